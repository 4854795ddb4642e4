"""The command line: the default sweep, one's own task and optimizer, and errors in one line."""

import csv
import errno
import importlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import jgd.tuning.sweep
from jgd import cli
from jgd.tuning import console, plots
from jgd.tuning.engine import Engine
from jgd.tuning.folder import Folder
from jgd.tuning.poll import Clock

TASK = """
import jax, jax.numpy as jnp, numpy as np, jgd

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(12, 2)
Y = X @ np.array([1.0, -2.0], np.float32) + 0.5

def task():
    init = lambda key: {"w": jax.random.normal(key, (2,)), "b": jnp.zeros(())}
    loss = lambda params, batch: jnp.mean((batch[0] @ params["w"] + params["b"] - batch[1]) ** 2)
    batch = jgd.minibatches((X, Y), 4, jax.random.key(0))
    return jgd.Task(init, loss, batch, lambda params: {"loss": loss(params, (X, Y))})

ready = task()

def build(peak, warmup):
    return jgd.adam(jgd.warmup_cosine_decay_schedule(0.0, peak, warmup, 50))

number = 3

def needs(x):
    return x

def fails(rate):
    raise RuntimeError("no such rate")

def broken():
    return ready._replace(loss=lambda params, batch: batch[0] @ params["b"][:, None])
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sys.modules.pop("mine", None)
    return tmp_path


def _jgd(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["jgd", *arguments])
    cli.main()


def test_help_needs_no_jax():
    program = (
        "import sys; sys.argv = ['jgd', 'sweep', '--help']\n"
        "from jgd import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules and 'optax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--optimizer" in done.stdout
    assert "handwritten digits" in done.stdout


def test_a_task_and_an_optimizer_of_ones_own(project, monkeypatch, capsys):
    _jgd(
        monkeypatch,
        *("sweep", "mine:task", "--optimizer", "adam", "--optimizer", "mine:build"),
        *("--set", "learning_rate=log:1e-3:1e-1:5", "--set", "b1=0.8,0.9"),
        *("--set", "peak=0.1,0.2", "--set", "warmup=lin:2:10:3"),
        *("--steps", "40", "--seeds", "2", "--out", "out"),
    )
    shown = capsys.readouterr().out
    assert "32 trainings of 40 steps: 16 settings in 2 compiled programs" in shown
    assert "lane-steps per second" in shown
    out = project / "out"
    for picture in ("sensitivity.png", "curves.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 16
    assert {row["optimizer"] for row in rows} == {"adam", "build"}
    losses = [float(row["loss"]) for row in rows]
    assert losses == sorted(losses)
    assert json.loads((out / "results.json").read_text())["metric"] == "loss"


def test_halving_report_and_resume(project, monkeypatch, capsys):
    _jgd(
        monkeypatch,
        *("sweep", "mine:task", "--optimizer", "adam", "--set", "learning_rate=log:1e-3:1:16"),
        *("--steps", "64", "--seeds", "2", "--out", "cut", "--halving", "2", "--min-steps", "8"),
        *("--patience", "3", "--checkpoint-every", "0"),
    )
    shown = capsys.readouterr().out
    assert "cut at 8" in shown or "finished at 64" in shown
    rows = (project / "cut" / "results.csv").read_bytes()
    assert rows.count(b",cut,") >= 8
    assert (project / "cut" / "survivors.png").exists()
    _jgd(monkeypatch, "report", "cut")
    again = capsys.readouterr().out
    table = lambda text: text[text.index("the best 16") : text.index("in cut:")].partition(
        "lane-steps"
    )[0]
    assert table(again).split()[:40] == table(shown).split()[:40]
    (project / "cut" / "results.csv").unlink()
    _jgd(monkeypatch, "sweep", "--resume", "cut")
    assert (project / "cut" / "results.csv").read_bytes() == rows
    for wrong, message in (
        (["report", "none"], "none holds no sweep: there is no plan.json"),
        (["sweep", "--resume", "none"], "holds no sweep that `jgd sweep` started"),
        (
            ["sweep", "--halving", "2", "--hyperband", "3"],
            "--halving must not be given with --hyperband",
        ),
        (["sweep", "--min-steps", "3"], "--min-steps needs --halving or --hyperband"),
        (["sweep", "--optimizer", "adam", "--halving", "1"], "--halving must be above 1, got 1"),
    ):
        with pytest.raises(SystemExit):
            _jgd(monkeypatch, *wrong)
        assert message in capsys.readouterr().err


def test_optuna_report_and_resume(project, monkeypatch, capsys):
    _jgd(
        monkeypatch,
        *("sweep", "mine:task", "--optimizer", "adam", "--optuna", "34", "--out", "out"),
        *("--set", "learning_rate=log:1e-3:1:2", "--set", "b1=lin:0.5:0.9:2"),
        *("--set", "nesterov=true,false", "--steps", "20", "--seeds", "2"),
    )
    shown = capsys.readouterr().out
    assert "68 trainings of 20 steps: 34 settings in 2 compiled programs" in shown
    out = project / "out"
    assert (out / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [int(row["rank"]) for row in rows] == list(range(1, 35))
    assert {row["optimizer"] for row in rows} == {"adam nesterov=True", "adam nesterov=False"}
    assert all(1e-3 <= float(row["learning_rate"]) <= 1 for row in rows)
    assert all(0.5 <= float(row["b1"]) <= 0.9 for row in rows)
    before = (out / "results.csv").read_bytes()
    _jgd(monkeypatch, "report", "out")
    assert "the best 20 of 34 settings" in capsys.readouterr().out
    (out / "results.csv").unlink()
    _jgd(monkeypatch, "sweep", "--resume", "out")
    assert (out / "results.csv").read_bytes() == before


def test_the_options_best_order_target_and_sharpness(project, monkeypatch, capsys):
    _jgd(
        monkeypatch,
        *("sweep", "mine:task", "--optimizer", "sgd", "--set", "learning_rate=log:1e-3:1:6"),
        *("--steps", "40", "--seeds", "2", "--out", "out", "--best", "ever", "--order", "own"),
        *("--target", "0.1", "--sharpness"),
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "reached target at" in shown
    assert "± standard error of the mean of 2 seeds with an order of batches each" in shown
    assert (project / "out" / "sharpness.png").exists()
    rows = list(csv.DictReader((project / "out" / "results.csv").open()))
    assert list(rows[0])[:4] == ["rank", "tied", "optimizer", "learning_rate"]
    assert float(rows[0]["steps_to_target"]) <= float(rows[1]["steps_to_target"])
    assert float(rows[0]["sharpness"]) > 0


def _fails(monkeypatch, capsys, *arguments):
    """Run a command that fails, and return its one line of error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        _jgd(monkeypatch, *arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "save_plots", lambda *_: [])


SMALL = ("--optimizer", "sgd", "--set", "learning_rate=0.1,0.2", "--steps", "20", "--seeds", "1")


@pytest.mark.parametrize("out", ["empty", "new", "parent/new"])
def test_a_refused_sweep_leaves_no_files(out, project, monkeypatch, capsys):
    (project / "empty").mkdir()
    before = sorted(project.rglob("*"))
    arguments = ("sweep", "mine:task", *SMALL, "--metric", "los", "--out", out)
    line = _fails(monkeypatch, capsys, *arguments)
    assert line == "jgd: --metric must be one of loss, got 'los'"
    assert [x for x in sorted(project.rglob("*")) if "cache" not in str(x)] == before


def test_a_resumed_sweep_must_have_the_same_options(project, no_pictures, monkeypatch, capsys):
    _jgd(monkeypatch, "sweep", "mine:task", *SMALL, "--out", "a")
    for changed, option, before, now in (
        (["--steps", "500"], "--steps", "20", "500"),
        (["--steps=1000"], "--steps", "20", "1000"),  # the default, but given
        (["--set", "learning_rate=1"], "--set", "learning_rate=0.1,0.2", "learning_rate=1"),
        (["--key", "1"], "--key", "0", "1"),
        (["--halving", "2"], "--halving", "None", "2.0"),
        (["--report-every", "5"], "--report-every", "None", "5"),
        (["--sharpness"], "--sharpness", "False", "True"),
        (["--out", "b"], "--out", "a", "b"),
        (["mine:ready"], "TASK", "mine:task", "mine:ready"),
    ):
        line = _fails(monkeypatch, capsys, "sweep", "--resume", "a", *changed)
        expected = f"{option} must be {before} as in the sweep that --resume continues, got {now}"
        assert line == f"jgd: {expected}"
    _jgd(monkeypatch, *("sweep", "mine:task", *SMALL, "--resume", "a", "--out", "a"))
    _jgd(monkeypatch, *("sweep", "--resume", "a", "--top", "1", "--checkpoint-every", "3"))
    assert "the best 1 of 2 settings" in capsys.readouterr().out


def test_a_sweep_that_fails_names_the_command_to_resume_it(
    project, no_pictures, monkeypatch, capsys
):
    _jgd(monkeypatch, "sweep", "mine:task", *SMALL, "--out", "reference")
    hint = "resume with: jgd sweep --resume "

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def ctrl_c_twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    for out, where, effect in (
        ("disk", (Folder, "append"), full),
        ("table", (Folder, "write_result"), full),
        ("early", (jgd.tuning.sweep, "prepare"), ctrl_c_twice),
        ("twice", (Engine, "begin"), ctrl_c_twice),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(*where, effect)
            line = _fails(patched, capsys, "sweep", "mine:task", *SMALL, "--out", out)
        assert f"{hint}{out}" in line
        assert ("No space left on device" in line) == (effect is full)
        assert "interrupted" in line or effect is full
        _jgd(monkeypatch, "sweep", "--resume", out)
        table = (project / out / "results.csv").read_bytes()
        assert table == (project / "reference" / "results.csv").read_bytes()


def test_an_interrupted_sweep_prints_a_table_only_after_a_report(
    project, no_pictures, monkeypatch, capsys
):
    poll = Clock.__call__
    for reports in (0, 2):
        calls = itertools.count()

        def interrupted(clock, events, calls=calls, reports=reports):
            if next(calls) == reports:
                signal.raise_signal(signal.SIGINT)
            return poll(clock, events)

        monkeypatch.setattr(Clock, "__call__", interrupted)
        with pytest.raises(SystemExit):
            _jgd(monkeypatch, *("sweep", "mine:task", *SMALL, "--out", f"after {reports}"))
        shown = capsys.readouterr()
        assert f"interrupted; resume with: jgd sweep --resume 'after {reports}'" in shown.err
        assert ("best" in shown.out) == bool(reports)


def test_narrow_tables_show_the_whole_metric(project):
    long = jgd.grid(lambda peak, warmup: jgd.adam(peak + 0 * warmup), peak=[0.1], warmup=[5, 10])
    adam = jgd.grid(jgd.adam, learning_rate=[0.1], b1=[0.9], b2=[0.99])
    groups = {"a_cosine_decay_with_warmup_and_adam": long, "adam": adam}
    result = jgd.sweep(importlib.import_module("mine").ready, groups, 20, seeds=2)
    shown = [console._spread(row, result.metric) for row in result.rows]
    for width in (60, 80, 120):
        file = io.StringIO()
        console.print_result(Console(file=file, width=width), result, 3)
        lines = file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert all(sum(number in line for line in lines) >= 1 for number in shown)
        assert ("no room for" in file.getvalue()) == (width < 120)


def test_a_sweep_that_was_killed_before_its_plan_starts_again(project, monkeypatch, capsys):
    options = ("--optimizer", "sgd", "--set", "learning_rate=0.1", "--steps", "20", "--seeds", "1")
    _jgd(monkeypatch, "sweep", "mine:task", *options, "--out", "reference")
    (project / "early").mkdir()
    (project / "reference" / "command.json").rename(project / "early" / "command.json")
    _jgd(monkeypatch, "sweep", "--resume", "early")
    for name in ("plan.json", "results.csv"):
        resumed, reference = (project / folder / name for folder in ("early", "reference"))
        assert resumed.read_bytes() == reference.read_bytes()


@pytest.mark.parametrize(
    ("command", "file"), [(["sweep", "--resume"], "command.json"), (["report"], "results.json")]
)
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_the_error_about_a_damaged_file_is_one_line_with_its_name(
    command, file, content, project, monkeypatch, capsys
):
    for name in ("plan.json", "command.json", "results.json", "curves.npz"):
        (project / name).write_text("{}")
    (project / file).write_text(content)
    with pytest.raises(SystemExit):
        _jgd(monkeypatch, *command, ".")
    error = capsys.readouterr().err
    assert file in error
    assert len(error.splitlines()) == 1


def test_an_optax_factory_can_be_swept(project, monkeypatch, capsys):
    _jgd(
        monkeypatch,
        *("sweep", "mine:ready", "--optimizer", "optax:lion"),
        *("--set", "learning_rate=0.01,0.1", "--steps", "20", "--seeds", "1"),
    )
    assert "lion" in capsys.readouterr().out
    assert len(list(Path("runs").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digitz"], "no task named 'digitz'; did you mean digits?"),
        (["min:task"], "task min:task: no module named min; did you mean mine?"),
        (["./mine.py:task"], "task must be module:name, got './mine.py:task'; did you mean mine:t"),
        (
            ["mine.py:broken"],
            "module:name, got 'mine.py:broken'; did you mean mine:broken?",
        ),
        (["mine.py"], "no task named 'mine.py'; did you mean mine:task?"),
        (["--out", "mine.py"], "jgd: --out must be a folder, got mine.py: mine.py is a file"),
        (["jax.nmpy:task"], "task jax.nmpy:task: no module named jax.nmpy; did you mean numpy?"),
        (["mine:needs"], "task mine:needs: TypeError: needs() missing 1 required"),
        (["mine:broken"], "(mine.py, line "),
        (["--optimizer", "mine:fails", "--set", "rate=1"], "no such rate (mine.py, line "),
        (["--optimizer=adam", "--optimizer=adam"], "--optimizer must have distinct names, got ad"),
        (["--set", "learning_rate=log:1e-3:inf:4"], "must be log:LOW:HIGH:COUNT with finite"),
        (["mine:tusk"], "task mine:tusk: mine has no tusk; did you mean task?"),
        (["mine:number"], "task mine:number must be a jgd.Task or jgd.Run, got 3"),
        (["--optimizer", "adm"], "no optimizer named 'adm'; did you mean 'adam'?"),
        (["--optimizer", "optax:lyon"], "optimizer optax:lyon: optax has no lyon; did you mean li"),
        (["--optimizer", "mine:number"], "optimizer mine:number must be a function, got 3"),
        (["--optimizer", "mine:build"], "--set must give values for an argument of mine:build"),
        (["--set", "learning_rat=0.1"], "has an argument learning_rat; did you mean learning_rate"),
        (["--set", "learning_rate"], "--set must be NAME=VALUES, such as b1=0.8,0.9, got 'learn"),
        (["--set", "learning_rate=lug:1:2:3"], "got lug:1:2:3; did you mean log?"),
        (["--set", "learning_rate=log:1:2"], "--set learning_rate must be log:LOW:HIGH:COUNT"),
        (["--set", "learning_rate=log:0:2:3"], "must have 0 < LOW < HIGH, got log:0:2:3"),
        (
            ["--optimizer", "adam", "--set", "b1=0.9,1.5"],
            "adam: b1 must be in [0, 1), got 1.5",
        ),
        (["--optuna", "4"], "--optuna needs one --optimizer, got 6"),
        (
            ["--optuna", "4", "--optimizer=sgd", "--budget=9"],
            "--budget must not be given with",
        ),
        (["--optuna", "0", "--optimizer=sgd"], "jgd: --optuna must be at least 1, got 0"),
        (["--optuna=4", "--optimizer=sgd", "--set", "momentum=lin:1:1:2"], "must have LOW < HIGH"),
        (["--seeds", "0"], "jgd: --seeds must be at least 1, got 0"),
        (["--patience", "-1"], "jgd: --patience must be a step count, at least 0, got -1"),
        (
            ["--hyperband", "3", "--min-steps", "9"],
            "--halving or --hyperband must have distinct r",
        ),
        (["--optimizer", "adam", "--steps", "2"], "jgd: --steps must be at least 4, got 2"),
        (["mine:task", "--metric", "los", "--optimizer", "sgd"], "--metric must be one of loss"),
    ],
)
def test_errors_are_one_line_with_the_closest_valid_name(
    arguments, message, project, monkeypatch, capsys
):
    with pytest.raises(SystemExit) as ended:
        _jgd(monkeypatch, "sweep", *arguments, *([] if "--steps" in arguments else ["--steps=9"]))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, error
    assert not list(Path("runs").glob("*"))  # no folder is left behind


@pytest.mark.slow
def test_the_default_job(tmp_path, monkeypatch):
    """`jgd sweep` without arguments trains all six optimizers to an accuracy above 0.95.

    DEFAULT_JOB may name a folder with the files of such a sweep in `run` and its output in
    `screen`.
    """

    folder = Path(os.environ.get("DEFAULT_JOB", tmp_path))
    if folder == tmp_path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("XLA_FLAGS")
        jgd = Path(sys.executable).parent / "jgd"
        command = [str(jgd), "sweep", "--out", str(tmp_path / "run")]
        with (tmp_path / "screen").open("w") as screen:
            done = subprocess.run(
                command, stdout=screen, stderr=subprocess.PIPE, text=True, cwd=tmp_path
            )
        assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((folder / "run" / "results.csv").open()))
    assert len(rows) == 6 * 64
    best = {row["optimizer"]: float(row["accuracy"]) for row in reversed(rows)}
    assert len(best) == 6
    assert min(best.values()) > 0.95
    assert {row["verdict"] for row in rows} == {"too small", "good", "oscillating", "diverged"}
    assert "1,152 trainings of 1,000 steps" in (folder / "screen").read_text()
