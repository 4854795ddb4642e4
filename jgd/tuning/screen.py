"""What a sweep shows on the terminal: a live bar while it runs, tables when it is done."""

import math
import time
from typing import Any, Literal

import rich.box
import rich.progress
import rich.table
from rich.console import Console
from rich.markup import escape

from jgd import catalog
from jgd.tuning.driver import Report
from jgd.tuning.plan import Plan
from jgd.tuning.results import Result, ranked_by

__all__ = ["Progress", "print_optimizers", "print_result"]


class Progress:
    """A live bar on a terminal, a line per finished group elsewhere; the best so far in both."""

    def __init__(
        self, console: Console, metric: str | None, mode: Literal["min", "max"] | None
    ) -> None:
        self.console, self.metric = console, metric
        self.mode: Literal["min", "max"] | None = mode
        self.live = console.is_terminal
        columns = [
            rich.progress.TextColumn("[bold]{task.description:<10}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.percentage:>3.0f}%"),
            rich.progress.TextColumn("{task.fields[speed]}"),
            rich.progress.TextColumn("{task.fields[best]}"),
            rich.progress.TimeRemainingColumn(),
        ]
        self.bar = rich.progress.Progress(
            *columns, console=console, disable=not self.live, transient=True
        )
        self.task = self.bar.add_task("compiling", total=None, speed="", best="")
        self.done = 0
        self.seconds = 0.0
        self.best: float | None = None
        self.started = time.perf_counter()

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, plan: Plan, report: Report) -> None:
        if not self.done:
            self._announce(plan)
        tile = plan.tiles[report.tile]
        before = max([0, *(step for step in plan.reports if step < report.step)])
        self.done += (report.step - before) * len(tile.lanes)
        self.seconds = time.perf_counter() - self.started
        speed = f"{self.done / self.seconds:,.0f} lane-steps/s"
        shown = self._best(plan, report)
        self.bar.update(
            self.task,
            description=report.group,
            total=plan.lane_steps,
            completed=self.done,
            speed=speed,
            best=shown,
        )
        last = report.tile + 1 == len(plan.tiles) or plan.tiles[report.tile + 1].group != tile.group
        if not self.live and last and report.step == plan.steps:
            share = self.done / plan.lane_steps
            self.console.print(f"{report.group:<12} {share:4.0%}  {speed}  {shown}")

    def _best(self, plan: Plan, report: Report) -> str:
        metric, mode = ranked_by(plan, self.metric, self.mode)
        choose = max if mode == "max" else min
        values = report.metrics[metric]
        seen = [float(x) for x in values if math.isfinite(x)]
        self.best = choose([*seen, *([] if self.best is None else [self.best])], default=None)
        return "" if self.best is None else f"best {metric} {self.best:.4g}"

    def _announce(self, plan: Plan) -> None:
        settings = sum(group.settings for group in plan.groups)
        self.console.print(
            f"{settings * plan.seeds:,} trainings of {plan.steps:,} steps: {settings:,} settings in"
            f" {len(plan.groups)} compiled programs, {plan.seeds} seeds"
        )


def print_result(console: Console, result: Result, top: int) -> None:
    """Each group's best setting with its count of verdicts, then the best `top` of all settings."""
    plan = result.plan
    varied = list(dict.fromkeys(name for g in plan.groups for name in (*g.axes, *g.fixed)))

    table = _table(
        "best of each optimizer", result.metric, "optimizer", *varied, result.metric, *_STYLES
    )
    for group in plan.groups:
        rows = [row for row in result.rows if row["optimizer"] == group.name]
        counts = [sum(row["verdict"] == verdict for row in rows) for verdict in _STYLES]
        shown = [f"[{style}]{n}[/]" for n, style in zip(counts, _STYLES.values(), strict=True)]
        numbers = [_cell(rows[0].get(name)) for name in varied]
        table.add_row(group.name, *numbers, _spread(rows[0], result.metric), *shown)
    console.print(table)

    title = f"the best {max(min(top, len(result.rows)), 0)} of {len(result.rows)} settings"
    columns = ("rank", "optimizer", *varied, result.metric, "final loss", "verdict")
    table = _table(title, result.metric, *columns)
    for row in result.rows[: max(top, 0)]:
        table.add_row(
            str(row["rank"]),
            row["optimizer"],
            *(_cell(row.get(name)) for name in varied),
            _spread(row, result.metric),
            _cell(row["final_loss"]),
            f"[{_STYLES[row['verdict']]}]{row['verdict']}[/]",
        )
    console.print(table)


def _table(title: str, metric: str, *columns: str) -> Any:
    edges: Any = dict(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table = rich.table.Table(title=f"\n{title}", title_justify="left", title_style="bold", **edges)
    for name in columns:
        left = name in ("optimizer", "verdict")
        header = name.replace("_", " ").replace("oscillating", "oscil- lating")
        table.add_column(header, justify="left" if left else "right", no_wrap=name == metric)
    return table


_STYLES = {"too small": "cyan", "good": "green", "oscillating": "yellow", "diverged": "red"}


def _cell(x: Any) -> str:
    return f"{x:.3g}" if isinstance(x, float) else "" if x is None else str(x)


def _spread(row: dict[str, Any], metric: str) -> str:
    spread = row.get(f"{metric}_sd")
    digits = ".4f" if "acc" in metric else ".4g"
    return f"{row[metric]:{digits}}" + ("" if spread is None else f" ± {spread:{digits}}")


def print_optimizers(console: Console) -> None:
    """The table of all optimizers."""
    table = rich.table.Table(box=rich.box.SIMPLE, padding=(0, 1), show_lines=True)
    for column in catalog.HEADER:
        justify = "right" if column == "state" else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for entry in catalog.entries():
        table.add_row(*map(escape, catalog.cells(entry)))
    console.print(table)
    console.print("state: copies of a 1024 x 1024 matrix; `jgd optimizers NAME` says all of one")
