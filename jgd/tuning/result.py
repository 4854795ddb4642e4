"""The result of a sweep: a ranked table of settings, their curves, and states of the best.

    facts = Facts.of(plan)              # a fold over the events: ledger and curves
    facts.apply(event)
    make_result(facts, has_state, setting_and_state)

A row is a setting, in the order of `Ledger.ranked`.
"""

import bisect
import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jgd import diagnosis
from jgd.training import TrainState
from jgd.tuning.devices import checkpointer, is_writer
from jgd.tuning.events import DIVERGED, ENDINGS, FINISHED, REACHED, Cut, Report
from jgd.tuning.ledger import Ledger
from jgd.tuning.plan import Group, Plan, plain

__all__ = ["Best", "Curves", "Facts", "Result", "make_result"]


class Curves(NamedTuple):
    """One value per report for all lanes of a group; row setting * seeds + seed."""

    step: np.ndarray  # (reports,): steps done; curves of a lane are NaN after its end
    train_loss: np.ndarray  # (lanes, reports): means since the previous report
    metrics: dict[str, np.ndarray]  # by name in `evaluate`, each (lanes, reports)


class Best(NamedTuple):
    """One of the best settings, and its trained state."""

    row: dict[str, Any]
    setting: Any  # without a lane axis
    state: Any  # of the best seed at the report that counts; None if it is not stored

    @property
    def params(self) -> Any:
        """The trained parameters of a supervised task.

        Raises: ValueError if the state is not stored, or is the state of a `Run`.
        """
        if self.state is None:
            raise ValueError(
                "best.params: the state of the best setting is not stored. Give jgd.load the task,"
                " or train the setting to its end"
            )
        if not hasattr(self.state, "params"):
            raise ValueError(
                "best.params: the sweep must train a jgd.Task, got a jgd.Run. Use best.state"
            )
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
    ledger: Ledger  # step, value, loss and ending of each lane

    def to_pandas(self) -> Any:
        """Return the rows as a `pandas.DataFrame`; pandas must be installed."""
        import pandas

        return pandas.DataFrame(self.rows)

    def save_best(self, path: str | Path) -> None:
        """Write one orbax checkpoint of the best setting with its state.

            result.save_best("best")
            orbax.checkpoint.StandardCheckpointer().restore(os.path.abspath("best"))["params"]

        The checkpoint holds "setting", "state" and, for a `Task`, "params". Its metadata are the
        row of the table and the repr of the setting.

        Args:
          path: a new folder for the checkpoint.

        Raises: FileExistsError if the path exists, ValueError if the state is not stored.
        """
        path, (row, setting, state) = Path(path).absolute(), self.best
        if path.exists():
            raise FileExistsError(f"save_best: {path} exists. Give a new path")
        if state is None:
            raise ValueError(
                "save_best: the state of the best setting is not stored. Give jgd.load the task, or"
                " train the setting with jgd.train"
            )
        if not is_writer():
            return
        path.mkdir(parents=True)  # if it cannot be created, orbax's threads wait for five minutes
        path.rmdir()
        tree = {"setting": setting, "state": state}
        if isinstance(state, TrainState):
            tree["params"] = state.params
        with contextlib.closing(checkpointer()) as orbax:
            orbax.save(path, tree, custom_metadata=plain({"row": row, "setting": repr(setting)}))

    def __repr__(self) -> str:
        return f"<{len(self.rows)} settings, best: {self.best.row}>"


class Facts(NamedTuple):
    """Ledger and curves of a sweep, as its events so far determine them."""

    plan: Plan
    ledger: Ledger
    curves: dict[str, Curves]  # by group

    @classmethod
    def of(cls, plan: Plan) -> "Facts":
        """Return the facts before the first event."""
        curves, steps = dict[str, Curves](), np.array(plan.reports)
        for group in plan.groups:
            empty = np.full((group.settings * plan.seeds, len(steps)), np.nan)
            metrics = {name: empty.copy() for name in plan.metrics}
            curves[group.name] = Curves(steps, empty, metrics)
        return cls(plan, Ledger(plan), curves)

    def apply(self, event: Report | Cut) -> None:
        """Fold an event into ledger and curves, in place."""
        self.ledger.apply(event)
        if isinstance(event, Report):
            curves = self.curves[event.group]
            column = bisect.bisect_left(self.plan.reports, event.step)
            curves.train_loss[event.lanes, column] = event.loss
            for name, values in event.metrics.items():
                curves.metrics[name][event.lanes, column] = values


def make_result(
    facts: Facts,
    has_state: np.ndarray | None = None,
    setting_and_state: Callable[[int, int | None], tuple[Any, Any]] = lambda setting, lane: (
        None,
        None,
    ),
) -> Result:
    """Return the result of a sweep. Lanes that are alive count as out of budget.

    Args:
      has_state: mask of the lanes whose states are stored. None: no state is stored.
      setting_and_state: (setting, lane of its best seed) -> the setting and the state of the lane.
        The lane is None if its state is not stored.
    """
    plan, ledger, curves = facts
    if ledger.alive.any():
        ledger = copy.deepcopy(ledger)
        ledger.apply(Cut(None, plan.by_group(np.flatnonzero(ledger.alive))))
    rows = [row for group in plan.groups for row in _rows(plan, group, ledger, curves[group.name])]
    settings = np.arange(len(rows))
    order, best = ledger.ranked(settings), ledger.best_lanes(settings)
    tied = _tied(ledger, order).tolist()
    ranked = [
        {"rank": place + 1, "tied": tied[place], **rows[setting]}
        for place, setting in enumerate(order.tolist())
    ]
    top = list[Best]()
    all_started = ledger.step[plan.lanes_of(settings)].all(1)
    loadable = np.full(len(rows), False) if has_state is None else has_state[best] & all_started
    for place in sorted({0, *np.flatnonzero(loadable[order])[: plan.keep].tolist()}):
        setting = int(order[place])
        lane = int(best[setting]) if loadable[setting] else None
        top.append(Best(ranked[place], *setting_and_state(setting, lane)))
    return Result(ranked, curves, top[0], top, plan.metric, plan.mode, plan, ledger)


@np.errstate(invalid="ignore")
def _rows(plan: Plan, group: Group, ledger: Ledger, curves: Curves) -> list[dict[str, Any]]:
    """Return a row for each setting of a group."""
    first = plan.offset(group.name)
    lanes = slice(first, first + group.settings * plan.seeds)
    by_setting = lambda values: np.asarray(values).reshape(-1, plan.seeds)
    verdicts, losses = map(by_setting, _verdicts(plan, ledger, lanes, curves))
    columns = dict[str, Any](group.axes)
    for name in sorted(plan.metrics, key=lambda name: name != plan.metric):
        values = by_setting(_at(plan, ledger.at[lanes], curves.metrics[name]))
        columns[name] = values.mean(1)
        if plan.seeds > 1:
            columns[f"{name}_se"] = _standard_error(values)
    if plan.target is not None:
        columns["steps_to_target"] = by_setting(ledger.reached[lanes]).mean(1)
    columns["final_loss"] = losses.mean(1)
    if plan.best == "ever":
        columns["best_at"] = by_setting(ledger.at[lanes]).mean(1)
    endings, at = by_setting(ledger.ending[lanes]).max(1), by_setting(ledger.step[lanes]).min(1)
    rows = list[dict[str, Any]]()
    for setting in range(group.settings):
        numbers = {name: float(values[setting]) for name, values in columns.items()}
        row: dict[str, Any] = {"optimizer": group.name}
        row |= {name: numbers.pop(name) for name in group.axes}
        row |= {**group.fixed, **numbers, "optimizer": group.name}
        row["verdict"] = _most_frequent(verdicts[setting])
        row["ended"], row["at"] = ENDINGS[endings[setting]], int(at[setting])
        row["seeds"], row["setting"] = plan.seeds, setting
        rows.append(row)
    return rows


def _at(plan: Plan, steps: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Return the value of each lane at its report at this step; NaN before the first report."""
    columns = np.minimum(np.searchsorted(plan.reports, steps), len(plan.reports) - 1)
    return np.where(steps > 0, curve[np.arange(len(steps)), columns], np.nan)


def _verdicts(
    plan: Plan, ledger: Ledger, lanes: slice, curves: Curves
) -> tuple[np.ndarray, np.ndarray]:
    """Return the verdict on each lane (empty if there is none), and its final loss."""
    ending, steps = ledger.ending[lanes], ledger.step[lanes]
    statistics = jax.tree.map(lambda x: x[lanes], ledger.statistics)
    verdicts = diagnosis.verdict(statistics, np.maximum(steps, 4)).astype(object)
    verdicts[(steps < 4) | ~ledger.judged[lanes]] = ""
    verdicts[ending == DIVERGED] = "diverged"
    verdicts[ending == REACHED] = "good"
    if not plan.verdict:
        verdicts[:] = ""
    losses = _at(plan, steps, curves.train_loss)
    return verdicts, np.where(ending == FINISHED, statistics.final_loss, losses)


@np.errstate(invalid="ignore")
def _standard_error(values: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean of each row; NaN if a value is not finite."""
    finite = np.isfinite(values.sum(1))
    spread = np.std(np.where(finite[:, None], values, 0), axis=1, ddof=1)
    return np.where(finite, spread / math.sqrt(values.shape[1]), math.nan)


@np.errstate(invalid="ignore")
def _tied(ledger: Ledger, order: np.ndarray) -> np.ndarray:
    """Return a mask of the ranked settings that are tied with the best one.

    A setting is tied if its mean is worse by at most the standard error of the difference.
    """
    scores = ledger.scores(order)
    if scores.shape[1] == 1:
        tied = scores[:, 0] == scores[0, 0]
    else:
        errors = _standard_error(scores)
        means = scores.mean(1)
        tied = means - means[0] <= np.hypot(errors, errors[0])
    tied &= np.isfinite(scores).all(1) & (ledger.shortfall(order) == ledger.shortfall(order[:1]))
    # with a target, the score is a number of steps or a metric, which are not comparable
    reached = np.isfinite(ledger.reached[ledger.plan.lanes_of(order)].max(1))
    tied &= reached == reached[0]
    tied[0] = True
    return tied


def _most_frequent(verdicts: np.ndarray) -> str:
    """Return the most frequent verdict of the seeds; of equally frequent ones, the worst."""

    names, counts = np.unique(verdicts.astype(str), return_counts=True)
    badness = lambda v: diagnosis.VERDICTS.index(v) if v in diagnosis.VERDICTS else -1
    return str(max(names[counts == counts.max()], key=lambda name: badness(str(name))))
