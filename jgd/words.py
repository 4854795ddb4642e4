"""The letters of the alphabet: pointwise words, memories and the bias correction.

Each is a formula on one array, lifted over the tree. Memories have nouns for names
(`moving_average`, `running_max`), effects have verbs (`scale`, `square`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Fraction, NonNegative, Number
from jgd.combinators import (
    abs_square,
    add,
    chain,
    expect,
    leafwise,
    named,
    safe_sqrt,
    stateless,
    with_nesterov,
    with_params,
)
from jgd.pytree import as_pytree

__all__ = [
    "BiasCorrectionState",
    "EmaState",
    "MovingAverageState",
    "RunningMaxState",
    "RunningSumState",
    "TraceState",
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


def pointwise(f: Callable[..., Any]) -> GradientTransformation:
    """A word without memory: `f` on each leaf."""
    return stateless(lambda updates, _: leafwise(f, updates))


def memory(
    state_type: type,
    step: Callable[[Any, Any], Any],
    start: Any = 0.0,
    dtype: DTypeLike | None = None,
) -> GradientTransformation:
    """A word with one slot per leaf: m <- step(g, m), and m goes on. m starts as `start`."""

    def init(params: Any) -> Any:
        full = lambda p: jnp.full_like(p, start, dtype=dtype)
        return state_type(jax.tree.map(full, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        memory = leafwise(step, updates, *expect(state, state_type), keep=True)
        return leafwise(lambda _, m: m, updates, memory), state_type(memory)

    return GradientTransformation(init, update)


# --- pointwise -------------------------------------------------------------------------------


@as_pytree
def identity() -> GradientTransformation:
    """u = g. State: `EmptyState`."""
    return optax.identity()


@as_pytree
def set_to_zero() -> GradientTransformation:
    """u = 0: what is under it stays as it is. State: `EmptyState`."""
    return optax.set_to_zero()


@as_pytree
def square() -> GradientTransformation:
    """u = g^2, |g|^2 for complex leaves. State: `EmptyState`."""
    return pointwise(abs_square)


@as_pytree
def sign() -> GradientTransformation:
    """u = sign(g), with sign(0) = 0. State: `EmptyState`."""
    return pointwise(jnp.sign)


@as_pytree
def scale_by_sign() -> GradientTransformation:
    """u = sign(g): optax's name of `sign`. State: `EmptyState`."""
    return sign()


@as_pytree
def root(eps: NonNegative = 0.0, eps_root: NonNegative = 0.0) -> GradientTransformation:
    """u = sqrt(v + eps_root) + eps: both places where papers and frameworks put epsilon.

    Args:
      eps: at least 0, added outside the root.
      eps_root: at least 0, added inside.

    State: `EmptyState`. Below 0 (rounding, in centred second moments) the root is 0, and its
    derivative at 0 is 0.
    """

    return pointwise(lambda v: safe_sqrt(v.real + eps_root) + eps)


@as_pytree
def scale(step_size: Number) -> GradientTransformation:
    """u = step_size g.

    Args:
      step_size: any number, or a schedule.

    State: `EmptyState`, with a step counter around it for a schedule.
    Differs from: `scale_by_learning_rate`, which flips the sign.
    """
    return pointwise(lambda g: step_size * g)


@as_pytree
def scale_by_schedule(step_size_fn: Number) -> GradientTransformation:
    """u = step_size_fn(t) g, with t = 0 at the first update: optax's name of `scale` by a schedule.

    State: `ScheduledState`, whose `count` is t.
    """
    return scale(step_size_fn)


@as_pytree
def scale_by_learning_rate(
    learning_rate: Number | None = None, *, flip_sign: bool = True
) -> GradientTransformation:
    """u = -learning_rate g: the last link of a descent.

    Args:
      learning_rate: any number, or a schedule. None leaves the updates as they are, without a flip.
      flip_sign: False keeps the sign: u = learning_rate g.

    State: `EmptyState`, with a step counter around it for a schedule.
    """
    if learning_rate is None:
        return identity()
    return scale(-learning_rate if flip_sign else learning_rate)


@as_pytree
def _add_params(factor: Number) -> GradientTransformation:
    return stateless(
        lambda updates, params: leafwise(lambda g, p: g + factor * p, updates, with_params(params))
    )


@as_pytree
def add_decayed_weights(
    weight_decay: Number = 0.0, mask: Any | Callable[[Any], Any] | None = None
) -> GradientTransformation:
    """u = g + weight_decay p, for parameters p.

    Before the adaptive part of a chain this is L2 regularisation, after it decoupled weight decay.

    Args:
      weight_decay: any number, or a schedule; 0 by default.
      mask: a tree of bools like the parameters (or a prefix), or a function from parameters to
        one; only leaves marked True decay. None: all do.

    State: `EmptyState`, or `optax.MaskedState` around it where there is a mask; with a step counter
    around it for a schedule.
    Raises: ValueError in `update` if no parameters are given.
    """
    decay = _add_params(weight_decay)
    return decay if mask is None else optax.masked(decay, mask)


@as_pytree
def add_noise(
    eta: NonNegative, gamma: Number, key: Any = None, *, seed: int | None = None
) -> GradientTransformation:
    """u = g + N(0, eta / t^gamma): normal noise that falls with the step t, from 1.

    Args:
      eta: at least 0, the variance at the first step.
      gamma: any number, how fast it falls.
      key: a random key or an int, structure; None (default) is 0.
      seed: optax's older name of key.

    State: `optax.AddNoiseState(count, rng_key)`, no tree.
    Source: Neelakantan et al. 2015, equation 1, arXiv:1511.06807.
    """
    return optax.add_noise(eta, gamma, next((k for k in (key, seed) if k is not None), 0))


# --- memories --------------------------------------------------------------------------------


class TraceState(NamedTuple):
    """State of `scale_by_momentum` and `trace`."""

    trace: Any  # like the parameters, at least float32


class MovingAverageState(NamedTuple):
    """State of `moving_average`."""

    average: Any  # like the parameters, at least float32


class RunningSumState(NamedTuple):
    """State of `running_sum`."""

    total: Any  # like the parameters, at least float32


class RunningMaxState(NamedTuple):
    """State of `running_max` and `decayed_max`."""

    maximum: Any  # like the parameters, at least float32


@as_pytree
def scale_by_momentum(
    decay: Fraction, *, accumulator_dtype: DTypeLike | None = None
) -> GradientTransformation:
    """v <- decay v + g, and u = v.

    Args:
      decay: in [0, 1]; the textbooks' momentum, usually 0.9. May be a schedule.
      accumulator_dtype: of the memory; None: float32 for 16-bit parameters, else theirs.

    State: `TraceState(trace)`, one tree like the parameters, from 0.
    Differs from: `moving_average`, whose gradients enter with weight 1 - decay, so that its steps
      are 1 - decay times as long; from `trace` in name only.
    Source: Polyak 1964.
    """
    return memory(TraceState, lambda g, v: decay * v + g, dtype=accumulator_dtype)


@as_pytree
def trace(
    decay: Fraction, nesterov: bool = False, accumulator_dtype: DTypeLike | None = None
) -> GradientTransformation:
    """v <- decay v + g, and u = v, or u = g + decay v with `nesterov`: optax's momentum.

    Args, State: as `scale_by_momentum`.
    """
    momentum = scale_by_momentum(decay, accumulator_dtype=accumulator_dtype)
    return with_nesterov(momentum) if nesterov else momentum


@as_pytree
def moving_average(
    decay: Fraction, start: Number = 0.0, *, accumulator_dtype: DTypeLike | None = None
) -> GradientTransformation:
    """a <- decay a + (1 - decay) g, and u = a.

    Args:
      decay: in [0, 1]. May be a schedule.
      start: what a is before the first step; 0 by default.
      accumulator_dtype: of the memory; None: float32 for 16-bit parameters, else theirs.

    State: `MovingAverageState(average)`, one tree like the parameters.
    Differs from: `ema`, which corrects the bias of the start at 0.
    """
    new = 1 - decay
    step = lambda g, a: decay * a + new * g
    return memory(MovingAverageState, step, start, accumulator_dtype)


@as_pytree
def running_sum(start: NonNegative = 0.0) -> GradientTransformation:
    """s <- s + g, and u = s.

    Args:
      start: at least 0, what s is before the first step.

    State: `RunningSumState(total)`, one tree like the parameters.
    """
    return memory(RunningSumState, jnp.add, start)


@as_pytree
def running_max() -> GradientTransformation:
    """x <- max(x, g), from 0, and u = x. State: `RunningMaxState(maximum)`, one tree."""
    return memory(RunningMaxState, lambda g, x: jnp.maximum(x, g))


@as_pytree
def decayed_max(decay: Fraction, eps: NonNegative = 0.0) -> GradientTransformation:
    """x <- max(decay x, |g| + eps), from 0, and u = x.

    Args:
      decay: in [0, 1]. May be a schedule.
      eps: at least 0; keeps x away from 0.

    State: `RunningMaxState(maximum)`, one tree like the parameters.
    """
    return memory(RunningMaxState, lambda g, x: jnp.maximum(jnp.abs(g) + eps, decay * x))


# --- bias correction -------------------------------------------------------------------------


class BiasCorrectionState(NamedTuple):
    """State of `bias_correction`."""

    count: jax.Array  # int32 scalar: steps so far
    log_decay: jax.Array  # float32 scalar: the mean over the steps so far of log(decay)


def below_one(decay: Any, count: Any, total: Any) -> Any:
    """1 - exp(total), for total the sum of log(decay) over `count` steps."""
    # expm1 is exact to rounding, but flat in a decay of 0, where the first step is not
    return jnp.where(count == 1, 1 - decay, -jnp.expm1(total))


def weights(
    decay: jax.Array, state: BiasCorrectionState
) -> tuple[jax.Array, jax.Array, BiasCorrectionState]:
    """1 - the product of the decays up to this step, the same up to the next, and the new state.

    The mean of log(decay) stays exactly log(decay) while the decay does not move, so that count
    times mean is as good as the closed form, and it is right as well for a decay that moves.
    """
    count: Any
    count, mean = state
    log_decay = jnp.log(jnp.maximum(decay, jnp.finfo(mean.dtype).tiny))  # safe at 0
    count = optax.safe_increment(count)
    mean = mean + (log_decay - mean) / count
    total = count * mean
    now = below_one(decay, count, total)
    return now, -jnp.expm1(total + log_decay), BiasCorrectionState(count, mean)


@as_pytree
def bias_correction(decay: Decay, *, ahead: bool = False) -> GradientTransformation:
    """u = g / (1 - decay^t), with t = 1 at the first step: undoes the start at 0 of an average.

    For a decay that moves, the power is the product of the decays so far: the average of a
    constant gradient comes out constant.

    Args:
      decay: in [0, 1), that of the average. May be a schedule.
      ahead: True takes the power t + 1, as Nesterov's look ahead does.

    State: `BiasCorrectionState(count, log_decay)`, two scalars.
    """

    def init(params: Any) -> Any:
        return BiasCorrectionState(jnp.zeros([], jnp.int32), jnp.zeros([], float))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        now, coming, state = weights(decay, expect(state, BiasCorrectionState))
        weight = coming if ahead else now
        weight = jnp.where(weight > 0, weight, 1)  # 0 for a decay of 1, whose average stays 0
        return leafwise(lambda g: g / weight, updates), state

    return GradientTransformation(init, update)


@as_pytree
def _aside(inner: GradientTransformation) -> GradientTransformation:
    """Advance the state of `inner`, but let the updates pass as they are."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, inner.update(updates, state, params)[1]

    return GradientTransformation(inner.init, update)


class EmaState(NamedTuple):
    """State of `ema` and `nesterov_ema`."""

    count: jax.Array  # int32 scalar: steps so far
    ema: Any  # like the parameters, at least float32: the average before its correction
    log_decay: jax.Array  # float32 scalar: mean of log(decay)


@as_pytree
def ema(
    decay: Decay,
    debias: bool = True,
    accumulator_dtype: DTypeLike | None = None,
) -> GradientTransformation:
    """a <- decay a + (1 - decay) g, and u = a / (1 - decay^t).

    Args:
      decay: in [0, 1). May be a schedule.
      debias: False gives u = a.
      accumulator_dtype: of the memory; None: float32 for 16-bit parameters, else theirs.

    State: `EmaState(count, ema, log_decay)`, one tree like the parameters and two scalars.
    Differs from: `moving_average`, which does not count; `optax.ema`, whose correction takes the
      last decay for all when the decay moves.
    """
    correction = bias_correction(decay) if debias else _aside(bias_correction(decay))
    average = moving_average(decay, accumulator_dtype=accumulator_dtype)
    return named(chain(average, correction), record=EmaState, slots="ema count log_decay")


@as_pytree
def nesterov_ema(
    decay: Decay, *, accumulator_dtype: DTypeLike | None = None
) -> GradientTransformation:
    """a <- decay a + (1 - decay) g, and u = decay a / c_(t+1) + (1 - decay) g / c_t.

    The direction of NAdam, with c_t = 1 - decay^t. Args and state: as `ema`.
    Differs from: `with_nesterov(ema(decay))`, which corrects both terms alike.
    Source: Dozat 2016, algorithm 2, with one decay for all steps.
    """
    average = chain(
        moving_average(decay, accumulator_dtype=accumulator_dtype),
        bias_correction(decay, ahead=True),
        scale(decay),
    )
    gradient = chain(bias_correction(decay), scale(1 - decay))
    slots = "ema count log_decay count log_decay"
    return named(add(average, gradient), record=EmaState, slots=slots)


@as_pytree
def rms(
    decay: Decay, eps: NonNegative = 0.0, eps_root: NonNegative = 0.0
) -> GradientTransformation:
    """v <- decay v + (1 - decay) g^2, and u = sqrt(v / (1 - decay^t) + eps_root) + eps.

    The magnitude of Adam.

    Args:
      decay: in [0, 1). May be a schedule.
      eps, eps_root: at least 0, as in `root`.

    State: that of the chain square, `ema`, root.
    """
    return chain(square(), ema(decay), root(eps, eps_root))
