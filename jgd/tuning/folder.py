"""The folder of a sweep: a segment, from which the sweep is resumed, and the results.

plan.json            the plan of the sweep, written before step 0
command.json         the command line, if the sweep was started by one
journal.jsonl        the events, one per line
states/              the states of lanes, a folder for each block of the pool (orbax)
manifest-N.json      checkpoint N: the schedule, the blocks, the length of the journal, and their
                     checksums
lock                 held by the process that writes to the folder
segment-N/           an extension, with its own plan, journal, states and manifests
results.csv          a row per setting, ranked; results.json adds metric, mode, steps and seeds
curves.npz           the curves of all lanes
settings.pickle      the settings: their numbers, and their structure if it can be pickled

A block is written once, under a unique name. A manifest is written when everything it names is on
disk, and the manifest before it stays, so that a complete checkpoint exists at any moment. Results
and curves are derived from the journal and never read to resume a sweep.
"""

import concurrent.futures
import contextlib
import csv
import errno
import functools
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jgd.tuning.devices import checkpointer as _checkpointer
from jgd.tuning.devices import fails_everywhere, is_writer
from jgd.tuning.events import Cut, Report, decode, encode
from jgd.tuning.lock import LOCKS, locked
from jgd.tuning.plan import FORMAT, Plan, plain
from jgd.tuning.result import Result
from jgd.tuning.segment import (
    Segment,
    checksums,
    crc_of_plan,
    extensions,
    manifests,
    number_of,
    read_manifest,
    read_segment,
    read_segments,
    resume_command,
    sealed,
)
from jgd.tuning.space import Lanes

__all__ = [
    "SETTINGS",
    "Folder",
    "folder_lock",
    "is_free",
    "load_block",
    "opened",
    "write_json",
    "write_table",
]

SETTINGS = "settings.pickle"
SPARE = 2**20  # bytes that a checkpoint leaves free on the disk

# files that a folder may hold before its sweep or search has started
EARLY = ("command.json", *(f"{x}.json.part" for x in ("command", "plan", "search")), *LOCKS)
# messages of a full disk; the errors that orbax raises have other types but contain the message
FULL = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)


@contextlib.contextmanager
def folder_lock(path: str | Path | None) -> Generator[None]:
    """Hold the lock of a folder, unless it is None. Process 0 locks it; all raise its error."""
    with contextlib.ExitStack() as stack:
        with fails_everywhere():
            if path is not None and is_writer():
                stack.enter_context(locked(Path(path)))
        yield


@contextlib.contextmanager
def opened(
    path: str | Path | None, *, resume: bool = False, extend: bool = False
) -> Generator["Folder"]:
    """Lock and open the folder of a sweep. At the end, finish the last checkpoint.

    Args:
      extend: whether to open the folder of an extension: a new one, or one that has not finished.

    Other arguments and raises: as `Folder`; BlockingIOError, naming the holder, if another process
      has locked the folder; OSError, with the command that resumes the sweep, if the disk is full.
    """
    with folder_lock(path):
        with fails_everywhere():
            new = Folder.of_extension if extend else functools.partial(Folder, resume=resume)
            folder = new(path)
        try:
            yield folder
            folder.finish()
        except BaseException as error:
            with contextlib.suppress(Exception):  # only the first error matters
                folder.finish()
            full = next((text for text in FULL if text in str(error)), None)
            if path is None or full is None:
                raise
            call = f"{resume_command(Path(path))}, or resume=True in Python"
            call = "the same call" if extend else call
            raise OSError(f"{path}: {full}. Free some space, then resume with: {call}") from error


class Folder:
    """The folder of one segment. With several processes, only process 0 writes.

    Args:
      path: None for a sweep without a folder: nothing is written.
      resume: whether the folder holds a sweep to resume.
      earlier: the segments that an extension extends. Results are written beside the first of them.

    Attributes:
      enabled: whether there is a path.
      segment: the segment to resume; None for a new one.

    Raises: FileExistsError for a new sweep in a folder that is not empty; the errors of
      `read_segment` for a resumed sweep; OSError if the folder cannot be written.
    """

    def __init__(
        self, path: str | Path | None, *, resume: bool = False, earlier: Sequence[Segment] = ()
    ) -> None:
        self.path, self.earlier = Path(path or ""), earlier
        if resume and not earlier and extensions(self.path):
            raise ValueError(f"resume: {path} was extended. Give it as extend, not as folder")
        self._writes = path is not None and is_writer()
        if not resume and self._writes and not is_free(self.path):
            raise FileExistsError(f"{self.path} is not empty. Give a sweep a folder of its own")
        self.enabled = path is not None
        self.segment = None
        if resume:
            self.segment = read_segment(self.path, resume=True, earlier=earlier)
        self._journal = self.path / "journal.jsonl"
        self._plan_crc = self.segment.plan_crc if self.segment else 0
        self._generation, self._written = 0, {"events": 0, "bytes": 0, "crc32": 0}
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: concurrent.futures.Future[None] | None = None

    @classmethod
    def of_extension(cls, path: str | Path | None) -> "Folder":
        """Return the folder of a new extension, or of the last one if it has not finished.

        Raises: ValueError if the sweep in the folder has not finished; as `read_segments`.
        """
        path = Path(path or "")
        segments = read_segments(path, resume=True)
        *earlier, last = segments
        if last.finished:
            return cls(path / f"segment-{len(segments) + 1}", earlier=segments)
        if not earlier:
            why = "; ".join(last.notes) or f"{path} has not finished"
            raise ValueError(f"extend: {why}. Finish it with resume=True first")
        return cls(last.path, resume=True, earlier=earlier)

    # --- plan and results

    def write_plan(self, plan: Plan) -> None:
        """Write the plan, the first file of a sweep."""
        if self._writes:
            self.path.mkdir(parents=True, exist_ok=True)
            data = write_json(self.path / "plan.json", plan.as_json())
            self._plan_crc = crc_of_plan(data, self.earlier)

    def write_result(self, result: Result, groups: Mapping[str, Lanes]) -> None:
        """Write the table, the curves and the settings."""
        if not self._writes:
            return
        folder = self.earlier[0].path if self.earlier else self.path
        write_table(folder, result)
        with _replacing(folder / SETTINGS) as path, path.open("wb") as file:
            pickle.dump({name: _pickled(lanes.settings) for name, lanes in groups.items()}, file)

    # --- the journal

    def append(self, events: Sequence[Report | Cut]) -> None:
        """Append events to the journal."""
        if not self._writes or not events:
            return
        lines = [encode(event) + "\n" for event in events]
        data = "".join(lines).encode()
        with self._journal.open("ab") as file:
            file.write(data)
        self._written["events"] += len(lines)
        self._written["bytes"] += len(data)
        self._written["crc32"] = zlib.crc32(data, self._written["crc32"])

    # --- checkpoints

    def checkpoint(self, manifest: Mapping[str, Any], states: Mapping[str, Any]) -> None:
        """Write a checkpoint in the background, once the previous checkpoint is complete.

        Args:
          manifest: schedule, blocks by name, and everything else that a resume needs, as JSON.
          states: the rows of each block, on the host.
        """
        if not self._writes:
            return
        self.finish()
        with self._journal.open("ab") as file:
            os.fsync(file.fileno())
        self._generation += 1
        manifest = {
            "format": FORMAT,
            "generation": self._generation,
            "plan": self._plan_crc,
            "journal": dict(self._written),
            **manifest,
        }
        self._saving = self._writer.submit(self._save, manifest, states)

    def busy(self) -> bool:
        """Return whether a checkpoint is being written."""
        return self._saving is not None and not self._saving.done()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and raise its error if there is one."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _save(self, manifest: Mapping[str, Any], states: Mapping[str, Any]) -> None:
        checkpointer, folder = _checkpointer(), (self.path / "states").absolute()
        folder.mkdir(exist_ok=True)
        new = [name for name in states if not (folder / name).exists()]
        size = sum(x.nbytes for name in new for x in jax.tree.leaves(states[name]))
        if size + SPARE > shutil.disk_usage(folder).free:  # orbax's error would have 100 lines
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        for name in new:  # orbax saves dicts, not bare arrays, and renames a complete folder
            leaves = enumerate(jax.tree.leaves(states[name]))
            checkpointer.save(folder / name, {str(index): leaf for index, leaf in leaves})
        checkpointer.wait_until_finished()
        for name in new:
            _sync(folder / name)
        _sync(folder, files=False)
        blocks = {
            name: {**block, "files": checksums(folder / name)}
            for name, block in manifest["blocks"].items()
        }
        content = sealed(plain({**manifest, "blocks": blocks}))
        write_json(self.path / f"manifest-{manifest['generation']}.json", content)
        _sync(self.path, files=False)
        self._tidy()

    def _tidy(self) -> None:
        """Delete all checkpoints but the last two, and the states that neither of them names."""
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
        """Truncate the journal to the part that the checkpoint covers; delete newer checkpoints."""
        if segment.manifest is not None:
            self._generation = segment.manifest["generation"]
            self._written = dict(segment.manifest["journal"])
        if not self._writes:
            return
        for path in manifests(self.path):
            if number_of(path) > self._generation:
                path.unlink()
        if self._journal.exists():
            os.truncate(self._journal, self._written["bytes"])
        self._tidy()

    def events(self, plan: Plan) -> Iterator[Report | Cut]:
        """Yield the events in the journal, up to the last checkpoint."""
        if size := self._written["bytes"]:
            data = self._journal.read_bytes()[:size]
            yield from (decode(line, plan) for line in data.splitlines())


# --- files -----------------------------------------------------------------------------------


def write_table(folder: Path, result: Result) -> None:
    """Write the table and the curves."""
    plan = result.plan
    summary = {"metric": plan.metric, "mode": plan.mode, "steps": plan.steps}
    with _replacing(folder / "results.csv") as path, path.open("w", newline="") as file:
        columns = list(dict.fromkeys(name for row in result.rows for name in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(result.rows)
    rows = plain(result.rows)
    write_json(folder / "results.json", {**summary, "seeds": plan.seeds, "rows": rows})
    arrays = dict[str, Any]()  # in single precision
    for group, (steps, losses, metrics) in result.curves.items():
        arrays[f"{group}/step"] = steps
        for name, values in {"train_loss": losses, **metrics}.items():
            arrays[f"{group}/{name}"] = values.astype(np.float32)
    with _replacing(folder / "curves.npz") as path, path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def write_json(path: Path, content: Any) -> bytes:
    """Write data to a file as JSON. Return the bytes of the file."""
    data = json.dumps(content, indent=1).encode()
    with _replacing(path) as part:
        part.write_bytes(data)
    return data


def _pickled(settings: Any) -> tuple[bytes | None, list[np.ndarray]]:
    """Return the pickled structure of settings (None if it fails to pickle) and their numbers."""
    structure = None
    with contextlib.suppress(Exception):  # functions cannot be pickled; a class may raise anything
        structure = pickle.dumps(jax.tree.map(lambda _: 0, settings))
    return structure, jax.tree.map(np.asarray, jax.tree.leaves(settings))


@contextlib.contextmanager
def _replacing(path: Path) -> Generator[Path]:
    """Yield a path to write to. At the end, the file written to it replaces the file at `path`."""
    part = path.with_name(path.name + ".part")
    yield part
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _sync(path: Path, *, files: bool = True) -> None:
    """Flush a folder to disk and, with `files`, everything in it. Only on POSIX systems."""
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
    """Return whether no sweep has started in a folder."""
    return all(x.name in EARLY for x in _entries(path))


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def load_block(path: Path, name: str) -> list[np.ndarray]:
    """Return the leaves of a block in the folder of a segment, as NumPy arrays."""
    leaves = _checkpointer().restore((path / "states" / name).absolute())
    return [np.asarray(leaves[str(index)]) for index in range(len(leaves))]
