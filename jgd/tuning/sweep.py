"""`sweep` and `iter_sweep`: many settings and seeds as lanes of compiled programs."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from jgd.pytree import Monitor
from jgd.training import Run, Task
from jgd.tuning.devices import agreed
from jgd.tuning.driver import Cut, Report, Snapshot, Sweep, prepare
from jgd.tuning.plan import Plan
from jgd.tuning.prune import Halving
from jgd.tuning.results import Collector, Result
from jgd.tuning.store import Folder

__all__ = ["Interrupted", "iter_sweep", "sweep"]


def iter_sweep(
    task: Task | Run, settings: Any, steps: int, **options: Any
) -> Iterator[Report | Cut]:
    """The reports of a sweep as they come, and the cuts. Args as `sweep`."""
    return iter(prepare(task, settings, steps, **options))


def sweep(
    task: Task | Run,
    settings: Any | Mapping[str, Any],
    steps: int,
    *,
    seeds: int = 1,
    key: int = 0,
    order: Literal["shared", "own"] = "shared",
    width: int | None = None,
    report_every: int | None = None,
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
    best: Literal["final", "ever"] = "final",
    target: float | None = None,
    keep: int = 1,
    halving: Halving | None = None,
    stop: Monitor | int | None = None,
    drop_diverged: bool = False,
    budget: int | None = None,
    seconds: float | None = None,
    devices: int | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: float = 30.0,
    on_report: Callable[[Plan, Report], None] | None = None,
) -> Result:
    """Train every setting with every seed, and rank them.

        lanes = jgd.grid(jgd.adam, learning_rate=np.logspace(-4, -1, 64))
        result = jgd.sweep(task, {"adam": lanes, "lion": other_lanes}, steps=2000, seeds=3)
        result.rows[0], result.best.params

    Args:
      task: a `Task`, or any `Run`.
      settings: a batch of settings, or a dict of named ones: what `grid`, `random_search`, `stack`
        or `jax.vmap` of a factory gives. One program is compiled for each, at each width.
      steps: of each training, at least 4.
      seeds: trainings of each setting, with initial parameters of their own, the same for all
        settings.
      key: an int, of the initial parameters.
      order: of the batches. "shared" (default): all lanes see the same ones. "own": each seed has
        an order of its own, the same for all settings; `task.batch` then takes (step, seed), as
        what `minibatches` makes does.
      width: lanes that step together, at least 1; a tile with fewer is filled up. None: the
        smallest within 5 per cent of the fastest, found by a probe where the sweep is long enough
        for one; else 64, or all lanes of a group with fewer. The numbers agree bit for bit at one
        width, and to rounding at another.
      report_every: steps between reports; None: a twentieth of `steps`.
      metric: of `evaluate`, to rank by; None: "accuracy", or "loss", or the first.
      mode: "min" or "max"; None: max for a metric with "acc" in its name, else min.
      best: which report of a lane counts. "final" (default): its last one; "ever": its best one,
        and the state that is given back is that of then; lanes are twice as big for it.
      target: a value of `metric`; a lane that is there ends, and fewer steps are better. None: no
        such end.
      keep: how many of the best settings come back with their states, at least 1.
      halving: `jgd.successive_halving(...)` or `jgd.hyperband(...)`: at some steps only the best
        settings go on. None: all run to their end.
      stop: `jgd.stopping.early_stopping(...)` on `metric`, for each lane, or its patience alone; a
        report is an epoch. None: no lane stops early.
      drop_diverged: True ends a lane whose training loss is not finite.
      budget: lane-steps, at least 1, those that fill up tiles included, after which no chunk is
        begun; what has not ended is out of budget, what has not begun is not run. None: none.
      seconds: likewise, of the clock: such a sweep is not the same twice. None: none.
      devices: how many to deal the lanes of a tile out to, without a word between them; widths are
        multiples of it. None: all of this host.
      folder: a new folder for plan, journal, checkpoints and results; None writes nothing.
      resume: True goes on with the sweep of `folder`, from its last checkpoint, to the numbers that
        it would have ended with, bit for bit on the same machine. All other arguments must be those
        it was begun with.
      checkpoint_every: seconds between checkpoints in `folder`: what a crash can lose.
      on_report: called with the `Plan` and each `Report`, as it comes.

    A lane that has ended costs nothing from the next report on, as far as the others fit narrower
    programs; at a rung they always do.

    Settings are ranked by the mean over their seeds; the table has its standard error, and says
    which settings are tied with the best: no worse than the standard error of the difference.

    Returns: a `Result`: ranked rows, curves, and the best settings with their trained states.
    Raises: ValueError, before anything is trained or written, for settings that are no batch, NaN
      in the data, a learning rate that is negative or NaN, an `evaluate` that returns no dict of
      scalars, or a count, metric or mode out of range.
    """
    if resume and folder is None:
        raise ValueError("sweep: resume wants the folder of a sweep")
    if not checkpoint_every >= 0:
        raise ValueError(f"sweep: checkpoint_every must be at least 0, got {checkpoint_every}")
    files = None if folder is None else Folder(folder, resume=resume)
    prepared = prepare(
        task,
        settings,
        steps,
        seeds=seeds,
        key=key,
        order=order,
        width=width,
        report_every=report_every,
        metric=metric,
        mode=mode,
        best=best,
        target=target,
        keep=keep,
        halving=halving,
        stop=stop,
        drop_diverged=drop_diverged,
        budget=budget,
        seconds=seconds,
        devices=devices,
        written=files.read_plan() if files is not None and resume else None,
    )
    collector = Collector(prepared)
    if files is not None and resume:
        _go_back(prepared, collector, files)
    elif files is not None:
        files.write_plan(prepared.plan)
    last = time.monotonic()
    try:
        for report in prepared:
            if files is not None:
                files.journal(report)
            if isinstance(report, Cut):
                collector.cut(report)
                continue
            collector.add(report)
            if files is not None:
                if report.snapshot is not None:
                    _checkpoint(files, report.snapshot, collector)
                    last = time.monotonic()
                due = time.monotonic() - last > checkpoint_every and not files.busy()
                prepared.wanted = agreed(due)
            if on_report is not None:
                on_report(prepared.plan, report)
    except KeyboardInterrupt:
        if jax.process_count() > 1:  # the others may be elsewhere
            raise
        for report in prepared.stop():
            if isinstance(report, Report):
                collector.add(report)
            else:
                collector.cut(report)
        raise Interrupted(_finished(prepared, collector, files, whole=False)) from None
    except BaseException:
        if files is not None:  # what a checkpoint has begun to write, it ends
            with contextlib.suppress(Exception):
                files.finish()
        raise
    return _finished(prepared, collector, files, whole=True)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what there was.

    Attributes:
      result: a `Result` of the lanes so far; those that had not ended are out of budget.
    """

    def __init__(self, result: Result) -> None:
        super().__init__("interrupted")
        self.result = result


def _checkpoint(files: Folder, snapshot: Snapshot, collector: Collector) -> None:
    names, states = collector.states()
    files.checkpoint({**snapshot.meta, "ended": names}, {**snapshot.states, **states})


def _go_back(prepared: Sweep, collector: Collector, files: Folder) -> None:
    """To the last checkpoint: the journal up to it, and the states."""
    manifest = files.last_checkpoint()
    files.go_back(manifest)
    if manifest is None:
        return
    for line in files.read_journal(manifest["journal"]):
        collector.replay(line)
    prepared.restore(manifest, files.load)
    collector.restore(manifest["ended"], files.load)


def _finished(
    prepared: Sweep, collector: Collector, files: Folder | None, *, whole: bool
) -> Result:
    """The result, in the folder as well."""
    result = collector.result()
    if files is not None:
        plan = result.plan
        summary = {"metric": plan.metric, "mode": plan.mode, "steps": plan.steps}
        files.write_results(result.rows, {**summary, "seeds": plan.seeds})
        files.write_curves(result.curves)
        if whole:
            _checkpoint(files, prepared.snapshot(), collector)
        files.finish()
    return result
