"""Adam and its closest variants: a corrected average over a corrected root mean square.

    adam       divide(ema(b1), rms(b2, eps))
    nadam      divide(nesterov_ema(b1), rms(b2, eps))
    adamax     divide(ema(b1), decayed_max(b2, eps))

Each `scale_by_x` is the quotient of the optimizer x below it.
"""

import optax
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Fraction, Mask, NonNegative, Number
from jgd.combinators import chain, divide, named
from jgd.pytree import as_pytree
from jgd.transforms import (
    add_decayed_weights,
    decayed_max,
    ema,
    nesterov_ema,
    rms,
    root,
    running_max,
    scale,
    scale_by_learning_rate,
    square,
)

__all__ = [
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "amsgrad",
    "nadam",
    "nadamw",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_amsgrad",
]


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

    m^ = m / (1 - b1^t) and v^ = v / (1 - b2^t). With `nesterov`, `nesterov_ema` replaces m^.

    Args:
      b1, b2: decays of m and v, in [0, 1). May be schedules.
      eps, eps_root: at least 0, added outside and inside the root.
      mu_dtype: dtype of m. None (default): float32 for 16-bit parameters, otherwise their
        dtype.
      nesterov: True looks ahead, as in `nadam`.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
    Differs from: optax, whose bias correction under a scheduled decay uses the current decay for
      all steps; jgd uses the product of the decays so far.
    Source: Kingma & Ba 2015, algorithm 1, arXiv:1412.6980.
    """
    direction = nesterov_ema if nesterov else ema
    mean = direction(b1, accumulator_dtype=mu_dtype, name="mu")
    quotient = divide(mean, rms(b2, eps, eps_root, name="nu"))
    return named(quotient, record=optax.ScaleByAdamState, shared=["count"])


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
    """Adam: divides the average gradient by its root mean square, both bias-corrected.

        m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
        u  = -learning_rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t) + eps_root) + eps)

    Args:
      learning_rate: the step size; positive to descend. May be a schedule, like the other numbers.
      b1: decay of the average gradient m, in [0, 1); 0.9 by default.
      b2: decay of the average square v, in [0, 1); 0.999 by default. `square` says what happens
        where a square overflows.
      eps: at least 0, added outside the root; 1e-8 by default.
      eps_root: at least 0, added inside the root; 0 by default. Hypergradients are finite even
        with 0.
      mu_dtype: dtype of m. None (default): float32 for 16-bit parameters, otherwise their
        dtype.
      nesterov: True gives `nadam`.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
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
    mask: Mask | None = None,
    *,
    nesterov: bool = False,
    independent_decay: bool = False,
) -> GradientTransformation:
    """AdamW: Adam with decoupled weight decay.

        u = -learning_rate (m^ / (sqrt(v^ + eps_root) + eps) + weight_decay p)

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov: as in `adam`.
      weight_decay: decoupled weight decay; 1e-4 by default. May be a schedule.
      mask: a tree of bools like the parameters (or a prefix), or a function from parameters to
        one; only leaves marked True decay. None (default): all do.
      independent_decay: True does not multiply the decay by the learning rate,
        u = -learning_rate (...) - weight_decay p, so that the best weight decay does not depend on
        the learning rate, and a schedule of the rate does not change the decay.

    State: as in `adam`.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: Adam on a loss with an L2 penalty, where the decay is part of the gradient.
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
    """NAdam: Adam with Nesterov's look ahead.

        m^ = b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)
        u  = -learning_rate m^ / (sqrt(v / (1 - b2^t) + eps_root) + eps)

    Args, State: as in `adam`; `nesterov=False` gives `adam`.
    Differs from: Keras and PyTorch, whose b1 follows a schedule.
    Source: Dozat 2016, algorithm 2, with one b1 for all steps.
    """
    return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)


@as_pytree
def nadamw(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Number = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = True,
) -> GradientTransformation:
    """NAdamW: NAdam with decoupled weight decay.

        m^ = b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)
        u  = -learning_rate (m^ / (sqrt(v^ + eps_root) + eps) + weight_decay p)

    Args, State: as in `adamw`; `nesterov=False` gives `adamw`.
    Differs from: PyTorch's NAdam with decoupled decay, whose b1 follows a schedule.
    Source: Dozat 2016, algorithm 2; Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    return adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )


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
    """x <- max(x, v^), and u = m^ / (sqrt(x + eps_root) + eps), for m^ and v^ of `scale_by_adam`.

    Args:
      b1, b2, eps, eps_root, mu_dtype: as in `scale_by_adam`.
      bias_correction_mu, bias_correction_nu: False replaces m^ by m, or v^ by v, as in the paper.

    State: `optax.ScaleByAmsgradState(count, mu, nu, nu_max)`, three trees and a scalar.
    Differs from: PyTorch and Keras, which take the maximum before the bias correction of v.
    Source: Reddi, Kale & Kumar 2018, algorithm 2, arXiv:1904.09237.
    """
    direction = ema(b1, bias_correction_mu, mu_dtype, name="mu")
    average = ema(b2, bias_correction_nu, name="nu")
    magnitude = chain(square(), average, running_max(name="nu_max"), root(eps, eps_root))
    quotient = divide(direction, magnitude)
    return named(quotient, record=optax.ScaleByAmsgradState, shared=["count"])


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
    """AMSGrad: Adam with a magnitude that never shrinks.

        x <- max(x, v / (1 - b2^t))
        u  = -learning_rate (m / (1 - b1^t)) / (sqrt(x + eps_root) + eps)

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype: as in `adam`.
      bias_correction_mu, bias_correction_nu: False leaves out the correction, as in the paper.

    State: `optax.ScaleByAmsgradState(count, mu, nu, nu_max)`, three trees and a scalar.
    Differs from: PyTorch and Keras, which take the maximum before the bias correction of v.
    Source: Reddi, Kale & Kumar 2018, algorithm 2, arXiv:1904.09237.
    """
    return chain(
        scale_by_amsgrad(b1, b2, eps, eps_root, mu_dtype, bias_correction_mu, bias_correction_nu),
        scale_by_learning_rate(learning_rate),
    )


@as_pytree
def scale_by_adamax(
    b1: Decay = 0.9, b2: Fraction = 0.999, eps: NonNegative = 1e-8
) -> GradientTransformation:
    """m <- b1 m + (1 - b1) g, x <- max(b2 x, |g| + eps), and u = m / (1 - b1^t) / x.

    Args:
      b1: decay of m, in [0, 1). May be a schedule.
      b2: decay of the maximum x, in [0, 1]. May be a schedule.
      eps: at least 0, added inside the maximum.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
    Differs from: Keras, which adds eps to x in the denominator.
    Source: Kingma & Ba 2015, algorithm 2, arXiv:1412.6980.
    """
    quotient = divide(ema(b1, name="mu"), decayed_max(b2, eps, name="nu"))
    return named(quotient, record=optax.ScaleByAdamState)


@as_pytree
def adamax(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Fraction = 0.999,
    eps: NonNegative = 1e-8,
) -> GradientTransformation:
    """AdaMax: Adam with a decaying maximum in place of the root mean square.

        x <- max(b2 x, |g| + eps)            u = -learning_rate (m / (1 - b1^t)) / x

    Args:
      learning_rate, b1: as in `adam`.
      b2: decay of the maximum x, in [0, 1]; 0.999 by default. May be a schedule.
      eps: at least 0, added inside the maximum; 1e-8 by default.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
    Differs from: Keras, which adds eps to x in the denominator.
    Source: Kingma & Ba 2015, algorithm 2, arXiv:1412.6980.
    """
    return chain(scale_by_adamax(b1, b2, eps), scale_by_learning_rate(learning_rate))


@as_pytree
def adamaxw(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Fraction = 0.999,
    eps: NonNegative = 1e-8,
    weight_decay: Number = 1e-4,
    mask: Mask | None = None,
) -> GradientTransformation:
    """AdaMaxW: AdaMax with decoupled weight decay.

        x <- max(b2 x, |g| + eps)
        u = -learning_rate (m / (1 - b1^t) / x + weight_decay p)

    Args:
      learning_rate, b1, b2, eps: as in `adamax`.
      weight_decay: decoupled weight decay; 1e-4 by default. May be a schedule.
      mask: selects the leaves that decay, as in `adamw`.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
    Differs from: `adamax` on a loss with an L2 penalty, where the decay is part of the gradient.
    Source: Kingma & Ba 2015, algorithm 2, arXiv:1412.6980; Loshchilov & Hutter 2019.
    """
    return chain(
        scale_by_adamax(b1, b2, eps),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
