"""`sweep` and `iter_sweep`: many settings and seeds as lanes of compiled programs."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jgd.training import Run, Task
from jgd.tuning.driver import Report, iter_plan, prepare
from jgd.tuning.plan import Plan
from jgd.tuning.results import Collector, Result
from jgd.tuning.store import Folder

__all__ = ["iter_sweep", "sweep"]


def iter_sweep(
    task: Task | Run,
    settings: Any,
    steps: int,
    *,
    seeds: int = 1,
    key: int = 0,
    width: int | None = None,
    report_every: int | None = None,
) -> Iterator[Report]:
    """The reports of a sweep as they come, tile by tile. Args as `sweep`."""
    options: dict[str, Any] = dict(seeds=seeds, key=key, width=width, report_every=report_every)
    plan, groups, run = prepare(task, settings, steps, **options)
    return iter_plan(plan, groups, run)


def sweep(
    task: Task | Run,
    settings: Any | Mapping[str, Any],
    steps: int,
    *,
    seeds: int = 1,
    key: int = 0,
    width: int | None = None,
    report_every: int | None = None,
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
    folder: str | Path | None = None,
    on_report: Callable[[Plan, Report], None] | None = None,
) -> Result:
    """Train every setting with every seed, and rank them.

        lanes = jgd.grid(jgd.adam, learning_rate=np.logspace(-4, -1, 64))
        result = jgd.sweep(task, {"adam": lanes, "lion": other_lanes}, steps=2000, seeds=3)
        result.rows[0], result.best.params

    Args:
      task: a `Task`, or any `Run`.
      settings: a batch of settings, or a dict of named ones: what `grid`, `random_search`, `stack`
        or `jax.vmap` of a factory gives. One program is compiled for each.
      steps: of each training, at least 4.
      seeds: trainings of each setting, with initial parameters of their own. All see the same
        batches in the same order.
      key: an int, of the initial parameters.
      width: lanes that step together, at least 1; a tile with fewer is filled up. None: 64, or all
        lanes of a group with fewer. The numbers agree bit for bit at one width, and to rounding at
        another.
      report_every: steps between reports; None: a twentieth of `steps`.
      metric: of `evaluate`, to rank by; None: "accuracy", or "loss", or the first.
      mode: "min" or "max"; None: max for a metric with "acc" in its name, else min.
      folder: a new folder for the plan, the journal and the results; None writes nothing.
      on_report: called with the `Plan` and each `Report`, as it comes.

    Returns: a `Result`: ranked rows, curves, and the best setting with its trained state.
    Raises: ValueError, before anything is trained or written, for settings that are no batch, an
      `evaluate` that returns no dict of scalars, or a count, metric or mode out of range.
    """
    options: dict[str, Any] = dict(seeds=seeds, key=key, width=width, report_every=report_every)
    plan, groups, run = prepare(task, settings, steps, **options)
    collector = Collector(plan, groups, metric, mode)
    files = None if folder is None else Folder(folder)
    if files is not None:
        files.write_plan(plan)
    for report in iter_plan(plan, groups, run):
        if files is not None:
            files.journal(report)
        collector.add(report)
        if on_report is not None:
            on_report(plan, report)
    result = collector.result()
    if files is not None:
        summary = {"metric": result.metric, "mode": result.mode, "steps": steps, "seeds": seeds}
        files.write_results(result.rows, summary)
    return result
