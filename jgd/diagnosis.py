"""Verdicts on loss curves: a rule with stated thresholds for what textbooks describe in words.

A learning rate is "too small" if the loss is still falling at the end, or is not far below its
start; "good" if the loss fell and then stays level; "oscillating" if the loss jumps about its
trend, or falls much less than its steps predict; "diverged" if the loss ends above its start, or
climbed back from a minimum.

For gradient descent on a w^2 / 2 over T = 20 to 200 steps, a rate below 0.02 / a is too small,
0.3 / a to 1 / a is good, and 2 / a or more is oscillating or diverged. Between 1 / a and 2 / a the
*parameter* jumps from side to side while the loss falls: this is good while the loss converges, and
oscillating near 2 / a, where it hardly does.

A lane that ended after T steps, for whatever reason, is judged by these T steps. The statistics:

  first        the loss at step 0
  early        mean loss of the first T / 10 steps
  middle       mean loss of the T / 10 steps before step T / 2
  late         mean loss of the last T / 10 steps; fall = first - late
  low          lowest of the 20 mean losses over T / 20 steps
  start        lower of the first two of these means, or first if that is larger
  swing        standard deviation of the second half about its regression line
  calm         the smaller swing of the two halves of the second half; one spike does not change it
  jump         mean of |loss - previous loss| in the second half
  stride       mean of |g . u| in the second half, the change of the loss to first order
  level        the fall, or |first| / 2 if that is larger
  error        3 swing sqrt(2 / (T / 10)): three standard errors of the difference of two means of
               T / 10 losses

The verdict is that of the first rule that holds:

  diverged     the loss was not finite;
               or late - max(first, early) > 0.1 |first|, and more than error or than both |first|
               and |early|;
               or late - low exceeds half of first - low, 0.1 |first| and 3 swing: it climbed back;
               or the greatest loss exceeds start and late by more than |first|, 3 |late| and 20
               calm, and start - late < |start| / 2; if jump < |late| / 2, first replaces start
  too small    early - late < max(0.01 |early|, error) and stride <= 0.02 swing: only noise
  oscillating  swing > 0.1 level and stride >= jump / 2: because of the steps, not of the batches;
               or fall < |first| / 4, while the strides of the second half add up to more than 20
               times the fall and more than 0.2 |first|: the steps cancel each other;
               or still falling, with stride > 0.02 level and > 5 times the fall per step
  too small    still falling: middle - late > 0.015 fall, and more than error or than a fifth of
               the fall; or fall < |first| / 5
  good         otherwise

The noise of small batches also changes the loss. If the strides are unknown, it counts as swing.

A lane does not store its curve: it sums its losses over about fifty intervals, which are short at
first. A window consists of the intervals that overlap it. For lanes that end at a rung or at the
last step, the windows are exact.
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

    loss: Any  # sum of the losses
    square: Any  # sum of x^2, for x = (loss - first) / |first|
    jump: Any  # sum of |loss - previous loss|
    stride: Any  # sum of |g . u|


class LossSums(NamedTuple):
    """The training loss of a lane so far: float32 scalars (float64 under x64)."""

    first: Any  # the loss at step 0
    last: Any  # the loss of the previous step
    greatest: Any  # the greatest loss so far
    finite: Any  # bool: whether all losses were finite
    open: Interval  # the current interval
    closed: Interval  # all intervals, along a trailing axis


class LossStatistics(NamedTuple):
    """Statistics of all losses of a lane, for `verdict`; the module docstring defines them."""

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
        """The mean loss of the last tenth of the steps; NaN if a loss was not finite."""
        return np.where(self.finite, self.late, np.nan)


# --- on the device, step by step -------------------------------------------------------------


def interval_ends(rounds: Sequence[int]) -> np.ndarray:
    """Return the steps at which intervals end, in rising order.

    Args:
      rounds: steps at which lanes may end, in rising order, such as rungs and the last step. Their
        windows consist of whole intervals.
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
      sums: the sums so far.
      loss: scalar, at the parameters before the step.
      stride: scalar |g . u|, or NaN if it is unknown.
      step: index of the step, from 0.
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
    """Return the sums with the open interval added to the closed interval `index`."""
    add = lambda all, x: jax.lax.dynamic_update_index_in_dim(all, all[index] + x, index, 0)
    closed = jax.tree.map(add, sums.closed, sums.open)
    return sums._replace(open=jax.tree.map(jnp.zeros_like, sums.open), closed=closed)


def _scale(first: Any) -> Any:
    return abs(first) + (first == 0)


# --- on the host, after a lane ended ---------------------------------------------------------


@np.errstate(all="ignore")
def statistics(sums: LossSums, ends: np.ndarray, steps: int) -> LossStatistics:
    """Return the statistics of lanes that ended after `steps` steps.

    Args:
      sums: NumPy arrays with any leading axes.
      ends: the result of `interval_ends`.
      steps: number of steps.
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
        line = slope**2 * (spread + (n * (n**2 - 1) / 12).sum()) / n.sum()
        variance = mean(closed.square, low, high) - ((n * x).sum(-1) / n.sum()) ** 2 - line
        return np.sqrt(np.maximum(variance, 0)) * _scale(first)

    # The sums have single precision, and seven digits make the journal half as long.
    rounded = np.vectorize(lambda x: float(f"{x:.7g}"), otypes=[float])
    twentieths = [mean(closed.loss, steps * k / 20, steps * (k + 1) / 20) for k in range(20)]
    result = LossStatistics(
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
    return result._make(map(rounded, result))._replace(finite=result.finite)


@np.errstate(all="ignore")
def verdict(stats: LossStatistics, steps: Any) -> np.ndarray:
    """Return the verdict on each lane, by the rule in the module docstring.

    Args:
      stats: the statistics of a lane, or arrays with one entry per lane.
      steps: number of losses, at least 4: one number for all lanes, or an array with one per lane.

    Returns: an array of strings from `VERDICTS`, with the shape of the statistics.
    """
    s = stats._make(np.asarray(x, np.float64) for x in stats)
    half, window = np.asarray(steps) // 2, np.maximum(np.asarray(steps) // 10, 1)
    tail = steps - half
    size, fall, still = np.abs(s.first), s.first - s.late, s.middle - s.late
    level, error = np.maximum(fall, size / 2), 3 * s.swing * np.sqrt(2 / window)

    # Comparisons with NaN are false: with `~`, an unknown stride attributes a swing to the steps.
    margin = np.minimum(error, np.maximum(size, np.abs(s.early)))
    rose = ~(s.late - np.maximum(s.first, s.early) <= np.maximum(0.1 * size, margin))
    climb = np.maximum(np.maximum((s.first - s.low) / 2, 0.1 * size), 3 * s.swing)
    height = np.maximum(np.maximum(size, 3 * np.abs(s.late)), 20 * s.calm)
    noisy = s.jump >= np.abs(s.late) / 2  # then the first loss may be small by chance
    start = np.where(noisy, s.start, s.first)
    peaked = s.greatest - np.maximum(start, s.late) > height
    blew_up = peaked & (start - s.late < np.abs(start) / 2)
    diverged = (s.finite == 0) | rose | (s.late - s.low > climb) | blew_up
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
    """Return the statistics of a whole curve of losses.

    Args:
      losses: an array (steps,) or (steps, lanes).
      strides: |g . u| at each step, in the shape of the losses. None: unknown; `verdict` then
        attributes every swing to the steps and not to the batches.
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
    """Return the eigenvalue of the Hessian of the loss with the largest absolute value.

        v <- H v / ||H v||        sharpness = <v, H v>

    Gradient descent is stable along the eigenvector if the sharpness is below 2 / learning_rate,
    or with momentum b below 2 (1 + b) / learning_rate.

    Args:
      loss: params -> scalar.
      params: the parameters at which the Hessian is computed.
      key: random key of the initial direction.
      iterations: number of steps of the power method, each a gradient and its derivative. The error
        is proportional to (l2 / l1)^(2 iterations), for the two largest eigenvalues l1 and l2.

    Returns: a scalar; NaN if the Hessian is not finite.
    Source: Cohen et al. 2021, arXiv:2103.00065, where training approaches the edge of stability.
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
