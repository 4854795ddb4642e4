"""Times the host's part of a sweep: 100,000 lanes with 20 reports, and a journal of 200 MB.

    python benchmarks/ledger.py             # about a minute; --lanes and --megabytes for others

The events are those of a sweep with a rung in its middle, of tiles of 64 lanes; nothing is trained.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jgd.diagnosis import LossStatistics
from jgd.tuning.events import FINISHED, Report
from jgd.tuning.folder import Folder
from jgd.tuning.ledger import Ledger
from jgd.tuning.plan import Group, Plan
from jgd.tuning.prune import successive_halving
from jgd.tuning.result import Record, make_result
from jgd.tuning.space import Lanes

WIDTH, REPORTS, STEPS = 64, 20, 1000


def plan_of(lanes: int) -> Plan:
    every = STEPS // REPORTS
    halving = successive_halving(2, STEPS // 2)
    return Plan(
        steps=STEPS,
        reports=list(range(every, STEPS + 1, every)),
        rounds=[*halving.brackets(STEPS)[0], STEPS],
        groups=[Group("adam", "", {"learning_rate": [0.1] * lanes}, {}, lanes, WIDTH)],
        brackets=[0] * lanes,
        metrics=["accuracy", "loss"],
        metric="accuracy",
        mode="max",
        halving=halving._asdict(),
        **dict(stop=None, task="", versions={}, device="", at_once=2),
    )


def reports(plan: Plan, ledger: Ledger, begin: int, end: int) -> Iterator[Report]:
    """The reports of the living lanes from one step to another, tile by tile."""
    rng = np.random.default_rng(begin)
    alive = np.flatnonzero(ledger.alive)
    for place in range(0, len(alive), WIDTH):
        lanes = alive[place : place + WIDTH]
        n = len(lanes)
        for step in (step for step in plan.reports if begin < step <= end):
            draw = lambda n=n: rng.random(n, np.float32).astype(np.float64)
            over = step in plan.rounds
            seen = LossStatistics(*[np.full(n, 0.1)] * len(LossStatistics._fields))
            yield Report(
                tile=place // WIDTH,
                group="adam",
                step=step,
                lanes=lanes,
                loss=draw(),
                metrics={"accuracy": draw(), "loss": draw()},
                ended=np.full(n, FINISHED if step == plan.steps else 0, np.int8),
                seen=seen if over else None,
            )


def folded(lanes: int) -> None:
    """Fold the events of a sweep, rank at its rung and at its end."""
    plan = plan_of(lanes)
    ledger, record = Ledger(plan), Record(plan)
    seconds, events, begin = {"apply": 0.0, "curves": 0.0}, 0, 0
    for end in plan.rounds:
        for report in reports(plan, ledger, begin, end):
            started = time.perf_counter()
            ledger.apply(report)
            applied = time.perf_counter()
            record.apply(report)
            seconds["apply"] += applied - started
            seconds["curves"] += time.perf_counter() - applied
            events += 1
        if end < plan.steps:
            started = time.perf_counter()
            ledger.apply(ledger.cut_at(end))
            seconds["rank and cut"] = time.perf_counter() - started
        begin = end
    started = time.perf_counter()
    axes = {"learning_rate": np.full(lanes, 0.1)}
    make_result(plan, {"adam": Lanes({"rate": axes["learning_rate"]}, axes)}, ledger, record)
    seconds["table"] = time.perf_counter() - started
    parts = ", ".join(f"{name} {part:.1f} s" for name, part in seconds.items())
    print(f"{lanes:,} lanes, {events:,} events: {parts}")


def read_again(megabytes: int) -> None:
    """Write a journal of this size, and fold it as a resume does."""
    plan = plan_of(100_000)
    ledger = Ledger(plan)
    with tempfile.TemporaryDirectory() as scratch:
        folder, journal = Folder(Path(scratch) / "run"), Path(scratch) / "run" / "journal.jsonl"
        folder.write_plan(plan)
        events = list(reports(plan, ledger, 0, plan.rounds[0]))
        while not journal.exists() or journal.stat().st_size < megabytes * 1e6:
            folder.append(events)
        folder.checkpoint({"blocks": {}, "schedule": {}}, {})
        folder.finish()
        started = time.perf_counter()
        resumed = Folder(folder.path, resume=True)
        resumed.return_to(resumed.last_checkpoint())
        count, fresh, record = 0, Ledger(plan), Record(plan)
        for event in resumed.events(plan):
            fresh.apply(event)
            record.apply(event)
            count += 1
        seconds = time.perf_counter() - started
        size = journal.stat().st_size / 1e6
        print(
            f"a journal of {size:.0f} MB, {count:,} events, is read and folded in {seconds:.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, default=100_000)
    parser.add_argument("--megabytes", type=int, default=200)
    options = parser.parse_args()
    folded(options.lanes)
    read_again(options.megabytes)


if __name__ == "__main__":
    main()
