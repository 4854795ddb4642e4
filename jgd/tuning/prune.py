"""Successive halving and Hyperband: the steps at which settings are cut, and how many continue.

    successive_halving(eta=2, min_steps=125)     # cuts the worse half at steps 125, 250, 500, ...
    hyperband(eta=3, min_steps=37)               # brackets of halvings that begin earlier or later

A rung is a step at which settings are cut. The ledger ranks them.
"""

import math
from typing import Annotated, Literal, NamedTuple

import numpy as np

from jgd.checks import FINITE, above, admit, at_least

__all__ = ["Halving", "hyperband", "successive_halving"]

Within = Literal["sweep", "group"]


class Halving(NamedTuple):
    """Schedule of cuts: result of `successive_halving` and `hyperband`."""

    eta: float
    min_steps: int | None
    within: Within
    several: bool  # whether settings are divided among several brackets

    def brackets(self, steps: int) -> list[list[int]]:
        """Return the rungs of each bracket, in rising order. The last of several has none."""
        least = self.min_steps or max(1, round(steps / self.eta**3))
        rungs: list[int] = []
        # a rung just before the end saves nothing: its settings have trained for most steps
        while (rung := math.ceil(least * self.eta ** len(rungs) - 1e-9)) * self.eta**0.5 < steps:
            rungs.append(rung)
        return [rungs[b:] for b in range(len(rungs) + 1)] if self.several else [rungs]

    def survivors(self, settings: int, cuts: int) -> int:
        """Return how many of these settings remain after this many cuts."""
        return max(1, math.floor(settings / self.eta**cuts + 1e-9))

    def assign(self, settings: int, steps: int) -> np.ndarray:
        """Assign a bracket to each setting, at random since neighbours in a grid are alike."""
        most = len(self.brackets(steps)) - 1
        weights = [self.eta**cuts * (most + 1) / (cuts + 1) for cuts in range(most, -1, -1)]
        bounds = np.round(np.cumsum(weights) / np.sum(weights) * settings).astype(int)
        brackets = np.searchsorted(bounds, np.arange(settings), side="right")
        return np.random.default_rng(0).permutation(brackets) if most else brackets


def _halving(name: str, eta: float, min_steps: int | None, within: Within) -> Halving:
    return Halving(
        admit(f"{name}: eta", eta, Annotated[float, above(1), FINITE]),
        admit(f"{name}: min_steps", min_steps, Annotated[int | None, at_least(1)]),
        admit(f"{name}: within", within, Within),
        several=name == "hyperband",
    )


def successive_halving(
    eta: float = 2.0,
    min_steps: int | None = None,
    *,
    within: Within = "sweep",
) -> Halving:
    """Keep the best 1 / eta of the settings at steps min_steps, min_steps eta, min_steps eta^2, ...

    Args:
      eta: above 1; 2 halves the settings at each rung.
      min_steps: the first rung, at least 1; None: the steps of the sweep divided by eta^3.
      within: which settings are ranked together: all of the "sweep" (default) or each "group".

    Raises: ValueError for an argument out of its range.

    Source: Jamieson & Talwalkar 2016, arXiv:1502.07943.
    """
    return _halving("successive_halving", eta, min_steps, within)


def hyperband(
    eta: float = 3.0,
    min_steps: int | None = None,
    *,
    within: Within = "sweep",
) -> Halving:
    """Divide settings among brackets of successive halving, each of which begins one rung later.

    The last bracket cuts no setting. Brackets with earlier rungs get more settings.

    Args: as `successive_halving`.
    Raises: as `successive_halving`.
    Source: Li et al. 2018, arXiv:1603.06560.
    """
    return _halving("hyperband", eta, min_steps, within)
