"""The state of another framework's optimizer: which parameter is which, and filling it in."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jgd.groups import paths

__all__ = ["filled", "in_place"]


def in_place(
    params: Any, shapes: Sequence[tuple[int, ...]], names: Sequence[str] | None = None
) -> list[int]:
    """For each leaf of `params` the number of the parameter over there.

    By name, if the names over there are the paths here ("." and "/" are the same); else by order:
    that of the leaves, of the keys of a flat dict, or of their names with numbers as numbers,
    whichever fits the shapes.

    Raises: ValueError if none fits, or several do.
    """
    here, _ = paths(params)
    sizes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    if len(sizes) != len(shapes):
        raise ValueError(f"state_from: {len(sizes)} parameters here, {len(shapes)} in the state")
    plain = [name.replace("/", ".") for name in here]
    there = [name.replace("/", ".") for name in names or ()]
    if sorted(there) == sorted(plain):
        orders = [[there.index(name) for name in plain]]
    else:
        orders = _orders(params, plain)
    fits = lambda order: all(sizes[i] == shapes[k] for i, k in enumerate(order))
    found = [order for order in orders if fits(order)]
    if not found:
        i, k = next((i, k) for i, k in enumerate(orders[0]) if sizes[i] != shapes[k])
        raise ValueError(
            f"state_from: {here[i] or 'the parameter'} has shape {sizes[i]}, that of the state has"
            f" {shapes[k]}: parameters must come in the order and the layout of the other framework"
        )
    if len(found) > 1:
        raise ValueError(
            "state_from: the shapes fit in more than one order; give the names in the order of the"
            f" other framework, out of {', '.join(here)}"
        )
    return found[0]


def _orders(params: Any, names: list[str]) -> list[list[int]]:
    """Places of the leaves, as they lie, as they were written, and as their names are counted."""
    count = len(names)
    found = [list(range(count))]
    if isinstance(params, Mapping) and len(params) == count:
        written = [str(key) for key in params]
        found.append([written.index(name) for name in names])
    pieces = lambda i: [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", names[i])
    ]
    counted = sorted(range(count), key=pieces)
    found.append([counted.index(i) for i in range(count)])
    return [order for i, order in enumerate(found) if order not in found[:i]]


def _is_hidden(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def filled(state: Any, fields: Mapping[str, Any]) -> Any:
    """The state with other values in the fields of these names, wherever they stand in it.

    Arrays take the shape and dtype of what they replace. Where a memory holds nothing for a
    parameter it stays so.

    Raises: ValueError if a field is not there, or an array has another size.
    """
    seen: set[str] = set()

    def one(name: str, old: Any, new: Any) -> Any:
        if _is_hidden(old) or np.size(old) == 0:  # this memory is not for that parameter
            return old
        if np.size(new) != np.size(old):
            raise ValueError(
                f"state_from: {name} has shape {np.shape(old)} here and {np.shape(new)} there"
            )
        # a copy: tensors go on changing in place
        return jnp.array(new, old.dtype).reshape(np.shape(old))

    def visit(node: Any) -> Any:
        if named := getattr(node, "_fields", ()):
            values = {}
            for name, value in zip(named, node, strict=True):
                if name in fields:
                    seen.add(name)
                    fill = functools.partial(one, name)
                    values[name] = jax.tree.map(fill, value, fields[name], is_leaf=_is_hidden)
                else:
                    values[name] = visit(value)
            return type(node)(**values)
        if isinstance(node, dict):
            return {key: visit(value) for key, value in node.items()}
        return tuple(map(visit, node)) if isinstance(node, tuple) else node

    new = visit(state)
    if missing := sorted(set(fields) - seen):
        raise ValueError(f"state_from: this optimizer keeps no {', '.join(missing)}")
    return new
