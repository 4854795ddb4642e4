"""Bad input raises a one-line error that names argument, range and fix, before compilation."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest
from test_training import X, Y, line_task

import jgd
from jgd.stopping import early_stopping, reduce_on_plateau
from jgd.tuning.compiling import Compiler
from jgd.tuning.result import Best

LANES = jgd.grid(jgd.adam, learning_rate=[0.1, 0.2])
ADAM, KEY, LOG, LINE = jgd.adam(0.1), jax.random.key(0), jgd.loguniform(1e-3, 1.0), line_task()
RUN = jgd.supervised(LINE)
NAN, INF = float("nan"), float("inf")
HERE = Path(__file__)
BATCH = r"a batch of settings must have one leading axis on all its numbers, got .*jgd\.grid"
STOP = r"must be jgd\.stopping\.early_stopping\(\.\.\.\) or an integer, got"
DISTRIBUTION = r"must be jgd\.loguniform, jgd\.uniform, jgd\.integers or jgd\.choice, got "
TRACED = r"must be a function that JAX can trace, got .*\(test_bad_input\.py, line \d+\)"


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    def compiled(*_, **__):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(Compiler, "compiled", compiled)


# Each helper returns a call with a bad argument. Rows are an argument, a bad value and a message.


def _call(function, *arguments, **keywords):
    return lambda: function(*arguments, **keywords)


def _sweep(task=LINE, settings=LANES, steps=10, **options):
    return _call(jgd.sweep, task, settings, steps, **options)


def _task(**changes):
    return _sweep(LINE._replace(**changes))


def _run(**changes):
    return _sweep(RUN._replace(**changes))


def _optuna(**changes):
    valid = dict(task=LINE, factory=jgd.adam, steps=10, trials=2, space={"learning_rate": LOG})
    return _call(jgd.optuna_search, **valid | changes)


def _train(task=LINE, setting=ADAM, steps=5, key=KEY):
    return _call(jgd.train, task, setting, steps, key)


def _search(search=jgd.random_search, factory=jgd.adam, n=3, key=KEY, **distributions):
    return _call(search, factory, n, key, **distributions or {"learning_rate": LOG})


def _batch(batch):
    return _task(batch=batch)


def _stream(make):
    return _call(lambda: _task(batch=jgd.stream(make))())


def _by_setting(params, model_state, setting):
    return {"loss": 0.0} if isinstance(setting, dict) else {"loss": 0.0, "accuracy": 0.0}


def _full(params, model_state, batch, key, setting):
    return jnp.sum(params["w"]), ({}, None)


def _with_nan():
    data = X.copy()
    data[5, 1] = np.nan
    return jgd.minibatches((data, Y), 4, KEY)


INTEGER, NUMBER = "must be an integer, got", "must be a number, got"
OPTIONS = [
    *(("steps", x, INTEGER) for x in (10.5, "10", None, NAN, INF, True, np.float32(10), [10], KEY)),
    *(("steps", x, f"must be at least 4, got {x}") for x in (0, -5, 3)),
    ("steps", 2**40, "must be below 2147483648, got"),
    *(
        ("task", x, r"must be a jgd\.Task or a jgd\.Run, got")
        for x in (None, "digits", 3, {}, ADAM)
    ),
    ("task", lambda: LINE, r"must be a jgd\.Task or a jgd\.Run, got .*Call it"),
    ("task", jgd.Task, r"must be a jgd\.Task or a jgd\.Run, got .*Call it"),
    ("task", tuple(LINE), r"must be a jgd\.Task or a jgd\.Run, got"),
    ("task", LANES, r"must be a jgd\.Task or a jgd\.Run, got <2 lanes"),
    *(("seeds", x, INTEGER) for x in (1.5, "3", None, NAN, [1], True)),
    *((x, 0, "must be at least 1, got 0") for x in ("seeds", "width", "report_every", "keep")),
    ("budget", -1, "must be at least 1, got -1"),
    *((x, 1.5, INTEGER) for x in ("width", "report_every", "keep", "budget", "devices")),
    *((x, "1", INTEGER) for x in ("width", "report_every", "keep", "budget", "devices")),
    ("keep", None, INTEGER),
    ("devices", 0, "must be in 1 to"),
    ("devices", 99, "must be in 1 to"),
    *(
        ("key", x, "must be an integer or a random key, got")
        for x in (1.5, "0", None, True, jnp.arange(3), jnp.ones(2), jax.random.split(KEY))
    ),
    ("key", 2**70, f"must be below {2**63}, got"),
    *(("order", x, "must be 'shared' or 'own', got") for x in ("random", None, 3, ["own"])),
    *(("mode", x, "must be 'min' or 'max', got") for x in ("best", 3, ["min"])),
    *(("best", x, "must be 'final' or 'ever', got") for x in ("last", None, True)),
    *(("drop_diverged", x, "must be True or False, got") for x in ("yes", None, 3)),
    *(("resume", x, "must be True or False, got") for x in ("yes", None, 1)),
    ("resume", True, "folder must be the folder of a sweep"),
    *(("metric", x, "must be one of loss, got") for x in ("accuracy",)),
    *(("metric", x, "must be a string, got") for x in (3, ["loss"])),
    *(("target", x, NUMBER) for x in ("low", [1.0], np.ones(2), True, 1j)),
    *(("target", x, "must be finite, got") for x in (NAN, INF)),
    *(("seconds", x, "must be above 0, got") for x in (0, -1, NAN)),
    *(("seconds", x, NUMBER) for x in ("60", [1])),
    *(("checkpoint_every", x, "must be at least 0, got") for x in (-1, NAN)),
    *(("checkpoint_every", x, NUMBER) for x in ("30", None)),
    *(("halving", x, r"must be jgd\.successive_halving") for x in (2, "hyperband", True)),
    ("halving", jgd.successive_halving(2, 100), "must have distinct rungs, got"),
    *(("stop", x, STOP) for x in (2.5, "3", ADAM)),
    ("stop", True, STOP),
    ("stop", reduce_on_plateau(), STOP),
    ("stop", -1, "patience must be a step count, at least 0, got -1"),
    ("stop", early_stopping(3, mode="max"), "stop must have mode 'min', .*got 'max'"),
    *(("folder", x, "must be a path, got") for x in (3, True, ["runs"])),
    ("folder", HERE, r"must be a folder, got .*test_bad_input\.py is a file"),
    ("folder", HERE / "new", r"must be a folder, got .*test_bad_input\.py is a file"),
    ("folder", HERE.parent, "is not empty"),
    *(("on_report", x, "must be a function, got") for x in (3, "print")),
    ("sede", 3, "did you mean seeds?"),
    # settings
    *(("settings", x, BATCH) for x in (None, 0.1, ADAM, [ADAM, ADAM], [], {"adam": ADAM}, LOG)),
    ("settings", {"a": {"tx": jax.vmap(jgd.sgd)(jnp.ones(3)), "rate": jnp.ones(2)}}, BATCH),
    ("settings", "adam", "must be a pytree of numbers, got 'adam'"),
    ("settings", jgd.adam, r"must be a pytree of numbers, got the function.*jgd\.as_pytree"),
    ("settings", optax.adam(0.1), r"must be a pytree of numbers, got <chain>.*jgd\.as_pytree"),
    ("settings", {}, "must hold at least one setting, got none"),
    ("settings", jax.vmap(jgd.sgd)(jnp.zeros(0)), "must hold at least one setting, got none"),
    ("settings", {1: LANES}, "the name of a group must be a string, got 1"),
    *(
        ("settings", jax.vmap(of_rate)(jnp.ones(2)), r"settings\['r'\] must be a batch.*name it")
        for of_rate in (lambda r: {"r": r, "s": r}, lambda r: {"r": r, "tx": jgd.sgd(r)})
    ),
    ("settings", jax.vmap(lambda r: {"r": r})(jnp.ones(2)), "must hold exactly one optimizer"),
    ("settings", {"x": {"rate": jnp.ones(3)}}, "must hold exactly one optimizer, got 0"),
    ("settings", (LANES, LANES), "must hold exactly one optimizer, got 2"),
    (
        "settings",
        {"adam": jgd.grid(jgd.adam, learning_rate=[0.1, -0.2])},
        "adam: learning_rate must be at least 0, got -0.2 in setting 1",
    ),
    (
        "settings",
        jax.vmap(jgd.sgd)(jnp.array([0.1, jnp.nan])),
        "sgd: learning_rate must be at least 0, got nan in setting 1",
    ),
]
BATCHES = itertools.cycle([(X, Y)])
TASKS = [
    *(({name: 0}, f"{name} of the task must be a function") for name in LINE._fields),
    ({"batch": (X, Y)}, "batch of the task must be a function"),
    ({"init": lambda key: {"w": jnp.zeros(2, int), "b": 0}}, "init must be .* floating-point"),
    ({"loss": _full}, r"init must be .* returns \(params, model_state\), got"),
    ({"loss": lambda p: 0.0}, "loss must take .* got a function of 1 arguments"),
    ({"loss": lambda p, b: b[0] @ p["w"]}, r"loss must return a scalar, got .* shape \(4,\)"),
    *(
        ({"loss": lambda p, b, x=x: x}, "loss must be .* a real scalar, got")
        for x in (1j, 3, None, "low", (0.0, {}), {"loss": 0.0})
    ),
    (
        {"loss": lambda p, m, b, k, s: 0.0, "init": lambda key: ({"w": jnp.zeros(2)}, None)},
        r"loss must be .* returns \(loss, \(metrics, model_state\)\), got 0\.0",
    ),
    ({"loss": lambda p, b: 0.0 if p["b"] > 0 else 1.0}, f"loss {TRACED}"),
    ({"loss": lambda p, b: float(np.sum(p["w"]))}, f"loss {TRACED}"),
    ({"batch": _with_nan()}, "the data must not hold NaN, got NaN in .*, first in row 5"),
    ({"batch": lambda s: (X * NAN, Y)}, "the first batch must not hold NaN, .*, first in row 0"),
    ({"batch": lambda s: (X, "y")}, "a batch must be a pytree of numbers, got 'y'"),
    ({"batch": lambda s: (yield X)}, "a batch must be a pytree of numbers, got <generator"),
    ({"batch": lambda s: (X[int(s) :], Y)}, f"batch {TRACED}"),
    ({"evaluate": lambda p: {"loss": float(p["b"])}}, f"evaluate {TRACED}"),
    ({"evaluate": lambda p: {"loss": p["b"].item()}}, f"evaluate {TRACED}"),
    ({"evaluate": lambda p: {"loss": 1 if p["b"] > 0 else 0}}, f"evaluate {TRACED}"),
    ({"evaluate": lambda p: {"loss": np.mean(np.asarray(p["w"]))}}, f"evaluate {TRACED}"),
    *(
        ({"evaluate": lambda p, x=x: {"loss": x}}, "metric loss of evaluate must be a scalar, got")
        for x in (1j, jnp.ones(2), "low", None, {"a": 0.0}, jnp.ones((), complex), KEY)
    ),
    *(
        ({"evaluate": lambda p, x=x: x}, "evaluate must return a dict of scalars, got")
        for x in (0.0, {}, None, [0.0])
    ),
    ({"evaluate": lambda p: {1: 0.0, 2: 0.0}}, "the name of a metric must be a string, got 1"),
    ({"evaluate": lambda p: {"rank": 0.0}}, "evaluate must not report 'rank', which is a column"),
]
RUNS = [
    *(({name: 0}, f"{name} of the task must be a function") for name in RUN._fields[:-1]),
    ({"verdict": 0}, "verdict of the run must be True or False, got 0"),
    ({"update": lambda s, state, b: state}, r"update must be .* returns \(state, metrics\), got"),
    ({"update": lambda s, state, b: (state, None)}, r"must be .* \(state, metrics\), got"),
    ({"update": lambda s, state, b: (state, {})}, "update must report a scalar under the name"),
    *(
        ({"update": lambda s, state, b, x=x: (state, {"loss": x})}, "update must report a scalar")
        for x in (1j, None, jnp.ones(2), "low")
    ),
    (
        {"update": lambda s, state, b: (state.params, {"loss": 0.0})},
        "the state after update must be a state with the shapes before it, .*got",
    ),
]
STREAMS = [
    *((x, "stream: make must be a function that returns an iterator") for x in ([1], None)),
    (iter([1]), "stream: make must be a function that returns an iterator"),
    *((lambda x=x: x, "stream: make must be .* returns an iterator, got") for x in ([X], None)),
    (lambda: iter([]), "the iterator ended after 0 batches; it must yield"),
    (lambda: itertools.cycle([(X, "y")]), "a batch must be a pytree of numbers, got 'y'"),
    (lambda: itertools.cycle([(X * NAN, Y)]), "the first batch must not hold NaN"),
]
GRIDS = [
    *(
        (ADAM, {"x": [0.1]}, "factory must be a function from numbers to a setting, got")
        for _ in "1"
    ),
    ("adam", {"x": [0.1]}, "factory must be a function from numbers to a setting, got 'adam'"),
    (jgd.adam, {"lr": [0.1]}, "unexpected keyword argument 'lr'; did you mean learning_rate?"),
    (jgd.adam, {"b1": [0.9]}, "missing a required argument: 'learning_rate'"),
    (jgd.adam, {}, "axes must hold at least one axis, got none"),
    *(
        (jgd.adam, {"learning_rate": x}, "axis learning_rate must be a sequence of values, got")
        for x in (0.1, "0.1", b"01", None, np.array(0.1), {0.1: 1}, {0.1, 0.2}, LOG, LANES)
    ),
    *(
        (jgd.adam, {"learning_rate": x}, "axis learning_rate must have at least one value")
        for x in ([], iter([]))
    ),
    *((jgd.adam, {"learning_rate": [x]}, "must be a number or a sch") for x in ("0.1", None, 1j)),
    *((jgd.adam, {"learning_rate": [x]}, "must be a finite number, got") for x in (NAN, INF)),
    (jgd.adam, {"learning_rate": [0.1], "b1": [1.5]}, r"b1 must be in \[0, 1\), got 1.5"),
    (optax.adam, {"learning_rate": [0.1]}, r"must be a pytree of numbers, got .*jgd\.as_pytree"),
    (lambda x: "x", {"x": [0.1]}, "must be a pytree of numbers, got 'x'"),
    (lambda x: float(x), {"x": [0.1]}, f"factory {TRACED}"),
    (lambda x: jgd.sgd(x if x > 1 else 1.0), {"x": [0.1]}, f"factory {TRACED}"),
]
SEARCHES = [
    *(({"n": x}, "n must be an integer, got") for x in (2.5, None, "3", NAN, KEY)),
    ({"n": 0}, "n and the number of distributions must be at least 1, got 0"),
    *(
        ({"key": x}, r"key must be a random key, got .*\. Use jax\.random\.key")
        for x in (0, None, "a", jnp.ones(2), jax.random.split(KEY))
    ),
    *(({"learning_rate": x}, DISTRIBUTION) for x in ([0.1, 0.2], (0.1, 0.2), 0.1, np.ones(3))),
    ({"learning_rate": jgd.loguniform}, DISTRIBUTION),
    ({"lr": LOG}, "unexpected keyword argument 'lr'; did you mean learning_rate?"),
    ({"factory": ADAM}, "factory must be a function from numbers to a setting, got"),
    ({"factory": 3, "n": jgd.adam}, "n must be an integer, got the function adam"),
]
DISTRIBUTIONS = [
    *((jgd.uniform, x, "low must be a number, got") for x in (("a", 1), (None, 1), ([0], 1))),
    *((jgd.uniform, x, "high must be a number, got") for x in ((0, "a"), (0, True), (0, 1j))),
    *((jgd.uniform, x, "must be finite, got") for x in ((NAN, 1), (0, INF), (-INF, 1))),
    (jgd.uniform, (1, 0), "bounds must satisfy low < high, got 1 and 0"),
    *((jgd.loguniform, x, "must be finite, got") for x in ((1e-3, INF), (1e-3, NAN))),
    *((jgd.loguniform, x, NUMBER) for x in (("1e-3", 1), (1e-3, None))),
    *((jgd.loguniform, x, "must satisfy 0 < low < high, got") for x in ((0, 1), (-1, 1), (1, 0.1))),
    *((jgd.choice, [x], "must be a sequence of values, got") for x in (3, None, "relu", LOG)),
    (jgd.choice, [[]], "choice: values must have at least one value, got none"),
]
HALVINGS = [
    *(({"eta": x}, "eta must be above 1, got") for x in (1, 0.5, NAN)),
    *(({"eta": x}, "eta must be a number, got") for x in ("2", None, [2], True)),
    ({"eta": INF}, "eta must be finite, got inf"),
    *(({"min_steps": x}, "min_steps must be an integer, got") for x in (2.5, "3", NAN, True)),
    *(({"min_steps": x}, "min_steps must be at least 1, got") for x in (0, -1)),
    *(({"within": x}, "within must be 'sweep' or 'group', got") for x in ("all", None, ["sweep"])),
]
STOPS = [
    *(({"patience": x}, "must be a number or a schedule, got") for x in ("3", None, [3])),
    *(({"patience": x}, "must be a step count, at least 0, got") for x in (-1, NAN)),
    *(({"mode": x}, r"must be one of \('min', 'max'\), got") for x in ("auto", None)),
    ({"start_from_epoch": -1}, "must be a step count, at least 0, got -1"),
    ({"pateince": 3}, "did you mean patience?"),
]
TRAININGS = [
    *(({"steps": x}, "train: steps must be an integer, got") for x in (10.5, "5", None, NAN, KEY)),
    *(({"steps": x}, "train: steps must be at least 1, got") for x in (0, -1)),
    *(
        ({"task": x}, "train: task must be a jgd.Task or a jgd.Run")
        for x in (None, "digits", {}, 3)
    ),
    ({"task": lambda: LINE}, "train: task must be a jgd.Task or a jgd.Run, got .*Call it"),
    *(({"key": x}, "train: key must be a random key, got") for x in (0, None, "k", jnp.ones(2))),
    ({"key": jax.random.split(KEY)}, "train: key must be a random key, got"),
    ({"setting": "adam"}, "train: a setting must be a pytree of numbers, got 'adam'"),
    *(({"setting": x}, "must hold exactly one optimizer, got") for x in (None, 0.1, (ADAM, ADAM))),
    ({"setting": optax.adam(0.1)}, r"must be a pytree of numbers, got .*jgd\.as_pytree"),
    ({"setting": LANES}, "learning_rate must be a scalar, got shape"),
    (
        {"task": LINE._replace(batch=lambda s: (X[int(s) :], Y))},
        f"each function of the task {TRACED}",
    ),
]
PROPOSALS = [
    *(({x: 0}, "must be at least 1, got 0") for x in ("trials", "at_once", "seeds")),
    *(({"trials": x}, "optuna_search: trials must be an integer, got") for x in (2.5, "3", None)),
    ({"steps": 10.5}, "optuna_search: steps must be an integer, got 10.5"),
    *(({"space": x}, "space must be a dict of distrib") for x in (None, [LOG], {1: LOG})),
    *(({"space": {"learning_rate": x}}, DISTRIBUTION) for x in ([0.1], (0.1, 0.2), 0.1)),
    ({"space": {"lr": LOG}}, "did you mean learning_rate?"),
    *(({"factory": x}, "factory must be a function, got") for x in (None, "adam", 3)),
    *(({"task": x}, "task must be a jgd.Task or a jgd.Run") for x in (None, 3)),
    *(
        ({"pruner": x}, r"pruner must be an Optuna pruner, such as .*MedianPruner\(\), got")
        for x in ("median", 3, optuna.pruners.MedianPruner)
    ),
    *(({"sampler": x}, "sampler must be an Optuna sampler, .*got") for x in ("tpe", 3)),
    *(({"study": x}, "study must be an Optuna study, .*got") for x in ("name", 3)),
    ({"storage": 3}, "storage must be an Optuna storage, or its URL, got 3"),
    ({"key": "a"}, "optuna_search: key must be an integer or a random key, got 'a'"),
]
DATA = ((X, Y), 4, KEY)
OTHERS = [
    *((_call(jgd.minibatches, (X, Y), 4, x), "key must be a random key, got") for x in (0, None)),
    *((_call(jgd.minibatches, (X, Y), x, KEY), INTEGER) for x in (2.5, "4", KEY, True)),
    *((_call(jgd.minibatches, (X, Y), x, KEY), "must be in 1 to 12, got") for x in (0, 13)),
    *(
        (_call(jgd.minibatches, x, None, KEY), "data must have one leading length, got")
        for x in (3.0, (), None, (X, Y[:3]), np.zeros((0, 2)))
    ),
    (_call(jgd.minibatches, ["a"], 1, KEY), "data must be a pytree of numbers, got 'a'"),
    *((_call(jgd.supervised, x), r"task must be a jgd\.Task, got") for x in (None, RUN)),
    *((_call(jgd.with_sharpness, x), r"task must be a jgd\.Task, got") for x in (None, RUN)),
    (_call(jgd.with_sharpness, LINE, iterations=0), "iterations must be at least 1, got 0"),
    (_call(jgd.stack, []), "must hold at least one setting, got none"),
    *(
        (_call(jgd.stack, x), "must be a list of settings, got")
        for x in (ADAM, None, 3, {"a": ADAM})
    ),
    (_call(jgd.stack, [ADAM, jgd.sgd(0.1)]), "stack: settings must have one structure, got"),
    (_call(jgd.stack, ["a", "b"]), "must be a pytree of numbers, got 'a'"),
    (_call(jgd.stack, [np.ones(2), np.ones(3)]), "each number must have one shape, got"),
    *((_call(jgd.lane, LANES, x), "index must be an integer, got") for x in (0.5, None, "a")),
    *((_call(jgd.lane, x, 0), BATCH) for x in (ADAM, None, 0)),
    (_call(jgd.lane, LANES, 2), r"lane: index must be in \[-2, 1\], got 2"),
    (_call(jgd.get, "adamm"), "did you mean.*adam"),
    (lambda: list(jgd.iter_sweep(LINE, LANES, 10, patience=3)), "patience"),
    (
        _sweep(RUN, order="own", settings={"a": LANES}, batch=0),
        "unexpected keyword argument 'batch'",
    ),
    (
        _sweep(LINE._replace(batch=lambda step: (X, Y)), order="own"),
        "must be 'shared' unless",
    ),
    (
        _sweep(LINE._replace(batch=jgd.stream(lambda: BATCHES)), order="own"),
        "order must be 'shared' for a stream, got 'own'",
    ),
    (
        _sweep(
            LINE._replace(evaluate=_by_setting),
            {"adam": LANES, "dict": jgd.grid(lambda x: {"tx": jgd.sgd(x)}, x=[0.1])},
        ),
        "the same metrics for all groups, got loss, accuracy for adam and loss for dict",
    ),
    (lambda: Best({}, None, jnp.zeros(2)).params, "must train a jgd.Task, got a jgd.Run"),
]
CASES = [
    *((f"sweep: {name}", _sweep(**{name: x}), message) for name, x, message in OPTIONS),
    *((f"Task: {next(iter(changes))}", _task(**changes), message) for changes, message in TASKS),
    *((f"Run: {next(iter(changes))}", _run(**changes), message) for changes, message in RUNS),
    *(("stream", _stream(make), message) for make, message in STREAMS),
    *(("grid", _call(jgd.grid, factory, **axes), message) for factory, axes, message in GRIDS),
    *(
        (search.__name__, _search(search, **changes), message)
        for search in (jgd.random_search, jgd.sobol_search, jgd.halton_search)
        for changes, message in SEARCHES
    ),
    *((f.__name__, _call(f, *bounds), message) for f, bounds, message in DISTRIBUTIONS),
    *(
        (f.__name__, _call(f, **changes), message)
        for f in (jgd.successive_halving, jgd.hyperband)
        for changes, message in HALVINGS
    ),
    *(("early_stopping", _call(early_stopping, **changes), message) for changes, message in STOPS),
    *(("train", _train(**changes), message) for changes, message in TRAININGS),
    *(("optuna_search", _optuna(**changes), message) for changes, message in PROPOSALS),
    *(("other", call, message) for call, message in OTHERS),
]


@pytest.mark.parametrize(("call", "message"), [pytest.param(*row[1:], id=row[0]) for row in CASES])
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError, OSError, IndexError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
