"""Halving, early stopping and budgets; a killed sweep resumes where it stopped."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import events, prepare_sweep
from test_training import line_task
from test_tuning import run_with_scores

import jgd
from jgd.diagnosis import LossStatistics
from jgd.stopping import early_stopping
from jgd.tuning import devices, sweep
from jgd.tuning.events import CUT, DIVERGED, ENDINGS, FINISHED, Cut, Report
from jgd.tuning.ledger import Ledger
from jgd.tuning.pack import pack_tiles
from jgd.tuning.plan import Group, Plan

RATES = np.geomspace(1e-4, 1, 32)


def _adam(n=32):
    return {"adam": jgd.grid(jgd.adam, learning_rate=RATES[:n])}


# --- pure decisions --------------------------------------------------------------------------


def test_rungs_and_brackets():
    assert jgd.successive_halving(2, 125).brackets(1000) == [[125, 250, 500]]
    assert jgd.successive_halving(3, 37).brackets(1000) == [[37, 111, 333]]  # 999 is too late
    assert jgd.successive_halving(3).brackets(1000) == [[37, 111, 333]]
    first, *_, last = brackets = jgd.hyperband(3, 37).brackets(1000)
    assert first == [37, 111, 333]
    assert last == []
    shares = jgd.hyperband(3, 37).assign(1000, 1000)
    counts = np.bincount(shares, minlength=len(brackets))
    assert counts.sum() == 1000
    assert (np.diff(counts) < 0).all()  # brackets with earlier rungs get more settings
    np.testing.assert_array_equal(shares, jgd.hyperband(3, 37).assign(1000, 1000))
    for wrong in (dict(eta=1.0), dict(min_steps=0), dict(within="seed")):
        with pytest.raises(ValueError, match=f"successive_halving: {next(iter(wrong))} must be"):
            jgd.successive_halving(**wrong)


def test_packed_tiles_are_cheapest_with_little_padding():
    widths = [64, 32, 16, 8, 4, 2, 1]
    costs = [w + 8.0 for w in widths]
    for lanes in range(1, 300):
        assert lanes <= sum(pack_tiles(lanes, widths, costs)) <= max(lanes, 1.1 * lanes)
    cost = lambda tiles: sum(w + 8.0 for w in tiles)
    for lanes in range(1, 20):  # compared with all choices of at most four tiles
        tried = [
            (a, b, c, d)
            for a in (0, *widths)
            for b in (0, *widths)
            for c in (0, *widths)
            for d in (0, *widths)
            if lanes <= a + b + c + d <= max(lanes, int(1.1 * lanes))
        ]
        best = min(cost([w for w in tiles if w]) for tiles in tried)
        assert cost(pack_tiles(lanes, widths, costs)) <= best


# --- halving ---------------------------------------------------------------------------------


def test_halving_cuts_the_worse_half_at_each_rung():
    run, lanes = run_with_scores([[float(k), float(k)] for k in [5, 3, 8, 1, 7, 2, 6, np.nan]])
    halving = jgd.successive_halving(2, 5)
    result = jgd.sweep(run, lanes, 40, seeds=2, width=4, halving=halving, mode="min")
    scores = [row["score"] for row in result.rows]
    np.testing.assert_array_equal(scores, [1, 2, 3, 5, 6, 7, 8, np.nan])
    assert [row["ended"] for row in result.rows] == ["finished"] + ["cut"] * 7
    assert [row["at"] for row in result.rows] == [40, 20, 10, 10, 5, 5, 5, 5]
    assert float(result.best.state) == 1.0


def test_survivors_train_as_without_halving():
    plain = jgd.sweep(line_task(), _adam(), 64, width=8, report_every=8)
    halved = jgd.sweep(
        line_task(), _adam(), 64, width=8, report_every=8, halving=jgd.successive_halving(2, 8)
    )
    survivors = [row for row in halved.rows if row["ended"] == "finished"]
    assert len(survivors) == 4
    loss = {row["learning_rate"]: row["loss"] for row in plain.rows}
    for row in survivors:  # widths may differ, so results agree up to rounding
        np.testing.assert_allclose(row["loss"], loss[row["learning_rate"]], rtol=1e-4)
    assert halved.plan.lane_steps == 32 * 8 + 16 * 8 + 8 * 16 + 4 * 32


@pytest.mark.parametrize("eta", [2, 3])
def test_padding_adds_at_most_a_tenth_of_the_lane_steps(eta):
    settings = {"adam": jgd.grid(jgd.adam, learning_rate=np.geomspace(1e-4, 1, 250))}
    prepared = prepare_sweep(
        line_task(), settings, 54, width=16, halving=jgd.successive_halving(eta, 2)
    )
    assert list(events(prepared))
    assert prepared.sweep.schedule.lane_steps <= 1.1 * prepared.plan.lane_steps


def test_the_host_holds_few_states_that_a_rung_will_cut():
    settings = {"adam": jgd.grid(jgd.adam, learning_rate=np.geomspace(1e-4, 1, 128))}
    prepared = prepare_sweep(
        line_task(), settings, 64, width=8, halving=jgd.successive_halving(4, 8)
    )
    most = 0
    for _ in events(prepared):
        if prepared.sweep.schedule.round == 0:
            most = max(most, len(prepared.sweep.pool.lanes()))
    assert 32 <= most <= 1.25 * 32 + 8
    result = jgd.sweep(line_task(), settings, 64, width=8, halving=jgd.successive_halving(4, 8))
    assert [row["ended"] for row in result.rows].count("finished") == 32


def _plan(settings, seeds=1, metric="score", mode="max", **options):
    groups = [Group(name, "", {}, {}, count) for name, count in settings.items()]
    return Plan(
        **dict(steps=20, reports=[5, 10, 20], rounds=[20], groups=groups, seeds=seeds),
        **dict(brackets=[0] * sum(settings.values()), metrics=[metric, "loss"], halving=None),
        **dict(stop=None, task="", versions={}, device="", at_once=1, metric=metric, mode=mode),
        **options,
    )


def _report(group, step, lanes, ended=0, **metrics):
    lanes = np.atleast_1d(lanes)
    metrics = {name: np.broadcast_to(x, lanes.shape).astype(float) for name, x in metrics.items()}
    ended = np.broadcast_to(np.int8(ended), lanes.shape)
    statistics = LossStatistics(*[np.zeros(lanes.shape)] * len(LossStatistics._fields))
    return Report(0, group, step, lanes, np.zeros(lanes.shape), metrics, ended, statistics)


def test_ranking_follows_its_rule():
    """Settings rank by steps, then the mean over seeds, then the loss, then their order."""
    plan = _plan({"a": 10, "b": 4}, seeds=3)
    ledger, rng = Ledger(plan), np.random.default_rng(0)
    for name, n in (("a", 30), ("b", 12)):
        values = rng.integers(0, 4, n).astype(float)
        values[rng.uniform(size=n) < 0.1] = np.nan
        ledger.apply(_report(name, 5, np.arange(n), score=values, loss=rng.integers(0, 3, n)))
        ledger.apply(Cut(5, {name: list(range(0, n, 7))}))

    def key(setting):
        lanes = range(3 * setting, 3 * setting + 3)
        cut = any(ledger.ending[lane] == CUT for lane in lanes)
        score = -np.mean([ledger.value[lane] for lane in lanes])
        loss = np.mean([ledger.loss[lane] for lane in lanes])
        return -5 if cut else -np.inf, np.inf if np.isnan(score) else score, loss, setting

    assert ledger.ranked(np.arange(14)).tolist() == sorted(range(14), key=key)


def test_halving_within_groups_keeps_the_best_of_each():
    run, good = run_with_scores([[1.0], [2.0], [3.0], [4.0]])
    _, bad = run_with_scores([[1.0], [2.0], [3.0], [4.0]])
    halving = jgd.successive_halving(2, 20, within="group")
    result = jgd.sweep(run, {"a": good, "b": bad}, 40, halving=halving)
    finished = [row["optimizer"] for row in result.rows if row["ended"] == "finished"]
    assert sorted(finished) == ["a", "a", "b", "b"]


def test_groups_of_one_structure_have_their_own_settings():
    groups = {
        "low": jgd.grid(jgd.sgd, learning_rate=[0.01, 0.02]),
        "high": jgd.grid(jgd.sgd, learning_rate=[0.1, 0.2]),
    }
    both = jgd.sweep(line_task(), groups, 20, width=2)
    for name, lanes in groups.items():
        alone = jgd.sweep(line_task(), {name: lanes}, 20, width=2)
        np.testing.assert_array_equal(both.curves[name].train_loss, alone.curves[name].train_loss)


def test_groups_of_one_structure_may_differ_in_shapes():
    steps = lambda n: (
        lambda rate: jgd.sgd(
            jgd.piecewise_constant(10 * (1 + jnp.arange(n)), rate * 0.5 ** jnp.arange(n + 1))
        )
    )
    groups = {str(n): jgd.grid(steps(n), rate=[0.05, 0.1]) for n in (2, 3)}
    assert len(jgd.sweep(line_task(), groups, 40).rows) == 4


@pytest.mark.parametrize("name", ["cholesky", "eigh", "inv", "qr", "slogdet", "svd", "solve"])
def test_decompositions_run_alone(name):
    """Batched decompositions in two programs can deadlock on a CPU, so each program runs alone."""
    function = getattr(jnp.linalg, name)
    if name == "svd":
        function = functools.partial(function, full_matrices=False)
    more = (jnp.ones(3),) if name == "solve" else ()

    def loss(params, batch):
        x = jnp.eye(3) + 0.1 * jnp.outer(params["w"][jnp.array([0, 1, 0])], jnp.ones(3))
        return sum(jnp.sum(y.real) for y in jax.tree.leaves(function(x @ x.T, *more)))

    prepared = prepare_sweep(line_task()._replace(loss=loss), _adam(4), 20)
    assert prepared.sweep.engine.programs[0].exclusive
    assert not prepare_sweep(line_task(), _adam(4), 20).sweep.engine.programs[0].exclusive


def test_a_setting_that_diverged_ranks_below_one_cut_later():
    ledger = Ledger(_plan({"a": 3}))
    ledger.apply(_report("a", 5, 1, DIVERGED, score=0.1))
    ledger.apply(_report("a", 10, 0, score=0.9))
    ledger.apply(Cut(10, {"a": [0]}))
    ledger.apply(_report("a", 20, 2, FINISHED, score=0.95))
    assert ledger.ranked(np.arange(3)).tolist() == [2, 0, 1]


def test_bad_options_are_rejected_before_compilation():
    for wrong, message in (
        (dict(halving=2), "halving must be jgd.successive_halving"),
        (dict(halving=jgd.successive_halving(2, 40)), "distinct rungs"),
        (dict(halving=jgd.successive_halving(1.01, 1)), "distinct rungs"),
        (dict(stop=early_stopping(3, mode="max")), "stop must have mode 'min', .* got 'max'"),
        (dict(stop=True), "stop must be .* or an integer, got True"),
        (dict(budget=0), "budget must be at least 1, got 0"),
        (dict(seconds=-1.0), "seconds must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            jgd.sweep(line_task(), _adam(4), 40, **wrong)


def test_shares_of_a_rung_may_need_fewer_tiles_together(monkeypatch):
    """43 lanes on two cores: shares of 22 and 21 lanes need tiles for 24 and 21, one too many."""
    monkeypatch.setattr(devices, "tiles_at_once", lambda mesh: 2)
    run, lanes = run_with_scores([[float(k)] for k in range(256)])
    result = jgd.sweep(run, lanes, 54, width=64, halving=jgd.hyperband(3, 2))
    assert result.rows[0]["score"] == 255


def test_hyperband_gives_each_bracket_its_rungs():
    result = jgd.sweep(line_task(), _adam(), 64, width=8, halving=jgd.hyperband(2, 8))
    ended = {(row["ended"], row["at"]) for row in result.rows}
    assert ("finished", 64) in ended
    assert {at for how, at in ended if how == "cut"} == {8, 16, 32}
    uncut = np.bincount(result.plan.brackets)[-1]  # the last bracket cuts no setting
    assert sum(row["ended"] == "finished" for row in result.rows) > uncut


# --- early stopping, divergence, budgets -----------------------------------------------------


def test_lanes_stop_when_the_monitor_says_so():
    stop = early_stopping(patience=2)
    plain = jgd.sweep(line_task(), _adam(), 60, width=8, report_every=3)
    result = jgd.sweep(line_task(), _adam(), 60, width=8, report_every=3, stop=stop)
    assert "stopped early" in {row["ended"] for row in result.rows}
    curves = plain.curves["adam"].metrics["loss"]
    for row in result.rows:
        lane = int(np.argmin(abs(RATES - row["learning_rate"])))
        state, expected = stop.init(), 60
        for step, loss in zip(plain.plan.reports, curves[lane], strict=True):
            ended, state = stop.update(loss, state)
            if ended:
                expected = step
                break
        assert abs(row["at"] - expected) <= 3  # rounding depends on the width and may decide a tie
    patience = jgd.sweep(line_task(), _adam(), 60, width=8, report_every=3, stop=2)
    assert [row["at"] for row in patience.rows] == [row["at"] for row in result.rows]


@pytest.mark.parametrize(("steps", "ended"), [(4, "finished"), (6, "stopped early")])
def test_a_lane_that_stops_at_the_last_step_is_finished(steps, ended):
    """The metric never improves, so the monitor stops each lane at its second report."""
    run, lanes = run_with_scores([[1.0], [2.0]])
    *_, report = jgd.iter_sweep(run, lanes, steps, report_every=2, stop=1)
    assert report.step == 4
    assert [ENDINGS[ending] for ending in report.ended] == [ended] * 2
    result = jgd.sweep(run, lanes, steps, report_every=2, stop=1)
    assert {(row["ended"], row["at"]) for row in result.rows} == {(ended, 4)}


def test_ended_lanes_cost_nothing():
    settings = {"sgd": jgd.grid(jgd.sgd, learning_rate=[0.1, *[1e30] * 15])}
    prepared = prepare_sweep(
        line_task(), settings, 100, width=16, report_every=5, drop_diverged=True
    )
    reports = [event for event in events(prepared) if isinstance(event, Report)]
    assert prepared.sweep.schedule.lane_steps == 16 * 5 + 95
    assert (reports[0].ended > 0).sum() == 15
    alive = []
    listen = lambda plan, report: alive.append(report.alive)
    options = dict(width=16, report_every=5, drop_diverged=True, on_report=listen)
    result = jgd.sweep(line_task(), settings, 100, **options)
    assert alive[0] == 1
    assert [row["ended"] for row in result.rows] == ["finished"] + ["diverged"] * 15
    assert {row["verdict"] for row in result.rows[1:]} == {"diverged"}


def test_a_budget_limits_the_lane_steps():
    at_once = devices.tiles_at_once(None)
    budget = 8 * at_once * 50
    lanes = {"adam": jgd.grid(jgd.adam, learning_rate=np.geomspace(1e-4, 1, 24 * at_once))}
    result = jgd.sweep(line_task(), lanes, 40, width=8, report_every=10, budget=budget)
    ended = [row["ended"] for row in result.rows]
    assert ended == [
        ending for ending in ("finished", "out of budget", "not run") for _ in range(8 * at_once)
    ]
    assert result.best.params is not None
    (cut,) = jgd.iter_sweep(line_task(), _adam(), 40, width=8, seconds=1e-9)
    assert cut.step is None
    late = jgd.sweep(line_task(), _adam(), 40, width=8, seconds=1e-9)
    assert {row["ended"] for row in late.rows} == {"not run"}
    assert late.best.state is None


# --- crashes ---------------------------------------------------------------------------------

KINDS = {
    "plain": dict(),
    "halving": dict(halving=jgd.successive_halving(2, 8)),
    "hyperband": dict(halving=jgd.hyperband(2, 8), drop_diverged=True),
    "stop": dict(stop=early_stopping(patience=2)),
}


class _Crash(Exception):
    pass


def _options(kind):
    return dict(seeds=2, width=8, report_every=8, **KINDS[kind])


def _assert_same(one, two):
    assert json.dumps(one.rows) == json.dumps(two.rows)
    for group, curves in one.curves.items():
        for a, b in zip(jax.tree.leaves(curves), jax.tree.leaves(two.curves[group]), strict=True):
            np.testing.assert_array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, one.best.state, two.best.state)


@pytest.mark.parametrize(
    "kind", [k if k == "halving" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_a_resumed_sweep_equals_an_uninterrupted_one(kind, tmp_path):
    """Table, curves and best parameters agree bit for bit, wherever it was interrupted."""
    groups = {**_adam(15), "m": jgd.grid(jgd.momentum, learning_rate=RATES[:9])}
    reference = jgd.sweep(line_task(), groups, 64, folder=tmp_path / "reference", **_options(kind))
    count = len((tmp_path / "reference" / "journal.jsonl").read_text().splitlines())
    for crash_at in (1, count // 3, count - 4):
        folder, reports = tmp_path / str(crash_at), []

        def crash(plan, report, reports=reports, crash_at=crash_at):
            reports.append(report)
            if len(reports) == crash_at:
                raise _Crash

        with pytest.raises(_Crash):
            jgd.sweep(
                line_task(),
                groups,
                64,
                folder=folder,
                checkpoint_every=0.0,
                on_report=crash,
                **_options(kind),
            )
        resumed = jgd.sweep(line_task(), groups, 64, folder=folder, resume=True, **_options(kind))
        _assert_same(reference, resumed)
    again = jgd.sweep(line_task(), groups, 64, folder=folder, resume=True, **_options(kind))
    _assert_same(reference, again)  # resuming a finished sweep changes nothing


def test_resume_rejects_another_sweep(tmp_path):
    options = dict(width=4, report_every=10)
    jgd.sweep(line_task(), _adam(8), 40, folder=tmp_path / "run", **options)
    again = dict(folder=tmp_path / "run", resume=True, **options)
    with pytest.raises(ValueError, match="another sweep: steps was 40 and is now 44"):
        jgd.sweep(line_task(), _adam(8), 44, **again)
    with pytest.raises(ValueError, match="another sweep: groups adam setting was"):
        jgd.sweep(line_task(), _adam(9), 40, **again)
    with pytest.raises(ValueError, match="another sweep: task was"):
        jgd.sweep(line_task(batch_size=3), _adam(8), 40, **again)
    with pytest.raises(FileNotFoundError, match=r"there is no plan\.json"):
        jgd.sweep(line_task(), _adam(8), 40, folder=tmp_path / "none", resume=True)
    with pytest.raises(ValueError, match="folder must be the folder of a sweep"):
        jgd.sweep(line_task(), _adam(8), 40, resume=True)


def test_an_interrupted_sweep_has_the_results_so_far(tmp_path):
    at_once = devices.tiles_at_once(None)
    lanes = {"adam": jgd.grid(jgd.adam, learning_rate=np.geomspace(1e-4, 1, 24 * at_once))}

    def interrupt(plan, report):
        if report.tile == at_once:  # the first tile of the second turn
            raise KeyboardInterrupt

    with pytest.raises(sweep.Interrupted) as caught:
        jgd.sweep(line_task(), lanes, 40, width=8, folder=tmp_path / "run", on_report=interrupt)
    ended = {row["ended"] for row in caught.value.result.rows}
    assert ended == {"finished", "out of budget", "not run"}
    assert (tmp_path / "run" / "results.csv").exists()


def test_ctrl_c_during_a_chunk_keeps_its_lanes():
    """After Ctrl-C during a chunk, the sweep waits for the chunk and reports its lanes."""
    lanes = {"adam": jgd.grid(jgd.adam, learning_rate=RATES[:8])}
    # called while the next tiles run
    interrupt = lambda plan, report: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(sweep.Interrupted) as caught:
        jgd.sweep(line_task(), lanes, 4000, width=4, report_every=400, on_report=interrupt)
    result = caught.value.result
    assert {row["ended"] for row in result.rows} == {"out of budget"}
    assert np.isfinite(result.best.params["w"]).all()


PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
import numpy as np, jgd
from test_halving import _adam, line_task
slow = lambda plan, report: time.sleep(0.02)
jgd.sweep(line_task(), _adam(), 64, seeds=2, width=8, report_every=8, folder={folder!r},
          halving=jgd.successive_halving(2, 8), resume={resume}, checkpoint_every=0.05,
          on_report=slow)
print("done")
"""


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_resumes(tmp_path):
    tests = os.path.dirname(__file__)
    run = lambda folder, resume: subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(tests=tests, folder=str(folder), resume=resume)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    reference = run(tmp_path / "reference", False)
    assert "done" in reference.communicate()[0]
    rng = random.Random(0)
    folder, kills, started = tmp_path / "killed", 0, False
    while True:
        process = run(folder, started)
        while process.poll() is None and not (folder / "journal.jsonl").exists():
            time.sleep(0.01)
        started = True
        if kills == 4:
            process.wait()
        else:
            time.sleep(rng.uniform(0.0, 0.8))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    assert "done" in process.communicate()[0]
    for name in ("results.csv", "results.json", "journal.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()


def test_errors_name_a_file_in_the_way_and_a_full_disk(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="file"):
        jgd.sweep(line_task(), _adam(4), 8, folder=blocked / "run")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        jgd.sweep(line_task(), _adam(4), 8, folder=tmp_path / "run")
