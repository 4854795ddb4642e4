"""The turns of a sweep.

    poll(sweep.events)          # the only entrance for clock, signal, pruner and writer
    sweep.start()               # the next tiles, one for each core
    deliver(sweep.take())       # the events of the turn before, while the tiles run
    sweep.finish()              # waits for them, and judges them in their order

The facts are what the events say about lanes, the pool holds the states of lanes, and the schedule
the queue of tiles.
"""

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgd.diagnosis import LossStatistics, statistics
from jgd.tuning import devices
from jgd.tuning.engine import Engine, Outcome
from jgd.tuning.events import DIVERGED, FINISHED, REACHED, Cut, Report
from jgd.tuning.lanes import Lane
from jgd.tuning.ledger import Ledger
from jgd.tuning.pack import pack_tiles
from jgd.tuning.pool import Pool
from jgd.tuning.result import Facts

__all__ = ["Decision", "Schedule", "Sweep", "Tile", "run"]


class Tile(NamedTuple):
    """Lanes of a group that step together next."""

    id: int
    group: int
    lanes: list[int]  # numbered over all groups; some may have ended
    width: int
    step: int


@dataclass
class Schedule:
    """The queue of tiles, as plain data that a checkpoint records."""

    queue: list[Tile] = field(default_factory=list[Tile])
    next_id: int = 0
    round: int = 0
    lane_steps: int = 0  # executed, including those that pad tiles
    elapsed: float = 0.0  # seconds

    @classmethod
    def of_json(cls, written: Mapping[str, Any]) -> "Schedule":
        schedule = cls(**dict[str, Any](written))
        schedule.queue = [Tile(*tile) for tile in written["queue"]]
        return schedule


class Decision(NamedTuple):
    """Requests of a poll."""

    checkpoint: bool = False
    cuts: tuple[int, ...] = ()  # lanes
    stop: bool = False  # a limit of time was reached: end all lanes
    interrupt: bool = False  # leave all lanes as they are, for a later resume


class Sweep:
    """A sweep in progress.

    Args:
      facts: lanes that are not alive do not train.

    Attributes:
      facts, pool, schedule: see the head of this module.
      events: events since the last `take`.
    """

    def __init__(self, facts: Facts, engine: Engine) -> None:
        self.facts, self.plan, self.engine = facts, facts.plan, engine
        self.pool, self.schedule = Pool(self.plan.lanes), Schedule()
        self._running: list[tuple[Tile, int, Callable[[], Outcome]]] = []
        self.events: list[Report | Cut] = []
        for index, (group, lanes) in enumerate(zip(self.plan.groups, self._living(), strict=True)):
            widths = [group.width] * -(-len(lanes) // group.width)
            self._queue(self._packed(index, lanes.tolist(), widths, 0))

    @property
    def ledger(self) -> Ledger:
        return self.facts.ledger

    # --- a turn

    def start(self) -> bool:
        """Start the next tiles. Returns False if there is nothing left to run."""
        schedule, plan = self.schedule, self.plan
        if plan.budget is not None and schedule.lane_steps >= plan.budget:
            self.stop()
        while not schedule.queue and schedule.round + 1 < len(plan.rounds):
            self._next_round()
        for tile in self._next_tiles():
            end = self._end_of(tile)
            schedule.lane_steps += (end - tile.step) * tile.width
            tile, rows = self._with_rows(tile)
            wait = self.engine.start(tile.group, rows, tile.step, end)
            self._running.append((tile, end, wait))
        return bool(self._running)

    def finish(self) -> None:
        """Wait for the running tiles, and judge them in their order."""
        running, self._running = self._running, []
        outcomes = [wait() for _, _, wait in running]
        following = list[Tile]()
        for (tile, end, _), outcome in zip(running, outcomes, strict=True):
            following += self._judge(tile, end, outcome)
        # a sequential source is read once for all tiles; else a tile runs to its end first
        self._queue(following, first=not self.engine.batches.sequential)
        self._drop_early_losers()

    def take(self) -> list[Report | Cut]:
        """Remove and return the events since the last call."""
        events, self.events = self.events, []
        return events

    def cut(self, lanes: Any) -> None:
        """End living lanes for a pruner."""
        lanes = np.asarray(lanes, int)
        if len(lanes):
            self._apply(self.cut_of(int(self.ledger.step[lanes].max()), lanes))
            alive = self.ledger.alive
            queue = self.schedule.queue
            self.schedule.queue = [tile for tile in queue if alive[tile.lanes].any()]

    def stop(self) -> None:
        """End all living lanes, as a limit is reached; the best keep their states."""
        self.schedule.queue = []
        if self.ledger.alive.any():
            self._apply(self.cut_of(None, np.flatnonzero(self.ledger.alive)))
            self.pool.drop(self.plan.lanes_of(self._losing()).ravel())

    def cut_of(self, step: int | None, lanes: np.ndarray) -> Cut:
        """Return the cut of living lanes, with the statistics of those that have started."""
        groups, pool = self.plan.by_group(lanes), self.pool
        lanes = self.plan.numbered(groups)
        lanes = lanes[self.ledger.step[lanes] > 0]
        # a lane without a state has reported at a rung
        seen = jax.tree.map(lambda x: x[lanes], self.ledger.seen)
        blocks = pool.block_of[lanes]
        for number in np.unique(blocks[blocks >= 0]).tolist():
            mine = np.flatnonzero(blocks == number)
            rows, at = pool.row_of[lanes[mine]], int(self.ledger.step[lanes[mine[0]]])
            new = self._statistics(pool.blocks[number].rows, rows, at)
            for old, values in zip(seen, new, strict=True):
                old[mine] = values
        return Cut(step, groups, seen if len(lanes) else None)

    # --- tiles

    def _living(self) -> list[np.ndarray]:
        """Return the living lanes of each group."""
        alive = np.flatnonzero(self.ledger.alive)
        return np.split(alive, np.searchsorted(alive, self.plan.first[1:-1] * self.plan.seeds))

    def _queue(self, tiles: list[Tile], *, first: bool = False) -> None:
        queue = self.schedule.queue
        self.schedule.queue = tiles + queue if first else queue + tiles

    def _end_of(self, tile: Tile) -> int:
        """Return the step of a tile's next report."""
        return self.plan.reports[bisect.bisect_right(self.plan.reports, tile.step)]

    def _next_tiles(self) -> list[Tile]:
        """Remove and return the tiles that run at once. An exclusive tile runs alone."""
        queue, taken = self.schedule.queue, list[Tile]()
        left = math.inf
        if self.plan.budget is not None:
            left = self.plan.budget - self.schedule.lane_steps
        while queue and len(taken) < self.plan.at_once and left > 0:
            if taken and any(self.engine.programs[t.group].exclusive for t in (taken[0], queue[0])):
                break
            taken.append(queue.pop(0))
            left -= (self._end_of(taken[-1]) - taken[-1].step) * taken[-1].width
        return taken

    def _with_rows(self, tile: Tile) -> tuple[Tile, Any]:
        """Return a tile and its states, removed from the pool, on its devices."""
        if tile.step == 0:
            return tile, self.engine.begin(tile.group, tile.lanes, tile.width)
        rows = self.pool.remove_block(tile.lanes)
        if rows is None:
            tile = tile._replace(lanes=[x for x in tile.lanes if self.ledger.alive[x]])
            rows = self.pool.take(tile.lanes)
            self.pool.drop(tile.lanes)
        on_devices = isinstance(rows.loss, jax.Array) and len(rows.loss) == tile.width
        return tile, rows if on_devices else self.engine.programs[tile.group].pad(rows, tile.width)

    def without_state(self) -> set[int]:
        """Return the living lanes that have started and lack a state."""
        rung = self.plan.rounds[self.schedule.round]
        started = np.flatnonzero(self.ledger.alive & (self.ledger.step > 0))
        dropped = self.ledger.losers(rung, early=True)  # see `_drop_early_losers`
        return set(started.tolist()) - set(self.pool.held().tolist()) - set(dropped.tolist())

    def fit_widths(self) -> None:
        """Give tiles that were queued on another number of devices a width of this plan."""
        for index, tile in enumerate(self.schedule.queue):
            widths = self.plan.groups[tile.group].widths
            if tile.width not in widths:
                width = min(w for w in widths if w >= len(tile.lanes))
                self.schedule.queue[index] = tile._replace(width=width)

    # --- after a chunk

    def _judge(self, tile: Tile, end: int, outcome: Outcome) -> list[Tile]:
        """Record the report of a tile; return the tiles its living lanes continue in."""
        ids = np.array(tile.lanes)
        reporting = self.ledger.alive[ids]  # lanes that ended earlier may still occupy a row
        report = self._report_of(tile, end, outcome, reporting)
        self._apply(report)
        living = self.ledger.alive[ids]
        if (reporting & ~living).any():
            self._keep_if_best(ids, reporting & ~living, outcome.lanes)
        if not living.any():
            return []
        at_rung = end == self.plan.rounds[self.schedule.round]
        # at a rung, and while other tiles read the stream, lanes wait on the host
        if at_rung or (self.engine.batches.sequential and self.schedule.queue):
            rows = jax.tree.map(lambda x: x[: len(ids)], devices.to_host(outcome.lanes))
            keep = living if at_rung else np.full(len(ids), True)
            self.pool.put(ids[keep], jax.tree.map(lambda x: x[keep], rows), living[keep])
        else:
            self.pool.put(ids, outcome.lanes, living)
        return [] if at_rung else self._following(tile, end, living)

    def _report_of(self, tile: Tile, end: int, outcome: Outcome, reporting: np.ndarray) -> Report:
        rows = np.flatnonzero(reporting)
        plan = self.plan
        seen = (outcome.loss, outcome.metrics, outcome.ending)
        loss, metrics, ending = jax.tree.map(lambda x: x[rows], devices.to_host(seen))
        if end == plan.steps:
            ending = np.where(ending == 0, FINISHED, ending)
        metrics = {name: _widened(values) for name, values in metrics.items()}
        reached = self.ledger.at_target(metrics[plan.metric])
        ending = np.where(reached & (ending != DIVERGED), REACHED, ending).astype(np.int8)
        # a rung cuts lanes whose states are gone by then
        last = ending.any() or end in plan.rounds
        return Report(
            tile=tile.id,
            group=plan.groups[tile.group].name,
            step=end,
            lanes=np.array(tile.lanes)[rows] - plan.offset(tile.group),
            loss=_widened(loss / (end - tile.step)),
            metrics=metrics,
            ended=ending,
            seen=self._statistics(outcome.lanes, rows, end) if last else None,
        )

    def _statistics(self, lanes: Lane, rows: np.ndarray, steps: int) -> LossStatistics:
        """Return the statistics of rows of a block after this many steps."""
        sums = jax.tree.map(lambda x: x[rows], devices.to_host(lanes.seen))
        return statistics(sums, self.plan.intervals, steps)

    def _following(self, tile: Tile, end: int, living: np.ndarray) -> list[Tile]:
        """Return the same tile, or narrower ones for its living lanes if that is cheaper."""
        same = [tile._replace(step=end)]
        if living.all():
            return same
        group = self.plan.groups[tile.group]
        cost = dict(zip(group.widths, group.costs, strict=True))
        widths = pack_tiles(int(living.sum()), group.widths, group.costs)
        if sum(cost[width] for width in widths) > 0.9 * cost[tile.width]:
            return same
        return self._packed(tile.group, np.array(tile.lanes)[living].tolist(), widths, end)

    def _packed(self, group: int, lanes: list[int], widths: list[int], step: int) -> list[Tile]:
        tiles = list[Tile]()
        for width in widths:
            mine, lanes = lanes[:width], lanes[width:]
            if mine:  # two shares with room to spare may need a tile less together
                tiles.append(Tile(self.schedule.next_id, group, mine, width, step))
                self.schedule.next_id += 1
        return tiles

    def _apply(self, event: Report | Cut) -> None:
        self.facts.apply(event)
        self.events.append(event)
        if isinstance(event, Cut) and event.step is not None:
            settings = np.unique(self.plan.numbered(event.lanes) // self.plan.seeds)
            self.pool.drop(self.plan.lanes_of(settings).ravel())

    # --- rungs

    def _next_round(self) -> None:
        """Cut lanes at a rung, and pack the others into tiles anew."""
        plan, schedule = self.plan, self.schedule
        rung = plan.rounds[schedule.round]
        self._apply(self.ledger.cut_at(rung))
        schedule.round += 1
        living = self._living()
        # where few groups are left, each is divided among several cores
        shares = -(-plan.at_once // max(sum(len(lanes) > 0 for lanes in living), 1))
        for index, (group, lanes) in enumerate(zip(plan.groups, living, strict=True)):
            parts = [len(lanes[share::shares]) for share in range(shares)]
            widths = [w for n in parts if n for w in pack_tiles(n, group.widths, group.costs)]
            widths.sort(reverse=True)
            self._queue(self._packed(index, lanes.tolist(), widths, rung))

    def _drop_early_losers(self) -> None:
        """Before all lanes are at a rung: drop the states of lanes that enough others beat.

        The host then never holds many more states than the rung keeps.
        """
        rung = self.plan.rounds[self.schedule.round]
        most = sum(keep for _, keep in self.plan.cohorts(rung)) * self.plan.seeds
        held = self.pool.held()
        waiting = held[self.ledger.alive[held] & (self.ledger.step[held] == rung)]
        if most and len(waiting) > 1.25 * most:
            losers = self.ledger.losers(rung, early=True)
            self.pool.drop(losers[self.ledger.alive[losers]])

    # --- the best settings

    def _keep_if_best(self, ids: np.ndarray, ended: np.ndarray, rows: Any) -> None:
        """Keep the states of lanes that ended, unless their setting is known to lose.

        The rank of a setting is known when all its seeds ended.
        """
        settings = ids // self.plan.seeds
        losing = self._losing(settings[ended])
        keep = ended & ~np.isin(settings, losing)
        if keep.any():
            on_host = devices.to_host(rows)
            where = np.flatnonzero(keep)
            self.pool.put(ids[keep], jax.tree.map(lambda x: x[where], on_host))
        self.pool.drop(self.plan.lanes_of(losing).ravel())

    def _losing(self, more: Any = ()) -> np.ndarray:
        """Return the settings that ended and are not among the best `keep`.

        Args:
          more: settings to rank beside those with states in the pool.
        """
        plan, alive = self.plan, self.ledger.alive
        settings = np.unique(np.concatenate([self.pool.held() // plan.seeds, np.array(more, int)]))
        ended = settings[~alive[plan.lanes_of(settings)].any(1)]
        return self.ledger.ranked(ended)[plan.keep :]


def run(
    sweep: Sweep,
    deliver: Callable[[list[Report | Cut]], None],
    poll: Callable[[list[Report | Cut]], Decision],
    checkpoint: Callable[[], None],
) -> bool:
    """Run a sweep to its end. Returns False if a poll interrupted it.

    With several processes, all of them call this. An error on one is raised on all before they wait
    for each other's results, and all obey the decisions of process 0.

    Args:
      poll: called before each turn with the events of the turn before.
      deliver: called with the same events, in their order, while the turn runs.
      checkpoint: called before a turn, when all events have been delivered.
    """
    failures = devices.Failures()
    while True:
        decision = Decision()
        with failures.collected():
            decision = poll(sweep.events)
        if jax.process_count() > 1:  # a pruner is of one process
            decision = Decision(*devices.from_process_0(decision))._replace(cuts=())
        sweep.cut(decision.cuts)
        if decision.stop:
            sweep.stop()
        if decision.checkpoint or decision.interrupt:
            with failures.collected():
                deliver(sweep.take())
            with failures.collected():  # also where `deliver` failed: processes send their lanes
                checkpoint()
        started = False
        with failures.collected():
            started = not decision.interrupt and sweep.start()
            deliver(sweep.take())
        failures.raise_everywhere()
        if not started:
            return not decision.interrupt
        sweep.finish()


def _widened(values: np.ndarray) -> np.ndarray:
    """Return numbers in the precision that a journal holds."""
    if jnp.issubdtype(values.dtype, jnp.floating):
        return values.astype(np.float64)
    return values.astype(np.int64) if np.issubdtype(values.dtype, np.integer) else values
