"""Models of flax and equinox as tasks in a few lines each, and a training that is not a task."""

import contextlib

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jgd

RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 5)).astype(np.float32)
Y = (X @ RNG.normal(size=5) > 0).astype(np.int32)
BATCHES = jgd.minibatches((X, Y), 32, jax.random.key(0))
LANES = {"adam": jgd.grid(jgd.adam, learning_rate=[1e-3, 3e-3, 1e-2, 3e-2])}


def _metrics(logits, labels=Y):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"accuracy": (logits.argmax(-1) == labels).mean(), "loss": losses.mean()}


def _sweep_small(task, lanes=LANES, **options):
    result = jgd.sweep(task, lanes, 60, seeds=2, **options)
    assert result.rows[0]["accuracy"] > 0.9
    assert len({row["loss"] for row in result.rows}) == 4  # all lanes differ
    return result


@pytest.mark.slow
def test_flax_linen():
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(2)])
    task = jgd.Task(
        init=lambda key: model.init(key, X[:1]),
        loss=lambda params, batch: _metrics(model.apply(params, batch[0]), batch[1])["loss"],
        batch=BATCHES,
        evaluate=lambda params: _metrics(model.apply(params, X)),
    )
    best = _sweep_small(task).best
    assert model.apply(best.params, X[:3]).shape == (3, 2)


class _Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.2)
        self.last = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x))), rngs=rngs))


@pytest.mark.slow
def test_flax_nnx_with_batch_norm_and_dropout():
    split = lambda model: nnx.split(model, nnx.Param, ...)
    graph, *_ = split(nnx.eval_shape(lambda: _Nnx(nnx.Rngs(0))))

    def loss(params, rest, batch, key, setting):
        model = nnx.merge(graph, params, rest, copy=True)  # the call changes its statistics
        metrics = _metrics(model(batch[0], nnx.Rngs(dropout=key)), batch[1])
        return metrics.pop("loss"), (metrics, split(model)[2])

    def evaluate(params, rest):
        model = nnx.merge(graph, params, rest)
        model.eval()
        return _metrics(model(X))

    task = jgd.Task(
        init=lambda key: split(_Nnx(nnx.Rngs(key)))[1:], loss=loss, batch=BATCHES, evaluate=evaluate
    )
    best = _sweep_small(task).best
    model = nnx.merge(graph, best.state.params, best.state.model_state)
    model.eval()
    assert model(X[:3]).shape == (3, 2)
    assert not np.allclose(model.norm.mean[...], 0)  # training updated the statistics


@pytest.mark.slow
def test_equinox():
    make = lambda key: eqx.nn.MLP(5, 2, 16, 1, key=key)
    static = eqx.filter(make(jax.random.key(0)), eqx.is_array, inverse=True)
    logits = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    task = jgd.Task(
        init=lambda key: eqx.filter(make(key), eqx.is_array),
        loss=lambda params, batch: _metrics(logits(params, batch[0]), batch[1])["loss"],
        batch=BATCHES,
        evaluate=lambda params: _metrics(logits(params, X)),
    )
    best = _sweep_small(task).best
    assert eqx.combine(best.params, static)(X[0]).shape == (2,)


def test_a_custom_run_has_lanes_stopping_halving_and_resume(tmp_path):
    """A bandit, without data or a loss function, sweeps like a task."""
    means = jnp.array([0.1, 0.5, 0.9])

    def init(tx, key):
        logits = jnp.zeros(3)
        return logits, tx.init(logits), key

    def update(tx, state, batch):
        logits, opt_state, key = state
        key, choice, noise = jax.random.split(key, 3)
        arm = jax.random.categorical(choice, logits)
        reward = means[arm] + 0.1 * jax.random.normal(noise)
        grads = jax.grad(lambda x: -reward * jax.nn.log_softmax(x)[arm])(logits)
        updates, opt_state = tx.update(grads, opt_state, logits)
        return (optax.apply_updates(logits, updates), opt_state, key), {"loss": -reward}

    def evaluate(tx, state):
        return {"value": jax.nn.softmax(state[0]) @ means}

    run = jgd.Run(init, update, evaluate, batch=lambda step: None)
    lanes = jgd.grid(jgd.adam, learning_rate=np.geomspace(1e-4, 0.3, 16))
    options = dict(seeds=3, metric="value", mode="max", stop=6, width=8)
    halving = jgd.successive_halving(2, 50)
    reports = []

    def crash(plan, report):
        reports.append(report)
        if len(reports) == 20:
            raise RuntimeError

    with contextlib.suppress(RuntimeError):
        where = dict(folder=tmp_path, checkpoint_every=0.0, on_report=crash)
        jgd.sweep(run, lanes, 400, halving=halving, **where, **options)
    resumed = jgd.sweep(run, lanes, 400, folder=tmp_path, resume=True, halving=halving, **options)
    reference = jgd.sweep(run, lanes, 400, halving=halving, **options)
    assert resumed.rows == reference.rows
    assert reference.rows[0]["value"] > 0.8
    assert {row["ended"] for row in reference.rows} >= {"cut"}
    logits, _, key = reference.best.state
    assert logits.argmax() == 2
    jax.random.normal(key)  # still a random key
