"""The door: where a user calls `init` and `update` of a factory's call.

    call = Call(spec, stored)             # a factory and its arguments
    call.update(updates, state, params)   # in float32 at least; errors name the optimizer

There numbers become scalars, schedules their values at this step, and 16-bit leaves float32. The
updates come back in their own precision. Behind the door, links of jgd's own are plain pairs: one
door is enough. If a link needs the dtypes of the parameters, the parameters pass as they are, and
each link has a door of its own.
"""

import contextlib
import functools
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jgd.arguments import (
    How,
    Kind,
    LinkKind,
    NumberKind,
    NumbersKind,
    concrete_scalar,
    scalar,
)
from jgd.calls import NEEDS_A_VALUE, Spec, extended, name_structure, plainly
from jgd.dtypes import alike, has_16_bits, narrowed, wide
from jgd.exporting import register_states
from jgd.nodes import NUMERIC, held_by, is_entry, is_schedule, unwrap
from jgd.sharding import placed
from jgd.trees import StateError, TreeError, like, other_state

__all__ = ["Call", "ScheduledState", "SteppedState"]


class SteppedState(NamedTuple):
    """State of a value with a scheduled number whose own state has a `count` already."""

    step: jax.Array  # int32 scalar: updates so far
    inner: optax.OptState


class ScheduledState(NamedTuple):
    """State of a value with a scheduled number and no `count` of its own."""

    count: jax.Array  # int32 scalar: updates so far
    inner: optax.OptState


# --- links, behind the door ------------------------------------------------------------------


def _enter(link: Any) -> Any:
    """Return a link of jgd's own without schedules as a plain pair: one door is enough."""
    link = unwrap(link)
    call = _call_behind(link)
    return link if call is None or not call.spec.own or call.scheduled else call.pair()


def _enter_by_its_door(link: Any) -> Any:
    """Return a link of a call whose door passes parameters as they are.

    Links of jgd have doors of their own. A foreign link gets float32, unless it needs the dtypes.
    """
    link = unwrap(link)
    if _call_behind(link) is not None or not _widens(link):
        return link
    tx = extended(link)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return tx.update(updates, state, wide(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(wide(params)), update)


def _widens(link: Any) -> bool:
    """Return whether a link accepts float32 parameters: nothing in it needs their own dtype."""
    if (call := _call_behind(link := unwrap(link))) is not None:
        return call.widens
    for function in link:
        for held in (function, *held_by(function, is_leaf=_is_value)):
            call = _call_behind(held) or getattr(held, "__self__", None)
            if isinstance(call, Call) and not call.widens:
                return False
    return True


def _call_behind(x: Any) -> "Call | None":
    """Return the call that a transformation of jgd is made of; None for anything else."""
    call = getattr(x, "_call", None)
    return call if isinstance(call, Call) and isinstance(x, tuple) else None


def _is_value(x: Any) -> bool:
    return _call_behind(x) is not None


def _is_link(x: Any) -> bool:
    return isinstance(unwrap(x), optax.GradientTransformation)


# --- calls -----------------------------------------------------------------------------------


class Call:
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

    @functools.cached_property
    def widens(self) -> bool:
        """True if parameters become float32 at this door: no link behind it needs their dtype."""
        if not self.spec.widen:
            return False
        pairs = zip(self.spec.kinds.values(), self.args, strict=True)
        links = [arg for kind, arg in pairs if isinstance(kind, LinkKind)]
        links = jax.tree.leaves(links, is_leaf=_is_link)
        if not self.spec.own:  # the body of a user's factory may build such a link
            links.append(self.pair(jnp.zeros([], jnp.int32)))
        return all(map(_widens, links))

    def pair(self, step: Any = None) -> optax.GradientTransformationExtraArgs:
        """Run the body, with schedules at `step`."""
        own = self.spec.own
        moving = any(isinstance(kind, NumberKind) and kind.decay for kind in self.scheduled)
        how = How(scalar, step=step)
        if own:
            how = How(concrete_scalar, _enter if self.widens else _enter_by_its_door, step)
        positional, keywords = self.spec.resolve(self.args, how)  # schedules are a user's functions
        with plainly(own, moving):
            return extended(self.spec.factory(*positional, **keywords))

    def init(self, params: optax.Params) -> optax.OptState:
        step = jnp.zeros([], jnp.int32) if self.scheduled else None
        with self._door(lambda pair: pair.init(wide(params)), params):
            inner = self.pair(step).init(wide(params) if self.widens else params)
        state = placed(inner, params)
        if step is not None:
            counted = optax.tree.get_all_with_path(inner, "count")
            state = (SteppedState if counted else ScheduledState)(step, state)
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
        again = lambda pair: pair.update(wide(updates), inner, wide(params), **extra)
        with self._door(again, params):
            if self.scheduled:
                if not isinstance(state, SteppedState | ScheduledState):
                    raise other_state("the state of a scheduled number", state)
                step, inner = state
            given = wide(params) if self.widens else params
            new, new_inner = self.pair(step).update(wide(updates), inner, given, **extra)
        new = narrowed(new, updates, params)
        if not self.spec.own and alike(new_inner, inner):
            new_inner = like(new_inner, inner)
        if not isinstance(state, SteppedState | ScheduledState) or not self.scheduled:
            return new, new_inner
        count: Any = optax.safe_increment(step)
        return new, type(state)(count, new_inner)

    @contextlib.contextmanager
    def _door(self, use: Callable[[Any], Any], params: Any) -> Generator[None]:
        """Give errors the name of this optimizer; NumPy's scalars overflow as JAX's do."""
        outer, theirs = _widened.get()
        token = _widened.set((self.spec.name, params))
        try:
            with np.errstate(all="ignore"):
                if not self.widens:
                    _widened.set((self.spec.name, None))
                    if any(map(has_16_bits, jax.tree.leaves(theirs))):
                        raise TypeError(
                            f"{self.spec.name}: params must have their own dtypes, got float32 in"
                            f" place of 16 bits from {outer}, which cannot see a link in another"
                            f" function. Put {self.spec.name} around {outer}, or use jgd.chain"
                        )
                yield
        except TreeError as error:
            hint = _OTHER_OPTIMIZER if isinstance(error, StateError) else ""
            raise TreeError(error.detail + hint, self.spec.name) from None
        except NEEDS_A_VALUE as error:
            name_structure(error, self.spec, self.args, use)
            raise
        finally:
            _widened.reset(token)


# The name of the door that made the parameters float32, and the parameters before it: a link inside
# a user's function may need their dtypes.
_widened = ContextVar[tuple[str, Any]]("widened", default=("", None))

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
