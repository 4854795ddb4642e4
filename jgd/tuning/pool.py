"""The pool: the states of lanes that wait or have ended, in blocks that never change.

    pool.put(ids, rows, present)    # adds a block; its rows stay where they are (device or host)
    pool.take(ids)                  # returns rows on the host, in the order of the ids
    pool.drop(ids)                  # removes states that are no longer needed

A lane lies in at most one block. A block keeps the rows of lanes that have left it until the block
is deleted. A checkpoint can therefore write it once, under a unique name.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from jgd.tuning import devices

__all__ = ["Block", "Pool"]


class Block(NamedTuple):
    """States of lanes that were added together. Padding may follow the rows of the ids."""

    ids: np.ndarray
    rows: Any  # a `Lane` with a leading axis


class Pool:
    """Blocks of lanes of one group each, by number."""

    def __init__(self, lanes: int) -> None:
        self.blocks = dict[int, Block]()
        self.last = 0  # number of the newest block
        self.block_of = np.full(lanes, -1)  # -1: the lane has no state in the pool
        self.row_of = np.zeros(lanes, int)

    def __contains__(self, lane: int) -> bool:
        return bool(self.block_of[lane] >= 0)

    def lanes(self) -> np.ndarray:
        """Return the lanes that have a state in the pool."""
        return np.flatnonzero(self.block_of >= 0)

    def put(self, ids: np.ndarray, rows: Any, present: np.ndarray | None = None) -> None:
        """Add a block.

        Args:
          present: mask of the ids that lie in the block; None: all of them.
        """
        self.last += 1
        self.restore(
            self.last, Block(ids, rows), np.full(len(ids), True) if present is None else present
        )

    def restore(self, number: int, block: Block, present: np.ndarray) -> None:
        """Add a block with a given number, with a mask of the ids that lie in it."""
        self.blocks[number] = block
        self.block_of[block.ids[present]] = number
        self.row_of[block.ids[present]] = np.flatnonzero(present)

    def drop(self, lanes: Any) -> None:
        """Remove lanes. Shrink a block on the host once a quarter of its lanes is removed."""
        lanes = np.asarray(lanes, int)
        touched = set(self.block_of[lanes].tolist()) - {-1}
        self.block_of[lanes] = -1
        for number in touched:
            ids, rows = self.blocks[number]
            remaining = np.flatnonzero(self.block_of[ids] == number)
            if not len(remaining):
                del self.blocks[number]
            elif len(remaining) <= 0.75 * len(ids) and _on_host(rows):
                del self.blocks[number]
                self.put(ids[remaining], _rows(rows, remaining))

    def remove_block(self, lanes: Any) -> Any | None:
        """Remove the block of exactly these lanes and return its rows; None if there is none.

        Its lanes include those that have ended since the block was added.
        """
        lanes = np.asarray(lanes, int)
        for number in set(self.block_of[lanes].tolist()) - {-1}:
            ids, rows = self.blocks[number]
            if np.array_equal(ids, lanes):
                self.drop(lanes[self.block_of[lanes] == number])
                return rows
        return None

    def take(self, lanes: Any) -> Any:
        """Return the rows of some lanes of one group on the host, in the order of `lanes`."""
        lanes = np.asarray(lanes, int)
        numbers = self.block_of[lanes]
        order = np.argsort(numbers, kind="stable")
        parts = list[Any]()
        for number in np.unique(numbers).tolist():
            self._to_host(number)
            rows = self.row_of[lanes[order][numbers[order] == number]]
            parts.append(_rows(self.blocks[number].rows, rows))
        back = np.argsort(order)
        return jax.tree.map(lambda *xs: np.concatenate(xs)[back], *parts)

    def _to_host(self, number: int) -> None:
        ids, rows = self.blocks[number]
        if not _on_host(rows):
            on_host = jax.tree.map(lambda x: x[: len(ids)], devices.to_host(rows))
            self.blocks[number] = Block(ids, on_host)


def _rows(rows: Any, index: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[index], rows)


def _on_host(rows: Any) -> bool:
    return isinstance(jax.tree.leaves(rows)[0], np.ndarray)
