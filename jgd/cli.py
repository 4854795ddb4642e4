"""The command line: arguments -> a sweep -> what it found, on the screen and in a folder.

jax is imported inside the commands, so that `jgd --help` answers at once.
"""

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import jgd

TEXTBOOK = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam")
RATES = "log:1e-5:1e1:64"
EXTRAS = ("tyro", "rich", "matplotlib", "sklearn", "orbax")
WATCHED = "JGD_WATCHED"  # in the environment of a process whose end another one waits for


class UserError(Exception):
    """Something the user can mend: shown as one line."""


def main() -> None:
    """The entry point `jgd`."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        _fail(f'{", ".join(missing)} not installed: python -m pip install "jgd[sweep]"')
    import tyro

    @dataclasses.dataclass
    class Sweep:
        """Train many settings of optimizers at once and rank them.

        Without arguments: the six textbook optimizers at 64 learning rates and three seeds each, on
        scikit-learn's handwritten digits. A task of your own is a function without arguments that
        returns a jgd.Task:

        jgd sweep mypackage.mymodule:task --optimizer adam --set learning_rate=log:1e-5:1e-1:64
        """

        task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK")] = "digits"
        """digits, or module:name of a Task or of a function that returns one."""
        optimizer: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
        """One of jgd's, or module:factory. Repeat it for several. Default: the textbook six."""
        set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
        """An argument's values: b1=0.8,0.9 or rate=log:LOW:HIGH:COUNT or lin:LOW:HIGH:COUNT.
        Repeat it for several arguments: every combination is tried.
        Default: learning_rate=log:1e-5:1e1:64."""
        steps: int = 1000
        """Training steps of each setting."""
        seeds: int = 3
        """Trainings of each setting, from different initial parameters."""
        metric: str | None = None
        """Metric to rank by. Default: accuracy, or loss, or the first that the task reports."""
        mode: Literal["min", "max"] | None = None
        """Which end of the metric is best. Default: max for an accuracy, else min."""
        out: Path | None = None
        """A new folder for table, pictures and journal. Default: runs/ and the time of day."""
        top: int = 20
        """Rows of the table to print; all are in results.csv."""
        best: Literal["final", "ever"] = "final"
        """Which report of a lane counts: its last one, or its best one."""
        target: float | None = None
        """A value of the metric: who is there in fewer steps is better, and ends."""
        order: Literal["shared", "own"] = "shared"
        """Of the batches: the same for all, or each seed its own."""
        halving: float | None = None
        """Successive halving: at each rung one setting in so many goes on, as 2 or 3. Default: all
        settings run to their end."""
        hyperband: float | None = None
        """Likewise, in brackets from bold to cautious."""
        min_steps: int | None = None
        """Steps to the first rung. Default: an eta-cubed-th of all."""
        within: Literal["sweep", "group"] = "sweep"
        """What is ranked together at a rung."""
        patience: int | None = None
        """Early stopping: reports without an improvement after which a lane ends."""
        drop_diverged: bool = False
        """End lanes whose training loss is not finite."""
        budget: int | None = None
        """Lane-steps after which nothing is begun."""
        seconds: float | None = None
        """Seconds after which nothing is begun."""
        sharpness: bool = False
        """Report the largest eigenvalue of the loss's Hessian as well, and draw it against
        2 / learning_rate."""
        width: int | None = None
        """Lanes that step together. Default: found by a probe."""
        key: int = 0
        """Random key of the initial parameters."""
        resume: Path | None = None
        """Go on with the sweep in this folder; all other options are those it was begun with."""
        checkpoint_every: float = 30.0
        """Seconds between checkpoints: what a crash can lose."""
        coordinator: str | None = None
        """HOST:PORT of process 0, for several processes that all run this command with one --out,
        on a disk that all see."""
        processes: int | None = None
        """How many there are. Default: as Slurm, Open MPI or the like say."""
        process: int | None = None
        """Which one this is, from 0. Default: likewise."""

    @dataclasses.dataclass
    class Optimizers:
        """Show the optimizers: formula, size of the state, numbers with defaults, paper."""

        name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None
        """One optimizer, with all that is said of it. Default: the table of all."""

    @dataclasses.dataclass
    class Report:
        """Show the table of a sweep again, and draw its pictures anew."""

        folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
        """The folder of the sweep."""
        top: int = 20
        """Rows of the table to print."""

    commands = {"sweep": Sweep, "report": Report, "optimizers": Optimizers}
    try:
        options = tyro.extras.subcommand_cli_from_dict(commands, prog="jgd")
        if isinstance(options, Sweep) and options.coordinator and WATCHED not in os.environ:
            _watched(options)
        elif isinstance(options, Sweep):
            _sweep(options)
        elif isinstance(options, Report):
            _report(options.folder, options.top)
        else:
            _optimizers(options.name)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")


def _fail(message: str) -> NoReturn:
    print(f"jgd: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- arguments -------------------------------------------------------------------------------


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.45)
    return f"; did you mean {close[0]}?" if close else ""


def _load(spec: str, what: str) -> Any:
    """The object at module:name."""
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise UserError(f"{what}: module:name wanted, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(f"{what} {spec}: {_where(error)}") from None
        parent, _, last = error.name.rpartition(".")
        paths = getattr(sys.modules.get(parent), "__path__", None) if parent else None
        known = [found.name for found in pkgutil.iter_modules(paths)]
        raise UserError(f"{what}: no module named {error.name}{_nearest(last, known)}") from None
    except Exception as error:
        raise UserError(f"{what} {spec}: {_where(error)}") from error
    if not hasattr(module, name):
        known = [known for known in vars(module) if not known.startswith("_")]
        raise UserError(f"{what}: {module_name} has no {name!r}{_nearest(name, known)}")
    return getattr(module, name)


def _where(error: BaseException) -> str:
    """An error of the user's code in one line, with the line of theirs that raised it."""
    libraries = (sysconfig.get_path("stdlib"), str(Path(__file__).parent), "<")
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        frame
        for frame in frames
        if not frame.filename.startswith(libraries) and "site-packages" not in frame.filename
    ]
    place = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}{place}"


def _task(spec: str) -> Any:
    from jgd.training import Run, Task

    if ":" not in spec:
        from jgd.tuning import tasks

        if spec not in tasks.__all__:
            hint = _nearest(spec, tasks.__all__) or "; your own is module:name"
            raise UserError(f"no task named {spec}{hint}")
        return getattr(tasks, spec)()
    found = _load(spec, "task")
    if not isinstance(found, Task | Run) and callable(found):
        try:
            found = found()
        except Exception as error:
            raise UserError(f"task {spec}: {_where(error)}") from error
    if not isinstance(found, Task | Run):
        raise UserError(f"task {spec} is a {type(found).__name__}, not a jgd.Task or jgd.Run")
    return found


def _factory(spec: str) -> Callable[..., Any]:
    if ":" in spec:
        found = _load(spec, "optimizer")
        if not callable(found):
            raise UserError(f"optimizer {spec} is a {type(found).__name__}, not a function")
        return found if hasattr(found, "__jgd_spec__") else _lifted(found)
    try:
        return jgd.get(spec)
    except ValueError as error:
        raise UserError(str(error)) from None


def _lifted(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A factory of optax made one of values; one that gives settings already, as it is."""
    import optax

    plain = (optax.GradientTransformation, optax.GradientTransformationExtraArgs)

    @functools.wraps(factory)
    def build(**arguments: Any) -> Any:
        made = factory(**arguments)
        return jgd.as_pytree(factory)(**arguments) if type(made) in plain else made

    return build


def _values(spec: str) -> tuple[str, list[Any]]:
    """The name and the values of an argument like b1=0.8,0.9 or rate=log:1e-5:1e-1:64."""
    import numpy as np

    name, equals, text = spec.partition("=")
    if not equals or not name or not text:
        raise UserError(f"--set wants name=values, got {spec!r}")
    form, *bounds = text.split(":")
    if not bounds:
        return name, [_value(word) for word in text.split(",")]
    if form not in ("log", "lin"):
        raise UserError(f"--set {spec}: no form {form!r}{_nearest(form, ('log', 'lin'))}")
    low = high = math.nan
    try:
        low, high, count = float(bounds[0]), float(bounds[1]), int(bounds[2])
    except (ValueError, IndexError):
        count = 0
    if len(bounds) != 3 or count < 1 or not math.isfinite(low + high):
        raise UserError(f"--set {spec}: {form}:LOW:HIGH:COUNT wanted")
    if form == "lin":
        return name, list(np.linspace(low, high, count))
    if not 0 < low < high:
        raise UserError(f"--set {spec}: 0 < LOW < HIGH wanted")
    return name, list(np.geomspace(low, high, count))


def _value(word: str) -> Any:
    named = {"none": None, "true": True, "false": False}
    if word.lower() in named:
        return named[word.lower()]
    try:
        return float(word)
    except ValueError:
        return word


def _groups(optimizers: Iterable[str], sets: Iterable[str]) -> dict[str, Any]:
    """A grid for each optimizer, over the arguments that it has."""
    from jgd.tuning.space import grid

    values: dict[str, list[Any]] = {}
    for name, more in map(_values, sets):
        values.setdefault(name, []).extend(more)
    groups, unused, known = {}, set(values), set()
    for spec in optimizers:
        factory = _factory(spec)
        parameters = inspect.signature(factory).parameters
        known.update(parameters)
        axes = {name: values[name] for name in values if name in parameters}
        unused -= set(axes)
        if "learning_rate" in parameters and "learning_rate" not in axes:
            axes = dict([_values(f"learning_rate={RATES}")], **axes)
        if not axes:
            raise UserError(f"optimizer {spec}: say what to vary with --set")
        name = spec.rpartition(":")[2]
        name = spec if name in groups else name
        if name in groups:
            raise UserError(f"optimizer {spec} is named twice")
        try:
            groups[name] = grid(factory, **axes)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        except Exception as error:
            raise UserError(f"optimizer {spec}: {_where(error)}") from error
    for name in unused:
        raise UserError(f"--set {name}: no optimizer here has that argument{_nearest(name, known)}")
    return groups


# --- the optimizers --------------------------------------------------------------------------


def _optimizers(name: str | None) -> None:
    from rich.console import Console

    console = Console()
    if name is not None:
        factory = _factory(name)
        signature = inspect.signature(factory)
        plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        call = signature.replace(parameters=plain, return_annotation=signature.empty)
        console.print(f"jgd.{name}{call}\n", markup=False, highlight=False)
        console.print(inspect.getdoc(factory), markup=False, highlight=False, soft_wrap=True)
        return
    from jgd.tuning import screen

    screen.print_optimizers(console)


# --- the sweep -------------------------------------------------------------------------------


def _watched(options: Any) -> None:
    """Run one of several processes, and say how to go on when it is torn down with a lost one.

    jax then ends it from within, where no Python runs any more.
    """
    out = options.resume or options.out
    if out is None:
        raise UserError("--coordinator wants --out, a folder that all processes see")
    command = [sys.executable, "-m", "jgd.cli", *sys.argv[1:]]
    process = subprocess.Popen(command, env={**os.environ, WATCHED: "1"})
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # which the other process has got as well
            pass
    if code < 0 and code != -signal.SIGTERM:
        raise UserError(_go_on(out))
    raise SystemExit(code)


def _go_on(out: Path) -> str:
    return (
        "a process of this sweep was lost, and so the others have ended. Go on, on as many or"
        f" fewer: jgd sweep --resume {out}, with --coordinator if there are several"
    )


def _sweep(options: Any) -> None:
    started = time.perf_counter()
    _keep_compiled_programs()
    from rich.console import Console

    from jgd.tuning import devices, screen, sweep

    several = options.coordinator is not None
    if several:
        devices.join(options.coordinator, options.processes, options.process)
    console = Console(quiet=not devices.writes())
    out = options.resume or options.out
    out = out or _new_folder(Path("runs") / time.strftime("%Y-%m-%d-%H%M%S"))
    # a sweep that was killed before it had a plan begins anew
    resume = options.resume is not None and devices.agreed((out / "plan.json").exists())
    if options.resume is not None:
        options = _command(options)
    task = _task(options.task)
    if options.sharpness:
        if not isinstance(task, jgd.Task):
            raise UserError("--sharpness wants a jgd.Task, whose loss it differentiates")
        try:
            task = jgd.with_sharpness(task)
        except TypeError as error:
            raise UserError(f"--sharpness: {error}") from error
    groups = _groups(options.optimizer or TEXTBOOK, options.set)
    if options.resume is None and devices.writes():
        _write_command(options, out)
    progress = screen.Progress(console)
    names = "seeds key width metric mode best target order drop_diverged budget seconds"
    told = {name: getattr(options, name) for name in names.split()}
    interrupted = False
    try:
        with progress:
            result = sweep.sweep(
                task,
                groups,
                options.steps,
                halving=_halving(options),
                stop=options.patience,
                folder=out,
                resume=resume,
                checkpoint_every=options.checkpoint_every,
                on_report=progress,
                **told,
            )
    except sweep.Interrupted as error:
        result, interrupted = error.result, True
    except (ValueError, OSError) as error:
        _forget_command(out)
        raise UserError(str(error)) from error
    except Exception as error:  # of the user's task, inside the program, or of the connection
        _forget_command(out)
        hint = f"; perhaps {_go_on(out)}" if several else ""
        raise UserError(f"task {options.task}: {_where(error)}{hint}") from error
    if not devices.writes():
        return
    _show(console, result, out, options.top)
    seconds = time.perf_counter() - started
    rate = progress.done / max(progress.seconds, 1e-9)
    console.print(
        f"{progress.done:,} lane-steps in {progress.seconds:.1f} s: "
        f"[bold]{rate:,.0f} lane-steps per second[/bold]; {seconds:.1f} s in all"
    )
    if interrupted:
        raise UserError(f"interrupted; go on with: jgd sweep --resume {out}")


def _show(console: Any, result: Any, out: Path, top: int) -> None:
    from jgd.tuning import plots, screen

    screen.print_result(console, result, top)
    pictures = plots.save_plots(result, out)
    files = ["results.csv", "results.json", "curves.npz", *(path.name for path in pictures)]
    console.print(f"in {out}: {', '.join(files)}")


def _report(folder: Path, top: int) -> None:
    from rich.console import Console

    from jgd.tuning.store import read_result

    try:
        _show(Console(), read_result(folder), folder, top)
    except OSError as error:
        raise UserError(str(error)) from error


def _halving(options: Any) -> Any:
    """What --halving and --hyperband ask for."""
    if options.halving is not None and options.hyperband is not None:
        raise UserError("one of --halving and --hyperband, not both")
    for make, eta in (
        (jgd.successive_halving, options.halving),
        (jgd.hyperband, options.hyperband),
    ):
        if eta is not None:
            return make(eta, options.min_steps, within=options.within)
    if options.min_steps is not None:
        raise UserError("--min-steps wants --halving or --hyperband")
    return None


def _write_command(options: Any, out: Path) -> None:
    """What the command line said, for the folder, before anything else is in it."""
    plain = lambda x: str(x) if isinstance(x, Path) else x
    told = {name: plain(x) for name, x in dataclasses.asdict(options).items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not any(out.iterdir()):
            (out / "command.json.part").write_text(json.dumps(told, indent=1))
            (out / "command.json.part").replace(out / "command.json")
    except OSError as error:
        raise UserError(str(error)) from error


def _forget_command(out: Path) -> None:
    """Leave no folder behind for a sweep that was refused."""
    if out.is_dir() and [path.name for path in out.iterdir()] == ["command.json"]:
        shutil.rmtree(out, ignore_errors=True)


def _command(options: Any) -> Any:
    """The options that the sweep in a folder was begun with."""
    path = options.resume / "command.json"
    if not path.exists():
        raise UserError(f"{options.resume} holds no sweep of the command line: no command.json")
    told = json.loads(path.read_text())
    now = ("top", "checkpoint_every", "coordinator", "processes", "process", "resume")
    told |= {name: getattr(options, name) for name in now} | {"out": options.resume}
    return type(options)(**told)


def _new_folder(path: Path) -> Path:
    """A folder that is not there yet: two sweeps may begin in the same second."""
    tries = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return path if not path.exists() else next(new for new in tries if not new.exists())


def _keep_compiled_programs() -> None:
    """The programs of a sweep compile in under a second each, so none is too small to keep."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jgd"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


if __name__ == "__main__":
    main()
