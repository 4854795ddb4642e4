"""Ranking by the last report, the best report or a target; errors, ties and orders of batches."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from test_training import line_task
from test_tuning import run_with_scores

import jgd
from jgd.stopping import early_stopping
from jgd.tuning import console
from jgd.tuning.options import Training
from jgd.tuning.plan import ranked_by

RATES = np.geomspace(1e-3, 1, 8)


def run_with_curves(curves, order="shared"):
    """Return a run whose metric at step k is the k-th number of its setting."""
    run = jgd.Run(
        init=lambda setting, key: jnp.int32(0),
        update=lambda setting, state, batch: (state + 1, {"loss": jnp.float32(1)}),
        evaluate=lambda setting, state: {
            "score": setting[state - 1],
            "twice": 2 * setting[state - 1],
        },
        batch=lambda step: step,
    )
    return run, jnp.asarray(curves, jnp.float32)


CURVES = [[5.0, 1, 4, 4], [3, 3, 2, 2], [9, 8, np.nan, 7], [6, 5, 4, 3]]


def _sweep_curves(**options):
    run, curves = run_with_curves(CURVES)
    options = dict(report_every=1, metric="score", mode="min", width=4) | options
    result = jgd.sweep(run, {"run": curves}, 4, **options)
    return result, [[row[0] for row in CURVES].index(one.setting[0]) for one in result.kept]


def test_the_last_report_counts():
    result, _ = _sweep_curves()
    assert [row["score"] for row in result.rows] == [2, 3, 4, 7]
    assert int(result.best.state) == 4


def test_the_best_report_counts_and_its_state_is_kept():
    result, settings = _sweep_curves(best="ever", keep=3)
    assert [row["score"] for row in result.rows] == [1, 2, 3, 7]
    assert [row["twice"] for row in result.rows] == [2, 4, 6, 14]  # of the same report
    assert [row["best_at"] for row in result.rows] == [2, 3, 4, 4]
    assert settings == [0, 1, 3]
    assert [int(one.state) for one in result.kept] == [2, 3, 4]
    most, _ = _sweep_curves(best="ever", mode="max")
    assert [row["score"] for row in most.rows] == [9, 6, 5, 3]


def test_the_first_at_the_target_is_best_and_ends():
    result, settings = _sweep_curves(target=4.5, keep=2)
    assert [row["steps_to_target"] for row in result.rows] == [1, 2, 3, np.inf]
    assert [row["ended"] for row in result.rows] == ["reached target"] * 3 + ["finished"]
    assert [row["at"] for row in result.rows] == [1, 2, 3, 4]
    assert settings == [1, 0]
    assert [int(one.state) for one in result.kept] == [1, 2]
    highest, _ = _sweep_curves(target=8.0, mode="max")
    assert [row["steps_to_target"] for row in highest.rows][:2] == [1, np.inf]
    assert highest.rows[1]["score"] == 4  # it missed the target, so its last report counts


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(best="ever"), dict(target=4.0), dict(keep=3)])
def test_a_resumed_sweep_has_the_same_best(options, tmp_path):
    reference, _ = _sweep_curves(folder=tmp_path / "reference", width=2, **options)
    count = len((tmp_path / "reference" / "journal.jsonl").read_text().splitlines())
    for crash_at in (1, count - 2):
        reports = []

        def crash(plan, report, reports=reports, crash_at=crash_at):
            reports.append(report)
            if len(reports) == crash_at:
                raise RuntimeError

        where = dict(folder=tmp_path / str(crash_at), width=2, **options)
        with pytest.raises(RuntimeError):
            _sweep_curves(checkpoint_every=0.0, on_report=crash, **where)
        resumed, _ = _sweep_curves(resume=True, **where)
        assert repr(resumed.rows) == repr(reference.rows)
        assert [int(one.state) for one in resumed.kept] == [
            int(one.state) for one in reference.kept
        ]


def test_a_budget_leaves_the_best_with_its_state(tmp_path):
    run, curves = run_with_curves(CURVES)
    options = dict(report_every=1, mode="min", width=2, budget=6, folder=tmp_path / "run")
    halving = jgd.successive_halving(2, 2)
    result = jgd.sweep(run, {"run": curves}, 4, metric="score", halving=halving, **options)
    assert [row["ended"] for row in result.rows] == ["out of budget"] * 4
    assert result.best.row["score"] == 1
    assert int(result.best.state) == 2
    again = jgd.sweep(
        run, {"run": curves}, 4, metric="score", halving=halving, resume=True, **options
    )
    assert repr(again.rows) == repr(result.rows)  # repr, since NaN != NaN
    assert int(again.best.state) == 2


def test_a_budget_keeps_the_state_of_the_setting_that_trained_further():
    """It ranks first even if a setting that ended earlier has a better metric."""
    run, curves = run_with_curves([[4.0, 4, 4, 4], [3, 3, 3, 3], [1, 1, 5, 5], [2, 2, 2, 2]])
    options = dict(report_every=1, metric="score", mode="min", width=1, budget=9)
    result = jgd.sweep(run, {"run": curves}, 4, halving=jgd.successive_halving(1.4, 2), **options)
    assert [row["at"] for row in result.rows] == [3, 2, 2, 2]
    assert result.rows[0]["score"] == 5
    assert [int(one.state) for one in result.kept] == [3]


def test_the_error_of_the_mean_and_ties():
    run, lanes = run_with_scores(
        [[1.0, 2.0, 3.0], [2.0, 3.0, 2.5], [9.0, 9.0, 9.0], [9.0, 9.0, np.nan]]
    )
    rows = jgd.sweep(run, lanes, 4, seeds=3, mode="min").rows
    np.testing.assert_allclose(rows[0]["score_se"], 1 / np.sqrt(3))
    np.testing.assert_allclose(rows[1]["score_se"], 0.5 / np.sqrt(3))
    assert [row["tied"] for row in rows] == [True, True, False, False]  # 0.5 < 0.65
    assert np.isnan(rows[3]["score_se"])
    run, lanes = run_with_scores([[1.0], [1.0], [1.1]])
    assert [row["tied"] for row in jgd.sweep(run, lanes, 4, mode="min").rows] == [True, True, False]


def test_steps_to_a_target_do_not_tie_with_metrics():
    """Settings can be tied only if both reached the target with all seeds, or neither did."""
    rows = _sweep_curves(target=6.0, mode="max")[0].rows
    assert [row["steps_to_target"] for row in rows] == [1, 1, np.inf, np.inf]
    assert [row["tied"] for row in rows] == [True, True, False, False]
    rows = _sweep_curves(target=100.0, mode="max")[0].rows
    assert [row["tied"] for row in rows] == [True, False, False, False]


def test_the_best_seed_is_the_first_at_the_target():
    """So it is even if another seed misses the target, and the setting is ranked by the metric."""
    curves = jnp.array([[1.0, 5, 5, 5], [1, 1, 1, 9], [1, 1, 1, 1]])
    run, one = run_with_curves([[0.0]])
    table = [jax.random.key_data(jax.random.fold_in(jax.random.key(0), k)) for k in range(3)]
    seed = lambda key: jnp.argmax((jax.random.key_data(key) == jnp.array(table)).all(1))
    run = run._replace(
        init=lambda setting, key: (seed(key), 0),
        update=lambda setting, state, batch: ((state[0], state[1] + 1), {"loss": 1.0}),
        evaluate=lambda setting, state: {"score": curves[state[0], state[1] - 1]},
    )
    result = jgd.sweep(run, {"run": one}, 4, seeds=3, report_every=1, target=4.0)
    assert tuple(map(int, result.best.state)) == (0, 2)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "max") for name in ("val_accuracy", "ACC", "evalAUC", "F1Score", "test/r2")),
        *((name, "max") for name in ("mean-reward", "episodeReturn", "bleu.4", "valBLEU")),
        *((name, "min") for name in ("val_loss", "testMSE", "MSELoss", "top 1 error", "nll@5")),
        *((name, None) for name in ("inaccuracy", "rewards", "norm", "error_score", "neg_mse")),
    ],
)
def test_the_name_of_a_metric_implies_its_mode(name, mode):
    if mode is None:
        message = f"sweep: mode must be 'min' or 'max' for the metric '{name}'"
        with pytest.raises(ValueError, match=message):
            ranked_by([name], Training())
    else:
        assert ranked_by([name], Training()) == (name, mode)
    assert ranked_by([name, "loss"], Training()) == ("loss", "min")
    assert ranked_by([name, "loss"], Training(metric=name, mode="max")) == (name, "max")


def test_sweeps_and_searches_use_the_implied_mode(tmp_path):
    run, lanes = run_with_scores([[1.0], [3.0], [2.0]])
    result = jgd.sweep(run, lanes, 4, folder=tmp_path / "run")
    assert [row["score"] for row in result.rows] == [3, 2, 1]
    for name in ("plan.json", "results.json"):
        assert json.loads((tmp_path / "run" / name).read_text())["mode"] == "max"
    for stop in (1, early_stopping(1, mode="max")):
        assert jgd.sweep(run, lanes, 4, stop=stop).mode == "max"
    terminal = Console(file=io.StringIO(), width=200)
    console.print_result(terminal, result, 3)
    assert "best of each optimizer: score, higher is better" in terminal.file.getvalue()
    unknown = run._replace(evaluate=lambda setting, state: {"value": state})
    space = {"row": jgd.choice([0, 1, 2])}
    setting = lambda row: {"row": jnp.asarray(row, float)}
    with pytest.raises(ValueError, match="mode must be 'min' or 'max' for the metric 'value'"):
        jgd.optuna_search(unknown, setting, 4, 3, space)
    found = jgd.optuna_search(run, setting, 4, 3, space)
    assert found.study.direction.name == "MAXIMIZE"
    assert found.best.row["score"] == found.rows[0]["score"] == found.study.best_value


def test_seeds_with_their_own_order_of_batches():
    task = line_task(batch_size=4)
    lanes = {"sgd": jgd.grid(jgd.sgd, learning_rate=[0.01, 0.05])}
    shared, own = (
        jgd.sweep(task, lanes, 12, seeds=3, report_every=1, width=6, order=order)
        for order in ("shared", "own")
    )
    assert own.plan.order == "own"
    losses = own.curves["sgd"].train_loss.reshape(2, 3, 12)
    for seed in range(3):  # a lane equals a training run on the batches of its seed
        key = jax.random.fold_in(jax.random.key(0), seed)
        by_seed = task._replace(batch=lambda step, seed=seed: task.batch(step, seed=seed))
        for rate, curve in zip([0.01, 0.05], losses[:, seed], strict=True):
            _, history = jgd.train(by_seed, jgd.sgd(rate), 12, key)
            np.testing.assert_allclose(curve, history["loss"], rtol=1e-5, atol=1e-6)
    assert (shared.curves["sgd"].train_loss != own.curves["sgd"].train_loss).all(1).sum() >= 4
    batches = {task.batch(k, seed=s)[0].tobytes() for k in range(3) for s in (None, 0, 1)}
    assert len(batches) == 9


def test_bad_ranking_options_are_rejected():
    lanes = {"sgd": jgd.grid(jgd.sgd, learning_rate=[0.1])}
    plain = line_task()._replace(batch=lambda step: line_task().batch(step))
    for task, wrong, message in (
        (plain, dict(order="own"), r"order must be .* a function of \(step, seed=None\)"),
        (line_task(), dict(order="mine"), "order must be 'shared' or 'own', got 'mine'"),
        (line_task(), dict(best="last"), "best must be 'final' or 'ever', got 'last'"),
        (line_task(), dict(keep=0), "keep must be at least 1, got 0"),
        (line_task(), dict(target=np.nan), "target must be finite, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            jgd.sweep(task, lanes, 8, **wrong)
