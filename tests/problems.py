"""Three small problems, and the loss that each optimizer reaches on them.

For each optimizer and problem, `FINAL_LOSSES` has the learning rate that was the best of a grid of
33 over 120 steps, with defaults for all other numbers, and the final loss: the largest for rates
within 0.1 per cent of this rate.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jgd

STEPS = 120
SCALES = np.geomspace(1.0, 1e3, 15)
START = np.random.default_rng(1).normal(size=15)
POINTS = np.random.default_rng(0).normal(size=(64, 6)) * np.geomspace(1.0, 0.05, 6)
OPTIMUM = 0.184071056442733  # least loss of the logistic regression, by BFGS up to 1e-12
LABELS = POINTS @ np.array([1.0, -2.0, 3.0, -4.0, 5.0, -6.0]) > 0.2


def quadratic(p: Any) -> Any:
    """Return a quadratic with condition number 1,000, of a matrix and a vector."""
    x = jnp.concatenate([p["w"].ravel(), p["b"]])
    return jnp.sum(SCALES * x**2) / 2


def rosenbrock(p: Any) -> Any:
    """Return Rosenbrock's function: a curved valley, flat along and steep across."""
    x, y = p["x"]
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def logistic(p: Any) -> Any:
    """Return the loss above the optimum of a logistic regression on badly scaled features."""
    logits = POINTS @ p["w"] + p["b"]
    penalty = 1e-3 * (jnp.sum(p["w"] ** 2) + p["b"] ** 2)
    return jnp.mean(jnp.logaddexp(0, jnp.where(LABELS, -logits, logits))) + penalty - OPTIMUM


PROBLEMS = {
    "quadratic": (quadratic, {"w": START[:12].reshape(4, 3), "b": START[12:]}),
    "rosenbrock": (rosenbrock, {"x": np.array([-1.2, 1.0])}),
    "logistic": (logistic, {"w": np.full(6, 0.1), "b": np.array(0.1)}),
}


def final_loss(tx: Any, problem: str) -> Any:
    """Return the loss after `STEPS` steps, at the averaged iterates of schedule-free optimizers."""
    loss, start = PROBLEMS[problem]
    start = jax.tree.map(jnp.asarray, start)

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params, value=value)
        return (jax.tree.map(jnp.add, params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (start, tx.init(start)), length=STEPS)
    if repr(tx).startswith("schedule_free"):
        params = jgd.schedule_free_eval_params(state, params)
    return loss(params)


FINAL_LOSSES = {  # (rate, loss) for each of PROBLEMS in their order; losses are at least 1e-8
    "adagrad": [(178, 1e-08), (1.78, 0.00097), (5.62, 1.7e-08)],
    "adam": [(0.1, 0.00023), (0.562, 0.079), (0.316, 1.7e-07)],
    "adamax": [(0.1, 0.0001), (1.78, 0.12), (0.316, 1.3e-07)],
    "adamw": [(0.1, 0.00023), (0.562, 0.079), (0.316, 1.4e-07)],
    "amsgrad": [(0.562, 8.9e-05), (1, 0.15), (0.562, 5.7e-08)],
    "momentum": [(0.00178, 0.0015), (0.00178, 0.0046), (3.16, 9e-07)],
    "nadam": [(1, 1e-08), (1, 0.049), (3.16, 1e-08)],
    "nesterov": [(0.001, 0.013), (0.00178, 0.01), (10, 1e-08)],
    "noisy_sgd": [(0.00178, 1.1), (0.00562, 0.34), (3.16, 0.011)],
    "rmsprop": [(0.01, 0.066), (0.316, 0.87), (0.0562, 9.8e-05)],
    "sgd": [(0.00178, 1.1), (0.00562, 0.17), (17.8, 1.9e-08)],
    "adabelief": [(0.178, 0.00023), (0.562, 0.091), (0.178, 3e-07)],
    "adamaxw": [(0.1, 0.0001), (1.78, 0.13), (1, 1.1e-07)],
    "adan": [(0.562, 1e-08), (0.562, 0.037), (5.62, 1e-08)],
    "ademamix": [(0.178, 0.00032), (0.562, 0.064), (1.78, 2.3e-07)],
    "nadamw": [(1000, 1e-08), (1, 0.05), (1.78, 1e-08)],
    "radam": [(0.00316, 15), (0.00562, 4.3), (5.62, 5.2e-07)],
    "yogi": [(0.178, 0.00017), (0.562, 0.083), (0.178, 3.9e-07)],
    "adadelta": [(5.62, 0.11), (56.2, 1.5), (31.6, 8.8e-06)],
    "adopt": [(0.0562, 0.00022), (3.16, 0.0089), (1, 1.8e-07)],
    "laprop": [(0.178, 1.1e-05), (1, 0.00041), (0.562, 5e-08)],
    "lion": [(0.0178, 1.3), (0.0178, 0.25), (0.178, 0.0014)],
    "rprop": [(0.1, 1e-08), (1.78, 1.1), (178, 1e-08)],
    "sign_sgd": [(0.01, 0.045), (0.00316, 3.8), (0.0562, 0.00031)],
    "signum": [(0.01, 0.38), (0.0562, 0.85), (0.0562, 0.00061)],
    "fromage": [(0.562, 1e-08), (0.316, 0.49), (0.1, 0.0026)],
    "lamb": [(0.316, 4e-05), (0.562, 1), (0.0562, 0.0045)],
    "lars": [(100, 0.00064), (10, 0.19), (10, 0.00024)],
    "novograd": [(0.00562, 0.0064), (0.00562, 0.015), (0.0178, 1.7e-05)],
    "adafactor": [(1.78, 5.1e-08), (1, 0.4), (0.178, 1.3e-05)],
    "sm3": [(1.78, 0.00014), (3.16, 0.15), (10, 2.3e-07)],
    "muon": [(0.0316, 0.13), (1, 0.049), (3.16, 1e-08)],
    "shampoo": [(31.6, 1e-08), (1, 0.42), (3.16, 1e-08)],
    "soap": [(31.6, 1e-08), (0.316, 0.027), (3.16, 2e-05)],
    "ftrl": [(31.6, 1e-08), (1.78, 0.001), (5.62, 2.2e-08)],
    "madgrad": [(0.0178, 0.00019), (0.1, 0.0031), (31.6, 8.8e-08)],
    "dadapt_adamw": [(1.78, 0.00079), (316, 0.0024), (1, 1.9e-06)],
    "dog": [(1.78, 4.4), (3.16, 3.9), (3.16, 9.3e-08)],
    "dowg": [(0.562, 1.1), (1.78, 3.2), (0.562, 2.3e-07)],
    "polyak_sgd": [(0.316, 0.032), (0.562, 0.017), (316, 1e-08)],
    "prodigy": [(1.78, 0.0035), (17.8, 0.0087), (3.16, 1.1e-06)],
    "schedule_free_adamw": [(1, 1e-08), (1.78, 0.00033), (3.16, 1e-08)],
    "schedule_free_sgd": [(0.01, 0.1), (0.00562, 0.35), (178, 3e-08)],
}
