"""Classical optimizers: gradient descent, momentum, Nesterov, AdaGrad and RMSProp.

    adagrad    g / sqrt(sum of g^2)            rmsprop    g / sqrt(average of g^2)

Each `scale_by_x` is the quotient of an optimizer, without its learning rate.
"""

from typing import Any, NamedTuple

import jax
import optax
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Fraction, Key, NonNegative, Number
from jgd.arithmetic import finite
from jgd.combinators import chain, divide, named, subtract, with_nesterov
from jgd.pytree import as_pytree
from jgd.transforms import (
    add_noise,
    bias_correction,
    identity,
    moving_average,
    pointwise,
    root,
    running_sum,
    scale_by_learning_rate,
    scale_by_momentum,
    square,
    trace,
)

__all__ = [
    "adagrad",
    "momentum",
    "nesterov",
    "noisy_sgd",
    "rmsprop",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_stddev",
    "sgd",
]

_bias_correction = bias_correction  # optax calls an argument below bias_correction as well


def _nesterov_needs_momentum(tx: Any) -> None:
    if tx.nesterov and tx.momentum is None:
        name = tx._call.spec.name
        raise ValueError(f"{name}: momentum must be a number where nesterov is True, got None")


@as_pytree(check=_nesterov_needs_momentum)
def sgd(
    learning_rate: Number,
    momentum: Fraction | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
) -> GradientTransformation:
    """Gradient descent: steps along the negative gradient of a batch, mini-batch or example.

        u = -learning_rate g

    With momentum, v <- momentum v + g replaces g. With `nesterov` as well, g + momentum v does.

    Args:
      learning_rate: the step size; positive to descend. May be a schedule.
      momentum: in [0, 1]; None (default): no momentum and no accumulator. May be a schedule.
      nesterov: True looks ahead; requires momentum.
      accumulator_dtype: dtype of v. None (default): float32 for 16-bit parameters, otherwise
        their dtype.

    State: none; with momentum `optax.TraceState(trace)`, one tree like the parameters.
    Differs from: Keras, whose velocity includes the learning rate, so that results differ under a
      schedule.
    Source: Robbins & Monro 1951; Sutskever et al. 2013 for momentum.
    """
    direction = identity() if momentum is None else trace(momentum, nesterov, accumulator_dtype)
    return chain(direction, scale_by_learning_rate(learning_rate))


@as_pytree
def momentum(learning_rate: Number, momentum: Fraction = 0.9) -> GradientTransformation:
    """Momentum, the heavy ball: steps along a decaying sum of gradients.

        v <- momentum v + g            u = -learning_rate v

    Args:
      learning_rate: the step size; positive to descend. May be a schedule.
      momentum: in [0, 1], 0.9 by default. May be a schedule.

    State: `optax.TraceState(trace)`, one tree like the parameters.
    Differs from: a moving average of gradients, whose steps are 1 - momentum times as long. With a
      constant gradient, v grows to g / (1 - momentum).
    Source: Polyak 1964.
    """
    return chain(scale_by_momentum(momentum), scale_by_learning_rate(learning_rate))


@as_pytree
def nesterov(learning_rate: Number, momentum: Fraction = 0.9) -> GradientTransformation:
    """Nesterov's accelerated gradient: momentum with a look ahead by one step.

        v <- momentum v + g            u = -learning_rate (g + momentum v)

    Args, State: as in `momentum`.
    Differs from: `momentum`, which does not look ahead; `nadam`, which is adaptive.
    Source: Nesterov 1983, in the form of Sutskever et al. 2013.
    """
    return chain(with_nesterov(scale_by_momentum(momentum)), scale_by_learning_rate(learning_rate))


@as_pytree
def noisy_sgd(
    learning_rate: Number,
    eta: NonNegative = 0.01,
    gamma: Number = 0.55,
    key: Key = None,
    *,
    seed: int | None = None,
) -> GradientTransformation:
    """Noisy gradient descent: adds normal noise to the gradient, which decays with the step.

        u = -learning_rate (g + N(0, eta / t^gamma))

    Args:
      learning_rate: the step size; positive to descend. May be a schedule.
      eta: at least 0, the variance of the noise at the first step; 0.01 by default.
      gamma: exponent of the decay of the variance; 0.55 by default.
      key: a random key or an int; None (default) is 0. Lanes share the noise.
      seed: optax's older name for `key`.

    State: `optax.AddNoiseState(count, rng_key)`, no tree.
    Differs from: `sgd`, which adds no noise.
    Source: Neelakantan et al. 2015, equation 1, arXiv:1511.06807.
    """
    return chain(add_noise(eta, gamma, key, seed=seed), scale_by_learning_rate(learning_rate))


# --- AdaGrad ---------------------------------------------------------------------------------


@as_pytree
def scale_by_rss(
    initial_accumulator_value: NonNegative = 0.1, eps: NonNegative = 1e-7
) -> GradientTransformation:
    """s <- s + g^2, and u = g / sqrt(s + eps): AdaGrad's quotient.

    Args:
      initial_accumulator_value: initial value of s, at least 0.
      eps: at least 0, added inside the root.

    State: `optax.ScaleByRssState(sum_of_squares)`, one tree like the parameters.
    Differs from: `scale_by_rms`, which averages squares with a decay.
    Source: Duchi, Hazan & Singer 2011.
    """
    total = running_sum(initial_accumulator_value, name="sum_of_squares")
    magnitude = chain(square(), total, root(eps_root=eps))
    return named(divide(identity(), magnitude), record=optax.ScaleByRssState)


@as_pytree
def adagrad(
    learning_rate: Number,
    initial_accumulator_value: NonNegative = 0.1,
    eps: NonNegative = 1e-7,
) -> GradientTransformation:
    """AdaGrad: divides the gradient by the root of the sum of all squared gradients so far.

        s <- s + g^2            u = -learning_rate g / sqrt(s + eps)

    Args:
      learning_rate: the step size; positive to descend. May be a schedule.
      initial_accumulator_value: initial value of s, at least 0; 0.1 by default, 0 in the paper.
      eps: at least 0, added inside the root; 1e-7 by default.

    State: `optax.ScaleByRssState(sum_of_squares)`, one tree like the parameters.
    Differs from: `rmsprop`, which forgets old gradients; PyTorch, which adds eps outside the root.
    Source: Duchi, Hazan & Singer 2011, JMLR 12.
    """
    return chain(
        scale_by_rss(initial_accumulator_value, eps), scale_by_learning_rate(learning_rate)
    )


# --- RMSProp ---------------------------------------------------------------------------------


class ScaleByRmsWithCountState(NamedTuple):
    """State of `scale_by_rms` with bias correction."""

    count: jax.Array  # int32 scalar: number of steps so far
    nu: optax.Updates  # like the parameters, at least float32


class ScaleByRStdDevWithCountState(NamedTuple):
    """State of `scale_by_stddev` with bias correction."""

    count: jax.Array  # int32 scalar: number of steps so far
    mu: optax.Updates  # average gradient; like the parameters, at least float32
    nu: optax.Updates  # average squared gradient; like mu


def _root(eps: NonNegative, eps_in_sqrt: bool) -> GradientTransformation:
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
      initial_scale: initial value of v, at least 0.
      eps_in_sqrt: False adds eps outside the root: u = g / (sqrt(v) + eps).
      bias_correction: True divides v by 1 - decay^t before the root.

    State: `optax.ScaleByRmsState(nu)`, one tree like the parameters; with bias correction
      `ScaleByRmsWithCountState(count, nu)`.
    Differs from: `rms`, which returns the magnitude and not the quotient.
    Source: Tieleman & Hinton 2012, lecture 6.5.
    """
    average = moving_average(decay, initial_scale, name="nu")
    corrected = [_bias_correction(decay, of="nu")] if bias_correction else []
    magnitude = chain(square(), average, *corrected, _root(eps, eps_in_sqrt))
    record = ScaleByRmsWithCountState if bias_correction else optax.ScaleByRmsState
    return named(divide(identity(), magnitude), record=record)


@as_pytree
def scale_by_stddev(
    decay: Decay = 0.9,
    eps: NonNegative = 1e-8,
    initial_scale: NonNegative = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> GradientTransformation:
    """u = g / sqrt(v - m^2 + eps): RMSProp's quotient with the variance for the second moment.

        m <- decay m + (1 - decay) g            v <- decay v + (1 - decay) g^2

    Args: as in `scale_by_rms`; v starts at `initial_scale`, m at 0.
    State: `optax.ScaleByRStdDevState(mu, nu)`, two trees like the parameters; with bias correction
      `ScaleByRStdDevWithCountState(count, mu, nu)`.
    Differs from: optax, which returns NaN where v - m^2 is negative by rounding; jgd takes 0 for
      the root there.
    Source: Graves 2013, equations 38 to 45.
    """
    correct = lambda of: [_bias_correction(decay, of=of)] if bias_correction else []
    mean = chain(moving_average(decay, name="mu"), *correct("mu"))
    second = chain(square(), moving_average(decay, initial_scale, name="nu"), *correct("nu"))
    variance = subtract(second, chain(mean, square(), pointwise(finite)))
    magnitude = chain(variance, _root(eps, eps_in_sqrt))
    record = ScaleByRStdDevWithCountState if bias_correction else optax.ScaleByRStdDevState
    return named(divide(identity(), magnitude), record=record, shared=["count"])


@as_pytree(check=_nesterov_needs_momentum)
def rmsprop(
    learning_rate: Number,
    decay: Decay = 0.9,
    eps: NonNegative = 1e-8,
    initial_scale: NonNegative = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Fraction | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
) -> GradientTransformation:
    """RMSProp: divides the gradient by its running root mean square.

        v <- decay v + (1 - decay) g^2            u = -learning_rate g / sqrt(v + eps)

    Args:
      learning_rate: the step size; positive to descend. May be a schedule.
      decay: decay of the average square, in [0, 1); 0.9 by default. May be a schedule.
      eps: at least 0; 1e-8 by default.
      initial_scale: initial value of v, at least 0; 0 by default.
      eps_in_sqrt: False adds eps outside the root, g / (sqrt(v) + eps), as PyTorch does.
      centered: True subtracts the square of the average gradient from v, to estimate the variance.
      momentum: in [0, 1]; accumulates the steps, learning rate included, as Keras does. None
        (default): no momentum.
      nesterov: True looks ahead; requires momentum.
      bias_correction: True divides the averages by 1 - decay^t.

    State: `optax.ScaleByRmsState(nu)`, one tree; if centered `optax.ScaleByRStdDevState(mu, nu)`,
      two trees. Momentum adds `optax.TraceState(trace)`, one tree.
    Differs from: `adam` with b1=0, which corrects the bias; PyTorch, whose velocity does not
      include the learning rate, so that results with momentum differ under a schedule.
    Source: Tieleman & Hinton 2012, lecture 6.5; Graves 2013 for the centered form.
    """
    quotient = scale_by_stddev if centered else scale_by_rms
    return chain(
        quotient(decay, eps, initial_scale, eps_in_sqrt, bias_correction),
        scale_by_learning_rate(learning_rate),
        identity() if momentum is None else trace(momentum, nesterov),
    )
