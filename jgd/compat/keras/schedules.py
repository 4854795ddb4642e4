"""The learning rate schedules of Keras 3: its classes in snake case, its arguments and defaults.

    import jgd.compat.keras as jk       # the name `keras` would hide Keras itself
    jk.sgd(jk.cosine_decay_restarts(0.1, first_decay_steps=50, t_mul=1.5, m_mul=0.9))

k is the step, 0 at the first update. `name` is accepted and ignored, so that the configuration of a
Keras schedule is a valid call: `jk.exponential_decay(**schedule.get_config())`. There are two
intended differences. Keras computes in the type of the initial rate, in integers for an integer
(`ExponentialDecay(1, 100, 0.96)` is 0 at step 50); jgd computes in floats. Under `jit` some stairs
and restarts of Keras come one step late; those of jgd come at the exact multiples.
"""

from typing import Any

import jax
import jax.numpy as jnp
from optax import Schedule

from jgd.arguments import Boundaries, Count, NonNegative, Number, Numbers, Positive
from jgd.pytree import as_pytree
from jgd.ramps import as_float, as_vector, floor_ratio, ramp, safe_power, safe_ratio
from jgd.schedules import (
    cosine_decay_schedule,
    join_schedules,
    linear_schedule,
    polynomial_schedule,
)
from jgd.schedules import inverse_time_decay as _inverse_time_decay

__all__ = [
    "cosine_decay",
    "cosine_decay_restarts",
    "exponential_decay",
    "inverse_time_decay",
    "piecewise_constant_decay",
    "polynomial_decay",
]


@as_pytree
def exponential_decay(
    initial_learning_rate: Number,
    decay_steps: Positive,
    decay_rate: NonNegative,
    staircase: bool = False,
    *,
    name: str | None = None,
) -> Schedule:
    """Exponential decay: initial_learning_rate decay_rate^(k / decay_steps).

    Args:
      initial_learning_rate: the value at step 0.
      decay_steps: above 0, the number of steps in which the value is multiplied by decay_rate once.
      decay_rate: at least 0; with 0 the value is 0 after step 0.
      staircase: True floors the exponent, so that the value changes at multiples of `decay_steps`.
      name: ignored.

    Differs from: `jgd.exponential_decay`, which also has a first step and a bound.
    """
    exponent = floor_ratio if staircase else safe_ratio
    return lambda step: (
        initial_learning_rate * safe_power(decay_rate, exponent(as_float(step), decay_steps))
    )


@as_pytree
def piecewise_constant_decay(
    boundaries: Boundaries, values: Numbers, *, name: str | None = None
) -> Schedule:
    """Piecewise constant: values[i], where i is the number of boundaries below k.

    At a boundary the value is still the one before it. After the last boundary it is values[-1].

    Args:
      boundaries: n steps in rising order, a sequence or an array.
      values: n + 1 values.
      name: ignored.

    Raises: ValueError if there are not n + 1 values for n boundaries.
    Differs from: `jgd.piecewise_constant` and PyTorch, which have the next value at a boundary.
    """
    edges, levels = as_vector(boundaries), as_vector(values)
    if levels.shape != (edges.size + 1,):
        raise ValueError(
            f"piecewise_constant_decay: values must have length {edges.size + 1} for {edges.size}"
            f" boundaries, got length {levels.size}"
        )
    return lambda step: levels[jnp.searchsorted(edges, as_float(step), side="left")]


@as_pytree
def polynomial_decay(
    initial_learning_rate: Number,
    decay_steps: Positive,
    end_learning_rate: Number = 0.0001,
    power: NonNegative = 1.0,
    cycle: bool = False,
    *,
    name: str | None = None,
) -> Schedule:
    """Polynomial decay from `initial_learning_rate` to `end_learning_rate` in `decay_steps` steps.

        value = end_learning_rate + (initial_learning_rate - end_learning_rate) (1 - k / T)^power

    T = decay_steps. From step T on the value is `end_learning_rate`.

    Args:
      initial_learning_rate, end_learning_rate: any numbers; the latter is 0.0001 by default.
      decay_steps: above 0, the length of the decay.
      power: at least 0; 1 (default) is linear.
      cycle: True makes T the least multiple of `decay_steps` that is at least k. The value is
        `end_learning_rate` at each multiple and jumps up after it, less high each time.
      name: ignored.
    """
    if not cycle:
        return polynomial_schedule(initial_learning_rate, end_learning_rate, power, decay_steps)
    of_fraction = polynomial_schedule(initial_learning_rate, end_learning_rate, power, 1.0)

    def value(step: Any) -> Any:
        now = as_float(step)
        cycles = jnp.maximum(-floor_ratio(-now, decay_steps), 1)  # ceil, and 1 at step 0
        return of_fraction(now / (decay_steps * cycles))

    return value


@as_pytree
def inverse_time_decay(
    initial_learning_rate: Number,
    decay_steps: Positive,
    decay_rate: NonNegative,
    staircase: bool = False,
    *,
    name: str | None = None,
) -> Schedule:
    """Inverse time decay: initial_learning_rate / (1 + decay_rate k / decay_steps).

    Args:
      initial_learning_rate: the value at step 0.
      decay_steps: above 0, the number of steps in which the denominator grows by `decay_rate`.
      decay_rate: at least 0.
      staircase: True floors k / decay_steps, so that the value changes at multiples of
        `decay_steps`.
      name: ignored.
    """
    return _inverse_time_decay(
        initial_learning_rate, decay_steps, decay_rate, staircase=bool(staircase)
    )


@as_pytree
def cosine_decay(
    initial_learning_rate: Number,
    decay_steps: Positive,
    alpha: Number = 0.0,
    warmup_target: Number | None = None,
    warmup_steps: Count = 0,
    *,
    name: str | None = None,
) -> Schedule:
    """Cosine decay: initial_learning_rate ((1 - alpha) (1 + cos(pi k / decay_steps)) / 2 + alpha).

    From `decay_steps` on the value is alpha initial_learning_rate. With a `warmup_target` the value
    first rises linearly to the target, at `warmup_steps`; then the cosine decays from the target,
    to alpha warmup_target at warmup_steps + decay_steps.

    Args:
      initial_learning_rate: the value at step 0.
      decay_steps: above 0, without the steps of the warmup.
      alpha: the final value as a fraction of the highest; 0 by default.
      warmup_target: the value at the end of the warmup; None (default): no warmup.
      warmup_steps: at least 0, the length of the warmup, ignored without a `warmup_target`; 0 by
        default.
      name: ignored.

    Differs from: Keras, whose cosine is float32; `jgd.warmup_cosine_decay_schedule`, whose
      decay_steps include the warmup.
    """
    if warmup_target is None:
        return cosine_decay_schedule(initial_learning_rate, decay_steps, alpha)
    rise = linear_schedule(initial_learning_rate, warmup_target, warmup_steps)
    decay = cosine_decay_schedule(warmup_target, decay_steps, alpha)
    return join_schedules([rise, decay], [warmup_steps])


@as_pytree
def cosine_decay_restarts(
    initial_learning_rate: Number,
    first_decay_steps: Positive,
    t_mul: Positive = 2.0,
    m_mul: NonNegative = 1.0,
    alpha: Number = 0.0,
    *,
    name: str | None = None,
) -> Schedule:
    """Cosine decay in cycles, each of which restarts at its full height.

        value = initial_learning_rate ((1 - alpha) m_mul^i (1 + cos(pi x)) / 2 + alpha)

    i counts the cycles from 0, and x goes from 0 to 1 within a cycle. Cycle i has
    first_decay_steps t_mul^i steps. The step after its last one is the first step of the next
    cycle.

    Args:
      initial_learning_rate: the value at step 0.
      first_decay_steps: above 0, the length of the first cycle.
      t_mul: above 0, the length of a cycle over that of the cycle before; 2 by default. Below 1 the
        cycles shrink, and from step first_decay_steps / (1 - t_mul) on the value is
        alpha initial_learning_rate (NaN in Keras).
      m_mul: at least 0, the height of a cycle over that of the cycle before; 1 by default.
      alpha: the lowest value as a fraction of initial_learning_rate; 0 by default.
      name: ignored.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983.
    """

    def value(step: Any) -> Any:
        cycle, x = _cycle(as_float(step), first_decay_steps, t_mul)
        # the half angle: near the end of a cycle 1 + cos(pi x) would be all rounding error
        height = safe_power(m_mul, cycle) * jnp.cos(jnp.pi / 2 * x) ** 2
        return initial_learning_rate * ((1 - alpha) * height + alpha)

    return value


def _cycle(now: jax.Array, first: Any, growth: Any) -> tuple[jax.Array, jax.Array]:
    """Return the number of the cycle that a step is in, and the fraction of it that has passed.

    Cycle i has first growth^i steps. It begins at first (growth^i - 1) / (growth - 1), a geometric
    sum, which is solved for i.
    """
    constant = growth == 1
    excess = jnp.where(constant, 1, growth - 1)
    log = jnp.log1p(excess)
    eps = jnp.finfo(now.dtype).eps
    solved = jnp.log1p(jnp.maximum(excess * now / first, eps - 1)) / log
    # at a restart, rounding of the logarithms may leave `solved` just below an integer
    cycle = jnp.where(constant, floor_ratio(now, first), jnp.floor(solved * (1 + 8 * eps)))
    begin = jnp.where(constant, cycle, jnp.expm1(cycle * log) / excess)
    return cycle, ramp(now, first * begin, first * growth**cycle)
