"""Shared helpers: float64 on demand, and one way to run a transformation over many gradients."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Compilation of small programs takes most of the time of the tests. These flags make it three times
# faster and the programs slower. Subprocesses inherit them. `XLA_FLAGS= pytest` tests without them.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from table import LABELS, Row, losses


def pytest_configure(config: pytest.Config) -> None:
    """Most of the time is compilation, much of it of the same programs: keep them."""
    if getattr(config, "cache", None) is not None:
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("programs")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the notebooks as slow, and order the tests so that less is done twice.

    What takes minutes comes first, so that no core waits at the end. The tests of a row of the
    table come together, so that one worker runs them with the programs they share.
    """
    files = {item.path: place for place, item in reversed(list(enumerate(items)))}
    minutes = ("test_in_optax_place.py", "test_faults.py", "test_processes.py")

    def order(item: pytest.Item) -> tuple[bool, int, int]:
        row = getattr(item, "callspec", None) and item.callspec.params.get("row")
        late = item.path.suffix != ".ipynb" and item.path.name not in minutes
        return late, files[item.path], LABELS.index(row.label) if isinstance(row, Row) else -1

    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.slow)
    items.sort(key=order)


def cached_environment() -> dict[str, str]:
    """Return the environment for a subprocess that shares the compilation cache of the tests."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    values = {name.upper(): jax.config.values[name] for name in names}
    return os.environ | {name: str(x) for name, x in values.items() if x is not None}


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    before = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture
def float64() -> Iterator[None]:
    with _float64():
        yield


def stacked(trees: list[Any], dtype: Any) -> Any:
    return jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs), dtype), *trees)


def run(tx: Any, gradients: Any, params: Any, compiler_options: Any = None) -> Any:
    """All updates of a transformation over stacked gradients, each added to the parameters."""
    tx = optax.with_extra_args_support(tx)
    values = jnp.asarray(losses(len(jax.tree.leaves(gradients)[0])))

    def step(carry: Any, seen: Any) -> Any:
        params, state = carry
        gradient, value = seen
        updates, state = tx.update(gradient, state, params, value=value)
        return (optax.apply_updates(params, updates), state), updates

    def go(gradients: Any, params: Any) -> Any:
        return jax.lax.scan(step, (params, tx.init(params)), (gradients, values))[1]

    return jax.jit(go, compiler_options=compiler_options)(gradients, params)
