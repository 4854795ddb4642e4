"""Dtypes at the door of an optimizer: it computes in float32 at least, and returns narrow updates.

widen({"w": bfloat16})                   # {"w": float32}
narrow(updates, gradients, params)       # in the wider precision of gradients and parameters
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgd.trees import TreeError, is_none, path_name

__all__ = ["has_16_bits", "narrow", "same_structure", "widen"]


_WIDE = frozenset(map(jnp.dtype, ("float32", "float64", "complex64", "complex128")))


def widen(tree: Any) -> Any:
    """Return a tree with its 16-bit and integer leaves as float32."""
    try:
        return jax.tree.map(_widen_leaf, tree)
    except TypeError:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            try:
                _widen_leaf(leaf)
            except TypeError:
                kind = type(leaf).__name__ if not hasattr(leaf, "dtype") else leaf.dtype
                raise TreeError(f"expected an array at {path_name(path)}, got {kind}") from None
        raise


def _widen_leaf(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and leaf.dtype in _WIDE:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):  # `init` needs only shapes
        dtype = leaf.dtype if leaf.dtype in _WIDE else jnp.zeros([], float).dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    dtype = jnp.result_type(leaf)
    if dtype == jax.dtypes.float0:  # the gradient of an integer
        return jnp.zeros(np.shape(leaf), float)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError
    if jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_):
        return jnp.asarray(leaf, float)
    return jnp.asarray(leaf) if dtype in _WIDE else jnp.asarray(leaf, jnp.float32)


def has_16_bits(leaf: Any) -> bool:
    """Return whether a leaf is bfloat16 or float16."""
    return jnp.result_type(leaf) in (jnp.bfloat16, jnp.float16)


def narrow(new: Any, updates: Any, params: Any) -> Any:
    """Return each update in the wider of the dtypes of its gradient and parameter."""
    if not same_structure(new, updates):
        # updates for the pairs of parameters of a lookahead have the dtypes of the parameters
        return (
            jax.tree.map(_narrow_leaf, new, params, params) if same_structure(new, params) else new
        )
    if params is not None:
        try:
            return jax.tree.map(_narrow_leaf, new, updates, params, is_leaf=is_none)
        except (TypeError, ValueError):  # unused parameters may have another structure
            pass
    return jax.tree.map(_narrow_leaf, new, updates, updates)


def same_structure(new: Any, old: Any) -> bool:
    """Return whether two trees have the same structure."""
    return jax.tree.structure(new) == jax.tree.structure(old)


def _narrow_leaf(new: Any, gradient: Any, param: Any) -> Any:
    if new is None:
        return None
    dtype = getattr(new, "dtype", None)
    if dtype == getattr(gradient, "dtype", None) == getattr(param, "dtype", None):
        return new
    dtypes = [jnp.result_type(x) for x in (gradient, param) if x is not None]
    dtypes = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    if not dtypes:
        return new
    # the real dtype, also for complex leaves
    dtype = jnp.finfo(functools.reduce(jnp.promote_types, dtypes)).dtype
    return jnp.asarray(new, jnp.result_type(dtype, 1j) if jnp.iscomplexobj(new) else dtype)
