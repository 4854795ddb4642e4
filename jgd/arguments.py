"""What the arguments of a factory are, and the stored form of a call.

Each parameter has a `Kind`: a number (or a schedule of one), several numbers, a link (another
transformation) or structure. `Spec.admit` checks an argument in the user's call and stores it so
that its leaves are its numbers; `Spec.call` hands the stored arguments back to the factory.
"""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "Count",
    "Decay",
    "Fraction",
    "Kind",
    "NonNegative",
    "Number",
    "Numbers",
    "Positive",
    "Spec",
    "Static",
]

NUMERIC = (float, int, np.number, np.ndarray, jax.Array)  # bool is an int: asked for before


class Kind(NamedTuple):
    """What an argument is to `as_pytree`: the metadata of the annotations below."""

    name: Literal["number", "numbers", "link", "structure"]
    wanted: str = ""  # the range in words, for the error message
    accepts: Callable[[Any], Any] | None = None  # asked of concrete numbers, in the user's call


# Where a caller writes any of float, int, NumPy or JAX scalar, tracer or schedule, the body of the
# factory sees a scalar float array. No static type says both, hence Any.
Number = Annotated[Any, Kind("number")]
NonNegative = Annotated[Any, Kind("number", "at least 0", lambda x: x >= 0)]
Positive = Annotated[Any, Kind("number", "above 0", lambda x: x > 0)]
Fraction = Annotated[Any, Kind("number", "in [0, 1]", lambda x: 0 <= x <= 1)]
Decay = Annotated[Any, Kind("number", "in [0, 1)", lambda x: 0 <= x < 1)]
Count = Annotated[Any, Kind("number", "a step count, at least 0", lambda x: x >= 0)]
Numbers = Annotated[Any, Kind("numbers")]  # a list, tuple, dict or array of numbers or schedules


def _members(hint: Any) -> list[Any]:
    """The members of a union, or the hint itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [member for arg in typing.get_args(hint) for member in _members(arg)]
    return [hint]


def _kind(parameter: inspect.Parameter, hint: Any) -> Kind:
    """The kind of a parameter, read from its annotation, its position and its default."""
    members = _members(hint)
    for member in members:
        for note in getattr(member, "__metadata__", ()):
            if isinstance(note, Kind):
                return note
    classes = [member for member in members if isinstance(member, type)]
    if any(issubclass(c, optax.GradientTransformation) for c in classes):
        return Kind("link")
    named = bool(classes) and all(issubclass(c, str | bool | types.NoneType) for c in classes)
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY or (named and len(classes) == len(members)):
        return Kind("structure")
    if parameter.default is None:
        numeric = Any not in members and any(c in (float, int, jax.Array) for c in classes)
        return Kind("number" if numeric else "structure")
    required = parameter.default is inspect.Parameter.empty
    if not required and not isinstance(parameter.default, (*NUMERIC, tuple, list, dict)):
        return Kind("structure")
    return Kind("structure" if isinstance(parameter.default, bool) else "number")


class Static:
    """A leafless node: structure, compared and hashed by value (dtypes, masks and arrays too)."""

    __slots__ = ("key", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.key = _static_key(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> Any:
        return Static, (self.value,)

    def __repr__(self) -> str:
        if isinstance(self.value, optax.GradientTransformation):
            factory, _, _ = getattr(self.value.update, "__qualname__", "?").partition(".")
            return f"<{factory}>"
        return getattr(self.value, "__qualname__", None) or repr(self.value)


jax.tree_util.register_pytree_node(Static, lambda node: ((), node), lambda node, _: node)


def _static_key(value: Any) -> Any:
    if isinstance(value, np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)  # type: ignore[arg-type]
        return value.shape, str(value.dtype), np.asarray(value).tobytes()
    leaves, structure = jax.tree.flatten(value)
    if not jax.tree_util.treedef_is_leaf(structure):
        return structure, tuple(_static_key(leaf) for leaf in leaves)
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


def _is_dtype(name: str, value: Any) -> bool:
    return value is not None and (
        isinstance(value, np.dtype) or (name.endswith("dtype") and not isinstance(value, bool))
    )


class Spec:
    """A factory and what is known of its parameters: the structure of its values."""

    def __init__(self, factory: Callable[..., Any], structure: Iterable[str]) -> None:
        self.factory = factory
        self.name = getattr(factory, "__name__", repr(factory))
        self.structure = frozenset([structure] if isinstance(structure, str) else structure)
        self.signature = inspect.signature(factory)
        hints = {name: p.annotation for name, p in self.signature.parameters.items()}
        if any(isinstance(hint, str) for hint in hints.values()):
            hints = typing.get_type_hints(factory, include_extras=True)
        unknown = self.structure.difference(hints)
        if unknown:
            raise ValueError(f"{self.name} has no parameter {', '.join(sorted(unknown))}")
        self.kinds = {
            name: Kind("structure") if name in self.structure else _kind(p, hints.get(name, Any))
            for name, p in self.signature.parameters.items()
        }
        self.names = tuple(self.kinds)
        self.decorated: Callable[..., Any] = factory

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and (self.factory, self.structure) == (
            other.factory,
            other.structure,
        )

    def __hash__(self) -> int:
        return hash((self.factory, self.structure))

    def __reduce__(self) -> Any:
        decorated = self.decorated
        module = importlib.import_module(decorated.__module__)
        if getattr(module, decorated.__qualname__, None) is decorated:
            return spec_of, (decorated,)
        return Spec, (self.factory, tuple(self.structure))

    def admit(self, name: str, value: Any) -> Any:
        """The stored form of an argument; refuses what is of another kind or out of range."""
        kind = self.kinds[name]
        if kind.name == "structure":
            return value if value is None else Static(_canonical(name, value))
        parameter = self.signature.parameters[name]
        if kind.name == "link":
            links = value if parameter.kind is inspect.Parameter.VAR_POSITIONAL else (value,)
            for link in links:
                if not isinstance(link, optax.GradientTransformation):
                    raise TypeError(f"{self.name}: {name} must be a transformation, got {link!r}")
            # a transformation whose leaves are its closures is no pytree of numbers
            admitted = tuple(
                Static(link) if any(map(callable, jax.tree.leaves(link))) else link
                for link in links
            )
            return admitted if links is value else admitted[0]
        if kind.name == "numbers":
            return jax.tree.map(
                lambda x: _schedule(x) if callable(x) else self._number(name, kind, x),
                value,
                is_leaf=callable,
            )
        if value is None:
            if parameter.default is None:
                return None
        elif callable(value) and not isinstance(value, type):
            return _schedule(value)
        return self._number(name, kind, value)

    def _number(self, name: str, kind: Kind, value: Any) -> Any:
        if isinstance(value, bool | np.bool_ | complex) or not isinstance(value, NUMERIC):
            raise TypeError(f"{self.name}: {name} must be a number or a schedule, got {value!r}")
        if isinstance(value, jax.Array):  # tracers too; integers become differentiable
            if not jnp.issubdtype(value.dtype, np.number):
                raise TypeError(f"{self.name}: {name} must be a number, got {value.dtype}")
            exact = value.dtype in (jnp.float32, jnp.float64)
            return value if exact else value.astype(float)
        value = np.asarray(value, np.float64) if np.ndim(value) else np.float64(value)
        if kind.accepts is not None and not (value.ndim or kind.accepts(value)):
            raise ValueError(f"{self.name}: {name} must be {kind.wanted}, got {float(value)!r}")
        return value

    def call(self, args: tuple[Any, ...], step: Any = None) -> Any:
        """The factory itself, called with float scalars; schedules take their value at `step`."""
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        arg: Any
        for (name, parameter), arg in zip(self.signature.parameters.items(), args, strict=True):
            kind = self.kinds[name].name
            if kind == "number" and arg is not None:
                if is_schedule(arg):
                    arg = unwrap(arg)(step)
                arg = _scalar(self.name, name, arg)
            elif kind == "numbers":
                arg = jax.tree.map(
                    lambda x: unwrap(x) if is_schedule(x) else jnp.asarray(x, float),
                    arg,
                    is_leaf=is_schedule,
                )
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                arg = tuple(unwrap(link) for link in arg or ())
            else:
                arg = unwrap(arg)
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                positional.extend(arg)
            elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                keywords[name] = arg
            else:
                positional.append(arg)
        return self.factory(*positional, **keywords)


def spec_of(decorated: Callable[..., Any]) -> Spec:
    return decorated.__jgd_spec__  # type: ignore[attr-defined]


def _canonical(name: str, value: Any) -> Any:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
        raise TypeError(f"{name} shapes the program and cannot be traced, got {value!r}")
    return jnp.dtype(value) if _is_dtype(name, value) else value


def _schedule(value: Callable[..., Any]) -> Any:
    """A callable pytree keeps its numbers as leaves; any other callable is structure."""
    return Static(value) if jax.tree_util.all_leaves([value]) else value


def is_schedule(arg: Any) -> bool:
    """Whether the stored form of a number is a schedule."""
    return callable(unwrap(arg)) and not isinstance(arg, type)


def unwrap(arg: Any) -> Any:
    return arg.value if isinstance(arg, Static) else arg


def _scalar(factory: str, name: str, value: Any) -> jax.Array:
    """A float32 scalar (float64 under x64), so that no 16-bit leaf ever rounds a number."""
    number = jnp.asarray(value, float)
    if number.ndim:
        raise TypeError(
            f"{factory}: {name} has shape {number.shape}; this is a batch of settings, so map over"
            " it with jax.vmap"
        )
    return number
