"""Clipping: scales down gradients that exceed a bound. The bound is a leaf.

    jgd.chain(jgd.clip_by_global_norm(1.0), jgd.adamw(1e-3))
    jax.vmap(jgd.clip_by_global_norm)(jnp.array([0.5, 1.0, jnp.inf]))     # inf: off

Each function clips the norm of a block: all leaves, one leaf, a unit (such as one row), or one
entry. Entries are divided by the largest one before they are squared, so that squares do not
overflow or underflow, and derivatives are finite where all gradients are 0.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformation

from jgd.arguments import NonNegative, Number, Structure
from jgd.arithmetic import abs_square, formula, quotient, safe_sqrt
from jgd.combinators import Plain, Slot, Slots, stateless, with_accumulators
from jgd.pytree import as_pytree
from jgd.transforms import pointwise
from jgd.trees import TreeError, aligned, leafwise, with_params

__all__ = [
    "adaptive_grad_clip",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "normalize",
    "normalize_by_update_norm",
    "zero_nans",
]


# --- the norm of a block ---------------------------------------------------------------------

_over_axes = functools.partial(jax.jit, inline=True, static_argnames="axis")


@_over_axes
def _peak(g: Any, axis: Any) -> Any:
    # No gradient is needed: the norm does not depend on the number that divides its entries.
    size = jnp.abs(jax.lax.stop_gradient(g))
    return jnp.max(size, axis, keepdims=axis is not None, initial=jnp.finfo(size.dtype).tiny)


@_over_axes
def _squares(g: Any, inverse: Any, axis: Any) -> Any:
    return jnp.sum(abs_square(g * inverse), axis, keepdims=axis is not None)


@formula
def _bounded(inverse: Any, rest: Any, limit: Any, unit: Any) -> tuple[Any, Any]:
    within = (rest / inverse <= limit * unit) | (limit == jnp.inf)  # NaN: False, so it propagates
    # Within the bound all inputs are 1: a `where` around the result would give NaN derivatives.
    inverse, rest, limit, unit = (jnp.where(within, 1, x) for x in (inverse, rest, limit, unit))
    return inverse, limit * unit / rest


class Norm(NamedTuple):
    """Norm `rest / inverse` of a block. Neither factor overflows or underflows."""

    inverse: Any  # about 1 / the largest modulus, rounded to a power of two within the range
    rest: Any  # the norm of the entries times `inverse`; not finite if an entry is not finite

    @classmethod
    def of(cls, arrays: Sequence[Any], axis: Any = None) -> "Norm":
        """Return the norm of all entries of some arrays, or of each slice along `axis`."""
        peaks = [_peak(g, axis) for g in arrays] or [jnp.ones([])]
        peak = functools.reduce(jnp.maximum, peaks)
        dtype = jnp.finfo(peak.dtype)
        peak = jax.lax.reduce_precision(peak, dtype.nexp, 0)  # powers of two scale exactly
        inverse = 1 / jnp.minimum(peak, 0.5 / dtype.tiny)
        squares = [_squares(g, inverse, axis) for g in arrays] or [jnp.zeros([])]
        return cls(inverse, safe_sqrt(functools.reduce(jnp.add, squares)))

    def plus(self, eps: Any) -> "Norm":
        """Return the norm with `eps` added to it."""
        return Norm(self.inverse, self.rest + eps * self.inverse)

    def bounded(self, limit: Any, unit: Any = 1.0) -> tuple[Any, Any]:
        """Return the factors that scale a block to a norm of at most `limit` units; inf: by 1."""
        return _bounded(*self, limit, unit)

    def set_to(self, length: Any) -> tuple[Any, Any]:
        """Return the factors that scale the block to the norm `length`; a block of 0 stays 0."""
        return self.inverse, quotient(length, self.rest)


@formula
def scaled(g: Any, inverse: Any, factor: Any) -> Any:
    """Return g times two factors; the product of the factors alone may be out of range."""
    return g * inverse * factor


def block(g: Any, limit: Any, unit: Any = 1.0, axis: Any = None) -> Any:
    """Scale one leaf, or each slice along `axis`, to a norm of at most `limit` units."""
    return scaled(g, *Norm.of([g], axis).bounded(limit, unit))


def together(scale_of: Callable[[Norm], tuple[Any, Any]]) -> Plain:
    """Return the transformation that scales all leaves as one block, by `scale_of` its norm."""

    def transformed(updates: Any, _: Any) -> Any:
        scale = scale_of(Norm.of(jax.tree.leaves(updates)))
        return leafwise(scaled, updates, numbers=scale)

    return stateless(transformed)


# --- transformations -------------------------------------------------------------------------


@formula
def entries(g: Any, limit: Any) -> Any:
    """Clip the entries of one leaf to a modulus of at most `limit`."""
    if jnp.iscomplexobj(g):
        return block(g, limit, axis=())  # an entry is a slice along no axis
    return jnp.clip(g, -limit, limit)


@formula
def _leaf_rms(g: Any, limit: Any) -> Any:
    return block(g, limit, math.sqrt(g.size))


@as_pytree
def clip(max_delta: NonNegative) -> GradientTransformation:
    """u = min(max(g, -max_delta), max_delta) for each entry.

    Args:
      max_delta: the largest |u|, at least 0; inf turns clipping off. May be a schedule.

    State: `EmptyState`.
    Differs from: `optax.clip`, which rejects complex leaves. jgd clips their modulus and keeps
      their phase.
    """
    return pointwise(entries, max_delta)


@as_pytree
def clip_by_global_norm(max_norm: NonNegative) -> GradientTransformation:
    """u = g min(1, max_norm / N), for N the norm of all gradients together.

    Args:
      max_norm: the largest norm of all updates together, at least 0; inf turns clipping off. May be
        a schedule.

    State: `EmptyState`.
    Differs from: `optax.clip_by_global_norm`, which returns 0 where the square of a gradient
      overflows, NaN if gradients and bound are 0, and NaN derivatives where gradients are 0. As in
      optax, an infinite entry becomes NaN and all others 0; one NaN makes every update NaN.
    Source: Pascanu, Mikolov & Bengio 2013, algorithm 1, arXiv:1211.5063.
    """
    return together(lambda norm: norm.bounded(max_norm))


@as_pytree
def clip_by_block_rms(threshold: NonNegative) -> GradientTransformation:
    """u = g min(1, threshold / rms(g)) for each leaf: the update clipping of Adafactor.

    Args:
      threshold: the largest root mean square of a leaf, at least 0; inf turns clipping off.

    State: `EmptyState`.
    Differs from: `optax.clip_by_block_rms`, in the cases of `clip_by_global_norm`.
    Source: Shazeer & Stern 2018, section 6, arXiv:1804.04235.
    """
    return pointwise(_leaf_rms, threshold)


def _unit_axes(x: Any, axis: Any) -> tuple[int, ...]:
    """Return the axes along which the entries of a unit lie."""
    if axis is None:
        if sum(n != 1 for n in x.shape) < 2:
            return tuple(range(x.ndim))
        if x.ndim > 5:
            raise TreeError(f"axis must be given for a leaf with more than 5 axes, got {x.ndim}")
        return tuple(range({2: 1, 3: 1, 4: 3, 5: 4}[x.ndim]))
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if not all(-x.ndim <= a < x.ndim for a in axes):
        raise TreeError(f"axis must exist in every leaf, got {axis} for a leaf with {x.ndim} axes")
    return axes


@as_pytree
def adaptive_grad_clip(
    clipping: NonNegative, eps: NonNegative = 1e-3, axis: Structure = None
) -> GradientTransformation:
    """u = g min(1, clipping max(||p||, eps) / ||g||) for each unit: adaptive gradient clipping.

    Args:
      clipping: the largest ratio of the norm of an update to the norm of its parameters, at least
        0; inf turns clipping off.
      eps: the least norm of parameters, at least 0; 1e-3 by default.
      axis: the axis or axes that the norm of a unit sums over. None (default): all axes of scalars
        and vectors, the first axis of leaves with 2 or 3 axes, all but the last axis of leaves with
        4 or 5, so that a unit holds the weights of one output in the layout of flax.

    State: `EmptyState`.
    Raises: ValueError in `update` if no parameters are given or a leaf has no such `axis`.
    Differs from: `optax.adaptive_grad_clip` in the cases of `clip_by_global_norm`, and where a
      gradient with a norm below 1e-6 is clipped: optax scales it further than to the bound.
    Source: Brock et al. 2021, equation 3, arXiv:2102.06171.
    """

    def clipped(g: Any, p: Any) -> Any:
        axes = _unit_axes(g, axis)
        inverse, rest = Norm.of([p], axes)
        return block(g, clipping, jnp.maximum(rest / inverse, eps), axes)

    return stateless(lambda updates, params: leafwise(clipped, updates, with_params(params)))


@as_pytree
def normalize_by_update_norm(
    scale_factor: Number = 1.0, eps: NonNegative = 1e-6
) -> GradientTransformation:
    """u = scale_factor g / (N + eps), for N the norm of all gradients together.

    Args:
      scale_factor: any number, or a schedule; 1 by default.
      eps: at least 0; 1e-6 by default.

    State: `EmptyState`.
    Differs from: `optax.normalize_by_update_norm`, in the cases of `clip_by_global_norm`.
    """
    return together(lambda norm: norm.plus(eps).set_to(scale_factor))


@as_pytree
def normalize() -> GradientTransformation:
    """u = g / N, for N the norm of all gradients together, and 0 where N is 0.

    State: `EmptyState`.
    Differs from: `optax.contrib.normalize`, which returns NaN for gradients of 0, and 0 where the
      square of a gradient overflows.
    """
    return normalize_by_update_norm(eps=0.0)


@as_pytree
def zero_nans() -> GradientTransformation:
    """u = g, and 0 where g is NaN; the state records which leaves had a NaN.

    State: `optax.ZeroNansState(found_nan)`, a bool for each leaf: whether its last gradient had a
      NaN.
    Differs from: `clip` and the other clipping transformations, which propagate NaN.
    """

    def has_nan(updates: Any, old: Any) -> Any:
        leaves, structure, (old_flags,) = aligned(updates, old)
        pairs = zip(leaves, old_flags, strict=True)
        return structure.unflatten([x if g is None else jnp.isnan(g).any() for g, x in pairs])

    def step(updates: Any, slots: Slots, _: Any) -> Any:
        slots.step("found_nan", lambda old: has_nan(updates, old))
        return leafwise(lambda g: jnp.where(jnp.isnan(g), 0, g), updates)

    flags = Slot("found_nan", lambda params: jax.tree.map(lambda p: jnp.zeros([], bool), params))
    return with_accumulators([step], [flags], optax.ZeroNansState, {"found_nan": "found_nan"})
