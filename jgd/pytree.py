"""`as_pytree`: a call of a factory returns a pytree of its numbers.

A factory takes numbers and structure and returns `init` and `update`. Decorated with `as_pytree`,
it returns a `GradientTransformationExtraArgs` that is a pytree as well: its leaves are the numbers
of the call, and all other arguments are structure.

    tx = adam(1e-3)                             # adam(learning_rate=0.001, b1=0.9, ...)
    jax.tree.leaves(tx)                         # [0.001, 0.9, 0.999, 1e-08, 0.0]
    jax.jit(step)(tx, params, state)            # another learning rate does not retrace
    jax.vmap(adam)(jnp.logspace(-4, -1, 64))    # 64 optimizers: each leaf has a lane axis
    jax.grad(final_loss)(tx)                    # hypergradients, shaped like the optimizer

Schedules are callables that are pytrees of their numbers, and any number of an optimizer may be a
schedule. Monitors, pairs `(init, update)` over a metric, are pytrees of their numbers as well.

Numbers, schedules and dtypes are converted once, where a user calls `update` (`jgd.door`). The
bodies of jgd's own factories call one another as plain functions, which return plain pairs.
"""

import collections.abc
import functools
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, ParamSpec, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jgd.arguments import (
    NumberKind,
    NumbersKind,
    Resolver,
    StructureKind,
    concrete_scalar,
    exact_scalar,
    scalar,
)
from jgd.calls import NEEDS_A_VALUE, NO_BODY, Spec, extended, factory_body, name_structure, running
from jgd.door import Call, ScheduledState, SteppedState
from jgd.exporting import register_factory, register_value
from jgd.nodes import brief, show, unwrap
from jgd.trees import TreeError

__all__ = [
    "Monitor",
    "MonitorPair",
    "Schedule",
    "ScheduledState",
    "SteppedState",
    "Transformation",
    "as_pytree",
]

P = ParamSpec("P")


# --- transformations, schedules, monitors ----------------------------------------------------


class _Value:
    """Base class of transformations, schedules and monitors: the value of a factory call."""

    _call: Call

    @classmethod
    def of_call(cls, spec: Spec, args: Iterable[Any]) -> Self:
        """Return the value of a call from its stored form. JAX unflattens with it, so unchecked."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Value) or type(self) is not type(other):
            return False
        return self is other or self._call.key == other._call.key

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._call.key)

    def __getattr__(self, name: str) -> Any:
        call = self.__dict__.get("_call")
        if call is not None and name in call.spec.kinds:
            return unwrap(call.args[call.spec.names.index(name)])
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_call", "__orig_class__"):
            object.__setattr__(self, name, value)
            return
        raise AttributeError(
            f"{self._call.spec.name} is immutable. Use tx._replace({name}=...) to change a number"
        )

    def __repr__(self) -> str:
        spec, shown = self._call.spec, list[str]()
        for (name, parameter), arg in zip(
            spec.signature.parameters.items(), self._call.args, strict=True
        ):
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                shown.extend(map(show, arg))
            elif not isinstance(spec.kinds[name], StructureKind) or (
                arg is not None and arg != spec.defaults[name]
            ):
                shown.append(f"{name}={show(arg)}")
        return f"{spec.name}({', '.join(shown)})"

    def __reduce__(self) -> Any:
        return type(self).of_call, (self._call.spec, self._call.args)

    def _replaced(self, changes: dict[str, Any]) -> Self:
        spec = self._call.spec
        unknown = set(changes).difference(spec.kinds)
        if unknown:
            names = ", ".join(sorted(unknown))
            raise ValueError(f"{spec.name} has no argument {names}{spec.nearest(min(unknown))}")
        args = tuple(
            spec.admit(name, changes[name]) if name in changes else arg
            for name, arg in zip(spec.names, self._call.args, strict=True)
        )
        new = self.of_call(spec, args)
        if spec.check is not None:
            spec.check(new)
        return new


class Transformation(_Value, optax.GradientTransformationExtraArgs):
    """A gradient transformation that is a pytree of its numbers. jgd's factories return it.

    It is an ordinary `(init, update)` pair for optax. Its arguments are attributes
    (`tx.learning_rate`), and `tx._replace(learning_rate=...)` returns the same optimizer with other
    numbers.
    """

    @classmethod
    def of_call(cls, spec: Spec, args: Iterable[Any]) -> Self:
        call = Call(spec, tuple(args))
        self = tuple.__new__(cls, (call.init, call.update))
        object.__setattr__(self, "_call", call)
        return self

    def _replace(self, **changes: Any) -> Any:
        if changes and {"init", "update"}.issuperset(changes):  # no call of the factory
            pair = optax.GradientTransformationExtraArgs(self.init, self.update)
            return pair._replace(**changes)
        return self._replaced(changes)


class Schedule(_Value):
    """A function of the step that is a pytree of its numbers. jgd's schedules return it."""

    @classmethod
    def of_call(cls, spec: Spec, args: Iterable[Any]) -> Self:
        self = object.__new__(cls)
        self._call = Call(spec, tuple(args))
        return self

    def __call__(self, step: Any) -> jax.Array:
        """Return the value at `step`: an integer, a traced integer, or an array of steps."""
        spec, args = self._call.spec, self._call.args
        try:
            with np.errstate(all="ignore"):
                with factory_body(spec.own):
                    schedule = spec.body(args, Resolver(concrete_scalar if spec.own else scalar))
                value = schedule(step)
            # given NumPy scalars, a user's function inside may return NumPy's float64
            return jnp.asarray(value, float) if spec.own else value
        except NEEDS_A_VALUE as error:
            name_structure(error, spec, args, lambda schedule: schedule(step))
            raise

    def _replace(self, **changes: Any) -> Self:
        return self._replaced(changes)


class MonitorPair(NamedTuple):
    """A pair `(init, update)` that makes a decision for each value of a metric, such as a loss."""

    init: Callable[..., Any]  # initial values, such as a learning rate -> state
    update: Callable[[Any, Any], tuple[Any, Any]]  # (metric, state) -> (decision, state)


class Monitor(_Value, MonitorPair):
    """A `MonitorPair` that is a pytree of its numbers. Factories in `jgd.stopping` return it."""

    @classmethod
    def of_call(cls, spec: Spec, args: Iterable[Any]) -> Self:
        call = Call(spec, tuple(args))
        label = lambda name: f"{spec.name}: {name}"

        def pair() -> MonitorPair:
            # outside jit, numbers stay float64 until they are compared
            return spec.body(call.args, Resolver(exact_scalar))

        def init(*start: Any, **named: Any) -> Any:
            named = {name: scalar(label(name), x) for name, x in named.items()}
            return pair().init(*(scalar(label("initial value"), x) for x in start), **named)

        def update(metric: Any, state: Any) -> tuple[Any, Any]:
            metric = np.float64(metric) if isinstance(metric, float | int | np.number) else metric
            try:
                return pair().update(exact_scalar(label("metric"), metric), state)
            except TreeError as error:
                raise TreeError(error.detail, spec.name) from None

        self = tuple.__new__(cls, (init, update))
        self._call = call
        return self

    def _replace(self, **changes: Any) -> Any:
        return self._replaced(changes)


def call_of(value: Any) -> Call:
    """Return the `Call`, the factory and its stored arguments, of a value."""
    return value._call


def _flatten(value: Any) -> tuple[tuple[Any, ...], Spec]:
    return value._call.args, value._call.spec


def _flatten_with_keys(value: Any) -> tuple[tuple[tuple[Any, Any], ...], Spec]:
    args, spec = _flatten(value)
    keys = map(jax.tree_util.GetAttrKey, spec.names)
    return tuple(zip(keys, args, strict=True)), spec


for _class in (Transformation, Schedule, Monitor):
    jax.tree_util.register_pytree_with_keys(_class, _flatten_with_keys, _class.of_call, _flatten)
    register_value(_class)


# --- the decorator ---------------------------------------------------------------------------


@overload
def as_pytree(
    factory: Callable[P, Any],
    *,
    structure: Iterable[str] = (),
    numbers: Iterable[str] = (),
    check: Callable[[Any], None] | None = None,
    widen: bool = True,
) -> Callable[P, Any]: ...
@overload
def as_pytree(
    *,
    structure: Iterable[str] = (),
    numbers: Iterable[str] = (),
    check: Callable[[Any], None] | None = None,
    widen: bool = True,
) -> Callable[[Callable[P, Any]], Callable[P, Any]]: ...
def as_pytree(
    factory: Any = None,
    *,
    structure: Iterable[str] = (),
    numbers: Iterable[str] = (),
    check: Callable[[Any], None] | None = None,
    widen: bool = True,
) -> Any:
    """Make the values that a factory returns pytrees of their numbers.

        lion = jgd.as_pytree(optax.lion)
        jax.vmap(lion)(jnp.logspace(-5, -2, 32))                     # 32 lanes of optax's Lion
        adafactor = jgd.as_pytree(optax.adafactor, structure=["min_dim_size_to_factor"])

    Args:
      factory: a function that returns an optax transformation, a pair `(init, update)`, a
        schedule (a function of the step) or, with that return annotation, a `MonitorPair`.
        The annotations of its parameters (jgd's or optax's types), their defaults and positions
        decide which are numbers: bools, strings, dtypes, masks, random keys, required functions
        and all parameters after `*` are structure, all others before `*` are numbers.
      structure: names of parameters before `*` that are structure, for example an int that
        determines a shape, or a number on which the factory branches in Python.
      numbers: names of parameters after `*` that are numbers.
      check: a function that is called with each new value and raises if its arguments do not fit
        together. Its numbers may be traced.
      widen: False passes parameters to the factory in their own dtypes, for a wrapper that needs
        them; gradients are float32 in either case.

    Returns:
      A function with the signature and docstring of `factory`. It returns a `Transformation`, a
      `Schedule` or a `Monitor`. Python and NumPy scalars are stored as `np.float64`, arrays and
      tracers as float32; inside `init` and `update` each is a float32 scalar (all float64 under
      x64). Integer step counts become floats as well, exact up to 2^24. The factory receives 16-bit
      and integer leaves of updates and parameters as float32, and the returned updates have the
      wider of the dtypes of gradient and parameter. A number of a transformation may be a schedule:
      the state then carries one step counter. Calls of jgd's factories inside the body of `factory`
      return values too. Programs of `jax.export` accept the values as arguments (`jgd.exporting`).

    Raises:
      TypeError: in the call, for an argument of the wrong type (`adam("0.1")`, `adam(True)`,
        `adam(optax.sgd(0.1))`); in `init` and `update`, for a number that is not a scalar, or on
        which the factory branches in Python.
      ValueError: in the call, for a concrete number out of its range; in `update`, for trees or
        shapes that do not match (`TreeError`, which names the optimizer and the leaf's path).

    Differs from: `optax.inject_hyperparams`, which keeps the numbers in the state. Note that
    `optax.chain` hides the numbers of its links; in `jgd.chain` they stay leaves.
    """
    if factory is None:
        options = dict[str, Any](structure=structure, numbers=numbers, check=check, widen=widen)
        return functools.partial(as_pytree, **options)
    spec = Spec(factory, structure, numbers, check, widen)
    register_factory(spec)
    value_class: list[type[_Value]] = []

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if running.get().own and spec.own and not _has_schedule(spec, args, kwargs):
            result = factory(*args, **kwargs)
            return extended(result) if isinstance(result, tuple) else result
        admitted = spec.bind(args, kwargs)
        if running.get() is NO_BODY:
            spec.check_call(admitted)
        if not value_class:
            value_class.append(_class_of(spec, admitted))
        value = value_class[0].of_call(spec, admitted)
        if not isinstance(value, Transformation):
            _check_body(value)
        if check is not None:
            check(value)
        return value

    spec.decorated = call
    setattr(call, "__jgd_spec__", spec)  # noqa: B010 (functions have no such attribute)
    return call


def _has_schedule(spec: Spec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a number of the call is a schedule, which needs a step counter."""
    named = [*zip(spec.names, args, strict=False), *kwargs.items()]
    return any(
        callable(arg) and isinstance(kind := spec.kinds[name], NumberKind) and not kind.lazy
        for name, arg in named
    )


def _check_body(value: Any) -> None:
    """Run the body of a schedule or monitor once, so that its checks raise in the user's call."""
    call: Call = value._call
    if call.scheduled and not any(isinstance(kind, NumbersKind) for kind in call.scheduled):
        what = type(value).__name__.lower()
        raise TypeError(f"{call.spec.name}: numbers of a {what} must be constant, got a schedule")
    if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(call.args)):
        call.spec.body(call.args, Resolver(lambda label, number: number))


def _class_of(spec: Spec, args: tuple[Any, ...]) -> type[Any]:
    """Return the class of a factory's values, read from its annotation or from a trial call."""
    if isinstance(spec.returns, type) and issubclass(spec.returns, optax.GradientTransformation):
        return Transformation
    if spec.returns is MonitorPair:
        return Monitor
    if typing.get_origin(spec.returns) is collections.abc.Callable:
        return Schedule
    first = lambda x: jnp.ravel(x)[0] if isinstance(x, np.ndarray | jax.Array) else x
    number = lambda label, x: scalar(label, first(x))
    try:
        with factory_body(own=False):
            result = spec.body(args, Resolver(number, step=jnp.zeros([], jnp.int32)))
    except NEEDS_A_VALUE as error:
        name_structure(error, spec, args, lambda result: result)
        raise
    if isinstance(result, tuple) and len(result) == 2:
        return Transformation
    if callable(result):
        return Schedule
    raise TypeError(
        f"{spec.name}: the factory must return a transformation, a pair (init, update) or a"
        f" schedule, got {brief(result)}"
    )
