"""Parameters sharded over a mesh: rules on gathered arrays, and the sharding of states.

    u, sums = apply_gathered(rule, g, sums)    # rule receives whole arrays, u is sharded like g
    state = shard_like_params(state, params)   # an accumulator is sharded like its parameter

JAX derives the sharding of sums and of elementwise formulas. It does not derive the sharding of
matrix products and decompositions on explicit axes, or of `jnp.zeros_like` on auto axes inside jit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["apply_gathered", "gather", "shard_like", "shard_like_params"]


def gather(x: Any) -> Any:
    """Gather `x` on every device if it is sharded over explicit axes.

    Every device then needs memory for the whole array. On auto axes, the compiler decides what to
    gather.
    """
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def shard_like(new: Any, old: Any) -> Any:
    """Return `new`, computed from whole arrays, with the explicit sharding of `old`."""
    sharding = jax.typeof(old).sharding
    return jax.sharding.reshard(new, sharding) if any(sharding.spec) else new


def apply_gathered(f: Callable[..., Any], *args: Any) -> Any:
    """Return `f(*args)` on whole arrays, with result i sharded like argument i.

    Args:
      f: a function that returns a tuple of trees, with the structures of the first arguments.
      args: trees of arrays.
    """
    results = f(*jax.tree.map(gather, args))
    pairs = zip(results, args, strict=False)  # arguments without a result are only read
    return tuple(jax.tree.map(shard_like, new, old) for new, old in pairs)


def shard_like_params(state: Any, params: Any) -> Any:
    """Return a new state with accumulators sharded like their parameters.

    An accumulator belongs to the parameter of its shape whose path is the end of the accumulator's
    path. Only states traced on auto axes change: elsewhere, zeros already have the sharding of the
    parameter.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    traced = {path: p for path, p in leaves if isinstance(p, jax.core.Tracer) and p.ndim}
    if not traced:
        return state
    # XLA gives both sides of a select one sharding, and cannot know that it never takes the first
    never = jax.lax.optimization_barrier(jnp.array(False))

    def place(path: Any, accumulator: Any) -> Any:
        ends = (path[start:] for start in range(len(path) + 1))
        p: Any = next((traced[end] for end in ends if end in traced), None)
        if p is None or p.shape != jnp.shape(accumulator) or any(jax.typeof(p).sharding.spec):
            return accumulator
        p = p if jnp.iscomplexobj(accumulator) else p.real
        return jnp.where(never, p.astype(accumulator.dtype), accumulator)

    return jax.tree_util.tree_map_with_path(place, state)
