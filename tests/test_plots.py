"""The pictures of a sweep, from one setting to ten thousand."""

import functools
import time

import jax.numpy as jnp
import matplotlib.colors
import matplotlib.text
import numpy as np
import pytest

import jgd
from jgd.tuning import plots
from jgd.tuning.ledger import Ledger
from jgd.tuning.options import SweepOptions
from jgd.tuning.plan import make_plan
from jgd.tuning.result import Best, Curves, Result


def _result(settings, seeds=1, values=None, **options):
    """Return the result of a sweep over learning rates, with made-up curves."""
    rates = np.geomspace(1e-4, 1, settings)
    lanes = {"adam": jgd.grid(jgd.adam, learning_rate=rates)}
    options = SweepOptions(seeds=seeds, metric="loss", mode="min", **options)
    plan = make_plan(lanes, 100, options, metrics=["loss"], devices=1, at_once=1, task="")
    rng, steps = np.random.default_rng(0), np.array(plan.reports)
    shape = (settings * seeds, len(steps))
    level = 0.01 + np.log10(np.repeat(rates, seeds) / 0.01) ** 2
    losses = (level[:, None] + 3 / steps) * rng.uniform(0.9, 1.1, shape)
    curves = Curves(steps, losses, {"loss": losses if values is None else values})
    row = {"optimizer": "adam", "at": 100, "ended": "finished", "verdict": "good"}
    rows = [{**row, "setting": setting} for setting in range(settings)]
    best = Best(rows[0], None, None)
    return Result(rows, {"adam": curves}, best, [best], "loss", "min", plan, Ledger(plan))


@pytest.mark.parametrize("settings", [1, 10_000])
def test_pictures_of_one_and_of_ten_thousand_settings(settings, tmp_path):
    result = _result(settings, seeds=2)
    started = time.perf_counter()
    paths = plots.save_plots(result, tmp_path)
    assert time.perf_counter() - started < 60  # one matplotlib line per lane took minutes
    assert [path.name for path in paths] == ["sensitivity.png", "curves.png", "ranges.png"]
    (panel,) = plots.plot_sensitivity(result).axes
    assert len(panel.lines[0].get_xdata()) == (1 if settings == 1 else plots.POINTS / 2)
    drawn = plots.plot_curves(result).axes[0]
    drawn.collections[0].update_scalarmappable()
    assert len(np.unique(drawn.collections[0].get_colors(), axis=0)) >= min(settings, 200)
    assert len(drawn.collections[0].get_segments()) == min(2 * settings, plots.LINES)
    assert [text.get_text() for text in drawn.texts] == ["1,000 of 20,000 lanes"] * (settings > 1)


def test_the_best_among_neighbours_is_drawn():
    result = _result(10_000)
    points = plots._points(result, result.plan.groups[0])
    losses = result.curves["adam"].metrics["loss"][:, -1]
    assert points.mean.min() == losses.min()
    assert (np.diff(points.x) > 0).all()


def test_ranges_hold_the_rates_within_the_standard_error():
    values = np.tile(
        np.array([[5.0, 5], [1.0, 1.2], [1.1, 1.1], [0.9, 1.1], [4, 4]]).reshape(-1, 1), 20
    )
    result = _result(5, seeds=2, values=values)
    (shown,) = plots.ranges(result)
    rates = np.geomspace(1e-4, 1, 5)
    np.testing.assert_allclose([shown.best, shown.low, shown.high], rates[[3, 1, 3]])


def _parabola(groups, steps=20, **options):
    """Sweep learning rates on a parabola: 1 is best, and far larger ones diverge."""
    loss = lambda w, batch: w**2 / 2
    evaluate = lambda w: {"loss": w**2 / 2, "accuracy": 1 - w**2, "sharpness": w**2}
    task = jgd.Task(lambda key: jnp.ones(()), loss, lambda step: (), evaluate)
    return jgd.sweep(task, groups, steps, **options)


PLOTS = (plots.plot_sensitivity, plots.plot_curves, plots.plot_ranges, plots.plot_sharpness)


def _texts(figure):
    """Return all texts of a figure."""
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.mark.parametrize("drop", [False, True])
def test_pictures_say_that_all_lanes_diverged(drop):
    options = dict(metric="loss", drop_diverged=drop, report_every=4)
    large = jgd.grid(jgd.sgd, learning_rate=[1e30, 1e33])
    result = _parabola({"sgd": large}, **options)
    for plot in PLOTS:
        assert "all lanes diverged" in _texts(plot(result)), plot
    small = jgd.grid(jgd.sgd, learning_rate=[0.1, 1.0])
    result = _parabola({"small": small, "large": large}, **options)
    for plot in PLOTS:
        texts = _texts(plot(result))
        assert len({"large: all lanes diverged", "all lanes diverged"} & set(texts)) == 1, plot
    constant = _parabola({"sgd": jgd.grid(functools.partial(jgd.sgd, 0.1), momentum=[None])})
    assert "no number varies" in _texts(plots.plot_sensitivity(constant))
    assert not any("diverged" in text for plot in PLOTS[:3] for text in _texts(plot(constant)))


def test_labels_name_the_other_arguments_and_the_mode():
    rates = np.geomspace(1e-4, 1e-2, 5)
    lanes = jgd.grid(jgd.adam, learning_rate=rates, b1=[0.5, 0.9], eps=[1e-8, 1e-4], b2=[0.99])
    for groups, over in (
        ({"adam": lanes, "sgd": jgd.grid(jgd.sgd, learning_rate=rates)}, ", best over b1, eps"),
        ({"sgd": jgd.grid(jgd.sgd, learning_rate=rates)}, ""),
    ):
        result = _parabola(groups)
        (panel,) = plots.plot_sensitivity(result).axes
        assert panel.get_title() == f"after 20 steps{over}"
        assert panel.get_ylabel() == "held-out accuracy, higher is better"
        assert plots.plot_ranges(result).axes[0].get_xlabel().endswith(f"as good{over}")
        assert f"{next(iter(groups))}: at the edge, too small" in _texts(
            plots.plot_sensitivity(result)
        )
    inside = _parabola({"sgd": jgd.grid(jgd.sgd, learning_rate=[0.1, 1.0, 1.5])}, steps=40)
    assert [shown.remark for shown in plots.ranges(inside)] == [""]
    assert not any("edge" in text for text in _texts(plots.plot_sensitivity(inside)))


def test_axes_of_about_one_decade_have_readable_ticks():
    result = _parabola({"sgd": jgd.grid(jgd.sgd, learning_rate=np.geomspace(1e-3, 1e-2, 5))})
    sensitivity, curves = plots.plot_sensitivity(result), plots.plot_curves(result)
    for figure, axis in (
        (sensitivity, sensitivity.axes[0].xaxis),
        (curves, curves.axes[-1].yaxis),  # the colour bar
    ):
        figure.draw_without_rendering()
        ticks = {text.get_text() for text in axis.get_ticklabels() if text.get_text()}
        assert {"0.001", "0.002", "0.005", "0.01"} <= ticks


def test_colours_are_distinct_for_colour_blind_readers():
    """Any two of the first six differ without green cones (Machado et al. 2009)."""
    blind = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    colors = np.array([blind @ np.array(matplotlib.colors.to_rgb(c)) for c in plots._COLORS[:6]])
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 9 * np.eye(6)
    assert distances.min() > 0.15
