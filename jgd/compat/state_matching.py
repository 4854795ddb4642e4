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

    By name, if each path here ends one name over there ("." and "/" are the same); else by order:
    that in which dicts were written. A dict that jax has sorted, and whose names count further than
    9, may be the other framework's order or not: it is refused where both fit.

    Raises: ValueError if no order fits, or it is not clear which one.
    """
    here = [name.replace("/", ".") for name in paths(params)[0]]
    sizes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    if len(sizes) != len(shapes):
        raise ValueError(f"state_from: {len(sizes)} parameters here, {len(shapes)} in the state")
    fits = lambda order: all(sizes[i] == shapes[k] for i, k in enumerate(order))
    by_name = _by_name(here, [name.replace("/", ".") for name in names or ()])
    if by_name is not None and fits(by_name):
        return by_name
    written, counted = _as_written(params), _as_counted(here)
    if not fits(written):
        if fits(counted):
            return counted
        i, k = next((i, k) for i, k in enumerate(written) if sizes[i] != shapes[k])
        raise ValueError(
            f"state_from: {here[i] or 'the parameter'} has shape {sizes[i]}, that of the state has"
            f" {shapes[k]}: parameters must come in the order and the layout of the other framework"
        )
    if written == list(range(len(here))) != counted and fits(counted):
        raise ValueError(
            "state_from: these may be in the order of the other framework or not; give their names"
            f" in that order, out of {', '.join(here)}"
        )
    return written


def _by_name(here: list[str], there: list[str]) -> list[int] | None:
    """Where each path is the end of exactly one name, and each name has one."""
    ends = lambda name, path: name == path or name.endswith("." + path)
    found = [[k for k, name in enumerate(there) if ends(name, path)] for path in here]
    if any(len(ks) != 1 for ks in found) or len({ks[0] for ks in found}) < len(here):
        return None
    return [ks[0] for ks in found]


def _as_written(params: Any) -> list[int]:
    """For each leaf its place where dicts keep their order; jax sorts them by their keys."""
    numbered = iter(range(len(jax.tree.leaves(params))))
    place: dict[int, int] = {}

    def visit(node: Any, index: Any) -> None:
        if isinstance(node, Mapping):
            for key in node:
                visit(node[key], index[key])
        elif isinstance(node, list | tuple):
            for child, below in zip(node, index, strict=True):
                visit(child, below)
        else:
            for leaf in jax.tree.leaves(index):
                place[leaf] = next(numbered)

    leaves, structure = jax.tree.flatten(params)
    visit(params, structure.unflatten(range(len(leaves))))
    return [place[i] for i in range(len(leaves))]


def _as_counted(names: list[str]) -> list[int]:
    """For each name its place where numbers in names are counted: 2 before 10."""
    pieces = lambda i: [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", names[i])
    ]
    counted = sorted(range(len(names)), key=pieces)
    return [counted.index(i) for i in range(len(names))]


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
