"""Optimizers at the step of a state: each schedule is replaced by its value.

jgd.now(tx, state).learning_rate     # the learning rate of the next update
"""

from collections.abc import Iterator
from typing import Any

import jax
import optax

from jgd.arguments import Kind, LinkKind, LinksKind, NumberKind, NumbersKind, scalar
from jgd.calls import spec_of
from jgd.nodes import is_entry, is_schedule, unwrap
from jgd.pytree import ScheduledState, SteppedState, Transformation, call_of
from jgd.trees import TreeError
from jgd.wrappers import per_layer

__all__ = ["now"]


def now(tx: Transformation, state: optax.OptState) -> Any:
    """Return the optimizer with its schedules evaluated at the step of its state.

        jgd.now(tx, state).learning_rate     # the learning rate of the next update
        jax.vmap(jgd.now)(lanes, states)     # the same for a batch of optimizers

    An optimizer inside another one has its own step: inside `accumulate`, for example, it counts
    updates, not gradients. Schedules that are not arguments are not evaluated: schedules inside
    links of optax, and schedules that the body of a factory creates.

    Args:
      tx: an optimizer of jgd.
      state: its state. The step is the step of the next update, 0 in a state from `init`. Only the
        schedule of a learning rate of `schedule_free` and its variants starts at step 1.

    Returns: an optimizer of the same factory, with numbers in place of schedules.
    Raises: TypeError if `tx` is not an optimizer of jgd, TreeError if `state` is not its state.
    """
    if not isinstance(tx, Transformation):
        raise TypeError(f"now: tx must be an optimizer of jgd, got {tx!r}")
    at_step = _at_step(tx, state, False)
    if at_step is None:
        raise TreeError(f"state must be a state of {tx!r}, got {type(state).__name__}", "now")
    return at_step


def _at_step(tx: Any, state: Any, layered: bool) -> Any:
    """Return a link with its schedules evaluated, or None if `state` is not a state of the link.

    With `layered`, the arrays of the state have a leading axis over layers, as in `per_layer`.
    """
    if not _follows_schedules(tx):
        return tx
    call, step = call_of(tx), None
    spec = call.spec
    if call.scheduled:
        if not isinstance(state, SteppedState | ScheduledState):
            return None
        step, state = state
    lazy_step = getattr(state, "step_count", None)  # as in `schedule_free`
    if spec.own and lazy_step is None and any(_is_lazy(*pair) for pair in _arguments(tx)):
        return None
    in_layers = layered or spec == spec_of(per_layer)
    pairs = zip([link for _, link in _links(tx)], _state_parts(tx, state), strict=True)
    links = [_search(link, part, in_layers) for link, part in pairs]
    if any(link is None for link in links):
        return None

    def value(label: str, schedule: Any, at: Any) -> jax.Array:
        at = at[(0,) * at.ndim] if layered else at  # all layers are at the same step
        return scalar(label, unwrap(schedule)(at))

    rest, args = iter(links), list[Any]()
    for label, (kind, arg) in zip(spec.labels.values(), _arguments(tx), strict=True):
        if isinstance(kind, LinkKind):
            args.append(jax.tree.map(lambda _: next(rest), arg, is_leaf=_is_link))
        elif isinstance(kind, NumberKind | NumbersKind):
            at = lazy_step if _is_lazy(kind, arg) else step
            one = lambda x, at=at, label=label: (
                value(label, x, at) if is_schedule(x) and at is not None else x
            )
            args.append(jax.tree.map(one, arg, is_leaf=is_entry))
        else:
            args.append(arg)
    return tx.of_call(spec, args)


def _search(link: Any, state: Any, layered: bool) -> Any:
    """Return a link with its schedules evaluated, at the first node that is a state of the link."""
    at_step = _at_step(link, state, layered)
    for node in _children(state) if at_step is None else ():
        at_step = _search(link, node, layered) if at_step is None else at_step
    return at_step


def _state_parts(tx: Transformation, state: Any) -> list[Any]:
    """Return, for each link of `tx`, the part of the state that holds the state of the link."""
    names = [name for name, _ in _links(tx)]
    if any(names):  # `param_groups`: the link without a name updates the remaining parameters
        groups = getattr(state, "inner_states", {})
        rest = next((key for key in groups if key not in names), None)
        return [groups.get(rest if name is None else name) for name in names]
    parts = _children(state) if len(names) > 1 else [state]
    return parts if len(parts) == len(names) else [None] * len(names)


def _children(node: Any) -> list[Any]:
    """Return the nodes and leaves directly below a node; none below a leaf."""
    below = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
    return [x for x in below if x is not node]


def _arguments(tx: Transformation) -> Iterator[tuple[Kind, Any]]:
    return zip(call_of(tx).spec.kinds.values(), call_of(tx).args, strict=True)


def _links(tx: Transformation) -> list[tuple[str | None, Any]]:
    """Return the links in the arguments of an optimizer as (name or None, link)."""
    links: list[tuple[str | None, Any]] = []
    for kind, arg in _arguments(tx):
        if isinstance(kind, LinksKind):
            links.extend(arg.items())
        elif isinstance(kind, LinkKind):
            links.extend((None, link) for link in jax.tree.leaves(arg, is_leaf=_is_link))
    return links


def _is_link(x: Any) -> bool:
    return isinstance(unwrap(x), optax.GradientTransformation)


def _is_lazy(kind: Kind, arg: Any) -> bool:
    return isinstance(kind, NumberKind) and kind.lazy and is_schedule(arg)


def _follows_schedules(link: Any) -> bool:
    """Return whether an argument of an optimizer, or of a link in it, is a schedule."""
    return isinstance(link, Transformation) and (
        bool(call_of(link).scheduled)
        or any(_is_lazy(*pair) for pair in _arguments(link))
        or any(_follows_schedules(inner) for _, inner in _links(link))
    )
