"""The basic transformations equal NumPy formulas over three steps in float64; their states."""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import run

import jgd
import jgd.norms
import jgd.transforms
from jgd.arithmetic import average, complement, weights
from jgd.pytree import ScheduledState
from jgd.rules import DifferenceState, difference
from jgd.transforms import (
    BiasCorrectionState,
    MovingAverageState,
    RunningMaxState,
    RunningSumState,
)

SHAPES = {"kernel": (2, 3, 4), "matrix": (3, 2), "vector": (4,), "scalar": (), "zero": (3,)}
STEPS = 3


def _params(dtype=np.float64):
    rng = np.random.default_rng(0)
    draw = lambda name, shape: rng.normal(size=shape) * (name != "zero")
    return {name: np.asarray(draw(name, shape), dtype) for name, shape in SHAPES.items()}


def _gradients():
    """Return gradients with some exact zeros; all of "vector" are 0 in the second step."""
    rng = np.random.default_rng(1)
    draw = lambda shape: rng.normal(size=(STEPS, *shape)) * (rng.uniform(size=shape) > 0.2)
    gradients = {name: draw(shape) for name, shape in SHAPES.items()}
    gradients["vector"][1] = 0
    return gradients


class Rule(NamedTuple):
    """A transformation, its formula on one leaf, and its state."""

    tx: Any
    formula: Callable[..., Any]  # (g, p, m, t) -> (u, new m), with t from 1
    state: Callable[[Any], Any] = lambda tree: optax.EmptyState()  # zeros like params -> state
    start: float = 0.0  # m before the first step


def _pointwise(f):
    return lambda g, p, m, t: (f(g), m)


def _accumulator(f):
    """Return the formula of a transformation whose update is its accumulator."""

    def formula(g, p, m, t):
        new = f(g, m)
        return new, new

    return formula


def _norm(x):
    return np.sqrt(np.sum(x**2))


def _trust(min_norm=0.0, coefficient=1.0, eps=0.0):
    def formula(g, p, m, t):
        size, length = max(_norm(p), min_norm), max(_norm(g), min_norm)
        unscaled = size == 0 or length == 0
        return g * (1 if unscaled else coefficient * size / (length + eps)), m

    return formula


def _centred(g, axis=0):
    if g.ndim < 2:
        return g
    return g - g.mean(tuple(a for a in range(g.ndim) if a != axis % g.ndim), keepdims=True)


def _ema(b):
    def formula(g, p, m, t):
        new = b * m + (1 - b) * g
        return new / (1 - b**t), new

    return formula


def _nesterov_ema(g, p, m, t, b=0.9):
    new = b * m + (1 - b) * g
    return b * new / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t), new


def _rms(g, p, m, t, b=0.9, eps=0.1, eps_root=0.2):
    new = b * m + (1 - b) * g**2
    return np.sqrt(new / (1 - b**t) + eps_root) + eps, new


def _look_ahead(g, p, m, t, b=0.9):
    return g + b * (b * m + g), b * m + g


def _state_of_ema(tree):
    return optax.EmaState(jnp.int32(0), tree)


def _full(value):
    return lambda tree: jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def _start_at(record, value):
    return lambda tree: record(_full(value)(tree))


count = lambda tree: BiasCorrectionState(jnp.int32(0))
line = lambda step: 0.5 + 0.25 * step
mask = {name: name in ("matrix", "scalar") for name in SHAPES}
masked = lambda tree: optax.MaskedState(optax.EmptyState())

RULES = {
    "identity": Rule(jgd.identity(), _pointwise(lambda g: g)),
    "set_to_zero": Rule(jgd.set_to_zero(), _pointwise(lambda g: 0 * g)),
    "square": Rule(jgd.square(), _pointwise(lambda g: g**2)),
    "sign": Rule(jgd.sign(), _pointwise(np.sign)),
    "scale_by_sign": Rule(jgd.scale_by_sign(), _pointwise(np.sign)),
    "root": Rule(
        jgd.chain(jgd.square(), jgd.root(0.3, 0.4)),
        _pointwise(lambda g: np.sqrt(g**2 + 0.4) + 0.3),
        lambda tree: (optax.EmptyState(), optax.EmptyState()),
    ),
    "scale": Rule(jgd.scale(-2.5), _pointwise(lambda g: -2.5 * g)),
    "scale_by_schedule": Rule(
        jgd.scale_by_schedule(line),
        lambda g, p, m, t: (line(t - 1) * g, m),
        lambda tree: ScheduledState(jnp.int32(0), optax.EmptyState()),
    ),
    "scale_by_learning_rate": Rule(jgd.scale_by_learning_rate(0.3), _pointwise(lambda g: -0.3 * g)),
    "scale_by_learning_rate up": Rule(
        jgd.scale_by_learning_rate(0.3, flip_sign=False), _pointwise(lambda g: 0.3 * g)
    ),
    "scale_by_learning_rate None": Rule(jgd.scale_by_learning_rate(None), _pointwise(lambda g: g)),
    "add_decayed_weights": Rule(jgd.add_decayed_weights(0.3), lambda g, p, m, t: (g + 0.3 * p, m)),
    "scale_by_momentum": Rule(
        jgd.scale_by_momentum(0.9), _accumulator(lambda g, m: 0.9 * m + g), optax.TraceState
    ),
    "trace": Rule(jgd.trace(0.9), _accumulator(lambda g, m: 0.9 * m + g), optax.TraceState),
    "trace nesterov": Rule(jgd.trace(0.9, True), _look_ahead, optax.TraceState),
    "with_nesterov": Rule(
        jgd.with_nesterov(jgd.scale_by_momentum(0.9)), _look_ahead, optax.TraceState
    ),
    "moving_average": Rule(
        jgd.moving_average(0.9, 2.0),
        _accumulator(lambda g, m: 0.9 * m + 0.1 * g),
        _start_at(MovingAverageState, 2.0),
        start=2.0,
    ),
    "running_sum": Rule(
        jgd.running_sum(0.5),
        _accumulator(lambda g, m: m + g),
        _start_at(RunningSumState, 0.5),
        start=0.5,
    ),
    "running_max": Rule(
        jgd.running_max(), _accumulator(lambda g, m: np.maximum(m, g)), RunningMaxState
    ),
    "decayed_max": Rule(
        jgd.decayed_max(0.6, 0.1),
        _accumulator(lambda g, m: np.maximum(0.6 * m, np.abs(g) + 0.1)),
        RunningMaxState,
    ),
    "bias_correction": Rule(
        jgd.bias_correction(0.75), lambda g, p, m, t: (g / (1 - 0.75**t), m), count
    ),
    "bias_correction ahead": Rule(
        jgd.bias_correction(0.75, ahead=True),
        lambda g, p, m, t: (g / (1 - 0.75 ** (t + 1)), m),
        count,
    ),
    "ema": Rule(jgd.ema(0.9), _ema(0.9), _state_of_ema),
    "ema debias=False": Rule(
        jgd.ema(0.9, False), _accumulator(lambda g, m: 0.9 * m + 0.1 * g), _state_of_ema
    ),
    "nesterov_ema": Rule(jgd.nesterov_ema(0.9), _nesterov_ema, _state_of_ema),
    "rms": Rule(
        jgd.rms(0.9, 0.1, 0.2),
        _rms,
        lambda tree: (optax.EmptyState(), _state_of_ema(tree), optax.EmptyState()),
    ),
    "difference": Rule(
        difference(),
        lambda g, p, m, t: (g - m if t > 1 else 0 * g, g),
        lambda tree: DifferenceState(jnp.int32(0), tree),
    ),
    "centralize": Rule(jgd.centralize(), _pointwise(_centred)),
    "scale_by_trust_ratio": Rule(jgd.scale_by_trust_ratio(), _trust()),
    "scale_by_trust_ratio numbers": Rule(
        jgd.scale_by_trust_ratio(2.0, 0.5, 0.25), _trust(2.0, 0.5, 0.25)
    ),
    "scale_by_param_block_norm": Rule(
        jgd.scale_by_param_block_norm(0.5), lambda g, p, m, t: (g * max(_norm(p), 0.5), m)
    ),
    "scale_by_param_block_rms": Rule(
        jgd.scale_by_param_block_rms(0.5),
        lambda g, p, m, t: (g * max(np.sqrt(np.mean(p**2)), 0.5), m),
    ),
    "add": Rule(
        jgd.add(jgd.ema(0.9), jgd.sign()),
        lambda g, p, m, t: ((u := _ema(0.9)(g, p, m, t))[0] + np.sign(g), u[1]),
        lambda tree: (_state_of_ema(tree), optax.EmptyState()),
    ),
    "subtract": Rule(
        jgd.subtract(jgd.ema(0.9), jgd.sign()),
        lambda g, p, m, t: ((u := _ema(0.9)(g, p, m, t))[0] - np.sign(g), u[1]),
        lambda tree: (_state_of_ema(tree), optax.EmptyState()),
    ),
    "divide": Rule(
        jgd.divide(jgd.ema(0.9), jgd.sign()),
        lambda g, p, m, t: ((u := _ema(0.9)(g, p, m, t))[0] * np.sign(g), u[1]),
        lambda tree: (_state_of_ema(tree), optax.EmptyState()),
    ),
}
RANDOM = {"add_noise"}  # has its own test


def test_every_transformation_has_a_formula():
    public = {*jgd.transforms.__all__, *jgd.norms.__all__}
    assert public <= RANDOM | {label.split()[0] for label in RULES}


def _all_updates(txs, gradients, params):
    """Return three updates of each transformation at fixed parameters, in one program."""

    @jax.jit
    def go(txs, gradients):
        def step(states, gradient):
            both = {n: tx.update(gradient, states[n], params) for n, tx in txs.items()}
            return {n: s for n, (_, s) in both.items()}, {n: u for n, (u, _) in both.items()}

        return jax.lax.scan(step, {n: tx.init(params) for n, tx in txs.items()}, gradients)[1]

    return go(txs, gradients)


def test_updates_are_the_formulas(float64):
    params, gradients = _params(), _gradients()
    ours = _all_updates({n: rule.tx for n, rule in RULES.items()}, gradients, params)
    for name, rule in RULES.items():
        expected = {}
        for leaf, p in params.items():
            accumulator, steps = np.full_like(p, rule.start), []
            for t in range(1, STEPS + 1):
                u, accumulator = rule.formula(gradients[leaf][t - 1], p, accumulator, t)
                steps.append(u)
            expected[leaf] = np.stack(steps)
        chex.assert_trees_all_close({name: ours[name]}, {name: expected}, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_have_the_shapes_and_dtypes_of_the_docstrings(dtype):
    """Accumulators of 16-bit parameters are float32; updates keep the dtype of the gradients."""
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), _params())
    like = jax.tree.map(lambda p: jnp.zeros(p.shape), params)
    for name, rule in RULES.items():
        state = rule.tx.init(params)
        expected = rule.state(like)
        chex.assert_trees_all_equal_structs({name: state}, {name: expected})
        chex.assert_trees_all_equal({name: state}, {name: expected}, strict=True)
        updates, after = jax.eval_shape(rule.tx.update, params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("accumulator", [None, "float32", "bfloat16", "float16"])
def test_the_dtype_of_an_accumulator(accumulator):
    params = {"wide": jnp.ones(2), "narrow": jnp.ones(3, jnp.bfloat16)}
    for tx in (
        jgd.scale_by_momentum(0.9, accumulator_dtype=accumulator),
        jgd.trace(0.9, True, accumulator),
        jgd.moving_average(0.9, accumulator_dtype=accumulator),
        jgd.ema(0.9, True, accumulator),
        jgd.nesterov_ema(0.9, accumulator_dtype=accumulator),
    ):
        updates, state = jax.eval_shape(tx.update, params, tx.init(params))
        average = state[-1]
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_type(list(average.values()), jnp.dtype(accumulator or "float32"))
        chex.assert_shape([average["wide"], average["narrow"]], [(2,), (3,)])


def test_centralize_with_an_output_axis(float64):
    """The mean is over all axes but `output_axis`, which is the last one in flax's layout."""
    gradient = {k: v for k, v in _gradients().items() if k in ("kernel", "matrix")}
    params = {name: _params()[name] for name in gradient}
    for axis in (-1, 1):
        ours = run(jgd.centralize(output_axis=axis), gradient, params)
        expected = {k: np.stack([_centred(g, axis) for g in v]) for k, v in gradient.items()}
        chex.assert_trees_all_close(ours, expected, rtol=1e-12, atol=1e-15)


def test_add_decayed_weights_of_marked_leaves(float64):
    params, gradients = _params(), _gradients()
    expected = {k: g + 0.3 * mask[k] * params[k] for k, g in gradients.items()}
    for given in (mask, lambda p: mask):
        tx = jgd.add_decayed_weights(0.3, given)
        chex.assert_trees_all_equal_structs(tx.init(params), masked(params))
        ours = _all_updates({"": tx}, gradients, params)[""]
        chex.assert_trees_all_close(ours, expected, rtol=1e-12)


def test_the_variance_of_add_noise_decays_with_the_step(float64):
    """The variance is eta / t^gamma, and the noise of a seed is the same as in optax."""
    params, zeros = np.zeros(20_000), np.zeros((STEPS, 20_000))
    standard = run(jgd.add_noise(1.0, 0.0, 3), zeros, params)
    falling = run(jgd.add_noise(0.3, 0.55, 3), zeros, params)
    t = np.arange(1.0, STEPS + 1)[:, None]
    chex.assert_trees_all_close(falling, np.sqrt(0.3 / t**0.55) * standard, rtol=1e-12)
    chex.assert_trees_all_close(standard, run(optax.add_noise(1.0, 0.0, 3), zeros, params))
    error = 4 / np.sqrt(zeros.size)  # four standard errors
    chex.assert_trees_all_close(standard.mean(), jnp.zeros([]), atol=error)
    chex.assert_trees_all_close((standard**2).mean(), jnp.ones([]), rtol=0, atol=error * 2**0.5)
    assert not np.allclose(standard[0], standard[1])
    shifted = run(jgd.add_noise(1.0, 0.0, 3), zeros + 2.0, params)
    chex.assert_trees_all_close(shifted, standard + 2.0, rtol=1e-12, atol=1e-15)  # where it cancels
    state = jgd.add_noise(1.0, 0.0).init(params)
    chex.assert_type(state.count, jnp.int32)
    chex.assert_shape(state.count, ())


# --- decimals --------------------------------------------------------------------------------

DECIMALS = sorted(
    {round(i / 1000, 3) for i in range(1001)}
    | {round(1 - m * 10.0**-k, 6) for m in range(1, 10) for k in range(3, 7)}
    | {0.9975, 0.99975, 0.999985, 0.123456}
)


def test_the_complement_is_that_of_the_typed_decimal():
    """0.9999 in float32 has an error of 3e-8, which would be 1.7e-4 of 1 - 0.9999."""
    typed = np.array(DECIMALS)
    rounded = np.float32(typed)
    concrete = np.array([complement(decay) for decay in rounded])
    traced = jax.jit(jax.vmap(complement))(rounded)
    chex.assert_type([concrete, traced], np.float32)
    chex.assert_trees_all_close(concrete, np.asarray(traced), rtol=1.2e-7)
    np.testing.assert_allclose(concrete, 1 - typed, rtol=7e-7, atol=0)
    assert concrete[0] == 1
    assert concrete[-1] == 0
    np.testing.assert_array_equal(jax.vmap(jax.grad(complement))(rounded), -1)


def test_the_complement_of_other_numbers_is_exact():
    between = np.float32(0.9999) + np.float32([3, -3, 8]) * np.float32(2**-24)
    np.testing.assert_array_equal(jax.vmap(complement)(between), 1 - between)
    assert np.isnan(complement(np.float32(np.nan)))


def test_the_complement_is_exact_in_float64(float64):
    for decay in (0.9999, 0.99990001, 1 - 1e-9):
        exact = float(1 - Decimal(repr(decay)))
        assert complement(np.float64(decay)) == pytest.approx(exact, rel=1e-6)
        assert jax.jit(complement)(decay) == pytest.approx(exact, rel=1e-6)


def test_a_slow_average_is_that_of_the_typed_decimal():
    """0.9999 for 5,000 steps without bias correction, traced and known, over 64 series.

    The error of one series is that of its roundings; the bound is on the root mean square.
    """
    rng = np.random.default_rng(0)
    gradients = rng.uniform(0.5, 1.5, (5000, 64)).astype(np.float32)
    truth = (1e-4 * 0.9999 ** np.arange(5000)[::-1]) @ gradients

    def last(tx):
        step = lambda state, g: (tx.update(g, state)[1], None)
        return jax.tree.leaves(jax.lax.scan(step, tx.init(jnp.zeros(64)), gradients)[0])[-1]

    def error(average):
        return np.sqrt(np.mean((average / truth - 1) ** 2))

    assert error(jax.jit(last)(jgd.moving_average(0.9999))) < 1.5e-6
    assert error(jax.jit(lambda: last(jgd.moving_average(0.9999)))()) < 1.5e-6
    assert error(jax.jit(lambda: last(optax.ema(0.9999, debias=False)))()) > 1e-5


def test_the_weights_of_an_average_add_up_to_1():
    for decay in (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999, 1.0):
        for by in (weights(np.float32(decay)), jax.jit(weights)(decay)):
            total = sum(np.float64(weight) for weight in by)
            np.testing.assert_allclose(total, 1, rtol=0, atol=1e-6 * (1 - decay))
            assert min(by) >= 0
            np.testing.assert_array_equal(average(jnp.float32(2), jnp.float32(2), by), 2)
    assert average(jnp.float32(1), jnp.float32(np.inf), weights(np.float32(0.999))) == np.inf
    assert average(jnp.float32(1), jnp.float32(7), weights(np.float32(0))) == 1
