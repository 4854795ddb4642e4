"""Trainings of optax and of jgd 0.1 continue under jgd, and those of jgd under optax."""

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
# The states of all others agree where no number follows a schedule.
CONVERTED = {
    "rmsprop(eps_in_sqrt=False, bias_correction=True)",  # a class that optax does not export
    "schedule_free_adamw",  # the same class
}
# optax takes no schedule there.
NO_SCHEDULE = {"sm3", "schedule_free_adamw"}


def _shared() -> list[Row]:
    """Return a row for each optimizer of optax, and those whose flags change the state."""
    with_flags = {"sgd", "rmsprop", "adafactor"}
    rows: list[Row] = []
    for row in ROWS:
        new = row.name in with_flags or row.name not in {other.name for other in rows}
        if row.peer is not None and row.peer32 < 5e-3 and new:  # further, and optax is wrong itself
            rows.append(row)
    return rows


def _pair(row: Row, scheduled: bool) -> tuple[Any, Any]:
    """Return the optimizers of jgd and of optax, with a learning rate that follows a schedule."""
    if not scheduled:
        return row.ours(**row.arguments), row.peer(**row.arguments)
    rate = "scaling" if row.name == "polyak_sgd" else row.rate
    peak = row.arguments.get(rate, 1.0)
    schedule = lambda of: {**row.arguments, rate: of.linear_schedule(peak, peak / 10, 20)}
    return row.ours(**schedule(jgd)), row.peer(**schedule(optax))


def _single(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


GRADIENTS = [_single(gradient) for gradient in noisy_gradients(10, SHAPES)]
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
    """Return a state as it comes back from a file of flax, without named tuples."""
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
def test_five_steps_there_three_here_two_there(row: Row, scheduled: bool) -> None:
    ours, theirs = _pair(row, scheduled)
    params = _single(parameters(SHAPES))
    _, there, moved = _train(theirs, theirs.init(params), params, range(5))
    expected, _, _ = _train(theirs, there, moved, range(5, 10))

    here = state_from(there, ours)
    chex.assert_trees_all_equal_structs(here, ours.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(here, ours.init(params))
    if row.name != "noisy_sgd":  # flax writes no random keys
        chex.assert_trees_all_equal(state_from(_raw(there), ours), here)
    if _agree(row, scheduled):
        chex.assert_trees_all_equal(there, here)
        if row.name != "noisy_sgd":
            file = flax.serialization.to_bytes(there)
            restored = flax.serialization.from_bytes(ours.init(params), file)
            chex.assert_trees_all_equal_structs(restored, there)

    updates, here, moved = _train(ours, here, moved, range(5, 8))
    back = to_optax(here, theirs)
    chex.assert_trees_all_equal_structs(back, there)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, there)
    if row.name != "noisy_sgd":
        chex.assert_trees_all_equal(to_optax(_raw(here), theirs), back)
    rest, _, _ = _train(theirs, back, moved, range(8, 10))
    _assert_close(updates + rest, expected, max(row.peer32, 2e-5))


def _agree(row: Row, scheduled: bool) -> bool:
    return not scheduled and row.name not in CONVERTED and row.label not in CONVERTED


def test_which_states_agree_without_a_call() -> None:
    params = _single(parameters(SHAPES))
    for row in _shared():
        for scheduled in (False,) if row.name in NO_SCHEDULE else (False, True):
            here, there = (jax.eval_shape(tx.init, params) for tx in _pair(row, scheduled))
            same = jax.tree.structure(here) == jax.tree.structure(there)
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
    params = _single(parameters(SHAPES))
    _, there, _ = _train(theirs, theirs.init(params), params, range(2))
    _, here, _ = _train(ours, state_from(there, ours), params, range(1))
    with checkpointer() as saver:
        saver.save(tmp_path / "there", there)
        saver.save(tmp_path / "here", here)
    with checkpointer() as saver:
        chex.assert_trees_all_equal(
            state_from(saver.restore(tmp_path / "there"), ours), state_from(there, ours)
        )
        chex.assert_trees_all_equal(
            to_optax(saver.restore(tmp_path / "here"), theirs), to_optax(here, theirs)
        )


def test_orbax_with_the_template_of_jgd(tmp_path: Path) -> None:
    """Also where optax does not export its class: the names of the fields are the same."""
    params = _single(parameters(SHAPES))
    arguments = dict(decay=0.9, bias_correction=True)
    ours, theirs = jgd.rmsprop(1e-2, **arguments), optax.rmsprop(1e-2, **arguments)
    _, there, moved = _train(theirs, theirs.init(params), params, range(2))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "there", there)
        saver.wait_until_finished()
        here = saver.restore(tmp_path / "there", ours.init(params))
    updates, _, _ = _train(ours, here, moved, range(2, 4))
    _assert_close(updates, _train(theirs, there, moved, range(2, 4))[0], 2e-5)


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
    """Return a state of flax as orbax restores it: lists for tuples, None for what is empty."""
    if not isinstance(node, dict):
        return node
    if node and all(key.isdigit() for key in node):
        return [_as_orbax(node[key]) for key in sorted(node, key=int)]
    return {key: _as_orbax(value) for key, value in node.items()} or None


@pytest.mark.parametrize("name", OF_0_1)
def test_states_of_0_1(name: str) -> None:
    """The file was written by jgd 0.1: states after 5 steps, as flax keeps them, and 4 updates."""
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
    params = _single(parameters(SHAPES))
    theirs = optax.adam(optax.linear_schedule(0.1, 0.01, 20))
    return _train(theirs, theirs.init(params), params, range(5))


def test_injected_hyperparams() -> None:
    params = _single(parameters(SHAPES))
    theirs = optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.01, 20))
    ours = jgd.adam(jgd.linear_schedule(0.1, 0.01, 20))
    _, there, moved = _train(theirs, theirs.init(params), params, range(5))
    expected, _, _ = _train(theirs, there, moved, range(5, 10))
    updates, here, moved = _train(ours, state_from(there, ours), moved, range(5, 8))
    rest, _, _ = _train(theirs, to_optax(here, theirs), moved, range(8, 10))
    _assert_close(updates + rest, expected, 2e-5)


def test_logarithms_of_scheduled_decays_are_those_after_as_many_steps() -> None:
    params = _single(parameters(SHAPES))
    _, there, _ = _train(optax.nadam(0.1), optax.nadam(0.1).init(params), params, range(5))
    ours = jgd.nadam(0.1, b1=jgd.linear_schedule(0.5, 0.9, 8))
    _, expected, _ = _train(ours, ours.init(params), params, range(5))
    here = state_from(there, ours)
    chex.assert_trees_all_equal_structs(here, expected)
    chex.assert_trees_all_close(here.inner[0].logs, expected.inner[0].logs, rtol=1e-6)
    chex.assert_trees_all_equal(state_from(_raw(expected), ours), expected)


def test_lookahead_keeps_the_slow_parameters_in_its_pair() -> None:
    fast = _single(parameters(SHAPES))
    params = optax.LookaheadParams(fast, fast)
    ours = jgd.lookahead(jgd.adam(jgd.linear_schedule(0.1, 0.01, 20)), 3, 0.5)
    theirs = optax.lookahead(optax.adam(optax.linear_schedule(0.1, 0.01, 20)), 3, 0.5)
    there = theirs.init(params)
    chex.assert_trees_all_equal(state_from(_raw(there), ours, params), ours.init(params))
    chex.assert_trees_all_equal(to_optax(ours.init(params), theirs, params), there)
    with pytest.raises(jgd.TreeError, match=r"expected LookaheadState of slow, steps_since_sync"):
        state_from(there, ours)


@pytest.mark.parametrize("name", ["acprop", "cocob", "momo", "optimistic_gradient_descent"])
def test_lifted_optimizers_have_the_states_of_optax(name: str) -> None:
    params = _single(parameters(SHAPES))
    peer = getattr(optax, name, None) or getattr(optax.contrib, name)
    ours, theirs = getattr(jgd, name)(0.1), peer(0.1)
    chex.assert_trees_all_equal(ours.init(params), theirs.init(params))
    scheduled = getattr(jgd, name)(jgd.linear_schedule(0.1, 0.01, 20))
    _, there, _ = _train(theirs, theirs.init(params), params, range(2))
    if optax.tree.get_all_with_path(there, "count"):
        here = state_from(_raw(there), scheduled)
        chex.assert_trees_all_equal(here, SteppedState(jnp.asarray(2), there))


def test_parameters_in_lists_and_tuples() -> None:
    params = {"a": [jnp.ones(3), (jnp.ones([2, 2]), None)]}
    mask = {"a": [True, (False, None)]}
    ours = jgd.muon(jgd.linear_schedule(0.1, 0.01, 20), weight_decay=0.1, weight_decay_mask=mask)
    theirs = optax.contrib.muon(
        optax.linear_schedule(0.1, 0.01, 20), weight_decay=0.1, weight_decay_mask=mask
    )
    there = theirs.init(params)
    chex.assert_trees_all_equal(state_from(there, ours), ours.init(params))
    chex.assert_trees_all_equal(state_from(_raw(there), ours, params), ours.init(params))


def test_dtypes_are_those_of_the_optimizer() -> None:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), parameters(SHAPES))
    ours = jgd.adam(jgd.linear_schedule(0.1, 0.01, 20))
    theirs = optax.adam(optax.linear_schedule(0.1, 0.01, 20))
    here, there = ours.init(params), theirs.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state_from(there, ours), here)
    chex.assert_trees_all_equal_shapes_and_dtypes(to_optax(here, theirs, params), there)
    assert to_optax(here, theirs)[0].mu["vector"].dtype == jnp.float32


def test_groups_wrappers_and_lanes() -> None:
    params = _single(parameters(SHAPES))
    rate = jgd.linear_schedule(0.1, 0.01, 20)
    for tx in (
        jgd.param_groups(jgd.adamw(rate), {"vector": jgd.sgd(0.1, 0.9)}),
        jgd.accumulate(jgd.average_params(jgd.adafactor(rate)), 3),
    ):
        _, state, _ = _train(tx, tx.init(params), params, range(4))
        chex.assert_trees_all_equal(state_from(_raw(state), tx, params), state)
        chex.assert_trees_all_equal(state_from(_as_orbax(_raw(state)), tx), state)
    lanes = jax.vmap(lambda scale: optax.adam(0.1).init(optax.tree.scale(scale, params)))
    there = lanes(jnp.ones(3))
    here = jax.vmap(lambda state: state_from(state, jgd.adam(rate)))(there)
    chex.assert_trees_all_equal(here.inner, there)
    chex.assert_shape(here.step, (3,))


# --- errors ----------------------------------------------------------------------------------


def test_errors_of_the_optimizers_name_a_call_that_helps() -> None:
    _, there, params = _adam_states()
    for tx in (jgd.adam(0.1), jgd.adam(jgd.linear_schedule(0.1, 0.01, 20))):
        with pytest.raises(jgd.TreeError, match=r"jgd\.compat\.optax\.state_from\(state, tx\)"):
            tx.update(GRADIENTS[5], there, params)
        tx.update(GRADIENTS[5], jgd.compat.optax.state_from(there, tx), params)


def test_a_constant_number_gets_a_schedule() -> None:
    """Adam counts its steps itself; for a rule that does not, the error says what to do."""
    params = _single(parameters(SHAPES))
    rate = jgd.linear_schedule(0.1, 0.01, 20)
    _, there, _ = _train(optax.adam(0.1), optax.adam(0.1).init(params), params, range(5))
    chex.assert_trees_all_equal(state_from(there, jgd.adam(rate)).step, jnp.asarray(5))
    there = optax.sgd(0.1, 0.9).init(params)
    with pytest.raises(jgd.TreeError, match=r"jgd\.pytree\.ScheduledState\(count, state\)"):
        state_from(there, jgd.sgd(rate, 0.9))
    here = ScheduledState(jnp.asarray(5), state_from(there, jgd.sgd(0.1, 0.9)))
    _train(jgd.sgd(rate, 0.9), here, params, range(1))


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
    state = theirs.init(_single(parameters(SHAPES)))
    for refused in (state, _raw(state)) if "Belief" not in repr(state) else (state,):
        with pytest.raises(jgd.TreeError, match=rf"^state_from: .*{message}"):
            state_from(refused, ours)


def test_parameters_of_another_shape_are_refused() -> None:
    _, there, _ = _adam_states()
    params = _single(parameters(SHAPES))
    ours = jgd.adam(jgd.linear_schedule(0.1, 0.01, 20))
    with pytest.raises(jgd.TreeError, match=r"mu\[vector\] must have shape \(3,\), got \(5,\)"):
        state_from(there, ours, {**params, "vector": jnp.ones(3)})
    with pytest.raises(jgd.TreeError, match=r"mu of the state has a leaf at \[vector\]"):
        state_from(there, ours, {"matrix": params["matrix"]})
    odd = there[0]._replace(nu=jax.tree.map(lambda x: x + 0j, there[0].nu))
    with pytest.raises(jgd.TreeError, match=r"nu\[matrix\] must be real, got complex64"):
        state_from((odd, there[1]), ours, params)
    counters = [optax.ScaleByScheduleState(np.int32(n)) for n in (2, 5)]
    with pytest.raises(jgd.TreeError, match=r"the counts of the state must agree, got \[2, 5\]"):
        state_from((there[0], *counters), ours)
    with pytest.raises(jgd.TreeError, match="expected a state of tuples, lists and dicts, got int"):
        state_from(3, ours)
    galore = optax.contrib.galore(0.1, rank=2).init({"w": jnp.ones([4, 4])})
    with pytest.raises(
        jgd.TreeError, match=r"pass the parameters: state_from\(state, tx, params\)"
    ):
        state_from(galore, jgd.galore(0.1, rank=2))
    state_from(galore, jgd.galore(0.1, rank=2), {"w": jnp.ones([4, 4])})
