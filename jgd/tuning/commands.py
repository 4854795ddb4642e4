"""The commands of `jgd`: parse the arguments, run a sweep, and show and write its result."""

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
WATCHED = "JGD_WATCHED"  # environment variable of a process that `_watch` started
REPEATABLE = ("optimizer", "set")  # options that may be repeated
# options that may change when a sweep is resumed
MAY_CHANGE = ("top", "checkpoint_every", "coordinator", "processes", "process", "resume")
# options that set an argument of another name
OPTION_OF = {
    "sweep: halving": "halving or --hyperband",
    "early_stopping: patience": "patience",
    "optuna_search: trials": "optuna",
    "successive_halving: eta": "halving",
    "hyperband: eta": "hyperband",
}
FUNCTIONS = ("sweep", "optuna_search", "successive_halving", "hyperband")
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
Top = Annotated[int, Doc("Number of rows of the table to print. results.csv has all rows.")]


@dataclass(frozen=True, kw_only=True)
class Sweep(SweepOptions):
    """Train many settings of optimizers at once and rank them.

    Without arguments, it trains a small network on scikit-learn's handwritten digits with the six
    textbook optimizers, each at 64 learning rates and with three seeds. A task of your own is a
    function without arguments that returns a jgd.Task:

    jgd sweep mypackage.mymodule:task --optimizer adam --set learning_rate=log:1e-5:1e-1:64
    """

    task: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="TASK"),
        Doc("""digits, or module:name of your own jgd.Task, jgd.Run, or function without arguments
        that returns one."""),
    ] = "digits"
    optimizer: Annotated[
        Repeated,
        Doc("""Name of an optimizer of jgd (see `jgd optimizers`), or module:name of a function that
        returns an optimizer. Repeat the option for several optimizers. Default: sgd, momentum,
        nesterov, adagrad, rmsprop and adam."""),
    ] = ()
    set: Annotated[
        Repeated,
        Doc("""Values of an argument of the optimizers: a list, as in b1=0.8,0.9, or COUNT values
        between two bounds. b1=lin:LOW:HIGH:COUNT spaces them evenly, and
        learning_rate=log:LOW:HIGH:COUNT evenly in the logarithm. Repeat the option for several
        arguments: all combinations are trained. Default: learning_rate=log:1e-5:1e1:64."""),
    ] = ()
    optuna: Annotated[
        int | None,
        Doc("""Number of settings of one optimizer that Optuna proposes, 32 at a time, at least 1.
        log and lin of --set are ranges to search, whatever their COUNT; lists are choices. None:
        all combinations of --set are trained."""),
    ] = None
    steps: Annotated[int, Doc("Number of steps of each training, at least 4.")] = 1000
    seeds: Seeds = 3
    key: Annotated[int, Doc("Random seed of the initial parameters.")] = 0
    out: Annotated[
        Path | None,
        Doc("""A new folder for the table, the pictures and the journal. None: a folder in runs/
        named after the date and time."""),
    ] = None
    top: Top = 20
    halving: Annotated[
        float | None,
        Doc("""Successive halving: at each rung, one in this many settings continues, and the
        others end. Above 1; usual values are 2 and 3. None: all settings train for all steps."""),
    ] = None
    hyperband: Annotated[
        float | None,
        Doc("""Hyperband: like --halving, but the settings are divided among several brackets, each
        of which starts to halve one rung later than the previous one. Above 1; a usual value is 3.
        None: no Hyperband."""),
    ] = None
    min_steps: Annotated[
        int | None,
        Doc("""Step of the first rung, at least 1. None: --steps divided by the cube of --halving
        or --hyperband."""),
    ] = None
    within: Annotated[
        Literal["sweep", "group"],
        Doc("""Settings that are ranked together at a rung: all settings of the sweep, or those of
        each group. A group holds the settings of one optimizer and one structure."""),
    ] = "sweep"
    patience: Annotated[
        int | None,
        Doc("""Early stopping: number of reports without an improvement after which a lane ends,
        at least 0. None: no lane stops early."""),
    ] = None
    sharpness: Annotated[
        bool,
        Doc("""Also report the sharpness, which is the largest eigenvalue of the Hessian of the
        loss, and draw its ratio to 2 / learning_rate."""),
    ] = False
    resume: Annotated[
        Path | None,
        Doc("""Folder of a sweep to resume, with the options it was started with. Options that may
        change: --top, --checkpoint-every, --coordinator, --processes and --process. None: start a
        new sweep."""),
    ] = None
    coordinator: Annotated[
        str | None,
        Doc("""HOST:PORT of process 0 of a sweep in several processes. Each process runs this
        command with the same --out, a folder that all of them see. None: one process."""),
    ] = None
    processes: Annotated[
        int | None,
        Doc("""Number of processes, with --coordinator. None: the number that Slurm, Open MPI or
        another launcher gives."""),
    ] = None
    process: Annotated[
        int | None,
        Doc("""Index of this process, from 0, with --coordinator. None: the index that the launcher
        gives."""),
    ] = None

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except (TypeError, ValueError) as error:
            raise UserError(_with_option(error)) from None

    def run(self) -> None:
        """Run the sweep; one of several processes runs it in a child process."""
        if self.coordinator and WATCHED not in os.environ:
            _watch(self)
        else:
            _sweep(self)


@dataclass(frozen=True)
class Optimizers:
    """Show the optimizers: their formulas, state sizes, numbers with defaults, and papers."""

    name: Annotated[
        tyro.conf.Positional[str | None],
        tyro.conf.arg(metavar="NAME"),
        Doc("An optimizer whose documentation to show. None: show a table of all optimizers."),
    ] = None

    def run(self) -> None:
        """Print the table of all optimizers, or the documentation of one."""
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
    """Show the table of a sweep again, and redraw its pictures."""

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
            message = f"{self.folder}: a file of the results is damaged: {where(error)}"
            raise UserError(f"{message}. Resume the sweep to write the results again") from error
        _show(Console(), result, self.folder, self.top)


def main() -> None:
    """Parse the arguments and run the command."""
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
    """Run the sweep in a child process, and say how to resume it if the child is killed.

    If another process of the sweep is lost, JAX kills the child without running Python code.
    """
    out = options.resume or options.out
    if out is None:
        raise UserError("--coordinator needs --out. Give a folder that all processes see")
    command = [sys.executable, "-m", "jgd.cli", *sys.argv[1:]]
    process = subprocess.Popen(command, env={**os.environ, WATCHED: "1"})
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the child has received Ctrl-C as well
            pass
    if code < 0 and code != -signal.SIGTERM:
        raise UserError(_lost_process(out))
    raise SystemExit(code)


def _lost_process(out: Path) -> str:
    """Return the error about a lost process, with the command that resumes the sweep."""
    from jgd.tuning.segment import resume_command

    return (
        "a process of the sweep was lost, so the others have ended. Resume the sweep with as many"
        f" processes or fewer: {resume_command(out)}, and --coordinator for more than one process"
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
    # a sweep that was killed before it wrote a plan starts again
    new = devices.from_process_0([is_free(out)])[0]
    resume = options.resume is not None and not new
    if options.resume is not None:
        options = _resumed(options)
    task = _task(options)
    train, halving = _training(options, task), _halving(options)
    progress = console.Progress(terminal, options.optuna)
    keywords = values_of(options, SweepOptions if options.optuna is None else Training)
    keywords |= dict(halving=halving, stop=options.patience, folder=out, resume=resume)
    try:
        with progress:
            result, finished = train(on_report=progress, **keywords), True
    except Interrupted as error:
        result, finished = error.result, False
    if not devices.is_writer():
        return
    if isinstance(result, Proposed):
        result = merge(*result.results)
    if finished or any(row["at"] for row in result.rows):
        _show(terminal, result, out, options.top)
    if not finished:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    rate = progress.done / max(progress.seconds, 1e-9)
    terminal.print(
        f"{progress.done:,} lane-steps in {progress.seconds:.1f} s: "
        f"[bold]{rate:,.0f} lane-steps per second[/bold]; {seconds:.1f} s in total"
    )


def _training(options: Sweep, task: Any) -> Callable[..., Any]:
    """Return a function of the options: the sweep over all combinations, or the Optuna search."""
    from jgd.tuning.propose import optuna_search
    from jgd.tuning.sweep import sweep

    optimizers = options.optimizer or TEXTBOOK
    if options.optuna is None:
        return functools.partial(sweep, task, groups_of(optimizers, options.set), options.steps)
    if importlib.util.find_spec("optuna") is None:
        raise UserError('--optuna needs Optuna: python -m pip install "jgd[optuna]"')
    for name in ("keep", "budget", "seconds"):
        if getattr(options, name) != getattr(SweepOptions, name):
            raise UserError(f"--{name} must not be given with --optuna. Leave out one of them")
    factory, space = space_of(optimizers, options.set)
    return functools.partial(optuna_search, task, factory, options.steps, options.optuna, space)


def _task(options: Sweep) -> Any:
    task = task_of(options.task)
    try:
        return jgd.with_sharpness(task) if options.sharpness else task
    except TypeError as error:
        raise UserError(f"--sharpness: {error}") from error


def _halving(options: Sweep) -> Any:
    """Return the halving that --halving or --hyperband asks for; None without them."""
    if options.halving is not None and options.hyperband is not None:
        raise UserError("--halving must not be given with --hyperband. Leave out one of them")
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
        redraw = f"jgd report {shlex.quote(str(out))}"
        message = f"{error}. The table is written. To draw the pictures, run {redraw}"
        raise UserError(message) from error
    tables = [out / name for name in ("results.csv", "results.json", "curves.npz")]
    files = [path.name for path in (*tables, *pictures) if path.exists()]
    terminal.print(f"files in {out}: {', '.join(files)}")


# --- the folder ------------------------------------------------------------------------------


@contextlib.contextmanager
def _in_folder(options: Sweep, out: Path) -> Generator[None]:
    """Lock a folder, write the command line into it, and turn errors and Ctrl-C into one line.

    A sweep whose arguments are refused leaves no files. Files that the folder had before stay.
    """
    from jgd.tuning import devices
    from jgd.tuning.folder import folder_lock, is_free, write_json
    from jgd.tuning.segment import resume_command

    with contextlib.ExitStack() as stack:
        new = False
        try:
            stack.enter_context(folder_lock(out))
            with devices.fails_everywhere():
                if new := devices.is_writer() and options.resume is None and is_free(out):
                    path = {"out": options.out and str(options.out)}  # JSON has no paths
                    write_json(out / "command.json", dataclasses.asdict(options) | path)
        except (OSError, RuntimeError) as error:
            option = "--out" if options.resume is None else "--resume"
            raise UserError(str(error).replace("sweep: folder", option)) from error
        try:
            yield

        except KeyboardInterrupt:
            raise UserError(f"interrupted; resume with: {resume_command(out)}") from None
        except Exception as error:
            if new and {path.name for path in out.iterdir()} <= {"command.json", *LOCKS}:
                (out / "command.json").unlink()
            if isinstance(error, UserError | ValueError | OSError):
                raise UserError(_with_option(error)) from error
            # the user's task failed, or the connection to another process
            hint = "" if options.coordinator is None else f". Perhaps {_lost_process(out)}"

            raise UserError(f"task {options.task}: {where(error)}{hint}") from error


def _resumed(options: Sweep) -> Sweep:
    """Return the options of the sweep in a folder, with the changes that the command line gives.

    Raises: UserError if an option changes that is not in MAY_CHANGE.
    """
    assert options.resume is not None
    path = options.resume / "command.json"
    if not path.exists():
        raise UserError(
            f"{options.resume} holds no sweep that `jgd sweep` started: there is no command.json"
        )
    try:
        entries = dict[str, Any](json.loads(path.read_text()), out=options.resume)
        entries |= {name: tuple(entries.get(name, ())) for name in REPEATABLE}
        written = Sweep(**entries)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    # parsed again, so that options that are not given keep their values
    now = tyro.cli(Sweep, args=sys.argv[2:], default=written)
    lists = {name: getattr(options, name) or getattr(written, name) for name in REPEATABLE}
    now = dataclasses.replace(now, **lists)
    for name, value in dataclasses.asdict(now).items():
        if name not in MAY_CHANGE and value != (was := getattr(written, name)):
            flag = "TASK" if name == "task" else _flag(name)
            was, value = (
                " ".join(x or ["not given"]) if name in REPEATABLE else x for x in (was, value)
            )
            raise UserError(
                f"{flag} must be {was} as in the sweep that --resume continues, got {value}"
            )
    return now


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _with_option(error: Exception) -> str:
    """Return the message of an error about an argument, with the option that sets the argument."""
    message = str(error)
    argument, _, rest = message.partition(" must ")
    function, _, name = argument.partition(": ")
    if argument in OPTION_OF:
        name = OPTION_OF[argument]
    elif function not in FUNCTIONS or name not in {x.name for x in dataclasses.fields(Sweep)}:
        return message
    return f"{_flag(name)} must {rest}"


def _new_folder(path: Path) -> Path:
    """Return `path`, or `path` with a number if it exists: two sweeps may start in one second."""
    tries = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return path if not path.exists() else next(new for new in tries if not new.exists())


def _keep_compiled_programs() -> None:
    """Cache compiled programs on disk, including programs that compile in under a second."""

    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jgd"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
