"""Combinators: they compose transformations into chains, quotients and named records.

`chain` composes in series; `divide`, `add` and `subtract` compose in parallel, where both sides see
the same gradient. `with_nesterov` wraps one transformation. An accumulator is an array, or a tree
of arrays, in a state, such as the moving average of `ema`. The state of a combinator is a plain
tuple of states; `named` gathers the accumulators of a composition in one named tuple instead:

    named(divide(ema(b1, name="mu"), rms(b2, eps, name="nu")),
          record=optax.ScaleByAdamState, shared=["count"])
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax import GradientTransformation

from jgd.arithmetic import formula, quotient
from jgd.pytree import as_pytree
from jgd.trees import (
    TreeError,
    aligned,
    check_state,
    is_none,
    leafwise,
    like,
    wrong_state,
)

__all__ = ["add", "chain", "divide", "named", "subtract", "with_nesterov"]


# --- accumulators ----------------------------------------------------------------------------


class Slot(NamedTuple):
    """An accumulator: its name, and the function that initializes it."""

    name: str
    start: Callable[[Any], Any]  # params -> initial value
    of_schedule: bool = False  # of a scheduled decay: no record has a field for it


class Slots:
    """The accumulators of a composition during one update, by name: old values and new values."""

    def __init__(self, old: Mapping[str, Any]) -> None:
        self.old = old
        self.new: dict[str, Any] = {}

    def step(self, name: str, advance: Callable[[Any], Any]) -> Any:
        """Return the new value of an accumulator: `advance(old)`, computed once in each update."""
        if name not in self.new:
            self.new[name] = advance(self.old[name])
        return self.new[name]

    def ahead(self) -> "Slots":
        """Return the slots with which the next update starts, to look one step ahead."""
        return Slots({**self.old, **self.new})


Step = Callable[[Any, Slots, Any], Any]  # (updates, slots, params) -> updates


class Plain(optax.GradientTransformationExtraArgs):
    """A plain pair with its steps and its accumulators by name, which `named` gathers."""

    slots: tuple[Slot, ...]
    steps: tuple[Step, ...] | None  # in series; None if a link is foreign or has a schedule

    @classmethod
    def of(
        cls, init: Any, update: Any, steps: Iterable[Step] | None, slots: Iterable[Slot] = ()
    ) -> "Plain":
        self = cls(init, update)
        self.slots, self.steps = tuple(slots), None if steps is None else tuple(steps)
        return self


class ScheduledDecayState(NamedTuple):
    """State of a rule whose decay is a schedule: the state of the rule, and its mean log decays."""

    inner: Any
    logs: dict[str, jax.Array]  # for each average, the mean of log(decay) over the steps so far


def with_accumulators(
    steps: Iterable[Step], slots: Iterable[Slot], record: Any, fields: Mapping[str, str]
) -> Plain:
    """Return the transformation that applies `steps` in series, with accumulators.

    Args:
      steps: functions (updates, slots, params) -> updates.
      slots: the accumulators.
      record: the named tuple that is the state of the transformation by itself.
      fields: for each field of `record`, the name of its slot.
    """
    steps, slots = tuple(steps), tuple(slots)
    extra = [slot.name for slot in slots if slot.of_schedule]

    def pack(values: Mapping[str, Any]) -> Any:
        inner = record(**{field: values[name] for field, name in fields.items()})
        return ScheduledDecayState(inner, {n: values[n] for n in extra}) if extra else inner

    def unpack(state: Any) -> dict[str, Any]:
        logs: Any = {}
        if extra:
            state, logs = check_state(state, ScheduledDecayState)
        check_state(state, record)
        return {**logs, **{name: getattr(state, field) for field, name in fields.items()}}

    def init(params: Any) -> Any:
        return pack({slot.name: slot.start(params) for slot in slots})

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        accumulators = Slots(unpack(state))
        for step in steps:
            updates = step(updates, accumulators, params)
        return updates, pack(like(accumulators.new, accumulators.old))

    return Plain.of(init, update, steps, slots)


def masked_like(accumulator: Any, updates: Any) -> Any:
    """Return an accumulator as updates, with None where `updates` is None."""
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
    if all(leaf is not None for leaf in leaves):
        return accumulator
    pairs = zip(leaves, structure.flatten_up_to(accumulator), strict=True)
    return structure.unflatten([None if g is None else m for g, m in pairs])


def stateless(f: Callable[[Any, Any], Any]) -> Plain:
    """Return `f(updates, params)` as a transformation without a state."""

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        if isinstance(state, tuple) and jax.tree.leaves(state):  # optax, too, ignores other states
            check_state(state, optax.EmptyState)
        return f(updates, params), state

    return Plain.of(optax.init_empty_state, update, [lambda updates, _, params: f(updates, params)])


# --- series ----------------------------------------------------------------------------------


def _steps_of(link: GradientTransformation) -> tuple[Step, ...] | None:
    return link.steps if isinstance(link, Plain) else None


def _slots_of(*links: GradientTransformation) -> list[Slot]:
    return [slot for link in links if isinstance(link, Plain) for slot in link.slots]


def _check_tuple(state: Any, n: int) -> Any:
    if type(state) is not tuple or len(state) != n:
        raise wrong_state(f"a tuple of {n} states", state)
    return state


@as_pytree
def chain(*links: GradientTransformation) -> GradientTransformation:
    """Series: each link transforms the updates of the link before it.

    Args:
      links: transformations of jgd, whose numbers stay leaves, or of optax, which are structure
        (lift them with `as_pytree` to sweep their numbers). Links of optax compare by identity, so
        a factory that creates one returns another structure, and retraces, on each call.

    State: the tuple of the links' states.
    Differs from: `optax.chain`, which hides the numbers of its links, so that its result can be
      neither a jit argument nor a lane.
    """
    inner = [optax.with_extra_args_support(link) for link in links]

    def init(params: Any) -> Any:
        return tuple(link.init(params) for link in inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        states: list[Any] = []
        for link, link_state in zip(inner, _check_tuple(state, len(inner)), strict=True):
            updates, link_state = link.update(updates, link_state, params, **extra)
            states.append(link_state)
        return updates, tuple(states)

    series: list[Step] | None = []
    for link in inner:
        steps = _steps_of(link)
        series = None if series is None or steps is None else [*series, *steps]
    return Plain.of(init, update, series, _slots_of(*inner))


# --- parallel --------------------------------------------------------------------------------


def _pair(
    f: Callable[..., Any], first: GradientTransformation, second: GradientTransformation
) -> Plain:
    one, two = map(optax.with_extra_args_support, (first, second))
    left_steps, right_steps = _steps_of(one), _steps_of(two)

    def init(params: Any) -> Any:
        return one.init(params), two.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        state_one, state_two = _check_tuple(state, 2)
        left, state_one = one.update(updates, state_one, params, **extra)
        right, state_two = two.update(updates, state_two, params, **extra)
        return leafwise(f, left, right), (state_one, state_two)

    def both(updates: Any, slots: Slots, params: Any) -> Any:
        left = right = updates
        for step in left_steps or ():
            left = step(left, slots, params)
        for step in right_steps or ():
            right = step(right, slots, params)
        return leafwise(f, left, right)

    known = left_steps is not None and right_steps is not None
    return Plain.of(init, update, [both] if known else None, _slots_of(one, two))


_quotient = formula(quotient)


def _sum(x: Any, y: Any) -> Any:
    return x + y


def _difference(x: Any, y: Any) -> Any:
    return x - y


@as_pytree
def divide(
    direction: GradientTransformation, magnitude: GradientTransformation
) -> GradientTransformation:
    """u = direction(g) / magnitude(g), and 0 where the magnitude is 0: the shape of Adam.

    State: the pair of both states. Derivatives are finite where the magnitude is 0.
    """
    return _pair(_quotient, direction, magnitude)


@as_pytree
def add(first: GradientTransformation, second: GradientTransformation) -> GradientTransformation:
    """u = first(g) + second(g). State: the pair of both states."""
    return _pair(_sum, first, second)


@as_pytree
def subtract(
    first: GradientTransformation, second: GradientTransformation
) -> GradientTransformation:
    """u = first(g) - second(g). State: the pair of both states."""
    return _pair(_difference, first, second)


# --- around one transformation ---------------------------------------------------------------


@as_pytree
def with_nesterov(inner: GradientTransformation) -> GradientTransformation:
    """Look ahead: apply `inner` twice to the same gradient, and keep the state of the first time.

        s' = inner.state(g, s)          u = inner(g, s')

    Around `scale_by_momentum(b)` it is Nesterov's accelerated gradient, u = g + b v'. If b is a
    schedule, both times use its value at this step.

    State: that of `inner`.
    Differs from: `nesterov_ema`, where the two terms carry different bias corrections.
    Source: Sutskever et al. 2013, equations 3 and 4.
    """
    tx = optax.with_extra_args_support(inner)
    steps = _steps_of(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        _, advanced = tx.update(updates, state, params, **extra)
        ahead, _ = tx.update(updates, advanced, params, **extra)
        return ahead, advanced

    def twice(updates: Any, slots: Slots, params: Any) -> Any:
        now = ahead = updates
        for step in steps or ():
            now = step(now, slots, params)
        accumulators = slots.ahead()
        for step in steps or ():
            ahead = step(ahead, accumulators, params)
        return ahead

    return Plain.of(tx.init, update, None if steps is None else [twice], _slots_of(tx))


def _build(value: Any) -> None:
    value._call.pair()


@as_pytree(check=_build)
def named(
    inner: GradientTransformation,
    *,
    record: type,
    shared: Iterable[str] = (),
    fields: Mapping[str, str] | None = None,
) -> GradientTransformation:
    """Gather the accumulators of `inner` in the fields of one flat named tuple.

    Args:
      inner: transformations composed by `chain`, `divide`, `add`, `subtract`. The argument `name`
        of a factory is the name of its accumulator.
      record: the named tuple, with one field of the same name for each accumulator.
        `optax.tree.get` finds the accumulators by these names.
      shared: names that stand for one accumulator although they appear several times, such as the
        `count` of averages that see the same steps. The first transformation with this name steps
        the accumulator in each update; the others use the result.
      fields: field -> accumulator, for fields of `record` whose accumulator has another name.

    State: `record`, or `ScheduledDecayState` around it if a decay is a schedule.
    Raises: ValueError for an accumulator without a field, a field without an accumulator, or a name
      that appears twice and is not shared.
    """
    slots, steps = _slots_of(inner), _steps_of(inner)
    if steps is None:
        raise ValueError(
            "named: inner must be composed of transformations of jgd without schedules, got"
            f" {inner!r}. Schedules belong to the factory around `named`"
        )
    unique = {slot.name: slot for slot in reversed(slots)}
    names = [slot.name for slot in slots]
    twice = sorted({name for name in names if names.count(name) > 1}.difference(shared))
    if twice:
        raise ValueError(
            f"named: accumulators must have different names, got {', '.join(twice)} more than"
            f" once. Rename them, or declare that each name is one accumulator: shared={twice}"
        )
    of_field = {field: field for field in getattr(record, "_fields", ())}
    if unknown := sorted(set(fields or ()).difference(of_field)):
        raise ValueError(f"named: fields must name fields of {record.__name__}, got {unknown}")
    of_field |= fields or {}
    known = {slot.name for slot in slots if not slot.of_schedule}
    if sorted(known) != sorted(of_field.values()):
        raise ValueError(
            f"named: the fields of {record.__name__} must be the accumulators {sorted(known)},"
            f" got {sorted(of_field.values())}"
        )
    return with_accumulators(steps, reversed(unique.values()), record, of_field)


# --- by label --------------------------------------------------------------------------------


def partition(
    transforms: Mapping[str, GradientTransformation], labels: Callable[[Any], Any]
) -> GradientTransformation:
    """Update each leaf with the transformation of its label.

    Unlike in `optax.partition`, gradients may be None, and trees that do not match raise
    `TreeError`.

    Args:
      transforms: one transformation for each label.
      labels: a function from a tree to a tree of labels.
    """
    inner = {name: optax.with_extra_args_support(tx) for name, tx in transforms.items()}
    hidden = optax.MaskedNode()

    def split(tree: Any, names: Any) -> dict[str, Any]:
        """Return, for each label, the tree with only its leaves and the leaves that are None."""
        leaves, structure, (column,) = aligned(tree, names)
        pairs = list(zip(leaves, column, strict=True))
        keep = lambda name: [x if x is None or n == name else hidden for x, n in pairs]
        return {name: structure.unflatten(keep(name)) for name in inner}

    def init(params: Any) -> Any:
        parts = split(params, labels(params))
        return optax.transforms.PartitionState(
            {name: optax.MaskedState(tx.init(parts[name])) for name, tx in inner.items()}
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        states: dict[Any, Any] = dict(
            check_state(state, optax.transforms.PartitionState).inner_states
        )
        if states.keys() != inner.keys():
            raise TreeError(f"expected a state with the groups {list(inner)}, got {list(states)}")
        leafwise(lambda g, *_: g, updates, *(() if params is None else (params,)))
        labelled = labels(updates)
        parts = split(updates, labelled)
        param_parts = dict.fromkeys(inner) if params is None else split(params, labelled)
        leaves, structure, (names,) = aligned(updates, labelled)
        results: list[Any] = [None] * len(leaves)
        for name, tx in inner.items():
            part, new_state = tx.update(
                parts[name], states[name].inner_state, param_parts[name], **extra
            )
            states[name] = optax.MaskedState(new_state)
            for index, u in enumerate(structure.flatten_up_to(part)):
                if leaves[index] is not None and names[index] == name:
                    results[index] = u
        return structure.unflatten(results), optax.transforms.PartitionState(states)

    return optax.GradientTransformationExtraArgs(init, update)
