"""Wrappers of whole optimizers: `wrapper(inner, numbers)` is an optimizer itself.

    jgd.accumulate(jgd.cautious(jgd.adamw(1e-3)), every=4)

Wrappers compose with one another. Their numbers and those of the inner optimizer are leaves.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.typing import DTypeLike
from optax import GradientTransformation

from jgd.arguments import Fraction, Mixing, NonNegative, NumberOrSchedule, Period
from jgd.arithmetic import complement, increment, log_decay, one_minus_exp, quotient
from jgd.calls import spec_of
from jgd.dtypes import widen
from jgd.pytree import as_pytree
from jgd.trees import TreeError, check_state, find_state, leafwise, like, with_params

__all__ = [
    "accumulate",
    "average_params",
    "averaged_params",
    "cautious",
    "lookahead",
    "per_layer",
    "schedule_free",
    "schedule_free_eval_params",
]


# --- when to step ----------------------------------------------------------------------------


class AccumulateState(NamedTuple):
    """State of `accumulate`."""

    micro_step: jax.Array  # int32 scalar: gradients since the last step
    average: Any  # like the parameters, at least float32: the mean of these gradients
    inner: Any


@as_pytree
def _accumulate(inner: GradientTransformation, every: Period) -> GradientTransformation:
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, widen(params))
        return AccumulateState(jnp.zeros([], jnp.int32), zeros, tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        step, average, inner_state = check_state(state, AccumulateState)
        step = increment(step)
        average = leafwise(lambda g, a: a + (g - a) / step, updates, average, keep=True)
        mean = leafwise(lambda _, a: a, updates, average)
        # outside `cond`, inside which zeros like a concrete array lose its sharding
        zeros, no_update = (jax.tree.map(jnp.zeros_like, tree) for tree in (average, mean))

        def step_inner() -> Any:
            new_updates, new_inner = tx.update(mean, inner_state, params, **extra)
            new = AccumulateState(jnp.zeros_like(step), zeros, new_inner)
            return like(new_updates, mean), like(new, state)

        def wait() -> Any:
            return no_update, like(AccumulateState(step, average, inner_state), state)

        return jax.lax.cond(step >= every, step_inner, wait)

    return optax.GradientTransformationExtraArgs(init, update)


def accumulate(inner: GradientTransformation, every: Any) -> GradientTransformation:
    """Step `inner` with the mean of `every` gradients. In between, the updates are 0.

        a <- a + (g - a) / n at gradient n            u = inner(a) at n = every, and n <- 0; else 0

    Args:
      inner: the optimizer. It and its schedules step once for `every` gradients.
      every: at least 1, the number of gradients in a step. It may be traced, so that it can differ
        between lanes. The number 1 returns `inner` itself. A schedule for it counts gradients.

    State: `AccumulateState(micro_step, average, inner)`, one tree and one scalar more than `inner`.
    Differs from: `optax.MultiSteps`, whose number of steps is a Python integer or a function, and
      which stores a mean also for 1. Under `jax.vmap`, `inner` computes at every call.
    """
    accumulating = _accumulate(inner, every)
    one = isinstance(every, int | float | np.number) and every == 1
    return inner if one else accumulating


setattr(accumulate, "__jgd_spec__", spec_of(_accumulate))  # noqa: B010 (no such attribute)


# --- masks and layers ------------------------------------------------------------------------


@as_pytree
def cautious(inner: GradientTransformation) -> GradientTransformation:
    """Mask the parts of `inner`'s update that would increase the loss to first order.

        k = 1 where inner(g) g < 0, else 0            u = inner(g) k / max(mean(k), 1e-3)

    Args:
      inner: an optimizer whose updates descend. Chain decoupled weight decay after it, as in the
        paper: `chain(cautious(adam(rate)), add_decayed_weights(-rate * decay))`.

    State: that of `inner`.
    Source: Liang et al. 2024, algorithm 1, arXiv:2411.16085, with one mean for each leaf.
    """
    tx = optax.with_extra_args_support(inner)

    def masked(u: Any, g: Any) -> Any:
        keep = ~(jnp.real(jnp.conj(g) * u) >= 0)  # True for NaN, so NaN propagates
        return jnp.where(keep, u, 0) / jnp.maximum(jnp.sum(keep) / max(u.size, 1), 1e-3)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        steps, state = tx.update(updates, state, params, **extra)
        return leafwise(masked, steps, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


@as_pytree
def per_layer(inner: GradientTransformation) -> GradientTransformation:
    """Apply an optimizer to each layer of a stack of parameters, as used with `jax.lax.scan`.

        u[k] = inner(g[k]) for each k of the leading axis, which all leaves share

    Without it, a rule that depends on a whole array, such as the norms of `lamb` and `lars` or the
    matrices of `muon`, treats the stack as one layer. Elementwise rules give the same either way.

    Args:
      inner: any optimizer. All its parameters must be stacked; select them by `param_groups`:
        `param_groups(adamw(rate), {"layers/*": per_layer(lamb(rate))})`.

    State: that of `inner`, each array with a leading axis over layers. An explicit mesh must not
      shard this axis, since neither `jax.vmap` nor `jax.lax.scan` maps over a sharded axis.
    Differs from: lanes, which have different numbers; all layers have the same numbers.
    """
    tx = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        one = lambda g, s, p: tx.update(g, s, p, **extra)
        return jax.vmap(one)(updates, state, params)

    return optax.GradientTransformationExtraArgs(jax.vmap(tx.init), update)


# --- slow parameters and averages ------------------------------------------------------------


class LookaheadState(NamedTuple):
    """State of `lookahead`."""

    fast_state: Any
    steps_since_sync: jax.Array  # int32 scalar
    slow: Any  # like the parameters; None if the caller stores them in `optax.LookaheadParams`


@as_pytree
def lookahead(
    fast_optimizer: GradientTransformation,
    sync_period: Period,
    slow_step_size: Fraction,
    reset_state: bool = False,
) -> GradientTransformation:
    """Lookahead: every `sync_period` steps, resets the parameters to slow ones that follow them.

        fast <- fast + u_fast            every sync_period steps:
        slow <- slow + slow_step_size (fast - slow)            fast <- slow

    Args:
      fast_optimizer: the optimizer of the fast parameters.
      sync_period: at least 1, fast steps for each step of the slow parameters; 5 in the paper.
      slow_step_size: in [0, 1], the step size of the slow parameters; 0.5 in the paper.
      reset_state: True initializes the state of `fast_optimizer` after each synchronization.

    State: `LookaheadState(fast_state, steps_since_sync, slow)`, one tree and one scalar more. If
      the parameters are `optax.LookaheadParams(fast, slow)`, so are the updates, and `slow` in the
      state is None.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: optax, which accepts only `LookaheadParams`, and whose period cannot be traced;
      `average_params`, which does not change the training.
    Source: Zhang et al. 2019, algorithm 1, arXiv:1907.08610.
    """
    tx = optax.with_extra_args_support(fast_optimizer)

    def init(params: Any) -> Any:
        own = not isinstance(params, optax.LookaheadParams)
        fast = params if own else params.fast
        slow = jax.tree.map(jnp.copy, widen(params)) if own else None
        return LookaheadState(tx.init(fast), jnp.zeros([], jnp.int32), slow)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        inner, steps, own_slow = check_state(state, LookaheadState)
        own = own_slow is not None
        if not own and not isinstance(params, optax.LookaheadParams):
            raise TreeError(
                "params must be optax.LookaheadParams(fast, slow), as in init, got"
                f" {type(params).__name__}"
            )
        fast, slow = (with_params(params), own_slow) if own else (params.fast, params.slow)
        steps_ahead, inner = tx.update(updates, inner, fast, **extra)
        sync = steps + 1 >= sync_period
        gap = leafwise(lambda u, f, s: f + u - s, steps_ahead, fast, slow)
        back = lambda u, d: u - jnp.where(sync, (1 - slow_step_size) * d, 0)
        new_updates = leafwise(back, steps_ahead, gap)
        along = leafwise(lambda d: jnp.where(sync, slow_step_size * d, 0), gap)
        if reset_state:
            fresh = tx.init(fast)
            inner = jax.tree.map(lambda old, new: jnp.where(sync, new, old), inner, fresh)
        steps = jnp.where(sync, 0, increment(steps))
        if own:
            slow = leafwise(lambda d, s: s + d, along, slow, keep=True)
            return new_updates, like(LookaheadState(inner, steps, slow), state)
        pair = optax.LookaheadParams(fast=new_updates, slow=along)
        return pair, like(LookaheadState(inner, steps, None), state)

    return optax.GradientTransformationExtraArgs(init, update)


class AverageParamsState(NamedTuple):
    """State of `average_params`."""

    steps: jax.Array  # int32 scalar: steps so far
    log_decay: jax.Array  # float32 scalar: mean of log(decay)
    average: Any  # like the parameters, at least float32
    inner: Any


@as_pytree
def average_params(
    inner: GradientTransformation, decay: Fraction = 0.999
) -> GradientTransformation:
    """Maintain an average of the parameters without changing the training.

        p' = p + inner(g)            a <- a + (1 - decay) / (1 - decay^t) (p' - a)

    Args:
      inner: the optimizer.
      decay: in [0, 1], the decay of the average, which is corrected for its bias; 0.999 by default.
        1 is the plain mean of all parameters so far (Polyak and Ruppert). May be a schedule.

    State: `AverageParamsState(steps, log_decay, average, inner)`, one tree and two scalars more
      than `inner`. `averaged_params(state)` returns the average, in float32 for 16-bit parameters.
      Before the first step, the average is a copy of the parameters.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `ema`, which averages updates; `schedule_free`, which trains at the average.
    Source: Polyak & Juditsky 1992; Kingma & Ba 2015, section 7.2.
    """
    tx = optax.with_extra_args_support(inner)
    weight = complement(decay)

    def init(params: Any) -> Any:
        steps, log = jnp.zeros([], jnp.int32), jnp.zeros([], float)
        average = jax.tree.map(jnp.copy, widen(params))
        return AverageParamsState(steps, log, average, tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        steps, log, average, inner_state = check_state(state, AverageParamsState)
        new_updates, inner_state = tx.update(updates, inner_state, with_params(params), **extra)
        steps = increment(steps)
        log = log + (log_decay(weight) - log) / steps
        total = one_minus_exp(weight, steps, steps * log)
        part = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), 1 / steps)
        move = lambda u, a, p: a + part * (p + u - a)
        average = leafwise(move, new_updates, average, params, keep=True)
        new = AverageParamsState(steps, log, average, inner_state)
        return new_updates, like(new, state)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(state: Any) -> Any:
    """Return the average of `average_params` from any optimizer state that contains one.

    Raises: ValueError if the state contains no `AverageParamsState`, or several.
    """
    return find_state("averaged_params", state, AverageParamsState).average


@as_pytree
def schedule_free(
    base_optimizer: GradientTransformation,
    learning_rate: NumberOrSchedule,
    b1: Mixing = 0.9,
    weight_lr_power: NonNegative = 2.0,
    state_dtype: DTypeLike | None = None,
) -> GradientTransformation:
    """Schedule-free: the base optimizer moves z; gradients are taken between z and its average x.

        z <- z + base(g)            w = max(learning_rate so far)^weight_lr_power, c = w / sum(w)
        x <- (1 - c) x + c z            u = (1 - b1) z + b1 x - p

    Args:
      base_optimizer: an optimizer without momentum, with the same learning rate.
      learning_rate: the learning rate that weights the average. A schedule starts at step 1.
      b1: in (0, 1), the weight of x in the point where gradients are taken; 0.9 by default.
      weight_lr_power: at least 0, the power of the learning rate in the weights; 2 by default.
      state_dtype: the dtype of z; None (default): float32 for 16-bit parameters, otherwise their
        dtype.

    State: `optax.contrib.ScheduleFreeState(b1, weight_sum, step_count, max_lr,
      base_optimizer_state, z)`, one tree and four scalars more than the base optimizer. The
      parameters are the point where gradients are taken; evaluate the model at x, which is
      `schedule_free_eval_params(state, params)`.
    Raises: ValueError in `update` if no parameters are given.
    Differs from: `average_params`, whose gradients do not depend on the average.
    Source: Defazio et al. 2024, algorithm 1, arXiv:2405.15682.
    """
    tx = optax.with_extra_args_support(base_optimizer)

    def init(params: Any) -> Any:
        return optax.contrib.ScheduleFreeState(
            b1=jnp.asarray(b1, float),
            weight_sum=jnp.zeros([], float),
            step_count=jnp.ones([], jnp.int32),
            max_lr=jnp.zeros([], float),
            base_optimizer_state=tx.init(params),
            z=jax.tree.map(lambda p: jnp.array(p, dtype=state_dtype), widen(params)),
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        _, weight_sum, step, max_lr, base, z = check_state(state, optax.contrib.ScheduleFreeState)
        rate: Any = learning_rate(step) if callable(learning_rate) else learning_rate
        max_lr = jnp.maximum(max_lr, rate)
        positive = max_lr > 0
        weight = jnp.where(positive, jnp.where(positive, max_lr, 1) ** weight_lr_power, 0)
        weight_sum = weight_sum + weight
        c = quotient(weight, weight_sum)
        steps, base = tx.update(updates, base, with_params(params), **extra)

        # (1 - b1) z + b1 x - p without the terms that cancel
        rule = lambda u, p, z: complement(b1) * u + c * (b1 * u + z - p)
        new_updates = leafwise(rule, steps, params, z)
        z = leafwise(lambda u, z: z + u, steps, z, keep=True)
        step = increment(step)
        new = optax.contrib.ScheduleFreeState(state.b1, weight_sum, step, max_lr, base, z)
        return new_updates, like(new, state)

    return optax.GradientTransformationExtraArgs(init, update)


def schedule_free_eval_params(state: Any, params: Any) -> Any:
    """Return the average x of `schedule_free`, at which the model is evaluated.

    Args:
      state: any optimizer state that contains one `ScheduleFreeState`.
      params: the trained parameters.

    Raises: ValueError if the state contains no `ScheduleFreeState`, or several.
    """
    free = find_state("schedule_free_eval_params", state, optax.contrib.ScheduleFreeState)
    x = lambda p, z: (p - (1 - free.b1) * z) / free.b1  # as p = (1 - b1) z + b1 x
    return jax.tree.map(lambda p, z: x(p, z).astype(p.dtype), params, free.z)
