"""`jgd.now` evaluates schedules at the step of a state, in any nest of optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jgd

PARAMS = {"body": jnp.ones((2, 3)), "head": jnp.zeros((2,))}
FALLING = jgd.linear_schedule(0.2, 0.0, 10)
RISING = lambda step: 0.1 * step


def _state(tx, steps=3):
    state = tx.init(PARAMS)
    for _ in range(steps):
        state = tx.update(PARAMS, state, PARAMS, value=jnp.float32(1.0))[1]
    return state


def _now(tx, steps=3):
    return jgd.now(tx, _state(tx, steps))


def test_the_step_is_the_step_of_the_next_update():
    tx = jgd.adam(FALLING, b1=jgd.linear_schedule(0.5, 0.9, 4))
    for steps in range(4):
        at_step = _now(tx, steps)
        np.testing.assert_allclose(at_step.learning_rate, FALLING(steps))
        np.testing.assert_allclose(at_step.b1, 0.5 + 0.1 * steps, rtol=1e-6)
        assert at_step.b2 == 0.999
    assert isinstance(at_step, jgd.Transformation)
    assert jax.tree.structure(at_step) == jax.tree.structure(jgd.adam(0.1))


def test_the_optimizer_at_its_step_gives_the_same_update():
    tx = jgd.sgd(FALLING, momentum=jgd.linear_schedule(0.5, 0.9, 4))
    state = _state(tx)
    ours, _ = jgd.now(tx, state).update(PARAMS, state.inner, PARAMS)
    theirs, _ = tx.update(PARAMS, state, PARAMS)
    np.testing.assert_allclose(ours["body"], theirs["body"])


def test_numbers_without_schedules_do_not_change():
    tx = jgd.chain(jgd.scale(2.0), jgd.adam(0.1))
    assert _now(tx) == tx


SCHEDULES = {
    "jgd": FALLING,
    "optax": optax.linear_schedule(0.2, 0.0, 10),
    "lambda": lambda step: 0.2 - 0.02 * step,
    "joined": jgd.join_schedules([jgd.constant_schedule(1.0), lambda step: 0.14 + 0 * step], [2]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_kind_of_schedule(name):
    np.testing.assert_allclose(_now(jgd.sgd(SCHEDULES[name])).learning_rate, 0.14, rtol=1e-6)
    lifted = jgd.as_pytree(optax.lion)(SCHEDULES[name])
    np.testing.assert_allclose(_now(lifted).learning_rate, 0.14, rtol=1e-6)


# name -> (wrapper, the place of the optimizer in it, steps of the optimizer after 3 gradients)
NESTS = {
    "chain": (lambda tx: jgd.chain(optax.clip(1.0), jgd.scale(2.0), tx), "tx.links[2]", 3),
    "a chain of one": (jgd.chain, "tx.links[0]", 3),
    "two step counters": (
        lambda tx: jgd.chain(jgd.accumulate(jgd.scale(RISING), 2), tx),
        "tx.links[1]",
        3,
    ),
    "a link with its own counter": (
        lambda tx: jgd.chain(tx, jgd.sgd(optax.linear_schedule(0.2, 0.0, 10))),
        "tx.links[0]",
        3,
    ),
    "accumulate": (lambda tx: jgd.accumulate(tx, 2), "tx.inner", 1),
    "cautious": (jgd.cautious, "tx.inner", 3),
    "lookahead": (lambda tx: jgd.lookahead(tx, 5, 0.5), "tx.fast_optimizer", 3),
    "average": (lambda tx: jgd.average_params(tx, decay=RISING), "tx.inner", 3),
    "per layer": (
        lambda tx: jgd.lookahead(jgd.per_layer(tx), 5, 0.5),
        "tx.fast_optimizer.inner",
        3,
    ),
    "divide": (lambda tx: jgd.divide(tx, jgd.rms(0.9, 0.1)), "tx.direction", 3),
    "nesterov": (lambda tx: jgd.with_nesterov(jgd.chain(tx)), "tx.inner.links[0]", 3),
    "the first group": (
        lambda tx: jgd.param_groups(jgd.sgd(RISING), {"head": tx}),
        "tx.groups['head']",
        3,
    ),
    "the default group": (
        lambda tx: jgd.accumulate(jgd.param_groups(tx, {"head": jgd.sgd(RISING)}), 3),
        "tx.inner.default",
        1,
    ),
    "lifted masks": (
        lambda tx: jgd.as_pytree(optax.masked)(tx, {"body": True, "head": False}),
        "tx.inner",
        3,
    ),
    "schedule free": (lambda tx: jgd.schedule_free(tx, 0.1), "tx.base_optimizer", 3),
}


@pytest.mark.parametrize("name", NESTS)
def test_links_are_at_their_own_steps(name):
    wrap, where, steps = NESTS[name]
    tx = wrap(jgd.adam(FALLING))
    at_step = eval(where, {"tx": _now(tx)})
    np.testing.assert_allclose(at_step.learning_rate, FALLING(steps), rtol=1e-6)
    assert jax.tree.structure(at_step) == jax.tree.structure(jgd.adam(0.1))


def test_two_links_with_different_step_counters():
    tx = jgd.chain(
        jgd.accumulate(jgd.scale(RISING), 2), jgd.average_params(jgd.sgd(FALLING), RISING)
    )
    accumulated, averaged = _now(tx).links
    np.testing.assert_allclose(accumulated.inner.step_size, 0.1)
    np.testing.assert_allclose(averaged.decay, 0.3)
    np.testing.assert_allclose(averaged.inner.learning_rate, 0.14)


def test_schedules_among_several_numbers():
    prodigy = jgd.prodigy(0.1, betas=(jgd.linear_schedule(0.5, 0.9, 4), 0.99))
    first, second = _now(prodigy).betas
    np.testing.assert_allclose(first, 0.8, rtol=1e-6)
    assert second == 0.99


def test_the_rate_of_schedule_free_is_read_at_its_count():
    rate = jgd.linear_schedule(0.2, 0.0, 10)
    for tx in (
        jgd.schedule_free_sgd(rate),
        jgd.schedule_free_adamw(lambda step: 0.2 - 0.02 * step),
        jgd.accumulate(jgd.schedule_free(jgd.sgd(rate), rate), 1.5),
    ):
        state = _state(tx, 2)
        at_step = jgd.now(tx, state)
        at_step = getattr(at_step, "inner", at_step) if "accumulate" in repr(tx) else at_step
        count = optax.tree.get(state, "step_count")
        np.testing.assert_allclose(at_step.learning_rate, rate(count), rtol=1e-6)


def test_schedules_inside_the_body_of_a_factory_are_not_evaluated():
    @jgd.as_pytree
    def decayed(rate):
        return jgd.adam(jgd.cosine_decay_schedule(rate, 4))

    tx = jgd.chain(decayed(0.1), jgd.sgd(FALLING))
    first, second = _now(tx).links
    assert first == decayed(0.1)
    np.testing.assert_allclose(second.learning_rate, 0.14, rtol=1e-6)


def test_inside_jit_and_over_lanes():
    tx = jgd.adam(FALLING)
    np.testing.assert_allclose(jax.jit(jgd.now)(tx, _state(tx)).learning_rate, 0.14, rtol=1e-6)
    lanes = jgd.stack([jgd.adam(jgd.linear_schedule(top, 0.0, 10)) for top in (0.1, 0.2)])

    def steps(tx, n):
        state = tx.init(PARAMS)
        return jax.lax.fori_loop(0, n, lambda _, s: tx.update(PARAMS, s, PARAMS)[1], state)

    states = jax.vmap(steps)(lanes, jnp.array([2, 5]))
    rates = jax.vmap(jgd.now)(lanes, states).learning_rate
    np.testing.assert_allclose(rates, [0.08, 0.1], rtol=1e-6)
    with pytest.raises(
        TypeError, match=r"init_value must be a scalar, got shape \(2,\).*jax\.vmap"
    ):
        jgd.now(lanes, states)
    shared = jgd.adam(optax.linear_schedule(0.2, 0.0, 10))
    with pytest.raises(
        TypeError, match=r"learning_rate must be a scalar, got shape \(2,\).*jax\.vmap"
    ):
        jgd.now(shared, jax.vmap(steps, (None, 0))(shared, jnp.array([2, 5])))


def test_only_optimizers_of_jgd_with_their_states_are_accepted():
    hidden = optax.chain(jgd.adam(FALLING))
    with pytest.raises(TypeError, match="now: tx must be an optimizer of jgd, got"):
        jgd.now(hidden, hidden.init(PARAMS))
    tx = jgd.adam(FALLING)
    for state in (jgd.adam(0.1).init(PARAMS), (), None):
        with pytest.raises(jgd.TreeError, match=r"now: state must be a state of adam\(") as caught:
            jgd.now(tx, state)
        assert "\n" not in str(caught.value)
    with pytest.raises(jgd.TreeError, match="now: state must be a state of chain"):
        jgd.now(jgd.chain(tx), jgd.chain(tx, tx).init(PARAMS)[0].inner)
