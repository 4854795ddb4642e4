"""Optimizers that scale the step of each parameter array by one factor.

The factor is relative to the norm of the layer's weights (LARS, LAMB, Fromage) or of its gradients
(NovoGrad).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Fraction, Mask, NonNegative, Number
from jgd.arithmetic import abs_square, average, quotient, safe_sqrt, weights
from jgd.combinators import chain, named
from jgd.norms import scale_by_trust_ratio
from jgd.optimizers.moments import scale_by_adam
from jgd.pytree import as_pytree
from jgd.rules import per_leaf
from jgd.transforms import (
    add_decayed_weights,
    scale_by_learning_rate,
    scale_by_momentum,
    trace,
)

__all__ = [
    "fromage",
    "lamb",
    "lars",
    "novograd",
    "scale_by_novograd",
]


@as_pytree
def lars(
    learning_rate: Number,
    weight_decay: Number = 0.0,
    weight_decay_mask: Mask = True,
    trust_coefficient: Number = 1e-3,
    eps: NonNegative = 0.0,
    trust_ratio_mask: Mask = True,
    momentum: Fraction = 0.9,
    nesterov: bool = False,
) -> GradientTransformation:
    """LARS: momentum whose step in each layer is proportional to the norm of its weights.

        x = g + weight_decay p            r = trust_coefficient ||p|| / (||x|| + eps)
        v <- momentum v - learning_rate r x            u = v

    Args:
      learning_rate: the step size; positive to descend. May be a schedule.
      weight_decay: weight decay inside the trust ratio; 0 by default. May be a schedule.
      weight_decay_mask, trust_ratio_mask: a tree of bools like the parameters (or a prefix), or a
        function from parameters to one. They select the leaves that decay and the leaves that have
        a trust ratio. True (default): all.
      trust_coefficient: above 0; 1e-3 by default.
      eps: at least 0, added to ||x||; 0 by default.
      momentum: in [0, 1]; 0.9 by default.
      nesterov: True looks ahead, as in `nesterov`.

    State: `optax.TraceState(trace)`, one tree.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `lamb`, whose direction is Adam's; `momentum`, whose velocity does not include the
      learning rate. Wrap it in `per_layer` if one array holds several layers, as in a scan.
    Source: You, Gitman & Ginsburg 2017, algorithm 1, arXiv:1708.03888.
    """
    ratio = scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps)
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        optax.masked(ratio, trust_ratio_mask),
        scale_by_learning_rate(learning_rate),
        trace(momentum, nesterov),
    )


@as_pytree
def lamb(
    learning_rate: Number,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-6,
    eps_root: NonNegative = 0.0,
    weight_decay: Number = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """LAMB: Adam whose step in each layer is proportional to the norm of its weights.

        x = m^ / (sqrt(v^ + eps_root) + eps) + weight_decay p
        u = -learning_rate x ||p|| / ||x||

    Args:
      learning_rate, b1, b2, eps_root: as in `adam`.
      eps: at least 0, added outside the root; 1e-6 by default.
      weight_decay: weight decay inside the trust ratio; 0 by default. May be a schedule.
      mask: selects the leaves that decay, as in `adamw`.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees and a scalar.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: Keras, whose decay is outside the trust ratio. Wrap it in `per_layer` if one array
      holds several layers, as in a scan.
    Source: You et al. 2020, algorithm 2, arXiv:1904.00962, without a bound on ||p||.
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )


@as_pytree
def fromage(learning_rate: Number, min_norm: NonNegative = 1e-6) -> GradientTransformation:
    """Fromage: changes each layer by a fixed fraction of its norm, and shrinks it to keep the norm.

        c = 1 / sqrt(1 + learning_rate^2)
        u = -c learning_rate g ||p|| / ||g|| + (c - 1) p

    Args:
      learning_rate: the relative change of each layer, 0.01 for example. May be a schedule.
      min_norm: the least norm, at least 0; smaller norms are raised to it. 1e-6 by default.

    State: none.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `lars`, which has momentum and does not shrink the weights.
    Source: Bernstein et al. 2020, algorithm 1, arXiv:2002.03432.
    """
    growth = jnp.sqrt(1 + learning_rate**2)
    return chain(
        scale_by_trust_ratio(min_norm),
        scale_by_learning_rate(learning_rate / growth),
        add_decayed_weights(-(learning_rate**2) / (growth * (1 + growth))),  # 1 / growth - 1
    )


class _LayerRmsState(NamedTuple):
    count: jax.Array
    nu: Any


@as_pytree
def scale_by_novograd(
    b1: Fraction = 0.9,
    b2: Decay = 0.25,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    weight_decay: Number = 0.0,
    mu_dtype: DTypeLike | None = None,
) -> GradientTransformation:
    """m <- b1 m + g / (sqrt(v + eps_root) + eps) + weight_decay p, and u = m: see `novograd`.

    State: `optax.ScaleByNovogradState(count, mu, nu)`, one tree and one scalar for each leaf.
    Source: Ginsburg et al. 2019, algorithm 1, arXiv:1905.11286.
    """

    def rule(g: Any, nu: Any, t: Any) -> tuple[Any, Any]:
        square = jnp.sum(abs_square(g))
        nu = jnp.where(t == 1, square, average(square, nu, by))
        return quotient(g, safe_sqrt(nu + eps_root) + eps), nu

    by = weights(b2)
    one_per_leaf = lambda p: jnp.zeros([], jnp.real(jnp.zeros([], p.dtype)).dtype)
    tx = chain(
        per_leaf(rule, _LayerRmsState, nu=one_per_leaf),
        add_decayed_weights(weight_decay),
        scale_by_momentum(b1, accumulator_dtype=mu_dtype, name="mu"),
    )
    return named(tx, record=optax.ScaleByNovogradState)


@as_pytree
def novograd(
    learning_rate: Number,
    b1: Fraction = 0.9,
    b2: Decay = 0.25,
    eps: NonNegative = 1e-6,
    eps_root: NonNegative = 0.0,
    weight_decay: Number = 0.0,
) -> GradientTransformation:
    """NovoGrad: momentum of gradients, each divided by the running norm of its layer's gradients.

        v <- b2 v + (1 - b2) ||g||^2 for each layer, and ||g||^2 at the first step
        m <- b1 m + g / (sqrt(v + eps_root) + eps) + weight_decay p            u = -learning_rate m

    Args:
      learning_rate: the step size; positive to descend. May be a schedule, like the other numbers.
      b1: momentum, in [0, 1]; 0.9 by default.
      b2: decay of the average squared norm, in [0, 1); 0.25 by default.
      eps, eps_root: at least 0, added outside and inside the root; 1e-6 and 0 by default.
      weight_decay: weight decay inside the momentum; 0 by default.

    State: `optax.ScaleByNovogradState(count, mu, nu)`, one tree and one scalar for each leaf.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `lars`, whose step is proportional to the norm of the weights.
    Source: Ginsburg et al. 2019, algorithm 1, arXiv:1905.11286.
    """
    return chain(
        scale_by_novograd(b1, b2, eps, eps_root, weight_decay),
        scale_by_learning_rate(learning_rate),
    )
