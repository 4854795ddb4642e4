"""Optimizers of jgd in flax nnx: their numbers are Variables, so a new rate does not retrace.

optimizer = jgd.nnx.Optimizer(model, jgd.adam(1e-3), wrt=nnx.Param)
optimizer.update(model, grads)                              # inside nnx.jit, as in flax
optimizer.tx = optimizer.tx._replace(learning_rate=1e-4)    # does not retrace
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jgd.lanes import check_numbers
from jgd.training import optimizer_of
from jgd.tuning.result import Best

__all__ = ["Number", "Optimizer"]


class Number(nnx.OptState):
    """A number of an optimizer, such as its learning rate."""


class Optimizer(nnx.Optimizer[Any]):
    """A `flax.nnx.Optimizer` that holds the numbers of its optimizer as Variables.

        result = jgd.sweep(task, jgd.grid(jgd.adam, learning_rate=rates), steps)
        optimizer = jgd.nnx.Optimizer(model, result.best, wrt=nnx.Param)

    `nnx.state`, `nnx.split` and checkpoints contain the numbers under `numbers`, as `Number`, a
    subclass of `nnx.OptState`.

    Args:
      model: a module of flax.
      tx: an optimizer of jgd with floats or arrays as numbers, a setting that contains one, or the
        best of a sweep, whose optimizer state is not used: each state is initialized.
      wrt: filter for the trained Variables, as in flax.
      options: other arguments of `flax.nnx.Optimizer`.

    Raises: TypeError for an optimizer that is not a pytree of its numbers, such as optax's.
    Differs from: `flax.nnx.Optimizer`, which holds the optimizer as structure: it refuses arrays as
      numbers, and `nnx.jit` retraces for another learning rate.
    """

    def __init__(self, model: Any, tx: Any, *, wrt: Any, **options: Any) -> None:
        setting = tx.setting if isinstance(tx, Best) else tx
        check_numbers("Optimizer", setting)
        super().__init__(model, optimizer_of(setting), wrt=wrt, **options)

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer, with arrays as numbers. Assign another optimizer to change them."""
        return jax.tree.map(lambda number: number[...], self.numbers, is_leaf=_is_number)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "tx":
            super().__setattr__(name, value)
            return
        arrays = jax.tree.map(lambda x: jnp.asarray(x, float), value)
        if "numbers" in vars(self) and jax.tree.structure(arrays) == jax.tree.structure(self.tx):
            jax.tree.map(_assign, self.numbers, arrays, is_leaf=_is_number)
        else:
            self.numbers = nnx.data(jax.tree.map(Number, arrays))


def _is_number(x: Any) -> bool:
    return isinstance(x, Number)


def _assign(number: Any, value: jax.Array) -> None:
    number[...] = value
