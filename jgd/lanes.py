"""Batches of optimizers: settings of one structure are lanes of one program.

lanes = stack([adam(1e-3), adam(1e-2)])     # each leaf has a leading axis of 2
lane(lanes, 1)                              # adam(0.01)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jgd.checks import admit, refuse
from jgd.nodes import brief

__all__ = ["lane", "stack"]


def stack(settings: Sequence[Any]) -> Any:
    """Return settings as lanes of one batch: each leaf has a leading axis of `len(settings)`.

    Args:
      settings: optimizers (or any pytrees of numbers) that differ only in their numbers.

    Raises:
      ValueError: if the list is empty, or the structures differ: such settings are groups.
    """
    if not isinstance(settings, list | tuple) or isinstance(settings, optax.GradientTransformation):
        refuse("stack: settings", "a list of settings", settings)
    if not settings:
        raise ValueError("stack: settings must hold at least one setting, got none")
    for setting in settings:
        check_numbers("stack", setting)
    structures = [jax.tree.structure(setting) for setting in settings]
    for index, structure in enumerate(structures):
        if structure != structures[0]:
            raise ValueError(
                f"stack: settings must have one structure, got {brief(settings[0])} as setting 0,"
                f" {brief(settings[index])} as setting {index}. Sweep them as two groups, or lift"
                " links of optax with jgd.as_pytree, so that their numbers are leaves, and pass the"
                " same function objects to all settings"
            )
    for number in zip(*map(jax.tree.leaves, settings), strict=True):
        if len(shapes := {np.shape(x) for x in number}) > 1:
            raise ValueError(f"stack: each number must have one shape, got {sorted(shapes)}")
    return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x, float) for x in xs]), *settings)


def check_numbers(function: str, setting: Any, what: str = "a setting") -> None:
    """Raise TypeError for leaves that are not numbers, such as functions of optax optimizers."""
    hides = lambda x: any(map(callable, jax.tree.leaves(x)))
    if hides(setting):
        of_optax = lambda x: isinstance(x, optax.GradientTransformation) and hides(x)
        hidden = next(filter(hides, jax.tree.leaves(setting, is_leaf=of_optax)))
        raise TypeError(
            f"{function}: a setting must be a pytree of numbers, got {brief(hidden)}, which hides"
            " its numbers in functions. Lift a factory of optax with jgd.as_pytree, as in"
            " jgd.as_pytree(optax.lion)(1e-4), and use jgd.chain in place of optax.chain"
        )
    for leaf in jax.tree.leaves(setting):
        array = hasattr(leaf, "dtype") or hasattr(leaf, "__array__")
        if array and jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.prng_key):
            raise TypeError(
                f"{function}: random keys of {what} must be raw, got {leaf.dtype}. Use"
                " jax.random.key_data(keys)"
            )
        text = getattr(getattr(leaf, "dtype", None), "kind", "") in ("O", "S", "U")
        if text or not (array or isinstance(leaf, int | float | complex)):
            refuse(f"{function}: {what}", "a pytree of numbers", leaf)


def length(function: str, lanes: Any) -> int:
    """Return the number of lanes in a batch. Raises ValueError if it has no common leading axis."""
    check_numbers(function, lanes)
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(lanes)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"{function}: a batch of settings must have one leading axis on all its numbers, got"
            f" {brief(lanes)}. Build it with jgd.grid, jgd.random_search, jgd.stack or jax.vmap of"
            " the factory"
        )
    return sizes.pop()[0]


def lane(lanes: Any, index: int) -> Any:
    """Return lane `index` of a batch: each leaf without its leading axis. Inverts `stack`."""
    count, index = length("lane", lanes), admit("lane: index", index, int)
    if not -count <= index < count:
        raise IndexError(f"lane: index must be in [{-count}, {count - 1}], got {index}")
    return jax.tree.map(lambda x: x[index], lanes)
