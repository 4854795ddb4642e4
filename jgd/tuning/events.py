"""The events of a sweep: recorded facts.

    report    lanes of a tile reached a report step: losses and metrics, and which lanes ended
    cut       lanes were ended by a rung, a limit or a pruner

An event is a line of the journal: `decode(encode(event), plan) == event`. A sweep that is resumed
folds the events it reads as a running sweep folds those it makes.
"""

import json
from typing import Any, NamedTuple

import numpy as np

from jgd.diagnosis import LossStatistics
from jgd.tuning.plan import Plan

__all__ = [
    "CUT",
    "DIVERGED",
    "ENDINGS",
    "FINISHED",
    "NOT_RUN",
    "OUT",
    "REACHED",
    "STOPPED",
    "Cut",
    "Report",
    "decode",
    "encode",
]

ENDINGS = (  # the ending of a setting is the last of its seeds' endings in this order
    *("not run", "reached target", "finished", "stopped early", "diverged", "cut"),
    "out of budget",
)
NOT_RUN, REACHED, FINISHED, STOPPED, DIVERGED, CUT, OUT = range(len(ENDINGS))


class Report(NamedTuple):
    """Lanes of a tile at a report step; arrays have one entry for each lane."""

    tile: int
    group: str
    step: int  # steps done
    lanes: np.ndarray  # numbered within the group: setting * seeds + seed
    loss: np.ndarray  # float64: mean training loss since the report before
    metrics: dict[str, np.ndarray]  # of `evaluate`, now: float64, int64 or bool
    ended: np.ndarray  # index in `ENDINGS`; 0 for a living lane
    seen: LossStatistics | None  # of the training loss, where a lane ended and at a rung
    alive: int = 0  # lanes of the sweep that have not ended, for `on_report`; not recorded


class Cut(NamedTuple):
    """Lanes that a rung, a limit or a pruner ended."""

    step: int | None  # of the rung; None: a limit was reached
    lanes: dict[str, list[int]]  # by group, numbered within it
    seen: LossStatistics | None = None  # of those that had started; at a rung, reports have it


def encode(event: Report | Cut) -> str:
    """Return an event as a line of JSON. Numbers that are not finite keep their Python names."""
    if isinstance(event, Cut):
        return json.dumps({"cut": event.step, "lanes": event.lanes} | _encoded(event.seen))
    line: dict[str, Any] = {
        "tile": event.tile,
        "group": event.group,
        "step": event.step,
        "lanes": event.lanes.tolist(),
        "train_loss": event.loss.tolist(),
    }
    line |= {name: values.tolist() for name, values in event.metrics.items()}
    if event.ended.any():
        line["ended"] = event.ended.tolist()
    return json.dumps(line | _encoded(event.seen))


def _encoded(seen: LossStatistics | None) -> dict[str, Any]:
    return {} if seen is None else {"seen": {k: v.tolist() for k, v in seen._asdict().items()}}


def decode(line: str | bytes, plan: Plan) -> Report | Cut:
    """Return the event of a line that `encode` wrote. Raises ValueError or KeyError for others."""
    entry = json.loads(line)
    seen = None
    if "seen" in entry:
        seen = LossStatistics(**{name: np.array(x) for name, x in entry["seen"].items()})
    if "cut" in entry:
        return Cut(entry["cut"], entry["lanes"], seen)
    lanes = np.array(entry["lanes"], int)
    return Report(
        tile=entry["tile"],
        group=entry["group"],
        step=entry["step"],
        lanes=lanes,
        loss=np.array(entry["train_loss"], np.float64),
        metrics={name: np.array(entry[name]) for name in plan.metrics},
        ended=np.array(entry.get("ended", np.zeros(len(lanes))), np.int8),
        seen=seen,
    )
