"""The lock of a folder: races, the name of its holder, and locks that dead processes leave."""

import contextlib
import re
import socket
import subprocess
import sys
import time

import pytest
from test_training import line_task

import jgd
from jgd import cli
from jgd.tuning.lock import locked

# For each line of input: wait until a moment, try to lock a folder, print the outcome, and release
# the lock at the next line.
RACER = """
import sys, time
from pathlib import Path
from jgd.tuning import lock
if sys.argv[1] == "creation":
    lock.fcntl = None
for line in sys.stdin:
    folder, moment = line.split()
    time.sleep(max(0, float(moment) - time.time()))
    try:
        with lock.locked(Path(folder)):
            print("won", flush=True)
            sys.stdin.readline()
    except BlockingIOError as error:
        print(error, flush=True)
        sys.stdin.readline()
    print("out", flush=True)
assert "jax" not in sys.modules
"""


@contextlib.contextmanager
def _racers(how, number):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", RACER, how]
    racers = [subprocess.Popen(command, **pipes) for _ in range(number)]
    yield racers
    for racer in racers:
        racer.stdin.close()
        assert racer.wait() in (0, -9)
        racer.stdout.close()


def _send(racers, line):
    for racer in racers:
        racer.stdin.write(f"{line}\n")
        racer.stdin.flush()
    return [racer.stdout.readline() for racer in racers]


def _in_use(pid):
    here = re.escape(socket.gethostname())
    return rf"is in use by a sweep on {here}, pid {pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"


def _leave_a_dead_holder(how, folder):
    with _racers(how, 1) as (racer,):
        assert _send([racer], f"{folder} 0") == ["won\n"]
        racer.kill()
        racer.wait()
    assert any(folder.iterdir())


@pytest.mark.parametrize("how", ["system", "creation"])
def test_fifty_races_have_fifty_winners(how, tmp_path):
    _leave_a_dead_holder(how, tmp_path / "0")
    leftovers = {file.name: file.read_bytes() for file in (tmp_path / "0").iterdir()}
    with _racers(how, 3) as racers:
        for race in range(50):
            folder = tmp_path / str(race)
            if race % 2:  # in the other races, the lock must create the folder
                folder.mkdir()
                for name, content in leftovers.items():
                    (folder / name).write_bytes(content)
            answers = _send(racers, f"{folder} {time.time() + 0.01}")
            assert sum(line == "won\n" for line in answers) == 1, answers
            assert all("in use by" in line for line in answers if line != "won\n"), answers
            _send(racers, "")
            assert folder.exists() or not race % 2  # no lock deletes a folder of others


@pytest.mark.parametrize("how", ["system", "creation"])
def test_the_holder_is_named_and_a_process_may_lock_twice(how, tmp_path, monkeypatch):
    if how == "creation":
        monkeypatch.setattr("jgd.tuning.lock.fcntl", None)
    with _racers(how, 1) as (racer,):
        with locked(tmp_path):
            with locked(tmp_path / ".." / tmp_path.name):
                pass
            (answer,) = _send([racer], f"{tmp_path} 0")  # the inner context released nothing
            _send([racer], "")
        assert re.search(_in_use("\\d+"), answer)
        assert _send([racer], f"{tmp_path} 0") == ["won\n"]
        with pytest.raises(BlockingIOError, match=_in_use(racer.pid)), locked(tmp_path):
            pass
        _send([racer], "")
        with locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_a_holder_on_another_host_counts_as_alive(tmp_path, monkeypatch):
    _leave_a_dead_holder("creation", tmp_path)
    monkeypatch.setattr("jgd.tuning.lock.fcntl", None)
    for name in ("socket.gethostname", "jgd.tuning.lock._boot"):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(name, lambda: "elsewhere")
            with pytest.raises(BlockingIOError, match=r"delete .*lock\.held"), locked(tmp_path):
                pass
    with locked(tmp_path):
        pass


def test_a_sweep_that_runs_is_neither_resumed_nor_overwritten(tmp_path, monkeypatch, capsys):
    folder, lanes = tmp_path / "run", jgd.grid(jgd.sgd, learning_rate=[0.1])
    with _racers("system", 1) as (racer,):
        _send([racer], f"{folder} 0")  # it has not written anything yet
        for options in (dict(folder=folder), dict(folder=folder, resume=True), dict(extend=folder)):
            with pytest.raises(BlockingIOError, match=_in_use(racer.pid)):
                jgd.sweep(line_task(), lanes, 8, **options)
        for option in ("--out", "--resume"):
            monkeypatch.setattr(sys, "argv", ["jgd", "sweep", option, str(folder)])
            with pytest.raises(SystemExit):
                cli.main()
            (line,) = capsys.readouterr().err.splitlines()
            assert re.search(_in_use(racer.pid), line)
        assert [path.name for path in folder.iterdir()] == ["lock"]
        _send([racer], "")

    def fails(plan, report):
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        jgd.sweep(line_task(), lanes, 8, folder=folder, on_report=fails)
    result = jgd.sweep(line_task(), lanes, 8, folder=folder, resume=True)  # that error released it
    assert result.rows[0]["ended"] == "finished"


def test_a_refused_sweep_leaves_a_folder_as_it_was(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileExistsError, match="is not empty"):
        jgd.sweep(line_task(), jgd.grid(jgd.sgd, learning_rate=[0.1]), 8, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
