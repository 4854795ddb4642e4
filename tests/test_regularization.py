"""Penalties, dropout and batch norm against Keras and PyTorch, at edge cases, and as lanes."""

import os
import re
import textwrap

os.environ.setdefault("KERAS_BACKEND", "jax")

import chex
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch
from test_tuning import _Spy

import jgd
from jgd import regularization
from jgd.regularization import (
    add_l1,
    add_l1_l2,
    add_l2,
    add_orthogonal,
    batch_norm,
    dropout,
    l1,
    l1_l2,
    l2,
    orthogonal,
)

RNG = np.random.default_rng(0)
ONE, TWO = 2.0**-6, 2.0**-4  # exact in float32, to which Keras rounds strengths


def _keras_in(dtype):
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


@pytest.fixture
def keras64(float64):
    _keras_in("float64")
    yield
    _keras_in("float32")


def _close(ours, theirs, rtol=1e-12):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=rtol, atol=1e-14)


def _near(ours, theirs):
    """Assert equality within 1e-6 of the largest entry: Keras computes in float32."""
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def _same(ours, theirs):
    """Assert equality bit for bit, and of dtypes."""
    chex.assert_trees_all_equal(ours, theirs)
    chex.assert_trees_all_equal_dtypes(ours, theirs)


# --- penalties -------------------------------------------------------------------------------

PENALTIES = {
    "l1": (lambda p: l1(p, ONE), lambda: keras.regularizers.L1(ONE)),
    "l2": (lambda p: l2(p, TWO), lambda: keras.regularizers.L2(TWO)),
    "l1_l2": (lambda p: l1_l2(p, ONE, TWO), lambda: keras.regularizers.L1L2(ONE, TWO)),
    "rows": (lambda p: orthogonal(p, TWO), lambda: keras.regularizers.OrthogonalRegularizer(TWO)),
    "columns": (
        lambda p: orthogonal(p, TWO, mode="columns"),
        lambda: keras.regularizers.OrthogonalRegularizer(TWO, mode="columns"),
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_and_their_gradients_are_those_of_keras(name, keras64):
    ours, theirs = PENALTIES[name]
    x = jnp.asarray(RNG.normal(size=(4, 3)))
    value, slope = jax.jit(jax.value_and_grad(ours))(x)
    expected, expected_slope = jax.jit(jax.value_and_grad(theirs()))(x)
    assert value.dtype == np.float64
    _close(value, expected)
    _close(slope, expected_slope)
    two = jax.jit(ours)({"a": x, "b": {"c": x}, "none": None})  # a tree is the sum of its leaves
    _close(two, 2 * expected)


def test_defaults_are_those_of_keras():
    x = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    for ours, theirs in (
        (l1, keras.regularizers.L1()),
        (l2, keras.regularizers.L2()),
        (l1_l2, keras.regularizers.L1L2()),
        (orthogonal, keras.regularizers.OrthogonalRegularizer()),
    ):
        _close(ours(x), theirs(x), rtol=1e-6)  # both in float32


def test_the_factor_of_two():
    """The penalty has no factor 1/2, and its gradient has a factor 2."""
    x = jnp.array([3.0, -4.0, 0.0])
    assert l2(x, 0.5) == 12.5
    assert l1(x, 0.5) == 3.5
    assert l1_l2(x, 0.5, 0.5) == 16.0
    np.testing.assert_array_equal(jax.grad(l2)(x, 0.5), x)
    np.testing.assert_array_equal(jax.grad(l1)(x, 0.5), [0.5, -0.5, 0.0])
    updates, _ = add_l2(0.5).update(jnp.ones(3), add_l2(0.5).init(x), x)
    np.testing.assert_array_equal(updates, 1 + x)


def test_the_l2_strength_is_half_of_the_weight_decay_in_pytorch(float64):
    """weight_decay=d in PyTorch's SGD equals add_l2(d / 2) and add_decayed_weights(d)."""
    start, gradients = RNG.normal(size=5), RNG.normal(size=(20, 5))
    p = torch.tensor(start, requires_grad=True)
    theirs = torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.3)
    for g in gradients:
        p.grad = torch.tensor(g)
        theirs.step()
    for decay in (add_l2(0.15), jgd.add_decayed_weights(0.3)):
        tx, ours = jgd.chain(decay, jgd.momentum(0.1, 0.9)), jnp.asarray(start)
        state = tx.init(ours)
        for g in gradients:
            updates, state = tx.update(jnp.asarray(g), state, ours)
            ours = optax.apply_updates(ours, updates)
        _close(ours, p.detach().numpy())


def _net(dtype=None):
    shapes = {"one": {"kernel": (3, 4), "bias": (4,)}, "two": {"kernel": (4, 2), "bias": (2,)}}
    draw = lambda shape: jnp.asarray(RNG.normal(size=shape), dtype)
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


LINKS = {
    "l1": (add_l1(ONE), lambda p, **only: l1(p, ONE, **only)),
    "l2": (add_l2(TWO), lambda p, **only: l2(p, TWO, **only)),
    "l1_l2": (add_l1_l2(ONE, TWO), lambda p, **only: l1_l2(p, ONE, TWO, **only)),
    "orthogonal": (
        add_orthogonal(TWO, mode="columns"),
        lambda p, **only: orthogonal(p, TWO, mode="columns", **only),
    ),
}


@pytest.mark.parametrize("name", LINKS)
def test_links_add_the_gradient_of_the_penalty(name, float64):
    """Ten steps of Adam are the same with the penalty in the loss and with the link."""
    link, penalty = LINKS[name]
    link = link._replace(only="*/kernel")
    params, x = _net(), jnp.asarray(RNG.normal(size=(8, 3)))

    def loss(p):
        hidden = jnp.tanh(x @ p["one"]["kernel"] + p["one"]["bias"])
        return jnp.mean((hidden @ p["two"]["kernel"] + p["two"]["bias"] - 1) ** 2)

    def ten_steps(tx, loss):
        def step(carry, _):
            p, state = carry
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=10)[0][0]

    in_loss = ten_steps(jgd.adam(0.1), lambda p: loss(p) + penalty(p, only="*/kernel"))
    in_chain = ten_steps(jgd.chain(link, jgd.adam(0.1)), loss)
    chex.assert_trees_all_close(in_chain, in_loss, rtol=1e-9, atol=1e-12)
    assert penalty(params, only="*/kernel") > 0.01


def test_only_selects_the_parameters_that_match():
    params = _net() | {"none": None}
    kernels = [params[name]["kernel"] for name in ("one", "two")]
    np.testing.assert_allclose(l2(params, 1.0, only="*/kernel"), l2(kernels, 1.0), rtol=1e-6)
    np.testing.assert_array_equal(l2(params, 1.0, only="one/*"), l2(params["one"], 1.0))
    several = ("one/kernel", "*/kernel", "two/bias")  # patterns may overlap
    np.testing.assert_allclose(
        l1(params, 1.0, only=several), l1([kernels, params["two"]["bias"]], 1.0), rtol=1e-6
    )
    slopes = jax.grad(lambda p: l1_l2(p, 1.0, 1.0, only="*/kernel"))(params)
    assert not slopes["one"]["bias"].any()
    assert slopes["one"]["kernel"].all()
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = add_l2(1.0, only=several)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert not updates["one"]["bias"].any()
    np.testing.assert_allclose(updates["two"]["bias"], 2 * params["two"]["bias"])
    assert updates["none"] is None
    zeros["one"]["kernel"] = None  # a parameter without a gradient
    assert tx.update(zeros, tx.init(params), params)[0]["one"]["kernel"] is None


def test_patterns_that_match_nothing_raise():
    params = _net()
    for name, penalty in dict(l1=l1, l2=l2, l1_l2=l1_l2, orthogonal=orthogonal).items():
        with pytest.raises(ValueError, match=rf"^{name}: no parameter matches '\*/kernle'; the p"):
            penalty(params, 0.1, only=("*/bias", "*/kernle"))
        with pytest.raises(TypeError, match=f"^{name}: only must be a pattern or several"):
            penalty(params, 0.1, only=None)
    link = add_l1(0.1, only="*/kernle")
    with pytest.raises(ValueError, match=r"^add_l1: no parameter matches '\*/kernle'"):
        link.update(params, link.init(params), params)
    with pytest.raises(
        ValueError, match=r"^orthogonal: no parameter that matches '\*/bias' is a m"
    ):
        orthogonal(params, only="*/bias")
    with pytest.raises(ValueError, match=r"^add_l2: params must be given, got None"):
        add_l2(0.1).update(params, link.init(params))
    assert l2({}, 0.1) == 0


@pytest.mark.parametrize("wrong", [-0.1, np.float32(-0.1), jnp.array(-0.1), np.nan])
def test_strengths_out_of_range_raise(wrong):
    for name, argument, call in (
        ("l1", "strength", lambda: l1(jnp.ones(2), wrong)),
        ("l2", "strength", lambda: l2(jnp.ones(2), wrong)),
        ("l1_l2", "l2", lambda: l1_l2(jnp.ones(2), l2=wrong)),
        ("orthogonal", "factor", lambda: orthogonal(jnp.ones((2, 2)), wrong)),
    ):
        for f in (call, jax.jit(call)):  # inside jit the number is still concrete
            with pytest.raises(ValueError, match=rf"^{name}: {argument} must be at least 0, got "):
                f()
    if not isinstance(wrong, jax.Array):
        with pytest.raises(ValueError, match=r"^add_l1_l2: l1 must be at least 0, got"):
            add_l1_l2(wrong)


def test_arguments_of_other_types_raise():
    for wrong in (True, "0.1", None, 1j, jnp.array(True)):
        with pytest.raises(TypeError, match=r"^l2: strength must be a number at least 0, got"):
            l2(jnp.ones(2), wrong)
    with pytest.raises(
        TypeError, match=r"^l2: strength must be a scalar, got shape \(3,\).*jax\.vmap"
    ):
        l2(jnp.ones(2), jnp.ones(3))
    for mode in ("row", None, 0):
        with pytest.raises(ValueError, match=r"^orthogonal: mode must be one of"):
            orthogonal(jnp.ones((2, 2)), mode=mode)


def test_derivatives_at_zero_are_finite(float64):
    """First and second derivatives are finite where entries, rows or matrices are 0."""
    x = jnp.asarray(RNG.normal(size=(4, 3))).at[1].set(0).at[0, 0].set(0)
    np.testing.assert_array_equal(jax.grad(l1)(x)[1], 0)
    squares = jnp.stack([x[1:], jnp.zeros((3, 3)), jnp.eye(3), jnp.ones((3, 3))])
    for mode, matrices in (("rows", squares[:, :2]), ("columns", squares)):
        penalty = lambda p, factor, mode=mode: orthogonal(p, factor, mode=mode)
        everything = lambda p, f=penalty: (
            jax.value_and_grad(f, argnums=(0, 1))(p, 0.1),
            jax.hessian(f)(p, 0.1),
        )
        chex.assert_tree_all_finite(jax.jit(jax.vmap(everything))(matrices))
    assert orthogonal(jnp.ones((1, 3)), 1.0) == 0  # no pairs
    assert orthogonal(jnp.eye(3), 1.0) == 0
    _close(orthogonal(jnp.ones((3, 3)), 1.0), 1.0)  # the mean cosine, not the sum


def test_penalties_sum_in_at_least_float32():
    ones = jnp.ones(10_000, jnp.bfloat16)  # a bfloat16 sum would stop at 256
    assert l2(ones, 0.5) == l1(ones, 0.5) == 5000
    assert l2(ones, 0.5).dtype == jnp.float32
    assert jax.grad(l2)(ones, 0.5).dtype == jnp.bfloat16
    tx = add_l2(0.5)
    updates, _ = tx.update(ones, tx.init(ones), ones)
    assert updates.dtype == jnp.bfloat16


def test_float32_parameters_stay_so_under_x64(float64):
    ones = jnp.ones(3, jnp.float32)
    assert l1_l2(ones, 0.1, 0.1).dtype == jnp.float32
    updates, _ = add_l1_l2(0.1, 0.1).update(ones, optax.EmptyState(), ones)
    assert updates.dtype == jnp.float32


def test_strengths_are_lanes_and_have_derivatives():
    params, strengths = _net(), jnp.array([0.0, 0.1, 1.0])
    alone = [l2(params, s) for s in strengths]
    np.testing.assert_allclose(jax.vmap(lambda s: l2(params, s))(strengths), alone, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda s: l2(params, s))(0.3), l2(params, 1.0), rtol=1e-6)
    assert jax.tree.leaves(add_l1_l2(0.1, 0.2)) == [0.1, 0.2]
    update = jax.jit(lambda tx: tx.update(params, tx.init(params), params)[0])
    lanes = jax.jit(jax.vmap(update))(jax.vmap(add_orthogonal)(strengths))
    for i, s in enumerate(strengths):
        chex.assert_trees_all_close(
            jgd.lane(lanes, i), update(add_orthogonal(s)), rtol=1e-5, atol=1e-6
        )
    rising = add_l2(jgd.linear_schedule(0.0, 0.5, 10))
    state = rising.init(params["one"])
    for step in range(3):
        updates, state = rising.update(params["one"], state, params["one"])
        expected = jax.tree.map(lambda p, step=step: p + 2 * 0.05 * step * p, params["one"])
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_training_with_penalties_equals_fit_with_regularizers_in_keras(keras64):
    """Dense layers with L1, L2 and L1L2 kernels follow the same path for 40 steps."""
    x, y = RNG.normal(size=(16, 3)), RNG.normal(size=(16, 1))
    regularizers = keras.regularizers.L1(ONE), keras.regularizers.L2(TWO)
    layers = [
        keras.layers.Dense(4, "tanh", kernel_regularizer=regularizers[0], name="one"),
        keras.layers.Dense(4, "tanh", kernel_regularizer=regularizers[1], name="two"),
        keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L1L2(ONE, TWO), name="three"),
    ]
    model = keras.Sequential([keras.Input((3,)), *layers])
    start = {
        layer.name: {"kernel": jnp.array(layer.kernel.value), "bias": jnp.array(layer.bias.value)}
        for layer in layers
    }
    model.compile(keras.optimizers.SGD(TWO), "mse")
    history = model.fit(x, y, batch_size=16, epochs=40, shuffle=False, verbose=0).history["loss"]

    def loss(params, batch):
        h = batch[0]
        for name in ("one", "two"):
            h = jnp.tanh(h @ params[name]["kernel"] + params[name]["bias"])
        out = h @ params["three"]["kernel"] + params["three"]["bias"]
        fit = jnp.mean((out - batch[1]) ** 2)
        penalty = (
            l1(params, ONE, only="one/kernel")
            + l2(params, TWO, only="two/kernel")
            + l1_l2(params, ONE, TWO, only="three/kernel")
        )
        return fit + penalty

    batch = jgd.minibatches((x, y), None, jax.random.key(0))
    task = jgd.Task(lambda key: start, loss, batch, lambda p: {"loss": loss(p, (x, y))})
    params, ours = jgd.train(task, jgd.sgd(TWO), 40, jax.random.key(0))
    for layer in layers:
        # Keras computes the mean of squares in float32.
        _near(params[layer.name]["kernel"], layer.kernel.value)
    np.testing.assert_allclose(ours["loss"], history, rtol=1e-6)


# --- dropout ---------------------------------------------------------------------------------


def test_dropout_of_a_5_by_2_array_equals_keras():
    """The same key gives the same mask and the same values, in training and in inference."""
    x = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    layer = keras.layers.Dropout(0.2, seed=3)
    for _ in range(3):
        key = jnp.array(layer.seed_generator.state.value)  # the call below changes the state
        theirs = layer(x, training=True)
        ours = dropout(key, x, 0.2, training=True)
        np.testing.assert_allclose(ours, theirs, rtol=2e-7)  # one rounding of 1 - rate
        assert set(np.unique(np.asarray(ours / x).round(5))) <= {0, 1.25}
    np.testing.assert_array_equal(dropout(key, x, 0.2, training=False), layer(x, training=False))
    torch.manual_seed(0)
    # PyTorch has another random generator: only the scale is the same.
    tensor = torch.nn.Dropout(0.2)(torch.tensor(x)).numpy()
    np.testing.assert_allclose(tensor[tensor > 0], (1.25 * x)[tensor > 0], rtol=2e-7)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_mask_statistics(rate):
    n = 100_000
    y = dropout(jax.random.key(1), jnp.ones(n), rate, training=True)
    assert abs(float((y == 0).mean()) - rate) < 5 * np.sqrt(rate * (1 - rate) / n)
    np.testing.assert_allclose(y[y > 0], 1 / (1 - rate), rtol=1e-6)
    halves = (y == 0).reshape(2, -1)  # entries are independent
    both = float((halves[0] & halves[1]).mean())
    assert abs(both - rate**2) < 5 * np.sqrt(rate**2 / (n / 2))
    other = dropout(jax.random.key(2), jnp.ones(n), rate, training=True)
    assert (other != y).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rates_of_0_and_1_traced_and_concrete(dtype):
    x = jnp.asarray(RNG.normal(size=100), dtype).at[0].set(0)
    key, zeros = jax.random.key(0), jnp.zeros_like(x)
    drop = lambda rate: dropout(key, x, rate, training=True)
    lanes = jax.jit(jax.vmap(drop))(jnp.array([0.0, 1.0, 0.3]))
    _same(drop(0), x)
    _same(drop(1), zeros)
    _same(jax.jit(drop)(0.0), x)
    _same(jax.jit(drop)(1.0), zeros)
    _same(lanes[0], x)
    _same(lanes[1], zeros)
    _same(lanes[2], jax.jit(drop)(0.3))
    total = lambda x, rate: jnp.sum(dropout(key, x, rate, training=True).astype(jnp.float32))
    for rate in (0.0, 0.3, 1.0):
        chex.assert_tree_all_finite(jax.grad(total, argnums=(0, 1))(x, rate))
    np.testing.assert_array_equal(jax.grad(total)(x, 0.0), 1)
    np.testing.assert_array_equal(jax.grad(total)(x, 1.0), 0)


def test_the_derivative_in_the_rate_is_that_of_the_scale(float64):
    x, key = jnp.asarray(RNG.normal(size=50)), jax.random.key(0)
    total = lambda rate: jnp.sum(dropout(key, x, rate, training=True))
    step = 1e-6  # so small that no entry of the mask changes
    difference = (total(0.4 + step) - total(0.4 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(0.4), difference, rtol=1e-8)
    assert difference != 0


def test_dropout_nests_masks_and_converts_integers():
    x, key = jnp.ones((40, 5)), jax.random.key(0)
    low, high = (dropout(key, x, rate, training=True) > 0 for rate in (0.3, 0.6))
    assert (high <= low).all()  # masks are nested
    assert high.any()
    integers = dropout(key, jnp.arange(5), 0.0, training=True)
    _same(integers, jnp.arange(5.0))
    _same(dropout(key, jnp.arange(5), 0.5, training=False), jnp.arange(5.0))
    gate = jax.jit(lambda on: dropout(key, x, 0.3 * on, training=True))  # a traced training
    _same(gate(False), x)
    np.testing.assert_array_equal(gate(True) > 0, low)
    nan = dropout(key, jnp.full(100, jnp.nan), 0.5, training=True)
    assert set(np.isnan(nan).tolist()) == {True, False}  # a dropped NaN is 0


def test_errors_of_dropout():
    key, x = jax.random.key(0), jnp.ones(3)
    for wrong in (-0.1, 1.5, np.float64(2), jnp.array(1.5), np.nan):
        for training in (True, False):
            with pytest.raises(ValueError, match=r"^dropout: rate must be in \[0, 1\], got "):
                dropout(key, x, wrong, training=training)
    with pytest.raises(TypeError, match=r"^dropout: rate must be a number in \[0, 1\], got 'half'"):
        dropout(key, x, "half", training=True)
    with pytest.raises(
        TypeError, match=r"^dropout: rate must be a scalar, got shape \(3,\).*jax\.vmap"
    ):
        dropout(key, x, jnp.ones(3), training=True)
    with pytest.raises(
        ValueError, match=r"^dropout: training must be one of \(True, False\), got 1"
    ):
        dropout(key, x, 0.5, training=1)
    with pytest.raises(ValueError, match=r"^dropout: training must be one of .*got .*bool"):
        jax.jit(lambda on: dropout(key, x, 0.5, training=on))(True)


# --- batch norm ------------------------------------------------------------------------------


def _batches(shape, n=5):
    return 3 * RNG.normal(size=(n, *shape)) + RNG.uniform(-5, 5, size=shape[-1])


def _applied(norm, params, state, batches):
    """Train on all batches; return the outputs, the state, and inference on the first batch."""
    train = jax.jit(lambda state, x: norm.apply(params, state, x, training=True))
    outputs = []
    for x in batches:
        y, state = train(state, jnp.asarray(x))
        outputs.append(y)
    inferred, after = norm.apply(params, state, jnp.asarray(batches[0]), training=False)
    _same(after, state)
    return outputs, state, inferred


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 3), dict()),
        ((6, 3), dict(momentum=0.7, epsilon=0.1, center=False)),
        ((4, 5, 3), dict(momentum=0.5, scale=False)),
        ((4, 3, 2, 5), dict(axis=1, momentum=0.9, epsilon=1e-5)),
        ((6, 3), dict(center=False, scale=False)),
    ],
)
def test_batch_norm_equals_keras(shape, options, keras64):
    layer = keras.layers.BatchNormalization(**options)
    layer.build(shape)
    ours = {"eps" if name == "epsilon" else name: value for name, value in options.items()}
    norm = batch_norm(**ours)
    params, state = norm.init(shape)
    for name, variable in (("scale", layer.gamma), ("bias", layer.beta)):
        assert (name in params) == (variable is not None)
        if variable is not None:
            assert params[name].shape == variable.shape
            np.testing.assert_array_equal(params[name], variable.value)
            params[name] = jnp.asarray(RNG.normal(size=variable.shape))
            variable.assign(params[name])
    np.testing.assert_array_equal(state.mean, layer.moving_mean.value)
    np.testing.assert_array_equal(state.variance, layer.moving_variance.value)
    batches = _batches(shape)
    outputs, state, inferred = _applied(norm, params, state, batches)
    # Keras casts to keras.backend.result_type("float64", "float32"), which is "float32".
    for x, y in zip(batches, outputs, strict=True):
        _near(y, layer(jnp.asarray(x), training=True))
    _near(state.mean, layer.moving_mean.value)
    _near(state.variance, layer.moving_variance.value)
    _near(inferred, layer(jnp.asarray(batches[0]), training=False))
    assert state.count == len(batches)


@pytest.mark.parametrize(
    ("shape", "momentum", "affine"),
    [((6, 3), 0.1, True), ((6, 3), None, True), ((4, 3, 2, 5), 0.3, True), ((4, 3, 7), 0.1, False)],
)
def test_batch_norm_equals_pytorch(shape, momentum, affine, float64):
    """Outputs and gradients are PyTorch's, in training and in inference."""
    kind = torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d
    layer = kind(3, momentum=momentum, affine=affine).double()
    norm = batch_norm(1, momentum, 1e-5, convention="torch", center=affine, scale=affine)
    params, state = norm.init(shape)
    if affine:
        params = {name: jnp.asarray(RNG.normal(size=3)) for name in params}
        layer.weight.data = torch.tensor(np.asarray(params["scale"]))
        layer.bias.data = torch.tensor(np.asarray(params["bias"]))
    batches, weights = _batches(shape), RNG.normal(size=shape)
    outputs, state, inferred = _applied(norm, params, state, batches)
    for x, y in zip(batches, outputs, strict=True):
        _close(y, layer(torch.tensor(x)).detach().numpy(), rtol=1e-9)
    _close(state.mean, layer.running_mean.numpy())
    _close(state.variance, layer.running_var.numpy())
    assert int(state.count) == int(layer.num_batches_tracked)
    for training in (False, True):  # training comes last: it changes the statistics
        layer.train(training)
        tensor = torch.tensor(batches[0], requires_grad=True)
        layer.zero_grad()
        y = layer(tensor)
        (y * torch.tensor(weights)).sum().backward()
        if not training:
            _close(inferred, y.detach().numpy(), rtol=1e-9)

        def total(params, x, training=training):
            return jnp.sum(weights * norm.apply(params, state, x, training=training)[0])

        ours, slope = jax.grad(total, argnums=(0, 1))(params, jnp.asarray(batches[0]))
        np.testing.assert_allclose(slope, tensor.grad.numpy(), rtol=1e-9, atol=1e-12)
        if affine:
            _close(ours["scale"], layer.weight.grad.numpy(), rtol=1e-9)
            _close(ours["bias"], layer.bias.grad.numpy(), rtol=1e-9)


@pytest.mark.parametrize("axis", [(), 0, 1, (1, -1), (3, 0), [-1, 1], (0, 1, 2)])
def test_any_axes(axis, float64):
    x = _batches((4, 3, 2, 5), 1)[0]
    norm = batch_norm(axis, 0.5, 0.1)
    own = {a % 4 for a in (axis if isinstance(axis, tuple | list) else [axis])}
    others = tuple(a for a in range(4) if a not in own)
    mean, variance = x.mean(others, keepdims=True), x.var(others, keepdims=True)
    params, state = norm.init(x)
    y, state = norm.apply(params, state, jnp.asarray(x), training=True)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 0.1), rtol=1e-9, atol=1e-12)
    assert params["bias"].shape == state.mean.shape == tuple(np.shape(x)[a] for a in sorted(own))
    _close(state.mean, 0.5 * mean.squeeze(others))
    _close(state.variance, 0.5 + 0.5 * variance.squeeze(others))
    _same(norm.init(jax.ShapeDtypeStruct(x.shape, x.dtype)), norm.init(x.shape))


def test_the_variance_is_stable():
    """For a mean of 1e4 deviations, E[x^2] - E[x]^2 has no correct digit in float32."""
    deviations = RNG.choice([-1.0, 1.0], size=(256, 2)) / 4
    x = jnp.asarray(deviations + 4096, jnp.float32)  # exact
    naive = jnp.mean(x**2, 0) - jnp.mean(x, 0) ** 2
    exact = deviations.var(0)
    assert (np.abs(naive / exact - 1) > 0.5).all()
    norm = batch_norm(momentum=0.0, eps=0.0)
    y, state = norm.apply(*norm.init(x), x, training=True)
    np.testing.assert_allclose(state.variance, exact, rtol=1e-6)
    standard = (deviations - deviations.mean(0)) / np.sqrt(exact)
    np.testing.assert_allclose(y, standard, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_inputs_have_statistics_in_float32(dtype):
    x = jnp.asarray(RNG.normal(size=(4000, 2)) * 300 + 1000, dtype)  # float16 squares overflow
    norm = batch_norm(momentum=0.999)
    params, state = norm.init(x)
    y, moved = norm.apply(params, state, x, training=True)
    assert y.dtype == x.dtype
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, state)
    assert state.mean.dtype == params["scale"].dtype == jnp.float32
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(moved.mean, 0.001 * wide.mean(0), rtol=1e-4)
    np.testing.assert_allclose(moved.variance, 0.999 + 0.001 * wide.var(0), rtol=1e-4)
    np.testing.assert_allclose(np.asarray(y, np.float64).std(0), 1, rtol=2e-3)


def test_batch_norm_of_a_large_mean_is_at_least_as_exact_as_in_pytorch():
    """The error against float64 for channels with mean 1000 and deviation 1."""
    x = np.float32(1000 + np.random.default_rng(0).normal(size=(64, 8)))
    norm = batch_norm(1, 0.1, 1e-5, convention="torch")
    ours, _ = norm.apply(*norm.init(x), x, training=True)
    theirs = torch.nn.BatchNorm1d(8)(torch.tensor(x)).detach().numpy()
    exact = x - np.mean(x, 0, np.float64)
    exact /= np.sqrt(np.mean(exact**2, 0) + 1e-5)
    gap = np.abs(ours - exact).max()
    assert gap < 1e-6
    assert gap <= np.abs(theirs - exact).max()


def test_batch_norm_keeps_float32_under_x64(float64):
    norm = batch_norm()
    x = jnp.ones((4, 2), jnp.float32)
    params, state = norm.init(x)
    y, moved = norm.apply(params, state, x, training=True)
    chex.assert_trees_all_equal_dtypes((params, state, y), (params, moved, x))
    assert norm.init((4, 2))[1].mean.dtype == jnp.float64


def test_constant_channels_have_finite_derivatives():
    x = jnp.concatenate([jnp.full((5, 1), 3.0), jnp.arange(5.0)[:, None]], 1)

    def total(x, eps):
        norm = batch_norm(eps=eps)
        return jnp.sum(norm.apply(*norm.init(x), x, training=True)[0] ** 3)

    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))
    for eps in (0.0, 1e-3):
        chex.assert_tree_all_finite(slopes(x, eps))
    norm = batch_norm(eps=0.0)
    y, _ = norm.apply(*norm.init(x), x, training=True)
    np.testing.assert_array_equal(y[:, 0], 0)


def test_momenta_of_0_and_1_and_their_derivatives(float64):
    x = jnp.asarray(_batches((6, 3), 1)[0])

    def after(momentum, convention="keras"):
        norm = batch_norm(momentum=momentum, convention=convention)
        return norm.apply(*norm.init(x), x, training=True)[1]

    for momentum, convention in ((0.0, "keras"), (1.0, "torch")):
        _close(after(momentum, convention).mean, x.mean(0))
    for momentum, convention in ((1.0, "keras"), (0.0, "torch")):
        _same(after(momentum, convention)[:2], batch_norm().init(x)[1][:2])
    _close(after(None).variance, x.var(0))
    _close(after(None, "torch").variance, x.var(0, ddof=1))
    slope = jax.jacobian(lambda m: after(m).mean)(0.9)
    _close(slope, -x.mean(0))
    lanes = jax.vmap(lambda m: after(m, "torch"))(jnp.array([0.0, 0.1, 1.0]))
    chex.assert_trees_all_close(jgd.lane(lanes, 1), after(0.1, "torch"), rtol=1e-12)


def test_errors_of_batch_norm():
    x = jnp.ones((4, 3))
    for name, wrong, message in (
        ("momentum", 1.1, r"momentum must be in \[0, 1\], got 1.1"),
        ("eps", -1e-3, r"eps must be at least 0, got -0.001"),
        ("convention", "flax", r"convention must be one of \('keras', 'torch'\), got 'flax'"),
        ("center", 1, r"center must be one of \(True, False\), got 1"),
        ("scale", None, r"scale must be one of \(True, False\), got None"),
    ):
        with pytest.raises(ValueError, match=r"^batch_norm: " + message):
            batch_norm(**{name: wrong})
    for axis in (2, -3, (0, -2), (1, 1)):
        with pytest.raises(ValueError, match=r"^batch_norm: axis must be distinct axes.*\(4, 3\)"):
            batch_norm(axis).init(x)
    norm = batch_norm()
    params, state = norm.init(x)
    for y, wrong in ((jnp.ones((4, 5)), params), (x, {"scale": params["scale"]}), (x, {})):
        with pytest.raises(
            ValueError, match=r"params \['scale', 'bias'\] and state must .*got params .*\(3,\)"
        ):
            norm.apply(wrong, state, y, training=True)
    with pytest.raises(ValueError, match=r"^batch_norm: training must be one of"):
        jax.jit(lambda on: norm.apply(params, state, x, training=on))(True)
    with pytest.raises(ValueError, match=r"x must have at least 2 values per channel.*, got 1"):
        batch_norm(convention="torch").apply(params, state, x[:1], training=True)
    norm.apply(params, state, x[:1], training=True)  # as Keras


# --- as lanes of a sweep ---------------------------------------------------------------------

X = np.random.default_rng(1).normal(2.0, 3.0, (48, 2)).astype(np.float32)
Y = np.tanh(X @ np.array([1.0, -2.0], np.float32))


def _net_init(key):
    norm, state = batch_norm().init((2,))
    kernels = jax.random.uniform(key, (10,), minval=-1.0)
    return {"norm": norm, "one": {"kernel": kernels[:8].reshape(2, 4)}, "two": kernels[6:]}, state


def _forward(params, state, x, setting, key=None):
    training = key is not None
    norm = batch_norm(momentum=setting["momentum"])
    x, state = norm.apply(params["norm"], state, x, training=training)
    x = jnp.tanh(x @ params["one"]["kernel"])
    if training:
        x = dropout(key, x, setting["rate"], training=True)
    return x @ params["two"], state


def _net_loss(params, state, batch, key, setting):
    y, state = _forward(params, state, batch[0], setting, key)
    penalty = l2(params, setting["l2"], only="*/kernel")
    return jnp.mean((y - batch[1]) ** 2) + penalty, ({}, state)


def _net_evaluate(params, state, setting):
    y, _ = _forward(params, state, jnp.asarray(X), setting)
    return {"loss": jnp.mean((y - Y) ** 2), "norm": l2(params, 1.0), "mean": jnp.mean(state.mean)}


BATCH = jgd.minibatches((X, Y), None, jax.random.key(0))
TASK = jgd.Task(_net_init, _net_loss, BATCH, _net_evaluate)
RUN = jgd.supervised(TASK)  # its final state also has the running statistics
EVALUATE = jax.jit(RUN.evaluate)


def setting(rate=0.2, l2=1e-3, momentum=0.9):
    return {"tx": jgd.adam(0.03), "rate": rate, "l2": l2, "momentum": momentum}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "values", "metric"),
    [("rate", [0.0, 0.2, 0.5], "loss"), ("l2", [0.0, 1e-2, 1.0], "norm"),
     ("momentum", [0.5, 0.9, 0.999], "mean")],
)  # fmt: skip
def test_a_grid_is_one_program(axis, values, metric, monkeypatch):
    spy = _Spy(monkeypatch)
    task = TASK._replace(init=lambda key: _net_init(key))  # a new function: no cached programs
    result = jgd.sweep(task, jgd.grid(setting, **{axis: values}), 12, report_every=12, width=3)
    assert len(spy.texts) == 4  # batches, parameters, start, chunk
    assert len(result.rows) == 3
    monkeypatch.undo()
    key = jax.random.fold_in(jax.random.key(0), 0)  # the key of seed 0 in the sweep
    rows = {row[axis]: row for row in result.rows}
    for value in values:
        alone = setting(**{axis: value})
        expected = EVALUATE(alone, jgd.train(RUN, alone, 12, key)[0])
        for name in ("loss", "norm", "mean"):
            np.testing.assert_allclose(rows[value][name], expected[name], rtol=2e-5, atol=1e-6)
    assert len({round(row[metric], 5) for row in result.rows}) == 3  # the axis has an effect


def test_the_strength_of_a_link_is_an_axis_of_a_sweep():
    """The short form of the loss suffices: only the link reads the strength."""
    loss = lambda p, batch: jnp.mean((batch[0] @ p - batch[1]) ** 2)
    evaluate = lambda p: {"norm": l2(p, 1.0)}
    task = jgd.Task(lambda key: jnp.zeros(2), loss, BATCH, evaluate)
    build = lambda strength: jgd.chain(add_l2(strength), jgd.sgd(0.01))
    result = jgd.sweep(task, jgd.grid(build, strength=[0.0, 1.0]), 6, mode="min")
    assert [row["strength"] for row in result.rows] == [1.0, 0.0]


@pytest.mark.slow
def test_hypergradients_through_training():
    """The evaluated loss has a finite derivative in every number of the setting."""

    def final(numbers):
        full = setting(**numbers)
        return RUN.evaluate(full, jgd.train(RUN, full, 6, jax.random.key(0))[0])["loss"]

    slopes = jax.jit(jax.grad(final))({"rate": 0.2, "l2": 1e-3, "momentum": 0.9})
    chex.assert_tree_all_finite(slopes)
    assert all(slope != 0 for slope in slopes.values())


def test_the_example_of_the_module_runs():
    text = regularization.__doc__
    blocks = re.findall(r"\n\n((?:    .*\n|\n)+)", text)
    assert len(blocks) == 2
    names = {name: getattr(jgd, name) for name in ("Task", "adam", "chain", "grid", "sweep")}
    names |= {name: getattr(regularization, name) for name in regularization.__all__}
    evaluate = lambda params, state: {"loss": jnp.sum(params["kernel"] ** 2) + state.mean.sum()}
    names |= {"jnp": jnp, "batch": BATCH, "evaluate": evaluate}
    for block in blocks:
        exec(textwrap.dedent(block), names)
    np.testing.assert_allclose(l2(names["params"], 0.01, only="*/kernel"), 0.25)
