"""What a sweep refuses before anything is compiled: one line that names the thing and the cure."""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jgd.pytree import Monitor
from jgd.stopping import early_stopping
from jgd.training import Run, start
from jgd.tuning import devices
from jgd.tuning.plan import Plan
from jgd.tuning.space import Lanes, lanes_of
from jgd.tuning.streams import Stream

__all__ = ["adopted", "batch", "groups", "metrics", "monitor"]

# columns of the table and the journal, which no metric may be called
RESERVED = (
    *("rank", "tied", "optimizer", "final_loss", "verdict", "seeds", "ended", "at", "cut"),
    *("best_at", "setting", "steps_to_target"),
    *("tile", "group", "step", "lanes", "train_loss", "seen"),
)


def groups(settings: Any) -> dict[str, Lanes]:
    """Named batches of settings, whatever of them the user gave."""
    if not isinstance(settings, dict):
        settings = {_name_of(settings): settings}
    found: dict[str, Lanes] = {}
    for name, batch in settings.items():
        several = type(batch) is dict and any(isinstance(x, Lanes) for x in batch.values())
        named = {f"{name} {label}": x for label, x in batch.items()} if several else {name: batch}
        for label, lanes in named.items():
            if label in found:
                raise ValueError(f"sweep: two groups of settings are named {label!r}")
            found[label] = lanes_of(lanes)
    if not any(map(len, found.values())):
        raise ValueError("sweep: no settings")
    for name, lanes in found.items():
        _refuse_rates(name, lanes)
    return found


def _refuse_rates(name: str, lanes: Lanes) -> None:
    """No training descends by a rate that is negative, or no number."""
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
    inner = settings.settings if isinstance(settings, Lanes) else settings
    known = isinstance(inner, optax.GradientTransformation)
    return repr(inner).partition("(")[0] if known else "setting"


def batch(make: Callable[..., Any], order: str) -> Any:
    """The first batch; refuses data with NaN, and a wish for orders that it cannot fulfil."""
    if isinstance(make, Stream):
        if order == "own":
            raise ValueError("sweep: a stream has one order, order='own' wants jgd.minibatches")
        first, data = make.first, None
    else:
        if order == "own" and "seed" not in inspect.signature(make).parameters:
            raise ValueError(
                "sweep: order='own' wants batches by seed, as jgd.minibatches of a batch_size makes"
                " them: a function of (step, seed=None)"
            )
        first = make(0)
        data = None if jax.tree_util.all_leaves([make]) else make
    for path, leaf in jax.tree_util.tree_leaves_with_path(first if data is None else data):
        if not jnp.issubdtype(jax.typeof(leaf).dtype, jnp.floating):
            continue
        if jnp.isnan(leaf).any():
            nan = np.isnan(np.asarray(leaf, np.float64))
            where = "the first batch" if data is None else "the data"
            row = f", first in row {np.argwhere(nan)[0][0]}" if nan.ndim else ""
            name = jax.tree_util.keystr(path) or "the array"
            raise ValueError(f"sweep: NaN in {where}{row} of {name}: leave it out, or fill it")
    return first


def metrics(run: Run, groups: Mapping[str, Lanes], batch: Any) -> list[str]:
    """The names that `evaluate` reports, the same for all groups; nothing is trained for that."""
    found = {group: _metrics(run, lanes, batch) for group, lanes in groups.items()}
    first, expected = next(iter(found.items()))
    for group, names in found.items():
        if set(names) != set(expected):
            raise ValueError(
                f"sweep: evaluate reports {', '.join(expected)} for {first}, but"
                f" {', '.join(names)} for {group}: one set of metrics for all is wanted"
            )
    columns = {name for lanes in groups.values() for name in (*lanes.axes, *lanes.fixed, *RESERVED)}
    for name in columns.intersection(expected):
        raise ValueError(f"sweep: evaluate's {name} has the name of a column of the table")
    return expected


def _metrics(run: Run, lanes: Lanes, batch: Any) -> list[str]:
    one = lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.asarray(x).dtype)
    setting = jax.tree.map(one, lanes.settings)
    state = jax.eval_shape(functools.partial(start, run), setting, jax.random.key(0))
    _, of_update = jax.eval_shape(run.update, setting, state, batch)
    if "loss" not in of_update or of_update["loss"].shape:
        raise ValueError("sweep: update must report a scalar loss, under the name 'loss'")
    names: list[str] = []

    def evaluate(setting: Any, state: Any) -> dict[str, Any]:
        values = run.evaluate(setting, state)
        if not isinstance(values, dict) or not values:
            raise ValueError(f"sweep: evaluate must return a dict of scalars, got {values!r}")
        names.extend(values)  # in the order of the user, where jax sorts
        return values

    for name, value in jax.eval_shape(evaluate, setting, state).items():
        if getattr(value, "shape", None) != ():
            raise ValueError(f"sweep: metric {name} of evaluate must be a scalar, got {value!r}")
    return names


def monitor(stop: Any, mode: Any) -> Monitor | None:
    """The early stopping that was asked for, in the direction of the metric."""
    if stop is None:
        return None
    if isinstance(stop, Monitor):
        if getattr(stop, "mode", mode) != mode:
            raise ValueError(f"sweep: stop has mode {stop.mode!r}, the metric {mode!r}")
        return stop
    if isinstance(stop, bool) or not hasattr(stop, "__index__"):
        raise ValueError(f"sweep: stop must be jgd.stopping.early_stopping or an int, got {stop!r}")
    return early_stopping(patience=operator.index(stop), mode=mode)


def adopted(plan: Plan, written: Mapping[str, Any]) -> Plan:
    """The plan that a sweep was begun with; its widths are not probed again.

    On another number of devices, or devices of another kind, it goes on with exact values, and then
    agrees to rounding.

    Raises: ValueError, naming the difference, if it is the plan of another sweep.
    """
    if difference := _difference(_without_layout(plan.as_json()), _without_layout(written), ""):
        raise ValueError(f"resume: this is another sweep: its {difference}")
    groups = []
    for group, old in zip(plan.groups, written["groups"], strict=True):
        width, *menu = [devices.rounded(w, plan.devices) for w in old["menu"]]
        costs = dict(zip([width, *menu], old["costs"], strict=True))  # of equal widths the last
        made = dict(width=width, menu=list(costs), costs=list(costs.values()))
        groups.append(dataclasses.replace(group, **made))
    same = (plan.devices, plan.device) == (written["devices"], written["device"])
    at_once = written["at_once"] if same else plan.at_once
    return dataclasses.replace(plan, groups=groups, at_once=at_once)


LAYOUT = ("width", "menu", "costs", "devices", "device", "at_once")


def _without_layout(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What decides about the numbers but for rounding."""
    bare = lambda x: {name: value for name, value in x.items() if name not in LAYOUT}
    return {**bare(plan), "groups": list(map(bare, plan["groups"]))}


def _difference(now: Any, was: Any, path: str) -> str:
    """The first thing that two plans do not say alike."""
    if isinstance(now, dict) and isinstance(was, dict):
        for name in [*now, *(name for name in was if name not in now)]:
            label = f"{path} {name}".strip()
            if found := _difference(now.get(name), was.get(name), label):
                return found
        return ""
    if isinstance(now, list) and isinstance(was, list) and len(now) == len(was):
        for place, pair in enumerate(zip(now, was, strict=True)):
            name = pair[0].get("name", place) if isinstance(pair[0], dict) else f"[{place}]"
            if found := _difference(*pair, f"{path} {name}"):
                return found
        return ""
    return "" if now == was else f"{path} was {_short(was)} and is now {_short(now)}"


def _short(x: Any) -> str:
    if isinstance(x, list):
        return f"{len(x)} values"
    text = repr(x)
    return text if len(text) < 200 else text[:200] + "..."
