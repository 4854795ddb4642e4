"""The folder of a sweep, from which it goes on after a crash.

plan.json       what will be done, before step 0
command.json    what the command line was told, if the sweep came from there
journal.jsonl   a line per report: tile, step, lanes, losses and metrics, and how lanes ended
states/         checkpoints (orbax): a folder for each tile at work, or waiting, or best so far
manifest.json   the last checkpoint: how much of the journal it has seen, and which states
results.csv     a row per setting, ranked; results.json the same, with the plan's numbers
curves.npz      the curves of all lanes

A state is written once, under a name of its own; the manifest is replaced when all that it names
are there, so that at any moment one whole checkpoint is on the disk.
"""

import concurrent.futures
import csv
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jgd.tuning.devices import writes
from jgd.tuning.driver import Cut, Report
from jgd.tuning.plan import Plan, plain
from jgd.tuning.results import Best, Curves, Result

__all__ = ["Folder", "read_result"]


class Folder:
    """The folder of one sweep.

    Raises: FileExistsError if it is not to be resumed and holds something; FileNotFoundError if it
      is and holds no plan; OSError if it cannot be written.
    """

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        self.path = Path(path)
        if resume and not (self.path / "plan.json").exists():
            raise FileNotFoundError(f"{self.path} holds no sweep: there is no plan.json")
        self.silent = not writes()  # of several processes one writes
        if not (resume or self.silent or self._is_free()):
            raise FileExistsError(f"{self.path} is not empty: a sweep wants a folder of its own")
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: concurrent.futures.Future[None] | None = None

    def _is_free(self) -> bool:
        """Whether nothing is there yet, or no more than a sweep that had not begun."""
        if not self.path.exists():
            return True
        early = ("command.json", "plan.json.part", "command.json.part")
        return self.path.is_dir() and all(x.name in early for x in self.path.iterdir())

    # --- plan and results --------------------------------------------------------------------

    def write_plan(self, plan: Plan) -> None:
        """The first thing that is written."""
        if not self.silent:
            self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("plan.json", plan.as_json())

    def read_plan(self) -> dict[str, Any]:
        return json.loads((self.path / "plan.json").read_text())

    def write_json(self, name: str, content: Any) -> None:
        """All of the file or nothing."""
        self._replace(name, json.dumps(plain(content), indent=1))

    def write_results(self, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
        if self.silent:
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with (self.path / "results.csv.part").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (self.path / "results.csv.part").replace(self.path / "results.csv")
        self.write_json("results.json", {**summary, "rows": list(rows)})

    def write_curves(self, curves: Mapping[str, Any]) -> None:
        """Group by group: steps, losses and metrics, in single precision."""
        if self.silent:
            return
        arrays = {}
        for group, c in curves.items():
            arrays[f"{group}/step"] = c.step
            arrays[f"{group}/train_loss"] = c.train_loss.astype(np.float32)
            for name, values in c.metrics.items():
                arrays[f"{group}/{name}"] = values.astype(np.float32)
        with (self.path / "curves.npz.part").open("wb") as file:
            np.savez_compressed(file, **arrays)
        (self.path / "curves.npz.part").replace(self.path / "curves.npz")

    def _replace(self, name: str, text: str) -> None:
        if self.silent:
            return
        part = self.path / (name + ".part")
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path / name)

    # --- the journal -------------------------------------------------------------------------

    def journal(self, report: Report | Cut) -> None:
        """Append a report; a checkpoint sees that it is on disk."""
        if self.silent:
            return
        with (self.path / "journal.jsonl").open("a") as file:
            file.write(json.dumps(_arrays(_line(report))) + "\n")

    def read_journal(self, size: int) -> Iterator[dict[str, Any]]:
        """The lines of the journal, as far as a checkpoint has seen it."""
        path = self.path / "journal.jsonl"
        seen = path.read_bytes()[:size] if path.exists() else b""
        yield from map(json.loads, seen.splitlines())

    # --- checkpoints -------------------------------------------------------------------------

    def checkpoint(self, meta: Mapping[str, Any], states: Mapping[str, Any]) -> None:
        """Write what is not there yet, beside the sweep; the one before is finished first."""
        if self.silent:
            return
        self.finish()
        with (self.path / "journal.jsonl").open("a") as file:
            os.fsync(file.fileno())
            size = file.tell()
        manifest = {**meta, "journal": size, "states": sorted(states)}
        self._saving = self._writer.submit(self._save, manifest, states)

    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._saving is not None and not self._saving.done()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and raise what went wrong with it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _save(self, manifest: Mapping[str, Any], states: Mapping[str, Any]) -> None:
        checkpointer = _checkpointer()
        folder = (self.path / "states").absolute()
        folder.mkdir(exist_ok=True)
        for name, tree in states.items():
            if not (folder / name).exists():  # orbax gives a folder its name when it is whole
                checkpointer.save(folder / name, {"lanes": tree})  # orbax saves no single array
        checkpointer.wait_until_finished()
        self.write_json("manifest.json", manifest)
        for path in folder.iterdir():
            if path.name not in states:
                shutil.rmtree(path, ignore_errors=True)

    def last_checkpoint(self) -> dict[str, Any] | None:
        """The last manifest; None before the first."""
        path = self.path / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else None

    def go_back(self, manifest: Mapping[str, Any] | None) -> None:
        """To what a checkpoint has seen: the journal up to there, its states and no others."""
        if self.silent:
            return
        journal, states = self.path / "journal.jsonl", self.path / "states"
        if journal.exists():
            os.truncate(journal, 0 if manifest is None else manifest["journal"])
        for path in states.iterdir() if states.exists() else []:
            if manifest is None or path.name not in manifest["states"]:
                shutil.rmtree(path, ignore_errors=True)

    def load(self, name: str, shapes: Any) -> Any:
        """A state of the last checkpoint, of these shapes, on the host."""
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        path = (self.path / "states" / name).absolute()
        found = _checkpointer().restore(path, {"lanes": jax.tree.map(shaped, shapes)})["lanes"]
        is_key = lambda x: jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), found)


def read_result(path: str | Path) -> Result:
    """The result in the folder of a sweep that has ended: table and curves, without states.

    Raises: FileNotFoundError if it holds none.
    """
    path = Path(path)
    for name in ("plan.json", "results.json", "curves.npz"):
        if not (path / name).exists():
            raise FileNotFoundError(f"{path} holds no finished sweep: there is no {name}")
    plan = Plan.of_json(json.loads((path / "plan.json").read_text()))
    rows = json.loads((path / "results.json").read_text())["rows"]
    rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
    with np.load(path / "curves.npz") as arrays:
        curves = {
            g.name: Curves(
                arrays[f"{g.name}/step"],
                arrays[f"{g.name}/train_loss"],
                {name: arrays[f"{g.name}/{name}"] for name in plan.metrics},
            )
            for g in plan.groups
        }
    best = Best(rows[0], None, None)
    return Result(rows, curves, best, [best], plan.metric, plan.mode, plan)


def _checkpointer() -> Any:
    import orbax.checkpoint

    logging.getLogger("absl").setLevel(logging.ERROR)
    here = jax.process_index()  # what is saved is on the host of the one process that writes
    alone = orbax.checkpoint.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=str(here)
    )
    several: dict[str, Any] = {"multiprocessing_options": alone} if jax.process_count() > 1 else {}
    return orbax.checkpoint.StandardCheckpointer(**several)


def _line(report: Report | Cut) -> dict[str, Any]:
    if isinstance(report, Cut):
        return {"cut": report.step, "lanes": report.lanes}
    line = {
        "tile": report.tile,
        "group": report.group,
        "step": report.step,
        "lanes": report.lanes,
        "train_loss": report.loss,
        **report.metrics,
    }
    if report.seen is not None:
        line |= {"ended": report.ended, "seen": report.seen._asdict()}
    return line


def _arrays(x: Any) -> Any:
    """Arrays as lists; numbers that are not finite keep their names, for Python to read again."""
    if isinstance(x, np.ndarray | np.generic):
        return x.tolist()
    return {name: _arrays(item) for name, item in x.items()} if isinstance(x, dict) else x
