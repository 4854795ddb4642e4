"""The basic transformations: pointwise functions, accumulators, bias correction, weight decay.

Each is a formula on one array, mapped over the leaves of a tree. An adaptive optimizer is a
direction divided by a magnitude, written like its formula:

    Nesterov   chain(with_nesterov(scale_by_momentum(b)), scale_by_learning_rate(lr))
    AdaGrad    divide(identity(), chain(square(), running_sum(start), root(eps_root=eps)))
    Adam       divide(ema(b1), rms(b2, eps))

Where optax has a public function of the same name, jgd's takes the same call and returns the same
numbers, except that the square root has derivative 0 at 0 and 0 / 0 is 0, where optax returns NaN.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Fraction, Key, Mask, NonNegative, Number
from jgd.arithmetic import (
    Weights,
    abs_square,
    average,
    complement,
    formula,
    increment,
    log_decay,
    one_minus_exp,
    one_minus_power,
    root_of,
    weights,
)
from jgd.calls import has_scheduled_decay
from jgd.combinators import (
    Plain,
    Slot,
    Slots,
    add,
    chain,
    masked_like,
    named,
    stateless,
    with_accumulators,
    with_nesterov,
)
from jgd.pytree import as_pytree
from jgd.trees import leafwise, with_params

__all__ = [
    "add_decayed_weights",
    "add_noise",
    "bias_correction",
    "decayed_max",
    "ema",
    "identity",
    "moving_average",
    "nesterov_ema",
    "rms",
    "root",
    "running_max",
    "running_sum",
    "scale",
    "scale_by_learning_rate",
    "scale_by_momentum",
    "scale_by_schedule",
    "scale_by_sign",
    "set_to_zero",
    "sign",
    "square",
    "trace",
]


# --- pointwise -------------------------------------------------------------------------------


def pointwise(f: Callable[..., Any], *numbers: Any) -> Plain:
    """Return the stateless transformation that applies `f(g, *numbers)` to each leaf g."""
    return stateless(lambda updates, _: leafwise(f, updates, numbers=numbers))


_square = formula(abs_square)
_sign = formula(jnp.sign)


@formula
def _root(v: Any, eps: Any, eps_root: Any) -> Any:
    return root_of(v.real + eps_root) + eps


@formula
def _scaled(g: Any, factor: Any) -> Any:
    return factor * g


@formula
def _decayed(g: Any, p: Any, factor: Any) -> Any:
    return g + factor * p


@as_pytree
def identity() -> GradientTransformation:
    """u = g. State: `EmptyState`."""
    return stateless(lambda updates, _: updates)


@as_pytree
def set_to_zero() -> GradientTransformation:
    """u = 0: freezes the parameters it applies to. State: `EmptyState`."""
    return stateless(lambda updates, _: jax.tree.map(jnp.zeros_like, updates))


@as_pytree
def square() -> GradientTransformation:
    """u = g^2, |g|^2 for complex leaves. State: `EmptyState`.

    The square overflows where |g| is above 1.8e19 (float32), and its average or sum stays infinite.
    An optimizer that divides by the root then takes steps of 0 for this entry, as in optax, or for
    the whole array or tree if it divides by a norm or a matrix. To prevent this, clip gradients
    (`clip`) or skip such steps (`skip_nonfinite`).
    """
    return pointwise(_square)


@as_pytree
def sign() -> GradientTransformation:
    """u = sign(g), with sign(0) = 0. State: `EmptyState`."""
    return pointwise(_sign)


@as_pytree
def scale_by_sign() -> GradientTransformation:
    """u = sign(g): optax's name for `sign`. State: `EmptyState`."""
    return sign()


@as_pytree
def root(eps: NonNegative = 0.0, eps_root: NonNegative = 0.0) -> GradientTransformation:
    """u = sqrt(v + eps_root) + eps, with an epsilon in each place where papers put one.

    Where v is 0, or negative by rounding, the root is so small that `divide` treats it as 0, and
    its derivative is 0.

    Args:
      eps: at least 0, added outside the root.
      eps_root: at least 0, added inside the root.

    State: `EmptyState`.
    """
    return pointwise(_root, eps, eps_root)


@as_pytree
def scale(step_size: Number) -> GradientTransformation:
    """u = step_size g.

    Args:
      step_size: any number, or a schedule.

    State: `EmptyState`, with a step counter around it for a schedule.
    Differs from: `scale_by_learning_rate`, which flips the sign.
    """
    return pointwise(_scaled, step_size)


@as_pytree
def scale_by_schedule(step_size_fn: Number) -> GradientTransformation:
    """u = step_size_fn(t) g, with t = 0 at the first update: optax's name for a scheduled `scale`.

    State: `ScheduledState`, whose `count` is t.
    """
    return scale(step_size_fn)


@as_pytree
def scale_by_learning_rate(
    learning_rate: Number | None = None, *, flip_sign: bool = True
) -> GradientTransformation:
    """u = -learning_rate g: the last link of an optimizer that descends.

    Args:
      learning_rate: any number, or a schedule. None (default): u = g, also with `flip_sign`.
      flip_sign: False keeps the sign: u = learning_rate g.

    State: `EmptyState`, with a step counter around it for a schedule.
    """
    if learning_rate is None:
        return identity()
    return scale(-learning_rate if flip_sign else learning_rate)


@as_pytree
def _add_params(factor: Number) -> GradientTransformation:
    return stateless(
        lambda updates, params: leafwise(_decayed, updates, with_params(params), numbers=(factor,))
    )


@as_pytree
def add_decayed_weights(
    weight_decay: Number = 0.0, mask: Mask | None = None
) -> GradientTransformation:
    """u = g + weight_decay p, for parameters p.

    Before the adaptive part of a chain this is L2 regularization; after it, decoupled weight decay.

    Args:
      weight_decay: any number, or a schedule; 0 by default.
      mask: a tree of bools like the parameters (or a prefix), or a function from parameters to
        one; only leaves marked True decay. None (default): all do.

    State: `EmptyState`, inside an `optax.MaskedState` if there is a mask; with a step counter
      around it for a schedule.
    Raises: ValueError in `update` if no parameters are given.
    """
    decay = _add_params(weight_decay)
    return decay if mask is None else optax.masked(decay, mask)


@as_pytree
def add_noise(
    eta: NonNegative, gamma: Number, key: Key = None, *, seed: int | None = None
) -> GradientTransformation:
    """u = g + N(0, eta / t^gamma): normal noise whose variance decays with the step t, from 1.

    Args:
      eta: the variance at the first step, at least 0.
      gamma: exponent of the decay, any number.
      key: a random key or an int; None (default) is 0. Lanes share the noise.
      seed: optax's older name for `key`.

    State: `optax.AddNoiseState(count, rng_key)`, no tree.
    Source: Neelakantan et al. 2015, equation 1, arXiv:1511.06807.
    """
    return optax.add_noise(eta, gamma, next((k for k in (key, seed) if k is not None), 0))


# --- accumulators ----------------------------------------------------------------------------


class MovingAverageState(NamedTuple):
    """State of `moving_average`."""

    average: optax.Updates  # the average a; like the parameters, at least float32


class RunningSumState(NamedTuple):
    """State of `running_sum`."""

    total: optax.Updates  # the sum s; like the parameters, at least float32


class RunningMaxState(NamedTuple):
    """State of `running_max` and `decayed_max`."""

    maximum: optax.Updates  # the maximum x; like the parameters, at least float32


def accumulator(
    record: type,
    f: Callable[..., Any],
    *numbers: Any,
    name: str,
    start: Any = 0.0,
    dtype: DTypeLike | None = None,
) -> Plain:
    """Return the transformation m <- f(g, m, *numbers), u = m, where m starts at `start`."""

    stored = None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)

    def initial(params: Any) -> Any:
        return jax.tree.map(lambda p: jnp.full_like(p, start, dtype=stored), params)

    def step(updates: Any, slots: Slots, _: Any) -> Any:
        if name not in slots.new:  # a shared accumulator is stepped once per update
            slots.new[name] = leafwise(f, updates, slots.old[name], numbers=numbers, keep=True)
        return masked_like(slots.new[name], updates)

    return with_accumulators([step], [Slot(name, initial)], record, {record._fields[0]: name})


@formula
def _sum(g: Any, s: Any) -> Any:
    return s + g


@formula
def _accumulate(g: Any, v: Any, decay: Any) -> Any:
    return decay * v + g


@formula
def _larger(g: Any, x: Any) -> Any:
    return jnp.maximum(x, g)


@formula
def _larger_decayed(g: Any, x: Any, by: Weights, eps: Any) -> Any:
    return jnp.maximum(jnp.abs(g) + eps, average(0, x, by))


@as_pytree
def scale_by_momentum(
    decay: Fraction, *, accumulator_dtype: DTypeLike | None = None, name: str = "trace"
) -> GradientTransformation:
    """v <- decay v + g, and u = v.

    Args:
      decay: the momentum, in [0, 1], usually 0.9. May be a schedule.
      accumulator_dtype: dtype of v. None (default): float32 for 16-bit parameters, otherwise
        their dtype.
      name: name of the accumulator, for `named`.

    State: `optax.TraceState(trace)`, one tree like the parameters; v starts at 0.
    Differs from: `moving_average`, where gradients enter with weight 1 - decay, so that its steps
      are 1 - decay times as long.
    Source: Polyak 1964.
    """
    return accumulator(optax.TraceState, _accumulate, decay, name=name, dtype=accumulator_dtype)


@as_pytree
def trace(
    decay: Fraction, nesterov: bool = False, accumulator_dtype: DTypeLike | None = None
) -> GradientTransformation:
    """v <- decay v + g, and u = v, or u = g + decay v with `nesterov`.

    This is optax's name for `scale_by_momentum`, with optax's arguments.

    Args, State: as in `scale_by_momentum`.
    """
    momentum = scale_by_momentum(decay, accumulator_dtype=accumulator_dtype)
    return with_nesterov(momentum) if nesterov else momentum


@as_pytree
def moving_average(
    decay: Fraction,
    start: Number = 0.0,
    *,
    accumulator_dtype: DTypeLike | None = None,
    name: str = "average",
) -> GradientTransformation:
    """a <- decay a + (1 - decay) g, and u = a.

    Args:
      decay: in [0, 1]. May be a schedule.
      start: initial value of a; 0 by default.
      accumulator_dtype: dtype of a. None (default): float32 for 16-bit parameters, otherwise
        their dtype.
      name: name of the accumulator, for `named`.

    State: `MovingAverageState(average)`, one tree like the parameters.
    Differs from: `ema`, which corrects the bias towards the initial value 0.
    """
    record, dtype = MovingAverageState, accumulator_dtype
    return accumulator(record, average, weights(decay), name=name, start=start, dtype=dtype)


@as_pytree
def running_sum(start: NonNegative = 0.0, *, name: str = "total") -> GradientTransformation:
    """s <- s + g, and u = s.

    Args:
      start: initial value of s, at least 0; 0 by default.
      name: name of the accumulator, for `named`.

    State: `RunningSumState(total)`, one tree like the parameters.
    """
    return accumulator(RunningSumState, _sum, name=name, start=start)


@as_pytree
def running_max(*, name: str = "maximum") -> GradientTransformation:
    """x <- max(x, g), and u = x; x starts at 0. State: `RunningMaxState(maximum)`, one tree."""
    return accumulator(RunningMaxState, _larger, name=name)


@as_pytree
def decayed_max(
    decay: Fraction, eps: NonNegative = 0.0, *, name: str = "maximum"
) -> GradientTransformation:
    """x <- max(decay x, |g| + eps), and u = x; x starts at 0.

    Args:
      decay: in [0, 1]. May be a schedule.
      eps: at least 0; keeps x away from 0.
      name: name of the accumulator, for `named`.

    State: `RunningMaxState(maximum)`, one tree like the parameters.
    """
    return accumulator(RunningMaxState, _larger_decayed, weights(decay), eps, name=name)


# --- bias correction -------------------------------------------------------------------------


class BiasCorrectionState(NamedTuple):
    """State of `bias_correction`."""

    count: jax.Array  # int32 scalar: number of steps so far


def count_slot() -> Slot:
    """Return the accumulator `count`, which counts the steps."""
    return Slot("count", lambda _: jnp.zeros([], jnp.int32))


def decay_slots(*names: str) -> list[Slot]:
    """Return the accumulators of log decays for these averages: none for constant decays."""
    if not has_scheduled_decay():
        return []
    return [Slot(f"log_{n}", lambda _: jnp.zeros([], float), of_schedule=True) for n in names]


def bias_weight(
    slots: Slots, decay: Any, of: str, *, ahead: bool = False, count: Any = None
) -> jax.Array:
    """Return 1 - decay^t, the factor by which an average that started at 0 is too small.

    For a decay that follows a schedule, the product of all decays so far replaces decay^t. The
    accumulator holds the mean of their logarithms, which is exact while the decay does not change.

    Args:
      slots: the accumulators of this update.
      decay: the decay of this step.
      of: the name of the average.
      ahead: True replaces t by t + 1.
      count: t. None (default): the accumulator `count`.
    """
    if count is None:
        count = slots.step("count", increment)
    weight = complement(decay)
    if (name := f"log_{of}") not in slots.old:
        return one_minus_power(weight, count + 1 if ahead else count)
    log = log_decay(weight)
    total = count * slots.step(name, lambda mean: mean + (log - mean) / count)
    return -jnp.expm1(total + log) if ahead else one_minus_exp(weight, count, total)


@formula
def _over(g: Any, weight: Any) -> Any:
    return g / weight


@as_pytree
def bias_correction(
    decay: Decay, *, ahead: bool = False, of: str = "decay"
) -> GradientTransformation:
    """u = g / (1 - decay^t), with t = 1 at the first step: corrects an average that started at 0.

    For a schedule, the product of the decays so far replaces decay^t, so that the corrected average
    of a constant gradient is this gradient.

    Args:
      decay: the decay of the average, in [0, 1). May be a schedule. A number that is replaced
        between steps is treated as the decay of all steps so far.
      ahead: True uses the power t + 1, for Nesterov's look ahead.
      of: the name of the average, for `named`. The step counter is named "count".

    State: `BiasCorrectionState(count)`, a scalar; under a schedule one more scalar, in a
      `ScheduledDecayState`.
    """

    def step(updates: Any, slots: Slots, _: Any) -> Any:
        weight = bias_weight(slots, decay, of, ahead=ahead)
        weight = jnp.where(weight > 0, weight, 1)  # 0 for a decay of 1: the average is 0 too
        return leafwise(_over, updates, numbers=(weight,))

    slots = [count_slot(), *decay_slots(of)]
    return with_accumulators([step], slots, BiasCorrectionState, {"count": "count"})


def _count_only() -> Plain:
    """Return the transformation u = g, which counts the steps."""

    def step(updates: Any, slots: Slots, _: Any) -> Any:
        slots.step("count", increment)
        return updates

    return with_accumulators([step], [count_slot()], BiasCorrectionState, {"count": "count"})


@as_pytree
def ema(
    decay: Decay,
    debias: bool = True,
    accumulator_dtype: DTypeLike | None = None,
    *,
    name: str = "ema",
) -> GradientTransformation:
    """a <- decay a + (1 - decay) g, and u = a / (1 - decay^t).

    Args:
      decay: in [0, 1). May be a schedule.
      debias: True by default; False gives u = a.
      accumulator_dtype: dtype of a. None (default): float32 for 16-bit parameters, otherwise
        their dtype.
      name: name of the accumulator, for `named`.

    State: `optax.EmaState(count, ema)`, one tree like the parameters and a scalar.
    Differs from: `moving_average`, which has no bias correction and does not count the steps;
      `optax.ema` under a schedule, whose correction uses the current decay for all steps.
    """
    average = moving_average(decay, accumulator_dtype=accumulator_dtype, name=name)
    correction = bias_correction(decay, of=name) if debias else _count_only()
    return named(chain(average, correction), record=optax.EmaState, fields={"ema": name})


@as_pytree
def nesterov_ema(
    decay: Decay, *, accumulator_dtype: DTypeLike | None = None, name: str = "ema"
) -> GradientTransformation:
    """a <- decay a + (1 - decay) g, and u = decay a / c_(t+1) + (1 - decay) g / c_t.

    This is the direction of NAdam, with c_t = 1 - decay^t.

    Args, State: as in `ema`.
    Differs from: `with_nesterov(ema(decay))`, which divides both terms by the same number.
    Source: Dozat 2016, algorithm 2, with one decay for all steps.
    """
    average = chain(
        moving_average(decay, accumulator_dtype=accumulator_dtype, name=name),
        bias_correction(decay, ahead=True, of=name),
        scale(decay),
    )
    gradient = chain(bias_correction(decay, of=name), scale(complement(decay)))
    shared = ["count", f"log_{name}"]
    both = add(average, gradient)
    return named(both, record=optax.EmaState, fields={"ema": name}, shared=shared)


@as_pytree
def rms(
    decay: Decay, eps: NonNegative = 0.0, eps_root: NonNegative = 0.0, *, name: str = "ema"
) -> GradientTransformation:
    """v <- decay v + (1 - decay) g^2, and u = sqrt(v / (1 - decay^t) + eps_root) + eps.

    This is the magnitude of Adam. `square` says what happens where g^2 overflows.

    Args:
      decay: in [0, 1). May be a schedule.
      eps, eps_root: at least 0, as in `root`.
      name: name of the accumulator, for `named`.

    State: the state of `chain(square(), ema(decay), root(eps, eps_root))`.
    """
    return chain(square(), ema(decay, name=name), root(eps, eps_root))
