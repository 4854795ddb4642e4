"""Wrappers of whole optimizers, and groups of parameters."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import run, stacked
from table import CONTRACTED, noisy_gradients, parameters

import jgd

WRAPPED = {
    "accumulate": lambda inner: jgd.accumulate(inner, 3),
    "average_params": lambda inner: jgd.average_params(inner, 0.9),
    "cautious": jgd.cautious,
    "lookahead": lambda inner: jgd.lookahead(inner, 3, 0.5),
    "schedule_free": lambda inner: jgd.schedule_free(inner, 0.01),
    "precision": lambda inner: jgd.loss_scaled(
        jgd.skip_nonfinite(
            jgd.stochastic_rounding(jgd.master_weights(jgd.compensated(inner)), key=0)
        )
    ),
    "param_groups": lambda inner: jgd.param_groups(inner, {"matrix": jgd.sgd(0.1)}),
    "scale_by_path": lambda inner: jgd.chain(inner, jgd.scale_by_path({"matrix": 0.5})),
    "scale_by_width": lambda inner: jgd.chain(inner, jgd.scale_by_width(parameters())),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)


def _start(steps=7, dtype=jnp.float32):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), parameters())
    return params, stacked(noisy_gradients(steps), dtype)


@every_wrapper
def test_numbers_stay_leaves(wrap):
    """Numbers of a wrapped optimizer do not retrace, are lanes, and have finite hypergradients."""
    params, gradients = _start()
    lanes = jax.vmap(lambda rate: wrap(jgd.adam(rate)))(jnp.array([0.01, 0.1]))
    together = jax.vmap(lambda tx: run(tx, gradients, params))(lanes)
    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(lambda tx: run(tx, gradients, params), n=1))
    for index, rate in enumerate((0.01, 0.1)):
        alone = once(wrap(jgd.adam(rate)))
        chex.assert_trees_all_close(jgd.lane(together, index), alone, rtol=1e-4, atol=1e-7)
    total = lambda tx: sum(jnp.sum(u**2) for u in jax.tree.leaves(run(tx, gradients, params)))
    chex.assert_tree_all_finite(jax.jit(jax.grad(total))(wrap(jgd.adam(0.1))))
    tx = wrap(jgd.adam(0.1))
    assert tx == wrap(jgd.adam(0.1)) != wrap(jgd.adam(0.2))
    assert pickle.loads(pickle.dumps(tx)) == tx
    assert hash(tx) == hash(wrap(jgd.adam(0.1)))
    assert "adam(learning_rate=0.1" in repr(tx)


@every_wrapper
def test_dtypes_of_states_and_updates_do_not_change(wrap):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params, _ = _start(dtype=dtype)
        tx = wrap(jgd.adam(0.1))
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@every_wrapper
def test_state_does_not_share_buffers_with_the_parameters(wrap):
    """A training step can donate both."""
    params, _ = _start()
    tx = wrap(jgd.adam(0.1))

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    after, _ = jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))
    chex.assert_tree_all_finite(after)


# --- accumulate ------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [2, 3])
def test_accumulate_equals_multi_steps(every):
    params, gradients = _start(9)
    ours = run(jgd.accumulate(jgd.adam(0.1), every), gradients, params)
    theirs = optax.MultiSteps(optax.adam(0.1), every).gradient_transformation()
    chex.assert_trees_all_close(ours, run(theirs, gradients, params), rtol=2e-5, atol=1e-8)


def test_accumulate_has_another_period_in_every_lane():
    params, gradients = _start(6)
    lanes = jax.vmap(lambda every: jgd.accumulate(jgd.momentum(0.1), every))(jnp.arange(1, 4))
    together = jax.vmap(lambda tx: run(tx, gradients, params))(lanes)
    for index, every in enumerate((1, 2, 3)):
        alone = run(jgd.accumulate(jgd.momentum(0.1), every), gradients, params)
        chex.assert_trees_all_close(jgd.lane(together, index), alone, rtol=1e-5, atol=1e-8)


def test_accumulating_one_gradient_returns_the_inner_optimizer():
    inner = jgd.adam(0.1)
    for one in (1, 1.0, np.float64(1), np.int64(1)):
        assert jgd.accumulate(inner, one) is inner
    with pytest.raises(ValueError, match="accumulate: every must be a number of steps, at le"):
        jgd.accumulate(inner, 0)


# --- cautious --------------------------------------------------------------------------------


def test_cautious_equals_the_formula_of_the_paper():
    params, gradients = _start(20)
    plain = run(jgd.adam(0.01), gradients, params)
    ours = run(jgd.cautious(jgd.adam(0.01)), gradients, params)
    for name, u in plain.items():
        for step, (step_u, g) in enumerate(zip(np.asarray(u), gradients[name], strict=True)):
            keep = (step_u * np.asarray(g) < 0).astype(np.float32)
            expected = step_u * keep / max(keep.mean(), 1e-3)
            np.testing.assert_allclose(ours[name][step], expected, rtol=1e-4, atol=1e-7)


# --- lookahead -------------------------------------------------------------------------------


def test_lookahead_of_16_bit_pairs():
    pair = optax.LookaheadParams.init_synced({"w": jnp.ones(2, jnp.bfloat16)})
    tx = jgd.lookahead(jgd.adam(0.1), 2, 0.5)
    updates, _ = tx.update(pair.fast, tx.init(pair), pair)
    chex.assert_trees_all_equal_dtypes(updates, pair)
    with pytest.raises(ValueError, match=r"lookahead: params must be optax\.LookaheadParams"):
        tx.update(pair.fast, tx.init(pair), pair.fast)


@pytest.mark.parametrize("reset", [False, True])
def test_lookahead_equals_optax_with_and_without_pairs(reset):
    params, gradients = _start(11)
    theirs = optax.lookahead(optax.adam(0.1), 4, 0.3, reset)
    ours = jgd.lookahead(jgd.adam(0.1), 4, 0.3, reset)
    pair = optax.LookaheadParams.init_synced(params)
    one, two, alone = pair, pair, params
    states = [theirs.init(pair), ours.init(pair), ours.init(params)]
    assert states[1].slow is None
    for index in range(11):
        g = jgd.lane(gradients, index)
        updates, states[0] = theirs.update(g, states[0], one)
        one = optax.apply_updates(one, updates)
        updates, states[1] = ours.update(g, states[1], two)
        two = optax.apply_updates(two, updates)
        updates, states[2] = ours.update(g, states[2], alone)
        alone = optax.apply_updates(alone, updates)
    chex.assert_trees_all_close(two, one, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(alone, one.fast, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(states[2].slow, one.slow, rtol=1e-4, atol=1e-5)


# --- average_params --------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_average_params_has_no_bias_and_does_not_change_the_training(decay):
    params, gradients = _start(8)
    tx = jgd.average_params(jgd.momentum(0.1), decay)
    chex.assert_trees_all_equal(
        run(tx, gradients, params), run(jgd.momentum(0.1), gradients, params)
    )
    state, trajectory = tx.init(params), []
    chex.assert_trees_all_equal(jgd.averaged_params(state), params)
    for index in range(8):
        updates, state = tx.update(jgd.lane(gradients, index), state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    weights = np.array([decay ** (7 - k) for k in range(8)])
    average = jax.tree.map(
        lambda *xs: np.average(np.stack(xs), axis=0, weights=weights), *trajectory
    )
    chex.assert_trees_all_close(jgd.averaged_params((state, "more")), average, rtol=1e-4, atol=1e-6)
    assert optax.tree.get(jgd.average_params(jgd.adam(0.1)).init(params), "count") == 0
    with pytest.raises(
        ValueError, match="averaged_params: state must hold one AverageParamsState, got 0"
    ):
        jgd.averaged_params(jgd.adam(0.1).init(params))


# --- schedule-free ---------------------------------------------------------------------------


def test_schedule_free_equals_optax_under_a_schedule():
    """The weights read the schedule from step 1, as in optax; evaluation is at the average."""
    params, gradients = _start(20)
    schedule = optax.linear_schedule(0.1, 0.01, 15)
    ours = jgd.schedule_free(jgd.sgd(schedule), schedule)
    short = jgd.schedule_free_sgd(schedule)
    theirs = optax.contrib.schedule_free(optax.sgd(schedule), schedule)
    final = []
    for tx, evaluate in (
        (jgd.chain(ours), jgd.schedule_free_eval_params),
        (short, jgd.schedule_free_eval_params),
        (theirs, optax.contrib.schedule_free_eval_params),
    ):
        p, state = params, tx.init(params)
        for index in range(20):
            updates, state = tx.update(jgd.lane(gradients, index), state, p)
            p = optax.apply_updates(p, updates)
        final.append((p, evaluate(state, p)))
    chex.assert_trees_all_close(final[0], final[2], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(final[1], final[2], rtol=1e-4, atol=1e-5)


# --- groups ----------------------------------------------------------------------------------

NET = {
    "embed": {"table": jnp.ones((5, 3))},
    "layers": [
        {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
    ],
    "bias": jnp.ones(2),
}
ONES = jax.tree.map(jnp.ones_like, NET)


def _first_step(tx):
    updates, _ = tx.update(ONES, tx.init(NET), NET)
    return jax.tree.map(lambda u: float(u.ravel()[0]), updates)


def test_param_groups_by_path():
    groups = {
        "layers/0/*": jgd.sgd(3.0),
        "*/bias": jgd.sgd(2.0),  # also at the top level, but not in the first layer
        "embed/*": jgd.set_to_zero(),
    }
    tx = jgd.param_groups(jgd.adam(1.0), groups)
    updates = _first_step(tx)
    np.testing.assert_allclose(updates["layers"][1].pop("kernel"), -1.0, rtol=1e-5)
    assert updates == {
        "embed": {"table": 0.0},
        "layers": [{"kernel": -3.0, "bias": -3.0}, {"bias": -2.0}],
        "bias": -2.0,
    }
    size = sum(x.size for x in jax.tree.leaves(tx.init(NET)) if x.ndim)
    assert size == 2 * NET["layers"][1]["kernel"].size  # only the leaf of adam has accumulators
    assert "{'layers/0/*': sgd(learning_rate=3.0" in repr(tx)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tx)]
    assert ".groups['*/bias'].learning_rate" in paths


def test_a_pattern_that_matches_nothing_raises():
    tx = jgd.param_groups(jgd.adam(1.0), {"*/scale": jgd.sgd(1.0)})
    message = r"param_groups: no parameter matches '\*/scale'; the parameters are bias, embed/table"
    with pytest.raises(ValueError, match=message):
        tx.init(NET)
    shadowed = jgd.param_groups(
        jgd.adam(1.0), {"layers/*": jgd.sgd(1.0), "layers/0/*": jgd.lion(1.0)}
    )
    with pytest.raises(ValueError, match="'layers/0/\\*'; earlier patterns match"):
        shadowed.init(NET)
    with pytest.raises(TypeError, match=r"param_groups: groups\['bias'\] must be a transformation"):
        jgd.param_groups(jgd.adam(1.0), {"bias": 0.1})
    with pytest.raises(TypeError, match="param_groups: groups must be a dict from names"):
        jgd.param_groups(jgd.adam(1.0), jgd.sgd(1.0))


def test_groups_nest_and_gradients_may_be_missing():
    inner = jgd.param_groups(jgd.momentum(1.0), {"*/bias": jgd.sgd(2.0)})
    tx = jgd.param_groups(inner, {"embed/*": jgd.sgd(0.5)})
    state = tx.init(NET)
    missing = {**ONES, "bias": None}
    updates, state = tx.update(missing, state, NET)
    assert updates["bias"] is None
    assert float(updates["embed"]["table"][0, 0]) == -0.5
    assert float(updates["layers"][0]["bias"][0]) == -2.0
    tx.update(ONES, state, NET)


def test_factors_by_path():
    tx = jgd.chain(jgd.sgd(1.0), jgd.scale_by_path({"layers/1/*": 0.25, "*/kernel": 0.5}))
    assert _first_step(tx) == {
        "embed": {"table": -1.0},
        "layers": [{"kernel": -0.5, "bias": -1.0}, {"kernel": -0.25, "bias": -0.25}],
        "bias": -1.0,
    }


# --- widths ----------------------------------------------------------------------------------


def _mlp(width):
    """Return a task with muP's initialisation: variance 1 / fan_in, zeros in the last layer."""

    def init(key):
        one, two = jax.random.split(key)
        return {
            "in": jax.random.normal(one, (8, width)) / np.sqrt(8),
            "hidden": jax.random.normal(two, (width, width)) / np.sqrt(width),
            "out": jnp.zeros((width, 1)),
        }

    x = np.random.default_rng(0).normal(size=(128, 8)).astype(np.float32)
    y = np.sin(x.sum(1, keepdims=True)).astype(np.float32)

    def loss(p, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(jnp.tanh(x @ p["in"]) @ p["hidden"]) @ p["out"] - y) ** 2)

    return jgd.Task(init, loss, lambda step: (x, y), lambda p: {"loss": loss(p, (x, y))})


@pytest.mark.slow
@pytest.mark.parametrize("make", [jgd.adam, jgd.momentum], ids=["adam", "momentum"])
def test_the_best_rate_of_a_narrow_net_carries_over_to_a_wide_one(make):
    """With factors by width the best rate is the same; without them it is not."""
    rates = 2.0 ** np.arange(-11, 4)
    rule = "adam" if make is jgd.adam else "sgd"

    def best(width, by_width):
        shapes = jax.eval_shape(_mlp(16).init, jax.random.key(0))

        def final(rate):
            tx = make(rate)
            if by_width:
                tx = jgd.chain(tx, jgd.scale_by_width(shapes, rule=rule))
            keys = jax.random.split(jax.random.key(1), 3)
            train = lambda key: jgd.train(_mlp(width), tx, 60, key)[1]["loss"][-10:].mean()
            return jax.vmap(train)(keys).mean()

        run = jax.jit(lambda r: jax.lax.map(final, r), compiler_options=CONTRACTED)
        scores = np.asarray(run(jnp.asarray(rates)))
        return int(np.nanargmin(np.where(np.isfinite(scores), scores, np.inf)))

    narrow = best(16, True)
    assert abs(best(256, True) - narrow) <= 1
    assert abs(best(256, False) - narrow) >= 2


def test_factors_by_width():
    base = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "out": jnp.ones((3, 1))}
    wide = {"w": jnp.ones((2, 12)), "b": jnp.ones(12), "out": jnp.ones((12, 1))}
    expected = {
        "adam": {"w": 1.0, "b": 1.0, "out": 0.25},
        "sgd": {"w": 4.0, "b": 4.0, "out": 0.25},
    }
    for rule, factors in expected.items():
        tx = jgd.scale_by_width(base, rule=rule)
        updates, _ = tx.update(wide, tx.init(wide))
        assert {k: float(u.ravel()[0]) for k, u in updates.items()} == factors
    transposed = jgd.scale_by_width({"w": jnp.ones((3, 2))}, output_axis=0)
    updates, _ = transposed.update({"w": jnp.ones((12, 8))}, transposed.init(base))
    assert float(updates["w"][0, 0]) == 0.25
    with pytest.raises(ValueError, match="scale_by_width: rule must be one of"):
        jgd.scale_by_width(base, rule="lion")
    with pytest.raises(ValueError, match="scale_by_width: base must have the parameter c with"):
        jgd.scale_by_width(base).update({"c": jnp.ones(2)}, optax.EmptyState())
    masked = jgd.param_groups(jgd.scale_by_width(base), {"b": jgd.sgd(1.0)})
    assert float(masked.update(wide, masked.init(wide))[0]["out"][0, 0]) == 0.25
