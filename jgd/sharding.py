"""Parameters that are sharded over a mesh: what a rule gathers, and where its memories lie.

    u, sums = gathered(rule, g, sums)          # rule sees whole arrays, u is sharded like g
    state = placed(tx.init(params), params)    # a memory is sharded like its parameter

JAX derives the sharding of sums and of elementwise formulas. It does not for products and
decompositions of matrices on explicit axes, nor for `jnp.zeros_like` on auto axes inside jit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

try:
    from jax.experimental.shard_alike import shard_alike
except ImportError:  # an experimental module: without it JAX decides where memories are

    def shard_alike(x: Any, y: Any) -> tuple[Any, Any]:
        return x, y


__all__ = ["gathered", "placed", "sharded_like", "whole"]


def whole(x: Any) -> Any:
    """Return `x`, gathered on every device where it is sharded over explicit axes.

    It takes the memory of the whole array there. On auto axes the compiler decides what to gather.
    """
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def sharded_like(new: Any, old: Any) -> Any:
    """Return `new`, computed from whole arrays, in the sharding of `old` over explicit axes."""
    sharding = jax.typeof(old).sharding
    return jax.sharding.reshard(new, sharding) if any(sharding.spec) else new


def gathered(f: Callable[..., Any], *args: Any) -> Any:
    """Return `f(*args)` on whole arrays, with each result sharded like the argument in its place.

    Args:
      f: returns a tuple, whose trees have the structures of the first arguments.
      args: trees of arrays.
    """
    results = f(*jax.tree.map(whole, args))
    pairs = zip(results, args, strict=False)  # arguments without a result are only read
    return tuple(jax.tree.map(sharded_like, new, old) for new, old in pairs)


def placed(state: Any, params: Any) -> Any:
    """Return a new state, traced on auto axes, with memories sharded like their parameters.

    The parameter of a memory is the one whose path ends the path of the memory, if it has its
    shape. Elsewhere zeros follow the array that they are like, and this is `state`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    traced = {path: p for path, p in leaves if isinstance(p, jax.core.Tracer) and p.ndim}

    def beside(path: Any, memory: Any) -> Any:
        ends = (path[start:] for start in range(len(path) + 1))
        p: Any = next((traced[end] for end in ends if end in traced), None)
        if p is None or p.shape != jnp.shape(memory) or any(jax.typeof(p).sharding.spec):
            return memory
        return shard_alike(p, memory)[1]

    return jax.tree_util.tree_map_with_path(beside, state) if traced else state
