"""Optuna proposes settings, lanes train: ask for a batch, run it as one program, tell, repeat.

    result = jgd.optuna_search(
        task, jgd.adamw, steps=1000, trials=256,
        space={"learning_rate": jgd.loguniform(1e-5, 1e-1), "b1": jgd.uniform(0.8, 0.99)},
    )
    result.best.params, result.study.best_params

A batch is a sweep. With a folder, a search that died goes on:

search.json          the arguments that a resumed search must share, and the name of the study
batch-0.json         the trials of the batch, written before it trains
batch-0/             its sweep, which a resumed search resumes: with it the study sees every report
"""

import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from jgd.training import Run, Task
from jgd.tuning import devices
from jgd.tuning.events import Cut, Report
from jgd.tuning.folder import Folder, read_json, write_json
from jgd.tuning.options import Doc, count, function_of, values_of
from jgd.tuning.plan import Plan
from jgd.tuning.result import Best, Result
from jgd.tuning.space import Distribution, Lanes, batch
from jgd.tuning.sweep import (
    Cutting,
    Interrupted,
    Recorded,
    SweepArguments,
    TrainingArguments,
    prepare,
    run_sweep,
)

__all__ = ["Proposed", "optuna_search"]

TAG = "jgd"  # the user attribute of a trial that says which one of which search it is


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
    steps: Annotated[int, Doc("Steps of each training, at least 4.")]
    trials: Annotated[
        int, Doc("Number of settings in all, at least 1. A resumed search may ask for more.")
    ]
    space: Annotated[
        Mapping[str, Distribution] | Callable[[Any], Mapping[str, Any]],
        Doc("""Name -> `jgd.loguniform`, `jgd.uniform`, `jgd.integers` or `jgd.choice`. Or a
        function of an Optuna trial that returns the arguments of the factory, for a space in which
        one value decides on others."""),
    ]


@dataclass(frozen=True, kw_only=True)
class SearchArguments(Recorded, SearchInputs):
    """Arguments of `optuna_search`."""

    at_once: Annotated[
        int,
        Doc("""Settings proposed and trained together, at least 1. All batches share their compiled
        programs."""),
    ] = 32
    sampler: Annotated[
        Any,
        Doc("""An Optuna sampler, or a function of the number of the batch that returns one. None:
        that of `study`, or TPE with constant_liar, for trials that run side by side, seeded by key
        and batch."""),
    ] = None
    pruner: Annotated[
        Any,
        Doc("""An Optuna pruner, asked at each report, beside `halving` or without. None: that of
        `study`, or no pruning. Some of Optuna's pruners compare with finished trials only: they cut
        nothing in the first batch."""),
    ] = None
    study: Annotated[
        Any,
        Doc("""An Optuna study to continue, with the direction of the metric. None: a new one, in
        memory."""),
    ] = None
    storage: Annotated[
        Any,
        Doc("""An Optuna storage, or its URL, to which finished trials are added after each batch,
        under the name of the study. None: no copy."""),
    ] = None
    study_name: Annotated[
        str | None,
        Doc("""Name of a new study. If `storage` has a study of this name, the search continues it.
        None: a random name."""),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("trials", "at_once"):
            count(f"optuna_search: {name}", getattr(self, name))
        if callable(self.space):
            return
        if not isinstance(self.space, Mapping) or not self.space:
            raise TypeError(
                "optuna_search: space must be a dict of distributions or a function of a trial, got"
                f" {self.space!r}"
            )
        for name, values in self.space.items():
            if not isinstance(values, Distribution):
                raise TypeError(
                    f"optuna_search: {name} must be a distribution such as jgd.uniform or"
                    f" jgd.choice, got {values!r}"
                )


@function_of(SearchArguments)
def optuna_search(arguments: SearchArguments) -> Proposed:
    """Train settings proposed by Optuna, as lanes.

        def space(trial):  # one value may decide on others
            name = trial.suggest_categorical("optimizer", ["adam", "momentum"])
            rate = trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)
            more = {"b1": trial.suggest_float("b1", 0.8, 0.99)} if name == "adam" else {}
            return {"optimizer": name, "learning_rate": rate, **more}

        build = lambda optimizer, **numbers: jgd.get(optimizer)(**numbers)
        found = jgd.optuna_search(task, build, 1000, 64, space, folder="runs/search")

    Args:
      {arguments}

    Each batch is a sweep in a folder of its own, `folder`/batch-0 and so on. A resumed search reads
    the finished batches, goes on with the one that was running, and proposes the others. They are
    those of an uninterrupted search if the sampler is the default, or a function of the batch that
    depends on nothing else; other samplers start with their own random numbers anew.

    A setting that a rung or the pruner cuts is a pruned trial, one whose metric is not finite a
    failed one. With a target, settings are ranked by their steps to it; Optuna sees the metric.

    Returns: the study, the best setting with its trained state, and all rows.
    Raises: ImportError without Optuna: pip install "jgd[optuna]". What `sweep` raises. Interrupted,
      on Ctrl-C, with the result so far.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _check_objects(arguments)
    plan, log = _plan(arguments), _Log(arguments)
    study, stored = _studies(arguments, plan, log)
    log.start(study.study_name)
    results = list[Result]()
    try:
        while (number := len(results)) < len(log.batches) or log.trials < arguments.trials:
            if number < len(log.batches):
                trials = _asked_before(study, log.batches[number])
            else:
                _reseed(study, arguments, number)
                trials = _ask(study, arguments, log)
            results.append(_trained(arguments, study, trials, log.folder(number)))
            _store(study, stored)
    except KeyboardInterrupt as error:
        results += [error.result] if isinstance(error, Interrupted) else []
        if not results:
            raise
        _store(study, stored)
        raise Interrupted(_proposed(study, plan, results)) from None
    return _proposed(study, plan, results)


def _check_objects(arguments: SearchArguments) -> None:
    """Raise TypeError for an object that is not Optuna's."""
    import optuna

    kinds: dict[str, tuple[type[Any], ...]] = {
        "sampler": (optuna.samplers.BaseSampler, Callable),
        "pruner": (optuna.pruners.BasePruner,),
        "study": (optuna.Study,),
        "storage": (optuna.storages.BaseStorage, str),
    }
    for name, kind in kinds.items():
        value = getattr(arguments, name)
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"optuna_search: {name} must be an Optuna {name}, got {value!r}")


# --- studies ---------------------------------------------------------------------------------


def _studies(arguments: SearchArguments, plan: Plan, log: "_Log") -> tuple[Any, Any]:
    """Return the study that proposes, and its copy in the storage or None.

    Raises: ValueError for a study of another direction.
    """
    import optuna

    study, stored = arguments.study, None
    direction = "maximize" if plan.mode == "max" else "minimize"
    if study is None:
        pruner = optuna.pruners.NopPruner()
        study = optuna.create_study(study_name=log.study, direction=direction, pruner=pruner)
    if arguments.pruner is not None:
        study.pruner = arguments.pruner
    if arguments.storage is not None:
        stored = optuna.create_study(
            study_name=study.study_name,
            storage=arguments.storage,
            direction=direction,
            load_if_exists=True,
        )
    for each in (study, stored):
        directions = [] if each is None else [x.name.lower() for x in each.directions]
        if each is not None and directions != [direction]:
            raise ValueError(
                f"optuna_search: study must have the direction of {plan.metric}, {direction}, got"
                f" {' and '.join(directions)}"
            )
    if stored is not None and arguments.study is None:  # trials of earlier searches
        for trial in stored.get_trials(deepcopy=False):
            if trial.state.is_finished() and not _tag(trial).startswith(log.id):
                study.add_trial(trial)
    return study, stored


def _tag(trial: Any) -> str:
    return trial.user_attrs.get(TAG, "")


def _by_tag(study: Any) -> dict[str, Any]:
    return {_tag(trial): trial for trial in study.get_trials(deepcopy=False)}


def _reseed(study: Any, arguments: SearchArguments, number: int) -> None:
    """Give the study the sampler of a batch."""
    import optuna

    sampler = arguments.sampler
    if sampler is None and arguments.study is None:
        seed = np.random.SeedSequence((arguments.key % 2**32, number)).generate_state(1)
        sampler = optuna.samplers.TPESampler(constant_liar=True, seed=int(seed[0]))
    elif callable(sampler):
        sampler = sampler(number)
    study.sampler = sampler or study.sampler


def _asked_before(study: Any, entries: list[dict[str, Any]]) -> list[Any]:
    """Return the trials of a batch of the log, which a study in a storage may have already."""
    import optuna
    from optuna.distributions import json_to_distribution

    known = _by_tag(study)
    for entry in entries:
        if entry["user_attrs"][TAG] not in known:
            kinds = {name: json_to_distribution(x) for name, x in entry["distributions"].items()}
            running = optuna.trial.TrialState.RUNNING
            entry = {**entry, "distributions": kinds, "state": running}
            study.add_trial(optuna.trial.create_trial(**entry))
    known = _by_tag(study)
    trials = [known[entry["user_attrs"][TAG]] for entry in entries]
    # a trial that is finished ignores what is reported to it
    return [t if t.state.is_finished() else optuna.Trial(study, t._trial_id) for t in trials]


def _store(study: Any, stored: Any) -> None:
    """Add the finished trials that the study in the storage lacks."""
    if stored is None or not devices.is_writer():
        return
    known = _by_tag(stored)
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and _tag(trial) not in known:
            stored.add_trial(trial)


# --- the log ---------------------------------------------------------------------------------


class _Log:
    """The trials of each batch as they were asked, in the folder of the search if it has one.

    Raises: FileExistsError for a new search in a folder that holds something, ValueError for a
      resumed one with other arguments or a damaged file.
    """

    def __init__(self, arguments: SearchArguments) -> None:
        space = arguments.space
        shown = "a function" if callable(space) else {k: repr(d) for k, d in space.items()}
        self.arguments = dict(steps=arguments.steps, at_once=arguments.at_once, space=shown)
        self.path = None if arguments.folder is None else Path(arguments.folder)
        self.id, self.study = uuid.uuid4().hex, arguments.study_name
        self.batches = list[list[dict[str, Any]]]()
        if self.path is None or not arguments.resume:
            Folder(self.path)  # must be empty
            return
        if not (self.path / "search.json").exists():
            raise FileNotFoundError(f"{self.path} holds no search: there is no search.json")
        written = read_json(self.path / "search.json")
        for name, now in self.arguments.items():
            if (was := written.get(name)) != now:
                raise ValueError(f"resume: {self.path}: {name} was {was} and is now {now}")
        self.id, self.study = written["id"], written["study"]
        while (path := self.path / f"batch-{len(self.batches)}.json").exists():
            self.batches.append(read_json(path)["trials"])
        devices.wait_for_all()  # all processes have read them before process 0 writes more

    @property
    def trials(self) -> int:
        """Return the number of trials in all batches so far."""
        return sum(map(len, self.batches))

    def folder(self, number: int) -> Path | None:
        """Return the folder of a batch."""
        return None if self.path is None else self.path / f"batch-{number}"

    def start(self, study: str) -> None:
        """Record the search."""
        self._write("search.json", {"id": self.id, "study": study, **self.arguments})

    def add(self, trials: list[dict[str, Any]]) -> None:
        """Record the trials of the next batch."""
        self._write(f"batch-{len(self.batches)}.json", {"trials": trials})
        self.batches.append(trials)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        if self.path is not None and devices.is_writer():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / name, content)


# --- a batch ---------------------------------------------------------------------------------


def _ask(study: Any, arguments: SearchArguments, log: _Log) -> list[Any]:
    """Return the trials of the next batch, once they are in the log."""
    from optuna.distributions import distribution_to_json

    number, trials = len(log.batches), list[Any]()
    for index in range(min(arguments.at_once, arguments.trials - log.trials)):
        trials.append(study.ask())
        trials[-1].set_user_attr(TAG, f"{log.id}/batch-{number}/{index}")
        _point(arguments.space, trials[-1])  # before the next one is asked
    known = _by_tag(study)
    frozen = [known[_tag(trial)] for trial in trials]
    plain = lambda kinds: {name: distribution_to_json(kind) for name, kind in kinds.items()}
    same = "params", "user_attrs", "system_attrs"
    log.add(
        [
            {**{name: getattr(t, name) for name in same}, "distributions": plain(t.distributions)}
            for t in frozen
        ]
    )
    return trials


def _point(space: Any, trial: Any) -> Mapping[str, Any]:
    """Return the arguments of the factory that a trial suggests; asked again, the same."""
    if not callable(space):
        return {name: values.suggest(trial, name) for name, values in space.items()}
    point = space(trial)
    if not isinstance(point, Mapping) or not point:
        raise TypeError(
            f"optuna_search: space must return a dict of the factory's arguments, got {point!r}"
        )
    return point


def _groups(arguments: SearchArguments, trials: Sequence[Any]) -> dict[str, Lanes]:
    """Return the settings of trials by structure, under names that all batches share."""
    lanes = batch(arguments.factory, [_point(arguments.space, trial) for trial in trials])
    name = getattr(arguments.factory, "__name__", "")
    name = name if name.isidentifier() else ""
    groups = dict[str, Lanes]()
    for each in lanes.values() if isinstance(lanes, dict) else [lanes]:
        structure = [f"{k}={value}" for k, value in each.fixed.items()]
        structure += each.axes if callable(arguments.space) else []
        groups[f"{name} {', '.join(structure)}".strip() or "setting"] = each
    return groups


def _options(arguments: SearchArguments, cls: type[Any]) -> dict[str, Any]:
    """Return the options of a sweep, with one width for all batches, the last one too."""
    width = arguments.width or min(64, arguments.at_once * arguments.seeds)
    return {**values_of(arguments, cls), "width": width}


def _plan(arguments: SearchArguments) -> Plan:
    """Return the plan of one setting: its metric and mode, and errors of the arguments."""
    import optuna

    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    groups, options = _groups(arguments, [trial]), _options(arguments, Cutting)
    return prepare(TrainingArguments(arguments.task, groups, arguments.steps, **options)).plan


def _trained(
    arguments: SearchArguments, study: Any, trials: Sequence[Any], folder: Path | None
) -> Result:
    """Train a batch, and tell the study how each setting ended."""
    groups = _groups(arguments, trials)
    by_setting = [trials[point] for lanes in groups.values() for point in lanes.points]
    values: dict[tuple[int, int], list[float]] = {}

    def prune(plan: Plan, events: list[Report | Cut]) -> Iterator[int]:
        for report in events:
            if not isinstance(report, Report):
                continue
            lanes = plan.offset(report.group) + report.lanes
            for lane, value in zip(lanes, report.metrics[plan.metric], strict=True):
                setting = int(lane) // plan.seeds
                seeds = values.setdefault((setting, report.step), [])
                seeds.append(float(value))
                if len(seeds) == plan.seeds and math.isfinite(sum(seeds)):
                    by_setting[setting].report(sum(seeds) / plan.seeds, report.step)
                    if by_setting[setting].should_prune():
                        yield setting

    resume = folder is not None and (folder / "plan.json").exists()
    options = {**_options(arguments, Recorded), "folder": folder, "resume": resume}
    inputs = SweepArguments(arguments.task, groups, arguments.steps, **options)
    try:
        result = run_sweep(inputs, prune)
    except Interrupted as error:
        _tell(study, by_setting, error.result)
        raise
    _tell(study, by_setting, result)
    return result


def _tell(study: Any, trials: Sequence[Any], result: Result) -> None:
    """Tell the study how settings ended, in the order in which they were asked."""
    from optuna.trial import TrialState

    plan = result.plan
    place = lambda row: int(plan.first[plan.index[row["optimizer"]]]) + row["setting"]
    ended = ((trials[place(row)].number, row) for row in result.rows)
    for number, row in sorted(ended, key=lambda pair: pair[0]):
        if row["ended"] == "cut":
            study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
        elif row["ended"] in ("out of budget", "not run"):  # by Ctrl-C: it may go on
            continue
        elif math.isfinite(row[plan.metric]):
            study.tell(number, row[plan.metric], skip_if_finished=True)
        else:
            study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _proposed(study: Any, plan: Plan, results: list[Result]) -> Proposed:
    """Rank the settings of all batches together."""
    score = lambda row: (
        plan.sign * row[plan.metric] if math.isfinite(row[plan.metric]) else math.inf
    )
    # as `Ledger.ranked` does
    short = lambda row: (
        -row["at"] if row["ended"] in ("cut", "diverged", "out of budget", "not run") else -math.inf
    )
    rows = [row for result in results for row in result.rows]
    rows.sort(key=lambda row: (short(row), score(row)))
    ranked = ({**row, "rank": rank} for rank, row in enumerate(rows, 1))
    rows = [{k: x for k, x in row.items() if k != "tied"} for row in ranked]  # within a batch only
    best = min(results, key=lambda result: score(result.best.row)).best
    return Proposed(study, best, rows, results)
