"""What the textbooks teach a reader to see in a loss curve, as a rule with stated thresholds.

Too small: still falling at the end, or not far below the start. Good: fell, and lies still.
Oscillating: jumps about its trend, or is not getting where its steps promise. Diverged: ended above
where it began, or climbed back from where it had been.

For gradient descent on a w^2 / 2 over T = 20 to 200 steps, a rate below 0.02 / a comes out too
small, 0.3 / a to 1 / a good, 2 / a and more oscillating or diverged. Between 1 / a and 2 / a the
*parameter* jumps from side to side while the loss falls: good as long as the loss arrives,
oscillating near 2 / a, where it hardly does.

A lane that ended after T steps, for whatever reason, is judged by these T steps. `early`, `middle`
and `late` are the mean losses of the first T / 10 steps, of those before half-time and of the last;
fall = first - late. `low` is the lowest mean of a twentieth, and `start` the lower one of the first
two, or `first` if that is more. From the second half: `swing` is the standard deviation about its
straight line, and `calm` the smaller one of its two halves, which a single spike leaves alone;
`jump` is the mean of |loss - loss before|, and `stride` the mean of |g . u|, the change of the loss
which a step promises to first order. `level` is the fall, or half of |first| if that is more, and
`error` 3 swing sqrt(2 / (T / 10)), three standard errors of the difference of two windows.
The first rule that holds:

  diverged     the loss was not finite; or late - max(first, early) > 0.1 |first|, and more than
               error or than |first| and |early|; or late - low is more than half of first - low,
               than 0.1 |first| and than 3 swing: it climbed back; or it rose above start and late
               by more than |first|, 3 |late| and 20 calm, and start - late < |start| / 2; if
               jump < |late| / 2, this start is first
  too small    early - late < max(0.01 |early|, error) and stride <= 0.02 swing: nothing but noise
  oscillating  swing > 0.1 level, and stride >= jump / 2: the steps did it, not the batches;
               or a fall under |first| / 4, though the strides of the second half add up to 20 times
               that, and to 0.2 |first|: they lead nowhere;
               or still falling, but stride > 0.02 level and 5 times what the loss falls per step
  too small    still falling: middle - late > 0.015 fall, and more than error or than a fifth of
               the fall; or fall < |first| / 5
  good         otherwise

The noise of small batches is in the loss as well: where nothing is known of the strides, it counts
as swing.

A lane keeps no curve: it adds up its losses over about fifty intervals, short at first. A window is
made of the intervals that overlap it; those of the rungs and of the last step fit exactly.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "VERDICTS",
    "Interval",
    "LossStatistics",
    "LossSums",
    "close_interval",
    "interval_ends",
    "no_losses",
    "observe",
    "of_curve",
    "sharpness",
    "statistics",
    "verdict",
]

VERDICTS = ("too small", "good", "oscillating", "diverged")
INTERVALS = 48


class Interval(NamedTuple):
    """Sums over the steps of an interval."""

    loss: Any
    square: Any  # of x = (loss - first) / |first|
    jump: Any  # |loss - last|
    stride: Any  # |g . u|


class LossSums(NamedTuple):
    """The training loss of a lane so far: float32 scalars (float64 under x64)."""

    first: Any  # the loss at step 0
    last: Any  # the loss one step ago
    greatest: Any
    finite: Any  # bool: whether all losses were
    open: Interval  # the interval that is not closed yet
    closed: Interval  # a trailing axis of all intervals


class LossStatistics(NamedTuple):
    """Statistics of all losses of a lane, which `verdict` reads: see the head of this module."""

    first: Any
    greatest: Any
    finite: Any
    early: Any
    middle: Any
    late: Any
    low: Any
    start: Any
    swing: Any
    calm: Any
    jump: Any
    stride: Any

    @property
    def final_loss(self) -> np.ndarray:
        """The mean loss of the last tenth of the steps; NaN where the loss was not finite."""
        return np.where(self.finite, self.late, np.nan)


# --- on the device, step by step -------------------------------------------------------------


def interval_ends(rounds: Sequence[int]) -> np.ndarray:
    """Return the steps at which intervals end, in rising order.

    Args:
      rounds: steps at which lanes often end, the last one of all at the end: their windows are
        made of whole intervals.
    """
    cuts = [(r // 10, r // 2 - r // 10, r // 2, r - r // 4, r - r // 10, r) for r in rounds]
    ends = np.unique([*np.geomspace(1, rounds[-1], INTERVALS).astype(int), *np.ravel(cuts)])
    return ends[ends > 0]


def no_losses(intervals: int) -> LossSums:
    """Return the sums before the first step."""
    zero, zeros = jnp.zeros([], float), jnp.zeros(intervals, float)
    return LossSums(
        first=zero,
        last=zero,
        greatest=zero - jnp.inf,
        finite=jnp.array(True),
        open=Interval(*[zero] * 4),
        closed=Interval(*[zeros] * 4),
    )


def observe(sums: LossSums, loss: Any, stride: Any, step: Any) -> LossSums:
    """Return the sums with one more loss.

    Args:
      loss: scalar, at the parameters before the step.
      stride: scalar |g . u|, or NaN where nothing is known of it.
      step: its number, from 0.
    """
    loss, stride = jnp.asarray(loss, float), jnp.asarray(stride, float)
    first = jnp.where(step == 0, loss, sums.first)
    x = (loss - first) / _scale(first)
    jump = jnp.where(step == 0, 0, jnp.abs(loss - sums.last))
    return LossSums(
        first=first,
        last=loss,
        greatest=jnp.maximum(sums.greatest, loss),
        finite=sums.finite & jnp.isfinite(loss),
        open=jax.tree.map(jnp.add, sums.open, Interval(loss, x * x, jump, stride)),
        closed=sums.closed,
    )


def close_interval(sums: LossSums, index: Any) -> LossSums:
    """Return the sums with those of the open interval added to interval `index`."""
    add = lambda all, x: jax.lax.dynamic_update_index_in_dim(all, all[index] + x, index, 0)
    closed = jax.tree.map(add, sums.closed, sums.open)
    return sums._replace(open=jax.tree.map(jnp.zeros_like, sums.open), closed=closed)


def _scale(first: Any) -> Any:
    return abs(first) + (first == 0)


# --- on the host, when a lane ended ----------------------------------------------------------


@np.errstate(all="ignore")
def statistics(sums: LossSums, ends: np.ndarray, steps: int) -> LossStatistics:
    """Return the statistics of lanes that ended after this many steps.

    Args:
      sums: on the host; any leading axes.
      ends: what `interval_ends` returned.
    """
    first, greatest = (np.asarray(x, np.float64) for x in (sums.first, sums.greatest))
    closed = Interval(*(np.asarray(x, np.float64) for x in sums.closed))
    starts, stops = np.concatenate([[0], ends[:-1]]), np.minimum(ends, steps)
    half, quarter, window = steps // 2, steps - steps // 4, max(steps // 10, 1)

    def mean(sum: np.ndarray, low: float, high: float = steps) -> np.ndarray:
        inside = (starts < high) & (stops > low)
        return sum[..., inside].sum(-1) / (stops - starts)[inside].sum()

    def swing(low: int, high: int = steps) -> np.ndarray:
        inside = (starts < high) & (stops > low)
        n, time = (stops - starts)[inside], (starts + stops)[inside] / 2
        time = time - (n * time).sum() / n.sum()
        x = (closed.loss[..., inside] / n - first[..., None]) / _scale(first)[..., None]
        spread = (n * time**2).sum()
        slope = (n * time * x).sum(-1) / spread if spread else 0.0
        of_line = slope**2 * (spread + (n * (n**2 - 1) / 12).sum()) / n.sum()
        variance = mean(closed.square, low, high) - ((n * x).sum(-1) / n.sum()) ** 2 - of_line
        return np.sqrt(np.maximum(variance, 0)) * _scale(first)

    # the sums are of single precision, and the journal is half as long
    rounded = np.vectorize(lambda x: float(f"{x:.7g}"), otypes=[float])
    twentieths = [mean(closed.loss, steps * k / 20, steps * (k + 1) / 20) for k in range(20)]
    seen = LossStatistics(
        first=first,
        greatest=greatest,
        finite=np.asarray(sums.finite),
        early=mean(closed.loss, 0, window),
        middle=mean(closed.loss, half - window, half),
        late=mean(closed.loss, steps - window),
        low=np.min(twentieths, axis=0),
        start=np.maximum(first, np.min(twentieths[:2], axis=0)),
        swing=swing(half),
        calm=np.minimum(swing(half, quarter), swing(quarter)),
        jump=mean(closed.jump, half),
        stride=mean(closed.stride, half),
    )
    return seen._make(map(rounded, seen))._replace(finite=seen.finite)


@np.errstate(all="ignore")
def verdict(seen: LossStatistics, steps: Any) -> np.ndarray:
    """Return the verdict on each lane, by the rule at the head of this module.

    Args:
      seen: statistics, scalars or arrays of lanes.
      steps: number of losses, at least 4: of all lanes, or an array with one for each.

    Returns: an array of strings out of `VERDICTS`, of the shape of the statistics.
    """
    s = seen._make(np.asarray(x, np.float64) for x in seen)
    half, window = np.asarray(steps) // 2, np.maximum(np.asarray(steps) // 10, 1)
    tail = steps - half
    size, fall, still = np.abs(s.first), s.first - s.late, s.middle - s.late
    level, error = np.maximum(fall, size / 2), 3 * s.swing * np.sqrt(2 / window)

    # comparisons with NaN are false: each is written so that an unknown stride accuses the steps
    reach = np.minimum(error, np.maximum(size, np.abs(s.early)))
    rose = ~(s.late - np.maximum(s.first, s.early) <= np.maximum(0.1 * size, reach))
    deep = np.maximum(np.maximum((s.first - s.low) / 2, 0.1 * size), 3 * s.swing)
    usual = np.maximum(np.maximum(size, 3 * np.abs(s.late)), 20 * s.calm)
    noisy = s.jump >= np.abs(s.late) / 2  # the first loss may be small by luck
    start = np.where(noisy, s.start, s.first)
    far = s.greatest - np.maximum(start, s.late) > usual
    blew_up = far & (start - s.late < np.abs(start) / 2)
    diverged = (s.finite == 0) | rose | (s.late - s.low > deep) | blew_up
    small = s.early - s.late < np.maximum(0.01 * np.abs(s.early), error)
    noise = small & (s.stride <= 0.02 * s.swing)
    falling = still > np.maximum(0.015 * fall, np.minimum(error, 0.2 * fall))
    oscillating = (
        ((s.swing > 0.1 * level) & ~(s.stride < s.jump / 2))
        | ((fall < size / 4) & (s.stride * tail > 20 * np.maximum(fall, 0.01 * size)))
        | (falling & (s.stride > np.maximum(0.02 * level, 5 * still / half)))
    )
    rules = [diverged, noise, oscillating, falling | (fall < size / 5)]
    return np.select(rules, ["diverged", "too small", "oscillating", "too small"], default="good")


@np.errstate(all="ignore")
def of_curve(losses: Sequence[float] | np.ndarray, strides: Any = None) -> LossStatistics:
    """Return the statistics of a whole curve, (steps,) or (steps, lanes); strides like the losses.

    Without strides every swing counts as caused by the steps, not by the batches.
    """
    curve = np.asarray(losses, np.float64)
    stride = np.full_like(curve, np.nan) if strides is None else np.asarray(strides, np.float64)
    x = (curve - curve[0]) / _scale(curve[0])
    each = Interval(curve, x * x, np.abs(np.diff(curve, axis=0, prepend=curve[:1])), stride)
    ends = interval_ends([len(curve)])
    starts = np.concatenate([[0], ends[:-1]])
    closed = Interval(*(np.add.reduceat(sum, starts).T for sum in each))
    open = Interval(*[np.zeros(curve.shape[1:])] * 4)
    finite = np.isfinite(curve).all(0)
    sums = LossSums(curve[0], curve[-1], curve.max(0), finite, open, closed)
    return statistics(sums, ends, len(curve))


def sharpness(
    loss: Callable[[Any], Any], params: Any, key: jax.Array, iterations: int = 20
) -> jax.Array:
    """The largest eigenvalue of the loss's Hessian, by size.

        v <- H v / ||H v||        sharpness = <v, H v>

    Gradient descent is stable along that direction below 2 / learning_rate, with momentum b below
    2 (1 + b) / learning_rate.

    Args:
      loss: params -> scalar.
      key: of the direction to begin with.
      iterations: of the power method, each one gradient and its derivative. The error falls with
        the ratio of the two largest eigenvalues to the power of twice as many.

    Returns: a scalar, NaN where the Hessian is not finite.
    Source: Cohen et al. 2021, arXiv:2103.00065, who show that training moves to the edge.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    draw = lambda k, x: jax.random.normal(k, jnp.shape(x), jnp.result_type(x))
    start = jax.tree.unflatten(structure, list(map(draw, keys, leaves)))
    dot = lambda a, b: jax.tree.reduce(jnp.add, jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))

    def step(_: Any, carry: Any) -> Any:
        along, _ = carry
        length = jnp.sqrt(dot(along, along))
        along = jax.tree.map(lambda x: x / jnp.where(length == 0, 1, length), along)
        curved = jax.jvp(jax.grad(loss), (params,), (along,))[1]
        return curved, dot(along, curved)

    zero = jnp.zeros_like(dot(start, start))
    return jax.lax.fori_loop(0, iterations, step, (start, zero))[1]
