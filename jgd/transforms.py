"""The alphabet: words that compose into every optimizer.

An adaptive optimizer is a direction over a magnitude. `chain` composes in series; `divide` puts
one chain over another, both fed the same gradient. With these two, and memories to feed them, the
classical family reads like its formulas:

    Nesterov   chain(with_nesterov(scale_by_momentum(b)), scale_by_learning_rate(lr))
    AdaGrad    divide(identity(), chain(square(), running_sum(start), root(eps_root=eps)))
    Adam       divide(ema(b1), rms(b2, eps))

Memories have nouns for names (`moving_average`, `running_max`), effects have verbs (`divide`,
`scale_by_adam`); where optax has a public name, the function of that name takes the same call and
gives the same numbers. What optax makes NaN is finite here: the square root has derivative 0 at 0,
and 0 / 0 is 0.
"""

from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Fraction, NonNegative
from jgd.combinators import add, chain, divide, leafwise, named, subtract, with_nesterov
from jgd.pytree import as_pytree
from jgd.words import (
    add_decayed_weights,
    add_noise,
    bias_correction,
    decayed_max,
    ema,
    identity,
    moving_average,
    nesterov_ema,
    rms,
    root,
    running_max,
    running_sum,
    scale,
    scale_by_learning_rate,
    scale_by_momentum,
    scale_by_schedule,
    scale_by_sign,
    set_to_zero,
    sign,
    square,
    trace,
)

__all__ = [
    "add",
    "add_decayed_weights",
    "add_noise",
    "bias_correction",
    "chain",
    "decayed_max",
    "divide",
    "ema",
    "identity",
    "leafwise",
    "moving_average",
    "named",
    "nesterov_ema",
    "rms",
    "root",
    "running_max",
    "running_sum",
    "scale",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_amsgrad",
    "scale_by_learning_rate",
    "scale_by_momentum",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_sign",
    "scale_by_stddev",
    "set_to_zero",
    "sign",
    "square",
    "subtract",
    "trace",
    "with_nesterov",
]

_correction = bias_correction  # where an argument of optax's bears the word's name


class ScaleByRssState(NamedTuple):
    """State of `scale_by_rss`."""

    sum_of_squares: Any  # like the parameters, at least float32


class ScaleByRmsState(NamedTuple):
    """State of `scale_by_rms`."""

    nu: Any  # like the parameters, at least float32


class ScaleByRmsWithCountState(NamedTuple):
    """State of `scale_by_rms` with bias correction."""

    count: jax.Array  # int32 scalar: steps so far
    nu: Any  # like the parameters, at least float32
    log_decay: jax.Array  # float32 scalar: mean of log(decay)


class ScaleByRStdDevState(NamedTuple):
    """State of `scale_by_stddev`."""

    mu: Any  # like the parameters, at least float32
    nu: Any


class ScaleByRStdDevWithCountState(NamedTuple):
    """State of `scale_by_stddev` with bias correction."""

    count: jax.Array  # int32 scalar: steps so far
    mu: Any  # like the parameters, at least float32
    nu: Any
    log_decay: jax.Array  # float32 scalar: mean of log(decay)


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`."""

    count: jax.Array  # int32 scalar: steps so far
    mu: Any  # like the parameters, at least float32
    nu: Any
    log_b1: jax.Array  # float32 scalars: means of log(b1) and log(b2)
    log_b2: jax.Array


class ScaleByAmsgradState(NamedTuple):
    """State of `scale_by_amsgrad`."""

    count: jax.Array  # int32 scalar: steps so far
    mu: Any  # like the parameters, at least float32
    nu: Any
    nu_max: Any
    log_b1: jax.Array  # float32 scalars: means of log(b1) and log(b2)
    log_b2: jax.Array


class ScaleByAdamaxState(NamedTuple):
    """State of `scale_by_adamax`."""

    count: jax.Array  # int32 scalar: steps so far
    mu: Any  # like the parameters, at least float32
    nu: Any
    log_b1: jax.Array  # float32 scalar: mean of log(b1)


@as_pytree
def scale_by_rss(
    initial_accumulator_value: NonNegative = 0.1, eps: NonNegative = 1e-7
) -> GradientTransformation:
    """s <- s + g^2, and u = g / sqrt(s + eps): AdaGrad's quotient.

    Args:
      initial_accumulator_value: at least 0, what s is before the first step.
      eps: at least 0, inside the root.

    State: `ScaleByRssState(sum_of_squares)`, one tree like the parameters.
    Differs from: `scale_by_rms`, which forgets.
    Source: Duchi, Hazan & Singer 2011.
    """
    magnitude = chain(square(), running_sum(initial_accumulator_value), root(eps_root=eps))
    return named(divide(identity(), magnitude), record=ScaleByRssState, slots="sum_of_squares")


def _root(eps: Any, eps_in_sqrt: bool) -> GradientTransformation:
    return root(eps_root=eps) if eps_in_sqrt else root(eps)


@as_pytree
def scale_by_rms(
    decay: Decay = 0.9,
    eps: NonNegative = 1e-8,
    initial_scale: NonNegative = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> GradientTransformation:
    """v <- decay v + (1 - decay) g^2, and u = g / sqrt(v + eps): RMSProp's quotient.

    Args:
      decay: in [0, 1). May be a schedule.
      eps: at least 0.
      initial_scale: at least 0, what v is before the first step.
      eps_in_sqrt: False puts eps outside: u = g / (sqrt(v) + eps).
      bias_correction: True divides v by 1 - decay^t first.

    State: `ScaleByRmsState(nu)`, one tree like the parameters; with bias correction
      `ScaleByRmsWithCountState(count, nu, log_decay)`.
    Differs from: `rms`, which is a magnitude and not yet a quotient.
    Source: Tieleman & Hinton 2012, lecture 6.5.
    """
    average = moving_average(decay, initial_scale)
    if not bias_correction:
        magnitude = chain(square(), average, _root(eps, eps_in_sqrt))
        return named(divide(identity(), magnitude), record=ScaleByRmsState, slots="nu")
    magnitude = chain(square(), average, _correction(decay), _root(eps, eps_in_sqrt))
    record, slots = ScaleByRmsWithCountState, "nu count log_decay"
    return named(divide(identity(), magnitude), record=record, slots=slots)


@as_pytree
def scale_by_stddev(
    decay: Decay = 0.9,
    eps: NonNegative = 1e-8,
    initial_scale: NonNegative = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> GradientTransformation:
    """RMSProp's quotient, centred: u = g / sqrt(v - m^2 + eps).

        m <- decay m + (1 - decay) g            v <- decay v + (1 - decay) g^2

    An estimate of the variance instead of the second moment.

    Args: as `scale_by_rms`; `initial_scale` is that of v, m starts at 0.
    State: `ScaleByRStdDevState(mu, nu)`, two trees like the parameters; with bias correction
      `ScaleByRStdDevWithCountState(count, mu, nu, log_decay)`.
    Differs from: optax where rounding takes v - m^2 below 0: the root is 0 there, not NaN.
    Source: Graves 2013, equations 38 to 45.
    """
    mean, second = moving_average(decay), chain(square(), moving_average(decay, initial_scale))
    if not bias_correction:
        magnitude = chain(subtract(second, chain(mean, square())), _root(eps, eps_in_sqrt))
        return named(divide(identity(), magnitude), record=ScaleByRStdDevState, slots="nu mu")
    mean, second = chain(mean, _correction(decay)), chain(second, _correction(decay))
    magnitude = chain(subtract(second, chain(mean, square())), _root(eps, eps_in_sqrt))
    record, slots = ScaleByRStdDevWithCountState, "nu count log_decay mu count log_decay"
    return named(divide(identity(), magnitude), record=record, slots=slots)


@as_pytree
def scale_by_adam(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, and u = m^ / (sqrt(v^ + eps_root) + eps).

    m^ = m / (1 - b1^t) and v^ = v / (1 - b2^t); with `nesterov` the direction is `nesterov_ema`.

    Args:
      b1, b2: in [0, 1). May be schedules.
      eps, eps_root: at least 0, outside and inside the root.
      mu_dtype: of m; None: float32 for 16-bit parameters, else theirs.
      nesterov: True looks ahead, as NAdam.

    State: `ScaleByAdamState(count, mu, nu, log_b1, log_b2)`, two trees and three scalars.
    Differs from: optax in that the correction is right for decays that move.
    Source: Kingma & Ba 2015, algorithm 1, arXiv:1412.6980.
    """
    direction = (
        nesterov_ema(b1, accumulator_dtype=mu_dtype)
        if nesterov
        else ema(b1, accumulator_dtype=mu_dtype)
    )
    slots = "count mu log_b1 count nu log_b2"
    return named(divide(direction, rms(b2, eps, eps_root)), record=ScaleByAdamState, slots=slots)


@as_pytree
def scale_by_amsgrad(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
) -> GradientTransformation:
    """Adam whose magnitude never shrinks: x <- max(x, v^), and u = m^ / (sqrt(x + eps_root) + eps).

    Args:
      b1, b2, eps, eps_root, mu_dtype: as `scale_by_adam`.
      bias_correction_mu, bias_correction_nu: False takes m for m^, v for v^, as the paper does.

    State: `ScaleByAmsgradState(count, mu, nu, nu_max, log_b1, log_b2)`, three trees.
    Differs from: PyTorch and Keras, whose maximum is over v before its correction.
    Source: Reddi, Kale & Kumar 2018, algorithm 2, arXiv:1904.09237.
    """
    direction = ema(b1, bias_correction_mu, mu_dtype)
    magnitude = chain(square(), ema(b2, bias_correction_nu), running_max(), root(eps, eps_root))
    slots = "count mu log_b1 count nu log_b2 nu_max"
    return named(divide(direction, magnitude), record=ScaleByAmsgradState, slots=slots)


@as_pytree
def scale_by_adamax(
    b1: Decay = 0.9, b2: Fraction = 0.999, eps: NonNegative = 1e-8
) -> GradientTransformation:
    """m <- b1 m + (1 - b1) g, x <- max(b2 x, |g| + eps), and u = m / (1 - b1^t) / x.

    Args:
      b1: in [0, 1). May be a schedule.
      b2: in [0, 1]. May be a schedule.
      eps: at least 0, inside the maximum.

    State: `ScaleByAdamaxState(count, mu, nu, log_b1)`, two trees.
    Differs from: Keras, which adds eps to x when it divides.
    Source: Kingma & Ba 2015, algorithm 2, arXiv:1412.6980.
    """
    slots = "count mu log_b1 nu"
    return named(divide(ema(b1), decayed_max(b2, eps)), record=ScaleByAdamaxState, slots=slots)
