"""The verdict on gradient descent of a w^2 / 2, and on planted noisy curves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgd
from jgd import diagnosis


def _descent(rate, curvature, steps):
    """Losses and strides of full-batch descent of curvature w^2 / 2 from w = 1."""
    w, losses, strides = np.float32(1), [], []
    with np.errstate(all="ignore"):
        for _ in range(steps):
            gradient = np.float32(curvature) * w
            update = -np.float32(rate) * gradient
            losses.append(gradient * w / 2)
            strides.append(abs(gradient * update))
            w = np.float32(w + update)
    return np.array(losses), np.array(strides)


def _verdict(losses, strides=None):
    return diagnosis.verdict(diagnosis.of_curve(losses, strides), len(losses))


@pytest.mark.parametrize("steps", [20, 50, 100, 200])
@pytest.mark.parametrize("curvature", [0.037, 1.0, 100.0])
def test_rates_on_a_parabola(curvature, steps):
    too_small = (1e-9, 1e-6, 1e-4, 1e-3, 5e-3, 0.01, 0.015, 0.0199)
    good = (0.3, 0.5, 0.7, 0.99, 1.0)
    too_large = (2.0, 2.0001, 2.01, 2.1, 3.0, 10.0, 1e6)
    rates = (*too_small, *good, *too_large, 1.3, 1.99)
    curves = [_descent(rate / curvature, curvature, steps) for rate in rates]
    losses, strides = (np.stack(each, axis=1) for each in zip(*curves, strict=True))
    of = dict(zip(rates, _verdict(losses, strides), strict=True))  # a rate per lane
    for rate in too_small:
        assert of[rate] == "too small", rate
    for rate in good:
        assert of[rate] == "good", rate
    for rate in too_large:
        assert of[rate] in ("oscillating", "diverged"), rate
    assert of[10.0] == "diverged"
    # between 1/a and 2/a the parameter jumps over the valley while the loss falls
    assert of[1.3] == "good"
    assert of[1.99] == "oscillating"


def _planted(kind, rng, steps=400):
    """A curve of a kind, with noise of up to a twentieth of where it starts."""
    t = np.arange(steps) / steps
    start, floor = rng.uniform(0.5, 5.0), rng.uniform(0.0, 0.3)
    noise = start * rng.uniform(0.0, 0.05) * rng.normal(size=steps)
    if kind == "too small":
        curve = start * np.exp(-rng.uniform(0.2, 2.0) * t)
    elif kind == "good":
        curve = start * (floor + (1 - floor) * np.exp(-rng.uniform(15, 60) * t))
    elif kind == "oscillating":
        period, size = rng.integers(2, 40), rng.uniform(0.3, 0.8)
        wave = np.sin(2 * np.pi * (np.arange(steps) + 0.25) / period)
        curve = start * (0.5 + 0.5 * np.exp(-20 * t) + size * wave)
    else:
        curve = start * np.exp(np.minimum(rng.uniform(2, 200) * t, 80))
    return curve + noise


def test_planted_noisy_curves():
    """200 of them, without anything known of the steps: at least 95 per cent are right."""
    rng = np.random.default_rng(0)
    kinds = [diagnosis.VERDICTS[i % 4] for i in range(200)]
    curves = np.stack([_planted(kind, rng) for kind in kinds], axis=1)
    found = _verdict(curves)
    right = found == np.array(kinds)
    assert right.mean() >= 0.95, [(k, f) for k, f in zip(kinds, found, strict=True) if k != f]


def test_what_never_came_back_has_diverged():
    steps = np.arange(300)
    spike = np.where(steps == 3, 50.0, np.where(steps < 3, 2.3, 2.25))
    assert _verdict(spike) == "diverged"
    assert _verdict(np.where(steps == 200, np.nan, 0.1)) == "diverged"
    assert _verdict(np.where(steps == 3, 50.0, 2.3 * np.exp(-steps / 5))) == "good"


def test_noise_of_the_batches_is_not_laid_at_the_door_of_tiny_steps():
    rng = np.random.default_rng(0)
    noisy = 2.3 + 0.4 * rng.normal(size=500) - 0.1 * np.arange(500) / 500
    assert _verdict(noisy, np.full(500, 1e-4)) == "too small"
    assert _verdict(noisy, np.full(500, 0.5)) == "oscillating"


def _line_batch(batch_size, rates, steps, lanes=40):
    """For each rate, verdicts on linear regression from mini-batches, one for each seed."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)).astype(np.float32)
    y = (x @ rng.normal(size=5) + 0.5 * rng.normal(size=400)).astype(np.float32)
    loss = lambda params, batch: jnp.mean((batch[0] @ params - batch[1]) ** 2)
    batch = jgd.minibatches((x, y), batch_size, jax.random.key(0))
    init = lambda key: jax.random.normal(key, (5,))
    task = jgd.Task(init, loss, batch, lambda params: {"loss": loss(params, (x, y))})
    settings = jgd.grid(jgd.sgd, learning_rate=rates)
    reports = jgd.iter_sweep(task, settings, steps, seeds=lanes, width=lanes, report_every=steps)
    return [diagnosis.verdict(report.seen, steps).tolist() for report in reports]


@pytest.mark.parametrize(
    "batch_size",
    [4, pytest.param(16, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.slow)],
)
def test_verdicts_under_the_noise_of_batches(batch_size):
    for steps, expected in (
        (100, {3e-2: "good"}),
        (200, {0.0: "too small"}),
        (400, {3e-3: "too small"}),
        (2000, {1e-5: "too small", 3e-2: "good"}),
    ):
        seen = _line_batch(batch_size, list(expected), steps)
        for (rate, verdict), verdicts in zip(expected.items(), seen, strict=True):
            assert verdicts.count(verdict) >= 38, (rate, steps, verdict, verdicts)


def test_rising_has_diverged():
    steps = np.arange(400) / 400
    for curve in (1 + 0.9 * steps, 4 - 1.7 * np.exp(-5 * steps), np.abs(1 - 2.8 * steps)):
        assert _verdict(curve) == "diverged"


def test_the_final_loss_of_a_square_is_not_negative():
    losses = np.float32(100.0) * 0.5 ** np.arange(400, dtype=np.float32)
    seen = diagnosis.of_curve(losses)
    np.testing.assert_allclose(diagnosis.final_loss(seen, 400), losses[-40:].mean(), rtol=1e-5)


def test_lanes_do_not_see_each_other_and_jit_sees_no_numbers():
    curves = np.stack([_descent(rate, 1.0, 50)[0] for rate in (0.01, 0.5, 3.0)], axis=1)
    together = _verdict(curves)
    assert [str(v) for v in together] == [str(_verdict(c)) for c in curves.T]
    observe = jax.jit(diagnosis.observe)
    seen = diagnosis.statistics()
    for step in range(50):
        seen = observe(seen, curves[step, 1], 0.0, step, 50)
    np.testing.assert_allclose(diagnosis.final_loss(seen, 50), curves[-5:, 1].mean(), atol=1e-6)
