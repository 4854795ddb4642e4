"""Every optimizer under hard inputs: leaves of all kinds, values at the edges, transformations.

The leaves of all kinds are one tree and the values are lanes, so that each row is few programs.
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
from table import FIRST
from test_numbers import NUMBERS

import jgd
import jgd.optimizers

# One of each kind is compiled by default. The others take a minute together.
QUICK = {"adafactor", "adamw", "lion", "momentum", "muon", "prodigy", "schedule_free_adamw"}
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


EXTRA = {"value": 1.0, "obj_fn": _objective}  # for the rules that read the loss or its Hessian


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
    """A tree of leaves of all kinds, without integers: parameters and gradients are alike."""
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
    """Parameters and gradients; those of integers and bools are float0, integers or zeros."""
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
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.dtype(float)


def _assert_update_fits(tx, params, gradients):
    """Assert that one update keeps the kinds of leaves, and the state all of its own."""
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
    """Real leaves with gradients: complex ones and None are optax's affair."""
    _assert_update_fits(getattr(jgd, name)(0.1), *_all_kinds(complex_leaves=False, none=False))


@pytest.mark.parametrize("row", [r for r in FIRST if r.name in REAL_ONLY], ids=REAL_ONLY)
def test_rules_for_real_parameters_say_so(row):
    tx, params = row.ours(**row.arguments), {"a": jnp.ones(2), "b": jnp.ones(2, jnp.complex64)}
    with pytest.raises(jgd.TreeError, match=f"^{row.name}: is for real parameters") as raised:
        tx.update(params, tx.init(params), params)
    assert "\n" not in str(raised.value)


@every_optimizer
def test_trees_without_leaves(row):
    """An empty container, a None, a masked node, an empty array: they come out as they are."""
    tx = row.ours(**row.arguments)

    def step(tree):
        return tx.update(tree, tx.init(tree), tree, **EXTRA)[0]

    for tree in ((), {}, [], {"a": None}, optax.MaskedNode(), [(), {"b": jnp.zeros([0, 2])}]):
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(step, tree), tree)


@every_optimizer_slow
def test_leaves_of_all_kinds_are_updated_as_if_alone(row, float64):
    """Or, in the rules that look at the whole tree, without an Inf or a NaN."""
    tx = row.ours(**row.arguments)
    params, gradients = _all_kinds(row.name not in REAL_ONLY)

    def two_steps(params, gradients):
        state, seen = tx.init(params), []
        for _ in range(2):
            updates, state = tx.update(gradients, state, params, **EXTRA)
            seen.append(updates)
        return seen

    alone = not row.whole_tree and row.name != "noisy_sgd"  # whose noise is drawn leaf by leaf
    apart = lambda: [two_steps({k: params[k]}, {k: gradients[k]}) for k in params if alone]
    together, separate = jax.jit(lambda: (two_steps(params, gradients), apart()))()
    chex.assert_tree_all_finite(together)
    for name, steps in zip(params, separate, strict=False):
        expected = [{name: updates[name]} for updates in together]
        chex.assert_trees_all_close(steps, expected, rtol=1e-6, atol=1e-12)


# --- values at the edges ---------------------------------------------------------------------

VALUES = jnp.array([0.0, 1e-42, 1e-30, 1.0, 1e30, jnp.inf, jnp.nan])


def _small(value):
    """Parameters, and gradients of one value but for a leaf of plain ones."""
    params = {"w": jnp.linspace(-1.0, 1.0, 4).reshape(2, 2), "v": jnp.ones(2)}
    return params, {"w": jnp.full((2, 2), value), "v": jnp.array([0.5, -2.0])}


@every_optimizer_slow
def test_values_at_the_edges_are_the_same_in_every_transformation(row):
    """Step by step, compiled or not, in a scan and in a lane beside other values."""
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
    """After 2^31 - 1 steps the count stands, and the optimizer goes on."""
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
    """A loss whose gradient moves with all leaves but `dark`, where it is always 0."""
    return jnp.sum(jnp.cos(params["w"])) + 0.0 * jnp.sum(params["dark"])


def _trained(tx, params, steps=3):
    """The loss after a few steps, each with a gradient of its own and recomputed backwards."""

    @jax.checkpoint
    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(_curved)(params)
        updates, state = tx.update(gradient, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, steps)
    return _curved(params)


def _away_from_kinks(row):
    """Numbers for the arguments of a row, where the largest of two is one of them alone."""
    spec = row.ours.__jgd_spec__
    wide = {"dtype_momentum": jnp.float64} if "dtype_momentum" in spec.names else {}
    return row.arguments | {name: NUMBERS[name] for name in spec.numeric()} | wide


@every_optimizer_slow
def test_derivatives_of_training_in_both_modes(row, float64):
    """By all numbers and by the parameters: forward = reverse, and the Hessian = differences."""
    params = {"w": jnp.array([[0.3, -0.7], [1.1, 0.4], [0.2, -1.3]]), "dark": jnp.ones(2)}
    point = row.ours(**_away_from_kinks(row)), params
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: np.abs(x) * rng.normal(size=np.shape(x)), point)

    def derivatives(shift):
        at = jax.tree.map(lambda x, v: jnp.asarray(x) + shift * v, point, direction)
        tangent = jax.tree.map(lambda x, v: jnp.asarray(v, x.dtype), at, direction)
        loss = lambda at: _trained(*at)
        forward = jax.jvp(loss, (at,), (tangent,))[1]
        reverse, second = jax.jvp(jax.grad(loss), (at,), (tangent,))
        along = lambda tree: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, tree, tangent)))
        return forward, along(reverse), along(second), reverse, second

    small = 1e-5
    rows = jax.jit(jax.vmap(derivatives))(small * jnp.array([-1.0, 0.0, 1.0]))
    chex.assert_tree_all_finite(rows)
    forward, reverse, second, *_ = rows
    np.testing.assert_allclose(forward, reverse, rtol=1e-9, atol=1e-12)
    difference = (forward[2] - forward[0]) / (2 * small)
    np.testing.assert_allclose(second[1], difference, rtol=1e-4, atol=1e-7)
