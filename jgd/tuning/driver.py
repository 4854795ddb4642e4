"""The loop of a sweep: a generator of reports.

A sweep is a list of works, lanes of a group at a step. The loop takes the first ones, one for each
core, runs each to its next report as one call of a compiled program, and puts what goes on back.
Lanes that ended are left out as soon as the others fit narrower programs; at a rung all lanes meet
on the host, some are cut, and the others are dealt out anew. The caller looks at reports while the
next chunks run.
"""

import bisect
import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgd import diagnosis
from jgd.training import Run, Task, start, supervised
from jgd.tuning import checks, devices
from jgd.tuning.plan import Options, Plan, fingerprint, make_plan, ranked_by
from jgd.tuning.programs import Batches, Common, Lane, Program
from jgd.tuning.prune import CUT, DIVERGED, FINISHED, NOT_RUN, OUT, REACHED, Board, Halving, cover
from jgd.tuning.space import Lanes
from jgd.tuning.streams import Reader, Stream
from jgd.tuning.waiting import Part, Waiting
from jgd.tuning.widths import choose_widths

__all__ = ["Cut", "Report", "Snapshot", "Sweep", "prepare"]


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
    states: dict[tuple[str, int], Any]  # of the best lanes that a budget ended, by group and lane


class Work(NamedTuple):
    """Lanes that step together next."""

    tile: int
    group: int
    lanes: list[int]
    step: int
    width: int
    state: Lane | None  # None: to be started, or fetched from those that wait


class Flight(NamedTuple):
    """A work that is running."""

    work: Work
    end: int  # step
    results: Callable[[], Any]


class Snapshot(NamedTuple):
    """A sweep between two chunks: plain data, and the states that they name."""

    meta: dict[str, Any]
    states: dict[str, Any]  # by name, on the host


def prepare(
    task: Task | Run,
    settings: Any,
    steps: int,
    *,
    written: Mapping[str, Any] | None = None,
    compiled: dict[Any, Any] | None = None,
    **options: Any,
) -> "Sweep":
    """A sweep that is planned but not begun; refuses what could not be reported.

    Args, beside those of `jgd.sweep`:
      written: the plan of a sweep to go on with, as it was written.
      compiled: programs of earlier sweeps of the same task and options, by the structure of the
        settings; this one's are added.
    """
    wanted = Options(**options)
    run = task if isinstance(task, Run) else supervised(task)
    mesh = devices.mesh(wanted.devices)
    groups = checks.groups(settings)
    streamed = run.batch if isinstance(run.batch, Stream) else None
    batch = checks.batch(run.batch, wanted.order)
    metrics = checks.metrics(run, groups, batch)
    metric, mode = ranked_by(metrics, wanted.metric, wanted.mode)
    stop = checks.monitor(wanted.stop, mode)
    wanted = dataclasses.replace(wanted, metric=metric, mode=mode, stop=stop)
    first = jax.tree.map(lambda x: jnp.asarray(x)[0], next(iter(groups.values())).settings)
    state = start(run, first, jax.random.key(wanted.key))
    last = () if streamed is not None else run.batch(steps - 1)
    made = state.params if isinstance(task, Task) else state
    plan = make_plan(
        groups,
        steps,
        wanted,
        metrics=metrics,
        usual_every=None if streamed is None else streamed.usual_every(steps),
        devices=1 if mesh is None else mesh.size,
        at_once=devices.tiles_at_once(mesh),
        task=fingerprint(batch, last, made, run.evaluate(first, state)),
    )
    devices.refuse_another(plan.task)
    compiled = {} if compiled is None else compiled
    if "common" not in compiled:
        compiled["common"] = Common(run, plan, mesh)
    programs = []
    for group in plan.groups:
        lanes = groups[group.name].settings
        leaves = map(jnp.asarray, jax.tree.leaves(lanes))
        kind = jax.tree.structure(lanes), tuple((x.shape[1:], x.dtype) for x in leaves)
        if kind not in compiled:
            compiled[kind] = Program(run, lanes, compiled["common"], plan, stop)
        programs.append(compiled[kind])
    if written is not None:
        plan = checks.adopted(plan, written)
    elif wanted.width is None and streamed is None and jax.process_count() == 1:
        plan = choose_widths(plan, programs, [groups[g.name].settings for g in plan.groups])
    return Sweep(plan, groups, programs, compiled["common"].batches, wanted.halving)


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
        batches: Batches | Reader,
        halving: Halving | None,
    ) -> None:
        self.plan, self.groups, self.programs, self.halving = plan, groups, programs, halving
        self.batches = batches
        sizes = {g.name: g.settings * plan.seeds for g in plan.groups}
        self.board = Board(sizes, plan.seeds, plan.metric, plan.mode, plan.best, plan.target)
        self.waiting = [Waiting(group, sizes[g.name]) for group, g in enumerate(plan.groups)]
        self.round = 0
        self.tiles = 0
        self.executed = 0
        self.queue: list[Work] = self._first_round()
        self.elapsed = 0.0  # seconds
        self.wanted = False  # whether the next report is to bring a snapshot
        self.unread: list[Report] = []  # decided, but not given out yet
        self.flying: list[Flight] = []
        self._threads = concurrent.futures.ThreadPoolExecutor(plan.at_once)

    def __iter__(self) -> Iterator[Report | Cut]:
        """Carry out what is left of the plan."""
        self._began = time.perf_counter() - self.elapsed
        while not self._over():
            if self.queue:
                self.flying = [self._dispatch(work) for work in self._next_works()]
                yield from self._unread()  # while the chunks run
                self._land()
                continue
            yield from self._unread()
            yield self._next_round()
        yield from self._unread()
        if left := self._out_of_budget():
            yield left

    def _unread(self) -> Iterator[Report]:
        while self.unread:
            yield self.unread.pop(0)

    def _next_works(self) -> list[Work]:
        """Those that run at once, one of them if it has to."""
        taken = [self.queue.pop(0)]
        budget = math.inf if self.plan.budget is None else self.plan.budget - self.executed
        while self.queue and len(taken) < self.plan.at_once:
            budget -= (self._end_of(taken[-1]) - taken[-1].step) * taken[-1].width
            alone = any(self.programs[w.group].alone for w in (taken[0], self.queue[0]))
            if alone or budget <= 0:
                break
            taken.append(self.queue.pop(0))
        return taken

    def _end_of(self, work: Work) -> int:
        """The step of a work's next report."""
        return self.plan.reports[bisect.bisect_right(self.plan.reports, work.step)]

    def _land(self) -> None:
        """Read the results of what is running, in the order of the works."""
        jax.block_until_ready([flight.results() for flight in self.flying])  # Ctrl-C comes here
        flying, self.flying = self.flying, []
        on: list[Work] = []
        for flight in flying:
            report, works = self._settle(flight.work, flight.end, flight.results())
            self.unread.append(report)
            on += works
        if isinstance(self.batches, Reader):  # a stream is read once, for all
            self.queue += on
        else:
            self.queue[:0] = on
        if self.wanted and flying:
            self.unread[-1] = self.unread[-1]._replace(snapshot=self.snapshot())
            self.wanted = False

    def _over(self) -> bool:
        plan = self.plan
        self.elapsed = time.perf_counter() - self._began
        late = plan.seconds is not None and devices.agreed(self.elapsed > plan.seconds)
        spent = plan.budget is not None and self.executed >= plan.budget
        return late or spent or (not self.queue and self.round + 1 == len(plan.rounds))

    # --- a chunk -----------------------------------------------------------------------------

    def _dispatch(self, work: Work) -> Flight:
        """Begin the chunk of a work."""
        program = self.programs[work.group]
        state = work.state
        if state is None and work.step == 0:
            settings = self.groups[self.plan.groups[work.group].name].settings
            state = program.start(settings, work.lanes, work.width)
        elif state is None:
            waiting = self.waiting[work.group]
            state = program.filled(waiting.take(work.lanes), work.width)
            waiting.drop(work.lanes)
        elif isinstance(state.loss, np.ndarray):  # it waited on the host
            state = program.dealt(state)
        end = self._end_of(work)
        self.executed += (end - work.step) * work.width
        ready = program.ready(state, work.step, end)
        if self.plan.at_once == 1:
            results = ready()
            return Flight(work, end, lambda: results)
        # a thread each: jax runs what comes from one thread one after the other
        return Flight(
            work, end, self._threads.submit(lambda: jax.block_until_ready(ready())).result
        )

    def _settle(self, work: Work, end: int, results: Any) -> tuple[Report, list[Work]]:
        """Read the results of a chunk, and decide who goes on."""
        lanes, loss, metrics, ending = results
        plan, name = self.plan, self.plan.groups[work.group].name
        ids, n = np.array(work.lanes), len(work.lanes)
        host = lambda tree: jax.tree.map(lambda x: x[:n], devices.to_host(tree))
        loss, metrics, ending = host(loss) / (end - work.step), host(metrics), host(ending)
        # those that ended in this tile before, but did not make room yet, have no more say
        fresh = self.board.alive[name][ids]
        if end == plan.steps:
            ending = np.where(ending == 0, FINISHED, ending)
        self.board.add(name, ids[fresh], end, {k: v[fresh] for k, v in metrics.items()})
        at_target = np.isfinite(self.board.reached[name][ids]) & (plan.target is not None)
        ending = np.where(at_target & (ending != DIVERGED), REACHED, ending)
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
            return report, []
        if end == plan.rounds[self.round]:
            self.waiting[work.group].add(ids[on], jax.tree.map(lambda x: x[on], host(lanes)))
            self._keep_what_may_survive(end)
            return report, []
        if isinstance(self.batches, Reader) and self.queue:
            lanes = devices.to_host(lanes)  # all others come before it is their turn again
        return report, self._going_on(work, end, lanes, on)

    def _states(self, group: int, lanes: Lane, over: np.ndarray) -> Any:
        """The states of the lanes that ended; the others' are given to the next chunk."""
        if self.plan.devices > 1:  # nobody wants a state that is spread over devices
            lanes = devices.to_host(lanes)
        state = self.programs[group].result(lanes)
        if over.all():
            return state
        return jax.tree.map(lambda x: x[np.flatnonzero(over)], state)

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
        host = devices.to_host(lanes)
        for width in widths:
            mine, rows = rows[:width], rows[width:]
            kept = jax.tree.map(lambda x, mine=mine: x[mine], host)
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
        left = {g.name: self.board.waiting(g.name).tolist() for g in self.plan.groups}
        # where few groups are left, each is shared out to several cores
        shares = -(-self.plan.at_once // max(sum(map(bool, left.values())), 1))
        for index, group in enumerate(self.plan.groups):
            self.waiting[index].drop(lost.get(group.name, []))
            ids = left[group.name]
            parts = [len(ids[share::shares]) for share in range(shares)]
            widths = [w for n in parts if n for w in cover(n, group.menu, group.costs)]
            for width in sorted(widths, reverse=True):
                mine, ids = ids[:width], ids[width:]
                self.queue.append(self._work(index, mine, step, width))
        return Cut(step, lost, {})

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
        """End all that is left; what never began is not run. The best go with their states."""
        left = {g.name: self.board.waiting(g.name) for g in self.plan.groups}
        lost = {name: lanes.tolist() for name, lanes in left.items() if len(lanes)}
        self.end(left, OUT)  # before they are ranked: who went further is better
        states = self._states_of_the_best(left)
        self.queue = []
        for waiting in self.waiting:
            waiting.drop(np.flatnonzero(waiting.part_of >= 0))
        return Cut(None, lost, states) if lost else None

    def _states_of_the_best(self, left: Mapping[str, Any]) -> dict[tuple[str, int], Any]:
        seeds, board = self.plan.seeds, self.board
        begun = {n: np.unique(x[board.step[n][x] > 0] // seeds) for n, x in left.items()}
        found = {}
        for name, setting in board.ranked(begun)[: self.plan.keep]:
            group = board.order[name]
            for lane in board.lanes_of(setting).tolist():
                rows = self._rows_of(group, lane)
                if rows is not None:
                    state = self.programs[group].result(jax.tree.map(jnp.asarray, rows))
                    found[name, lane] = jax.tree.map(lambda x: x[0], state)
        return found

    def _rows_of(self, group: int, lane: int) -> Any:
        """A lane that has begun and not ended, as one row; None if it is not there."""
        if self.waiting[group].part_of[lane] >= 0:
            return self.waiting[group].take([lane])
        for work in self.queue:
            if work.group == group and lane in work.lanes and work.state is not None:
                row = [work.lanes.index(lane)]
                return jax.tree.map(lambda x, row=row: x[row], devices.to_host(work.state))
        return None

    def end(self, lanes: Mapping[str, Any], ending: int) -> None:
        """Lanes that do not go on; those that never began are not run."""
        for name, ids in lanes.items():
            ids = np.asarray(ids, int)
            self.board.end(name, ids, ending)
            self.board.ending[name][ids[self.board.step[name][ids] == 0]] = NOT_RUN

    def stop(self) -> Iterator[Report | Cut]:
        """End all that is left, as if a budget were used up; what was not given out yet."""
        self._land()
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
                states[name] = devices.to_host(work.state)
            queue.append(entry)
        waiting = []
        for group in self.waiting:
            parts = []
            for number, part in group.parts.items():
                gone = part.ids[group.part_of[part.ids] != number]
                entry = {"number": number, "name": part.name, "lanes": part.ids.tolist()}
                parts.append({**entry, "gone": gone.tolist()})
                states[part.name] = part.rows
            waiting.append(parts)
        meta = {
            "round": self.round,
            "tiles": self.tiles,
            "executed": self.executed,
            "elapsed": self.elapsed,
            "parts": [group.made for group in self.waiting],
            "queue": queue,
            "waiting": waiting,
        }
        if isinstance(self.batches, Reader):
            next_step = self.plan.rounds[self.round] if not self.queue else self.queue[0].step
            meta["stream"] = self.batches.mark(next_step)
        return Snapshot(meta, states)

    def restore(self, meta: Mapping[str, Any], load: Callable[[str, Any], Any]) -> None:
        """Go back to a snapshot; `load(name, shapes)` gives the states that it names."""
        self.round, self.tiles = meta["round"], meta["tiles"]
        self.executed, self.elapsed = meta["executed"], meta["elapsed"]
        self.queue = []
        for entry in meta["queue"]:
            work = Work(**entry | {"state": None})
            program, menu = self.programs[work.group], self.plan.groups[work.group].menu
            if work.width not in menu:  # of another number of devices
                width = min(w for w in menu if w >= len(work.lanes))
                work = work._replace(width=width)
            if entry["state"] is not None:
                rows = load(entry["state"], program.shapes(entry["width"]))
                mine = slice(len(work.lanes))
                kept = jax.tree.map(lambda x, mine=mine: x[mine], rows)
                work = work._replace(state=program.filled(kept, work.width))
            self.queue.append(work)
        for group, parts in zip(self.waiting, meta["waiting"], strict=True):
            for part in parts:
                ids = np.array(part["lanes"])
                rows = load(part["name"], self.programs[group.group].shapes(len(ids)))
                group.put(part["number"], Part(part["name"], ids, rows))
                group.part_of[part["gone"]] = -1
            group.made = meta["parts"][group.group]
        if isinstance(self.batches, Reader):
            self.batches.seek(meta["stream"])
