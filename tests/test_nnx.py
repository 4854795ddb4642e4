"""`jgd.nnx.Optimizer` holds the numbers of an optimizer as Variables of flax."""

import copy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import release
from flax import nnx
from test_training import line_task

import jgd
import jgd.nnx

needs_new_flax = pytest.mark.skipif(
    release("flax") < (0, 12),
    reason="flax 0.11, the newest for jax 0.7.0, treats Variables otherwise",
)

X = jnp.ones((2, 3))
LANES = jgd.stack([jgd.adam(0.1), jgd.adam(0.2, b1=0.5)])


def _model(seed=0):
    return nnx.Linear(3, 1, rngs=nnx.Rngs(seed))


def _both(tx, seed=0):
    model = _model(seed)
    return model, jgd.nnx.Optimizer(model, tx, wrt=nnx.Param)


def _step(model, optimizer):
    loss = lambda model: jnp.mean((model(X) - 1) ** 2)
    optimizer.update(model, nnx.grad(loss)(model))


def _compiled():
    """Return a training step that fails if it is traced more than once."""
    chex.clear_trace_counter()
    return nnx.jit(chex.assert_max_traces(_step, n=1))


OPTIMIZERS = {
    "adam": jgd.adam(0.1),
    "no momentum": jgd.sgd(0.1),
    "a schedule": jgd.sgd(jgd.cosine_decay_schedule(0.1, 10), momentum=0.9),
    "a function": jgd.sgd(optax.linear_schedule(0.1, 0.0, 10)),
    "a tuple": jgd.prodigy(0.1, betas=(0.9, jgd.linear_schedule(0.9, 0.99, 10))),
    "links": jgd.chain(optax.clip(1.0), jgd.accumulate(jgd.adamw(0.1), 2)),
    "groups": jgd.param_groups(jgd.adam(0.1), {"bias": jgd.set_to_zero()}),
    "lifted": jgd.as_pytree(optax.lion)(0.1),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=needs_new_flax) if n == "groups" else n for n in OPTIMIZERS],
)
def test_training_equals_the_optimizer_of_flax(name):
    tx = OPTIMIZERS[name]
    ours, optimizer = _both(tx)
    theirs = _model()
    peer = nnx.Optimizer(theirs, tx, wrt=nnx.Param)
    step = _compiled()
    for _ in range(3):
        step(ours, optimizer)
        _step(theirs, peer)
    np.testing.assert_allclose(ours.kernel[...], theirs.kernel[...], rtol=1e-5)
    assert optimizer.step[...] == 3
    assert jax.tree.structure(optimizer.tx) == jax.tree.structure(tx)


def test_other_numbers_do_not_retrace():
    step = _compiled()
    for tx in (jgd.adam(0.1), jgd.adam(jnp.float32(0.2)), jgd.lane(LANES, 1)):
        model, optimizer = _both(tx)
        before = np.asarray(model.kernel[...])
        step(model, optimizer)
        moved = np.abs(np.asarray(model.kernel[...]) - before)
        np.testing.assert_allclose(moved, tx.learning_rate, rtol=1e-4)


def test_the_numbers_can_be_changed():
    step = _compiled()
    model, optimizer = _both(jgd.adam(0.1))
    step(model, optimizer)
    optimizer.tx = optimizer.tx._replace(learning_rate=0.0)
    before = np.asarray(model.kernel[...])
    step(model, optimizer)
    np.testing.assert_array_equal(model.kernel[...], before)

    @nnx.jit
    def halve(optimizer):
        optimizer.tx = optimizer.tx._replace(b1=optimizer.tx.b1 / 2)

    halve(optimizer)
    np.testing.assert_allclose(optimizer.tx.b1, 0.45)
    optimizer.tx = jgd.adam(jgd.linear_schedule(0.1, 0.0, 10))  # another structure
    assert isinstance(optimizer.tx.learning_rate, jgd.Schedule)


@needs_new_flax
def test_flax_refuses_arrays_and_retraces():
    """The limits of flax's own class are those that the docstring of `Optimizer` states."""
    with pytest.raises(ValueError, match="data"):
        nnx.Optimizer(_model(), jgd.lane(LANES, 0), wrt=nnx.Param)
    step = _compiled()
    pairs = [(model := _model(), nnx.Optimizer(model, jgd.adam(r), wrt=nnx.Param)) for r in (1, 2)]
    step(*pairs[0])
    with pytest.raises(AssertionError, match="traced > 1 times"):
        step(*pairs[1])


def test_the_best_of_a_sweep():
    result = jgd.sweep(line_task(), {"adam": jgd.grid(jgd.adam, learning_rate=[0.01, 0.1])}, 20)
    for best in (result.best, result.best.setting, {"tx": result.best.setting, "l2": 0.1}):
        model, optimizer = _both(best)
        _step(model, optimizer)
        np.testing.assert_allclose(optimizer.tx.learning_rate, result.best.setting.learning_rate)


def test_a_batch_of_optimizers():
    keys = jax.random.split(jax.random.key(0), 2)
    models, optimizers = nnx.vmap(_both)(LANES, keys)
    before = np.asarray(models.kernel[...])
    nnx.vmap(_step)(models, optimizers)
    moved = np.abs(np.asarray(models.kernel[...]) - before)
    np.testing.assert_allclose(moved[:, 0, 0], [0.1, 0.2], rtol=1e-4)


def test_state_split_and_merge_include_the_numbers():
    _, optimizer = _both(jgd.chain(jgd.scale(2.0), jgd.adam(0.1)))
    numbers = nnx.state(optimizer, jgd.nnx.Number)
    assert len(jax.tree.leaves(numbers)) == 6
    assert numbers["numbers"]["links"][1]["learning_rate"][...] == np.float32(0.1)
    assert len(jax.tree.leaves(nnx.state(optimizer, nnx.OptState))) == 6 + 5 + 1
    graph, state = nnx.split(optimizer)
    merged = nnx.merge(graph, jax.tree.map(lambda x: x * 0, state))
    assert merged.tx == jgd.chain(jgd.scale(0.0), jgd.adam(0.0, 0.0, 0.0, 0.0))
    for twin in (copy.deepcopy(optimizer), nnx.clone(optimizer)):
        assert twin.tx == optimizer.tx


def test_checkpoints_contain_the_numbers(tmp_path):
    model, optimizer = _both(jgd.adam(jgd.cosine_decay_schedule(0.1, 10)))
    _step(model, optimizer)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", nnx.state(optimizer))
        checkpointer.wait_until_finished()
        _, other = _both(jgd.adam(jgd.cosine_decay_schedule(0.5, 20), b1=0.5))
        nnx.update(other, checkpointer.restore(tmp_path / "step", nnx.state(other)))
    assert other.tx == optimizer.tx
    assert other.step[...] == 1


@needs_new_flax
def test_extra_arguments_and_now():
    model, optimizer = _both(jgd.chain(jgd.polyak_sgd(1.0), jgd.scale(lambda step: 1.0 + step)))
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X) - 1) ** 2))(model)
    optimizer.update(model, grads, value=loss)
    assert jgd.now(optimizer.tx, nnx.as_pure(optimizer.opt_state)).links[1].step_size == 2


def test_an_optimizer_of_optax_is_refused():
    with pytest.raises(TypeError, match=r"^Optimizer: a setting must be .*jgd\.as_pytree"):
        _both(optax.adam(0.1))
    with pytest.raises(TypeError, match="exactly one optimizer"):
        _both({"rate": 0.1})
