"""A sweep that dies at any file operation or turn writes the same bytes once it is resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from test_training import line_task

import jgd
from jgd.tuning import folder as folders
from jgd.tuning.segment import read_manifest, sealed

RATES = np.geomspace(1e-3, 0.3, 5)
WRITTEN = ("plan.json", "journal.jsonl", "results.csv", "results.json", "curves.npz")
TASK = line_task()  # one task, so that all sweeps share their compiled programs


class _Death(BaseException):
    """Raised to simulate the death of the process."""


class _Faults:
    """Counter of the file operations of `Folder`, which raises `_Death` at one of them.

    Later operations raise it too, as in a dead process. Saving a block counts as one operation:
    the test with kill -9 covers deaths inside orbax.
    """

    def __init__(self, monkeypatch):
        self.count, self.fatal = 0, None
        for name, functions in (("os", "fsync replace truncate"), ("shutil", "rmtree")):
            module = getattr(folders, name)
            counted = {n: self._counted(getattr(module, n)) for n in functions.split()}
            monkeypatch.setattr(folders, name, types.SimpleNamespace(**{**vars(module), **counted}))
        for name in ("mkdir", "unlink"):
            monkeypatch.setattr(Path, name, self._counted(getattr(Path, name)))
        checkpointer = folders._checkpointer

        def saving():
            orbax = checkpointer()
            save = self._counted(orbax.save)

            def finished(*args):  # a thread of orbax must not outlive the process
                save(*args)
                orbax.wait_until_finished()

            orbax.save = finished
            return orbax

        monkeypatch.setattr(folders, "_checkpointer", saving)
        opened = Path.open
        writes = lambda path, mode="r", *more, **options: (
            _Torn(self, opened(path, mode, *more, **options))
            if set(mode) & set("aw")
            else opened(path, mode, *more, **options)
        )
        monkeypatch.setattr(Path, "open", writes)

    def _counted(self, function):
        def call(*args, **kwargs):
            self.step()
            return function(*args, **kwargs)

        return call

    def step(self):
        self.count += 1
        if self.fatal is not None and self.count >= self.fatal:
            raise _Death

    def dies(self, fatal, function):
        """Return whether `function` reaches the operation with the number `fatal`, and dies."""
        self.count, self.fatal, died = 0, fatal, False
        try:
            function()
        except _Death:
            died = True
        finally:
            self.fatal = None
        return died


class _Torn:
    """A file to which a dying process writes only half of its data."""

    def __init__(self, faults, file):
        self.faults, self.file = faults, file

    def write(self, data):
        try:
            self.faults.step()
        except _Death:
            self.file.write(data[: len(data) // 2])
            raise
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def _sweep(folder):
    """Start the sweep, or resume it, as the command line does."""
    lanes = {"adam": jgd.grid(jgd.adam, learning_rate=RATES)}
    options = dict(width=2, report_every=8, halving=jgd.successive_halving(2, 8), stop=3, keep=2)
    resume = (folder / "plan.json").exists()
    return jgd.sweep(
        TASK, lanes, 24, folder=folder, resume=resume, checkpoint_every=0, seeds=2, **options
    )


def _bytes(folder):
    return {name: (folder / name).read_bytes() for name in WRITTEN}


def _states(result):
    return jax.tree.map(np.asarray, [best.state for best in result.kept])


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The result and the files of a sweep that does not die."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    return _sweep(folder), _bytes(folder)


def _assert_ends_the_same(folder, reference):
    result, written = reference
    jax.tree.map(np.testing.assert_array_equal, _states(_sweep(folder)), _states(result))
    assert _bytes(folder) == written


@pytest.mark.parametrize(
    "stride", [pytest.param(1, marks=pytest.mark.slow), pytest.param(17, id="some")]
)
def test_a_fault_at_each_operation_on_files(stride, reference, tmp_path, monkeypatch):
    faults = _Faults(monkeypatch)
    assert not faults.dies(None, lambda: _sweep(tmp_path / "count"))
    operations = faults.count
    assert operations > 50
    for at in range(1, operations, stride):
        folder = tmp_path / str(at)
        if faults.dies(at, lambda folder=folder: _sweep(folder)):
            faults.dies(at % 13 + 1, lambda folder=folder: _sweep(folder))  # the resume dies too
        _assert_ends_the_same(folder, reference)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_fault_at_each_turn(reference, tmp_path):
    append, turns, died = folders.Folder.append, 0, True
    while died:
        remaining, died = [turns], False

        def die(self, events, remaining=remaining):
            append(self, events)
            remaining[0] -= 1
            if remaining[0] < 0:
                raise _Death

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(folders.Folder, "append", die)
            try:
                _sweep(tmp_path / str(turns))
            except _Death:
                died = True
        _assert_ends_the_same(tmp_path / str(turns), reference)
        turns += 1
    assert turns > 5


def test_a_damaged_older_checkpoint_does_not_matter(reference, tmp_path):
    _sweep(tmp_path / "run")
    oldest = min((tmp_path / "run").glob("manifest-*.json"), key=lambda p: p.stat().st_mtime_ns)
    oldest.write_text("{")
    _assert_ends_the_same(tmp_path / "run", reference)


def test_a_checkpoint_without_the_state_of_a_lane_is_rejected(tmp_path):
    append, turns = folders.Folder.append, iter(range(4))

    def die(self, events):
        append(self, events)
        if next(turns, None) is None:
            raise _Death

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(folders.Folder, "append", die)
        patched.setattr(folders.Folder, "busy", lambda self: False)  # a checkpoint at each turn
        with pytest.raises(_Death):
            _sweep(tmp_path / "run")
    for path in (tmp_path / "run").glob("manifest-*.json"):
        path.write_text(json.dumps(sealed(read_manifest(path) | {"blocks": {}})))
    with pytest.raises(
        ValueError, match=r"resume: .* has no state for \d+ lanes that have started"
    ):
        _sweep(tmp_path / "run")


@pytest.mark.parametrize("damage", ["journal", "state", "manifest"])
def test_resume_uses_the_checkpoint_before_a_damaged_one(damage, reference, tmp_path):
    for attempt in range(10):
        folder = tmp_path / f"run-{attempt}"
        _sweep(folder)
        manifests = list(folder.glob("manifest-*.json"))
        covered = {read_manifest(path)["journal"]["bytes"] for path in manifests}
        if len(covered) == 2:  # a busy machine may write both checkpoints after the last report
            break
    newest = max(manifests, key=lambda p: int(p.stem.partition("-")[2]))
    if damage == "manifest":
        newest.write_text(newest.read_text()[:40])
    elif damage == "journal":
        journal = folder / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[: min(covered)])
    else:
        block = max((folder / "states").iterdir(), key=lambda p: int(p.name.partition("-")[2]))
        next(x for x in block.rglob("*") if x.is_file() and x.stat().st_size).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"checkpoint \d+: .*The checkpoint before it is used"):
        _assert_ends_the_same(folder, reference)


PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
import jgd.tuning.sweep, test_faults
from pathlib import Path
for name in ("append", "checkpoint"):  # slowly, so that kills hit every part of a turn
    def slowly(*args, function=getattr(test_faults.folders.Folder, name)):
        time.sleep(0.05)
        return function(*args)
    setattr(test_faults.folders.Folder, name, slowly)
test_faults._sweep(Path({folder!r}))
"""


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_ends_the_same(reference, tmp_path):
    program = PROGRAM.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "run"))
    rng, kills = random.Random(0), 0
    while kills < 20:
        process = subprocess.Popen([sys.executable, "-c", program])
        journal = tmp_path / "run" / "journal.jsonl"
        size = journal.stat().st_size if journal.exists() else -1
        while process.poll() is None and journal.exists() and journal.stat().st_size == size:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        elif (tmp_path / "run" / "results.csv").exists():
            _assert_ends_the_same(tmp_path / "run", reference)
            shutil.rmtree(tmp_path / "run")
    _assert_ends_the_same(tmp_path / "run", reference)
