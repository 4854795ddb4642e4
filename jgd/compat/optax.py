"""Conversion of optimizer states from optax and jgd 0.1 to jgd, and from jgd to optax.

    state = jgd.compat.optax.state_from(optax_state, tx)       # tx of jgd
    state = jgd.compat.optax.to_optax(jgd_state, optax_tx)

Most states need no conversion, since jgd uses optax's classes. These functions convert the others:
states with a scheduled learning rate (optax counts its steps inside the chain, jgd around it),
states whose class optax does not export, and all states of jgd 0.1. A conversion creates a state
with `tx.init` and fills its accumulators, in their order, from fields with the same names.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jgd.combinators import ScheduledDecayState
from jgd.trees import TreeError

__all__ = ["state_from", "to_optax"]


def state_from(
    state: optax.OptState,
    tx: optax.GradientTransformation,
    params: optax.Params | None = None,
) -> optax.OptState:
    """Return a state with which `tx`, an optimizer of jgd, continues training of optax or jgd 0.1.

        state = jgd.compat.optax.state_from(state, jgd.adamw(jgd.linear_schedule(1e-3, 0, 1000)))

    Args:
      state: the state of the optimizer with the same name. It may consist of dicts and lists
        instead of named tuples, as orbax returns it without a template, and
        `flax.serialization.msgpack_restore`. The hyperparameters of `optax.inject_hyperparams` are
        ignored, since `tx` has them.
      tx: the optimizer of jgd that continues.
      params: the parameters or their `jax.ShapeDtypeStruct`s. None: inferred from the accumulators.
        They are needed if they contain lists or tuples and `state` consists of dicts and lists, if
        no accumulator has their shapes (`galore`), and, as `optax.LookaheadParams`, for
        `lookahead`.

    Returns: a state like that of `tx.init`, with the same dtypes. Its schedules continue at the
      count of the schedules in `state` or, if there are none, of its accumulators. If a decay
      follows a schedule and `state` lacks its logarithms, they are computed by stepping `tx`.
    Raises: TreeError if `state` lacks an accumulator, has one too many, or has one of another
      shape; the error names it. In dicts and lists an accumulator is known by its field names only.
    Differs from: optax in `adan`, whose average of squares is different and is not converted.
    """
    return _converted("state_from", state, tx, params)


def to_optax(
    state: optax.OptState,
    tx: optax.GradientTransformation,
    params: optax.Params | None = None,
) -> optax.OptState:
    """Return a state with which `tx`, an optimizer of optax, continues training of jgd.

        state = jgd.compat.optax.to_optax(state, optax.adamw(optax.linear_schedule(1e-3, 0, 1000)))

    Args:
      state: the state of the optimizer of jgd with the same name, of named tuples or, as restored
        without a template, of dicts and lists.
      tx: the optimizer of optax that continues.
      params: as in `state_from`. They are also needed for 16-bit parameters, for which optax's
        accumulators have 16 bits; without `params` they stay float32.

    Returns: a state like that of `tx.init`.
    Raises: TreeError as `state_from`.
    """
    return _converted("to_optax", state, tx, params)


# --- reading a state -------------------------------------------------------------------------

# Fields that hold the state of another transformation, or a dict of states.
_INNER_DICTS = ["hyperparams_states", "inner_states"]
_INNER_STATES = ["base_optimizer_state", "fast_state", "hessian_fn_state", "inner"]
_INNER = [*_INNER_STATES, "inner_opt_state", "inner_state", *_INNER_DICTS]
_COUNTS = {"count", "count_m2", "step"}
_CONSTANTS = {"ns_coeffs", "hyperparams"}  # taken from `tx`
# The names in jgd 0.1 of the mean logarithm of an average's decay.
_OLD_LOGS = {
    "log_mu": ["log_b1", "log_beta", "log_decay"],
    "log_nu": ["log_b2", "log_decay"],
    "log_ema": ["log_decay"],
    "log_m": ["log_b1"],
    "log_m1": ["log_b1"],
    "log_v": ["log_b2"],
    "log_n": ["log_b3"],
}


class _Record(NamedTuple):
    """The fields of one transformation's state that hold arrays."""

    kind: str  # the name of the class; empty for a dict
    fields: dict[str, Any]

    @property
    def accumulators(self) -> dict[str, Any]:
        """The fields that identify a state; a counter of steps has none."""
        derived = _COUNTS | _CONSTANTS
        return {n: x for n, x in self.fields.items() if n not in derived and n[:4] != "log_"}

    def __str__(self) -> str:
        names = ", ".join(sorted(self.fields))
        return f"{self.kind} of {names}" if self.kind else names


def _fields_of(node: Any) -> Mapping[str, Any]:
    return node if isinstance(node, Mapping) else node._asdict()


def _record_of(node: Any) -> _Record:
    kind = "" if isinstance(node, Mapping) else type(node).__name__
    own = {n: x for n, x in _fields_of(node).items() if n not in _INNER and jax.tree.leaves(x)}
    return _Record(kind, own)


def _records(state: Any) -> list[_Record]:
    """Return the records of a state of named tuples or dicts, depth first."""
    if state is None:
        return []
    if isinstance(state, Mapping) and all(str(key).isdigit() for key in state):
        state = [state[key] for key in sorted(state, key=int)]  # a tuple, as flax writes it
    if isinstance(state, tuple | list) and not hasattr(state, "_fields"):
        return [record for inner in state for record in _records(inner)]
    if not isinstance(state, tuple | Mapping):
        raise TreeError(f"expected a state of tuples, lists and dicts, got {type(state).__name__}")
    record, inner = _record_of(state), list[_Record]()
    for name in _INNER:
        value = _fields_of(state).get(name)
        if name in _INNER_DICTS and value:
            value = [value[label] for label in sorted(value)]
        inner += _records(value)
    if logs := record.fields.pop("logs", None):
        inner[0] = inner[0]._replace(fields=inner[0].fields | logs)
    return [record, *inner] if record.fields else inner


# --- the shapes of the parameters ------------------------------------------------------------


def _candidates(records: list[_Record]) -> Iterator[Any]:
    """Yield trees that may have the shapes of the parameters: the largest accumulators first."""
    shapes: list[Any] = []
    for record in records:
        accumulators = jax.eval_shape(lambda trees: trees, record.accumulators)
        shapes += accumulators.values()
        if "v_row" in accumulators:
            means = (accumulators.get(name) for name in ("v_row", "v_col", "v"))
            shapes.append(jax.tree.map(_unfactored, *means))
    is_float = lambda tree: all(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(tree))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    shapes = sorted(filter(is_float, shapes), key=size, reverse=True)
    for tree in shapes:
        for other in shapes:  # each group of parameters has an accumulator of its own
            tree = _joined(tree, other)
        yield tree
    if not shapes:
        yield jax.ShapeDtypeStruct((), float)  # without accumulators the shapes do not matter


def _joined(tree: Any, other: Any) -> Any:
    """Return `tree` with the leaves of `other` where a mask left it without leaves."""
    is_empty = lambda node: not jax.tree.leaves(node)
    join = lambda x, y: y if is_empty(x) else x
    try:
        return jax.tree.map(join, tree, other, is_leaf=is_empty)
    except ValueError:
        return tree


def _unfactored(row: Any, column: Any, v: Any) -> Any:
    """Return the shape of a parameter from Adafactor's means over its rows and columns."""
    if row.shape == (1,):  # not factored
        return v
    for axis in range(row.ndim + 1):
        shape = (*row.shape[:axis], max(column.shape), *row.shape[axis:])
        second, largest = np.argsort(shape)[-2:]
        if largest == axis and tuple(np.delete(shape, second)) == column.shape:
            return jax.ShapeDtypeStruct(shape, v.dtype)
    return v


# --- the conversion --------------------------------------------------------------------------


class _Mismatch(TreeError):
    """Raised if a state does not fit the optimizer or the inferred shapes of the parameters."""


def _converted(
    where: str, state: Any, tx: optax.GradientTransformation, params: optax.Params | None
) -> Any:
    """Return `state` in the structure of the states of `tx`."""
    first: TreeError | None = None
    try:
        records = _records(state)
        for shapes in _candidates(records) if params is None else [params]:
            try:
                return _Filling(records, tx, shapes).state()
            except _Mismatch as error:
                first = first or error
    except TreeError as error:
        raise TreeError(error.detail, where) from None
    detail = f"{first.detail if first else ''}. Was the state created by another optimizer?"
    if params is None:
        detail += f" If not, pass the parameters: {where}(state, tx, params)"
    raise TreeError(detail, where)


class _Filling:
    """A depth-first walk over the state of `tx` that fills it with the records of another state."""

    def __init__(self, records: list[_Record], tx: Any, params: Any) -> None:
        self.tx = optax.with_extra_args_support(tx)
        try:
            self.params = jax.eval_shape(lambda tree: tree, params)
            self.template = jax.eval_shape(tx.init, params)
        except Exception as error:  # `init` may raise anything if the inferred shapes are wrong
            raise _Mismatch(str(error)) from error
        self.records = records
        self.left = [record for record in records if record.accumulators]
        self.counters = self.matching_counters()
        self.latest = _Record("", {})
        self.decays = 0  # number of states of scheduled decays so far

    def state(self) -> Any:
        """Return the state of `tx`, filled."""
        leaves, structure = jax.tree.flatten(self.node(self.template))
        if self.left:
            raise _Mismatch(f"the state has {self.left[0]}, but the state of tx does not")
        missing = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)]
        if missing:  # compiled, so that the other results of `init` are not computed
            zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.params)
            initial = lambda: jax.tree.leaves(self.tx.init(zeros()))
            constants = jax.jit(lambda: [initial()[i] for i in missing])()
            for i, x in zip(missing, constants, strict=True):
                leaves[i] = x
        return structure.unflatten(leaves)

    def node(self, node: Any) -> Any:
        """Return a part of the template, filled."""
        if isinstance(node, ScheduledDecayState):
            inner = self.node(node.inner)
            return ScheduledDecayState(inner, self.logs(node.logs, inner.count))
        if isinstance(node, dict):
            return {label: self.node(node[label]) for label in sorted(node)}
        if node is None:
            return None
        if not hasattr(node, "_fields"):
            if not isinstance(node, tuple | list):
                raise TreeError(f"tx must have a state of tuples, got {type(node).__name__} in it")
            return type(node)(map(self.node, node))
        target, new = _record_of(node), dict[str, Any]()
        if target.fields:
            record = self.latest = self.matching(target)
            new = {name: self.value(record, name, x) for name, x in target.fields.items()}
        for name in _INNER:
            if hasattr(node, name):
                new[name] = self.node(getattr(node, name))
        return node._replace(**new)

    def matching(self, target: _Record) -> _Record:
        """Return the record of the state for one of the template."""
        if not target.accumulators:
            return next(self.counters)
        if not self.left:
            raise _Mismatch(f"expected {target}, got a state without it")
        record = self.left.pop(0)
        names, known = target.accumulators.keys(), record.accumulators.keys()
        if [*names, *known] == ["ema", "average"]:  # the name that jgd 0.1 gave an average
            record = _Record("", {**record.fields, "ema": record.fields["average"]})
            del record.fields["average"]
        kinds = {target.kind, record.kind} - {""}
        if record.accumulators.keys() != names or len(kinds) > 1:
            raise _Mismatch(f"expected {target}, got {record}")
        return record

    def matching_counters(self) -> Iterator[_Record]:
        """Yield a counter of the state for each of the template, or the count they all agree on."""
        counters = lambda records: [record for record in records if not record.accumulators]
        targets, sources = counters(_records(self.template)), counters(self.records)
        if len(targets) == len(sources):
            yield from sources
        else:
            yield from [_Record("", {"count": self.common_count()})] * len(targets)

    def common_count(self) -> Any:
        """Return the count of the counters or, if there are none, of the accumulators."""
        counters = [record for record in self.records if not record.accumulators]
        fields = [record.fields for record in counters or self.records]
        counts = [x for own in fields for name, x in own.items() if name in _COUNTS]
        counts = counts or [own["step_count"] - 1 for own in fields if "step_count" in own]
        if not counts:
            raise TreeError(
                "a schedule needs a count of the steps so far, but the state has none. Convert it"
                " for a constant number and wrap it in jgd.pytree.ScheduledState(count, state)"
            )
        known = {int(x) for x in counts if not isinstance(x, Tracer) and not jnp.ndim(x)}
        if len(known) > 1:
            raise TreeError(f"the counts of the state must agree, got {sorted(known)}")
        return counts[0]

    def value(self, record: _Record, name: str, target: Any) -> Any:
        """Return a field of the template, filled."""
        if name in _CONSTANTS:
            return target
        fields = record.fields
        if name in _COUNTS and name not in fields:
            counts = [fields[known] for known in sorted(_COUNTS) if known in fields]
            return _like(target, counts[0] if counts else self.common_count(), name)
        if name not in fields:
            raise _Mismatch(f"expected a field {name}, got {record}")
        return _like(target, fields[name], name)

    def logs(self, target: dict[str, Any], steps: Any) -> dict[str, Any]:
        """Return the mean logarithms of decays, from the state or from stepping `tx`."""
        own, index = self.latest.fields, self.decays
        self.decays += 1
        known = {n: [own[k] for k in (n, *_OLD_LOGS.get(n, [])) if k in own] for n in target}
        if all(known.values()):
            return {name: _like(x, known[name][0], name) for name, x in target.items()}
        small = jax.tree.map(lambda x: jnp.zeros([1] * len(x.shape), x.dtype), self.params)
        step = lambda _, state: self.tx.update(small, state, small, value=jnp.ones([]))[1]
        state = jax.lax.fori_loop(0, steps, step, self.tx.init(small))
        is_scheduled = lambda node: isinstance(node, ScheduledDecayState)
        nodes = jax.tree.leaves(state, is_leaf=is_scheduled)
        return list(filter(is_scheduled, nodes))[index].logs


def _like(target: Any, value: Any, name: str) -> Any:
    """Return `value` in the containers and dtypes of `target`."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    values = {_path(path): x for path, x in jax.tree_util.tree_leaves_with_path(value)}
    targets = {_path(path): x for path, x in leaves}
    for path in sorted(targets.keys() ^ values.keys()):
        has = "has a leaf" if path in values else "has no leaf"
        raise _Mismatch(f"{name} of the state {has} at {path or 'its root'}, unlike the parameters")
    return structure.unflatten([_cast(values[path], x, name + path) for path, x in targets.items()])


def _cast(x: Any, target: jax.ShapeDtypeStruct, name: str) -> Any:
    if jnp.shape(x) != target.shape:
        raise _Mismatch(f"{name} must have shape {target.shape}, got {jnp.shape(x)}")
    if jnp.iscomplexobj(x) and not jnp.issubdtype(target.dtype, jnp.complexfloating):
        raise TreeError(f"{name} must be real, got {x.dtype}")
    is_key = jnp.issubdtype(target.dtype, jax.dtypes.prng_key)
    return x if is_key else jnp.asarray(x, target.dtype)


def _path(path: Any) -> str:
    """Return a path in one spelling for dict keys, indices and field names, as in checkpoints."""
    parts = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
    return "".join(f"[{part}]" for part in parts)
