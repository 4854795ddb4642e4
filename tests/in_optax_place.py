"""A pytest plugin: optax's own tests, with jgd's functions in optax's place.

    PYTHONPATH=tests pytest -p in_optax_place .../site-packages/optax/_src/alias_test.py

Every public function of jgd that bears the name of one of optax's takes its place in all modules of
optax, so that optax's functions call it as well as the tests. What `jgd.optimizers.lifted` has from
optax stays, and so does `optax.bias_correction`, a helper of another call than jgd's word.

If IN_OPTAX_PLACE names a file, how each test ended and the names that it called are written there
as JSON.
"""

import functools
import importlib
import json
import os
import pkgutil
import sys
import types
from pathlib import Path

import optax
import optax.contrib
import optax.schedules
import optax.transforms
import pytest

import jgd
from jgd.optimizers import lifted

APART = {"bias_correction", *lifted.__all__}
HOMES = (optax, optax.contrib, optax.schedules, optax.transforms)

_called = set()
_tests = {}


def _pairs():
    """For each name that both have, the function of optax and that of jgd."""
    for name in sorted(set(jgd.__all__) - APART):
        ours = getattr(jgd, name)
        theirs = next((vars(home)[name] for home in HOMES if name in vars(home)), None)
        if isinstance(ours, types.FunctionType) and callable(theirs):
            yield name, theirs, ours


def _recorded(name, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        _called.add(name)
        return function(*args, **kwargs)

    return call


def _modules(package):
    names = [n for n in sys.modules if n.split(".")[0] == package]
    return [sys.modules[n] for n in sorted(names)]


def _copies(modules):
    """The modules as they are now, each with the copies of the others in place of them."""
    copies = {id(module): types.ModuleType(module.__name__) for module in modules}
    for module in modules:
        for name, value in vars(module).items():
            setattr(copies[id(module)], name, copies.get(id(value), value))
    return copies


def replace():
    """Put jgd's functions in optax's place, and leave jgd an optax of before. Returns the names."""
    for found in pkgutil.walk_packages(jgd.__path__, "jgd."):
        importlib.import_module(found.name)
    table = {id(theirs): _recorded(name, ours) for name, theirs, ours in _pairs()}
    before = _copies(_modules("optax"))
    for module in _modules("jgd"):
        for name, value in list(vars(module).items()):
            if id(value) in before:
                setattr(module, name, before[id(value)])
    for module in _modules("optax"):
        for name, value in list(vars(module).items()):
            if id(value) in table:
                setattr(module, name, table[id(value)])
    return sorted(call.__name__ for call in table.values())


NAMES = replace()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    _called.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    if call.when == "call":  # user_properties come home from the workers of pytest-xdist
        item.user_properties.append(("jgd", sorted(_called)))
    return (yield)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        properties = dict(report.user_properties)
        _tests[report.nodeid] = dict(outcome=report.outcome, jgd=properties.get("jgd", []))


def pytest_sessionfinish(session):
    to = os.environ.get("IN_OPTAX_PLACE")
    if to and not hasattr(session.config, "workerinput"):
        Path(to).write_text(json.dumps(dict(names=NAMES, tests=_tests), indent=1))
