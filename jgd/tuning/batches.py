"""The batches of the chunks of a sweep: one protocol for a function of the step and for a stream.

    chunk = batches.of(first)               # outside the program: an argument of it
    batches.at(chunk, first, offset)        # inside the program: one batch

A sequential source is read once: every tile does a chunk before any tile does the next one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jgd.tuning.compiling import Compiler

__all__ = ["BatchSource", "FunctionBatches", "pick"]

BYTES_AHEAD = 64 * 2**20  # of the batches of one chunk, made ahead of it


class BatchSource(Protocol):
    """Batches of a sweep, chunk by chunk."""

    sequential: bool
    shape: Any  # of one batch

    def of(self, first: int) -> Any:
        """Return the batches of the chunk from this step on, as the program takes them."""
        ...

    def at(self, chunk: Any, first: Any, offset: Any) -> Any:
        """Return one batch of a chunk. Traced."""
        ...

    def release(self) -> None:
        """Free the batches that are kept."""
        ...

    def mark(self, first: int) -> dict[str, Any] | None:
        """Return the position before the chunk from this step on, as JSON; None without one."""
        ...

    def seek(self, mark: Mapping[str, Any]) -> None:
        """Return to a mark."""
        ...


def pick(batches: Any, offset: Any) -> Any:
    """Return one batch out of several, stacked along the leading axis."""
    one = lambda x: jax.lax.dynamic_index_in_dim(x, offset, keepdims=False)
    return jax.tree.map(one, batches)


class FunctionBatches:
    """Batches by a function of the step, made ahead for a whole chunk if they fit.

    All tiles and groups share them; those of all chunks are kept if they fit.

    Args:
      batch: step -> batch.
      seeds: None, or the number of seeds with an order of their own: `batch(step, seed=seed)`.
    """

    sequential = False

    def __init__(
        self,
        batch: Callable[..., Any],
        reports: Sequence[int],
        seeds: int | None,
        compiler: Compiler,
    ) -> None:
        self.size = max(np.diff([0, *reports]))
        self.batch = batch
        if seeds is not None:
            each = jnp.arange(seeds)
            self.batch = lambda step: jax.vmap(lambda seed: batch(step, seed=seed))(each)
        closed, self.shape = jax.make_jaxpr(self.batch, return_shape=True)(jnp.int32(0))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.shape))
        used = {id(v) for eqn in closed.jaxpr.eqns for v in eqn.invars}
        # a full batch does not depend on the step: there is nothing to make ahead
        moves = id(closed.jaxpr.invars[0]) in used
        self.ahead = moves and size * self.size <= BYTES_AHEAD
        self.keep = size * self.size * len(reports) <= 4 * BYTES_AHEAD
        self._chunks = dict[int, Any]()
        many = lambda first: jax.vmap(self.batch)(first + jnp.arange(self.size))
        self.make = compiler.compiled(many, np.int32(0), out=compiler.on_all)

    def of(self, first: int) -> Any:
        if not self.ahead:
            return ()
        if first not in self._chunks:
            if not self.keep:
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
        """Nothing to do: a function has no position."""
