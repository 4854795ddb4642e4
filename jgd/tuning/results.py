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
from jgd.tuning.driver import Cut, Report, Sweep
from jgd.tuning.plan import Plan
from jgd.tuning.prune import CUT, DIVERGED, ENDINGS, FINISHED, OUT, REACHED

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
    state: Any  # of the run, for its best seed, at the report that counts; None if there is none

    @property
    def params(self) -> Any:
        """The trained parameters, for a supervised task. Raises ValueError if there are none."""
        if self.state is None:
            raise ValueError("the best setting did not come to an end, so there are no parameters")
        return self.state.params


class Result(NamedTuple):
    """What `sweep` returns."""

    rows: list[dict[str, Any]]  # ranked, best first
    curves: dict[str, Curves]  # by group
    best: Best
    kept: list[Best]  # the best first, with their states: as many as `keep` came to an end
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
        self.best: list[
            tuple[tuple[Any, ...], str, int, dict[int, Any]]
        ] = []  # with rank, best first
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
            self.cut(Cut(line["cut"], line["lanes"], {}))
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
        held = self.open | {(group, setting): states for _, group, setting, states in self.best}
        names, found = [], {}
        for (group, setting), states in held.items():
            for seed, state in states.items():
                name = f"ended-{self.board.order[group]}-{setting}-{seed}"
                names.append({"name": name, "group": group, "setting": setting, "seed": seed})
                found[name] = state
        return names, found

    def restore(self, names: list[dict[str, Any]], load: Callable[[str, Any], Any]) -> None:
        """Take the states of a checkpoint back, after the journal was replayed."""
        self.open, self.best = {}, []
        for entry in names:
            group, setting = entry["group"], entry["setting"]
            program = self.sweep.programs[self.board.order[group]]
            state = load(entry["name"], program.result_shape())
            self._keep(group, setting, entry["seed"], state)

    def cut(self, cut: Cut) -> None:
        """Settings of which some lanes were cut; of those that a budget ended the best stay."""
        for group, lanes in cut.lanes.items():
            for setting in {lane // self.plan.seeds for lane in lanes}:
                ended = self.open.pop((group, setting), {})
                states = ended | {
                    lane % self.plan.seeds: state
                    for (name, lane), state in cut.states.items()
                    if name == group and lane // self.plan.seeds == setting
                }
                if cut.states and len(states) == self.plan.seeds:
                    self._rank(group, setting, states)

    def _keep(self, group: str, setting: int, seed: int, state: Any) -> None:
        """The state of a lane that ended; of settings that are whole only the best are kept."""
        states = self.open.setdefault((group, setting), {})
        states[seed] = state
        if len(states) == self.plan.seeds:
            del self.open[group, setting]
            self._rank(group, setting, states)

    def _rank(self, group: str, setting: int, states: dict[int, Any]) -> None:
        self.best.append((self.board.key(group, setting), group, setting, states))
        self.best.sort(key=lambda kept: kept[0])
        del self.best[self.plan.keep :]

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
            full = self.plan.seeds == 1 and len(self.best) == self.plan.keep
            if full and self.board.key(group, setting) > self.best[-1][0]:
                continue
            state = jax.tree.map(lambda x, row=row: x[row], report.state)
            self._keep(group, setting, seed, state)

    def _counted(self, group: str, name: str) -> np.ndarray:
        """The value of a metric for each lane, of the report that counts."""
        at = self.board.at[group]
        columns = np.minimum(np.searchsorted(self.plan.reports, at), len(self.plan.reports) - 1)
        values = self.curves[group].metrics[name][np.arange(len(at)), columns]
        return np.where(at > 0, values, np.nan)

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
        words[ending == REACHED] = "good"
        if whole.any():
            seen = jax.tree.map(lambda x: x[whole], self.seen[group])
            words[whole] = diagnosis.verdict(seen, self.plan.steps)
            losses[whole] = diagnosis.final_loss(seen, self.plan.steps)
        return words, losses

    @np.errstate(invalid="ignore")
    def _rows(self, group: str) -> list[dict[str, Any]]:
        """A row for each setting of a group."""
        lanes, plan, board = self.groups[group], self.plan, self.board
        by_setting = lambda values: np.asarray(values).reshape(-1, plan.seeds)
        verdicts, losses = map(by_setting, self._verdicts(group))
        columns: dict[str, Any] = dict(lanes.axes)
        for name in sorted(plan.metrics, key=lambda n: n != plan.metric):
            values = by_setting(self._counted(group, name))
            columns[name] = values.mean(1)
            if plan.seeds > 1:
                columns[f"{name}_se"] = _standard_error(values)
        if plan.target is not None:
            columns["steps_to_target"] = by_setting(board.reached[group]).mean(1)
        columns["final_loss"] = losses.mean(1)
        endings, at = by_setting(board.ending[group]).max(1), by_setting(board.step[group]).min(1)
        if plan.best == "ever":
            columns["best_at"] = by_setting(board.at[group]).mean(1)
        fixed = {name: str(value) for name, value in lanes.fixed.items()}
        rows = []
        for setting in range(len(lanes)):
            row: dict[str, Any] = {"optimizer": group}
            numbers = {name: float(values[setting]) for name, values in columns.items()}
            row |= {name: numbers.pop(name) for name in lanes.axes}
            row |= fixed | numbers
            row["verdict"] = _most(verdicts[setting])
            row["ended"], row["at"] = ENDINGS[endings[setting]], int(at[setting])
            row["seeds"], row["setting"] = plan.seeds, setting
            rows.append(row)
        return rows

    def result(self) -> Result:
        """The result, once no lane goes on."""
        rows = {group.name: self._rows(group.name) for group in self.plan.groups}
        order = self.board.ranked({name: np.arange(len(some)) for name, some in rows.items()})
        scores = [self.board.scores(*setting) for setting in order]
        ranked = []
        for place, (group, setting) in enumerate(order):
            row = rows[group][setting]
            tied = not place or (
                _as_good(scores[place], scores[0])
                and self.board.key(group, setting)[0] == self.board.key(*order[0])[0]
            )
            ranked.append({"rank": place + 1, "tied": tied, **row})
        places = {setting: place for place, setting in enumerate(order)}
        kept = [
            self._best(ranked[places[group, setting]], group, setting, states)
            for _, group, setting, states in self.best
        ]
        if not kept or kept[0].row["rank"] != 1:
            kept.insert(0, self._best(ranked[0], *order[0], {}))
        plan = self.plan
        return Result(ranked, self.curves, kept[0], kept, plan.metric, plan.mode, plan)

    def _best(self, row: dict[str, Any], group: str, setting: int, states: dict[int, Any]) -> Best:
        chosen = jax.tree.map(lambda x: x[setting], self.groups[group].settings)
        state = states[int(self.board.scores(group, setting).argmin())] if states else None
        return Best(row, chosen, state)


@np.errstate(invalid="ignore")
def _standard_error(values: np.ndarray) -> np.ndarray:
    """Of the means of rows."""
    finite = np.isfinite(values.sum(1))
    spread = np.std(np.where(finite[:, None], values, 0), axis=1, ddof=1)
    return np.where(finite, spread / math.sqrt(values.shape[1]), math.nan)


def _as_good(some: np.ndarray, best: np.ndarray) -> bool:
    """Whether a mean is that of the best, or within the standard error of their difference."""
    if not (np.isfinite(some).all() and np.isfinite(best).all()):
        return False
    if len(best) == 1:
        return bool(some[0] == best[0])
    error = math.hypot(*map(float, _standard_error(np.stack([some, best]))))
    return bool(some.mean() - best.mean() <= error)


def _most(verdicts: np.ndarray) -> str:
    """The verdict of most seeds, the worse of two."""
    found, counts = np.unique(verdicts.astype(str), return_counts=True)
    worst = lambda v: diagnosis.VERDICTS.index(v) if v in diagnosis.VERDICTS else -1
    return str(max(found[counts == counts.max()], key=lambda v: worst(str(v))))
