"""Every optimizer updates sharded parameters, on meshes of eight simulated CPU devices.

The tests run `python tests/test_meshes.py KINDS NAME...` in a process with these devices.
"""

import functools
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import cached_environment, release
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from table import ROWS

import jgd

SPECS = {
    "both": ((8, 8), P("data", "model")),
    "tall": ((16, 8), P("data")),
    "vector": ((8,), P("data")),
    "kernel": ((2, 3, 8, 4), P(None, None, "data", "model")),
    "scalar": ((), P()),
}
STACK = {"w": ((3, 8, 4), P(None, "data", "model")), "b": ((3, 8), P(None, "data"))}

# SOAP's bases are arbitrary along an axis that is longer than the gradient's rank
OTHER_ARGUMENTS = {"soap": {"max_precond_dim": 8}}
OPTIMIZERS = {
    row.name: functools.partial(row.ours, **row.arguments, **OTHER_ARGUMENTS.get(row.name, {}))
    for row in reversed(ROWS)
}
OPTIMIZERS |= {name: getattr(jgd, name) for name in ("cocob", "momo", "momo_adam")}
OPTIMIZERS |= {
    name: functools.partial(getattr(jgd, name), 0.01)
    for name in ("acprop", "optimistic_gradient_descent", "simplified_ademamix", "sophia")
}
OPTIMIZERS["optimistic_adam"] = lambda: jgd.optimistic_adam(0.01, 0.02)
OPTIMIZERS["optimistic_adam_v2"] = lambda: jgd.optimistic_adam_v2(0.01)
OPTIMIZERS["galore"] = lambda: jgd.galore(0.01, rank=2, update_proj_gap=2)
WRAPPERS = {
    "chain": lambda: jgd.chain(jgd.clip_by_global_norm(1.0), jgd.adam(0.01)),
    "param_groups": lambda: jgd.param_groups(
        jgd.adamw(0.01), {"b*": jgd.muon(0.01), "[tw]*": jgd.shampoo(0.1)}
    ),
    "accumulate": lambda: jgd.accumulate(jgd.muon(0.01), 2),
    "lookahead": lambda: jgd.lookahead(jgd.adafactor(0.5, 2), 2, 0.5, reset_state=True),
    "average_params": lambda: jgd.average_params(jgd.sm3(0.01)),
    "schedule_free": lambda: jgd.schedule_free(jgd.shampoo(0.5), 0.5),
    "cautious": lambda: jgd.cautious(OPTIMIZERS["soap"]()),
    "scheduled": lambda: jgd.muon(jgd.linear_schedule(0.01, 0.0, 10), preconditioning="spectral"),
}
LAYERED = {
    f"layered {name}": lambda name=name: jgd.per_layer(OPTIMIZERS[name]())
    for name in ("lamb", "muon", "shampoo", "galore")
}
MAKERS = OPTIMIZERS | WRAPPERS | LAYERED
# XLA shards their matrices on an auto mesh, so the second state has another sharding
PLACED_BY_XLA = ("adafactor", "sm3", "shampoo", "soap", "galore", "lookahead", "average_params")
PLACED_BY_XLA += ("schedule_free", "cautious", "param_groups", *LAYERED)


def _specs(name):
    return STACK if name in LAYERED else SPECS


def _draw(name, seed):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=s).astype(np.float32) for k, (s, _) in _specs(name).items()}


def _loss(params):
    return sum(jnp.sum(x * x) for x in jax.tree.leaves(params))


def _programs(names):
    """Return `init` and `update` of all optimizers, one program each."""
    txs = {name: optax.with_extra_args_support(MAKERS[name]()) for name in names}

    def init(params):
        return {name: tx.init(params[name]) for name, tx in txs.items()}

    def update(gradients, states, params):
        updates, after = {}, {}
        for name, tx in txs.items():
            extra = {"value": 1.0, "obj_fn": _loss}
            updates[name], after[name] = tx.update(
                gradients[name], states[name], params[name], **extra
            )
        return updates, after, optax.apply_updates(params, updates)

    return jax.jit(init), jax.jit(update)


def _assert_sharded_like_parameters(states, shardings, exactly):
    """Return the optimizers that have accumulators with the path and the shape of a parameter.

    Assert that such accumulators are sharded like the parameter or, if not `exactly`, into
    shards of at most its size.
    """
    names = set()
    for path, accumulator in jax.tree_util.tree_leaves_with_path(states):
        name, leaf = path[0].key, getattr(path[-1], "key", None)
        shape, _ = _specs(name).get(leaf, (None, None))
        if accumulator.shape == shape:
            names.add(name)
            own, parameter = accumulator.sharding, shardings[name][leaf]
            part = lambda sharding, shape=shape: math.prod(sharding.shard_shape(shape))
            assert part(own) <= part(parameter), (path, own)
            assert not exactly or own.is_equivalent_to(parameter, accumulator.ndim), (path, own)
    return names


def _steps(names):
    return [{name: _draw(name, seed) for name in names} for seed in (1, 2, 3)]


def _unsharded(names):
    init, update = _programs(names)
    params = {name: _draw(name, 0) for name in names}
    states, expected = init(params), []
    for gradients in _steps(names):
        updates, states, params = update(gradients, states, params)
        expected.append(jax.tree.map(np.asarray, updates))
    return expected


def _check(kind, names, expected, calls, compiled):
    """Assert that updates equal `expected` and that only the first `calls` compile."""
    shape, axes = ((8,), ("data",)) if kind == "one" else ((4, 2), ("data", "model"))
    auto = kind == "auto"
    types = (AxisType.Auto if auto else AxisType.Explicit,) * len(axes)
    mesh = jax.make_mesh(shape, axes, axis_types=types)
    known = lambda spec: P(*(axis if axis in axes else None for axis in spec))
    shardings = {
        name: {k: NamedSharding(mesh, known(spec)) for k, (_, spec) in _specs(name).items()}
        for name in names
    }
    init, update = _programs(names)
    with (getattr(jax, "set_mesh", None) or jax.sharding.use_mesh)(mesh):
        params = jax.device_put({name: _draw(name, 0) for name in names}, shardings)
        states = before = init(params)
        accumulators = _assert_sharded_like_parameters(states, shardings, exactly=True)
        assert accumulators >= {"adam", "muon", "soap"}.intersection(names)
        for step, (gradients, truth) in enumerate(zip(_steps(names), expected, strict=True)):
            gradients = jax.device_put(gradients, shardings)
            compiled.clear()
            updates, states, params = update(gradients, states, params)
            assert compiled or step, (
                "expected a compilation event, got none. Was the event renamed?"
            )
            assert not compiled or step < calls, f"compiled again at step {step}"
            for path, u in jax.tree_util.tree_leaves_with_path(updates):
                name, leaf = path[0].key, path[1].key
                assert u.sharding.is_equivalent_to(shardings[name][leaf], u.ndim), (
                    path,
                    u.sharding,
                )
                limit = (1e-4 if auto else 5e-6) * np.abs(truth[name][leaf]).max()
                np.testing.assert_allclose(u, truth[name][leaf], 0, limit, err_msg=str(path))
    _assert_sharded_like_parameters(states, shardings, exactly=not auto)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(states), strict=True)
    assert auto or all(new.sharding.is_equivalent_to(old.sharding, new.ndim) for old, new in pairs)


def _main(kinds, *names):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    for moves in (False, True):
        group = [name for name in names if (name in PLACED_BY_XLA) == moves]
        expected = _unsharded(group)
        for kind in kinds.split(","):
            calls = 2 if moves and kind == "auto" else 1
            _check(kind, group, expected, calls, compiled)
    print("done")


def _run(kinds, *names):
    """Run `_main` in a process with eight devices."""
    environment = {**cached_environment(), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] += (
        " --xla_force_host_platform_device_count=8"
        # on busy cores, eight devices wait for each other; the oldest jaxlib exits at this flag
        + " --xla_cpu_collective_call_terminate_timeout_seconds=300" * (release("jaxlib") >= (0, 8))
    )
    environment["PYTHONPATH"] = str(Path(jgd.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, __file__, kinds, *names], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def test_accumulate_keeps_shardings_without_jit():
    """Types contain the sharding even over an axis of one device."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    with (getattr(jax, "set_mesh", None) or jax.sharding.use_mesh)(mesh):
        params = {"w": jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, P("data")))}
        tx = jgd.accumulate(jgd.adam(0.1), 2)
        state = tx.init(params)
        for expected in (0.0, -0.1):
            updates, state = tx.update(params, state, params)
            np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
            for sharded in (updates["w"], state.average["w"]):
                assert sharded.sharding.is_equivalent_to(params["w"].sharding, 2)


def test_rules_of_matrices_on_an_explicit_and_an_auto_mesh():
    _run("one,auto", "adam", "sm3", "muon", "shampoo", "galore")


@pytest.mark.slow
def test_every_optimizer_on_an_explicit_and_an_auto_mesh():
    _run("explicit,auto", *MAKERS)


if __name__ == "__main__":
    _main(*sys.argv[1:])
