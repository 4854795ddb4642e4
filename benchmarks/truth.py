"""Measure rounding errors of optimizers: jgd, optax and PyTorch against float64.

    python -m benchmarks.truth                   # all optimizers: about four minutes
    python -m benchmarks.truth --optimizers adam adopt

Each optimizer takes 500 steps with the same random gradients, nine in ten of which point along one
direction, and with the decimals that a user types (0.9999). An error is the largest distance of the
parameters from their path in float64, relative to the largest distance of that path from its start.
jgd and optax are compared with the formula of the paper, written in NumPy (`tests/oracles`).
PyTorch, whose conventions differ, is compared with itself in float64. The table has four parts:

    float32           parameters and gradients are float32
    bfloat16          both are bfloat16, without a wrapper
    compensated       both are bfloat16, and jgd keeps a second bfloat16 tree
    master_weights    both are bfloat16, and jgd keeps a float32 copy of the parameters

Where jgd's error is more than 10 per cent above the better of the other two, a remark explains it.
One rounding in a remark is that of the largest parameter, in the units of the errors.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jgd

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from table import FIRST, Row, losses, noisy_gradients, oracle_updates, parameters

STEPS = 500

Tree = dict[str, np.ndarray]
Path64 = dict[str, np.ndarray]  # the parameters after each step, stacked in each leaf

TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.95, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.1, eps=1e-7),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, 0.9),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-3),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5, weight_decay=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
}

EXPLANATIONS = {
    "amsgrad": "PyTorch takes the maximum before the bias correction, another path",
}


def drawn_gradients(row: Row) -> list[Tree]:
    """Return gradients of many sizes; at each entry nine in ten have the same sign.

    Optimizers that find their own learning rate would accelerate along it; they get random signs.
    """
    if row.whole_tree:
        return noisy_gradients(STEPS, row.shapes)
    rng = np.random.default_rng(5)
    sign = lambda shape, odds: np.where(rng.uniform(size=shape) < odds, 1, -1)
    directions = {name: sign(shape, 0.5) for name, shape in row.shapes.items()}
    with_signs = lambda g, d: np.abs(g) * d * sign(g.shape, 0.9)
    return [jax.tree.map(with_signs, g, directions) for g in noisy_gradients(STEPS, row.shapes)]


def path_of(tx: Any, gradients: Any, params: Any) -> Path64:
    """Return the parameters after each step of a transformation."""
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, inputs: Any) -> Any:
        params, state = carry
        gradient, value = inputs
        updates, state = tx.update(gradient, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    def run(gradients: Any, params: Any, values: Any) -> Any:
        return jax.lax.scan(step, (params, tx.init(params)), (gradients, values))[1]

    path = jax.jit(run)(gradients, params, jnp.asarray(losses(STEPS)))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), path)


def path_of_paper(row: Row, gradients: list[Tree], params: Tree) -> Path64:
    """Return the parameters after each step of the paper's formula in float64."""
    updates = oracle_updates(row, gradients, params)
    steps = {name: np.stack([update[name] for update in updates]) for name in params}
    return {name: params[name] + np.cumsum(u, axis=0) for name, u in steps.items()}


def path_of_torch(
    build: Callable[..., torch.optim.Optimizer], gradients: list[Tree], params: Tree, dtype: Any
) -> Path64:
    """Return the parameters after each step of an optimizer of PyTorch."""
    tensors = {name: torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for name, x in params.items()}
    optimizer = build(list(tensors.values()))
    path: dict[str, list[np.ndarray]] = {name: [] for name in params}
    for gradient in gradients:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[name], dtype=dtype)
        optimizer.step()
        for name, tensor in tensors.items():
            path[name].append(tensor.detach().double().numpy().copy())
    return {name: np.stack(steps) for name, steps in path.items()}


def reach(truth: Path64, start: Tree) -> float:
    """Return the largest distance of a path from its start."""
    return max(float(np.abs(truth[name] - start[name]).max()) for name in truth)


def error(path: Path64, truth: Path64, start: Tree) -> float:
    """Return the largest distance of `path` from `truth` relative to the reach of `truth`."""
    gap = max(float(np.abs(path[name] - truth[name]).max()) for name in truth)
    return gap / reach(truth, start)


def errors_of(row: Row) -> dict[str, float]:
    """Return the errors of one optimizer by library and dtype, and the size of a rounding."""
    errors: dict[str, float] = {}
    for name, dtype, torch_dtype in (
        ("float32", jnp.float32, torch.float32),
        ("bfloat16", jnp.bfloat16, torch.bfloat16),
    ):
        rounded = lambda x, dtype=dtype: np.asarray(jnp.asarray(x, dtype), np.float64)
        start = jax.tree.map(rounded, parameters(row.shapes))
        drawn = jax.tree.map(rounded, drawn_gradients(row))
        truth = path_of_paper(row, drawn, start)
        params = jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), start)
        gradients = jax.tree.map(lambda *xs, dtype=dtype: jnp.asarray(np.stack(xs), dtype), *drawn)
        largest = max(float(np.abs(x).max()) for x in truth.values())
        errors[f"rounding {name}"] = float(jnp.finfo(dtype).eps) * largest / reach(truth, start)
        ours = row.ours(**row.arguments)
        errors[f"jgd {name}"] = error(path_of(ours, gradients, params), truth, start)
        if row.peer is not None:
            theirs = path_of(row.peer(**row.arguments), gradients, params)
            errors[f"optax {name}"] = error(theirs, truth, start)
        if row.name in TORCH:
            build = TORCH[row.name]
            exact = path_of_torch(build, drawn, start, torch.float64)
            errors[f"torch {name}"] = error(
                path_of_torch(build, drawn, start, torch_dtype), exact, start
            )
        if name == "bfloat16":
            for wrapper in (jgd.compensated, jgd.master_weights):
                path = path_of(wrapper(ours), gradients, params)
                errors[wrapper.__name__] = error(path, truth, start)
    return errors


LIBRARIES = ("jgd", "optax", "torch")
COLUMNS = [
    *(f"{library} float32" for library in LIBRARIES),
    *(f"{library} bfloat16" for library in LIBRARIES),
    "compensated",
    "master_weights",
]


def remark(name: str, errors: dict[str, float]) -> str:
    """Return why jgd's error exceeds the better of the other libraries, or an empty text."""
    remarks = []
    for dtype in ("float32", "bfloat16"):
        others = [errors[f"{one} {dtype}"] for one in LIBRARIES[1:] if f"{one} {dtype}" in errors]
        ours, best = errors[f"jgd {dtype}"], min(others, default=np.inf)
        rounding = errors[f"rounding {dtype}"]
        if rounding > 0.5:
            remarks.append(f"the path is shorter than two roundings in {dtype}")
        elif ours > 1.1 * best and ours - best <= 4 * rounding:
            remarks.append(f"{dtype}: four roundings of a parameter at most")
        elif ours > 1.1 * best:
            remarks.append(EXPLANATIONS.get(name, f"{dtype}: not explained"))
    return "; ".join(remarks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [row.name for row in FIRST]
    parser.add_argument("--optimizers", nargs="+", choices=names, default=names, metavar="NAME")
    options = parser.parse_args()
    cells = [["optimizer", *COLUMNS, "remark"], ["---", *["---:"] * len(COLUMNS), "---"]]
    for row in FIRST:
        if row.name in options.optimizers:
            errors = errors_of(row)
            shown = [f"{errors[c]:.1e}" if c in errors else "" for c in COLUMNS]
            cells.append([row.name, *shown, remark(row.name, errors)])
            print(" | ".join(cells[-1]), file=sys.stderr, flush=True)
    print("\n".join(f"| {' | '.join(line)} |" for line in cells))


if __name__ == "__main__":
    main()
