"""The kinds of a factory's parameters: how arguments are checked, stored and resolved.

Each parameter of a factory has a kind: a number (or a schedule), several numbers, a link (another
transformation), links by name, a random key, or structure. A kind has two main methods:

    kind.admit("adam: b1", 0.9)                  # checks an argument, returns its stored form
    kind.resolve("adam: b1", stored, resolver)   # the value that the factory's body receives

The stored form of a call is a pytree whose leaves are its numbers (`calls.py`).
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jgd.nodes import (
    NUMERIC,
    Named,
    Static,
    brief,
    captured_by,
    is_entry,
    is_number,
    is_schedule,
    unwrap,
)

__all__ = [
    "AnyNumber",
    "BelowOne",
    "Boundaries",
    "BoundariesAndScales",
    "Count",
    "Decay",
    "Decays",
    "Fraction",
    "Key",
    "Kind",
    "LinkKind",
    "Links",
    "LinksKind",
    "Mask",
    "Mixing",
    "NonNegative",
    "Number",
    "NumberKind",
    "NumberOrSchedule",
    "Numbers",
    "NumbersKind",
    "Period",
    "Positive",
    "Resolver",
    "Structure",
    "StructureKind",
    "kind_of",
    "members_of",
]


# --- kinds -----------------------------------------------------------------------------------


class Resolver(NamedTuple):
    """Conversions of stored arguments for the body of a factory, which `Kind.resolve` applies."""

    number: Callable[[str, Any], Any]  # (label, stored number) -> number
    link: Callable[[Any], Any] = unwrap  # stored link -> link
    step: Any = None  # the step at which schedules are evaluated


class Kind:
    """The kind of a parameter of a factory: the base class of all kinds."""

    description = ""

    def admit(self, label: str, value: Any) -> Any:
        """Return the stored form of an argument. Raises if its type or range is wrong."""
        raise NotImplementedError

    def check_call(self, label: str, stored: Any) -> None:
        """Run the checks of a user's call only: values of JAX arrays, closures of links."""

    def resolve(self, label: str, stored: Any, resolver: Resolver) -> Any:
        """Return the value that the factory's body receives."""
        return unwrap(stored)


def _is_not_nan(x: Any) -> Any:
    return x == x


@dataclass(frozen=True)
class NumberKind(Kind):
    """A number, or a schedule of one."""

    description: str = "a number"
    check: Callable[[Any], Any] = _is_not_nan  # called with concrete numbers, scalars or arrays
    lazy: bool = False  # the body receives a schedule, not its value
    decay: bool = False  # the decay of a bias-corrected average

    def admit(self, label: str, value: Any) -> Any:
        if type(value) is float:  # the common case, on a short path
            value = np.float64(value)
            self.check_range(label, value)
            return value
        if callable(value) and not isinstance(value, type):
            return admit_schedule(label, value)
        if not is_number(value):
            raise TypeError(f"{label} must be a number or a schedule, got {brief(value)}")
        if isinstance(value, jax.Array):  # float32, also for tracers: one trace for all
            return jnp.asarray(value, float)
        number: Any = value
        value = np.asarray(number, np.float64) if np.ndim(number) else np.float64(number)
        self.check_range(label, value)
        return value

    def check_range(self, label: str, value: Any) -> None:
        """Raise ValueError if a concrete number is out of range."""
        passed = self.check(value)
        if not (passed if value.ndim == 0 else np.all(passed)):
            first = tuple(np.argwhere(~np.asarray(passed))[0].tolist())
            at = f" at index {', '.join(map(str, first))}" if first else ""
            raise ValueError(f"{label} must be {self.description}, got {value[first]!s}{at}")

    def check_call(self, label: str, stored: Any) -> None:
        if isinstance(stored, jax.Array) and _is_ready(stored):
            self.check_range(label, np.asarray(stored))

    def resolve(self, label: str, stored: Any, resolver: Resolver) -> Any:
        if stored is None or not is_schedule(stored):
            return stored if stored is None else resolver.number(label, stored)
        schedule = unwrap(stored)
        return schedule if self.lazy else scalar(label, schedule(resolver.step))


@dataclass(frozen=True)
class NumbersKind(Kind):
    """A list, tuple, dict or array of numbers or schedules. Strings in it are structure."""

    description: str = "numbers"
    check: Callable[[Any], Any] | None = None

    def admit(self, label: str, value: Any) -> Any:
        value = tuple(value) if type(value) is list else value
        one = lambda x: Static(x, label) if isinstance(x, str) else NumberKind().admit(label, x)
        stored = jax.tree.map(one, value, is_leaf=callable)
        if not any(isinstance(x, jax.Array) for x in jax.tree.leaves(stored)):
            self.check_range(label, stored, value)
        return stored

    def check_range(self, label: str, stored: Any, value: Any = None) -> None:
        """Raise ValueError if concrete numbers do not satisfy the description together."""
        if self.check is not None and not self.check(stored):
            plain = lambda x: x.tolist() if np.ndim(x) else float(str(x))
            shown = brief(jax.tree.map(plain, stored) if value is None else value)
            raise ValueError(f"{label} must be {self.description}, got {shown}")

    def check_call(self, label: str, stored: Any) -> None:
        arrays = [x for x in jax.tree.leaves(stored) if isinstance(x, jax.Array)]
        if arrays and all(map(_is_ready, arrays)):
            as_numpy = lambda x: np.asarray(x)[()] if isinstance(x, jax.Array) else x
            self.check_range(label, jax.tree.map(as_numpy, stored))

    def resolve(self, label: str, stored: Any, resolver: Resolver) -> Any:
        def one(x: Any) -> Any:
            if resolver.step is not None and is_schedule(x):
                return scalar(label, unwrap(x)(resolver.step))
            if is_entry(x):
                return unwrap(x)
            return jnp.asarray(x, float) if np.ndim(x) else resolver.number(label, x)

        return jax.tree.map(one, stored, is_leaf=is_entry)


@dataclass(frozen=True)
class LinkKind(Kind):
    """A transformation."""

    description: str = "a transformation"

    def admit(self, label: str, value: Any) -> Any:
        link = unwrap(value)
        if not isinstance(link, optax.GradientTransformation):
            raise TypeError(
                f"{label} must be {self.description}, got {brief(value)}{_hint_to_call(value)}"
            )
        # the leaves of a transformation of optax are functions: it is stored as structure
        return Static(link, label) if any(map(callable, jax.tree.leaves(link))) else value

    def check_call(self, label: str, stored: Any) -> None:
        for link in stored if type(stored) is tuple else (stored,):
            closures = link.value if isinstance(link, Static) else ()
            if any(isinstance(x, jax.core.Tracer) for f in closures for x in captured_by(f)):
                raise TypeError(
                    f"{label} must not hold traced numbers in closures, got {link!r}. Lift its"
                    " factory with jgd.as_pytree, so that its numbers are leaves"
                )

    def resolve(self, label: str, stored: Any, resolver: Resolver) -> Any:
        return resolver.link(stored)


@dataclass(frozen=True)
class LinksKind(LinkKind):
    """A mapping from names to transformations that keeps its order."""

    def admit(self, label: str, value: Any) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise TypeError(
                f"{label} must be a dict from names to transformations, got {brief(value)}"
            )
        links = {
            name: super(LinksKind, self).admit(f"{label}[{name!r}]", link)
            for name, link in dict[str, Any](value).items()
        }
        return Named(links, links.values())

    def check_call(self, label: str, stored: Any) -> None:
        for name, link in stored.items():
            super().check_call(f"{label}[{name!r}]", link)

    def resolve(self, label: str, stored: Any, resolver: Resolver) -> Any:
        return {name: resolver.link(link) for name, link in stored.items()}


@dataclass(frozen=True)
class StructureKind(Kind):
    """Structure: a value that shapes the program, compared by value and never traced."""

    hint: Any = Any

    def admit(self, label: str, value: Any) -> Any:
        if self.hint is bool and not isinstance(value, bool | np.bool_):
            raise TypeError(f"{label} must be True or False, got {brief(value)}")
        if typing.get_origin(self.hint) is Literal and value not in typing.get_args(self.hint):
            choices = typing.get_args(self.hint)
            raise ValueError(f"{label} must be one of {choices}, got {brief(value)}")
        return value if value is None else Static(self._canonical(label, value), label)

    def _canonical(self, label: str, value: Any) -> Any:
        """Return equal dtypes, and equal integers, in one form, so that they compare as equal."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
            raise TypeError(
                f"{label} must not be traced, got {brief(value)}. It shapes the program: create"
                " an optimizer for each value"
            )
        if "dtype" in label.split(": ")[-1] or isinstance(value, np.dtype):
            if isinstance(value, bool):
                raise TypeError(f"{label} must be a dtype, got {value!r}")
            return jax.dtypes.canonicalize_dtype(value)
        array = isinstance(value, np.integer | np.ndarray | jax.Array) and np.ndim(value) == 0
        return int(value) if array and jnp.issubdtype(value.dtype, jnp.integer) else value


class KeyKind(Kind):
    """A random key or an int. It is structure, so that lanes share it, unless it is traced."""

    def admit(self, label: str, value: Any) -> Any:
        unchanged = value is None or isinstance(value, jax.core.Tracer)
        return value if unchanged else Static(value, label)


def admit_schedule(label: str, value: Any) -> Any:
    """Return the stored form of a schedule. The numbers of a callable pytree stay leaves."""
    if _is_factory(value):
        of_schedules = "schedule" in f"{value.__module__}.{value.__name__}"
        hint = _hint_to_call(value) if of_schedules else ""
        raise TypeError(f"{label} must be a number or a schedule, got {brief(value)}{hint}")
    return Static(value, label) if jax.tree_util.all_leaves([value]) else value


def _is_factory(value: Any) -> bool:
    """Return whether a function is a factory of jgd or optax, not what a factory returns."""
    if inspect.isfunction(value) and str(value.__module__).partition(".")[0] == "optax":
        return "<locals>" not in value.__qualname__
    return hasattr(value, "__jgd_spec__")


def _hint_to_call(value: Any) -> str:
    """Return the end of an error for a factory that was not called; empty for other values."""
    return f". Call it: {value.__name__}(...)" if _is_factory(value) else ""


def _is_ready(array: Any) -> bool:
    """Return whether the values of an array can be read without waiting."""
    return not isinstance(array, jax.core.Tracer) and array.is_ready()


def scalar(label: str, value: Any) -> jax.Array:
    """Return a float32 scalar (float64 under x64), which a 16-bit leaf does not round."""
    number = jnp.asarray(value, float)
    if number.ndim:
        raise TypeError(
            f"{label} must be a scalar, got shape {number.shape}. Map over a batch of settings with"
            " jax.vmap"
        )
    return number


def concrete_scalar(label: str, value: Any) -> Any:
    """Return a concrete number as a NumPy scalar, which traces faster, others as `scalar` does."""
    if type(value) is np.float64:
        return value if jax.dtypes.canonicalize_dtype(float) == np.float64 else np.float32(value)
    return scalar(label, value)


def exact_scalar(label: str, value: Any) -> Any:
    """Return a concrete number in float64, others as `scalar` does."""
    return value if isinstance(value, np.float64) else scalar(label, value)


# --- annotations -----------------------------------------------------------------------------

# A caller passes a float, an int, a NumPy or JAX scalar, a tracer or a schedule; the body of the
# factory receives a float scalar. No static type says both, hence Any.
Number = Annotated[Any, NumberKind("a finite number", np.isfinite)]
AnyNumber = Annotated[Any, NumberKind("a number", lambda x: x.dtype == np.float64)]  # or NaN
NonNegative = Annotated[Any, NumberKind("at least 0", lambda x: x >= 0)]
Positive = Annotated[Any, NumberKind("above 0", lambda x: x > 0)]
Fraction = Annotated[Any, NumberKind("in [0, 1]", lambda x: (x >= 0) & (x <= 1))]
Decay = Annotated[Any, NumberKind("in [0, 1)", lambda x: (x >= 0) & (x < 1), decay=True)]
BelowOne = Annotated[Any, NumberKind("below 1", lambda x: x < 1)]  # such as the factor of a plateau
Count = Annotated[Any, NumberKind("a step count, at least 0", lambda x: x >= 0)]
Period = Annotated[Any, NumberKind("a number of steps, at least 1", lambda x: x >= 1)]
Mixing = Annotated[Any, NumberKind("in (0, 1)", lambda x: (x > 0) & (x < 1))]
NumberOrSchedule = Annotated[Any, NumberKind("a finite number", np.isfinite, lazy=True)]
Numbers = Annotated[Any, NumbersKind()]
Links = Annotated[Any, LinksKind()]
Key = Annotated[Any, KeyKind()]
Structure = Annotated[Any, StructureKind()]
Mask = Any | Callable[[Any], Any]  # a tree of bools, or a function from parameters to one


def _is_pair_of_decays(pair: Any) -> bool:
    if not hasattr(pair, "__len__") or len(pair) != 2:
        return False
    numbers = [x for x in pair if isinstance(x, np.floating | np.ndarray)]  # others are schedules
    return all(np.all((x >= 0) & (x < 1)) for x in numbers)


def _is_increasing(steps: Any) -> bool:
    return bool(np.all(np.diff(np.asarray(steps, np.float64)) > 0))


def _is_increasing_with_scales(pairs: Any) -> bool:
    if isinstance(pairs, dict):
        return min(pairs.values(), default=0) >= 0
    return len(pairs) == 2 and _is_increasing(pairs[0]) and np.min(pairs[1], initial=0) >= 0


Decays = Annotated[Any, NumbersKind("two numbers in [0, 1)", _is_pair_of_decays)]
Boundaries = Annotated[Any, NumbersKind("in rising order", _is_increasing)]
BoundariesAndScales = Annotated[
    Any,
    NumbersKind(
        "a dict or a pair: boundaries in rising order, scales at least 0",
        _is_increasing_with_scales,
    ),
]


def members_of(hint: Any) -> list[Any]:
    """Return the members of a union, or the hint itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [member for arg in typing.get_args(hint) for member in members_of(arg)]
    return [hint]


def kind_of(parameter: inspect.Parameter, hint: Any) -> Kind:
    """Return the kind of a parameter, read from its annotation, its position and its default."""
    members = members_of(hint)
    for member in members:
        for note in getattr(member, "__metadata__", ()):
            if isinstance(note, Kind):
                return note
    classes = [member for member in members if isinstance(member, type)]
    if any(issubclass(c, optax.GradientTransformation) for c in classes):
        return LinkKind()
    structure = StructureKind(parameter.annotation)
    if parameter.name in ("key", "rng"):
        return KeyKind()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if parameter.kind not in plain or parameter.name in ("seed", "mask"):
        return structure
    default, empty = parameter.default, inspect.Parameter.empty
    numeric = Any not in members and any(c in NUMERIC for c in classes)
    if default is None or (default is empty and hint not in (empty, Any)):
        return NumberKind() if numeric else structure
    if default is empty or is_number(default):
        return NumberKind()
    several = isinstance(default, tuple | list) and all(map(is_number, default))
    return NumbersKind() if several else structure
