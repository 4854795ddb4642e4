"""What a sweep found: a ranked table of settings, their curves, and the best one to go on with.

A row is a setting: its score is the mean of the metric over seeds, and a seed whose metric is not
finite ranks it below all settings whose seeds are. Ties go to the lower held-out loss, then to the
setting that came first.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jgd import diagnosis
from jgd.tuning.driver import Report
from jgd.tuning.plan import Plan
from jgd.tuning.space import Lanes

__all__ = ["Best", "Collector", "Curves", "Result", "ranked_by"]


class Curves(NamedTuple):
    """One value per report, for all lanes of a group; row setting * seeds + seed."""

    step: np.ndarray  # (reports,): steps done
    train_loss: np.ndarray  # (lanes, reports): means since the report before
    metrics: dict[str, np.ndarray]  # of `evaluate`, each (lanes, reports)


class Best(NamedTuple):
    """The winner, ready to go on training."""

    row: dict[str, Any]
    setting: Any  # without a lane axis
    state: Any  # of the run after the last step, for its best seed

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

    def __repr__(self) -> str:
        return f"<{len(self.rows)} settings, best: {self.best.row}>"


def ranked_by(
    plan: Plan, metric: str | None, mode: Literal["min", "max"] | None
) -> tuple[str, Literal["min", "max"]]:
    """The metric to rank by and which end is best, with the defaults that `sweep` documents.

    Raises: ValueError for a metric that is not reported, or another mode.
    """
    if mode not in (None, "min", "max"):
        raise ValueError(f"sweep: mode must be 'min' or 'max', got {mode!r}")
    if metric not in (None, *plan.metrics):
        known = ", ".join(plan.metrics)
        raise ValueError(f"sweep: metric must be one of {known}, got {metric!r}")
    usual = [name for name in ("accuracy", "loss") if name in plan.metrics]
    chosen = metric or (usual or plan.metrics)[0]
    return chosen, mode or ("max" if "acc" in chosen else "min")


class Collector:
    """Takes the reports of a sweep as they come, and makes the result of them."""

    def __init__(
        self,
        plan: Plan,
        groups: Mapping[str, Lanes],
        metric: str | None = None,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        self.plan, self.groups = plan, groups
        self.metric: str
        self.mode: Literal["min", "max"]
        self.metric, self.mode = ranked_by(plan, metric, mode)
        self.curves: dict[str, Curves] = {}
        self.seen: dict[str, diagnosis.LossStatistics] = {}
        self.best: tuple[tuple, str, int, Any] | None = None
        self.open: dict[tuple[str, int], list[Any]] = {}  # states of settings with seeds to come

    def add(self, report: Report) -> None:
        group = next(g for g in self.plan.groups if g.name == report.group)
        lanes, reports = group.settings * self.plan.seeds, len(self.plan.reports)
        if report.group not in self.curves:
            empty = lambda: np.full((lanes, reports), np.nan)
            metrics = {name: empty() for name in report.metrics}
            self.curves[report.group] = Curves(np.array(self.plan.reports), empty(), metrics)
        curves = self.curves[report.group]
        column = self.plan.reports.index(report.step)
        curves.train_loss[report.lanes, column] = report.loss
        for name, values in report.metrics.items():
            curves.metrics[name][report.lanes, column] = values
        if report.seen is not None:
            self._finish(report, lanes)

    def _finish(self, report: Report, lanes: int) -> None:
        """Keep the statistics, and the states if a setting of this tile is the best so far."""
        assert report.seen is not None
        if report.group not in self.seen:
            empty = lambda x: np.zeros(lanes, x.dtype)
            self.seen[report.group] = jax.tree.map(empty, report.seen)
        for kept, new in zip(self.seen[report.group], report.seen, strict=True):
            kept[report.lanes] = new
        rows: dict[int, list[int]] = {}
        for row, lane in enumerate(report.lanes):
            rows.setdefault(int(lane) // self.plan.seeds, []).append(row)
        for setting, members in rows.items():
            waiting = self.open.pop((report.group, setting), [])
            if len(waiting) + len(members) < self.plan.seeds:  # the rest is in the next tile
                states = [jax.tree.map(lambda x, r=r: x[r], report.state) for r in members]
                self.open[report.group, setting] = waiting + states
                continue
            rank = self._rank(report.group, setting)
            if self.best is None or rank < self.best[0]:
                states = [jax.tree.map(lambda x, r=r: x[r], report.state) for r in members]
                self.best = rank, report.group, setting, waiting + states

    def _last(self, group: str, name: str, setting: int) -> np.ndarray:
        """The last values of a metric for the seeds of a setting."""
        seeds = slice(setting * self.plan.seeds, (setting + 1) * self.plan.seeds)
        return self.curves[group].metrics[name][seeds, -1].astype(np.float64)

    @np.errstate(invalid="ignore")
    def _rank(self, group: str, setting: int) -> tuple:
        """Sorts settings, best first."""
        values = self._last(group, self.metric, setting)
        score = values.mean() if np.isfinite(values).all() else math.inf
        if math.isfinite(score) and self.mode == "max":
            score = -score
        loss = math.inf
        if "loss" in self.curves[group].metrics:
            loss = float(self._last(group, "loss", setting).mean())
        order = [g.name for g in self.plan.groups].index(group)
        return float(score), loss if math.isfinite(loss) else math.inf, order, setting

    @np.errstate(invalid="ignore")
    def _row(self, group: str, setting: int, verdicts: np.ndarray, losses: np.ndarray) -> dict:
        lanes = self.groups[group]
        seeds = slice(setting * self.plan.seeds, (setting + 1) * self.plan.seeds)
        row: dict[str, Any] = {"optimizer": group}
        row |= {name: float(values[setting]) for name, values in lanes.axes.items()}
        row |= {name: str(value) for name, value in lanes.fixed.items()}
        for name in sorted(self.curves[group].metrics, key=lambda n: n != self.metric):
            values = self._last(group, name, setting)
            row[name] = float(values.mean())
            if self.plan.seeds > 1:
                finite = np.isfinite(values).all()
                row[f"{name}_sd"] = float(np.std(values, ddof=1)) if finite else math.nan
        row["final_loss"] = float(losses[seeds].mean())
        found, counts = np.unique(verdicts[seeds], return_counts=True)
        worst = lambda v: diagnosis.VERDICTS.index(str(v))
        most = counts == counts.max()
        row["verdict"] = str(max(found[most], key=worst))  # most seeds' verdict, the worse of two
        row["seeds"] = self.plan.seeds
        return row

    def result(self) -> Result:
        """The result, once all tiles have ended."""
        assert self.best is not None
        ranked = []
        for group in self.plan.groups:
            verdicts = diagnosis.verdict(self.seen[group.name], self.plan.steps)
            losses = diagnosis.final_loss(self.seen[group.name], self.plan.steps)
            for setting in range(group.settings):
                row = self._row(group.name, setting, verdicts, losses)
                ranked.append((self._rank(group.name, setting), row))
        ranked.sort(key=lambda pair: pair[0])
        rows = [{"rank": place, **row} for place, (_, row) in enumerate(ranked, 1)]
        _, group, setting, states = self.best
        values = self._last(group, self.metric, setting)
        values = np.where(np.isfinite(values), values, -np.inf if self.mode == "max" else np.inf)
        seed = int(values.argmax() if self.mode == "max" else values.argmin())
        chosen = jax.tree.map(lambda x: x[setting], self.groups[group].settings)
        best = Best(rows[0], chosen, states[seed])
        return Result(rows, self.curves, best, self.metric, self.mode, self.plan)
