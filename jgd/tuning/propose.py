"""Optuna proposes, lanes train: ask for a batch of settings, run it as one program, tell, repeat.

    found = jgd.optuna_search(
        task, jgd.adamw, steps=1000, trials=256,
        space={"learning_rate": jgd.loguniform(1e-5, 1e-1), "b1": jgd.uniform(0.8, 0.99)},
    )
    found.best.params, found.study.best_params

The search space is written once, in jgd's distributions. The study stays in memory while it runs,
where asking and telling cost next to nothing beside the training.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jgd.training import Run, Task
from jgd.tuning.driver import Cut, Sweep, prepare
from jgd.tuning.prune import CUT
from jgd.tuning.results import Best, Collector, Result
from jgd.tuning.space import Choice, Distribution, Lanes, LogUniform, batch, is_scalar

__all__ = ["Proposed", "optuna_search"]


TRAINING = {  # what the options may say
    *("seeds", "key", "order", "metric", "mode", "best", "width", "report_every", "stop"),
    *("drop_diverged", "devices"),
}


class Proposed(NamedTuple):
    """What `optuna_search` returns."""

    study: Any  # optuna.Study
    best: Best
    rows: list[dict[str, Any]]  # of all batches, best first
    results: list[Result]  # one for each batch


def optuna_search(
    task: Task | Run,
    factory: Callable[..., Any],
    steps: int,
    trials: int,
    space: Mapping[str, Distribution],
    *,
    at_once: int = 32,
    sampler: Any = None,
    pruner: Any = None,
    study: Any = None,
    storage: str | None = None,
    **options: Any,
) -> Proposed:
    """Settings proposed by Optuna, trained as lanes.

    Args:
      task, steps: as `jgd.sweep`.
      factory: numbers to a setting; called with each number of the space by its name.
      trials: how many settings in all.
      space: name -> `jgd.loguniform`, `jgd.uniform` or `jgd.choice`.
      at_once: settings asked for and trained together; 32 by default. All batches share their
        compiled programs.
      sampler: an Optuna sampler; None: its TPE, told that trials run side by side.
      pruner: an Optuna pruner, asked at each report; None: none. Note that some of Optuna's compare
        with finished trials only, so that they cut nothing within the first batch.
      study: an Optuna study to go on with; None: a new one. It has the direction of the metric.
      storage: an Optuna storage that the study is copied to at the end; None: none.
      options: those of `jgd.sweep` that decide about the training: seeds, key, order, metric, mode,
        best, width, report_every, stop, drop_diverged, devices.

    Returns: the study, the best setting with its trained state, and all rows.
    Raises: ImportError without Optuna: pip install "jgd[optuna]".
    """
    import optuna

    for name in options.keys() - TRAINING:
        raise TypeError(
            f"optuna_search: {name} is none of {', '.join(sorted(TRAINING))}: Optuna decides"
        )
    for name, count in {"trials": trials, "at_once": at_once}.items():
        if count < 1:
            raise ValueError(f"optuna_search: {name} must be at least 1, got {count}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names, seeds = list(space), options.get("seeds", 1)
    options.setdefault("width", min(64, at_once * seeds))  # of all batches, the last one too
    compiled: dict[Any, Any] = {}
    middle = [tuple(space[name].at(np.array([0.5]))[0] for name in names)]
    plan = prepare(task, batch(factory, names, middle), steps, compiled=compiled, **options).plan
    if study is not None and (study.direction.name == "MAXIMIZE") != (plan.mode == "max"):
        raise ValueError(
            f"optuna_search: the study is to {study.direction.name.lower()}, the mode of"
            f" {plan.metric} is {plan.mode}"
        )
    if study is None:
        study = optuna.create_study(
            direction="maximize" if plan.mode == "max" else "minimize",
            sampler=sampler
            or optuna.samplers.TPESampler(constant_liar=True, seed=options.get("key", 0)),
            pruner=pruner or optuna.pruners.NopPruner(),
        )
    distributions = {name: _of_optuna(space[name]) for name in names}
    results: list[Result] = []
    for first in range(0, trials, at_once):
        asked = [study.ask(distributions) for _ in range(min(at_once, trials - first))]
        points = [tuple(_value(space[n], trial.params[n]) for n in names) for trial in asked]
        lanes = batch(factory, names, points)
        groups = lanes if isinstance(lanes, dict) else {"setting": lanes}
        prepared = prepare(task, groups, steps, compiled=compiled, **options)
        results.append(_trained(prepared, study, _by_setting(names, points, asked, groups)))
    if storage is not None:
        optuna.copy_study(
            from_study_name=study.study_name, from_storage=study._storage, to_storage=storage
        )
    best_of = max if results[0].mode == "max" else min
    metric = results[0].metric
    finite = [r for r in results if math.isfinite(r.best.row[metric])] or results
    rows = [row for result in results for row in result.rows]
    last = -math.inf if results[0].mode == "max" else math.inf
    score = lambda row: row[metric] if math.isfinite(row[metric]) else last
    sign = -1 if results[0].mode == "max" else 1
    short = lambda row: -row["at"] if row["ended"] in ("cut", "diverged") else -math.inf
    rows.sort(key=lambda row: (short(row), sign * score(row)))
    ranked = ({**row, "rank": place} for place, row in enumerate(rows, 1))
    rows = [{k: x for k, x in row.items() if k != "tied"} for row in ranked]  # was of a batch
    return Proposed(study, best_of(finite, key=lambda r: score(r.best.row)).best, rows, results)


Trials = dict[tuple[str, int], Any]  # by group and setting


def _by_setting(
    names: list[str], points: list[tuple[Any, ...]], asked: list[Any], groups: Mapping[str, Lanes]
) -> Trials:
    """Which trial is which setting of which group; in a group they keep their order."""
    found: Trials = {}
    taken = dict.fromkeys(groups, 0)
    for point, trial in zip(points, asked, strict=True):
        values = dict(zip(names, point, strict=True))
        belongs = lambda lanes, values=values: all(
            name in lanes.fixed and lanes.fixed[name] == value
            if name not in lanes.axes
            else is_scalar(value)
            for name, value in values.items()
        )
        label = next(label for label, lanes in groups.items() if belongs(lanes))
        found[label, taken[label]] = trial
        taken[label] += 1
    return found


def _trained(prepared: Sweep, study: Any, trials: Trials) -> Result:
    """Train a batch, and tell the study how each setting ended."""
    from optuna.trial import TrialState

    collector, seeds = Collector(prepared), prepared.plan.seeds
    heard: dict[tuple[str, int, int], list[float]] = {}
    for report in prepared:
        if isinstance(report, Cut):
            collector.cut(report)
            continue
        collector.add(report)
        for lane, value in zip(report.lanes, report.metrics[prepared.plan.metric], strict=True):
            setting = int(lane) // seeds
            values = heard.setdefault((report.group, setting, report.step), [])
            values.append(float(value))
            if len(values) == seeds and math.isfinite(sum(values)):
                trial = trials[report.group, setting]
                trial.report(sum(values) / seeds, report.step)
                if trial.should_prune():
                    lanes = prepared.board.lanes_of(setting)
                    alive = lanes[prepared.board.alive[report.group][lanes]]
                    prepared.end({report.group: alive}, CUT)
    result = collector.result()
    for (group, setting), trial in trials.items():
        lanes = prepared.board.lanes_of(setting)
        value = float(prepared.board.value[group][lanes].mean())
        if (prepared.board.ending[group][lanes] == CUT).any():
            study.tell(trial, state=TrialState.PRUNED)
        elif math.isfinite(value):
            study.tell(trial, value)
        else:
            study.tell(trial, state=TrialState.FAIL)
    return result


def _of_optuna(distribution: Distribution) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(distribution, Choice):
        return CategoricalDistribution([_label(value) for value in distribution.values])
    log = isinstance(distribution, LogUniform)
    return FloatDistribution(distribution.low, distribution.high, log=log)


def _label(value: Any) -> Any:
    """What Optuna keeps of a choice: plain values as they are, others by their looks."""
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def _value(distribution: Distribution, chosen: Any) -> Any:
    if not isinstance(distribution, Choice):
        return chosen
    return next(value for value in distribution.values if _label(value) == chosen)
