"""Shared helpers: float64 on demand, and one way to run a transformation over many gradients."""

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Most of the test time is compilation of small programs. These flags make compilation three times
# faster and programs slower. Subprocesses inherit them. `XLA_FLAGS= pytest` runs without them.
# XLA exits at an unknown flag, and jaxlib 0.11 has one of these flags less.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_prefer_vector_width=128 "
    + "--xla_cpu_use_fusion_emitters=false"
    * (tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)),
)
os.environ.setdefault(
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0"
)  # without tracebacks, lowering is faster

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from table import Row, losses

# Each run uses the same few examples, so that its duration and its results do not vary.
settings.register_profile(
    "few",
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("few")


def pytest_configure(config: pytest.Config) -> None:
    """Cache compiled programs between runs, since compilation takes most of the time."""
    if getattr(config, "cache", None) is not None:
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("programs")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# The longest tests, in this order, start first, so that no core waits for one of them at the end.
LONGEST = (
    "in_optax_place",
    ".ipynb",
    "default_job",
    "at_each_operation",
    "processes",
    "narrow_net",
)


# Slow tests with many cases: `pytest -m slow` runs one of every n cases (0: none).
# `TESTS=all pytest -m slow` runs all cases, as the weekly workflow does.
CASES_PER_SAMPLE = {
    "test_a_fault_at_each_operation_on_files": 0,  # a default test runs every 17th operation
    "test_an_extension_that_dies_is_resumed": 0,  # a default test runs every 41st operation
    "test_every_optimizer_on_an_explicit_and_an_auto_mesh": 0,  # a default test runs five of them
    "test_an_error_on_one_process_ends_all_with_one_line": 2,
    "test_derivatives_of_training_in_both_modes": 8,
    "test_equals_its_peer_in_float64": 3,
    "test_every_number_is_a_lane_and_differentiable": 4,
    "test_never_further_from_the_paper_than_optax_over_1000_steps": 3,
    "test_reaches_its_recorded_loss": 3,
}


def _in_sample(item: pytest.Item, counts: dict[str, int]) -> bool:
    name = item.name.partition("[")[0]
    if name not in CASES_PER_SAMPLE or item.get_closest_marker("slow") is None:
        return True
    counts[name] = counts.get(name, -1) + 1
    return CASES_PER_SAMPLE[name] > 0 and counts[name] % CASES_PER_SAMPLE[name] == 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark notebooks as slow, sort by duration, and run the tests of a row in one worker.

    Tests of a row share programs, so one worker compiles each program once.
    """
    for item in items:
        row = getattr(item, "callspec", None) and item.callspec.params.get("row")
        if isinstance(row, Row):
            item.add_marker(pytest.mark.xdist_group(row.label))
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.slow)
    if os.environ.get("TESTS") != "all":
        counts: dict[str, int] = {}
        sample = [_in_sample(item, counts) for item in items]
        left_out = [item for item, chosen in zip(items, sample, strict=True) if not chosen]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item, chosen in zip(items, sample, strict=True) if chosen]
    order = lambda item: next(i for i, name in enumerate((*LONGEST, "")) if name in item.nodeid)
    items.sort(key=order)


def release(package: str) -> tuple[int, ...]:
    """Return the first two numbers of the version of an installed package."""
    return tuple(map(int, version(package).split(".")[:2]))


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
    """Return all updates of a transformation over stacked gradients, applied one by one."""
    tx = optax.with_extra_args_support(tx)
    values = jnp.asarray(losses(len(jax.tree.leaves(gradients)[0])))

    def step(carry: Any, inputs: Any) -> Any:
        params, state = carry
        gradient, value = inputs
        updates, state = tx.update(gradient, state, params, value=value)
        return (optax.apply_updates(params, updates), state), updates

    def go(gradients: Any, params: Any) -> Any:
        return jax.lax.scan(step, (params, tx.init(params)), (gradients, values))[1]

    return jax.jit(go, compiler_options=compiler_options)(gradients, params)
