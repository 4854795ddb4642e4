"""Transformations that depend on a whole array: its norm, or the mean of its gradient."""

from typing import Any

import jax.numpy as jnp
from optax import GradientTransformation

from jgd.arguments import NonNegative, Number, Structure
from jgd.arithmetic import abs_square, formula, quotient, safe_sqrt
from jgd.combinators import stateless
from jgd.pytree import as_pytree
from jgd.transforms import pointwise
from jgd.trees import TreeError, leafwise, with_params

__all__ = [
    "centralize",
    "scale_by_param_block_norm",
    "scale_by_param_block_rms",
    "scale_by_trust_ratio",
]


@formula
def norm(x: Any) -> Any:
    """Return the Euclidean norm of all entries, with derivative 0 at 0."""
    return safe_sqrt(jnp.sum(abs_square(x)))


@formula
def rms_norm(x: Any) -> Any:
    """Return the root mean square of all entries, with derivative 0 at 0; 0 for an empty x."""
    return safe_sqrt(jnp.sum(abs_square(x)) / max(x.size, 1))


def _by_params(f: Any) -> GradientTransformation:
    """Return the stateless transformation of each leaf by `f(g, p)`."""
    return stateless(lambda updates, params: leafwise(f, updates, with_params(params)))


@as_pytree
def centralize(*, output_axis: Structure = 0) -> GradientTransformation:
    """u = g - mean(g) over all axes but one, where there are two or more: gradient centralization.

    Args:
      output_axis: the axis over the outputs of a layer: 0 (default, the layout of optax and
        PyTorch), or -1 for kernels of flax. The weights into each output keep their sum.

    State: `EmptyState`.
    Source: Yong et al. 2020, equation 1, arXiv:2004.01461.
    """

    def centered(g: Any) -> Any:
        if not -g.ndim <= output_axis < g.ndim:
            raise TreeError(f"output_axis must be in [{-g.ndim}, {g.ndim - 1}], got {output_axis}")
        axes = tuple(axis for axis in range(g.ndim) if axis != output_axis % g.ndim)
        return g - g.mean(axes, keepdims=True)

    return pointwise(lambda g: centered(g) if g.ndim > 1 else g)


@as_pytree
def scale_by_trust_ratio(
    min_norm: NonNegative = 0.0, trust_coefficient: Number = 1.0, eps: NonNegative = 0.0
) -> GradientTransformation:
    """u = g trust_coefficient ||p|| / (||g|| + eps) for each leaf, and g where a norm is 0.

    Args:
      min_norm: at least 0; smaller norms are replaced by it.
      trust_coefficient: any number, 1 by default.
      eps: at least 0, added to the norm of g.

    State: `EmptyState`.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `optax.clip_by_block_rms`, which never increases an update.
    Source: You, Gitman & Ginsburg 2017, algorithm 1, arXiv:1708.03888.
    """

    def scaled(g: Any, p: Any) -> Any:
        size, length = (jnp.maximum(norm(x), min_norm) for x in (p, g))
        ratio = trust_coefficient * quotient(size, length + eps)
        return g * jnp.where((size == 0) | (length == 0), 1, ratio)

    return _by_params(scaled)


@as_pytree
def scale_by_param_block_norm(min_scale: NonNegative = 1e-3) -> GradientTransformation:
    """u = g max(||p||, min_scale) for each leaf. State: `EmptyState`."""
    return _by_params(lambda g, p: g * jnp.maximum(norm(p), min_scale))


@as_pytree
def scale_by_param_block_rms(min_scale: NonNegative = 1e-3) -> GradientTransformation:
    """u = g max(rms(p), min_scale) for each leaf. State: `EmptyState`."""
    return _by_params(lambda g, p: g * jnp.maximum(rms_norm(p), min_scale))
