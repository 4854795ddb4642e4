"""A checkpoint of PyTorch's becomes a jgd optimizer and its state."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import GradientTransformation

import jgd.compat.torch.optimizers as optimizers
from jgd.compat.state_matching import filled, in_place
from jgd.pytree import ScheduledState, SteppedState

__all__ = ["state_from"]

# what only the groups of one optimizer have, and the memories by PyTorch's names and by jgd's
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
    """The optimizer and the state that go on where a PyTorch optimizer stopped.

        tx, state = jt.state_from(optimizer.state_dict(), params)

    Args:
      state_dict: that of an optimizer, as saved in a checkpoint. Its tensors are read as arrays;
        PyTorch itself is not needed for a dict of arrays.
      params: the parameters, in PyTorch's layout (a Linear's weight is outputs by inputs).
      lr: a rate or schedule to go on with; None: the rate of now. A scheduler keeps a state of its
        own, which is not in this one.
      step: the steps so far, if lr is a schedule and the optimizer does not keep them (SGD, Muon).
      names: those of the parameters in PyTorch's order, where the paths here are the same names:
        `[name for name, _ in model.named_parameters()]`. None: as PyTorch has kept them
        (`param_names`), or in the order in which the dicts here were written.

    Returns: the optimizer with the numbers of the checkpoint, and its state.
    Raises: ValueError, naming it, for what does not fit: an optimizer that is not here, groups with
      numbers of their own, other parameters, other memories.
    """
    if not isinstance(state_dict, Mapping) or "param_groups" not in state_dict:
        raise ValueError(
            "state_from: state_dict must be that of an optimizer, with param_groups, got"
            f" {type(state_dict).__name__}. Pass optimizer.state_dict(), or that of a checkpoint"
        )
    group = _one_group(state_dict["param_groups"])
    kind, slots = next((_KINDS[key] for key in _KINDS if key in group), ("", {}))
    if not kind:
        raise ValueError(f"state_from: no optimizer here has the numbers {', '.join(group)}")
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
        raise ValueError(f"state_from: {kind} keeps no {', '.join(unknown)}")
    leaves = len(jax.tree.leaves(params))
    if leaves != len(indices):
        raise ValueError(f"state_from: {leaves} parameters here, {len(indices)} in the state")
    scheduled = isinstance(state, ScheduledState | SteppedState)
    if scheduled and step is None and any(rows) and not any("step" in row for row in rows):
        raise ValueError(
            f"state_from: {kind} keeps no step to begin the schedule at: give step=..."
        )
    counts = {int(row["step"]) for row in rows if "step" in row} or {step or 0}
    if len(counts) > 1:
        raise ValueError(f"state_from: parameters are at unlike steps, {sorted(counts)}")
    (count,) = counts
    kept = [name for g in state_dict["param_groups"] for name in g.get("param_names", ())]
    fields = _fields(params, slots, rows, names or kept, count) if any(rows) else {}
    if scheduled:
        return tx, type(state)(jnp.asarray(count, jnp.int32), filled(state.inner, fields))
    return tx, filled(state, fields)


def _rows(held: Mapping[int, Any], indices: Sequence[int]) -> list[dict[str, Any]]:
    """For each parameter its memories as arrays; none before the first step."""
    if held and (absent := [index for index in indices if index not in held]):
        raise ValueError(f"state_from: parameters {absent} have no state: they had no gradient")
    rows = [{slot: _array(x) for slot, x in held.get(index, {}).items()} for index in indices]
    return [{slot: x for slot, x in row.items() if x is not None} for row in rows]


def _fields(
    params: Any,
    slots: dict[str, str],
    rows: list[dict[str, Any]],
    names: Sequence[str],
    count: int,
) -> dict[str, Any]:
    """The memories under jgd's names, as trees like the parameters."""
    order = in_place(params, [_shape(row) for row in rows], names)
    structure = jax.tree.structure(params)
    fields: dict[str, Any] = {}
    for slot, field in slots.items():
        if field == "count":
            fields[field] = count
        elif field == "mu_product":
            fields[field] = rows[0][slot]
        elif any(slot in row for row in rows):
            empty = np.zeros([0])  # where Adafactor keeps none
            fields[field] = structure.unflatten([rows[k].get(slot, empty) for k in order])
    if "momentum_buffer" in fields:  # SGD's, whose first step is behind it
        fields["count"] = max(count, 1)
    return fields


def _shape(row: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a parameter, from what is kept for it."""
    if "row_var" in row:
        return (*row["row_var"].shape[:-1], row["col_var"].shape[-1])
    return max((x.shape for slot, x in row.items() if slot != "mu_product"), key=len)


def _one_group(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of all groups, which must be the same."""
    numbers = [
        {name: x for name, x in group.items() if name not in ("params", "param_names")}
        for group in groups
    ]
    for other in numbers[1:]:
        for name, value in numbers[0].items():
            if other.get(name) != value:
                raise ValueError(
                    f"state_from: the groups have {name}={value!r} and {other.get(name)!r}: convert"
                    " each alone, and put them together with jgd.param_groups"
                )
    return numbers[0]


def _plain(value: Any) -> Any:
    """A number of PyTorch's, which may be a tensor."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


def _array(x: Any) -> Any:
    """A tensor, wherever it lies and of whatever dtype, as an array; None stays."""
    if x is None:
        return None
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.double() if x.is_floating_point() else x
    return np.asarray(x)
