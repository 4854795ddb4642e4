"""Conversion of a PyTorch optimizer's state_dict into a jgd optimizer and its state."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import GradientTransformation

import jgd.compat.torch.optimizers as optimizers
from jgd.compat.state_matching import fill_state, match_parameters
from jgd.pytree import ScheduledState, SteppedState

__all__ = ["state_from"]

# The first key that a param group has identifies its optimizer. Values: jgd's name of it, empty if
# jgd does not have it, and jgd's names of PyTorch's accumulators.
_KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "history_size": ("", {}),  # L-BFGS
    "lambd": ("", {}),  # ASGD
    "momentum_decay": (
        "nadam",
        {"exp_avg": "mu", "exp_avg_sq": "nu", "mu_product": "mu_product", "step": "count"},
    ),
    "ns_coefficients": ("muon", {"momentum_buffer": "average"}),
    "beta2_decay": (
        "adafactor",
        {"row_var": "row", "col_var": "column", "variance": "v", "step": "count"},
    ),
    "etas": ("rprop", {"prev": "prev_updates", "step_size": "step_sizes"}),
    "lr_decay": ("adagrad", {"sum": "sum_of_squares", "step": "count"}),
    "rho": ("adadelta", {"square_avg": "e_g", "acc_delta": "e_x"}),
    "alpha": ("rmsprop", {"square_avg": "nu", "grad_avg": "mu", "momentum_buffer": "trace"}),
    "dampening": ("sgd", {"momentum_buffer": "momentum_buffer"}),
    "amsgrad": (
        "adam",
        {"exp_avg": "mu", "exp_avg_sq": "nu", "max_exp_avg_sq": "nu_max", "step": "count"},
    ),
    "decoupled_weight_decay": ("radam", {"exp_avg": "mu", "exp_avg_sq": "nu", "step": "count"}),
    "weight_decay": ("adamax", {"exp_avg": "mu", "exp_inf": "nu", "step": "count"}),
}


def state_from(
    state_dict: Mapping[str, Any],
    params: Any,
    *,
    lr: Any = None,
    step: int | None = None,
    names: Sequence[str] | None = None,
) -> tuple[GradientTransformation, Any]:
    """Return a jgd optimizer and a state that continue the training of a PyTorch optimizer.

        tx, state = jt.state_from(optimizer.state_dict(), params)

    Args:
      state_dict: the state_dict of an optimizer, as saved in a checkpoint. Tensors are read as
        arrays; a dict that holds arrays needs no PyTorch.
      params: the parameters, in PyTorch's layout (the weight of a Linear is outputs by inputs).
      lr: a rate or a schedule to continue with; None: the current rate. The state_dict does not
        contain the scheduler, so a schedule must be passed.
      step: the number of steps so far, if lr is a schedule and the optimizer does not count its
        steps (SGD, Muon).
      names: the names of PyTorch's parameters in its order, which end in the paths of `params`:
        `[name for name, _ in model.named_parameters()]`. None: the names in the state_dict
        (`param_names`) or, without them, the order in which the dicts of `params` were written.

    Returns: the optimizer with the numbers of the state_dict, and its state.
    Raises: ValueError for an optimizer that jgd does not have, for groups with different numbers,
      and for parameters or accumulators that do not match.
    """
    if not isinstance(state_dict, Mapping) or "param_groups" not in state_dict:
        raise ValueError(
            "state_from: state_dict must be the state_dict of an optimizer, got"
            f" {type(state_dict).__name__} without param_groups. Pass optimizer.state_dict()"
        )
    group = _one_group(state_dict["param_groups"])
    kind, slots = next((_KINDS[key] for key in _KINDS if key in group), ("", {}))
    if not kind:
        raise ValueError(
            "state_from: state_dict must be that of an optimizer in jgd.compat.torch, got one with"
            f" the arguments {', '.join(group)}"
        )
    factory = getattr(optimizers, kind)
    known = inspect.signature(factory).parameters
    numbers = {name: _plain(value) for name, value in group.items() if name in known}
    if lr is not None:
        numbers["lr"] = lr
    tx = factory(**numbers)
    state = tx.init(params)
    indices = [index for g in state_dict["param_groups"] for index in g["params"]]
    rows = _rows(state_dict["state"], indices)
    if unknown := sorted({slot for row in rows for slot in row} - {*slots, "step"}):
        raise ValueError(
            f"state_from: the accumulators of {kind} must be among {', '.join(slots)}, got"
            f" {', '.join(unknown)}"
        )
    leaves = len(jax.tree.leaves(params))
    if leaves != len(indices):
        raise ValueError(
            f"state_from: params must have {len(indices)} leaves, one for each parameter of the"
            f" state, got {leaves}"
        )
    scheduled = isinstance(state, ScheduledState | SteppedState)
    if scheduled and step is None and any(rows) and not any("step" in row for row in rows):
        raise ValueError(
            f"state_from: step must be a number of steps where lr is a schedule, got None. {kind}"
            " does not count its steps in the state_dict"
        )
    counts = {int(row["step"]) for row in rows if "step" in row} or {step or 0}
    if len(counts) > 1:
        raise ValueError(
            f"state_from: all parameters must be at the same step, got {sorted(counts)}"
        )
    (count,) = counts
    saved = [name for g in state_dict["param_groups"] for name in g.get("param_names", ())]
    fields = _fields(params, slots, rows, names or saved, count) if any(rows) else {}
    if scheduled:
        return tx, type(state)(jnp.asarray(count, jnp.int32), fill_state(state.inner, fields))
    return tx, fill_state(state, fields)


def _rows(states: Mapping[int, Any], indices: Sequence[int]) -> list[dict[str, Any]]:
    """Return for each parameter its accumulators as arrays; none before the first step."""
    if states and (absent := [index for index in indices if index not in states]):
        raise ValueError(
            f"state_from: each parameter must have a state, got none for numbers {absent}."
            " PyTorch creates it at the first step with a gradient"
        )
    rows = [{slot: _array(x) for slot, x in states.get(index, {}).items()} for index in indices]
    return [{slot: x for slot, x in row.items() if x is not None} for row in rows]


def _fields(
    params: Any,
    slots: dict[str, str],
    rows: list[dict[str, Any]],
    names: Sequence[str],
    count: int,
) -> dict[str, Any]:
    """Return the fields of jgd's state, with accumulators as trees like `params`."""
    order = match_parameters(params, [_shape(row) for row in rows], names)
    structure = jax.tree.structure(params)
    fields: dict[str, Any] = {}
    for slot, field in slots.items():
        if field == "count":
            fields[field] = count
        elif field == "mu_product":
            fields[field] = rows[0][slot]
        elif any(slot in row for row in rows):
            empty = np.zeros([0])  # Adafactor has either two factors or a variance
            fields[field] = structure.unflatten([rows[k].get(slot, empty) for k in order])
    if "momentum_buffer" in fields:  # SGD has taken at least one step
        fields["count"] = max(count, 1)
    return fields


def _shape(row: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape of a parameter from its accumulators."""
    if "row_var" in row:
        return (*row["row_var"].shape[:-1], row["col_var"].shape[-1])
    return max((x.shape for slot, x in row.items() if slot != "mu_product"), key=len)


def _one_group(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the numbers of the groups, which must all have the same."""
    numbers = [
        {name: x for name, x in group.items() if name not in ("params", "param_names")}
        for group in groups
    ]
    for other in numbers[1:]:
        for name, value in numbers[0].items():
            if other.get(name) != value:
                raise ValueError(
                    f"state_from: all groups must have the same {name}, got {value!r} and"
                    f" {other.get(name)!r}. Convert each group alone and join the optimizers with"
                    " jgd.param_groups"
                )
    return numbers[0]


def _plain(value: Any) -> Any:
    """Return a number of a param group, which may be a tensor, as a Python number."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


def _array(x: Any) -> Any:
    """Return a tensor of any device and dtype as an array, and None as None."""
    if x is None:
        return None
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.double() if x.is_floating_point() else x
    return np.asarray(x)
