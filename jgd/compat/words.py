"""What both frameworks need beyond jgd's own words: their bias correction, and three rules.

Keras and PyTorch correct with the decay of now, 1 - decay^t, where jgd's words hold the product of
all decays so far. For a decay that does not move the two are one.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformation

from jgd.arguments import Decay, NonNegative, Number, Positive, Structure
from jgd.combinators import (
    abs_square,
    expect,
    increment,
    leafwise,
    quotient,
    safe_sqrt,
    with_params,
)
from jgd.norms import rms_norm
from jgd.pytree import as_pytree
from jgd.rules import per_leaf
from jgd.transforms import (
    add,
    chain,
    divide,
    moving_average,
    named,
    root,
    running_max,
    scale,
    square,
)
from jgd.words import below_one

__all__ = [
    "AdamState",
    "AmsgradState",
    "CountState",
    "after_decay",
    "average",
    "correct",
    "correction",
    "factored_descent",
    "magnitude",
    "scale_by_nadam",
    "scale_by_uncorrected_adam",
    "with_parameters_of_options",
]


P = ParamSpec("P")


def with_parameters_of_options(
    rule: Callable[P, Any], defaults: Mapping[str, Any], *, keyword_only: bool = False
) -> Callable[P, Any]:
    """The rule with real parameters in the place of its `**options: Unpack[SomeTypedDict]`.

    They come before those of the rule that are for keywords only. A default not named is None.
    """
    signature = inspect.signature(rule)
    *own, rest = signature.parameters.values()
    (kind,) = typing.get_args(rest.annotation)
    how = rest.KEYWORD_ONLY if keyword_only else rest.POSITIONAL_OR_KEYWORD
    options = [
        inspect.Parameter(name, how, default=defaults.get(name), annotation=hint)
        for name, hint in typing.get_type_hints(kind, include_extras=True).items()
    ]
    front = [p for p in own if p.kind is not p.KEYWORD_ONLY]
    parameters = [*front, *options, *own[len(front) :]]
    expanded = signature.replace(parameters=parameters)

    @functools.wraps(rule)
    def factory(*args: Any, **kwargs: Any) -> Any:
        return rule(**expanded.bind(*args, **kwargs).arguments)  # type: ignore[call-arg]

    factory.__signature__ = expanded  # type: ignore[attr-defined]
    return factory


class CountState(NamedTuple):
    """State of `correct`."""

    count: jax.Array  # int32 scalar: steps so far


class AdamState(NamedTuple):
    """State of Adam and its kin."""

    count: jax.Array  # int32 scalar: steps so far
    mu: Any  # like the parameters, at least float32
    nu: Any


class AmsgradState(NamedTuple):
    """State of Adam with `amsgrad`."""

    count: jax.Array  # int32 scalar: steps so far
    mu: Any  # like the parameters, at least float32
    nu: Any
    nu_max: Any


def correction(decay: Any, t: Any) -> Any:
    """1 - decay^t, exact to rounding, with a finite derivative at a decay of 0."""
    log_decay = jnp.log(jnp.maximum(decay, jnp.finfo(jnp.result_type(float)).tiny))
    return below_one(decay, t, t * log_decay)


@as_pytree
def correct(decay: Decay, *, power: Structure = -1) -> GradientTransformation:
    """u = g (1 - decay^t)^power, with t = 1 at the first step.

    Args:
      decay: in [0, 1), that of an average which started at 0.
      power: -1 undoes that start; 0.5 is what Keras's Adam does where its magnitude is not yet
        corrected.

    State: `CountState(count)`.
    Differs from: `jgd.bias_correction`, which multiplies the decays of all steps where they move.
    """
    init = lambda params: CountState(jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = increment(expect(state, CountState).count)
        factor = correction(decay, count.astype(float)) ** power
        return leafwise(lambda g: g * factor, updates), CountState(count)

    return GradientTransformation(init, update)


def average(decay: Any) -> GradientTransformation:
    """a <- decay a + (1 - decay) g, and u = a / (1 - decay^t). Slots: average, count."""
    return chain(moving_average(decay), correct(decay))


def magnitude(decay: Any, eps: Any) -> GradientTransformation:
    """sqrt(v / (1 - decay^t)) + eps, for v the average of squares. Slots: average, count."""
    return chain(square(), average(decay), root(eps))


def scale_by_uncorrected_adam(
    b1: Any, b2: Any, eps: Any, eps_root: Any = 0.0, *, amsgrad: bool = False
) -> GradientTransformation:
    """u = sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v + eps_root) + eps): Adam with "epsilon hat".

    With `amsgrad` the largest v so far takes the place of v.
    """
    largest = [running_max()] if amsgrad else []
    roots = chain(square(), moving_average(b2), *largest, root(eps, eps_root))
    corrected = chain(divide(moving_average(b1), roots), correct(b1), correct(b2, power=0.5))
    if amsgrad:
        return named(corrected, record=AmsgradState, slots="mu nu nu_max count count")
    return named(corrected, record=AdamState, slots="mu nu count count")


@as_pytree
def after_decay(inner: GradientTransformation, factor: Number) -> GradientTransformation:
    """u = inner(g, p - factor p) - factor p: the parameters decay before `inner` sees them.

    Args:
      inner: the optimizer.
      factor: usually learning rate times weight decay.

    State: that of `inner`.
    Differs from: `add_decayed_weights`, after which a rule that looks at the parameters has seen
      them undecayed.
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
    b1: Decay, b2: Decay, eps: NonNegative, momentum_decay: NonNegative
) -> GradientTransformation:
    """NAdam's quotient, with the momentum that the paper's schedule gives.

        d_t = b1 (1 - 0.96^(t momentum_decay) / 2)            D = d_1 d_2 ... d_t
        u = (d_(t+1) m / (1 - D d_(t+1)) + (1 - d_t) g / (1 - D)) / (sqrt(v / (1 - b2^t)) + eps)

    State: `NadamState(count, mu, nu, mu_product)`, two trees and two scalars.
    Source: Dozat 2016, algorithm 2.
    """

    def quotient_of(now: Any, coming: Any) -> GradientTransformation:
        direction = add(chain(moving_average(b1), scale(coming)), scale(now))
        return named(divide(direction, magnitude(b2, eps)), record=AdamState, slots="mu nu count")

    def init(params: Any) -> Any:
        averages: Any = quotient_of(0.0, 0.0).init(params)
        return NadamState(**averages._asdict(), mu_product=jnp.ones([], float))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        *averages, product = expect(state, NadamState)
        t = increment(averages[0]).astype(float)
        momentum = lambda t: b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
        product = product * momentum(t)
        now = (1 - momentum(t)) / (1 - product)
        coming = momentum(t + 1) / (1 - product * momentum(t + 1))
        inner = quotient_of(now, coming)
        new: Any
        updates, new = inner.update(updates, AdamState(*averages), params)
        return updates, NadamState(**new._asdict(), mu_product=product)

    return GradientTransformation(init, update)


# --- Adafactor -------------------------------------------------------------------------------


class FactorsState(NamedTuple):
    """State of `factored_descent`. A memory that a leaf has no use for is empty."""

    count: jax.Array  # int32 scalar: steps so far
    row: Any  # average squares: means over the last axis, and over the one before
    column: Any
    v: Any  # like the leaves with fewer than two axes


@as_pytree
def factored_descent(
    learning_rate: Number,
    decay: Number,
    added: NonNegative,
    least_scale: NonNegative,
    threshold: Positive,
    floor: NonNegative | None = None,
) -> GradientTransformation:
    """Adafactor as Keras and PyTorch have it: over the last two axes, with a relative step.

        w = t^decay            row, column <- row + w (mean of g^2 + added - row), likewise
        x = g / sqrt(row column / mean(row))            x <- x / max(1, rms(x) / threshold)
        u = -max(least_scale, rms(p)) min(learning_rate, 1 / sqrt(t)) x

    Args:
      learning_rate: an upper bound of the step relative to the parameters.
      decay: of the weight of a new square, below 0.
      added: to each square.
      least_scale: that of small parameters.
      threshold: above 0, of the root mean square of x.
      floor: the least mean(row), and its square the least v; None: the dtype's epsilon.

    State: `FactorsState(count, row, column, v)`.
    Differs from: `jgd.adafactor`, which factors the two largest axes and has no 1 / sqrt(t).
    Source: Shazeer & Stern 2018, algorithms 4 and 6, arXiv:1804.04235.
    """

    def rule(g: Any, p: Any, row: Any, column: Any, v: Any, t: Any) -> tuple[Any, ...]:
        weight = t**decay
        least = jnp.finfo(g.dtype).eps if floor is None else floor
        new = lambda old, seen: old + weight * (seen - old)
        squares = abs_square(g) + added
        if g.ndim < 2:
            v = estimate = new(v, squares)
        else:
            row, column = new(row, squares.mean(-1)), new(column, squares.mean(-2))
            mean = jnp.maximum(row.mean(-1, keepdims=True), least)
            estimate = quotient(row, mean)[..., None] * column[..., None, :]
        x = quotient(g, safe_sqrt(jnp.maximum(estimate, least**2)))
        x = x / jnp.maximum(1, rms_norm(x) / threshold)
        rate = jnp.maximum(least_scale, rms_norm(p)) * jnp.minimum(learning_rate, t**-0.5)
        return -rate * x, row, column, v

    unused = lambda p: jnp.zeros([0], p.dtype)
    part = lambda shape: lambda p: jnp.zeros(shape(p.shape), p.dtype) if p.ndim > 1 else unused(p)
    return per_leaf(
        rule,
        FactorsState,
        row=part(lambda shape: shape[:-1]),
        column=part(lambda shape: shape[:-2] + shape[-1:]),
        v=lambda p: unused(p) if p.ndim > 1 else jnp.zeros_like(p),
    )
