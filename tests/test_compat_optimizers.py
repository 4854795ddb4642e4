"""jgd's optimizers of Keras and PyTorch equal the originals in float64, over 200 steps."""

import inspect

import frameworks
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch
from frameworks import PULL, distance, jgd_path, keras_path, problem, torch_path

import jgd
import jgd.compat.keras as jk
import jgd.compat.keras.optimizers
import jgd.compat.textbook
import jgd.compat.torch as jt
import jgd.compat.torch.optimizers

pytestmark = pytest.mark.usefixtures("float64")

CLASSES = {
    "schedule_free_adamw": "ScheduleFreeAdamW",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "adamw": "AdamW",
    "sgd": "SGD",
}
CLIPS = ["clipnorm", "clipvalue", "global_clipnorm"]
MATRICES = {"tall": (9, 4), "wide": (4, 9), "square": (6, 6)}


def of_keras(name):
    return getattr(keras.optimizers, name.capitalize() if name == "nadam" else _class(name))


def of_torch(name):
    return getattr(torch.optim, _class(name))


def _class(name):
    return CLASSES.get(name, name.capitalize())


# Keras's learning rate is float32, so that paths differ by 6e-8 of their length. The tolerance is
# 2e-5 where Keras computes more in float32: the means of Adafactor, the norm of Muon.
KERAS = [
    ("sgd", {}),
    ("sgd", dict(learning_rate=0.03, momentum=0.9, nesterov=True, clipvalue=0.5)),
    ("sgd", dict(momentum=0.9, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=7)),
    ("rmsprop", {}),
    ("rmsprop", dict(rho=0.8, momentum=0.9, centered=True, global_clipnorm=3.0)),
    ("adam", {}),
    ("adam", dict(amsgrad=True, epsilon=1e-3, clipnorm=1.0, gradient_accumulation_steps=4)),
    (
        "adam",
        dict(
            learning_rate=0.1,
            weight_decay=0.1,
            gradient_accumulation_steps=3,
            loss_scale_factor=8.0,
            use_ema=True,
            ema_momentum=0.9,
            ema_overwrite_frequency=5,
        ),
    ),
    ("adamw", {}),
    ("adamw", dict(weight_decay=0.05, beta_1=0.8, beta_2=0.95, amsgrad=True)),
    ("adadelta", {}),
    ("adadelta", dict(learning_rate=1.0, rho=0.8, epsilon=1e-4, weight_decay=0.01)),
    ("adagrad", {}),
    ("adagrad", dict(learning_rate=0.5, initial_accumulator_value=0.0, clipnorm=0.1)),
    ("adamax", {}),
    ("adamax", dict(learning_rate=0.1, beta_1=0.5, epsilon=0.1)),
    ("adafactor", {}),
    ("adafactor", dict(learning_rate=0.5, clip_threshold=0.5, epsilon_2=0.1, weight_decay=0.01)),
    ("nadam", {}),
    ("nadam", dict(beta_1=0.8, gradient_accumulation_steps=4)),
    ("ftrl", {}),
    (
        "ftrl",
        dict(
            learning_rate=0.05,
            learning_rate_power=-0.6,
            l1_regularization_strength=0.1,
            l2_regularization_strength=0.2,
            l2_shrinkage_regularization_strength=0.1,
            beta=0.3,
            weight_decay=0.1,
        ),
    ),
    ("lion", {}),
    ("lion", dict(beta_1=0.5, beta_2=0.9, weight_decay=0.1)),
    ("lamb", {}),
    ("lamb", dict(weight_decay=0.1, clipnorm=1.0)),
    ("muon", {}),
    ("muon", dict(exclude_layers=["wid"], nesterov=False, rms_rate=None, adam_lr_ratio=0.3)),
    ("schedule_free_adamw", {}),
    ("schedule_free_adamw", dict(warmup_steps=20, weight_decay=0.1, beta_1=0.7)),
]
FLOAT32_INSIDE = ("adafactor", "muon")


@pytest.mark.parametrize(("name", "numbers"), KERAS)
def test_optimizers_equal_keras(name, numbers):
    params, noise = problem()
    ours = jgd_path(getattr(jk, name)(**numbers), params, noise)
    theirs = keras_path(of_keras(name)(**numbers), params, noise)
    assert distance(ours, theirs, params) < (2e-5 if name in FLOAT32_INSIDE else 1e-6)


TORCH = [
    ("sgd", {}),
    ("sgd", dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
    ("sgd", dict(momentum=0.9, dampening=0.3, maximize=True, weight_decay=0.1)),
    ("sgd", dict(dampening=0.3)),
    ("rmsprop", {}),
    ("rmsprop", dict(alpha=0.9, momentum=0.9, centered=True, weight_decay=0.1)),
    ("adam", {}),
    ("adam", dict(betas=(0.8, 0.95), amsgrad=True, eps=1e-3)),
    ("adam", dict(weight_decay=0.1, maximize=True)),
    ("adam", dict(weight_decay=0.1, decoupled_weight_decay=True)),
    ("adamw", {}),
    ("adamw", dict(weight_decay=0.05, amsgrad=True, maximize=True)),
    ("adadelta", {}),
    ("adadelta", dict(lr=0.3, rho=0.8, eps=1e-3, weight_decay=0.1, maximize=True)),
    ("adagrad", {}),
    ("adagrad", dict(lr_decay=0.1, initial_accumulator_value=0.3, eps=1e-3, weight_decay=0.1)),
    ("adamax", {}),
    ("adamax", dict(betas=(0.5, 0.9), eps=0.1, weight_decay=0.1, maximize=True)),
    ("adafactor", {}),
    ("adafactor", dict(lr=0.5, beta2_decay=-0.6, eps=(1e-8, 0.01), d=1.5, weight_decay=0.1)),
    ("nadam", {}),
    ("nadam", dict(momentum_decay=0.1, weight_decay=0.1, decoupled_weight_decay=True)),
    ("nadam", dict(weight_decay=0.1, maximize=True)),
    ("radam", {}),
    ("radam", dict(betas=(0.9, 0.9), weight_decay=0.1, decoupled_weight_decay=True)),
    ("rprop", {}),
    ("rprop", dict(etas=(0.3, 1.5), step_sizes=(1e-4, 5e-3), maximize=True)),
    ("muon", dict(lr=0.02)),
    ("muon", dict(lr=0.02, nesterov=False, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")),
]


def test_get_takes_the_names_that_keras_takes():
    """Each class of Keras has its name in any case, except those that wrap other optimizers."""
    wrappers = {"Optimizer", "OptimizerMap", "MultiOptimizer", "LossScaleOptimizer"}
    classes = {name for name in dir(keras.optimizers) if name[0].isupper()} - wrappers
    for name in classes - {"Lamb"}:  # Keras has the class, but `get` does not know its name
        expected = type(keras.optimizers.get(name.lower())).__name__
        for spelling in (name, name.lower(), name.upper()):
            assert _class(jk.get(spelling).__name__).lower() == expected.lower()
    assert {jk.get(name) for name in classes} == {jk.get(name) for name, _ in KERAS}
    for name, _ in KERAS:
        assert jk.get(name) is getattr(jk, name)
    assert jk.get("adam")() == jk.adam(0.001, 0.9, 0.999, 1e-7)
    with pytest.raises(ValueError, match=r"^get: name must .*got 'adamm'\. Did you mean 'adam', "):
        jk.get("adamm")
    with pytest.raises(ValueError, match=r"got 'zzz'\. Use one of 'adadelta', .*'sgd'\.$"):
        jk.get("zzz")


@pytest.mark.parametrize(("name", "numbers"), TORCH)
def test_optimizers_equal_torch(name, numbers):
    params, noise = problem(MATRICES if name == "muon" else None)
    ours = jgd_path(getattr(jt, name)(**numbers), params, noise)
    theirs = torch_path(lambda ps: of_torch(name)(ps, **numbers), params, noise)
    # PyTorch's product of momenta in NAdam is float32. Muon's iteration is in bfloat16, where the
    # order of additions decides how sums are rounded.
    tolerance = {"nadam": 1e-7, "muon": 1e-3}.get(name, 1e-9)
    assert distance(ours, theirs, params) < tolerance


def test_every_optimizer_has_a_row():
    assert {name for name, _ in KERAS} == set(jgd.compat.keras.optimizers.__all__)
    others = {"clip_grad_norm"}
    assert {name for name, _ in TORCH} | others == set(jgd.compat.torch.optimizers.__all__)
    theirs = {name for name in dir(keras.optimizers) if name[0].isupper()}
    wrappers = {"Optimizer", "OptimizerMap", "MultiOptimizer", "LossScaleOptimizer"}
    assert {_class(n).lower() for n, _ in KERAS} == {n.lower() for n in theirs - wrappers}
    theirs = {name for name in dir(torch.optim) if name[0].isupper()}
    # ASGD averages, L-BFGS searches along lines, and SparseAdam needs sparse gradients
    others = {"Optimizer", "ASGD", "LBFGS", "SparseAdam"}
    assert {_class(n).lower() for n, _ in TORCH} == {n.lower() for n in theirs - others}


@pytest.mark.parametrize("name", [name for name, numbers in KERAS if not numbers])
def test_names_and_defaults_are_those_of_keras(name):
    theirs = inspect.signature(of_keras(name).__init__).parameters
    expected = {n: p for n, p in theirs.items() if n not in {"self", "kwargs"}}
    _check_defaults(getattr(jk, name), expected)
    optimizer = of_keras(name)(0.1)
    assert float(getattr(jk, name)(**optimizer.get_config()).learning_rate) == pytest.approx(0.1)


@pytest.mark.parametrize("name", sorted({name for name, _ in TORCH}))
def test_names_and_defaults_are_those_of_torch(name):
    theirs = inspect.signature(of_torch(name).__init__).parameters
    switches = {"foreach", "fused", "capturable", "differentiable"}
    expected = {n: p for n, p in theirs.items() if n not in {"self", "params", *switches}}
    _check_defaults(getattr(jt, name), expected, switches)
    getattr(jt, name)(**dict.fromkeys(switches))


def _check_defaults(factory, theirs, without=()):
    ours = inspect.signature(factory).parameters
    ours = {name: p for name, p in ours.items() if name not in without}
    assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()}
    positional = [n for n, p in ours.items() if p.kind is not p.KEYWORD_ONLY]
    assert positional == list(theirs)[: len(positional)]


# --- optimizers with schedules ---------------------------------------------------------------


def test_a_keras_schedule_counts_gradients_under_accumulation():
    params, noise = problem()
    options = dict(momentum=0.9, nesterov=True, weight_decay=0.1, gradient_accumulation_steps=4)
    decay = dict(initial_learning_rate=0.1, decay_steps=20, decay_rate=0.8)
    ours = jgd_path(jk.sgd(jk.exponential_decay(**decay), **options), params, noise)
    schedule = keras.optimizers.schedules.ExponentialDecay(**decay)
    theirs = keras_path(keras.optimizers.SGD(schedule, **options), params, noise)
    assert distance(ours, theirs, params) < 1e-6


def test_torch_schedules_drive_the_rate_and_the_momentum():
    params, noise = problem()
    cycle = dict(max_lr=0.1, total_steps=210)
    rate, momentum = jt.one_cycle_lr(**cycle), jt.one_cycle_momentum(**cycle)
    schedulers = [lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, **cycle)]
    for tx, make in (
        (jt.sgd(rate, momentum=momentum), lambda ps: torch.optim.SGD(ps, momentum=0.9)),
        (jt.adam(rate, betas=(momentum, 0.99)), lambda ps: torch.optim.Adam(ps, betas=(0.9, 0.99))),
    ):
        theirs = torch_path(make, params, noise, schedulers)
        assert distance(jgd_path(tx, params, noise), theirs, params) < 1e-9


def test_clip_grad_norm():
    params, noise = problem()
    tx = jgd.chain(jt.clip_grad_norm(2.0), jt.sgd(0.1, momentum=0.9))
    make = lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9)
    theirs = torch_path(make, params, noise, clip=2.0)
    assert distance(jgd_path(tx, params, noise), theirs, params) < 1e-9


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, 0.0])
def test_clip_grad_norm_of_extremes_equals_torch(bad):
    """PyTorch clips in float64, jgd in float32, whose squares overflow."""
    gradients = [np.array([1.0, bad, 0.0]), np.array([0.0, 3.0 * (bad != 0)])]
    tensors = [torch.nn.Parameter(torch.zeros(len(g), dtype=torch.float64)) for g in gradients]
    for tensor, g in zip(tensors, gradients, strict=True):
        tensor.grad = torch.tensor(g)
    torch.nn.utils.clip_grad_norm_(tensors, 0.5)
    ours, _ = jt.clip_grad_norm(0.5).update([np.float32(g) for g in gradients], None)
    for u, tensor in zip(ours, tensors, strict=True):
        np.testing.assert_allclose(u, tensor.grad, rtol=1e-6)


def test_derivatives_of_clips_are_finite_for_gradients_of_0():
    clips = [jt.clip_grad_norm, *(lambda bound, n=n: jk.sgd(1.0, **{n: bound}) for n in CLIPS)]

    def steps(bound, g):
        updates = [tx.update(g, tx.init(g), g)[0] for tx in (clip(bound) for clip in clips)]
        return jnp.concatenate([u for tree in updates for u in tree])

    zero = [jnp.zeros(2), jnp.zeros(1)]
    for transform in (jax.jacrev, jax.jacfwd):
        by_bound, by_gradient = jax.jit(transform(steps, argnums=(0, 1)))(0.5, zero)
        np.testing.assert_array_equal(by_bound, 0)
        signs = np.repeat([1, -1, -1, -1], 3)[:, None]
        np.testing.assert_array_equal(np.hstack(by_gradient), signs * np.tile(np.eye(3), (4, 1)))


# --- Keras's options at their edges ----------------------------------------------------------


@pytest.mark.parametrize("option", CLIPS)
def test_clipping_of_nonfinite_gradients_equals_keras(option):
    params = {"a": np.ones(3), "b": np.ones(2)}
    for bad in (np.inf, -np.inf, np.nan, 0.0):
        noise = {"a": np.array([[1.0, bad, 0.0]]), "b": np.array([[0.0, 0.0]])}
        ours = jgd_path(jk.sgd(0.1, **{option: 0.5}), params, noise)
        theirs = keras_path(keras.optimizers.SGD(0.1, **{option: 0.5}), params, noise)
        for name in params:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)


def test_averaged_params_equal_the_final_variables_of_keras():
    params, noise = problem({"matrix": (6, 4), "vector": (5,)}, steps=10)
    options = dict(use_ema=True, ema_momentum=0.9, gradient_accumulation_steps=4)
    tx = jk.adam(0.1, **options)
    state = tx.init(params)
    moved = jax.tree.map(jnp.asarray, params)
    optimizer = keras.optimizers.Adam(0.1, **options)
    variables = [keras.Variable(p, dtype="float64", name=n) for n, p in params.items()]
    step = jax.jit(tx.update)
    for k in range(10):
        grads = {name: noise[name][k] for name in params}
        optimizer.apply(list(grads.values()), variables)
        updates, state = step(grads, state, moved)
        moved = jax.tree.map(jnp.add, moved, updates)
    optimizer.finalize_variable_values(variables)
    averages = jk.averaged_params(state)
    for name, variable in zip(params, variables, strict=True):
        np.testing.assert_allclose(averages[name], variable, rtol=1e-6)
    with pytest.raises(ValueError, match=r"must have an average .* use_ema=True"):
        jk.averaged_params(jk.adam().init(params))


def test_incompatible_arguments_raise_in_the_call():
    with pytest.raises(
        ValueError, match=r"adam: must have at most one of .* got clipnorm, clipvalue"
    ):
        jk.adam(clipnorm=1.0, clipvalue=1.0)
    with pytest.raises(ValueError, match=r"must have at most one of .* got clipnorm, clipvalue"):
        jk.adam(clipnorm=1.0)._replace(clipvalue=1.0)
    for wrong in (dict(), dict(momentum=0.9, dampening=0.1)):
        with pytest.raises(
            ValueError, match="sgd: nesterov must be False unless momentum is above 0"
        ):
            jt.sgd(nesterov=True, **wrong)
    with pytest.raises(ValueError, match=r"adam: betas must be two numbers in \[0, 1\), got 0\.9"):
        jt.adam(betas=0.9)
    with pytest.raises(ValueError, match="sgd: lr must be at least 0"):
        jt.sgd(-0.1)
    jax.vmap(lambda m: jt.sgd(0.1, momentum=m, nesterov=True))(jnp.array([0.0, 0.9]))


@pytest.mark.parametrize("option", CLIPS)
def test_clipping_to_zero_is_off(option):
    params, noise = problem({"m": (4, 3)}, steps=5)
    off = jgd_path(jk.sgd(**{option: 0.0}), params, noise)
    np.testing.assert_array_equal(off["m"], jgd_path(jk.sgd(), params, noise)["m"])


def test_loss_scale_optimizer():
    params, noise = problem({"m": (4, 3), "v": (3,)}, steps=25)
    noise["v"][[4, 11, 12]] = np.inf
    noise["m"][17] = np.nan
    options = dict(initial_scale=8.0, dynamic_growth_steps=3)
    ours = jgd_path(jk.loss_scale_optimizer(jk.adam(0.1), **options), params, noise)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1), **options)
    theirs = keras_path(optimizer, params, noise)
    assert distance(ours, theirs, params) < 1e-6


# --- pytrees of their numbers ----------------------------------------------------------------

FACTORIES = {
    **{f"keras.{name}": getattr(jk, name) for name in jgd.compat.keras.optimizers.__all__},
    **{f"torch.{name}": getattr(jt, name) for name in {n for n, _ in TORCH}},
    **{
        f"textbook.{name}": getattr(jgd.compat.textbook, name)
        for name in jgd.compat.textbook.__all__
    },
}


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_numbers_are_lanes_of_one_program(name):
    params, noise = problem({"m": (4, 3)}, steps=5)
    tx = FACTORIES[name]()
    if name.startswith("keras."):
        tx = tx._replace(weight_decay=0.01, clipnorm=1.0, gradient_accumulation_steps=2)
        tx = tx._replace(use_ema=True, ema_overwrite_frequency=3, loss_scale_factor=2.0)
    traces = []

    def path(tx):
        traces.append(name)
        return jgd_path(tx, params, noise)["m"]

    other = jax.tree.map(lambda x: x * 0.999, tx)
    alone = jax.jit(path)
    one, two = alone(tx), alone(other)
    assert len(traces) == 1
    assert jax.tree.leaves(tx)
    assert not np.array_equal(one, two)
    lanes = jax.jit(jax.vmap(path))(jgd.stack([tx, other]))
    np.testing.assert_allclose(lanes, jnp.stack([one, two]), rtol=1e-9, atol=1e-12)


# --- states of the frameworks ----------------------------------------------------------------


def _rest(tx, state, params, noise):
    """Return the parameters after each further step of a jgd optimizer."""

    def step(carry, drawn):
        params, state = carry
        grads = jax.tree.map(lambda n, p: n + PULL * p, drawn, params)
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), params

    return jax.jit(lambda noise: jax.lax.scan(step, (params, state), noise)[1])(noise)


def _torch_halves(make, params, noise, half):
    """Yield the state_dict and the parameters after `half` steps, then the rest of the path."""
    names = list(params)
    tensors = [torch.nn.Parameter(torch.tensor(params[n])) for n in names]
    optimizer = make(tensors)
    path = []
    for k in range(len(noise[names[0]])):
        if k == half:
            moved = {n: jnp.array(p.detach()) for n, p in zip(names, tensors, strict=True)}
            yield optimizer.state_dict(), moved
        for n, p in zip(names, tensors, strict=True):
            p.grad = torch.tensor(noise[n][k]) + PULL * p.detach()
        optimizer.step()
        path.append([p.detach().numpy().copy() for p in tensors])
    rows = zip(names, zip(*path, strict=True), strict=True)
    yield {n: np.stack(values)[half:] for n, values in rows}


MOVED = [
    ("sgd", dict(momentum=0.9, dampening=0.2)),
    ("rmsprop", dict(momentum=0.9, centered=True)),
    ("adam", dict(amsgrad=True, weight_decay=0.1)),
    ("adagrad", dict(lr_decay=0.1)),
    *[(name, {}) for name in sorted({name for name, _ in TORCH})],
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "numbers"), MOVED)
def test_state_from_continues_a_training_of_torch(name, numbers):
    params, noise = problem(MATRICES if name == "muon" else None)
    halves = _torch_halves(lambda ps: of_torch(name)(ps, **numbers), params, noise, 100)
    state_dict, moved = next(halves)
    tx, state = jt.state_from(state_dict, moved)
    ours = _rest(tx, state, moved, {n: x[100:] for n, x in noise.items()})
    tolerance = {"nadam": 1e-7, "muon": 1e-3}.get(name, 1e-9)  # as in test_optimizers_equal_torch
    assert distance(ours, next(halves), moved) < tolerance


KERAS_MOVED = [
    ("sgd", dict(momentum=0.9, nesterov=True)),
    ("rmsprop", dict(momentum=0.9, centered=True)),
    (
        "adam",
        dict(
            amsgrad=True,
            gradient_accumulation_steps=4,
            loss_scale_factor=8.0,
            use_ema=True,
            ema_overwrite_frequency=5,
            weight_decay=0.1,
        ),
    ),
    ("schedule_free_adamw", dict(warmup_steps=150)),
    *[(name, {}) for name in jgd.compat.keras.optimizers.__all__],
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "numbers"), KERAS_MOVED)
def test_state_from_continues_a_training_of_keras(name, numbers):
    half = 102  # with four gradients per step, two are accumulated at this point
    params, noise = problem()
    names = list(params)
    if name in ("sgd", "adam"):
        rate = keras.optimizers.schedules.ExponentialDecay(0.1, 50, 0.9)
        numbers = dict(numbers, learning_rate=rate)
    optimizer = of_keras(name)(**numbers)
    variables = [keras.Variable(params[n], dtype="float64", name=n) for n in names]
    optimizer.build(variables)

    def step(carry, drawn):
        values, slots = carry
        grads = [drawn[n] + PULL * p for n, p in zip(names, values, strict=True)]
        values, slots = optimizer.stateless_apply(slots, grads, values)
        return (values, slots), dict(zip(names, values, strict=True))

    start = [v.value for v in variables], [v.value for v in optimizer.variables]
    run = jax.jit(lambda start, noise: jax.lax.scan(step, start, noise))
    (values, slots), _ = run(start, {n: x[:half] for n, x in noise.items()})
    rest = {n: x[half:] for n, x in noise.items()}
    _, theirs = run((values, slots), rest)
    for variable, value in zip([*variables, *optimizer.variables], [*values, *slots], strict=True):
        variable.assign(value)
    moved = dict(zip(names, values, strict=True))
    tx, state = jk.state_from(optimizer, moved)
    ours = _rest(tx, state, moved, rest)
    assert distance(ours, theirs, moved) < (2e-5 if name in FLOAT32_INSIDE else 1e-6)


def _stepped(optimizer, tensors):
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    return optimizer.state_dict()


def test_a_schedule_continues_at_the_step_of_the_checkpoint():
    tensors = [torch.nn.Parameter(torch.ones(3))]
    state_dict = _stepped(torch.optim.Adam(tensors, lr=0.5), tensors)
    params = [jnp.ones(3)]
    tx, state = jt.state_from(state_dict, params, lr=jt.exponential_lr(1.0, gamma=0.5))
    updates, _ = tx.update([jnp.ones(3)], state, params)
    np.testing.assert_allclose(updates[0], -0.5, rtol=1e-6)
    state_dict = _stepped(torch.optim.SGD(tensors, lr=0.5), tensors)
    tx, state = jt.state_from(state_dict, params, lr=jt.exponential_lr(1.0, gamma=0.5), step=1)
    np.testing.assert_allclose(tx.update([jnp.ones(3)], state, params)[0][0], -0.5)


def test_state_from_names_what_does_not_match():
    square = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    state_dict = _stepped(torch.optim.Adam(square), square)
    eye = jnp.eye(2)
    with pytest.raises(ValueError, match="state_dict must be the state_dict of an optimizer"):
        jt.state_from({"model": {}, "optimizer": state_dict}, [eye, eye])
    with pytest.raises(ValueError, match=r"params must have 2 leaves, .* got 1"):
        jt.state_from(state_dict, [eye])
    with pytest.raises(ValueError, match=r"leaf '0' of params must have shape \(2, 2\)"):
        jt.state_from(state_dict, [jnp.ones(3), eye])
    groups = torch.optim.Adam([{"params": square[:1]}, {"params": square[1:], "lr": 0.1}])
    with pytest.raises(ValueError, match=r"groups must have the same lr, got 0\.001 and 0\.1"):
        jt.state_from(_stepped(groups, square), [eye, eye])
    with pytest.raises(
        ValueError, match=r"optimizer in jgd\.compat\.torch, .* arguments lr, lambd"
    ):
        jt.state_from(_stepped(torch.optim.ASGD(square), square), [eye, eye])
    with pytest.raises(ValueError, match="optimizer must be built, got Adam"):
        jk.state_from(keras.optimizers.Adam(), [eye])
    named = torch.optim.Adam([("w.10", square[0]), ("w.2", square[1])])
    state_dict = _stepped(named, square)
    state_dict["state"][0]["exp_avg"] = torch.zeros(2, 2)
    _, state = jt.state_from(state_dict, {"w": {"2": eye, "10": eye}})
    assert float(jnp.sum(jnp.abs(optax.tree.get(state, "mu")["w"]["10"]))) == 0


def test_parameters_match_by_name_or_in_the_order_in_which_they_were_written():
    """JAX sorts keys as text, "10" before "2"; the frameworks number their parameters."""
    tensors = [torch.nn.Parameter(torch.ones(2)) for _ in range(11)]
    for k, tensor in enumerate(tensors):
        tensor.grad = torch.full((2,), float(k + 1))
    optimizer = torch.optim.SGD(tensors, momentum=0.9)
    optimizer.step()
    state_dict = optimizer.state_dict()

    def buffers(params, **options):
        _, state = jt.state_from(state_dict, params, **options)
        tree = optax.tree.get(state, "momentum_buffer")
        return [int(leaf[0]) - 1 for leaf in jax.tree.leaves(tree)]

    one, names = jnp.ones(2), [str(k) for k in range(11)]
    assert buffers([one] * 11) == list(range(11))
    numbered = [int(name) for name in sorted(names)]  # the index of each leaf in JAX's order
    assert buffers(dict.fromkeys(names, one)) == numbered
    assert buffers({n: {"w": one} for n in names}) == numbered
    with pytest.raises(ValueError, match="keys that fit it sorted as text and as numbers"):
        buffers(dict.fromkeys(sorted(names), one))
    full = [f"model.{name}" for name in names]
    assert buffers(dict.fromkeys(sorted(names), one), names=full) == numbered


def test_a_schedule_for_a_state_without_steps_needs_step():
    tensors = [torch.nn.Parameter(torch.ones(3))]
    state_dict = _stepped(torch.optim.SGD(tensors, lr=0.5, momentum=0.9), tensors)
    with pytest.raises(ValueError, match=r"step must be a number of steps .* sgd does not count"):
        jt.state_from(state_dict, [jnp.ones(3)], lr=jt.exponential_lr(1.0, gamma=0.5))


def test_state_from_of_keras_muon_needs_the_paths_of_the_parameters():
    variables = [keras.Variable(np.ones((3, 2)), name=n) for n in ("embedding", "kernel")]
    optimizer = keras.optimizers.Muon()
    optimizer.build(variables)
    params = [jnp.ones((3, 2))] * 2
    with pytest.raises(ValueError, match="leaf '0' of params must have the path 'embedding'"):
        jk.state_from(optimizer, params)
    jk.state_from(optimizer, dict(zip(("embedding", "kernel"), params, strict=True)))


def test_the_frameworks_are_not_imported():
    assert frameworks.keras is keras
    import subprocess
    import sys

    program = "import sys, jgd.compat; print(*{'keras', 'torch', 'tensorflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "", done
