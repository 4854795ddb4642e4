"""Pictures of a sweep: the final metric against the rate, and curves coloured by the rate."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.cm
import matplotlib.colors
import matplotlib.figure
import numpy as np

from jgd.tuning.results import Result

__all__ = [
    "Range",
    "plot_curves",
    "plot_ranges",
    "plot_sensitivity",
    "plot_survivors",
    "ranges",
    "save_plots",
]

_DASHES = ["-", "--"]  # momentum and Nesterov lie on each other where the rate is small
_COLORS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]


def _axis(result: Result) -> str | None:
    """The number to draw against: the learning rate, or the first that all groups vary."""
    shared = [set(group.axes) for group in result.plan.groups]
    common = [name for name in result.plan.groups[0].axes if all(name in axes for axes in shared)]
    return "learning_rate" if "learning_rate" in common else next(iter(common), None)


def _last(result: Result, group: str) -> np.ndarray:
    """The last value of the metric of each lane; one that never reported has none."""
    curves = result.curves[group].metrics[result.metric].astype(np.float64)
    said = ~np.isnan(result.curves[group].train_loss) | np.isfinite(curves)
    places = np.where(said.any(1), curves.shape[1] - 1 - said[:, ::-1].argmax(1), 0)
    return curves[np.arange(len(curves)), places]


def plot_sensitivity(result: Result) -> Any:
    """The final metric against the learning rate, a curve per optimizer: its mean over seeds.

    Bands span the seeds. Where other numbers vary as well, the best of them is shown. A star marks
    each optimizer's best.
    """
    common = _axis(result)
    figure = matplotlib.figure.Figure(figsize=(8, 4.8), layout="constrained")
    panel = figure.subplots()
    best = max if result.mode == "max" else min
    every = []
    drawn: dict[str, list[float]] = {}
    for color, dashes, group in zip(
        itertools.cycle(_COLORS), itertools.cycle(_DASHES), result.plan.groups, strict=False
    ):
        values = _last(result, group.name).reshape(group.settings, -1)
        axis = common or next(iter(group.axes), None)  # without a common one, each its own first
        if axis is None:
            continue
        drawn[axis] = group.axes[axis]
        at = np.array(group.axes[axis])
        points = []
        for x in np.unique(at):
            rows = [row for row in values[at == x] if np.isfinite(row).all()]
            if rows:
                chosen = best(rows, key=np.mean)
                points.append((x, chosen.mean(), chosen.min(), chosen.max()))
        if not points:
            continue
        x, mean, low, high = np.array(points).T
        every += list(mean)
        panel.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        on_top = 2 + (dashes == "--")
        panel.plot(x, mean, dashes, color=color, label=group.name, linewidth=1.8, zorder=on_top)
        top = mean.argmax() if result.mode == "max" else mean.argmin()
        panel.plot(x[top], mean[top], "*", color=color, markersize=13, markeredgecolor="white")
    if drawn and all(map(_spans_decades, drawn.values())):
        panel.set_xscale("log")
    if result.mode == "min" and every and min(every) > 0:
        panel.set_yscale("log")
    panel.set_xlabel(", ".join(drawn).replace("_", " "))
    panel.set_ylabel(f"{result.metric}, held out")
    seeds = f", mean and range of {result.plan.seeds} seeds" if result.plan.seeds > 1 else ""
    panel.set_title(f"after {result.plan.steps} steps{seeds}", fontsize=11)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    return figure


def plot_curves(result: Result) -> Any:
    """The training loss over the steps, a panel per optimizer, coloured by the learning rate.

    Lanes whose loss left the picture end at its edge: they diverged.
    """
    axis = _axis(result)
    groups = result.plan.groups
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = matplotlib.figure.Figure(
        figsize=(3.9 * columns, 3.0 * rows + 0.4), layout="constrained"
    )
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    losses = np.concatenate([c.train_loss.ravel() for c in result.curves.values()])
    first = np.concatenate([c.train_loss[:, 0] for c in result.curves.values()])
    finite = losses[np.isfinite(losses)]
    positive = finite[finite > 0]  # a loss of exactly 0 is at the foot of the picture
    top = 10 * np.median(first[np.isfinite(first)]) if np.isfinite(first).any() else 1.0
    norm = _norm([x for group in groups for x in group.axes.get(axis or "", [])])
    colors = matplotlib.colormaps["turbo"]
    for panel, group in zip(panels, groups, strict=False):
        curves = result.curves[group.name]
        for lane, loss in enumerate(curves.train_loss):
            at = group.axes[axis][lane // result.plan.seeds] if axis else 0.0
            color = colors(norm(at)) if axis else "tab:blue"
            panel.plot(curves.step, loss, color=color, linewidth=0.7, alpha=0.7)
        panel.set_title(group.name, fontsize=11)
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
        if positive.size and finite.min() >= 0:
            panel.set_yscale("log")
            panel.set_ylim(max(float(positive.min()), 1e-6 * float(top)), float(top))
        elif finite.size:
            panel.set_ylim(float(finite.min()), max(float(top), float(np.median(finite))))
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("training loss", fontsize=10)
    if axis:
        mappable = matplotlib.cm.ScalarMappable(norm, colors)
        figure.colorbar(mappable, ax=list(panels), label=axis.replace("_", " "), fraction=0.03)
    return figure


def plot_survivors(result: Result) -> Any:
    """How many settings are still at it after how many steps, a line per optimizer."""
    figure = matplotlib.figure.Figure(figsize=(8, 4.2), layout="constrained")
    panel = figure.subplots()
    steps = np.array([0, *result.plan.reports])
    for color, dashes, group in zip(
        itertools.cycle(_COLORS), itertools.cycle(_DASHES), result.plan.groups, strict=False
    ):
        ends = [row["at"] for row in result.rows if row["optimizer"] == group.name]
        alive = [sum(end > step for end in ends) for step in steps[:-1]]
        on_top = 2 + (dashes == "--")
        panel.step(
            steps,
            [*alive, alive[-1]],
            dashes,
            where="post",
            color=color,
            label=group.name,
            linewidth=1.8,
            zorder=on_top,
        )
    panel.set_yscale("symlog", linthresh=1, base=2)
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    panel.set_xlabel("step")
    panel.set_ylabel("settings that go on")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    return figure


class Range(NamedTuple):
    """The values of a number that are as good as the best one, for one optimizer."""

    optimizer: str
    best: float
    low: float
    high: float


def ranges(result: Result) -> list[Range]:
    """For each optimizer the best value of the number to draw against, and how far it may be off.

    As good is what lies within the standard error of the best mean over seeds, or within 1 per cent
    of it for one seed, with nothing worse between. Where other numbers vary as well, the best of
    them counts.
    """
    found = []
    sign = -1 if result.mode == "max" else 1
    for group in result.plan.groups:
        axis = _axis(result) or next(iter(group.axes), None)
        values = sign * _last(result, group.name).reshape(group.settings, -1)
        if axis is None or not np.isfinite(values).all(1).any():
            continue
        at = np.array(group.axes[axis])
        points = np.unique(at)
        rows = [values[(at == x) & np.isfinite(values).all(1)] for x in points]
        means = np.array([min(row.mean(1)) if len(row) else np.inf for row in rows])
        top = int(means.argmin())
        of_best = rows[top][rows[top].mean(1).argmin()]
        error = of_best.std(ddof=1) / np.sqrt(len(of_best)) if len(of_best) > 1 else 0.0
        good = means <= means[top] + max(error, 0.01 * abs(means[top]) * (len(of_best) == 1))
        low = high = top
        while low > 0 and good[low - 1]:
            low -= 1
        while high + 1 < len(points) and good[high + 1]:
            high += 1
        found.append(Range(group.name, *map(float, (points[top], points[low], points[high]))))
    return found


def plot_ranges(result: Result) -> Any:
    """The suggested value for each optimizer, and the range around it that is as good."""
    found = ranges(result)
    figure = matplotlib.figure.Figure(
        figsize=(8, 1.2 + 0.32 * max(len(found), 1)), layout="constrained"
    )
    panel = figure.subplots()
    for place, one in enumerate(found):
        color = _COLORS[place % len(_COLORS)]
        panel.plot([one.low, one.high], [place] * 2, color=color, linewidth=6, alpha=0.35)
        panel.plot(one.best, place, "*", color=color, markersize=13, markeredgecolor="white")
        panel.annotate(
            f"{one.best:.2g}",
            (one.best, place),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    if found and all(
        _spans_decades(g.axes[a]) for g in result.plan.groups for a in g.axes if a == _axis(result)
    ):
        panel.set_xscale("log")
    panel.set_yticks(range(len(found)), [one.optimizer for one in found])
    panel.set_ylim(len(found) - 0.4, -0.7)
    panel.set_xlabel((_axis(result) or "").replace("_", " ") + ": the best, and what is as good")
    panel.grid(axis="x", alpha=0.25)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _spans_decades(values: Any) -> bool:
    values = np.asarray(values)
    return bool(values.min() > 0 and values.max() / values.min() >= 10)


def _norm(values: list[float]) -> Any:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    log = bool(values) and _spans_decades(values)
    return (matplotlib.colors.LogNorm if log else matplotlib.colors.Normalize)(low, high)


def save_plots(result: Result, folder: str | Path) -> list[Path]:
    """sensitivity.png, curves.png and ranges.png in a folder, and survivors.png if lanes ended."""
    plots = {
        "sensitivity.png": plot_sensitivity,
        "curves.png": plot_curves,
        "ranges.png": plot_ranges,
    }
    if any(row["ended"] != "finished" for row in result.rows):
        plots["survivors.png"] = plot_survivors
    for name, plot in plots.items():
        plot(result).savefig(Path(folder) / name, dpi=150)
    return [Path(folder) / name for name in plots]
