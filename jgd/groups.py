"""Other treatment for other parameters: groups, learning rates by path, learning rates by width.

A pattern is a glob over the path of a parameter, its keys joined by slashes: "*/bias" is every
bias, at the top as well, "embed/*" all below embed, "layers/0/*" all of the first layer.
"""

import fnmatch
import math
from typing import Any, Literal

import jax
from optax import GradientTransformation

from jgd.arguments import Links, Structure
from jgd.combinators import aligned, partition, stateless
from jgd.pytree import as_pytree
from jgd.words import identity, scale

__all__ = ["param_groups", "scale_by_path", "scale_by_width"]

_REST = "the rest"


def _labels(tree: Any, patterns: list[str]) -> Any:
    """For each leaf the first pattern that matches its path."""
    is_none = lambda x: x is None
    paths, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    # a slash in front lets "*/bias" match "bias" too
    match = lambda name, pattern: any(fnmatch.fnmatchcase(n, pattern) for n in (name, f"/{name}"))
    found = [next((p for p in patterns if match(name, p)), _REST) for name in names]
    for pattern in patterns:
        if not any(match(name, pattern) for name in names):
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise ValueError(f"no parameter matches {pattern!r}; there are: {known}")
    return structure.unflatten(found)


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


def scale_by_path(factors: dict[str, Any]) -> GradientTransformation:
    """u = factor g, with the factor of the first pattern that matches the path, 1 if none does.

        chain(adamw(1e-3), scale_by_path({"embed/*": 0.1, "*/bias": 2.0}))

    Args:
      factors: a number or a schedule for each pattern.

    State: `optax.PartitionState` without memories.
    Raises: ValueError in `init` and `update` for a pattern that matches no parameter.
    Differs from: `param_groups`, of which it is the short form for learning rates.
    """
    return param_groups(identity(), {pattern: scale(f) for pattern, f in factors.items()})


@as_pytree
def scale_by_width(
    base: Structure, *, rule: Literal["adam", "sgd"] = "adam"
) -> GradientTransformation:
    """Learning rates by width (muP), so that the best rate of a narrow net is that of a wide one.

        u = g fan_in(base) / fan_in,  and for "sgd" times fan_out / fan_out(base)

    Args:
      base: the parameters of the net at the width where the rate was found, or their shapes: a tree
        of arrays or `jax.ShapeDtypeStruct`s. The last axis of an array counts its outputs, the
        others its inputs; vectors have one input.
      rule: "adam" (default) for updates whose size does not follow the gradient's, "sgd" for those
        that are proportional to it.

    State: `EmptyState`.
    Raises: ValueError in `update` for a tree with other leaves than `base`.
    Differs from: `scale_by_path`, whose factors are yours. The other half of muP is the
      initialisation: variance 1 / fan_in, and 1 / fan_in^2 (or zeros) for the last layer.
    Source: Yang et al. 2022, tables 3 and 8, arXiv:2203.03466.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)

    def factor(now: tuple[int, ...], then: tuple[int, ...]) -> float:
        growth_in = math.prod(now[:-1]) / math.prod(then[:-1])
        growth_out = math.prod(now[-1:]) / math.prod(then[-1:])
        return (growth_out if rule == "sgd" else 1.0) / growth_in

    def update(updates: Any, params: Any = None) -> Any:
        leaves, structure, (column,) = aligned(updates, shapes)
        pairs = zip(leaves, column, strict=True)
        scaled = [None if g is None else g * factor(g.shape, b.shape) for g, b in pairs]
        return structure.unflatten(scaled)

    return stateless(update)
