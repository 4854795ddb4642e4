"""What the textbooks teach a reader to see in a loss curve, as a rule with stated thresholds.

Too small: still falling when the steps are over. Good: fell, and lies still. Oscillating: jumps
about its trend, or is not getting where its steps promise. Diverged: ended above where it began.

A lane keeps a dozen sums of its training loss instead of the curve; `verdict` reads them. For
gradient descent on a w^2 / 2 over T = 20 to 200 steps, a rate below 0.02 / a comes out too small,
0.3 / a to 1 / a good, 2 / a and more oscillating or diverged. Between 1 / a and 2 / a the
*parameter* jumps from side to side while the loss falls: good as long as the loss arrives,
oscillating near 2 / a, where it hardly does.

With T steps, `late` is the mean loss of the last T / 10 steps, `middle` that of the T / 10 before
half-time, `swing` the standard deviation of the second half about its straight line, and `stride`
the mean over the second half of |g . u|, the change of the loss which a step promises to first
order. first - late is the fall; level is the fall or, if that is more, half of |first|.

  diverged     the loss was not finite, or late - first > max(|first|, first - least), or on the
               way it rose by more than |first| and did not come back to half of first
  oscillating  swing > 0.1 level, and stride > 0.02 swing: the steps did it, not the batches;
               or the strides of the second half add up to more than 20 times the fall, or 0.2
               |first| where that is more: they lead nowhere;
               or still falling, but stride > 0.02 level and 5 times what the loss falls per step
  too small    middle - late > 0.015 fall, and three standard errors of the difference (a fifth of
               the fall, if that is less); or a fall under 0.01 |first|
  good         otherwise

The noise of small batches is in the loss as well: a batch of a few examples can look like
oscillation at any rate that learns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["VERDICTS", "LossStatistics", "observe", "statistics", "verdict"]

VERDICTS = ("too small", "good", "oscillating", "diverged")


class LossStatistics(NamedTuple):
    """Sums over the training loss so far: float32 scalars, relative to the first loss."""

    first: Any  # the loss at step 0
    least: Any  # extremes, as they were
    greatest: Any
    finite: Any  # bool: whether all losses were
    middle: Any  # sums over the window before half-time,
    late: Any  # and over the last
    tail: Any  # sums over the second half: x, x^2, x * time and |g . u|
    tail_square: Any
    tail_trend: Any
    tail_stride: Any


def statistics() -> LossStatistics:
    """Those of no loss at all."""
    zero, inf = jnp.zeros([]), jnp.full([], jnp.inf)
    return LossStatistics(zero, inf, -inf, jnp.array(True), zero, zero, zero, zero, zero, zero)


def observe(seen: LossStatistics, loss: Any, stride: Any, step: Any, steps: Any) -> LossStatistics:
    """The statistics with one more loss.

    Args:
      loss: scalar, at the parameters before the step.
      stride: scalar |g . u|, or NaN where nothing is known of it.
      step: its number, from 0; with `steps` one scalar for all lanes.
      steps: how many there will be.
    """
    loss, stride = jnp.asarray(loss, jnp.float32), jnp.asarray(stride, jnp.float32)
    half, window = steps // 2, jnp.maximum(steps // 10, 1)
    first = jnp.where(step == 0, loss, seen.first)
    x = loss - first
    tail = step >= half
    in_middle, in_late = (step >= half - window) & ~tail, step >= steps - window
    time = 2 * (step - half + 0.5) / (steps - half) - 1
    add = lambda total, term, here: total + jnp.where(here, term, 0)
    return LossStatistics(
        first=first,
        least=jnp.minimum(seen.least, loss),
        greatest=jnp.maximum(seen.greatest, loss),
        finite=seen.finite & jnp.isfinite(loss),
        middle=add(seen.middle, x, in_middle),
        late=add(seen.late, x, in_late),
        tail=add(seen.tail, x, tail),
        tail_square=add(seen.tail_square, x * x, tail),
        tail_trend=add(seen.tail_trend, x * time, tail),
        tail_stride=add(seen.tail_stride, stride, tail),
    )


def final_loss(seen: LossStatistics, steps: int) -> np.ndarray:
    """The mean loss of the last tenth of the steps; NaN where the loss was not finite."""
    late = np.asarray(seen.first, np.float64) + np.asarray(seen.late) / max(steps // 10, 1)
    return np.where(np.asarray(seen.finite), late, np.nan)


@np.errstate(all="ignore")
def verdict(seen: LossStatistics, steps: int) -> np.ndarray:
    """The verdict on each lane, by the rule at the head of this module.

    Args:
      seen: statistics of all of `steps` losses, scalars or arrays of lanes.
      steps: at least 4.

    Returns: an array of strings out of `VERDICTS`, of the shape of the statistics.
    """
    s = seen._make(np.asarray(x, np.float64) for x in seen)
    half, window = steps // 2, max(steps // 10, 1)
    n = steps - half
    fall, middle = -s.late / window, -s.middle / min(window, half)
    still = fall - middle  # what the loss fell from half-time to the end
    trend = s.tail_trend / n * 3 / (1 - 1 / n**2)
    variance = s.tail_square / n - (s.tail / n) ** 2 - trend**2 / 3 * (1 - 1 / n**2)
    swing, stride = np.sqrt(np.maximum(variance, 0)), s.tail_stride / n
    size = np.abs(s.first)
    level = np.maximum(fall, size / 2)
    error = 3 * swing * np.sqrt(2 / window)

    ended_above = ~(-fall <= np.maximum(size, s.first - s.least))
    blew_up = (s.greatest - s.first > size) & (fall < size / 2)
    flat = fall < 0.01 * size
    falling = (still > np.maximum(0.015 * fall, np.minimum(error, 0.2 * fall))) | flat
    oscillating = (
        ((swing > 0.1 * level) & ~(stride <= 0.02 * swing))  # or no stride is known
        | (stride * n > 20 * np.maximum(fall, 0.01 * size))
        | (falling & (stride > np.maximum(0.02 * level, 5 * still / half)))
    )
    rules = [(s.finite == 0) | ended_above | blew_up, oscillating, falling]
    return np.select(rules, ["diverged", "oscillating", "too small"], default="good")


def of_curve(losses: Sequence[float] | np.ndarray, strides: Any = None) -> LossStatistics:
    """The statistics of a whole curve, (steps,) or (steps, lanes); strides like the losses.

    Without strides every swing is laid at the door of the steps, not of the batches.
    """
    curve = jnp.asarray(losses, jnp.float32)
    steps = len(curve)
    stride = jnp.full_like(curve, jnp.nan) if strides is None else jnp.asarray(strides)
    shape = curve.shape[1:]
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, shape), statistics())
    indexed = (curve, stride, jnp.arange(steps))
    step = lambda seen, x: (observe(seen, x[0], x[1], x[2], steps), None)
    return jax.lax.scan(step, start, indexed)[0]
