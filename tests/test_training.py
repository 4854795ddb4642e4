"""Training runs: batches, the two forms of a loss, `train`, and hypergradients on digits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jgd
from jgd.training import TrainState, start
from jgd.tuning.tasks import digits

X = np.random.default_rng(0).uniform(-1, 1, (12, 2)).astype(np.float32)
KEY = jax.random.key(0)
Y = X @ np.array([1.0, -2.0], np.float32) + 0.5


def line_task(batch_size=4):
    """Return the task of a linear regression with two inputs."""
    init = lambda key: {"w": jnp.zeros(2), "b": jnp.zeros(())}
    loss = lambda params, batch: jnp.mean((batch[0] @ params["w"] + params["b"] - batch[1]) ** 2)
    evaluate = lambda params: {"loss": loss(params, (X, Y))}
    return jgd.Task(init, loss, jgd.minibatches((X, Y), batch_size, jax.random.key(0)), evaluate)


def test_minibatches_are_epochs_of_permutations():
    batch = jgd.minibatches(np.arange(10), 3, jax.random.key(0))
    for epoch in range(4):
        examples = np.concatenate([batch(3 * epoch + step) for step in range(3)])
        assert len(examples) == len(set(examples.tolist())) == 9  # one is left out
    epochs = [np.concatenate([batch(3 * e + s) for s in range(3)]).tolist() for e in range(4)]
    assert epochs[0] != epochs[1]
    left_over = {(set(range(10)) - set(epoch)).pop() for epoch in epochs}
    assert len(left_over) > 1  # not the same one in each epoch
    chex.assert_shape(batch(7), (3,))
    chex.assert_trees_all_equal(jax.jit(batch)(7), batch(7))


def test_full_batch_and_single_examples():
    data = {"x": X, "y": Y}
    full = jgd.minibatches(data, None, jax.random.key(0))
    chex.assert_trees_all_equal(full(0), full(5), data)
    single = jgd.minibatches(data, 1, jax.random.key(0))
    chex.assert_shape([single(0)["x"], single(0)["y"]], [(1, 2), (1,)])
    chex.assert_trees_all_equal_dtypes(single(0), data)
    order = [float(single(step)["y"][0]) for step in range(12)]
    assert sorted(order) == sorted(Y.tolist())


def test_errors_of_minibatches():
    with pytest.raises(ValueError, match=r"must have one leading length, got \[3, 4\]"):
        jgd.minibatches((np.zeros(3), np.zeros(4)), 2, jax.random.key(0))
    for wrong in (0, 13):
        with pytest.raises(ValueError, match=rf"batch_size must be in 1 to 12, got {wrong}"):
            jgd.minibatches((X, Y), wrong, jax.random.key(0))


def test_train_equals_a_loop_written_by_hand():
    task, tx = line_task(), jgd.adam(0.05)
    params, history = jgd.train(task, tx, 30, jax.random.key(1))
    by_hand = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    state, losses = tx.init(by_hand), []
    for step in range(30):
        loss, grads = jax.value_and_grad(task.loss)(by_hand, task.batch(step))
        losses.append(loss)
        updates, state = tx.update(grads, state, by_hand)
        by_hand = optax.apply_updates(by_hand, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(history["loss"], jnp.stack(losses))
    chex.assert_trees_all_close(history["loss"], jnp.stack(losses), rtol=2e-6)
    chex.assert_trees_all_close(params, by_hand, rtol=2e-6)


def test_train_compiles_once_for_all_numbers():
    traces, plain = [], line_task()

    def loss(params, batch):
        traces.append(1)
        return plain.loss(params, batch)

    task = plain._replace(loss=loss)
    for rate in (0.1, 0.2, np.float32(0.3)):
        jgd.train(task, jgd.adam(rate), 5, jax.random.key(0))
    assert len(traces) == 1


def test_lanes_train_as_gradient_descent_in_numpy():
    rates, steps = [0.0, 0.2, 0.5], 12
    ends, history = jax.vmap(lambda tx: jgd.train(line_task(), tx, steps, jax.random.key(0)))(
        jax.vmap(jgd.sgd)(jnp.array(rates))
    )
    chex.assert_shape([ends["w"], ends["b"], history["loss"]], [(3, 2), (3,), (3, steps)])
    chex.assert_type(jax.tree.leaves((ends, history)), jnp.float32)
    batches = [jax.tree.map(np.float64, line_task().batch(step)) for step in range(steps)]
    for index, rate in enumerate(rates):
        w, b, losses = np.zeros(2), 0.0, []
        for x, y in batches:
            residual = x @ w + b - y
            losses.append(np.mean(residual**2))
            w, b = w - rate * 2 * np.mean(x.T * residual, 1), b - rate * 2 * np.mean(residual)
        expected = {"w": np.float32(w), "b": np.float32(b)}
        chex.assert_trees_all_close(jgd.lane(ends, index), expected, rtol=1e-5)
        chex.assert_trees_all_close(
            history["loss"][index], np.float32(losses), rtol=1e-5, atol=1e-7
        )


def test_the_full_form_of_a_loss():
    """The full form supports dropout by the step's key, a running mean, and a swept penalty."""

    def init(key):
        return {"w": jnp.ones(2)}, {"mean": jnp.zeros(2)}

    def loss(params, model_state, batch, key, setting):
        x, y = batch
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        mean = 0.9 * model_state["mean"] + 0.1 * x.mean(0)
        fit = jnp.mean(((x * keep - mean) @ params["w"] - y) ** 2)
        penalty = setting["l2"] * jnp.sum(params["w"] ** 2)
        metrics = {"kept": keep.mean(), "fit": fit, "mean": mean}
        return fit + penalty, (metrics, {"mean": mean})

    def evaluate(params, model_state, setting):
        return {"norm": jnp.sum(params["w"] ** 2), "l2": setting["l2"], **model_state}

    batch = jgd.minibatches((X, Y), 4, jax.random.key(0))
    task = jgd.Task(init, loss, batch, lambda p, s, t: {"norm": evaluate(p, s, t)["norm"]})
    setting = lambda strength: {"tx": jgd.sgd(0.1), "l2": strength}
    params, history = jgd.train(task, setting(0.0), 40, jax.random.key(0))
    shrunk, penalized = jgd.train(task, setting(3.0), 40, jax.random.key(0))
    chex.assert_shape([params["w"], history["loss"], history["kept"]], [(2,), (40,), (40,)])
    chex.assert_type(jax.tree.leaves((params, history)), jnp.float32)
    shares = np.asarray(history["kept"])
    assert len(set(shares.tolist())) > 1  # each step has a new mask
    chex.assert_trees_all_equal(8 * shares, np.round(8 * shares))  # a mask has eight entries
    chex.assert_trees_all_equal(history["loss"], history["fit"])
    chex.assert_trees_all_close(penalized["loss"][0], penalized["fit"][0] + 6, rtol=1e-6)  # 3 |1|^2
    means = [np.zeros(2)]
    for step in range(40):
        means.append(0.9 * means[-1] + 0.1 * np.asarray(batch(step)[0], np.float64).mean(0))
    chex.assert_trees_all_close(history["mean"], np.float32(means[1:]), rtol=1e-5, atol=1e-7)
    assert jnp.sum(shrunk["w"] ** 2) < jnp.sum(params["w"] ** 2)
    lanes = jgd.grid(setting_of, l2=[0.0, 3.0])
    result = jgd.sweep(task, {"ridge": lanes}, 40, metric="norm", mode="min")
    assert [row["l2"] for row in result.rows] == [3.0, 0.0]


def setting_of(l2):
    return {"tx": jgd.sgd(0.1), "l2": jnp.asarray(l2, float)}


BACKTRACKING = optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
ZOOM = optax.scale_by_zoom_linesearch(max_linesearch_steps=10)
WITH_FUNCTIONS = {
    "sophia": jgd.sophia(0.1),
    "momo": jgd.momo(0.5),
    "momo_adam": jgd.momo_adam(0.1),
    "polyak_sgd": jgd.polyak_sgd(1.0),
    "backtracking": jgd.chain(jgd.sgd(1.0), BACKTRACKING),
    "a lifted line search, after a link without extra arguments": jgd.chain(
        optax.clip(10.0),
        jgd.sgd(1.0),
        jgd.as_pytree(optax.scale_by_backtracking_linesearch, structure=["max_backtracking_steps"])(
            max_backtracking_steps=15
        ),
    ),
    "zoom": jgd.chain(jgd.sgd(1.0), ZOOM),
    "lbfgs": jgd.chain(optax.lbfgs()),
    "in wrappers": jgd.lookahead(jgd.accumulate(jgd.cautious(jgd.sophia(0.2)), 2), 5, 0.5),
}


@pytest.mark.parametrize("name", WITH_FUNCTIONS)
def test_optimizers_that_call_the_loss(name):
    _, history = jgd.train(line_task(), WITH_FUNCTIONS[name], 60, jax.random.key(0))
    assert history["loss"][-10:].max() < history["loss"][0] / 2


def _comparing_link(calls):
    """Return a link that compares the functions it receives with value and gradient."""

    def update(updates, state, params=None, *, value, grad, value_fn, grad_fn, obj_fn, **extra):
        calls.append(extra)
        shifted = jax.tree.map(lambda p: p + 1, params)
        gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), grad_fn(params), grad)
        gap = jnp.abs(value_fn(params) - value) + sum(jax.tree.leaves(gaps))
        return updates, jnp.array([gap, value_fn(shifted) - obj_fn(shifted), value_fn(shifted)])

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(3), update)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_fn_and_grad_fn_are_those_of_the_step(dtype):
    """They use the batch, key, model state and setting of the step."""
    calls = []

    def loss(params, model_state, batch, key, setting):
        x, y = batch
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        fit = jnp.mean(((x * keep) @ params["w"].astype(jnp.float32) - y) ** 2)
        loss = fit + model_state + setting["l2"] * jnp.sum(params["w"] ** 2)
        return loss, ({}, model_state + 1)

    init = lambda key: ({"w": jnp.ones(2, dtype)}, jnp.zeros([]))
    task = jgd.Task(init, loss, line_task().batch, lambda params: {})
    tx = jgd.chain(jgd.sgd(0.1), _comparing_link(calls))
    setting = {"tx": tx, "l2": 0.5}
    state, history = jgd.train(jgd.supervised(task), setting, 3, jax.random.key(0))
    gap, difference, shifted = state.opt_state[1]
    assert gap < 1e-5
    assert difference == 0
    assert shifted != history["loss"][-1]
    assert calls == [{}]


def test_functions_that_are_not_called_cost_nothing():
    traces, plain = [], line_task()

    def loss(params, batch):
        traces.append(1)
        return plain.loss(params, batch)

    jgd.train(plain._replace(loss=loss), jgd.chain(optax.clip(1.0), jgd.adam(0.1)), 5, KEY)
    assert len(traces) == 1


def test_lanes_of_optimizers_that_call_the_loss():
    searching = lambda rate: jgd.chain(jgd.sgd(rate), BACKTRACKING)
    settings = {
        "sophia": jgd.grid(jgd.sophia, learning_rate=[0.01, 0.1]),
        "search": jgd.grid(searching, rate=[0.5, 1.0]),
    }
    result = jgd.sweep(line_task(), settings, 30, seeds=2)
    assert len(result.rows) == 4
    assert all(np.isfinite(row["loss"]) for row in result.rows)
    alone, _ = jgd.train(line_task(), searching(0.5), 20, KEY)
    lanes = jgd.stack([searching(0.5), searching(1.0)])
    together, _ = jax.vmap(lambda tx: jgd.train(line_task(), tx, 20, KEY))(lanes)
    chex.assert_trees_all_close(jgd.lane(together, 0), alone, rtol=1e-4)


def test_losses_with_another_signature_raise():
    task = line_task()._replace(loss=lambda params: 0.0)
    with pytest.raises(
        TypeError, match=r"loss must take \(params, batch\).*got a function of 1 arguments"
    ):
        jgd.train(task, jgd.sgd(0.1), 5, jax.random.key(0))
    with pytest.raises(TypeError, match="exactly one optimizer, got 0"):
        jgd.train(line_task(), {"rate": jnp.ones(())}, 5, jax.random.key(0))


def test_train_and_sweep_accept_any_run():
    """A run needs only init, update, evaluate and batch, not a task."""

    def update(setting, state, batch):
        state = state - setting["rate"] * state * batch
        return state, {"loss": state**2}

    run = jgd.Run(
        init=lambda setting, key: jnp.ones(()),
        update=update,
        evaluate=lambda setting, state: {"distance": jnp.abs(state)},
        batch=lambda step: jnp.float32(1.0),
    )
    state, history = jgd.train(run, {"rate": 0.5}, 10, jax.random.key(0))
    chex.assert_trees_all_equal(state, jnp.float32(0.5**10))
    chex.assert_trees_all_equal(history["loss"], 0.25 ** jnp.arange(1.0, 11))
    lanes = jgd.grid(lambda rate: {"rate": jnp.asarray(rate, float)}, rate=[0.1, 0.5, 1.75])
    result = jgd.sweep(run, lanes, 10, mode="min")
    assert result.metric == "distance"
    assert [row["rate"] for row in result.rows] == [0.5, 1.75, 0.1]
    distances = np.array([row["distance"] for row in result.rows])
    chex.assert_trees_all_close(distances, np.array([0.5, 0.75, 0.9]) ** 10, rtol=2e-6)


@pytest.mark.parametrize(
    "name",
    [
        "adam",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("sgd", "momentum", "adagrad", "rmsprop", "adamax")
        ),
    ],
)
def test_hypergradients_are_finite_on_digits(name):
    """The corner pixels of digits are always 0, where the derivatives of optax's Adam are NaN."""
    task = digits()

    def final_loss(tx):
        params, _ = jgd.train(task, tx, 20, jax.random.key(0))
        return task.evaluate(params)["loss"]

    gradient = jax.jit(jax.grad(final_loss))(getattr(jgd, name)(0.01))
    chex.assert_tree_all_finite(gradient)
    assert gradient.learning_rate != 0


def test_optax_hypergradients_are_not_finite_on_digits():
    """The test above would fail without the safe root and quotient of jgd."""
    task = digits()

    def final_loss(rate):
        params, _ = jgd.train(task, jgd.as_pytree(optax.adam)(rate), 20, jax.random.key(0))
        return task.evaluate(params)["loss"]

    assert not np.isfinite(jax.jit(jax.grad(final_loss))(0.01))


def test_a_short_loss_has_no_key_and_no_model_state():
    state = start(jgd.supervised(line_task()), jgd.adam(0.1), jax.random.key(0))
    assert isinstance(state, TrainState)
    assert state.key is None
    assert state.model_state is None
