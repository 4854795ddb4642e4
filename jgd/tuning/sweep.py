"""`sweep` and `iter_sweep`: train many settings and seeds as lanes of compiled programs."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from jgd.checks import key_of
from jgd.pytree import Monitor
from jgd.training import Run, Task, start
from jgd.tuning import devices
from jgd.tuning.engine import Engine, shared_programs
from jgd.tuning.events import Cut, Report
from jgd.tuning.folder import Folder, load_block, opened
from jgd.tuning.inputs import check_inputs, extended, first_setting, resumed
from jgd.tuning.join import take
from jgd.tuning.load import StoredStates, stored_best
from jgd.tuning.loop import Schedule, Sweep, run
from jgd.tuning.options import Doc, Steps, SweepOptions, Training, function_of
from jgd.tuning.plan import Plan, fingerprint, make_plan
from jgd.tuning.poll import NO_PRUNING, Clock, CtrlC, Prune
from jgd.tuning.pool import Block
from jgd.tuning.prune import Halving
from jgd.tuning.result import Facts, Result, make_result
from jgd.tuning.segment import Segment
from jgd.tuning.space import Lanes
from jgd.tuning.streams import Stream
from jgd.tuning.widths import choose_widths

__all__ = ["Interrupted", "iter_sweep", "sweep"]


@dataclass(frozen=True, kw_only=True)
class CutOptions(Training):
    """Options of training, and objects that end lanes early."""

    halving: Annotated[
        Halving | None,
        Doc("""`jgd.successive_halving(...)` or `jgd.hyperband(...)`: at some steps, only the best
        settings continue. None: all settings train for all steps."""),
    ] = None
    stop: Annotated[
        Monitor | int | None,
        Doc("""`jgd.stopping.early_stopping(...)`, or only its patience: stop each lane by its
        metric, with one epoch per report. None: no lane stops early."""),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RecordOptions(CutOptions):
    """Options of `sweep` and of `optuna_search`: options of training, a folder, and a callback."""

    folder: Annotated[
        str | Path | None,
        Doc("A new folder for plan, journal, checkpoints and results. None: nothing is written."),
    ] = None
    resume: Annotated[
        bool,
        Doc("""True resumes the sweep of `folder` from its last checkpoint. Its results equal
        those of an uninterrupted sweep, bit for bit on the same machine. All other arguments must
        be those that the sweep was started with."""),
    ] = False
    on_report: Annotated[
        Callable[[Plan, Report], None] | None,
        Doc("Function of the `Plan` and a `Report`, called with each report in order."),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.folder is None:
            raise ValueError(
                "sweep: folder must be the folder of a sweep with resume=True, got None"
            )


@dataclass(frozen=True)
class SweepInputs:
    """Positional arguments of `sweep`."""

    task: Annotated[Task | Run, Doc("A `Task`, or any `Run`.")]
    settings: Annotated[
        Any,
        Doc("""A batch of settings, or a dict of batches by name. `grid`, `random_search`, `stack`
        and `jax.vmap` of a factory return batches. One program is compiled for each structure and
        width."""),
    ]
    steps: Steps


@dataclass(frozen=True, kw_only=True)
class TrainingArguments(SweepOptions, CutOptions, SweepInputs):
    """Arguments of `iter_sweep`: the arguments of `sweep` except for the folder and callback."""


@dataclass(frozen=True, kw_only=True)
class SweepArguments(TrainingArguments, RecordOptions):
    """Arguments of `sweep`."""

    extend: Annotated[
        str | Path | None,
        Doc("""The folder of a finished sweep to extend with more settings, groups or seeds, in
        place of `folder`. The arguments describe the whole sweep; only lanes that the folder lacks
        are trained. Lanes of the folder that the arguments lack stay in the folder, but not in the
        result. The same call resumes an extension that was interrupted. None: a new sweep."""),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extend is not None and self.folder is not None:
            raise ValueError(
                f"sweep: folder must be None with extend, got {str(self.folder)!r}. The folder in"
                " extend also receives the extension"
            )


@function_of(SweepArguments)
def sweep(arguments: SweepArguments) -> Result:
    """Train every setting with every seed, and rank them.

        lanes = jgd.grid(jgd.adam, learning_rate=np.logspace(-4, -1, 64))
        result = jgd.sweep(task, {"adam": lanes, "lion": other_lanes}, steps=2000, seeds=3)
        result.rows[0], result.best.params

    Args:
      {arguments}

    A lane that has ended costs nothing from the next report on if the other lanes fit narrower
    programs, which they always do at a rung. Within a process, sweeps of the same task share their
    compiled programs if they differ only in numbers.

    Settings are ranked by the mean over their seeds. The table has the standard error of the mean,
    and marks the settings that are tied with the best: worse by at most the standard error of the
    difference.

    Returns: a `Result`: ranked rows, curves, and the best settings with their trained states.
    Raises: ValueError, before anything is trained or written, for settings that are no batch, NaN
      in the data, a learning rate that is negative or NaN, an `evaluate` that returns no dict of
      scalars, or an option out of its range. BlockingIOError, naming the process, if another
      process runs a sweep in `folder`. Interrupted, on Ctrl-C.
    """
    return run_sweep(arguments)


def run_sweep(
    arguments: SweepArguments, prune: Prune = NO_PRUNING, ctrl_c: CtrlC | None = None
) -> Result:
    """Run a sweep.

    Args:
      prune: events of a turn -> settings to cut. A resumed sweep first calls it with the events of
        the journal and ignores its return value, since the journal already has the cuts.
      ctrl_c: handler of Ctrl-C that several sweeps share. None: a new one.
    """
    extend = arguments.extend is not None
    path = arguments.extend if extend else arguments.folder
    with opened(path, resume=arguments.resume, extend=extend) as folder:
        prepared = prepare(arguments, folder.segment and folder.segment.plan, folder.earlier)
        try:
            if extend and folder.segment is None and not prepared.sweep.schedule.queue:
                return prepared.result()  # the folder has all lanes
            finished = _run(arguments, prepared, folder, prune, ctrl_c or CtrlC())
            result = prepared.result()
            folder.write_result(result, prepared.groups)
            if finished:  # on Ctrl-C, the last poll has asked for a checkpoint
                _checkpoint(prepared, folder)
        finally:
            prepared.sweep.engine.close()
    if not finished:
        raise Interrupted(result)
    return result


def _run(
    arguments: SweepArguments,
    prepared: "PreparedSweep",
    folder: Folder,
    prune: Prune,
    ctrl_c: CtrlC,
) -> bool:
    """Run a sweep to its end. Return False if Ctrl-C ended it."""
    if folder.segment is not None:
        _resume(prepared, folder, folder.segment)
        list(prune(prepared.plan, list(folder.events(prepared.plan))))
    else:
        folder.write_plan(prepared.plan)

    def deliver(events: list[Report | Cut]) -> None:
        folder.append(events)
        for event in events:
            if arguments.on_report is not None and isinstance(event, Report):
                alive = int(prepared.sweep.ledger.alive.sum())
                with ctrl_c.interrupts():
                    arguments.on_report(prepared.plan, event._replace(alive=alive))

    with ctrl_c:
        poll = Clock(prepared.sweep, folder, ctrl_c, prune)
        return run(prepared.sweep, deliver, poll, lambda: _checkpoint(prepared, folder))


@function_of(TrainingArguments)
def iter_sweep(arguments: TrainingArguments) -> Iterator[Report | Cut]:
    """Run a sweep and yield its reports and cuts as they come. Writes no files.

    Args:
      {arguments}

    Raises: as `sweep`.
    """
    return _events(prepare(arguments).sweep)


def _events(sweep: Sweep) -> Iterator[Report | Cut]:
    poll, started = Clock(sweep), True
    try:
        while started:
            if poll(sweep.events).stop:
                sweep.stop()
            started = sweep.start()
            yield from sweep.take()  # while the turn runs
            if started:
                sweep.finish()
    finally:
        sweep.engine.close()


class Interrupted(KeyboardInterrupt):
    """Raised on Ctrl-C, with the result so far.

    Attributes:
      result: a `Result` in which unfinished lanes are out of budget; for a search, a `Proposed`.
    """

    def __init__(self, result: Any) -> None:
        super().__init__("interrupted")
        self.result = result


# --- preparation -----------------------------------------------------------------------------


@dataclass
class PreparedSweep:
    """A sweep that is planned and has not started."""

    plan: Plan
    groups: dict[str, Lanes]
    sweep: Sweep
    earlier: Sequence[Segment] = ()  # the segments that an extension extends

    def result(self) -> Result:
        """Return the result so far."""
        plan, pool = self.plan, self.sweep.pool
        states = StoredStates(plan, self.earlier)
        states.has_state[pool.lanes()] = True

        def leaves_of(lane: int) -> list[Any]:
            in_pool = lane in pool
            return [x[0] for x in jax.tree.leaves(pool.take([lane]))] if in_pool else states[lane]

        batches = [self.groups[group.name].settings for group in plan.groups]
        run = self.sweep.engine.programs[0].options.run
        setting_and_state = lambda *best: stored_best(run, plan, batches, leaves_of, *best)
        return make_result(self.sweep.facts, states.has_state, setting_and_state)


def prepare(
    arguments: TrainingArguments, written: Plan | None = None, earlier: Sequence[Segment] = ()
) -> PreparedSweep:
    """Check the inputs of a sweep before anything is compiled, and plan it.

    Args:
      written: the plan of the sweep to resume. None: a new sweep.
      earlier: the segments to extend.
    """
    task = arguments.task
    counts = [arguments.devices, *(segment.plan.devices for segment in earlier)]
    mesh = devices.mesh(next((count for count in counts if count is not None), None))
    inputs = check_inputs(task, arguments.settings, arguments, arguments.stop)
    training, batch = inputs.run, inputs.batch
    plans = [segment.plan for segment in earlier]
    first = first_setting(inputs.groups, plans)
    state = start(training, first, key_of(arguments.key))
    streamed = training.batch if isinstance(training.batch, Stream) else None
    last = () if streamed is not None else training.batch(arguments.steps - 1)
    params = state.params if isinstance(task, Task) else state
    data = [x for x in jax.tree.leaves(task) if isinstance(x, np.ndarray | jax.Array)]
    plan = make_plan(
        inputs.groups,
        arguments.steps,
        arguments,
        halving=arguments.halving,
        stop=inputs.stop,
        metrics=inputs.metrics,
        usual_every=None if streamed is None else streamed.usual_every(arguments.steps),
        devices=1 if mesh is None else mesh.size,
        at_once=devices.tiles_at_once(mesh),
        task=fingerprint(batch, last, params, training.evaluate(first, state), data),
        verdict=training.verdict,
    )
    devices.check_same_task(plan.task)
    if written is not None:
        what = "extend: an extension has not finished" if earlier else "resume"
        plan = resumed(plan, written, what)
    elif earlier:
        plan = extended(plan, plans)
    shared = shared_programs(task, training, plan, inputs.stop, mesh)
    engine = Engine(plan, inputs.groups, shared)
    probed = written is None and not earlier and arguments.width is None and streamed is None
    if probed and jax.process_count() == 1:
        plan = choose_widths(plan, engine)
    facts = Facts.of(plan)
    for segment in earlier:
        shared.check_seeds(plan, segment.plan)
        take(facts, segment.facts)
    return PreparedSweep(plan, inputs.groups, Sweep(facts, engine), earlier)


# --- checkpoints -----------------------------------------------------------------------------


def _checkpoint(prepared: PreparedSweep, folder: Folder) -> None:
    """Write a checkpoint of a sweep between two turns, if it has a folder."""
    if not folder.enabled:
        return
    sweep, states, blocks = prepared.sweep, dict[str, Any](), dict[str, Any]()
    for number, (ids, rows) in sweep.pool.blocks.items():
        name = f"block-{number}"
        n = len(ids)
        states[name] = jax.tree.map(lambda x, n=n: x[:n], devices.to_host(rows))
        present = sweep.pool.block_of[ids] == number
        blocks[name] = {"number": number, "lanes": ids.tolist(), "present": present.tolist()}
    queue, plan = sweep.schedule.queue, sweep.plan
    following = queue[0].step if queue else plan.rounds[sweep.schedule.round]
    manifest = {
        "schedule": dataclasses.asdict(sweep.schedule),
        "blocks": blocks,
        "last_block": sweep.pool.last,
        "stream": sweep.engine.batches.mark(following),
    }
    folder.checkpoint(manifest, states)


def _resume(prepared: PreparedSweep, folder: Folder, segment: Segment) -> None:
    """Restore the last checkpoint: the facts from the journal, the states from their blocks."""

    manifest, sweep = segment.manifest, prepared.sweep
    for note in segment.notes:
        warnings.warn(note, stacklevel=5)
    devices.wait_for_all()  # all processes have read the manifest before files change
    folder.return_to_checkpoint(segment)
    if manifest is None:
        return
    sweep.facts = segment.facts
    sweep.schedule = Schedule.of_json(manifest["schedule"])
    for name, block in manifest["blocks"].items():
        ids = np.array(block["lanes"], int)
        program = sweep.engine.programs[prepared.plan.group_of(ids[0])]
        structure = jax.tree.structure(program.shapes(len(ids)))
        rows = jax.tree.unflatten(structure, load_block(folder.path, name))
        sweep.pool.restore(block["number"], Block(ids, rows), np.array(block["present"]))
    sweep.pool.last = manifest["last_block"]
    if manifest["stream"] is not None:
        sweep.engine.batches.seek(manifest["stream"])
    sweep.fit_widths()
    if missing := sweep.without_state():
        raise ValueError(
            f"resume: {folder.path} has no state for {len(missing)} lanes that have started. Start"
            " the sweep in a new folder"
        )
