"""Schedules equal optax, their docstrings and float64 formulas, traced and untraced."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jgd
import jgd.schedules

STEPS = np.arange(140)
CYCLES = [
    dict(init_value=0.0, peak_value=1.0, warmup_steps=5, decay_steps=40),
    dict(init_value=0.1, peak_value=0.5, warmup_steps=5, decay_steps=60, end_value=0.1),
]
SHARED = [
    ("constant_schedule", (0.1,)),
    ("polynomial_schedule", (1.0, 0.1, 2, 50, 7)),
    ("polynomial_schedule", (1.0, 0.1, 0.5, 50, -3)),
    ("polynomial_schedule", (1.0, 0.1, 2, 0)),
    ("linear_schedule", (1.0, 0.1, 50, 5)),
    ("exponential_decay", (1.0, 41, 0.9)),
    ("exponential_decay", (1.0, 41, 0.9, 7, True, 0.8)),
    ("exponential_decay", (1.0, 47, 1.1, 0, True, 1.15)),
    ("exponential_decay", (1.0, 41, 0.0, 0, False, 0.5)),
    ("exponential_decay", (1.0, 0, 0.5)),
    ("cosine_decay_schedule", (1.0, 90, 0.1, 2.0)),
    ("cosine_decay_schedule", (1.0, 90)),
    ("piecewise_constant_schedule", (1.0, {60: 0.5, 30: 0.1})),
    ("piecewise_constant_schedule", (1.0,)),
    ("piecewise_interpolate_schedule", ("linear", 1.0, {30: 0.1, 60: 0.5})),
    ("piecewise_interpolate_schedule", ("cosine", 1.0, {30: 0.1, 60: 0.5})),
    ("piecewise_interpolate_schedule", ("cosine", 1.0)),
    ("linear_onecycle_schedule", (97, 1.0)),
    ("cosine_onecycle_schedule", (97, 1.0)),
    ("warmup_constant_schedule", (0.0, 1.0, 20)),
    ("warmup_cosine_decay_schedule", (0.0, 1.0, 20, 100, 0.1)),
    ("warmup_cosine_decay_schedule", (0.1, 1.0, 0, 100, 0.0, 2.0)),
    ("warmup_cosine_decay_schedule", (0.0, 0.0, 20, 100, 0.1)),
    ("warmup_exponential_decay_schedule", (0.0, 1.0, 20, 30, 0.5, 3, True, 0.1)),
    ("sgdr_schedule", (CYCLES,)),
]


@pytest.mark.parametrize(("name", "arguments"), SHARED)
def test_equals_optax(name, arguments):
    ours, theirs = getattr(jgd, name)(*arguments), getattr(optax, name)(*arguments)
    expected = np.array([theirs(int(step)) for step in STEPS], np.float32)
    jitted = jax.jit(lambda schedule, step: schedule(step))
    close = functools.partial(chex.assert_trees_all_close, rtol=2e-6, atol=2e-7)
    close(jnp.stack([ours(int(s)) for s in STEPS]), expected)
    close(jnp.stack([jitted(ours, s) for s in STEPS[::9]]), expected[::9])
    close(jax.vmap(ours)(STEPS), expected)
    close(ours(STEPS), expected)


def test_every_schedule_of_optax_is_here():
    """The functions that inject hyperparameters are not schedules."""
    theirs = {
        name
        for name, value in vars(optax.schedules).items()
        if inspect.isfunction(value) and not name.startswith(("inject", "_"))
    }
    assert theirs <= set(jgd.schedules.__all__)


@pytest.mark.parametrize("length", [41, 47, 60])
def test_staircases_step_at_exact_multiples(length):
    """XLA may compile a division as a multiplication, which rounds down at some multiples."""
    steps = np.arange(40 * length)
    for schedule in (
        jgd.exponential_decay(1.0, length, 0.9, staircase=True),
        jgd.inverse_time_decay(1.0, length, 0.5, staircase=True),
    ):
        for values in (
            schedule(steps),
            jax.jit(schedule)(steps),
            jax.jit(jax.vmap(schedule))(steps),
        ):
            changes = np.flatnonzero(np.diff(values)) + 1
            np.testing.assert_array_equal(changes, length * np.arange(1, 40))


def _values(schedule, *steps):
    return schedule(np.array(steps))


def test_values_stated_in_the_docstrings():
    single = lambda *numbers: np.array(numbers, np.float32)
    line = jgd.polynomial_schedule(1.0, 0.0, 1.0, 10, 5)
    decay = jgd.cosine_decay_schedule(1e-3, decay_steps=2000)
    steps = jgd.piecewise_constant([10, 20], [1.0, 0.1, 0.01])
    inverse = jgd.inverse_time_decay(1.0, 10, 0.5)
    transformer, at_once = jgd.inverse_sqrt_decay(1.0, 4), jgd.inverse_sqrt_decay(1.0)
    stable = jgd.warmup_stable_decay_schedule(0.0, 1.0, 10, 20, 10, 0.2)
    joined = jgd.join_schedules([lambda s: 1.0 * s, lambda s: 100.0 + s], [3])
    ours = {
        "polynomial": _values(line, 0, 5, 10, 15, 99),
        "cosine": _values(decay, 0, 1000),
        "piecewise": _values(steps, 0, 9, 10, 19, 20),
        "inverse": _values(inverse, 0, 10, 20),
        "transformer": _values(transformer, 0, 3, 15),
        "without warm-up": _values(at_once, 0, 3),
        "stable": _values(stable, 0, 5, 10, 30, 35, 40, 99),
        "joined": _values(joined, 0, 2, 3, 5),
    }
    expected = {
        "polynomial": single(1, 1, 0.5, 0, 0),
        "cosine": single(1e-3, 5e-4),
        "piecewise": single(1, 1, 0.1, 0.1, 0.01),
        "inverse": single(1, 1 / 1.5, 0.5),
        "transformer": single(0.25, 1, 0.5),
        "without warm-up": single(1, 0.5),
        "stable": single(0, 0.5, 1, 1, 0.6, 0.2, 0.2),
        "joined": single(0, 2, 100, 102),
    }
    chex.assert_trees_all_close(ours, expected, rtol=2e-7)


def _cosine(t, peak, length, end=0.0, exponent=1.0):
    x = np.minimum(t / length, 1)
    return peak * ((1 - end) * ((1 + np.cos(np.pi * x)) / 2) ** exponent + end)


def _warm(t, start, peak, length, after):
    """Return a ramp from `start` to `peak`, then `after`, whose steps count from the peak."""
    return np.where(
        t < length, start + (peak - start) * t / length, after(np.maximum(t - length, 0))
    )


def _restarts(t):
    first = _warm(t, 0.0, 1.0, 5, lambda s: _cosine(s, 1.0, 35))
    own = np.maximum(t - 40, 0)
    second = _warm(own, 0.1, 0.5, 5, lambda s: _cosine(s, 0.5, 55, 0.2))
    return np.where(t < 40, first, second)


def _wave(x):
    return (1 - np.cos(np.pi * x)) / 2


# the arguments of every schedule, and its formula of the step t in float64
FORMULAS = {
    "constant_schedule": ((0.3,), lambda t: 0.3 + 0 * t),
    "polynomial_schedule": (
        (1.0, 0.1, 3, 50, 7),
        lambda t: 0.1 + 0.9 * (1 - np.clip((t - 7) / 50, 0, 1)) ** 3,
    ),
    "linear_schedule": ((1.0, 0.1, 50, 5), lambda t: 1 - 0.9 * np.clip((t - 5) / 50, 0, 1)),
    "exponential_decay": (
        (1.0, 41, 0.9, 7, True, 0.8),
        lambda t: np.maximum(0.9 ** (np.maximum(t - 7, 0) // 41), 0.8),
    ),
    "inverse_time_decay": ((0.7, 9, 0.5), lambda t: 0.7 / (1 + 0.5 * t / 9)),
    "inverse_sqrt_decay": (
        (0.7, 16),
        lambda t: 0.7 * np.minimum((t + 1) / 16, np.sqrt(16 / (t + 1))),
    ),
    "cosine_decay_schedule": ((0.7, 90, 0.1, 2.0), lambda t: _cosine(t, 0.7, 90, 0.1, 2)),
    "piecewise_constant": (
        ([30, 60], [0.7, 0.2, 0.5]),
        lambda t: np.select([t < 30, t < 60], [0.7, 0.2], 0.5),
    ),
    "piecewise_constant_schedule": (
        (0.7, {60: 0.5, 30: 0.1}),
        lambda t: 0.7 * np.where(t >= 30, 0.1, 1) * np.where(t >= 60, 0.5, 1),
    ),
    "piecewise_interpolate_schedule": (
        ("linear", 0.7, {30: 0.1, 60: 0.5}),
        lambda t: np.interp(t, [0, 30, 60], [0.7, 0.07, 0.035]),
    ),
    "linear_onecycle_schedule": (
        (97, 0.7),
        lambda t: np.interp(t, [0, 29, 82, 97], [0.7 / 25, 0.7, 0.7 / 25, 0.7 / 25e4]),
    ),
    "cosine_onecycle_schedule": (
        (97, 0.7),
        lambda t: np.where(
            t < 29,
            0.7 / 25 + (0.7 - 0.7 / 25) * _wave(t / 29),
            0.7 + (0.7 / 25e4 - 0.7) * _wave(np.minimum((t - 29) / 68, 1)),
        ),
    ),
    "join_schedules": (
        ([lambda step: 2.0 + step, jgd.linear_schedule(1.0, 0.0, 20)], [30]),
        lambda t: np.where(t < 30, 2 + t, 1 - np.clip((t - 30) / 20, 0, 1)),
    ),
    "warmup_constant_schedule": (
        (0.1, 0.7, 20),
        lambda t: 0.1 + 0.6 * np.minimum(t / 20, 1),
    ),
    "warmup_cosine_decay_schedule": (
        (0.1, 0.7, 20, 100, 0.07, 2.0),
        lambda t: _warm(t, 0.1, 0.7, 20, lambda s: _cosine(s, 0.7, 80, 0.1, 2)),
    ),
    "warmup_exponential_decay_schedule": (
        (0.1, 0.7, 20, 30, 0.5, 3),
        lambda t: _warm(t, 0.1, 0.7, 20, lambda s: 0.7 * 0.5 ** (np.maximum(s - 3, 0) / 30)),
    ),
    "warmup_stable_decay_schedule": (
        (0.1, 0.7, 10, 20, 15, 0.2),
        lambda t: np.interp(t, [0, 10, 30, 45], [0.1, 0.7, 0.7, 0.2]),
    ),
    "sgdr_schedule": ((CYCLES,), _restarts),
}


def test_every_schedule_has_a_formula():
    assert set(FORMULAS) == set(jgd.schedules.__all__)


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_its_formula_in_float64(name, float64):
    arguments, formula = FORMULAS[name]
    ours = getattr(jgd, name)(*arguments)(STEPS)
    chex.assert_type(ours, jnp.float64)
    # atol: near pi, 1 + cos loses its digits.
    chex.assert_trees_all_close(ours, formula(STEPS.astype(float)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", FORMULAS)
def test_values_have_the_shape_of_the_steps(name):
    """Values are float32 for steps of any kind: integers, floats and arrays, traced or not."""
    schedule = getattr(jgd, name)(*FORMULAS[name][0])
    steps = STEPS.reshape(7, 20)
    scalars = [schedule(50), schedule(np.int64(50)), schedule(50.0), schedule(jnp.int32(50))]
    chex.assert_rank(scalars, 0)
    arrays = [schedule(STEPS), schedule(jnp.asarray(steps)), schedule(steps.astype(np.float32))]
    chex.assert_shape(arrays, [(140,), (7, 20), (7, 20)])
    chex.assert_type([*scalars, *arrays], jnp.float32)
    chex.assert_trees_all_equal(arrays[1].ravel(), arrays[2].ravel(), arrays[0])
    chex.assert_trees_all_equal(*scalars)
    chex.assert_trees_all_close(scalars[0], arrays[0][50], rtol=2e-7)
    for step, shape in ((jnp.int32(0), ()), (jnp.zeros((2, 3), jnp.int32), (2, 3))):
        traced = jax.eval_shape(schedule, step)
        chex.assert_shape(traced, shape)
        chex.assert_type(traced, jnp.float32)


def test_boundaries_and_scales_may_be_arrays():
    boundaries, scales = jnp.array([30, 60]), jnp.array([0.1, 0.5])
    for build in (
        lambda pairs: jgd.piecewise_constant_schedule(1.0, pairs),
        lambda pairs: jgd.piecewise_interpolate_schedule("linear", 1.0, pairs),
    ):
        expected = build({30: 0.1, 60: 0.5})(STEPS)
        chex.assert_shape(expected, STEPS.shape)
        forms = [build((boundaries, scales))(STEPS), build(([30, 60], [0.1, 0.5]))(STEPS)]
        chex.assert_trees_all_close(forms, [expected, expected], rtol=2e-7)
        lanes = jax.vmap(lambda b, build=build: build((b, scales)))(
            jnp.stack([boundaries, boundaries + 7])
        )
        together = jax.vmap(lambda schedule: schedule(STEPS))(lanes)
        both = jnp.stack([expected, build({37: 0.1, 67: 0.5})(STEPS)])
        chex.assert_trees_all_close(together, both, rtol=1e-6, atol=1e-7)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"cosine_decay_schedule: decay_steps must be above 0"):
        jgd.cosine_decay_schedule(1.0, 0)
    with pytest.raises(ValueError, match="values must have length 3 for 2 boundaries, got 2"):
        jgd.piecewise_constant([1, 2], [1.0, 2.0])
    with pytest.raises(ValueError, match="boundaries must be in rising order"):
        jgd.piecewise_constant([20, 10], [1.0, 0.1, 0.01])
    with pytest.raises(ValueError, match="boundaries must have length 1 for 2 schedules, got 2"):
        jgd.join_schedules([jnp.sin, jnp.cos], [1, 2])
    with pytest.raises(ValueError, match="'linear' or 'cosine', got 'cubic'"):
        jgd.piecewise_interpolate_schedule("cubic", 1.0)
    with pytest.raises(ValueError, match="scales at least 0"):
        jgd.piecewise_constant_schedule(1.0, {10: -0.5})
    with pytest.raises(ValueError, match="decay_steps must be above 0, got 0"):
        jgd.warmup_cosine_decay_schedule(0.0, 1.0, 100, 100)
    with pytest.raises(ValueError, match="at least one cycle"):
        jgd.sgdr_schedule([])
    with pytest.raises(TypeError, match="numbers of a schedule must be constant, got a schedule"):
        jgd.linear_schedule(jgd.constant_schedule(1.0), 0.0, 10)


def test_joined_functions_receive_integer_steps():
    table = jnp.array([0.3, 0.2, 0.1])
    joined = jgd.join_schedules([lambda step: table[step], lambda step: 1.0], [3])
    values = jnp.stack([joined(s) for s in range(5)])
    chex.assert_trees_all_equal(values, jnp.array([0.3, 0.2, 0.1, 1.0, 1.0]))
    chex.assert_trees_all_equal(jax.jit(joined)(1), jnp.float32(0.2))


def test_any_number_may_be_scheduled():
    """A scheduled momentum is evaluated at each step, from 0."""
    gradients = np.array([1.0, 2.0, -1.0, 0.5])
    decays = np.array([0.0, 0.5, 0.9, 0.2])
    tx = jgd.momentum(1.0, jgd.piecewise_constant([1, 2, 3], list(decays)))
    state, velocity = tx.init(jnp.float32(0)), 0.0
    for gradient, decay in zip(gradients, decays, strict=True):
        updates, state = jax.jit(tx.update)(jnp.float32(gradient), state)
        velocity = decay * velocity + gradient
        chex.assert_trees_all_close(updates, np.float32(-velocity), rtol=2e-7)
