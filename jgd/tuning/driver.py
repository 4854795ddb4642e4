"""The loop of a sweep: a generator of reports.

One program is compiled for each group. A tile runs from its first step to its last in chunks; each
is one call of the program, a loop over the steps to the next report. The host reads the report of
a chunk while the next one runs.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jgd import diagnosis
from jgd.training import Run, Task, supervised
from jgd.tuning.plan import Plan, Tile, fingerprint, make_plan
from jgd.tuning.space import Lanes, lanes_of

__all__ = ["Report", "iter_plan", "prepare"]

BATCHES_AT_ONCE = 64 * 2**20  # bytes of batches made ahead for a chunk
# columns of the table and the journal, which no metric may be called
RESERVED = (
    *("rank", "optimizer", "final_loss", "verdict", "seeds"),
    *("tile", "group", "step", "lanes", "train_loss"),
)


class Lane(NamedTuple):
    """What a tile holds, each leaf with a leading axis of its width."""

    setting: Any
    state: Any
    seen: diagnosis.LossStatistics
    loss: Any  # sum of the training loss since the last report


class Report(NamedTuple):
    """What a tile says at the end of a chunk; arrays have one row for each of its lanes."""

    tile: int
    group: str
    step: int  # steps done
    lanes: np.ndarray  # ids: setting * seeds + seed
    loss: np.ndarray  # mean training loss since the last report
    metrics: dict[str, np.ndarray]  # of `evaluate`, now
    seen: diagnosis.LossStatistics | None  # after the last step
    state: Any  # after the last step: of the run, on the device, rows beyond `lanes` are filling


def prepare(
    task: Task | Run,
    settings: Any,
    steps: int,
    *,
    seeds: int = 1,
    key: int = 0,
    width: int | None = None,
    report_every: int | None = None,
) -> tuple[Plan, dict[str, Lanes], Run]:
    """The plan of a sweep, its groups, and the training run; refuses what could not be reported."""
    run = task if isinstance(task, Run) else supervised(task)
    groups = _groups(settings)
    if not groups:
        raise ValueError("sweep: no settings")
    first = jax.tree.map(lambda x: jnp.asarray(x)[0], next(iter(groups.values())).settings)
    start = run.init(first, jax.random.key(key))
    batch = run.batch(0)
    metrics = _metrics(run, first, start, batch)
    columns = {name for lanes in groups.values() for name in (*lanes.axes, *lanes.fixed, *RESERVED)}
    for name in columns.intersection(metrics):
        raise ValueError(f"sweep: evaluate's {name} has the name of a column of the table")
    made = start.params if isinstance(task, Task) else start
    digest = fingerprint(batch, made)
    plan = make_plan(
        groups,
        steps,
        seeds=seeds,
        key=key,
        width=width,
        report_every=report_every,
        task=digest,
        metrics=metrics,
    )
    return plan, groups, run


def _metrics(run: Run, setting: Any, state: Any, batch: Any) -> list[str]:
    """The names that `evaluate` reports; refuses what is no dict of scalars before any training."""
    _, of_update = jax.eval_shape(run.update, setting, state, batch)
    if "loss" not in of_update or of_update["loss"].shape:
        raise ValueError("sweep: update must report a scalar loss, under the name 'loss'")
    names: list[str] = []

    def evaluate() -> dict[str, Any]:
        metrics = run.evaluate(setting, state)
        if not isinstance(metrics, dict) or not metrics:
            raise ValueError(f"sweep: evaluate must return a dict of scalars, got {metrics!r}")
        names.extend(metrics)  # in the order of the user, where jax sorts
        return metrics

    for name, value in jax.eval_shape(evaluate).items():
        if getattr(value, "shape", None) != ():
            raise ValueError(f"sweep: metric {name} of evaluate must be a scalar, got {value!r}")
    return names


def _groups(settings: Any) -> dict[str, Lanes]:
    """Named batches of settings, whatever of them the user gave."""
    if not isinstance(settings, dict):
        settings = {_name_of(settings): settings}
    groups: dict[str, Lanes] = {}
    for name, batch in settings.items():
        several = type(batch) is dict and any(isinstance(x, Lanes) for x in batch.values())
        named = {f"{name} {label}": x for label, x in batch.items()} if several else {name: batch}
        for label, lanes in named.items():
            if label in groups:
                raise ValueError(f"sweep: two groups of settings are named {label!r}")
            groups[label] = lanes_of(lanes)
    return groups


def _name_of(settings: Any) -> str:
    inner = settings.settings if isinstance(settings, Lanes) else settings
    known = isinstance(inner, optax.GradientTransformation)
    return repr(inner).partition("(")[0] if known else "setting"


def iter_plan(plan: Plan, groups: Mapping[str, Lanes], run: Run) -> Iterator[Report]:
    """Carry out a plan."""
    batches = _Batches(run.batch, plan.reports)
    programs: dict[int, _Program] = {}
    pending: Callable[[], Report] | None = None
    for index, tile in enumerate(plan.tiles):
        name = plan.groups[tile.group].name
        if tile.group not in programs:
            programs = {tile.group: _Program(run, plan, batches)}  # tiles come group by group
        program = programs[tile.group]
        lanes = program.start(groups[name].settings, tile, plan.groups[tile.group].width)
        begin = 0
        for end in plan.reports:
            lanes, loss, metrics = program.chunk(lanes, begin, end)
            if pending is not None:
                yield pending()
            last = lanes if end == plan.steps else None
            pending = _reporter(index, name, tile, (begin, end), loss, metrics, last)
            begin = end
    if pending is not None:
        yield pending()


def _reporter(
    index: int,
    name: str,
    tile: Tile,
    span: tuple[int, int],
    loss: Any,
    metrics: Any,
    lanes: Lane | None,
) -> Callable[[], Report]:
    """The report of a chunk that is still running: made when it is asked for."""

    def make() -> Report:
        begin, end = span
        n = len(tile.lanes)
        host = lambda tree: jax.tree.map(lambda x: np.asarray(x)[:n], tree)
        return Report(
            tile=index,
            group=name,
            step=end,
            lanes=np.array(tile.lanes),
            loss=host(loss) / (end - begin),
            metrics=host(metrics),
            seen=None if lanes is None else host(lanes.seen),
            state=None if lanes is None else lanes.state,
        )

    return make


class _Batches:
    """The batches of each chunk: made once, shared by all tiles and groups."""

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
        self.make = _with_constants_as_arguments(many, jnp.int32(0))

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


class _Program:
    """The compiled parts of a group: start and chunk."""

    def __init__(self, run: Run, plan: Plan, batches: _Batches) -> None:
        self.run, self.batches = run, batches
        self.seeds = plan.seeds
        root = jax.random.key(plan.key)
        self.keys = jax.vmap(lambda seed: jax.random.fold_in(root, seed))(jnp.arange(plan.seeds))
        self.steps = plan.steps
        self._dtypes: Any = None
        self._start: Callable[..., Lane] | None = None
        self._chunk: Callable[..., tuple[Lane, Any, Any]] | None = None

    def start(self, settings: Any, tile: Tile, width: int) -> Lane:
        """The lanes of a tile at step 0; the last lane fills up to the width."""
        ids = np.array(tile.lanes + tile.lanes[-1:] * (width - len(tile.lanes)))
        chosen = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[ids // self.seeds]), settings)
        keys = self.keys[ids % self.seeds]

        def begin(setting: Any, key: jax.Array) -> Lane:
            state = self.run.init(setting, key)
            return Lane(setting, state, diagnosis.statistics(), jnp.zeros([], float))

        if self._start is None:
            self._start = _with_constants_as_arguments(jax.vmap(begin), chosen, keys)
        lanes = self._start(chosen, keys)
        if self._dtypes is None:  # those of a step: a state may begin as a Python number
            batch = jax.eval_shape(self.run.batch, 0)
            after = jax.eval_shape(jax.vmap(self._step, (0, None, None)), lanes, batch, 0)
            self._dtypes = jax.tree.map(lambda x: x.dtype, after)
        return jax.tree.map(_as_dtype, lanes, self._dtypes)

    def chunk(self, lanes: Lane, begin: int, end: int) -> tuple[Lane, Any, Any]:
        """The lanes at step `end`, their losses since `begin` and their metrics now."""
        batches = self.batches.of(begin)
        arguments = (lanes, batches, jnp.int32(begin), jnp.int32(end))
        if self._chunk is None:
            self._chunk = _with_constants_as_arguments(self._steps, *arguments, donate=True)
        return self._chunk(*arguments)

    def _step(self, lane: Lane, batch: Any, index: Any) -> Lane:
        state, metrics = self.run.update(lane.setting, lane.state, batch)
        loss, stride = metrics["loss"], metrics.get("stride", jnp.nan)
        seen = diagnosis.observe(lane.seen, loss, stride, index, self.steps)
        return Lane(lane.setting, state, seen, lane.loss + loss)

    def _steps(self, lanes: Lane, batches: Any, begin: Any, end: Any) -> tuple[Lane, Any, Any]:
        def body(offset: Any, lanes: Lane) -> Lane:
            batch = self.batches.at(batches, begin, offset)
            # the step is one scalar for the tile: one in each lane would map the batch
            return jax.vmap(self._step, (0, None, None))(lanes, batch, begin + offset)

        lanes = jax.lax.fori_loop(0, end - begin, body, lanes)
        metrics = jax.vmap(self.run.evaluate)(lanes.setting, lanes.state)
        return lanes._replace(loss=jnp.zeros_like(lanes.loss)), lanes.loss, metrics


def _as_dtype(x: jax.Array, dtype: Any) -> jax.Array:
    return x if x.dtype == dtype else x.astype(dtype)


def _with_constants_as_arguments(
    f: Callable[..., Any], *examples: Any, donate: bool = False
) -> Callable[..., Any]:
    """`f` compiled for arguments like the examples, the arrays it closes over among them.

    Data in a program are constants to the compiler, which then takes seconds to look at them.
    """
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*examples)
    structure = jax.tree.structure(shape)

    def flat(constants: Any, *arguments: Any) -> Any:
        leaves = jax.core.eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(structure, leaves)

    constants = [jnp.asarray(x) for x in closed.consts]
    program = jax.jit(flat, donate_argnums=1 if donate else ())
    compiled = program.lower(constants, *examples).compile()
    return lambda *arguments: compiled(constants, *arguments)
