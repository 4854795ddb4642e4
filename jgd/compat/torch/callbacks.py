"""PyTorch's scheduler that acts on a metric, as a pair of pure functions."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jgd.arguments import BelowOne, Count, NonNegative, Number
from jgd.pytree import MonitorPair, as_pytree
from jgd.stopping import worst
from jgd.trees import check_state

__all__ = ["ReduceLROnPlateauState", "reduce_lr_on_plateau"]


class ReduceLROnPlateauState(NamedTuple):
    """State of `reduce_lr_on_plateau`: scalars, or arrays with a lane axis."""

    learning_rate: jax.Array  # float
    best: jax.Array  # float
    num_bad_epochs: jax.Array  # int32, epochs without improvement that count
    cooldown_counter: jax.Array  # int32, epochs left in the cooldown


@as_pytree
def reduce_lr_on_plateau(
    mode: Literal["min", "max"] = "min",
    factor: BelowOne = 0.1,
    patience: Count = 10,
    threshold: Number = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: Count = 0,
    min_lr: NonNegative = 0,
    eps: NonNegative = 1e-8,
) -> MonitorPair:
    """PyTorch's ReduceLROnPlateau: reduce the learning rate when a metric stops improving.

        better: metric < best (1 - threshold) for "min", > best (1 + threshold) for "max";
                with "abs" metric < best - threshold, > best + threshold
        where better:              best <- metric, bad <- 0; elsewhere bad <- bad + 1
        in the cooldown:           cooldown_counter <- cooldown_counter - 1, bad <- 0
        where bad > patience:      new = max(factor learning_rate, min_lr),
                                   learning_rate <- new if learning_rate - new > eps,
                                   cooldown_counter <- cooldown, bad <- 0

    `init(learning_rate) -> state`, `update(metric, state) -> (learning_rate, state)`, one call per
    epoch. The learning rate may be traced. NaN is never better. `best` starts at infinity (minus
    infinity for "max"), on which a metric of the same value does not improve.

    Args:
      mode: "min" (default) for a metric that should fall, "max" for one that should rise.
      factor: below 1, multiplies the learning rate at a reduction; 0.1 by default.
      patience: at least 0, epochs without improvement before the one that reduces; 10 by default.
      threshold: the least improvement that counts; 1e-4 by default.
      threshold_mode: "rel" (default) for a threshold relative to the best metric, or "abs".
      cooldown: at least 0, epochs after a reduction that do not count as bad; 0 by default.
      min_lr: at least 0, the lower bound of the learning rate; 0 by default. A single number,
        since jgd has no parameter groups in an optimizer.
      eps: at least 0; reductions that are not larger are skipped. 1e-8 by default.

    State: `ReduceLROnPlateauState(learning_rate, best, num_bad_epochs, cooldown_counter)`. The
      counters also restart where `eps` skips a reduction.
    Raises: ValueError for a factor of 1 or more or an unknown mode.
    Differs from: PyTorch, which computes in float64: equal under x64, else up to float32 rounding.
      `jgd.compat.keras.reduce_lr_on_plateau`, whose patience and cooldown are one epoch shorter and
      whose threshold is absolute.
    """
    up, relative = mode == "max", threshold_mode == "rel"

    def bound(best: Any) -> Any:
        if relative:
            return best * (1 + threshold if up else 1 - threshold)
        return best + threshold if up else best - threshold

    def init(learning_rate: Any) -> ReduceLROnPlateauState:
        zero = jnp.zeros([], jnp.int32)
        return ReduceLROnPlateauState(learning_rate, worst(mode), zero, zero)

    def update(metric: Any, state: Any) -> tuple[Any, ReduceLROnPlateauState]:
        rate, best, bad, cooling = check_state(state, ReduceLROnPlateauState)
        better = metric > bound(best) if up else metric < bound(best)
        bad = jnp.where(better | (cooling > 0), 0, bad + 1)
        over = bad > patience
        lower = jnp.maximum(rate * factor, min_lr)
        pause = jnp.where(over, jnp.ceil(cooldown), cooling - 1)
        new = ReduceLROnPlateauState(
            learning_rate=jnp.where(over & (rate - lower > eps), lower, rate),
            best=jnp.where(better, metric, best),
            num_bad_epochs=jnp.where(over, 0, bad),
            cooldown_counter=jnp.maximum(pause, 0).astype(jnp.int32),
        )
        return new.learning_rate, new

    return MonitorPair(init, update)
