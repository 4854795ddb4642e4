"""The events of a sweep: recorded facts.

    report    the lanes of a tile reached a report step: losses, metrics, and which lanes ended
    cut       a rung, a limit or a pruner ended lanes

An event is a line of the journal: `decode(encode(event), plan) == event`. A resumed sweep folds the
events of its journal in the same way as a running sweep folds new events.
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

ENDINGS = (  # the ending of a setting is the last, in this order, of those of its seeds
    *("not run", "reached target", "finished", "stopped early", "diverged", "cut"),
    "out of budget",
)
NOT_RUN, REACHED, FINISHED, STOPPED, DIVERGED, CUT, OUT = range(len(ENDINGS))


class Report(NamedTuple):
    """Report of the lanes of a tile. Arrays have one entry for each lane."""

    tile: int
    group: str
    step: int  # number of steps done
    lanes: np.ndarray  # numbered within the group: setting * seeds + seed
    loss: np.ndarray  # float64: mean training loss since the previous report
    metrics: dict[str, np.ndarray]  # results of `evaluate`: float64, int64 or bool
    ended: np.ndarray  # index in `ENDINGS`; 0 for a living lane
    statistics: LossStatistics | None  # of the loss; None unless a lane ended or the step is a rung
    alive: int = 0  # number of living lanes of the sweep, for `on_report`; not recorded


class Cut(NamedTuple):
    """Lanes that a rung, a limit or a pruner ended."""

    step: int | None  # step of the rung, or last step of the lanes; None: a limit was reached
    lanes: dict[str, list[int]]  # by group, numbered within the group
    statistics: LossStatistics | None = None  # None at a rung, where reports have them


def encode(event: Report | Cut) -> str:
    """Return an event as a line of JSON. It may contain NaN and Infinity, as Python's JSON does."""
    if isinstance(event, Cut):
        return json.dumps({"cut": event.step, "lanes": event.lanes} | _encoded(event.statistics))
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
    return json.dumps(line | _encoded(event.statistics))


def _encoded(statistics: LossStatistics | None) -> dict[str, Any]:
    if statistics is None:
        return {}
    return {"seen": {name: x.tolist() for name, x in statistics._asdict().items()}}


def decode(line: str | bytes, plan: Plan) -> Report | Cut:
    """Return the event of a line that `encode` wrote.

    Raises: ValueError, KeyError, TypeError or AttributeError for any other line.
    """
    entry = json.loads(line)
    statistics = None
    if "seen" in entry:
        columns = {name: np.array(x) for name, x in entry["seen"].items()}
        statistics = LossStatistics(**columns)
    if "cut" in entry:
        return Cut(entry["cut"], entry["lanes"], statistics)
    lanes = np.array(entry["lanes"], int)
    return Report(
        tile=entry["tile"],
        group=entry["group"],
        step=entry["step"],
        lanes=lanes,
        loss=np.array(entry["train_loss"], np.float64),
        metrics={name: np.array(entry[name]) for name in plan.metrics},
        ended=np.array(entry.get("ended", np.zeros(len(lanes))), np.int8),
        statistics=statistics,
    )
