"""Schedules against optax, their docstrings and float64, traced and untraced."""

import inspect

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
    expected = np.array([theirs(int(step)) for step in STEPS])
    np.testing.assert_allclose([ours(int(s)) for s in STEPS], expected, rtol=2e-6, atol=2e-7)
    jitted = jax.jit(lambda schedule, step: schedule(step))
    np.testing.assert_allclose(
        [jitted(ours, s) for s in STEPS[::9]], expected[::9], rtol=2e-6, atol=2e-7
    )
    np.testing.assert_allclose(jax.vmap(ours)(STEPS), expected, rtol=2e-6, atol=2e-7)
    np.testing.assert_allclose(ours(STEPS), expected, rtol=2e-6, atol=2e-7)


def test_every_schedule_of_optax_is_here():
    """`join_schedules` and the injection of hyperparameters are no formulas of the step."""
    theirs = {
        name
        for name, value in vars(optax.schedules).items()
        if inspect.isfunction(value) and not name.startswith(("inject", "_"))
    }
    assert theirs <= set(jgd.schedules.__all__)


@pytest.mark.parametrize("length", [41, 47, 60])
def test_staircases_step_at_exact_multiples(length):
    """A division by a constant is compiled as a multiplication, which is a step late at some."""
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


def test_values_stated_in_the_docstrings():
    line = jgd.polynomial_schedule(1.0, 0.0, 1.0, 10, 5)
    np.testing.assert_allclose(line(np.array([0, 5, 10, 15, 99])), [1, 1, 0.5, 0, 0])
    steps = jgd.piecewise_constant([10, 20], [1.0, 0.1, 0.01])
    np.testing.assert_allclose(steps(np.array([0, 9, 10, 19, 20])), [1, 1, 0.1, 0.1, 0.01])
    inverse = jgd.inverse_time_decay(1.0, 10, 0.5)
    np.testing.assert_allclose(inverse(np.array([0, 10, 20])), [1, 1 / 1.5, 0.5], rtol=1e-6)
    transformer = jgd.inverse_sqrt_decay(1.0, 4)
    np.testing.assert_allclose(transformer(np.array([0, 3, 15])), [0.25, 1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(jgd.inverse_sqrt_decay(1.0)(np.array([0, 3])), [1, 0.5], rtol=1e-6)
    stable = jgd.warmup_stable_decay_schedule(0.0, 1.0, 10, 20, 10, 0.2)
    np.testing.assert_allclose(
        stable(np.array([0, 5, 10, 30, 35, 40, 99])), [0, 0.5, 1, 1, 0.6, 0.2, 0.2], rtol=1e-6
    )
    joined = jgd.join_schedules([lambda s: s, lambda s: 100.0 + s], [3])
    np.testing.assert_allclose(joined(np.array([0, 2, 3, 5])), [0, 2, 100, 102])


def test_arrays_in_place_of_a_dict():
    boundaries, scales = jnp.array([30, 60]), jnp.array([0.1, 0.5])
    for build in (
        lambda pairs: jgd.piecewise_constant_schedule(1.0, pairs),
        lambda pairs: jgd.piecewise_interpolate_schedule("linear", 1.0, pairs),
    ):
        expected = build({30: 0.1, 60: 0.5})(STEPS)
        np.testing.assert_allclose(build((boundaries, scales))(STEPS), expected, rtol=1e-6)
        np.testing.assert_allclose(build(([30, 60], [0.1, 0.5]))(STEPS), expected, rtol=1e-6)
        lanes = jax.vmap(lambda b, build=build: build((b, scales)))(
            jnp.stack([boundaries, boundaries + 7])
        )
        together = jax.vmap(lambda schedule: schedule(STEPS))(lanes)
        np.testing.assert_allclose(together[0], expected, rtol=1e-6)
        np.testing.assert_allclose(
            together[1], build({37: 0.1, 67: 0.5})(STEPS), rtol=1e-6, atol=1e-7
        )


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"cosine_decay_schedule: decay_steps must be above 0"):
        jgd.cosine_decay_schedule(1.0, 0)
    with pytest.raises(ValueError, match="2 boundaries need 3 values, got 2"):
        jgd.piecewise_constant([1, 2], [1.0, 2.0])
    with pytest.raises(ValueError, match="boundaries must be in rising order"):
        jgd.piecewise_constant([20, 10], [1.0, 0.1, 0.01])
    with pytest.raises(ValueError, match="2 schedules need 1 boundaries, got 2"):
        jgd.join_schedules([jnp.sin, jnp.cos], [1, 2])
    with pytest.raises(ValueError, match="'linear' or 'cosine', got 'cubic'"):
        jgd.piecewise_interpolate_schedule("cubic", 1.0)
    with pytest.raises(ValueError, match="scales at least 0"):
        jgd.piecewise_constant_schedule(1.0, {10: -0.5})
    with pytest.raises(ValueError, match="decay_steps must be above 0, got 0"):
        jgd.warmup_cosine_decay_schedule(0.0, 1.0, 100, 100)
    with pytest.raises(ValueError, match="at least one cycle"):
        jgd.sgdr_schedule([])
    with pytest.raises(TypeError, match="a number of a schedule cannot be a schedule itself"):
        jgd.linear_schedule(jgd.constant_schedule(1.0), 0.0, 10)


def test_joined_functions_get_whole_steps():
    table = jnp.array([0.3, 0.2, 0.1])
    joined = jgd.join_schedules([lambda step: table[step], lambda step: 1.0], [3])
    np.testing.assert_allclose([joined(s) for s in range(5)], [0.3, 0.2, 0.1, 1.0, 1.0])
    np.testing.assert_allclose(jax.jit(joined)(1), 0.2)


def test_any_number_may_be_scheduled():
    """momentum by a schedule is the momentum of each step, counted from 0."""
    gradients = np.array([1.0, 2.0, -1.0, 0.5])
    decays = np.array([0.0, 0.5, 0.9, 0.2])
    tx = jgd.momentum(1.0, jgd.piecewise_constant([1, 2, 3], list(decays)))
    state, velocity = tx.init(jnp.float32(0)), 0.0
    for gradient, decay in zip(gradients, decays, strict=True):
        updates, state = jax.jit(tx.update)(jnp.float32(gradient), state)
        velocity = decay * velocity + gradient
        np.testing.assert_allclose(updates, -velocity, rtol=1e-6)
