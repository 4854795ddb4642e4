"""Checks of the arguments of a sweep, before anything is compiled. Each error is one line.

inputs = check_inputs(task, settings, options, stop)
inputs.run, inputs.groups, inputs.metrics
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jgd.checks import admit, refuse, traceable
from jgd.lanes import check_numbers
from jgd.nodes import brief, is_number
from jgd.pytree import Monitor
from jgd.stopping import early_stopping
from jgd.training import Run, Task, check_task, start, supervised
from jgd.tuning import devices
from jgd.tuning.options import Training
from jgd.tuning.plan import Plan, ranked_by
from jgd.tuning.space import Lanes, lanes_of
from jgd.tuning.streams import Stream

__all__ = ["Inputs", "check_inputs", "extended", "first_setting", "resumed"]

# columns of the table and the journal, which no metric may be named
RESERVED = (
    *("rank", "tied", "optimizer", "final_loss", "verdict", "seeds", "ended", "at", "cut"),
    *("best_at", "setting", "steps_to_target"),
    *("tile", "group", "step", "lanes", "train_loss", "seen"),
)


class Inputs(NamedTuple):
    """Arguments of a sweep that passed the checks."""

    run: Run
    groups: dict[str, Lanes]
    batch: Any  # the first batch
    metrics: list[str]
    stop: Monitor | None


def check_inputs(task: Any, settings: Any, options: Training, stop: Any) -> Inputs:
    """Check the arguments of a sweep and return its inputs.

    Raises: ValueError or TypeError, naming the argument, for inputs that a sweep cannot train.
    """
    check_task(options.function, task, Task, Run)
    run = task if isinstance(task, Run) else supervised(task)
    groups = _groups(settings)
    batch = _first_batch(run.batch, options.order)
    metrics = _metrics(run, groups, batch)
    mode = ranked_by(metrics, options)[1]
    return Inputs(run, groups, batch, metrics, _monitor(stop, mode))


def _groups(settings: Any) -> dict[str, Lanes]:
    """Return the batches of settings by name."""
    if not isinstance(settings, dict):
        settings = {_name_of(settings): settings}
    groups = dict[str, Lanes]()
    for name, batch in settings.items():
        if not isinstance(name, str):
            refuse("sweep: the name of a group", "a string", name)
        if len(settings) > 1 and isinstance(batch, np.ndarray | jax.Array):
            cure = ". If the dict is one batch, name it: {'batch': settings}"
            refuse(f"sweep: settings[{name!r}]", "a batch of settings", batch, cure)
        several = type(batch) is dict and any(isinstance(x, Lanes) for x in batch.values())
        named = {f"{name} {label}": x for label, x in batch.items()} if several else {name: batch}
        for label, lanes in named.items():
            if label in groups:
                raise ValueError(
                    f"sweep: settings must have distinct names of groups, got {label!r} twice"
                )
            groups[label] = lanes_of(lanes)
    if not any(map(len, groups.values())):
        raise ValueError("sweep: settings must hold at least one setting, got none")
    for name, lanes in groups.items():
        _check_learning_rates(name, lanes)
    return groups


def _check_learning_rates(name: str, lanes: Lanes) -> None:
    """Raise ValueError for a learning rate that is negative or NaN."""
    leaves = jax.tree_util.tree_leaves_with_path(lanes.settings)
    named = {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}
    rates = {number: x for number, x in named.items() if number.endswith("learning_rate")}
    for number, values in rates.items():
        values = np.asarray(values, np.float64)
        if not (values >= 0).all():
            setting = int(np.argmin(values >= 0))
            raise ValueError(
                f"sweep: {name}: {number} must be at least 0, got {values[setting]:g} in setting"
                f" {setting}"
            )


def _name_of(settings: Any) -> str:
    """Return the name of a group that was given without one: its optimizer, or "setting"."""
    inner = settings.settings if isinstance(settings, Lanes) else settings
    known = isinstance(inner, optax.GradientTransformation)
    return repr(inner).partition("(")[0] if known else "setting"


def _first_batch(make: Callable[..., Any], order: str) -> Any:
    """Return the first batch.

    Raises: ValueError for NaN in the data, and for an order of batches that `make` cannot give.
    """
    streamed = isinstance(make, Stream)
    if order == "own" and streamed:
        raise ValueError(
            "sweep: order must be 'shared' for a stream, got 'own'. Use jgd.minibatches"
        )
    if order == "own" and "seed" not in inspect.signature(make).parameters:
        raise ValueError(
            "sweep: order must be 'shared' unless batch is a function of (step, seed=None), got"
            " 'own'. Use jgd.minibatches with a batch_size"
        )
    first = make.first if streamed else make(0)
    data = None if streamed or jax.tree_util.all_leaves([make]) else make
    check_numbers("sweep", first, "a batch")
    if not streamed:
        with traceable("sweep: batch"):
            jax.eval_shape(make, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(first if data is None else data):
        if jnp.issubdtype(jax.typeof(leaf).dtype, jnp.floating) and jnp.isnan(leaf).any():
            nan = np.isnan(np.asarray(leaf, np.float64))
            source = "the first batch" if data is None else "the data"
            row = f", first in row {np.argwhere(nan)[0][0]}" if nan.ndim else ""
            name = jax.tree_util.keystr(path) or "the array"
            raise ValueError(
                f"sweep: {source} must not hold NaN, got NaN in {name}{row}. Remove or replace it"
            )
    return first


def _metrics(run: Run, groups: Mapping[str, Lanes], batch: Any) -> list[str]:
    """Return the names of the metrics that `evaluate` reports, without training.

    Raises: ValueError unless they are the same for all groups, and no columns of the table.
    """
    reported = {group: _metrics_of(run, lanes, batch) for group, lanes in groups.items()}
    first, expected = next(iter(reported.items()))
    for group, names in reported.items():
        if set(names) != set(expected):
            raise ValueError(
                f"sweep: evaluate must report the same metrics for all groups, got"
                f" {', '.join(expected)} for {first} and {', '.join(names)} for {group}"
            )
    columns = {name for lanes in groups.values() for name in (*lanes.axes, *lanes.fixed, *RESERVED)}
    for name in columns.intersection(expected):
        raise ValueError(
            f"sweep: evaluate must not report {name!r}, which is a column of the table. Rename the"
            " metric"
        )
    return expected


def _metrics_of(run: Run, lanes: Lanes, batch: Any) -> list[str]:
    """Return the names of the metrics of one group. Traces the run, and checks what it returns."""
    without_lanes = lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.asarray(x).dtype)
    setting = jax.tree.map(without_lanes, lanes.settings)
    with traceable("sweep: init"):
        state = jax.eval_shape(functools.partial(start, run), setting, jax.random.key(0))
    names: list[str] = []

    def update(setting: Any, state: Any, batch: Any) -> Any:
        after = run.update(setting, state, batch)
        if not isinstance(after, tuple) or len(after) != 2 or not isinstance(after[1], dict):
            refuse("sweep: update", "a function that returns (state, metrics)", after)
        if not _is_scalar(after[1].get("loss")):
            raise ValueError(
                "sweep: update must report a scalar under the name 'loss', got"
                f" {brief(after[1].get('loss'))}"
            )
        shapes = [jax.tree.map(np.shape, tree) for tree in (state, after[0])]
        if shapes[0] != shapes[1]:
            expected = f"a state with the shapes before it, {shapes[0]}"
            refuse("sweep: the state after update", expected, shapes[1])
        return after

    def evaluate(setting: Any, state: Any) -> None:
        values = run.evaluate(setting, state)
        if not isinstance(values, dict) or not values:
            raise ValueError(f"sweep: evaluate must return a dict of scalars, got {brief(values)}")
        for name, value in values.items():
            if not isinstance(name, str):
                refuse("sweep: the name of a metric", "a string", name)
            if not _is_scalar(value):
                raise ValueError(
                    f"sweep: metric {name} of evaluate must be a scalar, got {brief(value)}"
                )
        names.extend(values)  # in the user's order; JAX sorts names

    with traceable(f"sweep: {'loss' if run.begin else 'update'}"):
        jax.eval_shape(update, setting, state, batch)
    with traceable("sweep: evaluate"):
        jax.eval_shape(evaluate, setting, state)
    return names


def _is_scalar(x: Any) -> bool:
    """Return whether a value is a real scalar; a bool counts as 0 or 1."""
    a_bool = isinstance(x, bool) or str(getattr(x, "dtype", "")) == "bool"
    return (is_number(x) or a_bool) and np.shape(x) == ()


def _monitor(stop: Any, mode: Any) -> Monitor | None:
    """Return the monitor for early stopping, which must have the mode of the metric."""
    if stop is None:
        return None
    if isinstance(stop, Monitor):
        if getattr(stop, "mode", mode) != mode:
            raise ValueError(
                f"sweep: stop must have mode {mode!r}, the mode of the metric, got {stop.mode!r}"
            )
        return stop
    if isinstance(stop, bool) or not hasattr(stop, "__index__"):
        raise ValueError(
            f"sweep: stop must be jgd.stopping.early_stopping(...) or an integer, got {stop!r}"
        )
    return early_stopping(patience=admit("sweep: stop", stop, int), mode=mode)


# --- resuming a sweep ------------------------------------------------------------------------


def resumed(plan: Plan, written: Plan, what: str = "resume") -> Plan:
    """Return the plan of a resumed sweep, with the widths of the plan that it was started with.

    On another number or kind of devices, results agree to rounding.

    Args:
      what: start of the error.

    Raises: ValueError, naming the difference, if `written` is the plan of another sweep.
    """
    if difference := _difference(_without_layout(plan), _without_layout(written), ""):
        raise ValueError(
            f"{what}: the folder holds another sweep: {difference}. Give the arguments it was"
            " started with, as written in plan.json"
        )
    return _with_layout(plan, written)


def extended(plan: Plan, earlier: Sequence[Plan]) -> Plan:
    """Return the plan of an extended sweep; groups of the earlier plans keep their widths.

    Raises: ValueError, with the reason, if the lanes would differ from those of a single sweep.
    """
    for each in (plan, *earlier):
        for name in ("halving", "budget", "seconds"):
            if (value := getattr(each, name)) is not None:
                raise ValueError(
                    f"extend: {name} must be None in both sweeps, got {value}: it makes the end of"
                    " a lane depend on the other lanes. Start a sweep in a new folder"
                )
    comparable = lambda x: {k: v for k, v in _without_layout(x).items() if k not in EXTENDABLE}
    if difference := _difference(comparable(plan), comparable(earlier[0]), ""):
        raise ValueError(
            f"extend: the folder holds a sweep with other arguments: {difference}. Start a sweep in"
            " a new folder"
        )
    for each in earlier:
        plan = _with_layout(plan, each)
    return plan


def first_setting(groups: Mapping[str, Lanes], earlier: Sequence[Plan]) -> Any:
    """Return the setting that the digest of the task uses: the first one of the first segment.

    Without earlier segments, or if the groups lack that setting, it is the first of the groups.
    """
    name, row = next(iter(groups)), 0
    for group in (plan.groups[0] for plan in earlier[:1]):
        if group.name in groups and group.digests[0] in groups[group.name].digests:
            name, row = group.name, groups[group.name].digests.index(group.digests[0])
    return jax.tree.map(lambda x: jnp.asarray(x)[row], groups[name].settings)


# entries that an extension may change
EXTENDABLE = ("groups", "seeds", "brackets", "keep")


def _with_layout(plan: Plan, written: Plan) -> Plan:
    """Return `plan` with the widths of the groups of `written`."""
    groups = list(plan.groups)
    for place, group in enumerate(groups):
        if group.name in written.index:
            old = written.groups[written.index[group.name]]
            widths = [devices.round_up(w, plan.devices) for w in old.widths]
            costs = dict(zip(widths, old.costs, strict=True))  # of equal widths, the last cost
            sizes = dict(width=widths[0], widths=list(costs), costs=list(costs.values()))
            groups[place] = dataclasses.replace(group, **sizes)
    same = (plan.devices, plan.device) == (written.devices, written.device)
    at_once = written.at_once if same else plan.at_once
    return dataclasses.replace(plan, groups=groups, at_once=at_once)


# entries that affect rounding and files only
LAYOUT = ("width", "widths", "costs", "devices", "device", "at_once", "checkpoint_every")


def _without_layout(plan: Plan) -> dict[str, Any]:
    """Return the entries of a plan that affect results beyond rounding."""
    written = plan.as_json()
    bare = lambda x: {name: value for name, value in x.items() if name not in LAYOUT}
    return {**bare(written), "groups": list(map(bare, written["groups"]))}


def _difference(now: Any, was: Any, path: str) -> str:
    """Return the first difference between two plans, as text; empty if there is none."""
    if isinstance(now, dict) and isinstance(was, dict):
        for name in [*now, *(name for name in was if name not in now)]:
            label = f"{path} {name}".strip()
            if text := _difference(now.get(name), was.get(name), label):
                return text
        return ""
    if isinstance(now, list) and isinstance(was, list) and len(now) == len(was):
        for index, pair in enumerate(zip(now, was, strict=True)):
            name = pair[0].get("name", index) if isinstance(pair[0], dict) else f"[{index}]"
            if text := _difference(*pair, f"{path} {name}"):
                return text
        return ""
    same = now == was or repr(now) == repr(was)  # NaN equals NaN

    return "" if same else f"{path} was {_short(was)} and is now {_short(now)}"


def _short(x: Any) -> str:
    return f"{len(x)} values" if isinstance(x, list) else brief(x)
