"""Optimizers that estimate their learning rate, or need no schedule for it.

Polyak's step is the loss minus its least value, divided by the squared norm of the gradient. DoG,
DoWG, D-Adaptation and Prodigy estimate the distance from the initial parameters to the solution.
The schedule-free optimizers average their iterates. Norms are over the whole tree.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import (
    Count,
    Decay,
    Decays,
    Fraction,
    Mask,
    Mixing,
    NonNegative,
    Number,
    NumberOrSchedule,
    NumbersKind,
    Positive,
)
from jgd.arithmetic import (
    Weights,
    abs_square,
    average,
    complement,
    finite,
    formula,
    increment,
    one_minus_power,
    quotient,
    safe_sqrt,
    weights,
    weights_from,
)
from jgd.combinators import chain
from jgd.nodes import unwrap
from jgd.optimizers.classic import scale_by_rms, sgd
from jgd.pytree import as_pytree
from jgd.schedules import warmup_constant_schedule
from jgd.transforms import add_decayed_weights, identity, scale_by_learning_rate
from jgd.trees import check_state, leafwise, like, with_params
from jgd.wrappers import schedule_free

__all__ = [
    "dadapt_adamw",
    "dog",
    "dowg",
    "polyak_sgd",
    "prodigy",
    "scale_by_polyak",
    "schedule_free_adamw",
    "schedule_free_sgd",
]


def _summed(f: Callable[..., Any], tree: Any, *trees: Any) -> Any:
    """Return the sum of the scalars `f(x, *others)` over all leaves x of a tree."""
    return sum(jax.tree.leaves(leafwise(f, tree, *trees)), jnp.zeros([], float))


@formula
def _square(x: Any) -> Any:
    return jnp.sum(abs_square(x))


@formula
def _square_distance(x: Any, y: Any) -> Any:
    return jnp.sum(abs_square(x - y))


@formula
def _scaled(g: Any, _: Any, rate: Any) -> Any:
    return rate * g


def _decay(weight_decay: Any, mask: Mask | None) -> GradientTransformation:
    return identity() if weight_decay is None else add_decayed_weights(weight_decay, mask)


# --- Polyak ----------------------------------------------------------------------------------


@as_pytree
def scale_by_polyak(
    f_min: Number = 0.0,
    max_learning_rate: NonNegative = 1.0,
    eps: NonNegative = 0.0,
    variant: Literal["sps", "sps+"] = "sps",
) -> GradientTransformation:
    """u = g min((value - f_min) / (||g||^2 + eps), max_learning_rate): see `polyak_sgd`.

    State: `EmptyState`.
    Raises: TypeError in `update` if no `value` is given.
    Source: Loizou et al. 2021, equation 4, arXiv:2002.10542.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, value: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        if value is None:
            raise TypeError(
                "scale_by_polyak: value must be the loss, got None. Call update(..., value=loss)"
            )
        gap = jnp.asarray(value, float) - f_min
        if variant == "sps+":
            gap = jnp.maximum(gap, 0)
        length = _summed(_square, updates) + eps
        flat = length <= np.finfo(float).eps
        step = jnp.minimum(gap / jnp.where(flat, 1, length), max_learning_rate)
        return leafwise(lambda g: jnp.where(flat, 0, step) * g, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


@as_pytree
def polyak_sgd(
    max_learning_rate: NonNegative = 1.0,
    scaling: Number = 1.0,
    f_min: Number = 0.0,
    eps: NonNegative = 0.0,
    variant: Literal["sps", "sps+"] = "sps",
) -> GradientTransformation:
    """Polyak's step: a step size computed from the loss, for g the gradient times `scaling`.

        u = -g min((value - f_min) / (||g||^2 + eps), max_learning_rate)

    Args:
      max_learning_rate: the largest step size, at least 0; 1 by default.
      scaling: factor of the gradient; 1 by default. May be a schedule.
      f_min: the least value of the loss; 0 by default.
      eps: at least 0, added to the squared norm of the whole tree; 0 by default.
      variant: "sps" (default), or "sps+" to replace a loss below f_min by f_min.

    State: none. `update` takes the loss: `update(grads, state, params, value=loss)`.
    Raises: TypeError in `update` if no `value` is given.
    Differs from: `sgd`, which needs neither the loss nor its least value.
    Source: Loizou et al. 2021, equation 4, arXiv:2002.10542; Polyak 1969.
    """
    step = scale_by_polyak(f_min, max_learning_rate, eps, variant)
    return chain(sgd(scaling), step)


# --- distance over gradients -----------------------------------------------------------------


def _is_init_step(pair: Any) -> bool:
    words = ("distance", "learning_rate", "heuristic")
    return (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and unwrap(pair[0]) in words
        and pair[1] >= 0
    )


InitStep = Annotated[
    Any,
    NumbersKind(
        "a pair of 'distance', 'learning_rate' or 'heuristic' and a number at least 0",
        _is_init_step,
    ),
]


@as_pytree
def _scale_by_dog(init_step: InitStep, eps: NonNegative) -> GradientTransformation:
    kind, value = init_step

    def init(params: Any) -> Any:
        reach = {
            "distance": value,
            "heuristic": value * (1 + safe_sqrt(_summed(_square, params))),
            "learning_rate": 0.0,
        }[kind]
        first = jax.tree.map(jnp.copy, params)
        return optax.contrib.DoGState(
            jnp.array(True), first, jnp.asarray(reach, float), jnp.zeros([], float)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        is_first, first, reach, total = check_state(state, optax.contrib.DoGState)
        distance = safe_sqrt(_summed(_square_distance, with_params(params), first))
        reach, total = jnp.maximum(reach, distance), total + _summed(_square, updates)
        rate = quotient(finite(reach), safe_sqrt(total + eps))
        if kind == "learning_rate":
            rate = jnp.where(is_first, value, rate)
        new = optax.contrib.DoGState(jnp.array(False), first, reach, total)
        return leafwise(_scaled, updates, params, numbers=(rate,)), like(new, state)

    return GradientTransformation(init, update)


@as_pytree
def dog(
    learning_rate: Number = 1.0,
    init_step: InitStep = ("heuristic", 1e-6),
    eps: NonNegative = 1e-8,
    weight_decay: Number | None = None,
    mask: Mask | None = None,
) -> GradientTransformation:
    """DoG: the rate is the distance from the start over the root of the sum of squared gradients.

        d = max ||p - p0||            G <- G + ||g||^2
        u = -learning_rate d / sqrt(G + eps) g

    Args:
      learning_rate: factor of the estimated rate; 1 by default. May be a schedule.
      init_step: initial d: ("distance", d); ("heuristic", r) for d = r (1 + ||p0||); or
        ("learning_rate", rate) for a first step with this rate.
      eps: at least 0, added inside the root; 1e-8 by default.
      weight_decay: an L2 penalty: weight_decay p is added to the gradient; None (default): none.
      mask: selects the leaves that decay, as in `adamw`.

    State: `optax.contrib.DoGState(is_init_step, init_params, max_dist, sum_sq_norm_grads)`, one
      tree, two scalars and a bool.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `dowg`, which weights each squared gradient by the squared distance; the
      paper, which averages the iterates: wrap `dog` in `average_params` for that.
    Source: Ivgi, Hinder & Carmon 2023, algorithm 1, arXiv:2302.12022.
    """
    return chain(
        _decay(weight_decay, mask),
        _scale_by_dog(init_step, eps),
        scale_by_learning_rate(learning_rate),
    )


@as_pytree
def _scale_by_dowg(start: NonNegative, eps: NonNegative) -> GradientTransformation:
    def init(params: Any) -> Any:
        first = jax.tree.map(jnp.copy, params)
        return optax.contrib.DoWGState(first, jnp.zeros([], float), jnp.asarray(start, float))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        first, total, reach = check_state(state, optax.contrib.DoWGState)
        reach = jnp.maximum(reach, _summed(_square_distance, with_params(params), first))
        total = total + reach * _summed(_square, updates)
        rate = quotient(reach, safe_sqrt(total) + eps)
        new = optax.contrib.DoWGState(first, total, reach)
        return leafwise(_scaled, updates, params, numbers=(rate,)), like(new, state)

    return GradientTransformation(init, update)


@as_pytree
def dowg(
    learning_rate: Number = 1.0,
    init_estim_sq_dist: NonNegative | None = None,
    eps: NonNegative = 1e-4,
    weight_decay: Number | None = None,
    mask: Mask | None = None,
) -> GradientTransformation:
    """DoWG: DoG that weights each squared gradient by the squared distance at its step.

        d2 = max ||p - p0||^2            G <- G + d2 ||g||^2
        u = -learning_rate d2 / (sqrt(G) + eps) g

    Args:
      learning_rate: factor of the estimated rate; 1 by default. May be a schedule.
      init_estim_sq_dist: initial d2, at least 0; None (default): eps.
      eps: at least 0, added outside the root; 1e-4 by default.
      weight_decay, mask: as in `dog`.

    State: `optax.contrib.DoWGState(init_params, weighted_sq_norm_grads, estim_sq_dist)`, one tree
      and two scalars.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `dog`, which weights all squared gradients alike.
    Source: Khaled, Mishchenko & Jin 2023, algorithm 1, arXiv:2305.16284.
    """
    return chain(
        _decay(weight_decay, mask),
        _scale_by_dowg(eps if init_estim_sq_dist is None else init_estim_sq_dist, eps),
        scale_by_learning_rate(learning_rate),
    )


# --- D-adaptation ----------------------------------------------------------------------------


@formula
def _size(x: Any) -> Any:
    return jnp.sum(jnp.abs(x))


@formula
def _dot(x: Any, y: Any) -> Any:
    return jnp.sum(jnp.real(jnp.conj(x) * y))


@formula
def _dot_difference(g: Any, x: Any, y: Any) -> Any:
    return _dot(g, x - y)


@formula
def _average(g: Any, m: Any, rate: Any, by: Weights) -> Any:
    return average(rate * g, m, by)


@formula
def _average_square(g: Any, v: Any, rate: Any, by: Weights) -> Any:
    return average(abs_square(rate * g), v, by)


@formula
def _decayed_sum(g: Any, s: Any, decay: Any, weight: Any) -> Any:
    return decay * s + weight * g


@formula
def _quotient(s: Any, v: Any, eps: Any) -> Any:
    return quotient(s, safe_sqrt(v) + eps)


@formula
def _descent(_: Any, m: Any, v: Any, p: Any, rate: Any, eps: Any, decay: Any) -> Any:
    return -rate * _quotient(m, v, eps) - decay * p


def _corrected_rate(count: Any, b1: Any, b2: Any) -> Any:
    """Return sqrt(1 - b2^t) / (1 - b1^t): Adam's two bias corrections as one factor."""
    return jnp.sqrt(one_minus_power(complement(b2), count)) / one_minus_power(complement(b1), count)


@as_pytree
def dadapt_adamw(
    learning_rate: Number = 1.0,
    betas: Decays = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    estim_lr0: Positive = 1e-6,
    weight_decay: Number = 0.0,
) -> GradientTransformation:
    """D-Adaptation: AdamW with a growing estimate of the distance to the solution.

        k = d learning_rate sqrt(1 - b2^t) / (1 - b1^t)            c = sqrt(b2)
        r <- c r + (1 - c) k <g, s / (sqrt(v) + eps)>, with s and v before this step
        m <- b1 m + (1 - b1) k g        v <- b2 v + (1 - b2) g^2        s <- c s + (1 - c) k g
        u = -m / (sqrt(v) + eps) - weight_decay k p            d <- max(d, r / ((1 - c) |s|_1))

    Args:
      learning_rate: factor of the estimated rate; 1 by default. May be a schedule.
      betas: b1 and b2, in [0, 1); 0.9 and 0.999 by default.
      eps: at least 0, added outside the roots; 1e-8 by default.
      estim_lr0: initial d, above 0 and below the distance to the solution; 1e-6 by default.
      weight_decay: decoupled weight decay; 0 by default.

    State: `optax.contrib.DAdaptAdamWState(exp_avg, exp_avg_sq, grad_sum, ...)`, three trees and
      three scalars.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `prodigy`, whose estimate grows faster.
    Source: Defazio & Mishchenko 2023, algorithm 5, arXiv:2301.07733.
    """
    b1, b2 = betas
    w3 = complement(b2) / (1 + jnp.sqrt(b2))  # 1 - sqrt(b2)
    by_1, by_2, by_3 = weights(b1), weights(b2), weights_from(w3)

    def init(params: Any) -> Any:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        start = jnp.asarray(estim_lr0, float), jnp.zeros([], float), jnp.zeros([], jnp.int32)
        return optax.contrib.DAdaptAdamWState(zeros(), zeros(), zeros(), *start)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        m, v, s, d, r, count = check_state(state, optax.contrib.DAdaptAdamWState)
        count = increment(count)
        k = d * learning_rate * _corrected_rate(count, b1, b2)
        scaled = leafwise(_quotient, s, v, numbers=(eps,))
        r = average(k * _summed(_dot, updates, scaled), r, by_3)
        m = leafwise(_average, updates, m, numbers=(k, by_1), keep=True)
        v = leafwise(_average_square, updates, v, numbers=(1.0, by_2), keep=True)
        s = leafwise(_average, updates, s, numbers=(k, by_3), keep=True)
        numbers = (1.0, eps, weight_decay * k)
        new_updates = leafwise(_descent, updates, m, v, with_params(params), numbers=numbers)
        d = jnp.maximum(d, quotient(r, w3 * _summed(_size, s)))
        return new_updates, like(optax.contrib.DAdaptAdamWState(m, v, s, d, r, count), state)

    return GradientTransformation(init, update)


@as_pytree
def prodigy(
    learning_rate: Number = 1.0,
    betas: Decays = (0.9, 0.999),
    beta3: Fraction | None = None,
    eps: NonNegative = 1e-8,
    estim_lr0: Positive = 1e-6,
    estim_lr_coef: Positive = 1.0,
    weight_decay: Number = 0.0,
    safeguard_warmup: bool = False,
) -> GradientTransformation:
    """Prodigy: Adam with an estimate of the distance that grows faster than D-Adaptation's.

        k = d learning_rate sqrt(1 - b2^t) / (1 - b1^t)
        r <- b3 r + d / d0 k <g, p0 - p>            s <- b3 s + k d / d0 g
        m <- b1 m + (1 - b1) d g            v <- b2 v + (1 - b2) (d g)^2
        d' = max(d, estim_lr_coef r / |s|_1)
        u = -k m / (sqrt(v) + d' eps) - weight_decay k p            d <- d'

    Args:
      learning_rate: factor of the estimated rate; 1 by default. May be a schedule.
      betas: b1 and b2, in [0, 1); 0.9 and 0.999 by default.
      beta3: b3, in [0, 1]; None (default): the square root of b2.
      eps: at least 0, added outside the root; 1e-8 by default.
      estim_lr0: d0, the initial d, above 0 and below the distance to the solution; 1e-6 by default.
      estim_lr_coef: factor of the estimate, above 0; 1 by default.
      weight_decay: decoupled weight decay; 0 by default.
      safeguard_warmup: True replaces k by d in s, so that a warmup does not raise the estimate.

    State: `optax.contrib.ProdigyState(exp_avg, exp_avg_sq, grad_sum, params0, ...)`, four trees and
      three scalars.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `dadapt_adamw`, which does not store p0.
    Source: Mishchenko & Defazio 2024, algorithm 4, arXiv:2306.06101.
    """
    b1, b2 = betas
    b3 = jnp.sqrt(b2) if beta3 is None else beta3
    by_1, by_2 = weights(b1), weights(b2)

    def init(params: Any) -> Any:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        first = jax.tree.map(jnp.copy, params)
        start = jnp.asarray(estim_lr0, float), jnp.zeros([], float), jnp.zeros([], jnp.int32)
        return optax.contrib.ProdigyState(zeros(), zeros(), zeros(), first, *start)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        m, v, s, first, d, r, count = check_state(state, optax.contrib.ProdigyState)
        count = increment(count)
        k = d * learning_rate * _corrected_rate(count, b1, b2)
        toward = _summed(_dot_difference, updates, first, with_params(params))
        r = b3 * r + d / estim_lr0 * k * toward
        weight = (d if safeguard_warmup else k) * d / estim_lr0
        m = leafwise(_average, updates, m, numbers=(d, by_1), keep=True)
        v = leafwise(_average_square, updates, v, numbers=(d, by_2), keep=True)
        s = leafwise(_decayed_sum, updates, s, numbers=(b3, weight), keep=True)
        d = jnp.maximum(d, quotient(estim_lr_coef * r, _summed(_size, s)))
        numbers = (k, d * eps, weight_decay * k)
        new_updates = leafwise(_descent, updates, m, v, params, numbers=numbers)
        return new_updates, like(optax.contrib.ProdigyState(m, v, s, first, d, r, count), state)

    return GradientTransformation(init, update)


# --- schedule-free ---------------------------------------------------------------------------


def _warmed_up(learning_rate: Any, warmup_steps: Any) -> Any:
    if warmup_steps is None:
        return learning_rate
    if callable(learning_rate):
        ramp = warmup_constant_schedule(0.0, 1.0, warmup_steps)
        return lambda step: ramp(step) * learning_rate(step)
    return warmup_constant_schedule(0.0, learning_rate, warmup_steps)


@as_pytree
def schedule_free_sgd(
    learning_rate: NumberOrSchedule = 1.0,
    warmup_steps: Count | None = None,
    b1: Mixing = 0.9,
    weight_decay: Number | None = None,
    weight_lr_power: NonNegative = 2.0,
    state_dtype: DTypeLike | None = None,
) -> GradientTransformation:
    """Schedule-free SGD: gradient descent with an average of iterates instead of a schedule.

        z <- z - learning_rate (g + weight_decay p)            x <- (1 - c) x + c z
        u = (1 - b1) z + b1 x - p

    Args:
      learning_rate: the step size, positive to descend; 1 by default. May be a schedule.
      warmup_steps: length of a linear warmup from 0; None (default): no warmup. 0 keeps the rate at
        0, as in optax.
      b1, weight_lr_power, state_dtype: as in `schedule_free`, which also says what c is.
      weight_decay: weight_decay p is added to the gradient; None (default): no decay.

    State: `ScheduleFreeState(b1, weight_sum, step_count, max_lr, base_optimizer_state, z)`, one
      tree and four scalars. Evaluate at `schedule_free_eval_params(state, params)`.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `schedule_free_adamw`, which divides by a root mean square.
    Source: Defazio et al. 2024, equations 6 to 8, arXiv:2405.15682.
    """
    rate = _warmed_up(learning_rate, warmup_steps)
    base = chain(_decay(weight_decay, None), sgd(rate))
    return schedule_free(base, rate, b1, weight_lr_power, state_dtype)


@as_pytree
def schedule_free_adamw(
    learning_rate: NumberOrSchedule = 0.0025,
    warmup_steps: Count | None = None,
    b1: Mixing = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    weight_decay: Number = 0.0,
    weight_lr_power: NonNegative = 2.0,
    state_dtype: DTypeLike | None = None,
) -> GradientTransformation:
    """Schedule-free AdamW: RMSProp with an average of iterates instead of a schedule.

        z <- z - learning_rate (g / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)
        x <- (1 - c) x + c z            u = (1 - b1) z + b1 x - p

    Args:
      learning_rate: the step size, positive to descend; 0.0025 by default. May be a schedule.
      warmup_steps: length of a linear warmup from 0; None (default): no warmup. 0 keeps the rate at
        0, as in optax.
      b1, weight_lr_power, state_dtype: as in `schedule_free`, which also says what c is.
      b2: decay of the average square, in [0, 1); 0.999 by default.
      eps: at least 0, added outside the root; 1e-8 by default.
      weight_decay: decoupled weight decay, at the parameters p; 0 by default.

    State: `ScheduleFreeState(..., base_optimizer_state, z)`, two trees (z and v) and six scalars.
      Evaluate at `schedule_free_eval_params(state, params)`.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `adamw`, which averages gradients instead of iterates.
    Source: Defazio et al. 2024, algorithm 1, arXiv:2405.15682.
    """
    rate = _warmed_up(learning_rate, warmup_steps)
    base = chain(
        scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(rate),
    )
    return schedule_free(base, rate, b1, weight_lr_power, state_dtype)
