"""Computation of a chunk: pure functions of the lanes of a tile.

    lane = begin(options, setting, seed, key, shared_start)      # step 0
    lane = step(options, lane, batch, index)                     # one step
    chunk(options, lanes, batch_at, first, end)                  # a tile, up to its next report

`begin` and `step` take one lane; `chunk` maps `step` over the leading axis of a tile.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgd import diagnosis
from jgd.pytree import Monitor
from jgd.training import Run, start
from jgd.tuning.compiling import LeafSpec
from jgd.tuning.events import DIVERGED, STOPPED

__all__ = ["BestReport", "Lane", "LaneOptions", "begin", "chunk", "state_of", "step"]


class LaneOptions(NamedTuple):
    """Options that all lanes of a sweep share."""

    run: Run
    stop: Monitor | None
    intervals: np.ndarray  # steps at which intervals of the loss end
    metric: str
    sign: float  # -1 if the highest value of the metric is best, else 1
    own_order: bool  # whether each seed has its own order of batches
    keep_best: bool  # whether the best report counts, not the last one
    drop_diverged: bool  # whether a lane ends once its loss is not finite


class Lane(NamedTuple):
    """State of one training run. In a tile each leaf has a leading axis."""

    setting: Any
    state: Any  # state of the `Run`
    loss_sums: diagnosis.LossSums  # over the intervals of all steps
    loss: Any  # sum of the training loss since the last report
    monitor: Any  # state of the early stopping; None without early stopping
    seed: Any  # int32; None if all seeds see the same batches
    best: Any  # a `BestReport`; None if the last report counts


class BestReport(NamedTuple):
    """The best report of a lane so far."""

    score: Any  # the metric times the sign: lower is better
    state: Any


def begin(options: LaneOptions, setting: Any, seed: Any, key: Any, shared_start: Any) -> Lane:
    """Return a lane at step 0.

    Args:
      shared_start: result of `run.begin` for this seed; unused if the run has no `begin`.
    """
    run, zero = options.run, jnp.zeros([], float)
    state = run.init(setting, key, *(() if run.begin is None else (shared_start,)))
    return Lane(
        setting,
        state,
        diagnosis.no_losses(len(options.intervals)),
        loss=zero,
        monitor=None if options.stop is None else options.stop.init(),
        seed=jnp.int32(seed) if options.own_order else None,
        best=BestReport(zero + jnp.inf, state) if options.keep_best else None,
    )


def step(options: LaneOptions, lane: Lane, batch: Any, index: Any) -> Lane:
    """Return a lane after one step."""
    if options.own_order:
        batch = jax.tree.map(lambda x: x[lane.seed], batch)
    state, metrics = options.run.update(lane.setting, lane.state, batch)
    loss, stride = metrics["loss"], metrics.get("stride", jnp.nan)
    sums = diagnosis.observe(lane.loss_sums, loss, stride, index)
    return lane._replace(state=state, loss_sums=sums, loss=lane.loss + loss)


def chunk(
    options: LaneOptions, lanes: Lane, batch_at: Callable[[Any], Any], first: Any, end: Any
) -> tuple[Lane, jax.Array, dict[str, jax.Array], jax.Array]:
    """Return the lanes at step `end`, the sums of their losses, their metrics and their endings.

    Args:
      batch_at: offset from the first step -> batch.
      first, end: first step and end of the chunk, traced: chunks of all lengths share one program.
    """

    def body(offset: Any, lanes: Lane) -> Lane:
        one = lambda lane, batch, index: step(options, lane, batch, index)
        # the index is one scalar for the tile: with one per lane, vmap would map the batch too
        return jax.vmap(one, (0, None, None))(lanes, batch_at(offset), first + offset)

    ends = jnp.asarray(options.intervals, jnp.int32)

    def interval(carry: tuple[Any, Lane]) -> tuple[Any, Lane]:
        start, lanes = carry
        index = jnp.searchsorted(ends, start, side="right")
        stop = jnp.minimum(end, ends[index])
        lanes = jax.lax.fori_loop(start - first, stop - first, body, lanes)
        sums = jax.vmap(diagnosis.close_interval, (0, None))(lanes.loss_sums, index)
        return stop, lanes._replace(loss_sums=sums)

    _, lanes = jax.lax.while_loop(lambda carry: carry[0] < end, interval, (first, lanes))
    metrics = jax.vmap(options.run.evaluate)(lanes.setting, lanes.state)
    ending = jnp.zeros(lanes.loss.shape, jnp.int8)
    if options.stop is not None:
        stop, monitor = jax.vmap(options.stop.update)(metrics[options.metric], lanes.monitor)
        lanes = lanes._replace(monitor=monitor)
        ending = jnp.where(stop, STOPPED, ending).astype(jnp.int8)
    if options.keep_best:
        scores = options.sign * metrics[options.metric]
        lanes = lanes._replace(best=jax.vmap(_better_report)(lanes.best, scores, lanes.state))
    if options.drop_diverged:
        ending = jnp.where(lanes.loss_sums.finite, ending, DIVERGED).astype(jnp.int8)
    return lanes._replace(loss=jnp.zeros_like(lanes.loss)), lanes.loss, metrics, ending


def _better_report(best: BestReport, score: Any, state: Any) -> BestReport:
    """Return the better one of the best report so far and a new report."""
    better = jnp.isfinite(score) & (score < best.score)
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), BestReport(score, state), best)


def state_of(run: Run, setting: Any, leaves: Sequence[Any], best: str) -> Any:
    """Return the state of a run at the report that counts, from the leaves of its `Lane`.

    Args:
      leaves: plain arrays, as outside the program (see `LeafSpec`).
      best: see `SweepOptions`.

    Raises: ValueError if the leaves do not have the shapes that this run gives them.
    """
    shapes = jax.eval_shape(functools.partial(start, run), setting, jax.random.key(0))
    specs, structure = jax.tree.flatten(shapes)
    first = len(leaves) - len(specs) if best == "ever" else len(jax.tree.leaves(setting))
    of_state = leaves[first : first + len(specs)]
    state = list[jax.Array]()
    with contextlib.suppress(TypeError, ValueError):  # too few leaves, or not the bits of a key
        pairs = zip(specs, of_state, strict=True)
        state = [LeafSpec(spec.dtype).unpack(jnp.asarray(x)) for spec, x in pairs]
    if [x.shape for x in state] != [x.shape for x in specs]:
        raise ValueError(
            "load: task must be the task of the sweep, got one whose state has other leaves"
        )
    return jax.tree.unflatten(structure, state)
