"""The folder of a sweep: one segment, which a sweep that died goes on from, and the results.

plan.json            what the sweep does, written before step 0
command.json         the command line, if the sweep came from there
journal.jsonl        the events, one per line
states/              the states of lanes, a folder for each block of the pool (orbax)
manifest-N.json      checkpoint N: how much of the journal it covers, the schedule, and the blocks
results.csv          a row per setting, ranked; results.json the same with metric, mode and steps
curves.npz           the curves of all lanes

A block is written once, under a name of its own. A manifest is written after all that it names is
on disk, and the one before it stays, so that at any moment a whole checkpoint is there. Results and
curves follow from the journal; nothing is ever read from them to resume.
"""

import concurrent.futures
import contextlib
import csv
import errno
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jgd.tuning.devices import is_writer
from jgd.tuning.events import Cut, Report, decode, encode
from jgd.tuning.plan import FORMAT, Plan, plain
from jgd.tuning.result import Best, Curves, Result

__all__ = ["Folder", "read_result"]

SPARE = 2**20  # bytes that a checkpoint leaves free on the disk
EARLY = ("command.json", "plan.json.part", "command.json.part")  # a sweep that has not started


class Folder:
    """The folder of one sweep. Of several processes, process 0 writes.

    Args:
      path: None for a sweep without a folder: nothing is written.

    Attributes:
      enabled: False without a path.
      plan: of the sweep that is resumed, as it was written; None for a new sweep.
      notes: one line for each damaged checkpoint.

    Raises: FileExistsError for a new sweep in a folder that holds something, FileNotFoundError for
      a resumed one without a plan, OSError if the folder cannot be written.
    """

    def __init__(self, path: str | Path | None, *, resume: bool = False) -> None:
        self.path, self.notes = Path(path or ""), list[str]()
        self._writes = path is not None and is_writer()
        if resume and not (self.path / "plan.json").exists():
            raise FileNotFoundError(f"{self.path} holds no sweep: there is no plan.json")
        file = next((p for p in (self.path, *self.path.parents) if p.is_file()), None)
        if not resume and file is not None:
            raise NotADirectoryError(
                f"sweep: folder must be a folder, got {path}: {file} is a file"
            )
        if not resume and self._writes and not self._is_free():
            raise FileExistsError(f"{self.path} is not empty. Give a sweep a folder of its own")
        self.enabled = path is not None
        self.plan = _read_json(self.path / "plan.json") if resume else None
        self._journal = self.path / "journal.jsonl"
        self._events = self._bytes = self._crc = self._generation = 0
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: concurrent.futures.Future[None] | None = None

    def _is_free(self) -> bool:
        if not self.path.exists():
            return True
        return self.path.is_dir() and all(x.name in EARLY for x in self.path.iterdir())

    # --- plan and results

    def write_plan(self, plan: Plan) -> None:
        """Write the plan, the first file of a sweep."""
        if self._writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_json("plan.json", plan.as_json())

    def write_result(self, result: Result) -> None:
        """Write the table and the curves."""
        if not self._writes:
            return
        plan = result.plan
        summary = {"metric": plan.metric, "mode": plan.mode, "steps": plan.steps}
        with _replacing(self.path / "results.csv") as path, path.open("w", newline="") as file:
            columns = list(dict.fromkeys(name for row in result.rows for name in row))
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(result.rows)
        self._write_json("results.json", {**summary, "seeds": plan.seeds, "rows": result.rows})
        with _replacing(self.path / "curves.npz") as path, path.open("wb") as file:
            arrays: dict[str, Any] = _arrays_of(result.curves)
            np.savez_compressed(file, **arrays)

    # --- the journal

    def append(self, events: Sequence[Report | Cut]) -> None:
        """Append events to the journal."""
        if not self._writes or not events:
            return
        lines = [encode(event) + "\n" for event in events]
        data = "".join(lines).encode()
        with self._journal.open("ab") as file:
            file.write(data)
        self._events += len(lines)
        self._bytes += len(data)
        self._crc = zlib.crc32(data, self._crc)

    # --- checkpoints

    def checkpoint(self, manifest: Mapping[str, Any], states: Mapping[str, Any]) -> None:
        """Write a checkpoint in the background; the one before is finished first.

        Args:
          manifest: schedule, blocks by name, and what else a resume needs, as JSON.
          states: the rows of each block, on the host.
        """
        if not self._writes:
            return
        self.finish()
        with self._journal.open("ab") as file:
            os.fsync(file.fileno())
        journal = {"events": self._events, "bytes": self._bytes, "crc32": self._crc}
        self._generation += 1
        manifest = {
            "format": FORMAT,
            "generation": self._generation,
            "journal": journal,
            **manifest,
        }
        self._saving = self._writer.submit(self._save, manifest, states)

    def busy(self) -> bool:
        """Return whether a checkpoint is being written."""
        return self._saving is not None and not self._saving.done()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and raise what failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _save(self, manifest: Mapping[str, Any], states: Mapping[str, Any]) -> None:
        checkpointer, folder = _checkpointer(), (self.path / "states").absolute()
        folder.mkdir(exist_ok=True)
        new = [name for name in states if not (folder / name).exists()]
        size = sum(x.nbytes for name in new for x in jax.tree.leaves(states[name]))
        if size + SPARE > shutil.disk_usage(folder).free:  # orbax's own error is 100 lines
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        for name in new:  # orbax renames a folder when it is whole, and saves no single array
            checkpointer.save(folder / name, {"lanes": states[name]})
        checkpointer.wait_until_finished()
        for name in new:
            _sync(folder / name)
        _sync(folder, files=False)
        blocks = {
            name: {**block, "files": _checksums(folder / name)}
            for name, block in manifest["blocks"].items()
        }
        self._write_json(f"manifest-{manifest['generation']}.json", {**manifest, "blocks": blocks})
        _sync(self.path, files=False)
        self._tidy()

    def _tidy(self) -> None:
        """Delete all checkpoints but the last two, and the states that neither names."""
        for path in _manifests(self.path)[2:]:
            path.unlink()
        named = set[str]()
        for path in _manifests(self.path):
            with contextlib.suppress(ValueError, KeyError):  # a damaged manifest names no state
                named |= set(_read_json(path)["blocks"])
        for path in _entries(self.path / "states"):
            if path.name not in named:
                shutil.rmtree(path)

    # --- resuming

    def last_checkpoint(self) -> dict[str, Any] | None:
        """Return the manifest of the last whole checkpoint; None if there is none.

        A line for each damaged checkpoint is added to `notes`.
        """
        for path in _manifests(self.path):
            try:
                manifest = _read_json(path)
                self._check(manifest)
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.notes.append(f"{self.path}: checkpoint {_generation(path)}: {error}")
                continue
            return manifest
        return None

    def _check(self, manifest: Mapping[str, Any]) -> None:
        """Raise ValueError unless all that a manifest names is there and as it was written."""
        if manifest["format"] != FORMAT:
            raise ValueError(f"the format must be {FORMAT}, got {manifest['format']}")
        data = self._journal.read_bytes()[: manifest["journal"]["bytes"]]
        if len(data) < manifest["journal"]["bytes"]:
            raise ValueError(f"{self._journal.name} is shorter than the checkpoint says")
        if zlib.crc32(data) != manifest["journal"]["crc32"]:
            raise ValueError(f"{self._journal.name} was changed")
        for name, block in manifest["blocks"].items():
            if _checksums(self.path / "states" / name) != block["files"]:
                raise ValueError(f"states/{name} was changed")

    def return_to(self, manifest: Mapping[str, Any] | None) -> None:
        """Truncate the journal to what a checkpoint covers, and delete what is newer."""
        journal = manifest["journal"] if manifest else {"events": 0, "bytes": 0, "crc32": 0}
        self._events, self._bytes = journal["events"], journal["bytes"]
        self._crc, self._generation = journal["crc32"], manifest["generation"] if manifest else 0
        if not self._writes:
            return
        for path in _manifests(self.path):
            if _generation(path) > self._generation:
                path.unlink()
        if self._journal.exists():
            os.truncate(self._journal, self._bytes)
        self._tidy()

    def events(self, plan: Plan) -> Iterator[Report | Cut]:
        """Yield the events of the journal, as far as the checkpoint covers it."""
        if self._bytes:
            with self._journal.open("rb") as file:
                for line in file.read(self._bytes).splitlines():
                    yield decode(line, plan)

    def load(self, name: str, shapes: Any) -> Any:
        """Return the rows of a block, of these shapes, on the host."""
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        path = (self.path / "states" / name).absolute()
        rows = _checkpointer().restore(path, {"lanes": jax.tree.map(shaped, shapes)})["lanes"]
        return jax.tree.map(np.asarray, rows)

    # --- files

    def _write_json(self, name: str, content: Any) -> None:
        with _replacing(self.path / name) as path:
            path.write_text(json.dumps(plain(content), indent=1))


@contextlib.contextmanager
def _replacing(path: Path) -> Generator[Path]:
    """Yield a path to write to, which replaces the file when it is whole."""
    part = path.with_name(path.name + ".part")
    yield part
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _sync(path: Path, *, files: bool = True) -> None:
    """Make a folder durable, and all files and folders in it, where the system can."""
    if os.name != "posix":
        return
    inside = path.rglob("*") if files else ()
    for each in [*inside, path]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _checksums(path: Path) -> dict[str, list[int]]:
    """Return size and checksum of all files in a folder. Raises FileNotFoundError without one."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing")
    files = sorted(x for x in path.rglob("*") if x.is_file())
    data = ((x.relative_to(path).as_posix(), x.read_bytes()) for x in files)
    return {name: [len(content), zlib.crc32(content)] for name, content in data}


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def _generation(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _manifests(path: Path) -> list[Path]:
    """Return the manifests of a folder, newest first."""
    return sorted(path.glob("manifest-[0-9]*.json"), key=_generation, reverse=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict[str, Any](json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold a JSON object: {error}") from None


def _checkpointer() -> Any:
    import orbax.checkpoint

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors are raised
    here = jax.process_index()  # states are on the host of the one process that writes
    alone = orbax.checkpoint.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=str(here)
    )
    several: dict[str, Any] = {"multiprocessing_options": alone} if jax.process_count() > 1 else {}
    return orbax.checkpoint.StandardCheckpointer(**several)


# --- results ---------------------------------------------------------------------------------


def _arrays_of(curves: Mapping[str, Curves]) -> dict[str, np.ndarray]:
    """Return curves by group and name, in single precision."""
    arrays = dict[str, np.ndarray]()
    for group, c in curves.items():
        arrays[f"{group}/step"] = c.step
        arrays[f"{group}/train_loss"] = c.train_loss.astype(np.float32)
        arrays |= {f"{group}/{name}": x.astype(np.float32) for name, x in c.metrics.items()}
    return arrays


def read_result(path: str | Path) -> Result:
    """Return the result in the folder of a sweep that has ended: table and curves, no states.

    Raises: FileNotFoundError if it holds none.
    """
    path = Path(path)
    for name in ("plan.json", "results.json", "curves.npz"):
        if not (path / name).exists():
            raise FileNotFoundError(f"{path} holds no finished sweep: there is no {name}")
    rows = _read_json(path / "results.json")["rows"]
    plan = Plan.of_json(_read_json(path / "plan.json"))
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
