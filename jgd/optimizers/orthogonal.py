"""Muon: replaces the momentum of a weight matrix by the orthogonal matrix nearest to it."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Decay, Mask, NonNegative, Number, Numbers, Structure
from jgd.arithmetic import quotient, safe_sqrt
from jgd.combinators import Slot, Slots, chain, named, partition, stateless, with_accumulators
from jgd.linear_algebra import orthogonalized
from jgd.norms import norm
from jgd.optimizers.moments import adamw
from jgd.pytree import as_pytree
from jgd.sharding import gather, shard_like
from jgd.transforms import add_decayed_weights, ema, nesterov_ema, scale_by_learning_rate
from jgd.trees import TreeError, aligned

__all__ = ["muon", "scale_by_muon"]


_JORDAN = (3.4445, -4.7750, 2.0315)
_PRESETS = {
    "standard": _JORDAN,
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
Preconditioning = Literal["frobenius", "spectral", "aol", "schatten"]
Dimensions = optax.contrib.MuonDimensionNumbers


def _coefficients(ns_coeffs: Any, ns_steps: int) -> jax.Array:
    """Return three coefficients for all steps, or a row of three for each of up to `ns_steps`."""
    if isinstance(ns_coeffs, str):
        if ns_coeffs not in _PRESETS:
            raise ValueError(f"muon: ns_coeffs must be one of {list(_PRESETS)}, got {ns_coeffs!r}")
        ns_coeffs = _PRESETS[ns_coeffs]
    coefficients = jnp.asarray(ns_coeffs, float)
    shape = coefficients.shape
    if shape != (3,) and (len(shape) != 2 or shape[1] != 3 or shape[0] > ns_steps):
        raise ValueError(
            f"muon: ns_coeffs must be 3 numbers, or up to ns_steps={ns_steps} rows of 3, got shape"
            f" {shape}"
        )
    return coefficients


def _store(coefficients: jax.Array) -> GradientTransformation:
    """Return a transformation that stores the coefficients in the state, as optax does."""

    def step(updates: Any, slots: Slots, _: Any) -> Any:
        slots.step("ns_coeffs", lambda _: coefficients)
        return updates

    slot = Slot("ns_coeffs", lambda _: coefficients)
    return with_accumulators([step], [slot], optax.EmptyState, {})


def _normalized(x: Any, how: str, eps: Any) -> Any:
    """Return a matrix with its singular values scaled into (0, 1]; it has rows <= columns."""
    if how == "frobenius":
        return quotient(x, norm(x) + eps)
    if how == "spectral":
        is_zero = norm(x) == 0
        largest = jnp.linalg.norm(jnp.where(is_zero, jnp.eye(*x.shape), x), ord=2)
        return quotient(x, jnp.where(is_zero, 0, largest) + eps)
    gram = x @ x.conj().T
    if how == "aol":
        return x / safe_sqrt(jnp.maximum(jnp.abs(gram).sum(-1, keepdims=True), eps))
    return x / safe_sqrt(jnp.maximum(norm(gram), eps))


def _axes(ndim: int, dimensions: Any) -> tuple[tuple[int, ...], ...]:
    """Return the batch, row and column axes of the matrices in a leaf."""
    as_tuple = lambda axis: (axis,) if isinstance(axis, int) else tuple(axis)
    rows, columns = (tuple(a % ndim for a in as_tuple(axis)) for axis in dimensions)
    if set(rows) & set(columns):
        raise ValueError(
            "muon: weight_dimension_numbers must not have an axis as both reduction and output"
            f" axis, got {dimensions}"
        )
    return tuple(a for a in range(ndim) if a not in rows + columns), rows, columns


def _as_matrices(f: Callable[[Any], Any], x: Any, dimensions: Any) -> Any:
    """Apply `f` to each matrix in a leaf."""
    if dimensions is None:
        raise TreeError(f"expected a matrix, got shape {x.shape}. Pass weight_dimension_numbers")
    groups = _axes(x.ndim, dimensions)
    if x.size == 0:
        return x
    order = [axis for group in groups for axis in group]
    sizes = [math.prod(x.shape[axis] for axis in group) for group in groups]
    transposed = gather(x).transpose(order)
    matrices = transposed.reshape(sizes)
    result = jax.vmap(f)(matrices).reshape(transposed.shape)
    return shard_like(result.transpose([order.index(axis) for axis in range(x.ndim)]), x)


def _dimensions(given: Any, tree: Any) -> Any:
    """Return the `Dimensions` of each leaf, None for leaves that are not matrices."""
    if given is None:
        return jax.tree.map(lambda x: Dimensions() if x.ndim == 2 else None, tree)
    is_entry = lambda node: node is None or isinstance(node, Dimensions)
    prefix = given(tree) if callable(given) else given
    broadcast = lambda entry, subtree: jax.tree.map(lambda _: entry, subtree)
    return jax.tree.map(broadcast, prefix, tree, is_leaf=is_entry)


def _each_matrix(f: Callable[[Any, Any], Any], updates: Any, given: Any) -> Any:
    leaves, structure, (column,) = aligned(updates, _dimensions(given, updates))
    pairs = zip(leaves, column, strict=True)
    return structure.unflatten([None if x is None else f(x, d) for x, d in pairs])


@as_pytree
def scale_by_muon(
    ns_coeffs: Numbers = _JORDAN,
    ns_steps: Structure = 5,
    beta: Decay = 0.95,
    eps: NonNegative = 1e-8,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    weight_dimension_numbers: Any = None,
) -> GradientTransformation:
    """u = the bias-corrected average gradient, orthogonalized by Newton-Schulz steps: see `muon`.

    State: `optax.contrib.MuonState(count, mu, ns_coeffs)`, one tree, a scalar and the coefficients.
    Raises: ValueError in `update` for a leaf that is not a matrix.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """
    coefficients = _coefficients(ns_coeffs, ns_steps)
    rows = (ns_steps, 3) if coefficients.ndim == 1 else coefficients.shape
    triples = jnp.broadcast_to(coefficients, rows)
    normalized = functools.partial(_normalized, how=preconditioning, eps=eps)

    def orthogonal(m: Any) -> Any:
        o = orthogonalized(m, triples, normalized)
        return jnp.sum(jnp.conj(m) * o) * o if adaptive else o

    def update(updates: Any, _: Any) -> Any:
        each = functools.partial(_as_matrices, orthogonal)
        return _each_matrix(each, updates, weight_dimension_numbers)

    average = nesterov_ema if nesterov else ema
    momentum = average(beta, accumulator_dtype=mu_dtype, name="mu")
    tx = chain(momentum, _store(coefficients), stateless(update))
    return named(tx, record=optax.contrib.MuonState)


@as_pytree
def muon(
    learning_rate: Number,
    ns_coeffs: Numbers = _JORDAN,
    ns_steps: Structure = 5,
    beta: Decay = 0.95,
    eps: NonNegative = 1e-8,
    weight_decay: Number = 0.0,
    weight_decay_mask: Mask | None = None,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    adam_b1: Decay = 0.9,
    adam_b2: Decay = 0.999,
    adam_eps_root: NonNegative = 0.0,
    adam_weight_decay: Number = 0.0,
    adam_learning_rate: Number | None = None,
    muon_weight_dimension_numbers: Any = None,
    consistent_rms: NonNegative | None = None,
) -> GradientTransformation:
    """Muon: orthogonalized momentum for weight matrices, AdamW for all other parameters.

        m <- beta m + (1 - beta) g            O = the orthogonal matrix nearest to m^
        u = -learning_rate (sqrt(max(1, columns / rows)) O + weight_decay p)

    Args:
      learning_rate: the step size of both parts; positive to descend. May be a schedule.
      ns_coeffs: three coefficients for all Newton-Schulz steps, or up to ns_steps rows of three, or
        "standard" or "dion". The default brings singular values near 1, not exactly to 1.
      ns_steps: number of Newton-Schulz steps; 5 by default.
      beta: decay of the average, in [0, 1); 0.95 by default.
      eps: at least 0, added to the norm that divides m^; also the eps of AdamW; 1e-8 by default.
      weight_decay, adam_weight_decay: decoupled weight decay of matrices and of other parameters; 0
        by default.
      weight_decay_mask: selects the matrices that decay, as in `adamw`.
      mu_dtype: dtype of the averages. None (default): float32 for 16-bit parameters, otherwise
        their dtype.
      nesterov: True (default) looks ahead as in `nadam`, in both parts.
      adaptive: True multiplies O by the inner product of O and m^.
      preconditioning: the scale that brings singular values into (0, 1] before the first step: the
        "frobenius" (default) or "spectral" norm, the row sums of |m m^T| ("aol"), or the norm of
        m m^T ("schatten").
      adam_b1, adam_b2, adam_eps_root: arguments of `adamw` for other parameters.
      adam_learning_rate: the step size for other parameters; None (default): learning_rate.
      muon_weight_dimension_numbers: a tree like the parameters (or a prefix, or a function to one)
        with `optax.contrib.MuonDimensionNumbers` for leaves that hold matrices and None for others.
        None (default): leaves with two axes are matrices, rows first.
      consistent_rms: at least 0; if given, O is multiplied by consistent_rms sqrt(max(rows,
        columns)) instead.

    State: `optax.contrib.MuonState(count, mu, ns_coeffs)`, one tree for matrices, and the state of
      `adamw`, two trees, for other parameters, each in an `optax.MaskedState`. All are sharded like
      the parameters. On explicit mesh axes each update gathers the averages of the matrices, one
      leaf at a time, and every device orthogonalizes all of them.
    Differs from: Keras and PyTorch, whose momentum has no bias correction.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025,
      arXiv:2502.16982 for consistent_rms.
    """

    def factor(x: Any, dimensions: Any) -> Any:
        _, rows, columns = (
            math.prod(x.shape[axis] for axis in group) for group in _axes(x.ndim, dimensions)
        )
        if consistent_rms is None:
            return x * math.sqrt(max(1, columns / max(rows, 1)))
        return x * consistent_rms * math.sqrt(max(rows, columns))

    def labels(params: Any) -> Any:
        leaves, structure, (dimensions,) = aligned(params, _dimensions(given, params))
        return structure.unflatten(
            [
                None if x is None else ("adam" if d is None else "muon")
                for x, d in zip(leaves, dimensions, strict=True)
            ]
        )

    given = muon_weight_dimension_numbers
    matrices = chain(
        scale_by_muon(
            ns_coeffs,
            ns_steps,
            beta,
            eps,
            mu_dtype,
            nesterov=nesterov,
            adaptive=adaptive,
            preconditioning=preconditioning,
            weight_dimension_numbers=given,
        ),
        stateless(lambda updates, _: _each_matrix(factor, updates, given)),
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_learning_rate(learning_rate),
    )
    rest = adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        adam_b1,
        adam_b2,
        eps,
        adam_eps_root,
        mu_dtype,
        adam_weight_decay,
        nesterov=nesterov,
    )
    return partition({"muon": matrices, "adam": rest}, labels)
