"""The compiled parts of a sweep: start and chunk of each group, at each width.

What goes in and out are plain arrays: random keys travel as their bits, so that lanes can wait on
the host and in files.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jgd import diagnosis
from jgd.pytree import Monitor
from jgd.training import Run
from jgd.tuning import devices
from jgd.tuning.plan import Plan
from jgd.tuning.prune import DIVERGED, STOPPED
from jgd.tuning.streams import Reader, Stream

__all__ = ["Batches", "Common", "Lane", "Program"]

DECOMPOSITIONS = {
    *("cholesky", "eig", "eigh", "geqrf", "hessenberg", "householder_product", "lu", "ormqr", "qr"),
    *("schur", "svd", "triangular_solve", "tridiagonal", "tridiagonal_solve"),
}
BATCHES_AT_ONCE = 64 * 2**20  # bytes of batches made ahead for a chunk


class Lane(NamedTuple):
    """What a tile holds, each leaf with a leading axis of its width."""

    setting: Any
    state: Any
    seen: diagnosis.LossStatistics
    loss: Any  # sum of the training loss since the last report
    monitor: Any  # state of the early stopping; None without
    seed: Any  # int32; None where all seeds see the same batches
    best: Any  # `Kept` of the best report so far; None where the last one counts


class Kept(NamedTuple):
    """The best report so far."""

    score: Any  # the metric, its sign turned where the greatest is best
    state: Any


class Batches:
    """The batches of each chunk, shared by all tiles and groups; kept, if there is room for all.

    Args:
      seeds: None, or how many there are, each with an order of its own: `batch(step, seed=seed)`.
      where: as for `_compiled`.
    """

    def __init__(
        self,
        batch: Callable[..., Any],
        reports: list[int],
        seeds: int | None = None,
        **where: Any,
    ) -> None:
        self.size = max(np.diff([0, *reports]))
        if seeds is None:
            self.batch = batch
        else:
            each = jnp.arange(seeds)
            self.batch = lambda step: jax.vmap(lambda seed: batch(step, seed=seed))(each)
        closed, self.shape = jax.make_jaxpr(self.batch, return_shape=True)(jnp.int32(0))
        bytes_of = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.shape))
        used = {id(v) for eqn in closed.jaxpr.eqns for v in eqn.invars}
        # a full batch does not depend on the step: nothing to make ahead
        moves = id(closed.jaxpr.invars[0]) in used
        self.ahead = moves and bytes_of * self.size <= BATCHES_AT_ONCE
        self.keep = bytes_of * self.size * len(reports) <= 4 * BATCHES_AT_ONCE
        self.made: dict[int, Any] = {}
        many = lambda begin: jax.vmap(self.batch)(begin + jnp.arange(self.size))
        self.make = _compiled(many, np.int32(0), **where)

    def of(self, begin: int) -> Any:
        """The batches of the chunk from this step on, where they are made ahead."""
        if not self.ahead:
            return ()
        if begin not in self.made:
            if not self.keep:
                self.made.clear()
            self.made[begin] = self.make(np.int32(begin))
        return self.made[begin]

    def at(self, batches: Any, begin: Any, offset: Any) -> Any:
        """One batch, inside the program."""
        if not self.ahead:
            return self.batch(begin + offset)
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, offset, keepdims=False)
        return jax.tree.map(pick, batches)


class Common:
    """What all groups of a sweep share: the batches, and what each seed begins with."""

    def __init__(self, run: Run, plan: Plan, mesh: jax.sharding.Mesh | None) -> None:
        self.mesh = mesh
        self.placed: dict[int, Any] = {}  # data that programs share, by what they are copies of
        everywhere = devices.on_all(mesh)
        where: Any = dict(out=everywhere, placed=self.placed)
        if isinstance(run.batch, Stream):
            self.batches: Batches | Reader = Reader(run.batch, plan.reports, everywhere)
        else:
            own = plan.seeds if plan.order == "own" else None
            self.batches = Batches(run.batch, plan.reports, own, **where)
        root = jax.random.key(plan.key)
        keys = jax.vmap(lambda seed: jax.random.fold_in(root, seed))(jnp.arange(plan.seeds))
        self.keys = np.asarray(jax.random.key_data(keys))
        self.begun: Any = None
        if make := run.begin:
            begin = lambda bits: jax.vmap(make)(jax.random.wrap_key_data(bits))
            self.begun = _compiled(begin, self.keys, **where)(self.keys)


class Program:
    """The compiled parts of a group: start, and a chunk at each width that is asked for."""

    def __init__(
        self, run: Run, settings: Any, common: Common, plan: Plan, stop: Monitor | None
    ) -> None:
        self.run, self.batches, self.stop = run, common.batches, stop
        one = lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.asarray(x).dtype)
        self._setting = jax.tree.map(one, settings)
        self.seeds, self.steps, self.metric = plan.seeds, plan.steps, plan.metric
        self.own_order, self.ever = plan.order == "own", plan.best == "ever"
        self.sign = -1.0 if plan.mode == "max" else 1.0
        self.drop_diverged = plan.drop_diverged
        self._keys, self._begun, self._placed = common.keys, common.begun, common.placed
        # lanes are dealt out to the devices of a mesh, everything else is on all of them
        self._by_lane = devices.by_lane(common.mesh)
        self._start: Callable[..., Lane] | None = None
        self._start_width = 0
        self.chunks: dict[int, Any] = {}
        self._like, self.alone = self._seen_in_a_step()

    def start(self, settings: Any, lanes: list[int], width: int) -> Lane:
        """Lanes at step 0; the last one fills up to the width.

        One program starts lanes of all widths: the width that was asked for first.
        """
        one = self._start_width or width
        filled = np.array(lanes + lanes[-1:] * (-(-width // one) * one - len(lanes)))
        parts = [self._started(settings, ids) for ids in filled.reshape(-1, one)]
        if len(parts) == 1 and width == one:
            return parts[0]
        rows = [devices.to_host(part) for part in parts]
        return self.filled(jax.tree.map(lambda *x: np.concatenate(x)[:width], *rows), width)

    def _started(self, settings: Any, ids: np.ndarray) -> Lane:
        chosen = jax.tree.map(lambda x: np.asarray(x)[ids // self.seeds], settings)
        arguments = self.dealt((chosen, (ids % self.seeds).astype(np.int32)))
        arguments = (*arguments, self._keys, self._begun)
        if self._start is None:
            self._start = _compiled(
                self._begin_all, *arguments, out=self._by_lane, placed=self._placed
            )
            self._start_width = len(ids)
        return self._start(*arguments)

    def dealt(self, lanes: Any) -> Any:
        """Lanes on the devices that they belong to."""
        return jax.tree.map(lambda x: devices.placed(x, self._by_lane), lanes)

    def shapes(self, rows: int) -> Lane:
        """What so many packed lanes look like."""
        many = lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype)
        setting = jax.tree.map(many, self._setting)
        seeds = jax.ShapeDtypeStruct((rows,), np.int32)
        return jax.eval_shape(self._begin_all, setting, seeds, self._keys, self._begun)

    def chunk(self, lanes: Lane, begin: int, end: int) -> tuple[Lane, Any, Any, Any]:
        """The lanes at step `end`, their losses since `begin`, their metrics and endings now."""
        return self.ready(lanes, begin, end)()

    def ready(self, lanes: Lane, begin: int, end: int) -> Callable[[], Any]:
        """A chunk that any thread may call: compiled, its batches made."""
        program, arguments = self.compiled(lanes, begin), self._arguments(lanes, begin, end)
        return lambda: program(*arguments)

    def compiled(self, lanes: Lane, begin: int) -> Any:
        """The program for as many lanes as these."""
        width = len(lanes.loss)
        if width not in self.chunks:
            arguments = self._arguments(lanes, begin, begin)
            self.chunks[width] = _compiled(
                self._steps, *arguments, donate=True, out=self._by_lane, placed=self._placed
            )
        return self.chunks[width]

    def _arguments(self, lanes: Lane, begin: int, end: int) -> tuple[Any, ...]:
        return lanes, self.batches.of(begin), np.int32(begin), np.int32(end)

    def filled(self, rows: Lane, width: int) -> Lane:
        """Rows from the host as lanes; the last one fills up to the width."""
        n = len(rows.loss)
        index = np.minimum(np.arange(width), n - 1)
        return self.dealt(jax.tree.map(lambda x: np.asarray(x)[index], rows))

    def result(self, lanes: Lane) -> Any:
        """The states of lanes as the user knows them: those of the reports that count."""
        lanes = jax.tree.map(lambda x, like: like.unpack(x), lanes, self._like)
        return lanes.state if lanes.best is None else lanes.best.state

    def result_shape(self) -> Any:
        """What the state of one lane looks like to the user."""
        state = jax.eval_shape(self.result, self.shapes(1))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)

    def _seen_in_a_step(self) -> tuple[Any, bool]:
        """For each leaf of a lane its dtype after a step: a state may begin as a Python number.

        And whether a chunk must not run beside another one: batched decompositions of two programs
        wait for each other's threads for ever, on CPUs.
        """

        def step(lane: Lane, batch: Any) -> Any:
            after = self._step(lane, batch, 0)
            return after, self.run.evaluate(after.setting, after.state)

        begun = jax.tree.map(lambda x: x[0], self._begun)
        one = jax.eval_shape(self._begin, self._setting, 0, self._keys[0], begun)
        jaxpr, (after, _) = jax.make_jaxpr(step, return_shape=True)(one, self.batches.shape)
        if after.best is not None:
            after = after._replace(best=Kept(after.best.score, after.state))
        like = jax.tree.map(lambda x: _Like(x.dtype), after)
        return like, any(name in DECOMPOSITIONS for name in _primitives(jaxpr.jaxpr))

    def _begin_all(self, settings: Any, seeds: Any, keys: Any, begun: Any) -> Lane:
        mine = jax.tree.map(lambda x: x[seeds], (keys, begun))
        lanes = jax.vmap(self._begin)(settings, seeds, *mine)
        return jax.tree.map(lambda x, like: like.pack(x), lanes, self._like)

    def _begin(self, setting: Any, seed: Any, bits: Any, begun: Any) -> Lane:
        key = jax.random.wrap_key_data(bits)
        init = self.run.init
        state = init(setting, key) if self.run.begin is None else init(setting, key, begun)
        zero = jnp.zeros([], float)
        return Lane(
            setting,
            state,
            diagnosis.statistics(),
            loss=zero,
            monitor=None if self.stop is None else self.stop.init(),
            seed=jnp.int32(seed) if self.own_order else None,
            best=Kept(zero + jnp.inf, state) if self.ever else None,
        )

    def _step(self, lane: Lane, batch: Any, index: Any) -> Lane:
        if self.own_order:
            batch = jax.tree.map(lambda x: x[lane.seed], batch)
        state, metrics = self.run.update(lane.setting, lane.state, batch)
        loss, stride = metrics["loss"], metrics.get("stride", jnp.nan)
        seen = diagnosis.observe(lane.seen, loss, stride, index, self.steps)
        return lane._replace(state=state, seen=seen, loss=lane.loss + loss)

    def _steps(
        self, packed: Lane, batches: Any, begin: Any, end: Any
    ) -> tuple[Lane, Any, Any, Any]:
        def body(offset: Any, lanes: Lane) -> Lane:
            batch = self.batches.at(batches, begin, offset)
            # the step is one scalar for the tile: one in each lane would map the batch
            return jax.vmap(self._step, (0, None, None))(lanes, batch, begin + offset)

        lanes = jax.tree.map(lambda x, like: like.unpack(x), packed, self._like)
        lanes = jax.lax.fori_loop(0, end - begin, body, lanes)
        metrics = jax.vmap(self.run.evaluate)(lanes.setting, lanes.state)
        ending = jnp.zeros(lanes.loss.shape, jnp.int8)
        if self.stop is not None:
            stop, monitor = jax.vmap(self.stop.update)(metrics[self.metric], lanes.monitor)
            lanes = lanes._replace(monitor=monitor)
            ending = jnp.where(stop, STOPPED, ending).astype(jnp.int8)
        if self.ever:
            lanes = jax.vmap(self._kept)(lanes, metrics)
        if self.drop_diverged:
            ending = jnp.where(lanes.seen.finite, ending, DIVERGED).astype(jnp.int8)
        after = lanes._replace(loss=jnp.zeros_like(lanes.loss))
        after = jax.tree.map(lambda x, like: like.pack(x), after, self._like)
        return after, lanes.loss, metrics, ending

    def _kept(self, lane: Lane, metrics: Any) -> Lane:
        score = self.sign * metrics[self.metric]
        better = jnp.isfinite(score) & (score < lane.best.score)
        new = Kept(score, lane.state)
        return lane._replace(
            best=jax.tree.map(lambda a, b: jnp.where(better, a, b), new, lane.best)
        )


def _primitives(jaxpr: Any) -> Iterator[str]:
    """The names of all primitives, those of inner programs among them."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)


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
    f: Callable[..., Any],
    *examples: Any,
    donate: bool = False,
    out: Any = None,
    placed: dict[int, Any] | None = None,
) -> Callable[..., Any]:
    """`f` compiled for arguments like the examples, the arrays it closes over among them.

    Data in a program are constants to the compiler, which then takes seconds to look at them.

    Args:
      out: the sharding of all results; None: as they come.
      placed: arrays that other programs hold already; this one's are added.
    """
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*examples)
    structure = jax.tree.structure(shape)

    def flat(constants: Any, *arguments: Any) -> Any:
        leaves = jax.core.eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(structure, leaves)

    where_all = None if out is None else devices.on_all(out.mesh)
    placed = {} if placed is None else placed
    for x in closed.consts:  # each kept with its copy, or another might get its id
        placed.setdefault(id(x), (x, devices.placed(x, where_all)))
    constants = [placed[id(x)][1] for x in closed.consts]
    where: dict[str, Any] = {} if out is None else {"out_shardings": out}
    program = jax.jit(flat, donate_argnums=1 if donate else (), **where)
    compiled = program.lower(constants, *examples).compile()
    call = lambda *arguments: compiled(constants, *arguments)
    setattr(call, "compiled", compiled)  # noqa: B010 (functions have no such attribute)
    return call
