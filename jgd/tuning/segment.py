"""A segment, read from its folder: its plan, and the facts in its journal.

    segment = read_segment("runs/a")
    segment.facts                               # a fold over the journal
    segment.manifest, segment.notes             # the newest intact checkpoint; damaged ones
    read_segments("runs/a")                     # the segment, and its extensions in their order

An extension is a segment whose plan is that of the whole extended sweep. Its journal holds the
events of the lanes that it trains; the facts about other lanes come from the segments before it.

A manifest holds checksums of itself, of plan.json, of the journal up to its checkpoint and of the
states. The table is derived from plan and journal; results.json and curves.npz are read only in
folders of jgd 0.1. Readers take no lock.
"""

import contextlib
import itertools
import json
import math
import shlex
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jgd.tuning.events import Cut, Report, decode
from jgd.tuning.join import take
from jgd.tuning.ledger import Ledger
from jgd.tuning.plan import FORMAT, Plan
from jgd.tuning.result import Best, Curves, Facts, Result, make_result

__all__ = [
    "Segment",
    "batches_of",
    "checksums",
    "crc_of_plan",
    "extensions",
    "manifests",
    "number_of",
    "read_json",
    "read_manifest",
    "read_result",
    "read_segment",
    "read_segments",
    "resume_command",
    "sealed",
]

NEW = "Start the sweep in a new folder"
# errors that malformed JSON can raise
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)


@dataclass(frozen=True)
class Segment:
    """A segment of a sweep.

    Attributes:
      plan_crc: checksum of plan.json and of the plans of earlier segments.
      manifest: manifest of the newest intact checkpoint; None if there is none.
      facts: what the events say about the lanes.
      notes: one line for each newer checkpoint, all of which are damaged.
    """

    path: Path
    facts: Facts
    plan_crc: int
    manifest: Mapping[str, Any] | None
    notes: list[str]

    @property
    def finished(self) -> bool:
        """True if all lanes have ended."""
        return not self.facts.ledger.alive.any()

    @property
    def plan(self) -> Plan:
        return self.facts.plan


def read_segments(path: str | Path, *, resume: bool = False) -> list[Segment]:
    """Return the segment in a folder, followed by the segments of its extensions.

    Args, raises: as `read_segment`; ValueError if a segment that was extended is incomplete.
    """
    segments = [read_segment(path, resume=resume)]
    for folder in extensions(Path(path)):
        if not segments[-1].finished:
            why = "; ".join(segments[-1].notes) or "lanes are missing"
            raise ValueError(f"{segments[-1].path} was extended but is incomplete: {why}. {NEW}")
        segments.append(read_segment(folder, resume=resume, earlier=segments))
    return segments


def extensions(path: Path) -> list[Path]:
    """Return the folders of the extensions of a sweep, up to the last one that has a plan."""
    numbers = [x.parent.name.partition("-")[2] for x in path.glob("segment-*/plan.json")]
    last = max((int(number) for number in numbers if number.isdecimal()), default=1)
    return [path / f"segment-{number}" for number in range(2, last + 1)]


def batches_of(path: Path) -> list[Path]:
    """Return the folders of the batches of a search; an empty list for a sweep."""
    paths = (path / f"batch-{number}" for number in itertools.count())
    return list(itertools.takewhile(lambda path: path.with_suffix(".json").exists(), paths))


def resume_command(path: Path) -> str:
    """Return the command that resumes the sweep in a folder, or the search it is a batch of."""
    folder = path.parent if (path.parent / "search.json").exists() else path
    return f"jgd sweep --resume {shlex.quote(str(folder))}"


def read_segment(
    path: str | Path, *, resume: bool = False, earlier: Sequence[Segment] = ()
) -> Segment:
    """Return the segment in a folder.

    The journal is read beyond the last checkpoint, up to the first line that does not continue its
    lanes, unless a manifest shows that the plan or the journal was changed.

    Args:
      resume: whether to check the states too, and to stop reading at the checkpoint.
      earlier: the segments that this one extends.

    Raises: FileNotFoundError without a plan; ValueError, naming the file, if no checkpoint matches
      plan and journal, or if only an earlier one does and some of its lanes were alive.
    """
    path = Path(path)
    facts, data = _read_plan(path)
    plan_crc = crc_of_plan(data, earlier)
    for segment in earlier:
        take(facts, segment.facts)
    journal = path / "journal.jsonl"
    data = journal.read_bytes() if journal.exists() else b""
    manifest, notes, changed = _intact_manifest(path, plan_crc, data, states=resume)
    if manifest is None and (changed or (resume and notes)):
        still = "" if changed else "; jgd report still shows its table"
        raise ValueError(
            f"{path}: no checkpoint is intact: {'; '.join(notes)}. {NEW}, or delete the manifests"
            f" in {path} to start it again from step 0{still}"
        )
    covered = manifest["journal"]["bytes"] if manifest else 0
    end = _fold(data[:covered] if resume or changed else data, facts)
    if end < covered:
        raise ValueError(f"{journal} is not the journal of {path / 'plan.json'}. {NEW}")
    if changed and not resume and facts.ledger.alive.any():
        raise ValueError(
            f"{path}: {'; '.join(notes)}. The checkpoint before it is intact. Resume from it with:"
            f" {resume_command(path)}"
        )
    instead = "The checkpoint before it is used" if manifest else "Only the journal is used"
    notes = [f"{path}: {note}. {instead}" for note in notes]
    if resume and data and manifest is None:
        notes = [f"{path} has a journal but no manifest. The sweep starts again from step 0"]
    return Segment(path, facts, plan_crc, manifest, notes)


def crc_of_plan(data: bytes, earlier: Sequence[Segment]) -> int:
    """Return the checksum of a plan and of the plans of the segments that it extends."""
    return zlib.crc32(data, zlib.crc32(str([segment.plan_crc for segment in earlier]).encode()))


def _read_plan(path: Path) -> tuple[Facts, bytes]:
    """Return the facts of the plan in a folder, before any event, and the bytes of the plan."""
    file = path / "plan.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no sweep: there is no plan.json. {NEW}")
    data = file.read_bytes()
    try:
        written = dict[str, Any](json.loads(data))
        if (version := written.get("format", 1)) == FORMAT:
            return Facts.of(Plan.of_json(written)), data
    except MALFORMED as error:
        table = path / "results.csv"
        still = f"; the table is still in {table}" if table.exists() else ""
        raise ValueError(f"{file} holds no plan: {error}. {NEW}{still}") from None
    still = f"; jgd report still reads {path}" if _is_old(path) else ""
    raise ValueError(f"{file}: format must be {FORMAT}, got {version}. {NEW}{still}")


def _intact_manifest(
    path: Path, plan_crc: int, journal: bytes, *, states: bool
) -> tuple[dict[str, Any] | None, list[str], bool]:
    """Return the manifest of the newest intact checkpoint, None if there is none.

    Also return a note on each newer checkpoint, all of which are damaged, and whether the journal
    (or, if there is no intact checkpoint, the plan) differs from the record of one of them.
    """
    notes, changed, foreign = list[str](), False, False
    for file in manifests(path):
        try:
            manifest = read_manifest(file)
            if manifest["plan"] != plan_crc:
                foreign = True
                raise ValueError(f"plan.json was changed, or {file.name} belongs to another sweep")
            covered = journal[: manifest["journal"]["bytes"]]
            written = {"bytes": len(covered), "crc32": zlib.crc32(covered)}
            if not written.items() <= manifest["journal"].items():
                changed = True
                raise ValueError("journal.jsonl was changed")
            for name, block in manifest["blocks"].items() if states else ():
                if checksums(path / "states" / name) != block["files"]:
                    raise ValueError(f"states/{name} was changed")
        except (OSError, *MALFORMED) as error:
            notes.append(f"checkpoint {number_of(file)}: {error}")
        else:
            return manifest, notes, changed
    return None, notes, changed or foreign


def _fold(data: bytes, facts: Facts) -> int:
    """Fold the lines of a journal. Return the number of bytes before the first bad line."""
    end = 0
    with contextlib.suppress(*MALFORMED):
        for line in data.splitlines(keepends=True):
            event = decode(line, facts.plan)
            if not line.endswith(b"\n") or not _continues(event, facts.ledger):
                break
            facts.apply(event)
            end += len(line)
    return end


def _continues(event: Report | Cut, ledger: Ledger) -> bool:
    """Return whether the lanes of an event are alive and, in a report, at the report before it."""
    plan = ledger.plan
    groups = event.lanes if isinstance(event, Cut) else {event.group: event.lanes}
    for group, ids in groups.items():
        first, end = plan.offset(group), plan.offset(plan.index[group] + 1)
        lanes = first + np.asarray(ids, int)
        inside = (lanes >= first) & (lanes < end)
        if not inside.all() or not ledger.alive[lanes].all():
            return False
        if isinstance(event, Report):
            previous = [0, *plan.reports][plan.reports.index(event.step)]
            columns = (event.loss, event.ended, *event.metrics.values(), *(event.statistics or ()))
            complete = all(len(column) == len(lanes) for column in columns)
            if not complete or (ledger.step[lanes] != previous).any():
                return False
    return True


# --- manifests and states --------------------------------------------------------------------


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with a checksum of its content."""
    return {"crc32": zlib.crc32(json.dumps(manifest).encode()), **manifest}


def read_manifest(file: Path) -> dict[str, Any]:
    """Return a manifest. Raises ValueError if it was changed."""
    try:
        written = read_json(file)
    except ValueError:
        written = {}
    manifest = {name: value for name, value in written.items() if name != "crc32"}
    if written != sealed(manifest):
        raise ValueError(f"{file.name} was changed")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{file.name}: format must be {FORMAT}, got {manifest['format']}")
    return manifest


def checksums(path: Path) -> dict[str, list[int]]:
    """Return size and checksum of each file in a folder. Raises FileNotFoundError without it."""
    if not path.is_dir():
        raise FileNotFoundError(f"states/{path.name} is missing")
    files = sorted(x for x in path.rglob("*") if x.is_file())
    data = ((x.relative_to(path).as_posix(), x.read_bytes()) for x in files)
    return {name: [len(content), zlib.crc32(content)] for name, content in data}


def manifests(path: Path) -> list[Path]:
    """Return the manifests of a folder, newest first."""
    files = (x for x in path.glob("manifest-*.json") if x.stem[len("manifest-") :].isdecimal())
    return sorted(files, key=number_of, reverse=True)


def number_of(manifest: Path) -> int:
    """Return the number of the checkpoint that a manifest belongs to."""
    return int(manifest.stem.partition("-")[2])


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError, naming the file, for any other content."""
    try:
        return dict[str, Any](json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None


# --- results ---------------------------------------------------------------------------------


def read_result(path: str | Path) -> Result:
    """Return the table and curves of the sweep in a folder, without states.

    Warns if the sweep has not finished, in which case living lanes count as out of budget, and if
    files are damaged.

    Raises: as `read_segment`; ValueError if there is no report yet.
    """
    path = Path(path)
    if _is_old(path):
        return _read_old_result(path)
    segment = read_segments(path)[-1]
    if not segment.finished:
        extended = segment.path != path
        call = "the call that extended it" if extended else resume_command(path)
        hint = f"If the sweep no longer runs, resume it with: {call}"
        if not segment.facts.ledger.step.any():
            raise ValueError(f"{path} has no report yet. {hint}")
        warnings.warn(f"{path} has not finished: this is its table so far. {hint}", stacklevel=2)
    for note in segment.notes:
        warnings.warn(note, stacklevel=2)
    return make_result(segment.facts)


def _is_old(path: Path) -> bool:
    """Return whether a folder holds a finished sweep of jgd 0.1."""
    files = [path / name for name in ("plan.json", "results.json", "curves.npz")]
    if manifests(path) or not all(file.exists() for file in files):
        return False
    return "format" not in read_json(files[0])


def _read_old_result(path: Path) -> Result:
    """Return the result of a sweep of jgd 0.1."""
    file = path / "results.json"
    try:
        rows = read_json(file)["rows"]
        rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
        best = Best(rows[0], None, None)
        file = path / "plan.json"
        plan = Plan.of_json(read_json(file))
        file = path / "curves.npz"
        with np.load(file) as arrays:
            curves = {
                g.name: Curves(
                    arrays[f"{g.name}/step"],
                    arrays[f"{g.name}/train_loss"],
                    {name: arrays[f"{g.name}/{name}"] for name in plan.metrics},
                )
                for g in plan.groups
            }
    except (*MALFORMED, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    return Result(rows, curves, best, [best], plan.metric, plan.mode, plan, Ledger(plan))
