"""Batches of optimizers: settings of one structure are lanes of one program.

lanes = stack([adam(1e-3), adam(1e-2)])     # each leaf has a leading axis of 2
lane(lanes, 1)                              # adam(0.01)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jgd.nodes import brief

__all__ = ["lane", "stack"]


def stack(settings: Sequence[Any]) -> Any:
    """Return settings of one structure as lanes: each leaf with a leading axis of `len(settings)`.

    Args:
      settings: optimizers (or any pytrees of numbers) that differ in their numbers only.

    Raises:
      ValueError: if there are none, or their structures differ: those are groups, not lanes.
    """
    if not settings:
        raise ValueError("stack: needs at least one setting")
    for setting in settings:
        refuse_functions("stack", setting)
    structures = [jax.tree.structure(setting) for setting in settings]
    for index, structure in enumerate(structures):
        if structure != structures[0]:
            raise ValueError(
                f"stack: setting {index} has another structure than setting 0, got"
                f" {brief(settings[index])} beside {brief(settings[0])}. Sweep it as a group of its"
                " own, or lift links of optax with jgd.as_pytree, so that their numbers are leaves,"
                " and give all settings the same function objects"
            )
    return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x, float) for x in xs]), *settings)


def refuse_functions(function: str, setting: Any) -> None:
    """Raise TypeError for a setting whose leaves are functions, such as an optimizer of optax."""
    hides = lambda x: any(map(callable, jax.tree.leaves(x)))
    if hides(setting):
        of_optax = lambda x: isinstance(x, optax.GradientTransformation) and hides(x)
        hidden = next(filter(hides, jax.tree.leaves(setting, is_leaf=of_optax)))
        raise TypeError(
            f"{function}: a setting must be a pytree of numbers, got {brief(hidden)}, which hides"
            " its numbers in functions. Lift a factory of optax with jgd.as_pytree, as in"
            " jgd.as_pytree(optax.lion)(1e-4), and use jgd.chain in place of optax.chain"
        )


def lane(lanes: Any, index: int) -> Any:
    """Return lane `index` of a batch: each leaf without its leading axis. Inverts `stack`."""
    refuse_functions("lane", lanes)
    leaves = jax.tree.leaves(lanes)
    if leaves and not -len(leaves[0]) <= index < len(leaves[0]):
        raise IndexError(f"lane {index} of {len(leaves[0])} lanes")
    return jax.tree.map(lambda x: x[index], lanes)
