"""Which lanes go on: pure decisions from what the lanes have said so far.

    successive_halving(eta=2, min_steps=125)     # at 125, 250, 500 ... the better half goes on
    hyperband(eta=3, min_steps=37)               # several of them, from bold to cautious

A rung is a step at which settings are cut. Settings are ranked by the mean of the metric over their
seeds; one whose metric is not finite is below all that are, ties go to the lower held-out loss,
then to the setting that came first. A setting that went further is above one that was cut before.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

__all__ = ["ENDINGS", "Board", "Halving", "cover", "hyperband", "successive_halving"]

ENDINGS = (  # those of the seeds of a setting differ: the last of them is said
    *("not run", "reached target", "finished", "stopped early", "diverged", "cut"),
    "out of budget",
)
NOT_RUN, REACHED, FINISHED, STOPPED, DIVERGED, CUT, OUT = range(len(ENDINGS))


# --- rungs -----------------------------------------------------------------------------------


class Halving(NamedTuple):
    """When settings are cut, and how many: what `successive_halving` and `hyperband` give."""

    eta: float
    min_steps: int | None
    within: Literal["sweep", "group"]
    several: bool

    def brackets(self, steps: int) -> list[list[int]]:
        """The rungs of each bracket, the boldest first; the last of several has none."""
        least = self.min_steps or max(1, round(steps / self.eta**3))
        rungs: list[int] = []
        # one just before the end would cut what has cost all it can
        while (rung := math.ceil(least * self.eta ** len(rungs) - 1e-9)) * self.eta**0.5 < steps:
            rungs.append(rung)
        return [rungs[b:] for b in range(len(rungs) + 1)] if self.several else [rungs]

    def kept(self, settings: int, cuts: int) -> int:
        """How many of so many go on after so many cuts."""
        return max(1, math.floor(settings / self.eta**cuts + 1e-9))

    def shares(self, settings: int, steps: int) -> np.ndarray:
        """The bracket of each setting: dealt out at random, as a grid has favoured corners."""
        most = len(self.brackets(steps)) - 1
        weights = [self.eta**cuts * (most + 1) / (cuts + 1) for cuts in range(most, -1, -1)]
        bounds = np.round(np.cumsum(weights) / np.sum(weights) * settings).astype(int)
        found = np.searchsorted(bounds, np.arange(settings), side="right")
        return np.random.default_rng(0).permutation(found) if most else found


def _checked(eta: float, min_steps: int | None, within: str, name: str) -> None:
    if not eta > 1:
        raise ValueError(f"{name}: eta must be above 1, got {eta}")
    if min_steps is not None and min_steps < 1:
        raise ValueError(f"{name}: min_steps must be at least 1, got {min_steps}")
    if within not in ("sweep", "group"):
        raise ValueError(f"{name}: within must be 'sweep' or 'group', got {within!r}")


def successive_halving(
    eta: float = 2.0,
    min_steps: int | None = None,
    *,
    within: Literal["sweep", "group"] = "sweep",
) -> Halving:
    """At min_steps, min_steps eta, ... steps one in eta settings goes on.

    Args:
      eta: above 1; 2 halves.
      min_steps: of the first rung, at least 1; None: an eta^3-th of the steps.
      within: what is ranked together: the whole "sweep" (default), or each "group" of settings.

    Source: Jamieson & Talwalkar 2016, arXiv:1502.07943.
    """
    _checked(eta, min_steps, within, "successive_halving")
    return Halving(eta, min_steps, within, several=False)


def hyperband(
    eta: float = 3.0,
    min_steps: int | None = None,
    *,
    within: Literal["sweep", "group"] = "sweep",
) -> Halving:
    """Brackets of successive halving that begin later and later; the last one cuts nobody.

    Args: as `successive_halving`. The settings are dealt out to brackets, more to the bolder ones.
    Source: Li et al. 2018, arXiv:1603.06560.
    """
    _checked(eta, min_steps, within, "hyperband")
    return Halving(eta, min_steps, within, several=True)


# --- widths ----------------------------------------------------------------------------------


def cover(lanes: int, menu: Sequence[int], costs: Sequence[float]) -> list[int]:
    """The cheapest widths that hold so many lanes, widest first, with at most a tenth to spare.

    Args:
      lanes: at least 1.
      menu: widths with a program each; 1 among them, or any number of lanes fits exactly.
      costs: the time of a step at each.
    """
    pairs = sorted(zip(menu, costs, strict=True), reverse=True)
    widest = pairs[0][0]
    whole = max(0, lanes // widest - 2)  # beyond that only whole tiles can be cheapest
    rest = lanes - whole * widest
    most = rest + widest
    best: list[tuple[float, list[int]]] = [(0.0, [])] + [(math.inf, [])] * most
    for total in range(1, most + 1):
        for width, cost in pairs:
            if width <= total and best[total - width][0] + cost < best[total][0]:
                best[total] = best[total - width][0] + cost, [*best[total - width][1], width]
    tight = range(rest, max(rest, math.floor(1.1 * lanes) - whole * widest) + 1)
    within = [best[total] for total in tight if total <= most]
    _, widths = min(within if any(math.isfinite(c) for c, _ in within) else best[rest:])
    return sorted([widest] * whole + widths, reverse=True)


# --- the board -------------------------------------------------------------------------------


class Board:
    """The last word of every lane: what cuts and the table are made from.

    Args:
      lanes: how many each group has.
      best: "final": the last report of a lane counts; "ever": its best one.
      target: None, or a value of the metric: who got there in fewer steps is better.
    """

    def __init__(
        self,
        lanes: Mapping[str, int],
        seeds: int,
        metric: str,
        mode: Literal["min", "max"],
        best: str = "final",
        target: float | None = None,
    ) -> None:
        self.seeds, self.metric, self.ever = seeds, metric, best == "ever"
        self.sign = -1.0 if mode == "max" else 1.0
        self.target = target
        self.order = {name: place for place, name in enumerate(lanes)}
        full = lambda value, dtype: {n: np.full(k, value, dtype) for n, k in lanes.items()}
        self.value, self.loss = full(np.nan, np.float64), full(np.nan, np.float64)
        self.at = full(0, np.int64)  # the step of the report that counts
        self.step, self.ending = full(0, np.int64), full(NOT_RUN, np.int8)
        self.reached = full(np.inf, np.float64)  # the step at which the target was
        self.alive = full(True, bool)  # has a future: no ending that is final

    def add(self, group: str, lanes: Any, step: int, metrics: Mapping[str, Any]) -> None:
        """A report of some lanes."""
        lanes, new = np.asarray(lanes, int), np.asarray(metrics[self.metric], np.float64)
        self.step[group][lanes] = step
        if self.target is not None:
            there = self.sign * new <= self.sign * self.target
            self.reached[group][lanes[there & np.isinf(self.reached[group][lanes])]] = step
        old, counts = self.value[group][lanes], np.ones(len(lanes), bool)
        if self.ever:
            better = ~np.isfinite(old) | (self.sign * new < self.sign * old)
            counts = (self.at[group][lanes] == 0) | (np.isfinite(new) & better)
        rows = lanes[counts]
        self.value[group][rows], self.at[group][rows] = new[counts], step
        if "loss" in metrics:
            self.loss[group][rows] = np.asarray(metrics["loss"], np.float64)[counts]

    def end(self, group: str, lanes: Any, ending: Any) -> None:
        self.ending[group][lanes] = ending
        self.alive[group][lanes] = False

    def lanes_of(self, setting: Any) -> np.ndarray:
        """The lanes of a setting, or of each of several: one for each seed."""
        return np.asarray(setting)[..., None] * self.seeds + np.arange(self.seeds)

    def waiting(self, group: str) -> np.ndarray:
        """The lanes that still go on."""
        return np.flatnonzero(self.alive[group])

    def key(self, group: str, setting: int) -> tuple[Any, ...]:
        """Sorts settings, best first."""
        return (
            *(float(x[0]) for x in self._measures(group, np.array([setting]))),
            self.order[group],
            setting,
        )

    def ranked(self, members: Mapping[str, np.ndarray]) -> list[tuple[str, int]]:
        """Settings of several groups, best first."""
        names = [name for name, settings in members.items() for _ in settings]
        settings = np.concatenate([np.zeros(0, int), *members.values()])
        parts = [self._measures(name, some) for name, some in members.items()]
        columns = [np.concatenate(x) for x in zip(*parts, strict=True)]
        order = np.array([self.order[name] for name in names])
        places = np.lexsort((settings, order, *columns[::-1]))
        return [(names[k], int(settings[k])) for k in places]

    def scores(self, group: str, setting: int) -> np.ndarray:
        """What each seed of a setting is ranked by: the lower the better, inf for what is lost."""
        lanes = self.lanes_of(setting)
        if self.target is not None and np.isfinite(self.reached[group][lanes]).all():
            return self.reached[group][lanes]
        values = self.value[group][lanes]
        return np.where(np.isfinite(values), self.sign * values, np.inf)

    @np.errstate(invalid="ignore")
    def _measures(self, group: str, settings: np.ndarray) -> tuple[np.ndarray, ...]:
        """How far each went, when it was at the target, score and loss: the lower the better."""
        lanes = self.lanes_of(settings)
        values, losses = self.value[group][lanes], self.loss[group][lanes].mean(1)
        score = np.where(np.isfinite(values).all(1), self.sign * values.mean(1), np.inf)
        # who was cut, diverged or did not finish is below who went further
        unfinished = np.isin(self.ending[group][lanes], (CUT, OUT, NOT_RUN, DIVERGED))
        ended = unfinished & ~self.alive[group][lanes]
        steps = np.where(ended, self.step[group][lanes], np.iinfo(np.int64).max).min(1)
        short = np.where(ended.any(1), -steps.astype(float), -np.inf)
        reached = self.reached[group][lanes].mean(1)
        return short, reached, score, np.where(np.isfinite(losses), losses, np.inf)
