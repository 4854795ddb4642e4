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
"""

import collections.abc
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, ParamSpec, overload

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jgd.arguments import NUMERIC, Spec, Static, is_one_of, is_schedule, scalar, unwrap

__all__ = [
    "Monitor",
    "MonitorPair",
    "Schedule",
    "ScheduledState",
    "SteppedState",
    "Transformation",
    "TreeError",
    "as_pytree",
    "lane",
    "stack",
]

P = ParamSpec("P")


class TreeError(ValueError):
    """Updates, state and parameters that do not fit; says which optimizer was asked, and where."""

    def __init__(self, detail: str, optimizer: str = "") -> None:
        super().__init__(f"{optimizer}: {detail}" if optimizer else detail)
        self.detail = detail


# --- values ----------------------------------------------------------------------------------


class SteppedState(NamedTuple):
    """State of a value with a scheduled number whose own state has a `count` already."""

    step: jax.Array  # int32 scalar: updates so far
    inner: Any


class ScheduledState(NamedTuple):
    """State of a value with a scheduled number and no `count` of its own."""

    count: jax.Array  # int32 scalar: updates so far
    inner: Any


class _Call:
    """A factory and its arguments; the closures are built anew whenever they are needed."""

    def __init__(self, spec: Spec, args: tuple[Any, ...]) -> None:
        self.spec = spec
        self.args = args

    @functools.cached_property
    def key(self) -> Any:
        """Equality and hash: by value where concrete, by identity where traced."""
        leaves, structure = jax.tree.flatten(self.args)
        return self.spec, structure, tuple(map(_leaf_key, leaves))

    @property
    def scheduled(self) -> bool:
        """Whether a number, alone or among several, follows a schedule."""
        return any(
            is_schedule(number)
            for kind, arg in zip(self.spec.kinds.values(), self.args, strict=True)
            if kind.name in ("number", "numbers") and not kind.lazy
            for number in jax.tree.leaves(arg, is_leaf=is_one_of)
        )

    def transformation(self, step: Any = None) -> optax.GradientTransformationExtraArgs:
        pair = self.spec.call(self.args, step)
        if not isinstance(pair, optax.GradientTransformation):
            pair = optax.GradientTransformation(*pair)
        return optax.with_extra_args_support(pair)

    def init(self, params: Any) -> Any:
        params = jax.tree.map(_widen, params)
        step: Any = jnp.zeros([], jnp.int32) if self.scheduled else None
        try:
            inner = self.transformation(step).init(params)
        except TreeError as error:
            raise TreeError(error.detail, self.spec.name) from None
        if step is None:
            return inner
        counted = optax.tree.get_all_with_path(inner, "count")
        return (SteppedState if counted else ScheduledState)(step, inner)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        step: Any = None
        inner = state
        try:
            if self.scheduled:
                if not isinstance(state, SteppedState | ScheduledState):
                    raise TreeError(
                        f"this is the state of another optimizer: {type(state).__name__}, wanted"
                        " that of a scheduled number"
                    )
                step, inner = state
            new_updates, new_inner = self.transformation(step).update(
                jax.tree.map(_widen, updates), inner, jax.tree.map(_widen, params), **extra
            )
        except TreeError as error:
            raise TreeError(error.detail, self.spec.name) from None
        # updates that come in pairs, as the parameters of a lookahead, have the dtypes of those
        like = updates if _alike(new_updates, updates) else params
        new_updates = _map_if_alike(_narrow, new_updates, like)
        new_inner = _map_if_alike(_keep_dtype, new_inner, inner)
        if not self.scheduled:
            return new_updates, new_inner
        count: Any = optax.safe_increment(step)
        return new_updates, type(state)(count, new_inner)


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


_WIDE = frozenset(map(jnp.dtype, ("float32", "float64", "complex64", "complex128")))


def _float_bits(x: Any) -> int | None:
    dtype = jnp.result_type(x)
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.inexact) else None


def _widen(leaf: Any) -> Any:
    """16-bit and integer leaves as float32: arithmetic and accumulators are at least that."""
    if isinstance(leaf, jax.Array) and leaf.dtype in _WIDE:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):  # `init` needs no more than shapes
        wide = leaf.dtype if leaf.dtype in _WIDE else jnp.zeros([], float).dtype
        return jax.ShapeDtypeStruct(leaf.shape, wide, sharding=leaf.sharding)
    dtype = jnp.result_type(leaf)
    if dtype == jax.dtypes.float0:  # the gradient of an integer
        return jnp.zeros(np.shape(leaf), float)
    if jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_):
        return jnp.asarray(leaf, float)
    return jnp.asarray(leaf) if dtype in _WIDE else jnp.asarray(leaf, jnp.float32)


def _narrow(new: Any, old: Any) -> Any:
    """An update in the precision of the gradient it came from."""
    if isinstance(new, jax.Array) and new.dtype == getattr(old, "dtype", None):
        return new
    bits = _float_bits(old)
    if bits is None or bits == _float_bits(new):
        return new
    if jnp.iscomplexobj(new) == jnp.iscomplexobj(old):
        return jnp.asarray(new, jnp.result_type(old))
    return jnp.asarray(new, {32: jnp.float32, 64: jnp.float64}[bits])


def _keep_dtype(new: Any, old: Any) -> Any:
    if isinstance(new, jax.Array) and new.dtype == getattr(old, "dtype", None):
        return new
    dtype = jnp.result_type(old)
    return new if jnp.result_type(new) == dtype else jnp.asarray(new, dtype)


def _alike(new: Any, old: Any) -> bool:
    return jax.tree.structure(new) == jax.tree.structure(old)


def _map_if_alike(f: Callable[[Any, Any], Any], new: Any, old: Any) -> Any:
    return jax.tree.map(f, new, old) if _alike(new, old) else new


class _Value:
    """What transformations and schedules share as values of a call."""

    _call: _Call

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and self._call.key == other._call.key)  # type: ignore[attr-defined]

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
        shown = []
        for (name, parameter), arg in zip(
            self._call.spec.signature.parameters.items(), self._call.args, strict=True
        ):
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                shown.extend(map(_show, arg))
            elif self._call.spec.kinds[name].name != "structure" or (
                arg is not None and arg != Static(parameter.default)
            ):
                shown.append(f"{name}={_show(arg)}")
        return f"{self._call.spec.name}({', '.join(shown)})"

    def __reduce__(self) -> Any:
        return type(self)._of, (self._call.spec, self._call.args)

    def _replaced(self, changes: dict[str, Any]) -> Any:
        spec = self._call.spec
        unknown = set(changes).difference(spec.kinds)
        if unknown:
            raise ValueError(f"{spec.name} has no argument {', '.join(sorted(unknown))}")
        args = tuple(
            spec.admit(name, changes[name]) if name in changes else arg
            for name, arg in zip(spec.names, self._call.args, strict=True)
        )
        new = self._of(spec, args)
        if spec.check is not None:
            spec.check(new)
        return new

    @classmethod
    def _of(cls, spec: Spec, args: Iterable[Any]) -> Any:
        raise TypeError


def _show(arg: Any) -> str:
    if isinstance(arg, jax.core.Tracer) or (hasattr(arg, "dtype") and np.ndim(arg) > 0):
        return f"{arg.dtype}[{','.join(map(str, arg.shape))}]"  # type: ignore[union-attr]
    if isinstance(arg, np.number | np.ndarray | jax.Array):
        return repr(float(arg))
    if type(arg) is list:
        return f"[{', '.join(map(_show, arg))}]"
    if type(arg) is tuple:
        return f"({', '.join(map(_show, arg))}{',' * (len(arg) == 1)})"
    if isinstance(arg, dict):
        return "{" + ", ".join(f"{key!r}: {_show(item)}" for key, item in arg.items()) + "}"
    return repr(arg)


class Transformation(_Value, optax.GradientTransformationExtraArgs):
    """A gradient transformation that is a pytree of its numbers: what jgd's factories return.

    An ordinary `(init, update)` pair to optax. Its arguments are attributes (`tx.learning_rate`),
    `tx._replace(learning_rate=...)` is the same optimizer with other numbers.
    """

    @classmethod
    def _of(cls, spec: Spec, args: Iterable[Any]) -> "Transformation":
        call = _Call(spec, tuple(args))
        self = tuple.__new__(cls, (call.init, call.update))
        self._call = call
        return self

    def _replace(self, **changes: Any) -> Any:  # type: ignore[override]
        if changes and {"init", "update"}.issuperset(changes):  # no longer a call of the factory
            pair = optax.GradientTransformationExtraArgs(self.init, self.update)
            return pair._replace(**changes)
        return self._replaced(changes)


class Schedule(_Value):
    """A function of the step that is a pytree of its numbers: what jgd's schedules return."""

    @classmethod
    def _of(cls, spec: Spec, args: Iterable[Any]) -> "Schedule":
        self = object.__new__(cls)
        self._call = _Call(spec, tuple(args))
        return self

    def __call__(self, step: Any) -> jax.Array:
        """The value at a step: an integer, a traced one, or an array of steps."""
        return self._call.spec.call(self._call.args)(step)

    def _replace(self, **changes: Any) -> Any:
        return self._replaced(changes)


class MonitorPair(NamedTuple):
    """What decides from one number after another, such as a loss: a monitor's factory makes it."""

    init: Callable[..., Any]  # what to start from, such as a learning rate -> state
    update: Callable[[Any, Any], tuple[Any, Any]]  # (metric, state) -> (decision, state)


class Monitor(_Value, MonitorPair):
    """A pair over a metric that is a pytree of its numbers: what jgd's callbacks return."""

    @classmethod
    def _of(cls, spec: Spec, args: Iterable[Any]) -> "Monitor":
        call = _Call(spec, tuple(args))

        def number(name: str, x: Any) -> Any:
            # outside jit decimals keep their digits until they are compared
            return x if isinstance(x, np.float64) else scalar(spec.name, name, x)

        def pair() -> MonitorPair:
            return spec.call(call.args, exact=True)

        def init(*start: Any, **named: Any) -> Any:
            named = {name: scalar(spec.name, name, x) for name, x in named.items()}
            return pair().init(*(scalar(spec.name, "the start", x) for x in start), **named)

        def update(metric: Any, state: Any) -> tuple[Any, Any]:
            metric = np.float64(metric) if isinstance(metric, float | int | np.number) else metric
            try:
                return pair().update(number("metric", metric), state)
            except TreeError as error:
                raise TreeError(error.detail, spec.name) from None

        self = tuple.__new__(cls, (init, update))
        self._call = call
        return self

    def _replace(self, **changes: Any) -> Any:  # type: ignore[override]
        return self._replaced(changes)


def _flatten(value: Any) -> tuple[tuple[Any, ...], Spec]:
    return value._call.args, value._call.spec


def _flatten_with_keys(value: Any) -> Any:
    args, spec = _flatten(value)
    keys = map(jax.tree_util.GetAttrKey, spec.names)
    return tuple(zip(keys, args, strict=True)), spec


for _class in (Transformation, Schedule, Monitor):
    jax.tree_util.register_pytree_with_keys(_class, _flatten_with_keys, _class._of, _flatten)


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
      then the state carries one step counter.

    Raises:
      TypeError: in the call, for an argument of another kind (`adam("0.1")`, `adam(True)`,
        `adam(optax.sgd(0.1))`); in `init` and `update`, for a number that has an axis.
      ValueError: in the call, for a concrete number out of its range; in `update`, where trees or
        shapes do not fit (`TreeError`, which names the optimizer and the leaf's path).

    Differs from: `optax.inject_hyperparams`, which keeps the numbers in the state. Note that
    `optax.chain` hides the leaves of what it holds; `jgd.chain` keeps them.
    """
    if factory is None:
        return functools.partial(as_pytree, structure=structure, numbers=numbers, check=check)
    spec = Spec(factory, structure, numbers, check)
    value_class: list[type[Any]] = []

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = spec.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{spec.name}: {error}") from None
        bound.apply_defaults()
        admitted = tuple(spec.admit(name, value) for name, value in bound.arguments.items())
        if not value_class:
            value_class.append(_returns(spec, admitted))
        value = value_class[0]._of(spec, admitted)
        if isinstance(value, Schedule | Monitor):
            _check(value)
        if check is not None:
            check(value)
        return value

    spec.decorated = call
    call.__jgd_spec__ = spec  # type: ignore[attr-defined]
    return call


def _check(value: Schedule | Monitor) -> None:
    """The checks in the body of such a value, in the user's call, on concrete numbers."""
    call = value._call
    kinds = call.spec.kinds.values()
    pairs = zip(kinds, call.args, strict=True)
    if any(kind.name == "number" and is_schedule(arg) for kind, arg in pairs):
        what = type(value).__name__.lower()
        raise TypeError(f"{call.spec.name}: a number of a {what} cannot be a schedule itself")
    if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(call.args)):
        call.spec.validate(call.args)


def _returns(spec: Spec, args: tuple[Any, ...]) -> type[Any]:
    """What the factory gives: by its annotation, or by trying."""
    if isinstance(spec.returns, type) and issubclass(spec.returns, optax.GradientTransformation):
        return Transformation
    if spec.returns is MonitorPair:
        return Monitor
    if typing.get_origin(spec.returns) is collections.abc.Callable:
        return Schedule
    first = lambda x: jnp.ravel(x)[0] if isinstance(x, np.ndarray | jax.Array) else x
    kinds = spec.kinds.values()
    probe = [
        jax.tree.map(first, arg) if kind.name == "number" else arg
        for kind, arg in zip(kinds, args, strict=True)
    ]
    result = spec.call(tuple(probe), step=jnp.zeros([], jnp.int32))
    if isinstance(result, tuple) and len(result) == 2:
        return Transformation
    if callable(result):
        return Schedule
    raise TypeError(
        f"{spec.name} returns {type(result).__name__}: neither a transformation, nor a pair (init,"
        " update), nor a schedule"
    )


# --- batches of values -----------------------------------------------------------------------


def stack(settings: Sequence[Any]) -> Any:
    """Settings of one structure as lanes: each leaf gets a leading axis of `len(settings)`.

    Args:
      settings: optimizers (or any pytrees of numbers) that differ in their numbers only.

    Raises:
      ValueError: if there are none, or their structures differ: those are groups, not lanes.
    """
    if not settings:
        raise ValueError("stack: needs at least one setting")
    for setting in settings:
        refuse_functions(setting)
    structures = [jax.tree.structure(setting) for setting in settings]
    for index, structure in enumerate(structures):
        if structure != structures[0]:
            raise ValueError(
                f"stack: setting {index} has another structure than setting 0:\n"
                f"  {settings[index]!r}\n  {settings[0]!r}\n"
                "Lanes share one program: stack settings of one structure and sweep the others as "
                "a group of their own; lift links of optax with jgd.as_pytree, so that their "
                "numbers are leaves, and give all lanes the same function objects"
            )
    return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x, float) for x in xs]), *settings)


def refuse_functions(setting: Any) -> None:
    """Raise TypeError for a setting whose leaves are functions, such as an optimizer of optax."""
    if any(map(callable, jax.tree.leaves(setting))):
        raise TypeError(
            "this setting hides its numbers in functions: lift a factory of optax with"
            " jgd.as_pytree, as in jgd.as_pytree(optax.lion)(1e-4), and put links together with"
            " jgd.chain instead of optax.chain"
        )


def lane(lanes: Any, index: int) -> Any:
    """Lane `index` of a batch: each leaf without its leading axis. The inverse of `stack`."""
    leaves = jax.tree.leaves(lanes)
    if leaves and not -len(leaves[0]) <= index < len(leaves[0]):
        raise IndexError(f"lane {index} of {len(leaves[0])} lanes")
    return jax.tree.map(lambda x: x[index], lanes)
