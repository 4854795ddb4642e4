"""`per_leaf`: a formula on one array, lifted over the tree.

Where a paper's formula uses a variable twice, or looks at the parameters, it is not forced into a
composition: it stands as a function of one gradient and its memories. Famous instances are Lion,
whose average is read with one decay and written with another, and Rprop, whose step sizes follow
the signs of the gradient.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import GradientTransformation

from jgd.combinators import aligned, expect, increment, misfit, with_params
from jgd.pytree import TreeError, as_pytree

__all__ = ["difference", "per_leaf"]


def per_leaf(
    rule: Callable[..., Any], record: Any, **start: Callable[[Any], Any]
) -> GradientTransformation:
    """`rule` on each leaf: it takes a gradient and memories, and gives an update and new memories.

        def rule(g, mu):
            return jnp.sign(b1 * mu + (1 - b1) * g), b2 * mu + (1 - b2) * g

        lion = per_leaf(rule, LionState)  # class LionState(NamedTuple): mu: Any

    Args:
      rule: asks by the names of its parameters for what it needs: `g`, the gradient; `p`, the
        parameter; `t`, the number of this step as a float, from 1; any field of `record`, the
        memory of that name. It returns the update and the new memories in the order of `record`.
      record: the named tuple of the state. A field `count` counts the steps, each other field is a
        memory: a tree with one array, or a small tree of arrays, for each parameter.
      start: for each memory, what it is before the first step, as a function of the parameter;
        zeros like it by default.

    Differs from: words, which compose; a rule is for what does not come apart.
    """
    memories = [field for field in record._fields if field != "count"]
    asked = list(inspect.signature(rule).parameters)

    def init(params: Any) -> Any:
        made = {m: jax.tree.map(start.get(m, jnp.zeros_like), params) for m in memories}
        if "count" in record._fields:
            made["count"] = jnp.zeros([], jnp.int32)
        return record(**made)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        trees = {m: getattr(expect(state, record), m) for m in memories}
        if "p" in asked:
            trees["p"] = with_params(params)
        count = {}
        if "count" in record._fields:
            count["count"] = increment(state.count)
        leaves, structure, columns = aligned(updates, *trees.values())
        rows = []
        for index, (g, *others) in enumerate(zip(leaves, *columns, strict=True)):
            if g is None:
                rows.append((None, *others[: len(memories)]))
                continue
            given = dict(zip(trees, others, strict=True))
            for name, value in given.items():
                wanted = jax.eval_shape(start[name], g) if name in start else g
                held, structure_of = jax.tree.leaves(value), jax.tree.structure(wanted)
                if [jnp.shape(x) for x in held] != [x.shape for x in jax.tree.leaves(wanted)]:
                    raise misfit(updates, index, value)
                given[name] = structure_of.unflatten(held)  # flax has containers of its own
            given["g"] = g
            if "t" in asked:
                given["t"] = count["count"].astype(float)
            rows.append(rule(**{name: given[name] for name in asked}))
        new_updates, *new = (
            structure.unflatten([row[i] for row in rows]) for i in range(1 + len(memories))
        )
        return new_updates, record(**count, **dict(zip(memories, new, strict=True)))

    return GradientTransformation(init, update)


def real(x: Any) -> Any:
    """x itself, where numbers need an order."""
    if jnp.iscomplexobj(x):
        raise TreeError("is for real parameters: wrap it in optax.contrib.split_real_and_imaginary")
    return x


class DifferenceState(NamedTuple):
    """State of `difference`."""

    count: jax.Array  # int32 scalar: steps so far
    last: Any  # like the parameters, at least float32: the last gradient


@as_pytree
def difference() -> GradientTransformation:
    """u = g - the g of the step before, and 0 at the first step.

    State: `DifferenceState(count, last)`, one tree like the parameters.
    Source: Xie et al. 2022, algorithm 1 (Adan), arXiv:2208.06677.
    """
    return per_leaf(lambda g, last, t: (jnp.where(t == 1, 0, g - last), g), DifferenceState)
