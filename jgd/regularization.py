"""Regularisation as pure functions: penalties, dropout and batch norm, every number a lane.

A penalty is a term of the loss, or the same thing as a link of the optimizer:

    params = {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([5.0])}
    l2(params, 0.01, only="*/kernel")                       # 0.25 = 0.01 (9 + 16): no one half
    chain(add_l2(0.01, only="*/kernel"), adam(1e-3))        # g + 2 0.01 p, the gradient of that

Strengths, rates and momenta may be traced, so that they live in the setting and are swept:

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
from jgd.arithmetic import abs_square, average, complement, increment, quotient, safe_sqrt
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
    """A number as a scalar, refused if it is concrete and outside the range of its annotation."""
    (kind,) = hint.__metadata__
    if not is_number(value):
        raise TypeError(f"{function}: {name} must be a number {kind.description}, got {value!r}")
    number = scalar(f"{function}: {name}", value)
    # as a float: inside jit a comparison of concrete arrays is traced
    if not isinstance(value, jax.core.Tracer) and not kind.check(float(value)):
        raise ValueError(f"{function}: {name} must be {kind.description}, got {float(value)!r}")
    return number


def _choice(function: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse what is none of the choices; a traced bool is none."""
    if not isinstance(value, str | bool | np.bool_) or value not in choices:
        raise ValueError(f"{function}: {name} must be one of {choices}, got {value!r}")


def _wide(x: Any) -> jax.Array:
    """At least float32: what sums over an array need."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _absolute(x: jax.Array) -> jax.Array:
    """|x|, with derivative sign(x): that of jnp.abs is 1 at 0."""
    return (x * jnp.conj(jnp.sign(x))).real


# --- penalties -------------------------------------------------------------------------------


def _chosen(function: str, params: Any, only: Pattern) -> list[jax.Array]:
    """The leaves whose path matches one of the patterns, at least float32."""
    patterns = (only,) if isinstance(only, str) else only
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{function}: only must be a pattern or several, got {only!r}")
    try:  # one by one: a leaf may match several
        found = [matching(params, pattern) for pattern in patterns]
    except TreeError as error:
        raise TreeError(error.detail, function) from None
    leaves = jax.tree.leaves(params, is_leaf=lambda x: x is None)
    chosen = map(any, zip(*found, strict=True))
    return [_wide(x) for x, yes in zip(leaves, chosen, strict=True) if yes and x is not None]


def _total(strength: jax.Array, terms: Sequence[jax.Array]) -> jax.Array:
    total = sum(terms, start=jnp.zeros([], jnp.float32))
    return strength.astype(total.dtype) * total


def l1(params: Any, strength: Any = 0.01, *, only: Pattern = "*") -> jax.Array:
    """strength sum |x|, over all entries of the parameters that match.

    Its gradient is strength sign(x), 0 at 0.

    Args:
      params: a pytree of arrays.
      strength: at least 0, 0.01 by default. May be traced.
      only: a glob over paths such as "*/kernel", or several: which leaves count, "*" (all) by
        default. The language is that of `param_groups`.

    Returns: a scalar in the precision of the parameters, at least float32.
    Raises: ValueError for a pattern that matches no parameter, or a strength below 0.
    Source: Tibshirani 1996; `keras.regularizers.L1`.
    """
    strength = _number("l1", "strength", strength)
    return _total(strength, [jnp.sum(_absolute(x)) for x in _chosen("l1", params, only)])


def l2(params: Any, strength: Any = 0.01, *, only: Pattern = "*") -> jax.Array:
    """strength sum x^2, over all entries of the parameters that match. There is no one half.

    Its gradient is 2 strength x: the factor of two stays. So the `weight_decay` d of torch's
    optimizers, or `add_decayed_weights(d)` before the optimizer, is a strength of d / 2.

    Args, returns, raises: as `l1`.
    Differs from: decoupled weight decay (`adamw`, and `weight_decay` in Keras), which never enters
      the gradient.
    Source: Hoerl & Kennard 1970; `keras.regularizers.L2`.
    """
    strength = _number("l2", "strength", strength)
    return _total(strength, [jnp.sum(abs_square(x)) for x in _chosen("l2", params, only)])


def l1_l2(params: Any, l1: Any = 0.0, l2: Any = 0.0, *, only: Pattern = "*") -> jax.Array:
    """l1 sum |x| + l2 sum x^2: the elastic net, with gradient l1 sign(x) + 2 l2 x.

    Args:
      params, only: as in `l1`.
      l1, l2: at least 0; both 0 by default. May be traced.

    Returns, raises: as `l1`.
    Source: Zou & Hastie 2005, without their one half; `keras.regularizers.L1L2`.
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
    """factor times the mean |cosine| over the pairs of rows, summed over the matrices that match.

        factor sum_(i<j) |x_i . x_j| / (|x_i| |x_j|) / (n (n - 1) / 2)

    A row of zeros is at right angles to all others; one row alone has no pairs, and no penalty.

    Args:
      params, only: as in `l1`; leaves that are no matrices do not count.
      factor: at least 0, 0.01 by default. May be traced.
      mode: "rows" (default) or "columns".

    Returns, raises: as `l1`; ValueError too if no matrix matches.
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
    """The mean |cosine| over the pairs of rows, with derivative 0 in a row of zeros."""
    n = len(rows)
    unit = quotient(rows, safe_sqrt(jnp.sum(abs_square(rows), 1, keepdims=True)))
    cosines = jnp.matmul(unit, unit.conj().T, precision="highest")
    # every pair is there twice, and n (n - 1) is twice their number
    others = 1 - jnp.eye(n, dtype=rows.real.dtype)
    return jnp.sum(_absolute(cosines) * others) / max(n * (n - 1), 1)


def _add_gradient(penalty: Callable[[Any], jax.Array]) -> GradientTransformation:
    slope = jax.grad(penalty)
    return stateless(lambda updates, params: leafwise(jnp.add, updates, slope(with_params(params))))


@as_pytree
def add_l1(strength: NonNegative = 0.01, *, only: Pattern = "*") -> GradientTransformation:
    """u = g + strength sign(p): the gradient of a loss with `l1`.

    Args:
      strength: at least 0, 0.01 by default. May be a schedule.
      only: a glob over paths such as "*/kernel", or several; "*" (all) by default.

    State: `EmptyState`, with a step counter around it for a schedule.
    Raises: ValueError in `update` without parameters, or for a pattern that matches none of them.
    """
    return _add_gradient(lambda params: l1(params, strength, only=only))


@as_pytree
def add_l2(strength: NonNegative = 0.01, *, only: Pattern = "*") -> GradientTransformation:
    """u = g + 2 strength p: the gradient of a loss with `l2`.

    Args, state, raises: as `add_l1`.
    Differs from: `add_decayed_weights(d)`, u = g + d p, which has no factor of two: d is twice the
      strength. After the optimizer in a chain it is decoupled weight decay, no gradient of a loss.
    """
    return _add_gradient(lambda params: l2(params, strength, only=only))


@as_pytree
def add_l1_l2(
    l1: NonNegative = 0.0, l2: NonNegative = 0.0, *, only: Pattern = "*"
) -> GradientTransformation:
    """u = g + l1 sign(p) + 2 l2 p: the gradient of a loss with `l1_l2`.

    Args:
      l1, l2: at least 0, both 0 by default. May be schedules.
      only: as in `add_l1`.

    State, raises: as `add_l1`.
    """
    return _add_gradient(lambda params: l1_l2(params, l1, l2, only=only))


@as_pytree
def add_orthogonal(
    factor: NonNegative = 0.01,
    *,
    mode: Literal["rows", "columns"] = "rows",
    only: Pattern = "*",
) -> GradientTransformation:
    """u = g + the gradient of `orthogonal`, which turns rows away from each other.

    It leaves their lengths alone. Args: as `orthogonal`; factor may be a schedule.

    State, raises: as `add_l1`; ValueError too if no matrix matches.
    """
    return _add_gradient(lambda params: orthogonal(params, factor, mode=mode, only=only))


# --- dropout ---------------------------------------------------------------------------------


def dropout(key: jax.Array, x: Any, rate: Any, *, training: bool) -> jax.Array:
    """Each entry is 0 with probability rate, else x / (1 - rate): the mean stays x.

    In inference, x. A rate of 0 gives x exactly, 1 gives zeros.

    Args:
      key: of the mask; one key gives one mask, and masks of higher rates are within it.
      x: an array of any shape.
      rate: in [0, 1]. May be traced and swept. The derivative in it, finite everywhere, is that of
        the scale alone: the mask has none.
      training: True or False. Where it is traced, `rate * training` with True is the same.

    Returns: an array like x; integers become floats.
    Raises: ValueError for a concrete rate outside [0, 1].
    Differs from: flax's, whose rate cannot be traced.
    Source: Srivastava et al. 2014, JMLR 15, inverted, as in Keras and PyTorch.
    """
    rate = _number("dropout", "rate", rate, Fraction)
    _choice("dropout", "training", training, (True, False))
    x = jnp.asarray(x)
    wide = _wide(x)
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else wide.dtype
    if not training:
        return x.astype(dtype)
    kept = 1 - rate.astype(wide.real.dtype)
    mask = jax.random.bernoulli(key, kept, x.shape)
    return quotient(jnp.where(mask, wide, 0), kept).astype(dtype)


# --- batch norm ------------------------------------------------------------------------------


class BatchNormState(NamedTuple):
    """Running statistics of `batch_norm`."""

    mean: jax.Array  # of the shape of the channels, at least float32
    variance: jax.Array  # the same
    count: jax.Array  # int32 scalar: batches so far


class BatchNorm(NamedTuple):
    """What `batch_norm` gives: two pure functions."""

    init: Callable[[Any], tuple[dict[str, jax.Array], BatchNormState]]
    """An input or its shape -> (params, state)."""
    apply: Callable[..., tuple[jax.Array, BatchNormState]]
    """(params, state, x, *, training) -> (y, the new state)."""


def batch_norm(
    axis: int | Sequence[int] = -1,
    momentum: Any = 0.99,
    eps: Any = 1e-3,
    *,
    convention: Literal["keras", "torch"] = "keras",
    center: bool = True,
    scale: bool = True,
) -> BatchNorm:
    """Batch normalisation: each channel with mean 0 and variance 1 over the batch.

        y = gamma (x - m) / sqrt(v + eps) + beta

    In training m and v are the mean and the mean squared deviation of the batch, and the running
    statistics move; in inference they are the running ones, which stay.

        "keras":  running <- momentum running + (1 - momentum) batch
        "torch":  running <- (1 - momentum) running + momentum batch,  with v n / (n - 1) for v

    `torch.nn.BatchNorm1d(c)` is `batch_norm(1, 0.1, 1e-5, convention="torch")`; the defaults are
    those of `keras.layers.BatchNormalization()`.

    Args:
      axis: the axis of the channels, or several: what has statistics of its own. The last by
        default, 1 in PyTorch; () takes the statistics of the whole array.
      momentum: in [0, 1], 0.99 by default: what the old statistics keep ("keras") or the new ones
        get ("torch"). None: the plain mean over all batches so far. May be traced.
      eps: at least 0, 1e-3 by default. May be traced; with 0 a constant channel gives 0.
      convention: "keras" (default) or "torch", of the running statistics alone.
      center: False leaves out beta. scale: False leaves out gamma.

    Returns: `BatchNorm(init, apply)`.
      init(x): params {"scale": gamma = 1, "bias": beta = 0} and state, for an input or its shape,
        of which only the channels count. Neither depends on a number.
      apply(params, state, x, training=...): y in the dtype of x, and the new state. Sums are at
        least float32.
    Raises: ValueError for numbers out of range, axes that x does not have, other channels than the
      state's, and in training for n = 1 value in a channel under "torch".
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
        """The shape of the channels, and the other axes."""
        n = len(shape)
        own = {a % n for a in axes if -n <= a < n}
        if len(own) != len(axes):
            raise ValueError(
                f"batch_norm: axis must be different axes of x, got {axis} for shape {tuple(shape)}"
            )
        return tuple(shape[a] for a in sorted(own)), tuple(a for a in range(n) if a not in own)

    def init(x: Any) -> tuple[dict[str, jax.Array], BatchNormState]:
        channels, _ = split(getattr(x, "shape", x))
        dtype = _wide(jnp.zeros([], getattr(x, "dtype", float))).dtype
        params = {name: start(channels, dtype) for name, start in starts.items()}
        mean, variance = jnp.zeros(channels, dtype), jnp.ones(channels, dtype)
        return params, BatchNormState(mean, variance, jnp.zeros([], jnp.int32))

    def moved(state: BatchNormState, mean: Any, variance: Any, n: int) -> BatchNormState:
        count = increment(state.count)
        if weight is None:
            new = 1 / count.astype(variance.dtype)
        else:
            new = weight if convention == "torch" else complement(weight)
        if convention == "torch":
            if n < 2:
                raise ValueError(
                    "batch_norm: the unbiased variance of convention 'torch' needs 2 values or more"
                    f" in each channel, got {n}"
                )
            variance = variance * (n / (n - 1))
        towards = lambda was, now: average(now, was, new).astype(was.dtype)
        return BatchNormState(towards(state.mean, mean), towards(state.variance, variance), count)

    def apply(
        params: dict[str, jax.Array], state: BatchNormState, x: Any, *, training: bool
    ) -> tuple[jax.Array, BatchNormState]:
        _choice("batch_norm", "training", training, (True, False))
        x = jnp.asarray(x)
        channels, others = split(x.shape)
        shapes = {name: jnp.shape(p) for name, p in params.items()}
        if shapes != dict.fromkeys(starts, channels) or state.mean.shape != channels:
            raise ValueError(
                f"batch_norm: x of shape {x.shape} has channels {channels} and needs params"
                f" {list(starts)}, got params {shapes} and a state of {state.mean.shape}"
            )
        spread = lambda statistic: jnp.expand_dims(statistic, others)
        wide = _wide(x)
        mean = wide.mean(others) if training else state.mean
        centred = wide - spread(mean)
        if training:  # the mean of the rounding errors of a large mean
            rest = centred.mean(others)
            mean, centred = mean + rest, centred - spread(rest)
        variance = abs_square(centred).mean(others) if training else state.variance
        y = centred * spread(quotient(jnp.ones_like(variance), safe_sqrt(variance + eps)))
        if scale:
            y = y * spread(params["scale"])
        if center:
            y = y + spread(params["bias"])
        if training:
            state = moved(state, mean, variance, math.prod(x.shape[a] for a in others))
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else wide.dtype
        return y.astype(dtype), state

    return BatchNorm(init, apply)
