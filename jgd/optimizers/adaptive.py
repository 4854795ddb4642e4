"""Variants of Adam with other directions or other magnitudes.

adabelief   divide(ema(b1), root mean square of g - m)
radam       divide(ema(b1), rms(b2), or 1 while the variance of rms(b2) is unknown)
adan        divide(ema(b1) + average change of the gradient, rms(b3) of the extrapolated gradient)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Mask, NonNegative, Number
from jgd.arithmetic import (
    average,
    complement,
    finite,
    formula,
    increment,
    quotient,
    safe_sqrt,
    weights,
)
from jgd.combinators import Slot, Slots, add, chain, divide, named, subtract, with_accumulators
from jgd.pytree import as_pytree
from jgd.rules import difference
from jgd.transforms import (
    BiasCorrectionState,
    MovingAverageState,
    accumulator,
    add_decayed_weights,
    bias_correction,
    bias_weight,
    count_slot,
    decay_slots,
    ema,
    identity,
    moving_average,
    nesterov_ema,
    rms,
    root,
    scale,
    scale_by_learning_rate,
    square,
)
from jgd.trees import leafwise

__all__ = [
    "adabelief",
    "adan",
    "ademamix",
    "radam",
    "scale_by_adan",
    "scale_by_ademamix",
    "scale_by_belief",
    "scale_by_radam",
    "scale_by_yogi",
    "yogi",
]


# --- rectified -------------------------------------------------------------------------------


def rectification(decay: Any, count: Any, corrected: Any, threshold: Any) -> tuple[Any, Any]:
    """Return whether the variance of the magnitude is known yet, and RAdam's r(t).

    Args:
      corrected: 1 - decay^count.
    """
    # lengths of simple averages with as many degrees of freedom: in the limit, and at this step
    limit = 2 / complement(decay) - 1
    length = limit - 2 * count * (1 - corrected) / corrected
    tractable = length >= threshold
    length = jnp.where(tractable, length, limit)
    r = safe_sqrt(quotient((length - 4) * (length - 2) * limit, (limit - 4) * (limit - 2) * length))
    return tractable, r


@formula
def _rectified(x: Any, tractable: Any, r: Any) -> Any:
    return jnp.where(tractable, quotient(x, r), 1)


@as_pytree
def rectified(decay: Decay, threshold: Number, *, of: str) -> GradientTransformation:
    """u = x / r(t) for a magnitude x, and u = 1 while the variance of x is unknown."""

    def step(updates: Any, slots: Slots, _: Any) -> Any:
        corrected = bias_weight(slots, decay, of)
        gate = rectification(decay, slots.step("count", increment), corrected, threshold)
        return leafwise(_rectified, updates, numbers=gate)

    slots = [count_slot(), *decay_slots(of)]
    return with_accumulators([step], slots, BiasCorrectionState, {"count": "count"})


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
    """Adam's quotient times r(t), or the debiased average m^ while t is small: see `radam`.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
    Source: Liu et al. 2020, algorithm 2, arXiv:1908.03265.
    """
    direction = (nesterov_ema if nesterov else ema)(b1, name="mu")
    magnitude = chain(rms(b2, eps, eps_root, name="nu"), rectified(b2, threshold, of="nu"))
    shared = ["count", "log_nu"]
    return named(divide(direction, magnitude), record=optax.ScaleByAdamState, shared=shared)


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
    """RAdam: Adam that does not divide until the variance of its magnitude is known.

        l_inf = 2 / (1 - b2) - 1            l = l_inf - 2 t b2^t / (1 - b2^t)
        r = sqrt((l - 4) (l - 2) l_inf / ((l_inf - 4) (l_inf - 2) l))
        u = -learning_rate m^ r / (sqrt(v^ + eps_root) + eps), or -learning_rate m^ if l < threshold

    Args:
      learning_rate, b1, b2, eps, eps_root, nesterov: as in `adam`.
      threshold: the least l, the degrees of freedom of the magnitude, at which the update divides;
        above 4; 5 by default. For b2 up to 2 / 3, l stays below 5.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
    Differs from: `adam`, which needs a warmup instead; PyTorch, which adds eps before the bias
      correction.
    Source: Liu et al. 2020, algorithm 2, arXiv:1908.03265.
    """
    return chain(
        scale_by_radam(b1, b2, eps, eps_root, threshold, nesterov=nesterov),
        scale_by_learning_rate(learning_rate),
    )


# --- other magnitudes ------------------------------------------------------------------------


@formula
def _average_plus_eps(g: Any, s: Any, by: Any, eps: Any) -> Any:
    return average(g, s, by) + eps


@as_pytree
def scale_by_belief(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-16,
    eps_root: NonNegative = 1e-16,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """m as in Adam, s <- b2 s + (1 - b2) (g - m)^2 + eps_root, and u = m^ / (sqrt(s^) + eps).

    State: `optax.ScaleByBeliefState(count, mu, nu)`, two trees and a scalar.
    Source: Zhuang et al. 2020, algorithm 2, arXiv:2010.07468.
    """
    direction = (nesterov_ema if nesterov else ema)(b1, name="mu")
    deviation = subtract(identity(), moving_average(b1, name="mu"))
    variance = accumulator(MovingAverageState, _average_plus_eps, weights(b2), eps_root, name="nu")
    magnitude = chain(deviation, square(), variance, bias_correction(b2, of="nu"), root(eps))
    shared = ["count", "mu"]
    return named(divide(direction, magnitude), record=optax.ScaleByBeliefState, shared=shared)


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
    """AdaBelief: Adam whose magnitude is the deviation of gradients from their average.

        m <- b1 m + (1 - b1) g            s <- b2 s + (1 - b2) (g - m)^2 + eps_root
        u = -learning_rate (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps)

    Args:
      learning_rate, b1, b2, nesterov: as in `adam`.
      eps: at least 0, added outside the root; 1e-16 by default.
      eps_root: at least 0, added to s at each step, which adds up to eps_root / (1 - b2); 1e-16 by
        default.

    State: `optax.ScaleByBeliefState(count, mu, nu)`, two trees and a scalar.
    Differs from: `adam`, whose magnitude is large for large gradients even if they do not vary.
    Source: Zhuang et al. 2020, algorithm 2, arXiv:2010.07468.
    """
    return chain(
        scale_by_belief(b1, b2, eps, eps_root, nesterov=nesterov),
        scale_by_learning_rate(learning_rate),
    )


@formula
def _toward(g: Any, v: Any, weight: Any) -> Any:
    return v - weight * jnp.sign(finite(v) - g) * g


@as_pytree
def scale_by_yogi(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-3,
    eps_root: NonNegative = 0.0,
    initial_accumulator_value: NonNegative = 1e-6,
) -> GradientTransformation:
    """m as in Adam, v <- v - (1 - b2) sign(v - g^2) g^2, and u = m^ / (sqrt(v^ + eps_root) + eps).

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar. Both trees start at
      `initial_accumulator_value`.
    Source: Zaheer et al. 2018, algorithm 2.
    """
    start = initial_accumulator_value
    direction = chain(moving_average(b1, start, name="mu"), bias_correction(b1, of="mu"))
    average = accumulator(MovingAverageState, _toward, complement(b2), name="nu", start=start)
    magnitude = chain(square(), average, bias_correction(b2, of="nu"), root(eps, eps_root))
    quotient = divide(direction, magnitude)
    return named(quotient, record=optax.ScaleByAdamState, shared=["count"])


@as_pytree
def yogi(
    learning_rate: Number, b1: Decay = 0.9, b2: Decay = 0.999, eps: NonNegative = 1e-3
) -> GradientTransformation:
    """Yogi: Adam whose squared magnitude v changes by at most (1 - b2) g^2 per step.

        m <- b1 m + (1 - b1) g            v <- v - (1 - b2) sign(v - g^2) g^2
        u = -learning_rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
      learning_rate, b1, b2: as in `adam`.
      eps: at least 0, added outside the root; 1e-3 by default.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
    Differs from: `adam`, whose v shrinks by the factor b2 per step where gradients are small.
    Source: Zaheer et al. 2018, algorithm 2, NeurIPS 31; both averages start at 1e-6.
    """
    return chain(scale_by_yogi(b1, b2, eps), scale_by_learning_rate(learning_rate))


# --- other directions ------------------------------------------------------------------------


class ScaleByAdanState(NamedTuple):
    """State of `scale_by_adan`."""

    count: jax.Array  # int32 scalar: number of steps so far
    m: optax.Updates  # average of g; like the parameters, at least float32, as are v, n and g
    v: optax.Updates  # average of g - g_old
    n: optax.Updates  # average of (g + b2 (g - g_old))^2
    g: optax.Updates  # the gradient of the previous step


@as_pytree
def scale_by_adan(
    b1: Decay = 0.98,
    b2: Decay = 0.92,
    b3: Decay = 0.99,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
) -> GradientTransformation:
    """u = (m^ + b2 v^) / (sqrt(n^ + eps_root) + eps): see `adan`.

    State: `ScaleByAdanState(count, m, v, n, g)`, four trees and a scalar.
    Source: Xie et al. 2022, algorithm 1, arXiv:2208.06677.
    """
    change = difference(name="g")
    direction = add(ema(b1, name="m"), chain(change, ema(b2, name="v"), scale(b2)))
    extrapolated = add(identity(), chain(change, scale(b2)))
    quotient = divide(direction, chain(extrapolated, rms(b3, eps, eps_root, name="n")))
    return named(quotient, record=ScaleByAdanState, shared=["count", "g"])


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
    """Adan: Adam with a gradient extrapolated along its last change.

        d = g - g_old, 0 at first           n <- b3 n + (1 - b3) (g + b2 d)^2
        m <- b1 m + (1 - b1) g              v <- b2 v + (1 - b2) d
        u = -learning_rate ((m^ + b2 v^) / (sqrt(n^ + eps_root) + eps) + weight_decay p)

    Args:
      learning_rate: the step size; positive to descend. May be a schedule, like the other numbers.
      b1, b2, b3: decays of the averages m, v, n, in [0, 1); 0.98, 0.92, 0.99 by default. Each is
        1 - beta of the paper.
      eps, eps_root: at least 0, added outside and inside the root; 1e-8 by default.
      weight_decay: decoupled weight decay; 0 by default.
      mask: selects the leaves that decay, as in `adamw`.

    State: `ScaleByAdanState(count, m, v, n, g)`, four trees and a scalar.
    Differs from: optax, which multiplies d by 1 - b2 (0.08), while the paper's 1 - beta2 is b2
      (0.92); `nadam`, which extrapolates along m; the paper, where weight decay divides the new
      parameters by 1 + learning_rate weight_decay.
    Source: Xie et al. 2022, algorithm 1, arXiv:2208.06677.
    """
    return chain(
        scale_by_adan(b1, b2, b3, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


@as_pytree
def _counted(*, name: str) -> GradientTransformation:
    """u = g; counts the steps under `name`, since the state of optax has a second count."""

    def step(updates: Any, slots: Slots, _: Any) -> Any:
        slots.step(name, increment)
        return updates

    zero = Slot(name, lambda _: jnp.zeros([], jnp.int32))
    return with_accumulators([step], [zero], BiasCorrectionState, {"count": name})


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

    State: `optax.contrib.ScaleByAdemamixState(count, count_m2, m1, m2, nu)`, three trees
      and two scalars.
    Source: Pagliardini, Ablin & Grangier 2024, algorithm 1, arXiv:2409.03137.
    """
    average = moving_average(b3, accumulator_dtype=mu_dtype, name="m2")
    slow = chain(average, _counted(name="count_m2"), scale(alpha))
    direction = add(ema(b1, accumulator_dtype=mu_dtype, name="m1"), slow)
    quotient = divide(direction, rms(b2, eps, eps_root, name="nu"))
    return named(quotient, record=optax.contrib.ScaleByAdemamixState, shared=["count"])


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
    """AdEMAMix: Adam whose direction adds a second, much slower average of gradients.

        m1 <- b1 m1 + (1 - b1) g            m2 <- b3 m2 + (1 - b3) g
        u = -learning_rate ((m1^ + alpha m2) / (sqrt(v^ + eps_root) + eps) + weight_decay p)

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype: as in `adam`; mu_dtype applies to m1 and m2.
      b3: decay of the slow average, in [0, 1); 0.9999 by default. This average has no bias
        correction. The paper raises b3 with a schedule.
      alpha: weight of the slow average; 5 by default. The paper raises alpha with a schedule.
      weight_decay: decoupled weight decay; 0 by default.
      mask: selects the leaves that decay, as in `adamw`.

    State: `optax.contrib.ScaleByAdemamixState(count, count_m2, m1, m2, nu)`, three trees
      and two scalars.
    Differs from: optax, where mu_dtype applies to v too (in bfloat16, 0.999 v rounds to v).
    Source: Pagliardini, Ablin & Grangier 2024, algorithm 1, arXiv:2409.03137.
    """
    return chain(
        scale_by_ademamix(b1, b2, b3, alpha, eps, eps_root, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
