"""Optimizers that use only the sign of each coordinate's gradient or average.

Their steps do not shrink with the gradient: the learning rate is the change of a parameter per
step, and must decay for the parameters to converge.
"""

from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Fraction, Mask, NonNegative, Number, Positive
from jgd.arithmetic import average, weights
from jgd.combinators import chain
from jgd.pytree import as_pytree
from jgd.rules import per_leaf, real
from jgd.transforms import (
    add_decayed_weights,
    ema,
    scale,
    scale_by_learning_rate,
    scale_by_sign,
)

__all__ = ["lion", "rprop", "scale_by_lion", "scale_by_rprop", "sign_sgd", "signum"]


@as_pytree
def sign_sgd(learning_rate: Number) -> GradientTransformation:
    """Sign descent: moves every coordinate by the learning rate.

        u = -learning_rate sign(g)

    Args:
      learning_rate: the step of every coordinate; positive to descend. May be a schedule.

    State: none.
    Differs from: `signum`, which takes the sign of an average.
    Source: Bernstein et al. 2018, algorithm 1, arXiv:1802.04434.
    """
    return chain(scale_by_sign(), scale_by_learning_rate(learning_rate))


@as_pytree
def signum(
    learning_rate: Number, beta: Decay = 0.9, accumulator_dtype: DTypeLike | None = None
) -> GradientTransformation:
    """Signum: sign descent with the average gradient.

        m <- beta m + (1 - beta) g            u = -learning_rate sign(m)

    Args:
      learning_rate: the step of every coordinate; positive to descend. May be a schedule.
      beta: decay of the average, in [0, 1); 0.9 by default. May be a schedule.
      accumulator_dtype: dtype of m. None (default): float32 for 16-bit parameters, otherwise their
        dtype.

    State: `optax.EmaState(count, ema)`, one tree and a scalar.
    Differs from: `lion`, which uses different decays for the update and for the average.
    Source: Bernstein et al. 2018, algorithm 2, arXiv:1802.04434.
    """
    mean = ema(beta, debias=False, accumulator_dtype=accumulator_dtype)
    return chain(mean, scale_by_sign(), scale_by_learning_rate(learning_rate))


@as_pytree
def scale_by_lion(
    b1: Decay = 0.9,
    b2: Decay = 0.99,
    mu_dtype: DTypeLike | None = None,
    *,
    mode: Literal["hard", "smooth", "refined"] = "hard",
    smooth_beta: Positive = 1.0,
) -> GradientTransformation:
    """u = sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g: see `lion`.

    Args:
      b1, b2, mu_dtype: as in `lion`.
      mode: replaces sign(x): "hard" (default) is sign(x), "smooth" is tanh(smooth_beta x), and
        "refined" is x clipped to [-1, 1].
      smooth_beta: the slope of "smooth" at 0, above 0.

    State: `optax.ScaleByLionState(count, mu)`, one tree and one scalar.
    Source: Chen et al. 2023, algorithm 2, arXiv:2302.06675.
    """
    squash = {
        "hard": jnp.sign,
        "smooth": lambda x: jnp.tanh(smooth_beta * x),
        "refined": lambda x: jnp.where(jnp.abs(x) < 1, x, jnp.sign(x)),
    }[mode]

    def rule(g: Any, mu: Any) -> tuple[Any, Any]:
        # The sign needs no exact average, and `average` makes this step take 1.45 times as long.
        return squash(b1 * mu + (1 - b1) * g), average(g, mu, by)

    by = weights(b2)
    return per_leaf(rule, optax.ScaleByLionState, mu=lambda p: jnp.zeros_like(p, dtype=mu_dtype))


@as_pytree
def lion(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Decay = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Number = 1e-3,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Lion: sign descent with an average that is read with one decay and written with another.

        u = -learning_rate (sign(b1 m + (1 - b1) g) + weight_decay p)
        m <- b2 m + (1 - b2) g

    Args:
      learning_rate: the step of every coordinate, usually a third to a tenth of Adam's learning
        rate. May be a schedule, like the other numbers.
      b1: decay in the update, in [0, 1); 0.9 by default.
      b2: decay of the average m, in [0, 1); 0.99 by default.
      mu_dtype: dtype of m. None (default): float32 for 16-bit parameters, otherwise their
        dtype.
      weight_decay: decoupled weight decay; 1e-3 by default.
      mask: selects the leaves that decay, as in `adamw`.

    State: `optax.ScaleByLionState(count, mu)`, one tree and one scalar.
    Differs from: `signum`, for which b1 = b2.
    Source: Chen et al. 2023, algorithm 2, arXiv:2302.06675.
    """
    return chain(
        scale_by_lion(b1, b2, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


@as_pytree
def scale_by_rprop(
    learning_rate: Positive,
    eta_minus: Fraction = 0.5,
    eta_plus: Number = 1.2,
    min_step_size: NonNegative = 1e-6,
    max_step_size: NonNegative = 50.0,
) -> GradientTransformation:
    """u = s sign(g), for step sizes s that grow while the sign does not change: see `rprop`.

    State: `optax.ScaleByRpropState(step_sizes, prev_updates)`, two trees.
    Source: Riedmiller & Braun 1993, the variant without backtracking (Rprop-).
    """

    def rule(g: Any, step_sizes: Any, prev_updates: Any) -> tuple[Any, Any, Any]:
        agreement = real(g) * jnp.sign(prev_updates)
        factor = jnp.where(agreement > 0, eta_plus, eta_minus)
        moved = jnp.clip(step_sizes * factor, min_step_size, max_step_size)
        s = jnp.where(agreement == 0, step_sizes, moved)
        u = jnp.where(agreement < 0, 0, s * jnp.sign(g))
        return u, s, u

    return per_leaf(
        rule, optax.ScaleByRpropState, step_sizes=lambda p: jnp.full_like(p, learning_rate)
    )


@as_pytree
def rprop(
    learning_rate: Positive,
    eta_minus: Fraction = 0.5,
    eta_plus: Number = 1.2,
    min_step_size: NonNegative = 1e-6,
    max_step_size: NonNegative = 50.0,
) -> GradientTransformation:
    """Rprop: a step size per coordinate, which grows while the sign stays and shrinks otherwise.

        s <- clip(s eta, min_step_size, max_step_size), with eta by the sign of g g_old
        u = -s sign(g), and 0 where the sign changed

    Args:
      learning_rate: the initial step size, above 0.
      eta_minus: eta where the sign changed, in [0, 1]; 0.5 by default.
      eta_plus: eta where the sign stayed, at least 1; 1.2 by default.
      min_step_size, max_step_size: bounds of the step sizes, at least 0; 1e-6 and 50 by default.

    State: `optax.ScaleByRpropState(step_sizes, prev_updates)`, two trees.
    Differs from: optax, which applies each step one call later; `sign_sgd`, which has one step
      size. Use full batches: noise changes the signs of mini-batch gradients.
    Source: Riedmiller & Braun 1993, doi:10.1109/ICNN.1993.298623; as in PyTorch.
    """
    return chain(
        scale_by_rprop(learning_rate, eta_minus, eta_plus, min_step_size, max_step_size),
        scale(-1.0),
    )
