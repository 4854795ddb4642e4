"""Optimizers as arguments of a program that `jax.export` writes to a file.

    tx = jgd.adam(1e-3)
    exported = jax.export.export(jax.jit(step))(tx, params, tx.init(params))
    blob = exported.serialize()                     # needs the package flatbuffers

    tx = jgd.adam(1e-2)                             # another process, another learning rate
    state = tx.init(params)
    step = jax.export.deserialize(blob).call        # the same program
    updates, state = step(tx, params, state)

The file holds the structure of the arguments: names of factories and of state classes, and plain
values. Reading a file runs no code from it: a factory is looked up among the factories decorated
with `as_pytree`, a state class among the classes of the states that `init` has returned. A process
must therefore create the optimizer and its state before it reads the file.
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

# Names in a file are looked up only here. A factory replaces an earlier one of the same name.
_factories: dict[tuple[str, ...], Spec] = {}
_defaults: dict[str, Any] = {}
_states: set[type] = set()


def register_factory(spec: Spec) -> None:
    """Register a factory by its name, and those of its defaults that are not plain values."""
    _factories[_name_of(spec)] = spec
    for name, parameter in spec.signature.parameters.items():
        if type(parameter.default) not in (*_PLAIN, tuple, type):
            _defaults[f"{_path_of(spec.factory)}.{name}"] = parameter.default


def register_value(kind: type) -> None:
    """Register a class of values. The structure of a value is its factory."""
    jax.export.register_pytree_node_serialization(
        kind,
        serialized_name=f"jgd.{kind.__name__}",
        serialize_auxdata=lambda spec: json.dumps(_name_of(spec)).encode(),
        deserialize_auxdata=_find,
    )


def register_states(state: Any) -> None:
    """Register the classes of the named tuples in a state, also those of optax and of users."""
    for kind in _named_tuples(state):
        if kind not in _states:
            _states.add(kind)
            with contextlib.suppress(ValueError):  # the class is registered already
                jax.export.register_namedtuple_serialization(kind, serialized_name=_path_of(kind))


def _named_tuples(tree: Any) -> set[type]:
    """Return the classes of the named tuples in a tree."""
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
    """Return the path of a factory and the arguments `structure` and `numbers` of `as_pytree`."""
    return _path_of(spec.factory), *sorted(spec.structure), "", *sorted(spec.numbers)


def _find(blob: bytes) -> Spec:
    name = tuple(json.loads(blob))
    if name not in _factories:
        raise ValueError(
            f"jax.export: the file needs the factory {name[0]}, which is not registered. Create"
            " the optimizer before you deserialize the file"
        )
    return _factories[name]


# --- structure -------------------------------------------------------------------------------


def _encode(label: str, value: Any) -> Any:
    """Return structure as JSON: tuples, dicts and dtypes become objects with one entry."""
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
        f" tuple, list, dict) for jax.export, got {brief(value)}. You can also create the optimizer"
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
