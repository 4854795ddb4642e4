"""Every own optimizer of jgd at its own tuned rate, on four tasks that fit two cores.

    python benchmarks/compare.py                     # all of it; goes on where it was interrupted
    python benchmarks/compare.py --tasks digits --optimizers adam sgd --steps 100
    python benchmarks/compare.py --publish           # benchmarks/README.md and its picture as well

The budget is the same for all. Each optimizer is tuned over `RATES`, the settings of its first
number (the learning rate; the multiplier of those that find their own; the bound of Polyak's step),
with all other numbers at jgd's defaults and no schedule. `TUNING_SEEDS` seeds and the validation
data choose; `SEEDS` fresh seeds are trained at the chosen rate, and the test data are reported. A
seed is an initial point with batches of its own, and on the regression a problem of its own; one
seed is the same to all optimizers, so that differences are paired.

results.csv in the folder gets a row as soon as an optimizer has finished a task.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # two make eigenvectors of 64 rows ten times slower

import argparse
import csv
import functools
import inspect
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
import optax
import scipy.stats
import sklearn.datasets

import jgd
import jgd.optimizers
import jgd.tuning.tasks

HELD_OUT = ("validation", "test")
RATES = np.geomspace(1e-5, 1e2, 22)  # three to a decade
TUNING_SEEDS, SEEDS = 4, 10
TUNING_KEY, KEY = 0, 1
WIDTH = 11  # lanes in a tile: eight of 22 rates x 4 seeds, and one program for both sweeps
REPORTS = 50  # of each final training: the resolution of the steps to the target
ROUNDS = 15  # of the clock

HERE = Path(__file__).resolve().parent
README, PICTURE = HERE / "README.md", HERE.parent / ".github" / "comparison.png"
BEGIN, END = "<!-- comparison: begin -->", "<!-- comparison: end -->"

# --- the tasks -------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A task whose `evaluate` reports "validation" and "test", both better if lower."""

    make: Callable[[], jgd.Task]
    steps: int
    title: str
    measure: str  # what "test" is
    target: float
    edge: float  # of the picture; what is worse is drawn there
    log: bool  # whether to draw it so
    digits: int  # after the point, in the table


def digits() -> jgd.Task:
    """scikit-learn's digits: 897 to train on, 400 to choose the rate by, 500 to report.

    The 64-64-10 network of `jgd sweep`, batches of 64 drawn with replacement; the error, and the
    cross-entropy where two rates have the same.
    """
    network = jgd.tuning.tasks.digits()
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = jnp.asarray(images / 16, jnp.float32)[order]
    labels = jnp.asarray(labels, jnp.int32)[order]
    split = lambda begin, end: (images[begin:end], labels[begin:end])
    validation, test, train = split(0, 400), split(400, 900), split(900, None)

    def loss(
        data: Any, params: Any, _: Any, batch: Any, key: jax.Array, setting: Any
    ) -> tuple[Any, Any]:
        rows = jax.random.bits(key, (64,)) % len(data[1])
        return network.loss(params, (data[0][rows], data[1][rows])), ({}, None)

    def evaluate(validation: Any, test: Any, params: Any) -> dict[str, Any]:
        seen, unseen = (network.evaluate.func(*data, params) for data in (validation, test))
        return {
            "validation": 100 * (1 - seen["accuracy"]),
            "loss": seen["loss"],
            "test": 100 * (1 - unseen["accuracy"]),
        }

    return jgd.Task(
        init=lambda key: (network.init(key), None),
        loss=jax.tree_util.Partial(loss, train),
        batch=lambda step: (),
        evaluate=jax.tree_util.Partial(evaluate, validation, test),
    )


def sparse(words: int = 2000, length: int = 20) -> jgd.Task:
    """Logistic regression on bags of words, where rare words say more.

    20 words of 2,000, word j with a frequency of 1 / j; a teacher whose weights grow like sqrt(j)
    draws the labels. Every batch of 8 is new. What the loss exceeds the teacher's by, on 2,000
    bags.
    """
    rank = np.arange(1, words + 1)
    weights = np.random.default_rng(0).normal(size=words) * 2 * np.sqrt(rank / words)
    teacher = {"weight": jnp.asarray(weights, jnp.float32), "bias": jnp.zeros(())}

    def bags(key: jax.Array, n: int) -> jax.Array:
        uniform = jax.random.uniform(key, (n, length))
        return jnp.exp(uniform * math.log(words + 1)).astype(jnp.int32) - 1  # the quantile of 1 / j

    def logits(params: Any, bag: jax.Array) -> jax.Array:
        return params["weight"][bag].sum(-1) + params["bias"]

    def init(key: jax.Array) -> tuple[Any, None]:
        return {"weight": 0.01 * jax.random.normal(key, (words,)), "bias": jnp.zeros(())}, None

    def loss(
        teacher: Any, params: Any, _: Any, batch: Any, key: jax.Array, setting: Any
    ) -> tuple[Any, Any]:
        draws, coins = jax.random.split(key)
        bag = bags(draws, 8)
        labels = jax.random.uniform(coins, (8,)) < jax.nn.sigmoid(logits(teacher, bag))
        losses = optax.sigmoid_binary_cross_entropy(logits(params, bag), labels)
        return losses.mean(), ({}, None)

    def evaluate(teacher: Any, held_out: dict[str, jax.Array], params: Any) -> dict[str, Any]:
        def excess(bag: jax.Array) -> jax.Array:
            expected = jax.nn.sigmoid(logits(teacher, bag))
            of = lambda p: optax.sigmoid_binary_cross_entropy(logits(p, bag), expected).mean()
            return of(params) - of(teacher)

        return {name: excess(bag) for name, bag in held_out.items()}

    held_out = {name: bags(jax.random.key(i), 2000) for i, name in enumerate(HELD_OUT)}
    return jgd.Task(
        init=init,
        loss=jax.tree_util.Partial(loss, teacher),
        batch=lambda step: (),
        evaluate=jax.tree_util.Partial(evaluate, teacher, held_out),
    )


def recall(words: int = 32, values: int = 16, pairs: int = 12, width: int = 24) -> jgd.Task:
    """A sequence of pairs of a word and its value, then one of the words: which value was it?

    One block of attention, 3,840 parameters. Every batch of 32 sequences is new; cross-entropy on
    500 sequences.
    """
    shapes = {
        "word": (words, width),
        "value": (values, width),
        "query": (width, width),
        "key": (width, width),
        "read": (width, width),
        "write": (width, width),
        "head": (width, values),
    }

    def sequences(key: jax.Array, n: int) -> tuple[jax.Array, ...]:
        uniform = jax.random.uniform(key, (n, words + pairs + 1))
        shown = jnp.argsort(uniform[:, :words], axis=-1)[:, :pairs]  # no word twice
        held = (uniform[:, words:-1] * values).astype(jnp.int32)
        asked = (uniform[:, -1:] * pairs).astype(jnp.int32)
        at = lambda x: jnp.take_along_axis(x, asked, axis=1)[:, 0]
        return shown, held, at(shown), at(held)

    def init(key: jax.Array) -> tuple[Any, None]:
        sizes = [math.prod(shape) for shape in shapes.values()]
        flat = jax.random.normal(key, (sum(sizes),)) / math.sqrt(width)
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        pairs = zip(shapes.items(), parts, strict=True)
        return {name: part.reshape(shape) for (name, shape), part in pairs}, None

    def cross_entropy(params: Any, data: tuple[jax.Array, ...]) -> jax.Array:
        shown, held, asked, answer = data
        pair, word = params["word"][shown] + params["value"][held], params["word"][asked]
        scores = jnp.einsum("nd,npd->np", word @ params["query"], pair @ params["key"])
        attention = jax.nn.softmax(scores / math.sqrt(width))
        found = jnp.einsum("np,npd->nd", attention, pair @ params["read"])
        hidden = word + found @ params["write"]
        hidden = hidden * jax.lax.rsqrt((hidden**2).mean(-1, keepdims=True) + 1e-6)
        logits = hidden @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()

    def loss(params: Any, _: Any, batch: Any, key: jax.Array, setting: Any) -> tuple[Any, Any]:
        return cross_entropy(params, sequences(key, 32)), ({}, None)

    def evaluate(held_out: dict[str, Any], params: Any) -> dict[str, Any]:
        return {name: cross_entropy(params, data) for name, data in held_out.items()}

    held_out = {name: sequences(jax.random.key(i), 500) for i, name in enumerate(HELD_OUT)}
    return jgd.Task(init, loss, lambda step: (), jax.tree_util.Partial(evaluate, held_out))


def regression(size: int = 48, rows: int = 128, condition: float = 1e4) -> jgd.Task:
    """Linear least squares with a condition number of 10,000, full batch, no noise.

    Each seed has features of its own, turned at random, so that no coordinate is an eigenvector.
    The logarithm (base 10) of what is left of the squared error on other rows.
    """
    spectrum = jnp.geomspace(1, condition**-0.5, size)

    def init(key: jax.Array) -> tuple[Any, Any]:
        normal = jax.random.normal(key, (size + 3 * rows + 1, size))
        turn = jnp.linalg.qr(normal[:size])[0]
        # orthonormal columns: the condition number is exact for each of the three sets
        white = jnp.linalg.qr(normal[size:-1].reshape(3, rows, size) @ turn)[0] * math.sqrt(rows)
        features = white * spectrum @ turn.T
        solution = normal[-1]
        return {"weight": 0.1 * jnp.roll(solution, 1)}, (features, features @ solution)

    def error(params: Any, data: Any, part: int) -> jax.Array:
        features, targets = data
        return jnp.mean((features[part] @ params["weight"] - targets[part]) ** 2) / 2

    def loss(params: Any, data: Any, batch: Any, key: jax.Array, setting: Any) -> tuple[Any, Any]:
        return error(params, data, 0), ({}, data)

    def evaluate(params: Any, data: Any) -> dict[str, Any]:
        zero = jax.tree.map(jnp.zeros_like, params)
        left = lambda part: jnp.log10(error(params, data, part) / error(zero, data, part))
        return {"validation": left(1), "test": left(2)}

    return jgd.Task(init, loss, lambda step: (), evaluate)


PROBLEMS = {
    "digits": Problem(digits, 150, "digits", "test error, %", 6.0, 12.0, False, 1),
    "sparse": Problem(sparse, 1000, "sparse features", "excess test loss", 0.25, 0.36, False, 3),
    "recall": Problem(recall, 200, "recall", "test cross-entropy", 0.3, 3.0, True, 3),
    "regression": Problem(
        regression, 500, "ill-conditioned regression", "log10 of error left", -3.0, 0.0, False, 2
    ),
}

# --- one optimizer on one task ---------------------------------------------------------------


class Row(NamedTuple):
    """What one optimizer did on one task; a line of results.csv."""

    task: str
    optimizer: str
    steps: int
    rate: float  # the chosen setting of the first number
    edge: bool  # whether that is the first or the last of RATES
    test: list[float]  # for each seed, after the last step
    reached: list[float]  # for each seed, the first report at or below the target; inf: none
    time: float  # of a step, in those of sgd
    state: float  # numbers in it for each parameter
    tuning: list[float]  # for each rate, the mean of "validation" over the tuning seeds

    @property
    def mean(self) -> float:
        """The mean over seeds; inf if one of them is not finite."""
        return statistics.fmean(self.test) if np.isfinite(self.test).all() else math.inf

    @property
    def spread(self) -> float:
        """The standard deviation over seeds."""
        return statistics.stdev(self.test) if np.isfinite(self.test).all() else math.nan


def own_optimizers() -> dict[str, str]:
    """Every optimizer whose rule is jgd's own, and its room."""
    rooms = [room for room in jgd.optimizers.ROOMS if room is not jgd.optimizers.lifted]
    names = {name: room.__name__.rpartition(".")[2] for room in rooms for name in room.__all__}
    return {name: room for name, room in names.items() if not name.startswith("scale_by_")}


def at_the_average(run: jgd.Run) -> jgd.Run:
    """The run of a schedule-free optimizer, evaluated where its paper does."""

    def evaluate(setting: Any, state: Any) -> dict[str, Any]:
        average = jgd.schedule_free_eval_params(state.opt_state, state.params)
        return run.evaluate(setting, state._replace(params=average))

    return run._replace(evaluate=evaluate)


def compared(task: str, name: str, steps: int, relative_time: Callable[..., float]) -> Row:
    """Tune an optimizer on a task, train it afresh at the rate found, and look at the clock."""
    problem, factory = PROBLEMS[task], getattr(jgd, name)
    run = made(task)
    if name.startswith("schedule_free"):
        run = at_the_average(run)
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
    params = jax.eval_shape(lambda: run.init(tx, jax.random.key(KEY))).params
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
def made(task: str) -> jgd.Run:
    return jgd.supervised(PROBLEMS[task].make())


def _numbers(tree: Any) -> int:
    """How many floating numbers a tree holds."""
    return sum(x.size for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact))


def beside_sgd(task: str) -> Callable[[jgd.Run, Any, int], float]:
    """A clock: the time of one training alone in that of sgd's, turn by turn, both warm."""

    def seconds(run: jgd.Run, tx: Any, steps: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready(jgd.train(run, tx, steps, jax.random.key(KEY)))
        return time.perf_counter() - started

    def relative_time(run: jgd.Run, tx: Any, steps: int) -> float:
        plain = made(task), jgd.sgd(RATES[0]), steps
        seconds(*plain), seconds(run, tx, steps)  # compiled
        turns = [(seconds(run, tx, steps), seconds(*plain)) for _ in range(ROUNDS)]
        ours, plain_ones = zip(*turns, strict=True)
        return min(ours) / min(plain_ones)  # the least: others use this machine too

    return relative_time


# --- what is kept ----------------------------------------------------------------------------


def append(path: Path, row: Row) -> None:
    """Add a line; it is on disk when this returns."""
    new = not path.exists()
    plain = lambda x: " ".join(f"{v:.7g}" for v in x) if isinstance(x, list) else x
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(Row._fields)
        writer.writerow(map(plain, row))


def kept(path: Path) -> list[Row]:
    """The rows of a file that may not be there yet."""
    if not path.exists():
        return []
    many = lambda text: [float(x) for x in text.split()]
    with path.open(newline="") as file:
        return [
            Row(
                task=line["task"],
                optimizer=line["optimizer"],
                steps=int(line["steps"]),
                rate=float(line["rate"]),
                edge=line["edge"] == "True",
                test=many(line["test"]),
                reached=many(line["reached"]),
                time=float(line["time"]),
                state=float(line["state"]),
                tuning=many(line["tuning"]),
            )
            for line in csv.DictReader(file)
        ]


# --- table and picture -----------------------------------------------------------------------

Rows = dict[str, dict[str, Row]]  # by optimizer and task


def mean_ranks(rows: Rows, tasks: Sequence[str]) -> dict[str, float]:
    """The rank by the mean over seeds, averaged over tasks, best first; ties share theirs."""
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
    """Those that a paired t-test at 5 per cent does not tell from the best mean."""
    best = min((row[task] for row in rows.values()), key=lambda row: row.mean)
    found = {best.optimizer}
    for name, row in rows.items():
        if math.isfinite(row[task].mean):
            gaps = np.subtract(row[task].test, best.test)
            error = gaps.std(ddof=1) / math.sqrt(len(gaps))
            if gaps.mean() <= error * scipy.stats.t.ppf(0.975, len(gaps) - 1):
                found.add(name)
    return found


def table(rows: Rows, tasks: Sequence[str]) -> str:
    """Two Markdown tables: what was reached, and at which rate and how fast."""
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


# colour and shape both tell families apart: Okabe and Ito's colours, and one of Tol's
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
    """A panel per task, a line per optimizer: a small mark for each seed, a large one for the mean.

    What lies beyond the right edge is drawn there, hollow.
    """
    ranks, rooms = mean_ranks(rows, tasks), own_optimizers()
    figure = matplotlib.figure.Figure(
        figsize=(2.4 + 2.4 * len(tasks), 1.5 + 0.215 * len(ranks)), layout="constrained"
    )
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        problem = PROBLEMS[task]
        for place in range(0, len(ranks), 2):
            panel.axhspan(place - 0.5, place + 0.5, color="#f3f3f3", linewidth=0, zorder=0)
        if "sgd" in ranks and math.isfinite(level := rows["sgd"][task].mean):
            panel.axvline(min(level, problem.edge), color="black", linewidth=0.8, linestyle=":")
        for place, name in enumerate(ranks):
            row = rows[name][task]
            _, color, shape = FAMILIES[rooms[name]]
            inside = [x for x in row.test if x <= problem.edge]
            look = dict(color=color, linestyle="none", clip_on=False)
            panel.plot(inside, [place] * len(inside), "|", markersize=5, alpha=0.45, **look)
            beyond = not row.mean <= problem.edge
            look |= dict(markerfacecolor="white") if beyond else dict(markeredgecolor="white")
            size = 10 if shape == "*" else 6.5
            mean = problem.edge if beyond else row.mean
            panel.plot(mean, place, shape, markersize=size, markeredgewidth=0.7, zorder=4, **look)
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
    right = panels[-1].secondary_yaxis("right")
    right.set_yticks(range(len(ranks)), [f"{rank:.1f}" for rank in ranks.values()])
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    right.set_ylabel("mean rank", rotation=270, labelpad=14)
    shown = dict.fromkeys(FAMILIES[rooms[name]] for name in ranks)
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
    parser.add_argument("--steps", type=int, help="of each training; default: each task's own")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--publish", action="store_true", help="write README.md and its picture")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # the sweeps of tuning and of the final seeds are one program: the second finds it compiled
    jax.config.update("jax_compilation_cache_dir", str(options.out / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    path = options.out / "results.csv"
    rows: Rows = {name: {} for name in options.optimizers}
    steps = {task: options.steps or PROBLEMS[task].steps for task in options.tasks}
    for row in kept(path):
        if row.optimizer in rows and row.steps == steps.get(row.task):
            rows[row.optimizer][row.task] = row
    for task in options.tasks:
        clock = beside_sgd(task)
        for name in options.optimizers:
            if task not in rows[name]:
                started = time.perf_counter()
                row = rows[name][task] = compared(task, name, steps[task], clock)
                append(path, row)
                took = time.perf_counter() - started
                print(f"{task:11} {name:20} {row.mean:8.4f} at {row.rate:.1e} ({took:.0f} s)")
    text, figure = table(rows, options.tasks), draw(rows, options.tasks)
    (options.out / "table.md").write_text(text + "\n")
    figure.savefig(options.out / "comparison.png", dpi=130)
    if options.publish:
        before, _, rest = README.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        README.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
        figure.savefig(PICTURE, dpi=130)
    print(text)


if __name__ == "__main__":
    main()
