"""What the arguments of a factory are, and the stored form of a call.

Each parameter has a `Kind`: a number (or a schedule of one), several numbers, a link (another
transformation), links by name, or structure. `Spec.admit` checks an argument in the user's call and
stores it so that its leaves are its numbers; `Spec.call` hands the stored arguments back to the
factory.
"""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "BelowOne",
    "Boundaries",
    "BoundariesAndScales",
    "Count",
    "Decay",
    "Decays",
    "Fraction",
    "Kind",
    "Links",
    "Mask",
    "Mixing",
    "NonNegative",
    "Number",
    "NumberOrSchedule",
    "Numbers",
    "Period",
    "Positive",
    "Spec",
    "Static",
    "Structure",
]

NUMERIC = (float, int, np.number, np.ndarray, jax.Array)  # bool is an int: asked for before


class Kind(NamedTuple):
    """What an argument is to `as_pytree`: the metadata of the annotations below."""

    name: Literal["number", "numbers", "link", "links", "structure"]
    wanted: str = ""  # the range in words, for the error message
    accepts: Callable[[Any], Any] | None = None  # asked of concrete numbers, in the user's call
    lazy: bool = False  # a schedule is handed to the factory as it is

    def __repr__(self) -> str:
        return f"{self.name} {self.wanted}".rstrip()


# Where a caller writes any of float, int, NumPy or JAX scalar, tracer or schedule, the body of the
# factory sees a scalar float array. No static type says both, hence Any.
Number = Annotated[Any, Kind("number")]
NonNegative = Annotated[Any, Kind("number", "at least 0", lambda x: x >= 0)]
Positive = Annotated[Any, Kind("number", "above 0", lambda x: x > 0)]
Fraction = Annotated[Any, Kind("number", "in [0, 1]", lambda x: 0 <= x <= 1)]
Decay = Annotated[Any, Kind("number", "in [0, 1)", lambda x: 0 <= x < 1)]
BelowOne = Annotated[Any, Kind("number", "below 1", lambda x: x < 1)]  # what factors reduce by
Count = Annotated[Any, Kind("number", "a step count, at least 0", lambda x: x >= 0)]
Period = Annotated[Any, Kind("number", "a number of steps, at least 1", lambda x: x >= 1)]
Mixing = Annotated[Any, Kind("number", "in (0, 1)", lambda x: 0 < x < 1)]
NumberOrSchedule = Annotated[Any, Kind("number", lazy=True)]
Numbers = Annotated[Any, Kind("numbers")]  # a list, tuple, dict or array of numbers or schedules
Links = Annotated[Any, Kind("links")]  # a mapping from names to transformations, in its order
Structure = Annotated[Any, Kind("structure")]  # what shapes the program
Mask = Any | Callable[[Any], Any]  # a tree of bools, or a function from parameters to one


def _is_pair_of_decays(pair: Any) -> bool:
    if not hasattr(pair, "__len__") or len(pair) != 2:
        return False
    return all(0 <= x < 1 for x in pair if isinstance(x, np.floating))  # others are schedules


Decays = Annotated[Any, Kind("numbers", "two numbers in [0, 1)", _is_pair_of_decays)]


def _rising(steps: Any) -> bool:
    return bool(np.all(np.diff(np.asarray(steps, np.float64)) > 0))


def _rising_with_scales(pairs: Any) -> bool:
    if isinstance(pairs, dict):
        return min(pairs.values(), default=0) >= 0
    return len(pairs) == 2 and _rising(pairs[0]) and np.min(pairs[1], initial=0) >= 0


Boundaries = Annotated[Any, Kind("numbers", "in rising order", _rising)]
BoundariesAndScales = Annotated[
    Any,
    Kind(
        "numbers",
        "a dict or a pair: boundaries in rising order, scales at least 0",
        _rising_with_scales,
    ),
]


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
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if parameter.kind not in plain:
        return Kind("structure")
    if parameter.name in ("key", "seed", "rng", "mask"):
        return Kind("structure")
    default, empty = parameter.default, inspect.Parameter.empty
    numeric = Any not in members and any(c in NUMERIC for c in classes)
    if default is None or (default is empty and hint not in (empty, Any)):
        return Kind("number" if numeric else "structure")
    if default is empty or is_number(default):
        return Kind("number")
    several = isinstance(default, tuple | list) and all(map(is_number, default))
    return Kind("numbers" if several else "structure")


def is_number(value: Any) -> bool:
    """Whether it is a real number or an array of them: no bool, nothing complex."""
    if isinstance(value, bool | np.bool_ | complex | np.complexfloating):
        return False
    if isinstance(value, np.ndarray | jax.Array):
        return jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    return isinstance(value, NUMERIC)


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
    # the word in front keeps unlike things from being compared: old tree structures refuse to be
    if isinstance(value, np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            with jax.ensure_compile_time_eval():  # the values of a key are known inside jit too
                value = np.asarray(jax.random.key_data(value))  # type: ignore[arg-type]
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
    """Links by name: a mapping that keeps its order where JAX would sort a dict by its keys."""

    __slots__ = ("links", "names")

    def __init__(self, names: Iterable[str], links: Iterable[Any]) -> None:
        self.names, self.links = tuple(names), tuple(links)

    def __getitem__(self, name: str) -> Any:
        return dict(zip(self.names, self.links, strict=True))[name]

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> Any:
        return Named, (self.names, self.links)

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name!r}: {link!r}" for name, link in self.items()) + "}"


def _named_with_keys(node: Named) -> Any:
    return tuple((jax.tree_util.DictKey(name), link) for name, link in node.items()), node.names


jax.tree_util.register_pytree_with_keys(Named, _named_with_keys, Named)


class Spec:
    """A factory and what is known of its parameters: the structure of its values."""

    def __init__(
        self,
        factory: Callable[..., Any],
        structure: Iterable[str],
        numbers: Iterable[str] = (),
        check: Callable[[Any], None] | None = None,
    ) -> None:
        self.factory, self.check = factory, check
        self.name = getattr(factory, "__name__", repr(factory)).lstrip("_")
        self.structure, self.numbers = (
            frozenset([names] if isinstance(names, str) else names)
            for names in (structure, numbers)
        )
        self.signature = inspect.signature(factory)
        hints = {name: p.annotation for name, p in self.signature.parameters.items()}
        hints["return"] = self.signature.return_annotation
        if any(isinstance(hint, str) for hint in hints.values()):
            try:
                hints = typing.get_type_hints(factory, include_extras=True)
            except NameError:  # a name that only type checkers import
                hints = {}
        self.returns = hints.get("return")
        unknown = (self.structure | self.numbers).difference(self.signature.parameters)
        if unknown:
            raise ValueError(f"{self.name} has no parameter {', '.join(sorted(unknown))}")
        said = {
            **dict.fromkeys(self.numbers, Kind("number")),
            **dict.fromkeys(self.structure, Kind("structure")),
        }
        self.kinds = {
            name: said.get(name) or _kind(p, hints.get(name, p.empty))
            for name, p in self.signature.parameters.items()
        }
        self.optional = frozenset(
            name
            for name, p in self.signature.parameters.items()
            if p.default is None or type(None) in _members(hints.get(name))
        )
        self.names = tuple(self.kinds)
        self.decorated: Callable[..., Any] = factory

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> Any:
        return self.factory, self.structure, self.numbers

    def __reduce__(self) -> Any:
        decorated = self.decorated
        module = importlib.import_module(decorated.__module__)
        if getattr(module, decorated.__qualname__, None) is decorated:
            return spec_of, (decorated,)
        return Spec, (self.factory, tuple(self.structure), tuple(self.numbers))

    def admit(self, name: str, value: Any) -> Any:
        """The stored form of an argument; refuses what is of another kind or out of range."""
        kind = self.kinds[name]
        parameter = self.signature.parameters[name]
        if kind.name == "structure":
            if parameter.annotation is bool and not isinstance(value, bool | np.bool_):
                raise TypeError(f"{self.name}: {name} must be True or False, got {value!r}")
            if typing.get_origin(parameter.annotation) is Literal:
                words = typing.get_args(parameter.annotation)
                if value not in words:
                    raise ValueError(f"{self.name}: {name} must be one of {words}, got {value!r}")
            return value if value is None else Static(self._canonical(name, value))
        if value is None and name in self.optional:
            return None
        if kind.name == "link":
            several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            links: tuple[Any, ...] = tuple(value or ()) if several else (value,)
            admitted = tuple(self._link(name, link) for link in links)
            return admitted if several else admitted[0]
        if kind.name == "links":
            if not isinstance(value, Mapping) or not all(isinstance(n, str) for n in value):
                raise TypeError(f"{self.name}: {name} must be a dict of names, got {value!r}")
            pairs = dict(value)
            return Named(pairs, [self._link(f"{name}[{n!r}]", link) for n, link in pairs.items()])
        if kind.name == "numbers":
            value = tuple(value) if type(value) is list else value
            stored = jax.tree.map(lambda x: self._one_of(name, x), value, is_leaf=callable)
            concrete = not any(isinstance(x, jax.Array) for x in jax.tree.leaves(stored))
            if kind.accepts is not None and concrete and not kind.accepts(stored):
                raise ValueError(f"{self.name}: {name} must be {kind.wanted}, got {value!r}")
            return stored
        if callable(value) and not isinstance(value, type):
            return _schedule(value)
        return self._number(name, kind, value)

    def _link(self, name: str, link: Any) -> Any:
        if not isinstance(unwrap(link), optax.GradientTransformation):
            raise TypeError(f"{self.name}: {name} must be a transformation, got {link!r}")
        # a transformation whose leaves are its closures is no pytree of numbers
        return Static(link) if any(map(callable, jax.tree.leaves(link))) else link

    def _one_of(self, name: str, value: Any) -> Any:
        """One of several numbers; a word among them is structure."""
        if isinstance(value, str):
            return Static(value)
        return _schedule(value) if callable(value) else self._number(name, Kind("numbers"), value)

    def _canonical(self, name: str, value: Any) -> Any:
        """Structure as it compares: dtypes by what they mean."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
            raise TypeError(
                f"{self.name}: {name} shapes the program and cannot be traced, got {value!r}"
            )
        if not name.endswith("dtype") and not isinstance(value, np.dtype):
            whole = isinstance(value, np.integer | np.ndarray | jax.Array) and jnp.issubdtype(
                jnp.result_type(value), jnp.integer
            )
            return int(value) if whole and np.ndim(value) == 0 else value
        if isinstance(value, bool):
            raise TypeError(f"{self.name}: {name} must be a dtype, got {value!r}")
        return jax.dtypes.canonicalize_dtype(value)

    def _number(self, name: str, kind: Kind, value: Any) -> Any:
        if not is_number(value):
            raise TypeError(f"{self.name}: {name} must be a number or a schedule, got {value!r}")
        if isinstance(value, jax.Array):  # tracers too: float32, one trace for all of them
            return jnp.asarray(value, float)
        value = np.asarray(value, np.float64) if np.ndim(value) else np.float64(value)
        if kind.accepts is not None and not (value.ndim or kind.accepts(value)):
            raise ValueError(f"{self.name}: {name} must be {kind.wanted}, got {float(value)!r}")
        return value

    def call(self, args: tuple[Any, ...], step: Any = None, *, exact: bool = False) -> Any:
        """The factory itself, called with float scalars; schedules take their value at `step`.

        With `exact` concrete numbers are handed on as they are, in float64.
        """

        def prepare(name: str, arg: Any) -> Any:
            as_it_is = exact and isinstance(arg, np.float64)
            return arg if as_it_is else self._resolve(name, arg, step)

        return self._apply(args, prepare)

    def validate(self, args: tuple[Any, ...]) -> None:
        """Call the factory with the numbers as they are, for the checks in its body."""

        def as_they_are(name: str, arg: Any) -> Any:
            several = self.kinds[name].name == "numbers"
            return jax.tree.map(unwrap, arg, is_leaf=is_one_of) if several else unwrap(arg)

        self._apply(args, as_they_are)

    def _resolve(self, name: str, arg: Any, step: Any) -> Any:
        kind = self.kinds[name].name
        if kind == "number" and arg is not None:
            if is_schedule(arg):
                return (
                    unwrap(arg)
                    if self.kinds[name].lazy
                    else scalar(self.name, name, unwrap(arg)(step))
                )
            return scalar(self.name, name, arg)
        if kind == "numbers":
            lazy = self.kinds[name].lazy or step is None

            def number(x: Any) -> Any:
                if is_schedule(x) and not lazy:
                    return scalar(self.name, name, unwrap(x)(step))
                return unwrap(x) if is_one_of(x) else jnp.asarray(x, float)

            return jax.tree.map(number, arg, is_leaf=is_one_of)
        if kind == "links":
            return {name: unwrap(link) for name, link in arg.items()}  # type: ignore[union-attr]
        return unwrap(arg)

    def _apply(self, args: tuple[Any, ...], prepare: Callable[[str, Any], Any]) -> Any:
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for parameter, arg in zip(self.signature.parameters.values(), args, strict=True):
            value: Any = prepare(parameter.name, arg)
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                positional.extend(unwrap(item) for item in value or ())
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                keywords.update(value or {})
            elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                keywords[parameter.name] = value
            else:
                positional.append(value)
        return self.factory(*positional, **keywords)


def spec_of(decorated: Callable[..., Any]) -> Spec:
    return decorated.__jgd_spec__  # type: ignore[attr-defined]


def _schedule(value: Callable[..., Any]) -> Any:
    """A callable pytree keeps its numbers as leaves; any other callable is structure."""
    return Static(value) if jax.tree_util.all_leaves([value]) else value


def is_schedule(arg: Any) -> bool:
    """Whether the stored form of a number is a schedule."""
    return callable(unwrap(arg)) and not isinstance(arg, type)


def is_one_of(arg: Any) -> bool:
    """Whether it stands whole among several numbers: a schedule, or a word."""
    return isinstance(arg, Static) or is_schedule(arg)


def unwrap(arg: Any) -> Any:
    return arg.value if isinstance(arg, Static) else arg


def scalar(factory: str, name: str, value: Any) -> jax.Array:
    """A float32 scalar (float64 under x64), so that no 16-bit leaf ever rounds a number."""
    number = jnp.asarray(value, float)
    if number.ndim:
        raise TypeError(
            f"{factory}: {name} has shape {number.shape}; this is a batch of settings, so map over"
            " it with jax.vmap"
        )
    return number
