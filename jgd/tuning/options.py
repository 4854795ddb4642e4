"""The options of a sweep. Each has its type, default, range and documentation in one place.

    class Training          options of `sweep`, of `optuna_search`, of the command and of the plan
    class SweepOptions      adds limits of a sweep and `keep`, which `optuna_search` does not have

    @function_of(SweepArguments)        # SweepArguments(SweepOptions) adds task, settings, folder
    def sweep(arguments): ...           # called as sweep(task, settings, steps=100, seeds=3)

Everything that lists options reads these classes: `help(jgd.sweep)`, type checkers, the parser of
the command line, and `Plan`.
"""

import dataclasses
import difflib
import functools
import inspect
import textwrap
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, ParamSpec, TypeVar

from typing_extensions import Doc

from jgd.checks import FINITE, above, admit, at_least, below, seed_of

__all__ = ["Doc", "Seeds", "Steps", "SweepOptions", "Training", "function_of", "values_of"]

P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")


Steps = Annotated[
    int, at_least(4), below(2**31), Doc("Number of steps of each training, at least 4.")
]
Seeds = Annotated[
    int,
    at_least(1),
    Doc("""Number of trainings of each setting, at least 1. Each seed has its own initial
    parameters, the same for all settings."""),
]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options of each lane's training.

    Raises: ValueError for an option out of its range, TypeError for an option of another type.
    """

    function: ClassVar[str] = "sweep"  # the function that errors name

    seeds: Seeds = 1
    key: Annotated[
        Any,
        Doc("""Random seed of the initial parameters: an int, or a random key. 3 and
        `jax.random.key(3)` give the same parameters."""),
    ] = 0
    order: Annotated[
        Literal["shared", "own"],
        Doc("""Order of the batches. shared: all lanes see the same batches. own: each seed has its
        own order, the same for all settings; the task's `batch` must then be a function of (step,
        seed), such as `jgd.minibatches` returns."""),
    ] = "shared"
    width: Annotated[
        int | None,
        at_least(1),
        Doc("""Number of lanes that step together, at least 1; a tile with fewer lanes is padded.
        None: if the sweep is long enough, a probe measures several widths and chooses the smallest
        one within 5 per cent of the fastest; else 64, or fewer for a small group. Results at equal
        widths are equal bit for bit, results at other widths agree to rounding."""),
    ] = None
    report_every: Annotated[
        int | None,
        at_least(1),
        Doc("Number of steps between reports, at least 1. None: a twentieth of all steps."),
    ] = None
    metric: Annotated[
        str | None,
        Doc("""Metric of `evaluate` to rank by. None: "accuracy" if it is reported, else "loss" if
        it is reported, else the first metric."""),
    ] = None
    mode: Annotated[
        Literal["min", "max"] | None,
        Doc("""Direction of the metric: low (min) or high (max) is better. None: a word in its name
        decides: max for accuracy, acc, auc, f1, r2, reward, return, score and bleu, and min for
        loss, error, nll, mse, mae and perplexity. A name without such a word, or with words of both
        kinds, is an error."""),
    ] = None
    best: Annotated[
        Literal["final", "ever"],
        Doc("""Which report of a lane counts. final: its last report. ever: its best report, whose
        state is then returned; each lane takes twice the memory."""),
    ] = "final"
    drop_diverged: Annotated[
        bool, Doc("Whether to end a lane once its training loss is not finite.")
    ] = False
    devices: Annotated[
        int | None,
        Doc("""Number of devices to shard the lanes of a tile over, at least 1. Widths are
        multiples of it. Lanes do not communicate within a chunk. None: all devices."""),
    ] = None
    target: Annotated[
        float | None,
        FINITE,
        Doc("""Stop a lane once the metric reaches this value, and rank by the number of steps it
        took. None: no target."""),
    ] = None
    checkpoint_every: Annotated[
        float,
        at_least(0),
        Doc("""Seconds between checkpoints, at least 0. A crash loses the work since the last
        checkpoint."""),
    ] = 30.0

    def __post_init__(self) -> None:
        for name, hint in _hints_of(type(self)).items():
            label = f"{self.function}: {name}"
            value = getattr(self, name)
            value = seed_of(label, value) if name == "key" else admit(label, value, hint)
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Training):
    """Options of training, limits of a sweep, and the number of states to return."""

    keep: Annotated[
        int,
        at_least(1),
        Doc("Number of best settings to return with their trained states, at least 1."),
    ] = 1
    budget: Annotated[
        int | None,
        at_least(1),
        Doc("""Limit on lane-steps, including those that pad tiles, at least 1. At the limit,
        running chunks finish and no new chunk starts; lanes that are unfinished end as "out of
        budget" or "not run". None: no limit."""),
    ] = None
    seconds: Annotated[
        float | None,
        above(0),
        Doc("""Limit on wall-clock time in seconds, above 0. At the limit, running chunks finish and
        no new chunk starts. A sweep that reaches the limit cannot be repeated exactly. None: no
        limit."""),
    ] = None


@functools.cache
def _hints_of(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def values_of(options: Any, cls: type[Any]) -> dict[str, Any]:
    """Return name -> value of the fields of `cls`, from an instance of any class that has them."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(cls)}


def function_of(arguments: Callable[P, A]) -> Callable[[Callable[[A], R]], Callable[P, R]]:
    """Return a decorator that turns a function of a dataclass into a function of its fields.

    The new function has the signature of the dataclass. `{arguments}` in the docstring becomes the
    list of the fields with their documentation.
    """

    def decorate(function: Callable[[A], R]) -> Callable[P, R]:
        signature = inspect.signature(arguments).replace(return_annotation=inspect.Signature.empty)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                unknown = next((name for name in kwargs if name not in signature.parameters), None)
                close = difflib.get_close_matches(str(unknown), signature.parameters, 1)
                hint = f"; did you mean {close[0]}?" if unknown and close else ""
                raise TypeError(f"{function.__name__}: {error}{hint}") from None
            return function(arguments(*args, **kwargs))

        hints = typing.get_type_hints(arguments)
        plain = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values()]
        setattr(call, "__signature__", signature.replace(parameters=plain))  # noqa: B010
        call.__annotations__ = hints
        if function.__doc__ is not None:  # None under python -OO
            listed = textwrap.indent(_described(arguments), "  ")
            call.__doc__ = inspect.cleandoc(function.__doc__).replace("  {arguments}", listed)
        return call

    return decorate


def _described(cls: Any) -> str:
    """Return the documented fields of a dataclass as the `Args` of a docstring."""
    entries, hints = list[str](), _hints_of(cls)
    for field in sorted(dataclasses.fields(cls), key=lambda field: bool(field.kw_only)):
        doc = next(x for x in hints[field.name].__metadata__ if isinstance(x, Doc))
        default = (
            "" if field.default in (dataclasses.MISSING, None) else f" Default: {field.default!r}."
        )
        text = f"{field.name}: {' '.join(doc.documentation.split())}{default}"
        entries.append(textwrap.fill(text, 92, subsequent_indent="  "))
    return "\n".join(entries)
