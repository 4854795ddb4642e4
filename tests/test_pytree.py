"""Values of a factory call are pytrees of their numbers, and work wherever JAX expects pytrees."""

import copy
import inspect
import pickle
import subprocess
import sys

import chex
import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import run
from flax import nnx
from flax.training import train_state

import jgd

PARAMS = {"w": jnp.ones(3), "b": jnp.zeros(())}
GRADIENT = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.float32(0.5)}
VALUES = [
    jgd.adam(1e-3),
    jgd.adam(jgd.cosine_decay_schedule(1e-3, 100), b1=jgd.linear_schedule(0.5, 0.9, 10)),
    jgd.adamw(1e-3, mask={"w": True, "b": False}),
    jgd.adam(1e-3, mu_dtype="bfloat16"),
    jgd.chain(jgd.as_pytree(optax.clip)(1.0), jgd.sgd(0.1, momentum=0.9)),
    jgd.as_pytree(optax.lion)(1e-4),
    jgd.piecewise_constant([10, 20], [1.0, 0.1, 0.01]),
    jgd.piecewise_constant_schedule(1.0, {10: 0.5, 20: 0.5}),
    jgd.join_schedules([jgd.constant_schedule(1.0), jgd.linear_schedule(1.0, 0.0, 9)], [5]),
]
every_value = pytest.mark.parametrize("value", VALUES)


def train(tx, steps=5):
    """Return the parameters after a short descent, for `jax.vmap` and `jax.grad` over `tx`."""

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.sum((p["w"] - 2) ** 2) + (p["b"] + 1) ** 2)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), None, length=steps)
    return params


# --- a value ---------------------------------------------------------------------------------


def test_leaves_are_the_numbers():
    tx = jgd.adam(1e-3)
    assert jax.tree.leaves(tx) == [1e-3, 0.9, 0.999, 1e-8, 0.0]
    assert all(type(leaf) is np.float64 for leaf in jax.tree.leaves(tx))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tx)]
    assert paths == [".learning_rate", ".b1", ".b2", ".eps", ".eps_root"]
    assert repr(tx) == "adam(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0)"
    assert tx.learning_rate == 1e-3
    nested = jgd.chain(jgd.scale(2.0), jgd.adam(jgd.linear_schedule(0.1, 0.0, 7)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(nested)]
    assert paths[:3] == [
        ".links[0].step_size",
        ".links[1].learning_rate.init_value",
        ".links[1].learning_rate.end_value",
    ]


def test_is_an_optax_transformation():
    tx = jgd.adam(1e-3)
    init, update = tx
    assert isinstance(tx, optax.GradientTransformation)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    chex.assert_trees_all_equal(init(PARAMS), tx.init(PARAMS))
    state = init(PARAMS)
    chex.assert_trees_all_equal(update(GRADIENT, state), tx.update(GRADIENT, state, value=1.0))
    assert inspect.signature(jgd.adam).parameters["b2"].default == 0.999
    assert "Kingma" in jgd.adam.__doc__


@every_value
def test_pickle_copy_equality_and_hash(value):
    for twin in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
        assert twin == value
        assert hash(twin) == hash(value)
        assert jax.tree.structure(twin) == jax.tree.structure(value)
    other = jax.tree.map(lambda x: x * 2 + 1, value)
    assert other != value
    assert type(other) is type(value)
    assert len({value, other, copy.copy(value)}) == 2


def test_pickles_across_processes(tmp_path):
    """Unpickling finds a factory by its name, and a lifted factory by its original function."""
    path = tmp_path / "values.pickle"
    path.write_bytes(pickle.dumps(VALUES[:6]))
    program = f"import pickle; print(pickle.load(open({str(path)!r}, 'rb')))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.stdout.strip() == repr(VALUES[:6]), shown.stderr


def test_structure_compares_by_value():
    mask = lambda p: p
    assert jgd.adamw(0.1, mask=mask) == jgd.adamw(0.1, mask=mask)
    assert jgd.adamw(0.1, mask={"w": True}) == jgd.adamw(0.1, mask={"w": True})
    assert jgd.adamw(0.1, mask={"w": True}) != jgd.adamw(0.1, mask={"w": False})
    assert jgd.adam(0.1, mu_dtype="bfloat16") == jgd.adam(0.1, mu_dtype=jnp.bfloat16)
    assert jgd.adam(0.1) != jgd.adam(0.1, nesterov=True)
    assert jgd.adam(0.5) == jgd.adam(jnp.float32(0.5))
    assert jgd.adam(0.1) != jgd.sgd(0.1)
    assert "mask=array" in repr(jgd.adamw(0.1, mask=np.array([True, False])))
    arrays = [jgd.adamw(0.1, mask=np.array([True, flag])) for flag in (True, True, False)]
    assert arrays[0] == arrays[1] != arrays[2]


def test_replace():
    assert jgd.adam(0.1)._replace(learning_rate=0.2) == jgd.adam(0.2)
    with pytest.raises(ValueError, match="adam has no argument rate"):
        jgd.adam(0.1)._replace(rate=0.2)
    with pytest.raises(ValueError, match=r"adam: b1 must be in \[0, 1\), got 2.0"):
        jgd.adam(0.1)._replace(b1=2.0)
    plain = jgd.adam(0.1)._replace(update=optax.identity().update)
    assert plain.update(GRADIENT, None)[0] is GRADIENT
    assert jgd.linear_schedule(1.0, 0.0, 10)._replace(end_value=1.0)(10) == 1.0


@every_value
def test_tree_map_to_anything_and_back(value):
    leaves, structure = jax.tree.flatten(value)
    for stand_in in (lambda x: object(), lambda x: None, str, lambda x: x > 0, lambda x: (x, x)):
        repr(jax.tree.map(stand_in, value))
    assert jax.tree.unflatten(structure, leaves) == value
    assert jax.tree.map(lambda x: float(str(float(x))), jax.tree.map(float, value)) == value


def test_arguments_of_wrong_types_are_refused_in_the_call():
    for wrong in ("0.1", True, optax.sgd(0.1), jgd.sgd(0.1), None, 1j, [0.1], np.bool_(True)):
        with pytest.raises(TypeError, match="adam: learning_rate must be a number or a schedule"):
            jgd.adam(wrong)
    with pytest.raises(TypeError, match="adam: missing a required argument: 'learning_rate'"):
        jgd.adam()
    with pytest.raises(TypeError, match="adam: got an unexpected keyword argument 'beta1'"):
        jgd.adam(0.1, beta1=0.9)
    with pytest.raises(ValueError, match=r"adam: b1 must be in \[0, 1\), got 1.5"):
        jgd.adam(0.1, b1=1.5)
    with pytest.raises(ValueError, match=r"adam: eps must be at least 0, got -1.0"):
        jgd.adam(0.1, eps=-1)
    with pytest.raises(TypeError, match=r"chain: links must be a transformation, got 0\.1"):
        jgd.chain(jgd.sgd(0.1), 0.1)
    with pytest.raises(TypeError, match="adam: mu_dtype must not be traced"):
        jax.vmap(lambda x: jgd.adam(0.1, mu_dtype=x))(jnp.ones(2))


def test_wrong_structure_is_refused_in_the_call():
    for wrong in (0.5, "no", 1):
        with pytest.raises(TypeError, match="sgd: nesterov must be True or False"):
            jgd.sgd(0.1, 0.9, wrong)
    with pytest.raises(TypeError, match="adam: mu_dtype must be a dtype, got True"):
        jgd.adam(0.1, mu_dtype=True)
    for wrong in (np.complex64(1j), jnp.array(1j), np.array([True]), jax.random.key(0)):
        with pytest.raises(TypeError, match="adam: learning_rate must be a number"):
            jgd.adam(wrong)


def test_an_optimizer_is_immutable():
    tx = jgd.adam(0.1)
    with pytest.raises(AttributeError, match=r"Use tx\._replace\(learning_rate=...\)"):
        tx.learning_rate = 3.0
    assert tx == jgd.adam(0.1)


def test_init_of_shapes():
    """`init` accepts shapes instead of arrays, as before a sharded initialisation."""
    shapes = {"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "n": jax.ShapeDtypeStruct((), int)}
    for tx in (jgd.adam(0.1), jgd.as_pytree(optax.lion)(0.1)):
        mu = optax.tree.get(tx.init(shapes), "mu")
        assert mu["w"].shape == (2,)
        assert mu["w"].dtype == mu["n"].dtype == jnp.float32


def test_a_lane_out_of_range_is_refused():
    with pytest.raises(IndexError, match=r"lane: index must be in \[-2, 1\], got 5"):
        jgd.lane(jax.vmap(jgd.adam)(jnp.array([0.1, 0.2])), 5)
    with pytest.raises(TypeError, match=r"hides its numbers in functions.*jgd\.as_pytree"):
        jgd.stack([optax.adam(0.1), optax.adam(0.2)])


def test_the_error_for_a_batch_names_vmap():
    tx = jgd.adam(jnp.array([0.1, 0.2]))
    for call in (lambda: tx.init(PARAMS), lambda: tx.update(GRADIENT, None)):
        with pytest.raises(
            TypeError, match=r"adam: learning_rate must be a scalar, got shape \(2,\).*jax.vmap"
        ):
            call()


# --- transformations of jax ------------------------------------------------------------------


def test_new_numbers_never_retrace():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(tx, state):
        return tx.update(GRADIENT, state, PARAMS)

    state = jgd.adam(0.1).init(PARAMS)
    weak = jnp.array(0.1)  # weakly typed, as results of jit for Python numbers
    numbers = (0.1, 1, np.float32(2), jnp.float32(1e-3), weak, jnp.int32(1), jnp.bfloat16(1))
    for number in numbers:
        step(jgd.adam(number, eps=number), state)


def test_new_numbers_never_retrace_under_x64(float64):
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(lambda tx: tx.learning_rate, n=1))
    for number in (0.1, jnp.float32(0.1), np.float32(0.1), jnp.float64(0.1), jnp.array(0.1)):
        step(jgd.adam(number))


def test_vmap_of_the_factory_and_of_mixed_schedules():
    peaks, lengths = jnp.array([0.1, 0.2]), jnp.array([3, 50])
    build = lambda peak, n: jgd.adam(jgd.cosine_decay_schedule(peak, n), b1=peak)
    lanes = jax.vmap(build)(peaks, lengths)
    ends = jax.vmap(train)(lanes)
    for i in range(2):
        chex.assert_trees_all_close(
            jgd.lane(ends, i), train(build(float(peaks[i]), int(lengths[i]))), rtol=1e-6
        )
    mixed = jgd.stack([jgd.sgd(jgd.linear_schedule(0.1, end, 4)) for end in (0.0, 0.1)])
    np.testing.assert_allclose(jax.vmap(train)(mixed)["w"][1], train(jgd.sgd(0.1))["w"], rtol=1e-6)


def test_scan_carries_an_optimizer():
    def step(tx, _):
        return tx._replace(learning_rate=tx.learning_rate / 2), tx.learning_rate

    end, rates = jax.lax.scan(step, jgd.adam(1.0), None, length=3)
    np.testing.assert_allclose(rates, [1.0, 0.5, 0.25])
    assert end == jgd.adam(0.125)


def test_gradient_by_the_optimizer_and_its_step_counts():
    tx = jgd.sgd(jgd.warmup_cosine_decay_schedule(0.0, 0.3, 2, 6), momentum=0.5)
    loss = lambda tx: jnp.sum((train(tx)["w"] - 2) ** 2)
    gradient = jax.jit(jax.grad(loss))(tx)
    assert jax.tree.structure(gradient) == jax.tree.structure(tx)
    assert all(np.isfinite(x) for x in jax.tree.leaves(gradient))
    assert gradient.learning_rate.decay_steps != 0  # an integer in the call
    assert gradient.momentum != 0


def test_vmap_of_grad_of_vmap():
    losses = lambda tx: jnp.sum(train(tx)["w"] ** 2)
    lanes = jax.vmap(jgd.momentum)(jnp.array([0.01, 0.1]))
    gradients = jax.vmap(jax.grad(losses))(lanes)
    for i in range(2):
        chex.assert_trees_all_close(
            jgd.lane(gradients, i), jax.grad(losses)(jgd.lane(lanes, i)), rtol=1e-5
        )


def test_stack_and_lane():
    settings = [jgd.adam(0.1), jgd.adam(0.2, b1=0.5)]
    lanes = jgd.stack(settings)
    assert jgd.lane(lanes, 1) == jax.tree.map(jnp.float32, settings[1])
    with pytest.raises(ValueError, match="at least one"):
        jgd.stack([])
    different = [jgd.chain(optax.clip(1.0), jgd.sgd(0.1)), jgd.chain(optax.clip(2.0), jgd.sgd(0.1))]
    with pytest.raises(ValueError, match=r"(?s)settings must have one structure.*jgd\.as_pytree"):
        jgd.stack(different)


# --- factories of optax and of users ---------------------------------------------------------


def test_lifted_factories_are_the_same_optimizer():
    cases = [
        (jgd.as_pytree(optax.lion)(1e-2), optax.lion(1e-2)),
        (jgd.as_pytree(optax.yogi)(1e-2), optax.yogi(1e-2)),
        (jgd.as_pytree(optax.clip)(0.5), optax.clip(0.5)),
        (
            jgd.as_pytree(optax.adafactor, structure=["min_dim_size_to_factor", "decay_offset"])(
                1e-2
            ),
            optax.adafactor(1e-2),
        ),
        (
            jgd.as_pytree(optax.adamw)(optax.linear_schedule(0.1, 0.0, 5), weight_decay=0.1),
            optax.adamw(optax.linear_schedule(0.1, 0.0, 5), weight_decay=0.1),
        ),
    ]
    gradients = jax.tree.map(lambda g: jnp.stack([g, -2 * g, 3 * g]), GRADIENT)
    for ours, theirs in cases:
        chex.assert_trees_all_close(
            run(ours, gradients, PARAMS), run(theirs, gradients, PARAMS), rtol=1e-5
        )
        assert jax.tree.leaves(ours)


def test_kinds_of_foreign_arguments_are_read_from_signatures():
    key = jax.random.key(0)
    lifted = [
        jgd.as_pytree(optax.contrib.prodigy)(0.1),  # a pair of numbers by default
        jgd.as_pytree(optax.contrib.muon, structure=["ns_steps"])(0.1),
        jgd.as_pytree(optax.contrib.dowg)(),
        jgd.as_pytree(optax.noisy_sgd)(0.1, key=key),  # a random key
        jgd.as_pytree(optax.masked)(jgd.adam(0.1), {"w": True, "b": False}),  # link and mask
        jgd.as_pytree(optax.scale_by_schedule)(lambda step: 0.1),  # a required function
        jgd.as_pytree(optax.stateless)(lambda updates, params: updates),
    ]
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    for tx in lifted:
        state = tx.init(params)
        jax.jit(tx.update)(params, state, params)
        assert copy.copy(tx) == tx

    def build(rate, *names, decay=None, **options):
        assert options == {"deep": 1}
        return optax.sgd(rate)

    assert jax.tree.leaves(jgd.as_pytree(build)(0.1, deep=1)) == [0.1]
    with pytest.raises(TypeError, match="must return a transformation, a pair"):
        jgd.as_pytree(lambda rate: 3)(0.1)


def test_a_lifted_factory_builds_lanes():
    lanes = jax.vmap(jgd.as_pytree(optax.lion))(jnp.array([1e-2, 1e-1]))
    ends = jax.vmap(train)(lanes)
    chex.assert_trees_all_close(jgd.lane(ends, 1), train(optax.lion(1e-1)), rtol=1e-6)
    twice = [jgd.as_pytree(optax.lion)(0.1) for _ in range(2)]
    assert twice[0] == twice[1]
    assert jax.tree.structure(twice[0]) == jax.tree.structure(twice[1])


def test_a_pair_of_closures_is_enough():
    @jgd.as_pytree
    def halve(rate, *, flip: bool = False):
        init = lambda params: ()
        update = lambda g, s, p=None: (jax.tree.map(lambda x: (-rate if flip else rate) * x, g), s)
        return init, update

    tx = halve(0.5, flip=True)
    np.testing.assert_allclose(tx.update(GRADIENT, tx.init(PARAMS))[0]["b"], -0.25)
    assert jax.tree.leaves(tx) == [0.5]
    with pytest.raises(ValueError, match=r"as_pytree: .* has no argument speed"):
        jgd.as_pytree(lambda rate: None, structure=["speed"])


# --- inside optax, flax and equinox ----------------------------------------------------------

WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("tx", tx)),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"x": tx, "y": optax.set_to_zero()}, {"w": "x", "b": "y"}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "conditionally": lambda tx: optax.conditionally_transform(tx, lambda step: step < 2),
    "flatten": optax.flatten,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_inside_every_combinator_of_optax(name):
    gradients = jax.tree.map(lambda g: jnp.stack([g, -2 * g, 3 * g, g]), GRADIENT)
    ours = run(WRAPPED[name](jgd.adam(0.1)), gradients, PARAMS)
    theirs = run(WRAPPED[name](optax.adam(0.1)), gradients, PARAMS)
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=1e-7)


def test_inject_hyperparams_and_tree_map_params():
    tx = optax.inject_hyperparams(jgd.adam)(learning_rate=optax.linear_schedule(0.1, 0.0, 4))
    gradients = jax.tree.map(lambda g: jnp.stack([g, g, g]), GRADIENT)
    peer = optax.adam(optax.linear_schedule(0.1, 0.0, 4))
    chex.assert_trees_all_close(run(tx, gradients, PARAMS), run(peer, gradients, PARAMS), rtol=2e-5)
    assert tx.init(PARAMS).hyperparams["learning_rate"] == np.float32(0.1)
    plain = jgd.adam(0.1)
    doubled = optax.tree_map_params(plain, lambda x: x + 2, plain.init(PARAMS))
    assert optax.tree.get(doubled, "count") == 0
    np.testing.assert_array_equal(optax.tree.get(doubled, "mu")["w"], 2.0)


def test_bias_correction_is_exact_for_scheduled_decays():
    """A constant gradient gives sign(g); optax corrects all steps with the b1 of the last one."""
    tx = jgd.adam(1.0, b1=lambda step: 0.5 + 0.04 * step)
    gradients = jax.tree.map(lambda g: jnp.stack([g] * 8), GRADIENT)
    np.testing.assert_allclose(run(tx, gradients, PARAMS)["b"], -1.0, rtol=1e-5)


def test_injected_decays_are_treated_as_in_optax():
    """A number that changes without a schedule is treated as constant over all steps."""
    inject = lambda f: optax.inject_hyperparams(f)(1.0, b1=lambda step: 0.5 + 0.04 * step)
    gradients = jax.tree.map(lambda g: jnp.stack([g] * 8), GRADIENT)
    ours, theirs = (run(inject(f), gradients, PARAMS) for f in (jgd.adam, optax.adam))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


def test_optax_chain_hides_the_leaves_and_ours_keeps_them():
    hidden = optax.chain(jgd.adam(0.1))
    assert not any(isinstance(leaf, float) for leaf in jax.tree.leaves(hidden))
    assert jax.tree.leaves(jgd.chain(optax.clip(1.0), jgd.sgd(0.1))) == [0.1]


def test_equinox_filters_see_the_numbers():
    tx = jgd.adam(0.1)
    numbers, rest = eqx.partition(tx, eqx.is_inexact_array_like)
    assert len(jax.tree.leaves(numbers)) == 5
    assert eqx.combine(numbers, rest) == tx

    class Model(eqx.Module):
        weight: jax.Array
        name: str = eqx.field(static=True)

    model = Model(jnp.ones(3), "m")

    @eqx.filter_jit
    def step(tx, model, state):
        gradient = eqx.filter_grad(lambda m: jnp.sum(m.weight**2))(model)
        updates, state = tx.update(gradient, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state

    state = tx.init(eqx.filter(model, eqx.is_array))
    after, _ = step(tx, model, state)
    np.testing.assert_allclose(after.weight, 0.9, rtol=1e-5)
    swept = eqx.tree_at(lambda t: t.learning_rate, tx, 0.5)
    np.testing.assert_allclose(step(swept, model, state)[0].weight, 0.5, rtol=1e-5)


def test_flax_train_state():
    """In a TrainState, `tx` is static and new numbers retrace; declared as a node, they do not."""
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=jgd.adam(0.1))
    state = jax.jit(lambda s: s.apply_gradients(grads=GRADIENT))(state)
    np.testing.assert_allclose(state.params["b"], -0.1, rtol=1e-5)

    class SweptState(train_state.TrainState):
        tx: optax.GradientTransformationExtraArgs = flax.struct.field(pytree_node=True)

    create = lambda tx: SweptState.create(apply_fn=None, params=PARAMS, tx=tx)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state):
        return state.apply_gradients(grads=GRADIENT)

    for rate in (0.1, 0.2):
        np.testing.assert_allclose(step(create(jgd.adam(rate))).params["b"], -rate, rtol=1e-5)
    lanes = jax.vmap(lambda rate: step(create(jgd.adam(rate))))(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(lanes.params["b"], [-0.1, -0.2], rtol=1e-5)


def test_nnx_optimizer():
    """flax's own `nnx.Optimizer` accepts an optimizer whose numbers are floats."""
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, jgd.adam(0.1), wrt=nnx.Param)
    before = np.asarray(model.kernel[...])
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3)))))(model)
    optimizer.update(model, grads)
    np.testing.assert_allclose(np.asarray(model.kernel[...]), before - 0.1, rtol=1e-5)


def test_orbax_restores_an_optimizer_and_its_state(tmp_path):
    tx = jgd.adam(jgd.cosine_decay_schedule(0.1, 10))
    _, state = tx.update(GRADIENT, tx.init(PARAMS), PARAMS)
    saved = {"tx": jax.tree.map(jnp.asarray, tx), "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", saved)
        checkpointer.wait_until_finished()
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
        restored = checkpointer.restore(tmp_path / "step", template)
    assert restored["tx"] == saved["tx"]
    chex.assert_trees_all_equal(restored["state"], state)
    assert type(restored["state"]) is type(state)
