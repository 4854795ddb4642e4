"""Adam's relatives: other directions over other magnitudes.

Each is `divide(direction, magnitude)` and reads as its formula.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Fraction, Mask, NonNegative, Number
from jgd.combinators import expect, leafwise, quotient, safe_sqrt
from jgd.optimizers.classic import adamw
from jgd.pytree import as_pytree
from jgd.rules import difference
from jgd.transforms import (
    ScaleByAdamState,
    add,
    add_decayed_weights,
    bias_correction,
    chain,
    divide,
    ema,
    identity,
    moving_average,
    named,
    nesterov_ema,
    rms,
    root,
    scale,
    scale_by_adamax,
    scale_by_learning_rate,
    square,
    subtract,
)
from jgd.words import BiasCorrectionState, MovingAverageState, memory, weights

__all__ = [
    "adabelief",
    "adamaxw",
    "adan",
    "ademamix",
    "nadamw",
    "radam",
    "scale_by_adan",
    "scale_by_ademamix",
    "scale_by_belief",
    "scale_by_radam",
    "scale_by_yogi",
    "yogi",
]


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

    Args, State: as `adamw`, which `nesterov=False` is.
    Differs from: PyTorch's NAdam with decoupled decay, whose b1 follows a schedule.
    Source: Dozat 2016, algorithm 2; Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    return adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )


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
      learning_rate, b1, b2, eps: as `adamax`.
      weight_decay: 1e-4 by default. May be a schedule.
      mask: which leaves decay, as in `adamw`.

    State: `ScaleByAdamaxState(count, mu, nu, log_b1)`, two trees.
    Differs from: `adamax` on a loss with an L2 penalty, whose decay passes through the quotient.
    Source: Kingma & Ba 2015, algorithm 2, arXiv:1412.6980; Loshchilov & Hutter 2019.
    """
    return chain(
        scale_by_adamax(b1, b2, eps),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


# --- rectified -------------------------------------------------------------------------------


def rectification(decay: Any, count: Any, corrected: Any, threshold: Any) -> tuple[Any, Any]:
    """Whether the variance of the magnitude has an estimate yet, and RAdam's r(t).

    Args:
      corrected: 1 - decay^count.
    """
    # lengths of the simple averages with as many degrees of freedom: in the limit, and now
    limit = (1 + decay) / (1 - decay)
    length = limit - 2 * count * (1 - corrected) / corrected
    tractable = length >= threshold
    length = jnp.where(tractable, length, limit)
    r = safe_sqrt(quotient((length - 4) * (length - 2) * limit, (limit - 4) * (limit - 2) * length))
    return tractable, r


@as_pytree
def _rectified(decay: Decay, threshold: Number) -> GradientTransformation:
    """A magnitude x / r(t), and 1 while its variance has no estimate: RAdam's gate."""

    def init(params: Any) -> Any:
        return BiasCorrectionState(jnp.zeros([], jnp.int32), jnp.zeros([], float))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        corrected, _, state = weights(decay, expect(state, BiasCorrectionState))
        tractable, r = rectification(decay, state.count, corrected, threshold)
        return leafwise(lambda x: jnp.where(tractable, quotient(x, r), 1), updates), state

    return GradientTransformation(init, update)


@as_pytree
def scale_by_radam(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    threshold: Number = 5.0,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """Adam's quotient times r(t), and the debiased average alone while t is small: see `radam`.

    State: `ScaleByAdamState(count, mu, nu, log_b1, log_b2)`, two trees and three scalars.
    Source: Liu et al. 2020, algorithm 2, arXiv:1908.03265.
    """
    direction = nesterov_ema(b1) if nesterov else ema(b1)
    magnitude = chain(rms(b2, eps, eps_root), _rectified(b2, threshold))
    slots = "count mu log_b1 count nu log_b2 count log_b2"
    return named(divide(direction, magnitude), record=ScaleByAdamState, slots=slots)


@as_pytree
def radam(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    threshold: Number = 5.0,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """RAdam: Adam that waits until its magnitude is worth dividing by.

        l_inf = 2 / (1 - b2) - 1            l = l_inf - 2 t b2^t / (1 - b2^t)
        r = sqrt((l - 4) (l - 2) l_inf / ((l_inf - 4) (l_inf - 2) l))
        u = -learning_rate m^ r / (sqrt(v^ + eps_root) + eps), or -learning_rate m^ if l < threshold

    Args:
      learning_rate, b1, b2, eps, eps_root, nesterov: as `adam`. b2 above 0.6, or l stays below 5.
      threshold: of l, the degrees of freedom of the magnitude; above 4, 5 by default.

    State: `ScaleByAdamState(count, mu, nu, log_b1, log_b2)`, two trees and three scalars.
    Differs from: `adam` with a warm-up, which it replaces; from PyTorch, whose eps is added before
      the bias correction.
    Source: Liu et al. 2020, algorithm 2, arXiv:1908.03265.
    """
    return chain(
        scale_by_radam(b1, b2, eps, eps_root, threshold, nesterov=nesterov),
        scale_by_learning_rate(learning_rate),
    )


# --- other magnitudes ------------------------------------------------------------------------


class ScaleByBeliefState(NamedTuple):
    """State of `scale_by_belief`."""

    count: jax.Array  # int32 scalar: steps so far
    mu: Any  # like the parameters, at least float32
    nu: Any
    log_b1: jax.Array  # float32 scalars: means of log(b1) and log(b2)
    log_b2: jax.Array


@as_pytree
def scale_by_belief(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-16,
    eps_root: NonNegative = 1e-16,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """m as Adam's, s <- b2 s + (1 - b2) (g - m)^2 + eps_root, and u = m^ / (sqrt(s^) + eps).

    State: `ScaleByBeliefState(count, mu, nu, log_b1, log_b2)`, two trees and three scalars.
    Source: Zhuang et al. 2020, algorithm 2, arXiv:2010.07468.
    """
    direction = nesterov_ema(b1) if nesterov else ema(b1)
    surprise = subtract(identity(), moving_average(b1))  # the same mu: it is stored once
    spread = memory(MovingAverageState, lambda g, s: b2 * s + (1 - b2) * g + eps_root)
    magnitude = chain(surprise, square(), spread, bias_correction(b2), root(eps))
    slots = "count mu log_b1 mu nu count log_b2"
    return named(divide(direction, magnitude), record=ScaleByBeliefState, slots=slots)


@as_pytree
def adabelief(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-16,
    eps_root: NonNegative = 1e-16,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """AdaBelief: Adam whose magnitude is how far gradients are from their average.

        m <- b1 m + (1 - b1) g            s <- b2 s + (1 - b2) (g - m)^2 + eps_root
        u = -learning_rate (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps)

    Args:
      learning_rate, b1, b2, nesterov: as `adam`.
      eps: at least 0, outside the root; 1e-16 by default.
      eps_root: at least 0, added to s at each step, so that it grows to eps_root / (1 - b2).

    State: `ScaleByBeliefState(count, mu, nu, log_b1, log_b2)`, two trees and three scalars.
    Differs from: `adam`, whose steps are short where gradients are large and steady.
    Source: Zhuang et al. 2020, algorithm 2, arXiv:2010.07468.
    """
    return chain(
        scale_by_belief(b1, b2, eps, eps_root, nesterov=nesterov),
        scale_by_learning_rate(learning_rate),
    )


@as_pytree
def scale_by_yogi(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-3,
    eps_root: NonNegative = 0.0,
    initial_accumulator_value: NonNegative = 1e-6,
) -> GradientTransformation:
    """m as Adam's, v <- v - (1 - b2) sign(v - g^2) g^2, and u = m^ / (sqrt(v^ + eps_root) + eps).

    State: `ScaleByAdamState(count, mu, nu, log_b1, log_b2)`, two trees and three scalars; both
    trees start at `initial_accumulator_value`.
    Source: Zaheer et al. 2018, algorithm 2.
    """
    start = initial_accumulator_value
    direction = chain(moving_average(b1, start), bias_correction(b1))
    toward = lambda g, v: v - (1 - b2) * jnp.sign(v - g) * g
    average = memory(MovingAverageState, toward, start)
    magnitude = chain(square(), average, bias_correction(b2), root(eps, eps_root))
    slots = "mu count log_b1 nu count log_b2"
    return named(divide(direction, magnitude), record=ScaleByAdamState, slots=slots)


@as_pytree
def yogi(
    learning_rate: Number, b1: Decay = 0.9, b2: Decay = 0.999, eps: NonNegative = 1e-3
) -> GradientTransformation:
    """Yogi: Adam whose magnitude moves by a bounded amount, so that it cannot collapse.

        m <- b1 m + (1 - b1) g            v <- v - (1 - b2) sign(v - g^2) g^2
        u = -learning_rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
      learning_rate, b1, b2: as `adam`.
      eps: at least 0, outside the root; 1e-3 by default.

    State: `ScaleByAdamState(count, mu, nu, log_b1, log_b2)`, two trees and three scalars.
    Differs from: `adam`, whose v forgets a rare large gradient at the rate b2.
    Source: Zaheer et al. 2018, algorithm 2, NeurIPS 31; both averages start at 1e-6.
    """
    return chain(scale_by_yogi(b1, b2, eps), scale_by_learning_rate(learning_rate))


# --- other directions ------------------------------------------------------------------------


class ScaleByAdanState(NamedTuple):
    """State of `scale_by_adan`."""

    count: jax.Array  # int32 scalar: steps so far
    m: Any  # like the parameters, at least float32: averages of g, of g - g_old, of the square
    v: Any
    n: Any
    g: Any  # the last gradient
    log_b1: jax.Array  # float32 scalars: means of log(b1), log(b2), log(b3)
    log_b2: jax.Array
    log_b3: jax.Array


@as_pytree
def scale_by_adan(
    b1: Decay = 0.98,
    b2: Decay = 0.92,
    b3: Decay = 0.99,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
) -> GradientTransformation:
    """Adan's quotient: u = (m^ + b2 v^) / (sqrt(n^ + eps_root) + eps), see `adan`.

    State: `ScaleByAdanState(count, m, v, n, g, ...)`, four trees and four scalars.
    Source: Xie et al. 2022, algorithm 1, arXiv:2208.06677.
    """
    direction = add(ema(b1), chain(difference(), ema(b2), scale(b2)))
    ahead = add(identity(), chain(difference(), scale(b2)))
    slots = "count m log_b1 count g count v log_b2 count g count n log_b3"
    quotients = divide(direction, chain(ahead, rms(b3, eps, eps_root)))
    return named(quotients, record=ScaleByAdanState, slots=slots)


@as_pytree
def adan(
    learning_rate: Number,
    b1: Decay = 0.98,
    b2: Decay = 0.92,
    b3: Decay = 0.99,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 1e-8,
    weight_decay: Number = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adan: Adam that looks ahead along the change of the gradient.

        d = g - g_old, 0 at first           n <- b3 n + (1 - b3) (g + b2 d)^2
        m <- b1 m + (1 - b1) g              v <- b2 v + (1 - b2) d
        u = -learning_rate ((m^ + b2 v^) / (sqrt(n^ + eps_root) + eps) + weight_decay p)

    Args:
      learning_rate: the step, above 0 to descend. May be a schedule, as the others.
      b1, b2, b3: in [0, 1), of the averages m, v, n; 0.98, 0.92, 0.99 by default, each with its
        bias correction (^). Each is 1 - beta of the paper.
      eps, eps_root: at least 0, outside and inside the root; 1e-8 by default.
      weight_decay: decoupled; 0 by default.
      mask: which leaves decay, as in `adamw`.

    State: `ScaleByAdanState(count, m, v, n, g, ...)`, four trees and four scalars.
    Differs from: optax, which looks ahead by 1 - b2, 0.08, where the paper's 1 - beta2 is b2, 0.92;
      `nadam`, which looks ahead along m; from the paper, where the decay divides p.
    Source: Xie et al. 2022, algorithm 1, arXiv:2208.06677.
    """
    return chain(
        scale_by_adan(b1, b2, b3, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


class ScaleByAdemamixState(NamedTuple):
    """State of `scale_by_ademamix`."""

    count: jax.Array  # int32 scalar: steps so far
    m1: Any  # like the parameters, at least float32: the fast and the slow average
    m2: Any
    nu: Any
    log_b1: jax.Array  # float32 scalars: means of log(b1) and log(b2)
    log_b2: jax.Array


@as_pytree
def scale_by_ademamix(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    b3: Decay = 0.9999,
    alpha: Number = 6.0,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
) -> GradientTransformation:
    """u = (m1^ + alpha m2) / (sqrt(v^ + eps_root) + eps): see `ademamix`.

    State: `ScaleByAdemamixState(count, m1, m2, nu, log_b1, log_b2)`, three trees and three scalars.
    Source: Pagliardini, Ablin & Grangier 2024, algorithm 1, arXiv:2409.03137.
    """
    slow = chain(moving_average(b3, accumulator_dtype=mu_dtype), scale(alpha))
    direction = add(ema(b1, accumulator_dtype=mu_dtype), slow)
    slots = "count m1 log_b1 m2 count nu log_b2"
    quotients = divide(direction, rms(b2, eps, eps_root))
    return named(quotients, record=ScaleByAdemamixState, slots=slots)


@as_pytree
def ademamix(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    b3: Decay = 0.9999,
    alpha: Number = 5.0,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Number = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """AdEMAMix: Adam with a second, very slow average of gradients in its direction.

        m1 <- b1 m1 + (1 - b1) g            m2 <- b3 m2 + (1 - b3) g
        u = -learning_rate ((m1^ + alpha m2) / (sqrt(v^ + eps_root) + eps) + weight_decay p)

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype: as `adam`; mu_dtype is that of m1 and m2.
      b3: in [0, 1), of the slow average, which has no bias correction; 0.9999 by default. The paper
        raises it by a schedule.
      alpha: how much the slow average counts; 5 by default. The paper raises it by a schedule.
      weight_decay: decoupled; 0 by default.
      mask: which leaves decay, as in `adamw`.

    State: `ScaleByAdemamixState(count, m1, m2, nu, log_b1, log_b2)`, three trees and three scalars.
    Differs from: optax, whose mu_dtype is that of v too (in bfloat16, 0.999 v is v).
    Source: Pagliardini, Ablin & Grangier 2024, algorithm 1, arXiv:2409.03137.
    """
    return chain(
        scale_by_ademamix(b1, b2, b3, alpha, eps, eps_root, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
