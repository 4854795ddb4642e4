"""A row per optimizer: ours, the oracle, the peer and the numbers; every test takes all rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax
import oracles

import jgd


class Row(NamedTuple):
    label: str
    ours: Callable[..., Any]
    oracle: Callable[..., Any]
    peer: Callable[..., Any] | None  # None: optax has no such form
    arguments: dict[str, Any]


def _peer_momentum(learning_rate: float, momentum: float = 0.9) -> Any:
    return optax.sgd(learning_rate, momentum)


def _peer_nesterov(learning_rate: float, momentum: float = 0.9) -> Any:
    return optax.sgd(learning_rate, momentum, nesterov=True)


def _row(name: str, peer: Any = "optax", **arguments: Any) -> Row:
    shown = ", ".join(f"{k}={v}" for k, v in arguments.items() if k != "learning_rate")
    found = getattr(optax, name) if peer == "optax" else peer
    label = f"{name}({shown})"
    return Row(label, getattr(jgd, name), getattr(oracles, name), found, arguments)


ROWS = [
    _row("sgd", learning_rate=0.1),
    _row("sgd", learning_rate=0.1, momentum=0.8),
    _row("sgd", learning_rate=0.1, momentum=0.8, nesterov=True),
    _row("momentum", _peer_momentum, learning_rate=0.1),
    _row("nesterov", _peer_nesterov, learning_rate=0.1, momentum=0.95),
    _row("adagrad", learning_rate=0.1),
    _row("adagrad", learning_rate=0.1, initial_accumulator_value=0.0, eps=0.0),
    _row("rmsprop", learning_rate=0.01),
    _row("rmsprop", learning_rate=0.01, eps_in_sqrt=False, bias_correction=True),
    _row("rmsprop", learning_rate=0.01, centered=True, eps=1e-2),
    _row("rmsprop", learning_rate=0.01, momentum=0.9, initial_scale=1.0),
    _row("rmsprop", learning_rate=0.01, decay=0.99, momentum=0.9, nesterov=True, eps=1e-4),
    _row("adam", learning_rate=1e-3),
    _row("adam", learning_rate=1e-2, b1=0.5, b2=0.9, eps=1e-3, eps_root=1e-6, nesterov=True),
    _row("adamw", learning_rate=1e-3, weight_decay=0.1),
    _row("adamw", None, learning_rate=1e-3, weight_decay=1e-3, independent_decay=True),
    _row("nadam", learning_rate=1e-3),
    _row("amsgrad", learning_rate=1e-3),
    _row("amsgrad", learning_rate=1e-3, bias_correction_mu=False, bias_correction_nu=False),
    _row("adamax", learning_rate=1e-3),
]
LABELS = [row.label for row in ROWS]
SHAPES = {"scalar": (), "vector": (5,), "matrix": (6, 4), "cube": (3, 2, 4), "kernel": (2, 3, 4, 5)}


def parameters(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def noisy_gradients(steps: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Gradients over several orders of magnitude, with exact zeros among them."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        size = 10.0 ** rng.uniform(-3, 1)
        return size * rng.normal(size=shape) * (rng.uniform(size=shape) > 0.1)

    return [{name: draw(shape) for name, shape in SHAPES.items()} for _ in range(steps)]
