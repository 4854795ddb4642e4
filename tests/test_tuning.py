"""Sweeps: grids and samples, the plan, training as lanes, the result, and the folder."""

import csv
import functools
import inspect
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import events, prepare_sweep
from test_training import line_task

import jgd
from jgd.tuning import compiling, widths
from jgd.tuning.batches import FunctionBatches
from jgd.tuning.events import decode, encode
from jgd.tuning.pool import Pool
from jgd.tuning.space import lanes_of
from jgd.tuning.tasks import digits


def _curves(settings, steps=40, **options):
    """Return the loss curves, (lanes, reports), of a sweep that fits a line."""
    options = dict(report_every=1, width=4) | options
    return jgd.sweep(line_task(), {"tx": settings}, steps, **options).curves["tx"].train_loss


# --- grids and samples -----------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_axes():
    lanes = jgd.grid(jgd.adam, learning_rate=[0.1, 0.2], b1=np.array([0.8, 0.9, 0.95]))
    assert len(lanes) == 6
    np.testing.assert_allclose(lanes.axes["learning_rate"], [0.1, 0.1, 0.1, 0.2, 0.2, 0.2])
    np.testing.assert_allclose(lanes.axes["b1"], [0.8, 0.9, 0.95] * 2)
    assert jgd.lane(lanes, 4) == jax.tree.map(jnp.float32, jgd.adam(0.2, b1=0.9))
    ends = jax.vmap(lambda tx: jgd.train(line_task(), tx, 5, jax.random.key(0))[0])(lanes)
    assert ends["w"].shape == (6, 2)


def test_a_factory_can_be_any_function():
    build = lambda peak, warmup: jgd.adamw(
        jgd.warmup_cosine_decay_schedule(0.0, peak, warmup, 50), weight_decay=0.01
    )
    lanes = jgd.grid(build, peak=[0.1, 0.2], warmup=[5, 10])
    assert list(lanes.axes) == ["peak", "warmup"]
    assert jgd.lane(lanes, 3).learning_rate.warmup_steps == 10


def test_values_that_change_the_structure_make_groups():
    groups = jgd.grid(jgd.sgd, learning_rate=[0.1, 0.2], momentum=[None, 0.9])
    assert set(groups) == {"momentum=None", "momentum=number"}
    assert groups["momentum=None"].axes.keys() == {"learning_rate"}
    result = jgd.sweep(line_task(), {"sgd": groups}, 10)
    assert {row["optimizer"] for row in result.rows} == {
        "sgd momentum=None",
        "sgd momentum=number",
    }
    flags = jgd.grid(jgd.adam, nesterov=[True, False], learning_rate=[0.1])
    assert set(flags) == {"nesterov=True", "nesterov=False"}


def test_grids_and_distributions_refuse_bad_values():
    with pytest.raises(ValueError, match=r"adam: b1 must be in \[0, 1\), got 1.5"):
        jgd.grid(jgd.adam, learning_rate=[0.1], b1=[0.9, 1.5])
    with pytest.raises(ValueError, match="axis learning_rate must have at least one value"):
        jgd.grid(jgd.adam, learning_rate=[])
    with pytest.raises(ValueError, match="at least one axis"):
        jgd.grid(jgd.adam)
    with pytest.raises(
        ValueError, match="loguniform: bounds must satisfy 0 < low < high, got 0 and 1"
    ):
        jgd.loguniform(0, 1)
    with pytest.raises(ValueError, match="uniform: bounds must satisfy low < high, got 1 and 1"):
        jgd.uniform(1, 1)


def test_random_search_draws_from_its_distributions():
    draw = lambda seed: jgd.random_search(
        jgd.adam,
        500,
        jax.random.key(seed),
        learning_rate=jgd.loguniform(1e-5, 1e-1),
        b1=jgd.uniform(0.5, 0.99),
        eps=jgd.choice([1e-8, 1e-4]),
    )
    lanes = draw(0)
    rates = np.log10(lanes.axes["learning_rate"])
    assert -5 <= rates.min() < -4.9 < -1.1 < rates.max() <= -1
    assert abs(rates.mean() + 3) < 0.15
    assert set(lanes.axes["eps"]) == {1e-8, 1e-4}
    np.testing.assert_array_equal(draw(0).axes["b1"], lanes.axes["b1"])
    assert (draw(1).axes["b1"] != lanes.axes["b1"]).any()


def test_axes_of_a_plain_batch_are_the_leaves_that_differ():
    lanes = jax.vmap(jgd.adam)(jnp.array([0.1, 0.2]))
    result = jgd.sweep(line_task(), lanes, 10)
    assert {row["learning_rate"] for row in result.rows} == {np.float32(0.1), np.float32(0.2)}
    assert result.rows[0]["optimizer"] == "adam"
    with pytest.raises(ValueError, match=r"one leading axis.*jgd\.grid"):
        jgd.sweep(line_task(), jgd.adam(0.1), 10)


CLIP = jgd.as_pytree(optax.clip_by_global_norm)
CHAINS = {
    "one number": (lambda x: jgd.chain(CLIP(1.0), jgd.adam(x)), ["adam.learning_rate"]),
    "a schedule": (
        lambda x: jgd.chain(CLIP(x), jgd.adam(jgd.cosine_decay_schedule(x, 10))),
        ["clip_by_global_norm.max_norm", "adam.learning_rate"],
    ),
    "two numbers of a schedule": (
        lambda x: jgd.chain(jgd.adam(jgd.cosine_decay_schedule(x, 100 * x))),
        ["adam.learning_rate.init_value", "adam.learning_rate.decay_steps"],
    ),
    "two links of one name": (
        lambda x: jgd.chain(jgd.adam(x), jgd.adam(x)),
        ["links[0].learning_rate", "links[1].learning_rate"],
    ),
    "a wrapper": (lambda x: jgd.accumulate(jgd.adam(x), 2), ["adam.learning_rate"]),
    "a pair": (lambda x: (jgd.chain(jgd.sgd(x)), x), ["sgd.learning_rate", "[1]"]),
    "groups": (
        lambda x: jgd.param_groups(jgd.sgd(x), {"*/bias": jgd.sgd(2 * x)}),
        ["sgd.learning_rate", "*/bias.learning_rate"],
    ),
}


@pytest.mark.parametrize("case", CHAINS)
def test_axes_are_named_by_the_links_own_arguments(case):
    build, names = CHAINS[case]
    assert list(lanes_of(jax.vmap(build)(jnp.array([0.1, 0.2]))).axes) == names


def test_groups_are_named_by_the_factory_of_their_structure():
    short, long = jgd.cosine_decay_schedule(0.1, 10), jgd.cosine_decay_schedule(0.1, 20)
    rates = [short, long, optax.constant_schedule(0.1), 0.3]
    assert list(jgd.grid(jgd.sgd, learning_rate=rates)) == [
        "learning_rate=cosine_decay_schedule",
        "learning_rate=cosine_decay_schedule (1)",
        "learning_rate=<lambda>",
        "learning_rate=number",
    ]
    build = functools.partial(jgd.adamw, 0.1)
    masks = jgd.grid(build, mask=[None, {"w": True}], mu_dtype=[jnp.bfloat16])
    assert list(masks) == ["mask=None, mu_dtype=bfloat16", "mask=dict, mu_dtype=bfloat16"]


# --- the plan --------------------------------------------------------------------------------


def test_the_plan_is_plain_data():
    lanes = jgd.grid(jgd.adam, learning_rate=np.logspace(-3, -1, 7))
    plan = prepare_sweep(line_task(), {"adam": lanes}, 50, seeds=3, width=8, report_every=20).plan
    assert plan.reports == [20, 40, 50]
    assert plan.groups[0].widths == [8, 4, 2, 1]
    assert plan.lane_steps == 7 * 3 * 50
    assert json.loads(json.dumps(plan.as_json())) == plan.as_json()
    again = prepare_sweep(line_task(), {"adam": lanes}, 50, seeds=3, width=8, report_every=20)
    assert again.plan == plan
    assert prepare_sweep(line_task(batch_size=3), {"adam": lanes}, 50).plan.task != plan.task


@pytest.mark.parametrize("wrong", [dict(seeds=0), dict(width=0), dict(report_every=0)])
def test_options_out_of_range_are_errors(wrong):
    lanes = jgd.grid(jgd.adam, learning_rate=[0.1])
    with pytest.raises(ValueError, match=f"sweep: {next(iter(wrong))} must be at least 1, got 0"):
        jgd.sweep(line_task(), lanes, 10, **wrong)
    with pytest.raises(ValueError, match="steps must be at least 4, got 3"):
        jgd.sweep(line_task(), lanes, 3)
    with pytest.raises(ValueError, match="mode must be 'min' or 'max', got 'best'"):
        jgd.sweep(line_task(), lanes, 10, mode="best")
    with pytest.raises(ValueError, match="metric must be one of loss, got 'accuracy'"):
        jgd.sweep(line_task(), lanes, 10, metric="accuracy")


def test_the_plan_holds_the_random_key_as_plain_data(tmp_path):
    """A key that an int makes is stored as the int, any other key as its kind and words."""
    task = line_task()._replace(
        init=lambda key: {"w": jax.random.normal(key, (2,)), "b": jnp.zeros(())}
    )
    lanes = jgd.grid(jgd.adam, learning_rate=[0.1])
    plan = lambda key: prepare_sweep(task, lanes, 8, key=key).plan.as_json()
    assert plan(0)["key"] == 0
    assert plan(jax.random.key(0)) == plan(jax.random.PRNGKey(0)) == plan(np.int64(0)) == plan(0)
    keys = jax.random.split(jax.random.key(1))[1], jax.random.split(jax.random.PRNGKey(1))[1]
    kind, *words = plan(keys[0])["key"]
    assert (kind, words) == ("threefry2x32", jax.random.key_data(keys[0]).tolist())
    options = dict(key=keys[0], folder=tmp_path / "a")
    result = jgd.sweep(task, lanes, 8, **options)
    assert jgd.sweep(task, lanes, 8, resume=True, **options | {"key": keys[1]}).rows == result.rows
    alone, _ = jgd.train(task, result.best.setting, 8, jax.random.fold_in(keys[0], 0))
    chex.assert_trees_all_close(result.best.params, alone, rtol=1e-5)


# --- training as lanes -----------------------------------------------------------------------


def test_a_lane_does_not_depend_on_neighbours_position_or_chunking():
    rates = [0.05, 0.1, 0.2, 0.3]
    reference = _curves(jgd.grid(jgd.momentum, learning_rate=rates))
    diverged = _curves(jgd.grid(jgd.momentum, learning_rate=[0.05, 1e30, 1e38, 1e6]))
    np.testing.assert_array_equal(diverged[0], reference[0])  # bit for bit, beside NaN and inf
    assert not np.isfinite(diverged[1:, -1]).any()
    moved = _curves(jgd.grid(jgd.momentum, learning_rate=rates[::-1]))
    np.testing.assert_array_equal(moved[::-1], reference)
    chunks = jgd.sweep(
        line_task(),
        {"tx": jgd.grid(jgd.momentum, learning_rate=rates)},
        40,
        width=4,
        report_every=7,
    )
    whole = jgd.sweep(
        line_task(),
        {"tx": jgd.grid(jgd.momentum, learning_rate=rates)},
        40,
        width=4,
        report_every=40,
    )
    np.testing.assert_array_equal(
        chunks.curves["tx"].metrics["loss"][:, -1], whole.curves["tx"].metrics["loss"][:, -1]
    )
    padded = _curves(jgd.grid(jgd.momentum, learning_rate=[0.9, 0.8, 0.7, 0.6, *rates[:1]]))
    np.testing.assert_array_equal(padded[4], reference[0])  # the only lane of a padded tile


def test_a_lane_equals_training_its_setting_alone():
    task, rates = digits(), [0.003, 0.03, 0.1]
    result = jgd.sweep(
        task, {"adam": jgd.grid(jgd.adam, learning_rate=rates)}, 50, report_every=1, width=3
    )
    key = jax.random.fold_in(jax.random.key(0), 0)  # seed 0 of key 0
    for rate, curve in zip(rates, result.curves["adam"].train_loss, strict=True):
        _, history = jgd.train(task, jgd.adam(rate), 50, key)
        np.testing.assert_allclose(curve, history["loss"], rtol=1e-5, atol=1e-5)
    wide = jgd.sweep(
        task, {"adam": jgd.grid(jgd.adam, learning_rate=rates * 5)}, 50, report_every=1, width=15
    )
    np.testing.assert_allclose(
        wide.curves["adam"].train_loss[:3], result.curves["adam"].train_loss, rtol=1e-5, atol=1e-5
    )


class _Spy:
    """Replaces jax.jit in the engine, and records the text of each program that is compiled."""

    def __init__(self, monkeypatch):
        self.texts, self.jit = [], jax.jit
        monkeypatch.setattr(compiling.jax, "jit", self)

    def __call__(self, *args, **kwargs):
        self.jitted = self.jit(*args, **kwargs)
        return self

    def lower(self, *args):
        lowered = self.jitted.lower(*args)
        self.texts.append(lowered.as_text())
        return lowered


def test_tiles_are_padded_to_the_width_that_is_given():
    """So a lane that trains alone equals bit for bit the lane that trains with others."""
    rates = [0.05, 0.1, 0.2, 0.3]
    together = _curves(jgd.grid(jgd.adam, learning_rate=rates))
    alone = _curves(jgd.grid(jgd.adam, learning_rate=rates[1:2]))
    np.testing.assert_array_equal(alone[0], together[1])


def test_the_width_is_bounded_by_memory(monkeypatch):
    lanes = {"adam": jgd.grid(jgd.adam, learning_rate=np.logspace(-3, -1, 64))}
    wide = prepare_sweep(line_task(), lanes, 30)
    lane = wide.sweep.engine.programs[0].bytes_of_lane()
    monkeypatch.setattr(widths, "_memory", lambda: 4 * 5.5 * lane * wide.plan.at_once)
    assert prepare_sweep(line_task(), lanes, 30).plan.groups[0].width == 5
    assert prepare_sweep(line_task(), lanes, 30, width=64).plan.groups[0].width == 64


def test_a_sweep_in_float64(float64):
    result = jgd.sweep(
        line_task(), jgd.grid(jgd.adam, learning_rate=[0.01, 0.1]), 20, report_every=5
    )
    assert result.curves["adam"].train_loss.dtype == np.float64
    assert all(np.isfinite(row["loss"]) for row in result.rows)


def test_init_can_return_python_numbers():
    run = jgd.Run(
        lambda setting, key: {"x": 0, "n": 0},
        lambda setting, state, batch: (
            {"x": state["x"] + setting["rate"], "n": state["n"] + 1},
            {"loss": -state["x"]},
        ),
        lambda setting, state: {"loss": -state["x"], "steps": state["n"]},
        lambda step: step,
    )
    lanes = jgd.grid(lambda rate: {"rate": jnp.asarray(rate, float)}, rate=[0.5, 2.0])
    result = jgd.sweep(run, lanes, 10, report_every=3)
    assert [row["loss"] for row in result.rows] == [-20.0, -5.0]


def test_bad_metrics_and_settings_are_errors_before_any_training(tmp_path):
    lanes, folder = jgd.grid(jgd.sgd, learning_rate=[0.1]), tmp_path / "new"
    wrong = {
        "dict of scalars": lambda params: jnp.sum(params["w"]),
        "metric w of evaluate must be a scalar": lambda params: {"w": params["w"]},
    }
    for name in ("rank", "train_loss", "learning_rate"):
        message = f"evaluate must not report '{name}', which is a column of the table"
        wrong[message] = lambda params, name=name: {name: jnp.sum(params["w"])}
    for message, evaluate in wrong.items():
        with pytest.raises(ValueError, match=message):
            jgd.sweep(line_task()._replace(evaluate=evaluate), lanes, 10, folder=folder)
    with pytest.raises(ValueError, match="settings must hold at least one setting, got none"):
        jgd.sweep(line_task(), {}, 10, folder=folder)
    both = jgd.grid(jgd.sgd, learning_rate=[0.1], momentum=[None, 0.9])
    with pytest.raises(ValueError, match="distinct names of groups, got 'sgd momentum=None' twice"):
        jgd.sweep(line_task(), {"sgd": both, "sgd momentum=None": lanes}, 10, folder=folder)
    with pytest.raises(TypeError, match="hides its numbers in functions"):
        jgd.grid(lambda rate: optax.chain(optax.clip(1.0), jgd.sgd(rate)), rate=[0.1])
    with pytest.raises(ValueError, match=r"axis rate must be a sequence of values, got 0\.1"):
        jgd.grid(jgd.sgd, rate=0.1)
    assert not folder.exists()


def test_the_first_metric_of_the_task_is_the_default():
    evaluate = lambda params: {"r2": jnp.sum(params["w"]), "mae": jnp.sum(params["b"])}
    result = jgd.sweep(
        line_task()._replace(evaluate=evaluate), jgd.grid(jgd.sgd, learning_rate=[0.1]), 10
    )
    assert result.metric == "r2"


def test_axes_can_hold_arrays_and_schedules():
    rates = list(jnp.logspace(-3, -1, 3))
    assert len(jgd.grid(jgd.adam, learning_rate=[*rates, 0.2])) == 4
    steps = [
        jgd.piecewise_constant(jnp.array([3, 6]), jnp.array([x, 0.1, 0.01])) for x in (0.2, 0.3)
    ]
    result = jgd.sweep(line_task(), jgd.stack([jgd.sgd(schedule) for schedule in steps]), 10)
    assert {round(row["learning_rate.values[0]"], 6) for row in result.rows} == {0.2, 0.3}
    groups = jgd.grid(jgd.sgd, learning_rate=steps)
    assert len(jgd.sweep(line_task(), {"sgd": groups}, 10).rows) == 2


def test_one_program_for_each_group(monkeypatch):
    groups = {
        name: jgd.grid(getattr(jgd, name), learning_rate=np.logspace(-3, -1, 30))
        for name in ("sgd", "adam")
    }
    task, spy = line_task(), _Spy(monkeypatch)
    jgd.sweep(task, groups, 30, seeds=2, width=8, report_every=7)
    assert len(spy.texts) == 2 + 2 * 2  # batches, parameters; start and chunk of each group


def test_one_program_for_each_structure_and_width(monkeypatch):
    """Each structure also has one program that starts it. One program makes all parameters."""
    groups = {
        name: jgd.grid(getattr(jgd, name), learning_rate=np.logspace(-3, -1, 32))
        for name in ("sgd", "adam", "momentum")
    }
    spy, halving = _Spy(monkeypatch), jgd.successive_halving(2, 4, within="group")
    prepared = prepare_sweep(line_task(), groups, 32, width=16, halving=halving)
    assert list(events(prepared))
    widths = [set(program.chunks) for program in prepared.sweep.engine.programs]
    assert widths == [{16, 8, 4}] * 3
    assert len(spy.texts) == 2 + 3 * (1 + 3)


def test_data_are_arguments_of_the_program(monkeypatch):
    """Data as constants in the program would make it slow to compile."""
    data = jnp.asarray(np.random.default_rng(0).normal(size=(5000, 7)), jnp.float32)
    task = jgd.Task(
        init=lambda key: jnp.zeros(7),
        loss=lambda params, batch: jnp.mean((batch @ params - 1) ** 2),
        batch=lambda step: data[step * 10 + jnp.arange(10)],
        evaluate=lambda params: {"loss": jnp.mean((data @ params - 1) ** 2)},
    )
    lanes = jgd.grid(jgd.sgd, learning_rate=[0.1, 0.2])
    spy = _Spy(monkeypatch)
    jgd.sweep(task, lanes, 20)
    assert len(spy.texts) == 4  # batches, parameters, start, chunk
    assert max(map(len, spy.texts)) < 60_000  # the data alone are 140,000 bytes
    assert any("tensor<5000x7xf32>" in text for text in spy.texts)


def test_full_batches_are_not_copied_ahead():
    task = line_task(batch_size=None)
    ahead = lambda task: FunctionBatches(task.batch, [10, 20], None, compiling.Compiler(None)).ahead
    assert not ahead(task)
    assert ahead(line_task())
    curves = jgd.sweep(task, jgd.grid(jgd.sgd, learning_rate=[0.1]), 20).curves["sgd"]
    assert (np.diff(curves.train_loss[0]) < 0).all()


def test_seeds_differ_only_in_their_initial_parameters():
    result = jgd.sweep(
        digits(), jgd.grid(jgd.sgd, learning_rate=[0.0, 0.1]), 4, seeds=3, report_every=1
    )
    losses = result.curves["sgd"].train_loss
    assert len(set(losses[:3, 0].tolist())) == 3
    np.testing.assert_array_equal(losses[:3, 0], losses[3:, 0])  # the same for both settings


def test_iter_sweep_yields_a_report_per_tile_and_report_step():
    lanes = jgd.grid(jgd.sgd, learning_rate=[0.1, 0.2, 0.3])
    reports = list(jgd.iter_sweep(line_task(), {"sgd": lanes}, 20, width=2, report_every=10))
    reports.sort(key=lambda r: (r.tile, r.step))  # tiles may run at the same time
    assert [(r.tile, r.step) for r in reports] == [(0, 10), (0, 20), (1, 10), (1, 20)]
    assert [r.lanes.tolist() for r in reports[1:3]] == [[0, 1], [2]]
    assert reports[2].loss.shape == (1,)
    assert [r.statistics is None for r in reports] == [True, False, True, False]


# --- the result ------------------------------------------------------------------------------


def run_with_scores(values):
    """Return a run and settings with these metrics, of shape (settings, seeds)."""
    table = jnp.asarray(values, jnp.float32)

    def init(setting, key):
        seed = jnp.argmax(jax.vmap(lambda k: jnp.array_equal(k, jax.random.key_data(key)))(keys))
        return table[setting["row"].astype(int), seed]

    root = jax.random.key(0)
    keys = jax.random.key_data(
        jax.vmap(lambda seed: jax.random.fold_in(root, seed))(jnp.arange(table.shape[1]))
    )
    run = jgd.Run(
        init,
        lambda setting, state, batch: (state, {"loss": state}),
        lambda setting, state: {"score": state},
        lambda step: 0.0,
    )
    lanes = jgd.grid(lambda row: {"row": jnp.asarray(row, float)}, row=list(range(len(values))))
    return run, lanes


def test_settings_are_ranked_by_the_mean_over_seeds():
    run, lanes = run_with_scores([[3.0, 5.0], [1.0, np.nan], [2.0, 2.0], [2.0, 2.0], [0.0, 9.0]])
    # a width of 3 puts the two seeds of a setting into different tiles
    result = jgd.sweep(run, lanes, 4, seeds=2, width=3, mode="min")
    assert [row["row"] for row in result.rows] == [2, 3, 0, 4, 1]
    assert result.rows[0]["score_se"] == 0
    np.testing.assert_allclose(result.rows[2]["score_se"], 1.0)
    assert result.best.row == result.rows[0]
    assert float(result.best.state) == 2.0
    highest = jgd.sweep(run, lanes, 4, seeds=2, width=3, mode="max")
    assert [row["row"] for row in highest.rows] == [4, 0, 2, 3, 1]
    assert float(highest.best.state) == 9.0  # its better seed
    assert highest.best.setting["row"] == 4


def test_the_best_parameters_belong_to_the_first_row():
    task = digits()
    lanes = jgd.grid(jgd.adam, learning_rate=[1e-5, 3e-3, 1.0])
    result = jgd.sweep(task, lanes, 60, width=2)
    assert result.rows[0]["learning_rate"] == 3e-3
    assert task.evaluate(result.best.params)["accuracy"] == np.float32(result.rows[0]["accuracy"])
    assert result.best.setting == jgd.lane(lanes, 1)
    state = result.best.state  # can train further
    updates, _ = result.best.setting.update(state.params, state.opt_state, state.params)
    optax.apply_updates(state.params, updates)
    assert [row["verdict"] for row in result.rows][-1] in ("diverged", "too small", "oscillating")


# --- the folder ------------------------------------------------------------------------------


def test_a_folder_holds_plan_journal_and_results(tmp_path):
    lanes = jgd.grid(jgd.sgd, learning_rate=[0.1, 1e30])
    for name in ("one", "two"):
        result = jgd.sweep(line_task(), {"sgd": lanes}, 20, seeds=2, folder=tmp_path / name)
    folder = tmp_path / "one"
    assert {path.name for path in folder.iterdir()} == {
        "plan.json",
        "journal.jsonl",
        "results.csv",
        "results.json",
        "curves.npz",
        "settings.pickle",
        "manifest-1.json",
        "states",
        "lock",
    }
    for name in ("plan.json", "journal.jsonl", "results.csv", "results.json"):
        assert (folder / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [float(row["loss"]) for row in rows][:1] == [result.rows[0]["loss"]]
    plain = json.loads((folder / "results.json").read_text())
    assert plain["rows"][1]["final_loss"] is None  # not finite, which JSON cannot express
    assert plain["rows"][1]["verdict"] == "diverged"
    lines = (folder / "journal.jsonl").read_text().splitlines()
    read = [decode(line, result.plan) for line in lines]
    assert [report.step for report in read] == result.plan.reports
    assert [encode(report) for report in read] == lines
    with pytest.raises(FileExistsError, match="is not empty"):
        jgd.sweep(line_task(), {"sgd": lanes}, 20, folder=folder)


def test_on_report_is_called_with_every_report():
    steps = []
    lanes = jgd.grid(jgd.sgd, learning_rate=[0.1])
    jgd.sweep(
        line_task(),
        lanes,
        20,
        report_every=5,
        on_report=lambda plan, report: steps.append(report.step),
    )
    assert steps == [5, 10, 15, 20]


def test_jax_sees_only_the_settings_of_lanes():
    lanes = jgd.grid(jgd.adam, learning_rate=[0.1, 0.2])
    assert isinstance(jax.tree.map(lambda x: x, lanes), jgd.Transformation)
    chex.assert_trees_all_equal(jgd.lane(lanes, 1), jgd.lane(lanes.settings, 1))


def test_sweeps_of_one_task_share_their_programs(monkeypatch):
    task, lanes = line_task(), lambda *rates: jgd.grid(jgd.adam, learning_rate=list(rates))
    first = jgd.sweep(task, lanes(0.1, 0.2), 20, width=2)
    spy = _Spy(monkeypatch)
    again = jgd.sweep(task, lanes(0.2, 0.3), 20, width=2)
    assert not spy.texts
    np.testing.assert_array_equal(
        again.curves["adam"].train_loss[0], first.curves["adam"].train_loss[1]
    )
    for other in (dict(seeds=2), dict(key=1), dict(best="ever"), dict(report_every=10)):
        spy.texts.clear()
        jgd.sweep(task, lanes(0.2, 0.3), 20, width=2, **other)
        assert spy.texts, other
    spy.texts.clear()
    jgd.sweep(task._replace(init=lambda key: task.init(key)), lanes(0.2, 0.3), 20, width=2)
    assert spy.texts


def test_data_that_change_in_place_are_not_cached():
    """Sweeps of one task do not share programs once its data have changed in place."""
    data = np.ones((4, 2), np.float32)
    task = jgd.Task(
        init=lambda key: jnp.zeros(2),
        loss=lambda params, batch: jnp.mean((batch @ params - 1) ** 2),
        batch=lambda step: jnp.asarray(data),
        evaluate=lambda params: {"loss": jnp.mean((data @ params - 1) ** 2)},
    )
    losses = []
    for scale in (1, 3):
        data[:] = scale
        losses.append(jgd.sweep(task, jgd.grid(jgd.sgd, learning_rate=[0.01]), 4).rows[0]["loss"])
    assert losses[0] != losses[1]


def test_a_lane_that_ended_stays_when_the_block_of_its_tile_is_removed():
    """A lane that ended keeps its own block when the block of its tile is removed."""
    pool, rows = Pool(4), np.arange(4.0)
    pool.put(np.array([1]), rows[:1])
    pool.put(np.arange(4), rows, np.array([True, False, True, True]))
    assert pool.remove_block([0, 2, 3]) is None
    np.testing.assert_array_equal(pool.remove_block(np.arange(4)), rows)
    assert pool.lanes().tolist() == [1]


def test_programs_of_few_tasks_are_cached():
    from jgd.tuning import engine

    for _ in range(engine.CACHED + 2):
        jgd.sweep(line_task(), jgd.grid(jgd.sgd, learning_rate=[0.1]), 4)
    assert len(engine._cache) == engine.CACHED


def test_help_lists_the_options_and_a_misspelt_option_is_named():

    for function in (jgd.sweep, jgd.iter_sweep, jgd.optuna_search):
        names = list(inspect.signature(function).parameters)
        assert "seeds" in names
        assert "{arguments}" not in function.__doc__
        assert all(f"\n  {name}: " in function.__doc__ for name in names)
    lanes = jgd.grid(jgd.sgd, learning_rate=[0.1])
    with pytest.raises(TypeError, match=r"sweep: .*'widht'; did you mean width"):
        jgd.sweep(line_task(), lanes, 10, widht=2)
    with pytest.raises(TypeError, match=r"sweep: seeds must be an integer, got 1\.5"):
        jgd.sweep(line_task(), lanes, 10, seeds=1.5)
