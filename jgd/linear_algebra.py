"""Functions of a matrix whose derivatives are finite where eigenvalues are equal or zero.

The derivatives of JAX's own decompositions divide by the gaps between eigenvalues. A function of
the whole matrix has a finite derivative there; where a basis is arbitrary, its derivative is 0.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["eigenvectors", "inverse_root", "orthogonalized", "orthonormal", "within_range"]


def _adjoint(x: Any) -> Any:
    return x.conj().swapaxes(-1, -2)


def _one_by_one(f: Callable[[Any], Any]) -> Any:
    """Return `f`, called for one matrix after the other under `jax.vmap`.

    On CPUs, batched decompositions of two concurrent programs can deadlock.
    """
    one = jax.custom_batching.custom_vmap(f)

    @one.def_vmap
    def rule(axis_size: int, batched: list[bool], x: Any) -> tuple[Any, Any]:
        # JAX calls this rule without a batched argument if only the tangents are batched
        results = jax.lax.map(one, x) if batched[0] else f(x)
        return results, jax.tree.map(lambda _: batched[0], results)

    return one


def _decomposition(f: Callable[[Any], Any], derivative: Callable[..., Any]) -> Any:
    """Return `f` with its derivative, called for one matrix after the other under `jax.vmap`.

    The derivative is defined around the batching rule, which JAX cannot transpose, and inside it as
    well, since JAX drops the outer derivative in second derivatives of a scan.
    """
    inner = jax.custom_jvp(f)
    inner.defjvp(derivative)
    outer = jax.custom_jvp(_one_by_one(inner))
    outer.defjvp(derivative)
    return outer


def _eigh_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    values, vectors = _eigh(*primals)
    gaps = values[None, :] - values[:, None]
    close = jnp.abs(gaps) <= jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), initial=0)
    in_basis = _adjoint(vectors) @ tangents[0] @ vectors
    rotation = jnp.where(close, 0, in_basis / jnp.where(close, 1, gaps))
    return (values, vectors), (jnp.diagonal(in_basis).real, vectors @ rotation)


def _qr_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    q, r = _qr(*primals)
    diagonal = jnp.abs(jnp.diagonal(r))
    dependent = diagonal <= jnp.finfo(diagonal.dtype).eps * jnp.max(diagonal, initial=0)
    projected = _adjoint(q) @ tangents[0]
    change = jax.scipy.linalg.solve_triangular(
        (r + jnp.diag(dependent.astype(r.dtype))).T, projected.T, lower=True
    ).T
    below = jnp.tril(jnp.where(dependent[None, :], 0, change), -1)
    rotation = below - _adjoint(below)
    return (q, r), (q @ rotation, projected - rotation @ r)


_eigh = _decomposition(lambda h: tuple(jnp.linalg.eigh(h)), _eigh_jvp)
_qr = _decomposition(lambda a: tuple(jnp.linalg.qr(a)), _qr_jvp)


def _overflowed(h: Any) -> Any:
    """Return whether a positive matrix overflowed: its trace bounds all of its entries.

    Other entries may then be inf - inf. The trace itself is NaN only after a NaN gradient.
    """
    return jnp.isinf(jnp.trace(h).real)


def within_range(h: Any) -> Any:
    """Return a positive matrix, or the identity if it overflowed."""
    return jnp.where(_overflowed(h), jnp.eye(*h.shape, dtype=h.dtype), h)


def _spectrum(h: Any) -> tuple[Any, Any, Any]:
    """Return eigenvalues of a positive matrix, its eigenvectors, and the floor of the eigenvalues.

    Eigenvalues below the floor, which is their rounding error, are raised to it. All are infinite
    if the matrix overflowed.
    """
    values, vectors = _eigh(within_range(h))
    values = jnp.where(_overflowed(h), jnp.inf, values)
    precision = jnp.finfo(values.dtype)
    floor = precision.eps * jnp.max(values, initial=0) + precision.tiny
    return jnp.maximum(values, floor), vectors, floor


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def inverse_root(h: Any, order: int) -> Any:
    """Return h^(-1 / order) of a positive matrix."""
    values, vectors, _ = _spectrum(h)
    return (vectors * values ** (-1 / order)) @ _adjoint(vectors)


@inverse_root.defjvp
def _inverse_root_jvp(order: int, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Apply the formula of Daleckii and Krein: divided differences in the eigenbasis of h."""
    values, vectors, floor = _spectrum(*primals)
    power = -1 / order
    roots = values**power
    gaps = values[:, None] - values[None, :]
    middle = (values[:, None] + values[None, :]) / 2
    close = jnp.abs(gaps) <= middle * jnp.finfo(values.dtype).eps ** 0.5
    differences = (roots[:, None] - roots[None, :]) / jnp.where(close, 1, gaps)
    zero = middle <= floor  # 0 up to rounding: the derivative is 0
    slopes = power * roots[:, None] * jnp.where(zero, 0, 1 / jnp.where(zero, 1, middle))
    weights = jnp.where(close, slopes, differences)
    in_basis = _adjoint(vectors) @ tangents[0] @ vectors
    tangent = vectors @ (weights * in_basis) @ _adjoint(vectors)
    return (vectors * roots) @ _adjoint(vectors), tangent


def eigenvectors(h: Any) -> Any:
    """Return orthonormal eigenvectors of a positive matrix as columns, largest eigenvalue first."""
    return _eigh(h)[1][:, ::-1]


def orthonormal(a: Any) -> Any:
    """Return the orthonormal factor of the QR decomposition of a square matrix."""
    return _qr(a)[0]


def _unchanged(x: Any) -> Any:
    return x


def orthogonalized(
    x: Any,
    coefficients: Any,
    normalized: Callable[[Any], Any],
    rounded: Callable[[Any], Any] = _unchanged,
) -> Any:
    """Return a matrix made orthogonal by the Newton-Schulz iteration: Muon's step.

        x <- normalized(x), then x <- a x + (b x x^T + c (x x^T)^2) x for each (a, b, c)

    Args:
      x: a matrix. It is transposed for the iteration if it has more rows than columns.
      coefficients: rows (a, b, c), which drive singular values in (0, 1] towards 1.
      normalized: a function that scales the singular values into (0, 1].
      rounded: a function that rounds each matrix before it enters another product.
    """
    tall = x.shape[0] > x.shape[1]
    x = normalized(x.T if tall else x)

    def iterate(x: Any, triple: Any) -> tuple[Any, None]:
        a, b, c = triple
        gram = rounded(x @ _adjoint(x))
        return rounded(a * x + rounded(b * gram + c * gram @ gram) @ x), None

    x, _ = jax.lax.scan(iterate, x, coefficients.astype(x.real.dtype))
    return x.T if tall else x
