"""Combinators: a shared accumulator equals separate ones; `named` refuses invalid records."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jgd
import jgd.compat.keras as jk
import jgd.compat.torch as jt
from jgd.combinators import ScheduledDecayState
from jgd.compat.shared import correct, scale_by_uncorrected_adam
from jgd.optimizers.adaptive import rectified
from jgd.rules import difference, per_leaf
from jgd.transforms import MovingAverageState, RunningSumState, accumulator

B1, B2, B3, EPS, RATE = 0.8, 0.95, 0.99, 1e-3, 0.1
PARAMS = {"matrix": jnp.linspace(-1, 2, 9).reshape(3, 3), "vector": jnp.linspace(1, 2, 4)}
MOVING = jgd.linear_schedule(0.5, 0.95, 8)


def _gradients(steps=10):
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)), p.dtype)
    return jax.tree.map(draw, PARAMS)


# --- shared accumulators -------------------------------------------------------------------------


class _Counted(NamedTuple):
    count: jax.Array


def _look_ahead(decay, rest):
    average = jgd.chain(
        jgd.moving_average(decay), jgd.bias_correction(decay, ahead=True), jgd.scale(decay)
    )
    return jgd.add(average, jgd.chain(jgd.bias_correction(decay), jgd.scale(rest)))


def _mean_square(*between):
    return jgd.chain(jgd.square(), jgd.moving_average(B2), *between)


def _decay_of_soap():
    def decay(g, p, t):
        return (g - jnp.where(t == 1, 0, RATE * 0.01) * (p + g),)

    return per_leaf(decay, _Counted)


def _toward(g, v, decay):
    return v - (1 - decay) * jnp.sign(v - g) * g


def _stddev():
    corrected = [jgd.moving_average(B2), jgd.bias_correction(B2)]
    return jgd.subtract(jgd.chain(jgd.square(), *corrected), jgd.chain(*corrected, jgd.square()))


def _pairs():
    """Return, for each factory that shares accumulators, its recipe and a version without sharing.

    The states of the second are plain tuples: each transformation has its own accumulator.
    """
    ema, rms, root, square = jgd.ema(B1), jgd.rms(B2, EPS), jgd.root(EPS), jgd.square()
    divide, chain, identity = jgd.divide, jgd.chain, jgd.identity()
    descent = jgd.scale_by_learning_rate(RATE)
    change, scale = difference(), jgd.scale(B2)
    adan = divide(
        jgd.add(ema, chain(change, jgd.ema(B2), scale)),
        chain(jgd.add(identity, chain(change, scale)), jgd.rms(B3, EPS)),
    )
    surprise = jgd.subtract(identity, jgd.moving_average(B1))
    belief = chain(surprise, _mean_square(jgd.bias_correction(B2), root))
    start = 1e-6
    yogi = divide(
        chain(jgd.moving_average(B1, start), jgd.bias_correction(B1)),
        chain(
            square,
            accumulator(MovingAverageState, _toward, B2, name="nu", start=start),
            jgd.bias_correction(B2),
            root,
        ),
    )
    soap = dict(b1=B1, b2=B2, eps=EPS, precondition_frequency=3)
    slow = chain(jgd.moving_average(B3), jgd.scale(5.0))
    variance = rectified(B2, 5.0, of="nu")
    uncorrected = [correct(B1, power=-1), correct(B2, power=0.5)]
    largest = jgd.running_max()
    rest = lambda step: 1 - MOVING(step)
    return {
        "nesterov_ema": (jgd.nesterov_ema(B1), _look_ahead(B1, 1 - B1)),
        "nesterov_ema moving": (jgd.nesterov_ema(MOVING), _look_ahead(MOVING, rest)),
        "scale_by_adam": (jgd.scale_by_adam(B1, B2, EPS), divide(ema, rms)),
        "scale_by_adam nesterov": (
            jgd.scale_by_adam(B1, B2, EPS, nesterov=True),
            divide(_look_ahead(B1, 1 - B1), rms),
        ),
        "scale_by_adam moving": (
            jgd.scale_by_adam(MOVING, MOVING, EPS),
            divide(jgd.ema(MOVING), jgd.rms(MOVING, EPS)),
        ),
        "scale_by_amsgrad": (
            jgd.scale_by_amsgrad(B1, B2, EPS),
            divide(ema, chain(square, jgd.ema(B2), largest, root)),
        ),
        "scale_by_radam": (jgd.scale_by_radam(B1, B2, EPS), divide(ema, chain(rms, variance))),
        "scale_by_radam moving": (
            jgd.scale_by_radam(B1, MOVING, EPS),
            divide(ema, chain(jgd.rms(MOVING, EPS), rectified(MOVING, 5.0, of="nu"))),
        ),
        "scale_by_belief": (jgd.scale_by_belief(B1, B2, EPS, 0.0), divide(ema, belief)),
        "scale_by_yogi": (jgd.scale_by_yogi(B1, B2, EPS), yogi),
        "scale_by_adan": (jgd.scale_by_adan(B1, B2, B3, EPS), adan),
        "scale_by_ademamix": (
            jgd.scale_by_ademamix(B1, B2, B3, 5.0, EPS),
            divide(jgd.add(ema, slow), rms),
        ),
        "scale_by_laprop": (jgd.scale_by_laprop(B1, B2, EPS), chain(divide(identity, rms), ema)),
        "scale_by_stddev": (
            jgd.scale_by_stddev(B2, EPS, bias_correction=True),
            divide(identity, chain(_stddev(), jgd.root(eps_root=EPS))),
        ),
        "soap": (
            jgd.soap(RATE, **soap),
            chain(jgd.scale_by_soap(**soap), jgd.scale(-RATE), _decay_of_soap()),
        ),
        "scale_by_uncorrected_adam": (
            scale_by_uncorrected_adam(B1, B2, EPS),
            chain(divide(jgd.moving_average(B1), _mean_square(root)), *uncorrected),
        ),
        "scale_by_uncorrected_adam amsgrad": (
            scale_by_uncorrected_adam(B1, B2, EPS, amsgrad=True),
            chain(divide(jgd.moving_average(B1), _mean_square(largest, root)), *uncorrected),
        ),
        "_adam of torch": (
            jt.adam(RATE, (B1, B2), EPS),
            chain(divide(ema, _mean_square(jgd.bias_correction(B2), root)), descent),
        ),
        "_adam of torch, amsgrad": (
            jt.adam(RATE, (B1, B2), EPS, amsgrad=True),
            chain(divide(ema, _mean_square(largest, jgd.bias_correction(B2), root)), descent),
        ),
        "radam of torch": (
            jt.radam(RATE, (B1, B2), EPS),
            chain(
                divide(ema, _mean_square(root, correct(B2, power=-0.5), variance)),
                descent,
            ),
        ),
        "lamb of keras": (
            jk.lamb(RATE, B1, B2, EPS),
            chain(divide(ema, rms), jgd.scale_by_trust_ratio(), descent),
        ),
    }


def _shares(node):
    if not isinstance(node, ast.Call) or getattr(node.func, "id", None) != "named":
        return False
    return any(keyword.arg == "shared" for keyword in node.keywords)


def test_every_declared_sharing_has_a_case():
    sources = [path.read_text() for path in Path(jgd.__file__).parent.rglob("*.py")]
    trees = [ast.parse(source) for source in sources if "shared=" in source]
    functions = [f for tree in trees for f in tree.body if isinstance(f, ast.FunctionDef)]
    declared = {f.name for f in functions if any(map(_shares, ast.walk(f)))}
    assert declared == {label.split()[0] for label in _pairs()}


def test_a_shared_accumulator_equals_separate_accumulators():
    """Ten steps with random gradients are equal with and without sharing."""
    gradients = _gradients()

    @jax.jit
    def run(txs):
        def step(states, gradient):
            both = {name: tx.update(gradient, states[name], PARAMS) for name, tx in txs.items()}
            return {name: s for name, (_, s) in both.items()}, {n: u for n, (u, _) in both.items()}

        start = {name: tx.init(PARAMS) for name, tx in txs.items()}
        return jax.lax.scan(step, start, gradients)[1]

    pairs = _pairs()
    ours = run({name: recipe for name, (recipe, _) in pairs.items()})
    apart = run({name: composition for name, (_, composition) in pairs.items()})
    chex.assert_trees_all_close(ours, apart, rtol=2e-6, atol=2e-7)
    for updates in ours.values():
        assert all(jnp.all(u[1:] != 0) for u in jax.tree.leaves(updates))


def test_a_shared_accumulator_is_stepped_once():
    calls = []

    def accumulate(g, total):
        calls.append(1)
        return total + g

    total = lambda: accumulator(RunningSumState, accumulate, name="total")
    both = jgd.divide(total(), jgd.chain(total(), jgd.square()))
    tx = jgd.named(both, record=RunningSumState, shared=["total"])
    ones = jnp.full(2, 2.0)
    updates, state = tx.update(ones, tx.init(ones))
    assert len(calls) == 1
    chex.assert_trees_all_equal(updates, jnp.full(2, 0.5))
    chex.assert_trees_all_equal(state, RunningSumState(ones))
    both.update(ones, both.init(ones))
    assert len(calls) == 3  # without `named`, each transformation has its own accumulator


def _integer_additions(tx):
    """Return the number of integer additions in an update."""

    def count(jaxpr):
        nested = getattr(jax.extend.core, "jaxprs_in_params", None) or jax.core.jaxprs_in_params
        inner = [j for eqn in jaxpr.eqns for j in nested(eqn.params)]
        own = [eqn.outvars[0].aval.dtype for eqn in jaxpr.eqns if eqn.primitive.name == "add"]
        return sum(jnp.issubdtype(kind, jnp.integer) for kind in own) + sum(map(count, inner))

    return count(jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS)).jaxpr)


def test_a_shared_count_is_counted_once():
    apart = jgd.divide(jgd.ema(B1), jgd.rms(B2))
    assert (_integer_additions(jgd.scale_by_adam()), _integer_additions(apart)) == (1, 2)
    # the power t + 1 of the look-ahead is one more addition
    apart = _look_ahead(B1, 1 - B1)
    assert (_integer_additions(jgd.nesterov_ema(B1)), _integer_additions(apart)) == (2, 3)


# --- what `named` refuses --------------------------------------------------------------------


def _adams_quotient(mean="mu", square="nu"):
    return jgd.divide(jgd.ema(B1, name=mean), jgd.rms(B2, name=square))


REFUSED = {
    "twice": (
        lambda: jgd.named(_adams_quotient("mu", "mu"), record=optax.EmaState, shared=["count"]),
        "named: accumulators must have different names, got mu more than once.* shared=['mu']",
    ),
    "not declared": (
        lambda: jgd.named(_adams_quotient(), record=optax.ScaleByAdamState),
        "named: accumulators must have different names, got count more than once.*"
        " shared=['count']",
    ),
    "field without accumulator": (
        lambda: jgd.named(jgd.ema(B1, name="mu"), record=optax.ScaleByAdamState),
        "named: the fields of ScaleByAdamState must be the accumulators ['count', 'mu'], got"
        " ['count', 'mu', 'nu']",
    ),
    "accumulator without field": (
        lambda: jgd.named(_adams_quotient(), record=optax.EmaState, shared=["count"]),
        "named: the fields of EmaState must be the accumulators ['count', 'mu', 'nu'], got"
        " ['count', 'ema']",
    ),
    "misspelt": (
        lambda: jgd.named(
            _adams_quotient("nu", "mv"), record=optax.ScaleByAdamState, shared=["count"]
        ),
        "named: the fields of ScaleByAdamState must be the accumulators ['count', 'mv', 'nu'], got"
        " ['count', 'mu', 'nu']",
    ),
    "no record": (
        lambda: jgd.named(jgd.ema(B1), record=dict),
        "named: the fields of dict must be the accumulators ['count', 'ema'], got []",
    ),
    "unknown field": (
        lambda: jgd.named(jgd.ema(B1), record=optax.EmaState, fields={"emma": "ema"}),
        "named: fields must name fields of EmaState, got ['emma']",
    ),
    "one accumulator in two fields": (
        lambda: jgd.named(
            jgd.ema(B1, name="mu"), record=optax.ScaleByAdamState, fields={"nu": "mu"}
        ),
        "named: the fields of ScaleByAdamState must be the accumulators ['count', 'mu'], got"
        " ['count', 'mu', 'mu']",
    ),
    "foreign": (
        lambda: jgd.named(jgd.chain(jgd.ema(B1), optax.scale(2.0)), record=optax.EmaState),
        "named: inner must be composed of transformations of jgd without schedules, got ",
    ),
    "foreign in parallel": (
        lambda: jgd.named(jgd.divide(jgd.ema(B1), optax.scale(2.0)), record=optax.EmaState),
        "named: inner must be composed of transformations of jgd without schedules, got ",
    ),
    "scheduled": (
        lambda: jgd.named(jgd.ema(MOVING), record=optax.EmaState),
        "named: inner must be composed of transformations of jgd without schedules, got"
        " ema(decay=linear_schedule(",
    ),
    "scheduled link": (
        lambda: jgd.named(jgd.chain(jgd.ema(B1), jgd.scale(MOVING)), record=optax.EmaState),
        "named: inner must be composed of transformations of jgd without schedules, got ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_named_refuses(case):
    build, message = REFUSED[case]
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    with pytest.raises(ValueError, match="^" + pattern) as error:
        build()
    assert "\n" not in str(error.value)


class _Backwards(NamedTuple):
    nu: optax.Updates
    mu: optax.Updates
    count: jax.Array


def test_fields_follow_names_and_not_order():
    """A field holds the accumulator of its name, for any order of fields and of links."""
    gradients = _gradients(2)
    first, second = jgd.lane(gradients, 0), jgd.lane(gradients, 1)
    mean = lambda b, x, y: b * (1 - b) * x + (1 - b) * y
    mu = jax.tree.map(lambda x, y: mean(B1, x, y), first, second)
    nu = jax.tree.map(lambda x, y: mean(B2, x**2, y**2), first, second)
    quotient = jgd.divide(jgd.ema(B1, name="mu"), jgd.rms(B2, name="nu"))
    inverse = jgd.divide(jgd.rms(B2, name="nu"), jgd.ema(B1, name="mu"))
    for inner in (quotient, inverse):
        for record in (optax.ScaleByAdamState, _Backwards):
            tx = jgd.named(inner, record=record, shared=["count"])
            _, state = tx.update(first, tx.init(PARAMS))
            _, state = tx.update(second, state)
            assert type(state) is record
            chex.assert_trees_all_close((state.mu, state.nu), (mu, nu), rtol=1e-5)
            chex.assert_trees_all_equal(state.count, jnp.int32(2))
    # exchanged names exchange the fields
    swapped = jgd.named(
        _adams_quotient("nu", "mu"), record=optax.ScaleByAdamState, shared=["count"]
    )
    _, state = swapped.update(first, swapped.init(PARAMS))
    _, state = swapped.update(second, state)
    chex.assert_trees_all_close((state.nu, state.mu), (mu, nu), rtol=1e-5)


# --- scheduled decays ------------------------------------------------------------------------


def test_the_state_of_a_scheduled_decay_has_the_mean_of_its_logarithms():
    gradients, tx = _gradients(6), jgd.scale_by_adam(B1, MOVING, EPS)
    step, state = jax.jit(tx.update), tx.init(PARAMS)
    straight, states = [], []
    for index in range(6):
        inner = state.inner
        assert isinstance(inner, ScheduledDecayState)
        assert isinstance(inner.inner, optax.ScaleByAdamState)
        assert inner.logs.keys() == {"log_mu", "log_nu"}
        chex.assert_shape(list(inner.logs.values()), ())
        chex.assert_type(list(inner.logs.values()), jnp.float32)
        if index:
            decays = np.asarray(MOVING(np.arange(index)), np.float64)
            logs = {"log_mu": np.log(B1), "log_nu": np.log(decays).mean()}
            chex.assert_trees_all_close(inner.logs, jax.tree.map(jnp.float32, logs), rtol=1e-6)
        states.append(jax.tree.map(jnp.copy, state))
        updates, state = step(jgd.lane(gradients, index), state)
        straight.append(updates)
    state = states[3]
    for index in range(3, 6):
        updates, state = step(jgd.lane(gradients, index), state)
        chex.assert_trees_all_equal(updates, straight[index])


def test_a_state_without_the_logarithms_is_refused():
    """A state of a constant decay cannot continue under a schedule, nor the reverse."""
    constant, moving = jgd.ema(B1), jgd.ema(MOVING)
    with pytest.raises(ValueError, match=r"ema: expected .*, got optax.*EmaState"):
        moving.update(PARAMS, constant.init(PARAMS))
    with pytest.raises(ValueError, match=r"ema: expected a state of type .*EmaState, got jgd"):
        constant.update(PARAMS, moving.init(PARAMS))
