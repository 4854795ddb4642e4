"""A pytest plugin: optax's own tests, with jgd's functions in optax's place.

    PYTHONPATH=tests pytest -p in_optax_place .../site-packages/optax/_src/alias_test.py

Every public function of jgd that bears the name of one of optax's takes its place in all modules of
optax, so that optax's functions call it as well as the tests. What `jgd.optimizers.lifted` has from
optax stays, and so does `optax.bias_correction`, a helper of another call than jgd's word.

If IN_OPTAX_PLACE names a file, the names that were reached, how many tests reached one, and how
each test ended are written there as JSON. A test reaches a name when it calls the function, or runs
what the function made when the module of the test was imported.
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

_reached = set()  # by the test that runs now
_made = weakref.WeakKeyDictionary()  # the name for each call whose value a test or optax holds
_names, _tests = [], {}


def _pairs():
    """For each name that both have: it, the function of optax, and that of jgd."""
    for name in sorted(set(jgd.__all__) - APART):
        ours = getattr(jgd, name)
        theirs = next((vars(home)[name] for home in HOMES if name in vars(home)), None)
        if isinstance(ours, types.FunctionType) and callable(theirs):
            yield name, theirs, ours


def _recorded(name, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        _reached.add(name)
        value = function(*args, **kwargs)
        if isinstance(value, jgd.Transformation | jgd.Schedule):
            _made[value._call] = name
        return value

    return call


def _recorded_later(method, call_of):
    @functools.wraps(method)
    def run(self, *args, **kwargs):
        name = _made.get(call_of(self))
        if name is not None:
            _reached.add(name)
        return method(self, *args, **kwargs)

    return run


def _modules(package):
    return [module for name, module in sys.modules.items() if name.split(".")[0] == package]


def _copies(modules):
    """Each module as it is now, by its id; they refer to one another, not to the originals."""
    copies = {id(module): types.ModuleType(module.__name__) for module in modules}
    for module in modules:
        for name, value in vars(module).items():
            setattr(copies[id(module)], name, copies.get(id(value), value))
    return copies


def _exchange(modules, table):
    """Replace in the modules each value whose id is in the table."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if id(value) in table:
                setattr(module, name, table[id(value)])


def replace():
    """Put jgd's functions in optax's place, and leave jgd an optax as it was. Returns the names."""
    for found in pkgutil.walk_packages(jgd.__path__, "jgd."):
        importlib.import_module(found.name)
    pairs = list(_pairs())
    _exchange(_modules("jgd"), _copies(_modules("optax")))
    _exchange(_modules("optax"), {id(old): _recorded(name, new) for name, old, new in pairs})
    call_class, schedule = jgd.pytree.Call, jgd.Schedule
    for method in ("init", "update"):
        later = _recorded_later(getattr(call_class, method), lambda call: call)
        setattr(call_class, method, later)
    schedule.__call__ = _recorded_later(schedule.__call__, lambda value: value._call)
    return [name for name, _, _ in pairs]


# Tests of each optimizer with each of several other arguments: the sample has one of so many, so
# that two neighbours share each of these tests.
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
# L-BFGS and its line searches are optax's own; of jgd they reach at most `chain` and `scale`.
OPTAX_ALONE = ("LBFGSTest", "linesearch_test.py")


def _in_sample(nodeid):
    """Return whether a test is in the sample."""
    if any(name in nodeid for name in OPTAX_ALONE):
        return False
    test, index = re.fullmatch(r"(.*?)(\d*)", "::".join(nodeid.split("::")[-2:])).groups()
    n = PRODUCTS.get(test, 1)
    return n == 1 or int(index) % n == int(index) // n % n


def pytest_addoption(parser):
    parser.addoption("--optax-itself", action="store_true", help="replace nothing, to compare")
    parser.addoption("--sample", action="store_true", help="some arguments for each optimizer")


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
    # what is in the properties of a report comes home from the workers of pytest-xdist
    item.user_properties[:] = [("jgd", sorted(_reached))]
    return (yield)


def pytest_runtest_logreport(report):
    test = _tests.setdefault(report.nodeid, dict(outcome="passed", jgd=[]))
    if report.outcome != "passed" and test["outcome"] != "failed":
        test["outcome"] = report.outcome  # a failed subtest, setup or teardown fails the test
    test["jgd"] = sorted({*test["jgd"], *dict(report.user_properties).get("jgd", [])})


def pytest_sessionfinish(session):
    to = os.environ.get("IN_OPTAX_PLACE")
    if not to or hasattr(session.config, "workerinput"):
        return
    reaching = [test["jgd"] for test in _tests.values() if test["jgd"]]
    found = dict(
        replaced=_names,
        reached=sorted({name for names in reaching for name in names}),
        tests_that_reach=len(reaching),
        tests=_tests,
    )
    Path(to).write_text(json.dumps(found, indent=1))
