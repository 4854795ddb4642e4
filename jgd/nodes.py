"""Pytree nodes of the stored form of a call: `Static` for structure, `Named` for links by name.

jax.tree.leaves(Static("float32"))      # []: the value is compared and hashed instead
Named(["body", "head"], [adam, sgd])    # keeps this order; JAX sorts the keys of a dict
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

__all__ = ["Named", "Static", "brief", "is_entry", "is_schedule", "show", "unwrap"]


class Static:
    """A node without leaves: structure (dtypes, masks, arrays), compared and hashed by value.

    `label` names the argument in errors, such as "adamw: mask". Comparisons ignore it.
    """

    __slots__ = ("key", "label", "value")

    def __init__(self, value: Any, label: str = "structure") -> None:
        self.value, self.label = value, label
        self.key = _static_key(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> Any:
        return Static, (self.value, self.label)

    def __repr__(self) -> str:
        if isinstance(self.value, optax.GradientTransformation):
            factory, _, _ = getattr(self.value.update, "__qualname__", "?").partition(".")
            return f"<{factory}>"
        return getattr(self.value, "__qualname__", None) or repr(self.value)


def _flatten_static(node: Static) -> tuple[tuple[()], Static]:
    return (), node


def _unflatten_static(node: Static, _: Iterable[Any]) -> Static:
    return node


jax.tree_util.register_pytree_node(Static, _flatten_static, _unflatten_static)


def _static_key(value: Any) -> Any:
    # The tag keeps keys of different kinds apart: treedefs of older jax raise when compared with
    # other types.
    if isinstance(value, np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            with jax.ensure_compile_time_eval():  # the values of a key are known inside jit too
                value = np.asarray(jax.random.key_data(jnp.asarray(value)))
        return "array", value.shape, str(value.dtype), np.asarray(value).tobytes()
    leaves, structure = jax.tree.flatten(value)
    if not jax.tree_util.treedef_is_leaf(structure):
        return "tree", structure, tuple(_static_key(leaf) for leaf in leaves)
    try:
        hash(value)
    except TypeError:
        return "object", type(value), id(value)
    return "value", type(value), value


class Named(Mapping[str, Any]):
    """Links by name: a mapping that keeps its order, whereas JAX sorts a dict by its keys."""

    __slots__ = ("links", "names")

    def __init__(self, names: Iterable[str], links: Iterable[Any]) -> None:
        self.names, self.links = tuple(names), tuple(links)

    def __getitem__(self, name: str) -> Any:
        return self.links[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> Any:
        return Named, (self.names, self.links)


def _flatten_named(node: Named) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    return node.links, node.names


def _flatten_named_with_keys(node: Named) -> tuple[tuple[tuple[Any, Any], ...], tuple[str, ...]]:
    keys = map(jax.tree_util.DictKey, node.names)
    return tuple(zip(keys, node.links, strict=True)), node.names


jax.tree_util.register_pytree_with_keys(Named, _flatten_named_with_keys, Named, _flatten_named)


def unwrap(arg: Any) -> Any:
    """Return the value of a `Static`, and any other argument unchanged."""
    return arg.value if isinstance(arg, Static) else arg


def is_schedule(arg: Any) -> bool:
    """Return whether the stored form of a number is a schedule."""
    arg = unwrap(arg)
    return callable(arg) and not isinstance(arg, type)


def is_entry(arg: Any) -> bool:
    """Return whether `arg` is a single entry among several numbers rather than a container."""
    return isinstance(arg, Static) or is_schedule(arg)


def show(arg: Any) -> str:
    """Return the repr of the stored form of an argument, with numbers as Python floats."""
    if isinstance(arg, jax.core.Tracer | np.ndarray | jax.Array | np.generic):
        if isinstance(arg, jax.core.Tracer) or arg.ndim > 0:
            return f"{arg.dtype}[{','.join(map(str, arg.shape))}]"
        return repr(float(arg)) if is_number(arg) else repr(arg)
    if type(arg) is list:
        return f"[{', '.join(map(show, arg))}]"
    if type(arg) is tuple:
        return f"({', '.join(map(show, arg))}{',' * (len(arg) == 1)})"
    if isinstance(arg, dict | Named):
        return "{" + ", ".join(f"{key!r}: {show(item)}" for key, item in arg.items()) + "}"
    return repr(arg)


def brief(value: Any) -> str:
    """Return the repr of a value for an error: one line of at most 120 characters."""
    if isinstance(value, optax.GradientTransformation):
        text = repr(Static(value) if any(map(callable, jax.tree.leaves(value))) else value)
    elif callable(value) and hasattr(value, "__name__"):
        text = f"the function {value.__name__}"
    elif any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
        text = show(value)
    else:
        text = repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 120 else f"{text[:117]}..."


NUMERIC = (
    float,
    int,
    np.number,
    np.ndarray,
    jax.Array,
)  # bool is an int: test for it first


def is_number(value: Any) -> bool:
    """Return whether `value` is a real number or an array of real numbers; False for bools."""
    if isinstance(value, bool | np.bool_ | complex | np.complexfloating):
        return False
    if isinstance(value, np.ndarray | jax.Array):
        return jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    return isinstance(value, NUMERIC)


def captured_by(
    function: Callable[..., Any], depth: int = 4, is_leaf: Callable[[Any], bool] | None = None
) -> Iterator[Any]:
    """Yield the leaves that a closure or a method captures, and those of closures among them."""
    functions, known = {id(function): function}, dict[int, Any]()
    for _ in range(depth + 1):
        known |= functions  # keeps them alive, so that no id is reused
        leaves = [leaf for f in functions.values() for leaf in _captured(f, is_leaf)]
        yield from leaves
        functions = {id(x): x for x in leaves if callable(x) and id(x) not in known}


def _captured(function: Callable[..., Any], is_leaf: Callable[[Any], bool] | None) -> Iterator[Any]:
    captured = list(getattr(getattr(function, "__self__", None), "__dict__", {}).values())
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # the variable is not bound yet
            captured.append(cell.cell_contents)
    for value in captured:
        try:
            yield from jax.tree.leaves(value, is_leaf)
        except (TypeError, ValueError):  # JAX cannot sort the keys of a dict
            yield value
