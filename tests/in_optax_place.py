"""A pytest plugin that runs optax's own tests with jgd's functions in optax's place.

    PYTHONPATH=tests pytest -p in_optax_place .../site-packages/optax/_src/alias_test.py

Every public function of jgd that has the name of a function of optax replaces it in all modules of
optax, so that optax's tests and functions call it. The functions that `jgd.optimizers.lifted` takes
from optax are not replaced, nor is `optax.bias_correction`, whose signature differs from jgd's.

If IN_OPTAX_PLACE names a file, a JSON report is written to it: the names that tests reached, how
many tests reached one, and the outcome of each test. A test reaches a name when it calls the
function, or runs a value that the function returned when the test's module was imported.
"""

import functools
import importlib
import json
import os
import pkgutil
import re
import sys
import types
import weakref
from pathlib import Path

import optax
import optax.contrib
import optax.schedules
import optax.transforms
import pytest

import jgd
import jgd.pytree
from jgd.optimizers import lifted

APART = {"bias_correction", *lifted.__all__}
HOMES = (optax, optax.contrib, optax.schedules, optax.transforms)

_reached = set()  # the names that the current test has reached
_name_of_call = weakref.WeakKeyDictionary()  # for each value that is still referenced
_names, _tests = [], {}


def _pairs():
    """Yield each name that both libraries have, optax's function and jgd's function."""
    for name in sorted(set(jgd.__all__) - APART):
        ours = getattr(jgd, name)
        theirs = next((vars(home)[name] for home in HOMES if name in vars(home)), None)
        if isinstance(ours, types.FunctionType) and callable(theirs):
            yield name, theirs, ours


def _recorded(name, function):
    """Return a function that records its calls and the values it returns."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        _reached.add(name)
        value = function(*args, **kwargs)
        if isinstance(value, jgd.Transformation | jgd.Schedule):
            _name_of_call[value._call] = name
        return value

    return call


def _recorded_method(method, call_of):
    """Return a method that records the name of the function that returned the value."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        name = _name_of_call.get(call_of(self))
        if name is not None:
            _reached.add(name)
        return method(self, *args, **kwargs)

    return run


def _modules(package):
    return [module for name, module in sys.modules.items() if name.split(".")[0] == package]


def _copies(modules):
    """Return copies of modules by the id of the original; copies refer to one another."""
    copies = {id(module): types.ModuleType(module.__name__) for module in modules}
    for module in modules:
        for name, value in vars(module).items():
            setattr(copies[id(module)], name, copies.get(id(value), value))
    return copies


def _exchange(modules, table):
    """Replace each value in the modules whose id is in the table."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if id(value) in table:
                setattr(module, name, table[id(value)])


def replace():
    """Put jgd's functions in optax's place and return their names.

    jgd itself continues to use a copy of the original modules of optax.
    """
    for module in pkgutil.walk_packages(jgd.__path__, "jgd."):
        importlib.import_module(module.name)
    pairs = list(_pairs())
    _exchange(_modules("jgd"), _copies(_modules("optax")))
    _exchange(_modules("optax"), {id(old): _recorded(name, new) for name, old, new in pairs})
    call_class, schedule = jgd.pytree.Call, jgd.Schedule
    for method in ("init", "update"):
        recorded = _recorded_method(getattr(call_class, method), lambda call: call)
        setattr(call_class, method, recorded)
    schedule.__call__ = _recorded_method(schedule.__call__, lambda value: value._call)
    return [name for name, _, _ in pairs]


# Tests that run each optimizer with each value of other arguments. The sample has one in so many,
# with another value of the arguments for each optimizer.
PRODUCTS = {
    "AccumulationTest::test_multi_steps_mixed_precision": 2,
    "AliasTest::test_gradient_accumulation": 4,
    "AliasTest::test_optimization": 8,
    "AliasTest::test_preserve_dtype": 4,
    "AliasTest::test_state_shape_dtype_shard_stability": 12,
    "ContribTest::test_gradient_accumulation": 4,
    "ContribTest::test_optimizers": 8,
    "ContribTest::test_optimizers_accept_extra_args": 4,
    "ContribTest::test_preserve_dtype": 4,
    "ContribTest::test_state_shape_dtype_shard_stability": 8,
}
# Tests of L-BFGS and its line searches, which reach at most `chain` and `scale` of jgd.
OPTAX_ALONE = ("LBFGSTest", "linesearch_test.py")


def _in_sample(nodeid):
    """Return whether a test is in the sample."""
    if any(name in nodeid for name in OPTAX_ALONE):
        return False
    test, index = re.fullmatch(r"(.*?)(\d*)", "::".join(nodeid.split("::")[-2:])).groups()
    n = PRODUCTS.get(test, 1)
    return n == 1 or int(index) % n == int(index) // n % n


def pytest_addoption(parser):
    parser.addoption("--optax-itself", action="store_true", help="replace nothing")
    parser.addoption("--sample", action="store_true", help="run a sample of the tests")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--sample"):
        items[:] = [item for item in items if _in_sample(item.nodeid)]


def pytest_configure(config):
    if not config.getoption("--optax-itself"):
        _names.extend(replace())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    _reached.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    # the workers of pytest-xdist send the properties of a report to the main process
    item.user_properties[:] = [("jgd", sorted(_reached))]
    return (yield)


def pytest_runtest_logreport(report):
    test = _tests.setdefault(report.nodeid, dict(outcome="passed", jgd=[]))
    if report.outcome != "passed" and test["outcome"] != "failed":
        test["outcome"] = report.outcome  # a failed subtest, setup or teardown fails the test
    test["jgd"] = sorted({*test["jgd"], *dict(report.user_properties).get("jgd", [])})


def pytest_sessionfinish(session):
    path = os.environ.get("IN_OPTAX_PLACE")
    if not path or hasattr(session.config, "workerinput"):
        return
    reaching = [test["jgd"] for test in _tests.values() if test["jgd"]]
    report = dict(
        replaced=_names,
        reached=sorted({name for names in reaching for name in names}),
        tests_that_reach=len(reaching),
        tests=_tests,
    )
    Path(path).write_text(json.dumps(report, indent=1))
