"""Gradients that are NaN, huge or tiny: a NaN stays visible, and no step is worse than optax's.

Each optimizer steps all cases as lanes of one program, so that lanes compare bit for bit.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from conftest import run
from table import FIRST, LABELS, ROWS

import jgd
import jgd.optimizers

SHAPES = {"matrix": (4, 3), "vector": (3,), "other": (2,)}  # "other" always has normal gradients
STEPS, LATER = 5, 2
STRUCK = 1  # the entry of matrix and vector that has a NaN or a spike
NAN = {"NaN at first": 0, "NaN later": LATER}
# The first row of each optimizer runs by default, the others with the slow tests.
every_row = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.label, marks=[pytest.mark.slow] * (row not in FIRST))
        for row in ROWS
    ],
)


def _cases():
    """Return a tree of gradients over the steps for each case."""
    rng = np.random.default_rng(0)
    usual = {name: rng.normal(size=(STEPS, *shape)) for name, shape in SHAPES.items()}
    changed = lambda f: {name: g if name == "other" else f(g.copy()) for name, g in usual.items()}

    def struck(value, step):
        def strike(g):
            g.reshape(STEPS, -1)[step, STRUCK] = value
            return g

        return changed(strike)

    def constant(size):
        return changed(lambda g: np.broadcast_to(size * np.sign(g[0]), g.shape))

    cases = {"usual": usual}
    cases |= {case: struck(np.nan, step) for case, step in NAN.items()}
    cases |= {f"spike of {size:g}": struck(size, LATER) for size in (1e20, 1e30)}
    cases |= {f"constant {size:g}": constant(size) for size in (1e20, 1e30, 1e-20, 1e-30, 1e-40)}
    cases |= {f"noise of {s:g}": changed(lambda g, s=s: s * g) for s in (1e20, 1e-20)}
    return {case: jax.tree.map(np.float32, tree) for case, tree in cases.items()}


CASES = _cases()
PARAMS = {
    name: np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)
    for name, shape in SHAPES.items()
}


def _updates(tx, compiler_options=None):
    """Return the updates over the steps of each case."""
    gradients = jax.tree.map(lambda *xs: np.stack(xs), *CASES.values())
    lanes = jax.jit(jax.vmap(lambda g: run(tx, g, PARAMS)), compiler_options=compiler_options)
    updates = jax.tree.map(np.asarray, lanes(gradients))
    return {case: jgd.lane(updates, index) for index, case in enumerate(CASES)}


@functools.cache
def _ours(label):
    """Return the updates of a row, cached for two tests."""
    row = ROWS[LABELS.index(label)]
    return _updates(row.ours(**row.arguments), row.compiler_options)


def _assert_visible(updates, whole_tree, forgets=False):
    """Assert that each update is NaN or equals the update without the NaN.

    `whole_tree` allows NaN in "other"; `forgets` allows other numbers in the struck entry.
    """
    for case, step in NAN.items():
        for name, usual in updates["usual"].items():
            u = updates[case][name].reshape(STEPS, -1)
            broken = np.isnan(u)
            fine = broken | (u == usual.reshape(STEPS, -1))
            if name == "other":
                assert whole_tree or not broken.any(), case
            else:
                assert broken[step, STRUCK], (case, name)
                fine[:, STRUCK] |= forgets
            assert fine.all(), (case, name)


@every_row
def test_a_nan_stays_visible(row):
    # forgets: the step size of rprop shrinks where the sign of a gradient is NaN.
    _assert_visible(_ours(row.label), row.whole_tree, forgets=row.name == "rprop")


LIFTED = {
    "acprop": dict(learning_rate=0.1),
    "cocob": {},
    "galore": dict(learning_rate=0.1, rank=2),
    "momo": {},
    "momo_adam": {},
    "optimistic_adam": dict(learning_rate=0.1, optimism=0.1),
    "optimistic_adam_v2": dict(learning_rate=0.1),
    "optimistic_gradient_descent": dict(learning_rate=0.1),
    "simplified_ademamix": dict(learning_rate=0.1),
    "sophia": dict(learning_rate=0.1),
}


def _bowl(params):
    return sum((x * x).sum() for x in jax.tree.leaves(params))


def test_every_lifted_optimizer_has_arguments():
    names = jgd.optimizers.lifted.__all__
    assert {*LIFTED} == {name for name in names if not name.startswith("scale_by_")}


@pytest.mark.filterwarnings("ignore:.optimistic_adam. is deprecated")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("acprop", "momo"))) for n in LIFTED],
)
def test_a_nan_stays_visible_in_lifted_optimizers(name):
    tx = getattr(jgd, name)(**LIFTED[name])
    if name == "sophia":
        step = functools.partial(tx.update, obj_fn=_bowl)
        tx = optax.GradientTransformationExtraArgs(tx.init, step)
    _assert_visible(_updates(tx), whole_tree=name in ("momo", "momo_adam"))


def _length(u, together):
    """Return |u|, or the largest entry of each step where a rule has one rate for the tree."""
    if not together:
        return {name: np.abs(x) for name, x in u.items()}
    return {"tree": np.max([np.abs(x).reshape(STEPS, -1).max(1) for x in u.values()], 0)}


@every_row
def test_no_step_is_worse_than_that_of_optax(row):
    """Steps are finite, and no longer than optax's, or than twice a normal step without a peer."""
    ours = _ours(row.label)
    rest = {case: u for case, u in ours.items() if case not in NAN}
    chex.assert_tree_all_finite(rest)
    if row.peer is None:
        longest = max(np.abs(x).max() for x in ours["usual"].values())
        for case, u in rest.items():
            assert max(np.abs(x).max() for x in u.values()) <= 2 * longest, case
        return
    theirs = _updates(row.peer(**row.arguments), row.compiler_options)
    negligible = np.finfo(np.float32).eps  # rounded away when added to parameters near 1
    for case, u in rest.items():
        lengths = [_length(x, row.whole_tree) for x in (u, theirs[case])]
        for name, length in lengths[0].items():
            limit = lengths[1][name] * (1 + row.peer32) + negligible
            assert not (length > limit).any(), (case, name)  # passes where optax has NaN


def test_an_overflow_is_a_step_of_zero_without_jit():
    """Without jit: a compiled product may be fused into a sum, and then does not overflow."""
    params, huge = {"w": jnp.ones(2)}, {"w": jnp.full(2, 1e30)}
    for tx in (jgd.rmsprop(0.1, centered=True), jgd.ftrl(0.1)):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(huge, state, params)
            chex.assert_trees_all_equal(updates, {"w": jnp.zeros(2)})
            assert not any(np.isnan(x).any() for x in jax.tree.leaves(state))


def test_adopt_clips_a_quotient_that_overflows():
    """An infinite quotient becomes the bound, as in optax."""
    gradients = jnp.float32([[0, 1], [1, 1], [3e38, np.inf], [1, 1]])
    ours, theirs = (
        jax.jit(lambda tx=tx: run(tx, {"w": gradients}, {"w": jnp.zeros(2)}))()
        for tx in (jgd.adopt(0.1), optax.contrib.adopt(0.1))
    )
    chex.assert_tree_all_finite(ours)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)
