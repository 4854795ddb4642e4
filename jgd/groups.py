"""Other treatment for other parameters: groups, learning rates by path, learning rates by width.

A pattern is a glob over the path of a parameter, its keys joined by slashes: "*/bias" is every
bias, at the top as well, "embed/*" all below embed, "layers/0/*" all of the first layer. The
`value` that ends the paths of flax nnx does not count.
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
    """The path of each leaf, None among them, and the structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return [name(path).removesuffix("/value") for path, _ in pairs], structure


def _matches(name: str, pattern: str) -> bool:
    at_the_top = pattern.startswith("*/") and fnmatch.fnmatchcase(name, pattern[2:])
    return at_the_top or fnmatch.fnmatchcase(name, pattern)


def _labels(tree: Any, patterns: list[str]) -> Any:
    """For each leaf the first pattern that matches its path."""
    names, structure = paths(tree)
    found = [next((p for p in patterns if _matches(name, p)), _REST) for name in names]
    for pattern in patterns if names else []:
        if pattern not in found:
            taken = any(_matches(name, pattern) for name in names)
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            why = "earlier patterns take all" if taken else f"there are: {known}"
            raise TreeError(f"no parameter matches {pattern!r}; {why}")
    return structure.unflatten(found)


def matching(tree: Any, pattern: str) -> list[bool]:
    """For each leaf whether its path matches; raises TreeError if none does."""
    return [label == pattern for label in jax.tree.leaves(_labels(tree, [pattern]))]


@as_pytree
def param_groups(default: GradientTransformation, groups: Links) -> GradientTransformation:
    """An optimizer for each group of parameters, chosen by their paths.

        param_groups(adamw(1e-3), {"*/bias": adam(1e-3), "embed/*": set_to_zero()})

    Args:
      default: the optimizer of parameters that no pattern matches.
      groups: the optimizer of the parameters whose path matches a pattern; the first that matches
        counts. `set_to_zero()` freezes a group and keeps no memory for it.

    State: `optax.PartitionState`, with the state of each group under its pattern.
    Raises: ValueError in `init` and `update` for a pattern that matches no parameter.
    Differs from: `optax.partition`, whose labels are a tree. Rules that look at the whole tree,
      such as clipping by the global norm, see one group each.
    """
    labels = lambda tree: _labels(tree, list(groups))
    return partition({_REST: default, **groups}, labels)


def scale_by_path(factors: Mapping[str, Any]) -> GradientTransformation:
    """u = factor g, with the factor of the first pattern that matches the path, 1 if none does.

        chain(adamw(1e-3), scale_by_path({"embed/*": 0.1, "*/bias": 2.0}))

    Args:
      factors: a number or a schedule for each pattern.

    State: `optax.PartitionState` without memories.
    Raises: ValueError in `init` and `update` for a pattern that matches no parameter.
    Differs from: `param_groups`, of which it is the short form for learning rates.
    """
    if not isinstance(factors, Mapping):
        raise TypeError(f"scale_by_path: factors must be a dict of patterns, got {factors!r}")
    return param_groups(identity(), {pattern: scale(f) for pattern, f in factors.items()})


def scale_by_width(
    base: Any, *, rule: Literal["adam", "sgd"] = "adam", output_axis: int = -1
) -> GradientTransformation:
    """Learning rates by width (muP), so that the best rate of a narrow net is that of a wide one.

        u = g fan_in(base) / fan_in,  and for "sgd" times fan_out / fan_out(base)

    Args:
      base: the parameters of the net at the width where the rate was found, or their shapes: a tree
        of arrays or `jax.ShapeDtypeStruct`s with the same paths.
      rule: "adam" (default) for updates whose size does not follow the gradient's, "sgd" for those
        that are proportional to it.
      output_axis: the axis of an array that counts its outputs, -1 (default) for kernels of flax, 0
        for those of equinox and PyTorch; all others count its inputs, and vectors have one input.
        Where outputs have several axes (heads of attention), say the factor by `scale_by_path`.

    State: `EmptyState`.
    Raises: ValueError in `update` for a parameter that `base` lacks, or has with other axes.
    Differs from: `scale_by_path`, whose factors are yours. The other half of muP is the
      initialisation: variance 1 / fan_in, and 1 / fan_in^2 (or zeros) for the last layer.
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
    then = dict(base)

    def fans(shape: tuple[int, ...]) -> tuple[int, int]:
        outputs = shape[output_axis] if shape else 1
        return max(math.prod(shape) // max(outputs, 1), 1), max(outputs, 1)

    def scaled(name: str, g: Any) -> Any:
        if g is None:
            return None
        if name not in then or len(then[name]) != g.ndim:
            raise TreeError(
                f"the parameter {name} of shape {g.shape} is not in base, or has other"
                f" axes there: {then.get(name)}"
            )
        (inputs, outputs), (base_inputs, base_outputs) = fans(g.shape), fans(then[name])
        growth = outputs / base_outputs if rule == "sgd" else 1.0
        return g * (growth * base_inputs / inputs)

    def update(updates: Any, params: Any = None) -> Any:
        names, structure = paths(updates)
        leaves = structure.flatten_up_to(updates)
        return structure.unflatten(map(scaled, names, leaves))

    return stateless(update)
