"""A search: Optuna proposes a batch of settings, a sweep trains it, Optuna learns the results.

    result = jgd.optuna_search(
        task, jgd.adamw, steps=1000, trials=256,
        space={"learning_rate": jgd.loguniform(1e-5, 1e-1), "b1": jgd.uniform(0.8, 0.99)},
    )
    result.best.params, result.study.best_params

Each batch is a sweep. The folder of a search, from which it can be resumed, holds

search.json          the arguments that a resumed search must share, and the name of the study
batch-0.json         the trials of the batch, written before it trains
batch-0/             the sweep of the batch. A resumed batch reports its whole journal to the study
"""

import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np

from jgd.checks import at_least, refuse
from jgd.training import Run, Task
from jgd.tuning import devices
from jgd.tuning.distributions import Distribution, check_distributions
from jgd.tuning.events import Cut, Report
from jgd.tuning.folder import Folder, folder_lock, is_free, write_json, write_table
from jgd.tuning.join import merge
from jgd.tuning.options import Doc, Steps, function_of, values_of
from jgd.tuning.plan import Plan
from jgd.tuning.poll import CtrlC
from jgd.tuning.result import Best, Result
from jgd.tuning.segment import batches_of, read_json
from jgd.tuning.space import Lanes, batch
from jgd.tuning.sweep import (
    CutOptions,
    Interrupted,
    RecordOptions,
    SweepArguments,
    TrainingArguments,
    prepare,
    run_sweep,
)

__all__ = ["Proposed", "optuna_search"]

TAG = "jgd"  # user attribute of a trial: id of the search, number of the batch, place in the batch


class Proposed(NamedTuple):
    """Result of `optuna_search`."""

    study: Any  # optuna.Study
    best: Best
    rows: list[dict[str, Any]]  # settings of all batches, ranked, best first
    results: list[Result]  # one per batch


@dataclass(frozen=True)
class SearchInputs:
    """Positional arguments of `optuna_search`."""

    task: Annotated[Task | Run, Doc("A `Task`, or any `Run`.")]
    factory: Annotated[
        Callable[..., Any],
        Doc("""A function from numbers to a setting, called with one value of each distribution by
        keyword."""),
    ]
    steps: Steps
    trials: Annotated[
        int,
        at_least(1),
        Doc("Total number of settings, at least 1. A resumed search may raise it."),
    ]
    space: Annotated[
        Mapping[str, Distribution] | Callable[[Any], Mapping[str, Any]],
        Doc("""Name -> `jgd.loguniform`, `jgd.uniform`, `jgd.integers` or `jgd.choice`. Or a
        function of an Optuna trial that returns the arguments of the factory, for a space in which
        one value determines which others exist."""),
    ]


@dataclass(frozen=True, kw_only=True)
class SearchArguments(RecordOptions, SearchInputs):
    """Arguments of `optuna_search`."""

    function: ClassVar[str] = "optuna_search"

    at_once: Annotated[
        int,
        at_least(1),
        Doc("""Number of settings in a batch, which are proposed and trained together, at least 1.
        All batches share their compiled programs."""),
    ] = 32
    sampler: Annotated[
        Any,
        Doc("""An Optuna sampler, or a function from the number of a batch to a sampler. None: the
        sampler of `study`; without a study, TPE seeded by key and batch, with constant_liar because
        the trials of a batch run together."""),
    ] = None
    pruner: Annotated[
        Any,
        Doc("""An Optuna pruner, which is asked at each report, even if `halving` is given. Some of
        Optuna's pruners compare with finished trials only, so they cut nothing in the first batch.
        None: the pruner of `study`; without a study, no pruning."""),
    ] = None
    study: Annotated[
        Any,
        Doc("""An Optuna study to continue, which must have the direction of the metric. None: a new
        study in memory."""),
    ] = None
    storage: Annotated[
        Any,
        Doc("""An Optuna storage, or its URL. After each batch, its finished trials are copied to
        the study of the same name there. None: no copy."""),
    ] = None
    study_name: Annotated[
        str | None,
        Doc("""Name of a new study. If `storage` has a study of this name, the search continues that
        study. None: a random name."""),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # one width for all batches, so that a smaller last batch needs no programs of its own
        object.__setattr__(self, "width", self.width or min(64, self.at_once * self.seeds))
        if not callable(self.space):
            check_distributions(self.function, self.space)
            if not self.space:
                refuse(f"{self.function}: space", "at least one distribution", self.space)


@function_of(SearchArguments)
def optuna_search(arguments: SearchArguments) -> Proposed:
    """Train settings that Optuna proposes, as lanes.

        def space(trial):  # b1 exists only for adam
            name = trial.suggest_categorical("optimizer", ["adam", "sgd"])
            rate = jgd.loguniform(1e-5, 1e-1).suggest(trial, "learning_rate")
            more = {"b1": trial.suggest_float("b1", 0.8, 0.99)} if name == "adam" else {}
            return {"optimizer": name, "learning_rate": rate, **more}

        build = lambda optimizer, **numbers: jgd.get(optimizer)(**numbers)
        result = jgd.optuna_search(task, build, steps=100, trials=16, space=space)

    Args:
      {arguments}

    Each batch is a sweep in a folder of its own, `folder`/batch-0 and so on. A resumed search reads
    the finished batches, continues the batch that was running, and proposes the others. It proposes
    what an uninterrupted search would if the sampler is the default, or a function that depends
    only on the number of the batch. Any other sampler restarts its random numbers.

    A setting that a rung or the pruner cuts becomes a pruned trial, and a setting whose metric is
    not finite becomes a failed trial. With a target, settings are ranked by their steps to the
    target, but Optuna gets the metric.

    Returns: a `Proposed`: the study, the best setting with its trained state, all rows, and the
      result of each batch.
    Raises: as `sweep`, and ImportError without Optuna: pip install "jgd[optuna]". On Ctrl-C,
      Interrupted with the result so far.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _check_optuna(arguments)
    plan, results = _plan(arguments), list[Result]()
    with CtrlC() as ctrl_c, folder_lock(arguments.folder):
        search = _Search(arguments, plan)
        while len(results) < len(search.batches) or search.trial_count() < arguments.trials:
            if len(results) == len(search.batches):
                search.ask()
            results.append(search.train(len(results), ctrl_c))
            search.store()
            if ctrl_c.interrupt:
                raise Interrupted(search.finish(results))
        return search.finish(results)


def _check_optuna(arguments: SearchArguments) -> None:
    """Raise TypeError for objects that are not Optuna's."""
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

    for name, kinds, description in (
        ("sampler", BaseSampler | Callable, "an Optuna sampler, or a function of the batch"),
        ("pruner", BasePruner, "an Optuna pruner, such as optuna.pruners.MedianPruner()"),
        ("study", Study, "an Optuna study, such as optuna.create_study()"),
        ("storage", str | BaseStorage, "an Optuna storage, or its URL"),
    ):
        value = getattr(arguments, name)
        if value is not None and not isinstance(value, kinds):
            refuse(f"optuna_search: {name}", description, value)


# --- from trials to settings -----------------------------------------------------------------


def _point(space: Any, trial: Any) -> Mapping[str, Any]:
    """Return the arguments of the factory that a trial suggests. Each call returns the same."""
    if not callable(space):
        return {name: values.suggest(trial, name) for name, values in space.items()}
    point = space(trial)
    if not isinstance(point, Mapping) or not point:
        refuse("optuna_search: space", "a function that returns arguments by name", point)
    return point


def _groups(arguments: SearchArguments, trials: Sequence[Any]) -> dict[str, Lanes]:
    """Return the settings of trials as groups, whose names are the same in all batches."""
    lanes = batch(arguments.factory, [_point(arguments.space, trial) for trial in trials])
    name = getattr(arguments.factory, "__name__", "")
    groups = dict[str, Lanes]()
    for each in lanes.values() if isinstance(lanes, dict) else [lanes]:
        structure = ", ".join(f"{k}={value}" for k, value in each.fixed.items())
        label = f"{name if name.isidentifier() else ''} {structure}".strip() or "setting"
        groups[label if label not in groups else f"{label} {', '.join(each.axes)}"] = each
    return groups


def _plan(arguments: SearchArguments) -> Plan:
    """Check the arguments and return the plan of one setting, which has the metric and its mode."""
    import optuna

    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    settings, options = _groups(arguments, [trial]), values_of(arguments, CutOptions)
    return prepare(TrainingArguments(arguments.task, settings, arguments.steps, **options)).plan


# --- batches ---------------------------------------------------------------------------------


class _Search:
    """A search in progress.

    Attributes:
      study: proposes trials, and records how they end.
      copy: the copy of the study in the storage; None without a storage.
      batches: the trials of each batch as Optuna proposed them, as JSON.

    Raises: FileExistsError for a new search in a folder that is not empty; ValueError for a resumed
      search with other arguments, and for a study of another direction.
    """

    def __init__(self, arguments: SearchArguments, plan: Plan) -> None:
        self.arguments, space = arguments, arguments.space
        shown = "a function" if callable(space) else {k: repr(d) for k, d in space.items()}
        same = dict(steps=arguments.steps, at_once=arguments.at_once, space=shown)
        self.path = None if arguments.folder is None else Path(arguments.folder)
        self.batches = list[list[dict[str, Any]]]()
        self.id, name = uuid.uuid4().hex, arguments.study_name
        if arguments.resume:
            self.id, name = self._read(same)
        else:
            Folder(self.path)  # raises unless the folder is empty
        devices.wait_for_all()  # all processes have read before process 0 writes
        self.study, self.copy = self._studies(name, plan)
        self._write("search.json", {"id": self.id, "study": self.study.study_name, **same})

    def _studies(self, name: str | None, plan: Plan) -> tuple[Any, Any]:
        """Return the study that proposes trials, and its copy in the storage or None."""
        import optuna

        arguments, study, copy = self.arguments, self.arguments.study, None
        direction = "maximize" if plan.mode == "max" else "minimize"
        if study is None:
            study = optuna.create_study(study_name=name, direction=direction)
            study.pruner = optuna.pruners.NopPruner()
        study.pruner = arguments.pruner or study.pruner
        if arguments.storage is not None:
            copy = optuna.create_study(
                study_name=study.study_name,
                storage=arguments.storage,
                direction=direction,
                load_if_exists=True,
            )
        for each in (study, copy or study):
            if (got := [x.name.lower() for x in each.directions]) != [direction]:
                raise ValueError(
                    f"optuna_search: study must have the direction of {plan.metric}, {direction},"
                    f" got {' and '.join(got)}"
                )
        if copy is not None and arguments.study is None:
            for trial in copy.get_trials(deepcopy=False):  # the trials of earlier searches
                if trial.state.is_finished() and not _tag(trial).startswith(self.id):
                    study.add_trial(trial)
        return study, copy

    def trial_count(self) -> int:
        """Return the number of trials in all batches so far."""
        return sum(map(len, self.batches))

    def ask(self) -> None:
        """Ask Optuna for the trials of the next batch, and record them."""
        arguments, number = self.arguments, len(self.batches)
        if sampler := _sampler(arguments, number):
            self.study.sampler = sampler
        tags = self._tags(number, min(arguments.at_once, arguments.trials - self.trial_count()))
        for tag in tags:
            trial = self.study.ask()
            trial.set_user_attr(TAG, tag)
            _point(arguments.space, trial)  # the sampler uses it for the next trial
        known = _by_tag(self.study)
        fields = "params", "system_attrs"
        self.batches.append([{x: getattr(known[tag], x) for x in fields} for tag in tags])
        self._write(f"batch-{number}.json", {"trials": self.batches[-1]})

    def _tags(self, number: int, size: int) -> list[str]:
        """Return the tags of the trials of a batch."""
        return [f"{self.id}/{number}/{place}" for place in range(size)]

    def _trials(self, number: int) -> list[Any]:
        """Return the trials of a batch. Adds trials that the study of a resumed search lacks."""
        import optuna

        entries, known = self.batches[number], _by_tag(self.study)
        tags = self._tags(number, len(entries))
        for tag, entry in zip(tags, entries, strict=True):
            if tag not in known:
                fixed = optuna.trial.FixedTrial(entry["params"])
                _point(self.arguments.space, fixed)  # records the distributions
                running = optuna.trial.TrialState.RUNNING
                new: Any = {"distributions": fixed.distributions, "user_attrs": {TAG: tag}}
                self.study.add_trial(optuna.trial.create_trial(state=running, **entry, **new))
        known = _by_tag(self.study)
        # trials from get_trials are frozen: they ignore reports
        live = lambda trial: optuna.Trial(self.study, trial._trial_id)
        return [known[t] if known[t].state.is_finished() else live(known[t]) for t in tags]

    def train(self, number: int, ctrl_c: CtrlC) -> Result:
        """Train or resume a batch, and tell the study how the trial of each setting ended."""
        arguments, trials = self.arguments, self._trials(number)
        groups = _groups(arguments, trials)
        by_setting = [trials[point] for lanes in groups.values() for point in lanes.points]
        folder = None if self.path is None else self.path / f"batch-{number}"
        resume = folder is not None and not is_free(folder)
        options = values_of(arguments, RecordOptions) | dict[str, Any](folder=folder, resume=resume)
        inputs = SweepArguments(arguments.task, groups, arguments.steps, **options)
        try:
            result = run_sweep(inputs, _Pruner(by_setting), ctrl_c)
        except Interrupted as error:
            result = error.result
        plan = result.plan
        setting = lambda row: int(plan.first[plan.index[row["optimizer"]]]) + row["setting"]
        rows = {by_setting[setting(row)].number: row for row in result.rows}
        for number, row in sorted(rows.items()):  # in the order of the proposals
            _tell(self.study, number, row["ended"], row[plan.metric])
        return result

    def store(self) -> None:
        """Add the finished trials that the study in the storage lacks."""
        if self.copy is None or not devices.is_writer():
            return
        known = _by_tag(self.copy)
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.is_finished() and _tag(trial) not in known:
                self.copy.add_trial(trial)

    def finish(self, results: list[Result]) -> Proposed:
        """Rank the settings of all batches together, and write the table."""
        merged = merge(*results)
        if self.path is not None and devices.is_writer():
            write_table(self.path, merged)
        return Proposed(self.study, merged.best, merged.rows, results)

    def _read(self, same: dict[str, Any]) -> tuple[str, str]:
        """Read the batches of a search to resume. Return its id and the name of its study."""
        assert self.path is not None
        file = self.path / "search.json"
        if not file.exists():
            raise FileNotFoundError(f"{self.path} holds no search: there is no search.json")
        written = read_json(file)
        for name, now in same.items():
            if (was := written.get(name)) != now:
                raise ValueError(
                    f"resume: {name} must be {was} as in the search of {self.path}, got {now}"
                )
        try:
            for folder in batches_of(self.path):
                file = folder.with_suffix(".json")
                self.batches.append([{**trial} for trial in read_json(file)["trials"]])
            return written["id"], written["study"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error!r}. Start a new search") from None

    def _write(self, name: str, content: dict[str, Any]) -> None:
        if self.path is not None and devices.is_writer():
            write_json(self.path / name, content)


def _tag(trial: Any) -> str:
    """Return the tag of a trial; empty if it is not of a search of jgd."""
    return trial.user_attrs.get(TAG, "")


def _by_tag(study: Any) -> dict[str, Any]:
    """Return the trials of a study by tag."""
    return {_tag(trial): trial for trial in study.get_trials(deepcopy=False)}


def _sampler(arguments: SearchArguments, number: int) -> Any:
    """Return the sampler of a batch. None: the study keeps its sampler."""
    import optuna

    if arguments.sampler is None and arguments.study is None:
        key = arguments.key if isinstance(arguments.key, tuple) else (arguments.key,)
        words = [word % 2**32 for word in (*key, number) if isinstance(word, int)]
        seed = np.random.SeedSequence(words).generate_state(1)
        return optuna.samplers.TPESampler(constant_liar=True, seed=int(seed[0]))
    return arguments.sampler(number) if callable(arguments.sampler) else arguments.sampler


def _tell(study: Any, number: int, ended: str, value: float) -> None:
    """Tell the study how a setting ended, unless Ctrl-C ended it."""
    from optuna.trial import TrialState

    if ended == "cut":
        study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
    elif ended not in ("out of budget", "not run"):
        finite = math.isfinite(value)
        state = TrialState.COMPLETE if finite else TrialState.FAIL
        study.tell(number, value if finite else None, state, skip_if_finished=True)


class _Pruner:
    """Reports the metric of each setting, a mean over its seeds, to its trial.

    A call with the events of a turn yields the settings that Optuna's pruner cuts.
    """

    def __init__(self, trials: Sequence[Any]) -> None:
        self.trials = trials
        self.values = dict[tuple[int, int], list[float]]()

    def __call__(self, plan: Plan, events: list[Report | Cut]) -> Iterator[int]:
        for report in events:
            if isinstance(report, Report):
                lanes = plan.offset(report.group) + report.lanes
                pairs = zip(lanes.tolist(), report.metrics[plan.metric].tolist(), strict=True)
                for lane, value in pairs:
                    seeds = self.values.setdefault((lane // plan.seeds, report.step), [])
                    seeds.append(float(value))
                    if len(seeds) == plan.seeds and math.isfinite(sum(seeds)):
                        trial = self.trials[lane // plan.seeds]
                        trial.report(sum(seeds) / plan.seeds, report.step)
                        if trial.should_prune():
                            yield lane // plan.seeds
