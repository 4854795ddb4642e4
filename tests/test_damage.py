"""A damaged folder gives the same table, or a line that names the file, but never another table."""

import errno
import json
import os
import random
import re
import shutil
import sys

import chex
import numpy as np
import pytest
from test_training import line_task

import jgd
from jgd import cli
from jgd.tuning import plots
from jgd.tuning.folder import Folder
from jgd.tuning.segment import manifests, read_manifest, read_result, sealed

TASK = line_task()  # one task, so that all sweeps share their compiled programs
RATES = [0.01, 0.03, 0.1, 1e30]
OPTIONS = dict(width=2, report_every=2, checkpoint_every=0)

WAYS = ("gone", "empty", "truncated", "garbage", "a flipped bit")
OTHERS = ("another version", "another sweep")
DAMAGES = [
    # file, ways to damage it, errors of `resume` and `report` (None: they give the same table)
    ("plan.json", (*WAYS, *OTHERS), r"plan\.json", r"plan\.json"),
    ("journal.jsonl", ("gone", "empty", "garbage"), r"journal\.jsonl", r"journal\.jsonl"),
    ("journal.jsonl", ("another sweep",), r"journal\.jsonl", r"journal\.jsonl"),
    ("journal.jsonl", ("truncated", "a flipped bit"), None, r"journal\.jsonl"),
    ("newest manifest", (*WAYS, *OTHERS), None, None),
    ("both manifests", ("gone",), None, None),
    ("both manifests", (*WAYS[1:], "another version"), r"manifest-2\.json", None),
    ("both manifests", ("another sweep",), r"manifest-2\.json", r"manifest-2\.json"),
    ("newest state", WAYS, None, None),
    ("all states", WAYS, r"states/block-\d+", None),
    ("command.json", (*WAYS[:4], "another version"), r"command\.json", None),
    ("command.json", ("another sweep",), "the folder holds another sweep", None),
    *((name, WAYS, None, None) for name in ("results.json", "results.csv", "curves.npz", "lock")),
]
FALLS_BACK = ("journal.jsonl", "newest manifest", "newest state")
CASES = [(file, way, *errors) for file, ways, *errors in DAMAGES for way in ways]


@pytest.fixture(scope="module", autouse=True)
def _few_checkpoints_and_no_plots():
    """Write checkpoints only before the first two turns and at the end, and no plots."""
    with pytest.MonkeyPatch.context() as patched:
        checkpoint = Folder.checkpoint

        def checkpoint_now(self, *args):
            checkpoint(self, *args)
            self.finish()

        patched.setattr(Folder, "busy", lambda self: self._generation >= 2)
        patched.setattr(Folder, "checkpoint", checkpoint_now)
        patched.setattr(plots, "save_plots", lambda result, out: [])
        yield


def _jgd(*arguments):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["jgd", *map(str, arguments)])
        cli.main()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder to damage, and the folder of another sweep."""
    both = [tmp_path_factory.mktemp("reference") / name for name in ("this", "other")]
    for folder, all_rates in zip(both, (RATES, [2 * rate for rate in RATES]), strict=True):
        rates = ",".join(map(str, all_rates))
        options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
        what = ("test_damage:TASK", "--optimizer", "adam", "--set", f"learning_rate={rates}")
        _jgd("sweep", *what, "--steps", 8, "--seeds", 1, *options, "--out", folder)
    assert [path.name for path in manifests(both[0])] == ["manifest-3.json", "manifest-2.json"]
    return both


def _damage(folder, file, way, other):
    """Damage a file of a folder; `other` is the folder of another sweep."""
    newest, older = manifests(folder)
    blocks = [set(read_manifest(path)["blocks"]) for path in (newest, older)]
    for path in {
        "newest manifest": [newest],
        "both manifests": [newest, older],
        "newest state": [folder / "states" / name for name in blocks[0] - blocks[1]],
        "all states": [folder / "states" / name for name in blocks[0] | blocks[1]],
    }.get(file, [folder / file]):
        if way == "gone":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif way == "another sweep":
            shutil.copy(other / path.name, path)
        elif way == "another version":
            content = json.loads(path.read_text()) | {"format": 3}
            content.pop("crc32", None)
            path.write_text(json.dumps(sealed(content) if path in (newest, older) else content))
        else:
            if path.is_dir():
                path = max(
                    filter(lambda x: x.is_file(), path.rglob("*")), key=lambda x: x.stat().st_size
                )
            data = bytearray(path.read_bytes())
            if way == "a flipped bit":
                data[-20] ^= 1
            new = dict(
                empty=b"",
                truncated=data[: len(data) - 20],
                garbage=random.Random(0).randbytes(len(data)),
            )
            path.write_bytes(new.get(way, bytes(data)))


def _output(capsys, *command):
    """Return what a command prints on success, and the one line that it prints on failure."""
    try:
        _jgd(*command)
    except SystemExit:
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1, printed.err
        return "", printed.err
    return capsys.readouterr().out, ""


@pytest.mark.parametrize(("file", "way", "resumed", "reported"), CASES)
def test_a_damaged_folder_gives_the_same_table_or_one_line(
    file, way, resumed, reported, folders, tmp_path, capsys, recwarn
):
    reference, other = folders
    table = (reference / "results.csv").read_bytes()
    folder, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(reference, folder)
    _damage(folder, file, way, other)
    shutil.copytree(folder, again)

    shown, error = _output(capsys, "report", folder)
    if reported is None:
        expected = _output(capsys, "report", reference)[0]
        assert shown.partition("\nfiles in ")[0] == expected.partition("\nfiles in ")[0] != ""
        assert repr(read_result(folder).rows) == repr(read_result(reference).rows)
    else:
        assert re.search(reported, error)

    _, error = _output(capsys, "sweep", "--resume", folder)
    if resumed is None:
        assert not error
        assert (folder / "results.csv").read_bytes() == table
        assert (folder / "journal.jsonl").read_bytes() == (reference / "journal.jsonl").read_bytes()
    else:
        assert re.search(resumed, error)

    resume_in_python = lambda: jgd.sweep(
        TASK,
        {"adam": jgd.grid(jgd.adam, learning_rate=RATES)},
        8,
        folder=again,
        resume=True,
        **OPTIONS,
    )
    if resumed is None or file == "command.json":
        resume_in_python()
        assert (again / "results.csv").read_bytes() == table
        warned = any("The checkpoint before it is used" in str(w.message) for w in recwarn)
        assert warned == ((way != "gone" and file in FALLS_BACK) or file == "newest state")
    else:
        with pytest.raises((OSError, ValueError), match=resumed):
            resume_in_python()


def test_a_folder_has_the_rows_and_curves_of_its_sweep(tmp_path):
    def factory(learning_rate, limit, kind):
        return jgd.sgd(learning_rate) if kind == "sgd" else jgd.adam(learning_rate)

    axes = dict(learning_rate=[0.1, 1e30], limit=[np.float32(0.3), np.inf], kind=["sgd", "adam"])
    options = dict(seeds=2, target=1e-3, best="ever", drop_diverged=True)
    result = jgd.sweep(TASK, jgd.grid(factory, **axes), 8, folder=tmp_path / "run", **options)
    read = read_result(tmp_path / "run")
    assert repr(read.rows) == repr(result.rows)  # repr, since NaN != NaN
    chex.assert_trees_all_equal(read.curves, result.curves)


def test_a_sweep_resumes_after_a_full_disk(tmp_path, monkeypatch):
    folder, append = tmp_path / "run", Folder.append

    def full(self, events):
        if self._written["events"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, events)

    sweep = lambda resume: jgd.sweep(
        TASK, jgd.grid(jgd.adam, learning_rate=RATES), 8, folder=folder, resume=resume, **OPTIONS
    )
    with monkeypatch.context() as patched:
        patched.setattr(Folder, "append", full)
        with pytest.raises(
            OSError, match=rf"run: No space .* resume with: jgd sweep --resume {folder}"
        ):
            sweep(False)
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write('{"tile": 0, "group": "adam"')  # a line that a dying process wrote in part
    with pytest.warns(UserWarning, match=f"{folder} has not finished: this is its table so far"):
        rows = read_result(folder).rows
    assert {row["ended"] for row in rows} == {"out of budget"}
    assert {row["at"] for row in rows} == {4}
    sweep(True)
    assert {row["ended"] for row in read_result(folder).rows} == {"finished"}


def test_report_reads_the_folder_of_an_older_version(folders, tmp_path, capsys):
    folder, rows = tmp_path / "run", read_result(folders[0]).rows
    shutil.copytree(folders[0], folder)
    for path in (*manifests(folder), folder / "journal.jsonl"):
        path.unlink()
    plan = json.loads((folder / "plan.json").read_text())
    del plan["format"]
    (folder / "plan.json").write_text(json.dumps(plan))
    assert repr(read_result(folder).rows[:3]) == repr(rows[:3])  # the fourth has inf, null in JSON
    assert "; jgd report still reads " in _output(capsys, "sweep", "--resume", folder)[1]
