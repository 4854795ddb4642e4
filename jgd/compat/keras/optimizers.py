"""Keras's optimizers, with its names, arguments and defaults.

`learning_rate` may be a schedule, which counts steps from 0. All optimizers also take the arguments
of `DecayOptions`: weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum,
ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps, and a name, which is
ignored. Weight decay is decoupled and multiplied by the learning rate in every optimizer. For
16-bit parameters the accumulators are float32, where Keras's have 16 bits. In the formulas t counts
steps from 1.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Unpack

import jax.numpy as jnp
import optax
from optax import GradientTransformation

import jgd.optimizers
from jgd.arguments import Count, Fraction, Mixing, NonNegative, Number, Positive, Structure
from jgd.combinators import chain, divide, named, partition, with_nesterov
from jgd.compat.keras.options import DecayOptions, Options, optimizer, with_options
from jgd.compat.shared import (
    Beta,
    after_decay,
    factored_descent,
    scale_by_nadam,
    scale_by_uncorrected_adam,
)
from jgd.groups import paths
from jgd.linear_algebra import orthogonalized
from jgd.norms import norm, scale_by_trust_ratio
from jgd.schedules import linear_schedule
from jgd.transforms import (
    decayed_max,
    ema,
    identity,
    pointwise,
    rms,
    scale,
    scale_by_learning_rate,
    scale_by_momentum,
)
from jgd.wrappers import schedule_free

__all__ = [
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "ftrl",
    "lamb",
    "lion",
    "muon",
    "nadam",
    "rmsprop",
    "schedule_free_adamw",
    "sgd",
]


@optimizer
def sgd(
    learning_rate: Number = 0.01,
    momentum: Fraction = 0.0,
    nesterov: bool = False,
    **options: Unpack[DecayOptions],
) -> GradientTransformation:
    """SGD: gradient descent, with momentum as a velocity that includes the learning rate.

        v <- momentum v - learning_rate g            u = v, or momentum v - learning_rate g

    Args:
      learning_rate: 0.01 by default.
      momentum: in [0, 1]; 0 (default) is plain gradient descent.
      nesterov: True for the second u.

    State: `optax.TraceState(trace)`, one tree.
    Differs from: `jgd.sgd` and PyTorch under a schedule, where the current learning rate multiplies
      the whole velocity.
    """
    velocity = scale_by_momentum(momentum)
    direction = with_nesterov(velocity) if nesterov else velocity
    rule = chain(scale_by_learning_rate(learning_rate), direction)
    return with_options(rule, learning_rate, **options)


@optimizer
def rmsprop(
    learning_rate: Number = 0.001,
    rho: Fraction = 0.9,
    momentum: Fraction = 0.0,
    epsilon: NonNegative = 1e-7,
    centered: bool = False,
    **options: Unpack[DecayOptions],
) -> GradientTransformation:
    """RMSProp: `jgd.rmsprop`, with epsilon inside the root.

        v <- rho v + (1 - rho) g^2            b <- momentum b + learning_rate g / sqrt(v + epsilon)
        u = -b

    Args:
      learning_rate: 0.001 by default.
      rho: in [0, 1], 0.9 by default.
      momentum: in [0, 1]; 0 by default.
      epsilon: at least 0, 1e-7 by default.
      centered: True subtracts the square of the average gradient from v.

    State: that of `jgd.rmsprop` with momentum: two trees, three if centered.
    Differs from: PyTorch, whose eps is outside the root and whose b excludes the learning rate.
    """
    rule = jgd.optimizers.rmsprop(learning_rate, rho, epsilon, centered=centered, momentum=momentum)
    return with_options(rule, learning_rate, **options)


@optimizer
def adagrad(
    learning_rate: Number = 0.001,
    initial_accumulator_value: NonNegative = 0.1,
    epsilon: NonNegative = 1e-7,
    **options: Unpack[DecayOptions],
) -> GradientTransformation:
    """AdaGrad: `jgd.adagrad`, with epsilon inside the root.

        s <- s + g^2            u = -learning_rate g / sqrt(s + epsilon)

    Args:
      learning_rate: 0.001 by default.
      initial_accumulator_value: at least 0, the initial value of s; 0.1 by default.
      epsilon: at least 0, 1e-7 by default.

    State: `optax.ScaleByRssState(sum_of_squares)`, one tree.
    """
    rule = jgd.optimizers.adagrad(learning_rate, initial_accumulator_value, epsilon)
    return with_options(rule, learning_rate, **options)


@optimizer
def adadelta(
    learning_rate: Number = 0.001,
    rho: Fraction = 0.95,
    epsilon: NonNegative = 1e-7,
    **options: Unpack[DecayOptions],
) -> GradientTransformation:
    """AdaDelta: see `jgd.adadelta` for the formula.

    Args:
      learning_rate: 0.001 by default (1 in the paper).
      rho: in [0, 1], 0.95 by default.
      epsilon: at least 0, 1e-7 by default.

    State: `optax.ScaleByAdaDeltaState(e_g, e_x)`, two trees.
    """
    rule = jgd.optimizers.adadelta(learning_rate, rho, epsilon)
    return with_options(rule, learning_rate, **options)


@optimizer
def adam(
    learning_rate: Number = 0.001,
    beta_1: Beta = 0.9,
    beta_2: Beta = 0.999,
    epsilon: NonNegative = 1e-7,
    amsgrad: bool = False,
    **options: Unpack[DecayOptions],
) -> GradientTransformation:
    """Adam: epsilon is added to the root before the bias correction ("epsilon hat").

        m <- beta_1 m + (1 - beta_1) g            v <- beta_2 v + (1 - beta_2) g^2
        u = -learning_rate sqrt(1 - beta_2^t) / (1 - beta_1^t) m / (sqrt(v) + epsilon)

    Args:
      learning_rate: 0.001 by default.
      beta_1, beta_2: in [0, 1); 0.9 and 0.999 by default.
      epsilon: at least 0, 1e-7 by default; acts like eps = epsilon / sqrt(1 - beta_2^t) in
        `jgd.adam`.
      amsgrad: True replaces v by the largest v so far.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees; `optax.ScaleByAmsgradState(count, mu,
      nu, nu_max)`, three.
    Source: Kingma & Ba 2015, the form before section 2.1, arXiv:1412.6980.
    """
    quotients = scale_by_uncorrected_adam(beta_1, beta_2, epsilon, amsgrad=amsgrad)
    rule = chain(quotients, scale_by_learning_rate(learning_rate))
    return with_options(rule, learning_rate, **options)


@optimizer
def adamw(
    learning_rate: Number = 0.001,
    weight_decay: NonNegative | None = 0.004,
    beta_1: Beta = 0.9,
    beta_2: Beta = 0.999,
    epsilon: NonNegative = 1e-7,
    amsgrad: bool = False,
    **options: Unpack[Options],
) -> GradientTransformation:
    """AdamW: `adam` with a `weight_decay` of 0.004 by default.

    Args, State: as in `adam`.
    Raises: ValueError in `update` if no parameters are given.
    """
    quotients = scale_by_uncorrected_adam(beta_1, beta_2, epsilon, amsgrad=amsgrad)
    rule = chain(quotients, scale_by_learning_rate(learning_rate))
    return with_options(rule, learning_rate, weight_decay=weight_decay, **options)


@optimizer
def adamax(
    learning_rate: Number = 0.001,
    beta_1: Beta = 0.9,
    beta_2: Fraction = 0.999,
    epsilon: NonNegative = 1e-7,
    **options: Unpack[DecayOptions],
) -> GradientTransformation:
    """AdaMax: Adam with a decayed maximum in place of the root mean square.

        x <- max(beta_2 x, |g|)            u = -learning_rate m / (1 - beta_1^t) / (x + epsilon)

    Args: as in `adam`.
    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees.
    Differs from: `jgd.adamax` and PyTorch, which add eps inside the maximum.
    """
    largest = chain(decayed_max(beta_2, name="nu"), pointwise(lambda x: x + epsilon))
    quotients = named(divide(ema(beta_1, name="mu"), largest), record=optax.ScaleByAdamState)
    rule = chain(quotients, scale_by_learning_rate(learning_rate))
    return with_options(rule, learning_rate, **options)


@optimizer
def nadam(
    learning_rate: Number = 0.001,
    beta_1: Beta = 0.9,
    beta_2: Beta = 0.999,
    epsilon: NonNegative = 1e-7,
    **options: Unpack[DecayOptions],
) -> GradientTransformation:
    """NAdam: Adam with Nesterov momentum, which follows the paper's schedule with 0.96^t.

        d_t = beta_1 (1 - 0.96^t / 2)            D = d_1 d_2 ... d_t
        m^ = d_(t+1) m / (1 - D d_(t+1)) + (1 - d_t) g / (1 - D)
        u = -learning_rate m^ / (sqrt(v / (1 - beta_2^t)) + epsilon)

    Args: as in `adam`.
    State: `NadamState(count, mu, nu, mu_product)`, two trees.
    Differs from: `jgd.nadam`, whose momentum is constant; PyTorch, which has 0.96^(t / 250).
    Source: Dozat 2016, algorithm 2.
    """
    quotients = scale_by_nadam(beta_1, beta_2, epsilon, 1.0)
    rule = chain(quotients, scale_by_learning_rate(learning_rate))
    return with_options(rule, learning_rate, **options)


@optimizer
def ftrl(
    learning_rate: Positive = 0.001,
    learning_rate_power: Number = -0.5,
    initial_accumulator_value: NonNegative = 0.1,
    l1_regularization_strength: NonNegative = 0.0,
    l2_regularization_strength: NonNegative = 0.0,
    l2_shrinkage_regularization_strength: NonNegative = 0.0,
    beta: NonNegative = 0.0,
    **options: Unpack[DecayOptions],
) -> GradientTransformation:
    """FTRL-Proximal: see `jgd.ftrl` for the formula.

    Args:
      learning_rate: above 0, 0.001 by default.
      learning_rate_power: at most 0, -0.5 by default.
      initial_accumulator_value: at least 0, 0.1 by default.
      l1_regularization_strength, l2_regularization_strength, l2_shrinkage_regularization_strength,
        beta: at least 0, 0 by default.

    State: `FtrlState(sum_of_squares, linear)`, two trees.
    Raises: ValueError in `update` if no parameters are given.
    """
    rule = jgd.optimizers.ftrl(
        learning_rate,
        learning_rate_power,
        initial_accumulator_value,
        l1_regularization_strength,
        l2_regularization_strength,
        l2_shrinkage_regularization_strength,
        beta,
    )
    return with_options(rule, learning_rate, **options)


@optimizer
def lion(
    learning_rate: Number = 0.001,
    beta_1: Fraction = 0.9,
    beta_2: Fraction = 0.99,
    **options: Unpack[DecayOptions],
) -> GradientTransformation:
    """Lion: `jgd.lion` without its default weight decay.

        u = -learning_rate sign(beta_1 m + (1 - beta_1) g)            m <- beta_2 m + (1 - beta_2) g

    Args:
      learning_rate: 0.001 by default.
      beta_1, beta_2: in [0, 1]; 0.9 and 0.99 by default.

    State: `optax.ScaleByLionState`, one tree.
    Source: Chen et al. 2023, algorithm 2, arXiv:2302.06675.
    """
    direction = jgd.optimizers.scale_by_lion(beta_1, beta_2)
    rule = chain(direction, scale_by_learning_rate(learning_rate))
    return with_options(rule, learning_rate, **options)


@optimizer
def lamb(
    learning_rate: Number = 0.001,
    beta_1: Beta = 0.9,
    beta_2: Beta = 0.999,
    epsilon: NonNegative = 1e-7,
    **options: Unpack[DecayOptions],
) -> GradientTransformation:
    """LAMB: Adam whose quotient x is scaled, in each leaf, to the norm of the parameters.

        x = m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + epsilon)
        u = -learning_rate ||p|| / ||x|| x, and -learning_rate x where a norm is 0

    Args: as in `adam`.
    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `jgd.lamb`, which includes the weight decay in x, as the paper does.
    Source: You et al. 2020, algorithm 2, arXiv:1904.00962.
    """
    quotient = divide(ema(beta_1, name="mu"), rms(beta_2, epsilon, name="nu"))
    rule = chain(
        named(quotient, record=optax.ScaleByAdamState, shared=["count"]),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )
    return with_options(rule, learning_rate, **options)


@optimizer
def adafactor(
    learning_rate: Number = 0.001,
    beta_2_decay: Number = -0.8,
    epsilon_1: NonNegative = 1e-30,
    epsilon_2: NonNegative = 0.001,
    clip_threshold: Positive = 1.0,
    relative_step: bool = True,
    **options: Unpack[DecayOptions],
) -> GradientTransformation:
    """Adafactor: factored over the last two axes, with a step relative to the parameters.

        w = t^beta_2_decay            row, column <- averages of g^2 + epsilon_1 with weight w
        x = g / sqrt(row column / mean(row))            x <- x / max(1, rms(x) / clip_threshold)
        u = -max(epsilon_2, rms(p)) min(learning_rate, 1 / sqrt(t)) x

    Args:
      learning_rate: the upper bound of the relative step, 0.001 by default.
      beta_2_decay: below 0, -0.8 by default.
      epsilon_1: at least 0, added to each square; 1e-30 by default.
      epsilon_2: at least 0, the lower bound of rms(p); 0.001 by default.
      clip_threshold: above 0, the upper bound of rms(x); 1 by default.
      relative_step: no effect, as in Keras: the bound 1 / sqrt(t) always applies.

    State: `FactorsState(count, row, column, v)`: a row and a column for each matrix.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `jgd.adafactor`, which factors the two largest axes, if they are long, and has no
      1 / sqrt(t); PyTorch, whose eps_1 is a lower bound instead of a summand.
    Source: Shazeer & Stern 2018, algorithms 4 and 6, arXiv:1804.04235.
    """
    rule = factored_descent(
        learning_rate, beta_2_decay, epsilon_1, epsilon_2, clip_threshold, floor=0.0
    )
    return with_options(rule, learning_rate, **options)


@optimizer
def muon(
    learning_rate: Number = 0.001,
    adam_beta_1: Beta = 0.9,
    adam_beta_2: Beta = 0.999,
    adam_weight_decay: NonNegative | None = 0.004,
    epsilon: NonNegative = 1e-7,
    weight_decay: NonNegative | None = 0.004,
    *,
    exclude_layers: Sequence[str] | None = None,
    exclude_embeddings: bool = True,
    muon_a: Number = 3.4445,
    muon_b: Number = -4.7750,
    muon_c: Number = 2.0315,
    adam_lr_ratio: Number = 1.0,
    momentum: Fraction = 0.95,
    ns_steps: Structure = 5,
    nesterov: bool = True,
    rms_rate: Number | None = 0.2,
    **options: Unpack[Options],
) -> GradientTransformation:
    """Muon: orthogonalized momentum for matrices, `adam` for all other parameters.

        m <- momentum m + g            x = g + momentum m, or m without nesterov
        u = -learning_rate rms_rate sqrt(max(rows, columns)) orthogonal(x)

    orthogonal(x) repeats x <- a x + (b x x' + c (x x')^2) x, starting from x / (||x|| + 1e-7).

    Args:
      learning_rate: for matrices, 0.001 by default; Adam's is `adam_lr_ratio` times as large.
      adam_beta_1, adam_beta_2, epsilon: for Adam.
      adam_weight_decay: the weight decay of Adam's parameters, times `learning_rate` without
        `adam_lr_ratio`; 0.004 by default.
      weight_decay: the weight decay of matrices, 0.004 by default.
      exclude_layers: regular expressions; Adam updates a matrix if one is found in its path.
      exclude_embeddings: True for Adam on matrices with "embedding" in their path.
      muon_a, muon_b, muon_c: the coefficients a, b, c.
      adam_lr_ratio: Adam's learning rate relative to `learning_rate`; 1 by default.
      momentum: in [0, 1], 0.95 by default.
      ns_steps: the number of iterations, which is structure; 5 by default.
      nesterov: True (default) for the first x.
      rms_rate: 0.2 by default; None omits the factor rms_rate sqrt(max(rows, columns)).

    State: `optax.TraceState` for matrices, `optax.ScaleByAdamState` for the others.
    Raises: ValueError in `update` if no parameters are given and a weight decay is.
    Differs from: `jgd.muon`, which has another scale and corrects the bias of its average.
    Source: Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982.
    """

    def orthogonal(x: Any) -> Any:
        coefficients = jnp.broadcast_to(jnp.stack([muon_a, muon_b, muon_c]), (ns_steps, 3))
        result = orthogonalized(x, coefficients, lambda x: x / (norm(x) + 1e-7))
        return result if rms_rate is None else result * rms_rate * math.sqrt(max(x.shape))

    def labels(tree: Any) -> Any:
        names, structure = paths(tree)
        pairs = zip(names, structure.flatten_up_to(tree), strict=True)
        chosen = [is_matrix(*pair, exclude_layers, exclude_embeddings) for pair in pairs]
        return structure.unflatten(["matrix" if is_one else "other" for is_one in chosen])

    def decayed(rule: GradientTransformation, decay: Any) -> GradientTransformation:
        return rule if decay is None else after_decay(rule, learning_rate * decay)

    velocity = scale_by_momentum(momentum)
    direction = chain(with_nesterov(velocity) if nesterov else velocity, pointwise(orthogonal))
    matrices = chain(direction, scale_by_learning_rate(learning_rate))
    others = chain(
        scale_by_uncorrected_adam(adam_beta_1, adam_beta_2, epsilon),
        scale_by_learning_rate(learning_rate * adam_lr_ratio),
    )
    parts = {
        "matrix": decayed(matrices, weight_decay),
        "other": decayed(others, adam_weight_decay),
    }
    return with_options(partition(parts, labels), learning_rate, **options)


def is_matrix(
    name: str, x: Any, exclude_layers: Sequence[str] | None, exclude_embeddings: bool
) -> bool:
    """Return whether Muon updates the parameter `x` with the path `name`; else Adam does."""
    embedding = exclude_embeddings and "embedding" in name.lower()
    excluded = embedding or any(re.search(pattern, name) for pattern in exclude_layers or ())
    return jnp.ndim(x) == 2 and not excluded


@optimizer
def schedule_free_adamw(
    learning_rate: Number = 0.0025,
    beta_1: Mixing = 0.9,
    beta_2: Beta = 0.999,
    epsilon: NonNegative = 1e-8,
    warmup_steps: Count = 0,
    **options: Unpack[DecayOptions],
) -> GradientTransformation:
    """Schedule-free AdamW: RMSProp steps z, and gradients are taken between z and its average x.

        z <- z - learning_rate min(t / warmup_steps, 1) g / (sqrt(v / (1 - beta_2^t)) + epsilon)
        x <- (1 - 1/t) x + z / t            u = (1 - beta_1) z + beta_1 x - p

    Args:
      learning_rate: 0.0025 by default.
      beta_1: in (0, 1), the weight of x at the point where gradients are taken; 0.9 by default.
      beta_2: in [0, 1), 0.999 by default.
      epsilon: at least 0, 1e-8 by default.
      warmup_steps: at least 0, 0 by default.

    State: `ScheduleFreeState`, two trees. Evaluate at `jgd.schedule_free_eval_params(state, p)`.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `jgd.schedule_free_adamw`, whose average weights z by the squared learning rate.
    Source: Defazio et al. 2024, arXiv:2405.15682.
    """
    warmup = jnp.maximum(warmup_steps, 1)
    base = chain(
        divide(identity(), rms(beta_2, epsilon)),
        scale(linear_schedule(1 / warmup, 1.0, warmup - 1)),
        scale_by_learning_rate(learning_rate),
    )
    rule = schedule_free(base, 1.0, beta_1, weight_lr_power=0.0)
    return with_options(rule, learning_rate, **options)
