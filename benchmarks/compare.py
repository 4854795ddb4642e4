"""Compare the optimizers that jgd implements, each at its tuned learning rate, on four small tasks.

    python benchmarks/compare.py                     # everything; resumes where it was interrupted
    python benchmarks/compare.py --tasks digits --optimizers adam sgd --steps 100
    python benchmarks/compare.py --publish           # also updates benchmarks/README.md

All optimizers have the same budget. Each is tuned over `RATES`, the values of its first number: the
learning rate, its multiplier where an optimizer finds the learning rate itself, or the upper bound
of Polyak's step. All other numbers have jgd's defaults, and there is no schedule. The best rate is
chosen on validation data with `TUNING_SEEDS` seeds. Then `SEEDS` new seeds are trained at this rate
and evaluated on test data. A seed determines the initial parameters and the batches, and on the
regression also the data. All optimizers have the same seeds, so that results are paired.

A row is added to results.jsonl in the output folder when an optimizer has finished a task.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # with two, eigenvectors of 64 rows take ten times as long

import argparse
import functools
import inspect
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker
import numpy as np
import scipy.stats
from problems import PROBLEMS

import jgd
import jgd.optimizers
from jgd.training import start

RATES = np.geomspace(1e-5, 1e2, 22)  # three per decade
TUNING_SEEDS, SEEDS = 4, 10
TUNING_KEY, KEY = 0, 1
WIDTH = 11  # lanes per tile: 22 rates x 4 seeds fill eight tiles, and both sweeps share a program
REPORTS = 50  # reports of each final training: the resolution of the steps to the target
ROUNDS = 15  # rounds of timing

HERE = Path(__file__).resolve().parent
README, PICTURE = HERE / "README.md", HERE.parent / ".github" / "comparison.png"
BEGIN, END = "<!-- comparison: begin -->", "<!-- comparison: end -->"

# --- one optimizer on one task ---------------------------------------------------------------


class Row(NamedTuple):
    """Results of one optimizer on one task: a line of results.jsonl."""

    task: str
    optimizer: str
    steps: int
    rate: float  # the chosen value of the first number
    edge: bool  # whether it is the first or the last of RATES
    test: list[float]  # "test" of each seed after the last step
    reached: list[float]  # first reported step of each seed at or below the target; inf: none
    time: float  # time of a step relative to sgd
    state: float  # numbers in the state per parameter
    tuning: list[float]  # mean of "validation" over the tuning seeds for each rate

    @property
    def mean(self) -> float:
        """Mean over seeds; inf if a seed is not finite."""
        return statistics.fmean(self.test) if np.isfinite(self.test).all() else math.inf

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; NaN if a seed is not finite."""
        return statistics.stdev(self.test) if np.isfinite(self.test).all() else math.nan


def own_optimizers() -> dict[str, str]:
    """Return the family of each optimizer that jgd implements itself."""
    families = [f for f in jgd.optimizers.families if f is not jgd.optimizers.lifted]
    names = {name: f.__name__.rpartition(".")[2] for f in families for name in f.__all__}
    return {name: family for name, family in names.items() if not name.startswith("scale_by_")}


def evaluated_at_average(run: jgd.Run) -> jgd.Run:
    """Return the run of a schedule-free optimizer, evaluated at the average of its paper."""

    def evaluate(setting: Any, state: Any) -> dict[str, Any]:
        average = jgd.schedule_free_eval_params(state.opt_state, state.params)
        return run.evaluate(setting, state._replace(params=average))

    return run._replace(evaluate=evaluate)


def measure(task: str, name: str, steps: int, relative_time: Callable[..., float]) -> Row:
    """Tune an optimizer on a task, train it with new seeds at the best rate, and time it."""
    problem, factory = PROBLEMS[task], getattr(jgd, name)
    run = run_of(task)
    if name.startswith("schedule_free"):
        run = evaluated_at_average(run)
    number = next(iter(inspect.signature(factory).parameters))
    options: dict[str, Any] = dict(width=WIDTH, metric="validation", mode="min")

    def sweep(rates: Any, **more: Any) -> Any:
        return jgd.sweep(
            run, {name: jgd.grid(factory, **{number: rates})}, steps, **options, **more
        )

    tuned = sweep(RATES, seeds=TUNING_SEEDS, key=TUNING_KEY, report_every=steps)
    rate = tuned.rows[0][number]
    final = sweep([rate], seeds=SEEDS, key=KEY, report_every=max(1, steps // REPORTS))
    step, test = final.curves[name].step, final.curves[name].metrics["test"]
    arrived = test <= problem.target
    scores = tuned.curves[name].metrics["validation"][:, -1].reshape(len(RATES), -1)
    tx = factory(rate)
    params = jax.eval_shape(lambda: start(run, tx, jax.random.key(KEY))).params
    return Row(
        task=task,
        optimizer=name,
        steps=steps,
        rate=rate,
        edge=rate in (RATES[0], RATES[-1]),
        test=test[:, -1].tolist(),
        reached=np.where(arrived.any(1), step[arrived.argmax(1)], math.inf).tolist(),
        time=relative_time(run, tx, steps),
        state=_numbers(jax.eval_shape(tx.init, params)) / _numbers(params),
        tuning=scores.mean(1).tolist(),
    )


@functools.cache
def run_of(task: str) -> jgd.Run:
    return jgd.supervised(PROBLEMS[task].make())


def _numbers(tree: Any) -> int:
    """Return how many floating-point numbers a tree holds."""
    return sum(x.size for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact))


def timer(task: str) -> Callable[[jgd.Run, Any, int], float]:
    """Return a function that times a training relative to sgd's, in turns, after compilation."""

    def seconds(run: jgd.Run, tx: Any, steps: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready(jgd.train(run, tx, steps, jax.random.key(KEY)))
        return time.perf_counter() - started

    def relative_time(run: jgd.Run, tx: Any, steps: int) -> float:
        sgd = run_of(task), jgd.sgd(RATES[0]), steps
        seconds(*sgd), seconds(run, tx, steps)  # compile
        rounds = [(seconds(run, tx, steps), seconds(*sgd)) for _ in range(ROUNDS)]
        own, of_sgd = zip(*rounds, strict=True)
        return min(own) / min(of_sgd)  # the minimum, since other programs may slow this one

    return relative_time


# --- the file of results ---------------------------------------------------------------------


def append(path: Path, row: Row) -> None:
    """Append a row to a file."""
    with path.open("a") as file:
        file.write(json.dumps(row._asdict()) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, none if it does not exist."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Row(**json.loads(line)) for line in lines]


# --- table and picture -----------------------------------------------------------------------

Rows = dict[str, dict[str, Row]]  # by optimizer and task


def mean_ranks(rows: Rows, tasks: Sequence[str]) -> dict[str, float]:
    """Return the ranks by the mean over seeds, averaged over tasks, the best first.

    Optimizers with equal means share the mean of their ranks.
    """
    ranks: dict[str, list[float]] = {name: [] for name in rows}
    for task in tasks:
        means = {name: row[task].mean for name, row in rows.items()}
        for name, mean in means.items():
            better = sum(other < mean for other in means.values())
            alike = sum(other == mean for other in means.values())
            ranks[name].append(better + (alike + 1) / 2)
    averages = {name: statistics.fmean(of_tasks) for name, of_tasks in ranks.items()}
    return dict(sorted(averages.items(), key=lambda pair: pair[1]))


def among_the_best(rows: Rows, task: str) -> set[str]:
    """Return the optimizers that Wilcoxon's paired test at 5 per cent cannot tell from the best."""
    best = min((row[task] for row in rows.values()), key=lambda row: row.mean)

    def worse(test: list[float]) -> bool:
        if test == best.test:
            return False
        result = scipy.stats.wilcoxon(test, best.test, alternative="greater")
        return not math.isfinite(sum(test)) or result.pvalue < 0.05  # type: ignore[attr-defined]

    return {name for name, row in rows.items() if not worse(row[task].test)}


def table(rows: Rows, tasks: Sequence[str]) -> str:
    """Return two Markdown tables: the results, and the chosen rates with their speed."""
    ranks = mean_ranks(rows, tasks)
    best = {task: among_the_best(rows, task) for task in tasks}

    def reached(row: Row) -> str:
        if not math.isfinite(row.mean):
            return "diverged"
        places = PROBLEMS[row.task].digits
        text = f"{row.mean:.{places}f} ± {row.spread:.{places}f}"
        text = f"**{text}**" if row.optimizer in best[row.task] else text
        return text + ("†" if row.edge else "")

    def arrival(row: Row) -> str:
        median = statistics.median_high(row.reached)  # inf unless a majority arrives
        return f"{median:.0f}" if math.isfinite(median) else "-"

    def lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
        rule = ["---", "---", *["---:"] * (len(head) - 2)]
        return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]

    titles = [f"{PROBLEMS[task].title}: {PROBLEMS[task].measure}" for task in tasks]
    first = [
        [
            str(place),
            f"`{name}`",
            f"{ranks[name]:.1f}",
            *(reached(rows[name][task]) for task in tasks),
            f"{rows[name][tasks[0]].state:.1f}",
        ]
        for place, name in enumerate(ranks, 1)
    ]
    second = [
        [
            str(place),
            f"`{name}`",
            *(
                f"{row.rate:.1e}{'†' * row.edge}, {arrival(row)}, {row.time:.1f}"
                for row in (rows[name][task] for task in tasks)
            ),
        ]
        for place, name in enumerate(ranks, 1)
    ]
    goals = [f"{PROBLEMS[task].title}, target {PROBLEMS[task].target:g}" for task in tasks]
    return "\n".join(
        [
            *lines(["", "optimizer", "mean rank", *titles, "state"], first),
            "",
            "The chosen rate, the steps to the target (median; - if a majority of seeds never"
            " arrives), and the time of a step in those of `sgd`:",
            "",
            *lines(["", "optimizer", *goals], second),
        ]
    )


# Families differ in both color and shape. The colors are Okabe and Ito's, and one of Tol's.
FAMILIES = {
    "classic": ("classic", "#000000", "o"),
    "adaptive": ("Adam's relatives", "#0072B2", "s"),
    "normalized": ("normalized first", "#56B4E9", "D"),
    "signs": ("signs", "#D55E00", "^"),
    "layerwise": ("by layer", "#E69F00", "v"),
    "factored": ("factored", "#999999", "P"),
    "orthogonal": ("matrices", "#CC79A7", "*"),
    "kronecker": ("matrices", "#CC79A7", "*"),
    "dual": ("follow the leader", "#882255", "X"),
    "free": ("own rate", "#009E73", "p"),
}


def draw(rows: Rows, tasks: Sequence[str]) -> Any:
    """Draw a panel per task with a line per optimizer: small marks for seeds, large ones for means.

    A mean beyond the right edge is drawn at the edge, with a hollow mark.
    """
    ranks, families = mean_ranks(rows, tasks), own_optimizers()
    figure = matplotlib.figure.Figure(
        figsize=(2.4 + 2.4 * len(tasks), 1.5 + 0.215 * len(ranks)), layout="constrained"
    )
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        problem = PROBLEMS[task]
        floor = 1e-5 if problem.log else -math.inf
        for place in range(0, len(ranks), 2):
            panel.axhspan(place - 0.5, place + 0.5, color="#f3f3f3", linewidth=0, zorder=0)
        if "sgd" in ranks and math.isfinite(level := rows["sgd"][task].mean):
            panel.axvline(min(level, problem.edge), color="black", linewidth=0.8, linestyle=":")
        for place, name in enumerate(ranks):
            row = rows[name][task]
            _, color, shape = FAMILIES[families[name]]
            inside = [max(x, floor) for x in row.test if x <= problem.edge]
            style = dict(color=color, linestyle="none")
            panel.plot(inside, [place] * len(inside), "|", markersize=5, alpha=0.45, **style)
            beyond = not row.mean <= problem.edge
            style |= dict(markerfacecolor="white") if beyond else dict(markeredgecolor="white")
            size = 10 if shape == "*" else 6.5
            style |= dict(markersize=size, markeredgewidth=0.7, zorder=4, clip_on=False)
            panel.plot(problem.edge if beyond else max(row.mean, floor), place, shape, **style)
        if problem.log:
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            panel.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        panel.set_xlim(right=problem.edge)
        panel.set_title(problem.title, fontsize=11)
        panel.set_xlabel(problem.measure)
        panel.grid(axis="x", alpha=0.25)
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(range(len(ranks)), ranks)
    panels[0].set_ylim(len(ranks) - 0.5, -0.5)
    beside = dict(transform=panels[-1].get_yaxis_transform(), va="center", ha="right", fontsize=9)
    for place, rank in enumerate(["rank", *(f"{rank:.1f}" for rank in ranks.values())], -1):
        panels[-1].text(1.16, place, rank, **beside)
    shown = dict.fromkeys(FAMILIES[families[name]] for name in ranks)
    handles = [
        matplotlib.lines.Line2D([], [], color=color, marker=shape, linestyle="none", label=label)
        for label, color, shape in shown
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    return figure


# --- the command line ------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--optimizers", nargs="+", default=list(own_optimizers()))
    parser.add_argument(
        "--steps", type=int, help="steps of each training; default: set by each task"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    parser.add_argument(
        "--publish", action="store_true", help="also write README.md and its picture"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # the two sweeps of an optimizer share one program, which the second takes from this cache
    jax.config.update("jax_compilation_cache_dir", str(options.out / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    path = options.out / "results.jsonl"
    rows: Rows = {name: {} for name in options.optimizers}
    steps = {task: options.steps or PROBLEMS[task].steps for task in options.tasks}
    for row in read_rows(path):
        if row.optimizer in rows and row.steps == steps.get(row.task):
            rows[row.optimizer][row.task] = row
    for task in options.tasks:
        clock = timer(task)
        for name in options.optimizers:
            if task not in rows[name]:
                started = time.perf_counter()
                row = rows[name][task] = measure(task, name, steps[task], clock)
                append(path, row)
                elapsed = time.perf_counter() - started
                print(f"{task:11} {name:20} {row.mean:8.4f} at {row.rate:.1e} ({elapsed:.0f} s)")
    text, figure = table(rows, options.tasks), draw(rows, options.tasks)
    image: Any = dict(dpi=130, bbox_inches="tight")
    (options.out / "table.md").write_text(text + "\n")
    figure.savefig(options.out / "comparison.png", **image)
    if options.publish:
        before, _, rest = README.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        README.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
        figure.savefig(PICTURE, **image)
    print(text)


if __name__ == "__main__":
    main()
