"""The compiled parts of a sweep: start and chunk of each group, at each width.

What goes in and out are plain arrays: random keys travel as their bits, so that lanes can wait on
the host and in files.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jgd import diagnosis
from jgd.pytree import Monitor
from jgd.training import Run
from jgd.tuning.prune import DIVERGED, STOPPED

__all__ = ["Batches", "Lane", "Program"]

BATCHES_AT_ONCE = 64 * 2**20  # bytes of batches made ahead for a chunk


class Lane(NamedTuple):
    """What a tile holds, each leaf with a leading axis of its width."""

    setting: Any
    state: Any
    seen: diagnosis.LossStatistics
    loss: Any  # sum of the training loss since the last report
    monitor: Any  # state of the early stopping; None without


class Batches:
    """The batches of each chunk, shared by all tiles and groups; kept, if there is room for all."""

    def __init__(self, batch: Callable[[Any], Any], reports: list[int]) -> None:
        self.size = max(np.diff([0, *reports]))
        closed, shape = jax.make_jaxpr(batch, return_shape=True)(jnp.int32(0))
        bytes_of = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shape))
        used = {id(v) for eqn in closed.jaxpr.eqns for v in eqn.invars}
        # a full batch does not depend on the step: nothing to make ahead
        moves = id(closed.jaxpr.invars[0]) in used
        self.ahead = moves and bytes_of * self.size <= BATCHES_AT_ONCE
        self.keep = bytes_of * self.size * len(reports) <= 4 * BATCHES_AT_ONCE
        self.made: dict[int, Any] = {}
        self.batch = batch
        many = lambda begin: jax.vmap(batch)(begin + jnp.arange(self.size))
        self.make = _compiled(many, jnp.int32(0))

    def of(self, begin: int) -> Any:
        """The batches of the chunk from this step on, where they are made ahead."""
        if not self.ahead:
            return ()
        if begin not in self.made:
            if not self.keep:
                self.made.clear()
            self.made[begin] = self.make(jnp.int32(begin))
        return self.made[begin]

    def at(self, batches: Any, begin: Any, offset: Any) -> Any:
        """One batch, inside the program."""
        if not self.ahead:
            return self.batch(begin + offset)
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, offset, keepdims=False)
        return jax.tree.map(pick, batches)


class Program:
    """The compiled parts of a group: start, and a chunk at each width that is asked for."""

    def __init__(
        self,
        run: Run,
        settings: Any,
        batches: Batches,
        *,
        seeds: int,
        key: int,
        steps: int,
        metric: str,
        stop: Monitor | None = None,
        drop_diverged: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self.run, self.batches = run, batches
        one = lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.asarray(x).dtype)
        self._setting = jax.tree.map(one, settings)
        self.seeds, self.steps, self.metric = seeds, steps, metric
        self.stop, self.drop_diverged = stop, drop_diverged
        root = jax.random.key(key)
        self.keys = jax.vmap(lambda seed: jax.random.fold_in(root, seed))(jnp.arange(seeds))
        # lanes are dealt out to the devices of a mesh, everything else is on all of them
        spec = jax.sharding.PartitionSpec
        self._by_lane = mesh and jax.sharding.NamedSharding(mesh, spec("lanes"))
        self._on_all = mesh and jax.sharding.NamedSharding(mesh, spec())
        self._starts: dict[int, Callable[..., Lane]] = {}
        self.chunks: dict[int, Any] = {}
        self._like = self._seen_in_a_step()

    def start(self, settings: Any, lanes: list[int], width: int) -> Lane:
        """Lanes at step 0; the last one fills up to the width."""
        ids = np.array(lanes + lanes[-1:] * (width - len(lanes)))
        take = lambda x: jnp.asarray(np.asarray(x)[ids // self.seeds])
        chosen, keys = self.dealt((jax.tree.map(take, settings), self.keys[ids % self.seeds]))
        if width not in self._starts:
            self._starts[width] = _compiled(self._begin_all, chosen, keys, out=self._by_lane)
        return self._starts[width](chosen, keys)

    def dealt(self, lanes: Any) -> Any:
        """Lanes on the devices that they belong to."""
        return lanes if self._by_lane is None else jax.device_put(lanes, self._by_lane)

    def shapes(self, rows: int) -> Lane:
        """What so many packed lanes look like."""
        many = lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype)
        return jax.eval_shape(
            self._begin_all, jax.tree.map(many, self._setting), many(self.keys[0])
        )

    def chunk(self, lanes: Lane, begin: int, end: int) -> tuple[Lane, Any, Any, Any]:
        """The lanes at step `end`, their losses since `begin`, their metrics and endings now."""
        return self.compiled(lanes, begin)(*self._arguments(lanes, begin, end))

    def compiled(self, lanes: Lane, begin: int) -> Any:
        """The program for as many lanes as these."""
        width = len(lanes.loss)
        if width not in self.chunks:
            arguments = self._arguments(lanes, begin, begin)
            chunk = _compiled(self._steps, *arguments, donate=True, out=self._by_lane)
            self.chunks[width] = chunk
        return self.chunks[width]

    def _arguments(self, lanes: Lane, begin: int, end: int) -> tuple[Any, ...]:
        rest = (self.batches.of(begin), jnp.int32(begin), jnp.int32(end))
        return lanes, *(rest if self._on_all is None else jax.device_put(rest, self._on_all))

    def filled(self, rows: Lane, width: int) -> Lane:
        """Rows from the host as lanes; the last one fills up to the width."""
        n = len(rows.loss)
        index = np.minimum(np.arange(width), n - 1)
        return self.dealt(jax.tree.map(lambda x: jnp.asarray(x[index]), rows))

    def unpacked(self, lanes: Lane) -> Lane:
        """With random keys as such again."""
        return jax.tree.map(lambda x, like: like.unpack(x), lanes, self._like)

    def state_shape(self) -> Any:
        """What the state of one lane looks like to the user."""
        state = jax.eval_shape(self.unpacked, self.shapes(1)).state
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)

    def _pack(self, lanes: Lane) -> Lane:
        return jax.tree.map(lambda x, like: like.pack(x), lanes, self._like)

    def _seen_in_a_step(self) -> Any:
        """For each leaf of a lane its dtype after a step: a state may begin as a Python number."""
        one = jax.eval_shape(self._begin, self._setting, self.keys[0])
        after = jax.eval_shape(self._step, one, jax.eval_shape(self.run.batch, 0), 0)
        return jax.tree.map(lambda x: _Like(x.dtype), after)

    def _begin_all(self, settings: Any, keys: jax.Array) -> Lane:
        return self._pack(jax.vmap(self._begin)(settings, keys))

    def _begin(self, setting: Any, key: jax.Array) -> Lane:
        monitor = None if self.stop is None else self.stop.init()
        zero = jnp.zeros([], float)
        return Lane(setting, self.run.init(setting, key), diagnosis.statistics(), zero, monitor)

    def _step(self, lane: Lane, batch: Any, index: Any) -> Lane:
        state, metrics = self.run.update(lane.setting, lane.state, batch)
        loss, stride = metrics["loss"], metrics.get("stride", jnp.nan)
        seen = diagnosis.observe(lane.seen, loss, stride, index, self.steps)
        return Lane(lane.setting, state, seen, lane.loss + loss, lane.monitor)

    def _steps(
        self, packed: Lane, batches: Any, begin: Any, end: Any
    ) -> tuple[Lane, Any, Any, Any]:
        def body(offset: Any, lanes: Lane) -> Lane:
            batch = self.batches.at(batches, begin, offset)
            # the step is one scalar for the tile: one in each lane would map the batch
            return jax.vmap(self._step, (0, None, None))(lanes, batch, begin + offset)

        lanes = jax.lax.fori_loop(0, end - begin, body, self.unpacked(packed))
        metrics = jax.vmap(self.run.evaluate)(lanes.setting, lanes.state)
        ending = jnp.zeros(lanes.loss.shape, jnp.int8)
        if self.stop is not None:
            stop, monitor = jax.vmap(self.stop.update)(metrics[self.metric], lanes.monitor)
            lanes = lanes._replace(monitor=monitor)
            ending = jnp.where(stop, STOPPED, ending).astype(jnp.int8)
        if self.drop_diverged:
            ending = jnp.where(lanes.seen.finite, ending, DIVERGED).astype(jnp.int8)
        after = lanes._replace(loss=jnp.zeros_like(lanes.loss))
        return self._pack(after), lanes.loss, metrics, ending


class _Like:
    """How a leaf of the lanes looks: its dtype, or that it is a random key."""

    def __init__(self, dtype: Any) -> None:
        self.is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
        self.dtype = dtype
        self.impl = str(jax.random.key_impl(jnp.zeros([], dtype))) if self.is_key else None

    def pack(self, x: Any) -> jax.Array:
        if self.is_key:
            return jax.random.key_data(x)
        return x if x.dtype == self.dtype else x.astype(self.dtype)

    def unpack(self, x: Any) -> jax.Array:
        return jax.random.wrap_key_data(x, impl=self.impl) if self.is_key else x


def _compiled(
    f: Callable[..., Any], *examples: Any, donate: bool = False, out: Any = None
) -> Callable[..., Any]:
    """`f` compiled for arguments like the examples, the arrays it closes over among them.

    Data in a program are constants to the compiler, which then takes seconds to look at them.

    Args:
      out: the sharding of all results; None: as they come.
    """
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*examples)
    structure = jax.tree.structure(shape)

    def flat(constants: Any, *arguments: Any) -> Any:
        leaves = jax.core.eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(structure, leaves)

    constants = [jnp.asarray(x) for x in closed.consts]
    if out is not None:
        everywhere = jax.sharding.NamedSharding(out.mesh, jax.sharding.PartitionSpec())
        constants = jax.device_put(constants, everywhere)
    where: dict[str, Any] = {} if out is None else {"out_shardings": out}
    program = jax.jit(flat, donate_argnums=1 if donate else (), **where)
    compiled = program.lower(constants, *examples).compile()
    call = lambda *arguments: compiled(constants, *arguments)
    call.compiled = compiled  # type: ignore[attr-defined]
    return call
