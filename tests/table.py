"""One row for each case of an optimizer: jgd's factory, its oracle, its peer and its numbers."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import optax
import optax.contrib
import oracles

import jgd
import jgd.optimizers

SHAPES = {"scalar": (), "matrix": (6, 4), "kernel": (2, 3, 4, 5)}
# for rules that depend on the axes or on the whole tree
ALL_RANKS = {
    "scalar": (),
    "vector": (5,),
    "matrix": (6, 4),
    "cube": (3, 2, 4),
    "kernel": (2, 3, 4, 5),
}
# SOAP's bases are arbitrary for rank-deficient gradients, so all leaves have full rank
FULL_RANK = {"vector": (5,), "matrix": (4, 4), "cube": (3, 2, 4), "kernel": (2, 3, 4, 5)}


# For `jax.jit` where two programs must round in the same way: at level 0, XLA does not contract a
# product and a sum to one operation, as it does for users.
CONTRACTED = {"xla_backend_optimization_level": 1}

# Five steps of Newton and Schulz multiply a rounding by up to 3.4445^5 = 485. With jaxlib 0.7, Muon
# misses the tolerances of all other rows.
MUON = dict(peer32=3e-5, rounding=5e-6) if version("jaxlib").startswith("0.7.") else {}


class Row(NamedTuple):
    label: str
    ours: Callable[..., Any]
    oracle: Callable[..., Any]
    peer: Callable[..., Any] | None  # None: optax has no such rule, or a different one
    arguments: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    peer32: float = 2e-5  # tolerance relative to the peer in float32, then in float64
    peer64: float = 1e-9
    rounding: float = 2e-6  # tolerance between programs that compute in different orders
    contracted: bool = False  # compile as for users, since rounding errors grow

    @property
    def name(self) -> str:
        return self.ours.__name__

    @property
    def rate(self) -> str:
        """The name of the first argument, which tests vary."""
        return next(iter(self.arguments))

    @property
    def compiler_options(self) -> dict[str, int] | None:
        return CONTRACTED if self.contracted else None

    @property
    def whole_tree(self) -> bool:
        return getattr(self.oracle, "whole_tree", False)


def _optax(name: str) -> Any:
    return getattr(optax, name, None) or getattr(optax.contrib, name, None)


def _row(
    name: str,
    peer: Any = "optax",
    shapes: Any = SHAPES,
    peer32: float = 2e-5,
    peer64: float = 1e-9,
    rounding: float = 2e-6,
    contracted: bool = False,
    **arguments: Any,
) -> Row:
    first = next(iter(arguments))
    shown = ", ".join(f"{k}={v}" for k, v in arguments.items() if k != first)
    peer = _optax(name) if peer == "optax" else peer
    label = f"{name}({shown})"
    ours, oracle = getattr(jgd, name), getattr(oracles, name)
    limits = peer32, peer64, rounding
    return Row(label, ours, oracle, peer, arguments, shapes, *limits, contracted)


def _heavy_ball(learning_rate: float, momentum: float = 0.9) -> Any:
    return optax.sgd(learning_rate, momentum)


def _look_ahead(learning_rate: float, momentum: float = 0.9) -> Any:
    return optax.sgd(learning_rate, momentum, nesterov=True)


def _independent(learning_rate: float, weight_decay: float, **_: Any) -> Any:
    """Return AdamW with a decay that does not depend on the rate: in optax, an order of links."""
    return optax.chain(optax.adam(learning_rate), optax.add_decayed_weights(-weight_decay))


ROWS = [
    _row("sgd", learning_rate=0.1),
    _row("sgd", learning_rate=0.1, momentum=0.8),
    _row("sgd", learning_rate=0.1, momentum=0.8, nesterov=True),
    _row("momentum", _heavy_ball, learning_rate=0.1),
    _row("nesterov", _look_ahead, learning_rate=0.1, momentum=0.95),
    _row("noisy_sgd", learning_rate=0.1, eta=0.3),
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
    _row("adamw", _independent, learning_rate=1e-3, weight_decay=1e-3, independent_decay=True),
    _row("nadam", learning_rate=1e-3),
    _row("nadamw", learning_rate=1e-3, weight_decay=0.1),
    _row("amsgrad", learning_rate=1e-3),
    _row("amsgrad", learning_rate=1e-3, bias_correction_mu=False, bias_correction_nu=False),
    _row("adamax", learning_rate=1e-3),
    _row("adamaxw", learning_rate=1e-3, weight_decay=0.1),
    _row("radam", peer32=1e-2, learning_rate=1e-3),  # optax is 6e-3 from the paper at step 7
    _row("radam", learning_rate=1e-3, b2=0.9, threshold=4.5, nesterov=True),
    _row("adabelief", learning_rate=1e-3),
    _row("adabelief", learning_rate=1e-3, b2=0.99, eps_root=1e-6, nesterov=True),
    _row("yogi", learning_rate=1e-3),
    _row("adan", None, learning_rate=1e-3, weight_decay=0.1),
    _row("ademamix", learning_rate=1e-3, b3=0.99, weight_decay=0.1),
    _row("laprop", None, learning_rate=1e-3, eps=1e-8, weight_decay=0.1),
    _row("adopt", peer32=1e-4, learning_rate=1e-3),  # 1 - 0.9999 is 1.7e-4 off in optax's float32
    _row("adopt", learning_rate=1e-3, b2=0.9, nesterov=True, use_clipping=False),
    _row("adadelta", learning_rate=0.5, weight_decay=0.01),
    _row("adadelta", None, eps=1e-4, rho=0.95),
    _row("sign_sgd", learning_rate=0.01),
    _row("signum", learning_rate=0.01, beta=0.8),
    _row("lion", learning_rate=0.01, weight_decay=0.1),
    _row("rprop", None, learning_rate=0.01),
    _row("novograd", learning_rate=0.01, weight_decay=0.01),
    _row("lars", learning_rate=0.1, weight_decay=0.01, nesterov=True),
    _row("lamb", learning_rate=0.01, weight_decay=0.1),
    _row("fromage", learning_rate=0.01),
    _row("sm3", None, ALL_RANKS, learning_rate=0.1),
    _row("sm3", shapes={k: v for k, v in ALL_RANKS.items() if v}, learning_rate=0.1, momentum=0.5),
    # optax computes 1 - t^-decay_rate in float32 for every dtype
    _row(
        "adafactor",
        shapes=ALL_RANKS,
        peer64=1e-5,
        learning_rate=0.01,
        min_dim_size_to_factor=3,
    ),
    _row(
        "adafactor",
        shapes=ALL_RANKS,
        peer64=1e-5,
        learning_rate=0.01,
        min_dim_size_to_factor=2,
        decay_rate=0.6,
        momentum=0.9,
        dtype_momentum=np.float64,
        weight_decay_rate=1e-3,
        clipping_threshold=None,
    ),
    _row("muon", shapes=ALL_RANKS, **MUON, learning_rate=0.01),
    _row(
        "muon",
        shapes=ALL_RANKS,
        **MUON,
        learning_rate=0.01,
        beta=0.9,
        weight_decay=0.1,
        nesterov=False,
        adaptive=True,
        consistent_rms=0.2,
        adam_learning_rate=1e-3,
    ),
    _row("shampoo", None, ALL_RANKS, learning_rate=0.1, eps=1e-2, momentum=0.9),
    _row("soap", None, FULL_RANK, learning_rate=0.01, precondition_frequency=3),
    _row("ftrl", None, learning_rate=0.1),
    _row(
        "ftrl",
        None,
        rounding=1e-4,  # the step is a difference of parameters
        learning_rate=0.1,
        learning_rate_power=-0.7,
        l1=0.01,
        l2=0.02,
        l2_shrinkage=0.03,
        beta=0.5,
    ),
    # optax takes the root of an int32 count in float32
    _row("madgrad", peer32=4e-5, peer64=1e-7, learning_rate=0.01, weight_decay=0.01),
    _row("polyak_sgd", max_learning_rate=1.0, f_min=-0.5),
    _row("polyak_sgd", max_learning_rate=1.0, scaling=0.5, eps=0.1, variant="sps+"),
    _row("dog", shapes=ALL_RANKS, learning_rate=1.0, weight_decay=0.01),
    _row("dog", shapes=ALL_RANKS, learning_rate=0.5, init_step=("learning_rate", 0.01)),
    _row("dowg", shapes=ALL_RANKS, learning_rate=1.0, init_estim_sq_dist=1e-3),
    _row("dadapt_adamw", shapes=ALL_RANKS, learning_rate=1.0, weight_decay=0.01),
    # the estimate depends on p0 - p, which is 1e-6 at first: both are then 3e-2 from the paper
    _row(
        "prodigy",
        shapes=ALL_RANKS,
        peer32=1e-3,
        contracted=True,
        learning_rate=1.0,
        weight_decay=0.01,
    ),
    _row(
        "prodigy",
        shapes=ALL_RANKS,
        learning_rate=0.5,
        beta3=0.9,
        estim_lr_coef=2.0,
        safeguard_warmup=True,
    ),
    # optax divides differences of parameters by b1; its warm-up is float32
    _row("schedule_free_sgd", shapes=ALL_RANKS, peer32=2e-4, learning_rate=0.1, weight_decay=0.01),
    _row(
        "schedule_free_adamw",
        shapes=ALL_RANKS,
        contracted=True,
        peer32=1e-3,
        peer64=2e-7,
        learning_rate=0.01,
        warmup_steps=10,
        weight_decay=0.01,
    ),
]
LABELS = [row.label for row in ROWS]
FIRST = list({row.name: row for row in reversed(ROWS)}.values())[
    ::-1
]  # the first row of each optimizer


def own_optimizers() -> list[str]:
    """Return the names of the public optimizers whose math is jgd's."""
    families = [f for f in jgd.optimizers.families if f is not jgd.optimizers.lifted]
    names = [name for family in families for name in family.__all__]
    return [name for name in names if not name.startswith("scale_by_")]


def parameters(shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def noisy_gradients(
    steps: int, shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 1
) -> list[dict[str, np.ndarray]]:
    """Return gradients over several orders of magnitude, some of them exactly zero."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        size = 10.0 ** rng.uniform(-3, 1)
        return size * rng.normal(size=shape) * (rng.uniform(size=shape) > 0.1)

    return [{name: draw(shape) for name, shape in shapes.items()} for _ in range(steps)]


def losses(steps: int, seed: int = 2) -> np.ndarray:
    """Return a falling, noisy loss, for the rules that use its value."""
    noise = np.random.default_rng(seed).uniform(0.5, 1.5, size=steps)
    return np.exp(-np.arange(steps) / steps) * noise


def oracle_updates(
    row: Row, gradients: list[dict[str, np.ndarray]], params: dict[str, np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """Return the updates of the oracle, each added to the parameters before the next one."""
    updates = []
    values = losses(len(gradients)) if getattr(row.oracle, "needs_value", False) else None
    rules = {name: row.oracle(**row.arguments) for name in ([""] if row.whole_tree else params)}
    for index, gradient in enumerate(gradients):
        more = () if values is None else (values[index],)
        if row.whole_tree:
            update = rules[""](gradient, params, *more)
        else:
            update = {name: rules[name](gradient[name], params[name]) for name in params}
        params = {name: params[name] + update[name] for name in params}
        updates.append(update)
    return updates
