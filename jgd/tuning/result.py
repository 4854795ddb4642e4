"""The result of a sweep: a ranked table of settings, their curves, and the best ones to train on.

    record = Record(plan)               # curves: a fold over the events, as the ledger is
    record.apply(event)
    make_result(plan, groups, ledger, record, states)

A row is a setting, in the order of `Ledger.ranked`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jgd import diagnosis
from jgd.tuning.events import DIVERGED, ENDINGS, FINISHED, REACHED, Cut, Report
from jgd.tuning.ledger import Ledger
from jgd.tuning.plan import Group, Plan
from jgd.tuning.space import Lanes

__all__ = ["Best", "Curves", "Record", "Result", "make_result"]


class Curves(NamedTuple):
    """One value per report for all lanes of a group; row setting * seeds + seed."""

    step: np.ndarray  # (reports,): steps done; the curves of a lane are NaN after its end
    train_loss: np.ndarray  # (lanes, reports): means since the report before
    metrics: dict[str, np.ndarray]  # of `evaluate`, each (lanes, reports)


class Best(NamedTuple):
    """One of the best settings, ready to train on."""

    row: dict[str, Any]
    setting: Any  # without a lane axis
    state: Any  # of the run, for its best seed, at the report that counts; None if there is none

    @property
    def params(self) -> Any:
        """The trained parameters of a supervised task. Raises ValueError if there are none."""
        if self.state is None:
            raise ValueError("the best setting did not come to an end, so there are no parameters")
        return self.state.params


class Result(NamedTuple):
    """Result of `sweep`."""

    rows: list[dict[str, Any]]  # ranked, best first
    curves: dict[str, Curves]  # by group
    best: Best
    kept: list[Best]  # best first, with their states: at most `keep`
    metric: str
    mode: Literal["min", "max"]
    plan: Plan

    def to_pandas(self) -> Any:
        """Return the rows as a `pandas.DataFrame`; pandas must be installed."""
        import pandas

        return pandas.DataFrame(self.rows)

    def __repr__(self) -> str:
        return f"<{len(self.rows)} settings, best: {self.best.row}>"


class Record:
    """The curves of a sweep, by group."""

    def __init__(self, plan: Plan) -> None:
        self.columns = {step: column for column, step in enumerate(plan.reports)}
        self.curves = dict[str, Curves]()
        for group in plan.groups:
            shape = group.settings * plan.seeds, len(plan.reports)
            metrics = {name: np.full(shape, np.nan) for name in plan.metrics}
            self.curves[group.name] = Curves(
                np.array(plan.reports), np.full(shape, np.nan), metrics
            )

    def apply(self, event: Report | Cut) -> None:
        """Fold an event into the curves."""
        if isinstance(event, Report):
            curves, column = self.curves[event.group], self.columns[event.step]
            curves.train_loss[event.lanes, column] = event.loss
            for name, values in event.metrics.items():
                curves.metrics[name][event.lanes, column] = values


def make_result(
    plan: Plan,
    groups: Mapping[str, Lanes],
    ledger: Ledger,
    record: Record,
    state_of: Callable[[int], Any] | None = None,
) -> Result:
    """Return the result of a sweep in which no lane is alive.

    Args:
      state_of: lane -> the state of the run, or None if it was not kept.
    """
    rows = [row for group in plan.groups for row in _rows(plan, group, groups, ledger, record)]
    order = ledger.ranked(np.arange(len(rows)))
    tied = _tied(ledger, order).tolist()
    ranked = [
        {"rank": place + 1, "tied": tied[place], **rows[setting]}
        for place, setting in enumerate(order.tolist())
    ]
    kept = list[Best]()
    for place, setting in enumerate(order):
        states = [state_of(lane) for lane in plan.lanes_of(setting)] if state_of else [None]
        whole = all(state is not None for state in states)
        if place == 0 or whole:
            scores = ledger.scores(np.array([setting]))[0]
            seeds = np.lexsort((scores, ledger.reached[plan.lanes_of(setting)]))
            state = states[seeds[0]] if whole else None  # of the first at the target, if any is
            kept.append(Best(ranked[place], _setting(plan, groups, setting), state))
        if sum(best.state is not None for best in kept) == plan.keep or state_of is None:
            break
    return Result(ranked, record.curves, kept[0], kept, plan.metric, plan.mode, plan)


def _setting(plan: Plan, groups: Mapping[str, Lanes], setting: int) -> Any:
    group = plan.group_of(setting * plan.seeds)
    row = setting - int(plan.first[group])
    return jax.tree.map(lambda x: x[row], groups[plan.groups[group].name].settings)


@np.errstate(invalid="ignore")
def _rows(
    plan: Plan, group: Group, groups: Mapping[str, Lanes], ledger: Ledger, record: Record
) -> list[dict[str, Any]]:
    """Return a row for each setting of a group."""
    first = plan.offset(group.name)
    mine = slice(first, first + group.settings * plan.seeds)
    by_setting = lambda values: np.asarray(values).reshape(-1, plan.seeds)
    curves = record.curves[group.name]
    verdicts, losses = map(by_setting, _verdicts(plan, ledger, mine, curves))
    lanes, columns = groups[group.name], dict[str, Any]()
    columns.update(lanes.axes)
    for name in sorted(plan.metrics, key=lambda name: name != plan.metric):
        values = by_setting(_at(plan, ledger.at[mine], curves.metrics[name]))
        columns[name] = values.mean(1)
        if plan.seeds > 1:
            columns[f"{name}_se"] = _standard_error(values)
    if plan.target is not None:
        columns["steps_to_target"] = by_setting(ledger.reached[mine]).mean(1)
    columns["final_loss"] = losses.mean(1)
    if plan.best == "ever":
        columns["best_at"] = by_setting(ledger.at[mine]).mean(1)
    endings, at = by_setting(ledger.ending[mine]).max(1), by_setting(ledger.step[mine]).min(1)
    fixed = {name: str(value) for name, value in lanes.fixed.items()}
    rows = list[dict[str, Any]]()
    for setting in range(group.settings):
        numbers = {name: float(values[setting]) for name, values in columns.items()}
        row: dict[str, Any] = {"optimizer": group.name}
        row |= {name: numbers.pop(name) for name in lanes.axes}
        row |= fixed | numbers
        row["verdict"] = _most_frequent(verdicts[setting])
        row["ended"], row["at"] = ENDINGS[endings[setting]], int(at[setting])
        row["seeds"], row["setting"] = plan.seeds, setting
        rows.append(row)
    return rows


def _at(plan: Plan, steps: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Return the value of each lane at its report of this step; NaN before the first report."""
    columns = np.minimum(np.searchsorted(plan.reports, steps), len(plan.reports) - 1)
    return np.where(steps > 0, curve[np.arange(len(steps)), columns], np.nan)


def _verdicts(
    plan: Plan, ledger: Ledger, mine: slice, curves: Curves
) -> tuple[np.ndarray, np.ndarray]:
    """Return the verdict on each lane, empty without one, and its final loss."""
    ending, steps = ledger.ending[mine], ledger.step[mine]
    seen = jax.tree.map(lambda x: x[mine], ledger.seen)
    verdicts = diagnosis.verdict(seen, np.maximum(steps, 4)).astype(object)
    verdicts[steps < 4] = ""
    verdicts[ending == DIVERGED] = "diverged"
    verdicts[ending == REACHED] = "good"
    if not plan.verdict:
        verdicts[:] = ""
    losses = _at(plan, steps, curves.train_loss)
    return verdicts, np.where(ending == FINISHED, seen.final_loss, losses)


@np.errstate(invalid="ignore")
def _standard_error(values: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean of each row; NaN if a value is not finite."""
    finite = np.isfinite(values.sum(1))
    spread = np.std(np.where(finite[:, None], values, 0), axis=1, ddof=1)
    return np.where(finite, spread / math.sqrt(values.shape[1]), math.nan)


@np.errstate(invalid="ignore")
def _tied(ledger: Ledger, order: np.ndarray) -> np.ndarray:
    """Return which ranked settings are no worse than the best by the error of the difference."""
    scores = ledger.scores(order)
    if scores.shape[1] == 1:
        tied = scores[:, 0] == scores[0, 0]
    else:
        errors = _standard_error(scores)
        means = scores.mean(1)
        tied = means - means[0] <= np.hypot(errors, errors[0])
    tied &= np.isfinite(scores).all(1) & (ledger.shortfall(order) == ledger.shortfall(order[:1]))
    # a number of steps does not compare with a metric
    reached = np.isfinite(ledger.reached[ledger.plan.lanes_of(order)].max(1))
    tied &= reached == reached[0]
    tied[0] = True
    return tied


def _most_frequent(verdicts: np.ndarray) -> str:
    """Return the most frequent verdict of the seeds, the worst of several."""
    names, counts = np.unique(verdicts.astype(str), return_counts=True)
    badness = lambda v: diagnosis.VERDICTS.index(v) if v in diagnosis.VERDICTS else -1
    return str(max(names[counts == counts.max()], key=lambda name: badness(str(name))))
