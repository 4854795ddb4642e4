"""Sequences that spread settings out, and Optuna as the one who proposes."""

import jax
import numpy as np
import optuna
import pytest
from test_training import _line

import jgd

SPACE = {"learning_rate": jgd.loguniform(1e-4, 1.0), "b1": jgd.uniform(0.5, 0.95)}


@pytest.mark.parametrize("search", [jgd.sobol_search, jgd.halton_search])
def test_sequences_are_spread_out(search):
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
        # each of 16 bins gets its four, where chance leaves some empty; Halton nearly so
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


def test_optuna_proposes_and_lanes_train(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    found = jgd.optuna_search(
        _line(), jgd.adam, 60, 24, SPACE, at_once=8, seeds=2, storage=storage, report_every=20
    )
    assert len(found.study.trials) == 24
    assert len(found.rows) == 24
    assert found.best.row["loss"] == pytest.approx(found.study.best_value)
    assert found.rows[0]["learning_rate"] == pytest.approx(found.study.best_params["learning_rate"])
    alone = jgd.train(_line(), found.best.setting, 60, jax.random.fold_in(jax.random.key(0), 0))
    ends = [found.best.params, alone[0]]
    assert any(np.allclose(ends[0]["w"], end["w"], rtol=1e-3) for end in ends)
    first = np.mean([t.value for t in found.study.trials[:8]])
    assert np.mean([t.value for t in found.study.trials[16:]]) < first  # it learns
    (name,) = optuna.get_all_study_names(storage)
    kept = optuna.load_study(study_name=name, storage=storage)
    assert kept.best_value == found.study.best_value
    more = jgd.optuna_search(_line(), jgd.adam, 60, 8, SPACE, study=found.study)
    assert len(more.study.trials) == 32


def test_structure_may_be_proposed_and_bad_trials_fail():
    space = {
        "learning_rate": jgd.loguniform(1e-3, 1e12),
        "momentum": jgd.choice([None, 0.9]),
        "nesterov": jgd.choice([False]),
    }
    sampler = optuna.samplers.RandomSampler(seed=0)
    found = jgd.optuna_search(_line(), jgd.sgd, 40, 16, space, sampler=sampler)
    states = [trial.state.name for trial in found.study.trials]
    assert set(states) == {"COMPLETE", "FAIL"}
    for trial in found.study.trials:
        (row,) = [
            row
            for row in found.rows
            if row["learning_rate"] == pytest.approx(trial.params["learning_rate"], rel=1e-6)
        ]
        assert ("momentum" in row and row["momentum"] != "None") == (
            trial.params["momentum"] is not None
        )
        if trial.value is not None:
            assert trial.value == pytest.approx(row["loss"])


def test_bad_proposals_are_refused():
    study = optuna.create_study(direction="maximize")
    with pytest.raises(
        ValueError, match="study must have the direction of loss, minimize, got maximize"
    ):
        jgd.optuna_search(_line(), jgd.adam, 8, 4, SPACE, study=study)
    for wrong in (dict(trials=0), dict(trials=4, at_once=0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            jgd.optuna_search(_line(), jgd.adam, 8, space=SPACE, **wrong)


def test_pruned_trials_end_their_lanes():
    pruner = optuna.pruners.ThresholdPruner(upper=1.0)
    found = jgd.optuna_search(
        _line(),
        jgd.sgd,
        80,
        16,
        {"learning_rate": SPACE["learning_rate"]},
        pruner=pruner,
        report_every=8,
    )
    ended = {row["ended"] for row in found.rows}
    assert "cut" in ended
    pruned = [t for t in found.study.trials if t.state.name == "PRUNED"]
    assert len(pruned) == sum(row["ended"] == "cut" for row in found.rows)


def test_rows_as_a_data_frame():
    result = jgd.sweep(_line(), jgd.grid(jgd.sgd, learning_rate=[0.1, 0.2]), 10)
    frame = result.to_pandas()
    assert list(frame["rank"]) == [1, 2]
    assert set(frame.columns) == set(result.rows[0])
