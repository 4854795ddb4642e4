"""What a sweep found: a ranked table of settings, their curves, and the best one to go on with.

A row is a setting, ranked as `jgd.tuning.prune` says: by the mean of the metric over its seeds,
those that went to their end before those that were cut, and those before what was not run.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jgd import diagnosis
from jgd.tuning.driver import Report, Sweep
from jgd.tuning.plan import Plan
from jgd.tuning.prune import CUT, DIVERGED, ENDINGS, FINISHED, OUT

__all__ = ["Best", "Collector", "Curves", "Result"]


class Curves(NamedTuple):
    """One value per report, for all lanes of a group; row setting * seeds + seed."""

    step: np.ndarray  # (reports,): steps done; NaN below for a lane that had ended before
    train_loss: np.ndarray  # (lanes, reports): means since the report before
    metrics: dict[str, np.ndarray]  # of `evaluate`, each (lanes, reports)


class Best(NamedTuple):
    """The winner, ready to go on training."""

    row: dict[str, Any]
    setting: Any  # without a lane axis
    state: Any  # of the run after its last step, for its best seed; None if no setting ended

    @property
    def params(self) -> Any:
        """The trained parameters, for a supervised task."""
        return self.state.params


class Result(NamedTuple):
    """What `sweep` returns."""

    rows: list[dict[str, Any]]  # ranked, best first
    curves: dict[str, Curves]  # by group
    best: Best
    metric: str
    mode: Literal["min", "max"]
    plan: Plan

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`; pandas must be installed."""
        import pandas

        return pandas.DataFrame(self.rows)

    def __repr__(self) -> str:
        return f"<{len(self.rows)} settings, best: {self.best.row}>"


class Collector:
    """Takes the reports of a sweep as they come, and makes the result of them."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.plan, self.groups, self.board = sweep.plan, sweep.groups, sweep.board
        self.curves: dict[str, Curves] = {}
        self.seen: dict[str, diagnosis.LossStatistics] = {}
        for group in self.plan.groups:
            lanes, reports = group.settings * self.plan.seeds, len(self.plan.reports)
            empty = lambda lanes=lanes, reports=reports: np.full((lanes, reports), np.nan)
            metrics = {name: empty() for name in self.plan.metrics}
            self.curves[group.name] = Curves(np.array(self.plan.reports), empty(), metrics)
        self.best: tuple[tuple, str, int, dict[int, Any]] | None = None
        self.open: dict[tuple[str, int], dict[int, Any]] = {}  # states of settings, by seed

    def add(self, report: Report) -> None:
        curves = self.curves[report.group]
        column = self.plan.reports.index(report.step)
        curves.train_loss[report.lanes, column] = report.loss
        for name, values in report.metrics.items():
            curves.metrics[name][report.lanes, column] = values
        if report.seen is not None:
            self._finish(report)

    def replay(self, line: dict[str, Any]) -> None:
        """A line of the journal, as if it happened now; states come from a checkpoint."""
        if "cut" in line:
            self.sweep.end(line["lanes"], OUT if line["cut"] is None else CUT)
            self.forget(line["lanes"])
            return
        group, lanes, step = line["group"], np.array(line["lanes"], int), line["step"]
        metrics = {name: np.array(line[name], np.float64) for name in self.plan.metrics}
        self.board.add(group, lanes, step, metrics)
        ended = np.array(line.get("ended", np.zeros(len(lanes))), np.int8)
        self.board.end(group, lanes[ended > 0], ended[ended > 0])
        seen = None
        if "seen" in line:
            like = diagnosis.statistics()
            values = {k: np.array(v, like._asdict()[k].dtype) for k, v in line["seen"].items()}
            seen = diagnosis.LossStatistics(**values)
        loss = np.array(line["train_loss"], np.float64)
        self.add(Report(line["tile"], group, step, lanes, loss, metrics, ended, seen, None, 0))

    def states(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """What a checkpoint keeps of the settings that ended: their names, and the states."""
        held = dict(self.open)
        if self.best is not None:
            _, group, setting, states = self.best
            held[group, setting] = states
        names, found = [], {}
        for (group, setting), states in held.items():
            for seed, state in states.items():
                name = f"ended-{self.board.order[group]}-{setting}-{seed}"
                names.append({"name": name, "group": group, "setting": setting, "seed": seed})
                found[name] = state
        return names, found

    def restore(self, names: list[dict[str, Any]], load: Callable[[str, Any], Any]) -> None:
        """Take the states of a checkpoint back, after the journal was replayed."""
        self.open, self.best = {}, None
        for entry in names:
            group, setting = entry["group"], entry["setting"]
            program = self.sweep.programs[self.board.order[group]]
            state = load(entry["name"], program.state_shape())
            self._keep(group, setting, entry["seed"], state)

    def forget(self, lanes: dict[str, list[int]]) -> None:
        """Settings of which some lanes were cut: the states of their other seeds."""
        for group, ids in lanes.items():
            for setting in {lane // self.plan.seeds for lane in ids}:
                self.open.pop((group, setting), None)

    def _keep(self, group: str, setting: int, seed: int, state: Any) -> None:
        """The state of a lane that ended; of settings that are whole only the best is kept."""
        states = self.open.setdefault((group, setting), {})
        states[seed] = state
        if len(states) == self.plan.seeds:
            del self.open[group, setting]
            rank = self.board.key(group, setting)
            if self.best is None or rank < self.best[0]:
                self.best = rank, group, setting, states

    def _finish(self, report: Report) -> None:
        """Keep the statistics, and the states if a setting that ended is the best so far."""
        assert report.seen is not None
        group, ended = report.group, np.flatnonzero(report.ended)
        if group not in self.seen:
            lanes = len(self.board.value[group])
            self.seen[group] = jax.tree.map(lambda x: np.zeros(lanes, x.dtype), report.seen)
        for kept, new in zip(self.seen[group], report.seen, strict=True):
            kept[report.lanes[ended]] = new[ended]
        for row, lane in enumerate(report.lanes[ended] if report.state is not None else ()):
            setting, seed = divmod(int(lane), self.plan.seeds)
            alone = self.plan.seeds == 1 and self.best is not None
            if alone and self.board.key(group, setting) > self.best[0]:  # type: ignore[index]
                continue
            state = jax.tree.map(lambda x, row=row: x[row], report.state)
            self._keep(group, setting, seed, state)

    def _last(self, group: str, name: str, setting: int) -> np.ndarray:
        """The last values of a metric for the seeds of a setting."""
        rows = self.board.lanes_of(setting)
        columns = np.searchsorted(self.plan.reports, self.board.step[group][rows])
        values = self.curves[group].metrics[name][
            rows, np.minimum(columns, len(self.plan.reports) - 1)
        ]
        return np.where(self.board.step[group][rows] > 0, values, np.nan).astype(np.float64)

    def _verdicts(self, group: str) -> tuple[np.ndarray, np.ndarray]:
        """The verdict, which wants all the steps, and the final training loss of each lane."""
        board, curves = self.board, self.curves[group]
        ending = board.ending[group]
        columns = np.searchsorted(self.plan.reports, board.step[group])
        columns = np.minimum(columns, len(self.plan.reports) - 1)
        losses = curves.train_loss[np.arange(len(ending)), columns].astype(np.float64)
        words = np.full(len(ending), "", object)
        words[ending == DIVERGED] = "diverged"
        whole = ending == FINISHED
        if whole.any():
            seen = jax.tree.map(lambda x: x[whole], self.seen[group])
            words[whole] = diagnosis.verdict(seen, self.plan.steps)
            losses[whole] = diagnosis.final_loss(seen, self.plan.steps)
        return words, losses

    @np.errstate(invalid="ignore")
    def _row(self, group: str, setting: int, verdicts: np.ndarray, losses: np.ndarray) -> dict:
        lanes = self.groups[group]
        seeds = self.board.lanes_of(setting)
        row: dict[str, Any] = {"optimizer": group}
        row |= {name: float(values[setting]) for name, values in lanes.axes.items()}
        row |= {name: str(value) for name, value in lanes.fixed.items()}
        for name in sorted(self.plan.metrics, key=lambda n: n != self.plan.metric):
            values = self._last(group, name, setting)
            row[name] = float(values.mean())
            if self.plan.seeds > 1:
                finite = np.isfinite(values).all()
                row[f"{name}_sd"] = float(np.std(values, ddof=1)) if finite else math.nan
        row["final_loss"] = float(losses[seeds].mean())
        row["verdict"] = _most(verdicts[seeds])
        row["ended"] = ENDINGS[max(self.board.ending[group][seeds].tolist())]
        row["at"] = int(self.board.step[group][seeds].min())
        row["seeds"] = self.plan.seeds
        return row

    def result(self) -> Result:
        """The result, once no lane goes on."""
        ranked = []
        for group in self.plan.groups:
            verdicts, losses = self._verdicts(group.name)
            for setting in range(group.settings):
                row = self._row(group.name, setting, verdicts, losses)
                ranked.append((self.board.key(group.name, setting), row))
        ranked.sort(key=lambda pair: pair[0])
        rows = [{"rank": place, **row} for place, (_, row) in enumerate(ranked, 1)]
        *_, order, setting = ranked[0][0]
        group = self.plan.groups[order].name
        chosen = jax.tree.map(lambda x: x[setting], self.groups[group].settings)
        state = None
        if self.best is not None and self.best[0] == ranked[0][0]:
            states = self.best[3]
            values = self._last(group, self.plan.metric, setting)
            worst = -np.inf if self.plan.mode == "max" else np.inf
            values = np.where(np.isfinite(values), values, worst)
            state = states[int(values.argmax() if self.plan.mode == "max" else values.argmin())]
        best = Best(rows[0], chosen, state)
        return Result(rows, self.curves, best, self.plan.metric, self.plan.mode, self.plan)


def _most(verdicts: np.ndarray) -> str:
    """The verdict of most seeds, the worse of two."""
    found, counts = np.unique(verdicts.astype(str), return_counts=True)
    worst = lambda v: diagnosis.VERDICTS.index(v) if v in diagnosis.VERDICTS else -1
    return str(max(found[counts == counts.max()], key=lambda v: worst(str(v))))
