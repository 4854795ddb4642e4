"""Keras's callbacks that decide from a metric, as pure pairs with its arguments and counting.

    init, update = reduce_lr_on_plateau(factor=0.5, patience=2)
    state = init(learning_rate)
    learning_rate, state = update(val_loss, state)          # at the end of each epoch

One call of `update` is one epoch. `monitor` serves to find the direction of `mode="auto"`; the
metric itself is handed to `update`.
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

# Keras's own metrics by the names it gives them and those `compile` takes, without underscores
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
    """`mode`, or that of the metric called `monitor`: what Keras knows of its own metrics."""
    # "auc_1" is the second metric of its class in a process
    name = re.sub(r"_\d+$", "", monitor.removeprefix("val_")).replace("_", "").lower()
    if mode == "max" or (mode == "auto" and name in _RISES):
        return "max"
    if mode == "min" or name in _FALLS:
        return "min"
    raise ValueError(
        f"{callback}: mode 'auto' does not know whether {monitor!r} should rise or fall: mode must"
        " be 'min' or 'max'"
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
    """Keras's EarlyStopping: `jgd.stopping.early_stopping`, which says the rule, by Keras's call.

    `init() -> state`, `update(metric, state) -> (should_stop, state)`.

    Args:
      monitor: the metric's name, "val_loss" by default; see the module.
      min_delta: the least improvement that counts, of which the absolute value is taken; 0.
      patience: at least 0, epochs without improvement until the stop; 0, which is as 1.
      verbose: taken and ignored: nothing inside jit prints.
      mode: "min", "max" or "auto" (default): by the name of one of Keras's own metrics or losses,
        with or without "val_" in front.
      baseline: a value to beat before improvements count for patience; None.
      restore_best_weights: taken, and left to the caller: carry `jgd.stopping.keep_best(state,
        params, best)` along and end with it, stopped or not, as Keras does.
      start_from_epoch: at least 0, the first epoch to look at; 0.

    State: `jgd.stopping.EarlyStoppingState`.
    Raises: ValueError for mode "auto" and another name, as Keras where it finds no direction; for
      another mode, where Keras warns and takes "auto".
    Differs from: Keras, which asks the compiled metrics for the direction, so that it knows
      those of the user too.
    """
    direction = _direction("early_stopping", monitor, mode)
    return jgd.stopping.early_stopping(patience, min_delta, direction, baseline, start_from_epoch)


class ReduceLROnPlateauState(NamedTuple):
    """State of `reduce_lr_on_plateau`: scalars, or a lane axis of them."""

    learning_rate: jax.Array  # float
    best: jax.Array  # float
    wait: jax.Array  # int32, epochs without improvement
    cooldown_counter: jax.Array  # int32, epochs left of the cooldown
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
    """Keras's ReduceLROnPlateau: a smaller learning rate where a metric stops improving.

        in the cooldown:                        cooldown_counter <- cooldown_counter - 1
        where metric improves on best:          best <- metric, wait <- 0
        elsewhere, if the cooldown is over:     wait <- wait + 1, and where wait >= patience and
          learning_rate > min_lr:               learning_rate <- max(factor learning_rate, min_lr),
                                                cooldown_counter <- cooldown, wait <- 0

    `init(learning_rate) -> state`, `update(metric, state) -> (learning_rate, state)`. The
    learning rate may be traced. Improvement is that of `jgd.stopping.early_stopping`: by more than
    |min_delta|, not for NaN, always in the first epoch.

    Args:
      monitor: the metric's name, "val_loss" by default; see the module.
      factor: below 1, of the learning rate at a reduction; 0.1.
      patience: at least 0, epochs without improvement until a reduction; 10. 0 is as 1.
      verbose: taken and ignored.
      mode: "min", "max" or "auto" (default): as in `early_stopping`.
      min_delta: the least improvement that counts, absolute; 1e-4.
      cooldown: at least 0; the epoch that ends it counts already, so that one less than this many
        are ignored; 0.
      min_lr: at least 0, where the reductions end; 0.

    State: `ReduceLROnPlateauState(learning_rate, best, wait, cooldown_counter, epoch)`.
    Raises: ValueError for a factor of 1 or more, and as `early_stopping` for the mode.
    Differs from: `jgd.compat.torch.reduce_lr_on_plateau`, one epoch more patient, with a relative
      threshold and a cooldown one epoch longer.
    """
    direction = _direction("reduce_lr_on_plateau", monitor, mode)

    def init(learning_rate: Any) -> ReduceLROnPlateauState:
        none = jnp.zeros([], jnp.int32)
        return ReduceLROnPlateauState(learning_rate, worst(direction), none, none, none)

    def update(metric: Any, state: Any) -> tuple[Any, ReduceLROnPlateauState]:
        rate, best, wait, cooling, epoch = check_state(state, ReduceLROnPlateauState)
        cooling = jnp.maximum(cooling - 1, 0)
        better = (epoch == 0) | improves(direction, metric, best, min_delta)
        bad = ~better & (cooling == 0)
        wait = jnp.where(better, 0, wait + bad)
        # Keras's rate is float32: at the bound it must not seem above
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
