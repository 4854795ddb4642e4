"""Optimizers that divide each gradient by a magnitude before they average it.

LaProp divides by the current magnitude and ADOPT by the magnitude of the previous step. AdaDelta
does not average; it multiplies the quotient by the root mean square of past updates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Mask, NonNegative, Number
from jgd.arithmetic import abs_square, average, quotient, safe_sqrt, weights
from jgd.clipping import entries
from jgd.combinators import chain, divide, named, with_nesterov
from jgd.pytree import as_pytree
from jgd.rules import per_leaf
from jgd.transforms import (
    add_decayed_weights,
    ema,
    identity,
    moving_average,
    rms,
    scale_by_learning_rate,
)

__all__ = [
    "adadelta",
    "adopt",
    "laprop",
    "scale_by_adadelta",
    "scale_by_adopt",
    "scale_by_laprop",
]


@as_pytree
def scale_by_laprop(
    b1: Decay = 0.9, b2: Decay = 0.999, eps: NonNegative = 1e-15
) -> GradientTransformation:
    """v as in Adam, m <- b1 m + (1 - b1) g / (sqrt(v^) + eps), and u = m^.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
    Source: Ziyin, Wang & Ueda 2020, algorithm 1, arXiv:2002.04839.
    """
    tx = chain(divide(identity(), rms(b2, eps, name="nu")), ema(b1, name="mu"))
    return named(tx, record=optax.ScaleByAdamState, shared=["count"])


@as_pytree
def laprop(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-15,
    weight_decay: Number = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """LaProp: Adam that divides before it averages, so that it averages normalized gradients.

        v <- b2 v + (1 - b2) g^2            m <- b1 m + (1 - b1) g / (sqrt(v / (1 - b2^t)) + eps)
        u = -learning_rate (m / (1 - b1^t) + weight_decay p)

    Args:
      learning_rate, b1, b2: as in `adam`. Any pair of b1 and b2 is stable.
      eps: at least 0, added outside the root; 1e-15 by default.
      weight_decay: decoupled weight decay; 0 by default. May be a schedule.
      mask: selects the leaves that decay, as in `adamw`.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
    Differs from: `adam`, which divides the average, not each gradient, by the current magnitude.
    Source: Ziyin, Wang & Ueda 2020, algorithm 1, arXiv:2002.04839.
    """
    return chain(
        scale_by_laprop(b1, b2, eps),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


class _AdoptState(NamedTuple):
    count: jax.Array
    nu: Any


def _fourth_root(count: Any) -> Any:
    return count**0.25


@as_pytree
def scale_by_adopt(
    b1: Decay = 0.9,
    b2: Decay = 0.9999,
    eps: NonNegative = 1e-6,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Any], Any] = _fourth_root,
) -> GradientTransformation:
    """m <- b1 m + (1 - b1) clip(g / max(sqrt(v_old), eps), t^(1/4)), and u = m: see `adopt`.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and one scalar.
    Source: Taniguchi et al. 2024, algorithm 2, arXiv:2411.02853.
    """

    def rule(g: Any, nu: Any, t: Any) -> tuple[Any, Any]:
        x = quotient(g, jnp.maximum(safe_sqrt(nu), eps))
        if use_clipping:
            x = entries(x, clip_value_fn(t - 1))
        first = t == 1  # no earlier magnitude to divide by: the update is 0
        square = abs_square(g)
        nu = jnp.where(first, square, average(square, nu, by))
        return jnp.where(first, 0 * g, x), nu

    by = weights(b2)
    mean = moving_average(b1, accumulator_dtype=mu_dtype, name="mu")
    mean = with_nesterov(mean) if nesterov else mean
    return named(chain(per_leaf(rule, _AdoptState), mean), record=optax.ScaleByAdamState)


@as_pytree
def adopt(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Decay = 0.9999,
    eps: NonNegative = 1e-6,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Any], Any] = _fourth_root,
) -> GradientTransformation:
    """ADOPT: Adam that divides by the magnitude of the previous step, and converges for any b2.

        x = clip(g / max(sqrt(v_old), eps), t^(1/4))            v <- b2 v + (1 - b2) g^2
        m <- b1 m + (1 - b1) x            u = -learning_rate m

    Args:
      learning_rate, b1, mu_dtype: as in `adam`.
      b2: decay of the average square v, in [0, 1); 0.9999 by default. v starts as the first g^2.
      eps: the least magnitude, at least 0; 1e-6 by default.
      nesterov: True averages x into m a second time for the update.
      use_clipping: True by default; False does not clip x.
      clip_value_fn: steps so far -> the bound of |x|; the fourth root by default.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and one scalar. The first update is 0.
    Differs from: `laprop`, whose magnitude includes the gradient that it divides.
    Source: Taniguchi et al. 2024, algorithm 2, arXiv:2411.02853.
    """
    direction = scale_by_adopt(
        b1,
        b2,
        eps,
        mu_dtype,
        nesterov=nesterov,
        use_clipping=use_clipping,
        clip_value_fn=clip_value_fn,
    )
    return chain(direction, scale_by_learning_rate(learning_rate))


@as_pytree
def scale_by_adadelta(rho: Decay = 0.9, eps: NonNegative = 1e-6) -> GradientTransformation:
    """u = sqrt(e_x + eps) / sqrt(e_g + eps) g, with average squares of g and u: see `adadelta`.

    State: `optax.ScaleByAdaDeltaState(e_g, e_x)`, two trees.
    Source: Zeiler 2012, algorithm 1, arXiv:1212.5701.
    """

    def rule(g: Any, e_g: Any, e_x: Any) -> tuple[Any, Any, Any]:
        e_g = average(abs_square(g), e_g, by)
        u = quotient(safe_sqrt(e_x + eps), safe_sqrt(e_g + eps)) * g
        return u, e_g, average(abs_square(u), e_x, by)

    by = weights(rho)
    return per_leaf(rule, optax.ScaleByAdaDeltaState)


@as_pytree
def adadelta(
    learning_rate: Number | None = None,
    rho: Decay = 0.9,
    eps: NonNegative = 1e-6,
    weight_decay: Number = 0.0,
    weight_decay_mask: Mask | None = None,
) -> GradientTransformation:
    """AdaDelta: gradients over their root mean square, times the root mean square of past updates.

        e_g <- rho e_g + (1 - rho) g^2            d = sqrt(e_x + eps) / sqrt(e_g + eps) g
        e_x <- rho e_x + (1 - rho) d^2            u = -learning_rate d

    Args:
      learning_rate: positive to descend. None (default) is 1, as in the paper. May be a schedule.
      rho: decay of both averages, in [0, 1); 0.9 by default.
      eps: at least 0, added inside both roots; sets the size of the first steps; 1e-6 by default.
      weight_decay: an L2 penalty: weight_decay p is added to the gradient. May be a schedule.
      weight_decay_mask: selects the leaves that decay, as in `adamw`.

    State: `optax.ScaleByAdaDeltaState(e_g, e_x)`, two trees.
    Differs from: optax, which does not flip the sign if no learning rate is given, and so ascends.
    Source: Zeiler 2012, algorithm 1, arXiv:1212.5701.
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_adadelta(rho, eps),
        scale_by_learning_rate(1.0 if learning_rate is None else learning_rate),
    )
