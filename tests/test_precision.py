"""Steps smaller than the rounding of 16-bit parameters, and steps that are not finite."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from table import CONTRACTED

import jgd
from jgd.precision import CompensatedState, MasterWeightsState, _rounded
from jgd.trees import find_state

KEY = jax.random.key(0)
NARROW = (jnp.bfloat16, jnp.float16)
WRAPPERS = {
    "plain": lambda tx: tx,
    "compensated": jgd.compensated,
    "master": jgd.master_weights,
    "stochastic": lambda tx: jgd.stochastic_rounding(tx, 0),
}


def descend(tx, params, gradients):
    """Return the parameters and the state after one step per stacked gradient."""

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), gradients)[0]


def compiled(f):
    """Return `f` compiled with XLA's defaults for users: it skips casts and fuses operations."""
    return jax.jit(f, compiler_options=CONTRACTED)


# --- rounding --------------------------------------------------------------------------------


def test_rounding_is_that_of_a_cast():
    """Rounding equals a cast for ties, subnormal numbers, zeros, infinities and NaN."""
    rng = np.random.default_rng(0)
    wide = rng.normal(size=4000) * 2.0 ** rng.uniform(-30, 14, size=4000)
    ties = (rng.integers(-4000, 4000, 500) + 0.5) * 2.0 ** rng.integers(-24, 5, 500)
    x = np.float32([*wide, *ties, 0.0, -0.0, np.inf, -np.inf, np.nan, 1e-30, -3e38, 6e-8, 3e-8])
    for dtype in NARROW:
        inside = x[~(np.abs(x) > 65519) | ~np.isfinite(x)] if dtype == jnp.float16 else x
        ours = compiled(lambda x, dtype=dtype: _rounded(x, None, dtype))(inside)
        np.testing.assert_array_equal(ours, inside.astype(dtype).astype(np.float32))


def test_stochastic_rounding_takes_a_neighbour_without_bias():
    """This holds at powers of 2, for both signs and subnormal numbers; exact values stay."""
    n = 40_000
    for dtype in NARROW:
        unit = float(jnp.finfo(dtype).smallest_subnormal) if dtype == jnp.float16 else 2.0**-140
        base = np.float32([1.0, -2.0, 0.3, 3 * max(unit, 2.0**-120)])
        grid = base.astype(dtype)
        far = np.nextafter(grid, np.float32([-3, 3, 3, 3]).astype(dtype))
        low, high = (np.float64(g.astype(np.float32)) for g in (grid, far))
        x = np.float32(low + 0.3 * (high - low))
        noise = jax.random.uniform(KEY, (n, 4)).at[0].set(0)
        drawn = np.float64(
            compiled(lambda x, u, d=dtype: _rounded(x, u, d))(jnp.tile(x, (n, 1)), noise)
        )
        for column in range(4):
            assert set(drawn[:, column]) == {low[column], high[column]}
        part = ((drawn - low) / (high - low)).mean(0)
        np.testing.assert_allclose(part, (x - low) / (high - low), atol=4 * 0.46 / np.sqrt(n))
        still = jnp.tile(jnp.asarray(grid, jnp.float32), (n, 1))
        np.testing.assert_array_equal(_rounded(still, noise, dtype), still)


def test_rounding_has_derivative_1():
    x = jnp.float32([0.0, 1.001, -3.3, jnp.inf])
    for noise in (None, 0.4):
        total = lambda x, noise=noise: jnp.sum(2 * _rounded(x, noise, jnp.bfloat16))
        np.testing.assert_array_equal(jax.jit(jax.grad(total))(x), 2.0)


# --- steps smaller than rounding -------------------------------------------------------------


def test_a_thousand_small_steps():
    """1 - 1e-3 is 1 in bfloat16. The wrappers reach 0, and do not change float32 parameters."""
    start = {
        "bf16": jnp.ones(50, jnp.bfloat16),
        "f16": jnp.ones(50, jnp.float16),
        "f32": jnp.ones(5),
    }
    gradients = jax.tree.map(lambda p: jnp.ones((1000, *p.shape), p.dtype), start)
    run = lambda: {
        n: descend(wrap(jgd.sgd(1e-3)), start, gradients)[0] for n, wrap in WRAPPERS.items()
    }
    ends = compiled(run)()
    chex.assert_trees_all_equal_shapes_and_dtypes(*ends.values(), start)
    mean = {
        name: {k: float(x.astype(jnp.float32).mean()) for k, x in end.items()}
        for name, end in ends.items()
    }
    assert mean["plain"]["bf16"] == 1
    assert abs(mean["plain"]["f16"]) > 0.01
    for kind in ("bf16", "f16"):
        assert abs(mean["compensated"][kind]) < 1e-3
        assert abs(mean["master"][kind]) < 2e-5
        assert 0 < abs(mean["stochastic"][kind]) < 0.02  # the mean of 50 random walks
    assert len({*np.asarray(ends["stochastic"]["bf16"], np.float32)}) > 10
    for end in ends.values():
        chex.assert_trees_all_equal(end["f32"], ends["plain"]["f32"])


def test_the_state_holds_the_rounding_errors():
    """p + lost, and the master copy, equal the float64 sum of steps of all sizes."""
    rng = np.random.default_rng(0)
    kinds = {f"{p}, {g}": (p, g) for p in NARROW for g in (p, jnp.float32)}
    start = {k: jnp.asarray(4 + 0.3 * rng.normal(size=99), p) for k, (p, _) in kinds.items()}
    steps = 10.0 ** rng.uniform(-5, -1, size=(300, 1)) * rng.normal(size=(300, 99))
    gradients = {k: jnp.asarray(steps, g) for k, (_, g) in kinds.items()}
    wraps = (lambda tx: tx, jgd.compensated, jgd.master_weights)
    run = lambda gradients: [descend(wrap(jgd.sgd(1.0)), start, gradients) for wrap in wraps]
    (plain, _), (p, (lost, _)), (q, (master, _)) = compiled(run)(gradients)
    exactly = lambda x: np.float64(x.astype(jnp.float32))
    for name, p_0 in start.items():
        end = exactly(p_0) - exactly(gradients[name]).sum(0)
        assert np.abs(exactly(plain[name]) - end).max() > 0.02
        # `lost` was rounded 300 times, with much smaller errors than the parameter.
        np.testing.assert_allclose(exactly(p[name]) + exactly(lost[name]), end, atol=2e-3)
        np.testing.assert_allclose(master[name], end, atol=2e-5)
        chex.assert_trees_all_equal(q[name], master[name].astype(q[name].dtype))
        assert lost[name].dtype == p_0.dtype


def test_the_copy_is_reset_to_a_parameter_that_changed():
    tx = jgd.master_weights(jgd.sgd(1e-3))
    params = {"w": jnp.ones(2, jnp.bfloat16), "frozen": jnp.ones(2, jnp.bfloat16)}
    gradient = {"w": jnp.ones(2, jnp.bfloat16), "frozen": None}
    _, state = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(state.master["w"], 0.999)
    params["w"] = jnp.bfloat16([1, 3])
    updates, state = tx.update(gradient, state, params)
    np.testing.assert_allclose(state.master["w"], [0.998, 2.999])
    np.testing.assert_array_equal(state.master["frozen"], 1.0)
    assert updates["frozen"] is None
    params["w"] = jnp.bfloat16([0.998, jnp.nan])
    _, state = tx.update(gradient, state, params)
    np.testing.assert_allclose(state.master["w"], [0.997, np.nan])


def test_noise_differs_between_steps_leaves_and_keys():
    params = {"a": jnp.ones(400, jnp.bfloat16), "b": jnp.ones(400, jnp.bfloat16)}
    tx = lambda key: jgd.stochastic_rounding(jgd.sgd(2e-3), key)

    def two_steps(key):
        state = tx(key).init(params)
        first, state = tx(key).update(params, state, params)
        second, _ = tx(key).update(params, state, params)
        return first["a"], first["b"], second["a"]

    lanes, alone = jax.jit(lambda: (jax.vmap(two_steps)(jnp.arange(2)), two_steps(1)))()
    rows = np.float32([*lanes[0], *lanes[1], *lanes[2]])
    assert len(np.unique(rows, axis=0)) == 6
    chex.assert_trees_all_equal(jgd.lane(lanes, 1), alone)
    words = lambda key: jax.random.key_data(tx(key).init({}).key).tolist()
    typed = jax.random.key(3)
    assert words(3) == words(typed) == words(jax.random.key_data(typed)) != words(4)
    mapped = jax.eval_shape(jax.vmap(tx), jax.random.split(KEY, 3))  # a key may be a leaf
    assert jax.eval_shape(jax.vmap(lambda tx: tx.init(params).key), mapped).shape == (3,)


def test_memory_is_what_the_docstrings_state():
    """The wrappers store a 16-bit tree, a float32 tree or a key, and nothing for other leaves."""
    leaves = {"w": jnp.ones((8, 3), jnp.bfloat16), "h": jnp.ones(5, jnp.float16)}
    others = {
        "f": jnp.ones(7),
        "c": jnp.ones(2, complex),
        "n": jnp.arange(3),
        "hidden": optax.MaskedNode(),
        "none": None,
    }
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    inner = jgd.adam(1e-3)
    memory = lambda tx, params: (
        size(jax.eval_shape(tx.init, params)) - size(jax.eval_shape(inner.init, params))
    )
    expected = {"plain": (0, 0), "compensated": (0, 58), "master": (0, 116), "stochastic": (8, 8)}
    for narrow, params in enumerate((others, {**leaves, **others})):
        for name, wrap in WRAPPERS.items():
            tx = wrap(inner)
            state = jax.eval_shape(tx.init, params)
            assert memory(tx, params) == expected[name][narrow]
            updates, after = jax.eval_shape(tx.update, params, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
            inexact = {k: x for k, x in params.items() if k != "n"}
            updates.pop("n")
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, inexact)


# --- wrappers inside other transformations ---------------------------------------------------

ADAM = jgd.adam(1e-3)
SUM = jgd.compensated(ADAM)
NESTS = {
    "a chain": jgd.chain(jgd.scale(0.5), SUM),
    "beside an accumulator of optax": jgd.chain(optax.trace(0.9), SUM),
    "a chain of optax": jgd.chain(optax.chain(optax.clip(1.0), SUM), jgd.identity()),
    "a mask of optax": jgd.cautious(optax.masked(SUM, True)),
    "MultiSteps": jgd.chain(optax.MultiSteps(SUM, 2).gradient_transformation()),
    "lifted": jgd.as_pytree(lambda rate: jgd.compensated(jgd.adam(rate)))(1e-3),
    "lifted, in closures": jgd.lookahead(
        jgd.as_pytree(lambda rate: optax.chain(optax.clip(1.0), jgd.compensated(jgd.adam(rate))))(
            1e-3
        ),
        5,
        0.5,
    ),
    "a lifted wrapper": jgd.as_pytree(optax.masked)(SUM, True),
    "groups": jgd.param_groups(jgd.adam(1e-3), {"w": SUM}),
    "accumulate": jgd.accumulate(SUM, 4),
    "average": jgd.average_params(SUM),
    "lookahead": jgd.lookahead(SUM, 5, 0.5),
    "schedule-free": jgd.schedule_free(SUM, 0.1),
    "layers": jgd.per_layer(SUM),
    "nesterov": jgd.with_nesterov(SUM),
    "scaled": jgd.loss_scaled(SUM),
    "skipped": jgd.skip_nonfinite(jgd.chain(jgd.scale(jgd.linear_schedule(1.0, 0.5, 9)), SUM)),
    "the copy": jgd.master_weights(ADAM),
    "the copy of a sum": jgd.accumulate(jgd.master_weights(SUM), 2),
    "a schedule": jgd.compensated(jgd.adam(jgd.linear_schedule(1e-3, 0.0, 9))),
}


@pytest.mark.parametrize("name", NESTS)
def test_a_nested_wrapper_receives_the_dtype_of_the_parameters(name):
    """Only `lost` has 16 bits: other accumulators stay float32."""
    tx = NESTS[name]
    for dtype in NARROW:
        params = {"w": jnp.ones((3, 2), dtype), "v": jnp.ones((3, 1), dtype)}
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        is_sum = lambda node: isinstance(node, CompensatedState)
        nodes = jax.tree.leaves(state, is_leaf=is_sum)
        lost = [x.dtype for node in nodes if is_sum(node) for x in jax.tree.leaves(node.lost)]
        count = 0 if name.startswith("the copy") else 1 if name == "groups" else 2
        assert lost == [dtype] * count
        narrow = [x for x in jax.tree.leaves(state) if x.dtype == dtype]
        assert len(narrow) == count
        if name.startswith("the copy"):
            chex.assert_type(
                jax.tree.leaves(find_state("test", state, MasterWeightsState).master), jnp.float32
            )


def test_a_wrapper_hidden_in_a_function_raises():
    """The hidden wrapper would receive float32 parameters and compensate nothing."""
    partial = optax.GradientTransformation(
        functools.partial(lambda tx, *args: tx.init(*args), SUM),
        functools.partial(lambda tx, *args: tx.update(*args), SUM),
    )
    params = jnp.ones(2, jnp.bfloat16)
    for hidden in (partial, optax.chain(partial, optax.scale(0.5))):
        with pytest.raises(TypeError, match=r"compensated: params must have .* from chain, which"):
            jgd.chain(hidden).init(params)
        assert jgd.chain(hidden).init(jnp.ones(2))  # no dtype to hide
    updates, state = optax.chain(partial).update(params, optax.chain(partial).init(params), params)
    assert state[0].lost.dtype == updates.dtype == jnp.bfloat16


def test_a_factory_may_close_over_a_dict_that_jax_cannot_sort():
    """jgd searches closures for wrappers that need the dtypes of the parameters."""
    odd = {1: 2.0, "a": 3.0}
    tx = jgd.as_pytree(lambda rate: optax.sgd(lambda step: rate * odd[1]))(0.1)
    assert tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0][0] == np.float32(-0.2)


def test_updates_have_the_wider_precision():
    """Float32 parameters with 16-bit gradients get float32 updates, with or without frozen ones."""
    wider = {
        ("bfloat16", "bfloat16"): "bfloat16",
        ("bfloat16", "float32"): "float32",
        ("float32", "bfloat16"): "float32",
        ("float16", "bfloat16"): "float32",
        ("float16", None): "float16",
        ("bfloat16", "complex64"): "float32",
    }
    pick = lambda index: {
        str(k): None if k[index] is None else jnp.ones(2, k[index]) for k in wider
    }
    gradients, params = pick(0), pick(1)
    update = lambda *trees: jgd.scale(-0.1).update(trees[0], optax.EmptyState(), *trees[1:])[0]
    frozen = {**gradients, "frozen": None}
    for grads, values in ((gradients, params), (frozen, {**params, "frozen": jnp.ones(3)})):
        updates = jax.eval_shape(update, grads, values)
        for pair, dtype in wider.items():
            assert updates[str(pair)].dtype == dtype
    chex.assert_trees_all_equal_dtypes(jax.eval_shape(update, gradients), gradients)


# --- steps that are not finite ---------------------------------------------------------------


def test_loss_scaling_counts_steps_as_keras_does():
    """Each lane has its own count. `test_compat_optimizers.py` compares with Keras itself."""
    bad = np.zeros((2, 12), bool)
    bad[0, [4, 5]] = bad[1, 9] = True
    tx = jgd.loss_scaled(jgd.master_weights(jgd.adam(0.1)), 8.0, 3)
    params = {"w": jnp.ones(2, jnp.float16)}

    def step(carry, bad):
        params, state = carry
        scale = jgd.loss_scale({"nested": [state]})
        gradient = jax.grad(lambda p: scale * jnp.sum(jnp.float32(p["w"]) ** 2))(params)
        gradient = jax.tree.map(lambda g: jnp.where(bad, jnp.inf, g), gradient)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), (scale, state.steps, updates["w"])

    lane = lambda bad: jax.lax.scan(step, (params, tx.init(params)), bad)
    (_, state), (scales, steps, updates) = jax.jit(jax.vmap(lane))(bad)
    expected = [
        [8, 8, 8, 16, 16, 8, 4, 4, 4, 8, 8, 8],
        [8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 32, 32],
    ]
    np.testing.assert_array_equal(scales, expected)
    np.testing.assert_array_equal(steps[0], [1, 2, 0, 1, 0, 0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(optax.tree.get(state, "count"), [10, 11])
    np.testing.assert_array_equal((updates == 0).all(-1), bad)
    np.testing.assert_allclose(updates[:, 0], -0.1, rtol=1e-2)  # Adam saw the unscaled gradient
    with pytest.raises(ValueError, match="loss_scale: state must hold one LossScaleState, got 0"):
        jgd.loss_scale(jgd.sgd(0.1).init(params))


def test_the_scale_stays_in_range():
    """The scale does not overflow in a long training, nor vanish in a long series of NaN."""
    tx = jgd.loss_scaled(jgd.sgd(0.1), 1.0, 1)
    run = lambda g: jgd.loss_scale(descend(tx, jnp.ones(2), jnp.full((140, 2), g))[1])
    ends = jax.jit(jax.vmap(run))(jnp.array([0.0, jnp.nan]))
    np.testing.assert_array_equal(ends, [2.0**126, 2.0**-126])


def _never_better():
    """Return a transformation whose state is infinite, like a best loss before the first step."""
    return optax.GradientTransformation(lambda _: jnp.array(jnp.inf), lambda g, s, _=None: (g, s))


def _times_value():
    times = lambda updates, value: jax.tree.map(lambda u: u * value, updates)
    update = lambda u, s, p=None, *, value, **_: (times(u, value), s)
    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


INNER = jgd.chain(_never_better(), jgd.adam(0.1), _times_value())


def test_each_lane_skips_its_nonfinite_steps():
    """A nonfinite gradient, state or update skips the step; counts are those of optax."""
    gradients = np.tile(np.linspace(1, 2, 16, dtype=np.float32).reshape(8, 2), (4, 1, 1))
    values = np.ones((4, 8), np.float32)
    bad = np.zeros((4, 8), bool)
    bad[1, [2, 3]] = bad[2, 5:] = bad[3, 6] = True
    optax_gradients = np.where(bad[..., None], np.nan, gradients)  # optax skips only by gradients
    gradients[1, [2, 3], 0] = np.nan, -np.inf
    gradients[2, 5:, 1] = 1e20  # its square is infinite, and the update would be 0
    values[3, 6] = np.inf

    def run(tx, gradients, values):
        def step(carry, inputs):
            params, state = carry
            w, value = inputs
            updates, state = tx.update({"w": w, "frozen": None}, state, params, value=value)
            return (optax.apply_updates(params, updates), state), updates["w"]

        params = {"w": jnp.zeros(2), "frozen": None}
        return jax.lax.scan(step, (params, tx.init(params)), (gradients, values))

    lanes = lambda tx, *inputs: jax.vmap(lambda *xs: run(tx, *xs))(*inputs)
    theirs = optax.apply_if_finite(INNER, 100)
    both = lambda: (
        lanes(jgd.skip_nonfinite(INNER), gradients, values),
        lanes(theirs, optax_gradients, np.ones_like(values)),
    )
    ours, expected = jax.jit(both)()
    chex.assert_trees_all_close(ours, expected, rtol=1e-6)
    ((_, state), updates) = ours
    assert type(state) is optax.ApplyIfFiniteState
    np.testing.assert_array_equal((updates == 0).all(-1), bad)
    np.testing.assert_array_equal(state.notfinite_count, [0, 0, 3, 0])
    np.testing.assert_array_equal(state.total_notfinite, [0, 2, 3, 1])
    np.testing.assert_array_equal(state.last_finite, [True, True, False, True])


def test_a_state_may_hold_python_floats():
    halve = lambda g, s, _=None: (jax.tree.map(lambda x: s * x, g), s / 2)
    tx = jgd.skip_nonfinite(optax.GradientTransformation(lambda _: 1.0, halve))
    state = tx.init(jnp.ones(2))
    for g, expected in ((1.0, 1.0), (jnp.nan, 0.0), (1.0, 0.5)):
        updates, state = tx.update(jnp.full(2, g), state)
        np.testing.assert_array_equal(updates, expected)


def test_a_skipped_step_has_finite_derivatives():
    gradients = jnp.ones((4, 2)).at[2].set(jnp.nan)
    total = lambda tx: jnp.sum(descend(tx, jnp.ones(2), gradients)[0])
    for wrap in (jgd.skip_nonfinite, jgd.loss_scaled):
        slopes = jax.jit(jax.grad(total))(wrap(jgd.adam(0.1)))
        chex.assert_tree_all_finite(slopes)
        np.testing.assert_allclose(slopes.inner.learning_rate, -6, rtol=0.02)  # 3 of 4 steps


# --- training --------------------------------------------------------------------------------


def test_train_and_sweep_16_bit_parameters():
    """A lane of each wrapper in a sweep equals `jgd.train`."""
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    y = x @ np.float32([1, -2, 3])

    def loss(params, batch):
        return jnp.mean((batch[0] @ params["w"].astype(jnp.float32) - batch[1]) ** 2)

    init = lambda key: {"w": jnp.ones(3, jnp.bfloat16)}
    evaluate = lambda params: {"loss": loss(params, (x, y))}
    task = jgd.Task(init, loss, jgd.minibatches((x, y), None, KEY), evaluate)
    nests = {
        "sum": lambda rate: jgd.skip_nonfinite(jgd.compensated(jgd.sgd(rate))),
        "noise": lambda rate: jgd.stochastic_rounding(jgd.sgd(rate), 0),
    }
    settings = {name: jgd.grid(nest, rate=[1e-3, 1e-4]) for name, nest in nests.items()}
    result = jgd.sweep(task, settings, 100)
    losses = {(row["optimizer"], row["rate"]): row["loss"] for row in result.rows}
    assert len(losses) == 4
    alone = lambda: {name: jgd.train(task, nest(1e-3), 100, KEY)[0] for name, nest in nests.items()}
    for name, params in jax.jit(alone)().items():
        np.testing.assert_allclose(losses[name, 1e-3], evaluate(params)["loss"], rtol=1e-5)


def _transformer(key):
    draw = lambda key, *shape: jax.random.normal(key, shape) / np.sqrt(shape[0])
    shapes = dict(
        rows=(8, 16), place=(8, 16), qkv=(16, 48), mix=(16, 16), up=(16, 32), down=(32, 16)
    )
    shapes["classes"] = (16, 10)
    keys = jax.random.split(key, len(shapes))
    return {name: draw(k, *shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def _loss(params, images, labels):
    """Return the cross-entropy in float32 for digits whose 8 rows are the tokens."""
    p = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    norm = lambda x: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    x = images @ p["rows"] + p["place"]
    q, k, v = jnp.split(norm(x) @ p["qkv"], 3, -1)
    x += jax.nn.softmax(q @ k.mT / 4) @ v @ p["mix"]
    x += jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
    logits = norm(x).mean(1) @ p["classes"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.slow
def test_a_transformer_in_16_bits():
    """With a wrapper, the loss after 2,000 steps is within 1 per cent of that in float32."""
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images.reshape(-1, 8, 8) / 16 - 0.5, jnp.float32)

    def final(tx, params):
        def step(carry, index):
            params, state = carry
            batch = (jnp.arange(32) + 32 * index) % len(labels)
            gradient = jax.grad(_loss)(params, images[batch], jnp.asarray(labels)[batch])
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(2000))
        return _loss(params, images, labels)

    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), _transformer(KEY))
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    adamw = jgd.adamw(3e-4)
    train = lambda tx, params: float(compiled(final)(tx, params))
    exact = train(adamw, wide)
    assert exact < 0.6
    assert train(adamw, narrow) > 1.5 * exact
    for wrap in (jgd.compensated, jgd.master_weights):
        np.testing.assert_allclose(train(wrap(adamw), narrow), exact, rtol=0.01)


def test_lanes_of_a_sweep_use_their_own_raw_keys():
    task = jgd.Task(
        init=lambda key: jnp.ones(4, jnp.bfloat16),
        loss=lambda w, batch: jnp.sum(w.astype(jnp.float32) ** 2),
        batch=lambda step: (),
        evaluate=lambda w: {"loss": jnp.sum(w.astype(jnp.float32) ** 2)},
    )
    build = lambda key: jgd.stochastic_rounding(jgd.sgd(1e-4), key)
    keys = jax.random.split(jax.random.key(0), 3)
    result = jgd.sweep(task, jax.vmap(build)(jax.random.key_data(keys)), steps=20)
    assert len({row["loss"] for row in result.rows}) == 3
    with pytest.raises(TypeError, match=r"^sweep: random keys of a setting must be raw, got key"):
        jgd.sweep(task, jax.vmap(build)(keys), steps=20)
