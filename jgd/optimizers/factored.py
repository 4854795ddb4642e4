"""Optimizers that store the squared magnitude of a matrix as one number per row and column.

SM3 bounds each sum of squared gradients by the smaller of its row and column maxima. Adafactor
estimates each average squared gradient by the product of its row and column means.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Fraction, Mask, NonNegative, Number, Positive, Structure
from jgd.arithmetic import (
    abs_square,
    average,
    complement,
    finite,
    quotient,
    safe_sqrt,
    weights_from,
)
from jgd.combinators import chain, named
from jgd.norms import rms_norm, scale_by_param_block_rms
from jgd.pytree import as_pytree
from jgd.rules import per_leaf
from jgd.transforms import (
    add_decayed_weights,
    ema,
    moving_average,
    pointwise,
    scale,
    scale_by_learning_rate,
)

__all__ = ["adafactor", "scale_by_factored_rms", "scale_by_sm3", "sm3"]


# --- SM3 -------------------------------------------------------------------------------------


def _real_dtype(p: Any) -> Any:
    return jnp.real(jnp.zeros([], p.dtype)).dtype


class _CoverState(NamedTuple):
    mu: Any


def _others(ndim: int, axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if a != axis)


def _maxima(x: Any) -> list[Any]:
    """Return the maxima over all other axes, for each axis; [x] for scalars and vectors."""
    if x.ndim < 2:
        return [x]
    return [jnp.max(x, _others(x.ndim, axis), initial=0) for axis in range(x.ndim)]


@as_pytree
def scale_by_sm3(
    b1: Decay = 0.9, b2: Fraction = 1.0, eps: NonNegative = 1e-8
) -> GradientTransformation:
    """m <- b1 m + (1 - b1) g / sqrt(a + eps) for a bound a of the sum of g^2, u = m: see `sm3`.

    Args:
      b1: decay of the average, in [0, 1).
      b2: decay of the bound, in [0, 1]; below 1, g^2 enters with weight 1 - b2.
      eps: at least 0, added inside the root.

    State: `optax.ScaleBySM3State(mu, nu)`, one tree and one vector for each axis of each leaf.
    Source: Anil et al. 2019, algorithm SM3-II, arXiv:1901.11150.
    """
    new = jnp.where(b2 == 1, 1, complement(b2))

    def rule(g: Any, mu: Any) -> tuple[Any, Any]:
        along = lambda m, axis: jnp.expand_dims(m, _others(g.ndim, axis))
        covers = [along(m, axis) for axis, m in enumerate(mu)] if g.ndim > 1 else mu
        least = covers[0]
        for cover in covers[1:]:
            least = jnp.minimum(least, cover)
        bound = new * abs_square(g) + b2 * least
        magnitude = jnp.where(bound == 0, 0, safe_sqrt(bound + eps))
        return quotient(g, magnitude), _maxima(jnp.broadcast_to(bound, g.shape))

    def zeros(p: Any) -> list[Any]:
        return _maxima(jnp.zeros_like(p, dtype=_real_dtype(p)))  # sharded like the axis

    tx = chain(per_leaf(rule, _CoverState, mu=zeros), moving_average(b1, name="nu"))
    return named(tx, record=optax.ScaleBySM3State)


@as_pytree
def sm3(learning_rate: Number, momentum: Decay = 0.9) -> GradientTransformation:
    """SM3: AdaGrad that stores one number per row and column of a matrix.

        a = min(row, column) + g^2            row, column <- maxima of a
        m <- momentum m + (1 - momentum) g / sqrt(a + eps)            u = -learning_rate m

    Args:
      learning_rate: the step size; positive to descend. May be a schedule.
      momentum: decay of the average m, in [0, 1); 0.9 by default.

    State: `optax.ScaleBySM3State(mu, nu)`, one tree and one vector for each axis of each leaf.
    Differs from: `adagrad`, which stores the sum that SM3 bounds from above; `adafactor`, which
      averages squares with a decay.
    Source: Anil et al. 2019, algorithm SM3-II, arXiv:1901.11150; eps = 1e-8.
    """
    return chain(scale_by_sm3(momentum), scale_by_learning_rate(learning_rate))


# --- Adafactor -------------------------------------------------------------------------------


def _decay_rate_pow(i: Any, exponent: Any = 0.8) -> Any:
    return 1 - (i + 1) ** -exponent


def _factored_axes(shape: tuple[int, ...], factored: bool, least: int) -> tuple[int, int] | None:
    """Return the second largest and the largest axis, or None if the leaf is not factored."""
    if not factored or len(shape) < 2:
        return None
    second, largest = map(int, np.argsort(shape)[-2:])
    return (second, largest) if shape[second] >= least else None


@as_pytree
def scale_by_factored_rms(
    factored: bool = True,
    decay_rate: NonNegative = 0.8,
    step_offset: Number = 0,
    min_dim_size_to_factor: Structure = 128,
    epsilon: NonNegative = 1e-30,
    decay_rate_fn: Callable[[Any, Any], Any] = _decay_rate_pow,
) -> GradientTransformation:
    """u = g / sqrt(v), for v the average square, or its estimate row x column / mean(row).

    Args:
      factored: False stores v for every leaf.
      decay_rate: at least 0, the second argument of `decay_rate_fn`.
      step_offset: number of steps to subtract from the count, to fine-tune trained parameters.
      min_dim_size_to_factor: a leaf is factored if its second largest axis is at least this long.
      epsilon: at least 0, added to g^2.
      decay_rate_fn: (steps so far - step_offset, decay_rate) -> the decay of this step; by default
        1 - (i + 1)^-decay_rate, which is 0 at the first step.

    State: `optax.FactoredState(count, v_row, v_col, v)`: for each leaf its row and column means if
      it is factored, otherwise one array like the parameter.
    Source: Shazeer & Stern 2018, algorithm 4, arXiv:1804.04235.
    """

    def axes(x: Any) -> tuple[int, int] | None:
        return _factored_axes(x.shape, factored, min_dim_size_to_factor)

    unused = lambda p: jnp.zeros([1], _real_dtype(p))

    def mean_over(which: int) -> Callable[[Any], Any]:
        zeros = lambda p: jnp.zeros_like(p, dtype=_real_dtype(p))
        return lambda p: zeros(p).sum(found[which]) if (found := axes(p)) else unused(p)

    def rule(g: Any, v_row: Any, v_col: Any, v: Any, t: Any) -> tuple[Any, ...]:
        steps = t - step_offset
        is_power = decay_rate_fn is _decay_rate_pow  # then 1 - decay has a form that is exact
        weight = steps**-decay_rate if is_power else 1 - decay_rate_fn(steps - 1, decay_rate)
        by = weights_from(weight)
        square = abs_square(g) + epsilon
        if (found := axes(g)) is None:
            v = average(square, v, by)
            return quotient(g, safe_sqrt(v)), v_row, v_col, v
        second, largest = found
        v_row = average(square.mean(largest), v_row, by)
        v_col = average(square.mean(second), v_col, by)
        mean = v_row.mean(second - (second > largest), keepdims=True)
        row = jnp.expand_dims(safe_sqrt(quotient(finite(v_row), mean)), largest)
        column = jnp.expand_dims(safe_sqrt(v_col), second)
        return quotient(quotient(g, row), column), v_row, v_col, v

    start = dict(
        v_row=mean_over(1),
        v_col=mean_over(0),
        v=lambda p: unused(p) if axes(p) else jnp.zeros_like(p, dtype=_real_dtype(p)),
    )
    return per_leaf(rule, optax.FactoredState, **start)


@as_pytree
def adafactor(
    learning_rate: Number | None = None,
    min_dim_size_to_factor: Structure = 128,
    decay_rate: NonNegative = 0.8,
    decay_offset: Number = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Positive | None = 1.0,
    momentum: Fraction | None = None,
    dtype_momentum: DTypeLike = "float32",
    weight_decay_rate: Number | None = None,
    eps: NonNegative = 1e-30,
    factored: bool = True,
    weight_decay_mask: Mask | None = None,
) -> GradientTransformation:
    """Adafactor: a magnitude from row and column means, and steps relative to the parameters.

        v_row, v_col <- averages of row and column means of g^2 + eps, with decay 1 - t^-decay_rate
        x = g / sqrt(v_row v_col / mean(v_row))            x <- x / max(1, rms(x) / threshold)
        u = -learning_rate x max(rms(p), 1e-3) - weight_decay_rate p

    Args:
      learning_rate: the step size; positive to descend; None (default) is 1. May be a schedule.
      min_dim_size_to_factor: a leaf is factored if its second largest axis is at least this long;
        128 by default. Other leaves store v.
      decay_rate: exponent of the decay, at least 0; 0.8 by default.
      decay_offset: number of steps to subtract from the count; 0 by default.
      multiply_by_parameter_scale: False leaves out the factor max(rms(p), 1e-3).
      clipping_threshold: above 0, the largest root mean square of x in a leaf; 1 by default.
        None: no clipping.
      momentum: decay of an average of updates, in [0, 1]; None (default): no average.
      dtype_momentum: dtype of this average.
      weight_decay_rate: weight decay that is not multiplied by the learning rate; None (default):
        no decay. May be a schedule.
      eps: at least 0, added to g^2; 1e-30 by default.
      factored: False stores v for every leaf, as Adam does.
      weight_decay_mask: selects the leaves that decay, as in `adamw`.

    State: `optax.FactoredState(count, v_row, v_col, v)`: row and column means for each factored
      leaf, one array like the parameter for each other leaf; with momentum one more tree.
    Raises: ValueError in `update` if no parameters are given and they are needed.
    Differs from: Keras and PyTorch, which factor the last two axes, use min(learning_rate,
      1 / sqrt(t)) and multiply weight decay by the learning rate.
    Source: Shazeer & Stern 2018, algorithms 4 and 6, arXiv:1804.04235.
    """
    links = [scale_by_factored_rms(factored, decay_rate, decay_offset, min_dim_size_to_factor, eps)]
    if clipping_threshold is not None:
        links.append(pointwise(lambda g: g / jnp.maximum(1, rms_norm(g) / clipping_threshold)))
    if learning_rate is not None:
        links.append(scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        links.append(scale_by_param_block_rms())
    if momentum is not None:
        links.append(ema(momentum, debias=False, accumulator_dtype=dtype_momentum))
    if weight_decay_rate is not None:
        links.append(add_decayed_weights(weight_decay_rate, weight_decay_mask))
    return chain(*links, scale(-1.0))
