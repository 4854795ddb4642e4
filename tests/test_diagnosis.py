"""Verdicts on gradient descent of a w^2 / 2, on synthetic noisy curves, and on lanes of sweeps."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jgd
from jgd import diagnosis
from jgd.tuning import console
from jgd.tuning.events import decode, encode


def _descent(rate, curvature, steps):
    """Return losses and strides of gradient descent on curvature w^2 / 2 from w = 1."""
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
    verdicts = dict(zip(rates, _verdict(losses, strides), strict=True))
    for rate in too_small:
        assert verdicts[rate] == "too small", rate
    for rate in good:
        assert verdicts[rate] == "good", rate
    for rate in too_large:
        assert verdicts[rate] in ("oscillating", "diverged"), rate
    assert verdicts[10.0] == "diverged"
    # Between 1/a and 2/a the parameter jumps across the minimum while the loss falls.
    assert verdicts[1.3] == "good"
    assert verdicts[1.99] == "oscillating"


def _synthetic(kind, rng, steps=400):
    """Return a curve of a kind, with noise of up to a twentieth of its start."""
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


def test_synthetic_noisy_curves():
    """At least 95 per cent of 200 verdicts are right, without any strides."""
    rng = np.random.default_rng(0)
    kinds = [diagnosis.VERDICTS[i % 4] for i in range(200)]
    curves = np.stack([_synthetic(kind, rng) for kind in kinds], axis=1)
    verdicts = _verdict(curves)
    right = verdicts == np.array(kinds)
    assert right.mean() >= 0.95, [(k, v) for k, v in zip(kinds, verdicts, strict=True) if k != v]


def test_a_loss_that_does_not_recover_has_diverged():
    steps = np.arange(300)
    spike = np.where(steps == 3, 50.0, np.where(steps < 3, 2.3, 2.25))
    assert _verdict(spike) == "diverged"
    for length in (50, 300):  # an early spike that takes some steps to end
        decay = 20 * np.exp(1 - np.maximum(steps[:length], 1) / 3) * (steps[:length] > 0)
        assert _verdict(2.3 + decay) == "diverged"
    assert _verdict(np.where(steps == 200, np.nan, 0.1)) == "diverged"
    assert _verdict(np.where(steps == 3, 50.0, 2.3 * np.exp(-steps / 5))) == "good"


def _spiked(steps, at):
    """Return a loss that falls from chance level, jumps to 20 and then stays at chance level."""
    t = np.arange(steps) / steps
    return np.select(
        [np.arange(steps) == int(at * steps), t < at], [20.0, 2.3 * np.exp(-t / at)], 2.3
    )


@pytest.mark.parametrize("steps", [20, 100, 1000, 5000])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_loss_that_climbs_back_has_diverged_and_a_high_plateau_is_too_small(steps, noise):
    t = np.arange(steps) / steps
    noisy = lambda curve: curve + noise * np.random.default_rng(0).normal(size=steps)
    fell = 0.05 ** (2 * t)  # to a twentieth at half-time
    for back in (0.05 + 0.95 * (2 * t - 1), 0.05 ** (2 - 2 * t)):
        assert _verdict(noisy(2.3 * np.where(t < 0.5, fell, back))) == "diverged"
    assert _verdict(noisy(2.3 * np.where(t < 0.25, fell**2, 0.05))) == "good"
    for height in (0.85, 0.9, 0.95):
        assert _verdict(noisy(2.3 * (height + (1 - height) * np.exp(-30 * t)))) == "too small"
    for at in (0.1, 0.3, 0.6, 0.8):
        assert _verdict(noisy(_spiked(steps, at))) == "diverged", at
    assert _verdict(noisy(np.where(t == 0.1, 20.0, 2.3 * np.exp(-30 * t)))) == "good"


def test_noise_of_single_examples_has_not_diverged():
    """The first loss may be small by chance, and the greatest many times the mean."""
    rng, t = np.random.default_rng(1), np.arange(2000) / 2000
    noise = rng.chisquare(1, (2000, 200)) * (0.1 + np.exp(-20 * t))[:, None]
    verdicts = _verdict(noise, np.full_like(noise, 1e-4))
    assert (verdicts == "diverged").mean() <= 0.02


def run_along(curves):
    """Return a run whose loss at step k is number k of its setting, and a setting per curve."""
    run = jgd.Run(
        init=lambda setting, key: jnp.int32(0),
        update=lambda setting, state, batch: (state + 1, {"loss": setting[state]}),
        evaluate=lambda setting, state: {"error": setting[state - 1]},
        batch=lambda step: step,
    )
    return run, {"run": jnp.asarray(np.stack(curves), jnp.float32)}


ENDS = {
    "cut": dict(halving=jgd.successive_halving(2, 100), seeds=2, width=2),
    "out of budget": dict(budget=2 * 8 * 120, width=8, report_every=60),
    "stopped early": dict(stop=jgd.stopping.early_stopping(1, min_delta=1e9), report_every=200),
}


@pytest.mark.parametrize("ended", ENDS)
def test_a_lane_that_ended_early_is_judged_by_its_own_steps(ended, tmp_path):
    """A lane that ended at any step has the verdict of a training with that many steps."""
    t = np.arange(100) / 100
    curves = {
        "good": np.exp(-50 * t),
        "too small": np.exp(-0.5 * t),
        "oscillating": 1 + 0.5 * (-1.0) ** np.arange(100),
        "diverged": np.where(t < 0.5, 0.05 ** (2 * t), 0.05 ** (2 - 2 * t)),
    }
    curves |= {f"{kind} 2": 3 * curve for kind, curve in curves.items()}
    kinds = list(curves)
    losses = [np.concatenate([c, np.full(700, c[-1])]) for c in curves.values()]
    if ended != "cut":  # these lanes end after 120 or 400 steps
        losses = [np.repeat(c, 4)[3:] for c in losses]
    run, settings = run_along(losses)
    result = jgd.sweep(run, settings, 800, folder=tmp_path / "run", **ENDS[ended])
    assert ended in {row["ended"] for row in result.rows}
    for row in result.rows:
        curve = losses[row["setting"]][: row["at"]]
        assert row["verdict"] == _verdict(curve), (kinds[row["setting"]], row)
        if row["ended"] == "cut" and row["at"] == 100:
            assert kinds[row["setting"]].startswith(row["verdict"])
    assert len({row["verdict"] for row in result.rows}) > 1
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    events = [decode(line, result.plan) for line in lines]
    assert [encode(event) for event in events] == lines
    again = jgd.sweep(run, settings, 800, folder=tmp_path / "run", resume=True, **ENDS[ended])
    assert repr(again.rows) == repr(result.rows)


def test_a_run_may_have_no_verdicts():
    run, settings = run_along([np.ones(8), np.full(8, np.nan)])
    for verdict in (True, False):
        result = jgd.sweep(run._replace(verdict=verdict), settings, 8, report_every=4)
        assert [row["verdict"] for row in result.rows] == (
            ["too small", "diverged"] if verdict else ["", ""]
        )
        terminal = Console(file=io.StringIO(), width=200)
        console.print_result(terminal, result, 2)
        for word in ("diverged", "oscil", "verdict"):
            assert (word in terminal.file.getvalue()) == verdict


def test_noise_of_the_batches_is_not_attributed_to_tiny_steps():
    rng = np.random.default_rng(0)
    noisy = 2.3 + 0.4 * rng.normal(size=500) - 0.1 * np.arange(500) / 500
    assert _verdict(noisy, np.full(500, 1e-4)) == "too small"
    assert _verdict(noisy, np.full(500, 0.5)) == "oscillating"


def _line_batch(batch_size, rates, steps, lanes=40):
    """Return the verdicts on linear regression with mini-batches: for each rate, one per seed."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)).astype(np.float32)
    y = (x @ rng.normal(size=5) + 0.5 * rng.normal(size=400)).astype(np.float32)
    loss = lambda params, batch: jnp.mean((batch[0] @ params - batch[1]) ** 2)
    batch = jgd.minibatches((x, y), batch_size, jax.random.key(0))
    init = lambda key: jax.random.normal(key, (5,))
    task = jgd.Task(init, loss, batch, lambda params: {"loss": loss(params, (x, y))})
    settings = jgd.grid(jgd.sgd, learning_rate=rates)
    reports = jgd.iter_sweep(task, settings, steps, seeds=lanes, width=lanes, report_every=steps)
    return [diagnosis.verdict(report.statistics, steps).tolist() for report in reports]


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
        by_rate = _line_batch(batch_size, list(expected), steps)
        for (rate, verdict), verdicts in zip(expected.items(), by_rate, strict=True):
            assert verdicts.count(verdict) >= 38, (rate, steps, verdict, verdicts)


def test_a_rising_loss_has_diverged():
    steps = np.arange(400) / 400
    for curve in (1 + 0.9 * steps, 4 - 1.7 * np.exp(-5 * steps), np.abs(1 - 2.8 * steps)):
        assert _verdict(curve) == "diverged"


def test_the_final_loss_of_a_square_is_not_negative():
    losses = np.float32(100.0) * 0.5 ** np.arange(400, dtype=np.float32)
    statistics = diagnosis.of_curve(losses)
    np.testing.assert_allclose(statistics.final_loss, losses[-40:].mean(), rtol=1e-5)


def test_lanes_are_independent_and_sums_are_the_same_inside_jit():
    curves = np.stack([_descent(rate, 1.0, 50)[0] for rate in (0.01, 0.5, 3.0)], axis=1)
    together = _verdict(curves)
    assert [str(v) for v in together] == [str(_verdict(c)) for c in curves.T]
    observe, close = jax.jit(diagnosis.observe), jax.jit(diagnosis.close_interval)
    ends = diagnosis.interval_ends([50])
    sums, index = diagnosis.no_losses(len(ends)), 0
    for step in range(50):
        sums = observe(sums, curves[step, 1], np.nan, step)
        if step + 1 == ends[index]:
            sums, index = close(sums, index), index + 1
    ours, expected = diagnosis.statistics(sums, ends, 50), diagnosis.of_curve(curves[:, 1])
    for name, value in expected._asdict().items():
        np.testing.assert_allclose(getattr(ours, name), value, rtol=1e-4, atol=1e-6, err_msg=name)
