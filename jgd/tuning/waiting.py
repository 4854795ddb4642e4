"""Lanes that wait on the host between two rungs."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jgd.tuning.programs import Lane

__all__ = ["Part", "Waiting"]


class Part(NamedTuple):
    """Lanes on the host that came together, under a name that no other part ever has.

    A part is never changed, so that a checkpoint writes it once; of some of its rows nobody may be
    waiting any more.
    """

    name: str
    ids: np.ndarray
    rows: Lane


class Waiting:
    """Lanes of a group on the host, between two rungs."""

    def __init__(self, group: int, lanes: int) -> None:
        self.group, self.made = group, 0
        self.parts: dict[int, Part] = {}
        self.part_of = np.full(lanes, -1)  # of each lane; -1: it does not wait
        self.row_of = np.zeros(lanes, int)

    def __len__(self) -> int:
        return int((self.part_of >= 0).sum())

    def add(self, ids: np.ndarray, rows: Lane) -> None:
        self.made += 1
        self.put(self.made, Part(f"waiting-{self.group}-{self.made}", ids, rows))

    def put(self, number: int, part: Part) -> None:
        self.parts[number] = part
        self.part_of[part.ids], self.row_of[part.ids] = number, np.arange(len(part.ids))

    def drop(self, lanes: Any) -> None:
        """Forget some lanes; a part of which a quarter is forgotten makes room."""
        lanes = np.asarray(lanes, int)
        touched = set(self.part_of[lanes].tolist()) - {-1}
        self.part_of[lanes] = -1
        for number in touched:
            part = self.parts[number]
            left = np.flatnonzero(self.part_of[part.ids] == number)
            if len(left) <= 0.75 * len(part.ids):
                del self.parts[number]
                if len(left):
                    self.add(part.ids[left], jax.tree.map(lambda x, left=left: x[left], part.rows))

    def take(self, lanes: list[int]) -> Lane:
        """The rows of some lanes, in their order."""
        numbers, places = self.part_of[lanes], np.argsort(self.part_of[lanes], kind="stable")
        found = []
        for number in np.unique(numbers).tolist():
            rows = self.row_of[np.asarray(lanes)[places][numbers[places] == number]]
            found.append(jax.tree.map(lambda x, rows=rows: x[rows], self.parts[number].rows))
        back = np.argsort(places)
        return jax.tree.map(lambda *xs: np.concatenate(xs)[back], *found)
