"""The sharpness of a loss, and the edge of stability of gradient descent that it sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgd
from jgd.diagnosis import sharpness
from jgd.tuning import plots


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sharpness_is_the_largest_eigenvalue(sign):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(12, 12))
    a = sign * (a @ a.T).astype(np.float32)
    loss = lambda p: 0.5 * jnp.concatenate([p["x"], p["y"]]) @ a @ jnp.concatenate([p["x"], p["y"]])
    params = {"x": jnp.asarray(rng.normal(size=5), jnp.float32), "y": jnp.ones(7)}
    ours = jax.jit(lambda p: sharpness(loss, p, jax.random.key(1), 200))(params)
    eigenvalues = np.linalg.eigvalsh(a)
    np.testing.assert_allclose(ours, eigenvalues[np.abs(eigenvalues).argmax()], rtol=1e-4)


def test_a_loss_without_curvature_has_sharpness_zero():
    assert sharpness(lambda p: jnp.sum(p), jnp.ones(3), jax.random.key(0)) == 0


def _quartic():
    """Return a task with the loss 3 (w^2 - 1)^2 / 4, whose curvature grows towards w = 1."""
    loss = lambda w, batch: 0.75 * jnp.sum((w**2 - 1) ** 2)
    return jgd.Task(
        init=lambda key: jnp.full((1,), 0.3),
        loss=loss,
        batch=lambda step: step,
        evaluate=lambda w: {"loss": loss(w, None)},
    )


def test_gradient_descent_oscillates_beyond_two_over_the_rate():
    lanes = {"sgd": jgd.grid(jgd.sgd, learning_rate=[0.05, 0.3, 0.36])}
    result = jgd.sweep(jgd.with_sharpness(_quartic()), lanes, 200, report_every=10)
    last = result.curves["sgd"].metrics["sharpness"][:, -1]
    np.testing.assert_allclose(last[:2], 6, rtol=1e-3)  # at the minimum w = 1
    rates = [row["learning_rate"] for row in result.rows[:2]]
    assert sorted(rates) == [0.05, 0.3]  # 2 / 0.3 is above 6, 2 / 0.36 below
    assert result.curves["sgd"].metrics["loss"][2, -1] > 1e-3
    assert plots.plot_sharpness(result).axes
    plain = jgd.sweep(_quartic(), lanes, 10)
    with pytest.raises(ValueError, match=r"sweep of learning rates with jgd\.with_sharpness"):
        plots.plot_sharpness(plain)


def test_the_full_form_of_a_loss_has_a_sharpness_as_well():
    def loss(params, model_state, batch, key, setting):
        mask = jax.random.bernoulli(key, 0.5, params.shape)
        value = jnp.sum(jnp.where(mask, 2 * params, 0) ** 2) * setting["scale"]
        return value, ({}, model_state)

    task = jgd.Task(
        init=lambda key: (jnp.ones(4), ()),
        loss=loss,
        batch=lambda step: step,
        evaluate=lambda params: {"loss": jnp.sum(params)},
    )
    make = lambda scale: {"tx": jgd.sgd(0.0), "scale": jnp.asarray(scale, float)}
    result = jgd.sweep(jgd.with_sharpness(task), jgd.grid(make, scale=[1.0, 2.0]), 4)
    sharpnesses = result.curves["setting"].metrics["sharpness"][:, 0]
    np.testing.assert_allclose(sharpnesses, [8, 16], rtol=1e-6)
