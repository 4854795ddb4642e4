"""Conversion of a Keras optimizer into a jgd optimizer and its state."""

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
from jgd.compat.state_matching import fill_state, match_parameters
from jgd.groups import paths
from jgd.pytree import ScheduledState, SteppedState
from jgd.wrappers import AccumulateState

__all__ = ["state_from"]

# For each optimizer: Keras's attributes that hold its accumulators, and jgd's names for them.
_ACCUMULATORS = {
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
    """Return a jgd optimizer and a state that continue the training of a Keras optimizer.

        tx, state = jk.state_from(model.optimizer, params)

    Args:
      optimizer: a built Keras optimizer. Its numbers and its schedule come from its configuration,
        its accumulators and its step from its variables.
      params: the trainable variables, as a dict by their paths or as any tree in Keras's order.
      learning_rate: a rate or a schedule to continue with; None: that of the optimizer.

    Returns: the optimizer with those numbers, and its state.
    Raises: ValueError for an optimizer that is not built, for an optimizer or a schedule that jgd
      does not have, and for parameters or accumulators that do not match.
    """
    class_name = type(optimizer).__name__
    kind = _snake(class_name)
    if kind not in _ACCUMULATORS or not hasattr(optimizer, "get_config"):
        raise ValueError(
            "state_from: optimizer must be a Keras optimizer that jgd.compat.keras has, got"
            f" {class_name}"
        )
    if not optimizer.built:
        raise ValueError(
            f"state_from: optimizer must be built, got {class_name} without variables. Train it, or"
            " call optimizer.build(variables)"
        )
    factory = getattr(optimizers, kind)
    config = optimizer.get_config()
    rate = config["learning_rate"] if learning_rate is None else learning_rate
    config["learning_rate"] = _schedule(rate) if isinstance(rate, dict) else rate
    known = inspect.signature(factory).parameters
    tx = factory(**{name: value for name, value in config.items() if name in known})
    state = tx.init(params)

    variables = optimizer._trainable_variables
    shapes = [tuple(v.shape) for v in variables]
    order = match_parameters(params, shapes, [v.path for v in variables])

    def as_params(arrays: Any) -> Any:
        """Return arrays in the order of Keras's variables as a tree like `params`."""
        leaves = [np.zeros([0]) if arrays[k] is None else np.asarray(arrays[k]) for k in order]
        return jax.tree.structure(params).unflatten(leaves)

    if kind == "muon":
        _check_matrices(tx, optimizer, params, [variables[k] for k in order])
    return tx, _converted(state, optimizer, kind, as_params)


def _check_matrices(tx: Any, optimizer: Any, params: Any, variables: list[Any]) -> None:
    """Raise if jgd would update a parameter with Muon that Keras updates with Adam, or vice versa.

    Both decide by the path of the parameter.
    """
    names, structure = paths(params)
    for name, x, variable in zip(names, structure.flatten_up_to(params), variables, strict=True):
        has_muon = is_matrix(name, x, tx.exclude_layers, tx.exclude_embeddings)
        if has_muon == optimizer._should_use_adamw(variable):
            raise ValueError(
                f"state_from: leaf {name!r} of params must have the path {variable.path!r}, which"
                " decides between Muon and Adam. Pass the parameters as a dict by Keras's paths"
            )


def _converted(state: Any, optimizer: Any, kind: str, as_params: Callable[[Any], Any]) -> Any:
    """Return `state` filled, wrapper by wrapper in the order of `with_options`."""
    gradients = int(optimizer._iterations)
    every = optimizer.gradient_accumulation_steps or 1
    converted = lambda inner: _converted(inner, optimizer, kind, as_params)
    if isinstance(state, ScheduledState | SteppedState):
        return type(state)(jnp.asarray(gradients, jnp.int32), converted(state.inner))
    if isinstance(state, AverageState):
        average = as_params(optimizer._model_variables_moving_average)
        outer = fill_state(state._replace(inner=()), dict(steps=gradients, average=average))
        return outer._replace(inner=converted(state.inner))
    if isinstance(state, AccumulateState):
        micro_step = gradients % every
        factor = (optimizer.loss_scale_factor or 1) / max(micro_step, 1)
        sums = as_params(optimizer._accumulated_gradients)
        average = jax.tree.map(lambda x: x * factor, sums)
        outer = fill_state(state._replace(inner=()), dict(micro_step=micro_step, average=average))
        return outer._replace(inner=converted(state.inner))
    return fill_state(state, _fields(state, optimizer, kind, as_params, gradients // every))


def _fields(
    state: Any, optimizer: Any, kind: str, as_params: Callable[[Any], Any], steps: int
) -> dict[str, Any]:
    """Return the fields of the optimizer's state inside all wrappers, by jgd's names."""
    fields: dict[str, Any] = {}
    for attribute, field in _ACCUMULATORS[kind].items():
        if arrays := getattr(optimizer, attribute, None):
            fields[field] = as_params(arrays)
    if optax.tree.get_all_with_path(state, "count"):
        fields["count"] = steps
    if kind == "nadam":
        fields["mu_product"] = np.asarray(optimizer._u_product)
    elif kind == "rmsprop" and "trace" in fields:  # Keras subtracts it, jgd adds it
        fields["trace"] = jax.tree.map(np.negative, fields["trace"])
    elif kind == "muon":
        fields["trace"] = fields["mu"]
    elif kind == "schedule_free_adamw":
        fields |= dict(step_count=steps + 1, weight_sum=steps, max_lr=1)
    return fields


def _schedule(config: dict[str, Any]) -> Any:
    """Return jgd's schedule for a serialized schedule of Keras."""
    name = _snake(config["class_name"])
    if name not in schedules.__all__:
        raise ValueError(
            "state_from: the optimizer's schedule must be one that jgd.compat.keras has, got"
            f" {config['class_name']}. Pass learning_rate=..."
        )
    numbers = {key: value for key, value in config["config"].items() if key != "name"}
    return getattr(schedules, name)(**numbers)


def _snake(name: str) -> str:
    """Return a class name in jgd's spelling: RMSprop as rmsprop, CosineDecay as cosine_decay."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower()
