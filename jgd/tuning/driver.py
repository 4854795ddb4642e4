"""The loop of a sweep: a generator of reports.

A sweep is a list of works, lanes of a group at a step. The loop takes the first one, runs it to the
next report as one call of a compiled program, and puts what goes on back. Lanes that ended are left
out as soon as the others fit narrower programs; at a rung all lanes meet on the host, some are cut,
and the others are dealt out anew. The caller looks at a report while the next chunk runs.
"""

import dataclasses
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jgd import diagnosis
from jgd.pytree import Monitor
from jgd.stopping import early_stopping
from jgd.training import Run, Task, supervised
from jgd.tuning.plan import Plan, fingerprint, make_plan, ranked_by
from jgd.tuning.programs import Batches, Lane, Program
from jgd.tuning.prune import CUT, FINISHED, NOT_RUN, OUT, Board, Halving, cover
from jgd.tuning.space import Lanes, lanes_of
from jgd.tuning.waiting import Part, Waiting
from jgd.tuning.widths import choose_widths

__all__ = ["Cut", "Report", "Snapshot", "Sweep", "prepare"]

# columns of the table and the journal, which no metric may be called
RESERVED = (
    *("rank", "optimizer", "final_loss", "verdict", "seeds", "ended", "at", "cut"),
    *("tile", "group", "step", "lanes", "train_loss", "seen"),
)


class Report(NamedTuple):
    """What a tile says at the end of a chunk; arrays have one row for each of its lanes."""

    tile: int
    group: str
    step: int  # steps done
    lanes: np.ndarray  # ids: setting * seeds + seed
    loss: np.ndarray  # mean training loss since the last report
    metrics: dict[str, np.ndarray]  # of `evaluate`, now
    ended: np.ndarray  # for each lane a place in `prune.ENDINGS`; 0: it goes on
    seen: diagnosis.LossStatistics | None  # if any lane ended
    state: Any  # of the run, a row for each lane that ended, on the device; None if none did
    alive: int  # lanes of the whole sweep that go on or are to begin
    snapshot: "Snapshot | None" = None  # of the sweep just after this report, if it was wanted


class Cut(NamedTuple):
    """Lanes that do not go on, as decided at a rung or when a budget is used up."""

    step: int | None  # of the rung; None: the budget
    lanes: dict[str, list[int]]  # by group


class Work(NamedTuple):
    """Lanes that step together next."""

    tile: int
    group: int
    lanes: list[int]
    step: int
    width: int
    state: Lane | None  # None: to be started, or fetched from those that wait


class Snapshot(NamedTuple):
    """A sweep between two chunks: plain data, and the states that they name."""

    meta: dict[str, Any]
    states: dict[str, Any]  # by name, on the host


def prepare(
    task: Task | Run,
    settings: Any,
    steps: int,
    *,
    seeds: int = 1,
    key: int = 0,
    width: int | None = None,
    report_every: int | None = None,
    metric: str | None = None,
    mode: Any = None,
    halving: Halving | None = None,
    stop: Monitor | int | None = None,
    drop_diverged: bool = False,
    budget: int | None = None,
    seconds: float | None = None,
    devices: int | None = None,
    written: Mapping[str, Any] | None = None,
    compiled: dict[Any, Program] | None = None,
) -> "Sweep":
    """A sweep that is planned but not begun; refuses what could not be reported.

    Args, beside those of `jgd.sweep`:
      written: the plan of a sweep to go on with, as it was written.
      compiled: programs of earlier sweeps of the same task and options, by the structure of the
        settings; this one's are added.
    """
    run = task if isinstance(task, Run) else supervised(task)
    devices = jax.local_device_count() if devices is None else devices
    mesh = _mesh(devices)
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
    metric, mode = ranked_by(metrics, metric, mode)
    monitor = _monitor(stop, mode)
    plan = make_plan(
        groups,
        steps,
        seeds=seeds,
        key=key,
        width=width,
        report_every=report_every,
        metric=metric,
        mode=mode,
        halving=halving,
        stop=monitor,
        drop_diverged=drop_diverged,
        budget=budget,
        seconds=seconds,
        devices=devices,
        task=fingerprint(batch, run.batch(steps - 1), made, run.evaluate(first, start)),
        metrics=metrics,
    )
    batches: Batches | None = None
    compiled = {} if compiled is None else compiled
    programs = []
    for group in plan.groups:
        lanes = groups[group.name].settings
        structure = jax.tree.structure(lanes)
        if structure not in compiled:
            batches = batches or Batches(run.batch, plan.reports)
            compiled[structure] = Program(
                run,
                lanes,
                batches,
                seeds=plan.seeds,
                key=plan.key,
                steps=plan.steps,
                metric=plan.metric,
                stop=monitor,
                drop_diverged=drop_diverged,
                mesh=mesh,
            )
        programs.append(compiled[structure])
    if written is not None:
        plan = _adopted(plan, written)
    elif width is None:
        plan = choose_widths(plan, programs, [groups[g.name].settings for g in plan.groups])
    return Sweep(plan, groups, programs, halving)


def _monitor(stop: Any, mode: str) -> Monitor | None:
    """The early stopping that was asked for, in the direction of the metric."""
    if stop is None:
        return None
    if isinstance(stop, Monitor):
        if getattr(stop, "mode", mode) != mode:
            raise ValueError(f"sweep: stop has mode {stop.mode!r}, the metric {mode!r}")
        return stop
    if isinstance(stop, bool) or not hasattr(stop, "__index__"):
        raise ValueError(f"sweep: stop must be jgd.stopping.early_stopping or an int, got {stop!r}")
    return early_stopping(patience=operator.index(stop), mode=mode)  # type: ignore[arg-type]


def _mesh(devices: int) -> jax.sharding.Mesh | None:
    """A mesh of the first devices, for lanes; one device needs none."""
    known = jax.local_devices()
    if not 1 <= devices <= len(known):
        raise ValueError(f"sweep: devices must be in 1 to {len(known)}, got {devices}")
    return None if devices == 1 else jax.sharding.Mesh(np.array(known[:devices]), ("lanes",))


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


class Sweep:
    """A sweep at work: what is to be done next, and who waits for it.

    Attributes:
      plan: what decides about the numbers.
      board: the last word of every lane.
      executed: lane-steps done so far, those that fill up tiles included.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Mapping[str, Lanes],
        programs: list[Program],
        halving: Halving | None,
    ) -> None:
        self.plan, self.groups, self.programs, self.halving = plan, groups, programs, halving
        sizes = {g.name: g.settings * plan.seeds for g in plan.groups}
        self.board = Board(sizes, plan.seeds, plan.metric, plan.mode)
        self.waiting = [Waiting(group) for group in range(len(plan.groups))]
        self.round = 0
        self.tiles = 0
        self.executed = 0
        self.queue: list[Work] = self._first_round()
        self.elapsed = 0.0  # seconds
        self.wanted = False  # whether the next report is to bring a snapshot
        self.unread: Report | None = None  # decided, but not given out yet

    def __iter__(self) -> Iterator[Report | Cut]:
        """Carry out what is left of the plan."""
        self._began = time.perf_counter() - self.elapsed
        while not self._over():
            if self.queue:
                work = self.queue.pop(0)
                running = self._dispatch(work)
                yield from self._unread()  # while the chunk runs
                self.unread = self._settle(work, *running)
                if self.wanted:
                    self.unread = self.unread._replace(snapshot=self.snapshot())
                    self.wanted = False
                continue
            yield from self._unread()
            yield self._next_round()
        yield from self._unread()
        if left := self._out_of_budget():
            yield left

    def _unread(self) -> Iterator[Report]:
        report, self.unread = self.unread, None
        if report is not None:
            yield report

    def _over(self) -> bool:
        plan = self.plan
        self.elapsed = time.perf_counter() - self._began
        late = plan.seconds is not None and self.elapsed > plan.seconds
        spent = plan.budget is not None and self.executed >= plan.budget
        return late or spent or (not self.queue and self.round + 1 == len(plan.rounds))

    # --- a chunk -----------------------------------------------------------------------------

    def _dispatch(self, work: Work) -> tuple[int, Any]:
        """Begin the chunk of a work: where it ends, and its results to come."""
        program = self.programs[work.group]
        state = work.state
        if state is None and work.step == 0:
            settings = self.groups[self.plan.groups[work.group].name].settings
            state = program.start(settings, work.lanes, work.width)
        elif state is None:
            waiting = self.waiting[work.group]
            state = program.filled(waiting.take(work.lanes), work.width)
            waiting.drop(work.lanes)
        end = min(step for step in self.plan.reports if step > work.step)
        self.executed += (end - work.step) * work.width
        return end, program.chunk(state, work.step, end)

    def _settle(self, work: Work, end: int, results: Any) -> Report:
        """Read the results of a chunk, and decide who goes on."""
        lanes, loss, metrics, ending = results
        plan, name = self.plan, self.plan.groups[work.group].name
        ids, n = np.array(work.lanes), len(work.lanes)
        host = lambda tree: jax.tree.map(lambda x: np.asarray(x)[:n], tree)
        loss, metrics, ending = host(loss) / (end - work.step), host(metrics), host(ending)
        # those that ended in this tile before, but did not make room yet, have no more say
        fresh = self.board.alive[name][ids]
        if end == plan.steps:
            ending = np.where(ending == 0, FINISHED, ending)
        self.board.add(name, ids[fresh], end, {k: v[fresh] for k, v in metrics.items()})
        over = fresh & (ending > 0)
        self.board.end(name, ids[over], ending[over])
        report = Report(
            tile=work.tile,
            group=name,
            step=end,
            lanes=ids[fresh],
            loss=loss[fresh],
            metrics={k: v[fresh] for k, v in metrics.items()},
            ended=np.where(over, ending, 0)[fresh],
            seen=jax.tree.map(lambda x: x[fresh], host(lanes.seen)) if over.any() else None,
            state=self._states(work.group, lanes, over) if over.any() else None,
            alive=sum(int(alive.sum()) for alive in self.board.alive.values()),
        )
        on = fresh & ~over
        if not on.any():
            pass
        elif end == plan.rounds[self.round]:
            self.waiting[work.group].add(ids[on], jax.tree.map(lambda x: x[on], host(lanes)))
            self._keep_what_may_survive(end)
        else:
            self.queue[:0] = self._going_on(work, end, lanes, on)
        return report

    def _states(self, group: int, lanes: Lane, over: np.ndarray) -> Any:
        """The states of the lanes that ended; the others' are given to the next chunk."""
        state = self.programs[group].unpacked(lanes).state
        return state if over.all() else jax.tree.map(lambda x: x[np.flatnonzero(over)], state)

    def _going_on(self, work: Work, end: int, lanes: Lane, on: np.ndarray) -> list[Work]:
        """The works that follow: the same tile, or narrower ones if that is cheaper."""
        same = [work._replace(step=end, state=lanes)]
        if on.all():
            return same
        group = self.plan.groups[work.group]
        cost = dict(zip(group.menu, group.costs, strict=True))
        widths = cover(int(on.sum()), group.menu, group.costs)
        if sum(cost[w] for w in widths) > 0.9 * cost[work.width]:
            return same
        rows, works = np.flatnonzero(on), []
        for width in widths:
            mine, rows = rows[:width], rows[width:]
            kept = jax.tree.map(lambda x, mine=mine: np.asarray(x)[mine], lanes)
            state = self.programs[work.group].filled(kept, width)
            ids = [work.lanes[row] for row in mine]
            works.append(self._work(work.group, ids, end, width, state))
        return works

    def _work(
        self, group: int, lanes: list[int], step: int, width: int, state: Lane | None = None
    ) -> Work:
        self.tiles += 1
        return Work(self.tiles - 1, group, lanes, step, width, state)

    # --- rounds ------------------------------------------------------------------------------

    def _first_round(self) -> list[Work]:
        works = []
        for index, group in enumerate(self.plan.groups):
            ids = list(range(group.settings * self.plan.seeds))
            tiles = [ids[i : i + group.width] for i in range(0, len(ids), group.width)]
            works += [self._work(index, tile, 0, group.width) for tile in tiles]
        return works

    def _next_round(self) -> Cut:
        """Cut at a rung, and deal out the others."""
        step = self.plan.rounds[self.round]
        lost = self._cut_at(step)
        self.end(lost, CUT)
        self.round += 1
        for index, group in enumerate(self.plan.groups):
            self.waiting[index].drop(lost.get(group.name, []))
            ids = self.board.waiting(group.name).tolist()
            for width in cover(len(ids), group.menu, group.costs) if ids else []:
                mine, ids = ids[:width], ids[width:]
                self.queue.append(self._work(index, mine, step, width))
        return Cut(step, lost)

    def _cut_at(self, step: int) -> dict[str, list[int]]:
        """The lanes that a rung cuts, but for those that ended by themselves."""
        lost: dict[str, list[int]] = {}
        for members, keep in self._pools(step):
            for name, setting in self.board.ranked(members)[keep:]:
                lost.setdefault(name, []).extend(self.board.lanes_of(setting).tolist())
        alive = self.board.alive
        lost = {name: [x for x in sorted(lanes) if alive[name][x]] for name, lanes in lost.items()}
        return {name: lanes for name, lanes in lost.items() if lanes}

    def _keep_what_may_survive(self, step: int) -> None:
        """Before all have reached a rung: drop the states of those that enough others beat.

        The host then never holds many more than the rung will let through.
        """
        most = sum(keep for _, keep in self._pools(step)) * self.plan.seeds
        if sum(map(len, self.waiting)) <= 1.25 * most:
            return
        for members, keep in self._pools(step):
            here = {
                name: settings[self.board.step[name][self.board.lanes_of(settings)].min(1) >= step]
                for name, settings in members.items()
            }
            if sum(map(len, here.values())) <= keep:
                continue
            lost: dict[str, list[int]] = {}
            for name, setting in self.board.ranked(here)[keep:]:
                lost.setdefault(name, []).extend(self.board.lanes_of(setting).tolist())
            for group, waiting in zip(self.plan.groups, self.waiting, strict=True):
                waiting.drop(lost.get(group.name, []))

    def _pools(self, step: int) -> list[tuple[dict[str, np.ndarray], int]]:
        """What is ranked together at a rung, settings by group, and how many of them go on."""
        if self.halving is None:
            return []
        rungs, brackets = self.halving.brackets(self.plan.steps), np.array(self.plan.brackets)
        first = np.cumsum([0, *(group.settings for group in self.plan.groups)])
        pools = []
        for bracket, own in enumerate(rungs):
            if step not in own:
                continue
            members = {
                group.name: np.flatnonzero(brackets[a:b] == bracket)
                for group, a, b in zip(self.plan.groups, first, first[1:], strict=False)
            }
            apart = [{name: some} for name, some in members.items()]
            for pool in apart if self.halving.within == "group" else [members]:
                if count := sum(map(len, pool.values())):
                    pools.append((pool, self.halving.kept(count, own.index(step) + 1)))
        return pools

    def _out_of_budget(self) -> Cut | None:
        """End all that is left; what never began is not run."""
        left = {g.name: self.board.waiting(g.name) for g in self.plan.groups}
        self.end(left, OUT)
        self.queue = []
        for waiting in self.waiting:
            waiting.parts = []
        lost = {name: lanes.tolist() for name, lanes in left.items() if len(lanes)}
        return Cut(None, lost) if lost else None

    def end(self, lanes: Mapping[str, Any], ending: int) -> None:
        """Lanes that do not go on; those that never began are not run."""
        for name, ids in lanes.items():
            ids = np.asarray(ids, int)
            self.board.end(name, ids, ending)
            self.board.ending[name][ids[self.board.step[name][ids] == 0]] = NOT_RUN

    def stop(self) -> Iterator[Report | Cut]:
        """End all that is left, as if a budget were used up; what was not given out yet."""
        yield from self._unread()
        if left := self._out_of_budget():
            yield left

    # --- snapshots ---------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Where the sweep is, between two chunks."""
        states: dict[str, Any] = {}
        queue = []
        for work in self.queue:
            entry = work._asdict() | {"state": None}
            if work.state is not None:
                entry["state"] = name = f"tile-{work.tile}-{work.step}"
                states[name] = jax.tree.map(np.asarray, work.state)
            queue.append(entry)
        waiting = []
        for group in self.waiting:
            waiting.append([{"name": p.name, "lanes": p.ids.tolist()} for p in group.parts])
            states |= {part.name: part.rows for part in group.parts}
        meta = {
            "round": self.round,
            "tiles": self.tiles,
            "executed": self.executed,
            "elapsed": self.elapsed,
            "parts": [group.made for group in self.waiting],
            "queue": queue,
            "waiting": waiting,
        }
        return Snapshot(meta, states)

    def restore(self, meta: Mapping[str, Any], load: Callable[[str, Any], Any]) -> None:
        """Go back to a snapshot; `load(name, shapes)` gives the states that it names."""
        self.round, self.tiles = meta["round"], meta["tiles"]
        self.executed, self.elapsed = meta["executed"], meta["elapsed"]
        self.queue = []
        for entry in meta["queue"]:
            work = Work(**entry | {"state": None})
            if entry["state"] is not None:
                rows = load(entry["state"], self.programs[work.group].shapes(work.width))
                dealt = self.programs[work.group].dealt(jax.tree.map(jnp.asarray, rows))
                work = work._replace(state=dealt)
            self.queue.append(work)
        for group, parts in zip(self.waiting, meta["waiting"], strict=True):
            group.made = meta["parts"][group.group]
            group.parts = [
                Part(
                    part["name"],
                    np.array(part["lanes"]),
                    load(part["name"], self.programs[group.group].shapes(len(part["lanes"]))),
                )
                for part in parts
            ]


def _adopted(plan: Plan, written: Mapping[str, Any]) -> Plan:
    """The plan that a sweep was begun with; its widths are not probed again.

    Raises: ValueError, naming the difference, if it is the plan of another sweep.
    """
    widths = ("width", "menu", "costs")
    for name, value in plan.as_json().items():
        was = written.get(name)
        if name == "groups":
            value, was = ([_without(g, widths) for g in groups] for groups in (value, was or []))
        if value != was:
            raise ValueError(
                f"resume: this is another sweep: its {name} was {_short(was)} and is now"
                f" {_short(value)}"
            )
    groups = [
        dataclasses.replace(group, **{name: old[name] for name in widths})
        for group, old in zip(plan.groups, written["groups"], strict=True)
    ]
    return dataclasses.replace(plan, groups=groups)


def _without(group: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in names}


def _short(x: Any) -> str:
    text = repr(x)
    return text if len(text) < 200 else text[:200] + "..."
