"""The folder of a sweep: the plan, a journal that is written as reports come in, the results.

plan.json       what will be done, before step 0
journal.jsonl   a line per report: tile, step, lanes, losses and metrics
results.csv     a row per setting, ranked; results.json the same, with the plan's numbers
"""

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jgd.tuning.driver import Report
from jgd.tuning.plan import Plan

__all__ = ["Folder"]


class Folder:
    """A new folder for one sweep.

    Raises: FileExistsError if it exists and holds something; OSError if it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        if any(self.path.iterdir()):
            raise FileExistsError(f"{self.path} is not empty: a sweep wants a folder of its own")

    def write_plan(self, plan: Plan) -> None:
        self._write("plan.json", json.dumps(_plain(plan.as_json()), indent=1))

    def journal(self, report: Report) -> None:
        """Append a report; it is on disk when this returns."""
        line = {
            "tile": report.tile,
            "group": report.group,
            "step": report.step,
            "lanes": report.lanes,
            "train_loss": report.loss,
            **report.metrics,
        }
        with (self.path / "journal.jsonl").open("a") as file:
            file.write(json.dumps(_plain(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_results(self, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with (self.path / "results.csv.part").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (self.path / "results.csv.part").replace(self.path / "results.csv")
        self._write("results.json", json.dumps(_plain({**summary, "rows": list(rows)}), indent=1))

    def _write(self, name: str, text: str) -> None:
        """All of the file or nothing."""
        part = self.path / (name + ".part")
        part.write_text(text)
        part.replace(self.path / name)


def _plain(x: Any) -> Any:
    """As JSON knows it: no arrays, and null for what is not finite."""
    if isinstance(x, np.ndarray | np.generic):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [_plain(item) for item in x]
    if isinstance(x, dict):
        return {name: _plain(item) for name, item in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read_journal(path: str | Path) -> Iterable[dict[str, Any]]:
    """The lines of a journal; one cut off in the middle of writing ends it."""
    for line in (Path(path) / "journal.jsonl").read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
