"""Clipping equals optax, and is finite where optax overflows in float32 or returns NaN."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from conftest import _float64

import jgd

CLIPS = {  # a link of either library, with its bound
    "clip": lambda library, bound: library.clip(bound),
    "global": lambda library, bound: library.clip_by_global_norm(bound),
    "rms": lambda library, bound: library.clip_by_block_rms(bound),
    "adaptive": lambda library, bound: library.adaptive_grad_clip(bound),
    "adaptive, axis": lambda library, bound: library.adaptive_grad_clip(bound, 0.7, -1),
}
LINKS = CLIPS | {
    "normalize": lambda library, _: library.normalize(),
    "update norm": lambda library, bound: library.normalize_by_update_norm(jnp.minimum(bound, 2)),
}
OPTAX = SimpleNamespace(**{**vars(optax.contrib), **vars(optax)})
SHAPES = [(4,), (1, 3), (3, 2), (2, 3, 2), (2, 1, 3, 2), (2, 1, 2, 3, 2)]


def _tree(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {str(shape): np.asarray(rng.normal(size=shape), dtype) for shape in SHAPES}


PARAMS, GRADIENTS = _tree(0), _tree(1)


def _updates(library, links, bounds, gradients, params=PARAMS):
    """Return the updates of all links from one program, with a lane per bound and gradient."""

    @jax.jit
    @jax.vmap
    def go(bound, gradient):
        txs = {name: link(library, bound) for name, link in links.items()}
        return {n: tx.update(gradient, tx.init(params), params)[0] for n, tx in txs.items()}

    return jax.device_get(go(jnp.asarray(bounds), gradients))


def _lanes(tree, factors):
    """Return the tree times each factor, as lanes."""
    return jax.tree.map(lambda x: np.multiply.outer(np.asarray(factors), x), tree)


def test_numbers_and_states_are_those_of_optax(float64):
    bounds = [0.01, 0.3, 0.9, 3.0, 100.0]  # the first clips every leaf, the last none
    gradients = _lanes(GRADIENTS, np.ones(5))
    ours, theirs = (_updates(lib, LINKS, bounds, gradients) for lib in (jgd, OPTAX))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-13)
    for name, link in LINKS.items():
        states = [link(library, 0.3).init(PARAMS) for library in (jgd, OPTAX)]
        chex.assert_trees_all_equal_structs(*states)
        if name in CLIPS:
            chex.assert_trees_all_equal(*(jgd.lane(x, -1) for x in (ours[name], gradients)))


def test_large_and_small_gradients():
    """Where squares overflow or vanish in float32, clipping equals optax in float64."""
    factors, bounds = (5e37, 1e30, 1e20, 1e-25, 1e-35), (1e-30, 0.3, 1e20)
    factors, bounds = map(np.ravel, np.meshgrid(factors, bounds))
    with _float64():
        near_1 = _updates(OPTAX, LINKS, bounds / factors, _lanes(GRADIENTS, factors**0))
    gradients = jax.tree.map(np.float32, _lanes(GRADIENTS, factors))
    ours = _updates(jgd, LINKS, bounds, gradients, jax.tree.map(np.float32, PARAMS))
    times = lambda numbers, tree: jax.tree.map(lambda x: (numbers * x.T).T, tree)
    expected = {name: times(factors, near_1[name]) for name in CLIPS}
    expected["normalize"] = near_1["normalize"]
    length = np.sqrt(sum(np.sum(g**2) for g in GRADIENTS.values()))
    shares = np.minimum(bounds, 2) / (length + 1e-6 / factors)
    expected["update norm"] = times(shares, _lanes(GRADIENTS, factors**0))
    for name in LINKS:
        close = lambda ours, exact: np.testing.assert_allclose(ours, exact, 1e-6, 1e-37)
        jax.tree.map(close, ours[name], expected[name])


def test_nonfinite_gradients_stay_visible():
    """Updates are NaN or infinite where optax's are. A bound of inf changes nothing."""
    tree = {"struck": np.ones((3, 2), np.float32), "sound": np.ones(3, np.float32)}
    gradients = _lanes(tree, np.ones(6, np.float32))
    gradients["struck"][:, 1, 0] = [np.nan, np.inf, -np.inf] * 2
    bounds = [0.1] * 3 + [np.inf] * 3
    ours, theirs = (_updates(lib, LINKS, bounds, gradients, tree) for lib in (jgd, OPTAX))
    at = lambda lanes: lambda updates: jax.tree.map(lambda x: x[lanes], updates)
    on, off = at(slice(3)), at(slice(3, 6))
    chex.assert_trees_all_close(on(ours), on(theirs), rtol=1e-6)
    for name in CLIPS:
        chex.assert_trees_all_equal(off(ours[name]), off(gradients))


def _derivatives(library, bounds, gradients, params):
    """Return derivatives of each link by bound, gradients and parameters, and second ones."""

    def totals(name):
        def total(*point):
            bound, gradient, params = point
            tx = LINKS[name](library, bound)
            updates, _ = tx.update(gradient, tx.init(params), params)
            return sum(jnp.sum(jnp.cos(jnp.arange(u.size)) * u.ravel()) for u in updates.values())

        return jax.grad(total, argnums=(0, 1, 2))

    @jax.jit
    @jax.vmap
    def go(*point):
        ones = jax.tree.map(jnp.ones_like, point)
        return {n: jax.jvp(totals(n), point, ones) for n in LINKS if "," not in n}

    return jax.device_get(go(jnp.asarray(bounds), gradients, params))


def test_derivatives(float64):
    """Derivatives equal optax's, and are finite for gradients of 0 and a bound of inf."""
    params = {name: PARAMS[name] for name in ("(4,)", "(3, 2)")}
    gradients = _lanes({name: GRADIENTS[name] for name in params}, np.ones(6))
    gradients["(4,)"][2:] = 0
    gradients["(3, 2)"][3:] = 0
    bounds = [0.2, np.inf, 0.2, 0.2, np.inf, 0.0]
    params = _lanes(params, np.ones(6))
    params["(3, 2)"][4:] = 0
    ours, theirs = (_derivatives(lib, bounds, gradients, params) for lib in (jgd, OPTAX))
    chex.assert_trees_all_close(jgd.lane(ours, 0), jgd.lane(theirs, 0), rtol=1e-10)
    chex.assert_tree_all_finite(ours)
    for lane in (1, 4):  # clipping is off: the derivative is that of the identity
        for name in {*CLIPS} & {*ours}:
            by_bound, by_gradient, by_params = jgd.lane(ours[name][0], lane)
            np.testing.assert_array_equal(by_bound, 0)
            chex.assert_trees_all_equal(by_params, jax.tree.map(np.zeros_like, by_params))
            weights = jax.tree.map(lambda x: np.cos(np.arange(x.size)).reshape(x.shape), by_params)
            chex.assert_trees_all_close(by_gradient, weights, rtol=1e-14)


def test_complex_and_16_bit_leaves():
    """Norms are of moduli. Updates of 16-bit leaves equal the rounded float32 updates."""
    wide = {"real": GRADIENTS["(3, 2)"], "imaginary": GRADIENTS["(2, 3, 2)"][0]}
    wide = {name: np.float32(x.astype(jnp.bfloat16)) for name, x in wide.items()}
    whole = {"w": wide["real"] + 1j * wide["imaginary"], "zero": np.zeros(2, np.complex64)}
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), wide)

    names = [name for name in LINKS if "," not in name]

    def updates(library, name, tree):
        tx = LINKS[name](library, 0.3)
        return tx.update(tree, tx.init(tree), tree)[0]

    @jax.jit
    def go(whole, wide, narrow):
        slope = lambda z, name: updates(jgd, name, z)["zero"].real.sum()
        ours = [{n: updates(jgd, n, tree) for n in names} for tree in (whole, wide, narrow)]
        slopes = {n: jax.grad(slope)({"zero": jnp.zeros(2, complex)}, n) for n in names}
        return ours, slopes, {n: updates(OPTAX, n, whole) for n in names if n != "clip"}

    (of_whole, of_wide, of_narrow), slopes, theirs = go(whole, wide, narrow)
    by_modulus = whole["w"] * np.minimum(1, 0.3 / np.abs(whole["w"]))
    theirs["clip"] = {"w": by_modulus, "zero": whole["zero"]}
    chex.assert_trees_all_close(of_whole, theirs, rtol=1e-6)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), of_wide)
    chex.assert_trees_all_equal(of_narrow, rounded, strict=True)
    chex.assert_tree_all_finite(slopes)


def test_zero_nans():
    """Updates and flags equal optax's. A leaf without a gradient keeps its flag."""
    nan, step = np.nan, jax.jit(lambda tx, g, state: tx.update(g, state))
    steps = [[nan, 1.0], [np.inf, 2.0], [nan, nan]]
    ours, theirs = jgd.zero_nans(), optax.zero_nans()
    states = [tx.init({"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16)}) for tx in (ours, theirs)]
    chex.assert_trees_all_equal(*states, strict=True)
    for g in steps:
        gradient = {"a": jnp.array(g), "b": jnp.array(g[::-1], jnp.bfloat16)}
        updates, states[0] = step(ours, gradient, states[0])
        expected, states[1] = theirs.update(gradient, states[1])
        chex.assert_trees_all_equal((updates, states[0]), (expected, states[1]), strict=True)
    updates, state = ours.update({"a": jnp.ones(2), "b": None}, states[0])
    assert updates["b"] is None
    chex.assert_trees_all_equal(state.found_nan, {"a": jnp.array(False), "b": jnp.array(True)})
    inside = jgd.named(jgd.chain(jgd.zero_nans(), jgd.clip(1.0)), record=optax.ZeroNansState)
    assert inside.init(jnp.ones(2)).found_nan.dtype == bool


def test_empty_trees_and_leaves():
    """Empty trees keep their structure, and an empty leaf does not affect the norm."""
    for tree in ({}, {"a": None}, {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)}):
        for link in LINKS.values():
            tx = link(jgd, 0.5)
            updates, _ = jax.eval_shape(tx.update, tree, optax.EmptyState(), tree)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
    clipped, _ = jgd.clip_by_global_norm(0.5).update(tree, optax.EmptyState())
    np.testing.assert_allclose(clipped["b"], np.sqrt(0.125), rtol=1e-6)


def test_errors():
    for bad in (-0.1, np.nan):
        for name in ("clip: max_delta", "clip_by_global_norm: max_norm"):
            with pytest.raises(ValueError, match=f"{name} must be at least 0, got {bad}"):
                getattr(jgd, name.partition(":")[0])(bad)
    deep = jnp.ones([2] * 6)
    adaptive = lambda p, **options: jgd.adaptive_grad_clip(0.1, **options).update(p, None, p)
    with pytest.raises(jgd.TreeError, match=r"axis must be given for a leaf with .* got 6"):
        adaptive(deep)
    chex.assert_shape(adaptive(deep, axis=(0, 1))[0], deep.shape)
    with pytest.raises(jgd.TreeError, match="axis must exist in every leaf, got 2 for a leaf"):
        adaptive(jnp.ones((2, 2)), axis=2)
    with pytest.raises(jgd.TreeError, match="params must be given, got None"):
        jgd.adaptive_grad_clip(0.1).update(deep, optax.EmptyState())


def test_entries_are_scaled_exactly():
    for *entries, norm in ((3, 4, 12, 13), (6, 10, 15, 19), (2, 10, 11, 15), (1, 4, 8, 9)):
        for c in (1.0, 3 * 2.0**100, 7 * 2.0**-120):
            gradient = jnp.array(entries) * c
            clipped, _ = jgd.clip_by_global_norm(norm / 4 * c).update(gradient, None)
            np.testing.assert_array_equal(clipped, gradient / 4)
