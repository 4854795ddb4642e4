"""Quotients, roots, averages and bias corrections: finite at 0, exact for decimals.

    quotient(m, root_of(v))            # 0 where v is 0, NaN where m or v is NaN
    average(g, m, weights(0.9999))     # g has weight 1e-4; 1 - float32(0.9999) is 0.02% off

An infinite or NaN derivative at 0 would spoil a whole training run and every hypergradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "abs_square",
    "average",
    "complement",
    "finite",
    "formula",
    "increment",
    "one_minus_power",
    "quotient",
    "root_of",
    "safe_sqrt",
    "weights",
    "weights_from",
]


def formula(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `f`, a module-level function of one leaf and its numbers, traced once for each shape.

    Numbers must be arguments: a closure would be a new function, and a new trace, every time.
    """
    return jax.jit(f, inline=True)


def quotient(numerator: Any, denominator: Any) -> Any:
    """Return numerator / denominator, and 0 where the denominator is 0.

    A denominator counts as 0 up to the root of the smallest normal number: its square, by which the
    derivative divides, would be out of range.
    """
    size = jnp.abs(denominator)
    small = size <= np.sqrt(jnp.finfo(size.dtype).tiny)
    if jnp.iscomplexobj(denominator):  # an infinite complex denominator makes NaN
        return jnp.where(small, 0, numerator / jnp.where(small, 1, denominator))
    return numerator / jnp.where(small, np.asarray(np.inf, size.dtype), denominator)


def root_of(v: Any) -> Any:
    """Return sqrt(v). Where v is 0 or less, return a root that `quotient` treats as 0."""
    return jnp.sqrt(jnp.maximum(v, jnp.finfo(v.dtype).tiny))


def safe_sqrt(v: Any) -> Any:
    """Return sqrt(v), and 0 with derivative 0 where v is 0 or, by rounding, negative."""
    zero = v <= 0  # False for NaN, so NaN propagates
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, v)))


def abs_square(g: Any) -> Any:
    """Return |g|^2, which is real for complex g too."""
    return (g * jnp.conj(g)).real


@formula
def finite(x: Any) -> Any:
    """Return min(x, the largest number), for differences of squares that may be infinite.

    inf - finite(inf) is inf and finite(inf) / inf is 0, where inf - inf and inf / inf are NaN. NaN
    stays NaN. Complex numbers, which are never squares, are returned unchanged.
    """
    return x if jnp.iscomplexobj(x) else jnp.minimum(x, jnp.finfo(x.dtype).max)


@formula
def increment(count: Any) -> Any:
    """Return count + 1, or the largest integer once it is reached."""
    return optax.safe_increment(count)


# --- decays ----------------------------------------------------------------------------------


def complement(decay: Any) -> Any:
    """Return 1 - decay for the decimal that the user typed.

    The error of 0.9999 in float32 is 2e-4 of 1 - 0.9999. If `decay` is the float32 closest to a
    decimal of up to six places, the result is 1 minus that decimal; the derivative is that of
    1 - decay. Averages and bias corrections use the complement alone, since the complement and the
    rounded `decay` do not add up to 1.
    """
    if isinstance(decay, jax.Array):
        return _complement_traced(decay)
    rest = 1 - decay  # in float64 for a Python float
    return rest + _to_decimal(rest) if isinstance(rest, np.floating) else rest


def _to_decimal(rest: Any, xp: Any = np) -> Any:
    """Return the distance from `rest` to the six-place decimal that it rounds, if any, else 0."""
    dtype = rest.dtype
    millionths = rest * dtype.type(1e6)
    nearest = xp.round(millionths)
    # float32 rounds numbers below 1 by eps / 4 at most; the rest of the bound is for the product
    rounds = abs(millionths - nearest) <= 0.26e6 * np.finfo(dtype).eps
    return xp.where(rounds, nearest * dtype.type(1e-6) - rest, 0).astype(dtype)


@formula
def _complement_traced(decay: Any) -> Any:
    rest = 1 - decay
    return rest + jax.lax.stop_gradient(_to_decimal(rest, jnp))


class Weights(NamedTuple):
    """Weights of an average: of the new value, and of the old one in two parts, `most` and `rest`.

    The three add up to 1. A single float32 weight of the old value is rounded: for a decay of
    0.9999, by 2e-4 of the weight of the new value. No weight is negative, so a square that
    overflows stays infinite in its average, where old - weight old would be inf - inf.
    """

    new: Any
    most: Any
    rest: Any


def weights(decay: Any) -> Weights:
    """Return the weights of an average with this decay, for the decimal that the user typed."""
    return weights_from(complement(decay))


def weights_from(new: Any) -> Weights:
    """Return the weights of an average in which the new value has the weight `new`."""
    if isinstance(new, jax.Array):
        return _weights_traced(new)
    kind = np.dtype(getattr(new, "dtype", jnp.result_type(float))).type
    one, new = kind(1), kind(new)
    most = (one - new) * kind(_MOST)
    return Weights(new, most, (one - most) - new)


_MOST = 1 - 2**-14


@formula
def _weights_traced(new: Any) -> Weights:
    most = (1 - new) * _MOST
    # XLA may compute 1 - x y without rounding x y: the three weights would not add up to 1
    most = jax.lax.reduce_precision(most, jnp.finfo(most.dtype).nexp, 16)
    return Weights(new, most, (1 - most) - new)


@formula
def average(new: Any, old: Any, by: Weights) -> Any:
    """Return the average of a new and an old value; exactly `new` if the old one has no weight."""
    return by.most * old + (by.rest * old + by.new * new)


@formula
def one_minus_power(weight: Any, count: Any) -> Any:
    """Return 1 - (1 - weight)^count to rounding, with a finite derivative at a weight of 1."""
    return one_minus_exp(weight, count, count * log_decay(weight))


def log_decay(weight: Any) -> Any:
    """Return log(1 - weight), finite at a weight of 1."""
    weight = jnp.asarray(weight)
    return jnp.log1p(-jnp.minimum(weight, 1 - jnp.finfo(weight.dtype).epsneg))


def one_minus_exp(weight: Any, count: Any, total: Any) -> Any:
    """Return 1 - exp(total), where total is the sum of log(1 - weight) over `count` steps."""
    # expm1 is exact to rounding, but flat at a weight of 1, where the first step is not
    return jnp.where(count == 1, weight, -jnp.expm1(total))
