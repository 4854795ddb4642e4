"""The ledger: the facts about each lane, as the events recorded them.

    ledger.apply(event)             # folds a report or a cut, in place
    ledger.ranked(settings)         # best first
    ledger.losers(rung)             # the lanes that a rung cuts

Settings are ranked by how far they trained (a setting that was cut or diverged ranks below one that
trained further), then, with a target, by the mean number of steps to it, then by the mean of the
metric over their seeds. A mean that is not finite ranks below all others. Of tied settings, the one
with the lower held-out loss ranks first, then the one that comes first in the plan.
"""

import numpy as np

from jgd.diagnosis import LossStatistics
from jgd.tuning.events import CUT, DIVERGED, NOT_RUN, OUT, Cut, Report
from jgd.tuning.plan import Plan

__all__ = ["Ledger"]


class Ledger:
    """Facts about each lane. Arrays have one entry for each lane of the plan.

    Attributes:
      alive: whether the lane has not ended.
      ending: index in `ENDINGS`; "not run" while the lane is alive.
      step: step of the last report.
      value, loss: the metric and the held-out loss (NaN without one) at the report that counts.
      at: step of the report that counts; 0 before the first report.
      reached: step at which the lane reached the target; inf if it has not reached it.
      statistics: of the training loss, at the end of the lane or at the last rung.
      judged: whether `statistics` covers all steps of the lane.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, lanes = plan, plan.lanes
        self.alive = np.full(lanes, True)
        self.ending = np.full(lanes, NOT_RUN, np.int8)
        self.step, self.at = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
        self.value, self.loss = np.full(lanes, np.nan), np.full(lanes, np.nan)
        self.reached = np.full(lanes, np.inf)
        empty = {name: np.zeros(lanes) for name in LossStatistics._fields}
        self.statistics = LossStatistics(**empty | {"finite": np.full(lanes, False)})
        self.judged = np.full(lanes, False)

    # --- the fold

    def apply(self, event: Report | Cut) -> None:
        """Fold an event into the facts, in place."""
        if isinstance(event, Cut):
            lanes = self.plan.numbered(event.lanes)
            started = self.step[lanes] > 0
            self.ending[lanes] = np.where(started, OUT if event.step is None else CUT, NOT_RUN)
            self.alive[lanes] = False
            self._set_statistics(lanes[started], event.statistics)
            return
        lanes = self.plan.offset(event.group) + event.lanes
        self._set_report(lanes, event)
        self._set_statistics(lanes, event.statistics)
        ended = event.ended > 0
        self.ending[lanes[ended]] = event.ended[ended]
        self.alive[lanes[ended]] = False

    def _set_statistics(self, lanes: np.ndarray, statistics: LossStatistics | None) -> None:
        if statistics is not None:
            self.judged[lanes] = True
            for old, new in zip(self.statistics, statistics, strict=True):
                old[lanes] = new

    def _set_report(self, lanes: np.ndarray, report: Report) -> None:
        new, old = report.metrics[self.plan.metric].astype(np.float64), self.value[lanes]
        self.step[lanes], self.judged[lanes] = report.step, False
        reached = self.at_target(new) & np.isinf(self.reached[lanes])
        self.reached[lanes[reached]] = report.step
        counts = np.full(len(lanes), True)
        if self.plan.best == "ever":
            better = ~np.isfinite(old) | (self.plan.sign * new < self.plan.sign * old)
            counts = (self.at[lanes] == 0) | (np.isfinite(new) & better)
        self.value[lanes[counts]], self.at[lanes[counts]] = new[counts], report.step
        if "loss" in report.metrics:
            self.loss[lanes[counts]] = report.metrics["loss"][counts]

    def at_target(self, values: np.ndarray) -> np.ndarray:
        """Return whether values of the metric reach the target; False without a target."""
        if self.plan.target is None:
            return np.full(len(values), False)
        return self.plan.sign * values <= self.plan.sign * self.plan.target

    def take(self, lanes: np.ndarray, other: "Ledger", other_lanes: np.ndarray) -> None:
        """Copy the facts about lanes from another ledger, in which they are `other_lanes`."""
        for values, other_values in zip(self._facts(), other._facts(), strict=True):
            values[lanes] = other_values[other_lanes]

    def _facts(self) -> list[np.ndarray]:
        return [x for x in (*vars(self).values(), *self.statistics) if isinstance(x, np.ndarray)]

    # --- the ranking

    def ranked(self, settings: np.ndarray) -> np.ndarray:
        """Return settings in the order of their rank, best first."""
        return settings[np.lexsort((settings, *self._measures(settings)[::-1]))]

    def scores(self, settings: np.ndarray) -> np.ndarray:
        """Return a score for each seed of settings: lower is better, inf if not finite.

        It is the number of steps to the target for a setting whose seeds all reached it, else the
        metric times the sign.
        """
        lanes = self.plan.lanes_of(settings)
        values, reached = self.value[lanes], self.reached[lanes]
        scores = np.where(np.isfinite(values), self.plan.sign * values, np.inf)
        return np.where(np.isfinite(reached).all(1, keepdims=True), reached, scores)

    def best_lanes(self, settings: np.ndarray) -> np.ndarray:
        """Return the lane of the best seed of each setting: the first that reached the target."""
        lanes = self.plan.lanes_of(settings)
        order = np.lexsort((self.scores(settings), self.reached[lanes]))
        return np.take_along_axis(lanes, order[:, :1], 1)[:, 0]

    def shortfall(self, settings: np.ndarray) -> np.ndarray:
        """Return minus the number of steps of settings that were ended early; -inf for the others.

        A setting that was cut, diverged or ran out of budget ranks below one that trained further.
        """
        lanes = self.plan.lanes_of(settings)
        short = np.isin(self.ending[lanes], (CUT, OUT, NOT_RUN, DIVERGED)) & ~self.alive[lanes]
        steps = np.where(short, self.step[lanes], np.iinfo(np.int64).max).min(1)
        return np.where(short.any(1), -steps.astype(float), -np.inf)

    @np.errstate(invalid="ignore")
    def _measures(self, settings: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the measures to rank settings by, the most important first; lower is better."""
        lanes = self.plan.lanes_of(settings)
        values, losses = self.value[lanes], self.loss[lanes].mean(1)
        score = np.where(np.isfinite(values).all(1), self.plan.sign * values.mean(1), np.inf)
        reached = self.reached[lanes].mean(1)
        loss = np.where(np.isfinite(losses), losses, np.inf)
        return self.shortfall(settings), reached, score, loss

    # --- rungs

    def cut_at(self, rung: int) -> Cut:
        """Return the cut of a rung: the living lanes of the settings it drops."""
        losers = self.losers(rung)
        groups = self.plan.by_group(losers)  # in the order of their best loser
        living = self.plan.by_group(losers[self.alive[losers]])
        return Cut(rung, {name: living[name] for name in groups if name in living})

    def losers(self, rung: int, *, early: bool = False) -> np.ndarray:
        """Return all lanes of the settings that a rung cuts, in the order of their rank.

        Args:
          early: whether to rank only settings that have reached the rung. A setting that ranks too
            low among these is cut, whatever the other settings do.
        """
        losers = [np.zeros(0, int)]
        for settings, keep in self.plan.cohorts(rung):
            if early:
                settings = settings[self.step[self.plan.lanes_of(settings)].min(1) >= rung]
            losers.append(self.ranked(settings)[keep:])
        return self.plan.lanes_of(np.concatenate(losers)).ravel()
