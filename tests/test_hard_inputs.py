"""Every optimizer with hard inputs: leaves of all kinds, extreme values, transformations of JAX.

One tree has leaves of all kinds and the values are lanes, so that each row compiles few programs.
"""

import dataclasses
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from table import FIRST
from test_numbers import NUMBERS

import jgd
import jgd.optimizers
from jgd.linear_algebra import eigenvectors, inverse_root, orthonormal

# One optimizer of each kind is compiled by default. The others take a minute together.
QUICK = {"adafactor", "adamw", "lion", "momentum", "muon", "prodigy"}
REAL_ONLY = ("ftrl", "rprop")
LIFTED = [name for name in jgd.optimizers.lifted.__all__ if not name.startswith("scale_by_")]

every_optimizer = pytest.mark.parametrize("row", FIRST, ids=[row.name for row in FIRST])
every_optimizer_slow = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=[pytest.mark.slow] * (row.name not in QUICK))
        for row in FIRST
    ],
)


def _objective(params):
    return sum(jnp.sum(jnp.abs(jnp.cos(x))) for x in jax.tree.leaves(params))


EXTRA = {"value": 1.0, "obj_fn": _objective}  # for rules that need the loss or its Hessian


# --- leaves of all kinds ---------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


class Block(eqx.Module):
    weight: Any
    name: str = eqx.field(static=True)


class Pair(NamedTuple):
    first: Any
    second: Any


def _kinds(seed, complex_leaves=True, none=True):
    """Return a tree with leaves of all kinds but integers, for parameters or gradients."""
    rng = np.random.default_rng(seed)

    def draw(dtype, *shape):
        imaginary = 1j * rng.normal(size=shape) if dtype.startswith("complex") else 0
        return jnp.asarray(rng.normal(size=shape) + imaginary, dtype)

    tree = {name: draw(name, 2) for name in ("float16", "bfloat16", "float32")}
    tree |= {
        "float64": draw("float64"),
        "empty": draw("float32", 0),
        "empty matrix": draw("bfloat16", 0, 3),
        "five axes": draw("float32", 1, 2, 1, 2, 1),
        "dataclass": Layer(draw("float32", 2), draw("float16", 1)),
        "equinox": Block(draw("float32", 3, 1), "block"),
        "list": [draw("float32", 1), (draw("float16", 1), {})],
        "named tuple": Pair(draw("float32", 1), optax.MaskedNode()),
        "python": float(draw("float64")),
        "numpy": np.asarray(draw("float32", 2)),
    }
    if complex_leaves:
        tree |= {name: draw(name, 2) for name in ("complex64", "complex128")}
    return tree | {"none": None} if none else tree


def _all_kinds(complex_leaves=True, none=True):
    """Return parameters and gradients; gradients of integers and bools are float0 or integers."""
    params, gradients = (_kinds(seed, complex_leaves, none) for seed in (0, 1))
    params |= {"int": jnp.arange(3), "bool": jnp.array([True, False]), "int8": np.int8([3, -2])}
    gradients |= {
        name: np.zeros(np.shape(params[name]), jax.dtypes.float0)
        for name in params
        if name in ("int", "bool")
    }
    gradients["int8"] = np.int8([1, -1])
    if none:  # a gradient that is missing for a step
        params["missing"], gradients["missing"] = jnp.ones(2), None
    return params, gradients


def _dtype_of_update(gradient):
    dtype = jnp.result_type(gradient)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.zeros([], float).dtype


def _assert_update_fits(tx, params, gradients):
    """Assert that an update keeps the dtypes of gradients and state, and accumulators are wide."""
    state = jax.eval_shape(tx.init, params)
    step = lambda state: tx.update(gradients, state, params, **EXTRA)
    updates, after = jax.eval_shape(step, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_structs(updates, gradients)
    expected = jax.tree.map(
        lambda g: jax.ShapeDtypeStruct(np.shape(g), _dtype_of_update(g)), gradients
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, expected)
    wide = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert all(jnp.finfo(dtype).bits >= 32 for dtype in wide)


@every_optimizer
def test_leaves_of_all_kinds_keep_their_shapes_and_dtypes(row, float64):
    params, gradients = _all_kinds(row.name not in REAL_ONLY)
    _assert_update_fits(row.ours(**row.arguments), params, gradients)


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
@pytest.mark.parametrize("name", LIFTED)
def test_leaves_of_lifted_optimizers_keep_their_shapes_and_dtypes(name):
    """This covers real leaves with gradients; optax handles complex leaves and None."""
    _assert_update_fits(getattr(jgd, name)(0.1), *_all_kinds(complex_leaves=False, none=False))


@pytest.mark.parametrize("row", [r for r in FIRST if r.name in REAL_ONLY], ids=REAL_ONLY)
def test_rules_for_real_parameters_raise_for_complex_ones(row):
    tx, params = row.ours(**row.arguments), {"a": jnp.ones(2), "b": jnp.ones(2, jnp.complex64)}
    with pytest.raises(
        jgd.TreeError, match=f"^{row.name}: updates must be real, got complex"
    ) as raised:
        tx.update(params, tx.init(params), params)
    assert "\n" not in str(raised.value)


@every_optimizer
def test_trees_without_leaves(row):
    """Empty containers, None, masked nodes and empty arrays keep their structure."""
    tx = row.ours(**row.arguments)

    def step(tree):
        return tx.update(tree, tx.init(tree), tree, **EXTRA)[0]

    for tree in ((), {}, [], {"a": None}, optax.MaskedNode(), [(), {"b": jnp.zeros([0, 2])}]):
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(step, tree), tree)


@every_optimizer_slow
def test_leaves_of_all_kinds_are_updated_as_if_alone(row, float64):
    """Rules with norms over the whole tree return finite updates."""
    tx = row.ours(**row.arguments)
    params, gradients = _all_kinds(row.name not in REAL_ONLY)

    def first(params, gradients):
        return tx.update(gradients, tx.init(params), params, **EXTRA)[0]

    # The noise of noisy_sgd differs between leaves.
    alone = not row.whole_tree and row.name != "noisy_sgd"
    apart = lambda: [first({k: params[k]}, {k: gradients[k]}) for k in params if alone]
    together, separate = jax.jit(lambda: (first(params, gradients), apart()))()
    chex.assert_tree_all_finite(together)
    for name, updates in zip(params, separate, strict=False):
        chex.assert_trees_all_close(updates, {name: together[name]}, rtol=1e-6, atol=1e-12)


# --- extreme values --------------------------------------------------------------------------

VALUES = jnp.array([0.0, 1e-42, 1e-30, 1.0, 1e30, jnp.inf, jnp.nan])


def _small(value):
    """Return parameters, and gradients of which one leaf is filled with `value`."""
    params = {"w": jnp.linspace(-1.0, 1.0, 4).reshape(2, 2), "v": jnp.ones(2)}
    return params, {"w": jnp.full((2, 2), value), "v": jnp.array([0.5, -2.0])}


@every_optimizer_slow
def test_extreme_values_give_the_same_updates_in_every_transformation(row):
    """Updates are the same step by step, compiled or not, and in lanes of a scan."""
    tx, steps = row.ours(**row.arguments), 3
    init = jax.jit(tx.init)

    def step(value, state):
        params, gradient = _small(value)
        return tx.update(gradient, state, params, **EXTRA)

    def scanned(value):
        one = lambda state, _: step(value, state)[::-1]
        return jax.lax.scan(one, tx.init(_small(value)[0]), None, steps)[1]

    close = lambda *trees: chex.assert_trees_all_close(*trees, rtol=2e-5, atol=1e-30)
    lanes, compiled = jax.jit(jax.vmap(scanned))(VALUES), jax.jit(step)
    for index, value in enumerate(VALUES):
        state = init(_small(value)[0])
        for i in range(steps):
            before = state
            updates, state = compiled(value, before)
            expected = jgd.lane(jgd.lane(lanes, index), i)
            close(updates, expected)
        if row.name in QUICK:
            close(step(value, before)[0], expected)


@every_optimizer_slow
def test_counts_stay_at_the_largest_int32(row):
    """After 2^31 - 1 steps the count stays constant, and updates are finite."""
    tx, top = row.ours(**row.arguments), np.iinfo(np.int32).max
    params, gradient = _small(0.3)
    is_count = lambda x: x.dtype == jnp.int32 and x.ndim == 0
    state = jax.tree.map(lambda x: jnp.int32(top - 1) if is_count(x) else x, tx.init(params))

    def step(state, _):
        updates, state = tx.update(gradient, state, params, **EXTRA)
        return state, updates

    state, updates = jax.jit(lambda state: jax.lax.scan(step, state, None, 3))(state)
    chex.assert_tree_all_finite(updates)
    assert all(x == top for x in jax.tree.leaves(state) if is_count(x))


# --- transformations of JAX ------------------------------------------------------------------


def _curved(params):
    """Return a loss whose gradient depends on "w", and is always 0 for "dark"."""
    return jnp.sum(jnp.cos(params["w"])) + 0.0 * jnp.sum(params["dark"])


def _trained(tx, params, steps=3):
    """Return the loss after a few steps, which the backward pass recomputes."""

    @jax.checkpoint
    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(_curved)(params)
        updates, state = tx.update(gradient, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, steps)
    return _curved(params)


def _away_from_kinks(row):
    """Return arguments of a row for which no maximum or minimum is at a tie."""
    spec = row.ours.__jgd_spec__
    wide = {"dtype_momentum": jnp.float64} if "dtype_momentum" in spec.names else {}
    return row.arguments | {name: NUMBERS[name] for name in spec.numeric()} | wide


@every_optimizer_slow
def test_derivatives_of_training_in_both_modes(row, float64):
    """Forward and reverse derivatives agree, and the Hessian equals finite differences."""
    params = {"w": jnp.array([[0.3, -0.7], [1.1, 0.4], [0.2, -1.3]]), "dark": jnp.ones(2)}
    point = row.ours(**_away_from_kinks(row)), params
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: np.abs(x) * rng.normal(size=np.shape(x)), point)

    def derivatives(shift):
        at = jax.tree.map(lambda x, v: jnp.asarray(x) + shift * v, point, direction)
        tangent = jax.tree.map(lambda x, v: jnp.asarray(v, x.dtype), at, direction)
        loss = lambda at: _trained(*at)
        along = lambda tree: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, tree, tangent)))
        reverse, second = jax.jvp(jax.grad(loss), (at,), (tangent,))
        first = along(reverse)
        forward = jax.jvp(loss, (at,), (tangent,))[1] if row.name in QUICK else first
        return forward, first, along(second), reverse, second

    small = 1e-5
    rows = jax.jit(jax.vmap(derivatives))(small * jnp.array([-1.0, 0.0, 1.0]))
    chex.assert_tree_all_finite(rows)
    forward, first, second, *_ = rows
    np.testing.assert_allclose(forward, first, rtol=1e-9, atol=1e-12)
    difference = (first[2] - first[0]) / (2 * small)
    np.testing.assert_allclose(second[1], difference, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_second_derivatives_of_decompositions(float64):
    """Both modes are right, also in a scan, where JAX drops derivatives of batching rules."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))
    functions = (
        lambda a: inverse_root(a @ a.T, 4),
        lambda a: jnp.abs(eigenvectors(a @ a.T)),  # the signs of eigenvectors are arbitrary
        lambda a: orthonormal(a),
    )
    total = lambda a: sum(jnp.sum(jnp.sin(f(a))) for f in functions)
    scanned = lambda a: jax.lax.scan(lambda x, _: (total(a + 0.1 * x), None), 0.0, None, 2)[0]
    check_grads(jax.jit(total), (a,), order=2, rtol=1e-4)
    small = 1e-5 * jnp.ones((3, 3))
    second = jax.jit(lambda a: jax.jvp(jax.grad(scanned), (a,), (small,)))
    difference = second(a + small)[0] - second(a - small)[0]
    chex.assert_trees_all_close(2 * second(a)[1], difference, rtol=1e-5)


def test_jacobians_and_hessians_of_lanes(float64):
    """Derivatives by learning rates are right for `per_layer` on a stack of layers."""
    stack = {"w": jnp.array([[[0.3, -0.7]], [[1.1, 0.4]]]), "dark": jnp.ones((2, 2))}

    def by_layers(rate):
        layer = lambda total, layer: (total + _trained(jgd.fromage(rate), layer), None)
        return jax.lax.scan(layer, 0.0, stack)[0]

    @jax.jit
    def derivatives(rates):
        losses = jax.vmap(lambda rate: _trained(jgd.per_layer(jgd.fromage(rate)), stack))
        total = lambda rates: jnp.sum(losses(rates))
        first = losses(rates), jax.grad(total)(rates)
        alone = jax.vmap(jax.value_and_grad(by_layers))(rates)
        return first, alone, jax.jacfwd(losses)(rates), jax.hessian(total)(rates)

    rates, shift = jnp.array([0.1, 0.3]), 1e-5
    first, alone, jacobian, hessian = derivatives(rates)
    chex.assert_trees_all_close(first, alone, rtol=1e-9)
    chex.assert_trees_all_close(jacobian, jnp.diag(first[1]), rtol=1e-9)
    ahead, behind = (derivatives(rates + s)[0][1] for s in (shift, -shift))
    chex.assert_trees_all_close(hessian, jnp.diag(ahead - behind) / (2 * shift), rtol=1e-6)


# --- properties of random trees and numbers --------------------------------------------------

RULES = {  # few rules: without jit, each operation compiles for each kind of leaf
    "adam": lambda rate, decay: jgd.adam(rate, b2=decay),
    "adagrad": lambda rate, decay: jgd.adagrad(rate, initial_accumulator_value=0.0, eps=0.0),
    "lion": lambda rate, decay: jgd.lion(rate, b1=decay),
    "momentum": lambda rate, decay: jgd.momentum(rate, decay),
    "rmsprop": lambda rate, decay: jgd.rmsprop(rate, decay, eps=0.0),
}
QUOTIENTS = ("adagrad", "rmsprop")  # with eps = 0 in RULES

rules = st.sampled_from(sorted(RULES))
rates = st.floats(2**-12, 8.0, width=32)
decays = st.floats(0.0, 0.984375, width=32)
leaves = st.builds(
    lambda dtype, shape, seed: jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype),
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.sampled_from([(), (2,), (0,), (2, 1)]),
    st.integers(0, 99),
)
trees = st.recursive(
    leaves | st.none(),
    lambda inner: (
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
        | st.lists(inner, min_size=1, max_size=3)
        | st.tuples(inner)
        | st.builds(Layer, inner, inner)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=4,
)


def _two_updates(tx, params, start=None):
    """Return two updates from a state, and the state after them."""
    state, results = tx.init(params) if start is None else start, []
    for factor in (1.0, -0.5):
        gradient = jax.tree.map(lambda p, c=factor: jnp.asarray(c * p, p.dtype), params)
        updates, state = tx.update(gradient, state, params)
        results.append(updates)
    return results, state


@given(rules, rates, decays, trees)
def test_a_random_tree_is_updated_as_its_leaves_compiled_or_not(name, rate, decay, params):
    """Shapes are those of `eval_shape`, and a saved state continues like the live one."""
    tx = RULES[name](rate, decay)
    eager, state = _two_updates(tx, params)
    shapes = jax.eval_shape(lambda: _two_updates(tx, params))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, (eager, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(eager[0], params)
    compiled, _ = jax.jit(lambda: _two_updates(tx, params))()
    rounding = dict(rtol=1e-2, atol=1e-6)  # 16-bit updates may differ in their last digit
    chex.assert_trees_all_close(eager, compiled, **rounding)
    structure = jax.tree.structure(params)
    for index, leaf in enumerate(jax.tree.leaves(params)):
        alone = _two_updates(tx, leaf)[0]
        chex.assert_trees_all_equal(alone, [structure.flatten_up_to(u)[index] for u in eager])
    saved = jax.tree.map(np.asarray, state)
    chex.assert_trees_all_equal(_two_updates(tx, params, saved), _two_updates(tx, params, state))


@settings(max_examples=5)
@given(rules, st.integers(1, 9), decays)
def test_a_random_number_has_the_same_effect_in_every_form(name, rate, decay):
    """The forms are an int, a float, an array, a schedule and a lane."""
    params = {"a": jnp.array([0.5, -2.0]), "b": jnp.float32(1.5)}
    expected = _two_updates(RULES[name](rate, decay), params)[0]
    forms = [float(rate), np.int8(rate), jnp.bfloat16(rate), jnp.int32(rate), lambda _: rate]
    for form in (*forms, jgd.constant_schedule(rate)):
        chex.assert_trees_all_equal(_two_updates(RULES[name](form, decay), params)[0], expected)
    lanes = jax.vmap(RULES[name])(jnp.array([1.0 * rate, 0.25]), jnp.array([decay, 0.5]))
    together = jax.vmap(lambda tx: _two_updates(tx, params)[0])(lanes)
    chex.assert_trees_all_close(jgd.lane(together, 0), expected, rtol=2e-6)


@given(st.sampled_from(QUOTIENTS), rates, decays, st.floats(2**-20, 2**20, width=32), trees)
def test_a_quotient_does_not_depend_on_the_scale_of_gradients(name, rate, decay, scale, params):
    tx, state = RULES[name](rate, decay), None
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    state = tx.init(wide)
    updates = tx.update(wide, state, wide)[0]
    scaled = tx.update(jax.tree.map(lambda p: scale * p, wide), state, wide)[0]
    chex.assert_trees_all_close(scaled, updates, rtol=1e-5)
