"""Options of every Keras optimizer: clipping, weight decay, accumulation, averaging, scaling."""

from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypedDict

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformation

from jgd.arguments import Fraction, NonNegative, Period, Positive
from jgd.arithmetic import formula, increment
from jgd.clipping import Norm, block, clip, together
from jgd.combinators import chain
from jgd.compat.shared import after_decay, with_parameters_of_options
from jgd.precision import LossScaleState, loss_scaled
from jgd.pytree import as_pytree
from jgd.transforms import pointwise, scale
from jgd.trees import check_state, leafwise, with_params
from jgd.wrappers import accumulate

__all__ = [
    "AverageState",
    "DecayOptions",
    "LossScaleState",
    "Options",
    "averaged_params",
    "loss_scale_optimizer",
    "optimizer",
    "with_options",
]

P = ParamSpec("P")


class Options(TypedDict, total=False):
    """Arguments of every Keras optimizer. Where None is the default, it switches the option off."""

    clipnorm: NonNegative | None
    """The largest norm of a leaf of gradients; longer leaves are scaled down to it."""
    clipvalue: NonNegative | None
    """Each entry is clipped to [-clipvalue, clipvalue]."""
    global_clipnorm: NonNegative | None
    """The largest norm of all gradients together; if it is exceeded, all are scaled down by the
    same factor, and if it is not finite, all are NaN. At most one of these three bounds may be
    given; 0 is off."""
    use_ema: bool
    """True keeps a moving average of the parameters, which `averaged_params(state)` returns."""
    ema_momentum: Fraction
    """The decay of this average, 0.99 by default. Its first value is the parameters after the first
    step."""
    ema_overwrite_frequency: Period | None
    """Every so many steps the parameters are set to their average."""
    loss_scale_factor: Positive | None
    """The factor by which the caller multiplied the loss; gradients are divided by it."""
    gradient_accumulation_steps: Period | None
    """The number of gradients whose mean makes one step. A schedule of the learning rate still
    counts gradients, not steps."""
    name: str | None
    """Ignored."""


class _Decay(TypedDict, total=False):
    weight_decay: NonNegative | None
    """p <- p - weight_decay learning_rate p before the rule."""


class DecayOptions(_Decay, Options, total=False):
    """Arguments of the optimizers that do not declare `weight_decay` themselves."""


_DEFAULTS: dict[str, Any] = {"use_ema": False, "ema_momentum": 0.99}
_CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")


def optimizer(rule: Callable[P, GradientTransformation]) -> Callable[P, GradientTransformation]:
    """Decorate with `as_pytree`, with parameters in place of `**options`."""
    return as_pytree(with_parameters_of_options(rule, _DEFAULTS), check=_one_clip)


def _one_clip(tx: Any) -> None:
    given = [name for name in _CLIPS if getattr(tx, name) is not None]
    if len(given) > 1:
        name = repr(tx).partition("(")[0]
        raise ValueError(
            f"{name}: must have at most one of {', '.join(_CLIPS)}, got {', '.join(given)}"
        )


def with_options(
    rule: GradientTransformation,
    learning_rate: Any,
    *,
    weight_decay: Any = None,
    clipnorm: Any = None,
    clipvalue: Any = None,
    global_clipnorm: Any = None,
    use_ema: bool = False,
    ema_momentum: Any = 0.99,
    ema_overwrite_frequency: Any = None,
    loss_scale_factor: Any = None,
    gradient_accumulation_steps: Any = None,
    name: str | None = None,
) -> GradientTransformation:
    """Wrap a rule in Keras's order: accumulate, unscale, clip, decay, rule, average."""
    tx = rule if weight_decay is None else after_decay(rule, learning_rate * weight_decay)
    for bound, link in (
        (clipnorm, _clip_each),
        (clipvalue, clip),
        (global_clipnorm, _clip_all),
    ):
        if bound is not None:
            tx = chain(link(jnp.where(bound > 0, bound, jnp.inf)), tx)
    if loss_scale_factor is not None:
        tx = chain(scale(1 / loss_scale_factor), tx)
    if gradient_accumulation_steps is not None:
        tx = accumulate(tx, gradient_accumulation_steps)
    if use_ema:
        every = 1 if gradient_accumulation_steps is None else gradient_accumulation_steps
        tx = _with_average(tx, ema_momentum, every, ema_overwrite_frequency)
    return tx


_block = formula(block)


def _clip_each(bound: Any) -> GradientTransformation:
    return pointwise(_block, bound)


def _clip_all(bound: Any) -> GradientTransformation:
    def scale_of(norm: Norm) -> tuple[Any, Any]:
        overflow = ~jnp.isfinite(norm.rest) & jnp.isfinite(bound)
        return norm.bounded(jnp.where(overflow, jnp.nan, bound))

    return together(scale_of)


# --- the average of the parameters -----------------------------------------------------------


class AverageState(NamedTuple):
    """State of an optimizer with `use_ema`."""

    steps: jax.Array  # int32 scalar: gradients so far
    average: Any  # like the parameters, at least float32
    inner: Any


@as_pytree
def _with_average(
    inner: GradientTransformation,
    momentum: Fraction,
    every: Period,
    overwrite: Period | None = None,
) -> GradientTransformation:
    """Average the parameters: a <- momentum a + (1 - momentum) p, and a = p in the first step."""
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        average = jax.tree.map(jnp.zeros_like, params)
        return AverageState(jnp.zeros([], jnp.int32), average, tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        steps, average, inner_state = check_state(state, AverageState)
        updates, inner_state = tx.update(updates, inner_state, with_params(params), **extra)
        done = steps // jnp.asarray(every, int)
        decay = jnp.where(done == 0, 0, momentum)
        mix = lambda u, a, p: decay * a + (1 - decay) * (p + u)
        average = leafwise(mix, updates, average, params, keep=True)
        if overwrite is not None:
            due = (done + 1) % jnp.asarray(overwrite, int) == 0
            updates = leafwise(lambda u, a, p: jnp.where(due, a - p, u), updates, average, params)
        return updates, AverageState(increment(steps), average, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(state: Any) -> Any:
    """Return the average of the parameters that an optimizer with `use_ema` keeps.

    Keras's `finalize_variable_values` assigns it to the variables at the end of a training.

    Raises: ValueError if the state has no average.
    """
    is_average = lambda node: isinstance(node, AverageState)
    averages = [node for node in jax.tree.leaves(state, is_leaf=is_average) if is_average(node)]
    if not averages:
        raise ValueError(
            "averaged_params: state must have an average of the parameters, got none. Create the"
            " optimizer with use_ema=True"
        )
    return averages[0].average


# --- loss scaling ----------------------------------------------------------------------------


@as_pytree
def loss_scale_optimizer(
    inner_optimizer: GradientTransformation,
    initial_scale: Positive = 2.0**15,
    dynamic_growth_steps: Period = 2000,
) -> GradientTransformation:
    """LossScaleOptimizer: divide gradients by a loss scale that adapts to overflows.

        all finite:  u = inner(g / scale); scale <- 2 scale after dynamic_growth_steps in a row
        else:        u = 0, inner is not called, scale <- scale / 2

    Args:
      inner_optimizer: the optimizer.
      initial_scale: above 0, 2^15 by default.
      dynamic_growth_steps: at least 1, 2,000 by default.

    State: `LossScaleState(scale, steps, inner)`; multiply the loss by `jgd.loss_scale(state)`.
    Differs from: `jgd.loss_scaled` only in the names of its arguments.
    """
    return loss_scaled(inner_optimizer, initial_scale, dynamic_growth_steps)
