"""The learning rate schedules of Keras 3: its classes in snake case, its arguments and defaults.

    import jgd.compat.keras as jk       # not `keras`: the real one stays visible
    jk.sgd(jk.cosine_decay_restarts(0.1, first_decay_steps=50, t_mul=1.5, m_mul=0.9))

k is the step, 0 at the first update. `name` is taken, and ignored, so that `get_config()` of a
schedule of Keras is a call: `jk.exponential_decay(**schedule.get_config())`. Two differences are
meant: Keras computes in the type of the initial rate, so that an integer rate gives it integer
arithmetic (`ExponentialDecay(1, 100, 0.96)` is 0 at step 50), here a number is a float; and under
`jit` some of its stairs and restarts come a step late, here they come at the exact multiples.
"""

from typing import Any

import jax
import jax.numpy as jnp
from optax import Schedule

from jgd.arguments import Boundaries, Count, NonNegative, Number, Numbers, Positive
from jgd.pytree import as_pytree
from jgd.ramps import as_float, as_vector, ramp, safe_power, safe_ratio, whole_ratio
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
    """initial_learning_rate decay_rate^(k / decay_steps).

    Args:
      initial_learning_rate: the value at step 0.
      decay_steps: above 0, the steps in which the rate is multiplied once.
      decay_rate: at least 0; 0 leaves nothing after step 0.
      staircase: True floors the exponent; a multiple of `decay_steps` has the lower value already.
      name: ignored.

    Differs from: `jgd.exponential_decay`, which can begin late and stop at a bound.
    """
    exponent = whole_ratio if staircase else safe_ratio
    return lambda step: (
        initial_learning_rate * safe_power(decay_rate, exponent(as_float(step), decay_steps))
    )


@as_pytree
def piecewise_constant_decay(
    boundaries: Boundaries, values: Numbers, *, name: str | None = None
) -> Schedule:
    """values[i], for the number i of boundaries below k.

    values[0] up to and at boundaries[0]: at a boundary the old value still holds. After the last
    one values[-1] holds.

    Args:
      boundaries: n steps in rising order, a sequence or an array.
      values: n + 1 rates.
      name: ignored.

    Raises: ValueError if the lengths do not fit.
    Differs from: `jgd.piecewise_constant` and torch, which have the new value at a boundary.
    """
    edges, levels = as_vector(boundaries), as_vector(values)
    if levels.shape != (edges.size + 1,):
        raise ValueError(
            f"piecewise_constant_decay: values must be {edges.size + 1} for {edges.size}"
            f" boundaries, got {levels.size}"
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
    """end_learning_rate + (initial_learning_rate - end_learning_rate) (1 - k / T)^power.

    T = decay_steps: the initial rate at step 0, `end_learning_rate` from T on.

    Args:
      initial_learning_rate, end_learning_rate: any numbers.
      decay_steps: above 0.
      power: at least 0; 1 is linear.
      cycle: True stretches T to the next multiple of `decay_steps` that is not below k: the end
        rate at each multiple, and a jump up at the step after it, lower each time.
      name: ignored.
    """
    if not cycle:
        return polynomial_schedule(initial_learning_rate, end_learning_rate, power, decay_steps)
    of_fraction = polynomial_schedule(initial_learning_rate, end_learning_rate, power, 1.0)

    def value(step: Any) -> Any:
        now = as_float(step)
        cycles = jnp.maximum(-whole_ratio(-now, decay_steps), 1)  # ceil, and 1 at step 0
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
    """initial_learning_rate / (1 + decay_rate k / decay_steps).

    Args:
      initial_learning_rate: the value at step 0.
      decay_steps: above 0; after that many steps the denominator has grown by `decay_rate`.
      decay_rate: at least 0.
      staircase: True floors k / decay_steps; a multiple has the lower value already.
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
    """initial_learning_rate ((1 - alpha) (1 + cos(pi k / decay_steps)) / 2 + alpha).

    The initial rate at step 0, `alpha` times it from `decay_steps` on. With a `warmup_target`: a
    line from the initial rate to the target at `warmup_steps`, and the cosine of the target from
    there, `alpha` times the target from `warmup_steps + decay_steps` on.

    Args:
      initial_learning_rate: any number.
      decay_steps: above 0, without those of the warmup.
      alpha: the fraction that is left at the end.
      warmup_target: the rate at the end of the warmup; None (default): no warmup at all.
      warmup_steps: at least 0; without a `warmup_target` they are ignored.
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
    """initial_learning_rate ((1 - alpha) m_mul^i (1 + cos(pi x)) / 2 + alpha).

    i counts the cycles from 0, x goes from 0 to 1 within one. Cycle i has first_decay_steps t_mul^i
    steps; the step at which it would end is the first of the next, at full height. `alpha` is not
    scaled by `m_mul`.

    Args:
      initial_learning_rate: the value at step 0.
      first_decay_steps: above 0.
      t_mul: above 0, each cycle's length over the last one's. 1: all alike. Below 1 they shrink,
        and after first_decay_steps / (1 - t_mul) only `alpha` is left (NaN in Keras).
      m_mul: at least 0, each cycle's height over the last one's.
      alpha: the fraction that is left at the end of each.
      name: ignored.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983.
    """

    def value(step: Any) -> Any:
        cycle, x = _cycle(as_float(step), first_decay_steps, t_mul)
        # the half angle is exact near the end of a cycle, where 1 + cos is mere rounding
        height = safe_power(m_mul, cycle) * jnp.cos(jnp.pi / 2 * x) ** 2
        return initial_learning_rate * ((1 - alpha) * height + alpha)

    return value


def _cycle(now: jax.Array, first: Any, growth: Any) -> tuple[jax.Array, jax.Array]:
    """Which cycle a step is in, and how much of it has passed; cycle i has first growth^i steps.

    It begins at the geometric sum first (growth^i - 1) / (growth - 1), which is solved for i.
    """
    even = growth == 1
    more = jnp.where(even, 1, growth - 1)
    log = jnp.log1p(more)
    small = jnp.finfo(now.dtype).eps
    solved = jnp.log1p(jnp.maximum(more * now / first, small - 1)) / log
    # the logarithms may round to a hair below the restart that is meant
    cycle = jnp.where(even, whole_ratio(now, first), jnp.floor(solved * (1 + 8 * small)))
    begin = jnp.where(even, cycle, jnp.expm1(cycle * log) / more)
    return cycle, ramp(now, first * begin, first * growth**cycle)
