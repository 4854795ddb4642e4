"""Parsing of the command line: a task, optimizers, and values of their arguments.

task_of("mypackage.mymodule:task")
groups_of(["adam"], ["learning_rate=log:1e-5:1e-1:64", "b1=0.8,0.9"])
"""

import difflib
import functools
import importlib
import inspect
import math
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jgd
from jgd.checks import place_of

__all__ = ["UserError", "factory_of", "groups_of", "space_of", "task_of", "where"]

RATES = "log:1e-5:1e1:64"


class UserError(Exception):
    """An error the user can fix; shown without a traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the part of an error that asks for the closest known name; empty if none is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.45)
    return f"; did you mean {close[0]}?" if close else ""


def _load(spec: str, noun: str) -> Any:
    """Return the object at module:name. Errors call it `noun`: a task or an optimizer."""
    module_name, _, name = spec.partition(":")
    parts = [*module_name.split("."), name]
    if not all(map(str.isidentifier, parts)) or module_name.endswith(".py"):
        raise UserError(f"{noun} must be module:name, got {spec!r}{_as_module(spec)}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(f"{noun} {spec}: {where(error)}") from None
        parent, _, last = error.name.rpartition(".")
        paths = getattr(sys.modules.get(parent), "__path__", None) if parent else None
        known = [module.name for module in pkgutil.iter_modules(paths)]
        raise UserError(
            f"{noun} {spec}: no module named {error.name}{nearest(last, known)}"
        ) from None
    except Exception as error:
        raise UserError(f"{noun} {spec}: {where(error)}") from error
    if not hasattr(module, name):
        known = [known for known in vars(module) if not known.startswith("_")]
        raise UserError(f"{noun} {spec}: {module_name} has no {name}{nearest(name, known)}")
    return getattr(module, name)


def _as_module(spec: str) -> str:
    """Return the part of an error that suggests module:name for the path of a Python file."""
    path, _, name = spec.partition(":")
    module = os.path.relpath(path.removesuffix(".py")).replace(os.sep, ".")
    return f"; did you mean {module}:{name or 'task'}?" if path.endswith(".py") else ""


def where(error: BaseException) -> str:
    """Return an error of the user's code as one line, with the file and line that raised it."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}{place_of(error)}"


def task_of(spec: str) -> Any:
    """Return jgd's task of this name, or the task at module:name."""
    from jgd.nodes import brief
    from jgd.training import Run, Task

    if ":" not in spec:
        from jgd.tuning import tasks

        if spec not in tasks.__all__:
            hint = _as_module(spec) or nearest(spec, tasks.__all__)
            hint = hint or ". Give a task of your own as module:name"
            raise UserError(f"no task named {spec!r}{hint}")
        return getattr(tasks, spec)()
    task = _load(spec, "task")
    if not isinstance(task, Task | Run) and callable(task):
        try:
            task = task()
        except Exception as error:
            raise UserError(f"task {spec}: {where(error)}") from error
    if not isinstance(task, Task | Run):
        raise UserError(f"task {spec} must be a jgd.Task or jgd.Run, got {brief(task)}")

    return task


def factory_of(spec: str) -> Callable[..., Any]:
    """Return jgd's factory of this name, or the factory at module:name."""
    from jgd.nodes import brief

    if ":" in spec:
        factory = _load(spec, "optimizer")
        if not callable(factory):
            raise UserError(f"optimizer {spec} must be a function, got {brief(factory)}")
        return factory if hasattr(factory, "__jgd_spec__") else _lifted(factory)
    try:
        return jgd.get(spec)
    except ValueError as error:
        raise UserError(str(error)) from None


def _lifted(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return the factory, lifted to a pytree of its numbers if it builds a plain optax pair."""
    import optax

    plain = (optax.GradientTransformation, optax.GradientTransformationExtraArgs)

    @functools.wraps(factory)
    def build(**arguments: Any) -> Any:
        optimizer = factory(**arguments)
        return jgd.as_pytree(factory)(**arguments) if type(optimizer) in plain else optimizer

    return build


def _values(spec: str) -> tuple[str, str, list[Any]]:
    """Parse b1=0.8,0.9 or rate=log:1e-5:1e-1:64.

    Returns: the name, the form ("log", "lin", or empty for a list), and the values.
    """
    import numpy as np

    name, equals, text = spec.partition("=")
    if not equals or not name or not text:
        raise UserError(f"--set must be NAME=VALUES, such as b1=0.8,0.9, got {spec!r}")
    form, *bounds = text.split(":")
    if not bounds:
        return name, "", [_value(item) for item in text.split(",")]
    if form not in ("log", "lin"):
        hint = nearest(form, ("log", "lin"))
        raise UserError(
            f"--set {name} must be a list, log:LOW:HIGH:COUNT or lin:LOW:HIGH:COUNT, got {text}"
            f"{hint}"
        )
    low = high = math.nan
    try:
        low, high, count = float(bounds[0]), float(bounds[1]), int(bounds[2])
    except (ValueError, IndexError):
        count = 0
    if len(bounds) != 3 or count < 1 or not math.isfinite(low + high):
        raise UserError(
            f"--set {name} must be {form}:LOW:HIGH:COUNT with finite bounds and a COUNT of at least"
            f" 1, got {text}"
        )
    if form == "lin":
        return name, form, list(np.linspace(low, high, count))
    if not 0 < low < high:
        raise UserError(f"--set {name} must have 0 < LOW < HIGH, got {text}")
    return name, form, list(np.geomspace(low, high, count))


def _value(text: str) -> Any:
    """Return a value of a list: None, a bool, a number, or else the string."""
    named = {"none": None, "true": True, "false": False}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return float(text)
    except ValueError:
        return text


def groups_of(optimizers: Iterable[str], sets: Iterable[str]) -> dict[str, Any]:
    """Return a grid for each optimizer, over those arguments of --set that it has."""
    from jgd.tuning.space import grid

    values: dict[str, list[Any]] = {}
    for name, _, more in map(_values, sets):
        values.setdefault(name, []).extend(more)
    groups: dict[str, Any] = {}
    rates = _values(f"learning_rate={RATES}")[2]
    for spec, factory, axes in _varied(optimizers, values, rates):
        name = spec.rpartition(":")[2]
        name = spec if name in groups else name
        if name in groups:
            raise UserError(f"--optimizer must have distinct names, got {spec} twice")
        try:
            groups[name] = grid(factory, **axes)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        except Exception as error:
            raise UserError(f"optimizer {spec}: {where(error)}") from error
    return groups


def space_of(
    optimizers: Sequence[str], sets: Iterable[str]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the factory of the one optimizer, and the distributions of its arguments."""
    if len(optimizers) != 1:
        raise UserError(f"--optuna needs one --optimizer, got {len(optimizers)}")
    space = dict[str, Any]()
    for spec in sets:
        name, values = _distribution(spec)
        if name in space:
            raise UserError(f"--set {name} must be given once with --optuna, got it twice")
        space[name] = values
    rates = _distribution(f"learning_rate={RATES}")[1]
    ((_, factory, space),) = _varied(optimizers, space, rates)
    return factory, space


def _distribution(spec: str) -> tuple[str, Any]:
    """Return an argument and its distribution: a range for log and lin, else a choice."""
    from jgd.tuning.distributions import choice, loguniform, uniform

    name, form, values = _values(spec)
    if not form:
        return name, choice(values)
    text = spec.partition("=")[2]
    low, high = map(float, text.split(":")[1:3])  # a COUNT of 1 has no last value
    if not low < high:
        raise UserError(f"--set {name} must have LOW < HIGH with --optuna, got {text}")
    return name, (loguniform if form == "log" else uniform)(low, high)


def _varied(
    optimizers: Iterable[str], values: Mapping[str, Any], default_rates: Any
) -> list[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Return each optimizer with its factory and the values of its arguments.

    An optimizer with a learning rate that --set does not name gets `default_rates`.
    """
    varied, unused, known = list[Any](), set(values), set[str]()
    for spec in optimizers:
        factory = factory_of(spec)
        parameters = inspect.signature(factory).parameters
        known.update(parameters)
        axes = {name: values[name] for name in values if name in parameters}
        unused -= set(axes)
        if "learning_rate" in parameters and "learning_rate" not in axes:
            axes = {"learning_rate": default_rates, **axes}
        if not axes:
            names = ", ".join(parameters) or "it has none"
            raise UserError(f"--set must give values for an argument of {spec} ({names}), got none")
        varied.append((spec, factory, axes))
    for name in unused:
        raise UserError(f"--set: no --optimizer has an argument {name}{nearest(name, known)}")
    return varied
