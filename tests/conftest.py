"""Shared helpers: float64 on demand, and one way to run a transformation over many gradients."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parent))


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
    return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x, dtype) for x in xs]), *trees)


def run(tx: Any, gradients: Any, params: Any) -> Any:
    """All updates of a transformation over stacked gradients, the parameters held fixed."""

    def step(state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, params)
        return state, updates

    return jax.jit(lambda gs: jax.lax.scan(step, tx.init(params), gs)[1])(gradients)
