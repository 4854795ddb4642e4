"""Building blocks of schedules: ramps, ratios and powers, safe at 0, with traced arguments.

1 - ramp(step, begin=10, length=5)     # 1 up to step 10, 0 from step 15 on
"""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["as_float", "as_vector", "floor_ratio", "ramp", "safe_power", "safe_ratio"]


def as_float(step: Any) -> jax.Array:
    """Return a step as a float: exact up to 2^24 in float32."""
    return jnp.asarray(step, float)


def safe_ratio(x: Any, length: Any) -> Any:
    """Return x / length, and 0 if length <= 0, for which optax returns the initial value."""
    positive = length > 0
    return jnp.where(positive, x / jnp.where(positive, length, 1), 0)


def ramp(step: Any, begin: Any, length: Any) -> Any:
    """Return 0 up to `begin`, 1 from `begin + length` on, and a straight line in between."""
    return jnp.clip(safe_ratio(as_float(step) - begin, length), 0, 1)


def floor_ratio(x: Any, length: Any) -> Any:
    """Return floor(x / length), exact at multiples even if XLA multiplies by 1 / length."""
    quotient = jnp.floor(safe_ratio(x, length))
    rest = x - quotient * length
    return quotient + jnp.where(rest >= length, 1.0, 0.0) - jnp.where(rest < 0, 1.0, 0.0)


def safe_power(base: Any, exponent: Any) -> Any:
    """Return base^exponent for a base of 0 or more, with finite derivatives at 0."""
    positive = base > 0
    power = jnp.where(positive, base, 1) ** exponent
    return jnp.where(positive, power, jnp.where(exponent == 0, 1.0, 0.0))


def as_vector(numbers: Any) -> jax.Array:
    """Return several numbers as an array."""
    if isinstance(numbers, tuple | list):
        return jnp.stack(numbers) if numbers else jnp.zeros([0])
    return numbers
