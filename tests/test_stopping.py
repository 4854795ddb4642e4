"""Callbacks decide as in Keras, PyTorch and optax: epoch by epoch, in lanes of one program.

Keras adds min_delta in float64 and then compares in float32. With x64 enabled it compares in
float64, so the decisions of Keras are computed before the `float64` fixture is active. The curves
have ties on a grid: of eighths without x64, which are exact in float32, and of tenths under x64,
which are ties for Keras.
"""

import copy
import doctest
import functools
import inspect
import os
import pickle
from types import SimpleNamespace

os.environ.setdefault("KERAS_BACKEND", "jax")

import chex
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch
from keras.src.metrics import ALL_OBJECTS, ALL_OBJECTS_DICT
from keras.src.trainers.compile_utils import MetricsList, get_metric
from table import CONTRACTED

import jgd
from jgd import stopping
from jgd.compat.keras import callbacks as jk
from jgd.compat.torch import callbacks as jt
from jgd.stopping import early_stopping, improved, keep_best, reduce_on_plateau

EPOCHS, LANES = 24, 150


# --- curves and lanes ------------------------------------------------------------------------


def curves(rng, grid):
    """Return curves that fall or rise, with plateaus, ties on the grid, NaN and infinities."""
    falling = 3 * np.exp(-rng.uniform(0, 0.4, (LANES, 1)) * np.arange(EPOCHS))
    values = falling + rng.choice([0.02, 0.3], (LANES, 1)) * rng.normal(size=(LANES, EPOCHS))
    values = np.where(rng.random((LANES, 1)) < 0.7, np.round(values * grid) / grid, values)
    values *= rng.choice([-1.0, 1.0], (LANES, 1))
    holes = rng.random((LANES, EPOCHS)) * rng.choice([1, 9], (LANES, 1))
    for hole, start in ((np.nan, 0), (np.inf, 0.05), (-np.inf, 0.1)):
        values = np.where((holes >= start) & (holes < start + 0.05), hole, values)
    return values if grid == 10 else values.astype(np.float32).astype(np.float64)


def configurations(rng, **choices):
    draw = lambda values: values[rng.integers(len(values))]
    return [{name: draw(values) for name, values in choices.items()} for _ in range(LANES)]


@jax.jit
@jax.vmap
def follow(monitor, curve, *start):
    """Return the decision and the state of each epoch."""

    def epoch(state, value):
        decision, state = monitor.update(value, state)
        return state, (decision, state)

    return jax.lax.scan(epoch, monitor.init(*start), curve)[1]


@jax.jit
@jax.vmap
def follow_and_keep(monitor, curve):
    """Return decision, state, whether it improved, and the best epoch, of each epoch."""

    def epoch(carry, inputs):
        (state, best), (number, value) = carry, inputs
        decision, state = monitor.update(value, state)
        best = keep_best(state, {"epoch": number}, best)
        return (state, best), (decision, state, improved(state), best["epoch"])

    begin = monitor.init(), {"epoch": jnp.int32(-1)}
    return jax.lax.scan(epoch, begin, (jnp.arange(EPOCHS, dtype=jnp.int32), curve))[1]


def each_lane(run, build, configs, values, *start):
    """Yield each row and the result of `run` for it; rows of one structure run as lanes."""
    monitors = [build(**config) for config in configs]
    structures = list(map(jax.tree.structure, monitors))
    for structure in dict.fromkeys(structures):
        rows = [row for row, other in enumerate(structures) if other == structure]
        lanes = jgd.stack([monitors[row] for row in rows])
        results = run(lanes, *(jnp.asarray(x[rows], float) for x in (values, *start)))
        results = jax.tree.map(np.asarray, results)
        yield from ((row, jgd.lane(results, lane)) for lane, row in enumerate(rows))


# --- early stopping --------------------------------------------------------------------------


def keras_stops(curve, **config):
    """Return Keras's stop epoch, best, best epoch, wait and epoch of the weights; -1 for none."""
    callback = keras.callbacks.EarlyStopping(restore_best_weights=True, **config)
    model = SimpleNamespace(stop_training=False, metrics=[], weights=-1)
    model.get_weights = lambda: model.weights
    model.set_weights = lambda weights: setattr(model, "weights", weights)
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, value in enumerate(curve):
        model.weights = epoch
        callback.on_epoch_end(epoch, {"val_loss": float(value)})
        if model.stop_training:
            break
    callback.on_train_end()
    stopped = callback.stopped_epoch if model.stop_training else -1
    if callback.best is None:
        return stopped, None, -1, callback.wait, -1
    return stopped, callback.best, callback.best_epoch, callback.wait, model.weights


def stopping_cases(grid):
    rng = np.random.default_rng(1)
    configs = configurations(
        rng,
        patience=[0, 1, 2, 3, 5, 8],
        min_delta=[0, 0, 1 / grid, 2 / grid, -1 / grid],
        mode=["min", "max"],
        baseline=[None, None, 0.5, -1.0, np.nan],
        start_from_epoch=[0, 0, 1, 3, 30],
    )
    values = curves(rng, grid)
    truth = [keras_stops(v, **c) for v, c in zip(values, configs, strict=True)]
    stops = [stop for stop, *_ in truth]
    assert 20 < sum(stop < 0 for stop in stops) < 120
    assert len(set(stops)) > 10
    return configs, values, truth


@pytest.fixture(scope="module")
def on_eighths():
    return stopping_cases(8)


@pytest.fixture(scope="module")
def on_tenths():
    return stopping_cases(10)


def assert_stops_as_keras(build, configs, values, truth):
    runs = each_lane(follow_and_keep, build, configs, values)
    for row, (stops, states, betters, best_epochs) in runs:
        stop, best, best_epoch, wait, weights = truth[row]
        # After the stop every epoch returns True, and the state does not change.
        expected = (stop >= 0) & (np.arange(EPOCHS) >= stop)
        np.testing.assert_array_equal(stops, expected, err_msg=f"{configs[row]} {values[row]}")
        end = jax.tree.map(lambda x: x[-1], states)
        assert end.best_epoch == best_epoch == weights == best_epochs[-1]
        assert (end.stopped_epoch, end.wait) == (stop, wait)
        assert end.epoch == (EPOCHS if stop < 0 else stop + 1)
        assert best is not None or not betters.any()
        if best is not None:
            np.testing.assert_equal(float(end.best), best)
            assert np.flatnonzero(betters)[-1] == best_epoch


@pytest.mark.parametrize("build", [early_stopping, jk.early_stopping])
def test_early_stopping_is_that_of_keras(on_eighths, build):
    assert_stops_as_keras(build, *on_eighths)


def test_early_stopping_in_decimals(on_tenths, float64):
    assert_stops_as_keras(early_stopping, *on_tenths)


def test_hard_cases_of_early_stopping():
    """Stop epochs worked out by hand, which Keras has too."""
    nan = np.nan
    cases = [
        (dict(), [1, 1, 1], 1),  # patience 0: a tie stops, but not in epoch 0
        (dict(patience=1), [1, 1, 1], 1),
        (dict(), [nan, 0.5, 0.1], 1),  # a NaN in epoch 0 stays the best
        (dict(patience=2), [1, nan, nan, 0.5], 2),
        (dict(patience=2, min_delta=0.5), [1, 0.5, 0.5, 0.4], 2),
        (dict(patience=2, baseline=0.1), [1, 0.9, 0.8, 0.7, 0.7, 0.05], 4),
        (dict(patience=3, baseline=0.1), [1, 0.9, 0.05, 0.06, 0.07, 0.01], -1),
        (dict(patience=1, start_from_epoch=2), [0, 0, 5, 4, 4], 4),
        (dict(patience=1, mode="max"), [1, 2, 3, 3], 3),
    ]
    for config, curve, stop in cases:
        assert keras_stops(curve, **{"mode": "min", **config})[0] == stop
        init, update = early_stopping(**config)
        state = init()
        for value in curve:
            _, state = update(value, state)
        assert state.stopped_epoch == stop, (config, curve)


def test_all_numbers_share_one_program():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def last(monitor, curve):
        step = lambda state, value: monitor.update(value, state)[::-1]
        return jax.lax.scan(step, monitor.init(), curve)[1][-1]

    curve = jnp.array([3.0, 2.0, 1.5, 1.6, 1.7, 1.8])
    for patience, delta, baseline, start in ((3, 0, 0.1, 0), (4.0, 0.1, 9, 0), (1, 0.0, 1.0, 4)):
        stopped = last(early_stopping(patience, delta, "min", baseline, start), curve)
        assert stopped == (keras_stops(curve, patience=patience, min_delta=delta, mode="min",
                           baseline=baseline, start_from_epoch=start)[0] >= 0)  # fmt: skip
    patient = jax.vmap(lambda n: early_stopping(n, baseline=9.0))(jnp.arange(1, 6))
    stops = jax.vmap(last, (0, None))(patient, curve)
    np.testing.assert_array_equal(stops, [True, True, True, False, False])


def test_keep_best_takes_batches_and_its_example_runs():
    state = jax.vmap(lambda _: early_stopping().init())(jnp.arange(3))
    update = jax.vmap(early_stopping().update)
    for values in ([1.0, 1.0, 1.0], [2.0, 0.5, np.nan]):
        _, state = update(jnp.array(values), state)
    np.testing.assert_array_equal(improved(state), [False, True, False])
    kept = keep_best(state, {"w": jnp.ones((3, 2))}, {"w": jnp.zeros((3, 2))})
    np.testing.assert_array_equal(kept["w"], [[0, 0], [1, 1], [0, 0]])
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(keep_best, "keep_best", module=stopping)
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples))


# --- reduce on plateau -----------------------------------------------------------------------


def keras_rates(curve, rate, **config):
    """Return Keras's learning rates over a curve, and its final best, wait and cooldown."""
    callback = keras.callbacks.ReduceLROnPlateau(**config)
    OPTIMIZER.learning_rate = rate
    callback.set_model(SimpleNamespace(optimizer=OPTIMIZER, metrics=[]))
    callback.on_train_begin()
    rates = []
    for epoch, value in enumerate(curve):
        callback.on_epoch_end(epoch, {"val_loss": float(value)})
        rates.append(float(OPTIMIZER.learning_rate))
    return rates, (callback.best, callback.wait, max(callback.cooldown_counter, 0))


def torch_rates(curve, rate, **config):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **config)
    rates = []
    for value in curve:
        scheduler.step(float(value))
        rates.append(optimizer.param_groups[0]["lr"])
    return rates, (scheduler.best, scheduler.num_bad_epochs, scheduler.cooldown_counter)


OPTIMIZER = keras.optimizers.SGD()


def plateau_cases(grid, rates_of, **choices):
    rng = np.random.default_rng(2)
    configs = configurations(
        rng,
        mode=["min", "max"],
        factor=[0.1, 0.5, 0.9, 0.0] if grid == 10 else [0.125, 0.5, 0.875, 0.0],
        patience=[0, 1, 2, 5],
        cooldown=[0, 1, 2, 4],
        min_lr=[0, 0.01, 0.3, 0.5, 2.0],
        **choices,
    )
    values, start = curves(rng, grid), rng.choice([0.5, 0.1, 1e-7], LANES)
    truth = [rates_of(v, r, **c) for v, r, c in zip(values, start, configs, strict=True)]
    assert len({len(set(rates)) for rates, _ in truth}) > 4
    return configs, values, start, truth


@pytest.fixture(scope="module")
def keras_plateaus():
    min_delta = lambda grid: [0, 1 / grid, -2 / grid, 1e-4 if grid == 10 else 2**-13]
    return [plateau_cases(grid, keras_rates, min_delta=min_delta(grid)) for grid in (8, 10)]


def assert_rates_as(build, configs, values, start, truth, rtol):
    for row, (rates, states) in each_lane(follow, build, configs, values, start):
        expected, (best, wait, cooldown) = truth[row]
        shown = f"{configs[row]} {values[row]}"
        np.testing.assert_allclose(rates, expected, rtol=rtol, err_msg=shown)
        np.testing.assert_array_equal(states.learning_rate, rates)
        np.testing.assert_equal(float(states.best[-1]), best)
        assert (states[2][-1], states.cooldown_counter[-1]) == (wait, cooldown), shown


def test_reduce_lr_on_plateau_is_that_of_keras(keras_plateaus):
    assert_rates_as(jk.reduce_lr_on_plateau, *keras_plateaus[0], rtol=1e-6)


def test_reduce_lr_on_plateau_of_keras_in_decimals(keras_plateaus, float64):
    # rtol: the learning rate in Keras is a float32 variable.
    assert_rates_as(jk.reduce_lr_on_plateau, *keras_plateaus[1], rtol=1e-6)


THRESHOLDS = dict(threshold=[0, 1e-4, 0.1, 1.0], threshold_mode=["rel", "abs"], eps=[1e-8, 0, 0.02])


def test_reduce_lr_on_plateau_is_that_of_torch(float64):
    cases = plateau_cases(10, torch_rates, **THRESHOLDS)
    assert_rates_as(jt.reduce_lr_on_plateau, *cases, rtol=1e-13)


def test_reduce_lr_on_plateau_of_torch_in_float32():
    cases = plateau_cases(8, torch_rates, **{**THRESHOLDS, "threshold": [0, 0.25], "eps": [1e-8]})
    assert_rates_as(jt.reduce_lr_on_plateau, *cases, rtol=1e-6)


def test_a_real_fit_stops_and_slows_down_at_the_same_epochs():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(32, 4)), rng.normal(size=(32, 1))
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.3), loss="mse")
    callbacks = [
        keras.callbacks.ReduceLROnPlateau("loss", factor=0.7, patience=2, cooldown=2, min_lr=0.1),
        keras.callbacks.EarlyStopping("loss", patience=6, min_delta=0.01, start_from_epoch=2),
    ]
    history = model.fit(x, y, batch_size=4, epochs=60, verbose=0, callbacks=callbacks).history
    losses = history["loss"]
    assert 8 < len(losses) < 60
    assert len(set(history["learning_rate"])) > 2
    slow = jk.reduce_lr_on_plateau("loss", factor=0.7, patience=2, cooldown=2, min_lr=0.1)
    stop = jk.early_stopping("loss", patience=6, min_delta=0.01, start_from_epoch=2)
    one = lambda x: jnp.asarray([x])
    stops, _ = follow(jgd.stack([stop]), one(losses))
    np.testing.assert_array_equal(np.flatnonzero(stops[0]), [len(losses) - 1])
    rates, _ = follow(jgd.stack([slow]), one(losses), one(0.3))
    # Keras logs the rate of an epoch before the reduction.
    np.testing.assert_allclose(rates[0, :-1], history["learning_rate"][1:], rtol=1e-6)


def test_reduce_on_plateau_is_that_of_optax(float64):
    rng = np.random.default_rng(3)
    values = jnp.asarray(curves(rng, 10)[:60])
    values = values.at[:30].set(jnp.abs(values[:30]))
    choices = ([1, 2, 3, 5], [0, 1, 3], [1, 2, 4], [0.0, 0.02, 0.5])
    numbers = [jnp.asarray(rng.choice(choice, 60)) for choice in choices]
    grads = {"w": jnp.array([1.0, -2.0]), "none": None}

    def run(tx, values):
        def step(state, value):
            updates, state = tx.update(grads, state, grads, value=value, other=1)
            return state, (updates, state)

        return jax.lax.scan(step, tx.init(grads), values)[1]

    once = chex.assert_max_traces(run, n=1)
    ours_of = jax.jit(jax.vmap(once), compiler_options=CONTRACTED)
    scales = set()
    # No metric ties with the bound: a fused multiply-add would decide such a tie.
    choices = ((0.1, 1e-4, 0.0), (0.5, 0.0, 0.1), (0.9, 1.0, 0.5), (0.3, 0.2, 0.13))
    for factor, rtol, atol in choices:

        def lane(factory, patience, cooldown, size, low, static=(factor, rtol, atol)):
            factor, rtol, atol = static
            return factory(factor, patience, rtol, atol, cooldown, size, low)

        theirs_of = lambda values, *lanes: run(
            lane(optax.contrib.reduce_on_plateau, *lanes),
            values,
        )
        theirs = jax.jit(jax.vmap(theirs_of), compiler_options=CONTRACTED)(values, *numbers)
        ours = ours_of(jax.vmap(functools.partial(lane, reduce_on_plateau))(*numbers), values)
        chex.assert_trees_all_close(ours, theirs, rtol=1e-12)
        chex.assert_trees_all_equal_dtypes(ours, theirs)
        scales |= set(np.ravel(ours[1].scale))
    assert len(scales) > 20


def test_reduce_on_plateau_in_a_chain():
    tx = jgd.chain(jgd.sgd(1.0), reduce_on_plateau(0.5, patience=1, rtol=0.0))
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    state = tx.init(params)
    steps = []
    for value in (1.0, 1.0, 1.0, 0.5):
        updates, state = tx.update(params, state, params, value=value)
        assert updates["w"].dtype == jnp.bfloat16
        steps.append(float(updates["w"][0]))
    assert steps == [-1, -0.5, -0.25, -0.25]
    with pytest.raises(TypeError, match="reduce_on_plateau: value must be the metric, got None"):
        tx.update(params, state, params)
    for wrong in (dict(factor=1.0), dict(rtol=2.0), dict(atol=-1.0), dict(patience=0)):
        with pytest.raises(ValueError, match="reduce_on_plateau: "):
            reduce_on_plateau(**wrong)


# --- values ----------------------------------------------------------------------------------

VALUES = [
    early_stopping(3, baseline=0.5),
    jk.early_stopping("val_accuracy", patience=3),
    jk.reduce_lr_on_plateau(patience=2),
    jt.reduce_lr_on_plateau("max", threshold_mode="abs"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value).partition("(")[0])
def test_monitors_are_values(value):
    init, update = value
    assert (init, update) == (value.init, value.update)
    assert isinstance(value, jgd.pytree.Monitor)
    for twin in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
        assert twin == value
        assert hash(twin) == hash(value)
    assert jax.tree.map(lambda x: x + 1, value) != value
    assert value._replace(patience=9).patience == 9
    start = {"learning_rate": 0.5} if "lr" in repr(value) else {}
    state = value.init(**start)
    after = jax.jit(value.update)(1.0, state)[1]
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, after)
    with pytest.raises(TypeError, match=r"metric must be a scalar, got shape \(3,\).*jax\.vmap"):
        value.update(jnp.ones(3), state)
    with pytest.raises(ValueError, match=r"_\w+: expected a state of type .*State, got tuple of 0"):
        value.update(1.0, ())


def test_leaves_of_monitors():
    assert repr(early_stopping(3)) == (
        "early_stopping(patience=3.0, min_delta=0.0, baseline=None, start_from_epoch=0.0)"
    )
    assert jax.tree.leaves(early_stopping(3, baseline=0.5)) == [3, 0, 0.5, 0]
    assert jax.tree.leaves(jk.early_stopping(patience=3, verbose=1)) == [0, 3, 0]
    assert jax.tree.leaves(jk.reduce_lr_on_plateau()) == [0.1, 10, 1e-4, 0, 0]
    assert jax.tree.leaves(jt.reduce_lr_on_plateau()) == [0.1, 10, 1e-4, 0, 0, 1e-8]


def test_signatures_are_those_of_the_frameworks():
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    for ours, theirs, left_out in (
        (jk.early_stopping, keras.callbacks.EarlyStopping, ()),
        (jk.reduce_lr_on_plateau, keras.callbacks.ReduceLROnPlateau, ("kwargs",)),
        (jt.reduce_lr_on_plateau, plateau, ("optimizer",)),
        (reduce_on_plateau, optax.contrib.reduce_on_plateau, ()),
    ):
        call = lambda f: [(p.name, p.default) for p in inspect.signature(f).parameters.values()]
        assert call(ours) == [pair for pair in call(theirs) if pair[0] not in left_out]


def test_bad_numbers_and_modes_raise():
    for build in (jk.reduce_lr_on_plateau, jt.reduce_lr_on_plateau):
        with pytest.raises(ValueError, match=r"reduce_lr_on_plateau: factor .* below 1, got 1\.0"):
            build(factor=1.0)
    wrong = [
        (lambda: early_stopping(-1), ValueError, r"early_stopping: patience .* got -1\.0"),
        (lambda: early_stopping(mode="auto"), ValueError, "mode must be one of .*'min', 'max'"),
        (lambda: jk.early_stopping(mode="up"), ValueError, "mode must be one of .*'auto'"),
        (lambda: jk.early_stopping("val_hinge2"), ValueError, "must be 'min' or .* 'val_hinge2'"),
        (lambda: early_stopping(jgd.linear_schedule(1, 2, 3)), TypeError, "must be constant, got"),
        (lambda: jt.reduce_lr_on_plateau("auto"), ValueError, "reduce_lr_on_plateau: mode"),
        (lambda: jt.reduce_lr_on_plateau(min_lr=[0, 1]), TypeError, "min_lr must be a number"),
        (lambda: jt.reduce_lr_on_plateau().init(jnp.ones(2)), TypeError, "jax.vmap"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()


def keras_direction(metric):
    """Return the direction that Keras's callback chooses for a metric; None where it raises."""
    callback = keras.callbacks.EarlyStopping("val_" + metric.name)
    callback.set_model(SimpleNamespace(metrics=[MetricsList([metric])]))
    try:
        callback._set_monitor_op()
    except ValueError:
        return None
    return "max" if callback.monitor_op is keras.ops.greater else "min"


def test_auto_mode_knows_the_metrics_of_keras():
    metrics = []
    for name in [*ALL_OBJECTS_DICT, "acc", "accuracy", "mse", "MAE"]:  # names for `compile`
        try:
            metrics.append(get_metric(name, np.zeros((4, 3)), np.zeros((4, 3))))
        except (TypeError, ValueError):
            continue
    options = [{}, {"num_classes": 3}, {"num_classes": 3, "target_class_ids": [1]}]
    options += [{name: 0.5} for name in ("recall", "precision", "specificity", "sensitivity")]
    for kind in ALL_OBJECTS:  # two objects of each class: the second has a number in its name
        for option in options:
            try:
                metrics += [kind(**option), kind(**option)]
                break
            except TypeError:
                continue
    assert len(metrics) > 150
    for metric in metrics:
        truth = keras_direction(metric)
        if truth is None:
            with pytest.raises(ValueError, match=f"early_stopping.*'val_{metric.name}'"):
                jk.early_stopping("val_" + metric.name)
        else:
            for monitor in (metric.name, "val_" + metric.name):
                worst = jk.early_stopping(monitor).init().best
                assert worst == (np.inf if truth == "min" else -np.inf), metric.name
    assert jk.early_stopping("loss").init().best == np.inf


def test_a_learning_rate_is_traced_and_differentiated():
    def last(monitor, rate):
        step = lambda state, value: monitor.update(value, state)[::-1]
        return jax.lax.scan(step, monitor.init(rate), jnp.ones(9))[1][-1]

    for monitor in (jk.reduce_lr_on_plateau(patience=4), jt.reduce_lr_on_plateau(patience=3)):
        value, (by_number, by_rate) = jax.value_and_grad(last, (0, 1))(monitor, 0.2)
        np.testing.assert_allclose([value, by_number.factor, by_rate], [0.002, 0.04, 0.01], 1e-5)
        rates = jax.vmap(last, (None, 0))(monitor, jnp.array([0.2, 1.0]))
        np.testing.assert_allclose(rates, [0.002, 0.01], rtol=1e-5)
