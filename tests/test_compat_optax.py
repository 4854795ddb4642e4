"""jgd continues trainings of optax and of jgd 0.1, and optax those of jgd."""

from pathlib import Path
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from table import ROWS, Row, losses, noisy_gradients, parameters

import jgd
from jgd.compat.optax import state_from, to_optax
from jgd.pytree import ScheduledState, SteppedState

SHAPES = {"vector": (5,), "matrix": (4, 3)}
OLD = Path(__file__).parent / "data" / "states_of_jgd_0_1.msgpack"
# Optimizers whose states always need a conversion: optax does not export their class.
CONVERTED = {"rmsprop(eps_in_sqrt=False, bias_correction=True)", "schedule_free_adamw"}
# Optimizers that take no schedule in optax.
NO_SCHEDULE = {"sm3", "schedule_free_adamw"}


def _shared() -> list[Row]:
    """Return the first row of each optimizer of optax, and all rows if flags change its state."""
    with_flags = {"sgd", "rmsprop", "adafactor"}
    rows: list[Row] = []
    for row in ROWS:
        new = row.name in with_flags or row.name not in {other.name for other in rows}
        if row.peer is not None and row.peer32 < 5e-3 and new:  # else optax is wrong
            rows.append(row)
    return rows


def _pair(row: Row, scheduled: bool) -> tuple[Any, Any]:
    """Return the optimizers of jgd and of optax, with a scheduled learning rate if asked for."""
    if not scheduled:
        return row.ours(**row.arguments), row.peer(**row.arguments)
    rate = "scaling" if row.name == "polyak_sgd" else row.rate
    peak = row.arguments.get(rate, 1.0)
    schedule = lambda lib: {**row.arguments, rate: lib.linear_schedule(peak, peak / 10, 20)}
    return row.ours(**schedule(jgd)), row.peer(**schedule(optax))


def _as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


GRADIENTS = [_as_float32(gradient) for gradient in noisy_gradients(10, SHAPES)]
LOSSES = losses(10)


def _train(tx: Any, state: Any, params: Any, steps: range) -> tuple[list[Any], Any, Any]:
    """Return the updates of some steps, and the state and parameters after them."""
    tx = optax.with_extra_args_support(tx)
    updates: list[Any] = []
    for i in steps:
        update, state = tx.update(GRADIENTS[i], state, params, value=LOSSES[i])
        params = optax.apply_updates(params, update)
        updates.append(update)
    return updates, state, params


def _raw(state: Any) -> Any:
    """Return a state as flax restores it from a file, without named tuples."""
    return flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))


def _assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected))
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=tolerance * largest)


CASES = [
    pytest.param(
        row,
        scheduled,
        id=f"{row.label}{' scheduled' * scheduled}",
        marks=[pytest.mark.slow] * (scheduled and row.name not in ("sgd", "adam")),
    )
    for row in _shared()
    for scheduled in (False, True)
    if not (scheduled and row.name in NO_SCHEDULE)
]


@pytest.mark.parametrize(("row", "scheduled"), CASES)
def test_training_continues_from_optax_to_jgd_and_back(row: Row, scheduled: bool) -> None:
    """Five steps of optax, three of jgd and two of optax equal ten steps of optax."""
    ours, theirs = _pair(row, scheduled)
    params = _as_float32(parameters(SHAPES))
    _, optax_state, moved = _train(theirs, theirs.init(params), params, range(5))
    expected, _, _ = _train(theirs, optax_state, moved, range(5, 10))

    jgd_state = state_from(optax_state, ours)
    chex.assert_trees_all_equal_structs(jgd_state, ours.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(jgd_state, ours.init(params))
    if row.name != "noisy_sgd":  # flax cannot write random keys
        chex.assert_trees_all_equal(state_from(_raw(optax_state), ours), jgd_state)
    if _agree(row, scheduled):
        chex.assert_trees_all_equal(optax_state, jgd_state)
        if row.name != "noisy_sgd":
            file = flax.serialization.to_bytes(optax_state)
            restored = flax.serialization.from_bytes(ours.init(params), file)
            chex.assert_trees_all_equal_structs(restored, optax_state)

    updates, jgd_state, moved = _train(ours, jgd_state, moved, range(5, 8))
    back = to_optax(jgd_state, theirs)
    chex.assert_trees_all_equal_structs(back, optax_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, optax_state)
    if row.name != "noisy_sgd":
        chex.assert_trees_all_equal(to_optax(_raw(jgd_state), theirs), back)
    rest, _, _ = _train(theirs, back, moved, range(8, 10))
    _assert_close(updates + rest, expected, max(row.peer32, 2e-5))


def _agree(row: Row, scheduled: bool) -> bool:
    return not scheduled and row.name not in CONVERTED and row.label not in CONVERTED


def test_states_that_need_no_conversion() -> None:
    params = _as_float32(parameters(SHAPES))
    for row in _shared():
        for scheduled in (False,) if row.name in NO_SCHEDULE else (False, True):
            jgd_state, optax_state = (
                jax.eval_shape(tx.init, params) for tx in _pair(row, scheduled)
            )
            same = jax.tree.structure(jgd_state) == jax.tree.structure(optax_state)
            assert same == _agree(row, scheduled), (row.label, scheduled)


# --- checkpoints of orbax --------------------------------------------------------------------


def _row(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


@pytest.mark.parametrize(
    ("checkpointer", "name", "scheduled"),
    [
        (ocp.StandardCheckpointer, "adam", False),
        (ocp.StandardCheckpointer, "adamw", True),
        (ocp.StandardCheckpointer, "noisy_sgd", True),
        (ocp.PyTreeCheckpointer, "muon", True),
        (ocp.PyTreeCheckpointer, "schedule_free_adamw", False),
    ],
)
def test_orbax(checkpointer: Any, name: str, scheduled: bool, tmp_path: Path) -> None:
    ours, theirs = _pair(_row(name), scheduled)
    params = _as_float32(parameters(SHAPES))
    _, optax_state, _ = _train(theirs, theirs.init(params), params, range(2))
    _, jgd_state, _ = _train(ours, state_from(optax_state, ours), params, range(1))
    with checkpointer() as saver:
        saver.save(tmp_path / "optax_state", optax_state)
        saver.save(tmp_path / "jgd_state", jgd_state)
    with checkpointer() as saver:
        chex.assert_trees_all_equal(
            state_from(saver.restore(tmp_path / "optax_state"), ours), state_from(optax_state, ours)
        )
        chex.assert_trees_all_equal(
            to_optax(saver.restore(tmp_path / "jgd_state"), theirs), to_optax(jgd_state, theirs)
        )


def test_orbax_with_the_template_of_jgd(tmp_path: Path) -> None:
    """This includes classes that optax does not export, since their fields have the same names."""
    params = _as_float32(parameters(SHAPES))
    arguments = dict(decay=0.9, bias_correction=True)
    ours, theirs = jgd.rmsprop(1e-2, **arguments), optax.rmsprop(1e-2, **arguments)
    _, optax_state, moved = _train(theirs, theirs.init(params), params, range(2))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "optax_state", optax_state)
        saver.wait_until_finished()
        jgd_state = saver.restore(tmp_path / "optax_state", ours.init(params))
    updates, _, _ = _train(ours, jgd_state, moved, range(2, 4))
    _assert_close(updates, _train(theirs, optax_state, moved, range(2, 4))[0], 2e-5)


# --- states of jgd 0.1 -----------------------------------------------------------------------

OF_0_1 = {
    "adam": lambda: jgd.adam(0.01),
    "adam_scheduled_decay": lambda: jgd.adam(0.01, b1=jgd.linear_schedule(0.5, 0.9, 8)),
    "adamw_scheduled": lambda: jgd.adamw(jgd.linear_schedule(0.01, 0.001, 8), weight_decay=0.1),
    "rmsprop_momentum": lambda: jgd.rmsprop(0.01, momentum=0.9),
    "lamb": lambda: jgd.lamb(0.01),
    "muon": lambda: jgd.muon(0.01),
    "soap": lambda: jgd.soap(0.01, precondition_frequency=3),
    "radam": lambda: jgd.radam(0.01, b2=0.9),
    "ademamix": lambda: jgd.ademamix(0.01),
}


def _as_orbax(node: Any) -> Any:
    """Return a state of flax as orbax restores it: lists for tuples, None for empty nodes."""
    if not isinstance(node, dict):
        return node
    if node and all(key.isdigit() for key in node):
        return [_as_orbax(node[key]) for key in sorted(node, key=int)]
    return {key: _as_orbax(value) for key, value in node.items()} or None


@pytest.mark.parametrize("name", OF_0_1)
def test_states_of_0_1(name: str) -> None:
    """A file of jgd 0.1 has its states after 5 steps, as flax writes them, and 4 more updates."""
    old = flax.serialization.msgpack_restore(OLD.read_bytes())
    case, tx = old["cases"][name], OF_0_1[name]()
    state, params = state_from(case["state"], tx), case["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    chex.assert_trees_all_equal(state_from(_as_orbax(case["state"]), tx), state)
    chex.assert_trees_all_equal(state_from(case["state"], tx, params), state)
    updates: list[Any] = []
    for i in range(5, 9):
        gradient = jax.tree.map(lambda x, i=i: x[i], old["gradients"])
        update, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, update)
        updates.append(update)
    _assert_close(jax.tree.map(lambda *xs: jnp.stack(xs), *updates), case["updates"], 2e-5)


# --- other forms -----------------------------------------------------------------------------


def _adam_states() -> tuple[Any, Any, Any]:
    params = _as_float32(parameters(SHAPES))
    theirs = optax.adam(optax.linear_schedule(0.1, 0.01, 20))
    return _train(theirs, theirs.init(params), params, range(5))


def test_injected_hyperparams() -> None:
    params = _as_float32(parameters(SHAPES))
    theirs = optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.01, 20))
    ours = jgd.adam(jgd.linear_schedule(0.1, 0.01, 20))
    _, optax_state, moved = _train(theirs, theirs.init(params), params, range(5))
    expected, _, _ = _train(theirs, optax_state, moved, range(5, 10))
    updates, jgd_state, moved = _train(ours, state_from(optax_state, ours), moved, range(5, 8))
    rest, _, _ = _train(theirs, to_optax(jgd_state, theirs), moved, range(8, 10))
    _assert_close(updates + rest, expected, 2e-5)


def test_missing_logarithms_of_scheduled_decays_are_computed() -> None:
    params = _as_float32(parameters(SHAPES))
    _, optax_state, _ = _train(optax.nadam(0.1), optax.nadam(0.1).init(params), params, range(5))
    ours = jgd.nadam(0.1, b1=jgd.linear_schedule(0.5, 0.9, 8))
    _, expected, _ = _train(ours, ours.init(params), params, range(5))
    jgd_state = state_from(optax_state, ours)
    chex.assert_trees_all_equal_structs(jgd_state, expected)
    chex.assert_trees_all_close(jgd_state.inner[0].logs, expected.inner[0].logs, rtol=1e-6)
    chex.assert_trees_all_equal(state_from(_raw(expected), ours), expected)


def test_lookahead_keeps_the_slow_parameters_in_its_pair() -> None:
    fast = _as_float32(parameters(SHAPES))
    params = optax.LookaheadParams(fast, fast)
    ours = jgd.lookahead(jgd.adam(jgd.linear_schedule(0.1, 0.01, 20)), 3, 0.5)
    theirs = optax.lookahead(optax.adam(optax.linear_schedule(0.1, 0.01, 20)), 3, 0.5)
    optax_state = theirs.init(params)
    chex.assert_trees_all_equal(state_from(_raw(optax_state), ours, params), ours.init(params))
    chex.assert_trees_all_equal(to_optax(ours.init(params), theirs, params), optax_state)
    with pytest.raises(jgd.TreeError, match=r"expected LookaheadState of slow, steps_since_sync"):
        state_from(optax_state, ours)


@pytest.mark.parametrize("name", ["acprop", "cocob", "momo", "optimistic_gradient_descent"])
def test_lifted_optimizers_have_the_states_of_optax(name: str) -> None:
    params = _as_float32(parameters(SHAPES))
    peer = getattr(optax, name, None) or getattr(optax.contrib, name)
    ours, theirs = getattr(jgd, name)(0.1), peer(0.1)
    chex.assert_trees_all_equal(ours.init(params), theirs.init(params))
    scheduled = getattr(jgd, name)(jgd.linear_schedule(0.1, 0.01, 20))
    _, optax_state, _ = _train(theirs, theirs.init(params), params, range(2))
    if optax.tree.get_all_with_path(optax_state, "count"):
        jgd_state = state_from(_raw(optax_state), scheduled)
        chex.assert_trees_all_equal(jgd_state, SteppedState(jnp.asarray(2), optax_state))


def test_parameters_in_lists_and_tuples() -> None:
    params = {"a": [jnp.ones(3), (jnp.ones([2, 2]), None)]}
    mask = {"a": [True, (False, None)]}
    ours = jgd.muon(jgd.linear_schedule(0.1, 0.01, 20), weight_decay=0.1, weight_decay_mask=mask)
    theirs = optax.contrib.muon(
        optax.linear_schedule(0.1, 0.01, 20), weight_decay=0.1, weight_decay_mask=mask
    )
    optax_state = theirs.init(params)
    chex.assert_trees_all_equal(state_from(optax_state, ours), ours.init(params))
    chex.assert_trees_all_equal(state_from(_raw(optax_state), ours, params), ours.init(params))


def test_dtypes_are_those_of_the_optimizer() -> None:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), parameters(SHAPES))
    ours = jgd.adam(jgd.linear_schedule(0.1, 0.01, 20))
    theirs = optax.adam(optax.linear_schedule(0.1, 0.01, 20))
    jgd_state, optax_state = ours.init(params), theirs.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state_from(optax_state, ours), jgd_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(to_optax(jgd_state, theirs, params), optax_state)
    assert to_optax(jgd_state, theirs)[0].mu["vector"].dtype == jnp.float32


def test_groups_wrappers_and_lanes() -> None:
    params = _as_float32(parameters(SHAPES))
    rate = jgd.linear_schedule(0.1, 0.01, 20)
    for tx in (
        jgd.param_groups(jgd.adamw(rate), {"vector": jgd.sgd(0.1, 0.9)}),
        jgd.accumulate(jgd.average_params(jgd.adafactor(rate)), 3),
    ):
        _, state, _ = _train(tx, tx.init(params), params, range(4))
        chex.assert_trees_all_equal(state_from(_raw(state), tx, params), state)
        chex.assert_trees_all_equal(state_from(_as_orbax(_raw(state)), tx), state)
    lanes = jax.vmap(lambda scale: optax.adam(0.1).init(optax.tree.scale(scale, params)))
    optax_state = lanes(jnp.ones(3))
    jgd_state = jax.vmap(lambda state: state_from(state, jgd.adam(rate)))(optax_state)
    chex.assert_trees_all_equal(jgd_state.inner, optax_state)
    chex.assert_shape(jgd_state.step, (3,))


# --- errors ----------------------------------------------------------------------------------


def test_errors_of_the_optimizers_name_state_from() -> None:
    _, optax_state, params = _adam_states()
    for tx in (jgd.adam(0.1), jgd.adam(jgd.linear_schedule(0.1, 0.01, 20))):
        with pytest.raises(jgd.TreeError, match=r"jgd\.compat\.optax\.state_from\(state, tx\)"):
            tx.update(GRADIENTS[5], optax_state, params)
        tx.update(GRADIENTS[5], jgd.compat.optax.state_from(optax_state, tx), params)


def test_a_schedule_replaces_a_constant_number() -> None:
    """Adam's state has a count; for a state without one the error says what to do."""
    params = _as_float32(parameters(SHAPES))
    rate = jgd.linear_schedule(0.1, 0.01, 20)
    _, optax_state, _ = _train(optax.adam(0.1), optax.adam(0.1).init(params), params, range(5))
    chex.assert_trees_all_equal(state_from(optax_state, jgd.adam(rate)).step, jnp.asarray(5))
    optax_state = optax.sgd(0.1, 0.9).init(params)
    with pytest.raises(jgd.TreeError, match=r"jgd\.pytree\.ScheduledState\(count, state\)"):
        state_from(optax_state, jgd.sgd(rate, 0.9))
    jgd_state = ScheduledState(jnp.asarray(5), state_from(optax_state, jgd.sgd(0.1, 0.9)))
    _train(jgd.sgd(rate, 0.9), jgd_state, params, range(1))


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (optax.sgd(1.0), jgd.sgd(1.0, 0.9), "expected TraceState of trace"),
        (optax.sgd(1.0, 0.9), jgd.sgd(1.0), "trace, but the state of tx does not"),
        (optax.sgd(1.0), jgd.sgd(jgd.linear_schedule(1.0, 0.1, 9)), "needs a count of the steps"),
        (optax.adabelief(1.0), jgd.adam(1.0), "expected ScaleByAdamState of count, mu, nu, got"),
        (optax.adan(1.0), jgd.adan(1.0), "expected ScaleByAdanState of count, g, m, n, v, got"),
        (optax.novograd(1.0), jgd.signum(1.0), "expected EmaState of count, ema, got"),
    ],
)
def test_states_of_other_optimizers_are_refused(theirs: Any, ours: Any, message: str) -> None:
    state = theirs.init(_as_float32(parameters(SHAPES)))
    for refused in (state, _raw(state)) if "Belief" not in repr(state) else (state,):
        with pytest.raises(jgd.TreeError, match=rf"^state_from: .*{message}"):
            state_from(refused, ours)


def test_parameters_of_another_shape_are_refused() -> None:
    _, optax_state, _ = _adam_states()
    params = _as_float32(parameters(SHAPES))
    ours = jgd.adam(jgd.linear_schedule(0.1, 0.01, 20))
    with pytest.raises(jgd.TreeError, match=r"mu\[vector\] must have shape \(3,\), got \(5,\)"):
        state_from(optax_state, ours, {**params, "vector": jnp.ones(3)})
    with pytest.raises(jgd.TreeError, match=r"mu of the state has a leaf at \[vector\]"):
        state_from(optax_state, ours, {"matrix": params["matrix"]})
    odd = optax_state[0]._replace(nu=jax.tree.map(lambda x: x + 0j, optax_state[0].nu))
    with pytest.raises(jgd.TreeError, match=r"nu\[matrix\] must be real, got complex64"):
        state_from((odd, optax_state[1]), ours, params)
    counters = [optax.ScaleByScheduleState(np.int32(n)) for n in (2, 5)]
    with pytest.raises(jgd.TreeError, match=r"the counts of the state must agree, got \[2, 5\]"):
        state_from((optax_state[0], *counters), ours)
    with pytest.raises(jgd.TreeError, match="expected a state of tuples, lists and dicts, got int"):
        state_from(3, ours)
    galore = optax.contrib.galore(0.1, rank=2).init({"w": jnp.ones([4, 4])})
    with pytest.raises(
        jgd.TreeError, match=r"pass the parameters: state_from\(state, tx, params\)"
    ):
        state_from(galore, jgd.galore(0.1, rank=2))
    state_from(galore, jgd.galore(0.1, rank=2), {"w": jnp.ones([4, 4])})
