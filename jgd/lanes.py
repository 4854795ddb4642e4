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
    """Return settings of one structure as lanes: each leaf with a leading axis of `len(settings)`.

    Args:
      settings: optimizers (or any pytrees of numbers) that differ in their numbers only.

    Raises:
      ValueError: if there are none, or their structures differ: those are groups, not lanes.
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
                f"stack: setting {index} has another structure than setting 0, got"
                f" {brief(settings[index])} beside {brief(settings[0])}. Sweep it as a group of its"
                " own, or lift links of optax with jgd.as_pytree, so that their numbers are leaves,"
                " and give all settings the same function objects"
            )
    for number in zip(*map(jax.tree.leaves, settings), strict=True):
        if len(shapes := {np.shape(x) for x in number}) > 1:
            raise ValueError(f"stack: each number must have one shape, got {sorted(shapes)}")
    return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x, float) for x in xs]), *settings)


def check_numbers(function: str, setting: Any, what: str = "a setting") -> None:
    """Raise TypeError for leaves that are no numbers: functions, as in an optimizer of optax."""
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
    """Return the number of lanes in a batch. Raises ValueError for one setting, or unlike ones."""
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
    lanes_in, index = length("lane", lanes), admit("lane: index", index, int)
    if not -lanes_in <= index < lanes_in:
        raise IndexError(f"lane {index} of {lanes_in} lanes")
    return jax.tree.map(lambda x: x[index], lanes)
