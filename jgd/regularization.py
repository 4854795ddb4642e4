"""Regularization as pure functions: penalties, dropout and batch norm.

A penalty is a term of the loss or, with the same effect, a link of the optimizer:

    params = {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([5.0])}
    l2(params, 0.01, only="*/kernel")                       # 0.25 = 0.01 (9 + 16)
    chain(add_l2(0.01, only="*/kernel"), adam(1e-3))        # adds the gradient, 0.02 p

Strengths, rates and momenta may be traced, so that a setting can contain them and a sweep can vary
them:

    def init(key):
        norm, state = batch_norm().init((2,))
        return {"norm": norm, "kernel": jnp.ones(2)}, state

    def loss(params, state, batch, key, setting):
        x, y = batch
        norm = batch_norm(momentum=setting["momentum"])
        x, state = norm.apply(params["norm"], state, x, training=True)
        x = dropout(key, x, setting["rate"], training=True)
        fit = jnp.mean((x @ params["kernel"] - y) ** 2)
        return fit + l2(params, setting["l2"], only="*/kernel"), ({}, state)

    def setting(rate=0.2, l2=1e-3, momentum=0.99):
        return {"tx": adam(1e-2), "rate": rate, "l2": l2, "momentum": momentum}

    task = Task(init, loss, batch, evaluate)
    sweep(task, grid(setting, rate=[0.0, 0.2, 0.5], l2=[0.0, 1e-3]), 100)   # 6 lanes, one program
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from optax import GradientTransformation

from jgd.arguments import Fraction, NonNegative, scalar
from jgd.arithmetic import (
    abs_square,
    average,
    complement,
    increment,
    quotient,
    safe_sqrt,
    weights_from,
)
from jgd.combinators import stateless
from jgd.groups import matching
from jgd.nodes import is_number
from jgd.pytree import as_pytree
from jgd.trees import TreeError, leafwise, with_params

__all__ = [
    "BatchNorm",
    "BatchNormState",
    "add_l1",
    "add_l1_l2",
    "add_l2",
    "add_orthogonal",
    "batch_norm",
    "dropout",
    "l1",
    "l1_l2",
    "l2",
    "orthogonal",
]

Pattern = str | Sequence[str]


# --- arguments -------------------------------------------------------------------------------


def _number(function: str, name: str, value: Any, hint: Any = NonNegative) -> jax.Array:
    """Return a number as a scalar. Raises if it is concrete and out of the range of `hint`."""
    (kind,) = hint.__metadata__
    if not is_number(value):
        raise TypeError(f"{function}: {name} must be a number {kind.description}, got {value!r}")
    number = scalar(f"{function}: {name}", value)
    # Compare as a float: inside jit a comparison of concrete arrays is traced.
    if not isinstance(value, jax.core.Tracer) and not kind.check(float(value)):
        raise ValueError(f"{function}: {name} must be {kind.description}, got {float(value)!r}")
    return number


def _choice(function: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError unless `value` is one of the choices; a traced bool is not."""
    if not isinstance(value, str | bool | np.bool_) or value not in choices:
        raise ValueError(f"{function}: {name} must be one of {choices}, got {value!r}")


def _widen(x: Any) -> jax.Array:
    """Return x in at least float32, for sums over an array."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _absolute(x: jax.Array) -> jax.Array:
    """Return |x|, with derivative sign(x); the derivative of jnp.abs is 1 at 0."""
    return (x * jnp.conj(jnp.sign(x))).real


# --- penalties -------------------------------------------------------------------------------


def _chosen(function: str, params: Any, only: Pattern) -> list[jax.Array]:
    """Return the leaves whose path matches one of the patterns, in at least float32."""
    patterns = (only,) if isinstance(only, str) else only
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{function}: only must be a pattern or several patterns, got {only!r}")
    try:  # one pattern at a time: a leaf may match several
        matches = [matching(params, pattern) for pattern in patterns]
    except TreeError as error:
        raise TreeError(error.detail, function) from None
    leaves = jax.tree.leaves(params, is_leaf=lambda x: x is None)
    chosen = map(any, zip(*matches, strict=True))
    return [_widen(x) for x, yes in zip(leaves, chosen, strict=True) if yes and x is not None]


def _total(strength: jax.Array, terms: Sequence[jax.Array]) -> jax.Array:
    total = sum(terms, start=jnp.zeros([], jnp.float32))
    return strength.astype(total.dtype) * total


def l1(params: Any, strength: Any = 0.01, *, only: Pattern = "*") -> jax.Array:
    """Return strength sum |x|, over all entries of the parameters that match `only`.

    Its gradient is strength sign(x), 0 at 0.

    Args:
      params: a pytree of arrays.
      strength: at least 0, 0.01 by default. May be traced.
      only: a glob over paths such as "*/kernel", or several globs, which select leaves as in
        `param_groups`; "*" (all) by default.

    Returns: a scalar in the precision of the parameters, at least float32.
    Raises: ValueError for a pattern that matches no parameter, or a strength below 0.
    Source: Tibshirani 1996; `keras.regularizers.L1`.
    """
    strength = _number("l1", "strength", strength)
    return _total(strength, [jnp.sum(_absolute(x)) for x in _chosen("l1", params, only)])


def l2(params: Any, strength: Any = 0.01, *, only: Pattern = "*") -> jax.Array:
    """Return strength sum x^2, without a factor 1/2, over the parameters that match `only`.

    Its gradient is 2 strength x. So `weight_decay=d` in PyTorch's optimizers, or
    `add_decayed_weights(d)` before the optimizer, is a strength of d / 2.

    Args, returns, raises: as in `l1`.
    Differs from: decoupled weight decay (`adamw`, and `weight_decay` in Keras), which never enters
      the gradient.
    Source: Hoerl & Kennard 1970; `keras.regularizers.L2`.
    """
    strength = _number("l2", "strength", strength)
    return _total(strength, [jnp.sum(abs_square(x)) for x in _chosen("l2", params, only)])


def l1_l2(params: Any, l1: Any = 0.0, l2: Any = 0.0, *, only: Pattern = "*") -> jax.Array:
    """Return the elastic net l1 sum |x| + l2 sum x^2, with gradient l1 sign(x) + 2 l2 x.

    Args:
      params, only: as in `l1`.
      l1, l2: at least 0; both 0 by default. May be traced.

    Returns, raises: as in `l1`.
    Source: Zou & Hastie 2005, without the factor 1/2; `keras.regularizers.L1L2`.
    """
    one, two = _number("l1_l2", "l1", l1), _number("l1_l2", "l2", l2)
    leaves = _chosen("l1_l2", params, only)
    absolute, squared = (
        [jnp.sum(measure(x)) for x in leaves] for measure in (_absolute, abs_square)
    )
    return _total(one, absolute) + _total(two, squared)


def orthogonal(
    params: Any,
    factor: Any = 0.01,
    *,
    mode: Literal["rows", "columns"] = "rows",
    only: Pattern = "*",
) -> jax.Array:
    """Return factor times the mean |cosine| over all pairs of rows, summed over the matrices.

        factor sum_(i<j) |x_i . x_j| / (|x_i| |x_j|) / (n (n - 1) / 2)

    The cosine with a row of zeros is 0. A matrix with one row has no pairs and no penalty.

    Args:
      params, only: as in `l1`; leaves that are not matrices are ignored.
      factor: at least 0, 0.01 by default. May be traced.
      mode: "rows" (default), or "columns" for the cosines of columns.

    Returns, raises: as in `l1`; also ValueError if no matrix matches.
    Source: `keras.regularizers.OrthogonalRegularizer`.
    """
    factor = _number("orthogonal", "factor", factor)
    _choice("orthogonal", "mode", mode, ("rows", "columns"))
    leaves = _chosen("orthogonal", params, only)
    matrices = [x if mode == "rows" else x.T for x in leaves if x.ndim == 2]
    if leaves and not matrices:
        raise TreeError(f"no parameter that matches {only!r} is a matrix", "orthogonal")
    return _total(factor, [_mean_cosine(x) for x in matrices])


def _mean_cosine(rows: jax.Array) -> jax.Array:
    """Return the mean |cosine| over all pairs of rows, with derivative 0 in a row of zeros."""
    n = len(rows)
    unit = quotient(rows, safe_sqrt(jnp.sum(abs_square(rows), 1, keepdims=True)))
    cosines = jnp.matmul(unit, unit.conj().T, precision="highest")
    # The sum contains every pair twice, and n (n - 1) is twice the number of pairs.
    off_diagonal = 1 - jnp.eye(n, dtype=rows.real.dtype)
    return jnp.sum(_absolute(cosines) * off_diagonal) / max(n * (n - 1), 1)


def _add_gradient(penalty: Callable[[Any], jax.Array]) -> GradientTransformation:
    grad = jax.grad(penalty)
    return stateless(lambda updates, params: leafwise(jnp.add, updates, grad(with_params(params))))


@as_pytree
def add_l1(strength: NonNegative = 0.01, *, only: Pattern = "*") -> GradientTransformation:
    """u = g + strength sign(p): adds the gradient of `l1`.

    Args:
      strength: at least 0, 0.01 by default. May be a schedule.
      only: a glob over paths such as "*/kernel", or several globs; "*" (all) by default.

    State: `EmptyState`, with a step counter around it for a schedule.
    Raises: ValueError in `update` if no parameters are given or a pattern matches none of them.
    """
    return _add_gradient(lambda params: l1(params, strength, only=only))


@as_pytree
def add_l2(strength: NonNegative = 0.01, *, only: Pattern = "*") -> GradientTransformation:
    """u = g + 2 strength p: adds the gradient of `l2`.

    Args, state, raises: as in `add_l1`.
    Differs from: `add_decayed_weights(d)`, u = g + d p, which has no factor 2, so that d is twice
      the strength. After the optimizer in a chain, this is decoupled weight decay instead.
    """
    return _add_gradient(lambda params: l2(params, strength, only=only))


@as_pytree
def add_l1_l2(
    l1: NonNegative = 0.0, l2: NonNegative = 0.0, *, only: Pattern = "*"
) -> GradientTransformation:
    """u = g + l1 sign(p) + 2 l2 p: adds the gradient of `l1_l2`.

    Args:
      l1, l2: at least 0, both 0 by default. May be schedules.
      only: as in `add_l1`.

    State, raises: as in `add_l1`.
    """
    return _add_gradient(lambda params: l1_l2(params, l1, l2, only=only))


@as_pytree
def add_orthogonal(
    factor: NonNegative = 0.01,
    *,
    mode: Literal["rows", "columns"] = "rows",
    only: Pattern = "*",
) -> GradientTransformation:
    """u = g + the gradient of `orthogonal`, which rotates rows towards orthogonal directions.

    To first order, the gradient does not change the lengths of the rows.

    Args: as in `orthogonal`; `factor` may be a schedule.
    State, raises: as in `add_l1`; also ValueError if no matrix matches.
    """
    return _add_gradient(lambda params: orthogonal(params, factor, mode=mode, only=only))


# --- dropout ---------------------------------------------------------------------------------


def dropout(key: jax.Array, x: Any, rate: Any, *, training: bool) -> jax.Array:
    """Set each entry to 0 with probability rate, and to x / (1 - rate) otherwise.

    The expected value is x. Without `training`, return x. A rate of 0 gives x exactly.

    Args:
      key: random key of the mask. For one key, a higher rate drops the same entries and more.
      x: an array of any shape.
      rate: in [0, 1]. May be traced and swept. The derivative with respect to the rate is that of
        the scale only, and finite everywhere.
      training: True or False. If it is traced, pass `rate * training` as the rate, and True.

    Returns: an array like x; integers become floats.
    Raises: ValueError for a concrete rate outside [0, 1].
    Differs from: `flax.linen.Dropout`, whose rate cannot be traced.
    Source: Srivastava et al. 2014, JMLR 15; inverted dropout, as in Keras and PyTorch.
    """
    rate = _number("dropout", "rate", rate, Fraction)
    _choice("dropout", "training", training, (True, False))
    x = jnp.asarray(x)
    wide = _widen(x)
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else wide.dtype
    if not training:
        return x.astype(dtype)
    keep_rate = 1 - rate.astype(wide.real.dtype)
    mask = jax.random.bernoulli(key, keep_rate, x.shape)
    return quotient(jnp.where(mask, wide, 0), keep_rate).astype(dtype)


# --- batch norm ------------------------------------------------------------------------------


class BatchNormState(NamedTuple):
    """Running statistics of `batch_norm`."""

    mean: jax.Array  # one value per channel, at least float32
    variance: jax.Array  # one value per channel, at least float32
    count: jax.Array  # int32 scalar: number of training batches so far


class BatchNorm(NamedTuple):
    """A batch norm layer as two pure functions."""

    init: Callable[[Any], tuple[dict[str, jax.Array], BatchNormState]]
    """Input, or its shape -> (params, state)."""
    apply: Callable[..., tuple[jax.Array, BatchNormState]]
    """(params, state, x, *, training) -> (y, new state)."""


def batch_norm(
    axis: int | Sequence[int] = -1,
    momentum: Any = 0.99,
    eps: Any = 1e-3,
    *,
    convention: Literal["keras", "torch"] = "keras",
    center: bool = True,
    scale: bool = True,
) -> BatchNorm:
    """Batch normalization: gives each channel mean 0 and variance 1 over the batch.

        y = gamma (x - m) / sqrt(v + eps) + beta

    In training, m and v are the mean and the mean squared deviation of the batch, and the running
    statistics are updated. In inference, m and v are the running statistics.

        "keras":  running <- momentum running + (1 - momentum) batch
        "torch":  running <- (1 - momentum) running + momentum batch,  with v n / (n - 1) for v

    `torch.nn.BatchNorm1d(c)` is `batch_norm(1, 0.1, 1e-5, convention="torch")`; the defaults are
    those of `keras.layers.BatchNormalization()`.

    Args:
      axis: the channel axis, or several axes; every other axis is averaged over. The last axis by
        default, 1 in PyTorch; () averages over the whole array.
      momentum: in [0, 1], 0.99 by default: the weight of the old statistics ("keras") or of the new
        ones ("torch"). None: the plain mean over all batches so far. May be traced.
      eps: at least 0, 1e-3 by default. May be traced; with 0, a constant channel gives 0.
      convention: "keras" (default) or "torch"; affects the running statistics only.
      center: False leaves out beta.
      scale: False leaves out gamma.

    Returns: `BatchNorm(init, apply)`.
      init(x): params {"scale": gamma = 1, "bias": beta = 0} and state, for an input or its shape.
        Only the sizes of the channel axes matter.
      apply(params, state, x, training=...): y in the dtype of x, and the new state. Sums are at
        least float32.
    Raises: ValueError for numbers out of range, axes that x does not have, channels that do not
      match the state, and in training under "torch" for n = 1 value per channel.
    Source: Ioffe & Szegedy 2015, algorithm 1, arXiv:1502.03167.
    """
    weight = None if momentum is None else _number("batch_norm", "momentum", momentum, Fraction)
    eps = _number("batch_norm", "eps", eps)
    _choice("batch_norm", "convention", convention, ("keras", "torch"))
    _choice("batch_norm", "center", center, (True, False))
    _choice("batch_norm", "scale", scale, (True, False))
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    starts = {**({"scale": jnp.ones} if scale else {}), **({"bias": jnp.zeros} if center else {})}

    def split(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the sizes of the channel axes, and the other axes."""
        n = len(shape)
        own = {a % n for a in axes if -n <= a < n}
        if len(own) != len(axes):
            raise ValueError(
                f"batch_norm: axis must be distinct axes of x, got {axis} for shape {tuple(shape)}"
            )
        return tuple(shape[a] for a in sorted(own)), tuple(a for a in range(n) if a not in own)

    def init(x: Any) -> tuple[dict[str, jax.Array], BatchNormState]:
        channels, _ = split(getattr(x, "shape", x))
        dtype = _widen(jnp.zeros([], getattr(x, "dtype", float))).dtype
        params = {name: start(channels, dtype) for name, start in starts.items()}
        mean, variance = jnp.zeros(channels, dtype), jnp.ones(channels, dtype)
        return params, BatchNormState(mean, variance, jnp.zeros([], jnp.int32))

    def updated(state: BatchNormState, mean: Any, variance: Any, n: int) -> BatchNormState:
        count = increment(state.count)
        if weight is None:
            new_weight = 1 / count.astype(variance.dtype)
        else:
            new_weight = weight if convention == "torch" else complement(weight)
        if convention == "torch":
            if n < 2:
                raise ValueError(
                    "batch_norm: x must have at least 2 values per channel for convention='torch',"
                    f" got {n}"
                )
            variance = variance * (n / (n - 1))
        by = weights_from(new_weight)
        moved = lambda old, batch: average(batch, old, by).astype(old.dtype)
        return BatchNormState(moved(state.mean, mean), moved(state.variance, variance), count)

    def apply(
        params: dict[str, jax.Array], state: BatchNormState, x: Any, *, training: bool
    ) -> tuple[jax.Array, BatchNormState]:
        _choice("batch_norm", "training", training, (True, False))
        x = jnp.asarray(x)
        channels, others = split(x.shape)
        shapes = {name: jnp.shape(p) for name, p in params.items()}
        if shapes != dict.fromkeys(starts, channels) or state.mean.shape != channels:
            raise ValueError(
                f"batch_norm: params {list(starts)} and state must have the shape {channels} of the"
                f" channels of x, got params {shapes} and a state of shape {state.mean.shape}"
            )
        expand = lambda statistic: jnp.expand_dims(statistic, others)
        wide = _widen(x)
        mean = wide.mean(others) if training else state.mean
        centered = wide - expand(mean)
        if training:  # subtract the mean again: a large mean has a rounding error
            error = centered.mean(others)
            mean, centered = mean + error, centered - expand(error)
        variance = abs_square(centered).mean(others) if training else state.variance
        y = centered * expand(quotient(jnp.ones_like(variance), safe_sqrt(variance + eps)))
        if scale:
            y = y * expand(params["scale"])
        if center:
            y = y + expand(params["bias"])
        if training:
            state = updated(state, mean, variance, math.prod(x.shape[a] for a in others))
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else wide.dtype
        return y.astype(dtype), state

    return BatchNorm(init, apply)
