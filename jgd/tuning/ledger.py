"""The ledger: what the events have said about each lane, and the only truth about lanes.

    ledger.apply(event)             # folds a report or a cut, in place
    ledger.ranked(settings)         # best first
    ledger.losers(rung)             # the lanes that a rung cuts

Settings are ranked by how far they went (one that was cut or diverged is below one that went
further), then by the mean of the metric over their seeds; a mean that is not finite is below all
that are; ties go to the lower held-out loss, then to the setting that came first.
"""

import numpy as np

from jgd.diagnosis import LossStatistics, statistics
from jgd.tuning.events import CUT, DIVERGED, NOT_RUN, OUT, Cut, Report
from jgd.tuning.plan import Plan

__all__ = ["Ledger"]


class Ledger:
    """What is known of each lane. Arrays have one entry for each lane of the plan.

    Attributes:
      alive: whether the lane has not ended.
      ending: its place in `ENDINGS`; "not run" while it is alive.
      step: of its last report.
      value, loss: the metric, and the held-out loss if there is one, at the report that counts.
      at: the step of that report; 0 before the first.
      reached: the step at which it reached the target; inf before.
      seen: statistics of its training loss, once it ended.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, lanes = plan, plan.lanes
        self.sign = -1.0 if plan.mode == "max" else 1.0
        self.alive = np.full(lanes, True)
        self.ending = np.full(lanes, NOT_RUN, np.int8)
        self.step, self.at = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
        self.value, self.loss = np.full(lanes, np.nan), np.full(lanes, np.nan)
        self.reached = np.full(lanes, np.inf)
        empty = (np.zeros(lanes, x.dtype) for x in statistics())
        self.seen = LossStatistics(*empty)

    # --- the fold

    def apply(self, event: Report | Cut) -> None:
        """Take an event into account."""
        if isinstance(event, Cut):
            for group, ids in event.lanes.items():
                lanes = self.plan.offset(group) + np.asarray(ids, int)
                ending = OUT if event.step is None else CUT
                self.ending[lanes] = np.where(self.step[lanes] == 0, NOT_RUN, ending)
                self.alive[lanes] = False
            return
        lanes = self.plan.offset(event.group) + event.lanes
        self._report(lanes, event)
        if event.seen is not None:
            ended = event.ended > 0
            self.ending[lanes[ended]] = event.ended[ended]
            self.alive[lanes[ended]] = False
            for kept, new in zip(self.seen, event.seen, strict=True):
                kept[lanes[ended]] = new[ended]

    def _report(self, lanes: np.ndarray, report: Report) -> None:
        new, old = report.metrics[self.plan.metric].astype(np.float64), self.value[lanes]
        self.step[lanes] = report.step
        reached = self.at_target(new) & np.isinf(self.reached[lanes])
        self.reached[lanes[reached]] = report.step
        counts = np.full(len(lanes), True)
        if self.plan.best == "ever":
            better = ~np.isfinite(old) | (self.sign * new < self.sign * old)
            counts = (self.at[lanes] == 0) | (np.isfinite(new) & better)
        self.value[lanes[counts]], self.at[lanes[counts]] = new[counts], report.step
        if "loss" in report.metrics:
            self.loss[lanes[counts]] = report.metrics["loss"][counts]

    def at_target(self, values: np.ndarray) -> np.ndarray:
        """Return whether values of the metric reach the target; False without one."""
        if self.plan.target is None:
            return np.full(len(values), False)
        return self.sign * values <= self.sign * self.plan.target

    # --- the ranking

    def ranked(self, settings: np.ndarray) -> np.ndarray:
        """Return settings in the order of their rank, best first."""
        return settings[np.lexsort((settings, *self._measures(settings)[::-1]))]

    def scores(self, settings: np.ndarray) -> np.ndarray:
        """Return what each seed of settings is ranked by: lower is better, inf if not finite."""
        lanes = self.plan.lanes_of(settings)
        values, reached = self.value[lanes], self.reached[lanes]
        scores = np.where(np.isfinite(values), self.sign * values, np.inf)
        return np.where(np.isfinite(reached).all(1, keepdims=True), reached, scores)

    def shortfall(self, settings: np.ndarray) -> np.ndarray:
        """Return how early settings were ended: -inf for those that were not, else minus the steps.

        A setting that was cut, diverged or ran out of budget is below one that went further.
        """
        lanes = self.plan.lanes_of(settings)
        short = np.isin(self.ending[lanes], (CUT, OUT, NOT_RUN, DIVERGED)) & ~self.alive[lanes]
        steps = np.where(short, self.step[lanes], np.iinfo(np.int64).max).min(1)
        return np.where(short.any(1), -steps.astype(float), -np.inf)

    @np.errstate(invalid="ignore")
    def _measures(self, settings: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return what settings are ranked by, in this order; lower is better."""
        lanes = self.plan.lanes_of(settings)
        values, losses = self.value[lanes], self.loss[lanes].mean(1)
        score = np.where(np.isfinite(values).all(1), self.sign * values.mean(1), np.inf)
        reached = self.reached[lanes].mean(1)
        loss = np.where(np.isfinite(losses), losses, np.inf)
        return self.shortfall(settings), reached, score, loss

    # --- rungs

    def cut_at(self, rung: int) -> Cut:
        """Return the cut of a rung: the living lanes of the settings it drops."""
        lost = self.plan.by_group(self.losers(rung))  # groups in the order of their best loser
        alive = {name: self.alive[self.plan.offset(name) + np.array(x)] for name, x in lost.items()}
        cut = {name: np.array(x)[alive[name]].tolist() for name, x in lost.items()}
        return Cut(rung, {name: lanes for name, lanes in cut.items() if lanes})

    def losers(self, rung: int, *, early: bool = False) -> np.ndarray:
        """Return the lanes of the settings that a rung cuts, also those that ended, as ranked.

        Args:
          early: consider only settings that have reached the rung. Those that enough of them beat
            are cut whatever the others do.
        """
        lost = [np.zeros(0, int)]
        for pool, keep in self.plan.pools(rung):
            if early:
                pool = pool[self.step[self.plan.lanes_of(pool)].min(1) >= rung]
            lost.append(self.ranked(pool)[keep:])
        return self.plan.lanes_of(np.concatenate(lost)).ravel()
