"""The door of a transformation: it converts the arguments when a user calls `init` and `update`.

    call = Call(spec, stored)             # a factory and its arguments
    call.update(updates, state, params)   # in float32 at least; errors name the optimizer

At the door, numbers become scalars, schedules become their values at this step, and 16-bit leaves
become float32. The returned updates have their original precision. One door is enough, so jgd's
own links behind it are plain pairs. If a link needs the dtypes of the parameters, the door passes
the parameters unchanged, and each link has a door of its own.
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
    Kind,
    LinkKind,
    NumberKind,
    NumbersKind,
    Resolver,
    concrete_scalar,
    scalar,
)
from jgd.calls import NEEDS_A_VALUE, Spec, extended, factory_body, name_structure
from jgd.dtypes import has_16_bits, narrow, same_structure, widen
from jgd.exporting import register_states
from jgd.nodes import NUMERIC, captured_by, is_entry, is_schedule, unwrap
from jgd.sharding import shard_like_params
from jgd.trees import StateError, TreeError, like, wrong_state

__all__ = ["Call", "ScheduledState", "SteppedState"]


class SteppedState(NamedTuple):
    """State of an optimizer with a scheduled number, if its own state has a `count` already."""

    step: jax.Array  # int32 scalar: updates so far
    inner: optax.OptState


class ScheduledState(NamedTuple):
    """State of an optimizer with a scheduled number, if its own state has no `count`."""

    count: jax.Array  # int32 scalar: updates so far
    inner: optax.OptState


# --- links, behind the door ------------------------------------------------------------------


def _enter(link: Any) -> Any:
    """Return a link, as a plain pair if it is jgd's own without schedules: one door is enough."""
    link = unwrap(link)
    call = _call_behind(link)
    return link if call is None or not call.spec.own or call.scheduled else call.pair()


def _enter_by_its_door(link: Any) -> Any:
    """Return a link of a call whose door passes parameters unchanged.

    Links of jgd have doors of their own. A foreign link receives float32 parameters, unless a
    transformation in it needs their dtypes.
    """
    link = unwrap(link)
    if _call_behind(link) is not None or not _widens(link):
        return link
    tx = extended(link)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return tx.update(updates, state, widen(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(widen(params)), update)


def _widens(link: Any) -> bool:
    """Return whether a link accepts float32 parameters: nothing in it needs their dtypes."""
    if (call := _call_behind(link := unwrap(link))) is not None:
        return call.widens
    for function in link:
        for x in (function, *captured_by(function, is_leaf=_is_value)):
            call = _call_behind(x) or getattr(x, "__self__", None)
            if isinstance(call, Call) and not call.widens:
                return False
    return True


def _call_behind(x: Any) -> "Call | None":
    """Return the call behind a transformation of jgd; None for anything else."""
    call = getattr(x, "_call", None)
    return call if isinstance(call, Call) and isinstance(x, tuple) else None


def _is_value(x: Any) -> bool:
    return _call_behind(x) is not None


def _is_link(x: Any) -> bool:
    return isinstance(unwrap(x), optax.GradientTransformation)


# --- calls -----------------------------------------------------------------------------------


class Call:
    """A factory and its stored arguments. Its body runs each time the pair is needed."""

    def __init__(self, spec: Spec, args: tuple[Any, ...]) -> None:
        self.spec = spec
        self.args = args

    @functools.cached_property
    def key(self) -> Any:
        """The key for equality and hash: concrete numbers by value, traced ones by identity."""
        leaves, structure = jax.tree.flatten(self.args)
        return self.spec, structure, tuple(map(_leaf_key, leaves))

    @functools.cached_property
    def scheduled(self) -> tuple[Kind, ...]:
        """The kinds of the arguments that are a schedule, one entry for each schedule."""
        kinds: list[Kind] = []
        for kind, arg in zip(self.spec.kinds.values(), self.args, strict=True):
            if isinstance(kind, NumberKind) and not kind.lazy and is_schedule(arg):
                kinds.append(kind)
            if isinstance(kind, NumbersKind):
                several = jax.tree.leaves(arg, is_leaf=is_entry)
                kinds.extend(kind for one in several if is_schedule(one))
        return tuple(kinds)

    @functools.cached_property
    def widens(self) -> bool:
        """True if parameters become float32 at this door, since no link needs their dtypes."""
        if not self.spec.widen:
            return False
        pairs = zip(self.spec.kinds.values(), self.args, strict=True)
        links = [arg for kind, arg in pairs if isinstance(kind, LinkKind)]
        links = jax.tree.leaves(links, is_leaf=_is_link)
        if not self.spec.own:  # the body of a user's factory may build such a link
            links.append(self.pair(jnp.zeros([], jnp.int32)))
        return all(map(_widens, links))

    def pair(self, step: Any = None) -> optax.GradientTransformationExtraArgs:
        """Return the pair that the body builds, with schedules evaluated at `step`."""
        own = self.spec.own
        scheduled_decay = any(
            isinstance(kind, NumberKind) and kind.decay for kind in self.scheduled
        )
        resolver = Resolver(scalar, step=step)
        if own:
            resolver = Resolver(
                concrete_scalar, _enter if self.widens else _enter_by_its_door, step
            )
        # outside `factory_body`: a schedule may be a user's function
        positional, keywords = self.spec.resolve(self.args, resolver)
        with factory_body(own, scheduled_decay):
            return extended(self.spec.factory(*positional, **keywords))

    def init(self, params: optax.Params) -> optax.OptState:
        step = jnp.zeros([], jnp.int32) if self.scheduled else None
        with self._door(lambda pair: pair.init(widen(params)), params):
            inner = self.pair(step).init(widen(params) if self.widens else params)
        state = shard_like_params(inner, params)
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
        use = lambda pair: pair.update(widen(updates), inner, widen(params), **extra)
        with self._door(use, params):
            if self.scheduled:
                if not isinstance(state, SteppedState | ScheduledState):
                    raise wrong_state("the state of an optimizer with a schedule", state)
                step, inner = state
            inner_params = widen(params) if self.widens else params
            new, new_inner = self.pair(step).update(widen(updates), inner, inner_params, **extra)
        new = narrow(new, updates, params)
        if not self.spec.own and same_structure(new_inner, inner):
            new_inner = like(new_inner, inner)
        if not isinstance(state, SteppedState | ScheduledState) or not self.scheduled:
            return new, new_inner
        count: Any = optax.safe_increment(step)
        return new, type(state)(count, new_inner)

    @contextlib.contextmanager
    def _door(self, use: Callable[[Any], Any], params: Any) -> Generator[None]:
        """Add this optimizer's name to errors; let NumPy scalars overflow in silence, as in JAX."""
        outer, original = _widened.get()
        token = _widened.set((self.spec.name, params))
        try:
            with np.errstate(all="ignore"):
                if not self.widens:
                    _widened.set((self.spec.name, None))
                    if any(map(has_16_bits, jax.tree.leaves(original))):
                        raise TypeError(
                            f"{self.spec.name}: params must have their own dtypes, got float32"
                            f" copies of 16-bit leaves from {outer}, which cannot see"
                            f" {self.spec.name} inside another function. Wrap {outer} in"
                            f" {self.spec.name}, or use jgd.chain"
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


# The name of the optimizer whose door made the parameters float32, and the original parameters: a
# link inside a user's function may need their dtypes.
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
