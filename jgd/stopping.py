"""Functions that follow a metric: early stopping, the best parameters, reduction on a plateau.

    init, update = early_stopping(patience=3)
    state = init()
    should_stop, state = update(val_loss, state)        # once per report, inside jit, per lane
    best = keep_best(state, params, best)               # the parameters of the best report so far

`early_stopping` and `reduce_on_plateau` return pairs of pure functions that are pytrees of their
numbers, so that patience, min_delta or cooldown can be swept under `jax.vmap` and changed without a
new trace. An epoch is one call of `update`: if you call it every n steps (n = examples //
batch_size, or a sweep's `report_every`), then an epoch has n steps, and patience counts these
epochs.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jgd.arguments import AnyNumber, Count, Fraction, Mixing, NonNegative, Number, Period
from jgd.arithmetic import increment
from jgd.pytree import MonitorPair, as_pytree
from jgd.trees import check_state, leafwise

__all__ = [
    "EarlyStoppingState",
    "early_stopping",
    "improved",
    "keep_best",
    "reduce_on_plateau",
]


def improves(mode: str, metric: Any, reference: Any, min_delta: Any) -> Any:
    """Return whether `metric` is better than `reference` by more than |min_delta|, as in Keras.

    metric + |min_delta| < reference for "min", metric - |min_delta| > reference for "max". The
    comparison is strict, false for NaN, and in float32 whatever the precision of the sum.
    """
    as_float32 = lambda x: jnp.asarray(x, jnp.float32)
    delta = abs(min_delta)  # jnp.abs would round a Python float to float32
    if mode == "max":
        return as_float32(metric - delta) > as_float32(reference)
    return as_float32(metric + delta) < as_float32(reference)


def worst(mode: str) -> jax.Array:
    """Return the initial best value, which any finite metric improves on."""
    return jnp.asarray(-jnp.inf if mode == "max" else jnp.inf, float)


class EarlyStoppingState(NamedTuple):
    """State of `early_stopping`: scalars, or arrays with a lane axis."""

    best: jax.Array  # float: the best metric so far
    best_epoch: jax.Array  # int32: the epoch of the best metric; -1 before `start_from_epoch`
    wait: jax.Array  # int32: number of epochs since the last improvement
    epoch: jax.Array  # int32: number of calls of `update` so far, the index of the next epoch
    stopped_epoch: jax.Array  # int32: the epoch of the stop; -1: not stopped


@as_pytree
def early_stopping(
    patience: Count = 0,
    min_delta: Number = 0.0,
    mode: Literal["min", "max"] = "min",
    baseline: AnyNumber | None = None,
    start_from_epoch: Count = 0,
) -> MonitorPair:
    """Stop when a metric has not improved for `patience` epochs: exactly Keras's rule.

        wait <- wait + 1
        where metric improves on best:  best <- metric, and wait <- 0 if it improves on baseline too
        elsewhere:                      stop if wait >= patience

    `init() -> state`, `update(metric, state) -> (should_stop, state)`. Epochs count the calls of
    `update` from 0. A metric improves if it is better by more than |min_delta|, compared in
    float32; a tie or NaN does not improve. The first epoch (`start_from_epoch`) always improves:
    it never stops, and if its metric is NaN, the best metric stays NaN.

    Args:
      patience: number of epochs without improvement until the stop, at least 0; 0 (default) has the
        same effect as 1.
      min_delta: the least improvement that counts; its absolute value is used; 0 by default.
      mode: "min" (default) for a metric that should decrease, "max" for one that should increase.
      baseline: a value to improve on; None (default): no baseline. Until a metric improves on it,
        `wait` grows even in epochs that improve; then the first epoch without improvement after
        `patience` epochs stops.
      start_from_epoch: epochs before this one are ignored, at least 0; 0 by default.

    State: `EarlyStoppingState(best, best_epoch, wait, epoch, stopped_epoch)`, five scalars. It does
      not change after the stop: in a scan or among lanes, later calls of `update` still return
      True and keep the best epoch up to the stop. `keep_best` keeps the parameters of that epoch.
    Raises: ValueError in the call for a negative patience or start_from_epoch.
    Differs from: Keras with x64 enabled in JAX, which compares in float64, where 0.7 + 0.1 and 0.8
      are no longer a tie. Inside jit without x64, metric and min_delta are rounded to float32
      before they are added, not after, which may decide such a tie.
    Source: `keras.callbacks.EarlyStopping` of Keras 3.
    """

    def init() -> EarlyStoppingState:
        never, zero = jnp.full([], -1, jnp.int32), jnp.zeros([], jnp.int32)
        return EarlyStoppingState(worst(mode), never, zero, zero, never)

    def update(metric: Any, state: Any) -> tuple[Any, EarlyStoppingState]:
        best, best_epoch, wait, epoch, stopped_epoch = check_state(state, EarlyStoppingState)
        started = epoch >= start_from_epoch
        better = started & ((best_epoch < 0) | improves(mode, metric, best, min_delta))
        above_baseline = True if baseline is None else improves(mode, metric, baseline, min_delta)
        wait = jnp.where(better & above_baseline, 0, wait + started)
        stop = started & ~better & (wait >= patience)
        advanced = EarlyStoppingState(
            best=jnp.where(better, metric, best),
            best_epoch=jnp.where(better, epoch, best_epoch),
            wait=wait,
            epoch=increment(epoch),
            stopped_epoch=jnp.where(stop, epoch, stopped_epoch),
        )
        running = stopped_epoch < 0
        new = jax.tree.map(lambda x, old: jnp.where(running, x, old), advanced, state)
        return new.stopped_epoch >= 0, new

    return MonitorPair(init, update)


def improved(state: EarlyStoppingState) -> jax.Array:
    """Return whether the last epoch is the best so far: a bool, or one per lane for a batch."""
    return (state.best_epoch >= 0) & (state.best_epoch + 1 == state.epoch)


def keep_best(state: EarlyStoppingState, new: Any, best: Any) -> Any:
    """Return `new` in lanes whose last epoch is the best so far, otherwise `best`.

    Call it after each `update` with the current parameters, and carry the result: it holds the
    parameters of the best epoch, which `restore_best_weights` restores in Keras. An example with a
    step size swept over 4 lanes, one of which overshoots:

    >>> import jax, jax.numpy as jnp
    >>> from jgd.stopping import early_stopping, keep_best
    >>> loss = lambda x: (x - 3) ** 2
    >>> def train(step_size, monitor):
    ...     def epoch(carry, _):
    ...         x, best, state = carry
    ...         x = x - step_size * jax.grad(loss)(x)
    ...         should_stop, state = monitor.update(loss(x), state)
    ...         return (x, keep_best(state, x, best), state), should_stop
    ...     start = (jnp.zeros([]), jnp.zeros([]), monitor.init())
    ...     (x, best, state), _ = jax.lax.scan(epoch, start, length=20)
    ...     return best, state.stopped_epoch
    >>> best, stopped = jax.vmap(train, (0, None))(jnp.array([0.01, 0.1, 0.5, 1.5]),
    ...                                            early_stopping(patience=3))
    >>> print(best.round(1), stopped)
    [1. 3. 3. 9.] [-1 -1  3  3]

    Args:
      state: state of `early_stopping`, or a batch of states whose leading axes the leaves of `new`
        and `best` have too.
      new, best: trees of the same structure.
    """
    is_best = improved(state)

    def choose(x: Any, old: Any) -> Any:
        per_lane = jnp.reshape(is_best, is_best.shape + (1,) * (jnp.ndim(x) - is_best.ndim))
        return jnp.where(per_lane, x, old)

    return jax.tree.map(choose, new, best)


@as_pytree
def reduce_on_plateau(
    factor: Mixing = 0.1,
    patience: Period = 10,
    rtol: Fraction = 1e-4,
    atol: NonNegative = 0.0,
    cooldown: Count = 0,
    accumulation_size: Period = 1,
    min_scale: NonNegative = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Scale updates down when a metric has stopped decreasing: chain it after an optimizer.

        a = mean of the last accumulation_size values
        a < (1 - rtol) best - atol:           best <- a, bad <- 0
        else, and not in the cooldown:        bad <- bad + 1
        bad >= patience:  scale <- max(factor scale, min_scale), bad <- 0, a cooldown begins
        u = scale g

    Pass the metric as `update(updates, state, params, value=loss)`; lower is better.

    Args:
      factor: factor of the scale at a reduction, in (0, 1); 0.1 by default.
      patience: number of consecutive means without improvement until a reduction, at least 1; 10 by
        default.
      rtol: the least improvement that counts, relative to the best mean, in [0, 1]; 1e-4 by
        default.
      atol: the least improvement that counts, as an absolute difference, at least 0; 0 by default.
      cooldown: number of means after a reduction during which bad stays 0, at least 0; 0 by
        default.
      accumulation_size: number of values per mean, at least 1; 1 (default) for a loss on held-out
        data, more for the loss of mini-batches.
      min_scale: the least scale, at least 0; 0 by default.

    State: `optax.contrib.ReduceLROnPlateauState(scale, best_value, plateau_count, cooldown_count,
      count, avg_value)`, six scalars.
    Raises: TypeError in `update` if no `value` is given; ValueError in the call for a number out of
      range.
    Differs from: `optax.contrib.reduce_on_plateau`, which branches on its numbers, so that factor
      and tolerances cannot be traced, and which rejects two tolerances of 0. jgd's scale is float32
      for 16-bit parameters too. See `jgd.compat` for the rules of Keras and PyTorch.
    Source: `optax.contrib.reduce_on_plateau`.
    """

    def init(params: Any) -> Any:
        no_count, zero = jnp.zeros([], jnp.int32), jnp.zeros([], float)
        return optax.contrib.ReduceLROnPlateauState(
            jnp.ones([], float), worst("min"), no_count, no_count, no_count, zero
        )

    def update(
        updates: Any, state: Any, params: Any = None, *, value: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        if value is None:
            raise TypeError(
                "reduce_on_plateau: value must be the metric, got None. Call"
                " update(..., value=loss)"
            )
        fields: Any = check_state(state, optax.contrib.ReduceLROnPlateauState)
        scale, best, bad, cooldown_count, count, average = fields
        average = (count * average + jnp.asarray(value, float)) / increment(count)
        accumulated = state._replace(count=increment(count), avg_value=average)
        better = average < (1 - rtol) * best - atol
        cooling = cooldown_count > 0
        bad = jnp.where(better | cooling, 0, increment(bad))
        reduce = ~better & ~cooling & (bad >= patience)
        pause = jnp.where(reduce, jnp.ceil(cooldown), 0).astype(jnp.int32)
        decided = optax.contrib.ReduceLROnPlateauState(
            scale=jnp.maximum(jnp.where(reduce, scale * factor, scale), min_scale),
            best_value=jnp.where(better, average, best),
            plateau_count=jnp.where(reduce, 0, bad),
            cooldown_count=jnp.where(cooling, cooldown_count - 1, pause),
            count=jnp.zeros_like(count),
            avg_value=jnp.zeros_like(average),
        )
        full = accumulated.count >= accumulation_size
        new = jax.tree.map(lambda x, y: jnp.where(full, x, y), decided, accumulated)
        return leafwise(lambda g: new.scale * g, updates), new

    return optax.GradientTransformationExtraArgs(init, update)
