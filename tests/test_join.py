"""Sweeps that are joined: merged results, extended folders, and results loaded from them."""

import dataclasses

import jax
import numpy as np
import optax
import orbax.checkpoint
import pytest
from test_training import _line

import jgd

RATES = np.geomspace(1e-3, 3, 6)
TASK = _line()  # one task, so that all sweeps share their compiled programs
OPTIONS = dict(width=2, report_every=8, keep=2, mode="min")


def _adam(rates):
    return jgd.grid(jgd.adam, learning_rate=rates)


def _sweep(settings, steps=24, **options):
    return jgd.sweep(TASK, settings, steps, **OPTIONS | options)


def _without_texts(plan):
    """A plan without the reprs of its batches, which show their lengths."""
    groups = [dataclasses.replace(group, setting="") for group in plan.groups]
    return dataclasses.replace(plan, groups=groups)


def _assert_equal(result, whole, *, states=True):
    """Results that agree in all that they say, to the bit."""
    assert repr(result.rows) == repr(whole.rows)  # NaN is not itself
    assert _without_texts(result.plan) == _without_texts(whole.plan)
    jax.tree.map(np.testing.assert_array_equal, result.curves, whole.curves)
    assert len(result.kept) == len(whole.kept)
    for one, other in zip(result.kept, whole.kept, strict=True):
        assert repr(one.row) == repr(other.row)
        mine, theirs = ((x.setting, x.state if states else None) for x in (one, other))
        assert jax.tree.structure(mine) == jax.tree.structure(theirs)
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            assert x.dtype == y.dtype
            if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
            np.testing.assert_array_equal(x, y)


# --- merge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(seeds=2, order="own"), dict(target=1.0, best="ever")])
def test_merged_halves_are_one_sweep_of_the_whole(options):
    lion = jgd.grid(jgd.lion, learning_rate=RATES)
    whole = _sweep({"adam": _adam(RATES), "lion": lion}, **options)
    halves = (
        _sweep({"adam": _adam(RATES[:3])}, **options),
        _sweep({"adam": _adam(RATES[2:]), "lion": lion}, **options),  # one setting is in both
    )
    merged = jgd.merge(*halves)
    _assert_equal(merged, whole)
    _assert_equal(jgd.merge(merged, *halves), whole)


def test_a_group_whose_name_is_taken_is_added():
    one = _sweep({"tx": _adam(RATES[:2])})
    two = _sweep({"tx": jgd.grid(jgd.lion, learning_rate=RATES[:2])}, keep=1)
    merged = jgd.merge(one, two, two, jgd.merge(one, two))
    assert [(group.name, group.settings) for group in merged.plan.groups] == [
        ("tx", 2),
        ("tx (2)", 2),
    ]
    assert {repr(best.setting).partition("(")[0] for best in merged.kept} <= {"adam", "lion"}
    np.testing.assert_array_equal(merged.curves["tx (2)"].train_loss, two.curves["tx"].train_loss)
    states = [best.state for best in (*one.kept, *two.kept)]
    assert all(any(best.state is state for state in states) for best in merged.kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=32), "merge: steps must be the same in all results, got 24 and 32"),
        (dict(report_every=6), r"reports must be the same in all results, got \[8, 16, 24\] and"),
        (dict(seeds=2), "seeds must be the same in all results, got 1 and 2"),
        (dict(mode="max"), "mode must be the same in all results, got 'min' and 'max'"),
        (dict(best="ever"), "best must be the same in all results, got 'final' and 'ever'"),
        (dict(target=0.1), "target must be the same in all results, got None and 0.1"),
    ],
)
def test_results_that_do_not_compare_are_not_merged(options, message):
    settings = _adam(RATES[:2])
    with pytest.raises(ValueError, match=message):
        jgd.merge(_sweep(settings), _sweep(settings, **options))
    with pytest.raises(ValueError, match="results must hold at least one result, got none"):
        jgd.merge()


# --- the best, as a checkpoint ---------------------------------------------------------------


def test_the_best_is_saved_with_its_setting(tmp_path):
    result = _sweep(_adam(RATES), seeds=2)
    result.save_best(tmp_path / "best")
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "best")
        metadata = checkpointer.metadata(tmp_path / "best").custom_metadata
    best = result.best
    jax.tree.map(np.testing.assert_array_equal, restored["params"], best.params)
    assert restored["setting"]["learning_rate"] == best.setting.learning_rate
    assert metadata == {"row": best.row, "setting": repr(best.setting)}
    assert optax.tree.norm(restored["state"]["params"]) == optax.tree.norm(best.params)
    with pytest.raises(FileExistsError, match=r"save_best: .*best exists. Give a new path"):
        result.save_best(tmp_path / "best")
    lost = result._replace(best=best._replace(state=None))
    with pytest.raises(ValueError, match="save_best: the state of the best setting is not stored"):
        lost.save_best(tmp_path / "lost")
