"""Searches: low-discrepancy sequences, and settings that Optuna proposes."""

import collections
import itertools
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import optuna
import pytest
from test_training import line_task

import jgd
from jgd.tuning.load import read_results
from jgd.tuning.sweep import Interrupted

TASK = line_task()  # one task, so that all searches share their compiled programs
SPACE = {"learning_rate": jgd.loguniform(1e-4, 1.0), "b1": jgd.uniform(0.5, 0.95)}


@pytest.mark.parametrize("search", [jgd.sobol_search, jgd.halton_search])
def test_sequences_spread_settings_evenly(search):
    lanes = search(jgd.adam, 64, jax.random.key(0), **SPACE)
    assert len(lanes) == 64
    for name, values in lanes.axes.items():
        low, high = SPACE[name].low, SPACE[name].high
        assert ((low <= values) & (values <= high)).all()
        u = (
            np.log(values / low) / np.log(high / low)
            if low == 1e-4
            else (values - low) / (high - low)
        )
        # 64 settings put four into each of 16 bins, Halton's about four; chance leaves some empty
        counts = np.bincount((u * 16).astype(int).clip(0, 15), minlength=16)
        assert counts.min() >= 3
        assert counts.max() <= 5
    again = search(jgd.adam, 64, jax.random.key(0), **SPACE)
    np.testing.assert_array_equal(lanes.axes["b1"], again.axes["b1"])
    other = search(jgd.adam, 64, jax.random.key(1), **SPACE)
    assert (lanes.axes["b1"] != other.axes["b1"]).any()
    assert len(search(jgd.adam, 5, jax.random.key(0), **SPACE)) == 5
    with pytest.raises(ValueError, match=f"{search.__name__}: n and the number of distributions"):
        search(jgd.adam, 0, jax.random.key(0), **SPACE)


def test_a_search_returns_the_best_setting_and_its_study_can_be_continued(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    result = jgd.optuna_search(
        TASK, jgd.adam, 60, 24, SPACE, at_once=8, seeds=2, storage=storage, report_every=20
    )
    study = result.study
    assert len(study.trials) == 24
    assert len(result.rows) == 24
    assert result.best.row["loss"] == pytest.approx(study.best_value)
    assert result.rows[0]["learning_rate"] == pytest.approx(study.best_params["learning_rate"])
    keys = [jax.random.fold_in(jax.random.key(0), seed) for seed in (0, 1)]
    alone = [jgd.train(TASK, result.best.setting, 60, key)[0] for key in keys]
    assert any(np.allclose(result.best.params["w"], end["w"], rtol=1e-3) for end in alone)
    first = np.mean([t.value for t in study.trials[:8]])

    assert np.mean([t.value for t in study.trials[16:]]) < first  # the sampler learns
    (name,) = optuna.get_all_study_names(storage)
    stored = optuna.load_study(study_name=name, storage=storage)
    assert stored.best_value == study.best_value
    more = jgd.optuna_search(TASK, jgd.adam, 60, 8, SPACE, study=study)
    assert len(more.study.trials) == 32


def test_structure_can_be_proposed_and_diverged_trials_fail():
    space = {
        "learning_rate": jgd.loguniform(1e-3, 1e12),
        "momentum": jgd.choice([None, 0.9]),
        "nesterov": jgd.choice([False]),
    }
    sampler = optuna.samplers.RandomSampler(seed=0)
    result = jgd.optuna_search(TASK, jgd.sgd, 40, 16, space, sampler=sampler)
    states = [trial.state.name for trial in result.study.trials]
    assert set(states) == {"COMPLETE", "FAIL"}
    for trial in result.study.trials:
        (row,) = [
            row
            for row in result.rows
            if row["learning_rate"] == pytest.approx(trial.params["learning_rate"], rel=1e-6)
        ]
        assert ("momentum" in row and row["momentum"] != "None") == (
            trial.params["momentum"] is not None
        )
        if trial.value is not None:
            assert trial.value == pytest.approx(row["loss"])


def test_bad_arguments_of_a_search_are_errors(tmp_path):
    study = optuna.create_study(direction="maximize")
    direction = "study must have the direction of loss, minimize, got maximize"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for wrong, message in (
        (dict(study=study), direction),
        (dict(study=optuna.create_study(directions=["minimize"] * 2)), "got minimize and minimize"),
        (dict(trials=0), "optuna_search: trials must be at least 1, got 0"),
        (dict(at_once=0), "optuna_search: at_once must be at least 1, got 0"),
        (dict(space={}), "space must be at least one distribution, got {}"),
        (dict(space=lambda trial: 3), "space must be a function that returns arguments by name"),
        (dict(folder=tmp_path / "full"), "full is not empty"),
        (dict(folder=tmp_path / "none", resume=True), "holds no search: there is no search.json"),
        (dict(resume=True), "folder must be the folder of a sweep with resume=True, got None"),
        (dict(sampler="tpe"), "sampler must be an Optuna sampler, or a function of the batch"),
    ):
        given = dict(trials=4, space=SPACE) | wrong
        with pytest.raises((ValueError, TypeError, OSError), match=re.escape(message)) as caught:
            jgd.optuna_search(TASK, jgd.adam, 8, **given)
        assert "\n" not in str(caught.value)


def _search(folder=None, resume=False, **options):
    """Run a search of three batches, the last one smaller, with a checkpoint at every turn."""
    given = dict(at_once=4, seeds=2, report_every=10, checkpoint_every=0) | options
    return jgd.optuna_search(TASK, jgd.adam, 40, 10, SPACE, folder=folder, resume=resume, **given)


def _interrupts_at(count):
    """Return a callback that raises KeyboardInterrupt at this report."""
    calls = itertools.count(1)

    def on_report(plan, report):
        if next(calls) == count:
            raise KeyboardInterrupt

    return on_report


def _contents(result):
    """Return rows, trials and parameters of a search to compare bit for bit; NaN equals NaN."""
    study = [
        (t.number, t.params, t.state.name, t.values, t.intermediate_values)
        for t in result.study.trials
    ]
    return repr((result.rows, study)), jax.tree.map(np.asarray, result.best.params)


def _files(folder):
    """Return contents by path, without the states and the files that hold a random name."""
    files = (path for path in folder.rglob("*") if path.is_file() and "states" not in path.parts)
    skipped = ("search.json", "lock")
    return {
        path.relative_to(folder): path.read_bytes()
        for path in files
        if path.name not in skipped and "manifest" not in path.name
    }


@pytest.mark.parametrize(
    ("options", "endings", "stops"),
    [
        ({}, {"finished"}, (1, 9)),
        (dict(pruner=optuna.pruners.SuccessiveHalvingPruner(10)), {"finished", "cut"}, (6,)),
        (dict(halving=jgd.successive_halving(2, 20)), {"finished", "cut"}, (3,)),
        (dict(target=0.4, pruner=optuna.pruners.MedianPruner(2)), {"reached target"}, (7,)),
    ],
    ids=["plain", "pruner", "halving", "target"],
)
def test_a_search_resumes_after_ctrl_c(options, endings, stops, tmp_path):
    reference = _search(tmp_path / "reference", **options)
    assert endings <= {row["ended"] for row in reference.rows}
    states = collections.Counter(trial.state.name for trial in reference.study.trials)
    assert states["PRUNED"] == sum(row["ended"] == "cut" for row in reference.rows)
    assert not states["RUNNING"]
    for stop in stops:
        folder = tmp_path / str(stop)
        with pytest.raises(Interrupted) as caught:
            _search(folder, on_report=_interrupts_at(stop), **options)
        result = caught.value.result  # its finished trials equal those of the reference
        for trial, other in zip(result.study.trials, reference.study.trials, strict=False):
            assert trial.params == other.params
            if trial.state.is_finished():
                assert (trial.state, trial.values) == (other.state, other.values)
        chex.assert_trees_all_equal(
            _contents(_search(folder, True, **options)), _contents(reference)
        )
        assert _files(folder) == _files(tmp_path / "reference")


def test_ctrl_c_in_the_last_turn_of_a_batch_ends_the_search():
    with pytest.raises(Interrupted) as caught:
        _search(on_report=_interrupts_at(4))
    assert len(caught.value.result.study.trials) == len(caught.value.result.rows) == 4


@pytest.mark.slow
def test_a_search_resumes_after_kill_9(tmp_path):
    reference = _search(tmp_path / "reference")
    for kill in (2, 6):
        folder = tmp_path / str(kill)
        program = (
            "import itertools, os, signal, test_propose\n"
            "calls = itertools.count(1)\n"
            f"die = lambda *_: next(calls) == {kill} and os.kill(os.getpid(), signal.SIGKILL)\n"
            f"test_propose._search({str(folder)!r}, on_report=die)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent)
        assert done.returncode == -signal.SIGKILL
        chex.assert_trees_all_equal(_contents(_search(folder, True)), _contents(reference))
        assert _files(folder) == _files(tmp_path / "reference")


def test_finished_trials_are_copied_to_the_storage_after_each_batch(tmp_path):
    storage = optuna.storages.InMemoryStorage()
    load = lambda: optuna.load_study(study_name="mine", storage=storage)
    trials = []  # in the storage, at each report

    def on_report(plan, report):
        trials.append(len(load().trials))
        if len(trials) == 7:
            raise KeyboardInterrupt

    names = dict(storage=storage, study_name="mine")
    with pytest.raises(Interrupted):
        _search(tmp_path / "a", on_report=on_report, **names)
    assert (trials[:4], set(trials[4:])) == ([0] * 4, {4})
    resumed = _search(tmp_path / "a", True, **names)
    again = _search(tmp_path / "a", True, **names)  # adds nothing
    copied = lambda study: [(t.params, t.values, t.intermediate_values) for t in study.trials]
    assert copied(load()) == copied(resumed.study) == copied(again.study)
    more = _search(**names)  # a second search continues the study
    assert len(more.rows) == 10
    assert copied(load()) == copied(more.study)
    assert copied(load())[:10] == copied(resumed.study)
    # the trials of a study that is in the storage are not copied again
    last = _search(study=load(), storage=storage)
    assert len(load().trials) == len(last.study.trials) == 30


def test_a_finished_search_can_be_resumed_with_more_trials(tmp_path):
    given = dict(space=SPACE, at_once=4, folder=tmp_path / "a")
    call = lambda n, **options: jgd.optuna_search(TASK, jgd.adam, 20, n, **given | options)
    first = call(4)
    suggest = lambda trial: {
        "learning_rate": SPACE["learning_rate"].suggest(trial, "learning_rate")
    }
    for changed, message in (
        (dict(space=suggest), r"resume: space must be .* as in the search of .*, got a function"),
        (dict(at_once=5), "resume: at_once must be 4 as in the search of .*, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            call(8, resume=True, **changed)
    more = call(8, resume=True)
    assert [t.params for t in more.study.trials[:4]] == [t.params for t in first.study.trials]
    assert len(more.rows) == 8
    assert (tmp_path / "a" / "results.csv").read_text().count("\n") == 9
    loaded = jgd.load(tmp_path / "a", TASK)
    assert loaded.rows == more.rows
    chex.assert_trees_all_equal(loaded.best.params, more.best.params)


def test_a_damaged_search_is_repaired_or_its_file_is_named(tmp_path):
    reference = tmp_path / "reference"
    rows = _search(reference).rows
    for name, content, message in (
        ("search.json", None, "holds no search: there is no search.json"),
        ("search.json", "", "search.json is damaged"),
        ("search.json", '{"steps": 40}', "at_once must be None as in the search of"),
        ("batch-1.json", "[1", "batch-1.json is damaged"),
        ("batch-1.json", "{}", "batch-1.json is damaged: KeyError('trials')"),
        ("batch-1.json", '{"trials": [3]}', "batch-1.json is damaged"),
        (
            "batch-1.json",
            (reference / "batch-0.json").read_text(),
            "the folder holds another sweep",
        ),
        ("batch-1.json", None, None),  # the default sampler proposes the same trials again
        ("batch-0.json", None, None),
        ("batch-1/plan.json", None, "batch-1 holds no sweep: there is no plan.json"),
    ):
        folder = shutil.copytree(reference, tmp_path / "damaged")
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content)
        if message is None:
            with pytest.raises((ValueError, OSError), match=r"batch-1|holds no sweep"):
                read_results(folder)
            assert _search(folder, True).rows == rows
        else:
            with pytest.raises((ValueError, OSError), match=re.escape(message)) as caught:
                _search(folder, True)
            assert "\n" not in str(caught.value)
        shutil.rmtree(folder)


def test_integers_are_numbers_and_a_space_may_have_conditions():
    calls = []

    def build(optimizer, learning_rate, warmup, b1=None):
        calls.append((optimizer, b1 is None))
        rate = jgd.linear_schedule(0.0, learning_rate, warmup)
        return jgd.sgd(rate) if b1 is None else jgd.adam(rate, b1=b1)

    def space(trial):
        name = trial.suggest_categorical("optimizer", ["adam", "sgd"])
        rate = jgd.loguniform(1e-3, 1.0).suggest(trial, "learning_rate")
        warmup = jgd.integers(1, 20, log=True).suggest(trial, "warmup")
        more = {"b1": trial.suggest_float("b1", 0.5, 0.95)} if name == "adam" else {}
        return {"optimizer": name, "learning_rate": rate, "warmup": warmup, **more}

    result = jgd.optuna_search(TASK, build, 20, 16, space, at_once=8)
    groups = {row["optimizer"] for row in result.rows}
    assert groups == {"build optimizer=adam", "build optimizer=sgd"}
    assert set(calls) == {("adam", False), ("sgd", True)}
    for trial in result.study.trials:
        assert isinstance(trial.params["warmup"], int)
        assert ("b1" in trial.params) == (trial.params["optimizer"] == "adam")
        assert any(
            row["warmup"] == trial.params["warmup"] and row.get("b1") == trial.params.get("b1")
            for row in result.rows
        )


@pytest.mark.parametrize("log", [False, True])
def test_integers_are_uniform_or_log_uniform(log):
    lanes = jgd.random_search(
        lambda warmup: jgd.sgd(0.1 * warmup),
        2000,
        jax.random.key(0),
        warmup=jgd.integers(1, 4, log=log),
    )
    values, counts = np.unique(lanes.axes["warmup"], return_counts=True)
    assert values.tolist() == [1, 2, 3, 4]
    edges = np.log([0.5, 1.5, 2.5, 3.5, 4.5]) if log else np.arange(5.0)
    expected = 2000 * np.diff(edges) / (edges[-1] - edges[0])
    np.testing.assert_allclose(counts, expected, rtol=0.12)
    for low, high in ((0, 4), (4, 4)):
        if log or low == high:
            with pytest.raises(
                ValueError, match=r"integers: bounds must satisfy .*low < high, got"
            ):
                jgd.integers(low, high, log=log)
    with pytest.raises(TypeError, match=r"integers: high must be an integer, got 2\.5"):
        jgd.integers(1, 2.5, log=log)


def test_pruned_trials_end_their_lanes():
    pruner = optuna.pruners.ThresholdPruner(upper=1.0)
    result = jgd.optuna_search(
        TASK,
        jgd.sgd,
        80,
        16,
        {"learning_rate": SPACE["learning_rate"]},
        pruner=pruner,
        report_every=8,
    )
    ended = {row["ended"] for row in result.rows}
    assert "cut" in ended
    pruned = [t for t in result.study.trials if t.state.name == "PRUNED"]
    assert len(pruned) == sum(row["ended"] == "cut" for row in result.rows)


def test_the_rows_of_a_result_as_a_data_frame():

    result = jgd.sweep(TASK, jgd.grid(jgd.sgd, learning_rate=[0.1, 0.2]), 10)
    frame = result.to_pandas()
    assert list(frame["rank"]) == [1, 2]
    assert set(frame.columns) == set(result.rows[0])
