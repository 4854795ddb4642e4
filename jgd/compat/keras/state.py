"""A Keras optimizer becomes a jgd optimizer and its state."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import GradientTransformation

import jgd.compat.keras.optimizers as optimizers
import jgd.compat.keras.schedules as schedules
from jgd.compat.keras.optimizers import is_matrix
from jgd.compat.keras.options import AverageState
from jgd.compat.state_matching import filled, in_place
from jgd.groups import paths
from jgd.pytree import ScheduledState, SteppedState
from jgd.wrappers import AccumulateState

__all__ = ["state_from"]

# for each optimizer, where Keras keeps what, and jgd's name of it
_MEMORIES = {
    "adadelta": {"_accumulated_grads": "e_g", "_accumulated_delta_vars": "e_x"},
    "adafactor": {"_r": "row", "_c": "column", "_v": "v"},
    "adagrad": {"_accumulators": "sum_of_squares"},
    "adam": {"_momentums": "mu", "_velocities": "nu", "_velocity_hats": "nu_max"},
    "adamw": {"_momentums": "mu", "_velocities": "nu", "_velocity_hats": "nu_max"},
    "adamax": {"_m": "mu", "_u": "nu"},
    "ftrl": {"_accumulators": "sum_of_squares", "_linears": "linear"},
    "lamb": {"_momentums": "mu", "_velocities": "nu"},
    "lion": {"_momentums": "mu"},
    "muon": {"momentums": "mu", "adam_velocities": "nu"},
    "nadam": {"_momentums": "mu", "_velocities": "nu"},
    "rmsprop": {"_velocities": "nu", "_momentums": "trace", "_average_gradients": "mu"},
    "schedule_free_adamw": {"_momentums": "z", "_velocities": "ema"},
    "sgd": {"momentums": "trace"},
}


def state_from(
    optimizer: Any, params: Any, *, learning_rate: Any = None
) -> tuple[GradientTransformation, Any]:
    """The optimizer and the state that go on where a Keras optimizer stopped.

        tx, state = jk.state_from(model.optimizer, params)

    Args:
      optimizer: a built Keras optimizer: its numbers are read from its configuration, its schedule
        too, its memories and its step from its variables.
      params: the trainable variables: a dict by their paths, or any tree in Keras's order.
      learning_rate: a rate or a schedule to go on with; None: that of the optimizer.

    Returns: the optimizer with those numbers, and its state.
    Raises: ValueError, naming it, for what does not fit: an optimizer or a schedule that is not
      here, variables without memory, other parameters.
    """
    kind = _snake(type(optimizer).__name__)
    if kind not in _MEMORIES or not hasattr(optimizer, "get_config"):
        raise ValueError(f"state_from: no {type(optimizer).__name__} here")
    if not optimizer.built:
        raise ValueError(f"state_from: this {type(optimizer).__name__} has no state: build it")
    factory = getattr(optimizers, kind)
    config = optimizer.get_config()
    rate = config["learning_rate"] if learning_rate is None else learning_rate
    config["learning_rate"] = _schedule(rate) if isinstance(rate, dict) else rate
    known = inspect.signature(factory).parameters
    tx = factory(**{name: value for name, value in config.items() if name in known})
    state = tx.init(params)

    variables = optimizer._trainable_variables
    shapes = [tuple(v.shape) for v in variables]
    order = in_place(params, shapes, [v.path for v in variables])

    def tree(kept: Any) -> Any:
        """What Keras keeps for each variable, where our parameters are."""
        arrays = [np.zeros([0]) if kept[k] is None else np.asarray(kept[k]) for k in order]
        return jax.tree.structure(params).unflatten(arrays)

    if kind == "muon":
        _same_matrices(tx, optimizer, params, [variables[k] for k in order])
    return tx, _carried(state, optimizer, kind, tree)


def _same_matrices(tx: Any, optimizer: Any, params: Any, variables: list[Any]) -> None:
    """Refuse parameters whose paths do not tell Muon here from Adam there."""
    names, structure = paths(params)
    for name, x, variable in zip(names, structure.flatten_up_to(params), variables, strict=True):
        here = is_matrix(name, x, tx.exclude_layers, tx.exclude_embeddings)
        if here == optimizer._should_use_adamw(variable):
            raise ValueError(
                f"state_from: {name!r} does not say that it is {variable.path!r}, which decides"
                " between Muon and Adam: give the parameters as a dict by their paths"
            )


def _carried(state: Any, optimizer: Any, kind: str, tree: Callable[[Any], Any]) -> Any:
    """The state, wrapper by wrapper, as `with_options` put them on."""
    gradients = int(optimizer._iterations)
    every = optimizer.gradient_accumulation_steps or 1
    go_on = lambda inner: _carried(inner, optimizer, kind, tree)
    if isinstance(state, ScheduledState | SteppedState):
        return type(state)(jnp.asarray(gradients, jnp.int32), go_on(state.inner))
    if isinstance(state, AverageState):
        fields = dict(steps=gradients, average=tree(optimizer._model_variables_moving_average))
        return filled(state._replace(inner=()), fields)._replace(inner=go_on(state.inner))
    if isinstance(state, AccumulateState):
        micro_step = gradients % every
        factor = (optimizer.loss_scale_factor or 1) / max(micro_step, 1)
        average = jax.tree.map(lambda x: x * factor, tree(optimizer._accumulated_gradients))
        fields = dict(micro_step=micro_step, average=average)
        return filled(state._replace(inner=()), fields)._replace(inner=go_on(state.inner))
    return filled(state, _memories(state, optimizer, kind, tree, gradients // every))


def _memories(
    state: Any, optimizer: Any, kind: str, tree: Callable[[Any], Any], steps: int
) -> dict[str, Any]:
    """The fields of the rule itself."""
    fields: dict[str, Any] = {}
    for attribute, field in _MEMORIES[kind].items():
        if kept := getattr(optimizer, attribute, None):
            fields[field] = tree(kept)
    if optax.tree.get_all_with_path(state, "count"):
        fields["count"] = steps
    if kind == "nadam":
        fields["mu_product"] = np.asarray(optimizer._u_product)
    elif kind == "rmsprop" and "trace" in fields:  # Keras takes it off, jgd adds it
        fields["trace"] = jax.tree.map(np.negative, fields["trace"])
    elif kind == "muon":
        fields["trace"] = fields["mu"]
    elif kind == "schedule_free_adamw":
        fields |= dict(step_count=steps + 1, weight_sum=steps, max_lr=1)
    return fields


def _schedule(config: dict[str, Any]) -> Any:
    name = _snake(config["class_name"])
    if name not in schedules.__all__:
        raise ValueError(f"state_from: no schedule {config['class_name']} here")
    numbers = {key: value for key, value in config["config"].items() if key != "name"}
    return getattr(schedules, name)(**numbers)


def _snake(name: str) -> str:
    """ScheduleFreeAdamW is schedule_free_adamw, AdamW adamw, RMSprop rmsprop."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower()
