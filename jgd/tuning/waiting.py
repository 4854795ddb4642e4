"""Lanes that wait on the host between two rungs."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jgd.tuning.programs import Lane

__all__ = ["Part", "Waiting"]


class Part(NamedTuple):
    """Lanes on the host that came together, under a name that no other part ever has."""

    name: str
    ids: np.ndarray
    rows: Lane


class Waiting:
    """Lanes of a group on the host, between two rungs."""

    def __init__(self, group: int) -> None:
        self.group, self.made = group, 0
        self.parts: list[Part] = []

    def __len__(self) -> int:
        return sum(len(part.ids) for part in self.parts)

    def add(self, ids: np.ndarray, rows: Lane) -> None:
        self.made += 1
        self.parts.append(Part(f"waiting-{self.group}-{self.made}", ids, rows))

    def drop(self, lanes: Any) -> None:
        """Forget some lanes."""
        lanes = np.asarray(lanes, int)
        parts, self.parts = self.parts, []
        for part in parts:
            keep = ~np.isin(part.ids, lanes)
            if keep.all():
                self.parts.append(part)
            elif keep.any():
                self.add(part.ids[keep], jax.tree.map(lambda x, keep=keep: x[keep], part.rows))

    def take(self, lanes: list[int]) -> Lane:
        """Some lanes, which are in rising order."""
        found = [(part, np.isin(part.ids, lanes)) for part in self.parts]
        ids = np.concatenate([part.ids[mine] for part, mine in found])
        order = np.argsort(ids)[np.searchsorted(np.sort(ids), lanes)]
        chosen = [jax.tree.map(lambda x, mine=mine: x[mine], p.rows) for p, mine in found]
        return jax.tree.map(lambda *xs: np.concatenate(xs)[order], *chosen)
