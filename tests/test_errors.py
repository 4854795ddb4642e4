"""Errors about arguments are one line, name the function and the argument, and say what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training import line_task

import jgd
import jgd.compat.torch as jt

PARAMS = {"w": jnp.ones(3), "b": {"c": jnp.zeros(())}}
ADAM = jgd.adam(0.1)
HIDDEN = optax.chain(optax.clip(1.0), ADAM)
KEY = jax.random.key(0)


def _on_device(value):
    return jnp.asarray(value).block_until_ready()


NUMBERS = {
    "NaN": (lambda: jgd.adam(np.nan), "adam: learning_rate must be a finite number, got nan"),
    "infinity": (
        lambda: jgd.adam(learning_rate=np.inf),
        "adam: learning_rate must be a finite number, got inf",
    ),
    "NaN of a lifted factory": (
        lambda: jgd.as_pytree(optax.lion)(0.1, b1=np.nan),
        "lion: b1 must be a number, got nan",
    ),
    "an array": (
        lambda: jgd.adam(0.1, b1=np.array([0.9, 1.2])),
        "adam: b1 must be in [0, 1), got 1.2 at index 1",
    ),
    "an array of two axes": (
        lambda: jgd.adam(0.1, eps=np.array([[1.0, 2.0], [-1.0, 3.0]])),
        "adam: eps must be at least 0, got -1.0 at index 1, 0",
    ),
    "an array on a device": (
        lambda: jgd.adam(0.1, b1=_on_device([0.9, 1.2])),
        "adam: b1 must be in [0, 1), got 1.2 at index 1",
    ),
    "a scalar on a device": (
        lambda: jgd.adam(_on_device(np.nan)),
        "adam: learning_rate must be a finite number, got nan",
    ),
    "a pair": (
        lambda: jgd.prodigy(0.1, betas=(1.2, 0.9)),
        "prodigy: betas must be two numbers in [0, 1), got (1.2, 0.9)",
    ),
    "a pair on a device": (
        lambda: jgd.prodigy(0.1, betas=(_on_device(1.2), 0.9)),
        "prodigy: betas must be two numbers in [0, 1), got (1.2, 0.9)",
    ),
    "several numbers on a device": (
        lambda: jgd.piecewise_constant(_on_device([20.0, 10.0]), [1.0, 0.1, 0.01]),
        "piecewise_constant: boundaries must be in rising order, got [20.0, 10.0]",
    ),
    "a number in _replace": (
        lambda: ADAM._replace(b1=2.0),
        "adam: b1 must be in [0, 1), got 2.0",
    ),
}
KINDS = {
    "an abbreviation": (
        lambda: jgd.adam(lr=0.1),
        "adam: got an unexpected keyword argument 'lr'; did you mean learning_rate?",
    ),
    "initials": (
        lambda: jgd.adamw(0.1, wd=0.1),
        "adamw: got an unexpected keyword argument 'wd'; did you mean weight_decay?",
    ),
    "another framework's name": (
        lambda: jgd.adam(0.1, epsilon=0.1),
        "adam: got an unexpected keyword argument 'epsilon'; did you mean eps?",
    ),
    "a name without a close match": (
        lambda: jgd.adam(0.1, zzz=0.1),
        "adam: got an unexpected keyword argument 'zzz'",
    ),
    "an abbreviation in _replace": (
        lambda: ADAM._replace(lr=0.1),
        "adam has no argument lr; did you mean learning_rate?",
    ),
    "a schedule that was not called": (
        lambda: jgd.adam(jgd.cosine_decay_schedule),
        "adam: learning_rate must be a number or a schedule, got the function"
        " cosine_decay_schedule. Call it: cosine_decay_schedule(...)",
    ),
    "a schedule of optax that was not called": (
        lambda: jgd.adam(optax.linear_schedule),
        "adam: learning_rate must be a number or a schedule, got the function linear_schedule."
        " Call it: linear_schedule(...)",
    ),
    "a schedule of torch that was not called": (
        lambda: jgd.sgd(jt.multi_step_lr),
        "sgd: learning_rate must be a number or a schedule, got the function multi_step_lr."
        " Call it: multi_step_lr(...)",
    ),
    "a schedule in a pair that was not called": (
        lambda: jgd.prodigy(betas=(jgd.exponential_decay, 0.9)),
        "prodigy: betas must be a number or a schedule, got the function exponential_decay."
        " Call it: exponential_decay(...)",
    ),
    "a factory as a rate": (
        lambda: jgd.adam(optax.sgd),
        "adam: learning_rate must be a number or a schedule, got the function sgd",
    ),
    "an optimizer as a rate": (
        lambda: jgd.adam(optax.sgd(0.1)),
        "adam: learning_rate must be a number or a schedule, got <chain>",
    ),
    "a factory as a link": (
        lambda: jgd.chain(jgd.adam),
        "chain: links must be a transformation, got the function adam. Call it: adam(...)",
    ),
    "nesterov without momentum": (
        lambda: jgd.sgd(0.1, nesterov=True),
        "sgd: momentum must be a number where nesterov is True, got None",
    ),
    "nesterov of rmsprop": (
        lambda: jgd.rmsprop(0.1, nesterov=True),
        "rmsprop: momentum must be a number where nesterov is True, got None",
    ),
    "nesterov by _replace": (
        lambda: jgd.sgd(0.1, 0.9, True)._replace(momentum=None),
        "sgd: momentum must be a number where nesterov is True, got None",
    ),
    "lanes without vmap": (
        lambda: jgd.adam(jnp.ones(2)).init(PARAMS),
        "adam: learning_rate must be a scalar, got shape (2,). Map over a batch of settings with"
        " jax.vmap",
    ),
}
HINT = (
    ", which hides its numbers in functions. Lift a factory of optax with jgd.as_pytree, as in"
    " jgd.as_pytree(optax.lion)(1e-4), and use jgd.chain in place of optax.chain"
)
HIDES = "a setting must be a pytree of numbers, got <chain>" + HINT
FUNCTIONS = {
    "stack": (lambda: jgd.stack([HIDDEN, HIDDEN]), f"stack: {HIDES}"),
    "lane": (lambda: jgd.lane(HIDDEN, 0), f"lane: {HIDES}"),
    "train": (lambda: jgd.train(line_task(), HIDDEN, 5, KEY), f"train: {HIDES}"),
    "train a dict": (lambda: jgd.train(line_task(), {"tx": HIDDEN}, 5, KEY), f"train: {HIDES}"),
    "sweep": (lambda: jgd.sweep(line_task(), {"a": HIDDEN}, 5), f"sweep: {HIDES}"),
    "grid": (lambda: jgd.grid(optax.adam, learning_rate=[0.1, 0.2]), f"adam: {HIDES}"),
    "a bare function": (
        lambda: jgd.stack([{"rate": jnp.sin}]),
        f"stack: a setting must be a pytree of numbers, got the function sin{HINT}",
    ),
}
ALL = NUMBERS | KINDS | FUNCTIONS


def _message(call, kind=(TypeError, ValueError)):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_the_message_in_the_call(name):
    call, message = ALL[name]
    assert _message(call) == message


def test_a_schedule_may_have_no_module():
    """A function that `exec` defines in its own namespace has no module."""
    names = {}
    exec("def fall(step): return 0.1 - 0.01 * step", names)
    assert names["fall"].__module__ is None
    assert jgd.sgd(names["fall"]).learning_rate is names["fall"]


def test_arrays_on_a_device_are_checked_without_waiting(monkeypatch):
    """They are checked only if their values are ready, and only in the user's call."""
    bad = _on_device(1.5)
    monkeypatch.setattr(type(bad), "is_ready", lambda self: False)
    assert jgd.adam(0.1, b1=bad).b1 == 1.5
    monkeypatch.undo()

    @jgd.as_pytree
    def wrapped(rate, b1=0.9):
        return jgd.adam(rate, b1=b1)

    jax.jit(lambda tx: tx.init(PARAMS))(wrapped(0.1, 1.5))
    wrapped(0.1, 1.5).init(PARAMS)
    jax.vmap(lambda b1: jgd.adam(0.1, b1=b1))(_on_device([1.5]))


LEAVES = {
    "a string": ("x", "str"),
    "a key": (KEY, "key<fry>"),
    "a function": (np.sin, "ufunc"),
    "an array of strings": (np.array(["x"]), "<U1"),
}


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_that_are_not_arrays_are_named(name):
    leaf, shown = LEAVES[name]
    bad = {"w": jnp.ones(3), "b": {"c": leaf}}
    tx = jgd.adamw(0.1)
    message = f"adamw: expected an array at ['b']['c'], got {shown}"
    state = tx.init(PARAMS)
    for call in (
        lambda: tx.init(bad),
        lambda: tx.update(bad, state, PARAMS),
        lambda: tx.update(PARAMS, state, bad),
        lambda: jgd.as_pytree(optax.adamw)(0.1).init(bad),
    ):
        assert _message(call, jgd.TreeError) == message
    outer = message.replace("adamw", "chain")
    assert _message(lambda: jgd.chain(tx).init(bad), jgd.TreeError) == outer


# --- traced numbers in closures --------------------------------------------------------------

IN_CLOSURES = {
    "clip": (optax.clip, "<clip>"),
    "adamw": (optax.adamw, "<chain>"),
    "wrappers": (lambda r: optax.chain(optax.masked(optax.adamw(r), True)), "<chain>"),
    "a schedule": (lambda r: optax.sgd(optax.linear_schedule(r, 0.0, 3)), "<chain>"),
    "an optimizer of jgd": (lambda r: optax.chain(jgd.adam(r)), "<chain>"),
}
LINKED = {
    "chain: links": lambda link: jgd.chain(optax.clip(1.0), link),
    "accumulate: inner": lambda link: jgd.accumulate(link, 2),
    "param_groups: groups['w']": lambda link: jgd.param_groups(ADAM, {"w": link}),
}


@pytest.mark.parametrize("transform", [jax.vmap, jax.jit])
@pytest.mark.parametrize("where", LINKED)
@pytest.mark.parametrize("name", IN_CLOSURES)
def test_traced_numbers_in_closures_are_refused(name, where, transform):
    """They would leak out of the transformation, and fail in another place."""
    make, shown = IN_CLOSURES[name]
    message = (
        f"{where} must not hold traced numbers in closures, got {shown}. Lift its factory with"
        " jgd.as_pytree, so that its numbers are leaves"
    )
    build = transform(lambda rate: LINKED[where](make(rate)))
    assert _message(lambda: build(jnp.array([0.1, 0.2])), TypeError) == message


def test_inside_the_body_of_a_factory_closures_may_hold_traced_numbers():
    """They do not leak, since they live only as long as the pair."""

    @jgd.as_pytree
    def decayed(rate, decay=0.1):
        return jgd.chain(optax.add_decayed_weights(decay), jgd.sgd(rate))

    update = lambda tx: tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]["w"]
    lanes = jax.vmap(decayed)(jnp.array([0.1, 0.2]), jnp.array([0.1, 0.5]))
    np.testing.assert_allclose(jax.vmap(update)(lanes)[:, 0], [-0.11, -0.3], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(update)(decayed(0.1))[0], -0.11, rtol=1e-6)


# --- numbers that a lifted factory branches on -----------------------------------------------


@jgd.as_pytree
def in_the_body(rate, power=0.5, decay=0.1):
    return jgd.sgd(rate) if power > 0.1 else jgd.adam(rate)


@jgd.as_pytree
def in_the_update(rate, power=0.5, decay=0.1):
    sign = lambda x: -rate * x if power > 0.1 else rate * x
    return optax.stateless(lambda updates, params: jax.tree.map(sign, updates))


@jgd.as_pytree
def by_an_integer(rate, power=3, decay=0.1):
    return optax.stateless(lambda updates, params: [updates] * int(power))


@jgd.as_pytree
def as_a_pair(rate, power=0.5, decay=0.1):
    return (lambda params: ()), (lambda g, s, p=None: (g if power > 0.1 else None, s))


@jgd.as_pytree
def as_a_schedule(rate, power=2.0):
    return lambda step: rate * step if power > 1 else rate


@pytest.mark.parametrize("factory", [in_the_body, in_the_update, by_an_integer, as_a_pair])
def test_numbers_that_are_branched_on_are_named(factory):
    name = factory.__name__
    message = (
        f"{name}: power must be structure, since the factory needs the value in Python, got a"
        f" traced number. Lift it with jgd.as_pytree({name}, structure=['power'])"
    )
    update = lambda tx: tx.update(PARAMS, tx.init(PARAMS))[0]
    closed_over = factory(0.1)
    for call in (
        lambda: jax.jit(update)(factory(0.1)),
        lambda: jax.jit(lambda: update(closed_over))(),
        lambda: jax.vmap(update)(jgd.stack([factory(0.1), factory(0.2)])),
        lambda: jax.vmap(lambda rate: update(factory(rate, power=rate)))(jnp.ones(2)),
    ):
        assert _message(call, TypeError) == message
    fixed = jgd.as_pytree(factory.__wrapped__, structure=["power"])
    assert jax.tree.leaves(fixed(0.1)) == [0.1, 0.1]
    jax.jit(update)(fixed(0.1))


def test_numbers_that_a_schedule_branches_on_are_named():
    message = "as_a_schedule: power must be structure, since the factory needs the value in Python"
    schedule = as_a_schedule(0.1)
    assert message in _message(lambda: jax.jit(lambda s: s(3))(schedule))
    assert message in _message(lambda: jax.vmap(lambda p: as_a_schedule(0.1, p)(3))(jnp.ones(2)))


def test_other_errors_of_traced_values_do_not_change():
    """The factory branches on a gradient, which no argument of `as_pytree` can fix."""

    @jgd.as_pytree
    def gated(rate):
        gate = lambda x: -rate * x if x.sum() > 0 else x
        return optax.stateless(lambda updates, params: jax.tree.map(gate, updates))

    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda tx: tx.update(PARAMS, tx.init(PARAMS)))(gated(0.1))
