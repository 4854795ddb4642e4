"""jgd replaces optax in code of other libraries: each test is an example to copy.

The examples are optax's wrappers, flax, equinox, orbax, the parameters of a pretrained model, a
transformer scanned over its layers, `jax.shard_map`, and reinforcement learning with one optimizer
per lane.
"""

import inspect
import os
import subprocess
import sys
from typing import Any

import chex
import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, traverse_util
from flax.training import train_state
from optax import contrib

import jgd

# --- optax -----------------------------------------------------------------------------------

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.ones(3)}
RATES = jnp.array([0.01, 0.1])
ONLY_W, NAMES = {"w": True, "b": False}, {"w": "matrix", "b": "rest"}
EARLY = lambda step, **_: step < 2
STEPPED = optax.WrappedSchedule(optax.constant_schedule(0.8))

WRAPPERS = {  # each function of optax whose first argument is a transformation or its factory
    "MultiSteps": lambda f, r: optax.MultiSteps(f(r), 2).gradient_transformation(),
    "apply_if_finite": lambda f, r: optax.apply_if_finite(f(r), 3),
    "chain": lambda f, r: optax.chain(optax.clip_by_global_norm(1.0), f(r)),
    "conditionally_mask": lambda f, r: optax.conditionally_mask(f(r), EARLY),
    "conditionally_transform": lambda f, r: optax.conditionally_transform(f(r), EARLY),
    "flatten": lambda f, r: optax.flatten(f(r)),
    "inject_hyperparams": lambda f, r: optax.inject_hyperparams(f)(r, b1=0.8),
    "inject_stateful_hyperparams": lambda f, r: optax.inject_stateful_hyperparams(f)(r, b1=STEPPED),
    "lookahead": lambda f, r: optax.lookahead(f(r), 2, 0.5),
    "masked": lambda f, r: optax.masked(f(r), ONLY_W),
    "mechanize": lambda f, r: contrib.mechanize(f(r), s_init=0.1),
    "monitor": lambda f, r: optax.chain(f(r), optax.monitor({"again": f(r)})),
    "multi_transform": lambda f, r: optax.multi_transform({"matrix": f(r), "rest": f(0.5)}, NAMES),
    "named_chain": lambda f, r: optax.named_chain(("clip", optax.clip(1.0)), ("tx", f(r))),
    "partition": lambda f, r: optax.partition({"matrix": f(r), "rest": optax.set_to_zero()}, NAMES),
    "sam": lambda f, r: contrib.sam(f(r), optax.chain(contrib.normalize(), f(0.1))),
    "schedule_free": lambda f, r: contrib.schedule_free(f(r, b1=0.0), r),
    "selective_transform": lambda f, r: optax.selective_transform(f(r), freeze_mask=ONLY_W),
    "split_real_and_imaginary": lambda f, r: contrib.split_real_and_imaginary(f(r)),
    "with_extra_args_support": lambda f, r: optax.with_extra_args_support(f(r)),
}
CHAINED = {  # transformations of optax before or after an optimizer in a chain
    "adaptive_grad_clip": lambda tx: (optax.adaptive_grad_clip(0.1), tx),
    "add_noise": lambda tx: (optax.add_noise(0.1, 0.5, jax.random.key(0)), tx),
    "apply_every": lambda tx: (tx, optax.apply_every(2)),
    "clip_by_block_rms": lambda tx: (optax.clip_by_block_rms(0.5), tx),
    "freeze": lambda tx: (tx, optax.freeze(ONLY_W)),
    "keep_params_nonnegative": lambda tx: (tx, optax.keep_params_nonnegative()),
    "normalize": lambda tx: (contrib.normalize(), tx),
    "normalize_by_update_norm": lambda tx: (tx, optax.normalize_by_update_norm()),
    "reduce_on_plateau": lambda tx: (tx, contrib.reduce_on_plateau(0.5, patience=1)),
    "snapshot": lambda tx: (tx, optax.snapshot("norm", optax.tree.norm)),
    "zero_nans": lambda tx: (optax.zero_nans(), tx),
}


def _updates(tx, params, steps=4):
    """Return the updates of a few steps for fixed gradients and losses."""
    tx, state, all_updates = optax.with_extra_args_support(tx), tx.init(params), []
    plain = params.fast if isinstance(params, optax.LookaheadParams) else params
    for step in range(steps):
        gradient = jax.tree.map(lambda p, k=step: jnp.cos(3 * p + k), plain)
        value = {} if isinstance(state, contrib.SAMState) else {"value": 1.0}
        updates, state = tx.update(gradient, state, params, **value)
        params = optax.apply_updates(params, updates)
        all_updates.append(updates)
    return all_updates


def test_every_wrapper_of_optax_is_tested():
    names = set()
    for name, function in [*vars(optax).items(), *vars(contrib).items()]:
        if inspect.isfunction(function) or function is optax.MultiSteps:
            first, *_ = [*inspect.signature(function).parameters.values(), None]
            if "GradientTransformation" in str(first) and not name.startswith("_"):
                names.add(name)
    assert names == {*WRAPPERS}


@pytest.mark.filterwarnings("ignore:inject_stateful_hyperparams is deprecated")
@pytest.mark.parametrize("name", WRAPPERS)
def test_in_every_wrapper_of_optax(name):
    """With a schedule, and in lanes built inside a vmap, updates equal those of optax's adamw."""
    params = PARAMS
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(PARAMS)
    elif name == "split_real_and_imaginary":
        params = jax.tree.map(lambda p: p * (1 + 2j), PARAMS)
    ours = lambda rate: WRAPPERS[name](jgd.adamw, jgd.linear_schedule(rate, 0.01, 4))
    theirs = WRAPPERS[name](optax.adamw, optax.linear_schedule(0.1, 0.01, 4))
    lanes = jax.vmap(lambda rate: _updates(ours(rate), params))
    actual, expected = jax.jit(lambda r: (lanes(r), _updates(theirs, params)))(RATES)
    chex.assert_trees_all_close(jgd.lane(actual, 1), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(jgd.lane(actual, 0), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CHAINED)
def test_chained_with_links_of_optax(name):
    """`jgd.chain` accepts links of optax, and the learning rate stays a leaf: a jit argument."""
    ours = jgd.chain(*CHAINED[name](jgd.adamw(0.1)))
    theirs = optax.chain(*CHAINED[name](optax.adamw(0.1)))
    assert 0.1 in jax.tree.leaves(ours)
    actual, expected = jax.jit(lambda tx: (_updates(tx, PARAMS), _updates(theirs, PARAMS)))(ours)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)


# --- flax ------------------------------------------------------------------------------------

X = jax.random.normal(jax.random.key(0), (32, 3))
Y = jnp.sin(X.sum(1, keepdims=True))


def _squares(model):
    return jnp.mean((model(X) - Y) ** 2)


def test_nnx_optimizer():
    """In `nnx.jit`, equal optimizers share a program; `jax.vmap` trains lanes of rates."""

    @nnx.jit
    @chex.assert_max_traces(n=2)
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(_squares)(model))

    def train(tx, step=step, steps=5):
        model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(steps):
            step(model, optimizer)
        return model.kernel[...]

    chex.clear_trace_counter()
    alone = [train(jgd.adam(rate)) for rate in (0.01, 0.1, 0.01)]  # two rates: two traces
    chex.assert_trees_all_equal(alone[0], alone[2])
    plain = lambda model, optimizer: optimizer.update(model, nnx.grad(_squares)(model))
    chex.assert_trees_all_close(alone[1], train(optax.adam(0.1), plain), atol=1e-5)
    lanes = jax.jit(jax.vmap(lambda rate: train(jgd.adam(rate), plain)))(RATES)
    chex.assert_trees_all_close(lanes, jnp.stack(alone[:2]), atol=1e-5)


class SweptState(train_state.TrainState):
    """A TrainState of flax with the numbers of the optimizer among its leaves."""

    tx: Any = flax.struct.field(pytree_node=True)


def _linear(params, x):
    return x @ params["w"] + params["b"]


def _flax_step(state):
    loss = lambda params: jnp.mean((state.apply_fn(params, X) - Y) ** 2)
    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def test_flax_train_state():
    """A static `tx` is traced once per rate; `tx` as a node is traced once, and has lanes."""

    def train(kind, step, rate):
        params = {"w": jnp.zeros((3, 1)), "b": jnp.zeros(1)}
        state = kind.create(apply_fn=_linear, params=params, tx=jgd.adam(rate))
        for _ in range(3):
            state = step(state)
        return state.params

    chex.clear_trace_counter()
    twice = jax.jit(chex.assert_max_traces(_flax_step, n=2))
    alone = [train(train_state.TrainState, twice, rate) for rate in (0.01, 0.1, 0.01)]
    with pytest.raises(AssertionError, match="traced > 2 times"):
        train(train_state.TrainState, twice, 0.2)
    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(_flax_step, n=1))
    swept = [train(SweptState, once, rate) for rate in (0.01, 0.1, 0.2)]
    lanes = jax.vmap(lambda rate: train(SweptState, _flax_step, rate))(RATES)
    for index in range(2):
        chex.assert_trees_all_close(swept[index], alone[index], rtol=1e-5)
        chex.assert_trees_all_close(jgd.lane(lanes, index), alone[index], rtol=1e-5)


# --- equinox ---------------------------------------------------------------------------------


def test_equinox():
    """Filters treat an optimizer like a model: one program for all rates, and lanes of both."""
    model = eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))

    @eqx.filter_jit
    @chex.assert_max_traces(n=1)
    def train(tx, model):
        params, rest = eqx.partition(model, eqx.is_inexact_array)
        loss = lambda params: _squares(jax.vmap(eqx.combine(params, rest)))
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(eqx.filter_grad(loss)(params), state, params)
            params = eqx.apply_updates(params, updates)
        return eqx.combine(params, rest)

    chex.clear_trace_counter()
    clip = optax.clip_by_global_norm(1.0)  # created once, since links of optax compare by identity
    adamw = lambda rate: jgd.chain(clip, jgd.adamw(rate))
    alone = [train(adamw(rate), model) for rate in (0.01, 0.1)]
    chex.clear_trace_counter()
    both = eqx.filter_vmap(train, in_axes=(eqx.if_array(0), None))
    lanes = both(eqx.filter_vmap(adamw)(RATES), model)
    for index in range(2):
        chosen = jax.tree.map(lambda x, k=index: x[k] if eqx.is_array(x) else x, lanes)
        assert eqx.tree_equal(chosen, alone[index], rtol=1e-4, atol=1e-6)


# --- orbax -----------------------------------------------------------------------------------


def test_orbax(tmp_path):
    """A restored run, with structure from code and numbers from disk, continues as if never cut."""
    build = lambda rate: jgd.param_groups(
        jgd.adamw(jgd.cosine_decay_schedule(rate, 6)), {"b": jgd.momentum(rate)}
    )

    @jax.jit
    def step(run):
        gradient = jax.tree.map(jnp.cos, run["params"])
        updates, state = run["tx"].update(gradient, run["state"], run["params"])
        return {**run, "params": optax.apply_updates(run["params"], updates), "state": state}

    def start(rate):
        tx = build(rate)
        return {"tx": tx, "params": PARAMS, "state": tx.init(PARAMS)}

    half = step(step(step(start(0.3))))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave(half))
    with ocp.CheckpointManager(tmp_path) as manager:  # a new process does not know the rate
        template = jax.eval_shape(lambda: step(start(0.0)))
        restored = manager.restore(3, args=ocp.args.StandardRestore(template))
    assert restored["tx"] == half["tx"] == jax.tree.map(jnp.float32, build(0.3))
    chex.assert_trees_all_equal(step(step(restored)), step(step(half)))


# --- a pretrained model ----------------------------------------------------------------------


NORM = {"scale": jnp.ones(4), "bias": jnp.ones(4)}
DENSE = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
LAYER = {
    "attention": {"self": {"query": DENSE, "key": DENSE, "value": DENSE}, "output": DENSE},
    "output": {"dense": DENSE, "LayerNorm": NORM},
}
PRETRAINED = {  # as in a FlaxPreTrainedModel: dicts, with numbered layers
    "embeddings": {"word_embeddings": {"embedding": jnp.ones((9, 4))}, "LayerNorm": NORM},
    "encoder": {"layer": {"0": LAYER, "1": LAYER}},
    "pooler": {"dense": DENSE},
}


@pytest.mark.slow
def test_weight_decay_of_a_pretrained_model():
    """Globs over paths exclude biases and LayerNorm from the decay, as a mask does in optax."""
    no_decay = jgd.adamw(1e-2, weight_decay=0.0)
    ours = jgd.param_groups(
        jgd.adamw(1e-2, weight_decay=0.1), {"*/LayerNorm/*": no_decay, "*/bias": no_decay}
    )

    def decays(params):
        paths = traverse_util.flatten_dict(params)
        mask = {path: path[-1] != "bias" and "LayerNorm" not in path for path in paths}
        return traverse_util.unflatten_dict(mask)

    masked = jgd.adamw(1e-2, weight_decay=0.1, mask=decays)
    theirs = optax.adamw(1e-2, weight_decay=0.1, mask=decays)
    together = jax.jit(lambda *txs: [_updates(tx, PRETRAINED) for tx in (*txs, theirs)])
    *actual, expected = together(ours, masked)
    for updates in actual:
        chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)
    query = expected[0]["encoder"]["layer"]["0"]["attention"]["self"]["query"]
    np.testing.assert_allclose(query["kernel"][0] - query["bias"], -1e-2 * 0.1, rtol=1e-3)


# --- a transformer scanned over its layers -----------------------------------------------------

LAYERS, DIM, TOKENS = 3, 16, 11
MATRICES = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # axis 0 is a batch


def _transformer(key):
    keys = iter(jax.random.split(key, 5))
    stack = lambda *shape: jax.random.normal(next(keys), (LAYERS, *shape)) / np.sqrt(shape[0])
    mixing = {"qkv": stack(DIM, 3 * DIM), "out": stack(DIM, DIM)}
    mlp = {"up": stack(DIM, 2 * DIM), "down": stack(2 * DIM, DIM)}
    embed = jax.random.normal(next(keys), (TOKENS, DIM))
    return {"embed": embed, "layers": {**mixing, **mlp, "scale": jnp.ones((LAYERS, DIM))}}


def _next_token_loss(params, tokens):
    normalize = lambda x: x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    def layer(x, p):
        q, k, v = jnp.split((normalize(x) * p["scale"] @ p["qkv"])[:, :, None], 3, axis=-1)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed[:, :, 0] @ p["out"]
        return x + jax.nn.gelu(normalize(x) @ p["up"]) @ p["down"], None

    x, _ = jax.lax.scan(layer, params["embed"][tokens[:, :-1]], params["layers"])
    logits = normalize(x) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def _matrices(params):
    return jax.tree.map(lambda p: MATRICES if p.ndim == 3 else None, params)


SCANNED = {
    "adamw": jgd.adamw(1e-2),
    "muon": jgd.muon(2e-2, muon_weight_dimension_numbers=_matrices),
    "lamb": jgd.param_groups(jgd.adamw(1e-2), {"layers/*": jgd.per_layer(jgd.lamb(3e-2))}),
}


@pytest.mark.slow
@pytest.mark.parametrize("tx", SCANNED.values(), ids=SCANNED)
def test_scanned_transformer(tx):
    """Stacked layers train: Muon with the axes of its matrices, LAMB with `per_layer`."""
    starts = jax.random.randint(jax.random.key(1), (16, 1), 0, TOKENS)
    tokens = (starts + 3 * jnp.arange(9)) % TOKENS  # counting in threes

    @jax.jit
    def train(tx, params):
        def step(carry, _):
            params, state = carry
            loss, gradient = jax.value_and_grad(_next_token_loss)(params, tokens)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, tx.init(params)), None, length=40)[1]

    losses = train(tx, _transformer(jax.random.key(0)))
    assert losses[-1] < 0.2 < 2.0 < losses[0]


@pytest.mark.slow
def test_rules_on_stacked_layers():
    """Elementwise rules ignore the stack; LAMB treats it as one layer, Muon not as matrices."""
    w = jax.random.normal(jax.random.key(0), (LAYERS, 4, 4))
    params = {"w": w * jnp.arange(1, 4)[:, None, None]}
    apart = {str(k): params["w"][k] for k in range(LAYERS)}

    def agrees(stacked, alone):
        together = _updates(stacked, params)[-1]["w"]
        expected = jnp.stack([*_updates(alone, apart)[-1].values()])
        return np.allclose(together, expected, rtol=1e-4, atol=1e-6)

    adamw, lamb, muon = jgd.adamw(0.1), jgd.lamb(0.1), jgd.muon(0.1)
    with_axes = jgd.muon(0.1, muon_weight_dimension_numbers=_matrices)
    assert agrees(adamw, adamw)
    assert not agrees(lamb, lamb)
    assert not agrees(muon, muon)
    assert agrees(jgd.per_layer(lamb), lamb)
    assert agrees(with_axes, muon)
    assert jax.tree.leaves(jgd.per_layer(lamb)) == jax.tree.leaves(lamb)


# --- several devices ---------------------------------------------------------------------------

PROGRAM = """
import os
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np, optax, jgd
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((8,), ("data",))
params = {"w": jax.random.normal(jax.random.key(0), (16, 4)), "b": jnp.ones(8)}
words = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")

def updated(tx, spread):
    state = jax.jit(tx.init)(params)
    like = optax.tree_map_params(tx, lambda _: P("data"), state, transform_non_params=lambda _: P())
    update = lambda tx, g, state, p: tx.update(g, state, p)
    specs = (P(), P("data"), like, P("data"))
    if spread == "shard_map":
        update = jax.shard_map(update, mesh=mesh, in_specs=specs, out_specs=(P("data"), like))
    held = jax.tree.map(lambda x: NamedSharding(mesh, P("data")), params)
    rest = jax.tree.map(lambda x: NamedSharding(mesh, x), like, is_leaf=lambda x: isinstance(x, P))
    placed, state = jax.device_put(params, held), jax.device_put(state, rest)
    program = jax.jit(update, out_shardings=(held, rest)).lower(tx, placed, state, placed).compile()
    updates, state = program(tx, placed, state, placed)
    accumulators = [x for x in jax.tree.leaves(state) if x.ndim]
    assert accumulators
    assert all(x.addressable_shards[0].data.size == x.size // 8 for x in accumulators)
    alone, _ = tx.update(params, tx.init(params), params)
    same = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5), updates, alone)
    return any(word in program.as_text() for word in words), all(same.values())

talks, same = zip(*(updated(tx, "shard_map") for tx in (
    jgd.adamw(jgd.cosine_decay_schedule(0.1, 9)), jgd.lion(0.1), jgd.adan(0.1),
)))
print("elementwise in shard_map:", any(talks), all(same))
print("lamb in shard_map:", *updated(jgd.lamb(0.1), "shard_map"))
print("lamb in jit:", *updated(jgd.lamb(0.1), "jit"))
"""


@pytest.mark.slow
def test_shard_map():
    """With states sharded like the parameters, updates equal those of one device.

    Elementwise rules do not communicate. A rule with norms, such as LAMB, treats each shard as a
    layer in `shard_map`, but not under `jit`.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines() == [
        "elementwise in shard_map: False True",
        "lamb in shard_map: False False",
        "lamb in jit: True True",
    ], done.stderr[-3000:]


# --- reinforcement learning ----------------------------------------------------------------------


PLACES = 6  # a corridor; the reward is at its right end, which ends the episode


def _start(key):
    return jax.random.randint(key, (), 0, PLACES - 1)


def _move(key, place, action):
    place = jnp.clip(place + 2 * action - 1, 0, PLACES - 1)
    arrived = place == PLACES - 1
    return jnp.where(arrived, _start(key), place), arrived.astype(float)


def make_train(config):
    """Return a train function as in PureJaxRL, except that the optimizer is an argument."""
    actors, discount = config["actors"], config["discount"]

    def train(tx, key):
        def act(carry, _):
            params, places, key = carry
            key, choose, move = jax.random.split(key, 3)
            actions = jax.random.categorical(choose, params["logits"][places])
            after, rewards = jax.vmap(_move)(jax.random.split(move, actors), places, actions)
            return (params, after, key), (places, actions, rewards)

        def loss(params, transitions, last):
            places, actions, rewards = transitions
            back = lambda later, now: (now + discount * (1 - now) * later,) * 2
            _, returns = jax.lax.scan(back, params["values"][last], rewards, reverse=True)
            advantage = jax.lax.stop_gradient(returns) - params["values"][places]
            log_p = jax.nn.log_softmax(params["logits"])[places, actions]
            return jnp.mean(advantage**2 / 2 - jax.lax.stop_gradient(advantage) * log_p)

        def update(carry, _):
            state, places, key = carry
            start = (state.params, places, key)
            (_, places, key), transitions = jax.lax.scan(act, start, None, config["horizon"])
            state = state.apply_gradients(grads=jax.grad(loss)(state.params, transitions, places))
            return (state, places, key), transitions[2].mean()

        params = {"logits": jnp.zeros((PLACES, 2)), "values": jnp.zeros(PLACES)}
        state = SweptState.create(apply_fn=None, params=params, tx=tx)
        key, start = jax.random.split(key)
        places = jax.vmap(_start)(jax.random.split(start, actors))
        (state, *_), rewards = jax.lax.scan(update, (state, places, key), None, config["updates"])
        return state.params, rewards

    return train


@pytest.mark.slow
def test_reinforcement_learning_in_lanes():
    """All rates and seeds run in one program; the best rate learns, the smallest hardly."""
    train = make_train(dict(actors=8, horizon=16, updates=60, discount=0.9))
    rates, keys = jnp.array([1e-4, 1e-1]), jax.random.split(jax.random.key(0), 3)
    chex.clear_trace_counter()
    once = chex.assert_max_traces(train, n=1)
    both = jax.jit(jax.vmap(jax.vmap(once, (None, 0)), (0, None)))
    params, rewards = both(jax.vmap(jgd.adam)(rates), keys)
    both(jax.vmap(jgd.adam)(rates / 2), keys)
    first, last = rewards[..., :5].mean((1, 2)), rewards[..., -5:].mean((1, 2))
    assert last[1] > 2.5 * first[1]
    assert last[0] < 1.5 * first[0]
    assert (params["logits"][1, :, :-1].argmax(-1) == 1).all()  # to the right, everywhere
    alone, _ = jax.jit(train)(jgd.adam(0.1), keys[2])
    chex.assert_trees_all_close(jgd.lane(jgd.lane(params, 1), 2), alone, rtol=1e-3, atol=1e-3)
