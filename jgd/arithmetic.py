"""Quotients and roots that are finite at 0, in value and in derivative, and let NaN through.

    quotient(m, root_of(v))        # 0 where v is 0, NaN where m or v is

What JAX makes infinite or NaN there would spoil a whole training, or every hypergradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "abs_square",
    "finite",
    "formula",
    "increment",
    "one_minus_power",
    "quotient",
    "root_of",
    "safe_sqrt",
]


def formula(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `f`, a function of a module on one leaf and its numbers, traced once for each shape.

    Numbers have to be arguments: a closure would be a new function, and a new trace, every time.
    """
    return jax.jit(f, inline=True)


def quotient(numerator: Any, denominator: Any) -> Any:
    """Return numerator / denominator, and 0 where the denominator is 0.

    A denominator counts as 0 up to the root of the smallest normal number, where its square, which
    the derivative divides by, would leave the range.
    """
    size = jnp.abs(denominator)
    small = size <= np.sqrt(jnp.finfo(size.dtype).tiny)
    if jnp.iscomplexobj(denominator):  # an infinite complex denominator makes NaN
        return jnp.where(small, 0, numerator / jnp.where(small, 1, denominator))
    return numerator / jnp.where(small, np.asarray(np.inf, size.dtype), denominator)


def root_of(v: Any) -> Any:
    """Return sqrt(v), and where v is 0 or less a root that `quotient` takes for 0."""
    return jnp.sqrt(jnp.maximum(v, jnp.finfo(v.dtype).tiny))


def safe_sqrt(v: Any) -> Any:
    """Return sqrt(v), and 0 with derivative 0 where v is 0 or, by rounding, less."""
    zero = v <= 0  # False for NaN, so NaN propagates
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, v)))


def abs_square(g: Any) -> Any:
    """Return |g|^2, which is real for complex g too."""
    return (g * jnp.conj(g)).real


def finite(x: Any) -> Any:
    """Return min(x, the largest number), for differences of squares that may be infinite.

    inf - finite(inf) is inf, finite(inf) / inf is 0; without it both are NaN. NaN stays NaN.
    """
    return jnp.minimum(x, jnp.finfo(x.dtype).max)


@formula
def increment(count: Any) -> Any:
    """Return count + 1, or the largest integer once it is reached."""
    return optax.safe_increment(count)


@formula
def one_minus_power(decay: Any, count: Any) -> Any:
    """Return 1 - decay^count, to rounding, with a finite derivative at a decay of 0."""
    return one_minus_exp(decay, count, count * log_of(decay))


def log_of(decay: Any) -> Any:
    """Return log(decay), finite at 0."""
    decay = jnp.asarray(decay)
    return jnp.log(jnp.maximum(decay, jnp.finfo(decay.dtype).tiny))


def one_minus_exp(decay: Any, count: Any, total: Any) -> Any:
    """Return 1 - exp(total), for total the sum of log(decay) over `count` steps."""
    # expm1 is exact to rounding, but flat at a decay of 0, where the first step is not
    return jnp.where(count == 1, 1 - decay, -jnp.expm1(total))
