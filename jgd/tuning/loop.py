"""The turns of a sweep.

    poll(sweep.events)          # the only input from clock, Ctrl-C, pruner and checkpoint writer
    sweep.start()               # starts the next tiles, one for each core
    deliver(sweep.take())       # delivers the events of the previous turn while the tiles run
    sweep.finish()              # waits for the tiles, and judges them in their order

The facts are what the events say about lanes, the pool holds the states of lanes, and the schedule
holds the queue of tiles.
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
from jgd.tuning.events import DIVERGED, FINISHED, REACHED, STOPPED, Cut, Report
from jgd.tuning.lanes import Lane
from jgd.tuning.ledger import Ledger
from jgd.tuning.pack import pack_tiles
from jgd.tuning.pool import Pool
from jgd.tuning.result import Facts

__all__ = ["Decision", "Schedule", "Sweep", "Tile", "run"]


class Tile(NamedTuple):
    """Lanes of a group that step together in their next chunk."""

    id: int
    group: int
    lanes: list[int]  # numbered over all groups; some may have ended
    width: int
    step: int  # steps done


@dataclass
class Schedule:
    """The queue of tiles, as plain data that checkpoints record."""

    queue: list[Tile] = field(default_factory=list[Tile])
    next_id: int = 0
    round: int = 0  # index of the next step in `plan.rounds`
    lane_steps: int = 0  # executed, including the padding of tiles
    elapsed: float = 0.0  # seconds, including those before a resume

    @classmethod
    def of_json(cls, written: Mapping[str, Any]) -> "Schedule":
        schedule = cls(**dict[str, Any](written))
        schedule.queue = [Tile(*tile) for tile in written["queue"]]
        return schedule


class Decision(NamedTuple):
    """Result of a poll: what to do before the next turn."""

    checkpoint: bool = False  # write a checkpoint
    cuts: tuple[int, ...] = ()  # end these lanes
    stop: bool = False  # end all lanes, since the time limit was reached
    interrupt: bool = False  # leave all lanes as they are, for a later resume


class Sweep:
    """A sweep in progress.

    Args:
      facts: facts about the lanes, of which only the living ones train.

    Attributes:
      facts, pool, schedule: see the docstring of this module.
      events: events since the last `take`.
    """

    def __init__(self, facts: Facts, engine: Engine) -> None:
        self.facts, self.plan, self.engine = facts, facts.plan, engine
        self.pool, self.schedule = Pool(self.plan.lanes), Schedule()
        self._running: list[tuple[Tile, int, Callable[[], Outcome]]] = []
        self.events: list[Report | Cut] = []
        for index, (group, lanes) in enumerate(zip(self.plan.groups, self._living(), strict=True)):
            widths = [group.width] * -(-len(lanes) // group.width)
            self._enqueue(self._packed(index, lanes.tolist(), widths, 0))

    @property
    def ledger(self) -> Ledger:
        return self.facts.ledger

    # --- a turn

    def start(self) -> bool:
        """Start the next tiles. Return whether there were any."""
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
        # all tiles share one read of a sequential source; else a tile continues before others start
        self._enqueue(following, first=not self.engine.batches.sequential)
        self._drop_early_losers()

    def take(self) -> list[Report | Cut]:
        """Remove and return the events since the last call."""
        events, self.events = self.events, []
        return events

    def cut(self, lanes: Any) -> None:
        """End living lanes as a pruner asks."""
        lanes = np.asarray(lanes, int)
        if len(lanes):
            self._apply(self.cut_of(int(self.ledger.step[lanes].max()), lanes))
            alive = self.ledger.alive
            queue = self.schedule.queue
            self.schedule.queue = [tile for tile in queue if alive[tile.lanes].any()]

    def stop(self) -> None:
        """End all living lanes, since a limit was reached. The best settings keep their states."""
        self.schedule.queue = []
        if self.ledger.alive.any():
            self._apply(self.cut_of(None, np.flatnonzero(self.ledger.alive)))
            self.pool.drop(self.plan.lanes_of(self._losing()).ravel())

    def cut_of(self, step: int | None, lanes: np.ndarray) -> Cut:
        """Return the cut of living lanes, with the statistics of the lanes that have started."""
        groups, pool = self.plan.by_group(lanes), self.pool
        lanes = self.plan.numbered(groups)
        lanes = lanes[self.ledger.step[lanes] > 0]
        # a lane without a state has reported its statistics at a rung
        statistics = jax.tree.map(lambda x: x[lanes], self.ledger.statistics)
        blocks = pool.block_of[lanes]
        for number in np.unique(blocks[blocks >= 0]).tolist():
            inside = np.flatnonzero(blocks == number)
            rows, steps = pool.row_of[lanes[inside]], int(self.ledger.step[lanes[inside[0]]])
            new = self._statistics_of(pool.blocks[number].rows, rows, steps)
            for old, values in zip(statistics, new, strict=True):
                old[inside] = values
        return Cut(step, groups, statistics if len(lanes) else None)

    # --- tiles

    def _living(self) -> list[np.ndarray]:
        """Return the living lanes of each group."""
        alive = np.flatnonzero(self.ledger.alive)
        return np.split(alive, np.searchsorted(alive, self.plan.first[1:-1] * self.plan.seeds))

    def _enqueue(self, tiles: list[Tile], *, first: bool = False) -> None:
        queue = self.schedule.queue
        self.schedule.queue = tiles + queue if first else queue + tiles

    def _end_of(self, tile: Tile) -> int:
        """Return the step of a tile's next report."""
        return self.plan.reports[bisect.bisect_right(self.plan.reports, tile.step)]

    def _next_tiles(self) -> list[Tile]:
        """Remove and return the tiles that run at the same time. An exclusive tile runs alone."""
        queue, tiles = self.schedule.queue, list[Tile]()
        budget = math.inf
        if self.plan.budget is not None:
            budget = self.plan.budget - self.schedule.lane_steps
        while queue and len(tiles) < self.plan.at_once and budget > 0:
            if tiles and any(self.engine.programs[t.group].exclusive for t in (tiles[0], queue[0])):
                break
            tiles.append(queue.pop(0))
            budget -= (self._end_of(tiles[-1]) - tiles[-1].step) * tiles[-1].width
        return tiles

    def _with_rows(self, tile: Tile) -> tuple[Tile, Any]:
        """Return a tile, and its states on its devices. They are removed from the pool."""
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
        """Return the living lanes that have started but have no state, though they need one."""
        rung = self.plan.rounds[self.schedule.round]
        started = np.flatnonzero(self.ledger.alive & (self.ledger.step > 0))
        losers = self.ledger.losers(rung, early=True)  # need none: see `_drop_early_losers`
        return set(started.tolist()) - set(self.pool.lanes().tolist()) - set(losers.tolist())

    def fit_widths(self) -> None:
        """Fit the widths of tiles that were queued on another number of devices to this plan."""
        for index, tile in enumerate(self.schedule.queue):
            widths = self.plan.groups[tile.group].widths
            if tile.width not in widths:
                width = min(w for w in widths if w >= len(tile.lanes))
                self.schedule.queue[index] = tile._replace(width=width)

    # --- after a chunk

    def _judge(self, tile: Tile, end: int, outcome: Outcome) -> list[Tile]:
        """Record the report of a tile. Return the tiles in which its living lanes continue."""
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
        # lanes wait on the host at a rung, and while other tiles read the same chunk of a stream
        if at_rung or (self.engine.batches.sequential and self.schedule.queue):
            rows = jax.tree.map(lambda x: x[: len(ids)], devices.to_host(outcome.lanes))
            keep = living if at_rung else np.full(len(ids), True)
            self.pool.put(ids[keep], jax.tree.map(lambda x: x[keep], rows), living[keep])
        else:
            self.pool.put(ids, outcome.lanes, living)
        return [] if at_rung else self._following(tile, end, living)

    def _report_of(self, tile: Tile, end: int, outcome: Outcome, reporting: np.ndarray) -> Report:
        """Return the report of the rows of a tile that are still reporting."""
        rows = np.flatnonzero(reporting)
        plan = self.plan
        on_host = devices.to_host((outcome.loss, outcome.metrics, outcome.ending))
        loss, metrics, ending = jax.tree.map(lambda x: x[rows], on_host)
        if end == plan.steps:  # a lane that stops after all steps is not early
            ending = np.where((ending == 0) | (ending == STOPPED), FINISHED, ending)
        metrics = {name: _widened(values) for name, values in metrics.items()}
        reached = self.ledger.at_target(metrics[plan.metric])
        ending = np.where(reached & (ending != DIVERGED), REACHED, ending).astype(np.int8)
        # a rung may cut lanes after their states have been dropped
        with_statistics = ending.any() or end in plan.rounds
        return Report(
            tile=tile.id,
            group=plan.groups[tile.group].name,
            step=end,
            lanes=np.array(tile.lanes)[rows] - plan.offset(tile.group),
            loss=_widened(loss / (end - tile.step)),
            metrics=metrics,
            ended=ending,
            statistics=self._statistics_of(outcome.lanes, rows, end) if with_statistics else None,
        )

    def _statistics_of(self, lanes: Lane, rows: np.ndarray, steps: int) -> LossStatistics:
        """Return the loss statistics of these rows after this many steps."""
        sums = jax.tree.map(lambda x: x[rows], devices.to_host(lanes.loss_sums))
        return statistics(sums, self.plan.intervals, steps)

    def _following(self, tile: Tile, end: int, living: np.ndarray) -> list[Tile]:
        """Return the same tile, or narrower ones for its living lanes if they are cheaper."""
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
        """Return tiles of these widths with the lanes of a group."""
        tiles = list[Tile]()
        for width in widths:
            first, lanes = lanes[:width], lanes[width:]
            if first:  # shares are padded one by one, so all lanes together may need fewer tiles
                tiles.append(Tile(self.schedule.next_id, group, first, width, step))
                self.schedule.next_id += 1
        return tiles

    def _apply(self, event: Report | Cut) -> None:
        """Fold an event into the facts, and drop the states of settings that a rung cut."""
        self.facts.apply(event)
        self.events.append(event)
        if isinstance(event, Cut) and event.step is not None:
            settings = np.unique(self.plan.numbered(event.lanes) // self.plan.seeds)
            self.pool.drop(self.plan.lanes_of(settings).ravel())

    # --- rungs

    def _next_round(self) -> None:
        """Cut lanes at a rung, and pack the remaining lanes into new tiles."""
        plan, schedule = self.plan, self.schedule
        rung = plan.rounds[schedule.round]
        self._apply(self.ledger.cut_at(rung))
        schedule.round += 1
        living = self._living()
        # if fewer groups than cores are left, each group is divided among several cores
        shares = -(-plan.at_once // max(sum(len(lanes) > 0 for lanes in living), 1))
        for index, (group, lanes) in enumerate(zip(plan.groups, living, strict=True)):
            parts = [len(lanes[share::shares]) for share in range(shares)]
            widths = [w for n in parts if n for w in pack_tiles(n, group.widths, group.costs)]
            widths.sort(reverse=True)
            self._enqueue(self._packed(index, lanes.tolist(), widths, rung))

    def _drop_early_losers(self) -> None:
        """Drop the states of lanes that the next rung will cut, before all lanes have reached it.

        The host then never holds many more states than the rung keeps.
        """
        rung = self.plan.rounds[self.schedule.round]
        survivors = sum(keep for _, keep in self.plan.cohorts(rung)) * self.plan.seeds
        lanes = self.pool.lanes()
        waiting = lanes[self.ledger.alive[lanes] & (self.ledger.step[lanes] == rung)]
        if survivors and len(waiting) > 1.25 * survivors:
            losers = self.ledger.losers(rung, early=True)
            self.pool.drop(losers[self.ledger.alive[losers]])

    # --- the best settings

    def _keep_if_best(self, ids: np.ndarray, ended: np.ndarray, rows: Any) -> None:
        """Keep the states of lanes that ended, unless their setting is known to lose.

        The rank of a setting is known once all its seeds have ended.
        """
        settings = ids // self.plan.seeds
        losing = self._losing(settings[ended])
        keep = ended & ~np.isin(settings, losing)
        if keep.any():
            on_host = devices.to_host(rows)
            index = np.flatnonzero(keep)
            self.pool.put(ids[keep], jax.tree.map(lambda x: x[index], on_host))
        self.pool.drop(self.plan.lanes_of(losing).ravel())

    def _losing(self, more: Any = ()) -> np.ndarray:
        """Return the settings that have ended and are not among the best `keep`.

        Args:
          more: settings to rank in addition to those with states in the pool.
        """
        plan, alive = self.plan, self.ledger.alive
        settings = np.unique(np.concatenate([self.pool.lanes() // plan.seeds, np.array(more, int)]))
        ended = settings[~alive[plan.lanes_of(settings)].any(1)]
        return self.ledger.ranked(ended)[plan.keep :]


def run(
    sweep: Sweep,
    deliver: Callable[[list[Report | Cut]], None],
    poll: Callable[[list[Report | Cut]], Decision],
    checkpoint: Callable[[], None],
) -> bool:
    """Run a sweep to its end. Return False if a poll interrupted it, else True.

    With several processes, all of them call this function. An error on one process is raised on all
    before they wait for each other's results, and all follow the decisions of process 0.

    Args:
      poll: called before each turn with the events of the previous turn.
      deliver: called with the same events, in their order, while the turn runs.
      checkpoint: called before a turn, when all events have been delivered.
    """
    failures = devices.Failures()
    while True:
        decision = Decision()
        with failures.collected():
            decision = poll(sweep.events)
        if jax.process_count() > 1:  # pruners run in one process only
            decision = Decision(*devices.from_process_0(decision))._replace(cuts=())
        sweep.cut(decision.cuts)
        if decision.stop:
            sweep.stop()
        if decision.checkpoint or decision.interrupt:
            with failures.collected():
                deliver(sweep.take())
            with failures.collected():  # even if `deliver` failed: others wait for these lanes
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
    """Return numbers in the precision of the journal: float64, int64 or bool."""
    if jnp.issubdtype(values.dtype, jnp.floating):
        return values.astype(np.float64)
    return values.astype(np.int64) if np.issubdtype(values.dtype, np.integer) else values
