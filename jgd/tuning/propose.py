"""Optuna proposes settings, lanes train: ask for a batch, run it as one program, tell, repeat.

    result = jgd.optuna_search(
        task, jgd.adamw, steps=1000, trials=256,
        space={"learning_rate": jgd.loguniform(1e-5, 1e-1), "b1": jgd.uniform(0.8, 0.99)},
    )
    result.best.params, result.study.best_params

The search space is written once, in jgd's distributions. The study is in memory while it runs;
asking and telling then take little time compared to training.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np

from jgd.checks import at_least, refuse
from jgd.training import Run, Task
from jgd.tuning.events import CUT, Cut, Report
from jgd.tuning.loop import Decision, run
from jgd.tuning.options import Doc, Steps, Training, function_of, values_of
from jgd.tuning.plan import Plan
from jgd.tuning.result import Best, Result
from jgd.tuning.space import Choice, Distribution, LogUniform, batch, check_distributions
from jgd.tuning.sweep import Prepared, Stop, TrainingArguments, prepare

__all__ = ["Proposed", "optuna_search"]


class Proposed(NamedTuple):
    """Result of `optuna_search`."""

    study: Any  # optuna.Study
    best: Best
    rows: list[dict[str, Any]]  # settings of all batches, best first
    results: list[Result]  # one for each batch


@dataclass(frozen=True)
class SearchInputs:
    """Positional arguments of `optuna_search`."""

    task: Annotated[Task | Run, Doc("A `Task`, or any `Run`.")]
    factory: Annotated[
        Callable[..., Any],
        Doc("""A function from numbers to a setting, called with each number of the space by its
        name."""),
    ]
    steps: Steps
    trials: Annotated[int, at_least(1), Doc("Number of settings in all, at least 1.")]
    space: Annotated[
        Mapping[str, Distribution],
        Doc("Name -> `jgd.loguniform`, `jgd.uniform` or `jgd.choice`."),
    ]


@dataclass(frozen=True, kw_only=True)
class SearchArguments(Training, SearchInputs):
    """Arguments of `optuna_search`."""

    function: ClassVar[str] = "optuna_search"

    at_once: Annotated[
        int,
        at_least(1),
        Doc("""Settings proposed and trained together, at least 1. All batches share their compiled
        programs."""),
    ] = 32
    stop: Stop = None
    sampler: Annotated[
        Any,
        Doc("An Optuna sampler. None: TPE with constant_liar, for trials that run side by side."),
    ] = None
    pruner: Annotated[
        Any,
        Doc("""An Optuna pruner, asked at each report. None: no pruning. Some of Optuna's pruners
        compare with finished trials only: they cut nothing in the first batch."""),
    ] = None
    study: Annotated[
        Any,
        Doc("""An Optuna study to continue, with the direction of the metric. None: a new one."""),
    ] = None
    storage: Annotated[
        Any, Doc("An Optuna storage that the study is copied to at the end. None: no copy.")
    ] = None


@function_of(SearchArguments)
def optuna_search(arguments: SearchArguments) -> Proposed:
    """Train settings proposed by Optuna, as lanes.

    Args:
      {arguments}

    Returns: the study, the best setting with its trained state, and all rows.
    Raises: ImportError without Optuna: pip install "jgd[optuna]".
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _check_optuna(arguments)
    task, steps, space = arguments.task, arguments.steps, arguments.space
    check_distributions("optuna_search", space)
    names = list(space)
    options = values_of(arguments, Training)
    # the same for all batches, the last one too
    options["width"] = arguments.width or min(64, arguments.at_once * arguments.seeds)
    prepared = lambda settings: prepare(
        TrainingArguments(task, settings, steps, stop=arguments.stop, **options)
    )
    middle = [tuple(space[name].at(np.array([0.5]))[0] for name in names)]
    plan = prepared(batch(arguments.factory, names, middle)).plan
    study = _study(arguments, plan)
    distributions = {name: _of_optuna(space[name]) for name in names}
    results = list[Result]()
    for first in range(0, arguments.trials, arguments.at_once):
        size = min(arguments.at_once, arguments.trials - first)
        batch_trials = [study.ask(distributions) for _ in range(size)]
        points = [tuple(_value(space[n], trial.params[n]) for n in names) for trial in batch_trials]
        lanes = batch(arguments.factory, names, points)
        groups = lanes if isinstance(lanes, dict) else {"setting": lanes}
        sweep = prepared(groups)
        first = {name: int(sweep.plan.first[index]) for name, index in sweep.plan.index.items()}
        by_setting = {
            first[name] + setting: batch_trials[point]
            for name, lanes in groups.items()
            for setting, point in enumerate(lanes.points)
        }
        results.append(_trained(sweep, study, by_setting))
    if arguments.storage is not None:
        optuna.copy_study(
            from_study_name=study.study_name,
            from_storage=study._storage,
            to_storage=arguments.storage,
        )
    return _proposed(study, plan, results)


def _check_optuna(arguments: SearchArguments) -> None:
    """Raise TypeError for objects that are not Optuna's."""
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

    for name, kinds, description in (
        ("sampler", BaseSampler, "an Optuna sampler, such as optuna.samplers.TPESampler()"),
        ("pruner", BasePruner, "an Optuna pruner, such as optuna.pruners.MedianPruner()"),
        ("study", Study, "an Optuna study, such as optuna.create_study()"),
        ("storage", str | BaseStorage, "an Optuna storage, or its URL"),
    ):
        value = getattr(arguments, name)
        if value is not None and not isinstance(value, kinds):
            refuse(f"optuna_search: {name}", description, value)


def _study(arguments: SearchArguments, plan: Plan) -> Any:
    """Return the study to continue, or a new one. Raises ValueError for another direction."""
    import optuna

    study, direction = arguments.study, "maximize" if plan.mode == "max" else "minimize"
    if study is None:
        key = arguments.key
        seed = key if isinstance(key, int) else key[-1]
        sampler = optuna.samplers.TPESampler(constant_liar=True, seed=seed)
        return optuna.create_study(
            direction=direction,
            sampler=arguments.sampler or sampler,
            pruner=arguments.pruner or optuna.pruners.NopPruner(),
        )
    if study.direction.name.lower() != direction:
        raise ValueError(
            f"optuna_search: study must have the direction of {plan.metric}, {direction}, got"
            f" {study.direction.name.lower()}"
        )
    return study


def _proposed(study: Any, plan: Plan, results: list[Result]) -> Proposed:
    """Rank the settings of all batches together."""
    score = lambda row: (
        plan.sign * row[plan.metric] if math.isfinite(row[plan.metric]) else math.inf
    )
    short = lambda row: -row["at"] if row["ended"] in ("cut", "diverged") else -math.inf
    rows = [row for result in results for row in result.rows]
    rows.sort(key=lambda row: (short(row), score(row)))
    ranked = ({**row, "rank": rank} for rank, row in enumerate(rows, 1))
    rows = [{k: x for k, x in row.items() if k != "tied"} for row in ranked]  # within a batch only
    best = min(results, key=lambda result: score(result.best.row)).best
    return Proposed(study, best, rows, results)


def _trained(prepared: Prepared, study: Any, trials: Mapping[int, Any]) -> Result:
    """Train a batch, and tell the study how each setting ended."""
    from optuna.trial import TrialState

    plan, ledger = prepared.plan, prepared.sweep.ledger
    reported: dict[tuple[int, int], list[float]] = {}

    def prune(events: list[Report | Cut]) -> Decision:
        cuts = list[int]()
        for report in events:
            if not isinstance(report, Report):
                continue
            lanes = plan.offset(report.group) + report.lanes
            for lane, value in zip(lanes, report.metrics[plan.metric], strict=True):
                setting = int(lane) // plan.seeds
                values = reported.setdefault((setting, report.step), [])
                values.append(float(value))
                if len(values) == plan.seeds and math.isfinite(sum(values)):
                    trials[setting].report(sum(values) / plan.seeds, report.step)
                    if trials[setting].should_prune():
                        mine = plan.lanes_of(setting)
                        cuts += mine[ledger.alive[mine]].tolist()
        return Decision(cuts=tuple(cuts))

    def deliver(events: list[Report | Cut]) -> None:
        for event in events:
            prepared.record.apply(event)

    run(prepared.sweep, deliver, prune, checkpoint=lambda: None)
    prepared.sweep.engine.close()
    for setting, trial in trials.items():
        lanes = plan.lanes_of(setting)
        value = float(ledger.value[lanes].mean())
        if (ledger.ending[lanes] == CUT).any():
            study.tell(trial, state=TrialState.PRUNED)
        elif math.isfinite(value):
            study.tell(trial, value)
        else:
            study.tell(trial, state=TrialState.FAIL)
    return prepared.result()


def _of_optuna(distribution: Distribution) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(distribution, Choice):
        return CategoricalDistribution([_label(value) for value in distribution.values])
    log = isinstance(distribution, LogUniform)
    return FloatDistribution(distribution.low, distribution.high, log=log)


def _label(value: Any) -> Any:
    """Return a choice as Optuna records it: a plain value itself, others by their repr."""
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def _value(distribution: Distribution, chosen: Any) -> Any:
    if not isinstance(distribution, Choice):
        return chosen
    return next(value for value in distribution.values if _label(value) == chosen)
