"""Schedules: functions of the step that are pytrees of their numbers.

    decay = cosine_decay_schedule(1e-3, decay_steps=2000)
    decay(0), decay(1000), decay(2000)          # 1e-3, 5e-4, 0
    adam(decay)                                 # any number of an optimizer may be a schedule
    jax.vmap(lambda peak, steps: adam(cosine_decay_schedule(peak, steps)))(peaks, steps)

Steps count from 0, which is the first update. A step may be an integer, a tracer or an array of
steps; the value is float32 (float64 under x64). Every number may be traced and swept, including
step counts and boundaries: no schedule branches on a number. Where optax has a schedule of the same
name, jgd's takes the same call and returns the same values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from optax import Schedule

from jgd.arguments import (
    Boundaries,
    BoundariesAndScales,
    Count,
    NonNegative,
    Number,
    Numbers,
    Positive,
)
from jgd.arithmetic import formula
from jgd.pytree import as_pytree
from jgd.ramps import as_float, as_vector, floor_ratio, ramp, safe_power, safe_ratio

__all__ = [
    "constant_schedule",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "exponential_decay",
    "inverse_sqrt_decay",
    "inverse_time_decay",
    "join_schedules",
    "linear_onecycle_schedule",
    "linear_schedule",
    "piecewise_constant",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polynomial_schedule",
    "sgdr_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
    "warmup_stable_decay_schedule",
]


def _boundaries_and_scales(function: str, pairs: Any) -> tuple[jax.Array, jax.Array]:
    """Return two arrays, from optax's dict or from a pair of sequences."""
    if pairs is None:
        pairs = {}
    if isinstance(pairs, dict):
        ordered = sorted(pairs)
        return as_vector([as_float(b) for b in ordered]), as_vector([pairs[b] for b in ordered])
    boundaries, scales = map(as_vector, pairs)
    if boundaries.shape != scales.shape:
        raise ValueError(
            f"{function}: boundaries_and_scales must have as many scales as boundaries, got"
            f" {boundaries.size} boundaries and {scales.size} scales"
        )
    return boundaries, scales


# --- single formulas -------------------------------------------------------------------------


@as_pytree
def constant_schedule(value: Number) -> Schedule:
    """Constant: the same value at every step.

    Args:
      value: any number.
    """
    return lambda step: jnp.broadcast_to(value, jnp.shape(step))


@as_pytree
def polynomial_schedule(
    init_value: Number,
    end_value: Number,
    power: NonNegative,
    transition_steps: Number,
    transition_begin: Number = 0,
) -> Schedule:
    """end_value + (init_value - end_value) (1 - x)^power, with x from 0 to 1.

    x = (step - transition_begin) / transition_steps, clipped to [0, 1]. The value is `init_value`
    up to `transition_begin`, and `end_value` from `transition_begin + transition_steps` on.

    Args:
      init_value, end_value: any numbers.
      power: at least 0; 1 is linear.
      transition_steps: length of the ramp; if 0 or less, the value is always `init_value`.
      transition_begin: the step at which the ramp starts; negative values are treated as 0.
    """

    return functools.partial(
        _polynomial, init_value, end_value, power, transition_steps, transition_begin
    )


@formula
def _polynomial(init: Any, end: Any, power: Any, length: Any, begin: Any, step: Any) -> Any:
    begin, step = jnp.maximum(begin, 0), as_float(step)
    passed = safe_ratio(step - begin, length)
    # The second half counts from the end, which is then exact: powers below 1 are steep at the end.
    left = safe_ratio(begin + length - step, length)
    rest = jnp.clip(jnp.where(passed < 0.5, 1 - passed, left), 0, 1)
    return end + (init - end) * safe_power(rest, power)


@as_pytree
def linear_schedule(
    init_value: Number, end_value: Number, transition_steps: Number, transition_begin: Number = 0
) -> Schedule:
    """Linear ramp from init_value to end_value: `polynomial_schedule` with power 1.

    Args: as in `polynomial_schedule`.
    """
    return polynomial_schedule(init_value, end_value, 1.0, transition_steps, transition_begin)


@as_pytree
def exponential_decay(
    init_value: Number,
    transition_steps: Number,
    decay_rate: NonNegative,
    transition_begin: Number = 0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> Schedule:
    """init_value decay_rate^((step - transition_begin) / transition_steps).

    Args:
      init_value: the value up to `transition_begin`.
      transition_steps: number of steps after which the value has been multiplied by `decay_rate`;
        if 0 or less, the value is always `init_value`.
      decay_rate: at least 0; if 0, the value is always `init_value`, as in optax.
      transition_begin: the step at which the decay starts; negative values are treated as 0.
      staircase: True floors the exponent, so that the value changes at multiples of
        `transition_steps`; at a multiple the new value applies.
      end_value: bound of the value, from below for rates below 1 and from above for larger rates.
        None (default): no bound.
    """

    def value(step: Any) -> Any:
        passed = jnp.maximum(as_float(step) - jnp.maximum(transition_begin, 0), 0)
        floor = floor_ratio if staircase else safe_ratio
        decays = decay_rate > 0
        rate = jnp.where(decays, decay_rate, 1)
        decayed = init_value * rate ** jnp.where(
            transition_steps > 0, floor(passed, transition_steps), 0
        )
        if end_value is None:
            return decayed
        bounded = jnp.where(
            rate < 1, jnp.maximum(decayed, end_value), jnp.minimum(decayed, end_value)
        )
        return jnp.where(decays & (transition_steps > 0), bounded, init_value)

    return value


@as_pytree
def inverse_time_decay(
    init_value: Number,
    transition_steps: Positive,
    decay_rate: NonNegative,
    *,
    staircase: bool = False,
) -> Schedule:
    """init_value / (1 + decay_rate step / transition_steps): decay as 1/t.

    Args:
      init_value: the value at step 0.
      transition_steps: above 0; number of steps in which the denominator grows by `decay_rate`.
      decay_rate: at least 0; 0 is constant.
      staircase: True floors step / transition_steps; at a multiple the new value applies.
    """
    floor = floor_ratio if staircase else safe_ratio
    return lambda step: init_value / (1 + decay_rate * floor(as_float(step), transition_steps))


@as_pytree
def inverse_sqrt_decay(peak_value: Number, warmup_steps: NonNegative = 1.0) -> Schedule:
    """peak_value min((step + 1) / w, sqrt(w / (step + 1))), for w = max(warmup_steps, 1).

    This is the schedule of the Transformer: a linear ramp to `peak_value` at step w - 1, then a
    decay as 1 / sqrt(step + 1).

    Args:
      peak_value: the highest value.
      warmup_steps: at least 0; 1 by default. Up to 1, there is no warmup, and the value at step 0
        is `peak_value`.

    Source: Vaswani et al. 2017, equation 3, with the peak d_model^-0.5 warmup_steps^-0.5.
    """

    def value(step: Any) -> Any:
        now, warmup = as_float(step) + 1, jnp.maximum(warmup_steps, 1)
        return peak_value * jnp.minimum(now / warmup, jnp.sqrt(warmup / now))

    return value


@as_pytree
def cosine_decay_schedule(
    init_value: Number, decay_steps: Positive, alpha: Number = 0.0, exponent: NonNegative = 1.0
) -> Schedule:
    """init_value ((1 - alpha) ((1 + cos(pi x)) / 2)^exponent + alpha), x from 0 to 1.

    x = step / decay_steps, at most 1. The value is `init_value` at step 0 and `alpha init_value`
    from `decay_steps` on.

    Args:
      init_value: any number.
      decay_steps: length of the decay, above 0.
      alpha: the fraction of `init_value` at the end; 0 by default.
      exponent: at least 0; 1 by default.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983.
    """

    return functools.partial(_cosine, init_value, decay_steps, alpha, exponent)


@formula
def _cosine(init: Any, length: Any, alpha: Any, exponent: Any, step: Any) -> Any:
    passed = jnp.clip(safe_ratio(as_float(step), length), 0, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * passed))
    return init * ((1 - alpha) * safe_power(cosine, exponent) + alpha)


# --- piecewise schedules ---------------------------------------------------------------------


@as_pytree
def piecewise_constant(boundaries: Boundaries, values: Numbers) -> Schedule:
    """values[i], for the number i of boundaries at or below the step: a step function.

    Args:
      boundaries: n steps in rising order, a sequence or an array. At a boundary the new value
        applies.
      values: n + 1 numbers.

    Raises: ValueError when the schedule is called if the lengths do not match.
    Differs from: `piecewise_constant_schedule`, which multiplies by scales; Keras, where the old
      value applies at a boundary.
    """
    edges, levels = as_vector(boundaries), as_vector(values)
    if levels.shape != (edges.size + 1,):
        raise ValueError(
            f"piecewise_constant: values must have length {edges.size + 1} for {edges.size}"
            f" boundaries, got {levels.size}"
        )
    return lambda step: levels[jnp.searchsorted(edges, as_float(step), side="right")]


@as_pytree
def piecewise_constant_schedule(
    init_value: Number, boundaries_and_scales: BoundariesAndScales | None = None
) -> Schedule:
    """init_value times the product of the scales whose boundaries are at or below the step.

    Args:
      init_value: the value before the first boundary.
      boundaries_and_scales: a dict {boundary: scale} as in optax, or a pair (boundaries, scales) of
        sequences or arrays with boundaries in rising order. Boundaries in a dict cannot be traced.
        None (default): constant.

    Differs from: `piecewise_constant`, which takes the values themselves.
    """
    function = "piecewise_constant_schedule"
    edges, scales = _boundaries_and_scales(function, boundaries_and_scales)
    levels = init_value * jnp.concatenate([jnp.ones([1]), jnp.cumprod(scales)])
    return lambda step: levels[jnp.searchsorted(edges, as_float(step), side="right")]


@as_pytree
def piecewise_interpolate_schedule(
    interpolate_type: str,
    init_value: Number,
    boundaries_and_scales: BoundariesAndScales | None = None,
) -> Schedule:
    """Linear or cosine interpolation between init_value and its successive products with scales.

    Args:
      interpolate_type: "linear" or "cosine".
      init_value: the value at step 0.
      boundaries_and_scales: as in `piecewise_constant_schedule`. At a boundary the value is the
        product up to its scale; after the last boundary the value is constant.

    Raises: ValueError for another `interpolate_type`.
    """
    if interpolate_type not in ("linear", "cosine"):
        raise ValueError(
            "piecewise_interpolate_schedule: interpolate_type must be 'linear' or 'cosine', got"
            f" {interpolate_type!r}"
        )
    function = "piecewise_interpolate_schedule"
    edges, scales = _boundaries_and_scales(function, boundaries_and_scales)
    knots = jnp.concatenate([jnp.zeros([1]), edges])
    levels = init_value * jnp.concatenate([jnp.ones([1]), jnp.cumprod(scales)])
    last = edges.size

    def value(step: Any) -> Any:
        now = as_float(step)
        left = jnp.clip(jnp.searchsorted(knots, now, side="right") - 1, 0, last)
        right = jnp.minimum(left + 1, last)
        x = ramp(now, knots[left], knots[right] - knots[left])
        if interpolate_type == "cosine":
            x = 0.5 * (1 - jnp.cos(jnp.pi * x))
        return levels[left] + (levels[right] - levels[left]) * x

    return value


@as_pytree
def linear_onecycle_schedule(
    transition_steps: Positive,
    peak_value: Number,
    pct_start: NonNegative = 0.3,
    pct_final: NonNegative = 0.85,
    div_factor: Positive = 25.0,
    final_div_factor: Positive = 1e4,
) -> Schedule:
    """One-cycle: three linear ramps, up to the peak, down to the initial value, and to nearly 0.

    The value is peak / div_factor at step 0, peak at floor(pct_start n), peak / div_factor at
    floor(pct_final n), and peak / (div_factor final_div_factor) from n = transition_steps on.

    Args:
      transition_steps: length of the cycle, above 0.
      peak_value: the highest value.
      pct_start, pct_final: fractions of `transition_steps`, in rising order; 0.3 and 0.85 by
        default.
      div_factor, final_div_factor: above 0; 25 and 1e4 by default.

    Source: Smith & Topin 2017, arXiv:1708.07120.
    """
    knots = [jnp.floor(pct_start * transition_steps), jnp.floor(pct_final * transition_steps)]
    scales = [div_factor, 1 / div_factor, 1 / final_div_factor]
    start = peak_value / div_factor
    return piecewise_interpolate_schedule("linear", start, ([*knots, transition_steps], scales))


@as_pytree
def cosine_onecycle_schedule(
    transition_steps: Positive,
    peak_value: Number,
    pct_start: NonNegative = 0.3,
    div_factor: Positive = 25.0,
    final_div_factor: Positive = 1e4,
) -> Schedule:
    """One-cycle with cosines: one ramp up to the peak and one down to nearly 0.

    The value is peak / div_factor at step 0, peak at floor(pct_start n), and
    peak / (div_factor final_div_factor) from n = transition_steps on.

    Args: as in `linear_onecycle_schedule`.
    Source: Smith & Topin 2017, arXiv:1708.07120.
    """
    knots = [jnp.floor(pct_start * transition_steps), transition_steps]
    scales = [div_factor, 1 / (div_factor * final_div_factor)]
    return piecewise_interpolate_schedule("cosine", peak_value / div_factor, (knots, scales))


@as_pytree
def join_schedules(schedules: Numbers, boundaries: Boundaries) -> Schedule:
    """schedules[i](step - boundaries[i-1]), for the number i of boundaries at or below the step.

    Args:
      schedules: n + 1 callables; the steps of each count from the boundary before it.
      boundaries: n steps in rising order. At a boundary the next schedule applies.

    Raises: ValueError when the schedule is called if the lengths do not match.
    """
    if len(schedules) != len(boundaries) + 1:
        raise ValueError(
            f"join_schedules: boundaries must have length {len(schedules) - 1} for"
            f" {len(schedules)} schedules, got {len(boundaries)}"
        )

    def value(step: Any) -> Any:
        now, kind = as_float(step), jnp.result_type(step)
        # Integer steps stay integers, for a schedule that indexes with them.
        is_integer = jnp.issubdtype(kind, jnp.integer)
        like_step = lambda own: own.astype(kind) if is_integer else own
        result = schedules[0](step)
        for index, schedule in enumerate(schedules[1:]):
            # Before its boundary, a schedule is evaluated at its step 0.
            after = now >= boundaries[index]
            own = jnp.where(after, now - boundaries[index], 0)
            result = jnp.where(after, schedule(like_step(own)), result)
        return result

    return value


@as_pytree
def warmup_constant_schedule(
    init_value: Number, peak_value: Number, warmup_steps: Number
) -> Schedule:
    """Linear ramp from init_value to peak_value at step warmup_steps, then constant.

    Args:
      init_value, peak_value: any numbers.
      warmup_steps: length of the ramp; if 0 or less, the value is always `init_value`, as in optax.
    """
    return linear_schedule(init_value, peak_value, warmup_steps)


@as_pytree
def warmup_cosine_decay_schedule(
    init_value: Number,
    peak_value: Number,
    warmup_steps: Count,
    decay_steps: Positive,
    end_value: Number = 0.0,
    exponent: NonNegative = 1.0,
) -> Schedule:
    """Linear ramp from init_value up to peak_value, then a cosine decay down to end_value.

    The value is `peak_value` at step `warmup_steps` and `end_value` from `decay_steps` on.

    Args:
      init_value, peak_value, end_value: any numbers; end_value is 0 by default.
      warmup_steps: length of the ramp, at least 0.
      decay_steps: total length, above 0, including the warmup (Keras excludes the warmup).
      exponent: exponent of the cosine, at least 0; 1 by default.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983.
    """
    scaled = peak_value != 0
    alpha = jnp.where(scaled, end_value / jnp.where(scaled, peak_value, 1), 0)
    decay = cosine_decay_schedule(peak_value, decay_steps - warmup_steps, alpha, exponent)
    rise = linear_schedule(init_value, peak_value, warmup_steps)
    return join_schedules([rise, decay], [warmup_steps])


@as_pytree
def warmup_exponential_decay_schedule(
    init_value: Number,
    peak_value: Number,
    warmup_steps: Count,
    transition_steps: Number,
    decay_rate: NonNegative,
    transition_begin: Number = 0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> Schedule:
    """Linear ramp from init_value to peak_value at step warmup_steps, then `exponential_decay`.

    Args: as in `exponential_decay`, whose steps count from the peak.
    """
    rise = linear_schedule(init_value, peak_value, warmup_steps)
    decay = exponential_decay(
        peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value
    )
    return join_schedules([rise, decay], [warmup_steps])


@as_pytree
def warmup_stable_decay_schedule(
    init_value: Number,
    peak_value: Number,
    warmup_steps: Count,
    stable_steps: Count,
    decay_steps: Count,
    end_value: Number = 0.0,
) -> Schedule:
    """Linear ramp up to peak_value, constant for stable_steps, linear ramp down to end_value.

    The value is `peak_value` from step `warmup_steps` to `warmup_steps + stable_steps`, and
    `end_value` from `warmup_steps + stable_steps + decay_steps` on.

    Args:
      init_value, peak_value, end_value: any numbers; end_value is 0 by default.
      warmup_steps, stable_steps, decay_steps: lengths of the three parts, at least 0.

    Source: Hu et al. 2024 (WSD), arXiv:2404.06395.
    """
    rise = linear_schedule(init_value, peak_value, warmup_steps)
    fall = linear_schedule(peak_value, end_value, decay_steps, stable_steps)
    return join_schedules([rise, fall], [warmup_steps])


@as_pytree
def sgdr_schedule(cosine_kwargs: Numbers) -> Schedule:
    """Warm restarts: one `warmup_cosine_decay_schedule` after another.

    Args:
      cosine_kwargs: a sequence of dicts with the arguments of each cycle; `decay_steps` is the
        length of the cycle.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983.
    """
    if not cosine_kwargs:
        raise ValueError("sgdr_schedule: cosine_kwargs must have at least one cycle, got none")
    ends = jnp.cumsum(as_vector([cycle["decay_steps"] for cycle in cosine_kwargs]))
    cycles = [warmup_cosine_decay_schedule(**cycle) for cycle in cosine_kwargs]
    return join_schedules(cycles, ends[:-1])
