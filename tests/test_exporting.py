"""`jax.export` writes and reads programs that have an optimizer among their arguments."""

import subprocess
import sys
from typing import NamedTuple

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import ROWS

import jgd
import jgd.optimizers
import jgd.stopping
from jgd.exporting import register_states
from jgd.rules import per_leaf

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "b": jnp.ones(2)}


def _step(tx, params, state):
    updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params, value=1.0)
    return tx, optax.apply_updates(params, updates), state


def _momentum(rate):
    return optax.sgd(rate, 0.9)


def _through_(_):
    raise AssertionError("a file must not reach this function")


def _through_a_file(function, *args):
    blob = jax.export.export(jax.jit(function))(*args).serialize()
    return jax.export.deserialize(blob)


class _Counts(NamedTuple):
    count: jax.Array


@jgd.as_pytree
def _decaying(rate, *, flip: bool = False):
    return jgd.chain(
        per_leaf(lambda g, t: (-rate if flip else rate) / t * g, _Counts), optax.trace(0.9)
    )


LIFTED = [name for name in jgd.optimizers.lifted.__all__ if not name.startswith("scale_by_")]
STRUCTURES = [
    *(row.ours(**row.arguments) for row in ROWS),
    *(getattr(jgd, name)(0.1) for name in LIFTED),
    jgd.adam(jgd.cosine_decay_schedule(0.1, 9), b1=jgd.linear_schedule(0.5, 0.9, 4)),
    jgd.adamw(0.1, mask={"w": True, "b": False}),
    jgd.adam(0.1, mu_dtype="bfloat16"),
    jgd.chain(jgd.as_pytree(optax.clip)(1.0), jgd.ema(0.9), jgd.scale(-0.1)),
    jgd.param_groups(jgd.adamw(0.1), {"b": jgd.set_to_zero()}),
    jgd.lookahead(jgd.accumulate(jgd.cautious(jgd.lion(0.1)), 2), 3, 0.5),
    jgd.adam(jgd.join_schedules([jgd.constant_schedule(1.0), jgd.linear_schedule(1, 0, 9)], [5])),
    jgd.as_pytree(optax.adafactor, structure=["min_dim_size_to_factor"])(0.1),
    _decaying(0.1, flip=True),
]


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
def test_the_structure_of_every_optimizer_and_of_its_state_is_read_back():
    arguments = [(tx, jax.eval_shape(tx.init, PARAMS)) for tx in STRUCTURES]
    arguments.append((jgd.stopping.early_stopping(patience=3), jgd.linear_schedule(1.0, 0.0, 9)))
    program = _through_a_file(lambda *pairs: pairs, *arguments)
    expected = jax.tree.structure((tuple(arguments), {}))
    assert program.in_tree == expected
    assert program.out_tree == jax.tree.structure(tuple(arguments))


def test_a_step_is_the_same_program_for_another_learning_rate():
    build = lambda rate: jgd.adamw(jgd.cosine_decay_schedule(rate, 9), mask={"w": True, "b": False})
    chex.clear_trace_counter()
    once = chex.assert_max_traces(_step, n=1)
    tx, state = build(0.1), build(0.1).init(PARAMS)
    program = _through_a_file(once, tx, PARAMS, state)
    for tx in (build(0.1), build(0.3)):
        same, params, after = program.call(tx, PARAMS, state)
        assert same == jax.tree.map(jnp.float32, tx)
        chex.assert_trees_all_close((params, after), _step(tx, PARAMS, state)[1:], rtol=1e-5)


PROGRAM = """
import sys, jax, jax.numpy as jnp, numpy as np, jgd
tx = jgd.ftrl(float(sys.argv[2]))
params = {"w": jnp.ones(3)}
state = tx.init(params)
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
print(*program.call(tx, params, state)[1]["w"].tolist())
"""


@pytest.mark.slow
def test_another_process_reads_the_file(tmp_path):
    params = {"w": jnp.ones(3)}
    tx, other = jgd.ftrl(0.1), jgd.ftrl(0.5)
    exported = jax.export.export(jax.jit(_step))(tx, params, tx.init(params))
    (tmp_path / "step").write_bytes(exported.serialize())
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "step"), "0.5"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    expected = _step(other, params, other.init(params))[1]["w"]
    np.testing.assert_allclose([*map(float, done.stdout.split())], expected, err_msg=done.stderr)


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (jgd.adamw(0.1, mask=lambda p: p), "^adamw: mask must be .* got the function <lambda>"),
        (jgd.adam(lambda step: 0.1), "^adam: learning_rate must be .* got the function <lambda>"),
        (jgd.chain(optax.clip(1.0)), "^chain: links must be made by a factory of jgd .*<clip>"),
        (jgd.noisy_sgd(0.1, key=jax.random.key(0)), "^noisy_sgd: key must be .* got Array"),
    ],
)
def test_structure_that_is_not_plain_is_named(tx, message):
    with pytest.raises(TypeError, match=message) as raised:
        _through_a_file(lambda tx: 1.0, tx)
    assert "\n" not in str(raised.value)


def test_a_file_names_only_factories_that_are_decorated():
    """Reading a file imports nothing and finds only factories decorated with `as_pytree`."""
    tx = jgd.as_pytree(_momentum)(0.1)
    blob = jax.export.export(jax.jit(lambda tx: 1.0))(tx).serialize()
    assert jax.export.deserialize(blob).in_tree == jax.tree.structure(((tx,), {}))
    assert blob.count(b"exporting._momentum") == 1
    for other in (b"exporting._another_", b"exporting._through_"):  # missing, and undecorated
        forged = bytearray(blob.replace(b"exporting._momentum", other))
        with pytest.raises(ValueError, match=f"{other.decode()}, which is not registered"):
            jax.export.deserialize(forged)


def test_a_state_class_that_is_already_registered_keeps_its_name():
    class Mine(NamedTuple):
        x: jax.Array

    jax.export.register_namedtuple_serialization(Mine, serialized_name="mine")
    register_states({"a": [Mine(jnp.ones(2))]})
    blob = jax.export.export(jax.jit(lambda x: x))(Mine(jnp.ones(2))).serialize()
    assert b"mine" in blob
