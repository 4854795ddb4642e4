"""Batches from an iterator on the host, for data that do not fit the device.

    task = jgd.Task(init, loss, jgd.stream(lambda: iter(loader)), evaluate)

A sweep reads a stream once: all tiles do the steps between two reports before any does the next,
and while they do, the batches of the next are read.
"""

import concurrent.futures
import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jgd.tuning import devices

__all__ = ["Reader", "Stream", "stream"]

BATCHES_AT_ONCE = 256 * 2**20  # bytes of a chunk's batches; as many are read ahead


class Stream:
    """What `stream` returns: stands where a task's function from step to batch does."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self.make = make

    def __call__(self, step: Any) -> Any:
        raise TypeError(
            "a stream has no batch for a step alone: train with jgd.sweep, and give"
            " jgd.with_sharpness a batch"
        )

    @functools.cached_property
    def first(self) -> Any:
        """A look at the first batch."""
        return _next(self.make(), 0)

    def usual_every(self, steps: int) -> int:
        """Steps between reports, so that their batches fit."""
        size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(self.first))
        return max(1, min(steps // 20, BATCHES_AT_ONCE // max(size, 1)))


def stream(make: Callable[[], Iterator[Any]]) -> Stream:
    """Batches for a `Task` or `Run` from an iterator on the host.

    Args:
      make: called without arguments for a new iterator over batches, pytrees of NumPy arrays that
        all have the same shapes; each call begins with the same first batch. It has to last for
        all steps of the sweep, and so repeats its data if there are fewer.

    A resumed sweep goes on where it was: by `get_state` and `set_state`, or `state_dict` and
    `load_state_dict`, if the iterator has them and the state is JSON or bytes (Grain's iterators,
    PyTorch's stateful loaders); else by reading and dropping what was used.

    All batches between two reports are on the device at once: unless `report_every` says
    otherwise, it is chosen so that they take at most 256 MiB; as much again waits on the host.
    Several processes all have to read the same.

    Raises: TypeError if `make` is an iterator itself.
    """
    if not callable(make):
        raise TypeError(f"stream: a function that makes an iterator wanted, got {make!r}")
    return Stream(make)


class Reader:
    """The chunks of a stream, one after the other, on the device."""

    def __init__(self, stream: Stream, reports: list[int], where: Any) -> None:
        self.stream, self.where = stream, where
        self.ends = dict(zip([0, *reports], reports, strict=False))
        self.size = max(np.diff([0, *reports]))
        first = jax.tree.map(np.asarray, stream.first)
        first = jax.tree.map(lambda x: x.astype(jax.dtypes.canonicalize_dtype(x.dtype)), first)
        self.shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first)
        self.iterator: Iterator[Any] | None = None
        self.place = 0  # step of the next batch
        self.marks: dict[int, Any] = {}  # what the iterator said of itself before a chunk
        self.now: tuple[int, Any] = (-1, None)
        self._ahead: tuple[int, concurrent.futures.Future[Any]] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def of(self, begin: int) -> Any:
        """The batches of the chunk from this step on; those of the next are then read."""
        if self.now[0] != begin:
            ahead, self._ahead = self._ahead, None
            self.now = (-1, None)  # makes room
            made = None if ahead is None else ahead[1].result()
            if ahead is None or ahead[0] != begin:
                made = self._read(begin)
            self.now = begin, jax.tree.map(lambda x: devices.placed(x, self.where), made)
            following = self.ends[begin]
            if following in self.ends:
                self._ahead = following, self._thread.submit(self._read, following)
        return self.now[1]

    def at(self, batches: Any, begin: Any, offset: Any) -> Any:
        """One batch, inside the program."""
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, offset, keepdims=False)
        return jax.tree.map(pick, batches)

    def mark(self, begin: int) -> dict[str, Any]:
        """Where the stream is before the chunk from this step on: plain data for a checkpoint."""
        return {"step": begin, "state": self.marks.get(begin)}

    def seek(self, mark: Mapping[str, Any]) -> None:
        """To a mark, in a new iterator."""
        self.iterator, self.place = self.stream.make(), 0
        if mark["state"] is not None:
            restore = getattr(self.iterator, "set_state", None) or getattr(
                self.iterator, "load_state_dict", None
            )
            if restore is not None:
                restore(_of_json(mark["state"]))
                self.place = mark["step"]

    def _read(self, begin: int) -> Any:
        if self.iterator is None or self.place > begin:
            self.iterator, self.place = self.stream.make(), 0
        while self.place < begin:
            self._batch()
        self.marks = {k: v for k, v in self.marks.items() if self.ends.get(k) == begin}
        self.marks[begin] = _state_of(self.iterator)
        batches = [self._batch() for _ in range(begin, self.ends[begin])]
        batches += batches[-1:] * (self.size - len(batches))  # one program for chunks of all sizes
        return jax.tree.map(lambda *x: np.stack(x), *batches)

    def _batch(self) -> Any:
        assert self.iterator is not None
        batch = jax.tree.map(np.asarray, _next(self.iterator, self.place))
        wanted, found = (jax.tree.map(np.shape, x) for x in (self.shape, batch))
        if wanted != found:
            raise ValueError(
                f"stream: batch {self.place} has the shapes {found}, the first has {wanted}"
            )
        self.place += 1
        return jax.tree.map(lambda x, like: x.astype(like.dtype), batch, self.shape)


def _next(iterator: Iterator[Any], place: int) -> Any:
    try:
        return next(iterator)
    except StopIteration:
        raise ValueError(
            f"stream: it ended after {place} batches; one for each step is wanted, so let it repeat"
        ) from None


def _state_of(iterator: Any) -> Any:
    """What the iterator says of itself, as JSON; None if it does not, or not so."""
    for name, restore in (("get_state", "set_state"), ("state_dict", "load_state_dict")):
        if hasattr(iterator, name) and hasattr(iterator, restore):
            state = getattr(iterator, name)()
            state = {"hex": state.hex()} if isinstance(state, bytes) else state
            with contextlib.suppress(TypeError, ValueError):
                return json.loads(json.dumps(state))  # a copy, should it change
    return None


def _of_json(state: Any) -> Any:
    return bytes.fromhex(state["hex"]) if isinstance(state, dict) and "hex" in state else state
