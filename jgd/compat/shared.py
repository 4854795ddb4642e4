"""Transformations of Keras and PyTorch that jgd does not have: bias correction, decay and rules.

Under a scheduled decay both frameworks correct the bias with the decay of the current step,
1 - decay^t, and jgd with the product of all decays. For a constant decay the two are equal.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformation

from jgd.arguments import NonNegative, Number, NumberKind, Positive, Structure
from jgd.arithmetic import (
    abs_square,
    complement,
    increment,
    one_minus_power,
    quotient,
    safe_sqrt,
)
from jgd.calls import factory_body
from jgd.combinators import Slots, add, chain, divide, named, with_accumulators
from jgd.norms import rms_norm
from jgd.pytree import as_pytree
from jgd.rules import per_leaf
from jgd.transforms import (
    BiasCorrectionState,
    count_slot,
    moving_average,
    rms,
    root,
    running_max,
    scale,
    square,
)
from jgd.trees import check_state, leafwise, like, with_params

__all__ = [
    "Beta",
    "NadamState",
    "after_decay",
    "correct",
    "factored_descent",
    "scale_by_nadam",
    "scale_by_uncorrected_adam",
    "with_parameters_of_options",
]


P = ParamSpec("P")


def with_parameters_of_options(
    rule: Callable[P, Any], defaults: Mapping[str, Any], *, keyword_only: bool = False
) -> Callable[P, Any]:
    """Return `rule` with parameters in place of its `**options: Unpack[SomeTypedDict]`.

    Each field of the TypedDict becomes a parameter, in front of the keyword-only parameters of
    `rule`. Its default is that of `defaults`, or None.
    """
    signature = inspect.signature(rule)
    *own, var_keyword = signature.parameters.values()
    (typed_dict,) = typing.get_args(var_keyword.annotation)
    kind = var_keyword.KEYWORD_ONLY if keyword_only else var_keyword.POSITIONAL_OR_KEYWORD
    options = [
        inspect.Parameter(name, kind, default=defaults.get(name), annotation=hint)
        for name, hint in typing.get_type_hints(typed_dict, include_extras=True).items()
    ]
    front = [p for p in own if p.kind is not p.KEYWORD_ONLY]
    parameters = [*front, *options, *own[len(front) :]]
    expanded = signature.replace(parameters=parameters)

    call: Callable[..., Any] = rule

    @functools.wraps(rule)
    def factory(*args: Any, **kwargs: Any) -> Any:
        arguments: Any = expanded.bind(*args, **kwargs).arguments
        return call(**arguments)

    setattr(factory, "__signature__", expanded)  # noqa: B010 (not an attribute of functions)
    return factory


# A decay that may follow a schedule. The bias correction uses only its value at the current step.
Beta = Annotated[Any, NumberKind("in [0, 1)", lambda x: (x >= 0) & (x < 1))]


@as_pytree
def correct(decay: Beta, *, power: Structure) -> GradientTransformation:
    """Scale updates by u = g (1 - decay^t)^power, with t = 1 at the first step.

    Args:
      decay: in [0, 1), the decay of an average that starts at 0.
      power: -1 corrects the average; 0.5 corrects a quotient by the average's root.

    State: `BiasCorrectionState(count)`.
    Differs from: `jgd.bias_correction`, whose power is -1.
    """

    def step(updates: Any, slots: Slots, _: Any) -> Any:
        count = slots.step("count", increment)
        factor = one_minus_power(complement(decay), count) ** power
        return leafwise(lambda g: g * factor, updates)

    return with_accumulators([step], [count_slot()], BiasCorrectionState, {"count": "count"})


def scale_by_uncorrected_adam(
    b1: Any, b2: Any, eps: Any, eps_root: Any = 0.0, *, amsgrad: bool = False
) -> GradientTransformation:
    """Scale updates by Adam's rule with "epsilon hat", added before the bias correction of v.

        u = sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v + eps_root) + eps)

    With `amsgrad` the largest v so far replaces v.
    """
    largest = [running_max(name="nu_max")] if amsgrad else []
    roots = chain(square(), moving_average(b2, name="nu"), *largest, root(eps, eps_root))
    quotient = divide(moving_average(b1, name="mu"), roots)
    record = optax.ScaleByAmsgradState if amsgrad else optax.ScaleByAdamState
    corrected = chain(quotient, correct(b1, power=-1), correct(b2, power=0.5))
    return named(corrected, record=record, shared=["count"])


@as_pytree
def after_decay(inner: GradientTransformation, factor: Number) -> GradientTransformation:
    """Decay the parameters before `inner` sees them: u = inner(g, p - factor p) - factor p.

    Args:
      inner: the optimizer.
      factor: usually the learning rate times the weight decay.

    State: that of `inner`.
    Differs from: `add_decayed_weights`, with which a rule sees the parameters before their decay.
    """
    tx = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        decayed = leafwise(lambda _, p: p - factor * p, updates, with_params(params))
        updates, state = tx.update(updates, state, decayed, **extra)
        return leafwise(lambda u, p: u - factor * p, updates, params), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


# --- NAdam -----------------------------------------------------------------------------------


class NadamState(NamedTuple):
    """State of `scale_by_nadam`."""

    count: jax.Array  # int32 scalar: steps so far
    mu: Any  # like the parameters, at least float32
    nu: Any
    mu_product: jax.Array  # float32 scalar: the product of the momenta so far


@as_pytree
def scale_by_nadam(
    b1: Beta, b2: Beta, eps: NonNegative, momentum_decay: NonNegative
) -> GradientTransformation:
    """Scale updates by NAdam's rule, whose momentum follows the paper's schedule.

        d_t = b1 (1 - 0.96^(t momentum_decay) / 2)            D = d_1 d_2 ... d_t
        u = (d_(t+1) m / (1 - D d_(t+1)) + (1 - d_t) g / (1 - D)) / (sqrt(v / (1 - b2^t)) + eps)

    State: `NadamState(count, mu, nu, mu_product)`, two trees and two scalars.
    Source: Dozat 2016, algorithm 2.
    """

    def quotient_of(gradient_weight: Any, mean_weight: Any) -> GradientTransformation:
        with factory_body():
            mean = moving_average(b1, name="mu")
            direction = add(chain(mean, scale(mean_weight)), scale(gradient_weight))
            quotient = divide(direction, rms(b2, eps, name="nu"))
            return named(quotient, record=optax.ScaleByAdamState)

    def init(params: Any) -> Any:
        averages: Any = quotient_of(0.0, 0.0).init(params)
        return NadamState(*averages, mu_product=jnp.ones([], float))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        *averages, product = check_state(state, NadamState)
        t = increment(averages[0]).astype(float)
        momentum = lambda t: b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
        product = product * momentum(t)
        gradient_weight = (1 - momentum(t)) / (1 - product)
        mean_weight = momentum(t + 1) / (1 - product * momentum(t + 1))
        quotient = quotient_of(gradient_weight, mean_weight)
        new: Any
        updates, new = quotient.update(updates, optax.ScaleByAdamState(*averages), params)
        return updates, like(NadamState(*new, mu_product=product), state)

    return GradientTransformation(init, update)


# --- Adafactor -------------------------------------------------------------------------------


class FactorsState(NamedTuple):
    """State of `factored_descent`. An accumulator that a leaf does not need is empty."""

    count: jax.Array  # int32 scalar: steps so far
    row: Any  # average squares of leaves with two or more axes: means over the last axis
    column: Any  # the same: means over the last axis but one
    v: Any  # average squares of leaves with fewer than two axes


@as_pytree
def factored_descent(
    learning_rate: Number,
    decay: Number,
    added: NonNegative,
    least_scale: NonNegative,
    threshold: Positive,
    floor: NonNegative | None = None,
) -> GradientTransformation:
    """Adafactor of Keras and PyTorch: factored over the last two axes, with a relative step.

        w = t^decay            row, column <- row + w (mean of g^2 + added - row), likewise
        x = g / sqrt(row column / mean(row))            x <- x / max(1, rms(x) / threshold)
        u = -max(least_scale, rms(p)) min(learning_rate, 1 / sqrt(t)) x

    Args:
      learning_rate: upper bound of the step relative to the parameters.
      decay: below 0, the exponent of the weight w.
      added: constant added to each square.
      least_scale: lower bound of rms(p).
      threshold: above 0, upper bound of the root mean square of x.
      floor: lower bound of mean(row); its square is the lower bound of the average squares. None:
        the dtype's epsilon.

    State: `FactorsState(count, row, column, v)`.
    Differs from: `jgd.adafactor`, which factors the two largest axes and has no 1 / sqrt(t).
    Source: Shazeer & Stern 2018, algorithms 4 and 6, arXiv:1804.04235.
    """

    def rule(g: Any, p: Any, row: Any, column: Any, v: Any, t: Any) -> tuple[Any, ...]:
        weight = t**decay
        lowest = jnp.finfo(g.dtype).eps if floor is None else floor
        average = lambda old, new: old + weight * (new - old)
        squares = abs_square(g) + added
        if g.ndim < 2:
            v = estimate = average(v, squares)
        else:
            row, column = average(row, squares.mean(-1)), average(column, squares.mean(-2))
            mean = jnp.maximum(row.mean(-1, keepdims=True), lowest)
            estimate = quotient(row, mean)[..., None] * column[..., None, :]
        x = quotient(g, safe_sqrt(jnp.maximum(estimate, lowest**2)))
        x = x / jnp.maximum(1, rms_norm(x) / threshold)
        rate = jnp.maximum(least_scale, rms_norm(p)) * jnp.minimum(learning_rate, t**-0.5)
        return -rate * x, row, column, v

    empty = lambda p: jnp.zeros([0], p.dtype)
    part = lambda shape: lambda p: jnp.zeros(shape(p.shape), p.dtype) if p.ndim > 1 else empty(p)
    return per_leaf(
        rule,
        FactorsState,
        row=part(lambda shape: shape[:-1]),
        column=part(lambda shape: shape[:-2] + shape[-1:]),
        v=lambda p: empty(p) if p.ndim > 1 else jnp.zeros_like(p),
    )
