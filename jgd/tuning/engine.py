"""The engine: compiles the programs of a sweep and runs its tiles.

    engine = Engine(plan, groups, shared)
    rows = engine.begin(group, lanes, width)            # a tile at step 0, on its devices
    wait = engine.start(group, rows, first, end)        # starts a chunk; donates the rows
    wait()                                              # lanes, losses, metrics, endings

Sweeps of one task that differ only in numbers share their programs within a process, like calls of
one jitted function. `shared_programs` identifies a task by the ids of its functions and the digest
of its data.
"""

import collections
import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgd.checks import key_of
from jgd.pytree import Monitor
from jgd.training import Run
from jgd.tuning import devices
from jgd.tuning import lanes as lane
from jgd.tuning.batches import BatchSource, FunctionBatches
from jgd.tuning.compiling import Compiled, Compiler, LeafSpec, has_decomposition
from jgd.tuning.lanes import BestReport, Lane, LaneOptions
from jgd.tuning.plan import Plan
from jgd.tuning.space import Lanes
from jgd.tuning.streams import Stream, StreamBatches

__all__ = ["Engine", "Outcome", "Program", "SharedPrograms", "shared_programs"]


# --- programs --------------------------------------------------------------------------------


class SharedPrograms:
    """Batches, initial parameters and compiled programs that the groups of a sweep share."""

    def __init__(
        self, run: Run, plan: Plan, stop: Monitor | None, mesh: jax.sharding.Mesh | None
    ) -> None:
        self.compiler = Compiler(mesh)
        self.options = LaneOptions(
            run,
            stop,
            plan.intervals,
            metric=plan.metric,
            sign=plan.sign,
            own_order=plan.order == "own",
            keep_best=plan.best == "ever",
            drop_diverged=plan.drop_diverged,
        )
        self.batches = self.make_batches(plan)
        self.key_impl = jax.random.key_impl(key_of(plan.key))
        self.keys, self.shared_start = self.start_of(plan)
        self._programs = dict[Any, Program]()

    def make_batches(self, plan: Plan) -> BatchSource:
        """Return a new source of batches. Each sweep reads a stream from its beginning."""
        make = self.options.run.batch
        if isinstance(make, Stream):
            return StreamBatches(make, plan.reports, self.compiler.on_all)
        seeds = plan.seeds if self.options.own_order else None
        return FunctionBatches(make, plan.reports, seeds, self.compiler)

    def start_of(self, plan: Plan) -> tuple[np.ndarray, Any]:
        """Return the keys of the seeds, as bits, and the results of `run.begin` for the seeds."""
        root = key_of(plan.key)
        keys = jax.vmap(lambda seed: jax.random.fold_in(root, seed))(jnp.arange(plan.seeds))
        bits = np.asarray(jax.random.key_data(keys))
        if (make := self.options.run.begin) is None:
            return bits, None
        begin = lambda bits: jax.vmap(make)(jax.random.wrap_key_data(bits, impl=self.key_impl))
        return bits, self.compiler.compiled(begin, bits, out=self.compiler.on_all)(bits)

    def check_seeds(self, plan: Plan, before: Plan) -> None:
        """Raise ValueError if the number of seeds changes the shared start of a seed."""
        n = min(plan.seeds, before.seeds)
        old = self.shared_start if plan.seeds == before.seeds else self.start_of(before)[1]
        equal = lambda x, y: bool((x[:n] == y[:n]).all())
        same = jax.tree.map(equal, self.shared_start, old)
        if not all(jax.tree.leaves(same)):
            raise ValueError(
                f"extend: seeds must be {before.seeds}, got {plan.seeds}: the initial parameters of"
                " the task depend, by rounding, on the number of seeds. Start a sweep in a new"
                " folder"
            )

    def program(self, settings: Any) -> "Program":
        """Return the program for settings of this structure, these shapes and dtypes."""
        leaves = map(jnp.asarray, jax.tree.leaves(settings))
        key = jax.tree.structure(settings), tuple((x.shape[1:], x.dtype) for x in leaves)
        if key not in self._programs:
            self._programs[key] = Program(settings, self)
        return self._programs[key]


CACHED = 4  # tasks whose programs stay in memory
_cache: collections.OrderedDict[Any, tuple[Any, SharedPrograms]] = collections.OrderedDict()


def shared_programs(
    task: Any, run: Run, plan: Plan, stop: Monitor | None, mesh: jax.sharding.Mesh | None
) -> SharedPrograms:
    """Return the programs of this task and these options, from an earlier sweep if there is one."""
    config = "enable_x64 default_matmul_precision numpy_dtype_promotion debug_nans default_device"
    options = "task key seeds order steps metric mode best drop_diverged"
    key = (
        *(id(function) for function in task),
        *(getattr(plan, name) for name in options.split()),
        *(getattr(jax.config, f"jax_{name}") for name in config.split()),
        *(tuple(plan.reports), tuple(plan.rounds), stop, mesh),
    )
    if key in _cache:
        _cache.move_to_end(key)
    else:
        # keeps the task alive, so that the ids of its functions are not reused
        _cache[key] = task, SharedPrograms(run, plan, stop, mesh)
        while len(_cache) > CACHED:
            _cache.popitem(last=False)
    return _cache[key][1]


class Program:
    """Compiled programs for settings of one structure: a start and a chunk for each width.

    Attributes:
      exclusive: whether no other chunk may run at the same time.
    """

    def __init__(self, settings: Any, shared: SharedPrograms) -> None:
        spec = lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.asarray(x).dtype)
        self.setting = jax.tree.map(spec, settings)
        self.shared, self.options = shared, shared.options
        self._starts, self.chunks = dict[int, Compiled](), dict[int, Compiled]()
        self._specs, self.exclusive = self._trace_step()

    def begin(self, settings: Any, seeds: np.ndarray) -> Lane:
        """Return lanes at step 0, on their devices."""
        shared, width = self.shared, len(seeds)
        arguments = (*self._to_devices((settings, seeds)), shared.keys, shared.shared_start)
        if width not in self._starts:
            self._starts[width] = shared.compiler.compiled(
                self._begin, *arguments, out=shared.compiler.by_lane
            )
        return self._starts[width](*arguments)

    def pad(self, rows: Lane, width: int) -> Lane:
        """Move rows from the host to their devices; repeat the last row up to the width."""
        index = np.minimum(np.arange(width), len(rows.loss) - 1)
        return self._to_devices(jax.tree.map(lambda x: np.asarray(x)[index], rows))

    def chunk(self, lanes: Lane, batches: Any, first: int, end: int) -> Callable[[], "Outcome"]:
        """Return a function that runs a compiled chunk, in any thread, and donates the lanes."""
        arguments = (batches, np.int32(first), np.int32(end))
        width = len(lanes.loss)
        if width not in self.chunks:
            compiler = self.shared.compiler
            self.chunks[width] = compiler.compiled(
                self._chunk, lanes, *arguments, donate=True, out=compiler.by_lane
            )
        program = self.chunks[width]
        return lambda: program(lanes, *arguments)

    def shapes(self, rows: int) -> Lane:
        """Return the shapes and dtypes of this many lanes outside the program."""
        stacked = lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype)
        setting = jax.tree.map(stacked, self.setting)
        seeds = jax.ShapeDtypeStruct((rows,), np.int32)
        shared = self.shared
        return jax.eval_shape(self._begin, setting, seeds, shared.keys, shared.shared_start)

    def bytes_of_lane(self) -> int:
        """Return the size of one lane."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.shapes(1)))

    def _to_devices(self, tree: Any) -> Any:
        by_lane = self.shared.compiler.by_lane
        return jax.tree.map(lambda x: devices.placed(x, by_lane), tree)

    def _one(self, setting: Any, seed: Any, bits: Any, shared_start: Any) -> Lane:
        key = jax.random.wrap_key_data(bits, impl=self.shared.key_impl)
        return lane.begin(self.options, setting, seed, key, shared_start)

    def _begin(self, settings: Any, seeds: Any, keys: Any, shared_start: Any) -> Lane:
        of_lanes = jax.tree.map(lambda x: x[seeds], (keys, shared_start))
        lanes = jax.vmap(self._one)(settings, seeds, *of_lanes)
        return jax.tree.map(lambda x, spec: spec.pack(x), lanes, self._specs)

    def _chunk(self, packed: Lane, batches: Any, first: Any, end: Any) -> "Outcome":
        batch_at = lambda offset: self.shared.batches.at(batches, first, offset)
        lanes = jax.tree.map(lambda x, spec: spec.unpack(x), packed, self._specs)
        lanes, loss, metrics, ending = lane.chunk(self.options, lanes, batch_at, first, end)
        packed = jax.tree.map(lambda x, spec: spec.pack(x), lanes, self._specs)
        return Outcome(packed, loss, metrics, ending)

    def _trace_step(self) -> tuple[Any, bool]:
        """Return the `LeafSpec` of each leaf of a lane, and whether the program is exclusive.

        The specs describe a lane after one step, since an initial state may hold Python numbers.
        """

        def step(one: Lane, batch: Any) -> Any:
            after = lane.step(self.options, one, batch, 0)
            return after, self.options.run.evaluate(after.setting, after.state)

        start = jax.tree.map(lambda x: x[0], self.shared.shared_start)
        one = jax.eval_shape(self._one, self.setting, 0, self.shared.keys[0], start)
        batch = self.shared.batches.shape
        jaxpr, (after, _) = jax.make_jaxpr(step, return_shape=True)(one, batch)
        if after.best is not None:
            after = after._replace(best=BestReport(after.best.score, after.state))
        return jax.tree.map(lambda x: LeafSpec(x.dtype), after), has_decomposition(jaxpr.jaxpr)


# --- running tiles ---------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Result of a chunk; leading axes are the width of the tile."""

    lanes: Lane  # at the end of the chunk
    loss: Any  # sum of the losses over the chunk
    metrics: dict[str, Any]
    ending: Any  # index in `ENDINGS`; 0 for a living lane


class Engine:
    """Runner of the tiles of one sweep.

    Attributes:
      programs: the `Program` of each group.
      batches: the `BatchSource` of the sweep.
    """

    def __init__(self, plan: Plan, groups: Mapping[str, Lanes], shared: SharedPrograms) -> None:
        self.plan = plan
        self.batches = shared.make_batches(plan) if shared.batches.sequential else shared.batches
        self.settings = [groups[group.name].settings for group in plan.groups]
        self.programs = [shared.program(settings) for settings in self.settings]
        self._threads = concurrent.futures.ThreadPoolExecutor(plan.at_once)

    def begin(self, group: int, lanes: list[int], width: int) -> Lane:
        """Return lanes of the plan at step 0, on their devices. Repeat the last up to the width."""
        ids = np.array(lanes + lanes[-1:] * (width - len(lanes))) - self.plan.offset(group)
        settings, seeds = np.divmod(ids, self.plan.seeds)
        chosen = jax.tree.map(lambda x: np.asarray(x)[settings], self.settings[group])
        return self.programs[group].begin(chosen, seeds.astype(np.int32))

    def start(self, group: int, rows: Lane, first: int, end: int) -> Callable[[], Outcome]:
        """Start a chunk and return a function that waits for it. Donates the rows."""
        chunk = self.programs[group].chunk(rows, self.batches.of(first), first, end)
        if self.plan.at_once == 1:
            outcome = chunk()
            return lambda: jax.block_until_ready(outcome)
        # each chunk has its own thread: JAX runs the programs of one thread one after the other
        return self._threads.submit(lambda: jax.block_until_ready(chunk())).result

    def close(self) -> None:
        """Stop the threads and free the batches."""
        self._threads.shutdown(wait=False)
        self.batches.release()
