"""Groups of parameters: optimizers by path, learning rates by path, learning rates by width.

A pattern is a glob over the path of a parameter, whose keys are joined by slashes: "*/bias" matches
every bias, also at the top level, "embed/*" all parameters below embed, "layers/0/*" all
parameters of the first layer. The `value` that ends each path of flax nnx is ignored.
"""

import fnmatch
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from optax import GradientTransformation

from jgd.arguments import Links, Structure
from jgd.combinators import partition, stateless
from jgd.pytree import as_pytree
from jgd.transforms import identity, scale
from jgd.trees import TreeError

__all__ = ["param_groups", "scale_by_path", "scale_by_width"]

_REST = "//the rest"  # no path begins with two slashes


def paths(tree: Any) -> tuple[list[str], Any]:
    """Return the path of each leaf, with None as a leaf, and the structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return [name(path).removesuffix("/value") for path, _ in pairs], structure


def _matches(name: str, pattern: str) -> bool:
    at_top_level = pattern.startswith("*/") and fnmatch.fnmatchcase(name, pattern[2:])
    return at_top_level or fnmatch.fnmatchcase(name, pattern)


def _labels(tree: Any, patterns: list[str]) -> Any:
    """Return, for each leaf, the first pattern that matches its path."""
    names, structure = paths(tree)
    labels = [next((p for p in patterns if _matches(name, p)), _REST) for name in names]
    for pattern in patterns if names else []:
        if pattern not in labels:
            shadowed = any(_matches(name, pattern) for name in names)
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            reason = (
                "earlier patterns match its parameters first"
                if shadowed
                else f"the parameters are {known}"
            )
            raise TreeError(f"no parameter matches {pattern!r}; {reason}")
    return structure.unflatten(labels)


def matching(tree: Any, pattern: str) -> list[bool]:
    """Return, for each leaf, whether its path matches. Raises TreeError if none does."""
    return [label == pattern for label in jax.tree.leaves(_labels(tree, [pattern]))]


@as_pytree
def param_groups(default: GradientTransformation, groups: Links) -> GradientTransformation:
    """Update each group of parameters with its own optimizer, chosen by path.

        param_groups(adamw(1e-3), {"*/bias": adam(1e-3), "embed/*": set_to_zero()})

    Args:
      default: the optimizer of parameters that no pattern matches.
      groups: pattern -> optimizer of the parameters whose path matches. The first pattern that
        matches counts. `set_to_zero()` freezes a group and keeps no state for it.

    State: `optax.PartitionState`, with the state of each group under its pattern.
    Raises: ValueError in `init` and `update` for a pattern that matches no parameter.
    Differs from: `optax.partition`, whose labels are a tree. As there, a rule over the whole tree,
      such as clipping by the global norm, sees only its own group.
    """
    labels = lambda tree: _labels(tree, list(groups))
    return partition({_REST: default, **groups}, labels)


def scale_by_path(factors: Mapping[str, Any]) -> GradientTransformation:
    """u = factor g, with the factor of the first pattern that matches the path, else 1.

        chain(adamw(1e-3), scale_by_path({"embed/*": 0.1, "*/bias": 2.0}))

    Args:
      factors: pattern -> number or schedule.

    State: `optax.PartitionState` without accumulators.
    Raises: ValueError in `init` and `update` for a pattern that matches no parameter.
    Differs from: `param_groups`, which takes an optimizer, not a factor, for each pattern.
    """
    if not isinstance(factors, Mapping):
        raise TypeError(
            f"scale_by_path: factors must be a dict from patterns to factors, got {factors!r}"
        )
    return param_groups(identity(), {pattern: scale(f) for pattern, f in factors.items()})


def scale_by_width(
    base: Any, *, rule: Literal["adam", "sgd"] = "adam", output_axis: int = -1
) -> GradientTransformation:
    """Scale updates by layer width (muP): the best learning rate carries over to wider nets.

        u = g fan_in(base) / fan_in,  and for "sgd" times fan_out / fan_out(base)

    Args:
      base: the parameters of the net at the width where the rate was tuned, or their shapes: a tree
        of arrays or `jax.ShapeDtypeStruct`s with the same paths.
      rule: "adam" (default) for updates whose size does not depend on the size of the gradient,
        "sgd" for updates that are proportional to it.
      output_axis: the axis over the outputs of an array: -1 (default) for kernels of flax, 0 for
        those of equinox and PyTorch. All other axes are inputs, and a vector has one input. If the
        outputs have several axes (attention heads), set the factor with `scale_by_path`.

    State: `EmptyState`.
    Raises: ValueError in `update` for a parameter that `base` lacks, or has with another rank.
    Differs from: `scale_by_path`, whose factors you choose. The other half of muP is the
      initialization: variance 1 / fan_in, and 1 / fan_in^2 (or zeros) for the last layer.
    Source: Yang et al. 2022, tables 3 and 8, arXiv:2203.03466.
    """
    names, _ = paths(base)
    shapes = [jnp.shape(x) for x in jax.tree.leaves(base, is_leaf=lambda x: x is None)]
    pairs = tuple(zip(names, shapes, strict=True))
    return _scale_by_width(pairs, rule=rule, output_axis=output_axis)


@as_pytree
def _scale_by_width(
    base: Structure, *, rule: Literal["adam", "sgd"], output_axis: Structure
) -> GradientTransformation:
    base_shapes = dict(base)

    def fans(shape: tuple[int, ...]) -> tuple[int, int]:
        outputs = shape[output_axis] if shape else 1
        return max(math.prod(shape) // max(outputs, 1), 1), max(outputs, 1)

    def scaled(name: str, g: Any) -> Any:
        if g is None:
            return None
        shape = base_shapes.get(name)
        if shape is None or len(shape) != g.ndim:
            raise TreeError(
                f"base must have the parameter {name} with as many axes as shape {g.shape}, got"
                f" {'no such parameter' if shape is None else f'shape {shape}'}"
            )
        (inputs, outputs), (base_inputs, base_outputs) = fans(g.shape), fans(shape)
        growth = outputs / base_outputs if rule == "sgd" else 1.0
        return g * (growth * base_inputs / inputs)

    def update(updates: Any, params: Any = None) -> Any:
        names, structure = paths(updates)
        leaves = structure.flatten_up_to(updates)
        return structure.unflatten(map(scaled, names, leaves))

    return stateless(update)
