"""`per_leaf`: a formula on one array, lifted over the tree.

If a paper's formula uses a variable twice, or depends on the parameters, it is written as a
function of one gradient and its accumulators instead of a composition. Examples are Lion, which
reads its average with one decay and writes it with another, and Rprop, whose step sizes follow the
signs of the gradient.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import GradientTransformation

from jgd.arithmetic import increment
from jgd.combinators import Plain, Slot, Slots, with_accumulators
from jgd.pytree import as_pytree
from jgd.transforms import count_slot
from jgd.trees import TreeError, aligned, leafwise, shape_error, with_params

__all__ = ["difference", "per_leaf"]


def per_leaf(rule: Callable[..., Any], record: type, **start: Callable[[Any], Any]) -> Plain:
    """Lift `rule`, a function of one gradient and its accumulators, over the tree.

        def rule(g, mu):
            return jnp.sign(b1 * mu + (1 - b1) * g), b2 * mu + (1 - b2) * g

        lion = per_leaf(rule, LionState)  # class LionState(NamedTuple): mu: Any

    Args:
      rule: a function whose parameters are, by name: `g`, the gradient; `p`, the parameter; `t`,
        the number of this step as a float, from 1; any field of `record`, the accumulator of that
        name. It returns the update, and the new accumulators in the order of `record`.
      record: the named tuple of the state. A field `count` counts the steps. Each other field is an
        accumulator: a tree with one array, or a small tree of arrays, for each parameter.
      start: for each accumulator, a function from the parameter to its initial value; by default
        zeros like the parameter.

    Differs from: the basic transformations, which compose; a rule is for formulas that do not.
    """
    fields: tuple[str, ...] = getattr(record, "_fields")  # noqa: B009
    accumulators = [field for field in fields if field != "count"]
    parameters = _parameters_of(rule)
    slots = [
        Slot(m, functools.partial(jax.tree.map, start.get(m, jnp.zeros_like))) for m in accumulators
    ]
    if "count" in fields:
        slots.append(Slot("count", lambda _: jnp.zeros([], jnp.int32)))

    def step(updates: Any, slots: Slots, params: Any) -> Any:
        trees = {m: slots.old[m] for m in accumulators}
        if "p" in parameters:
            trees["p"] = with_params(params)
        count: Any = slots.step("count", increment) if "count" in fields else None
        t = count.astype(float) if "t" in parameters else None
        leaves, structure, columns = aligned(updates, *trees.values())
        rows: list[tuple[Any, ...]] = []
        for index, (g, *others) in enumerate(zip(leaves, *columns, strict=True)):
            if g is None:
                rows.append((None, *others[: len(accumulators)]))
                continue
            given = {"g": g, "t": t}
            for name, value in zip(trees, others, strict=True):
                given[name] = _checked(value, start.get(name), g)
                if given[name] is None:
                    raise shape_error(updates, index, value)
            rows.append(rule(**{name: given[name] for name in parameters}))
        new_updates, *new = (
            structure.unflatten([row[i] for row in rows]) for i in range(1 + len(accumulators))
        )
        for name, tree in zip(accumulators, new, strict=True):
            slots.new[name] = tree
        return new_updates

    return with_accumulators([step], slots, record, dict(zip(fields, fields, strict=True)))


@functools.cache
def _parameters_of_code(code: Any) -> tuple[str, ...]:
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _parameters_of(rule: Callable[..., Any]) -> tuple[str, ...]:
    code = getattr(rule, "__code__", None)
    return tuple(inspect.signature(rule).parameters) if code is None else _parameters_of_code(code)


def _checked(value: Any, start: Callable[[Any], Any] | None, g: Any) -> Any:
    """Return the accumulator of one leaf, or None if its shapes are not the shapes of its start."""
    if start is None:
        return value if getattr(value, "shape", None) == g.shape else None
    expected = jax.eval_shape(start, g)
    leaves = jax.tree.leaves(value)
    if [jnp.shape(x) for x in leaves] != [x.shape for x in jax.tree.leaves(expected)]:
        return None
    return jax.tree.unflatten(jax.tree.structure(expected), leaves)  # flax has its own containers


def real(x: Any) -> Any:
    """Return x. Raises TreeError if it is complex, for rules that compare numbers."""
    if jnp.iscomplexobj(x):
        raise TreeError(
            "updates must be real, got complex ones. Wrap the optimizer in"
            " optax.contrib.split_real_and_imaginary"
        )
    return x


class DifferenceState(NamedTuple):
    """State of `difference`."""

    count: jax.Array  # int32 scalar: steps so far
    last: Any  # like the parameters, at least float32: the last gradient


@as_pytree
def difference(*, name: str = "last") -> GradientTransformation:
    """u = g - the gradient of the step before, and 0 at the first step.

    Args:
      name: the name of the accumulator, for `named`.

    State: `DifferenceState(count, last)`, one tree like the parameters.
    Source: Xie et al. 2022, algorithm 1 (Adan), arXiv:2208.06677.
    """

    def step(updates: Any, slots: Slots, _: Any) -> Any:
        first = slots.step("count", increment) == 1
        slots.step(name, lambda old: leafwise(lambda g, _: g, updates, old, keep=True))
        return leafwise(lambda g, old: jnp.where(first, 0, g - old), updates, slots.old[name])

    zeros = Slot(name, functools.partial(jax.tree.map, jnp.zeros_like))
    fields = {"count": "count", "last": name}
    return with_accumulators([step], [count_slot(), zeros], DifferenceState, fields)
