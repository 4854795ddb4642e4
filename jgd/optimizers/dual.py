"""Follow the leader: the parameters are a function of the sums of all gradients so far.

Both rules compute the next parameters from these sums and return the difference as the update.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
import optax.contrib
from optax import GradientTransformation

from jgd.arguments import Decay, NonNegative, Number, Positive
from jgd.arithmetic import abs_square, complement, quotient
from jgd.combinators import chain
from jgd.pytree import as_pytree
from jgd.rules import per_leaf, real
from jgd.transforms import add_decayed_weights

__all__ = ["ftrl", "madgrad", "scale_by_madgrad"]


class FtrlState(NamedTuple):
    """State of `ftrl`."""

    sum_of_squares: Any  # n; like the parameters, at least float32
    linear: Any  # z; like the parameters, at least float32


@as_pytree
def ftrl(
    learning_rate: Positive,
    learning_rate_power: Number = -0.5,
    initial_accumulator_value: NonNegative = 0.1,
    l1: NonNegative = 0.0,
    l2: NonNegative = 0.0,
    l2_shrinkage: NonNegative = 0.0,
    beta: NonNegative = 0.0,
) -> GradientTransformation:
    """FTRL-Proximal: for sparse linear models; an L1 penalty sets parameters to exactly 0.

        n <- n + g^2            q = n^(-learning_rate_power) / learning_rate
        z <- z + g + 2 l2_shrinkage p - (q - q_old) p
        u = (clip(z, -l1, l1) - z) / (q + 2 l2 + beta / learning_rate) - p

    Args:
      learning_rate: above 0. May be a schedule.
      learning_rate_power: at most 0; -0.5 (default) gives the square root of AdaGrad.
      initial_accumulator_value: initial value of n, at least 0; 0.1 by default.
      l1, l2: penalties in the formula of u, at least 0; 0 by default.
      l2_shrinkage: an L2 penalty on the gradient only, at least 0; 0 by default.
      beta: at least 0, added to the root of n; 0 by default.

    State: `FtrlState(sum_of_squares, linear)`, two trees.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `adagrad`, which updates the parameters instead of computing them from the sums:
      FTRL overwrites the initial parameters, and sets parameters without any gradient to 0.
    Source: McMahan et al. 2013, algorithm 1, doi:10.1145/2487575.2488200; defaults as in Keras.
    """

    def power(n: Any) -> Any:
        zero = n == 0
        return jnp.where(zero, 0, jnp.where(zero, 1, n) ** -learning_rate_power) / learning_rate

    def rule(g: Any, p: Any, sum_of_squares: Any, linear: Any) -> tuple[Any, Any, Any]:
        total = sum_of_squares + abs_square(real(g))
        q = power(total)
        overflow = jnp.isinf(q)  # z / q would be NaN, although the step tends to 0
        z = linear + g + 2 * l2_shrinkage * p - (q - power(sum_of_squares)) * p
        linear = jnp.where(overflow, linear, z)
        shrunk = jnp.clip(linear, -l1, l1) - linear
        u = quotient(shrunk, q + 2 * l2 + beta / learning_rate) - p
        return jnp.where(overflow, 0 * g, u), total, linear

    start = lambda p: jnp.full_like(p, initial_accumulator_value)
    return per_leaf(rule, FtrlState, sum_of_squares=start)


@as_pytree
def scale_by_madgrad(
    learning_rate: Number, momentum: Decay = 0.9, eps: NonNegative = 1e-6
) -> GradientTransformation:
    """MADGRAD without weight decay: see `madgrad`. The update already includes the learning rate.

    State: `optax.contrib.MadgradState(count, grad_sum_sq, s, x0)`, three trees and one scalar.
    Source: Defazio & Jelassi 2021, algorithm 1, arXiv:2101.11075.
    """

    def cube_root(x: Any) -> Any:
        zero = x == 0
        return jnp.where(zero, 0, jnp.cbrt(jnp.where(zero, 1, x)))

    def rule(
        g: Any, p: Any, grad_sum_sq: Any, s: Any, x0: Any, t: Any
    ) -> tuple[Any, Any, Any, Any]:
        weight = (learning_rate + eps) * jnp.sqrt(t)
        grad_sum_sq = grad_sum_sq + weight * abs_square(g)
        s = s + weight * g
        z = x0 - quotient(s, cube_root(jnp.real(grad_sum_sq)) + eps)
        return complement(momentum) * (z - p), grad_sum_sq, s, x0

    return per_leaf(rule, optax.contrib.MadgradState, x0=jnp.copy)


@as_pytree
def madgrad(
    learning_rate: Number,
    momentum: Decay = 0.9,
    weight_decay: Number = 0.0,
    eps: NonNegative = 1e-6,
) -> GradientTransformation:
    """MADGRAD: dual averaging divided by the cube root of the sum of squares, with momentum.

        w = (learning_rate + eps) sqrt(t)            s <- s + w g            v <- v + w g^2
        u = (1 - momentum) (x0 - s / (cbrt(v) + eps) - p)

    Args:
      learning_rate: the step size; positive to descend. May be a schedule, like the other numbers.
      momentum: in [0, 1), the fraction of the step that is left out; 0.9 by default.
      weight_decay: an L2 penalty: weight_decay p is added to the gradient; 0 by default.
      eps: at least 0, added to the learning rate and outside the cube root; 1e-6 by default.

    State: `optax.contrib.MadgradState(count, grad_sum_sq, s, x0)`, three trees and one scalar.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `adagrad`, which takes the square root and steps from p, not from x0.
    Source: Defazio & Jelassi 2021, algorithm 1, arXiv:2101.11075.
    """
    return chain(add_decayed_weights(weight_decay), scale_by_madgrad(learning_rate, momentum, eps))
