"""Walks over the leaves of updates, states and parameters, and the errors where they do not match.

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
    """Raised when a state is not of the type that its optimizer has."""


def leafwise(
    f: Callable[..., Any],
    updates: optax.Updates,
    *trees: Any,
    numbers: tuple[Any, ...] = (),
    keep: bool = False,
) -> Any:
    """Return `f(g, *others, *numbers)` for each leaf g of `updates` and the leaves in its place.

    Args:
      f: a formula on one array. `numbers` are passed to it as they are, so that it can be a
        function of the module that JAX traces once for each shape (`jgd.arithmetic.formula`).
      updates: a tree. Where it is None the result is None or, with `keep`, the leaf of the first
        of `trees`, so that a memory outlives a step without a gradient.
      trees: trees with the leaves of `updates`, or with a small tree in the place of each.

    Raises:
      TreeError: if a tree has other leaves than `updates`, or a leaf another shape.
    """
    leaves, structure, columns = aligned(updates, *trees)
    results: list[Any] = []
    for index, (g, *others) in enumerate(zip(leaves, *columns, strict=True)):
        if g is None:
            results.append(others[0] if keep else None)
            continue
        for other in others:
            if getattr(other, "shape", None) != g.shape:
                raise misfit(updates, index, other)
        results.append(f(g, *others, *numbers))
    return structure.unflatten(results)


def aligned(updates: optax.Updates, *trees: Any) -> tuple[list[Any], Any, list[list[Any]]]:
    """Return the leaves of `updates`, its structure, and what each of `trees` has in their places.

    Raises: TreeError if a tree has other leaves.
    """
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
    try:
        return leaves, structure, [structure.flatten_up_to(tree) for tree in trees]
    except ValueError:
        raise TreeError(_first_difference(updates, trees)) from None


def misfit(updates: optax.Updates, index: int, other: Any) -> TreeError:
    """Return the error for leaf `index` of `updates`, beside which `other` has the wrong shape."""
    path, g = jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_none)[index]
    shape = lambda x: getattr(x, "shape", x)
    return TreeError(
        f"the update at {path_name(path)} has shape {jnp.shape(g)}, but state or params have"
        f" {jax.tree.map(shape, other)} there"
    )


def path_name(path: Any) -> str:
    """Return a path of a leaf as it is written in Python, such as `['w'][0]`."""
    return jax.tree_util.keystr(path) or "the root"


def is_none(x: Any) -> bool:
    """Return whether `x` is None, to take it for a leaf."""
    return x is None


def _first_difference(updates: optax.Updates, trees: Iterable[Any]) -> str:
    def paths(tree: Any) -> list[Any]:
        return [p for p, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)]

    here = paths(updates)
    for there in map(paths, trees):  # a memory may have leaves below one of the updates
        for path in here:
            if not any(other[: len(path)] == path for other in there):
                return f"the updates have a leaf at {path_name(path)} that state or params lack"
        for other in there:
            if not any(other[: len(path)] == path for path in here):
                return f"the updates lack the leaf at {path_name(other)} that state or params have"
    return "the updates are another kind of tree than state or params"


def check_state(state: Any, expected: type[State]) -> State:
    """Return `state`. Raises TreeError if it is not of the type `expected`."""
    if not isinstance(state, expected):
        raise other_state(f"a state of type {_type_name(expected)}", state)
    return state


def other_state(expected: str, state: Any) -> StateError:
    """Return the error for a state that is not what `expected` says."""
    count = f" of {len(state)}" if type(state) is tuple else ""
    return StateError(f"expected {expected}, got {_type_name(type(state))}{count}")


def _type_name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def only(function: str, state: optax.OptState, kind: type[State]) -> State:
    """Return the one state of a kind in a nest of states. Raises ValueError for none or several."""
    is_one = lambda node: isinstance(node, kind)
    found = [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]
    if len(found) != 1:
        raise ValueError(f"{function}: state must hold one {kind.__name__}, got {len(found)}")
    return found[0]


def with_params(params: optax.Params | None) -> Any:
    """Return `params`. Raises TreeError if there are none."""
    if params is None:
        raise TreeError("needs the parameters: call update(updates, state, params)")
    return params


def like(new: Any, old: Any) -> Any:
    """Return `new` with the dtypes of `old`: `cond` and `scan` want a state as it came."""
    return jax.tree.map(_like_leaf, new, old)


def _like_leaf(new: Any, old: Any) -> Any:
    if isinstance(new, jax.Array) and new.dtype == getattr(old, "dtype", None):
        return new
    dtype = jnp.result_type(old)
    return new if jnp.result_type(new) == dtype else jnp.asarray(new, dtype)
