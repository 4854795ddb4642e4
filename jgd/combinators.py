"""Combinators: how words become chains, quotients and named records.

`chain` composes in series, `divide`, `add` and `subtract` in parallel: both sides see the same
gradient. `with_nesterov` wraps one word, `named` gives the memories of a composition their names.
The state of a combinator is a plain tuple, that of a word a named tuple.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformation

from jgd.pytree import TreeError, as_pytree

__all__ = ["add", "chain", "divide", "leafwise", "named", "subtract", "with_nesterov"]


# --- trees -----------------------------------------------------------------------------------


def leafwise(f: Callable[..., Any], updates: Any, *trees: Any, keep: bool = False) -> Any:
    """`f(g, *others)` on each leaf g of `updates` and the leaves in its place in `trees`.

    Where the update is None the result is None or, with `keep`, the leaf of the first of `trees`:
    a memory outlives a step without gradient.

    Raises:
      TreeError: if a tree has other leaves than `updates`, or a leaf another shape.
    """
    leaves, structure, columns = aligned(updates, *trees)
    results = []
    for index, (g, *others) in enumerate(zip(leaves, *columns, strict=True)):
        if g is None:
            results.append(others[0] if keep else None)
            continue
        for other in others:
            if getattr(other, "shape", None) != g.shape:
                raise misfit(updates, index, other)
        results.append(f(g, *others))
    return structure.unflatten(results)


def aligned(updates: Any, *trees: Any) -> tuple[list[Any], Any, list[list[Any]]]:
    """The leaves of `updates`, its structure, and what each of `trees` has in their places."""
    leaves, structure = jax.tree.flatten(updates, is_leaf=_is_none)
    try:
        return leaves, structure, [structure.flatten_up_to(tree) for tree in trees]
    except ValueError:
        raise TreeError(_first_difference(updates, trees)) from None


def misfit(updates: Any, index: int, other: Any) -> TreeError:
    """The error for leaf `index` of `updates`, beside which `other` has the wrong shape."""
    path, g = jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_none)[index]
    return TreeError(
        f"the update at {jax.tree_util.keystr(path) or 'the root'} has shape {jnp.shape(g)},"
        f" state or params have {jax.tree.map(lambda x: getattr(x, 'shape', x), other)} there"
    )


def _is_none(x: Any) -> bool:
    return x is None


def _first_difference(updates: Any, trees: tuple[Any, ...]) -> str:
    def paths(tree: Any) -> list[Any]:
        return [p for p, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_none)]

    show = lambda path: jax.tree_util.keystr(path) or "the root"
    here = paths(updates)
    for there in map(paths, trees):  # whose memories may have leaves below one of the updates
        for path in here:
            if not any(other[: len(path)] == path for other in there):
                return f"the updates have a leaf at {show(path)} that state or params lack"
        for other in there:
            if not any(other[: len(path)] == path for path in here):
                return f"the updates lack the leaf at {show(other)} that state or params have"
    return "the updates are another kind of tree than state or params"


def expect(state: Any, wanted: type) -> Any:
    if not isinstance(state, wanted):
        raise TreeError(
            f"this is the state of another optimizer: {_name(type(state))}, wanted {_name(wanted)}"
        )
    return state


def with_params(params: Any) -> Any:
    if params is None:
        raise TreeError("needs the parameters: call update(updates, state, params)")
    return params


def _name(state_type: type) -> str:
    return f"{state_type.__module__}.{state_type.__qualname__}"


@jax.custom_jvp
def quotient(numerator: Any, denominator: Any) -> Any:
    """0 where the denominator is 0, with finite derivatives there."""
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))


@quotient.defjvp
def _quotient_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    # JAX's own rule squares the denominator, which leaves float32 below 1e-19
    q = quotient(*primals)
    return q, quotient(tangents[0] - q * tangents[1], primals[1])


def increment(count: Any) -> Any:
    """count + 1, as far as its integers go."""
    return optax.safe_increment(count)


def safe_sqrt(v: Any) -> Any:
    """sqrt(v), and 0 with derivative 0 where v is 0 or, by rounding, below."""
    zero = v <= 0  # false for NaN, which goes on
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, v)))


def abs_square(g: Any) -> Any:
    """|g|^2, real for complex g too."""
    return (g * jnp.conj(g)).real


@as_pytree
def chain(*links: GradientTransformation) -> GradientTransformation:
    """Series: each link transforms what the one before it gives.

    Args:
      links: transformations of jgd, whose numbers stay leaves, or of optax, which are structure
        (lift them with `as_pytree` to sweep their numbers) and compare by identity: made anew
        inside a factory they make another structure each time, and retrace.

    State: the tuple of the links' states.
    Differs from: `optax.chain`, which hides the leaves of what it holds, so that its result can be
      neither a jit argument nor a lane.
    """
    inner = [optax.with_extra_args_support(link) for link in links]

    def init(params: Any) -> Any:
        return tuple(link.init(params) for link in inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if type(state) is not tuple or len(state) != len(inner):
            raise TreeError(
                f"this is the state of another optimizer: {type(state).__name__}, wanted a tuple"
                f" of {len(inner)}"
            )
        states = []
        for link, link_state in zip(inner, state, strict=True):
            updates, link_state = link.update(updates, link_state, params, **extra)
            states.append(link_state)
        return updates, tuple(states)

    return optax.GradientTransformationExtraArgs(init, update)


def partition(
    transforms: Mapping[str, GradientTransformation], labels: Callable[[Any], Any]
) -> GradientTransformation:
    """Each leaf to the transformation of its label; `labels` maps a tree to one of their names.

    As `optax.partition`, and gradients may be None; misfits are `TreeError`s.
    """
    inner = {name: optax.with_extra_args_support(tx) for name, tx in transforms.items()}
    hidden = optax.MaskedNode()

    def split(tree: Any, found: Any) -> dict[str, Any]:
        """For each name the tree with only its leaves, and those that are None."""
        leaves, structure, (names,) = aligned(tree, found)
        pairs = list(zip(leaves, names, strict=True))
        keep = lambda name: [x if x is None or n == name else hidden for x, n in pairs]
        return {name: structure.unflatten(keep(name)) for name in inner}

    def init(params: Any) -> Any:
        parts = split(params, labels(params))
        return optax.transforms.PartitionState(
            {name: optax.MaskedState(tx.init(parts[name])) for name, tx in inner.items()}
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        states = dict(expect(state, optax.transforms.PartitionState).inner_states)
        if states.keys() != inner.keys():
            raise TreeError(f"this is the state of other groups: {list(states)}")
        leafwise(lambda g, *_: g, updates, *(() if params is None else (params,)))
        found = labels(updates)
        parts = split(updates, found)
        seen = dict.fromkeys(inner) if params is None else split(params, found)
        leaves, structure, (names,) = aligned(updates, found)
        results: list[Any] = [None] * len(leaves)
        for name, tx in inner.items():
            part, moved = tx.update(parts[name], states[name].inner_state, seen[name], **extra)
            states[name] = optax.MaskedState(moved)
            for index, u in enumerate(structure.flatten_up_to(part)):
                if leaves[index] is not None and names[index] == name:
                    results[index] = u
        return structure.unflatten(results), optax.transforms.PartitionState(states)

    return optax.GradientTransformationExtraArgs(init, update)


def stateless(f: Callable[[Any, Any], Any]) -> GradientTransformation:
    """`f(updates, params)` as a transformation without memory."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if isinstance(state, tuple) and jax.tree.leaves(state):  # else it is ignored, as by optax
            expect(state, optax.EmptyState)
        return f(updates, params), state

    return GradientTransformation(optax.init_empty_state, update)


def _pair(
    f: Callable[[Any, Any], Any], first: GradientTransformation, second: GradientTransformation
) -> GradientTransformation:
    one, two = map(optax.with_extra_args_support, (first, second))

    def init(params: Any) -> Any:
        return one.init(params), two.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if type(state) is not tuple or len(state) != 2:
            raise TreeError(
                f"this is the state of another optimizer: {type(state).__name__}, wanted a pair"
            )
        left, state_one = one.update(updates, state[0], params, **extra)
        right, state_two = two.update(updates, state[1], params, **extra)
        return leafwise(f, left, right), (state_one, state_two)

    return optax.GradientTransformationExtraArgs(init, update)


@as_pytree
def divide(
    direction: GradientTransformation, magnitude: GradientTransformation
) -> GradientTransformation:
    """u = direction(g) / magnitude(g), and 0 where the magnitude is 0: the shape of Adam.

    State: the pair of both states. Derivatives are finite where the magnitude is 0.
    """
    return _pair(quotient, direction, magnitude)


@as_pytree
def add(first: GradientTransformation, second: GradientTransformation) -> GradientTransformation:
    """u = first(g) + second(g). State: the pair of both states."""
    return _pair(jnp.add, first, second)


@as_pytree
def subtract(
    first: GradientTransformation, second: GradientTransformation
) -> GradientTransformation:
    """u = first(g) - second(g). State: the pair of both states."""
    return _pair(jnp.subtract, first, second)


@as_pytree
def with_nesterov(inner: GradientTransformation) -> GradientTransformation:
    """Look ahead: advance `inner` twice with the same gradient, keep the state of the first time.

        s' = inner.state(g, s)          u = inner(g, s')

    Around `scale_by_momentum(b)` this is Nesterov's accelerated gradient, u = g + b v'. If b is a
    schedule, the look ahead sees the b of the step ahead; `nesterov` and `trace` take that of now.

    State: that of `inner`.
    Differs from: `nesterov_ema`, where the two terms carry different bias corrections.
    Source: Sutskever et al. 2013, equations 3 and 4.
    """
    tx = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        _, advanced = tx.update(updates, state, params, **extra)
        ahead, _ = tx.update(updates, advanced, params, **extra)
        return ahead, advanced

    return optax.GradientTransformationExtraArgs(tx.init, update)


@as_pytree
def named(inner: GradientTransformation, *, record: type, slots: str) -> GradientTransformation:
    """`inner` with its memories under names of one flat named tuple.

    Args:
      inner: words put together by `chain`, `divide`, `add`, `subtract`.
      record: the named tuple. Its fields are found by name with `optax.tree.get`.
      slots: the field for each slot of the inner states, in their order, separated by spaces. Slots
        of one name are one: memories that count the same steps share their counter.
    """
    fields = slots.split()

    def collect(inner_state: Any) -> Any:
        return record(**dict(zip(fields, _slots(inner_state), strict=True)))

    def init(params: Any) -> Any:
        return collect(inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        expect(state, record)
        values = iter([getattr(state, field) for field in fields])
        # the state of no parameters at all shows where each slot goes
        updates, inner_state = inner.update(updates, _fill(inner.init(()), values), params)
        return updates, collect(inner_state)

    return GradientTransformation(init, update)


def _slots(state: Any) -> list[Any]:
    """The fields of all named tuples in a nest of tuples, depth first."""
    if type(state) is tuple:
        return [slot for inner in state for slot in _slots(inner)]
    return list(state)


def _fill(skeleton: Any, values: Any) -> Any:
    if type(skeleton) is tuple:
        return tuple(_fill(inner, values) for inner in skeleton)
    return type(skeleton)(*(next(values) for _ in skeleton))
