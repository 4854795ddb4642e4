"""Optimizers as arguments of a program that `jax.export` writes to a file.

    tx = jgd.adam(1e-3)
    exported = jax.export.export(jax.jit(step))(tx, params, tx.init(params))
    blob = exported.serialize()                     # needs the package flatbuffers

    tx = jgd.adam(1e-2)                             # another process, another learning rate
    state = tx.init(params)
    step = jax.export.deserialize(blob).call        # the same program
    updates, state = step(tx, params, state)

The file holds the structure of the arguments: names of factories and of state classes, and plain
values. Reading it runs nothing that it names: a factory is looked up among those that `as_pytree`
has decorated, a state class among those of the states that an `init` has returned. So a process
makes the optimizer and its state before it reads the file.
"""

import contextlib
import json
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jgd.calls import Spec
from jgd.nodes import Named, Static, brief

__all__ = ["register_factory", "register_states", "register_value"]

_PLAIN = (type(None), bool, int, float, str)

# Reading a file finds what stands here, and nothing else. A later factory replaces its namesake.
_factories: dict[tuple[str, ...], Spec] = {}
_defaults: dict[str, Any] = {}
_states: set[type] = set()


def register_factory(spec: Spec) -> None:
    """Register a factory by its name, and defaults that are functions or transformations."""
    _factories[_name_of(spec)] = spec
    for name, parameter in spec.signature.parameters.items():
        if type(parameter.default) not in (*_PLAIN, tuple, type):
            _defaults[f"{_path_of(spec.factory)}.{name}"] = parameter.default


def register_value(kind: type) -> None:
    """Register a class of values, whose structure is the factory."""
    jax.export.register_pytree_node_serialization(
        kind,
        serialized_name=f"jgd.{kind.__name__}",
        serialize_auxdata=lambda spec: json.dumps(_name_of(spec)).encode(),
        deserialize_auxdata=_find,
    )


def register_states(state: Any) -> None:
    """Register the classes of the named tuples in a state, those of optax and of users too."""
    for kind in _named_tuples(state):
        if kind not in _states:
            _states.add(kind)
            with contextlib.suppress(ValueError):  # the class is registered already
                jax.export.register_namedtuple_serialization(kind, serialized_name=_path_of(kind))


def _named_tuples(tree: Any) -> set[type]:
    """Return the classes of the named tuples that a tree is made of."""
    kinds = set[type]()

    def visit(node: Any) -> bool:
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            kinds.add(type(node))
        return False

    jax.tree.leaves(tree, is_leaf=visit)
    return kinds


# --- factories -------------------------------------------------------------------------------


def _path_of(thing: Any) -> str:
    return f"{thing.__module__}.{getattr(thing, '__qualname__', thing)}"


def _name_of(spec: Spec) -> tuple[str, ...]:
    """Return the name of a factory, and what `as_pytree` was told about its parameters."""
    return _path_of(spec.factory), *sorted(spec.structure), "", *sorted(spec.numbers)


def _find(blob: bytes) -> Spec:
    name = tuple(json.loads(blob))
    if name not in _factories:
        raise ValueError(
            f"jax.export: {name[0]} must be decorated with jgd.as_pytree before the file is read,"
            " got no such factory. Make the optimizer first"
        )
    return _factories[name]


# --- structure -------------------------------------------------------------------------------


def _encode(label: str, value: Any) -> Any:
    """Return structure as JSON: containers and dtypes as one-entry objects."""
    several = lambda items: [_encode(label, item) for item in items]
    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return several(value)
    if type(value) is tuple:
        return {"tuple": several(value)}
    if type(value) is dict:
        return {"dict": several(value.items())}
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    for name, default in _defaults.items():
        if value is default:
            return {"default": name}
    raise TypeError(
        f"{label} must be made by a factory of jgd or be plain (None, bool, number, string, dtype,"
        f" tuple, list, dict) for jax.export, got {brief(value)}. Otherwise make the optimizer"
        " inside the exported function"
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dtype":
        return jnp.dtype(content)
    if kind == "default":
        return _defaults[content]
    return {"tuple": tuple, "dict": dict}[kind](map(_decode, content))


jax.export.register_pytree_node_serialization(
    Static,
    serialized_name="jgd.Static",
    serialize_auxdata=lambda node: json.dumps(_encode(node.label, node.value)).encode(),
    deserialize_auxdata=lambda blob: Static(_decode(json.loads(blob))),
)
jax.export.register_pytree_node_serialization(
    Named,
    serialized_name="jgd.Named",
    serialize_auxdata=lambda names: json.dumps(names).encode(),
    deserialize_auxdata=json.loads,
)
