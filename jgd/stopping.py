"""Decisions from a metric: when to stop, which parameters to keep, when to step more carefully.

    init, update = early_stopping(patience=3)
    state = init()
    should_stop, state = update(val_loss, state)        # once per report, inside jit, per lane
    best = keep_best(state, params, best)               # the parameters of the best report so far

A callback is a pure pair and a pytree of its numbers, as everything in jgd: patience, min_delta or
cooldown are swept under `jax.vmap` and changed without another trace. An epoch is a call of
`update`, no more: who calls it every n steps (n = examples // batch_size, or a sweep's
`report_every`) has epochs of n steps, and patience counts those.
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
    """Whether `metric` is better than `reference` by more than |min_delta|, as Keras finds it.

    metric + |min_delta| < reference for "min", metric - |min_delta| > reference for "max": strict,
    false for NaN, and compared in float32 whatever the precision of the sum.
    """
    rounded = lambda x: jnp.asarray(x, jnp.float32)
    delta = abs(min_delta)  # that of jax.numpy would round what is exact
    if mode == "max":
        return rounded(metric - delta) > rounded(reference)
    return rounded(metric + delta) < rounded(reference)


def worst(mode: str) -> jax.Array:
    """What any metric improves on."""
    return jnp.asarray(-jnp.inf if mode == "max" else jnp.inf, float)


class EarlyStoppingState(NamedTuple):
    """State of `early_stopping`: scalars, or a lane axis of them."""

    best: jax.Array  # float, the best metric so far
    best_epoch: jax.Array  # int32, when that was; -1: no epoch was watched yet
    wait: jax.Array  # int32, epochs watched since an improvement
    epoch: jax.Array  # int32, calls of `update` so far: the number of the next epoch
    stopped_epoch: jax.Array  # int32, when it said stop; -1: it did not


@as_pytree
def early_stopping(
    patience: Count = 0,
    min_delta: Number = 0.0,
    mode: Literal["min", "max"] = "min",
    baseline: AnyNumber | None = None,
    start_from_epoch: Count = 0,
) -> MonitorPair:
    """Stop when a metric has not improved for `patience` epochs: Keras's rule, to the letter.

        wait <- wait + 1
        where metric improves on best:  best <- metric, and wait <- 0 if it improves on baseline too
        elsewhere:                      stop if wait >= patience

    `init() -> state`, `update(metric, state) -> (should_stop, state)`. Epochs count the calls of
    `update` from 0 (see the module). To improve, a metric must be better by more than |min_delta|,
    strictly: a tie is no improvement, nor is NaN; compared in float32. The first epoch watched
    always improves, so that it never stops and a NaN there stays the best.

    Args:
      patience: at least 0, epochs without improvement until the stop; 0 (default) is as 1.
      min_delta: the least improvement that counts, of which the absolute value is taken; 0.
      mode: "min" (default) for a metric that should fall, "max" for one that should rise.
      baseline: a value to beat; None (default): no such. Until it is beaten `wait` goes on growing
        over improvements, and the next epoch without one stops once patience is used up.
      start_from_epoch: at least 0; epochs before it count for nothing, not even as the best; 0.

    State: `EarlyStoppingState(best, best_epoch, wait, epoch, stopped_epoch)`, five scalars. It
      freezes at the stop: in a scan or among lanes `update` may be called on, and it goes on saying
      stop, with the best of its own time. See `keep_best` for the parameters of that epoch.
    Raises: ValueError in the call for a negative patience or start_from_epoch.
    Differs from: Keras on a JAX with x64 switched on, which compares in float64, where decimals
      that tie (0.7 + 0.1 and 0.8) no longer do. Inside jit, without x64, metric and min_delta are
      rounded to float32 before they are added, not after: such ties may fall by a last bit.
    Source: `keras.callbacks.EarlyStopping` of Keras 3.
    """

    def init() -> EarlyStoppingState:
        none, zero = jnp.full([], -1, jnp.int32), jnp.zeros([], jnp.int32)
        return EarlyStoppingState(worst(mode), none, zero, zero, none)

    def update(metric: Any, state: Any) -> tuple[Any, EarlyStoppingState]:
        best, best_epoch, wait, epoch, stopped_epoch = check_state(state, EarlyStoppingState)
        watched = epoch >= start_from_epoch
        better = watched & ((best_epoch < 0) | improves(mode, metric, best, min_delta))
        beaten = True if baseline is None else improves(mode, metric, baseline, min_delta)
        wait = jnp.where(better & beaten, 0, wait + watched)
        stop = watched & ~better & (wait >= patience)
        moved = EarlyStoppingState(
            best=jnp.where(better, metric, best),
            best_epoch=jnp.where(better, epoch, best_epoch),
            wait=wait,
            epoch=increment(epoch),
            stopped_epoch=jnp.where(stop, epoch, stopped_epoch),
        )
        running = stopped_epoch < 0
        new = jax.tree.map(lambda after, before: jnp.where(running, after, before), moved, state)
        return new.stopped_epoch >= 0, new

    return MonitorPair(init, update)


def improved(state: EarlyStoppingState) -> jax.Array:
    """Whether the last epoch is the best so far: a bool, one per lane for a batch of states."""
    return (state.best_epoch >= 0) & (state.best_epoch + 1 == state.epoch)


def keep_best(state: EarlyStoppingState, new: Any, best: Any) -> Any:
    """`new` where the last epoch is the best so far, else `best`: one tree or the other, per lane.

    Called after each `update` with the parameters of now, and carried along, it holds the
    parameters of the best epoch, which is what `restore_best_weights` of Keras restores. A step
    size swept over 4 lanes, one of which overshoots:

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
      state: that of `early_stopping`, one or a batch with leading axes, which the leaves have too.
      new, best: trees of one structure.
    """
    keep = improved(state)

    def choose(now: Any, then: Any) -> Any:
        per_lane = jnp.reshape(keep, keep.shape + (1,) * (jnp.ndim(now) - keep.ndim))
        return jnp.where(per_lane, now, then)

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
    """Smaller steps when a metric has stopped falling: chain it after an optimizer.

        a = mean of the last accumulation_size values
        a < (1 - rtol) best - atol:           best <- a, bad <- 0
        else, and not in the cooldown:        bad <- bad + 1
        bad >= patience:  scale <- max(factor scale, min_scale), bad <- 0, a cooldown begins
        u = scale g

    The metric comes as `update(updates, state, params, value=loss)`; lower is better.

    Args:
      factor: in (0, 1), of the scale at a reduction; 0.1 by default.
      patience: at least 1, means in a row without improvement until a reduction; 10.
      rtol: in [0, 1], the least improvement that counts, as a part of the best; 1e-4.
      atol: at least 0, the same as an absolute difference; 0.
      cooldown: at least 0, means after a reduction that count as nothing bad; 0.
      accumulation_size: at least 1, values to a mean: 1 (default) for a loss on held-out data, more
        for that of a mini-batch.
      min_scale: at least 0, where the reductions end; 0.

    State: `optax.contrib.ReduceLROnPlateauState(scale, best_value, plateau_count, cooldown_count,
      count, avg_value)`, six scalars.
    Raises: TypeError in `update` if no `value` is given; ValueError in the call for a number out
      of its range.
    Differs from: `optax.contrib.reduce_on_plateau`, which branches on its numbers, so that factor
      and tolerances cannot be traced; here both tolerances may be 0 as well. The scale is float32
      for 16-bit parameters too. For the counting of Keras and PyTorch see `jgd.compat`.
    Source: optax's, of the name.
    """

    def init(params: Any) -> Any:
        none, zero = jnp.zeros([], jnp.int32), jnp.zeros([], float)
        return optax.contrib.ReduceLROnPlateauState(
            jnp.ones([], float), worst("min"), none, none, none, zero
        )

    def update(
        updates: Any, state: Any, params: Any = None, *, value: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        if value is None:
            raise TypeError("reduce_on_plateau: needs the metric: call update(..., value=loss)")
        fields: Any = check_state(state, optax.contrib.ReduceLROnPlateauState)
        scale, best, bad, cooldown_count, count, average = fields
        average = (count * average + jnp.asarray(value, float)) / increment(count)
        gathered = state._replace(count=increment(count), avg_value=average)
        better = average < (1 - rtol) * best - atol
        cooling = cooldown_count > 0
        bad = jnp.where(better | cooling, 0, increment(bad))
        reduce = ~better & ~cooling & (bad >= patience)
        pause = jnp.where(reduce, jnp.ceil(cooldown), 0).astype(jnp.int32)
        judged = optax.contrib.ReduceLROnPlateauState(
            scale=jnp.maximum(jnp.where(reduce, scale * factor, scale), min_scale),
            best_value=jnp.where(better, average, best),
            plateau_count=jnp.where(reduce, 0, bad),
            cooldown_count=jnp.where(cooling, cooldown_count - 1, pause),
            count=jnp.zeros_like(count),
            avg_value=jnp.zeros_like(average),
        )
        full = gathered.count >= accumulation_size
        new = jax.tree.map(lambda after, before: jnp.where(full, after, before), judged, gathered)
        return leafwise(lambda g: new.scale * g, updates), new

    return optax.GradientTransformationExtraArgs(init, update)
