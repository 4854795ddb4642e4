"""Loops over the leaves of updates, states and parameters, and errors if trees do not match.

leafwise(lambda g, m: m + g, updates, momentum)      # one formula on every leaf
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

__all__ = ["TreeError", "leafwise"]

State = TypeVar("State")


class TreeError(ValueError):
    """Raised when updates, state and parameters do not match. Names the optimizer and the leaf."""

    def __init__(self, detail: str, optimizer: str = "") -> None:
        super().__init__(f"{optimizer}: {detail}" if optimizer else detail)
        self.detail = detail


class StateError(TreeError):
    """Raised when a state is not of the type that the optimizer expects."""


def leafwise(
    f: Callable[..., Any],
    updates: optax.Updates,
    *trees: Any,
    numbers: tuple[Any, ...] = (),
    keep: bool = False,
) -> Any:
    """Return `f(g, *others, *numbers)` for each leaf g of `updates` and its leaves in `trees`.

    Args:
      f: a formula on one array.
      updates: a tree. Where it is None, the result is None.
      trees: trees with the same leaves as `updates`.
      numbers: further arguments of `f`, so that `f` can be a module-level function that JAX traces
        once for each shape (`jgd.arithmetic.formula`).
      keep: where `updates` is None, return the leaf of the first of `trees` instead, so that a
        accumulator survives a step without a gradient.

    Raises:
      TreeError: if a tree has other leaves than `updates`, or a leaf has another shape.
    """
    leaves, structure, columns = aligned(updates, *trees)
    results: list[Any] = []
    for index, (g, *others) in enumerate(zip(leaves, *columns, strict=True)):
        if g is None:
            results.append(others[0] if keep else None)
            continue
        for other in others:
            if getattr(other, "shape", None) != g.shape:
                raise shape_error(updates, index, other)
        results.append(f(g, *others, *numbers))
    return structure.unflatten(results)


def aligned(updates: optax.Updates, *trees: Any) -> tuple[list[Any], Any, list[list[Any]]]:
    """Return the leaves and structure of `updates`, and the nodes of each tree at these leaves.

    Raises: TreeError if a tree does not have these leaves.
    """
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
    try:
        return leaves, structure, [structure.flatten_up_to(tree) for tree in trees]
    except ValueError:
        raise TreeError(_first_difference(updates, trees)) from None


def shape_error(updates: optax.Updates, index: int, other: Any) -> TreeError:
    """Return the error for leaf `index` of `updates` if `other` does not have its shape."""
    path, g = jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_none)[index]
    shape = lambda x: getattr(x, "shape", x)
    return TreeError(
        f"state or params at {path_name(path)} must have shape {jnp.shape(g)}, as the update has,"
        f" got {jax.tree.map(shape, other)}"
    )


def path_name(path: Any) -> str:
    """Return the path of a leaf in Python notation, such as `['w'][0]`."""
    return jax.tree_util.keystr(path) or "the root"


def is_none(x: Any) -> bool:
    """Return whether `x` is None, as an `is_leaf` for trees with None."""
    return x is None


def _first_difference(updates: optax.Updates, trees: Iterable[Any]) -> str:
    def paths(tree: Any) -> list[Any]:
        return [p for p, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)]

    update_paths = paths(updates)
    for tree_paths in map(paths, trees):  # an accumulator may have a tree in place of a leaf
        for path in update_paths:
            if not any(other[: len(path)] == path for other in tree_paths):
                return f"state and params must have a leaf at {path_name(path)}, as the updates do"
        for other in tree_paths:
            if not any(other[: len(path)] == path for path in update_paths):
                return f"updates must have a leaf at {path_name(other)}, as state or params do"
    return "updates, state and params must have the same structure, got other containers"


def check_state(state: Any, expected: type[State]) -> State:
    """Return `state`. Raises TreeError if its type is not `expected`."""
    if not isinstance(state, expected):
        raise wrong_state(f"a state of type {_type_name(expected)}", state)
    return state


def wrong_state(expected: str, state: Any) -> StateError:
    """Return the error `expected ..., got ...` for a state."""
    count = f" of {len(state)}" if type(state) is tuple else ""
    return StateError(f"expected {expected}, got {_type_name(type(state))}{count}")


def _type_name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def find_state(function: str, state: optax.OptState, kind: type[State]) -> State:
    """Return the one state of type `kind` in a nested state. Raises ValueError for 0 or several."""
    is_kind = lambda node: isinstance(node, kind)
    states = [node for node in jax.tree.leaves(state, is_leaf=is_kind) if is_kind(node)]
    if len(states) != 1:
        raise ValueError(f"{function}: state must hold one {kind.__name__}, got {len(states)}")
    return states[0]


def with_params(params: optax.Params | None) -> Any:
    """Return `params`. Raises TreeError if it is None."""
    if params is None:
        raise TreeError("params must be given, got None. Call update(updates, state, params)")
    return params


def like(new: Any, old: Any) -> Any:
    """Return `new` with the dtypes of `old`: `cond` and `scan` require them."""
    return jax.tree.map(_like_leaf, new, old)


def _like_leaf(new: Any, old: Any) -> Any:
    if isinstance(new, jax.Array) and new.dtype == getattr(old, "dtype", None):
        return new
    dtype = jnp.result_type(old)
    return new if jnp.result_type(new) == dtype else jnp.asarray(new, dtype)
