"""Every optimizer against its oracle and its peer, and the properties that all of them share."""

import functools
import inspect
import itertools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from conftest import run, stacked
from problems import FINAL_LOSSES, PROBLEMS, final_loss
from table import (
    FIRST,
    LABELS,
    ROWS,
    losses,
    noisy_gradients,
    oracle_updates,
    own_optimizers,
    parameters,
)

import jgd
import jgd.optimizers

every_row = pytest.mark.parametrize("row", ROWS, ids=LABELS)
# The first row of each optimizer runs by default, the others with the slow tests.
every_row_slow = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.label, marks=[pytest.mark.slow] * (row not in FIRST))
        for row in ROWS
    ],
)
every_optimizer = pytest.mark.parametrize("row", FIRST, ids=[row.name for row in FIRST])
peered = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.peer], ids=[row.label for row in ROWS if row.peer]
)


def test_every_public_optimizer_has_a_row():
    assert {row.name for row in ROWS} == set(own_optimizers())


def _relative(updates, truth):
    """Return both trees with each step divided by its largest |truth|.

    Steps whose truth is almost 0 are divided by the median of these sizes.
    """
    updates, truth = jax.tree.map(lambda x: np.asarray(x, np.float64), (updates, truth))
    flat = [np.abs(x.reshape(len(x), -1)) for x in jax.tree.leaves(truth) if x.size]
    sizes = np.max([x.max(1) for x in flat], 0)
    median = np.median(sizes)
    sizes = np.where(sizes > 1e-4 * median, sizes, median)
    scaled = lambda x: x / sizes.reshape(-1, *[1] * (x.ndim - 1))
    return jax.tree.map(scaled, updates), jax.tree.map(scaled, truth)


def _assert_close(updates, truth, limit):
    """Assert that updates differ by at most `limit` times the largest true update of the step."""
    chex.assert_trees_all_equal_shapes(updates, truth)
    chex.assert_tree_all_finite(truth)
    chex.assert_trees_all_close(*_relative(updates, truth), rtol=0, atol=limit)


def _error(updates, truth):
    """Return the root mean square error, relative to the largest true update of each step."""
    gaps = jax.tree.map(lambda u, t: np.square(u - t).ravel(), *_relative(updates, truth))
    return np.sqrt(np.mean(np.concatenate(jax.tree.leaves(gaps))))


def _both(row, steps, dtype):
    params = stacked([parameters(row.shapes)], dtype)
    return jgd.lane(params, 0), stacked(noisy_gradients(steps, row.shapes), dtype)


@peered
def test_equals_its_peer_over_200_steps(row):
    params, gradients = _both(row, 200, jnp.float32)
    ours, theirs = (
        run(factory(**row.arguments), gradients, params, row.compiler_options)
        for factory in (row.ours, row.peer)
    )
    _assert_close(ours, theirs, row.peer32)


@functools.cache
def _in_float64(label):
    """Return the updates of a row in float64, cached for two tests."""
    row = ROWS[LABELS.index(label)]
    params, gradients = _both(row, 300, jnp.float64)
    return jax.tree.map(np.asarray, run(row.ours(**row.arguments), gradients, params))


@pytest.mark.slow
@peered
def test_equals_its_peer_in_float64(row, float64):
    params, gradients = _both(row, 300, jnp.float64)
    peer = run(row.peer(**row.arguments), gradients, params)
    _assert_close(_in_float64(row.label), peer, row.peer64)


@every_row
def test_equals_the_paper_in_float64(row, float64):
    params, gradients = parameters(row.shapes), noisy_gradients(300, row.shapes)
    truth = stacked(oracle_updates(row, gradients, params), np.float64)
    _assert_close(_in_float64(row.label), truth, 1e-9)


@pytest.mark.slow
@peered
def test_never_further_from_the_paper_than_optax_over_1000_steps(row):
    """All three receive the decimals that a user types, and gradients that are exact in float32."""
    row = row._replace(arguments=_numbers(row))
    start = parameters(row.shapes), noisy_gradients(1000, row.shapes)
    params, gradients = jax.tree.map(lambda x: np.asarray(np.float32(x), np.float64), start)
    truth = jax.tree.map(lambda *xs: np.stack(xs), *oracle_updates(row, gradients, params))
    params, gradients = jgd.lane(stacked([params], jnp.float32), 0), stacked(gradients, jnp.float32)
    ours = _error(run(row.ours(**row.arguments), gradients, params), truth)
    theirs = _error(run(row.peer(**row.arguments), gradients, params), truth)
    # 3 per cent, where both lose the same digits in p - p0; 2 eps, where both only round.
    assert ours <= max(1.03 * theirs, 2 * np.finfo(np.float32).eps)


def _numbers(row):
    """Return the arguments of a row, including the defaults of numbers."""
    parameters = inspect.signature(row.oracle).parameters.values()
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, float)}
    return {**defaults, **row.arguments}


@pytest.mark.slow
@pytest.mark.parametrize("name", own_optimizers())
def test_reaches_its_recorded_loss(name, float64):
    """Each optimizer still reaches its recorded loss, within a factor of 2, on three problems."""
    factory = jgd.get(name)
    rate = next(iter(inspect.signature(factory).parameters))
    for problem, (best, loss) in zip(PROBLEMS, FINAL_LOSSES[name], strict=True):
        assert jax.jit(final_loss, static_argnums=1)(factory(**{rate: best}), problem) <= 2 * loss


# --- properties ------------------------------------------------------------------------------


def _small_params():
    return {
        "w": jnp.linspace(-1, 1, 6).reshape(3, 2),
        "s": jnp.float32(0.5),
        "empty": jnp.zeros([0]),
        "none": None,
    }


def _small_gradients(steps=5):
    rng = np.random.default_rng(3)
    draw = lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)), p.dtype)
    return jax.tree.map(draw, _small_params())


@functools.cache
def _program(label):
    """Return a compiled function from an optimizer of a row to its updates, cached for tests."""
    options = ROWS[LABELS.index(label)].compiler_options
    params, gradients = _small_params(), _small_gradients()
    return jax.jit(lambda tx: run(tx, gradients, params), compiler_options=options)


def _alone(row):
    return _program(row.label)(row.ours(**row.arguments))


def _by_rate(row):
    """Return the optimizer of a row as a function of its learning rate."""
    rest = {k: v for k, v in row.arguments.items() if k != row.rate}
    return lambda rate: row.ours(**{row.rate: rate}, **rest)


@every_row_slow
def test_a_lane_is_the_setting_alone(row):
    rates = jnp.array([0.5, 0.9, 1.0]) * row.arguments[row.rate]
    make = _by_rate(row)
    params, gradients = _small_params(), _small_gradients()
    lanes = jax.vmap(make)(rates)
    together = jax.vmap(lambda tx: run(tx, gradients, params, row.compiler_options))(lanes)
    for index, rate in enumerate(rates):
        alone = _program(row.label)(make(float(rate)))
        _assert_close(jgd.lane(together, index), alone, row.rounding)
        assert jgd.lane(lanes, index) == jgd.lane(jgd.stack([make(float(rate))]), 0)


@every_optimizer
def test_one_trace_for_floats_ints_arrays_and_numpy(row):
    params = _small_params()
    gradient = jgd.lane(_small_gradients(), 0)

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(tx, state):
        return tx.update(gradient, state, params, value=1.0)

    make = _by_rate(row)
    forms = [1.0, 1, np.float32(1), np.float64(1), np.int32(1), np.array(1.0), jnp.float32(1)]
    forms += [jnp.int32(1), jnp.bfloat16(1)]
    results = [step(make(one), make(one).init(params)) for one in forms]
    for result in results[1:]:
        chex.assert_trees_all_equal(result, results[0])


@every_row_slow
def test_constant_schedule_is_the_number(row):
    params, gradients = _small_params(), _small_gradients()
    make, rate = _by_rate(row), row.arguments[row.rate]
    schedules = [jgd.constant_schedule(rate), optax.constant_schedule(rate), lambda _: rate]
    updates = lambda: [run(make(one), gradients, params) for one in (rate, *schedules)]
    number, *scheduled = jax.jit(updates, compiler_options=row.compiler_options)()
    for each in scheduled:
        chex.assert_trees_all_close(each, number, rtol=1e-6)
    _assert_close(_alone(row), number, row.rounding)  # there the number is an argument of jit


@every_optimizer
def test_state_keeps_structure_shapes_and_dtypes(row):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params = jax.tree.map(lambda p, d=dtype: p.astype(d), _small_params())
        tx = row.ours(**row.arguments)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params, value=1.0)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        chex.assert_type(floats, jnp.float32)


@every_optimizer
def test_state_keeps_its_dtypes_under_x64(row, float64):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float64):
        params = {"w": jnp.ones((3, 3), dtype), "b": jnp.ones(3, dtype)}
        tx = row.ours(**row.arguments)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params, value=1.0)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@every_optimizer
def test_a_fresh_state_shares_no_buffers(row):
    """A training step can donate the state together with the parameters."""
    params = {"w": jnp.ones((3, 3)), "b": jnp.ones(3)}
    leaves = jax.tree.leaves((params, row.ours(**row.arguments).init(params)))
    arrays = [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)


@every_optimizer
def test_a_float16_zero_gradient_gives_a_finite_step(row):
    params = {"w": jnp.ones(3, jnp.float16)}
    tx = row.ours(**row.arguments)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params, value=1.0)
    chex.assert_tree_all_finite(updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@every_row_slow
def test_a_tree_is_updated_as_its_leaves(row):
    """Rules with norms over the whole tree update it as one long vector."""
    params, gradients = _small_params(), _small_gradients()
    together = _alone(row)
    if row.name == "noisy_sgd":  # the noise differs between leaves
        assert not np.allclose(together["w"], -row.arguments["learning_rate"] * gradients["w"])
    elif row.whole_tree:
        flat = lambda tree: jnp.concatenate([x.reshape(*x.shape[:1], -1) for x in tree], 1)
        leaves = flat([x[None] for x in jax.tree.leaves(params)])[0]
        alone = run(row.ours(**row.arguments), flat(jax.tree.leaves(gradients)), leaves)
        chex.assert_trees_all_close(alone, flat(jax.tree.leaves(together)), rtol=1e-5, atol=1e-9)
    else:
        tx, one = row.ours(**row.arguments), lambda tree, name: {name: tree[name]}
        apart = lambda: [run(tx, one(gradients, name), one(params, name)) for name in ("w", "s")]
        for alone in jax.jit(apart)():
            (name,) = alone
            limit = row.rounding * float(jnp.abs(alone[name]).max())
            chex.assert_trees_all_close(together[name], alone[name], rtol=0, atol=limit)


@every_optimizer
def test_a_saved_state_continues_as_the_uninterrupted_run(row):
    params, gradients = _small_params(), _small_gradients(6)
    tx = row.ours(**row.arguments)
    step = jax.jit(functools.partial(tx.update, value=0.7))
    state = tx.init(params)
    straight = []
    for i in range(6):
        updates, state = step(jgd.lane(gradients, i), state, params)
        straight.append(updates)
        if i == 2:
            saved = jax.tree.map(jnp.copy, state)
    state = saved
    for i in range(3, 6):
        updates, state = step(jgd.lane(gradients, i), state, params)
        chex.assert_trees_all_equal(updates, straight[i])


@every_optimizer
def test_odd_leaves(row):
    """Integer and complex leaves, and leaves without a gradient, keep their structure and dtype."""
    params = {"int": jnp.arange(3), "complex": jnp.ones(2, jnp.complex64), "gone": jnp.ones(2)}
    tx = row.ours(**row.arguments)
    state = tx.init(params)
    gradient = {
        "int": np.zeros(3, jax.dtypes.float0),
        "complex": jnp.full(2, 1 + 1j, jnp.complex64),
        "gone": None,
    }
    if row.name in ("rprop", "ftrl"):
        with pytest.raises(ValueError, match=f"{row.name}: updates must be real, got complex"):
            tx.update(gradient, state, params)
        for tree in (params, gradient):
            tree["complex"] = jnp.ones(2)
        state = tx.init(params)
    updates, after = tx.update(gradient, state, params, value=1.0)
    assert updates["gone"] is None
    chex.assert_trees_all_equal_dtypes(updates["complex"], gradient["complex"])
    chex.assert_tree_all_finite({k: updates[k] for k in ("int", "complex")})
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    optax.apply_updates(params, {**updates, "gone": jnp.zeros(2)})


STATELESS = ("sgd", "noisy_sgd", "sign_sgd", "polyak_sgd")  # no state that could mismatch
WITH_STATE = [row for row in FIRST if row.name not in STATELESS]


@pytest.mark.parametrize("row", WITH_STATE, ids=[row.label for row in WITH_STATE])
def test_errors_about_mismatched_trees_name_the_optimizer_and_the_path(row):
    tx = row.ours(**row.arguments)
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = tx.init(params)
    name = row.name
    with pytest.raises(ValueError, match=rf"{name}: .*\['b'\].*\(4,\)"):
        tx.update({"a": jnp.ones(2), "b": jnp.ones(4)}, state, params)
    with pytest.raises(ValueError, match=rf"{name}: .*\['b'\]"):
        tx.update({"a": jnp.ones(2)}, state, params)
    other = (optax.adam if name == "lion" else optax.lion)(0.1).init(params)
    with pytest.raises(ValueError, match=f"{name}: expected .*, got .* created by another opti"):
        tx.update(params, other, params)


@every_optimizer
def test_lowers_for_cpu_cuda_and_tpu(row):
    tx = row.ours(**row.arguments)
    params = {"w": jnp.ones((4, 3)), "h": jnp.ones(3, jnp.bfloat16)}
    step = jax.jit(lambda tx, g, s: tx.update(g, s, params, value=1.0))
    platforms = ["cpu", "cuda", "tpu"]
    flat, treedef = jax.tree.flatten((tx, params, tx.init(params)))
    lowered = jax.export.export(
        jax.jit(lambda *xs: jax.tree.leaves(step(*jax.tree.unflatten(treedef, xs)))),
        platforms=platforms,
    )(*flat)
    assert set(lowered.platforms) == set(platforms)


QUOTIENTS = {
    "adagrad": dict(initial_accumulator_value=0.0, eps=0.0),
    "rmsprop": dict(eps=0.0),
    "adam": dict(eps=0.0),
    "nadam": dict(eps=0.0),
    "amsgrad": dict(eps=0.0),
    "adamax": dict(eps=0.0),
}


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_scale_of_the_gradient(scale):
    """Scaling gradients does not change quotients, and scales the steps of gradient descent."""
    params, gradients = _small_params(), _small_gradients()
    scaled = jax.tree.map(lambda g: scale * g, gradients)
    for name, zeros in QUOTIENTS.items():
        tx = getattr(jgd, name)(0.1, **zeros)
        chex.assert_trees_all_close(run(tx, scaled, params), run(tx, gradients, params), rtol=1e-5)
    for name in ("sgd", "momentum", "nesterov"):
        tx = getattr(jgd, name)(0.1)
        expected = jax.tree.map(lambda u: scale * u, run(tx, gradients, params))
        chex.assert_trees_all_close(run(tx, scaled, params), expected, rtol=1e-5)


@pytest.mark.slow
class VariantsTest(chex.TestCase):
    """Updates are the same with and without jit, with and without a device."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.named_parameters((row.name, row) for row in FIRST)
    def test_update(self, row):
        tx = row.ours(**row.arguments)
        params, gradients = _small_params(), _small_gradients(3)
        state = self.variant(tx.init)(params)
        expected = run(tx, gradients, params)
        for i in range(3):
            update = self.variant(functools.partial(tx.update, value=losses(3)[i]))
            updates, state = update(jgd.lane(gradients, i), state, params)
            params = optax.apply_updates(params, updates)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            chex.assert_trees_all_close(updates, jgd.lane(expected, i), rtol=1e-5, atol=1e-7)


def test_the_state_of_adam_has_one_count_one_mu_and_one_nu():
    params = _small_params()
    for tx in (jgd.adam(0.1), jgd.adamw(0.1), jgd.nadam(0.1), jgd.amsgrad(0.1), jgd.adamax(0.1)):
        state = tx.init(params)
        for name in ("count", "mu", "nu"):
            assert len(optax.tree.get_all_with_path(state, name)) == 1
    scheduled = jgd.adam(jgd.linear_schedule(0.1, 0.0, 10)).init(params)
    assert len(optax.tree.get_all_with_path(scheduled, "count")) == 1
    only = jgd.sgd(jgd.linear_schedule(0.1, 0.0, 10)).init(params)
    assert optax.tree.get(only, "count") == 0


def test_16_bit_parameters_do_not_round_the_numbers():
    """b2 = 0.999 rounds to 1 in bfloat16, which would keep nu at 0."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = jgd.adam(0.1)
    _, state = tx.update(params, tx.init(params), params)
    nu = optax.tree.get(state, "nu")["w"]
    chex.assert_trees_all_close(nu, jnp.full(3, 1e-3), rtol=2e-7)
    halved = jgd.adam(0.1, mu_dtype="bfloat16").init(params)
    chex.assert_shape(optax.tree.get(halved, "mu")["w"], (3,))
    chex.assert_type(optax.tree.get(halved, "mu")["w"], jnp.bfloat16)


def test_float32_arrays_do_not_promote_under_x64(float64):
    params = {"w": jnp.ones(3, jnp.float32), "d": jnp.ones(3, jnp.float64)}
    for rate in (0.1, np.float64(0.1), jnp.float64(0.1), jnp.float32(0.1)):
        tx = jgd.adam(rate)
        updates, state = tx.update(params, tx.init(params), params)
        chex.assert_trees_all_equal_dtypes(updates, params)
        chex.assert_trees_all_equal_dtypes(optax.tree.get(state, "nu"), params)


def test_bias_correction_of_a_scheduled_decay():
    """The corrected average of a constant gradient is this gradient, for any schedule."""
    constant = {"w": jnp.full(2, 3.0)}
    for schedule in (jgd.linear_schedule(0.5, 0.99, 20), jgd.piecewise_constant([5], [0.0, 0.9])):
        tx = jgd.ema(schedule)
        state = tx.init(constant)
        for _ in range(40):
            updates, state = tx.update(constant, state)
            chex.assert_trees_all_close(updates, constant, rtol=2e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999, 0.9999])
def test_bias_correction_is_exact_to_rounding(decay):
    """Corrections equal the closed form of the typed decimal for 20,000 steps.

    0.999 rounded to float32 would give an error of 1.3e-5.
    """
    ones = jnp.ones([])

    def step(state, _):
        u, state = jgd.bias_correction(decay).update(ones, state)
        return state, u

    init = jgd.bias_correction(decay).init(ones)
    _, ours = jax.jit(lambda s: jax.lax.scan(step, s, None, length=20_000))(init)
    t = np.arange(1, 20_001)
    exact = 1 / -np.expm1(t * np.log(decay)) if decay else np.ones(20_000)
    np.testing.assert_allclose(ours, exact, rtol=4e-7)


def test_compositions_of_basic_transformations_equal_optax():
    """A composition of basic transformations equals the optimizer of optax with its formula."""
    b, b2, eps, rate = 0.9, 0.99, 1e-3, 0.1
    lr = jgd.scale_by_learning_rate(rate)
    square_sum = jgd.chain(jgd.square(), jgd.running_sum(0.1), jgd.root(eps_root=eps))
    square_mean = jgd.chain(jgd.square(), jgd.moving_average(b), jgd.root(eps))
    largest = jgd.chain(jgd.square(), jgd.ema(b2), jgd.running_max(), jgd.root(eps))
    pairs = [
        (jgd.chain(jgd.scale_by_momentum(b), lr), optax.sgd(rate, b)),
        (jgd.chain(jgd.with_nesterov(jgd.scale_by_momentum(b)), lr), optax.sgd(rate, b, True)),
        (jgd.chain(jgd.divide(jgd.identity(), square_sum), lr), optax.adagrad(rate, 0.1, eps)),
        (
            jgd.chain(jgd.divide(jgd.identity(), square_mean), lr),
            optax.rmsprop(rate, b, eps, eps_in_sqrt=False),
        ),
        (jgd.chain(jgd.divide(jgd.ema(b), jgd.rms(b2, eps)), lr), optax.adam(rate, b, b2, eps)),
        (jgd.chain(jgd.divide(jgd.ema(b), largest), lr), optax.amsgrad(rate, b, b2, eps)),
    ]
    params, gradients = _small_params(), _small_gradients(20)
    for ours, theirs in pairs:
        _assert_close(run(ours, gradients, params), run(theirs, gradients, params), 2e-6)


def test_zero_over_zero_is_zero_with_finite_derivatives():
    zero = {"w": jnp.zeros(3)}
    for tx in itertools.starmap(lambda n, z: getattr(jgd, n)(0.1, **z), QUOTIENTS.items()):
        updates, _ = tx.update(zero, tx.init(zero), zero)
        chex.assert_trees_all_equal(updates, zero)

        def total(tx, g):
            return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, tx.update(g, tx.init(g), g)[0]))

        chex.assert_tree_all_finite(jax.grad(total, (0, 1))(tx, zero))


@pytest.mark.parametrize("size", [1e-8, 1e-19, 1e-25, 0.0])
def test_hypergradients_are_finite_for_tiny_gradients(size):
    """The square of a denominator overflows or underflows long before the denominator does."""
    tiny = {"w": jnp.full((4, 3), size)}

    def scalar(tx):
        state, params, total = tx.init(tiny), tiny, 0.0
        for _ in range(2):
            updates, state = tx.update(tiny, state, params)
            params = jax.tree.map(jnp.add, params, updates)
            total += jnp.sum(jnp.sin(updates["w"]))
        return total

    for tx in (
        jgd.adam(0.1, eps=0.0),
        jgd.adafactor(0.1, 2),
        jgd.dadapt_adamw(),
        jgd.prodigy(),
        jgd.adopt(0.1),
        jgd.shampoo(0.1, eps=0.0),
        jgd.lars(0.1),
    ):
        chex.assert_tree_all_finite(jax.jit(jax.grad(scalar))(tx))


def test_a_typed_key_is_part_of_the_structure_inside_jit():
    params = {"w": jnp.ones(3)}
    tx = jgd.noisy_sgd(0.1, key=jax.random.key(7))
    updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params))
    theirs = optax.noisy_sgd(0.1, key=jax.random.key(7))
    chex.assert_trees_all_close(updates, theirs.update(params, theirs.init(params))[0], rtol=1e-6)


def test_a_nan_in_the_state_stays_nan():
    """A NaN in the second moment gives NaN updates, not plain gradient steps."""
    params = {"w": jnp.ones(2)}
    once, then = {"w": jnp.array([jnp.nan, 1.0])}, {"w": jnp.array([3.0, 3.0])}
    for tx in (jgd.rmsprop(0.1), jgd.rmsprop(0.1, eps_in_sqrt=False), jgd.adagrad(0.1)):
        _, state = tx.update(once, tx.init(params), params)
        updates, _ = tx.update(then, state, params)
        assert np.isnan(updates["w"][0])
        assert np.isfinite(updates["w"][1])


def test_weight_decay_needs_parameters():
    tx = jgd.adamw(0.1)
    g = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="adamw: params must be given, got None"):
        tx.update(g, tx.init(g))


def test_mask_of_weight_decay():
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    for mask in ({"w": True, "b": False}, lambda p: {"w": True, "b": False}):
        tx = jgd.adamw(1.0, weight_decay=0.5, mask=mask)
        updates, _ = jax.jit(tx.update)(zero, tx.init(params), params)
        chex.assert_trees_all_equal(updates, {"w": jnp.full(2, -0.5), "b": jnp.zeros(2)})
