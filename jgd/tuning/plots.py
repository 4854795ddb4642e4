"""Plots of a sweep: the final metric against the learning rate, curves, ranges and survivors.

A panel is one matplotlib axes; an axis is an argument that varies in the sweep.
"""

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.cm
import matplotlib.collections
import matplotlib.colors
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from jgd.tuning.plan import Group
from jgd.tuning.result import Result

__all__ = [
    "Range",
    "plot_curves",
    "plot_ranges",
    "plot_sensitivity",
    "plot_sharpness",
    "plot_survivors",
    "ranges",
    "save_plots",
]

_DASHES = ["-", "--"]  # tell apart curves that coincide, as momentum and Nesterov at small rates
# by Okabe and Ito: distinct for colour-blind readers, on white and on black
_COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#B8A800"]
_COLORMAP = matplotlib.colors.ListedColormap(  # its yellow end is hard to see on white
    matplotlib.colormaps["viridis"](np.linspace(0, 0.92, 256)), "values"
)
POINTS = 128  # in a curve; if an axis has more values, the best among neighbours is drawn
LINES = 1000  # in a panel; if there are more lanes, evenly spaced ones are drawn


def _axis(result: Result) -> str | None:
    """Return the axis to draw against: the learning rate, else the first axis of all groups.

    None if the groups have no axis in common.
    """
    shared = [set(group.axes) for group in result.plan.groups]
    common = [name for name in result.plan.groups[0].axes if all(name in axes for axes in shared)]
    return "learning_rate" if "learning_rate" in common else next(iter(common), None)


def _last(result: Result, group: str) -> np.ndarray:
    """Return the metric of each lane at the report that counts; NaN for a lane without reports."""
    curves = result.curves[group].metrics[result.metric].astype(np.float64)
    if result.plan.best == "ever":
        best = np.where(np.isfinite(curves), result.plan.sign * curves, np.inf).argmin(1)
        return curves[np.arange(len(curves)), best]
    reported = ~np.isnan(result.curves[group].train_loss) | np.isfinite(curves)
    last = np.where(reported.any(1), curves.shape[1] - 1 - reported[:, ::-1].argmax(1), 0)
    return curves[np.arange(len(curves)), last]


class _Points(NamedTuple):
    """The best setting at each value of an axis, or in each neighbourhood of values."""

    axis: str
    x: np.ndarray
    values: np.ndarray  # (points, seeds), of the metric
    top: int  # the best point
    remark: str  # about the best point; may be empty

    @property
    def mean(self) -> np.ndarray:
        return self.values.mean(1)


def _points(result: Result, group: Any) -> _Points | None:
    """Return the points of a group; None for one without an axis or without finite values."""
    axis = _axis(result) or next(iter(group.axes), None)  # without a common axis, its first axis
    if axis is None:
        return None
    at, values = np.array(group.axes[axis]), _last(result, group.name).reshape(group.settings, -1)
    (finite,) = np.nonzero(np.isfinite(values).all(1))
    at, values = at[finite], values[finite]
    if not len(at):
        return None
    cells = np.unique(at, return_inverse=True)[1]
    if cells.max() >= POINTS:
        scale = np.log(at) if _spans_decades(at) else at
        cells = ((scale - scale.min()) / np.ptp(scale) * (POINTS / 2 - 1e-9)).astype(int)
    scores = values.mean(1) * result.plan.sign
    order = np.lexsort((scores, cells))
    first = order[np.flatnonzero(np.diff(cells[order], prepend=-1))]
    top = int(scores[first].argmin())
    remarks = ["at the edge"] if len(first) > 1 and top in (0, len(first) - 1) else []
    of_group = (row for row in result.rows if row["optimizer"] == group.name)
    verdict = next(row["verdict"] for row in of_group if row["setting"] == finite[first[top]])
    remarks += [verdict] if verdict == "too small" else []
    return _Points(axis, at[first], values[first], top, ", ".join(remarks))


def _best_over(result: Result) -> str:
    """Return the end of a title that names the other axes, over which the best is drawn."""
    axis, groups = _axis(result), result.plan.groups
    others = [name for g in groups for name in g.axes if name != (axis or next(iter(g.axes)))]
    varied = [n for n in others if any(len(set(g.axes.get(n, []))) > 1 for g in groups)]
    names = ", ".join(dict.fromkeys(varied)).replace("_", " ")
    return f", best over {names}" if names else ""


def _annotate(
    panel: Any, text: str, at: Any = (0.5, 0.65), align: str = "center", size: int = 9
) -> None:
    panel.annotate(text, at, xycoords="axes fraction", fontsize=size, ha=align, va="top")


def _why_missing(result: Result, names: Sequence[str]) -> str:
    """Return why groups have no finite values."""
    ended = {row["ended"] for row in result.rows if row["optimizer"] in names}
    return "not run" if ended == {"not run"} else "all lanes diverged"


def _explain_missing(panel: Any, result: Result, names: Sequence[str]) -> None:
    """Write into the panel why these groups have no curve."""
    if not names:
        return
    values = [row[result.metric] for row in result.rows if row["optimizer"] in names]
    why = "no number varies" if np.isfinite(values).any() else _why_missing(result, names)
    if len(names) == len(result.plan.groups):
        panel.set(xticks=[], yticks=[])
        _annotate(panel, why)
    else:
        text = textwrap.fill(f"{', '.join(names)}: {why}", 60)
        _annotate(panel, text, (0.98, 0.98), "right")


def _with_readable_ticks(panel: Any) -> None:
    """Label a logarithmic axis of about a decade at 1, 2 and 5, and a shorter axis evenly."""
    for axis, limits in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim())):
        low, high = sorted(limits)
        if axis.get_scale() == "log" and high < 40 * low:
            few = matplotlib.ticker.MaxNLocator(5)
            axis.set_major_locator(
                few if high < 8 * low else matplotlib.ticker.LogLocator(10, (1, 2, 5))
            )
            axis.set_major_formatter(lambda x, _: f"{x:g}")
            axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure and its panels, which share their limits and scales."""
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in panels:
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _styles(result: Result) -> Iterator[tuple[Group, dict[str, Any]]]:
    """Yield each group with the style of its line."""
    cycles = itertools.cycle(_COLORS), itertools.cycle(_DASHES)
    for color, dashes, group in zip(*cycles, result.plan.groups, strict=False):
        on_top = 2 + (dashes == "--")
        style = dict(color=color, linestyle=dashes, linewidth=1.8, zorder=on_top, label=group.name)
        yield group, style


def _legend(figure: Any, panel: Any) -> None:
    labels = panel.get_legend_handles_labels()[1]
    if len(labels) > 1 or any(":" in label for label in labels):
        columns = 6 if max(map(len, labels)) < 16 else 3
        figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def plot_sensitivity(result: Result) -> Any:
    """Draw the metric against the learning rate: the mean over seeds, a curve per optimizer.

    Bands span the seeds. If other numbers vary as well, the best setting at each rate is drawn; if
    there are very many rates, the best of neighbouring rates. A star marks the best rate of each
    optimizer. The legend says if it is at the edge of the range, or has the verdict "too small".
    """
    figure, (panel,) = _figure(8, 4.8)
    means, drawn, missing = [], {}, []
    for group, style in _styles(result):
        points = _points(result, group)
        if points is None:
            missing.append(group.name)
            continue
        drawn[points.axis] = [*drawn.get(points.axis, []), *points.x]
        x, mean, color = points.x, points.mean, style["color"]
        means += list(mean)
        low, high = points.values.min(1), points.values.max(1)
        panel.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        label = group.name + (points.remark and f": {points.remark}")
        panel.plot(x, mean, **style | {"label": label})
        star = x[points.top], mean[points.top]
        panel.plot(*star, "*", color=color, markersize=13, markeredgecolor="white")
    _explain_missing(panel, result, missing)
    if drawn and all(map(_spans_decades, drawn.values())):
        panel.set_xscale("log")
    if result.mode == "min" and means and min(means) > 0:
        panel.set_yscale("log")
    _with_readable_ticks(panel)
    panel.set_xlabel(", ".join(drawn).replace("_", " "))
    panel.set_ylabel(f"held-out {result.plan.direction}")
    seeds = f", mean and range of {result.plan.seeds} seeds" if result.plan.seeds > 1 else ""
    panel.set_title(f"after {result.plan.steps} steps{_best_over(result)}{seeds}", fontsize=11)
    _legend(figure, panel)
    return figure


def _lines(panel: Any, steps: np.ndarray, curves: np.ndarray, values: np.ndarray | None) -> Any:
    """Draw the curves of lanes, coloured by values; of more than LINES, evenly spaced ones."""
    shown = np.unique(np.linspace(0, len(curves) - 1, min(LINES, len(curves))).astype(int))
    few = len(shown) < 10
    lines = matplotlib.collections.LineCollection(
        [np.column_stack([steps, curves[lane]]) for lane in shown],
        linewidths=1.6 if few else 0.7,
        alpha=1.0 if few else 0.7,
    )
    if values is None:
        lines.set_color(_COLORS[0])
    else:
        lines.set_cmap(_COLORMAP)
        lines.set_array(values[shown])
    panel.add_collection(lines)
    panel.set_xlim(0, steps[-1])
    if len(shown) < len(curves):
        note = f"{len(shown):,} of {len(curves):,} lanes"
        _annotate(panel, note, (0.98, 0.97), "right", size=7)
    return lines


def _lane_panels(
    result: Result, groups: Sequence[Group], values: Sequence[np.ndarray], axis: str | None
) -> tuple[Any, Any]:
    """Return a figure with a panel per group: the curves of its lanes, coloured by the axis.

    Args:
      values: the curves of each group, of shape (lanes, reports).
      axis: None for curves of one colour.
    """
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, panels = _figure(max(3.9 * columns, 5.5), 3.0 * rows + 0.4, rows, columns)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    norm = _norm([x for group in groups for x in group.axes.get(axis or "", [])])
    for panel, group, curves in zip(panels, groups, values, strict=False):
        colors = np.repeat(group.axes[axis], result.plan.seeds) if axis else None
        _lines(panel, result.curves[group.name].step, curves, colors).set_norm(norm)
        panel.set_title(group.name, fontsize=11)
    figure.supxlabel("step", fontsize=10)
    if axis:
        mappable, label = matplotlib.cm.ScalarMappable(norm, _COLORMAP), axis.replace("_", " ")
        bar = figure.colorbar(mappable, ax=list(panels), label=label, fraction=0.03)
        _with_readable_ticks(bar.ax)
    return figure, panels


def plot_curves(result: Result) -> Any:
    """Draw the training loss over the steps, a panel per optimizer, coloured by learning rate.

    A curve that leaves the picture belongs to a lane that diverged.
    """
    groups = result.plan.groups
    losses = [result.curves[group.name].train_loss for group in groups]
    figure, panels = _lane_panels(result, groups, losses, _axis(result))
    figure.supylabel("training loss", fontsize=10)
    all_losses = np.concatenate(losses)
    first, finite = all_losses[:, 0], all_losses[np.isfinite(all_losses)]
    positive = finite[finite > 0]  # a loss of exactly 0 is drawn at the lower edge
    top = 10 * np.median(first[np.isfinite(first)]) if np.isfinite(first).any() else 1.0
    for panel, group, loss in zip(panels, groups, losses, strict=False):
        if positive.size and finite.min() >= 0:
            panel.set_yscale("log")
            panel.set_ylim(max(float(positive.min()) / 1.2, 1e-6 * float(top)), float(top))
        elif finite.size:
            panel.set_ylim(float(finite.min()), max(float(top), float(np.median(finite))))
        furthest = max(row["at"] for row in result.rows if row["optimizer"] == group.name)
        reports = np.searchsorted(result.plan.reports, furthest, side="right")
        if np.isfinite(loss).sum(1).max() < np.clip(reports, 1, 2):  # a line needs two
            _annotate(panel, _why_missing(result, [group.name]))
    _with_readable_ticks(panels[0])
    return figure


def _groups_with_sharpness(result: Result) -> list[Group]:
    """Return the groups that have a sharpness to draw over 2 / learning rate."""
    reported = "sharpness" in result.plan.metrics
    return [g for g in result.plan.groups if reported and "learning_rate" in g.axes]


def plot_sharpness(result: Result) -> Any:
    """Draw the sharpness of each lane over 2 / learning rate, a panel per optimizer.

    Above 1, plain gradient descent oscillates along the sharpest direction. With momentum b the
    limit is 1 + b. A lane that reaches this edge of stability stays near it, and its loss falls,
    but not smoothly. Optimizers that divide by a magnitude have other limits.

    Raises: ValueError if the sweep has no "sharpness" (`jgd.with_sharpness`) or no learning rates.
    """
    groups = _groups_with_sharpness(result)
    if not groups:
        raise ValueError(
            "plot_sharpness: result must be of a sweep of learning rates with jgd.with_sharpness"
        )
    ratios, shown = list[np.ndarray](), list[float]()
    for group in groups:
        rates = np.repeat(group.axes["learning_rate"], result.plan.seeds)
        ratios.append(np.abs(result.curves[group.name].metrics["sharpness"]) * rates[:, None] / 2)
    figure, panels = _lane_panels(result, groups, ratios, "learning_rate")
    figure.supylabel("sharpness / (2 / learning rate)", fontsize=10)
    for panel, group, ratio in zip(panels, groups, ratios, strict=False):
        panel.axhline(1, color="black", linewidth=1.2, linestyle="--")
        panel.set_yscale("log")
        positive = ratio[np.isfinite(ratio) & (ratio > 0)]
        shown += [1.0, *positive]
        if not positive.size:
            _annotate(panel, _why_missing(result, [group.name]))
    panels[0].set_ylim(np.quantile(shown, 0.005) / 1.5, np.quantile(shown, 0.995) * 1.5)
    _with_readable_ticks(panels[0])
    return figure


def plot_survivors(result: Result) -> Any:
    """Draw the number of settings that still train over the steps, a line per optimizer."""
    figure, (panel,) = _figure(8, 4.2)
    steps = np.array([0, *result.plan.reports])
    for group, style in _styles(result):
        ends = np.sort([row["at"] for row in result.rows if row["optimizer"] == group.name])
        alive = (len(ends) - np.searchsorted(ends, steps[:-1], side="right")).tolist()
        panel.step(steps, [*alive, alive[-1]], where="post", **style)
    panel.set_yscale("symlog", linthresh=1, base=2)
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    panel.set_xlabel("step")
    panel.set_ylabel("settings that still train")
    _legend(figure, panel)
    return figure


class Range(NamedTuple):
    """Range of values as good as the best one, for one optimizer."""

    optimizer: str
    best: float
    low: float
    high: float
    remark: str = ""  # "at the edge", "too small", both, or nothing


def ranges(result: Result) -> list[Range]:
    """Return the best learning rate of each optimizer, and the range of rates that are as good.

    A rate is as good if its mean over seeds is worse than the best mean by at most the standard
    error of the best mean (for one seed, 1 per cent of it), and if the rates between them are as
    good. If other numbers vary as well, the best setting at each rate counts.
    """
    best_ranges = []
    for group in result.plan.groups:
        points = _points(result, group)
        if points is None:
            continue
        means = result.plan.sign * points.mean
        low = high = top = points.top
        of_best = points.values[top]
        one_seed = len(of_best) == 1
        error = abs(means[top]) * 0.01 if one_seed else of_best.std(ddof=1) / np.sqrt(len(of_best))
        good = means <= means[top] + error
        while low > 0 and good[low - 1]:
            low -= 1
        while high + 1 < len(points.x) and good[high + 1]:
            high += 1
        best_ranges.append(
            Range(group.name, *map(float, points.x[[top, low, high]]), remark=points.remark)
        )
    return best_ranges


def plot_ranges(result: Result) -> Any:
    """Draw the best learning rate of each optimizer, and the range of rates that are as good."""
    best_ranges, axis = ranges(result), _axis(result)
    figure, (panel,) = _figure(8, 1.2 + 0.32 * max(len(best_ranges), 1))
    for place, one in enumerate(best_ranges):
        color = _COLORS[place % len(_COLORS)]
        panel.plot([one.low, one.high], [place] * 2, color=color, linewidth=6, alpha=0.35)
        panel.plot(one.best, place, "*", color=color, markersize=13, markeredgecolor="white")
        panel.annotate(
            f"{one.best:.2g}" + (one.remark and f", {one.remark}"),
            (one.best, place),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    if best_ranges and all(
        _spans_decades(group.axes[axis]) for group in result.plan.groups if axis
    ):
        panel.set_xscale("log")
    panel.set_yticks(range(len(best_ranges)), [one.optimizer for one in best_ranges])
    panel.set_ylim(len(best_ranges) - 0.4, -0.7)
    drawn = {one.optimizer for one in best_ranges}
    missing = [group.name for group in result.plan.groups if group.name not in drawn]
    _explain_missing(panel, result, missing)
    panel.margins(x=0.15)
    _with_readable_ticks(panel)
    name = (axis or "").replace("_", " ")
    panel.set_xlabel(f"{name}: best value (star) and range of values as good{_best_over(result)}")
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    return figure


def _spans_decades(values: Any) -> bool:
    """Return whether values are positive and span at least one decade."""
    values = np.asarray(values)
    return bool(values.min() > 0 and values.max() / values.min() >= 10)


def _norm(values: list[float]) -> Any:
    """Return the scale of the colours for values: logarithmic if they span a decade."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    log = bool(values) and _spans_decades(values)
    return (matplotlib.colors.LogNorm if log else matplotlib.colors.Normalize)(low, high)


def save_plots(result: Result, folder: str | Path) -> list[Path]:
    """Write the plots into a folder as PNG files, and return their paths.

    These are sensitivity, curves and ranges; survivors if settings ended early; sharpness if the
    sweep reported it.
    """

    plots = {
        "sensitivity.png": plot_sensitivity,
        "curves.png": plot_curves,
        "ranges.png": plot_ranges,
    }
    if any(row["ended"] != "finished" for row in result.rows):
        plots["survivors.png"] = plot_survivors
    if _groups_with_sharpness(result):
        plots["sharpness.png"] = plot_sharpness
    for name, plot in plots.items():
        plot(result).savefig(Path(folder) / name, dpi=150)
    return [Path(folder) / name for name in plots]
