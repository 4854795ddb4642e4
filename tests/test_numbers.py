"""Every numeric argument of every public factory can differ between lanes and has a derivative.

The factories and their arguments are read from the signatures, so none can be forgotten.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgd
import jgd.optimizers
from jgd.calls import Spec

# argument name -> its number in every factory, away from kinks
NUMBERS = {
    "adam_b1": 0.85,
    "adam_b2": 0.96,
    "adam_eps_root": 0.01,
    "adam_learning_rate": 0.2,
    "adam_weight_decay": 0.05,
    "alpha": 0.1,
    "b1": 0.8,
    "b2": 0.97,
    "b3": 0.9,
    "beta": 0.7,
    "beta3": 0.9,
    "betas": [0.8, 0.97],
    "boundaries": [3.4, 7.2],
    "boundaries_and_scales": ([3.4, 7.2], [0.5, 0.3]),
    "clip_threshold": 0.8,
    "clipping": 0.3,
    "clipping_threshold": 0.7,
    "consistent_rms": 0.3,
    "cosine_kwargs": [
        dict(init_value=0.1, peak_value=1.0, warmup_steps=2.3, decay_steps=5.6, end_value=0.2),
        dict(init_value=0.2, peak_value=0.7, warmup_steps=1.3, decay_steps=4.6, exponent=1.3),
    ],
    "decay": 0.9,
    "decay_offset": -1.5,
    "decay_rate": 0.7,
    "decay_steps": 11.37,
    "div_factor": 20.0,
    "end_value": 0.15,
    "eps": 1e-2,
    "eps_root": 1e-2,
    "epsilon": 0.01,
    "estim_lr0": 0.01,
    "estim_lr_coef": 1.3,
    "eta": 0.3,
    "eta_minus": 0.6,
    "eta_plus": 1.3,
    "every": 2.5,
    "exponent": 1.3,
    "f_min": -0.3,
    "final_div_factor": 30.0,
    "gamma": 0.6,
    "init_estim_sq_dist": 0.02,
    "init_step": ("heuristic", 0.01),
    "init_value": 0.6,
    "initial": 4.0,
    "initial_accumulator_value": 0.2,
    "initial_scale": 0.3,
    "l1": 0.01,
    "l2": 0.02,
    "l2_shrinkage": 0.03,
    "learning_rate": 0.1,
    "learning_rate_power": -0.6,
    "lower_bound": -0.2,
    "max_delta": 0.7,
    "max_learning_rate": 0.8,
    "max_norm": 1.3,
    "max_step_size": 5.0,
    "min_norm": 0.05,
    "min_scale": 0.02,
    "min_step_size": 0.001,
    "momentum": 0.85,
    "ns_coeffs": [3.4, -4.7, 2.0],
    "optimism": 0.05,
    "pct_final": 0.87,
    "pct_start": 0.31,
    "peak_value": 1.1,
    "period": 2.5,
    "power": 1.7,
    "precondition_frequency": 2.5,
    "rho": 0.9,
    "scale": 0.4,
    "scale_factor": 0.6,
    "scaling": 0.7,
    "schedules": [lambda step: 0.3 + step, jgd.linear_schedule(1.0, 0.5, 6.2), lambda step: 0.1],
    "shampoo_beta": 0.9,
    "slow_step_size": 0.6,
    "smooth_beta": 1.7,
    "stable_steps": 4.1,
    "start": 0.1,
    "step_offset": -1.5,
    "step_size": 0.5,
    "step_size_fn": 0.3,
    "sync_period": 2.5,
    "threshold": 4.5,
    "transition_begin": 1.43,
    "transition_steps": 8.7,
    "trust_coefficient": 0.02,
    "update_interval": 2.5,
    "value": 0.4,
    "values": [1.0, 0.4, 0.2],
    "warmup_steps": 3.6,
    "weight_decay": 0.1,
    "weight_decay_rate": 0.02,
    "weight_lr_power": 1.7,
}
STRUCTURE = {
    "base": {
        "w": jnp.zeros((2, 2)),
        "dark": jnp.zeros((2, 3)),
        "s": jnp.zeros(()),
    },
    "base_optimizer": jgd.momentum(0.1),
    "default": jgd.momentum(0.1),
    "direction": jgd.ema(0.8),
    "dtype_momentum": jnp.float64,  # the default, float32, would round the differences
    "fast_optimizer": jgd.momentum(0.1),
    "first": jgd.ema(0.8),
    "groups": {"w": jgd.adam(0.1), "s": jgd.set_to_zero()},
    "inner": jgd.momentum(0.1),
    "interpolate_type": "cosine",
    "key": 0,
    "magnitude": jgd.rms(0.9, 0.01),
    "second": jgd.square(),
}
STEPS = 8
SHAPES = {"w": (3, 2), "dark": (2, 3), "s": ()}
MATRICES = ("scale_by_muon",)  # accept only matrices
LIFTED = set(jgd.optimizers.lifted.__all__)


def _factories():
    for name in jgd.__all__:
        spec = getattr(getattr(jgd, name), "__jgd_spec__", None)
        if isinstance(spec, Spec) and _numeric(spec):
            yield name


# One factory of each kind: all others take minutes to compile.
QUICK = {"adamw", "cautious", "chain", "cosine_decay_schedule", "ema", "muon", "prodigy", "sgd"}


def _marked(name):
    """Mark a factory as slow if it is not in `QUICK`."""
    return pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK))


def _numeric(spec):
    return [name for name, kind in spec.kinds.items() if name in spec.numeric()]


FACTORIES = [*_factories()]


def _settings(spec):
    """Return all numeric arguments, and the structure that has no default."""
    arguments = {name: NUMBERS[name] for name in _numeric(spec)}
    for name, parameter in spec.signature.parameters.items():
        required = parameter.default is inspect.Parameter.empty or name == "dtype_momentum"
        if name not in arguments and required:
            arguments[name] = STRUCTURE[name]
    if spec.name == "join_schedules":
        arguments["boundaries"] = [3.4, 7.2]
    return arguments


def _total(value, names=SHAPES):
    """Return a scalar that depends on all outputs of a value."""
    if not isinstance(value, tuple):
        weights = jnp.sin(1.0 + jnp.arange(2 * STEPS))
        return jnp.sum(weights * jax.vmap(value)(jnp.arange(2 * STEPS)))
    rng = np.random.default_rng(0)
    draw = lambda n: {name: rng.normal(size=(n, *SHAPES[name])) for name in names}
    params, gradients = jax.tree.map(jnp.asarray, (jgd.lane(draw(1), 0), draw(STEPS)))
    for tree in (params, gradients):
        if "dark" in names:  # an input that is always 0
            tree["dark"] = jnp.zeros_like(tree["dark"])
    extra = {"obj_fn": lambda p: sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(p))}

    def step(carry, indexed):
        params, state = carry
        index, gradient = indexed
        loss = jnp.exp(-0.1 * index)
        updates, state = value.update(gradient, state, params, value=loss, **extra)
        total = sum(jnp.sum(jnp.sin((index + 1) * u)) for u in jax.tree.leaves(updates))
        return (jax.tree.map(jnp.add, params, updates), state), total

    start = params, value.init(params)
    return jnp.sum(jax.lax.scan(step, start, (jnp.arange(STEPS), gradients))[1])


@pytest.mark.parametrize("name", list(map(_marked, FACTORIES)))
def test_every_number_is_a_lane_and_differentiable(name, float64):
    factory = getattr(jgd, name)
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        {name: x for name, x in _settings(factory.__jgd_spec__).items() if name in NUMBERS},
        is_leaf=callable,
    )
    rest = {k: x for k, x in _settings(factory.__jgd_spec__).items() if k not in NUMBERS}
    numeric = [i for i, (_, x) in enumerate(leaves) if isinstance(x, int | float)]
    labels = [jax.tree_util.keystr(leaves[i][0]) for i in numeric]

    def total(vector):
        mixed = [x for _, x in leaves]
        for place, number in zip(numeric, vector, strict=True):
            mixed[place] = number
        arguments = jax.tree.unflatten(structure, mixed)
        return _total(factory(**arguments, **rest), ["w"] if name in MATRICES else SHAPES)

    point = np.array([float(leaves[i][1]) for i in numeric])
    n, step = len(point), 1e-6 * np.abs(point)
    # per number, one lane with a large change (lane = solo) and two for the central difference
    moves = np.concatenate([-0.07 * np.diag(np.abs(point)), np.diag(step), -np.diag(step)])
    together = np.asarray(jax.jit(jax.vmap(total))(point + moves))
    lifted = name in LIFTED  # optax computes its derivatives
    # one program for values and gradient, since a second one costs a compilation
    alone = jax.jit((lambda x: (total(x), None)) if lifted else jax.value_and_grad(total))
    solo = [alone(lane)[0] for lane in (point + moves)[:n]]
    np.testing.assert_allclose(together[:n], solo, rtol=1e-9, err_msg=str(labels))
    if lifted:
        return

    gradient = np.asarray(alone(point)[1])
    differences = (together[n : 2 * n] - together[2 * n :]) / (2 * step)
    for label, exact, estimate in zip(labels, gradient, differences, strict=True):
        np.testing.assert_allclose(exact, estimate, rtol=1e-5, atol=1e-7, err_msg=label)


def test_schedules_of_schedules_are_differentiable(float64):
    """The numbers of a joined schedule are the numbers of its schedules."""
    value = jgd.join_schedules(NUMBERS["schedules"], NUMBERS["boundaries"])
    gradients = jax.tree.leaves(jax.grad(_total)(value))
    assert len(gradients) > 2
    assert np.isfinite(gradients).all()


def test_the_enumeration_finds_all_factories():
    assert len(FACTORIES) >= 120
    assert sum(len(_numeric(getattr(jgd, n).__jgd_spec__)) for n in FACTORIES) >= 380
