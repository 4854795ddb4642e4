"""Inside the body of a user's lifted factory, calls of jgd's factories return values."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import run

import jgd

PARAMS = {"w": jnp.ones(3), "b": jnp.zeros(())}
GRADIENTS = {
    "w": jnp.sin(jnp.arange(18.0)).reshape(6, 3),
    "b": jnp.cos(jnp.arange(6.0)),
}


def _same(ours, theirs):
    assert isinstance(ours, jgd.Transformation)
    actual, expected = run(ours, GRADIENTS, PARAMS), run(theirs, GRADIENTS, PARAMS)
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=2e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)


SCHEDULES = {
    "jgd": lambda rate: jgd.cosine_decay_schedule(rate, 4),
    "optax": lambda rate: optax.cosine_decay_schedule(rate, 4),
    "lambda": lambda rate: lambda step: rate / (1 + step),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_in_the_body(kind):
    make = SCHEDULES[kind]

    @jgd.as_pytree
    def decayed(rate, b1=0.9):
        return jgd.chain(jgd.as_pytree(optax.clip)(1.0), jgd.adam(make(rate), b1))

    _same(decayed(0.1), optax.chain(optax.clip(1.0), optax.adam(make(0.1))))
    lanes = jax.vmap(lambda rate: jgd.adam(make(rate)))(jnp.array([0.1, 0.2]))
    assert isinstance(lanes, jgd.Transformation)


def test_attributes_and_replace_in_the_body():
    @jgd.as_pytree
    def slowed(rate, factor=0.5):
        base = jgd.adamw(rate, b1=0.8)
        assert jgd.adam(rate, mu_dtype="bfloat16").mu_dtype == jnp.bfloat16
        return base._replace(learning_rate=base.learning_rate * factor, b2=base.b1)

    _same(slowed(0.2), optax.adamw(0.1, b1=0.8, b2=0.8))
    np.testing.assert_allclose(jax.vmap(slowed)(jnp.ones(2)).rate, 1.0)


def test_tree_map_over_numbers_in_the_body():
    @jgd.as_pytree
    def halved(rate, b1=0.8):
        base = jgd.adam(rate, b1, b2=0.9, eps=0.1)
        assert len(jax.tree.leaves(base)) == 5
        return jax.tree.map(lambda x: x / 2, base)

    _same(halved(0.2), optax.adam(0.1, b1=0.4, b2=0.45, eps=0.05))


def test_wrappers_with_a_dtype_in_the_body():
    @jgd.as_pytree
    def accumulated(rate):
        return jgd.accumulate(jgd.adam(rate, mu_dtype=jnp.bfloat16), 2)

    _same(accumulated(0.1), jgd.accumulate(jgd.adam(0.1, mu_dtype=jnp.bfloat16), 2))
    state = accumulated(0.1).init(PARAMS)
    after = jax.jit(accumulated(0.1).update)(PARAMS, state, PARAMS)[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert optax.tree.get(after, "mu")["w"].dtype == jnp.bfloat16


def test_a_user_function_called_by_an_optimizer_sees_values():
    """Factories called by a user's function inside `update` return values, not plain pairs."""
    values = []

    def bound(step):
        tx = jgd.sgd(0.1)
        values.append(tx)
        return tx.learning_rate * (step + 1)

    for tx in (jgd.adopt(0.1, clip_value_fn=bound), jgd.adam(bound), jgd.chain(jgd.adam(bound))):
        before = len(values)
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        assert len(values) > before
    assert all(isinstance(value, jgd.Transformation) for value in values)
    assert isinstance(jgd.sgd(jgd.linear_schedule(0.1, 0.0, 5)).learning_rate, jgd.Schedule)


def test_an_error_in_a_body_does_not_leave_plain_pairs_behind():
    tx = jgd.muon(0.1, ns_coeffs=(1.0, 2.0))
    with pytest.raises(ValueError, match="ns_coeffs must be 3 numbers"):
        tx.init({"w": jnp.ones((2, 2))})
    assert isinstance(jgd.adam(0.1), jgd.Transformation)
