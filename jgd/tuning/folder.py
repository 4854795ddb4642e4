"""The folder of a sweep: one segment, which a sweep that died goes on from, and the results.

plan.json            what the sweep does, written before step 0
command.json         the command line, if the sweep came from there
journal.jsonl        the events, one per line
states/              the states of lanes, a folder for each block of the pool (orbax)
manifest-N.json      checkpoint N: the schedule, the blocks, how much of the journal it covers, and
                     checksums of all of it
lock                 held by the process that writes here
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
import os
import shutil
import zlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jgd.tuning.devices import fails_everywhere, is_writer
from jgd.tuning.events import Cut, Report, encode
from jgd.tuning.lock import LOCKS, locked
from jgd.tuning.plan import FORMAT, Plan, plain
from jgd.tuning.result import Curves, Result
from jgd.tuning.segment import (
    Segment,
    checksums,
    manifests,
    number_of,
    read_manifest,
    read_segment,
    sealed,
)

__all__ = ["Folder", "is_free", "load_block", "opened"]

# of a sweep that has not started
EARLY = ("command.json", "plan.json.part", "command.json.part", *LOCKS)
# orbax has errors of its own, with these texts
FULL = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)


@contextlib.contextmanager
def opened(path: str | Path | None, *, resume: bool = False) -> Generator["Folder"]:
    """Hold the folder of a sweep: no other process has it, and at the end all is written.

    Args, raises: as `Folder`; BlockingIOError, naming the holder, if another process has it;
      OSError, saying how to go on, if the disk is full.
    """
    with contextlib.ExitStack() as stack:
        with fails_everywhere():
            if path is not None and is_writer():
                stack.enter_context(locked(Path(path)))
        with fails_everywhere():
            folder = Folder(path, resume=resume)
        try:
            yield folder
            folder.finish()
        except BaseException as error:
            with contextlib.suppress(Exception):  # a checkpoint that is being written is finished
                folder.finish()
            full = next((text for text in FULL if text in str(error)), None)
            if path is None or full is None:
                raise
            raise OSError(
                f"{path}: {full}. Free some space, then go on: jgd sweep --resume {path}, or"
                " resume=True in Python"
            ) from error


class Folder:
    """The folder of one sweep. Of several processes, process 0 writes.

    Args:
      path: None for a sweep without a folder: nothing is written.
      resume: whether it holds a sweep to go on with.

    Attributes:
      enabled: False without a path.
      segment: of the sweep that is resumed; None for a new sweep.

    Raises: FileExistsError for a new sweep in a folder that holds something; what `read_segment`
      raises for a resumed one; OSError if the folder cannot be written.
    """

    def __init__(self, path: str | Path | None, *, resume: bool = False) -> None:
        self.path = Path(path or "")
        self._writes = path is not None and is_writer()
        if not resume and self._writes and not is_free(self.path):
            raise FileExistsError(f"{self.path} is not empty. Give a sweep a folder of its own")
        self.enabled = path is not None
        self.segment = read_segment(self.path, resume=True) if resume else None
        self._journal = self.path / "journal.jsonl"
        self._plan_crc = self.segment.plan_crc if self.segment else 0
        self._events = self._bytes = self._crc = self._generation = 0
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: concurrent.futures.Future[None] | None = None

    # --- plan and results

    def write_plan(self, plan: Plan) -> None:
        """Write the plan, the first file of a sweep."""
        if self._writes:
            self._plan_crc = self._write_json("plan.json", plan.as_json())

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
        rows = plain(result.rows)
        self._write_json("results.json", {**summary, "seeds": plan.seeds, "rows": rows})
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
            "plan": self._plan_crc,
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
        for name in new:  # orbax renames a folder when it is whole, and saves no single array
            checkpointer.save(folder / name, {"lanes": states[name]})
        checkpointer.wait_until_finished()
        for name in new:
            _sync(folder / name)
        _sync(folder, files=False)
        blocks = {
            name: {**block, "files": checksums(folder / name)}
            for name, block in manifest["blocks"].items()
        }
        whole = sealed(plain({**manifest, "blocks": blocks}))
        self._write_json(f"manifest-{manifest['generation']}.json", whole)
        _sync(self.path, files=False)
        self._tidy()

    def _tidy(self) -> None:
        """Delete all checkpoints but the last two, and the states that neither names."""
        for path in manifests(self.path)[2:]:
            path.unlink()
        named = set[str]()
        for path in manifests(self.path):
            with contextlib.suppress(ValueError, KeyError):  # a damaged manifest names no state
                named |= set(read_manifest(path)["blocks"])
        for path in _entries(self.path / "states"):
            if path.name not in named:
                shutil.rmtree(path)

    # --- resuming

    def return_to_checkpoint(self, segment: Segment) -> None:
        """Truncate the journal to what the checkpoint covers, and delete what is newer."""
        if segment.manifest is not None:
            journal, self._generation = segment.manifest["journal"], segment.manifest["generation"]
            self._events, self._bytes = journal["events"], journal["bytes"]
            self._crc = journal["crc32"]
        if not self._writes:
            return
        for path in manifests(self.path):
            if number_of(path) > self._generation:
                path.unlink()
        if self._journal.exists():
            os.truncate(self._journal, self._bytes)
        self._tidy()

    # --- files

    def _write_json(self, name: str, content: Any) -> int:
        """Write a file, and return its checksum."""
        data = json.dumps(content, indent=1).encode()
        with _replacing(self.path / name) as path:
            path.write_bytes(data)
        return zlib.crc32(data)


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


def is_free(path: Path) -> bool:
    """Return whether a sweep may start in a folder: none has."""
    return all(x.name in EARLY for x in _entries(path))


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def load_block(path: Path, name: str, shapes: Any) -> Any:
    """Return the rows of a block of states in a folder, of these shapes, on the host."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    file = (path / "states" / name).absolute()
    rows = _checkpointer().restore(file, {"lanes": jax.tree.map(shaped, shapes)})["lanes"]
    return jax.tree.map(np.asarray, rows)


def _checkpointer() -> Any:
    import orbax.checkpoint

    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    here = jax.process_index()  # states are on the host of the one process that writes
    alone = orbax.checkpoint.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=str(here)
    )
    several: dict[str, Any] = {"multiprocessing_options": alone} if jax.process_count() > 1 else {}
    return orbax.checkpoint.StandardCheckpointer(**several)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname  # errors are raised as well


def _arrays_of(curves: Mapping[str, Curves]) -> dict[str, np.ndarray]:
    """Return curves by group and name, in single precision."""
    arrays = dict[str, np.ndarray]()
    for group, c in curves.items():
        arrays[f"{group}/step"] = c.step
        arrays[f"{group}/train_loss"] = c.train_loss.astype(np.float32)
        arrays |= {f"{group}/{name}": x.astype(np.float32) for name, x in c.metrics.items()}
    return arrays
