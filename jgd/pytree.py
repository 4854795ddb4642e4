"""One trick carries jgd: a call of a factory becomes a pytree of its numbers.

`as_pytree` turns an ordinary factory (numbers and structure in, `init` and `update` out) into one
whose result still is a `GradientTransformationExtraArgs` and is a pytree as well: its leaves are
the numbers of the call, everything else is structure.

    tx = adam(1e-3)                             # adam(learning_rate=0.001, b1=0.9, ...)
    jax.tree.leaves(tx)                         # [0.001, 0.9, 0.999, 1e-08, 0.0]
    jax.jit(step)(tx, params, state)            # another learning rate: the same program
    jax.vmap(adam)(jnp.logspace(-4, -1, 64))    # 64 optimizers: each leaf has a lane axis
    jax.grad(final_loss)(tx)                    # hypergradients, shaped like the optimizer

Schedules are values in the same way, callables that are pytrees of their numbers, and any number
of an optimizer may be one. So are monitors, pairs `(init, update)` over a metric.

The trick applies once, where a user calls `update` (`jgd.door`). Behind that door the bodies of
jgd's own factories call one another as plain functions, and what they return are plain pairs.
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
    How,
    NumberKind,
    NumbersKind,
    StructureKind,
    concrete_scalar,
    exact_scalar,
    scalar,
)
from jgd.calls import NEEDS_A_VALUE, NONE, Spec, extended, name_structure, plainly, running
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
    """What transformations, schedules and monitors share as values of a call."""

    _call: Call

    @classmethod
    def of_call(cls, spec: Spec, args: Iterable[Any]) -> Self:
        """Return the value of a call in its stored form. JAX unflattens with it: no checks."""
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
            f"{self._call.spec.name} is immutable: use tx._replace({name}=...) for another number"
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
    """A gradient transformation that is a pytree of its numbers: what jgd's factories return.

    An ordinary `(init, update)` pair to optax. Its arguments are attributes (`tx.learning_rate`),
    `tx._replace(learning_rate=...)` is the same optimizer with other numbers.
    """

    @classmethod
    def of_call(cls, spec: Spec, args: Iterable[Any]) -> Self:
        call = Call(spec, tuple(args))
        self = tuple.__new__(cls, (call.init, call.update))
        object.__setattr__(self, "_call", call)
        return self

    def _replace(self, **changes: Any) -> Any:
        if changes and {"init", "update"}.issuperset(changes):  # no longer a call of the factory
            pair = optax.GradientTransformationExtraArgs(self.init, self.update)
            return pair._replace(**changes)
        return self._replaced(changes)


class Schedule(_Value):
    """A function of the step that is a pytree of its numbers: what jgd's schedules return."""

    @classmethod
    def of_call(cls, spec: Spec, args: Iterable[Any]) -> Self:
        self = object.__new__(cls)
        self._call = Call(spec, tuple(args))
        return self

    def __call__(self, step: Any) -> jax.Array:
        """Return the value at a step: an integer, a traced one, or an array of steps."""
        spec, args = self._call.spec, self._call.args
        try:
            with np.errstate(all="ignore"):
                with plainly(spec.own):
                    schedule = spec.body(args, How(concrete_scalar if spec.own else scalar))
                value = schedule(step)
            # a user's function may return NumPy's float64 for NumPy's scalars
            return jnp.asarray(value, float) if spec.own else value
        except NEEDS_A_VALUE as error:
            name_structure(error, spec, args, lambda schedule: schedule(step))
            raise

    def _replace(self, **changes: Any) -> Self:
        return self._replaced(changes)


class MonitorPair(NamedTuple):
    """A pair that decides from one number after another, such as a loss."""

    init: Callable[..., Any]  # what to start from, such as a learning rate -> state
    update: Callable[[Any, Any], tuple[Any, Any]]  # (metric, state) -> (decision, state)


class Monitor(_Value, MonitorPair):
    """A pair over a metric that is a pytree of its numbers: what jgd's callbacks return."""

    @classmethod
    def of_call(cls, spec: Spec, args: Iterable[Any]) -> Self:
        call = Call(spec, tuple(args))
        label = lambda name: f"{spec.name}: {name}"

        def pair() -> MonitorPair:
            # outside jit decimals keep their digits until they are compared
            return spec.body(call.args, How(exact_scalar))

        def init(*start: Any, **named: Any) -> Any:
            named = {name: scalar(label(name), x) for name, x in named.items()}
            return pair().init(*(scalar(label("the start"), x) for x in start), **named)

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
    """Return the factory and the arguments behind a value."""
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
    """Make the results of a factory pytrees of their numbers.

        lion = jgd.as_pytree(optax.lion)
        jax.vmap(lion)(jnp.logspace(-5, -2, 32))                     # 32 lanes of optax's Lion
        adafactor = jgd.as_pytree(optax.adafactor, structure=["min_dim_size_to_factor"])

    Args:
      factory: a function that returns an optax transformation, a pair `(init, update)`, a
        schedule (a function of the step) or, annotated as such, a `MonitorPair`.
        Which of its parameters are numbers is read from their annotations (jgd's own kinds, or
        optax's), their defaults and positions: bools, strings, dtypes, masks, random keys, required
        functions and everything after `*` are structure, what else comes before `*` are numbers.
      structure: names of parameters that are structure all the same, for example an int that
        decides about shapes, or a number on which the factory branches in Python.
      numbers: names of parameters after `*` that are numbers all the same.
      check: called with each value in the user's call; raises for arguments that do not go
        together. Numbers may be traced there.
      widen: False hands parameters to the factory as they are, for a wrapper that needs their
        dtype; the gradients are float32 all the same.

    Returns:
      A function with the signature and docstring of `factory`. Called, it gives a `Transformation`,
      a `Schedule` or a `Monitor`. Python and NumPy scalars are kept as `np.float64`, arrays and
      tracers as float32; inside `init` and `update` each is a float32 scalar (all float64 under
      x64). Step counts given as integers become floats as well, exact up to 2^24. 16-bit and
      integer leaves of updates and parameters are handed to the factory as float32, and the updates
      come back in the wider of the precisions of gradients and parameters. A number of a
      transformation may be a schedule: then the state carries one step counter. Inside the body of
      `factory`, calls of jgd's factories return values as everywhere else. Programs of `jax.export`
      take them as arguments (`jgd.exporting`).

    Raises:
      TypeError: in the call, for an argument of another kind (`adam("0.1")`, `adam(True)`,
        `adam(optax.sgd(0.1))`); in `init` and `update`, for a number that has an axis, or one that
        the factory branches on.
      ValueError: in the call, for a concrete number out of its range; in `update`, where trees or
        shapes do not match (`TreeError`, which names the optimizer and the leaf's path).

    Differs from: `optax.inject_hyperparams`, which keeps the numbers in the state. Note that
    `optax.chain` hides the leaves of what it holds; `jgd.chain` keeps them.
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
        if running.get() is NONE:
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
    """Return whether a number of the call follows a schedule, and needs a count of its own."""
    named = [*zip(spec.names, args, strict=False), *kwargs.items()]
    return any(
        callable(arg) and isinstance(kind := spec.kinds[name], NumberKind) and not kind.lazy
        for name, arg in named
    )


def _check_body(value: Any) -> None:
    """Run the checks in the body of a schedule or monitor, in the user's call."""
    call: Call = value._call
    if call.scheduled and not any(isinstance(kind, NumbersKind) for kind in call.scheduled):
        what = type(value).__name__.lower()
        raise TypeError(f"{call.spec.name}: a number of a {what} cannot be a schedule itself")
    if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(call.args)):
        call.spec.body(call.args, How(lambda label, number: number))


def _class_of(spec: Spec, args: tuple[Any, ...]) -> type[Any]:
    """Return the class of a factory's values: by its annotation, or by a trial."""
    if isinstance(spec.returns, type) and issubclass(spec.returns, optax.GradientTransformation):
        return Transformation
    if spec.returns is MonitorPair:
        return Monitor
    if typing.get_origin(spec.returns) is collections.abc.Callable:
        return Schedule
    first = lambda x: jnp.ravel(x)[0] if isinstance(x, np.ndarray | jax.Array) else x
    number = lambda label, x: scalar(label, first(x))
    try:
        with plainly(own=False):
            result = spec.body(args, How(number, step=jnp.zeros([], jnp.int32)))
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
