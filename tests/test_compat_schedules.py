"""jgd's schedules of Keras and PyTorch equal the originals over 200 steps."""

import inspect
import itertools
import os
import re
import warnings

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch

import jgd
from jgd.compat.keras import schedules as jk
from jgd.compat.torch import schedules as jt

STEPS = np.arange(200)
compiled = jax.jit(lambda schedule, steps: schedule(steps))  # traces the schedule's numbers too
random = np.random.default_rng(20)


def snake(name):
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def assert_close(ours, expected, tolerance):
    """Compare a schedule on an array of steps (eager, compiled and mapped) and on single steps."""
    assert expected.shape == STEPS.shape
    assert np.isfinite(expected).all()
    scale = np.abs(expected).max()
    for values in (ours(STEPS), compiled(ours, STEPS), jax.vmap(ours)(jnp.asarray(STEPS))):
        assert values.dtype == jnp.zeros([]).dtype
        np.testing.assert_allclose(values, expected, rtol=tolerance, atol=tolerance * scale)
    some = STEPS[::66]
    np.testing.assert_allclose(
        [ours(int(step)) for step in some], expected[some], rtol=tolerance, atol=tolerance * scale
    )


# --- Keras -----------------------------------------------------------------------------------

KERAS = [
    ("ExponentialDecay", dict(decay_steps=30, decay_rate=0.9)),
    ("ExponentialDecay", dict(decay_steps=41, decay_rate=0.8, staircase=True)),
    ("ExponentialDecay", dict(decay_steps=47, decay_rate=1.1, staircase=True)),
    ("ExponentialDecay", dict(decay_steps=7.5, decay_rate=0.0)),
    ("PiecewiseConstantDecay", dict(boundaries=[30, 60, 61], values=[0.1, 0.03, 0.5, 0.001])),
    ("PiecewiseConstantDecay", dict(boundaries=[100], values=[1.0, 0.1])),
    ("PolynomialDecay", dict(decay_steps=150)),
    ("PolynomialDecay", dict(decay_steps=60, end_learning_rate=0.01, power=0.5)),
    ("PolynomialDecay", dict(decay_steps=60, end_learning_rate=0.01, power=2.0, cycle=True)),
    ("PolynomialDecay", dict(decay_steps=7, power=0.5, cycle=True)),
    ("InverseTimeDecay", dict(decay_steps=30, decay_rate=0.5)),
    ("InverseTimeDecay", dict(decay_steps=41, decay_rate=2.0, staircase=True)),
    ("CosineDecay", dict(decay_steps=150)),
    ("CosineDecay", dict(decay_steps=90, alpha=0.1, warmup_steps=20)),
    ("CosineDecay", dict(decay_steps=90, alpha=0.1, warmup_target=0.5, warmup_steps=20)),
    ("CosineDecay", dict(decay_steps=90, warmup_target=0.05)),
    ("CosineDecayRestarts", dict(first_decay_steps=25)),
    ("CosineDecayRestarts", dict(first_decay_steps=41, t_mul=1.0, m_mul=0.8, alpha=0.05)),
    ("CosineDecayRestarts", dict(first_decay_steps=10, t_mul=1.5, m_mul=0.9, alpha=0.1)),
    ("CosineDecayRestarts", dict(first_decay_steps=60, t_mul=0.7)),
    ("CosineDecayRestarts", dict(first_decay_steps=1, t_mul=3.0, m_mul=1.1)),
    *(
        ("CosineDecayRestarts", dict(first_decay_steps=int(t), t_mul=float(m), m_mul=0.9))
        for t, m in zip(random.integers(2, 60, 5), random.choice([1, 1.25, 2, 3], 5), strict=True)
    ),
    *(
        (name, dict(decay_steps=int(t), decay_rate=float(d), staircase=bool(t % 2)))
        for name in ("ExponentialDecay", "InverseTimeDecay")
        for t, d in zip(random.integers(2, 60, 3), random.uniform(0.1, 1, 3), strict=True)
    ),
]


def of_keras(name, arguments, number):
    """Return the schedule of Keras, which computes in the type of its initial rate."""
    if "values" in arguments:
        arguments = dict(arguments, values=[number(v) for v in arguments["values"]])
    else:
        arguments = dict(arguments, initial_learning_rate=number(0.3))
    return getattr(keras.optimizers.schedules, name)(**arguments)


def values_of_keras(theirs):
    """Return the values one by one without jit, since stairs may come a step late under jit."""
    with pytest.MonkeyPatch.context() as patch:  # so that `cond` does not compile at each step
        branch = lambda condition, true_fun, false_fun: (true_fun if condition else false_fun)()
        patch.setattr(jax.lax, "cond", branch)
        return np.array([theirs(int(step)) for step in STEPS])


@pytest.mark.parametrize(("name", "arguments"), KERAS)
def test_equals_keras(name, arguments, float64):
    theirs = of_keras(name, arguments, np.float64)
    config = theirs.get_config()
    ours = getattr(jk, snake(name))(**config)
    expected = values_of_keras(theirs)
    # Keras computes the cosine of CosineDecay in float32
    tolerance = 2e-5 if name == "CosineDecay" else 1e-6
    assert_close(ours, expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), KERAS[:20])  # without random numbers
def test_equals_keras_in_float32(name, arguments):
    theirs = of_keras(name, arguments, float)
    ours = getattr(jk, snake(name))(**theirs.get_config())
    assert_close(ours, values_of_keras(theirs), 2e-5)


# --- PyTorch ---------------------------------------------------------------------------------

LINEAR = ("LinearLR", dict(start_factor=0.1, total_iters=10))
EXPONENTIAL = ("ExponentialLR", dict(gamma=0.97))
CONSTANT = ("ConstantLR", dict(factor=0.5, total_iters=15))
COSINE = ("CosineAnnealingLR", dict(T_max=60, eta_min=0.001))
STEP = ("StepLR", dict(step_size=20, gamma=0.5))
RESTARTS = ("CosineAnnealingWarmRestarts", dict(T_0=12, T_mult=2))
ONE_CYCLE = ("OneCycleLR", dict(max_lr=0.4, total_steps=180))
CYCLIC = ("CyclicLR", dict(base_lr=0.02, max_lr=0.2, step_size_up=15))
LAMBDA = ("LambdaLR", dict(lr_lambda=lambda k: 1 / (1 + 0.1 * k)))

CHAINABLE = [LINEAR, EXPONENTIAL, CONSTANT, COSINE, STEP, RESTARTS, CYCLIC]


def sequence(milestones, *schedulers):
    return "SequentialLR", dict(schedulers=list(schedulers), milestones=milestones)


TORCH = [
    LAMBDA,
    STEP,
    ("StepLR", dict(step_size=41, gamma=1.1)),
    ("MultiStepLR", dict(milestones=[30, 60])),
    ("MultiStepLR", dict(milestones=[150, 0, 47, 47, 46], gamma=0.7)),
    EXPONENTIAL,
    ("LinearLR", dict()),
    ("LinearLR", dict(start_factor=1.0, end_factor=0.0, total_iters=120)),
    ("LinearLR", dict(start_factor=0.5, total_iters=0)),
    CONSTANT,
    ("ConstantLR", dict(total_iters=0)),
    ("PolynomialLR", dict()),
    ("PolynomialLR", dict(total_iters=130, power=2.5)),
    ("PolynomialLR", dict(total_iters=0)),
    ("CosineAnnealingLR", dict(T_max=200)),
    ("CosineAnnealingLR", dict(T_max=37, eta_min=0.01)),
    ("CosineAnnealingLR", dict(T_max=1)),
    ("CosineAnnealingWarmRestarts", dict(T_0=41)),
    ("CosineAnnealingWarmRestarts", dict(T_0=7, T_mult=2, eta_min=0.01)),
    ("CosineAnnealingWarmRestarts", dict(T_0=1, T_mult=3)),
    ("OneCycleLR", dict(max_lr=0.3, total_steps=200)),
    ("OneCycleLR", dict(max_lr=0.3, epochs=21, steps_per_epoch=10, pct_start=0.45)),
    (
        "OneCycleLR",
        dict(max_lr=1, total_steps=200, pct_start=0.33, three_phase=True, anneal_strategy="linear"),
    ),
    ("OneCycleLR", dict(max_lr=1.0, total_steps=203, three_phase=True, div_factor=3.0)),
    ("OneCycleLR", dict(max_lr=1.0, total_steps=200, anneal_strategy="linear", pct_start=0.0)),
    ("OneCycleLR", dict(max_lr=1.0, total_steps=200, three_phase=True, pct_start=0.8)),
    (
        "OneCycleLR",
        dict(max_lr=1.0, total_steps=200, base_momentum=0.0, max_momentum=0.5, final_div_factor=10),
    ),
    CYCLIC,
    ("CyclicLR", dict(base_lr=0.01, max_lr=0.1, step_size_up=7, step_size_down=34)),
    ("CyclicLR", dict(base_lr=0.01, max_lr=0.1, step_size_up=41, mode="triangular2")),
    ("CyclicLR", dict(base_lr=0.01, max_lr=0.1, step_size_up=9, mode="exp_range", gamma=0.98)),
    ("CyclicLR", dict(base_lr=0.01, max_lr=0.1, step_size_up=9, scale_fn=lambda c: 1 / c)),
    (
        "CyclicLR",
        dict(base_lr=0.1, max_lr=1.0, scale_fn=lambda k: 0.9**k, scale_mode="iterations"),
    ),
    ("ChainedScheduler", dict(schedulers=[CONSTANT, EXPONENTIAL, STEP])),
    ("ChainedScheduler", dict(schedulers=[LINEAR, ("CosineAnnealingLR", dict(T_max=200))])),
    sequence([20, 100], CONSTANT, LINEAR, EXPONENTIAL),
    sequence([], EXPONENTIAL),
    sequence([0], CONSTANT, EXPONENTIAL),
    sequence([20, 170], LINEAR, ONE_CYCLE, EXPONENTIAL),
    sequence([20, 60], RESTARTS, ONE_CYCLE, STEP),
    sequence([20, 60], CYCLIC, COSINE, LINEAR),
    sequence([20, 60], ONE_CYCLE, CYCLIC, LAMBDA),
    sequence([33], LAMBDA, ("OneCycleLR", dict(max_lr=0.4, total_steps=180, three_phase=True))),
    *(sequence([30], CHAINABLE[i], CHAINABLE[(i + n) % 7]) for i in range(7) for n in (1, 3)),
    *(
        ("OneCycleLR", dict(max_lr=float(top), total_steps=int(n), pct_start=float(p)))
        for top, n, p in zip(
            random.uniform(0.01, 1, 3),
            random.integers(200, 400, 3),
            random.uniform(0.05, 1, 3),
            strict=True,
        )
    ),
    *(
        (
            "CyclicLR",
            dict(base_lr=0.01, max_lr=0.5, step_size_up=int(up), step_size_down=int(down)),
        )
        for up, down in random.integers(1, 60, (3, 2))
    ),
]


def of_torch(optimizer, config):
    name, arguments = config
    if "schedulers" in arguments:
        inner = [of_torch(optimizer, each) for each in arguments["schedulers"]]
        arguments = dict(arguments, schedulers=inner)
    own = () if name == "ChainedScheduler" else (optimizer,)
    return getattr(torch.optim.lr_scheduler, name)(*own, **arguments)


def of_jgd(lr, config, suffix="lr"):
    name, arguments = config
    if "schedulers" in arguments:
        inner = [of_jgd(lr, each) for each in arguments["schedulers"]]
        arguments = dict(arguments, schedulers=inner)
    return getattr(jt, snake(name).replace("_lr", f"_{suffix}"))(lr, **arguments)


def drive(config, lr=0.3, gradient=None):
    """Return the rates, the momenta and the parameters before each update of torch.optim.SGD."""
    x = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=lr, momentum=0.9)
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns when one scheduler is created after another
        scheduler = of_torch(optimizer, config)
        for step in STEPS:
            group = optimizer.param_groups[0]
            rows.append((group["lr"], group["momentum"], x.detach().numpy().copy()))
            x.grad = torch.zeros_like(x) if gradient is None else gradient(x.detach(), step)
            optimizer.step()
            scheduler.step()
    return [np.array(column) for column in zip(*rows, strict=True)]


def label(config):
    name, arguments = config
    inner = [label(each) for each in arguments.get("schedulers", ())]
    return "-".join([name, *inner])


@pytest.mark.parametrize("config", TORCH, ids=label)
def test_equals_torch(config, float64):
    rates, momenta, _ = drive(config)
    assert_close(of_jgd(0.3, config), rates, 1e-6)
    if config[0] in ("OneCycleLR", "CyclicLR"):
        assert_close(of_jgd(None, config, "momentum"), momenta, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("config", [c for c in TORCH if c[0] != "SequentialLR"], ids=label)
def test_equals_torch_in_float32(config):
    assert_close(of_jgd(0.3, config), drive(config)[0], 2e-5)


# --- both ------------------------------------------------------------------------------------


def test_every_schedule_has_a_row():
    assert set(jk.__all__) == {snake(name) for name, _ in KERAS}
    momenta = {"one_cycle_momentum", "cyclic_momentum"}
    assert set(jt.__all__) == {snake(name) for name, _ in TORCH} | momenta


def defaults(function, without=()):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.name not in without]


def test_arguments_are_those_of_the_frameworks():
    for name in {name for name, _ in KERAS}:
        theirs = defaults(getattr(keras.optimizers.schedules, name), ["name"])
        assert defaults(getattr(jk, snake(name)), ["name"]) == theirs
    for name in {name for name, _ in TORCH}:
        theirs = defaults(getattr(torch.optim.lr_scheduler, name), ["optimizer", "last_epoch"])
        (first, _), *ours = defaults(getattr(jt, snake(name)))
        assert first == "lr"
        if name in ("OneCycleLR", "CyclicLR"):  # jgd may take lr instead of a required argument
            missing = inspect.Parameter.empty
            theirs = [(n, None if default is missing else default) for n, default in theirs]
        assert ours == theirs
    assert defaults(jt.one_cycle_momentum) == defaults(jt.one_cycle_lr)
    assert defaults(jt.cyclic_momentum) == defaults(jt.cyclic_lr)


def test_the_maximum_or_the_base_may_be_lr():
    both = jt.one_cycle_lr(0.7, max_lr=0.3, total_steps=100)
    assert jnp.array_equal(both(STEPS), jt.one_cycle_lr(0.3, total_steps=100)(STEPS))
    both = jt.cyclic_lr(0.7, base_lr=0.1, max_lr=0.3, step_size_up=9)
    assert jnp.array_equal(both(STEPS), jt.cyclic_lr(0.1, max_lr=0.3, step_size_up=9)(STEPS))


def test_lr_of_a_sequence_replaces_that_of_its_schedulers():
    """A sweep over `lr` of `sequential_lr` therefore changes all of its schedulers."""
    schedulers = [jt.linear_lr(7.0, total_iters=5), jt.exponential_lr(0.0, 0.9), lambda k: 0.5 + k]
    assert_allclose = np.testing.assert_allclose
    lanes = jax.vmap(lambda lr: jt.sequential_lr(lr, schedulers, [10, 20])(STEPS))(
        jnp.array([0.1, 0.3])
    )
    for lr, lane in zip([0.1, 0.3], lanes, strict=True):
        assert_allclose(lane[:10], jt.linear_lr(lr, total_iters=5)(STEPS[:10]), rtol=1e-6)
        assert_allclose(lane[10:20], jt.exponential_lr(lr, 0.9)(STEPS[:10]), rtol=1e-6)
        assert_allclose(lane[20:], 0.5 + STEPS[:180], rtol=1e-6)


def test_one_cycle_keeps_its_last_value():
    """PyTorch takes one more step, below the minimum, and then raises."""
    for strategy, three_phase in itertools.product(("cos", "linear"), (False, True)):
        rate, momentum = (
            schedule(0.5, total_steps=50, anneal_strategy=strategy, three_phase=three_phase)
            for schedule in (jt.one_cycle_lr, jt.one_cycle_momentum)
        )
        np.testing.assert_allclose(rate(STEPS[49:]), 0.5 / 25 / 1e4, rtol=1e-6)
        np.testing.assert_allclose(momentum(STEPS[49:]), 0.95, rtol=1e-6)


def test_shrinking_restarts_end_at_alpha():
    schedule = jk.cosine_decay_restarts(1.0, 20, t_mul=0.5, alpha=0.1)
    np.testing.assert_allclose(schedule(np.array([0, 20, 30, 41, 199])), [1, 1, 1, 0.1, 0.1])


def test_integer_rates_are_numbers():
    assert jk.exponential_decay(1, 100, 0.96)(50) == jk.exponential_decay(1.0, 100, 0.96)(50) > 0.9


# Numbers that can be swept include numbers of steps, boundaries and values. Lists have two lanes.
SWEPT = [
    (jk.polynomial_decay, dict(decay_steps=[60, 41], cycle=True), 0.1),
    (jk.piecewise_constant_decay, dict(boundaries=[[9, 50], [20, 30]], values=[[3, 2, 1]] * 2), ()),
    (jk.cosine_decay_restarts, dict(first_decay_steps=[20, 9], t_mul=[1.0, 1.5]), 0.1),
    (jk.cosine_decay, dict(decay_steps=[20, 90], warmup_steps=[0, 9], warmup_target=[1, 0.1]), 0.1),
    (jt.multi_step_lr, dict(milestones=[[9, 50], [30, 20]], gamma=[0.1, 0.5]), 0.1),
    (jt.constant_lr, dict(total_iters=[0, 70]), 0.1),
    (jt.cosine_annealing_lr, dict(T_max=[20, 90]), 0.1),
    (jt.one_cycle_lr, dict(epochs=[7, 20], steps_per_epoch=[10, 11], pct_start=[0, 0.4]), 0.1),
    (jt.one_cycle_momentum, dict(total_steps=[50, 300], three_phase=True), None),
    (jt.cyclic_lr, dict(max_lr=[0.5, 1.0], step_size_up=[5, 50], mode="triangular2"), 0.1),
]


@pytest.mark.parametrize(
    ("factory", "arguments", "lr"), SWEPT, ids=lambda x: getattr(x, "__name__", None)
)
def test_one_program_for_all_numbers_of_a_structure(factory, arguments, lr):
    traced = []

    def values(schedule):
        traced.append(schedule)
        return schedule(STEPS)

    first = () if lr == () else (lr,)
    numbers = {name: x for name, x in arguments.items() if isinstance(x, list)}
    structure = {name: x for name, x in arguments.items() if name not in numbers}
    make = lambda numbers: factory(*first, **numbers, **structure)
    each = [make({name: x[lane] for name, x in numbers.items()}) for lane in range(2)]
    program = jax.jit(values)
    alone = [program(schedule) for schedule in each]
    assert len(traced) == 1
    assert not jnp.array_equal(*alone)
    together = jax.jit(jax.vmap(lambda numbers: make(numbers)(STEPS)))(
        {name: jnp.asarray(x, float) for name, x in numbers.items()}
    )
    for lane, schedule, expected in zip(together, each, alone, strict=True):
        np.testing.assert_allclose(lane, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(schedule(STEPS), expected, rtol=1e-5, atol=1e-6)


def test_numbers_have_finite_derivatives():
    of_each = {name: of_jgd(0.3, (name, arguments)) for name, arguments in TORCH}
    for name, arguments in KERAS:
        config = of_keras(name, arguments, float).get_config()
        of_each[name] = getattr(jk, snake(name))(**config)
    schedules = list(of_each.values())
    slopes = jax.jit(jax.grad(lambda each: sum(jnp.sum(schedule(STEPS)) for schedule in each)))
    for schedule, slope in zip(schedules, slopes(schedules), strict=True):
        assert all(np.isfinite(number) for number in jax.tree.leaves(slope)), schedule


def test_one_cycle_drives_sgd_as_in_torch(float64):
    """Rate and momentum follow one cycle, over 200 steps on a noisy quadratic."""
    config = "OneCycleLR", dict(max_lr=0.05, total_steps=200)
    curvature = np.array([1.0, 3.0, 10.0])
    gradient = lambda x, step: curvature * x + 0.3 * (7 * step % 5 - 2)
    tx = jgd.sgd(of_jgd(None, config), momentum=of_jgd(None, config, "momentum"))

    def update(carry, step):
        x, state = carry
        updates, state = tx.update(gradient(x, step), state, x)
        return (x + updates, state), x

    def torch_gradient(x, step):
        return torch.tensor(gradient(x.numpy(), step))

    start = jnp.ones(3)
    _, path = jax.lax.scan(update, (start, tx.init(start)), jnp.asarray(STEPS))
    _, _, expected = drive(config, gradient=torch_gradient)
    np.testing.assert_allclose(path, expected, rtol=1e-6, atol=1e-9)


def test_errors_name_the_argument():
    def check(message, factory, *arguments, error: type[Exception] = ValueError, **keywords):
        with pytest.raises(error, match=message):
            factory(*arguments, **keywords)

    check(
        "piecewise_constant_decay: values must have length 3 for 2 boundaries, got length 2",
        jk.piecewise_constant_decay,
        [1, 2],
        [0.1, 0.2],
    )
    check(
        r"piecewise_constant_decay: boundaries must be in rising order, got \(2, 1\)",
        jk.piecewise_constant_decay,
        [2, 1],
        [3, 2, 1],
    )
    check("cosine_decay: decay_steps must be above 0, got 0", jk.cosine_decay, 0.1, 0)
    check("staircase must be True or False", jk.exponential_decay, 1, 1, 1, 2, error=TypeError)
    check("step_lr: step_size must be a number of steps, at least 1, got 0", jt.step_lr, 0.1, 0)
    check(r"linear_lr: start_factor must be in \(0, 1\], got 0.0", jt.linear_lr, 0.1, 0.0)
    check(r"multi_step_lr: milestones must be at least 0, got \(-1,\)", jt.multi_step_lr, 0.1, [-1])
    check(
        r"one_cycle_lr: anneal_strategy must be one of \('cos', 'linear'\), got 'cosine'",
        jt.one_cycle_lr,
        0.1,
        total_steps=9,
        anneal_strategy="cosine",
    )
    check("one_cycle_lr: max_lr or lr must be a number, got None", jt.one_cycle_lr, total_steps=9)
    check("steps_per_epoch=None", jt.one_cycle_lr, 0.1, epochs=3)
    check("epochs=None", jt.one_cycle_momentum, 0.1)
    check("cyclic_lr: base_lr or lr must be a number", jt.cyclic_lr, max_lr=0.1)
    check("cyclic_lr: max_lr must be a number", jt.cyclic_lr, 0.1)
    check("cyclic_lr: mode must be one of .* got 'square'", jt.cyclic_lr, 0.1, mode="square")
    for momentum in (jt.one_cycle_momentum, jt.cyclic_momentum):
        check(
            f"{momentum.__name__}: cycle_momentum must be True, got False",
            momentum,
            cycle_momentum=False,
        )
    line = jt.linear_lr(0.1)
    check(
        "schedulers must have length 2 for 1 milestones, got length 1",
        jt.sequential_lr,
        0.1,
        [line],
        [5],
    )
    check(
        "sequential_lr: milestones must be in rising order",
        jt.sequential_lr,
        0.1,
        [line] * 3,
        [9, 5],
    )
    check("must have at least one schedule, got none", jt.chained_scheduler, 0.1, [])
    check(
        "chained_scheduler: schedulers must be schedules that multiply .* got cyclic_lr",
        jt.chained_scheduler,
        0.1,
        [line, jt.cyclic_lr(0.1, max_lr=0.2)],
    )
    check("lr_lambda must be a function of the step", jt.lambda_lr, 0.1, 0.5, error=TypeError)
