"""Measure what a step costs in jgd relative to optax: tracing, compiling and running an update.

    python -m benchmarks.step             # everything: about six minutes on two idle cores
    python -m benchmarks.step --quick     # only the small tree: less than a minute
    python -m benchmarks.step --optimizers adam muon --trees small GPT-2 --measurements trace run

Both libraries run in this process and take turns, so that a busy machine slows both alike. A ratio
is the median over rounds of the seconds of jgd over those of optax. `--seconds` limits the rounds.

    trace       jax.jit(update).trace of a new function; JAX's other caches are warm
    argument    the same with the optimizer as an argument of the function, relative to optax's
                plain trace
    cold        the first trace after jax.clear_caches(), for the small tree
    compile     compilation without the persistent cache: the smallest of five times, or of fewer if
                they take more than four times `--seconds`
    run         a compiled update whose state is donated
    counts      equations, bytes, kernels and stack frames: see tests/costs.py
    eager       an update of Adam without jit, for the small tree
    construct   the call `adam(1e-3)`

Two cases are omitted. Muon does not run on the leaf of 5000 x 5000, where one step takes minutes.
The tree of a thousand leaves is only traced, since some of its compilations take half a minute;
`--optimizers` compiles and runs it for the optimizers named.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jgd

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from costs import (
    BOUNDS,
    COMPOSITIONS,
    FRAMES,
    OPTAX,
    OPTIMIZERS,
    TREES,
    counts,
    frames,
    shapes_of_arguments,
    trace,
)

MEASUREMENTS = ["trace", "argument", "cold", "compile", "run", "counts", "eager", "construct"]
TARGETS = {  # the upper bounds of the median and of the worst case
    "trace": (1.1, 1.5),
    **{f"trace, {name}": (1.1, 1.5) for name in COMPOSITIONS},
    "trace, optimizer as argument": (1.4, 1.4),
    "cold trace": (None, None),
    "compile": (1.05, 1.3),
    "run": (1.0, 1.1),
    "eager Adam": (1.5, 1.5),
    "construct `adam(1e-3)`": (2.5, 2.5),
    **{name: (None, bound) for name, bound in BOUNDS.items()},
    "frames of jgd (number)": (None, FRAMES),
    "frames of optax (number)": (None, None),
}
Call = Callable[[], Any]


def seconds_of(call: Call, repeats: int = 1) -> float:
    """Return the seconds of a call, averaged over `repeats`."""
    gc.disable()  # as in timeit: a collection would be charged to the library whose turn it is
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = time.perf_counter() - started
    gc.enable()
    return seconds / repeats


def in_turns(calls: list[Call], limit: float) -> np.ndarray:
    """Return the seconds of each call in each of up to 50 rounds.

    The first calls only fill caches, unless they take more than four seconds; then they are the
    only round. In a round, calls of less than two milliseconds are repeated. Every other round runs
    in reverse order, so that no call profits from its position.
    """
    first = [seconds_of(call) for call in calls]
    if sum(first) > 4:
        return np.array([first])
    fastest = min(seconds_of(call) for call in calls)
    repeats, rounds = max(1, int(2e-3 / fastest)), []
    stop = time.perf_counter() + limit
    while not rounds or (len(rounds) < 50 and time.perf_counter() < stop):
        order = range(len(calls))[:: -1 if len(rounds) % 2 else 1]
        seconds = {i: seconds_of(calls[i], repeats) for i in order}
        rounds.append([seconds[i] for i in range(len(calls))])
    return np.array(rounds)


def median_ratio(seconds: np.ndarray, ours: int = 0, theirs: int = 1) -> float:
    """Return the median over rounds of the ratio of two calls."""
    return float(np.median(seconds[:, ours] / seconds[:, theirs]))


class Results:
    """Ratios for each row of the table, by tree and optimizer."""

    def __init__(self) -> None:
        self.ratios: dict[str, dict[tuple[str, str], float]] = {row: {} for row in TARGETS}
        self.started = time.perf_counter()

    def elapsed(self) -> str:
        return f"{time.perf_counter() - self.started:.0f} s"

    def add(self, row: str, tree: str, name: str, ratio: float) -> None:
        self.ratios[row][tree, name] = ratio
        print(f"{self.elapsed()}, {tree}, {name}: {row} {ratio:.3g}", file=sys.stderr, flush=True)

    def table(self, trees: list[str]) -> str:
        """Return a Markdown table of medians and worst cases; values above a target are bold."""
        columns = [*trees, "all"] if len(trees) > 1 else trees
        lines = [["jgd relative to optax: median / worst", "target", *columns]]
        lines.append(["---", *["---:"] * (len(columns) + 1)])
        for row, ratios in self.ratios.items():
            if ratios:
                cells = [
                    _cell([r for (t, _), r in ratios.items() if t == tree], row) for tree in trees
                ]
                everything = [_cell(list(ratios.values()), row)] if len(trees) > 1 else []
                target = " / ".join("-" if t is None else f"{t:g}" for t in TARGETS[row])
                lines.append([row, target, *cells, *everything])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def worst(self, number: int = 4) -> str:
        """Return a list of the largest ratios of each row."""
        lines = []
        for row, ratios in self.ratios.items():
            ordered = sorted(ratios.items(), key=lambda item: -item[1])[:number]
            if len(ratios) > 1:
                shown = (f"{name} on {tree} {ratio:.3g}" for (tree, name), ratio in ordered)
                lines.append(f"- {row}: " + "; ".join(shown))
        return "\n".join(lines)


def _cell(ratios: list[float], row: str) -> str:
    if not ratios:
        return ""
    shown = []
    for ratio, target in zip((statistics.median(ratios), max(ratios)), TARGETS[row], strict=True):
        bold = "**" if target is not None and ratio > target else ""
        shown.append(f"{bold}{ratio:.3g}{bold}")
    return " / ".join(shown if len(ratios) > 1 else shown[1:])


def trace_as_argument(tx: Any, shapes: tuple[Any, Any, Any]) -> None:
    """Trace an update with the optimizer as an argument of the function."""
    update = lambda tx, updates, state, params: tx.update(updates, state, params)
    jax.jit(update, donate_argnums=2).trace(tx, *shapes)


def compile_in_turns(
    lowered: list[jax.stages.Lowered], limit: float
) -> tuple[list[float], list[jax.stages.Compiled]]:
    """Return for each program the least seconds of up to five compilations, and the result."""
    rounds, stop = [], time.perf_counter() + limit
    programs: list[Any] = [None] * len(lowered)
    while not rounds or (len(rounds) < 5 and time.perf_counter() < stop):
        # a new value of an irrelevant option, so that JAX does not reuse the compiled program
        options = {"xla_dump_max_hlo_modules": len(rounds)}
        seconds = []
        for i, one in enumerate(lowered):
            started = time.perf_counter()
            programs[i] = one.compile(compiler_options=options)
            seconds.append(time.perf_counter() - started)
        rounds.append(seconds)
    return [min(seconds) for seconds in zip(*rounds, strict=True)], programs


def stepper(program: jax.stages.Compiled, tx: Any, gradients: Any, params: Any) -> Call:
    """Return a call that runs a compiled update on the state of the call before."""
    state = tx.init(params)
    # a buffer that is an argument twice cannot be donated
    state = jax.tree.map(lambda x: jnp.array(x, copy=True), state)

    def step() -> None:
        nonlocal state
        updates, state = program(gradients, state, params)
        jax.tree.leaves(updates)[0].block_until_ready()

    return step


@lru_cache(maxsize=2)
def arrays(tree: str, seed: int) -> Any:
    """Return random arrays with the shapes of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape, s.dtype)), TREES[tree])


def measure(results: Results, name: str, tree: str, measurements: set[str], limit: float) -> None:
    """Measure one optimizer on one tree."""
    build = {**OPTIMIZERS, **COMPOSITIONS}[name]
    both = [build(jgd), build(OPTAX)]
    shapes = [shapes_of_arguments(tx, TREES[tree]) for tx in both]
    calls = [partial(trace, tx, s) for tx, s in zip(both, shapes, strict=True)]
    if measurements & {"trace", "argument"}:
        argument = (
            [partial(trace_as_argument, both[0], shapes[0])] if "argument" in measurements else []
        )
        seconds = in_turns(calls + argument, limit)
        row = f"trace, {name}" if name in COMPOSITIONS else "trace"
        results.add(row, tree, name, median_ratio(seconds))
        if argument:
            results.add("trace, optimizer as argument", tree, name, median_ratio(seconds, 2))
    if not measurements & {"compile", "run", "counts"}:
        return
    traced = [call() for call in calls]
    lowered = [one.lower() for one in traced]
    least, programs = compile_in_turns(lowered, 4 * limit if "compile" in measurements else 0)
    if "compile" in measurements:
        results.add("compile", tree, name, least[0] / least[1])
    if "counts" in measurements:
        ours, theirs = map(counts, traced, programs)
        for count in BOUNDS:
            results.add(count, tree, name, ours[count] / theirs[count])
    if "run" in measurements:
        inputs = arrays(tree, 0), arrays(tree, 1)
        steps = [stepper(p, tx, *inputs) for p, tx in zip(programs, both, strict=True)]
        results.add("run", tree, name, median_ratio(in_turns(steps, 4 * limit)))


def measure_cold(results: Results, name: str, rounds: int) -> None:
    """Measure the first trace of one optimizer after JAX's caches were cleared."""
    both = [OPTIMIZERS[name](library) for library in (jgd, OPTAX)]
    ratios = []
    for _ in range(rounds):
        seconds = []
        for tx in both:
            shapes = shapes_of_arguments(tx, TREES["small"])
            jax.clear_caches()
            seconds.append(seconds_of(partial(trace, tx, shapes)))
        ratios.append(seconds[0] / seconds[1])
    results.add("cold trace", "small", name, statistics.median(ratios))


def measure_python(results: Results, measurements: set[str], limit: float) -> None:
    """Measure Adam outside of jit: an eager update, and the call that creates it."""
    if "eager" in measurements:
        inputs, calls = (arrays("small", 0), arrays("small", 1)), []
        for tx in (jgd.adam(1e-3), optax.adam(1e-3)):
            state = tx.init(inputs[1])
            calls.append(lambda tx=tx, state=state: tx.update(inputs[0], state, inputs[1]))
        results.add("eager Adam", "small", "adam", median_ratio(in_turns(calls, 2 * limit)))
    if "construct" in measurements:
        calls = [lambda: jgd.adam(1e-3), lambda: optax.adam(1e-3)]
        seconds = in_turns(calls, limit)
        results.add("construct `adam(1e-3)`", "small", "adam", median_ratio(seconds))
        print(f"adam(1e-3): {np.median(seconds, 0) * 1e6} microseconds", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, metavar="NAME")
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds per measurement")
    parser.add_argument(
        "--quick", action="store_true", help="only the small tree, with 0.1 seconds"
    )
    options = parser.parse_args()
    if options.quick:
        options.trees, options.seconds = ["small"], 0.1
    jax.config.update("jax_enable_compilation_cache", False)
    measurements, limit = set(options.measurements), options.seconds
    names = options.optimizers or list(OPTIMIZERS)
    results = Results()
    measure_python(results, measurements, limit)
    for tree in options.trees:
        for name in names:
            chosen = set(measurements)
            if tree == "thousand" and not options.optimizers:
                chosen -= {"argument", "compile", "run", "counts"}
            if tree == "one leaf" and name == "muon":
                chosen -= {"run"}
            measure(results, name, tree, chosen, limit)
        if "trace" in measurements and tree != "thousand" and not options.optimizers:
            for name in COMPOSITIONS:
                measure(results, name, tree, {"trace"}, limit)
    for name in names:  # last, because these measurements clear JAX's caches
        if "small" not in options.trees:
            break
        if "cold" in measurements:
            measure_cold(results, name, 1 if options.quick else 3)
        if "counts" in measurements:
            for library, module, row in ((jgd, jgd, "jgd"), (OPTAX, optax, "optax")):
                deepest = frames(OPTIMIZERS[name](library), TREES["small"], module)
                results.add(f"frames of {row} (number)", "small", name, deepest)
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, optax {optax.__version__}, {device}", end=", ")
    print(f"{results.elapsed()}\n\n{results.table(options.trees)}\n")
    print(f"Worst:\n\n{results.worst()}")


if __name__ == "__main__":
    main()
