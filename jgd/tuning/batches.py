"""Sources of batches for a sweep: one protocol for a function of the step and for a stream.

    chunk = batches.of(first)               # outside the program, as an argument for it
    batches.at(chunk, first, offset)        # inside the program: one batch

A sequential source is read only once: every tile runs a chunk before any tile runs the next chunk.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jgd.tuning.compiling import Compiler

__all__ = ["BatchSource", "FunctionBatches", "pick"]

BYTES_AHEAD = 64 * 2**20  # limit on the batches of one chunk that are computed ahead of it


class BatchSource(Protocol):
    """Source of the batches of a sweep, read chunk by chunk."""

    sequential: bool  # whether it can be read only once, in order
    shape: Any  # shapes and dtypes of one batch

    def of(self, first: int) -> Any:
        """Return the batches of the chunk that starts at this step, as an argument of `at`."""
        ...

    def at(self, chunk: Any, first: Any, offset: Any) -> Any:
        """Return the batch of step `first + offset`, from the batches of its chunk. Traced."""
        ...

    def release(self) -> None:
        """Free the batches in memory."""
        ...

    def mark(self, first: int) -> dict[str, Any] | None:
        """Return the position before the chunk that starts at this step, as JSON; None if none."""
        ...

    def seek(self, mark: Mapping[str, Any]) -> None:
        """Move to a position that `mark` returned."""
        ...


def pick(batches: Any, offset: Any) -> Any:
    """Return one batch out of a stack along the leading axis."""
    one = lambda x: jax.lax.dynamic_index_in_dim(x, offset, keepdims=False)
    return jax.tree.map(one, batches)


class FunctionBatches:
    """Batches computed by a function of the step: a whole chunk in advance, if it fits in memory.

    All tiles and groups share the batches. If all chunks fit, all of them stay in memory.

    Args:
      batch: step -> batch.
      reports: steps at which chunks end.
      seeds: number of seeds if each has its own order of batches, `batch(step, seed=seed)`; None if
        all seeds share one order.
    """

    sequential = False

    def __init__(
        self,
        batch: Callable[..., Any],
        reports: Sequence[int],
        seeds: int | None,
        compiler: Compiler,
    ) -> None:
        self.longest = max(np.diff([0, *reports]))  # steps of the longest chunk
        self.batch = batch
        if seeds is not None:
            each = jnp.arange(seeds)
            self.batch = lambda step: jax.vmap(lambda seed: batch(step, seed=seed))(each)
        closed, self.shape = jax.make_jaxpr(self.batch, return_shape=True)(jnp.int32(0))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.shape)) * self.longest
        used = {id(v) for eqn in closed.jaxpr.eqns for v in eqn.invars}
        # a full batch does not depend on the step, so nothing needs to be computed ahead
        varies = id(closed.jaxpr.invars[0]) in used
        self.ahead = varies and size <= BYTES_AHEAD
        self.keep_all = size * len(reports) <= 4 * BYTES_AHEAD
        self._chunks = dict[int, Any]()
        whole_chunk = lambda first: jax.vmap(self.batch)(first + jnp.arange(self.longest))
        self.make = compiler.compiled(whole_chunk, np.int32(0), out=compiler.on_all)

    def of(self, first: int) -> Any:
        if not self.ahead:
            return ()
        if first not in self._chunks:
            if not self.keep_all:
                self._chunks.clear()
            self._chunks[first] = self.make(np.int32(first))
        return self._chunks[first]

    def at(self, chunk: Any, first: Any, offset: Any) -> Any:
        return pick(chunk, offset) if self.ahead else self.batch(first + offset)

    def release(self) -> None:
        self._chunks.clear()

    def mark(self, first: int) -> None:
        return None

    def seek(self, mark: Mapping[str, Any]) -> None:
        """Do nothing: a function has no position."""
