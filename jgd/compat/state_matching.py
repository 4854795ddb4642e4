"""Matching of parameters with those of a Keras or PyTorch optimizer, and filling of jgd's state."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jgd.groups import paths

__all__ = ["fill_state", "match_parameters"]


def match_parameters(
    params: Any, shapes: Sequence[tuple[int, ...]], names: Sequence[str] | None = None
) -> list[int]:
    """Return for each leaf of `params` the index of its parameter in the other framework.

    `shapes` and `names` are those of the other framework's parameters, in its order. Leaves are
    matched by name if each path ends exactly one name ("." and "/" are the same), otherwise by
    order, where dicts have the order in which they were written. A dict whose keys are sorted as
    text ("10" before "2") may have lost that order in a `jax.tree.map`, so that an order by numbers
    is possible too. If both orders fit the shapes, the match is ambiguous.

    Raises: ValueError if no order fits the shapes, or the match is ambiguous.
    """
    leaf_paths = [name.replace("/", ".") for name in paths(params)[0]]
    leaf_shapes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    if len(leaf_shapes) != len(shapes):
        raise ValueError(
            f"state_from: params must have {len(shapes)} leaves, one for each parameter of the"
            f" state, got {len(leaf_shapes)}"
        )
    fits = lambda order: all(leaf_shapes[i] == shapes[k] for i, k in enumerate(order))
    by_name = _by_name(leaf_paths, [name.replace("/", ".") for name in names or ()])
    if by_name is not None and fits(by_name):
        return by_name
    written, numbered = _as_written(params), _as_numbered(leaf_paths)
    if not fits(written):
        if fits(numbered):
            return numbered
        i, k = next((i, k) for i, k in enumerate(written) if leaf_shapes[i] != shapes[k])
        leaf = f"leaf {leaf_paths[i]!r} of params" if leaf_paths[i] else "params"
        raise ValueError(
            f"state_from: {leaf} must have shape {shapes[k]}, as in the state, got"
            f" {leaf_shapes[i]}. Pass the parameters in the order and the layout of the other"
            " framework"
        )
    if written == list(range(len(leaf_paths))) != numbered and fits(numbered):
        raise ValueError(
            "state_from: params must have the order of the state, got keys that fit it sorted as"
            " text and as numbers. Pass a list of the parameters in that order, or to"
            f" jt.state_from the names in that order, out of {', '.join(leaf_paths)}"
        )
    return written


def _by_name(leaf_paths: list[str], names: list[str]) -> list[int] | None:
    """Return for each path the index of its name, or None if paths and names are not one to one."""
    ends = lambda path, name: name == path or name.endswith("." + path)
    candidates = [[k for k, name in enumerate(names) if ends(path, name)] for path in leaf_paths]
    if any(len(ks) != 1 for ks in candidates) or len({ks[0] for ks in candidates}) < len(
        candidates
    ):
        return None
    return [ks[0] for ks in candidates]


def _as_written(params: Any) -> list[int]:
    """Return the position of each leaf if dicts keep their order; JAX sorts them by their keys."""
    numbers = iter(range(len(jax.tree.leaves(params))))
    positions: dict[int, int] = {}

    def visit(node: Any, indices: Any) -> None:
        if isinstance(node, Mapping):
            for key in node:
                visit(node[key], indices[key])
        elif isinstance(node, list | tuple):
            for child, below in zip(node, indices, strict=True):
                visit(child, below)
        else:
            for leaf in jax.tree.leaves(indices):
                positions[leaf] = next(numbers)

    leaves, structure = jax.tree.flatten(params)
    visit(params, structure.unflatten(range(len(leaves))))
    return [positions[i] for i in range(len(leaves))]


def _as_numbered(names: list[str]) -> list[int]:
    """Return the position of each name if numbers in names sort as numbers: 2 before 10."""
    pieces = lambda i: [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", names[i])
    ]
    order = sorted(range(len(names)), key=pieces)
    return [order.index(i) for i in range(len(names))]


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def fill_state(state: Any, fields: Mapping[str, Any]) -> Any:
    """Return `state` with the values of `fields` in the fields of these names, at any depth.

    Arrays take the shape and dtype of those they replace. Where a field of the state holds nothing
    for a parameter (a masked or an empty leaf), it stays as it is.

    Raises: ValueError if the state has no field of a name, or an array has another size.
    """
    filled: set[str] = set()

    def converted(name: str, old: Any, new: Any) -> Any:
        if _is_masked(old) or np.size(old) == 0:
            return old
        if np.size(new) != np.size(old):
            raise ValueError(
                f"state_from: {name} must have shape {np.shape(old)}, got {np.shape(new)} in the"
                " state of the other framework"
            )
        # a copy, since PyTorch updates its tensors in place
        return jnp.array(new, old.dtype).reshape(np.shape(old))

    def visit(node: Any) -> Any:
        if names := getattr(node, "_fields", ()):
            values = {}
            for name, value in zip(names, node, strict=True):
                if name in fields:
                    filled.add(name)
                    convert = functools.partial(converted, name)
                    values[name] = jax.tree.map(convert, value, fields[name], is_leaf=_is_masked)
                else:
                    values[name] = visit(value)
            return type(node)(**values)
        if isinstance(node, dict):
            return {key: visit(value) for key, value in node.items()}
        return tuple(map(visit, node)) if isinstance(node, tuple) else node

    new = visit(state)
    if missing := sorted(set(fields) - filled):
        raise ValueError(
            f"state_from: jgd's optimizer has no state for {', '.join(missing)}, which the other"
            " optimizer has"
        )
    return new
