"""Shampoo and SOAP: second moments of the rows and of the columns of a matrix.

Shampoo divides by roots of these moments; SOAP runs Adam in their eigenbases.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import GradientTransformation

from jgd.arguments import Decay, Fraction, NonNegative, Number, Period, Structure
from jgd.arithmetic import abs_square, average, increment, quotient, safe_sqrt, weights
from jgd.combinators import Plain, Slots, chain, named, with_accumulators
from jgd.linear_algebra import eigenvectors, inverse_root, orthonormal, within_range
from jgd.pytree import as_pytree
from jgd.rules import per_leaf
from jgd.sharding import apply_gathered
from jgd.transforms import (
    bias_weight,
    count_slot,
    decay_slots,
    identity,
    scale,
    scale_by_learning_rate,
    scale_by_momentum,
)

__all__ = ["scale_by_shampoo", "scale_by_soap", "shampoo", "soap"]


def _moment(g: Any, axis: int) -> Any:
    """Return the matrix of inner products between the slices of g along an axis."""
    others = [a for a in range(g.ndim) if a != axis]
    return jnp.tensordot(g, jnp.conj(g), (others, others))


def _along(x: Any, axis: int, matrix: Any) -> Any:
    """Return x with each vector along an axis multiplied by a matrix."""
    return jnp.moveaxis(jnp.tensordot(matrix, x, (1, axis)), 0, axis)


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`."""

    preconditioners: Any  # for each parameter array, a square matrix per axis that is short enough


@as_pytree
def scale_by_shampoo(
    eps: NonNegative = 1e-4, *, max_precond_dim: Structure = 1024
) -> GradientTransformation:
    """u = g multiplied along each axis by H^(-1 / 2k), for k axes: see `shampoo`.

    State: `ShampooState(preconditioners)`, for each leaf a square matrix for each axis that is no
      longer than `max_precond_dim`.
    Source: Gupta, Koren & Singer 2018, algorithms 1 and 2, arXiv:1802.09568.
    """

    def short(x: Any) -> list[int]:
        return [a for a, size in enumerate(x.shape or (1,)) if 0 < size <= max_precond_dim]

    def start(p: Any) -> Any:
        sizes = p.shape or (1,)
        return tuple(eps * jnp.eye(sizes[axis], dtype=p.dtype) for axis in short(p))

    def rule(g: Any, preconditioners: Any) -> tuple[Any, Any]:
        u = x = jnp.atleast_1d(g)
        moments = [_moment(x, axis) for axis in short(x)]
        sums = tuple(h + m for h, m in zip(preconditioners, moments, strict=True))
        for axis, h in zip(short(x), sums, strict=True):
            u = _along(u, axis, inverse_root(h, 2 * len(sums)))
        return u.reshape(g.shape), sums

    gathered_rule = lambda g, preconditioners: apply_gathered(rule, g, preconditioners)
    return per_leaf(gathered_rule, ShampooState, preconditioners=start)


@as_pytree
def shampoo(
    learning_rate: Number,
    eps: NonNegative = 1e-4,
    momentum: Fraction | None = None,
    *,
    max_precond_dim: Structure = 1024,
) -> GradientTransformation:
    """Shampoo: full-matrix AdaGrad for the rows and for the columns of a matrix.

        L <- L + g g^T            R <- R + g^T g
        u = -learning_rate L^(-1/4) g R^(-1/4), for a matrix; H^(-1/2k) for each of k axes

    Args:
      learning_rate: the step size; positive to descend. May be a schedule.
      eps: initial value of the diagonals of L and R, at least 0; 1e-4 by default.
      momentum: in [0, 1], momentum of the preconditioned gradients; None (default): no momentum.
      max_precond_dim: longer axes are left out, and k counts the others; 1024 by default.

    State: `ShampooState(preconditioners)`, for each leaf a square matrix for each axis that is no
      longer than `max_precond_dim`; with momentum one more tree. On explicit mesh axes every
      device holds all square matrices; each update gathers the gradient, one leaf at a time, and
      every device decomposes all matrices. On auto axes the compiler shards them.
    Differs from: `soap`, which averages with a decay and decomposes every few steps; Shampoo
      decomposes every preconditioner at each step.
    Source: Gupta, Koren & Singer 2018, algorithms 1 and 2, arXiv:1802.09568.
    """
    direction = identity() if momentum is None else scale_by_momentum(momentum)
    return chain(
        scale_by_shampoo(eps, max_precond_dim=max_precond_dim),
        direction,
        scale_by_learning_rate(learning_rate),
    )


# --- SOAP ------------------------------------------------------------------------------------


class SoapState(NamedTuple):
    """State of `scale_by_soap`."""

    count: jax.Array  # int32 scalar: number of calls so far; the first one takes no step
    mu: Any  # average gradient in `bases`; like the parameters, at least float32
    nu: Any  # average squared gradient in `bases`; like mu
    preconditioners: Any  # for each parameter array, a square matrix per axis that is rotated
    bases: Any  # approximate eigenvectors of the preconditioners


class _SoapLeaves(NamedTuple):
    mu: Any
    nu: Any
    preconditioners: Any
    bases: Any


class _CountState(NamedTuple):
    count: jax.Array


@as_pytree
def scale_by_soap(
    b1: Decay = 0.95,
    b2: Decay = 0.95,
    shampoo_beta: Decay | None = None,
    eps: NonNegative = 1e-8,
    precondition_frequency: Period = 10,
    *,
    max_precond_dim: Structure = 10_000,
    precondition_1d: bool = False,
) -> GradientTransformation:
    """Adam's quotient in the eigenbases of Shampoo's preconditioners: see `soap`.

    State: `SoapState(count, mu, nu, preconditioners, bases)`, two trees, a scalar, and two
      square matrices for each axis that is rotated.
    Source: Vyas et al. 2024, algorithm 3, arXiv:2409.11321.
    """
    beta = b2 if shampoo_beta is None else shampoo_beta
    by_1, by_2, by_3 = map(weights, (b1, b2, beta))

    def rotated(x: Any) -> list[int]:
        if x.ndim < 2 and not (precondition_1d and x.ndim):
            return []
        return [axis for axis, size in enumerate(x.shape) if 0 < size <= max_precond_dim]

    def squares(p: Any) -> Any:
        return tuple(jnp.zeros([p.shape[axis]] * 2, p.dtype) for axis in rotated(p))

    def into(x: Any, bases: Any) -> Any:
        for axis, basis in zip(rotated(x), bases, strict=True):
            x = _along(x, axis, basis.conj().T)
        return x

    def out_of(x: Any, bases: Any) -> Any:
        for axis, basis in zip(rotated(x), bases, strict=True):
            x = _along(x, axis, basis)
        return x

    def refreshed(mu: Any, nu: Any, preconditioners: Any, bases: Any) -> tuple[Any, Any, Any]:
        """Sort each basis by eigenvalue, apply one power iteration, and rotate mu and nu."""
        new = []
        for axis, h, basis in zip(rotated(mu), preconditioners, bases, strict=True):
            eigenvalues = jnp.real(jnp.diagonal(basis.conj().T @ h @ basis))
            order = jnp.argsort(-eigenvalues)
            nu = jnp.take(nu, order, axis)
            new.append(orthonormal(h @ jnp.take(basis, order, 1)))
        return into(out_of(mu, bases), new), nu, tuple(new)

    def one_step(count: Any, c1: Any, c2: Any) -> Plain:
        first = count == 1
        refresh = jnp.mod(count - 1, precondition_frequency) == 0

        def rule(
            g: Any, mu: Any, nu: Any, preconditioners: Any, bases: Any
        ) -> tuple[Any, Any, Any, Any, Any]:
            x = into(g, bases)
            cast = lambda new, old: new.astype(old.dtype)
            mu = cast(jnp.where(first, mu, average(x, mu, by_1)), mu)
            nu = cast(jnp.where(first, nu, average(abs_square(x), nu, by_2)), nu)
            u = out_of(quotient(mu, safe_sqrt(nu) + eps), bases) * (jnp.sqrt(c2) / c1)
            moments = [_moment(g, axis) for axis in rotated(g)]
            preconditioners = tuple(
                cast(average(m, h, by_3), h) for h, m in zip(preconditioners, moments, strict=True)
            )
            if bases:
                scaled = tuple(map(within_range, preconditioners))
                start = lambda: (mu, nu, tuple(map(eigenvectors, scaled)))
                iterate = lambda: refreshed(mu, nu, scaled, bases)
                unchanged = lambda: (mu, nu, bases)
                new_bases = lambda: jax.lax.cond(first, start, iterate)
                mu, nu, bases = jax.lax.cond(refresh, new_bases, unchanged)
            return jnp.where(first, 0 * g, u), mu, nu, preconditioners, bases

        def gathered_rule(g: Any, mu: Any, nu: Any, preconditioners: Any, bases: Any) -> Any:
            return apply_gathered(rule, g, mu, nu, preconditioners, bases)

        return per_leaf(gathered_rule, _SoapLeaves, preconditioners=squares, bases=squares)

    def step(updates: Any, slots: Slots, params: Any) -> Any:
        count = slots.step("count", increment)
        t = jnp.maximum(count - 1, 1)  # the first call takes no step
        c1, c2 = (bias_weight(slots, decay, of, count=t) for decay, of in ((b1, "mu"), (b2, "nu")))
        for rule in one_step(count, c1, c2).steps or ():
            updates = rule(updates, slots, params)
        return updates

    fields = {field: field for field in SoapState._fields}
    slots = [count_slot(), *one_step(1, 1.0, 1.0).slots, *decay_slots("mu", "nu")]
    return with_accumulators([step], slots, SoapState, fields)


@as_pytree
def soap(
    learning_rate: Number,
    b1: Decay = 0.95,
    b2: Decay = 0.95,
    shampoo_beta: Decay | None = None,
    eps: NonNegative = 1e-8,
    weight_decay: Number = 0.01,
    precondition_frequency: Period = 10,
    *,
    max_precond_dim: Structure = 10_000,
    precondition_1d: bool = False,
) -> GradientTransformation:
    """SOAP: Adam in the eigenbases of Shampoo's preconditioners.

        L <- beta L + (1 - beta) g g^T, R with g^T g            U, V: their eigenvectors
        m, v <- Adam's averages of U^T g V and its square, c = sqrt(1 - b2^t) / (1 - b1^t)
        u = -learning_rate (c U (m / (sqrt(v) + eps)) V^T + weight_decay p)

    Args:
      learning_rate: the step size; positive to descend. May be a schedule.
      b1, b2: decays of Adam's averages, in [0, 1); both 0.95 by default.
      shampoo_beta: decay of L and R, in [0, 1); None (default): b2.
      eps: at least 0, added outside the root, before the bias correction; 1e-8 by default.
      weight_decay: decoupled weight decay, of the parameters after the step; 0.01 by default.
      precondition_frequency: number of steps between two refreshes of the bases, each of which is a
        power iteration and a QR decomposition; at least 1; 10 by default.
      max_precond_dim: longer axes are not rotated; 10,000 by default.
      precondition_1d: True rotates vectors too.

    State: `SoapState(count, mu, nu, preconditioners, bases)`, two trees, a scalar, and two
      square matrices for each axis that is rotated. The first call only initializes the bases: its
      update is 0. On explicit mesh axes `mu` and `nu` are sharded like the parameters, and every
      device holds all square matrices; each update gathers the gradient, `mu` and `nu`, one leaf
      at a time, and every device computes the whole step. On auto axes the compiler decides.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `shampoo`, which has no average of gradients. Vectors get Adam's quotient, without
      a rotation. Under `jax.vmap` the bases are computed at every step.
    Source: Vyas et al. 2024, algorithm 3, arXiv:2409.11321, as in the authors' code.
    """

    def decay(g: Any, p: Any, t: Any) -> tuple[Any]:
        return (g - jnp.where(t == 1, 0, learning_rate * weight_decay) * (p + g),)

    tx = chain(
        scale_by_soap(
            b1,
            b2,
            shampoo_beta,
            eps,
            precondition_frequency,
            max_precond_dim=max_precond_dim,
            precondition_1d=precondition_1d,
        ),
        scale(-learning_rate),
        per_leaf(decay, _CountState),
    )
    return named(tx, record=SoapState, shared=["count"])
