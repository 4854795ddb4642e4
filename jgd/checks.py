"""Checks of plain arguments. Errors are `function: argument must be RANGE, got VALUE`.

    admit("sweep: steps", 10.5, Count)      # sweep: steps must be an integer, got 10.5
    check_key("train: key", 0)              # train: key must be a random key, got 0. Use ...

The annotation of an argument says what it must be. JAX is imported only where a value needs it,
since the command line reads its options without JAX.
"""

import contextlib
import math
import operator
import os
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

__all__ = [
    "Count",
    "Range",
    "admit",
    "at_least",
    "check_key",
    "key_of",
    "place_of",
    "refuse",
    "seed_of",
    "traceable",
]


class Range(NamedTuple):
    """The range of an argument, as metadata of its annotation. NaN is outside every range."""

    description: str
    check: Callable[[Any], bool]


def at_least(least: float) -> Range:
    return Range(f"at least {least}", lambda x: x >= least)


def above(bound: float) -> Range:
    return Range(f"above {bound}", lambda x: x > bound)


def below(bound: float) -> Range:
    return Range(f"below {bound}", lambda x: x < bound)


FINITE = Range("finite", math.isfinite)
Count = Annotated[int, at_least(1)]


def refuse(label: str, description: str, value: Any, hint: str = "") -> NoReturn:
    """Raise TypeError for an argument of the wrong type."""
    from jgd.nodes import brief

    raise TypeError(f"{label} must be {description}, got {brief(value)}{hint}")


# --- arguments by their annotations ----------------------------------------------------------


def admit(label: str, value: Any, hint: Any) -> Any:
    """Return an argument as the type of its annotation. Types that `PLAIN` lacks admit any value.

    Raises: TypeError for the wrong type, ValueError for a value out of range.
    """
    notes = getattr(hint, "__metadata__", ())
    hint = typing.get_args(hint)[0] if notes else hint
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = list(typing.get_args(hint) if union else [hint])
    if type(None) in kinds:
        if value is None:
            return None
        kinds.remove(type(None))
    kind = Path if kinds == [str, Path] else kinds[0] if len(kinds) == 1 else Any
    kind, choices = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Literal and value not in choices:
        raise ValueError(f"{label} must be {' or '.join(map(repr, choices))}, got {value!r}")
    if kind in PLAIN:
        try:
            value = _converted(value, kind)
        except (TypeError, ValueError):
            refuse(label, PLAIN[kind], value)
    for note in notes:
        if isinstance(note, Range) and not note.check(value):
            raise ValueError(f"{label} must be {note.description}, got {value}")
    return value


PLAIN: Any = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    Path: "a path",
    Callable: "a function",
}


def _converted(value: Any, kind: Any) -> Any:
    """Return a value as the plain type `kind`: scalars of NumPy and JAX become Python's."""
    if str(getattr(value, "dtype", "")) == "bool":
        value = bool(value)
    if isinstance(value, bool) != (kind is bool):
        raise TypeError
    if kind is int:
        return operator.index(value)
    if kind is float and not isinstance(value, float | int | str | bytes):
        return float(value)
    if not isinstance(value, {float: float | int, Path: str | os.PathLike}.get(kind, kind)):
        raise TypeError
    return value


# --- random keys -----------------------------------------------------------------------------


def check_key(label: str, key: Any, description: str = "a random key") -> None:
    """Raise TypeError unless `key` is one random key, from `jax.random.key` or `PRNGKey`."""
    import jax

    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(jax.random.key(0))
    if (dtype, shape) != (words.dtype, words.shape) and not (typed and shape == ()):
        refuse(label, description, key, ". Use jax.random.key(0)")


def seed_of(label: str, key: Any) -> Any:
    """Return a random key as plain data: its integer seed, or its implementation and its words."""
    if isinstance(key, list | tuple) and key and isinstance(key[0], str):
        return tuple(key)  # plain already
    with contextlib.suppress(TypeError):
        return admit(label, key, Annotated[int, at_least(-(2**63)), below(2**63)])
    check_key(label, key, "an integer or a random key")
    import jax

    def plain(key: Any) -> tuple[Any, ...]:
        key = jax.random.wrap_key_data(key) if key.shape else key
        return str(jax.random.key_impl(key)), *jax.random.key_data(key).tolist()

    words = plain(key)
    return words[-1] if words == plain(jax.random.key(words[-1])) else words


def key_of(seed: Any) -> Any:
    """Return the random key for plain data from `seed_of`."""
    import jax
    import jax.numpy as jnp

    if isinstance(seed, int):
        return jax.random.key(seed)
    kind, *words = seed
    return jax.random.wrap_key_data(jnp.array(words, "uint32"), impl=kind)


# --- the user's functions --------------------------------------------------------------------


@contextlib.contextmanager
def traceable(label: str) -> Generator[None]:
    """Turn errors of JAX about a traced value into a one-line TypeError within this context."""
    import jax

    try:
        yield
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise TypeError(
            f"{label} must be a function that JAX can trace, got one that reads the value of a"
            f" traced array{place_of(error)}. Use jax.numpy, and jnp.where for branches"
        ) from error


def place_of(error: BaseException) -> str:
    """Return the file and line of the user's code that raised an error; empty if there is none."""
    libraries = (sysconfig.get_path("stdlib"), str(Path(__file__).parent), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(libraries) and "site-packages" not in frame.filename:
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""
