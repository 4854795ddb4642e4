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
    """What a sweep would have found, without one."""
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
    assert time.perf_counter() - started < 60  # a line each took minutes
    assert [path.name for path in paths] == ["sensitivity.png", "curves.png", "ranges.png"]
    (panel,) = plots.plot_sensitivity(result).axes
    assert len(panel.lines[0].get_xdata()) == (1 if settings == 1 else plots.POINTS / 2)
    drawn = plots.plot_curves(result).axes[0]
    drawn.collections[0].update_scalarmappable()
    assert len(np.unique(drawn.collections[0].get_colors(), axis=0)) >= min(settings, 200)
    assert len(drawn.collections[0].get_segments()) == min(2 * settings, plots.LINES)
    assert [text.get_text() for text in drawn.texts] == ["1,000 of 20,000 lanes"] * (settings > 1)


def test_the_best_among_neighbours_is_shown():
    result = _result(10_000)
    points = plots._points(result, result.plan.groups[0])
    losses = result.curves["adam"].metrics["loss"][:, -1]
    assert points.mean.min() == losses.min()
    assert (np.diff(points.x) > 0).all()


def test_ranges_of_what_is_as_good():
    values = np.tile(
        np.array([[5.0, 5], [1.0, 1.2], [1.1, 1.1], [0.9, 1.1], [4, 4]]).reshape(-1, 1), 20
    )
    result = _result(5, seeds=2, values=values)
    (found,) = plots.ranges(result)
    rates = np.geomspace(1e-4, 1, 5)
    np.testing.assert_allclose([found.best, found.low, found.high], rates[[3, 1, 3]])


def _bowl(groups, steps=20, **options):
    """Sweep rates on a parabola: 1 is best, and far above it all diverges."""
    loss = lambda w, batch: w**2 / 2
    evaluate = lambda w: {"loss": w**2 / 2, "accuracy": 1 - w**2, "sharpness": w**2}
    task = jgd.Task(lambda key: jnp.ones(()), loss, lambda step: (), evaluate)
    return jgd.sweep(task, groups, steps, **options)


PLOTS = (plots.plot_sensitivity, plots.plot_curves, plots.plot_ranges, plots.plot_sharpness)


def _texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.mark.parametrize("drop", [False, True])
def test_pictures_say_that_all_lanes_diverged(drop):
    wild = jgd.grid(jgd.sgd, learning_rate=[1e30, 1e33])
    result = _bowl({"sgd": wild}, metric="loss", drop_diverged=drop, report_every=4)
    for plot in PLOTS:
        assert "all lanes diverged" in _texts(plot(result)), plot
    tame = jgd.grid(jgd.sgd, learning_rate=[0.1, 1.0])
    result = _bowl({"tame": tame, "wild": wild}, metric="loss", drop_diverged=drop, report_every=4)
    for plot in PLOTS:
        texts = _texts(plot(result))
        assert len({"wild: all lanes diverged", "all lanes diverged"} & set(texts)) == 1, plot
    alone = _bowl({"sgd": jgd.grid(functools.partial(jgd.sgd, 0.1), momentum=[None])})
    assert "no number varies" in _texts(plots.plot_sensitivity(alone))
    assert not any("diverged" in text for plot in PLOTS[:3] for text in _texts(plot(alone)))


def test_pictures_say_what_the_curve_is_the_best_over_and_which_end_is_best():
    rates = np.geomspace(1e-4, 1e-2, 5)
    lanes = jgd.grid(jgd.adam, learning_rate=rates, b1=[0.5, 0.9], eps=[1e-8, 1e-4], b2=[0.99])
    for groups, over in (
        ({"adam": lanes, "sgd": jgd.grid(jgd.sgd, learning_rate=rates)}, ", best over b1, eps"),
        ({"sgd": jgd.grid(jgd.sgd, learning_rate=rates)}, ""),
    ):
        result = _bowl(groups)
        (panel,) = plots.plot_sensitivity(result).axes
        assert panel.get_title() == f"after 20 steps{over}"
        assert panel.get_ylabel() == "held-out accuracy, higher is better"
        assert plots.plot_ranges(result).axes[0].get_xlabel().endswith(f"as good{over}")
        assert f"{next(iter(groups))}: at the edge, too small" in _texts(
            plots.plot_sensitivity(result)
        )
    inside = _bowl({"sgd": jgd.grid(jgd.sgd, learning_rate=[0.1, 1.0, 1.5])}, steps=40)
    assert [found.remark for found in plots.ranges(inside)] == [""]
    assert not any("edge" in text for text in _texts(plots.plot_sensitivity(inside)))


def test_axes_of_about_one_decade_have_readable_ticks():
    result = _bowl({"sgd": jgd.grid(jgd.sgd, learning_rate=np.geomspace(1e-3, 1e-2, 5))})
    one, other = plots.plot_sensitivity(result), plots.plot_curves(result)
    for figure, axis in ((one, one.axes[0].xaxis), (other, other.axes[-1].yaxis)):
        figure.draw_without_rendering()
        ticks = {text.get_text() for text in axis.get_ticklabels() if text.get_text()}
        assert {"0.001", "0.002", "0.005", "0.01"} <= ticks


def test_colours_are_told_apart_without_red_or_green():
    """Seen by eyes without green cones (Machado et al. 2009), any two of six differ."""
    blind = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    seen = np.array([blind @ np.array(matplotlib.colors.to_rgb(c)) for c in plots._COLORS[:6]])
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + 9 * np.eye(6)
    assert apart.min() > 0.15
