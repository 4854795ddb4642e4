"""Joining of sweeps: merged results, extended folders, and results loaded from folders."""

import dataclasses
import functools
import gc
import json
import os
import shutil
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from test_faults import _Faults
from test_ranking import CURVES, run_with_curves
from test_training import line_task

import jgd
from jgd.tuning.segment import read_result
from jgd.tuning.space import Lanes
from jgd.tuning.sweep import Interrupted

RATES = np.geomspace(1e-3, 3, 6)
TASK = line_task()  # one task, so that all sweeps share their compiled programs
NOISY = TASK._replace(  # each seed has its own initial parameters
    init=lambda key: {"w": jax.random.normal(key, (2,)), "b": jnp.zeros(())}
)
OPTIONS = dict(width=2, report_every=8, keep=2, mode="min")


def _adam(rates):
    return jgd.grid(jgd.adam, learning_rate=rates)


def _sweep(settings, steps=24, **options):
    return jgd.sweep(TASK, settings, steps, **OPTIONS | options)


def _without_texts(plan):
    """Return a plan without the reprs of its batches, which show their lengths."""
    groups = [dataclasses.replace(group, setting="") for group in plan.groups]
    return dataclasses.replace(plan, groups=groups)


def _assert_equal(result, reference, *, states=True):
    """Assert that two results agree bit for bit."""
    assert repr(result.rows) == repr(reference.rows)  # repr, since NaN != NaN
    assert _without_texts(result.plan) == _without_texts(reference.plan)
    jax.tree.map(np.testing.assert_array_equal, result.curves, reference.curves)
    assert len(result.kept) == len(reference.kept)
    for one, other in zip(result.kept, reference.kept, strict=True):
        assert repr(one.row) == repr(other.row)
        pair = [(x.setting, x.state if states else None) for x in (one, other)]
        assert jax.tree.structure(pair[0]) == jax.tree.structure(pair[1])
        for x, y in zip(*map(jax.tree.leaves, pair), strict=True):
            assert x.dtype == y.dtype
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
            np.testing.assert_array_equal(x, y)


# --- merge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(seeds=2, order="own"), dict(target=1.0, best="ever")])
def test_merged_halves_equal_one_sweep(options):
    lion = jgd.grid(jgd.lion, learning_rate=RATES)
    reference = _sweep({"adam": _adam(RATES), "lion": lion}, **options)
    halves = (
        _sweep({"adam": _adam(RATES[:3])}, **options),
        _sweep({"adam": _adam(RATES[2:]), "lion": lion}, **options),  # one setting is in both
    )
    merged = jgd.merge(*halves)
    _assert_equal(merged, reference)
    _assert_equal(jgd.merge(merged, *halves), reference)


def test_another_group_of_the_same_name_gets_a_number():
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
def test_results_that_cannot_be_compared_are_not_merged(options, message):
    settings = _adam(RATES[:2])
    with pytest.raises(ValueError, match=message):
        jgd.merge(_sweep(settings), _sweep(settings, **options))
    with pytest.raises(ValueError, match="results must hold at least one result, got none"):
        jgd.merge()
    with pytest.raises(TypeError, match=r"merge: results must be results of jgd\.sweep, got 3"):
        jgd.merge(_sweep(settings), 3)


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
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        result.save_best(tmp_path / "file" / "best")
    # no thread of orbax waits for one that failed; an idle thread ends with its executor
    gc.collect()
    for thread in [x for x in threading.enumerate() if "metadata" in x.name]:
        thread.join(10)
        assert not thread.is_alive()
    lost = result._replace(best=best._replace(state=None))
    with pytest.raises(ValueError, match="save_best: the state of the best setting is not stored"):
        lost.save_best(tmp_path / "lost")


# --- load ------------------------------------------------------------------------------------


class _State(NamedTuple):
    """Leaves of all kinds."""

    weight: Any  # bfloat16
    key: Any
    count: Any
    flag: Any


def _mixed():
    def update(setting, state, batch):
        key, now = jax.random.split(state.key)
        weight = state.weight - setting["rate"] * jax.random.normal(now, dtype=jnp.bfloat16)
        loss = jnp.float32(weight) ** 2 + setting["shift"][0]
        return _State(weight.astype(jnp.bfloat16), key, state.count + 1, ~state.flag), {
            "loss": loss
        }

    return jgd.Run(
        init=lambda setting, key: _State(jnp.bfloat16(1), key, jnp.int32(0), jnp.bool(True)),
        update=update,
        evaluate=lambda setting, state: {"loss": jnp.float32(state.weight) ** 2},
        batch=lambda step: step,
    )


MIXED = {
    "tx": jgd.grid(jgd.adam, learning_rate=[0.1, 0.2, 0.3]).settings,
    "rate": np.array([0.1, 0.2, 0.3]),  # float64
    "shift": jnp.array([[0, np.inf], [1, np.inf], [2, np.inf]], jnp.bfloat16),
    "depth": np.array([1, 2, 3], np.int8),
}


@pytest.mark.parametrize("options", [dict(keep=2, seeds=2), dict(best="ever", target=0.2)])
def test_a_loaded_result_equals_the_result_in_memory(options, tmp_path):
    run = _mixed()
    folder = tmp_path / "run"
    reference = jgd.sweep(run, {"mixed": MIXED}, 8, mode="min", folder=folder, **options)
    loaded = jgd.load(folder, run)
    _assert_equal(loaded, reference)
    assert loaded.plan == reference.plan
    assert loaded.best.state.weight.dtype == jnp.bfloat16
    alone = jgd.load(folder)
    assert repr(alone.rows) == repr(reference.rows)
    assert [best[1:] for best in alone.kept] == [(None, None)] * len(reference.kept)


@pytest.mark.parametrize("keep", [1, 3])
def test_equal_settings_stay_separate(keep, tmp_path):
    """A repeated setting is not mistaken for the first one, whose state is stored."""
    best, last = 0.3, 1e-3
    reference = _sweep(_adam([last, best, best]), keep=keep, folder=tmp_path / "run")
    assert reference.best.row["setting"] == 1
    _assert_equal(jgd.load(tmp_path / "run", TASK), reference)
    _assert_equal(jgd.merge(reference, reference), reference)
    more = _sweep(_adam([best, best, best, last]), keep=4, extend=tmp_path / "run")
    _assert_equal(jgd.load(tmp_path / "run", TASK), more)
    assert repr(more.rows) == repr(_sweep(_adam([best, best, best, last])).rows)


def test_a_template_gives_the_structure_that_cannot_be_pickled(tmp_path):
    build = lambda rate: jgd.adamw(rate, weight_decay=0.1, mask=lambda params: True)
    settings = {"a": jgd.grid(build, rate=RATES), "b": _adam(RATES)}
    reference = _sweep(settings, folder=tmp_path / "run")
    for template in (settings, settings["a"], jgd.lane(settings["a"], 0)):
        _assert_equal(jgd.load(tmp_path / "run", TASK, template=template), reference)
    for template in (None, settings["b"], {"a": 3}):
        with pytest.raises(ValueError, match="load: template must be the settings given to sweep"):
            jgd.load(tmp_path / "run", TASK, template=template)


def test_folders_that_cannot_be_loaded(tmp_path):
    settings = _adam(RATES[:2])
    _sweep(settings, folder=tmp_path / "run")
    (tmp_path / "run" / "settings.pickle").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"load: .*settings.pickle is damaged"):
        jgd.load(tmp_path / "run", TASK)
    with pytest.raises(Interrupted):
        _sweep(settings, folder=tmp_path / "half", on_report=_interrupt)
    with pytest.raises(ValueError, match=r"load: .*half has not finished"):
        jgd.load(tmp_path / "half")
    with pytest.raises(FileNotFoundError, match=r"no plan\.json"):
        jgd.load(tmp_path / "nowhere")
    _sweep(settings, folder=tmp_path / "other")
    with pytest.raises(ValueError, match="load: task must be the task of the sweep, got"):
        jgd.load(tmp_path / "other", _mixed(), template=settings)


def _interrupt(plan, report):
    raise KeyboardInterrupt


# --- extend ----------------------------------------------------------------------------------

TABLES = ("results.csv", "results.json", "curves.npz", "settings.pickle")


def _reported_lanes(folder):
    """Return the lanes that the journal of a folder reports, as (group, lane)."""
    lines = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return {(line["group"], lane) for line in lines if "tile" in line for lane in line["lanes"]}


@pytest.mark.parametrize("options", [dict(), dict(best="ever", order="own")])
def test_an_extended_sweep_equals_one_sweep(options, tmp_path):
    """Extended by settings on both sides, then by seeds and a group, it is equal bit for bit."""
    folder = tmp_path / "run"
    sweep = functools.partial(jgd.sweep, NOISY, steps=24, **OPTIONS | options)
    sweep({"adam": _adam(RATES[2:4])}, folder=folder)
    more = {"adam": _adam(RATES)}
    _assert_equal(sweep(more, extend=folder), sweep(more, folder=tmp_path / "more"))
    assert _reported_lanes(folder / "segment-2") == {("adam", lane) for lane in (0, 1, 4, 5)}
    settings = {"lion": jgd.grid(jgd.lion, learning_rate=RATES[:3]), **more}
    extended, reference = (
        sweep(settings, seeds=3, extend=folder),
        sweep(settings, seeds=3, folder=tmp_path / "reference"),
    )
    assert repr(extended.rows) == repr(reference.rows)
    jax.tree.map(np.testing.assert_array_equal, extended.curves, reference.curves)
    assert ("adam", 0) not in _reported_lanes(folder / "segment-3")
    assert {("adam", 1), ("lion", 0)} <= _reported_lanes(folder / "segment-3")
    for name in TABLES:
        assert (folder / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    _assert_equal(jgd.load(folder, NOISY), extended)
    _assert_equal(sweep(settings, seeds=3, extend=folder), extended)  # adds no lane
    assert not (folder / "segment-4").exists()
    assert repr(read_result(folder).rows) == repr(reference.rows)
    states = {(best.row["optimizer"], best.row["setting"]): best.state for best in reference.kept}
    for best in extended.kept:  # the two results may have stored the states of other settings
        state = states.get((best.row["optimizer"], best.row["setting"]), best.state)
        jax.tree.map(np.testing.assert_array_equal, best.state, state)
    fewer = sweep({"adam": _adam(RATES[1:3])}, seeds=2, extend=folder)
    np.testing.assert_array_equal(
        fewer.curves["adam"].train_loss.reshape(2, 2, -1),
        reference.curves["adam"].train_loss.reshape(6, 3, -1)[1:3, :2],
    )
    assert not (folder / "segment-4").exists()


def test_a_run_whose_metric_depends_on_its_setting_is_extended(tmp_path):
    run, curves = run_with_curves(CURVES)
    options = dict(report_every=1, metric="score", mode="min", width=2)
    jgd.sweep(run, {"run": curves[2:]}, 4, folder=tmp_path / "run", **options)
    extended = jgd.sweep(run, {"run": curves}, 4, extend=tmp_path / "run", **options)
    assert repr(extended.rows) == repr(jgd.sweep(run, {"run": curves}, 4, **options).rows)
    assert int(extended.best.state) == 4


def test_a_sweep_with_a_changed_setting_is_not_resumed(tmp_path):
    build = lambda middle: jgd.stack([jgd.adam(rate, b1=0.5) for rate in (0.1, middle, 0.3)])
    options = dict(folder=tmp_path / "run", resume=True)
    settings = lambda middle: {"a": Lanes(build(middle), {"number": np.arange(3)})}
    _sweep(settings(0.2), folder=tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"resume: the folder holds another sweep: groups a digests \[1\]"
    ):
        _sweep(settings(0.25), **options)


@pytest.mark.parametrize(
    "stride", [pytest.param(1, marks=pytest.mark.slow), pytest.param(41, id="some")]
)
def test_an_extension_that_dies_is_resumed(stride, tmp_path, monkeypatch):
    extend = lambda folder: _sweep(
        {"adam": _adam(RATES)}, seeds=2, extend=folder, checkpoint_every=0, report_every=12
    )
    _sweep({"adam": _adam(RATES[:3])}, folder=tmp_path / "old", report_every=12)
    begin = lambda name: shutil.copytree(tmp_path / "old", tmp_path / name)
    reference = extend(begin("reference"))
    faults = _Faults(monkeypatch)
    counted = begin("count")
    assert not faults.dies(None, lambda: extend(counted))
    assert faults.count > 30
    for at in range(1, faults.count, stride):
        folder = begin(str(at))
        faults.dies(at, lambda folder=folder: extend(folder))
        _assert_equal(extend(folder), reference)
        for name in TABLES:
            assert (folder / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
        assert [x.name for x in folder.glob("segment-*")] == ["segment-2"]


def test_an_interrupted_extension_must_finish_before_another(tmp_path):
    folder = tmp_path / "run"
    _sweep({"adam": _adam(RATES[:2])}, folder=folder)
    with pytest.raises(Interrupted) as error:
        _sweep({"adam": _adam(RATES)}, extend=folder, on_report=_interrupt)
    assert {row["ended"] for row in error.value.result.rows} >= {"finished"}
    with pytest.raises(
        ValueError,
        match=r"extend: an extension has not finished: .* groups adam setting was",
    ):
        _sweep({"adam": _adam(RATES[:5])}, extend=folder)
    with pytest.raises(ValueError, match=r"load: .*segment-2 has not finished"):
        jgd.load(folder)
    reference = _sweep({"adam": _adam(RATES)}, extend=folder)
    assert [row["ended"] for row in reference.rows] == ["finished"] * 6
    with pytest.raises(ValueError, match=r"resume: .*run was extended. Give it as extend"):
        _sweep({"adam": _adam(RATES[:2])}, folder=folder, resume=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    _sweep({"adam": _adam(RATES[:2])}, folder=folder)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(steps=32),
            "a sweep with other arguments: steps was 24 and is now 32",
        ),
        (
            dict(halving=jgd.successive_halving(2, 8)),
            "extend: halving must be None.* depend on the other lanes",
        ),
        (dict(budget=100), "extend: budget must be None"),
        (dict(seconds=9.0), "extend: seconds must be None"),
        (dict(key=1), "key was 0 and is now 1"),
        (dict(report_every=6), "report_every was 8 and is now 6"),
        (dict(order="own"), "order was 'shared' and is now 'own'"),
        (dict(target=0.1), "target was None and is now 0.1"),
        (dict(stop=3), "stop was None"),
        (dict(drop_diverged=True), "drop_diverged was False and is now True"),
        (dict(mode="max"), "mode was 'min' and is now 'max'"),
        (dict(best="ever"), "best was 'final' and is now 'ever'"),
        (dict(folder="x"), "sweep: folder must be None with extend, got 'x'"),
        (dict(resume=True), "folder must be the folder of a sweep with resume=True"),
    ],
)
def test_an_extension_that_would_change_lanes_is_rejected(options, message, finished):
    with pytest.raises(ValueError, match=message):
        _sweep({"adam": _adam(RATES)}, extend=finished, **options)
    assert not (finished / "segment-2").exists()


def test_sweeps_that_cannot_be_extended(finished, tmp_path):
    settings = {"adam": _adam(RATES[:4])}
    with pytest.raises(ValueError, match="task was"):
        jgd.sweep(line_task(3), settings, 24, extend=finished, **OPTIONS)
    with pytest.raises(FileNotFoundError, match=r"no plan\.json"):
        _sweep(settings, extend=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(Interrupted):
        _sweep(settings, folder=tmp_path / "half", on_report=_interrupt)
    with pytest.raises(
        ValueError, match=r"extend: .*half has not finished. Finish it with resume=True"
    ):
        _sweep(settings, extend=tmp_path / "half")
    _sweep(settings, folder=tmp_path / "run")
    batch, order = TASK.batch.args[0], TASK.batch.args[1]
    middle = batch[0].at[_row_of_no_end_batch(TASK, 24)].add(1e-3), batch[1]
    other = TASK._replace(batch=jgd.minibatches(middle, 4, order))
    with pytest.raises(ValueError, match="the folder holds a sweep with other arguments: task"):
        jgd.sweep(other, settings, 24, extend=tmp_path / "run", **OPTIONS)
    halving = jgd.successive_halving(2, 8)
    _sweep(settings, folder=tmp_path / "halved", halving=halving)
    with pytest.raises(ValueError, match="halving must be None in both sweeps"):
        _sweep(settings, extend=tmp_path / "halved")
    task = TASK._replace(init=lambda key: {"w": _rounded_by_seeds(key), "b": jnp.zeros(())})
    jgd.sweep(task, settings, 24, seeds=2, folder=tmp_path / "sums", **OPTIONS)
    with pytest.raises(ValueError, match="extend: seeds must be 2, got 3: the initial parameters"):
        jgd.sweep(task, settings, 24, seeds=3, extend=tmp_path / "sums", **OPTIONS)


def _row_of_no_end_batch(task, steps):
    """Return the row of an example that is in neither the first nor the last batch."""
    ends = np.concatenate([task.batch(step)[0] for step in (0, steps - 1)])
    rows = enumerate(np.asarray(task.batch.args[0][0]).tolist())
    return next(row for row, x in rows if x not in ends.tolist())


@jax.custom_batching.custom_vmap
def _rounded_by_seeds(key):
    """Return parameters whose rounding depends on the number of seeds, as in a sum."""
    return jnp.ones(2)


@_rounded_by_seeds.def_vmap
def _(size, batched, key):
    return jnp.full((size, 2), 1 + 1e-7 * size), True


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """A sweep that was extended twice."""
    folder = tmp_path_factory.mktemp("twice") / "run"
    _sweep({"adam": _adam(RATES[:2])}, folder=folder)
    for number in (3, 4):
        _sweep({"adam": _adam(RATES[:number])}, extend=folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run / "segment-2"), r"segment-2 holds no sweep"),
        (lambda run: os.truncate(run / "segment-2" / "journal.jsonl", 99), "segment-2: no checkp"),
        (lambda run: os.truncate(run / "journal.jsonl", 99), "run: no checkpoint is intact"),
        (
            lambda run: [(run / "segment-2" / x).unlink() for x in ("journal.jsonl", MANIFEST)],
            "segment-2 was extended but is incomplete",
        ),
        (
            lambda run: shutil.copy(run / "segment-2" / "plan.json", run / "segment-3"),
            "plan.json was changed, or manifest-1.json belongs to another sweep",
        ),
        (
            lambda run: [
                shutil.copy(run / "segment-2" / x, run)
                for x in ("plan.json", "journal.jsonl", MANIFEST)
            ],
            "manifest-1.json belongs to another sweep",
        ),
    ],
)
def test_a_damaged_extension_gives_no_table(damage, message, twice, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(twice, run)
    assert len(read_result(run).rows) == 4
    damage(run)
    for read in (read_result, jgd.load, lambda run: _sweep({"adam": _adam(RATES)}, extend=run)):
        with pytest.raises((ValueError, OSError), match=message):
            read(run)


MANIFEST = "manifest-1.json"
