"""What the textbooks teach a reader to see in a loss curve, as a rule with stated thresholds.

Too small: still falling when the steps are over. Good: fell, and lies still. Oscillating: jumps
about its trend, or is not getting where its steps promise. Diverged: ended above where it began.

A lane keeps a dozen sums of its training loss instead of the curve; `verdict` reads them. For
gradient descent on a w^2 / 2 over T = 20 to 200 steps, a rate below 0.02 / a comes out too small,
0.3 / a to 1 / a good, 2 / a and more oscillating or diverged. Between 1 / a and 2 / a the
*parameter* jumps from side to side while the loss falls: good as long as the loss arrives,
oscillating near 2 / a, where it hardly does.

With T steps, `early`, `middle` and `late` are the mean losses of the first T / 10 steps, of those
before half-time and of the last; fall = first - late. From the second half: `swing` is the standard
deviation about its straight line, `jump` the mean of |loss - loss before|, and `stride` the mean
of |g . u|, the change of the loss which a step promises to first order. `level` is the fall, or
half of |first| if that is more, and `error` 3 swing sqrt(2 / (T / 10)), three standard errors of
the difference of two windows. The first rule that holds:

  diverged     the loss was not finite; or late - max(first, early) > 0.1 |first|, and more than
               error or than |first| and |early|; or on the way it rose by more than |first|,
               10 |early| and 20 swing, and fall < |first| / 2
  too small    early - late < max(0.01 |early|, error) and stride <= 0.02 swing: nothing but noise
  oscillating  swing > 0.1 level, and stride >= jump / 2: the steps did it, not the batches;
               or a fall under |first| / 4, though the strides of the second half add up to 20 times
               that, and to 0.2 |first|: they lead nowhere;
               or still falling, but stride > 0.02 level and 5 times what the loss falls per step
  too small    still falling: middle - late > 0.015 fall, and more than error or than a fifth of
               the fall; or a fall under 0.01 |first|, not all of it long done
  good         otherwise

The noise of small batches is in the loss as well: where nothing is known of the strides, it counts
as swing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "VERDICTS",
    "LossStatistics",
    "final_loss",
    "observe",
    "of_curve",
    "sharpness",
    "statistics",
    "verdict",
]

VERDICTS = ("too small", "good", "oscillating", "diverged")


class LossStatistics(NamedTuple):
    """What is kept of the training loss so far: float32 scalars (float64 under x64)."""

    first: Any  # the loss at step 0
    least: Any  # extremes
    greatest: Any
    finite: Any  # bool: whether all losses were
    last: Any  # the loss one step ago
    early: Any  # sums over the windows
    middle: Any
    late: Any
    tail: Any  # sums over the second half, of x = (loss - first) / |first|,
    tail_square: Any  # x^2,
    tail_trend: Any  # x * time,
    tail_jump: Any  # |loss - last|
    tail_stride: Any  # and |g . u|


def statistics() -> LossStatistics:
    """Those of no loss at all."""
    zero = jnp.zeros([], float)
    least, greatest = zero + jnp.inf, zero - jnp.inf
    return LossStatistics(
        first=zero,
        least=least,
        greatest=greatest,
        finite=jnp.array(True),
        last=zero,
        early=zero,
        middle=zero,
        late=zero,
        tail=zero,
        tail_square=zero,
        tail_trend=zero,
        tail_jump=zero,
        tail_stride=zero,
    )


def observe(seen: LossStatistics, loss: Any, stride: Any, step: Any, steps: Any) -> LossStatistics:
    """The statistics with one more loss.

    Args:
      loss: scalar, at the parameters before the step.
      stride: scalar |g . u|, or NaN where nothing is known of it.
      step: its number, from 0; with `steps` one scalar for all lanes.
      steps: how many there will be.
    """
    loss, stride = jnp.asarray(loss, float), jnp.asarray(stride, float)
    half, window = steps // 2, jnp.maximum(steps // 10, 1)
    first = jnp.where(step == 0, loss, seen.first)
    x = (loss - first) / _scale(first)
    tail = step >= half
    in_middle, in_late = (step >= half - window) & ~tail, step >= steps - window
    time = 2 * (step - half + 0.5) / (steps - half) - 1
    add = lambda total, term, here: total + jnp.where(here, term, 0)
    return LossStatistics(
        first=first,
        least=jnp.minimum(seen.least, loss),
        greatest=jnp.maximum(seen.greatest, loss),
        finite=seen.finite & jnp.isfinite(loss),
        last=loss,
        early=add(seen.early, loss, step < window),
        middle=add(seen.middle, loss, in_middle),
        late=add(seen.late, loss, in_late),
        tail=add(seen.tail, x, tail),
        tail_square=add(seen.tail_square, x * x, tail),
        tail_trend=add(seen.tail_trend, x * time, tail),
        tail_jump=add(seen.tail_jump, jnp.abs(loss - seen.last), tail),
        tail_stride=add(seen.tail_stride, stride, tail),
    )


def _scale(first: Any) -> Any:
    return abs(first) + (first == 0)


def final_loss(seen: LossStatistics, steps: int) -> np.ndarray:
    """The mean loss of the last tenth of the steps; NaN where the loss was not finite."""
    late = np.asarray(seen.late, np.float64) / max(steps // 10, 1)
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
    early, middle, late = s.early / window, s.middle / window, s.late / window
    trend = s.tail_trend / n * 3 / (1 - 1 / n**2)
    variance = s.tail_square / n - (s.tail / n) ** 2 - trend**2 / 3 * (1 - 1 / n**2)
    swing = np.sqrt(np.maximum(variance, 0)) * _scale(s.first)
    jump, stride = s.tail_jump / n, s.tail_stride / n
    size, fall, still = np.abs(s.first), s.first - late, middle - late
    level, error = np.maximum(fall, size / 2), 3 * swing * np.sqrt(2 / window)

    # comparisons with NaN are false: each is written so that an unknown stride accuses the steps
    reach = np.minimum(error, np.maximum(size, np.abs(early)))
    rose = ~(late - np.maximum(s.first, early) <= np.maximum(0.1 * size, reach))
    usual = np.maximum(np.maximum(size, 10 * np.abs(early)), 20 * swing)
    blew_up = (s.greatest - s.first > usual) & (fall < size / 2)
    noise = (early - late < np.maximum(0.01 * np.abs(early), error)) & (stride <= 0.02 * swing)
    flat = (fall < 0.01 * size) & ~(stride * n <= 0.1 * fall)
    falling = (still > np.maximum(0.015 * fall, np.minimum(error, 0.2 * fall))) | flat
    oscillating = (
        ((swing > 0.1 * level) & ~(stride < jump / 2))
        | ((fall < size / 4) & (stride * n > 20 * np.maximum(fall, 0.01 * size)))
        | (falling & (stride > np.maximum(0.02 * level, 5 * still / half)))
    )
    rules = [(s.finite == 0) | rose | blew_up, noise, oscillating, falling]
    return np.select(rules, ["diverged", "too small", "oscillating", "too small"], default="good")


def of_curve(losses: Sequence[float] | np.ndarray, strides: Any = None) -> LossStatistics:
    """The statistics of a whole curve, (steps,) or (steps, lanes); strides like the losses.

    Without strides every swing is laid at the door of the steps, not of the batches.
    """
    curve = jnp.asarray(losses, float)
    steps = len(curve)
    stride = jnp.full_like(curve, jnp.nan) if strides is None else jnp.asarray(strides)
    shape = curve.shape[1:]
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, shape), statistics())
    indexed = (curve, stride, jnp.arange(steps))
    step = lambda seen, x: (observe(seen, x[0], x[1], x[2], steps), None)
    return jax.lax.scan(step, start, indexed)[0]


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
