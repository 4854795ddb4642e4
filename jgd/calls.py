"""Calls of a factory: `Spec` gives arguments their stored form and runs the body with them.

    spec = Spec(adam)                        # the kinds of the parameters of one factory
    stored = spec.bind((1e-3,), {})          # a tuple whose leaves are the numbers of the call
    spec.body(stored, Resolver(scalar))      # runs the body with float32 scalars

While the body of one of jgd's own factories runs, calls of jgd's factories return plain pairs.
"""

import contextlib
import contextvars
import difflib
import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jgd.arguments import (
    Kind,
    LinkKind,
    NumberKind,
    NumbersKind,
    Resolver,
    StructureKind,
    kind_of,
    members_of,
)
from jgd.nodes import unwrap

__all__ = ["Spec", "factory_body", "has_scheduled_decay", "spec_of"]


# --- the running body ------------------------------------------------------------------------


class Body(NamedTuple):
    """Properties of the factory call whose body is running."""

    own: bool  # the factory is jgd's: calls of jgd's factories return plain pairs
    scheduled_decay: bool  # a decay of the call is a schedule


# Set while a body builds its pair, never while the pair runs: inside `update`, factories that a
# user's function calls return values.
NO_BODY = Body(own=False, scheduled_decay=False)
running = contextvars.ContextVar[Body]("running", default=NO_BODY)


@contextlib.contextmanager
def factory_body(own: bool = True, scheduled_decay: bool = False) -> Generator[None]:
    """Mark the body that is running. With `own`, calls of jgd's factories return plain pairs."""
    token = running.set(Body(own, scheduled_decay))
    try:
        yield
    finally:
        running.reset(token)


def has_scheduled_decay() -> bool:
    """Return whether a decay of the call whose body is running is a schedule."""
    return running.get().scheduled_decay


# --- a factory and its calls -----------------------------------------------------------------


class Spec:
    """A factory and the kinds of its parameters: the structure of its values."""

    def __init__(
        self,
        factory: Callable[..., Any],
        structure: Iterable[str] = (),
        numbers: Iterable[str] = (),
        check: Callable[[Any], None] | None = None,
        widen: bool = True,
    ) -> None:
        self.factory, self.check, self.widen = factory, check, widen
        self.name: str = getattr(factory, "__name__", repr(factory)).lstrip("_")
        names_of = lambda names: frozenset([names] if isinstance(names, str) else names)
        self.structure, self.numbers = names_of(structure), names_of(numbers)
        self.signature = inspect.signature(factory)
        parameters = self.signature.parameters
        hints: dict[str, Any] = {name: p.annotation for name, p in parameters.items()}
        hints["return"] = self.signature.return_annotation
        if any(isinstance(hint, str) for hint in hints.values()):
            try:
                hints = typing.get_type_hints(factory, include_extras=True)
            except NameError:  # a name that only type checkers import
                hints = {}
        self.returns = hints.get("return")
        self.names = tuple(parameters)
        unknown = sorted((self.structure | self.numbers).difference(parameters))
        if unknown:
            hint = self.nearest(unknown[0])
            raise ValueError(f"as_pytree: {self.name} has no argument {', '.join(unknown)}{hint}")
        overrides: dict[str, Kind] = {
            **dict.fromkeys(self.numbers, NumberKind()),
            **dict.fromkeys(self.structure, StructureKind()),
        }
        self.kinds = {
            name: overrides.get(name) or kind_of(p, hints.get(name, p.empty))
            for name, p in parameters.items()
        }
        self.labels = {name: f"{self.name}: {name}" for name in self.names}
        self.required = frozenset(n for n, p in parameters.items() if p.default is p.empty)
        variadic = inspect.Parameter.VAR_POSITIONAL
        self.variadic = next((n for n, p in parameters.items() if p.kind is variadic), None)
        self.optional = frozenset(
            name
            for name, p in parameters.items()
            if p.default is None or type(None) in members_of(hints.get(name))
        )
        # in the bodies of jgd's own factories, calls of jgd's factories return plain pairs
        self.own = str(getattr(factory, "__module__", None)).partition(".")[0] == "jgd"
        self.decorated = factory
        self._hash = hash((factory, self.structure, self.numbers))

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Spec)
            and self.factory == other.factory
            and (self.structure, self.numbers) == (other.structure, other.numbers)
            and self.widen == other.widen
        )

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:
        decorated = self.decorated
        module = importlib.import_module(decorated.__module__)
        if getattr(module, decorated.__qualname__, None) is decorated:
            return spec_of, (decorated,)
        return Spec, (self.factory, tuple(self.structure), tuple(self.numbers), None, self.widen)

    # --- from a call to its stored form

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """The stored form of each default, and `Parameter.empty` for required parameters."""
        empty, stored = inspect.Parameter.empty, dict[str, Any]()
        for name, p in self.signature.parameters.items():
            stored[name] = p.default if p.default is empty else self.admit(name, p.default)
        return stored

    @functools.cached_property
    def _positional(self) -> tuple[str, ...] | None:
        """The names of positional parameters; None if there are `*args` or `**kwargs`."""
        kinds = {p.kind for p in self.signature.parameters.values()}
        if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            return None
        keyword_only = inspect.Parameter.KEYWORD_ONLY
        return tuple(n for n, p in self.signature.parameters.items() if p.kind != keyword_only)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the stored form of a call. Raises TypeError as a call of the factory would."""
        positional = self._positional
        if positional is None or len(args) > len(positional):
            return self._bind_by_signature(args, kwargs)
        given = dict(zip(positional, args, strict=False))
        if not kwargs.keys().isdisjoint(given) or not kwargs.keys() <= self.kinds.keys():
            return self._bind_by_signature(args, kwargs)
        given.update(kwargs)
        if not self.required <= given.keys():
            return self._bind_by_signature(args, kwargs)
        stored = self.defaults | {name: self.admit(name, x) for name, x in given.items()}
        return tuple(stored.values())

    def _bind_by_signature(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            kinds = {p.kind for p in self.signature.parameters.values()}
            for name in kwargs if inspect.Parameter.VAR_KEYWORD not in kinds else ():
                if name not in self.kinds:
                    detail = f"got an unexpected keyword argument {name!r}{self.nearest(name)}"
                    raise TypeError(f"{self.name}: {detail}") from None
            raise TypeError(f"{self.name}: {error}") from None
        bound.apply_defaults()
        return tuple(self.admit(name, value) for name, value in bound.arguments.items())

    def admit(self, name: str, value: Any) -> Any:
        """Return the stored form of an argument. Raises if its type or range is wrong."""
        kind, label = self.kinds[name], self.labels[name]
        if value is None and name in self.optional:
            return None
        if name == self.variadic and isinstance(kind, LinkKind):
            links: Any = value
            return tuple(kind.admit(label, link) for link in links)
        return kind.admit(label, value)

    def nearest(self, unknown: str) -> str:
        """Return the end of an error: the closest parameter name, or nothing if none is close."""
        close = difflib.get_close_matches(unknown, self.names, 1, 0.5)
        # `lr` stands for `learning_rate`
        initials = ["".join(word[:1] for word in name.split("_")) for name in self.names]
        close += [
            name for name, letters in zip(self.names, initials, strict=True) if letters == unknown
        ]
        return f"; did you mean {close[0]}?" if close else ""

    def check_call(self, args: tuple[Any, ...]) -> None:
        """Run the checks of a user's call, which calls in the body of a factory skip."""
        for name, arg in zip(self.names, args, strict=True):
            if arg is not None and type(arg) is not np.float64:
                self.kinds[name].check_call(self.labels[name], arg)

    # --- from the stored form to the body

    def body(self, args: tuple[Any, ...], resolver: Resolver) -> Any:
        """Run the body of the factory with the stored arguments."""
        positional, keywords = self.resolve(args, resolver)
        return self.factory(*positional, **keywords)

    def resolve(
        self, args: tuple[Any, ...], resolver: Resolver
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the positional and keyword arguments for the body of the factory."""
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        pairs = zip(self.signature.parameters.values(), self.kinds.values(), args, strict=True)
        for parameter, kind, stored in pairs:
            label = self.labels[parameter.name]
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                several: Any = unwrap(stored)
                positional.extend(kind.resolve(label, one, resolver) for one in several)
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                keywords.update(unwrap(stored) or {})
            elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                keywords[parameter.name] = kind.resolve(label, stored, resolver)
            else:
                positional.append(kind.resolve(label, stored, resolver))
        return positional, keywords

    def numeric(self) -> list[str]:
        """Return the names of the parameters that are numbers, or several numbers."""
        return [n for n, kind in self.kinds.items() if isinstance(kind, NumberKind | NumbersKind)]


def spec_of(decorated: Callable[..., Any]) -> Spec:
    """Return the `Spec` of a factory that `as_pytree` decorated."""
    return getattr(decorated, "__jgd_spec__")  # noqa: B009 (functions have no such attribute)


def extended(pair: Any) -> optax.GradientTransformationExtraArgs:
    """Return a pair as a transformation that takes extra arguments."""
    if isinstance(pair, optax.GradientTransformationExtraArgs):
        return pair
    if not isinstance(pair, optax.GradientTransformation):
        pair = optax.GradientTransformation(*pair)
    return optax.with_extra_args_support(pair)


# --- numbers that a lifted factory needs as structure ----------------------------------------


NEEDS_A_VALUE = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)


def name_structure(
    error: Exception, spec: Spec, args: tuple[Any, ...], use: Callable[[Any], Any]
) -> None:
    """Raise TypeError with the names of the numbers on which a lifted factory branches in Python.

    Args:
      use: a function that calls the result of the factory, since this call may branch.
    """
    if spec.own or _branches(spec, args, use, None):  # the branch is on a gradient, for example
        return
    if names := [name for name in spec.numeric() if _branches(spec, args, use, name)]:
        raise TypeError(
            f"{spec.name}: {', '.join(names)} must be structure, since the factory needs the value"
            f" in Python, got a traced number. Lift it with jgd.as_pytree({spec.name},"
            f" structure={names!r})"
        ) from error


def _branches(
    spec: Spec, args: tuple[Any, ...], use: Callable[[Any], Any], name: str | None
) -> bool:
    """Return whether a lifted factory branches if `name` is the only number that is traced."""
    concrete = lambda x: 0.5 if isinstance(x, jax.core.Tracer) else np.asarray(x, np.float64)[()]

    def build(x: jax.Array) -> None:
        traced = lambda label: name is not None and label == spec.labels[name]
        number = lambda label, value: x if traced(label) else concrete(value)
        with factory_body(own=False):
            result = spec.body(args, Resolver(number, step=jnp.zeros([], jnp.int32)))
        use(extended(result) if isinstance(result, tuple) else result)

    try:
        jax.eval_shape(build, jnp.zeros([]))
    except NEEDS_A_VALUE:
        return True
    except Exception:  # about the value 0.5, not about `name`
        return False
    return False
