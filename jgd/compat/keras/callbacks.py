"""Keras's callbacks that act on a metric, as pairs of pure functions with Keras's arguments.

    init, update = reduce_lr_on_plateau(factor=0.5, patience=2)
    state = init(learning_rate)
    learning_rate, state = update(val_loss, state)          # at the end of each epoch

Each call of `update` counts as one epoch. The metric is an argument of `update`; its name, in
`monitor`, only tells `mode="auto"` whether it should fall or rise.
"""

import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import jgd.stopping
from jgd.arguments import AnyNumber, BelowOne, Count, NonNegative, Number, Structure
from jgd.pytree import MonitorPair, as_pytree
from jgd.stopping import improves, worst
from jgd.trees import check_state

__all__ = ["ReduceLROnPlateauState", "early_stopping", "reduce_lr_on_plateau"]

Mode = Literal["auto", "min", "max"]

# Keras's metrics: their default names and the aliases that `compile` takes, without underscores
_RISES = frozenset(
    [
        "acc",
        "accuracy",
        "auc",
        "binaryaccuracy",
        "binaryiou",
        "categoricalaccuracy",
        "concordancecorrelation",
        "cosinesimilarity",
        "f1score",
        "fbetascore",
        "iou",
        "meaniou",
        "onehotiou",
        "onehotmeaniou",
        "pearsoncorrelation",
        "precision",
        "precisionatrecall",
        "r2score",
        "recall",
        "recallatprecision",
        "sensitivityatspecificity",
        "sparsecategoricalaccuracy",
        "sparsetopkcategoricalaccuracy",
        "specificityatsensitivity",
        "topkcategoricalaccuracy",
    ]
)
_FALLS = frozenset(
    [
        "bce",
        "binarycrossentropy",
        "categoricalcrossentropy",
        "categoricalhinge",
        "hinge",
        "kldivergence",
        "logcosh",
        "logcosherror",
        "loss",
        "mae",
        "mape",
        "meanabsoluteerror",
        "meanabsolutepercentageerror",
        "meansquarederror",
        "meansquaredlogarithmicerror",
        "mse",
        "msle",
        "poisson",
        "rootmeansquarederror",
        "sparsecategoricalcrossentropy",
        "squaredhinge",
    ]
)


def _direction(callback: str, monitor: str, mode: str) -> Literal["min", "max"]:
    """Return `mode` or, for "auto", the direction of Keras's own metric with this name."""
    # Keras numbers the metrics of one class: "auc_1" is the second one of a process
    name = re.sub(r"_\d+$", "", monitor.removeprefix("val_")).replace("_", "").lower()
    if mode == "max" or (mode == "auto" and name in _RISES):
        return "max"
    if mode == "min" or name in _FALLS:
        return "min"
    raise ValueError(
        f"{callback}: mode must be 'min' or 'max' for a metric that is not Keras's own, got"
        f" {mode!r} for {monitor!r}"
    )


@as_pytree
def early_stopping(
    monitor: str = "val_loss",
    min_delta: Number = 0,
    patience: Count = 0,
    verbose: Structure = 0,
    mode: Mode = "auto",
    baseline: AnyNumber | None = None,
    restore_best_weights: bool = False,
    start_from_epoch: Count = 0,
) -> MonitorPair:
    """Keras's EarlyStopping: the rule of `jgd.stopping.early_stopping` with Keras's arguments.

    `init() -> state`, `update(metric, state) -> (should_stop, state)`.

    Args:
      monitor: the metric's name, "val_loss" by default; only mode "auto" uses it.
      min_delta: the least improvement that counts, in absolute value; 0 by default.
      patience: at least 0, epochs without improvement until the stop; 0 by default, the same as 1.
      verbose: ignored, since nothing inside jit prints.
      mode: "min", "max" or "auto" (default), which knows Keras's own metrics and losses by their
        names, with or without the prefix "val_".
      baseline: an improvement resets the patience only if the metric also beats this value; None
        (default): every improvement does.
      restore_best_weights: ignored. To end with the best parameters as Keras does, stopped or not,
        update `best = jgd.stopping.keep_best(state, params, best)` each epoch.
      start_from_epoch: at least 0, the first epoch that counts; 0 by default.

    State: `jgd.stopping.EarlyStoppingState`.
    Raises: ValueError for mode "auto" with a metric that is not Keras's own, as in Keras where it
      finds no direction; for an unknown mode, where Keras warns and uses "auto".
    Differs from: Keras, whose mode "auto" also knows the user's metrics, from the compiled model.
    """
    direction = _direction("early_stopping", monitor, mode)
    return jgd.stopping.early_stopping(patience, min_delta, direction, baseline, start_from_epoch)


class ReduceLROnPlateauState(NamedTuple):
    """State of `reduce_lr_on_plateau`: scalars, or arrays with a lane axis."""

    learning_rate: jax.Array  # float
    best: jax.Array  # float
    wait: jax.Array  # int32, epochs without improvement that count
    cooldown_counter: jax.Array  # int32, epochs left in the cooldown
    epoch: jax.Array  # int32, epochs so far


@as_pytree
def reduce_lr_on_plateau(
    monitor: str = "val_loss",
    factor: BelowOne = 0.1,
    patience: Count = 10,
    verbose: Structure = 0,
    mode: Mode = "auto",
    min_delta: Number = 1e-4,
    cooldown: Count = 0,
    min_lr: NonNegative = 0.0,
) -> MonitorPair:
    """Keras's ReduceLROnPlateau: reduce the learning rate when a metric stops improving.

        in the cooldown:                        cooldown_counter <- cooldown_counter - 1
        where metric improves on best:          best <- metric, wait <- 0
        elsewhere, if the cooldown is over:     wait <- wait + 1, and where wait >= patience and
          learning_rate > min_lr:               learning_rate <- max(factor learning_rate, min_lr),
                                                cooldown_counter <- cooldown, wait <- 0

    `init(learning_rate) -> state`, `update(metric, state) -> (learning_rate, state)`. The
    learning rate may be traced. A metric improves as in `jgd.stopping.early_stopping`: by more than
    |min_delta|, never if it is NaN, and always in the first epoch.

    Args:
      monitor: the metric's name, "val_loss" by default; only mode "auto" uses it.
      factor: below 1, multiplies the learning rate at a reduction; 0.1 by default.
      patience: at least 0, epochs without improvement until a reduction; 10 by default. 0 is the
        same as 1.
      verbose: ignored.
      mode: "min", "max" or "auto" (default), as in `early_stopping`.
      min_delta: the least improvement that counts, in absolute value; 1e-4 by default.
      cooldown: at least 0, 0 by default. After a reduction, cooldown - 1 epochs do not count
        towards `patience`.
      min_lr: at least 0, the lower bound of the learning rate; 0 by default.

    State: `ReduceLROnPlateauState(learning_rate, best, wait, cooldown_counter, epoch)`.
    Raises: ValueError for a factor of 1 or more, and for the modes that `early_stopping` refuses.
    Differs from: `jgd.compat.torch.reduce_lr_on_plateau`, whose patience and cooldown are one epoch
      longer and whose threshold is relative.
    """
    direction = _direction("reduce_lr_on_plateau", monitor, mode)

    def init(learning_rate: Any) -> ReduceLROnPlateauState:
        zero = jnp.zeros([], jnp.int32)
        return ReduceLROnPlateauState(learning_rate, worst(direction), zero, zero, zero)

    def update(metric: Any, state: Any) -> tuple[Any, ReduceLROnPlateauState]:
        rate, best, wait, cooling, epoch = check_state(state, ReduceLROnPlateauState)
        cooling = jnp.maximum(cooling - 1, 0)
        better = (epoch == 0) | improves(direction, metric, best, min_delta)
        bad = ~better & (cooling == 0)
        wait = jnp.where(better, 0, wait + bad)
        # compare in float32 as Keras does: a rate at min_lr must not count as above it
        above = jnp.asarray(rate, jnp.float32) > jnp.asarray(min_lr, jnp.float32)
        reduce = bad & (wait >= patience) & above
        new = ReduceLROnPlateauState(
            learning_rate=jnp.where(reduce, jnp.maximum(rate * factor, min_lr), rate),
            best=jnp.where(better, metric, best),
            wait=jnp.where(reduce, 0, wait),
            cooldown_counter=jnp.where(reduce, jnp.ceil(cooldown), cooling).astype(jnp.int32),
            epoch=epoch + 1,
        )
        return new.learning_rate, new

    return MonitorPair(init, update)
