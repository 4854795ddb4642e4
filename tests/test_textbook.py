"""The optimizers of a textbook chapter: its snippets, its formulas and Keras give equal numbers."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import chex
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from conftest import run

import jgd
import jgd.compat.keras as jk
from jgd.compat import textbook
from jgd.transforms import MovingAverageState

# --- one step on var^2 / 2, from 1 -----------------------------------------------------------


def _steps(tx, count=1):
    """Return the points of a path on var^2 / 2, whose gradient is var, from 1."""
    var, path = jnp.float32(1.0), []
    state = tx.init(var)
    for _ in range(count):
        updates, state = tx.update(var, state, var)
        var = var + updates
        chex.assert_shape(var, ())
        chex.assert_type(var, jnp.float32)
        path.append(var)
    return path


SNIPPETS = [
    ("sgd", "SGD", {}, 0.9),
    ("sgd", "SGD", dict(momentum=0.9), 0.9),
    ("adagrad", "Adagrad", dict(initial_accumulator_value=0.1, epsilon=1e-7), 0.90465),
    ("rmsprop", "RMSprop", {}, 0.68377),
    ("adam", "Adam", {}, 0.9),
]


@pytest.mark.parametrize(("ours", "theirs", "numbers", "printed"), SNIPPETS)
def test_one_step_equals_keras_and_the_printed_number(ours, theirs, numbers, printed):
    (after,) = _steps(getattr(jk, ours)(0.1, **numbers))
    variable = keras.Variable(1.0)
    optimizer = getattr(keras.optimizers, theirs)(0.1, **numbers)
    optimizer.apply([variable.value], [variable])
    chex.assert_trees_all_close(after, variable.value, rtol=1e-6)
    chex.assert_trees_all_close(after, jnp.float32(printed), rtol=0, atol=6e-6)  # five digits


def test_momentum_steps_by_a_tenth_and_then_by_eighteen_hundredths():
    for tx in (jk.sgd(0.1, momentum=0.9), textbook.momentum(0.1), jgd.momentum(0.1)):
        first, second = _steps(tx, 2)
        steps = 1 - first, first - second
        chex.assert_trees_all_close(steps, (jnp.float32(0.1), jnp.float32(0.18)), rtol=1e-6)


# --- the optimizers against the formulas of the chapter, in float64 --------------------------


def _textbook_rules():
    """Return the formulas of the chapter in NumPy, with its misprints corrected."""
    zero = lambda g: 0 * g

    def momentum(g, s, t, eta=0.01, a=0.9):
        v = a * s.get("v", zero(g)) - eta * g
        return v, {"v": v}

    def momentum_average(g, s, t, eta=0.01, b=0.9):
        v = b * s.get("v", zero(g)) + (1 - b) * g
        return -eta * v, {"v": v}

    def nesterov(g, s, t, eta=0.01, mu=0.9):
        old = s.get("v", zero(g))
        return mu**2 * old - (1 + mu) * eta * g, {"v": mu * old - eta * g}

    def adagrad(g, s, t, eta=0.01, eps=1e-7, inside=0.0, start=0.0):
        h = s.get("h", zero(g) + start) + g**2
        return -eta * g / (np.sqrt(h + inside) + eps), {"h": h}

    def rmsprop(g, s, t, eta=0.01, rho=0.99, eps=1e-7, inside=0.0):
        h = rho * s.get("h", zero(g)) + (1 - rho) * g**2
        return -eta * g / (np.sqrt(h + inside) + eps), {"h": h}

    def adam(g, s, t, eta=0.001, b1=0.9, b2=0.999, eps=1e-7, inside=0.0):
        m = b1 * s.get("m", zero(g)) + (1 - b1) * g
        v = b2 * s.get("v", zero(g)) + (1 - b2) * g**2
        rate = eta * np.sqrt(1 - b2**t) / (1 - b1**t)
        return -rate * m / (np.sqrt(v + inside) + eps), {"m": m, "v": v}

    return dict(
        sgd=lambda g, s, t, eta=0.01: (-eta * g, s),
        momentum=momentum,
        momentum_average=momentum_average,
        nesterov=nesterov,
        adagrad=adagrad,
        rmsprop=rmsprop,
        adam=adam,
    )


# Numbers other than the defaults, in the order of the arguments, with both epsilons.
NUMBERS = {
    "sgd": (0.3,),
    "momentum": (0.3, 0.7),
    "momentum_average": (0.3, 0.7),
    "nesterov": (0.3, 0.7),
    "adagrad": (0.3, 0.02, 1e-3, 0.1),
    "rmsprop": (0.3, 0.7, 0.02, 1e-3),
    "adam": (0.3, 0.7, 0.95, 0.02, 1e-3),
}
# The same with epsilon only inside the root.
ALONE = {"adagrad": (0.3, 0.0, 1e-3), "rmsprop": (0.3, 0.7, 0.0, 1e-3)}
ALONE |= {"adam": (0.3, 0.7, 0.95, 0.0, 1e-3)}


@pytest.mark.parametrize("name", textbook.__all__)
def test_optimizers_equal_the_formulas_of_the_chapter(name, float64):
    """They do with the defaults, with other numbers, and with epsilon only inside the root."""
    gradients = np.random.default_rng(0).normal(size=(50, 6)) * 10.0 ** np.arange(-3, 3)
    for numbers in ((), NUMBERS[name], *([ALONE[name]] if name in ALONE else ())):
        ours = run(getattr(textbook, name)(*numbers), jnp.asarray(gradients), jnp.ones(6))
        rule, state, expected = _textbook_rules()[name], {}, []
        for t, g in enumerate(gradients, 1):
            u, state = rule(g, state, t, *numbers)
            expected.append(u)
        # where a velocity crosses 0, its error is that of the larger velocities before
        chex.assert_trees_all_close(ours, np.stack(expected), rtol=1e-11, atol=1e-15)


STATES = {
    "sgd": None,
    "momentum": lambda tree, _: optax.TraceState(tree),
    "momentum_average": lambda tree, _: MovingAverageState(tree),
    "nesterov": lambda tree, _: optax.TraceState(tree),
    "adagrad": lambda tree, _: optax.ScaleByRssState(tree),
    "rmsprop": lambda tree, _: optax.ScaleByRmsState(tree),
    "adam": lambda tree, count: optax.ScaleByAdamState(count, tree, tree),
}


@pytest.mark.parametrize("name", textbook.__all__)
def test_states_agree_with_the_docstrings(name):
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2, jnp.bfloat16)}
    like = jax.tree.map(lambda p: jnp.zeros(p.shape), params)
    tx = getattr(textbook, name)()
    state = tx.init(params)
    accumulators = [part for part in state if not isinstance(part, optax.EmptyState)]
    if STATES[name] is None:
        assert not jax.tree.leaves(state)
    else:
        chex.assert_trees_all_equal(accumulators, [STATES[name](like, jnp.int32(0))], strict=True)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_misprints_have_the_effects_that_the_docstrings_state(float64):
    g = 0.5
    m, v = 0.1 * g, 0.001 * g**2
    printed = m / np.sqrt(1 - 0.9) / np.sqrt(v)
    chex.assert_trees_all_close(printed, 10.0, rtol=1e-12)
    right = run(textbook.adam(1.0, eps=0.0), jnp.array([g]), jnp.ones([]))
    chex.assert_trees_all_close(right, -jnp.ones(1), rtol=1e-12)
    first = run(textbook.nesterov(1.0, 0.9), jnp.array([1.0]), jnp.ones([]))
    chex.assert_trees_all_close(first, jnp.array([-1.9]), rtol=1e-12)


# --- the line y = 3 x + 2, and a network that diverges ---------------------------------------


def _fit_keras(x, y, weights, stages, epochs=100, batch_size=32, callbacks=()):
    """Return the loss of each epoch with Keras, for stages with one optimizer each."""
    model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Dense(weights.shape[1])])
    model.layers[0].set_weights([weights, np.zeros(weights.shape[1])])
    losses = []
    for optimizer in stages:
        model.compile(optimizer, "mse")
        options = dict(batch_size=batch_size, shuffle=False, verbose=0, callbacks=list(callbacks))
        losses.append(model.fit(x, y, epochs=epochs, **options).history["loss"])
    return losses


def _fit(x, y, weights, stages, epochs=100, batch_size=32):
    """Return the loss of each epoch with jgd: its mean over examples, each before its step."""
    params = {"w": jnp.asarray(weights, jnp.float32), "b": jnp.zeros(weights.shape[1])}
    parts = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]

    def loss(p, x, y):
        return jnp.mean((x @ p["w"] + p["b"] - y) ** 2)

    @jax.jit
    def stage(tx, params):
        def epoch(carry, _):
            params, state = carry
            total = 0.0
            for part in parts:
                value, grads = jax.value_and_grad(loss)(params, x[part], y[part])
                updates, state = tx.update(grads, state, params)
                params = optax.apply_updates(params, updates)
                total += value * len(x[part])
            return (params, state), total / len(x)

        (params, _), losses = jax.lax.scan(epoch, (params, tx.init(params)), length=epochs)
        return params, losses

    losses = []
    for tx in stages:
        params, stage_losses = stage(tx, params)
        losses.append(stage_losses)
    return losses


def test_losses_of_a_line_fit_equal_keras():
    """They do for SGD followed by Adam, as in the tutorial, and for Adam from the start."""
    rng = np.random.RandomState(0)
    x = rng.rand(100, 1).astype("float32")
    y = 3 * x + 2 + rng.normal(0, 0.1, (100, 1)).astype("float32")
    start = np.full((1, 1), 0.4, "float32")
    optimizers = keras.optimizers
    theirs = _fit_keras(x, y, start, [optimizers.SGD(0.01), optimizers.Adam(0.001)])
    ours = _fit(x, y, start, [jk.sgd(0.01), jk.adam(0.001)])
    ours += _fit(x, y, start, [jk.adam(0.001)])
    theirs += _fit_keras(x, y, start, [optimizers.Adam(0.001)])
    chex.assert_shape(ours, (100,))
    chex.assert_type(ours, jnp.float32)
    chex.assert_trees_all_close(jnp.stack(ours), np.float32(theirs), rtol=2e-5)
    # Adam alone has a large loss: 400 steps of a thousandth cannot reach the weights 3 and 2
    last = jnp.stack([losses[-1] for losses in ours])
    chex.assert_trees_all_close(last, np.float32([0.05065016, 0.02416707, 7.6705737]), rtol=5e-5)


def test_a_network_that_diverges_stops_after_four_epochs():
    """The loss grows from the first epoch on, which stays the best one for a patience of 3."""
    x = np.arange(100, dtype="float32").reshape(5, 20)
    y = np.array([[0], [1], [2], [1], [2]], "float32")
    start = np.random.RandomState(0).uniform(-0.4, 0.4, (20, 10)).astype("float32")
    callback = keras.callbacks.EarlyStopping(monitor="loss", patience=3)
    sgd = keras.optimizers.SGD()
    (theirs,) = _fit_keras(x, y, start, [sgd], epochs=10, batch_size=1, callbacks=[callback])
    (ours,) = _fit(x, y, start, [jk.sgd()], epochs=10, batch_size=1)
    init, update = jk.early_stopping(monitor="loss", patience=3)
    state, epochs = init(), 0
    for value in ours:
        stop, state = update(value, state)
        epochs += 1
        if stop:
            break
    assert epochs == len(theirs) == 4
