"""The commands: arguments -> a sweep -> its result, in the terminal and in a folder."""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import jgd
from jgd.tuning.lock import LOCKS
from jgd.tuning.options import Doc, Seeds, SweepOptions, Training, values_of
from jgd.tuning.parsing import UserError, factory_of, groups_of, space_of, task_of, where

__all__ = ["main"]

TEXTBOOK = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam")
WATCHED = "JGD_WATCHED"  # in the environment of a process that a parent process watches
SEVERAL = ("optimizer", "set")  # options that may be repeated
MAY_CHANGE = ("top", "checkpoint_every", "coordinator", "processes", "process", "resume")
Several = tyro.conf.UseAppendAction[tuple[str, ...]]
Top = Annotated[int, Doc("Rows of the table to print; all are in results.csv.")]


@dataclass(frozen=True, kw_only=True)
class Sweep(SweepOptions):
    """Train many settings of optimizers at once and rank them.

    Without arguments: the six textbook optimizers at 64 learning rates and three seeds each, on
    scikit-learn's handwritten digits. A task of your own is a function without arguments that
    returns a jgd.Task:

    jgd sweep mypackage.mymodule:task --optimizer adam --set learning_rate=log:1e-5:1e-1:64
    """

    task: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="TASK"),
        Doc("digits, or module:name of a Task or of a function that returns one."),
    ] = "digits"
    optimizer: Annotated[
        Several,
        Doc("One of jgd's, or module:factory. Repeat it for several. Default: the textbook six."),
    ] = ()
    set: Annotated[
        Several,
        Doc("""Values of an argument: b1=0.8,0.9 or rate=log:LOW:HIGH:COUNT or
        rate=lin:LOW:HIGH:COUNT. Repeat it for several arguments: every combination is trained.
        Default: learning_rate=log:1e-5:1e1:64."""),
    ] = ()
    optuna: Annotated[
        int | None,
        Doc("""Train this many settings of one optimizer that Optuna proposes, 32 at a time: log and
        lin of --set give ranges, lists give choices. Default: every combination of --set."""),
    ] = None
    steps: Annotated[int, Doc("Steps of each training.")] = 1000
    seeds: Seeds = 3
    out: Annotated[
        Path | None,
        Doc("A new folder for table, pictures and journal. Default: runs/ and the time of day."),
    ] = None
    top: Top = 20
    halving: Annotated[
        float | None,
        Doc("""Successive halving: at each rung one setting in this many continues, such as 2 or 3.
        Default: all settings run to their end."""),
    ] = None
    hyperband: Annotated[float | None, Doc("As --halving, in brackets.")] = None
    min_steps: Annotated[
        int | None, Doc("Step of the first rung. Default: --steps over the cube of --halving.")
    ] = None
    within: Annotated[Literal["sweep", "group"], Doc("What is ranked together at a rung.")] = (
        "sweep"
    )
    patience: Annotated[
        int | None,
        Doc("Early stopping: reports without an improvement after which a lane ends."),
    ] = None
    sharpness: Annotated[
        bool,
        Doc("""Report the largest eigenvalue of the loss's Hessian as well, and draw it against
        2 / learning_rate."""),
    ] = False
    resume: Annotated[
        Path | None,
        Doc("""Resume the sweep in this folder, with the options it started with. --top,
        --checkpoint-every and the options of processes may change, others may not."""),
    ] = None
    coordinator: Annotated[
        str | None,
        Doc("""HOST:PORT of process 0, for several processes that run this command with one --out
        on a disk that all of them see."""),
    ] = None
    processes: Annotated[
        int | None, Doc("Number of processes. Default: as Slurm, Open MPI and the like say.")
    ] = None
    process: Annotated[
        int | None, Doc("Index of this process, from 0. Default: as --processes.")
    ] = None

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None

    def run(self) -> None:
        """Run the sweep; a process of several runs it in a process that this one watches."""
        if self.coordinator and WATCHED not in os.environ:
            _watch(self)
        else:
            _sweep(self)


@dataclass(frozen=True)
class Optimizers:
    """Show the optimizers: formula, size of the state, numbers with defaults, paper."""

    name: Annotated[
        tyro.conf.Positional[str | None],
        tyro.conf.arg(metavar="NAME"),
        Doc("One optimizer, with its whole documentation. Default: the table of all."),
    ] = None

    def run(self) -> None:
        """Print the table, or one optimizer."""
        from rich.console import Console

        from jgd.tuning import console

        if self.name is None:
            console.print_optimizers(Console())
            return
        factory = factory_of(self.name)
        signature = inspect.signature(factory)
        plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        call = signature.replace(parameters=plain, return_annotation=signature.empty)
        Console().print(f"jgd.{self.name}{call}\n", markup=False, highlight=False)
        Console().print(inspect.getdoc(factory), markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Report:
    """Show the table of a sweep again, and draw its pictures anew."""

    folder: Annotated[
        tyro.conf.Positional[Path],
        tyro.conf.arg(metavar="FOLDER"),
        Doc("The folder of the sweep."),
    ]
    top: Top = 20

    def run(self) -> None:
        """Print the table and draw the pictures."""
        from rich.console import Console

        from jgd.tuning.load import read_results

        try:
            result = read_results(self.folder)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        except Exception as error:
            raise UserError(f"{self.folder} holds no whole result: {where(error)}") from error
        _show(Console(), result, self.folder, self.top)


def main() -> None:
    """Parse the arguments and run a command."""
    commands = {"sweep": Sweep, "report": Report, "optimizers": Optimizers}
    warnings.formatwarning = lambda message, *_, **__: f"jgd: {message}\n"
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="jgd").run()
    except (UserError, KeyboardInterrupt) as error:
        message = " ".join(str(error).split()) or "interrupted"
        print(f"jgd: {message}", file=sys.stderr)
        raise SystemExit(2) from None


# --- the sweep -------------------------------------------------------------------------------


def _watch(options: Sweep) -> None:
    """Run one of several processes as a child of this one, and say how to go on if it is killed.

    JAX kills a process, without running Python, once another one is lost.
    """
    out = options.resume or options.out
    if out is None:
        raise UserError("--coordinator needs --out, a folder that all processes see")
    command = [sys.executable, "-m", "jgd.cli", *sys.argv[1:]]
    process = subprocess.Popen(command, env={**os.environ, WATCHED: "1"})
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the other process has received it as well
            pass
    if code < 0 and code != -signal.SIGTERM:
        raise UserError(_how_to_go_on(out))
    raise SystemExit(code)


def _how_to_go_on(out: Path) -> str:
    from jgd.tuning.segment import resume_command

    return (
        "a process of this sweep was lost, so the others have ended. Go on with as many processes"
        f" or fewer: {resume_command(out)}, with --coordinator if there are several"
    )


def _sweep(options: Sweep) -> None:
    started = time.perf_counter()
    _keep_compiled_programs()
    from jgd.tuning import devices

    if options.coordinator is not None:
        devices.join(options.coordinator, options.processes, options.process)
    out = options.resume or options.out
    out = out or _new_folder(Path("runs") / time.strftime("%Y-%m-%d-%H%M%S"))
    with _in_folder(options, out):
        _sweep_in(out, options, started)


def _sweep_in(out: Path, options: Sweep, started: float) -> None:
    from rich.console import Console

    from jgd.tuning import console, devices
    from jgd.tuning.folder import is_free
    from jgd.tuning.join import merge
    from jgd.tuning.propose import Proposed
    from jgd.tuning.sweep import Interrupted

    terminal = Console(quiet=not devices.is_writer())
    # a sweep that was killed before it had a plan starts anew
    new = devices.from_process_0([is_free(out)])[0]
    resume = options.resume is not None and not new
    if options.resume is not None:
        options = _resumed(options)
    task = _task(options)
    train, halving = _training(options, task), _halving(options)
    progress = console.Progress(terminal, options.optuna)
    given = values_of(options, SweepOptions if options.optuna is None else Training)
    given |= dict(halving=halving, stop=options.patience, folder=out, resume=resume)
    try:
        with progress:
            result, whole = train(on_report=progress, **given), True
    except Interrupted as error:
        result, whole = error.result, False
    if not devices.is_writer():
        return
    if isinstance(result, Proposed):
        result = merge(*result.results)
    if whole or any(row["at"] for row in result.rows):
        _show(terminal, result, out, options.top)
    if not whole:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    rate = progress.done / max(progress.seconds, 1e-9)
    terminal.print(
        f"{progress.done:,} lane-steps in {progress.seconds:.1f} s: "
        f"[bold]{rate:,.0f} lane-steps per second[/bold]; {seconds:.1f} s in all"
    )


def _training(options: Sweep, task: Any) -> Callable[..., Any]:
    """Return the sweep over all combinations, or the search, without its options."""
    from jgd.tuning.propose import optuna_search
    from jgd.tuning.sweep import sweep

    optimizers = options.optimizer or TEXTBOOK
    if options.optuna is None:
        return functools.partial(sweep, task, groups_of(optimizers, options.set), options.steps)
    if importlib.util.find_spec("optuna") is None:
        raise UserError('--optuna needs Optuna: python -m pip install "jgd[optuna]"')
    for name in ("keep", "budget", "seconds"):
        if getattr(options, name) != getattr(SweepOptions, name):
            raise UserError(f"--optuna and --{name} exclude each other")
    factory, space = space_of(optimizers, options.set)
    return functools.partial(optuna_search, task, factory, options.steps, options.optuna, space)


def _task(options: Sweep) -> Any:
    task = task_of(options.task)
    try:
        return jgd.with_sharpness(task) if options.sharpness else task
    except TypeError as error:
        raise UserError(f"--sharpness: {error}") from error


def _halving(options: Sweep) -> Any:
    """Return the halving of --halving or --hyperband."""
    if options.halving is not None and options.hyperband is not None:
        raise UserError("--halving and --hyperband exclude each other")
    eta = options.hyperband if options.halving is None else options.halving
    if eta is None:
        if options.min_steps is not None:
            raise UserError("--min-steps needs --halving or --hyperband")
        return None
    make = jgd.successive_halving if options.hyperband is None else jgd.hyperband
    return make(eta, options.min_steps, within=options.within)


def _show(terminal: Any, result: Any, out: Path, top: int) -> None:
    from jgd.tuning import console, plots

    console.print_result(terminal, result, top)
    try:
        pictures = plots.save_plots(result, out)
    except OSError as error:
        later = f"jgd report {shlex.quote(str(out))}"
        raise UserError(f"{error}. The table is written; for pictures: {later}") from error
    tables = [out / name for name in ("results.csv", "results.json", "curves.npz")]
    files = [path.name for path in (*tables, *pictures) if path.exists()]
    terminal.print(f"in {out}: {', '.join(files)}")


# --- the folder ------------------------------------------------------------------------------


@contextlib.contextmanager
def _in_folder(options: Sweep, out: Path) -> Generator[None]:
    """Hold a folder, write the command line into it, and turn errors and Ctrl-C into one line.

    A sweep that was refused leaves nothing behind; what was there before stays.
    """
    from jgd.tuning import devices
    from jgd.tuning.folder import held, is_free, write_json
    from jgd.tuning.segment import resume_command

    with contextlib.ExitStack() as stack:
        new = False
        try:
            stack.enter_context(held(out))
            with devices.fails_everywhere():
                if new := devices.is_writer() and options.resume is None and is_free(out):
                    given = {"out": options.out and str(options.out)}
                    write_json(out / "command.json", dataclasses.asdict(options) | given)
        except (OSError, RuntimeError) as error:
            raise UserError(str(error)) from error
        try:
            yield
        except KeyboardInterrupt:
            raise UserError(f"interrupted; go on with: {resume_command(out)}") from None
        except Exception as error:
            if new and {path.name for path in out.iterdir()} <= {"command.json", *LOCKS}:
                (out / "command.json").unlink()
            if isinstance(error, UserError | ValueError | OSError):
                raise UserError(str(error)) from error
            # of the user's task, inside the program, or of the connection
            hint = "" if options.coordinator is None else f"; perhaps {_how_to_go_on(out)}"
            raise UserError(f"task {options.task}: {where(error)}{hint}") from error


def _resumed(options: Sweep) -> Sweep:
    """Return the options that the sweep in a folder was started with; some may change.

    Raises: UserError for any other option that is given and has changed.
    """
    assert options.resume is not None
    path = options.resume / "command.json"
    if not path.exists():
        raise UserError(f"{options.resume} holds no sweep of the command line: no command.json")
    try:
        given = dict[str, Any](json.loads(path.read_text()), out=options.resume)
        given |= {name: tuple(given.get(name, ())) for name in SEVERAL}
        written = Sweep(**given)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    # parsed again, so that options that are not given keep their values
    now = tyro.cli(Sweep, args=sys.argv[2:], default=written)
    lists = {name: getattr(options, name) or getattr(written, name) for name in SEVERAL}
    now = dataclasses.replace(now, **lists)
    for name, value in dataclasses.asdict(now).items():
        if name not in MAY_CHANGE and value != (was := getattr(written, name)):
            flag = name if name == "task" else f"--{name.replace('_', '-')}"
            was, value = (
                " ".join(x or ["not given"]) if name in SEVERAL else x for x in (was, value)
            )
            raise UserError(f"--resume: {flag} was {was} and is now {value}")
    return now


def _new_folder(path: Path) -> Path:
    """Return a folder that does not exist: two sweeps may start in the same second."""
    tries = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return path if not path.exists() else next(new for new in tries if not new.exists())


def _keep_compiled_programs() -> None:
    """Cache compiled programs on disk, also those that compile in under a second."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jgd"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
