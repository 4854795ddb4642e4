"""Batches from an iterator on the host, for data that do not fit on the device.

    task = jgd.Task(init, loss, jgd.stream(lambda: iter(loader)), evaluate)

A sweep reads a stream once: all tiles train up to a report before any tile goes past it. Meanwhile,
a thread reads the batches up to the next report.
"""

import concurrent.futures
import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jgd.checks import refuse
from jgd.tuning import devices
from jgd.tuning.batches import pick

__all__ = ["Stream", "StreamBatches", "stream"]

BYTES_AHEAD = 256 * 2**20  # limit on the batches of a chunk; the next chunk is read ahead


class Stream:
    """Result of `stream`, which takes the place of a task's function from step to batch."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self.make = make

    def __call__(self, step: Any) -> Any:
        raise TypeError(
            "stream: batches must be read in order, got a call for one step. Train with jgd.sweep,"
            " and give jgd.with_sharpness a batch"
        )

    @functools.cached_property
    def first(self) -> Any:
        """The first batch, read from a separate iterator."""
        return _next(self.open(), 0)

    def open(self) -> Iterator[Any]:
        """Return a new iterator."""
        iterator = self.make()
        if not hasattr(iterator, "__next__"):
            refuse("stream: make", "a function that returns an iterator", iterator)
        return iterator

    def usual_every(self, steps: int) -> int:
        """Return a number of steps between reports whose batches fit in BYTES_AHEAD."""
        size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(self.first))
        return max(1, min(steps // 20, BYTES_AHEAD // max(size, 1)))


def stream(make: Callable[[], Iterator[Any]]) -> Stream:
    """Return batches for a `Task` or `Run` from an iterator on the host.

    Args:
      make: function without arguments that returns a new iterator over batches: pytrees of NumPy
        arrays of equal shapes. Each iterator must begin with the same first batch and yield one
        batch per step of the sweep; if the data are fewer, let it repeat them (for example with
        `itertools.cycle`).

    A resumed sweep restores the iterator with `set_state`, or `load_state_dict`, if the iterator
    has it and `get_state`, or `state_dict`, returns JSON or bytes (Grain's iterators, PyTorch's
    stateful loaders). Otherwise it reads and drops the batches of the steps that are done.

    All batches between two reports are on the device at once. Unless `report_every` is given, it is
    chosen so that they take at most 256 MiB; the batches up to the next report take as much again
    on the host. With several processes, each process must read the same batches.

    Raises: TypeError if `make` is an iterator itself.
    """
    if not callable(make):
        refuse("stream: make", "a function that returns an iterator", make)
    return Stream(make)


class StreamBatches:
    """The batches of a stream as a `BatchSource`: one chunk on the device, the next on the host."""

    sequential = True

    def __init__(self, stream: Stream, reports: Sequence[int], sharding: Any) -> None:
        self.stream, self.sharding = stream, sharding
        self.ends = dict(zip([0, *reports], reports, strict=False))
        self.size = max(np.diff([0, *reports]))
        dtype = lambda x: jax.dtypes.canonicalize_dtype(x.dtype)
        like = lambda x: jax.ShapeDtypeStruct(np.shape(x), dtype(np.asarray(x)))
        self.shape = jax.tree.map(like, stream.first)
        self._iterator: Iterator[Any] | None = None
        self._position = 0  # step of the next batch
        self._marks = dict[int, Any]()  # the iterator's state before a chunk
        self._current: tuple[int, Any] = (-1, None)  # first step and batches of the chunk
        self._ahead: tuple[int, concurrent.futures.Future[Any]] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def of(self, first: int) -> Any:
        if self._current[0] != first:
            ahead, self._ahead = self._ahead, None
            self._current = (-1, None)  # frees the batches of the previous chunk
            batches = None if ahead is None else ahead[1].result()
            if ahead is None or ahead[0] != first:
                batches = self._read(first)
            self._current = first, jax.tree.map(lambda x: devices.placed(x, self.sharding), batches)
            following = self.ends[first]
            if following in self.ends:
                self._ahead = following, self._thread.submit(self._read, following)
        return self._current[1]

    def at(self, chunk: Any, first: Any, offset: Any) -> Any:
        return pick(chunk, offset)

    def release(self) -> None:
        self._current, self._ahead = (-1, None), None
        self._thread.shutdown(wait=False, cancel_futures=True)

    def mark(self, first: int) -> dict[str, Any] | None:
        return {"step": first, "state": self._marks.get(first)}

    def seek(self, mark: Mapping[str, Any]) -> None:
        self._iterator, self._position = self.stream.open(), 0
        names = ("set_state", "load_state_dict")
        restore = next(
            (getattr(self._iterator, n) for n in names if hasattr(self._iterator, n)), None
        )
        if mark["state"] is not None and restore is not None:
            restore(_of_json(mark["state"]))
            self._position = mark["step"]

    def _read(self, first: int) -> Any:
        """Return the batches of the chunk that begins at step `first`, stacked."""
        if self._iterator is None or self._position > first:
            self._iterator, self._position = self.stream.open(), 0
        while self._position < first:
            self._batch(self._iterator)
        self._marks = {k: v for k, v in self._marks.items() if self.ends.get(k) == first}
        self._marks[first] = _state_of(self._iterator)
        batches = [self._batch(self._iterator) for _ in range(first, self.ends[first])]
        batches += batches[-1:] * (self.size - len(batches))  # chunks of all sizes: one program
        return jax.tree.map(lambda *x: np.stack(x), *batches)

    def _batch(self, iterator: Iterator[Any]) -> Any:
        """Return the next batch, in the dtypes of the first one."""
        batch = jax.tree.map(np.asarray, _next(iterator, self._position))
        expected, shapes = (jax.tree.map(np.shape, x) for x in (self.shape, batch))
        if expected != shapes:
            raise ValueError(
                f"stream: all batches must have the shapes of the first, {expected}, got {shapes}"
                f" in batch {self._position}"
            )
        self._position += 1
        return jax.tree.map(lambda x, like: x.astype(like.dtype), batch, self.shape)


def _next(iterator: Iterator[Any], position: int) -> Any:
    try:
        return next(iterator)
    except StopIteration:
        raise ValueError(
            f"stream: the iterator ended after {position} batches; it must yield one batch per step"
            " (for example itertools.cycle)"
        ) from None


def _state_of(iterator: Any) -> Any:
    """Return the state of an iterator as JSON; None if it has no state, or JSON cannot hold it."""
    for name, restore in (("get_state", "set_state"), ("state_dict", "load_state_dict")):
        if hasattr(iterator, name) and hasattr(iterator, restore):
            state = getattr(iterator, name)()
            state = {"hex": state.hex()} if isinstance(state, bytes) else state
            with contextlib.suppress(TypeError, ValueError):
                return json.loads(json.dumps(state))  # a copy, since the iterator may change it
    return None


def _of_json(state: Any) -> Any:
    """Return the state of an iterator from its JSON."""
    return bytes.fromhex(state["hex"]) if isinstance(state, dict) and "hex" in state else state
