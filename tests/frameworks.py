"""Paths of parameters under Keras, PyTorch and jgd, and the distance between two paths."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch

torch.set_num_threads(1)  # the tensors are small, and pytest-xdist runs a worker per core

SHAPES = {"scalar": (), "matrix": (6, 4), "kernel": (2, 3, 4, 5)}
STEPS = 200
PULL = 0.05  # gradients contain this multiple of the parameters, so that they depend on the path


def problem(shapes=None, steps=STEPS, seed=0):
    """Return parameters, and stacked gradients of sizes from 1e-5 to 1e2 with exact zeros."""
    rng = np.random.default_rng(seed)
    shapes = SHAPES if shapes is None else shapes
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    noise = {}
    for name, shape in shapes.items():
        size = 10 ** rng.uniform(-5, 2, size=shape)
        drawn = size * rng.normal(size=(steps, *shape))
        noise[name] = drawn * (rng.uniform(size=drawn.shape) > 0.05)
    return params, noise


def jgd_path(tx, params, noise):
    """Return the parameters after each step of a jgd optimizer."""

    def step(carry, drawn):
        params, state = carry
        grads = jax.tree.map(lambda n, p: n + PULL * p, drawn, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = jax.tree.map(jnp.asarray, params)
    return jax.jit(lambda noise: jax.lax.scan(step, (params, tx.init(params)), noise)[1])(noise)


def keras_path(optimizer, params, noise):
    """Return the parameters after each step of a Keras optimizer."""
    names = list(params)
    variables = [keras.Variable(params[n], dtype="float64", name=n) for n in names]
    optimizer.build(variables)

    def step(carry, drawn):
        values, slots = carry
        grads = [drawn[n] + PULL * p for n, p in zip(names, values, strict=True)]
        values, slots = optimizer.stateless_apply(slots, grads, values)
        return (values, slots), dict(zip(names, values, strict=True))

    start = [v.value for v in variables], [v.value for v in optimizer.variables]
    return jax.jit(lambda noise: jax.lax.scan(step, start, noise)[1])(noise)


def torch_path(make, params, noise, schedulers=(), clip=None):
    """Return the parameters after each step of a PyTorch optimizer.

    `make` creates it from a list of parameters, and each of `schedulers` a scheduler from it.
    """
    names = list(params)
    tensors = [torch.nn.Parameter(torch.tensor(params[n])) for n in names]
    optimizer = make(tensors)
    running = [scheduler(optimizer) for scheduler in schedulers]
    path = []
    for k in range(len(noise[names[0]])):
        for n, p in zip(names, tensors, strict=True):
            p.grad = torch.tensor(noise[n][k]) + PULL * p.detach()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(tensors, clip)
        optimizer.step()
        for scheduler in running:
            scheduler.step()
        path.append([p.detach().numpy().copy() for p in tensors])
    return {n: np.stack(values) for n, values in zip(names, zip(*path, strict=True), strict=True)}


def distance(ours, theirs, params):
    """Return the largest distance of two paths relative to the length so far, by coordinate."""
    worst = 0.0
    for name, start in params.items():
        own, expected = np.asarray(ours[name]), np.asarray(theirs[name])
        steps = np.abs(np.diff(expected, axis=0, prepend=np.asarray(start)[None]))
        length = np.cumsum(steps, axis=0)
        gap = np.abs(own - expected) / np.maximum(length, 1e-12)
        assert np.isfinite(gap).all(), name
        worst = max(worst, float(gap.max()))
    return worst
