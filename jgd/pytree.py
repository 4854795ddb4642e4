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

The trick applies once, at the door: where a user calls `update`. There numbers become scalars,
16-bit leaves float32, and errors get the name of the optimizer. Behind it the bodies of jgd's own
factories call one another as plain functions, and what they return are plain pairs.
"""

import collections.abc
import contextlib
import functools
import inspect
import typing
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple, ParamSpec, Self, overload

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jgd.arguments import (
    How,
    Kind,
    NumberKind,
    NumbersKind,
    StructureKind,
    concrete_scalar,
    exact_scalar,
    scalar,
)
from jgd.calls import NEEDS_A_VALUE, NONE, Spec, extended, name_structure, plainly, running
from jgd.dtypes import alike, narrowed, wide
from jgd.exporting import register_factory, register_states, register_value
from jgd.nodes import NUMERIC, brief, is_entry, is_schedule, show, unwrap
from jgd.trees import StateError, TreeError, like, other_state

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


class SteppedState(NamedTuple):
    """State of a value with a scheduled number whose own state has a `count` already."""

    step: jax.Array  # int32 scalar: updates so far
    inner: optax.OptState


class ScheduledState(NamedTuple):
    """State of a value with a scheduled number and no `count` of its own."""

    count: jax.Array  # int32 scalar: updates so far
    inner: optax.OptState


# --- plain pairs, behind the door ------------------------------------------------------------


def _enter(link: Any) -> Any:
    """Return a link of jgd's own without schedules as a plain pair: one door is enough."""
    link = unwrap(link)
    if not isinstance(link, Transformation):
        return link
    call = call_of(link)
    return call.pair() if call.spec.own and not call.scheduled else link


# --- values ----------------------------------------------------------------------------------


class _Call:
    """A factory and its arguments. The body runs anew whenever its pair is needed."""

    def __init__(self, spec: Spec, args: tuple[Any, ...]) -> None:
        self.spec = spec
        self.args = args

    @functools.cached_property
    def key(self) -> Any:
        """Equality and hash: by value where concrete, by identity where traced."""
        leaves, structure = jax.tree.flatten(self.args)
        return self.spec, structure, tuple(map(_leaf_key, leaves))

    @functools.cached_property
    def scheduled(self) -> tuple[Kind, ...]:
        """The kinds of the numbers that follow a schedule, alone or among several."""
        found: list[Kind] = []
        for kind, arg in zip(self.spec.kinds.values(), self.args, strict=True):
            if isinstance(kind, NumberKind) and not kind.lazy and is_schedule(arg):
                found.append(kind)
            if isinstance(kind, NumbersKind):
                several = jax.tree.leaves(arg, is_leaf=is_entry)
                found.extend(kind for one in several if is_schedule(one))
        return tuple(found)

    def pair(self, step: Any = None) -> optax.GradientTransformationExtraArgs:
        """Run the body, with schedules at `step`."""
        own = self.spec.own
        moving = any(isinstance(kind, NumberKind) and kind.decay for kind in self.scheduled)
        how = How(concrete_scalar, _enter, step) if own else How(scalar, step=step)
        positional, keywords = self.spec.resolve(self.args, how)  # schedules are a user's functions
        with plainly(own, moving):
            return extended(self.spec.factory(*positional, **keywords))

    def init(self, params: optax.Params) -> optax.OptState:
        step = jnp.zeros([], jnp.int32) if self.scheduled else None
        use = lambda pair: pair.init(wide(params))
        with self._door(use):
            inner = use(self.pair(step))
        state = inner
        if step is not None:
            counted = optax.tree.get_all_with_path(inner, "count")
            state = (SteppedState if counted else ScheduledState)(step, inner)
        register_states(state)
        return state

    def update(
        self,
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        step: Any = None
        inner: Any = state
        with self._door(lambda pair: pair.update(wide(updates), inner, wide(params), **extra)):
            if self.scheduled:
                if not isinstance(state, SteppedState | ScheduledState):
                    raise other_state("the state of a scheduled number", state)
                step, inner = state
            new, new_inner = self.pair(step).update(wide(updates), inner, wide(params), **extra)
        new = narrowed(new, updates, params)
        if not self.spec.own and alike(new_inner, inner):
            new_inner = like(new_inner, inner)
        if not isinstance(state, SteppedState | ScheduledState) or not self.scheduled:
            return new, new_inner
        count: Any = optax.safe_increment(step)
        return new, type(state)(count, new_inner)

    @contextlib.contextmanager
    def _door(self, use: Callable[[Any], Any]) -> Generator[None]:
        """Give errors the name of this optimizer; NumPy's scalars overflow as JAX's do."""
        try:
            with np.errstate(all="ignore"):
                yield
        except TreeError as error:
            hint = _OTHER_OPTIMIZER if isinstance(error, StateError) else ""
            raise TreeError(error.detail + hint, self.spec.name) from None
        except NEEDS_A_VALUE as error:
            name_structure(error, self.spec, self.args, use)
            raise


_OTHER_OPTIMIZER = (
    ". Was it created by another optimizer? jgd.compat.optax.state_from(state, tx) converts states"
    " of optax and of jgd 0.1"
)


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        return id(leaf)
    if isinstance(leaf, NUMERIC):
        return np.shape(leaf), np.asarray(leaf, np.float64).tobytes()
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return leaf


# --- transformations, schedules, monitors ----------------------------------------------------


class _Value:
    """What transformations, schedules and monitors share as values of a call."""

    _call: _Call

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
        call = _Call(spec, tuple(args))
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
        self._call = _Call(spec, tuple(args))
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
        call = _Call(spec, tuple(args))
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


def call_of(value: Any) -> _Call:
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
) -> Callable[P, Any]: ...
@overload
def as_pytree(
    *,
    structure: Iterable[str] = (),
    numbers: Iterable[str] = (),
    check: Callable[[Any], None] | None = None,
) -> Callable[[Callable[P, Any]], Callable[P, Any]]: ...
def as_pytree(
    factory: Any = None,
    *,
    structure: Iterable[str] = (),
    numbers: Iterable[str] = (),
    check: Callable[[Any], None] | None = None,
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

    Returns:
      A function with the signature and docstring of `factory`. Called, it gives a `Transformation`,
      a `Schedule` or a `Monitor`. Python and NumPy scalars are kept as `np.float64`, arrays and
      tracers as float32; inside `init` and `update` each is a float32 scalar (all float64 under
      x64). Step counts given as integers become floats as well, exact up to 2^24. 16-bit and
      integer leaves of updates and parameters are handed to the factory as float32, and the updates
      come back in the precision of the gradients. A number of a transformation may be a schedule:
      then the state carries one step counter. Inside the body of `factory`, calls of jgd's
      factories return values as everywhere else. A program that `jax.export` writes to a file takes
      them as arguments (`jgd.exporting`).

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
        return functools.partial(as_pytree, structure=structure, numbers=numbers, check=check)
    spec = Spec(factory, structure, numbers, check)
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
    call: _Call = value._call
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
