"""PyTorch's optimizers, with its names, arguments and defaults.

`lr` and every other number, `betas` included, may be a schedule. `maximize=True` negates the
gradient first, so that weight decay still pulls towards 0. Weight decay is L2, added to the
gradient, unless it is called decoupled: then it is multiplied by lr and subtracted from the
parameters. All optimizers but Rprop need the parameters in `update`. In the formulas g is the
gradient with the L2 term, and t counts steps from 1. The arguments that choose one of PyTorch's
implementations (foreach, fused, capturable, differentiable) are accepted and ignored.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, ParamSpec, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import GradientTransformation

import jgd.optimizers
from jgd.arguments import Decays, Fraction, NonNegative, Number, Numbers, Positive, Structure
from jgd.clipping import together
from jgd.combinators import chain, divide, named, with_nesterov
from jgd.compat.shared import (
    correct,
    factored_descent,
    scale_by_nadam,
    with_parameters_of_options,
)
from jgd.linear_algebra import orthogonalized
from jgd.norms import norm
from jgd.optimizers.adaptive import rectified
from jgd.optimizers.classic import scale_by_rms, scale_by_stddev
from jgd.optimizers.normalized import scale_by_adadelta
from jgd.pytree import as_pytree
from jgd.rules import per_leaf
from jgd.schedules import inverse_time_decay
from jgd.transforms import (
    add_decayed_weights,
    bias_correction,
    decayed_max,
    ema,
    identity,
    moving_average,
    pointwise,
    root,
    running_max,
    running_sum,
    scale,
    scale_by_learning_rate,
    scale_by_momentum,
    square,
)
from jgd.trees import TreeError

__all__ = [
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "clip_grad_norm",
    "muon",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
]


P = ParamSpec("P")


class Switches(TypedDict, total=False):
    """Arguments that choose one of PyTorch's implementations: accepted and ignored."""

    foreach: bool | None
    capturable: bool | None
    differentiable: bool | None
    fused: bool | None


def optimizer(
    rule: Callable[P, GradientTransformation], check: Callable[[Any], None] | None = None
) -> Callable[P, GradientTransformation]:
    """Decorate with `as_pytree`, with parameters in place of `**switches`."""
    return as_pytree(with_parameters_of_options(rule, {}, keyword_only=True), check=check)


def _descent(
    rule: GradientTransformation,
    lr: Any,
    weight_decay: Any,
    maximize: bool,
    decoupled: bool = False,
) -> GradientTransformation:
    """Chain a rule with its weight decay (before it, or after it if decoupled) and -lr."""
    signed = scale(-1.0) if maximize else identity()
    decay = add_decayed_weights(weight_decay)
    order = (rule, decay) if decoupled else (decay, rule)
    return chain(signed, *order, scale_by_learning_rate(lr))


@as_pytree
def clip_grad_norm(max_norm: Positive) -> GradientTransformation:
    """Clip by the global norm: u = g min(1, max_norm / (N + 1e-6)), N the norm of all gradients.

    Args:
      max_norm: the largest norm of all gradients together, above 0.

    State: `EmptyState`.
    Differs from: `optax.clip_by_global_norm`, which has no 1e-6.
    """
    return together(lambda norm: norm.plus(1e-6).bounded(max_norm))


# --- gradient descent ------------------------------------------------------------------------


def _check_nesterov(tx: Any) -> None:
    is_constant = lambda x: isinstance(x, np.floating)  # not an array, a tracer or a schedule
    no_momentum = is_constant(tx.momentum) and tx.momentum == 0
    has_dampening = is_constant(tx.dampening) and tx.dampening != 0
    if tx.nesterov and (no_momentum or has_dampening):
        raise ValueError(
            "sgd: nesterov must be False unless momentum is above 0 and dampening is 0, got"
            f" momentum={tx.momentum} and dampening={tx.dampening}"
        )


class SgdState(NamedTuple):
    """State of `sgd`."""

    count: jax.Array  # int32 scalar: steps so far
    momentum_buffer: Any  # like the parameters, at least float32


@functools.partial(optimizer, check=_check_nesterov)
def sgd(
    lr: NonNegative = 1e-3,
    momentum: Fraction = 0,
    dampening: Number = 0,
    weight_decay: NonNegative = 0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    **switches: Unpack[Switches],
) -> GradientTransformation:
    """SGD: gradient descent, with momentum as a velocity that excludes the learning rate.

        b <- momentum b + (1 - dampening) g, b = g at the first step
        u = -lr b, or -lr (g + momentum b) with nesterov, or -lr g if momentum is 0

    Args:
      lr: 0.001 by default.
      momentum: in [0, 1]; 0 by default.
      dampening: any number, 0 by default; must be 0 with nesterov.
      weight_decay: at least 0, L2; 0 by default.
      nesterov, maximize: True or False.

    State: `SgdState(count, momentum_buffer)`, one tree, even without momentum.
    Differs from: `jgd.sgd` only in dampening; Keras under a schedule, whose velocity includes the
      learning rate.
    """
    no_momentum = momentum == 0

    def rule(g: Any, momentum_buffer: Any, t: Any) -> tuple[Any, Any]:
        weight = jnp.where(no_momentum | (t == 1), 1, 1 - dampening)
        buffer = momentum * momentum_buffer + weight * g
        return (g + momentum * buffer if nesterov else buffer), buffer

    return _descent(per_leaf(rule, SgdState), lr, weight_decay, maximize)


@optimizer
def rprop(
    lr: Positive = 1e-2,
    etas: Numbers = (0.5, 1.2),
    step_sizes: Numbers = (1e-6, 50),
    *,
    maximize: bool = False,
    **switches: Unpack[Switches],
) -> GradientTransformation:
    """Rprop: see `jgd.rprop` for the formula.

    Args:
      lr: above 0, the initial step size; 0.01 by default.
      etas: the factors of a step size when the sign of the gradient changes and when it does not;
        (0.5, 1.2) by default.
      step_sizes: the least and the greatest step size; (1e-6, 50) by default.
      maximize: True or False.

    State: `optax.ScaleByRpropState`, two trees.
    """
    rule = jgd.optimizers.rprop(jnp.clip(lr, *step_sizes), *etas, *step_sizes)
    return chain(scale(-1.0), rule) if maximize else rule


# --- adaptive --------------------------------------------------------------------------------


@optimizer
def adagrad(
    lr: NonNegative = 1e-2,
    lr_decay: NonNegative = 0,
    weight_decay: NonNegative = 0,
    initial_accumulator_value: NonNegative = 0,
    eps: NonNegative = 1e-10,
    *,
    maximize: bool = False,
    **switches: Unpack[Switches],
) -> GradientTransformation:
    """AdaGrad: with eps outside the root and a 1/t decay of the learning rate.

        s <- s + g^2            u = -lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)

    Args:
      lr: 0.01 by default.
      lr_decay: at least 0, 0 by default.
      weight_decay: at least 0, L2; 0 by default.
      initial_accumulator_value: at least 0, the initial value of s; 0 by default.
      eps: at least 0, 1e-10 by default.
      maximize: True or False.

    State: `optax.ScaleByRssState(sum_of_squares)`, one tree, and a count.
    Differs from: `jgd.adagrad` and Keras, whose eps is inside the root and whose s starts at 0.1.
    """
    total = running_sum(initial_accumulator_value, name="sum_of_squares")
    quotient = divide(identity(), chain(square(), total, root(eps)))
    quotients = named(quotient, record=optax.ScaleByRssState)
    decay = scale(inverse_time_decay(1.0, 1.0, lr_decay))
    return _descent(chain(quotients, decay), lr, weight_decay, maximize)


@optimizer
def rmsprop(
    lr: NonNegative = 1e-2,
    alpha: Fraction = 0.99,
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0,
    momentum: Fraction = 0,
    centered: bool = False,
    *,
    maximize: bool = False,
    **switches: Unpack[Switches],
) -> GradientTransformation:
    """RMSProp: with eps outside the root and a velocity that excludes the learning rate.

        v <- alpha v + (1 - alpha) g^2            b <- momentum b + g / (sqrt(v) + eps)
        u = -lr b

    Args:
      lr: 0.01 by default.
      alpha: in [0, 1], 0.99 by default.
      eps: at least 0, 1e-8 by default.
      weight_decay: at least 0, L2; 0 by default.
      momentum: in [0, 1]; 0 by default.
      centered: True subtracts the square of the average gradient from v; where rounding makes the
        difference negative (NaN in PyTorch) the root is 0.
      maximize: True or False.

    State: `optax.ScaleByRmsState(nu)` or, if centered, `optax.ScaleByRStdDevState(mu, nu)`, and
      `optax.TraceState(trace)`.
    Differs from: `jgd.rmsprop` and Keras, with eps inside the root and the learning rate in b.
    """
    scaled = scale_by_stddev if centered else scale_by_rms
    rule = chain(scaled(alpha, eps, eps_in_sqrt=False), scale_by_momentum(momentum))
    return _descent(rule, lr, weight_decay, maximize)


@optimizer
def adadelta(
    lr: NonNegative = 1.0,
    rho: Fraction = 0.9,
    eps: NonNegative = 1e-6,
    weight_decay: NonNegative = 0,
    *,
    maximize: bool = False,
    **switches: Unpack[Switches],
) -> GradientTransformation:
    """AdaDelta with L2 weight decay: see `jgd.adadelta` for the formula.

    Args:
      lr: 1 by default.
      rho: in [0, 1], 0.9 by default.
      eps: at least 0, 1e-6 by default.
      weight_decay: at least 0, L2; 0 by default.
      maximize: True or False.

    State: `optax.ScaleByAdaDeltaState(e_g, e_x)`, two trees.
    """
    return _descent(scale_by_adadelta(rho, eps), lr, weight_decay, maximize)


def _adam(betas: Any, eps: Any, amsgrad: bool) -> GradientTransformation:
    b1, b2 = betas
    largest = [running_max(name="nu_max")] if amsgrad else []
    average = chain(square(), moving_average(b2, name="nu"), *largest)
    magnitude = chain(average, bias_correction(b2), root(eps))
    record = optax.ScaleByAmsgradState if amsgrad else optax.ScaleByAdamState
    return named(divide(ema(b1, name="mu"), magnitude), record=record, shared=["count"])


@optimizer
def adam(
    lr: NonNegative = 1e-3,
    betas: Decays = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    **switches: Unpack[Switches],
) -> GradientTransformation:
    """Adam: `jgd.adam` with L2 weight decay.

        m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
        u = -lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
      lr: 0.001 by default.
      betas: (b1, b2), in [0, 1); (0.9, 0.999) by default.
      eps: at least 0, 1e-8 by default.
      weight_decay: at least 0, L2; 0 by default.
      decoupled_weight_decay: True for decoupled instead of L2 weight decay.
      amsgrad: True replaces v, before its bias correction, by the largest v so far.
      maximize: True or False.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees; `optax.ScaleByAmsgradState(count, mu,
      nu, nu_max)`, three.
    Differs from: `jgd.amsgrad`, whose maximum is over the corrected v; `jgd.adam` under a scheduled
      b1, where the product of all b1 so far replaces b1^t.
    """
    rule = _adam(betas, eps, amsgrad)
    return _descent(rule, lr, weight_decay, maximize, decoupled_weight_decay)


@optimizer
def adamw(
    lr: NonNegative = 1e-3,
    betas: Decays = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    **switches: Unpack[Switches],
) -> GradientTransformation:
    """AdamW: Adam with decoupled weight decay, u = -lr (Adam's quotient + weight_decay p).

    Args, State: as in `adam`; weight_decay is 0.01 by default.
    Differs from: `jgd.adamw`, whose weight decay is 1e-4 by default.
    """
    return _descent(_adam(betas, eps, amsgrad), lr, weight_decay, maximize, decoupled=True)


@optimizer
def adamax(
    lr: NonNegative = 2e-3,
    betas: Decays = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0,
    *,
    maximize: bool = False,
    **switches: Unpack[Switches],
) -> GradientTransformation:
    """AdaMax: `jgd.adamax` with L2 weight decay.

        x <- max(b2 x, |g| + eps)            u = -lr m / (1 - b1^t) / x

    Args: as in `adam`; lr is 0.002 by default.
    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees.
    """
    b1, b2 = betas
    quotient = divide(ema(b1, name="mu"), decayed_max(b2, eps, name="nu"))
    rule = named(quotient, record=optax.ScaleByAdamState)
    return _descent(rule, lr, weight_decay, maximize)


@optimizer
def nadam(
    lr: NonNegative = 2e-3,
    betas: Decays = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0,
    momentum_decay: NonNegative = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
    **switches: Unpack[Switches],
) -> GradientTransformation:
    """NAdam: Adam with Nesterov momentum, which follows a schedule with 0.96^(t momentum_decay).

        d_t = b1 (1 - 0.96^(t momentum_decay) / 2)            D = d_1 d_2 ... d_t
        m^ = d_(t+1) m / (1 - D d_(t+1)) + (1 - d_t) g / (1 - D)
        u = -lr m^ / (sqrt(v / (1 - b2^t)) + eps)

    Args: as in `adam`; lr is 0.002 by default.
      momentum_decay: at least 0, 0.004 by default.

    State: `NadamState(count, mu, nu, mu_product)`, two trees.
    Differs from: Keras, whose schedule is 250 times as fast; `jgd.nadam`, whose momentum is
      constant.
    Source: Dozat 2016, algorithm 2.
    """
    b1, b2 = betas
    rule = scale_by_nadam(b1, b2, eps, momentum_decay)
    return _descent(rule, lr, weight_decay, maximize, decoupled_weight_decay)


@optimizer
def radam(
    lr: NonNegative = 1e-3,
    betas: Decays = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
    **switches: Unpack[Switches],
) -> GradientTransformation:
    """RAdam: `jgd.radam`, with eps added to the root before its bias correction.

        l = l_inf - 2 t b2^t / (1 - b2^t), r as in `jgd.radam`
        u = -lr m^ r sqrt(1 - b2^t) / (sqrt(v) + eps), or -lr m^ if l is not above 5

    Args: as in `adam`.
    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees.
    Source: Liu et al. 2020, algorithm 2, arXiv:1908.03265.
    """
    b1, b2 = betas
    average = chain(square(), moving_average(b2, name="nu"))
    roots = chain(average, root(eps), correct(b2, power=-0.5), rectified(b2, 5.0, of="nu"))
    quotient = divide(ema(b1, name="mu"), roots)
    rule = named(quotient, record=optax.ScaleByAdamState, shared=["count"])
    return _descent(rule, lr, weight_decay, maximize, decoupled_weight_decay)


# --- matrices --------------------------------------------------------------------------------


@optimizer
def adafactor(
    lr: NonNegative = 1e-2,
    beta2_decay: Number = -0.8,
    eps: Numbers = (None, 1e-3),
    d: Positive = 1.0,
    weight_decay: NonNegative = 0.0,
    *,
    maximize: bool = False,
    **switches: Unpack[Switches],
) -> GradientTransformation:
    """Adafactor: factored over the last two axes, with a step relative to the parameters.

        w = t^beta2_decay            row, column <- averages of g^2 with weight w
        v = max(row column / max(mean(row), eps_1), eps_1^2)
        x = g / sqrt(v)            x <- x / max(1, rms(x) / d)
        u = -max(eps_2, rms(p)) min(lr, 1 / sqrt(t)) x - lr weight_decay p

    Args:
      lr: the upper bound of the relative step, 0.01 by default.
      beta2_decay: below 0, -0.8 by default.
      eps: (eps_1, eps_2), (None, 0.001) by default; None is the epsilon of the parameters' dtype,
        and of float32 for 16-bit parameters.
      d: above 0, the upper bound of rms(x); 1 by default.
      weight_decay: at least 0, decoupled; 0 by default.
      maximize: True or False.

    State: `FactorsState(count, row, column, v)`: a row and a column for each matrix.
    Differs from: `jgd.adafactor`, which factors the two largest axes, if they are long, and has no
      1 / sqrt(t); Keras, whose epsilon_1 is added to each square.
    Source: Shazeer & Stern 2018, algorithms 4 and 6, arXiv:1804.04235.
    """
    floor, least_scale = eps
    rule = factored_descent(lr, beta2_decay, 0.0, least_scale, d, floor)
    signed = scale(-1.0) if maximize else identity()
    return chain(signed, rule, add_decayed_weights(-lr * weight_decay))


@optimizer
def muon(
    lr: NonNegative = 1e-3,
    weight_decay: NonNegative = 0.1,
    momentum: Fraction = 0.95,
    nesterov: bool = True,
    ns_coefficients: Numbers = (3.4445, -4.7750, 2.0315),
    eps: NonNegative = 1e-7,
    ns_steps: Structure = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
    **switches: Unpack[Switches],
) -> GradientTransformation:
    """Muon: momentum, orthogonalized by an iteration in bfloat16; for matrices only.

        m <- momentum m + (1 - momentum) g            x = momentum m + (1 - momentum) g, or m
        u = -lr (scale orthogonal(x) + weight_decay p)

    orthogonal(x) repeats x <- a x + (b x x' + c (x x')^2) x, starting from x / max(||x||, eps).

    Args:
      lr: 0.001 by default.
      weight_decay: at least 0, decoupled; 0.1 by default.
      momentum: in [0, 1], 0.95 by default.
      nesterov: True (default) for the first x.
      ns_coefficients: (a, b, c).
      eps: at least 0, 1e-7 by default.
      ns_steps: the number of iterations, which is structure; 5 by default.
      adjust_lr_fn: "original" or None (default) for scale = sqrt(max(1, rows / columns)),
        "match_rms_adamw" for scale = 0.2 sqrt(max(rows, columns)).

    State: `MovingAverageState(average)`, one tree.
    Raises: `TreeError` in `update` for a leaf that is not a matrix; give such leaves another
      optimizer with `jgd.param_groups`.
    Differs from: `jgd.muon`, whose iteration has the dtype of the parameters and whose scale is
      sqrt(max(1, columns / rows)), since the kernels of flax are inputs by outputs.
    Source: Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982.
    """

    def rounded(x: Any) -> Any:
        """Round to bfloat16 and return float32."""
        return jax.lax.reduce_precision(jnp.asarray(x, jnp.float32), 8, 7)

    def orthogonal(x: Any) -> Any:
        if x.ndim != 2:
            raise TreeError(f"every leaf must be a matrix, got shape {x.shape}")
        rows, columns = x.shape
        # products of bfloat16 numbers are exact in float32, in which PyTorch sums them
        unit = lambda x: rounded(x / jnp.maximum(rounded(norm(x)), rounded(eps)))
        triple = jnp.stack([jnp.asarray(c, jnp.float32) for c in ns_coefficients])
        wide = rounded(x.astype(jnp.float32))
        result = orthogonalized(
            wide, jnp.broadcast_to(triple, (ns_steps, 3)), unit, rounded
        ).astype(x.dtype)
        match_adamw = adjust_lr_fn == "match_rms_adamw"
        factor = 0.2 * math.sqrt(max(x.shape)) if match_adamw else math.sqrt(max(1, rows / columns))
        return factor * result

    average = moving_average(momentum)
    rule = chain(with_nesterov(average) if nesterov else average, pointwise(orthogonal))
    return _descent(rule, lr, weight_decay, maximize=False, decoupled=True)
