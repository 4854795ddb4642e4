"""Time what a sweep does outside of training, for 100,000 lanes with 20 reports.

    python benchmarks/ledger.py             # about a minute; --lanes sets another number of lanes

The events are those of a sweep in tiles of 64 lanes with a rung halfway. Their values are random:
nothing is trained.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jgd.diagnosis import LossStatistics
from jgd.tuning.events import FINISHED, Report
from jgd.tuning.folder import opened
from jgd.tuning.ledger import Ledger
from jgd.tuning.plan import Group, Plan
from jgd.tuning.prune import successive_halving
from jgd.tuning.result import Facts, make_result
from jgd.tuning.segment import read_segment

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
    """Yield the reports of the living lanes after step `begin` up to `end`, tile by tile."""
    rng = np.random.default_rng(begin)
    alive = np.flatnonzero(ledger.alive)
    for first in range(0, len(alive), WIDTH):
        lanes = alive[first : first + WIDTH]
        n = len(lanes)
        for step in (step for step in plan.reports if begin < step <= end):
            draw = lambda n=n: rng.random(n, np.float32).astype(np.float64)
            ends_round = step in plan.rounds
            statistics = LossStatistics(*[np.full(n, 0.1)] * len(LossStatistics._fields))
            yield Report(
                tile=first // WIDTH,
                group="adam",
                step=step,
                lanes=lanes,
                loss=draw(),
                metrics={"accuracy": draw(), "loss": draw()},
                ended=np.full(n, FINISHED if step == plan.steps else 0, np.int8),
                seen=statistics if ends_round else None,
            )


def time_folding(lanes: int) -> None:
    """Print the seconds to fold the events of a sweep, rank at its rung, and make its table."""
    plan = plan_of(lanes)
    facts, seconds, events, begin = Facts.of(plan), {"apply": 0.0}, 0, 0
    for end in plan.rounds:
        for report in reports(plan, facts.ledger, begin, end):
            started = time.perf_counter()
            facts.apply(report)
            seconds["apply"] += time.perf_counter() - started
            events += 1
        if end < plan.steps:
            started = time.perf_counter()
            facts.apply(facts.ledger.cut_at(end))
            seconds["rank and cut"] = time.perf_counter() - started
        begin = end
    started = time.perf_counter()
    make_result(facts)
    seconds["table"] = time.perf_counter() - started
    parts = ", ".join(f"{name} {part:.1f} s" for name, part in seconds.items())
    print(f"{lanes:,} lanes, {events:,} events: {parts}")


def time_reading(lanes: int) -> None:
    """Write the journal of a sweep, and print the seconds to read it as a resume does."""
    plan = plan_of(lanes)
    with tempfile.TemporaryDirectory() as scratch:
        with opened(Path(scratch) / "run") as folder:
            folder.write_plan(plan)
            folder.append(events := list(reports(plan, Ledger(plan), 0, plan.steps)))
            folder.checkpoint({"blocks": {}, "schedule": {}}, {})
        started = time.perf_counter()
        assert read_segment(folder.path, resume=True).finished
        seconds = time.perf_counter() - started
        size = (folder.path / "journal.jsonl").stat().st_size / 1e6
        print(f"a journal of {size:.0f} MB, {len(events):,} events, is read in {seconds:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, default=100_000, help="number of lanes")
    options = parser.parse_args()
    time_folding(options.lanes)
    time_reading(options.lanes)


if __name__ == "__main__":
    main()
