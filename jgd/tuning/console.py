"""Terminal output: a progress bar while a sweep runs, and tables at its end."""

import math
import time
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.progress
import rich.table
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from jgd import catalog
from jgd.tuning.events import Report
from jgd.tuning.plan import Plan, words_of
from jgd.tuning.result import Result

__all__ = ["Progress", "print_optimizers", "print_result"]


class Progress:
    """Progress of a sweep: a live bar on a terminal, else up to twenty lines.

    Args:
      settings: number of settings in all plans of a search; None: the number in the plan.
    """

    def __init__(self, console: Console, settings: int | None = None) -> None:
        self.console, self.settings = console, settings
        self.live = console.is_terminal
        self.line = self.group = ""  # the next line to print, and the group it is about
        self.share = self.printed = 0.0  # fractions of the lane-steps: now, and at the last line
        text = rich.progress.TextColumn
        columns = [  # each with the width of the narrowest terminal that shows it
            (0, text("[bold]{task.description:<10}")),
            (110, rich.progress.BarColumn(20)),
            (0, text("{task.percentage:>3.0f}%")),
            (100, text("{task.fields[alive]}")),
            (80, text("{task.fields[speed]}")),
            (0, text("{task.fields[best]}")),
            (100, rich.progress.TimeRemainingColumn()),
        ]
        shown = [column for width, column in columns if console.width >= width]
        self.bar = rich.progress.Progress(
            *shown, console=console, disable=not self.live, transient=True
        )
        self.task = self.bar.add_task("compiling", total=None, alive="", speed="", best="")
        self.done = 0
        self.seconds = 0.0
        self.best: float | None = None
        self.started = time.perf_counter()

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._print_line()
        self.bar.stop()

    def __call__(self, plan: Plan, report: Report) -> None:
        if not self.done:
            self._announce(plan)
        if self.group != report.group and self.share >= self.printed + 0.05:
            self._print_line()
        self.group = report.group
        before = max([0, *(step for step in plan.reports if step < report.step)])
        self.done += (report.step - before) * len(report.lanes)
        self.seconds = time.perf_counter() - self.started
        speed = f"{self.done / self.seconds:,.0f} lane-steps/s"
        total = plan.lane_steps * self._settings(plan) / int(plan.first[-1])
        shown = self._best(plan, report)
        self.bar.update(
            self.task,
            description=report.group,
            total=total,
            completed=self.done,
            alive=f"{report.alive:,} alive",
            speed=speed,
            best=shown,
        )
        self.share = self.done / total
        self.line = f"{report.group:<12} {self.share:4.0%}  {speed}  {shown}"

    def _print_line(self) -> None:
        if not self.live and self.line:
            self.console.print(self.line)
        self.line, self.printed = "", self.share

    def _best(self, plan: Plan, report: Report) -> str:
        choose = max if plan.mode == "max" else min
        values = report.metrics[plan.metric]
        finite = [float(x) for x in values if math.isfinite(x)]
        self.best = choose([*finite, *([] if self.best is None else [self.best])], default=None)
        return "" if self.best is None else f"best {plan.metric} {self.best:.4g}"

    def _settings(self, plan: Plan) -> int:
        return int(plan.first[-1]) if self.settings is None else self.settings

    def _announce(self, plan: Plan) -> None:
        settings = self._settings(plan)
        widths = " and ".join(str(width) for width in sorted({g.width for g in plan.groups}))
        self.console.print(
            f"{_count(settings * plan.seeds, 'training')} of {plan.steps:,} steps:"
            f" {_count(settings, 'setting')} in {_count(len(plan.groups), 'compiled program')},"
            f" {_count(plan.seeds, 'seed')}, tiles of {widths} lanes"
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def print_result(console: Console, result: Result, top: int) -> None:
    """Print the best setting and the verdicts of each group, then the best `top` settings."""
    plan = result.plan
    varied = dict.fromkeys(name for g in plan.groups for name in (*g.axes, *g.fixed))
    varied.pop("optimizer", None)  # the column of this name shows the group
    styles = _STYLES if plan.verdict else {}

    columns, rows = ["optimizer", *varied, result.metric, *styles], list[list[str]]()
    for group in plan.groups:
        of_group = [row for row in result.rows if row["optimizer"] == group.name]
        counts = [sum(row["verdict"] == verdict for row in of_group) for verdict in styles]
        shown = [f"[{style}]{n}[/]" for n, style in zip(counts, styles.values(), strict=True)]
        numbers = [_cell(of_group[0].get(name)) for name in varied]
        rows.append([group.name, *numbers, _spread(of_group[0], result.metric), *shown])
    title = f"best of each optimizer: {plan.direction}"
    _print_table(console, title, result.metric, columns, rows)

    best = result.rows[: max(top, 0)]
    verdict = ["verdict"] if styles else []
    ended = ["ended"] if any(row["ended"] != "finished" for row in best) else []
    columns = ["rank", "optimizer", *varied, result.metric, "final loss", *verdict, *ended]
    ties = sum(row["tied"] for row in result.rows) > 1
    rows = [
        [
            f"{'= ' if ties and row['tied'] else ''}{row['rank']}",
            row["optimizer"],
            *(_cell(row.get(name)) for name in varied),
            _spread(row, result.metric),
            _cell(row["final_loss"]),
            *([f"[{_STYLES.get(row['verdict'], 'dim')}]{row['verdict']}[/]"] if styles else []),
            *([f"{row['ended']} at {row['at']:,}"] if ended else []),
        ]
        for row in best
    ]
    title = f"the best {len(best)} of {len(result.rows)} settings"
    _print_table(console, title, result.metric, columns, rows)
    if plan.seeds > 1:
        order = "one order of batches" if plan.order == "shared" else "an order of batches each"
        console.print(f"[dim]± standard error of the mean of {plan.seeds} seeds with {order}[/]")
    if ties:
        count = sum(row["tied"] for row in result.rows)
        within = "" if plan.seeds == 1 else " within the standard error of the difference"
        console.print(f"[dim]= as good as the best{within}: {count:,} settings[/]")


GAP = 3  # characters between two columns
NAMES = 16  # width to which the names of optimizers are folded in a narrow terminal


def _print_table(
    console: Console, title: str, metric: str, columns: Sequence[str], rows: list[list[str]]
) -> None:
    """Print a table. A narrow terminal shows it without the least important columns."""
    headers = [c.replace("_", " ").replace("oscillating", "oscil-\nlating") for c in columns]
    cells = [[Text.from_markup(row[i]).plain for row in rows] for i in range(len(columns))]
    widths = list[int]()  # the least: words are not split, nor are the cells of the metric
    for name, header, column in zip(columns, headers, cells, strict=True):
        words = column if name == metric else " ".join(column).split()
        longest = max(map(len, (*header.split(), *words)))
        widths.append(min(longest, NAMES) if name == "optimizer" else longest)
    shown = list(range(len(columns)))
    optional = [i for i in shown if columns[i] not in ("rank", "optimizer", metric)]
    # columns are omitted from the end of the list: the final loss, then from right to left
    optional.sort(key=lambda i: columns[i] == "final loss")
    while (spare := console.width + GAP - sum(widths[i] + GAP for i in shown)) < 0 and optional:
        shown.remove(optional.pop())
    for i in reversed(shown):
        extra = min(max(map(len, (headers[i], *cells[i]))) - widths[i], max(spare, 0))
        widths[i], spare = widths[i] + extra, spare - extra
    edges: Any = dict(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table = rich.table.Table(title=f"\n{title}", title_justify="left", title_style="bold", **edges)
    for i in shown:
        is_text = columns[i] in ("optimizer", "verdict", "ended")
        justify = "left" if is_text else "right"
        table.add_column(headers[i], justify=justify, width=widths[i], overflow="fold")
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    console.print(table)
    if hidden := [columns[i] for i in range(len(columns)) if i not in shown]:
        console.print(f"[dim]no room for {', '.join(hidden)}: see results.csv[/]")


_STYLES = {"too small": "cyan", "good": "green", "oscillating": "yellow", "diverged": "red"}


def _cell(x: Any) -> str:
    return f"{x:.3g}" if isinstance(x, float) else "" if x is None else str(x)


def _spread(row: dict[str, Any], metric: str) -> str:
    spread = row.get(f"{metric}_se")
    digits = ".4f" if {"acc", "accuracy"} & words_of(metric) else ".4g"
    return f"{row[metric]:{digits}}" + ("" if spread is None else f" ± {spread:{digits}}")


def print_optimizers(console: Console) -> None:
    """Print the table of all optimizers."""
    table = rich.table.Table(box=rich.box.SIMPLE, padding=(0, 1), show_lines=True)
    for column in catalog.HEADER:
        justify = "right" if column == "state" else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for entry in catalog.entries():
        table.add_row(*map(escape, catalog.cells(entry)))
    console.print(table)
    console.print("state: copies of a 1024 x 1024 matrix; `jgd optimizers NAME` describes one")
