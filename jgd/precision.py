"""Wrappers for 16-bit parameters: for steps smaller than rounding and gradients out of range.

    jgd.compensated(jgd.adamw(1e-3))                      # stores rounding errors, a 16-bit tree
    jgd.master_weights(jgd.adamw(1e-3))                   # stores a float32 copy of the parameters
    jgd.stochastic_rounding(jgd.adamw(1e-3), key)         # rounds up or down at random, no tree
    jgd.loss_scaled(jgd.master_weights(jgd.adamw(1e-3)))  # keeps float16 gradients in range
    jgd.skip_nonfinite(jgd.adamw(1e-3))                   # skips steps with NaN or infinity

bfloat16 has 8 significant bits: 1 - 1e-3 rounds to 1, so that a thousand such steps change nothing.
The first three wrappers return exactly the change of the parameters. Transformations that change
updates, such as `scale`, belong inside the wrapper: `compensated(chain(adamw(1e-3), scale(0.5)))`.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformation

from jgd.arguments import Key, Period, Positive
from jgd.arithmetic import increment
from jgd.dtypes import has_16_bits, widen
from jgd.pytree import as_pytree
from jgd.trees import aligned, check_state, find_state, leafwise, shape_error, with_params

__all__ = [
    "compensated",
    "loss_scale",
    "loss_scaled",
    "master_weights",
    "skip_nonfinite",
    "stochastic_rounding",
]


# --- steps smaller than rounding -------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _rounded(x: Any, noise: Any, dtype: Any) -> Any:
    """Return x rounded to the values of a 16-bit `dtype`, in the dtype of x, with derivative 1.

    XLA may compute a 16-bit sum in float32 and skip its rounding, but does not change this
    arithmetic. Without `noise`, x is rounded to nearest. With `noise`, uniform in [0, 1), x is
    rounded up or down at random so that its mean is x.
    """
    info = jnp.finfo(dtype)
    lowest = max(int(info.minexp) - info.nmant, -126)  # XLA may flush lower powers of 2 to 0
    _, exponent = jnp.frexp(x)
    spacing = jnp.ldexp(jnp.ones_like(x), jnp.maximum(exponent - 1 - info.nmant, lowest))
    units = x / spacing
    below = jnp.floor(units)
    whole = jnp.round(units) if noise is None else below + (noise < units - below)
    return whole * spacing


@_rounded.defjvp
def _(dtype: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    return _rounded(*primals, dtype), tangents[0]


def _pairs(f: Callable[..., tuple[Any, Any]], updates: Any, *trees: Any) -> tuple[Any, Any]:
    """Map `f(u, *others) -> (x, y)` over the leaves, and return the trees of x and of y."""
    leaves, structure, columns = aligned(updates, *trees)
    pairs: list[tuple[Any, Any]] = []
    for index, (u, *others) in enumerate(zip(leaves, *columns, strict=True)):
        if any(jnp.shape(x) != jnp.shape(u) for x in others if u is not None and x is not None):
            raise shape_error(updates, index, others)
        pairs.append(f(u, *others))
    return structure.unflatten([x for x, _ in pairs]), structure.unflatten([y for _, y in pairs])


class CompensatedState(NamedTuple):
    """State of `compensated`."""

    lost: Any  # like the 16-bit parameters; None for other parameters
    inner: Any


@as_pytree(widen=False)
def compensated(inner: GradientTransformation) -> GradientTransformation:
    """Kahan summation: adds the rounding error of each step of the parameters to the next step.

        y = inner(g) + lost            u = y, rounded to 16 bits
        p' = p + u, rounded to 16 bits            lost <- y - (p' - p)

    Args:
      inner: the optimizer. It receives the parameters in float32.

    State: `CompensatedState(lost, inner)`, one 16-bit tree more than `inner`. Parameters that do
      not have 16 bits need no accumulator and receive the updates of `inner`.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `master_weights`, whose float32 copy takes twice as much memory and is more exact.
    Source: Kahan 1965, doi:10.1145/363707.363723; Zamirai et al. 2020, section 4.2,
      arXiv:2010.06192.
    """
    tx = optax.with_extra_args_support(inner)

    def step(u: Any, lost: Any, p: Any) -> tuple[Any, Any]:
        if u is None or lost is None:
            return u, lost
        y = u + lost
        u = _rounded(y, None, lost.dtype)
        moved = _rounded(p + u, None, lost.dtype)
        return u, (y - (moved - p)).astype(lost.dtype)

    def init(params: Any) -> Any:
        inner_state = tx.init(params)
        lost = jax.tree.map(lambda p: jnp.zeros_like(p) if has_16_bits(p) else None, params)
        return CompensatedState(lost, inner_state)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        lost, inner_state = check_state(state, CompensatedState)
        updates, inner_state = tx.update(updates, inner_state, with_params(params), **extra)
        updates, lost = _pairs(step, updates, lost, params)
        return updates, CompensatedState(lost, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class MasterWeightsState(NamedTuple):
    """State of `master_weights`."""

    master: Any  # like the 16-bit parameters, in float32; None for other parameters
    inner: Any


@as_pytree(widen=False)
def master_weights(inner: GradientTransformation) -> GradientTransformation:
    """Master weights: trains a float32 copy of the parameters and rounds it to the parameters.

        m <- m + inner(g)            u = (m rounded to 16 bits) - p

    Where a parameter does not equal its rounded copy, for example after `lookahead` or after
    loading a checkpoint, the copy is reset to the parameter. This also happens with 16-bit
    gradients, whose updates have 16 bits, if a step is larger than its parameter.

    Args:
      inner: the optimizer. It receives the copy as its parameters.

    State: `MasterWeightsState(master, inner)`, one float32 tree more than `inner`. Parameters that
      do not have 16 bits need no accumulator and receive the updates of `inner`.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `compensated`, whose accumulator has 16 bits.
    Source: Micikevicius et al. 2018, section 3.1, arXiv:1710.03740.
    """
    tx = optax.with_extra_args_support(inner)

    def current(p: Any, master: Any) -> tuple[Any, Any]:
        if p is None or master is None:
            return p, master
        unchanged = _rounded(master, None, jnp.result_type(p)) == p
        master = jnp.where(unchanged, master, p)
        return master, master

    def step(u: Any, master: Any, p: Any) -> tuple[Any, Any]:
        if u is None or master is None:
            return u, master
        master = (master + u).astype(master.dtype)
        return _rounded(master, None, jnp.result_type(p)) - p, master

    def init(params: Any) -> Any:
        inner_state = tx.init(widen(params))
        master = jax.tree.map(lambda p: widen(p) if has_16_bits(p) else None, params)
        return MasterWeightsState(master, inner_state)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        master, inner_state = check_state(state, MasterWeightsState)
        inner_params, master = _pairs(current, with_params(params), master)
        updates, inner_state = tx.update(updates, inner_state, inner_params, **extra)
        updates, master = _pairs(step, updates, master, params)
        return updates, MasterWeightsState(master, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`."""

    key: jax.Array  # random key for the following steps
    inner: Any


@as_pytree(widen=False)
def stochastic_rounding(inner: GradientTransformation, key: Key) -> GradientTransformation:
    """Stochastic rounding: rounds p + inner(g) up or down at random, with the right mean.

        u = r - p            r: the 16-bit number below or above y = p + inner(g),
                             above with probability (y - below) / (above - below)

    Args:
      inner: the optimizer. It receives the parameters in float32.
      key: a random key or an int. Lanes, seeds of a sweep and layers of `per_layer` share it unless
        `jax.vmap` maps over it. Give each group of `param_groups` its own key.

    State: `StochasticRoundingState(key, inner)`, one random key more than `inner`. Parameters that
      do not have 16 bits receive the updates of `inner`.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `compensated` and `master_weights`, which store a tree and are deterministic.
    Source: Gupta et al. 2015, section 3, arXiv:1502.02551.
    """
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        # `fold_in` copies the key into a new buffer, which a training step may donate.
        return StochasticRoundingState(jax.random.fold_in(_typed(key), 0), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        next_key, inner_state = check_state(state, StochasticRoundingState)
        updates, inner_state = tx.update(updates, inner_state, with_params(params), **extra)
        next_key, step_key = jax.random.split(next_key)
        indices = itertools.count()

        def step(u: Any, p: Any) -> Any:
            index = next(indices)
            if not has_16_bits(p):
                return u
            noise = jax.random.uniform(jax.random.fold_in(step_key, index), u.shape, u.dtype)
            return _rounded(p + u, noise, jnp.result_type(p)) - p

        return leafwise(step, updates, params), StochasticRoundingState(next_key, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _typed(key: Any) -> Any:
    """Return a typed random key for a typed key, a raw key or an int."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key) if jnp.ndim(key) else jax.random.key(key)


# --- steps that are not finite ---------------------------------------------------------------


def _is_finite(tree: Any) -> jax.Array:
    """Return whether all values in a tree are finite."""
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _where(condition: Any, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


class LossScaleState(NamedTuple):
    """State of `loss_scaled`."""

    scale: jax.Array  # float32 scalar: the factor of the loss
    steps: jax.Array  # int32 scalar: number of finite gradients since the scale last changed
    inner: Any


@as_pytree
def loss_scaled(
    inner: GradientTransformation, initial: Positive = 2.0**15, period: Period = 2000
) -> GradientTransformation:
    """Loss scaling: divides gradients by the scale of the loss, which adapts to their range.

        g finite:  u = inner(g / scale); scale <- 2 scale after `period` finite g in a row
        else:      u = 0, inner does not see g, scale <- scale / 2

    Multiply the loss by the scale before you take its gradient:

        tx = jgd.loss_scaled(jgd.adam(1e-3))
        state = tx.init(params)
        gradient = jax.grad(lambda p: jgd.loss_scale(state) * loss(p, batch(0)))(params)

    Args:
      inner: the optimizer.
      initial: initial scale, above 0; 2^15 by default.
      period: number of consecutive finite gradients after which the scale doubles, at least 1;
        2,000 by default.

    State: `LossScaleState(scale, steps, inner)`, two scalars more than `inner`. The scale stays
      between 2^-126 and 2^126 in float32.
    Differs from: `skip_nonfinite`, which does not scale the loss.
    Source: Micikevicius et al. 2018, section 3.2, arXiv:1710.03740; counts steps as
      `keras.optimizers.LossScaleOptimizer` does.
    """
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        scale, steps = jnp.asarray(initial, float), jnp.zeros([], jnp.int32)
        return LossScaleState(scale, steps, tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        scale, steps, inner_state = check_state(state, LossScaleState)
        finite = _is_finite(updates)
        # Infinity would give NaN derivatives even though the step is skipped, so use zeros.
        unscaled = leafwise(lambda g: jnp.where(finite, g, 0) / scale, updates)
        updates, moved = tx.update(unscaled, inner_state, params, **extra)
        grown = steps + 1 >= period
        tiny = jnp.finfo(scale.dtype).tiny
        factor = jnp.where(finite, jnp.where(grown, 2, 1), 0.5)
        new = LossScaleState(
            jnp.clip(scale * factor, tiny, 1 / tiny),
            jnp.where(finite & ~grown, increment(steps), 0),
            _where(finite, moved, inner_state),
        )
        return leafwise(lambda u: jnp.where(finite, u, 0), updates), new

    return optax.GradientTransformationExtraArgs(init, update)


def loss_scale(state: Any) -> Any:
    """Return the scale of the loss from an optimizer state that contains a `LossScaleState`.

    Raises: ValueError if the state contains none, or several.
    """
    return find_state("loss_scale", state, LossScaleState).scale


@as_pytree
def skip_nonfinite(inner: GradientTransformation) -> GradientTransformation:
    """Skip each step of `inner` that would bring NaN or infinity into updates or state.

        u = inner(g), or 0 with the state unchanged if a gradient, an update, or a value of the
        state that was finite before is not finite

    Under `jax.vmap` each lane skips its own steps.

    Args:
      inner: the optimizer. Its schedules do not count skipped steps.

    State: `optax.ApplyIfFiniteState(notfinite_count, last_finite, total_notfinite, inner_state)`,
      three scalars more than `inner`: the number of consecutive skipped steps, whether the last
      step was taken, and the total number of skipped steps.
    Differs from: `optax.apply_if_finite`, which checks only the gradients, and applies a nonfinite
      step after a number of skipped steps. Read `notfinite_count` to decide when to stop.
    """
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        zero = lambda: jnp.zeros([], jnp.int32)
        return optax.ApplyIfFiniteState(zero(), jnp.array(True), zero(), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        in_a_row, _, in_all, inner_state = check_state(state, optax.ApplyIfFiniteState)
        finite = _is_finite(updates)
        # NaN would give NaN derivatives even though the step is skipped, so use zeros.
        updates = leafwise(lambda g: jnp.where(finite, g, 0), updates)
        updates, moved = tx.update(updates, inner_state, params, **extra)
        inexact = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.inexact)  # x may be a float
        for old, new in zip(*map(jax.tree.leaves, (inner_state, moved)), strict=True):
            if inexact(old):
                finite &= (jnp.isfinite(new) | ~jnp.isfinite(old)).all()
        finite &= _is_finite(updates)
        new = optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, increment(in_a_row)),
            last_finite=finite,
            total_notfinite=jnp.where(finite, in_all, increment(in_all)),
            inner_state=_where(finite, moved, inner_state),
        )
        return leafwise(lambda u: jnp.where(finite, u, 0), updates), new

    return optax.GradientTransformationExtraArgs(init, update)
