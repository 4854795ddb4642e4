"""Counts of what one update costs: stack frames, equations, bytes and kernels.

None of them depends on how busy the machine is, so `test_costs.py` bounds them relative to optax.
`benchmarks/step.py` reports them beside its timings; both take optimizers and trees from here.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.extend.core import Primitive

FRAMES = 9  # the limit from `tx.update` to the arithmetic
FRAMES_OF = {"muon": 13}  # optax's has 11: groups of leaves, then matrices, then their norm
# Relative to optax. An average that is exact for decimals has five equations, optax's has three.
BOUNDS = {"equations": 2.0, "bytes": 1.1, "kernels": 1.15}


def _cautious(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def masked(u: Any, g: Any) -> Any:
        keep = u * g < 0
        return jnp.where(keep, u, 0) / jnp.maximum(jnp.mean(keep), 1e-3)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        steps, state = inner.update(updates, state, params)
        return jax.tree.map(masked, steps, updates), state

    return optax.GradientTransformation(inner.init, update)


# optax under jgd's names, so that one expression builds both optimizers
OPTAX = SimpleNamespace(
    **{**vars(optax.contrib), **vars(optax)},
    momentum=partial(optax.sgd, momentum=0.9),
    cautious=_cautious,
)

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda library: library.sgd(1e-3),
    "momentum": lambda library: library.momentum(1e-3),
    "rmsprop": lambda library: library.rmsprop(1e-3),
    "adam": lambda library: library.adam(1e-3),
    "adamw": lambda library: library.adamw(1e-3),
    "adamw, warm-up cosine": lambda library: library.adamw(
        library.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 1000)
    ),
    "lion": lambda library: library.lion(1e-3),
    "adabelief": lambda library: library.adabelief(1e-3),
    "lamb": lambda library: library.lamb(1e-3),
    "adafactor": lambda library: library.adafactor(1e-3),
    "nadam": lambda library: library.nadam(1e-3),
    "radam": lambda library: library.radam(1e-3),
    "muon": lambda library: library.muon(1e-3),
    "prodigy": lambda library: library.prodigy(1.0),
}
COMPOSITIONS: dict[str, Callable[[Any], Any]] = {
    "chain(identity(), adamw)": lambda library: library.chain(
        library.identity(), library.adamw(1e-3)
    ),
    "cautious(adamw)": lambda library: library.cautious(library.adamw(1e-3)),
}


def _shapes(tree: Any) -> Any:
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=is_shape)


def _gpt2(layers: int = 12, width: int = 192) -> Any:
    """Return the leaves of GPT-2 small, at a quarter of its width."""
    dense = lambda n, m: {"kernel": (n, m), "bias": (m,)}
    norm = lambda: {"scale": (width,), "bias": (width,)}
    layer = lambda: {
        "ln_1": norm(),
        "attn": {"qkv": dense(width, 3 * width), "proj": dense(width, width)},
        "ln_2": norm(),
        "mlp": {"fc": dense(width, 4 * width), "proj": dense(4 * width, width)},
    }
    blocks = {f"h_{i}": layer() for i in range(layers)}
    return {"wte": (50257, width), "wpe": (1024, width), **blocks, "ln_f": norm()}


TREES = {
    "small": _shapes({"w_1": (32, 64), "b_1": (64,), "w_2": (64, 10), "b_2": (10,)}),
    "GPT-2": _shapes(_gpt2()),
    "thousand": _shapes([(64,)] * 1000),
    "one leaf": _shapes([(5000, 5000)]),
}


def shapes_of_arguments(tx: Any, params: Any) -> tuple[Any, Any, Any]:
    """Return the shapes of the arguments of `tx.update`: gradients, state and parameters."""
    return params, jax.eval_shape(tx.init, params), params


def trace(tx: Any, shapes: tuple[Any, Any, Any]) -> jax.stages.Traced:
    """Trace one update with donated state. The new function object bypasses the outer cache."""
    update = lambda updates, state, params: tx.update(updates, state, params)
    return jax.jit(update, donate_argnums=1).trace(*shapes)


# Calls are counted by what they call. In float32, a conversion only makes the type of a number
# strong; jax from 0.11 writes an equation for it.
_NOT_EQUATIONS = ("jit", "pjit", "closed_call", "convert_element_type")


def equations(traced: jax.stages.Traced) -> int:
    """Count the equations of a traced function, nested ones included, as if calls were inlined."""

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            total += equation.primitive.name not in _NOT_EQUATIONS
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    total += count(inner) if hasattr(inner, "eqns") else 0
        return total

    return count(traced.jaxpr.jaxpr)


def bytes_accessed(compiled: jax.stages.Compiled) -> float:
    """Return the bytes that XLA estimates a compiled program to read and write."""
    return compiled.cost_analysis()["bytes accessed"]  # type: ignore[index]


# These do no work, or the computations that they run are counted.
_NOT_KERNELS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "call"}
_NOT_KERNELS |= {"while", "conditional"}


def kernels(compiled: jax.stages.Compiled) -> int:
    """Count fusions and other instructions that run by themselves, loop bodies included."""
    text = compiled.as_text() or ""
    fused = set(re.findall(r"calls=%?([\w.-]+)", text))
    for line in text.splitlines():
        if " call(" not in line:  # the function of a reduction, for example
            fused.update(re.findall(r"to_apply=%?([\w.-]+)", line))
    total, counted = 0, False
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            counted = header[1] not in fused
        elif counted and (op := re.match(r"\s+(?:ROOT )?\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(", line)):
            total += op[1] not in _NOT_KERNELS
    return total


def counts(traced: jax.stages.Traced, compiled: jax.stages.Compiled) -> dict[str, float]:
    """Return the counts that `BOUNDS` limits."""
    return {
        "equations": equations(traced),
        "bytes": bytes_accessed(compiled),
        "kernels": kernels(compiled),
    }


def frames(tx: Any, params: Any, package: ModuleType) -> int:
    """Return the most stack frames of `package` above a primitive that one update binds.

    Clears jax's caches, since the bodies of cached functions would not run. Python 3.12 inlines
    comprehensions, so their frames in 3.11 do not count.
    """
    home = str(Path(package.__file__ or "").parent) + "/"
    deepest, bind = 0, Primitive.bind

    def observed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal deepest
        depth, frame = 0, sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            depth += code.co_filename.startswith(home) and not code.co_name.endswith("comp>")
            frame = frame.f_back
        deepest = max(deepest, depth)
        return bind(self, *args, **kwargs)

    shapes = shapes_of_arguments(tx, params)
    jax.clear_caches()
    with mock.patch.object(Primitive, "bind", observed):
        trace(tx, shapes)
    return deepest
