"""Every numeric argument of every public factory: a lane, and differentiable.

The factories and their arguments are found from the signatures, none is left out by name.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgd
from jgd.arguments import Spec

# An argument of any factory is given the number of its name, chosen away from kinks.
NUMBERS = {
    "alpha": 0.1,
    "b1": 0.8,
    "b2": 0.97,
    "boundaries": [3.4, 7.2],
    "boundaries_and_scales": ([3.4, 7.2], [0.5, 0.3]),
    "cosine_kwargs": [
        dict(init_value=0.1, peak_value=1.0, warmup_steps=2.3, decay_steps=5.6, end_value=0.2),
        dict(init_value=0.2, peak_value=0.7, warmup_steps=1.3, decay_steps=4.6, exponent=1.3),
    ],
    "decay": 0.9,
    "decay_rate": 0.7,
    "decay_steps": 11.37,
    "div_factor": 20.0,
    "end_value": 0.15,
    "eps": 1e-2,
    "eps_root": 1e-2,
    "exponent": 1.3,
    "final_div_factor": 30.0,
    "init_value": 0.6,
    "initial_accumulator_value": 0.2,
    "initial_scale": 0.3,
    "learning_rate": 0.1,
    "momentum": 0.85,
    "pct_final": 0.87,
    "pct_start": 0.31,
    "peak_value": 1.1,
    "power": 1.7,
    "schedules": [lambda step: 0.3 + step, jgd.linear_schedule(1.0, 0.5, 6.2), lambda step: 0.1],
    "stable_steps": 4.1,
    "start": 0.1,
    "step_size": 0.5,
    "step_size_fn": 0.3,
    "transition_begin": 1.43,
    "transition_steps": 8.7,
    "value": 0.4,
    "values": [1.0, 0.4, 0.2],
    "warmup_steps": 3.6,
    "weight_decay": 0.1,
}
STRUCTURE = {"interpolate_type": "cosine"}
STEPS = 12
SHAPES = {"w": (3, 2), "zero": (4,), "s": ()}


def _factories():
    for name in jgd.__all__:
        spec = getattr(getattr(jgd, name), "__jgd_spec__", None)
        if isinstance(spec, Spec):
            yield name, spec


def _cases():
    for name, spec in _factories():
        for argument, kind in spec.kinds.items():
            if kind.name in ("number", "numbers"):
                yield name, argument


def _settings(spec):
    """All numeric arguments at once, and structure where it has no default."""
    arguments = {}
    for argument, kind in spec.kinds.items():
        if kind.name in ("number", "numbers"):
            arguments[argument] = NUMBERS[argument]
        elif spec.signature.parameters[argument].default is inspect.Parameter.empty:
            arguments[argument] = STRUCTURE[argument]
    if spec.name == "join_schedules":
        arguments["boundaries"] = [3.4, 7.2]
    return arguments


def _total(value):
    """A scalar that everything a value does goes into."""
    if not isinstance(value, tuple):
        weights = jnp.sin(1.0 + jnp.arange(2 * STEPS))
        return jnp.sum(weights * jax.vmap(value)(jnp.arange(2 * STEPS)))
    rng = np.random.default_rng(0)
    draw = lambda n: {name: rng.normal(size=(n, *shape)) for name, shape in SHAPES.items()}
    params, gradients = jax.tree.map(jnp.asarray, (jgd.lane(draw(1), 0), draw(STEPS)))
    for tree in (params, gradients):
        tree["zero"] = jnp.zeros_like(tree["zero"])  # a pixel that is always black

    def step(carry, indexed):
        params, state = carry
        index, gradient = indexed
        updates, state = value.update(gradient, state, params)
        seen = sum(jnp.sum(jnp.sin((index + 1) * u)) for u in jax.tree.leaves(updates))
        return (jax.tree.map(jnp.add, params, updates), state), seen

    start = params, value.init(params)
    return jnp.sum(jax.lax.scan(step, start, (jnp.arange(STEPS), gradients))[1])


@pytest.mark.parametrize(("name", "argument"), list(_cases()))
def test_every_number_is_a_lane_and_differentiable(name, argument, float64):
    factory, spec = getattr(jgd, name), getattr(jgd, name).__jgd_spec__
    arguments = _settings(spec)
    leaves, structure = jax.tree.flatten(arguments[argument], is_leaf=callable)
    numeric = [i for i, leaf in enumerate(leaves) if not callable(leaf)]
    if not numeric:  # a list of schedules: the numbers are theirs
        leaves = jax.tree.leaves([leaf for leaf in leaves if not inspect.isfunction(leaf)])
        assert leaves
        value = factory(**arguments)
        assert np.isfinite(jax.tree.leaves(jax.grad(_total)(value))).all()
        return

    def total(vector):
        mixed = list(leaves)
        for place, number in zip(numeric, vector, strict=True):
            mixed[place] = number
        return _total(factory(**{**arguments, argument: structure.unflatten(mixed)}))

    point = np.array([float(leaves[i]) for i in numeric])
    lanes = jnp.stack([point, 0.93 * point])
    together = jax.jit(jax.vmap(total))(lanes)
    solo = [jax.jit(lambda lane=lane: total(list(lane)))() for lane in np.asarray(lanes)]
    np.testing.assert_allclose(together, solo, rtol=1e-9)

    gradient = np.asarray(jax.jit(jax.grad(total))(jnp.asarray(point)))
    step = 1e-6 * np.abs(point)
    nudges = np.concatenate([np.diag(step), -np.diag(step)])
    ends = np.asarray(jax.jit(jax.vmap(total))(jnp.asarray(point + nudges)))
    n = len(point)
    differences = (ends[:n] - ends[n:]) / (2 * step)
    np.testing.assert_allclose(gradient, differences, rtol=1e-5, atol=1e-8)
    continuous = not (name.startswith("piecewise_constant") and argument == "boundaries")
    if continuous and n == 1 and together[0] != together[1]:
        assert gradient[0] != 0


def test_the_enumeration_sees_them_all():
    assert len(list(_factories())) >= 60
    assert len(list(_cases())) >= 130
