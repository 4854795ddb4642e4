"""Adam's relatives: other directions over other magnitudes.

adabelief   divide(ema(b1), root mean square of g - m)
radam       divide(ema(b1), rms(b2) held back while it has no variance)
adan        divide(ema(b1) + what the gradient changes by, rms(b3) of the gradient ahead)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Mask, NonNegative, Number
from jgd.arithmetic import average, complement, finite, formula, increment, quotient, safe_sqrt
from jgd.combinators import Slot, Slots, add, chain, divide, named, remembering, subtract
from jgd.pytree import as_pytree
from jgd.rules import difference
from jgd.transforms import (
    BiasCorrectionState,
    MovingAverageState,
    add_decayed_weights,
    bias_correction,
    bias_weight,
    count_slot,
    decay_slots,
    ema,
    identity,
    memory,
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
    """Return whether the variance of the magnitude has an estimate yet, and RAdam's r(t).

    Args:
      corrected: 1 - decay^count.
    """
    # lengths of the simple averages with as many degrees of freedom: in the limit, and now
    limit = 2 / complement(decay) - 1
    length = limit - 2 * count * (1 - corrected) / corrected
    tractable = length >= threshold
    length = jnp.where(tractable, length, limit)
    r = safe_sqrt(quotient((length - 4) * (length - 2) * limit, (limit - 4) * (limit - 2) * length))
    return tractable, r


@formula
def _held_back(x: Any, tractable: Any, r: Any) -> Any:
    return jnp.where(tractable, quotient(x, r), 1)


@as_pytree
def rectified(decay: Decay, threshold: Number, *, of: str) -> GradientTransformation:
    """Magnitude x / r(t), and 1 while its variance has no estimate."""

    def step(updates: Any, slots: Slots, _: Any) -> Any:
        corrected = bias_weight(slots, decay, of)
        gate = rectification(decay, slots.step("count", increment), corrected, threshold)
        return leafwise(_held_back, updates, numbers=gate)

    slots = [count_slot(), *decay_slots(of)]
    return remembering([step], slots, BiasCorrectionState, {"count": "count"})


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
    """RAdam: Adam that waits until its magnitude is worth dividing by.

        l_inf = 2 / (1 - b2) - 1            l = l_inf - 2 t b2^t / (1 - b2^t)
        r = sqrt((l - 4) (l - 2) l_inf / ((l_inf - 4) (l_inf - 2) l))
        u = -learning_rate m^ r / (sqrt(v^ + eps_root) + eps), or -learning_rate m^ if l < threshold

    Args:
      learning_rate, b1, b2, eps, eps_root, nesterov: as `adam`. b2 above 0.6, or l stays below 5.
      threshold: of l, the degrees of freedom of the magnitude; above 4, 5 by default.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
    Differs from: `adam` with a warm-up, which it replaces; from PyTorch, whose eps is added before
      the bias correction.
    Source: Liu et al. 2020, algorithm 2, arXiv:1908.03265.
    """
    return chain(
        scale_by_radam(b1, b2, eps, eps_root, threshold, nesterov=nesterov),
        scale_by_learning_rate(learning_rate),
    )


# --- other magnitudes ------------------------------------------------------------------------


@formula
def _added(g: Any, s: Any, weight: Any, eps: Any) -> Any:
    return average(g, s, weight) + eps


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

    State: `optax.ScaleByBeliefState(count, mu, nu)`, two trees and a scalar.
    Source: Zhuang et al. 2020, algorithm 2, arXiv:2010.07468.
    """
    direction = (nesterov_ema if nesterov else ema)(b1, name="mu")
    surprise = subtract(identity(), moving_average(b1, name="mu"))
    spread = memory(MovingAverageState, _added, complement(b2), eps_root, name="nu")
    magnitude = chain(surprise, square(), spread, bias_correction(b2, of="nu"), root(eps))
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
    """AdaBelief: Adam whose magnitude is how far gradients are from their average.

        m <- b1 m + (1 - b1) g            s <- b2 s + (1 - b2) (g - m)^2 + eps_root
        u = -learning_rate (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps)

    Args:
      learning_rate, b1, b2, nesterov: as `adam`.
      eps: at least 0, outside the root; 1e-16 by default.
      eps_root: at least 0, added to s at each step, so that it grows to eps_root / (1 - b2).

    State: `optax.ScaleByBeliefState(count, mu, nu)`, two trees and a scalar.
    Differs from: `adam`, whose steps are short where gradients are large and steady.
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
    """m as Adam's, v <- v - (1 - b2) sign(v - g^2) g^2, and u = m^ / (sqrt(v^ + eps_root) + eps).

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar; both
    trees start at `initial_accumulator_value`.
    Source: Zaheer et al. 2018, algorithm 2.
    """
    start = initial_accumulator_value
    direction = chain(moving_average(b1, start, name="mu"), bias_correction(b1, of="mu"))
    average = memory(MovingAverageState, _toward, complement(b2), name="nu", start=start)
    magnitude = chain(square(), average, bias_correction(b2, of="nu"), root(eps, eps_root))
    quotient = divide(direction, magnitude)
    return named(quotient, record=optax.ScaleByAdamState, shared=["count"])


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

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
    Differs from: `adam`, whose v forgets a rare large gradient at the rate b2.
    Source: Zaheer et al. 2018, algorithm 2, NeurIPS 31; both averages start at 1e-6.
    """
    return chain(scale_by_yogi(b1, b2, eps), scale_by_learning_rate(learning_rate))


# --- other directions ------------------------------------------------------------------------


class ScaleByAdanState(NamedTuple):
    """State of `scale_by_adan`."""

    count: jax.Array  # int32 scalar: steps so far
    m: optax.Updates  # like the parameters, at least float32: average of g
    v: optax.Updates  # average of g - g_old
    n: optax.Updates  # average of (g + b2 (g - g_old))^2
    g: optax.Updates  # the gradient of the step before


@as_pytree
def scale_by_adan(
    b1: Decay = 0.98,
    b2: Decay = 0.92,
    b3: Decay = 0.99,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
) -> GradientTransformation:
    """Adan's quotient: u = (m^ + b2 v^) / (sqrt(n^ + eps_root) + eps), see `adan`.

    State: `ScaleByAdanState(count, m, v, n, g)`, four trees and a scalar.
    Source: Xie et al. 2022, algorithm 1, arXiv:2208.06677.
    """
    change = difference(name="g")
    direction = add(ema(b1, name="m"), chain(change, ema(b2, name="v"), scale(b2)))
    ahead = add(identity(), chain(change, scale(b2)))
    quotient = divide(direction, chain(ahead, rms(b3, eps, eps_root, name="n")))
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

    State: `ScaleByAdanState(count, m, v, n, g)`, four trees and a scalar.
    Differs from: optax, which looks ahead by 1 - b2, 0.08, where the paper's 1 - beta2 is b2, 0.92;
      `nadam`, which looks ahead along m; from the paper, where the decay divides p.
    Source: Xie et al. 2022, algorithm 1, arXiv:2208.06677.
    """
    return chain(
        scale_by_adan(b1, b2, b3, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


@as_pytree
def _counted(*, name: str) -> GradientTransformation:
    """Count the steps under another name, as optax's state has it."""

    def step(updates: Any, slots: Slots, _: Any) -> Any:
        slots.step(name, increment)
        return updates

    zero = Slot(name, lambda _: jnp.zeros([], jnp.int32))
    return remembering([step], [zero], BiasCorrectionState, {"count": name})


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

    State: `optax.contrib.ScaleByAdemamixState(count, count_m2, m1, m2, nu)`, three trees
    and two scalars.
    Differs from: optax, whose mu_dtype is that of v too (in bfloat16, 0.999 v is v).
    Source: Pagliardini, Ablin & Grangier 2024, algorithm 1, arXiv:2409.03137.
    """
    return chain(
        scale_by_ademamix(b1, b2, b3, alpha, eps, eps_root, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
