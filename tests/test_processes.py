"""One sweep in two processes on the loopback address, which is resumed after one is killed."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import cached_environment

TASK = """
import itertools, sys
sys.path.insert(0, {tests!r})
import jax, jgd, numpy as np
from test_training import line_task

def _breaks(process):
    task = line_task()
    def batches():
        for step in itertools.count():
            if step == 40 and jax.process_index() == process:
                raise OSError("no more data")
            yield tuple(map(np.asarray, task.batch(step)))
    return task._replace(batch=jgd.stream(batches))

breaks_0, breaks_1 = lambda: _breaks(0), lambda: _breaks(1)
"""
COMMAND = (
    "sweep processes_task:line_task --optimizer adam --set learning_rate=log:1e-4:1:20 --steps 64"
    " --seeds 2 --width 16 --halving 2 --min-steps 16 --checkpoint-every 0"
)


def _start(folder, *more, devices=2):
    (folder / "processes_task.py").write_text(TASK.format(tests=os.path.dirname(__file__)))
    environment = {
        **cached_environment(),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "jgd.cli", *more]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def _together(folder, *arguments):
    """Start two processes of a sweep, on a port that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for process in ("0", "1"):
        several = ["--coordinator", address, "--processes", "2", "--process", process]
        yield _start(folder, *arguments, *several)


def _loss(folder):
    with (folder / "results.csv").open() as file:
        return {
            row["learning_rate"]: (row["ended"], float(row["loss"])) for row in csv.DictReader(file)
        }


@pytest.mark.slow
def test_two_processes_run_one_sweep(tmp_path):
    alone = _start(tmp_path, *COMMAND.split(), "--out", "alone", devices=4)
    output = alone.communicate()
    assert alone.returncode == 0, output
    both = list(_together(tmp_path, *COMMAND.split(), "--out", "both"))
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "lane-steps per second" in outputs[0][0]
    assert "lane-steps per second" not in outputs[1][0]  # only process 0 prints
    for rate, (ended, loss) in _loss(tmp_path / "alone").items():
        np.testing.assert_allclose(_loss(tmp_path / "both")[rate][1], loss, rtol=1e-4)
        assert _loss(tmp_path / "both")[rate][0] == ended

    pair = list(
        _together(tmp_path, *COMMAND.replace("--steps 64", "--steps 4000").split(), "--out", "lost")
    )
    while not (tmp_path / "lost" / "manifest-1.json").exists():
        assert pair[0].poll() is None, pair[0].communicate()
        time.sleep(0.05)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pair[1].pid)], capture_output=True, text=True
    )
    os.kill(int(children.stdout), signal.SIGKILL)
    for process in pair:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "a process of the sweep was lost" in errors
        assert "jgd sweep --resume lost" in errors
    reference = _start(
        tmp_path, *COMMAND.replace("--steps 64", "--steps 4000").split(), "--out", "reference"
    )
    resumed = _start(tmp_path, "sweep", "--resume", "lost")  # on fewer devices
    for process in (reference, resumed):
        output = process.communicate()
        assert process.returncode == 0, output
    for rate, (ended, loss) in _loss(tmp_path / "reference").items():
        np.testing.assert_allclose(_loss(tmp_path / "lost")[rate][1], loss, rtol=1e-3, atol=1e-6)
        assert _loss(tmp_path / "lost")[rate][0] == ended


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_an_error_on_one_process_ends_all_with_one_line(process, tmp_path):
    command = COMMAND.replace("line_task", f"breaks_{process}").split()
    both = list(_together(tmp_path, *command, "--out", "both"))
    for one in both:
        _, errors = one.communicate(timeout=120)
        assert one.returncode == 2
        (line,) = [line for line in errors.splitlines() if line.startswith("jgd: ")]
        assert "no more data" in line


def test_several_processes_need_a_folder(tmp_path):
    process = _start(tmp_path, "sweep", "--coordinator", "127.0.0.1:1")
    assert "--coordinator needs --out" in process.communicate()[1]
