"""The textbook: gradient descent, momentum, AdaGrad, RMSProp, Adam and their nearest kin."""

from collections.abc import Callable
from typing import Any

from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Fraction, NonNegative, Number
from jgd.pytree import as_pytree
from jgd.transforms import (
    add_decayed_weights,
    add_noise,
    chain,
    identity,
    scale,
    scale_by_adam,
    scale_by_adamax,
    scale_by_amsgrad,
    scale_by_learning_rate,
    scale_by_momentum,
    scale_by_rms,
    scale_by_rss,
    scale_by_stddev,
    trace,
    with_nesterov,
)

__all__ = [
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "amsgrad",
    "momentum",
    "nadam",
    "nesterov",
    "noisy_sgd",
    "rmsprop",
    "sgd",
]


@as_pytree
def sgd(
    learning_rate: Number,
    momentum: Fraction | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
) -> GradientTransformation:
    """Gradient descent: batch, mini-batch or stochastic, as the gradient is.

        u = -learning_rate g

    With momentum, v <- momentum v + g takes the place of g; with `nesterov` too, g + momentum v.

    Args:
      learning_rate: the step, above 0 to descend. May be a schedule.
      momentum: in [0, 1]; None (default): no memory at all. May be a schedule.
      nesterov: look ahead; needs momentum.
      accumulator_dtype: of v; None: float32 for 16-bit parameters, else theirs.

    State: none, or `TraceState(trace)`, one tree like the parameters, with momentum.
    Differs from: Keras, whose velocity holds the learning rate, another path under a schedule.
    Source: Robbins & Monro 1951; Sutskever et al. 2013 for momentum.
    """
    memory = identity() if momentum is None else trace(momentum, nesterov, accumulator_dtype)
    return chain(memory, scale_by_learning_rate(learning_rate))


@as_pytree
def momentum(learning_rate: Number, momentum: Fraction = 0.9) -> GradientTransformation:
    """Momentum, the heavy ball: descend by a decaying sum of gradients.

        v <- momentum v + g            u = -learning_rate v

    Args:
      learning_rate: the step, above 0 to descend. May be a schedule.
      momentum: in [0, 1], 0.9 by default. May be a schedule.

    State: `TraceState(trace)`, one tree like the parameters.
    Differs from: a moving average of gradients, whose steps are 1 - momentum times as long; with a
      constant gradient v grows to g / (1 - momentum).
    Source: Polyak 1964.
    """
    return chain(scale_by_momentum(momentum), scale_by_learning_rate(learning_rate))


@as_pytree
def nesterov(learning_rate: Number, momentum: Fraction = 0.9) -> GradientTransformation:
    """Nesterov's accelerated gradient: momentum that looks one step ahead.

        v <- momentum v + g            u = -learning_rate (g + momentum v)

    Args, State: as `momentum`.
    Differs from: `momentum`, which does not see where it is about to be; `nadam`, adaptive.
    Source: Nesterov 1983, in the form of Sutskever et al. 2013.
    """
    return chain(with_nesterov(scale_by_momentum(momentum)), scale_by_learning_rate(learning_rate))


@as_pytree
def noisy_sgd(
    learning_rate: Number,
    eta: NonNegative = 0.01,
    gamma: Number = 0.55,
    key: Any = None,
    *,
    seed: int | None = None,
) -> GradientTransformation:
    """Noisy gradient descent: normal noise on the gradient, less of it with every step.

        u = -learning_rate (g + N(0, eta / t^gamma))

    Args:
      learning_rate: the step, above 0 to descend. May be a schedule.
      eta: at least 0, the variance of the noise at the first step; 0.01 by default.
      gamma: how fast it falls; 0.55 by default.
      key: of the noise, a random key or an int; None (default) is 0. It is structure: lanes share
        their noise.
      seed: optax's older name of key.

    State: `optax.AddNoiseState(count, rng_key)`, no tree.
    Differs from: `sgd`, whose noise is that of the batches.
    Source: Neelakantan et al. 2015, equation 1, arXiv:1511.06807.
    """
    return chain(add_noise(eta, gamma, key, seed=seed), scale_by_learning_rate(learning_rate))


@as_pytree
def adagrad(
    learning_rate: Number,
    initial_accumulator_value: NonNegative = 0.1,
    eps: NonNegative = 1e-7,
) -> GradientTransformation:
    """AdaGrad: descend by the gradient over the root of all squared gradients so far.

        s <- s + g^2            u = -learning_rate g / sqrt(s + eps)

    Args:
      learning_rate: the step, above 0 to descend. May be a schedule.
      initial_accumulator_value: at least 0, what s starts from; 0.1 by default, 0 in the paper.
      eps: at least 0, inside the root; 1e-7 by default.

    State: `ScaleByRssState(sum_of_squares)`, one tree like the parameters.
    Differs from: `rmsprop`, which forgets old gradients; PyTorch, whose eps is outside the root.
    Source: Duchi, Hazan & Singer 2011, JMLR 12.
    """
    return chain(
        scale_by_rss(initial_accumulator_value, eps), scale_by_learning_rate(learning_rate)
    )


@as_pytree
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
    """RMSProp: descend by the gradient over its root mean square.

        v <- decay v + (1 - decay) g^2            u = -learning_rate g / sqrt(v + eps)

    Args:
      learning_rate: the step, above 0 to descend. May be a schedule.
      decay: in [0, 1), of the average of squares; 0.9 by default. May be a schedule.
      eps: at least 0; 1e-8 by default.
      initial_scale: at least 0, what v starts from.
      eps_in_sqrt: False puts eps outside: g / (sqrt(v) + eps), as PyTorch.
      centered: True subtracts the square of the average gradient from v, an estimate of variance.
      momentum: in [0, 1]; accumulates the steps, learning rate included, as Keras; None: does not.
      nesterov: look ahead; needs momentum.
      bias_correction: True divides the averages by 1 - decay^t.

    State: `ScaleByRmsState(nu)`, one tree; centred `ScaleByRStdDevState(mu, nu)`, two; one more,
      `TraceState(trace)`, with momentum.
    Differs from: `adam` with b1=0, which corrects the bias; from PyTorch under a schedule with
      momentum, whose velocity is without the learning rate.
    Source: Tieleman & Hinton 2012, lecture 6.5; Graves 2013 for the centred form.
    """
    quotient = scale_by_stddev if centered else scale_by_rms
    return chain(
        quotient(decay, eps, initial_scale, eps_in_sqrt, bias_correction),
        scale_by_learning_rate(learning_rate),
        identity() if momentum is None else trace(momentum, nesterov),
    )


@as_pytree
def adam(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """Adam: descend by the bias-corrected average over the bias-corrected root mean square.

        m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
        u  = -learning_rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t) + eps_root) + eps)

    Args:
      learning_rate: the step, above 0 to descend. May be a schedule, as the others.
      b1: in [0, 1), of the average gradient; 0.9 by default.
      b2: in [0, 1), of the average square; 0.999 by default.
      eps: at least 0, outside the root; 1e-8 by default.
      eps_root: at least 0, inside; 0 by default. Hypergradients are finite with 0 as well.
      mu_dtype: of m; None: float32 for 16-bit parameters, else theirs.
      nesterov: True looks ahead, which is `nadam`.

    State: `ScaleByAdamState(count, mu, nu, log_b1, log_b2)`, two trees and three scalars.
    Differs from: Keras, which adds eps before the bias correction; `adamw`, which decays weights.
    Source: Kingma & Ba 2015, algorithm 1, arXiv:1412.6980.
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        scale_by_learning_rate(learning_rate),
    )


@as_pytree
def adamw(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Number = 1e-4,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    nesterov: bool = False,
    independent_decay: bool = False,
) -> GradientTransformation:
    """AdamW: Adam with decoupled weight decay.

        u = -learning_rate (m^ / (sqrt(v^ + eps_root) + eps) + weight_decay p)

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov: as `adam`.
      weight_decay: 1e-4 by default. May be a schedule.
      mask: a tree of bools like the parameters (or a prefix), or a function from parameters to
        one: which leaves decay. None: all do.
      independent_decay: True takes the decay out of the rate, u = -learning_rate (...) -
        weight_decay p, so that the best decay does not move with the rate; a schedule of the rate
        then leaves the decay alone.

    State: as `adam`.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: Adam on a loss with an L2 penalty, whose decay passes through the quotient.
    Source: Loshchilov & Hutter 2019, algorithm 2, arXiv:1711.05101.
    """
    direction = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    decay = add_decayed_weights(weight_decay, mask)
    if independent_decay:
        rate = scale_by_learning_rate(learning_rate, flip_sign=False)
        return chain(direction, rate, decay, scale(-1.0))
    return chain(direction, decay, scale_by_learning_rate(learning_rate))


@as_pytree
def nadam(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
) -> GradientTransformation:
    """NAdam: Adam that looks ahead as Nesterov does.

        m^ = b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)
        u  = -learning_rate m^ / (sqrt(v / (1 - b2^t) + eps_root) + eps)

    Args, State: as `adam`; `nesterov=False` is `adam`.
    Differs from: Keras and PyTorch, whose b1 follows a schedule.
    Source: Dozat 2016, algorithm 2, with one b1 for all steps.
    """
    return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)


@as_pytree
def amsgrad(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
) -> GradientTransformation:
    """AMSGrad: Adam over a magnitude that never shrinks.

        x <- max(x, v / (1 - b2^t))
        u  = -learning_rate (m / (1 - b1^t)) / (sqrt(x + eps_root) + eps)

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype: as `adam`.
      bias_correction_mu, bias_correction_nu: False leaves that correction out, as the paper does.

    State: `ScaleByAmsgradState(count, mu, nu, nu_max, log_b1, log_b2)`, three trees.
    Differs from: PyTorch and Keras, whose maximum is over v before its correction: another path.
    Source: Reddi, Kale & Kumar 2018, algorithm 2, arXiv:1904.09237.
    """
    return chain(
        scale_by_amsgrad(b1, b2, eps, eps_root, mu_dtype, bias_correction_mu, bias_correction_nu),
        scale_by_learning_rate(learning_rate),
    )


@as_pytree
def adamax(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Fraction = 0.999,
    eps: NonNegative = 1e-8,
) -> GradientTransformation:
    """AdaMax: Adam over a decaying maximum in place of the root mean square.

        x <- max(b2 x, |g| + eps)            u = -learning_rate (m / (1 - b1^t)) / x

    Args:
      learning_rate, b1: as `adam`.
      b2: in [0, 1], of the maximum; 0.999 by default. May be a schedule.
      eps: at least 0, inside the maximum; 1e-8 by default.

    State: `ScaleByAdamaxState(count, mu, nu, log_b1)`, two trees.
    Differs from: Keras, which adds eps to x when it divides.
    Source: Kingma & Ba 2015, algorithm 2, arXiv:1412.6980.
    """
    return chain(scale_by_adamax(b1, b2, eps), scale_by_learning_rate(learning_rate))
