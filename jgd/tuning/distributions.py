"""Distributions of one number or of structure, for searches.

loguniform(1e-5, 1e-1).at(quantiles)            # values, for quantiles in [0, 1)
loguniform(1e-5, 1e-1).suggest(trial, "rate")   # the value that an Optuna trial suggests
"""

from collections.abc import Iterable, Mapping, Set
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from jgd.checks import FINITE, admit, refuse
from jgd.nodes import brief

__all__ = [
    "Choice",
    "Distribution",
    "Integers",
    "LogUniform",
    "Uniform",
    "check_distributions",
    "choice",
    "integers",
    "loguniform",
    "sequence_of",
    "uniform",
]


class Uniform(NamedTuple):
    """Uniform distribution between low and high."""

    low: float
    high: float

    def at(self, u: np.ndarray) -> np.ndarray:
        """Return the values at quantiles in [0, 1)."""
        return self.low + (self.high - self.low) * u

    def suggest(self, trial: Any, name: str) -> float:
        """Return the value that an Optuna trial suggests."""
        return trial.suggest_float(name, self.low, self.high)


class LogUniform(NamedTuple):
    """Distribution between low and high whose logarithm is uniform."""

    low: float
    high: float

    def at(self, u: np.ndarray) -> np.ndarray:
        """Return the values at quantiles in [0, 1)."""
        return self.low * (self.high / self.low) ** u

    def suggest(self, trial: Any, name: str) -> float:
        """Return the value that an Optuna trial suggests."""
        return trial.suggest_float(name, self.low, self.high, log=True)


class Integers(NamedTuple):
    """Distribution over the integers from low to high: uniform, or in the logarithm."""

    low: int
    high: int
    log: bool

    def at(self, u: np.ndarray) -> np.ndarray:
        """Return the values at quantiles in [0, 1)."""
        ends = self.low - 0.5, self.high + 0.5  # each integer is the middle of its interval
        spread = LogUniform(*ends) if self.log else Uniform(*ends)
        return np.rint(spread.at(u)).astype(int).clip(self.low, self.high)

    def suggest(self, trial: Any, name: str) -> int:
        """Return the value that an Optuna trial suggests."""
        return trial.suggest_int(name, self.low, self.high, log=self.log)


class Choice(NamedTuple):
    """Uniform distribution over values, which may be structure."""

    values: tuple[Any, ...]

    def at(self, u: np.ndarray) -> list[Any]:
        """Return the values at quantiles in [0, 1)."""
        return [self.values[int(x * len(self.values))] for x in u]

    def suggest(self, trial: Any, name: str) -> Any:
        """Return the value that an Optuna trial suggests. Optuna stores the repr of structure."""
        plain = bool | int | float | str | None
        labels = [value if isinstance(value, plain) else repr(value) for value in self.values]
        return self.values[labels.index(trial.suggest_categorical(name, labels))]


Distribution = Uniform | LogUniform | Integers | Choice


def uniform(low: float, high: float) -> Uniform:
    """Return a uniform distribution. Raises ValueError unless low < high, both finite."""
    low, high = _bounds("uniform", low, high)
    if not low < high:
        raise ValueError(f"uniform: bounds must satisfy low < high, got {low} and {high}")
    return Uniform(low, high)


def loguniform(low: float, high: float) -> LogUniform:
    """Return a log-uniform distribution. Raises ValueError unless 0 < low < high, both finite."""
    low, high = _bounds("loguniform", low, high)
    if not 0 < low < high:
        raise ValueError(f"loguniform: bounds must satisfy 0 < low < high, got {low} and {high}")
    return LogUniform(low, high)


def integers(low: int, high: int, *, log: bool = False) -> Integers:
    """Return a distribution over the integers from low to high, both included.

    The integers are numbers, not structure: the factory gets them as traced floats.

    Args:
      low: smallest integer; at least 1 with log.
      high: largest integer; above low.
      log: whether the logarithm is uniform. False: all integers are equally likely.

    Raises: ValueError for a bound out of its range, TypeError for a bound that is no integer.
    """
    low, high = admit("integers: low", low, int), admit("integers: high", high, int)
    if not low < high or (log and low < 1):
        least = "1 <= " if log else ""
        raise ValueError(f"integers: bounds must satisfy {least}low < high, got {low} and {high}")
    return Integers(low, high, log)


def _bounds(function: str, low: Any, high: Any) -> tuple[float, float]:
    finite = Annotated[float, FINITE]
    return admit(f"{function}: low", low, finite), admit(f"{function}: high", high, finite)


def choice(values: Iterable[Any]) -> Choice:
    """Return a uniform distribution over values. Raises ValueError unless there is at least one."""
    return Choice(tuple(sequence_of("choice: values", values)))


def sequence_of(label: str, values: Any) -> list[Any]:
    """Return values as a list. Raises ValueError unless they are a sequence of at least one."""
    no_sequence = isinstance(values, str | bytes | Mapping | Set | Distribution)
    if no_sequence or not np.iterable(values):
        raise ValueError(f"{label} must be a sequence of values, got {brief(values)}")
    items = list(np.asarray(values) if isinstance(values, jax.Array) else values)
    if not items:
        raise ValueError(f"{label} must have at least one value, got none")
    return items


def check_distributions(function: str, distributions: Mapping[str, Any]) -> None:
    """Raise TypeError unless each value is a distribution."""
    if not isinstance(distributions, Mapping) or not all(isinstance(n, str) for n in distributions):
        refuse(f"{function}: space", "a dict of distributions by name", distributions)
    for name, values in distributions.items():
        if not isinstance(values, Distribution):
            cure = ". Use jgd.choice for values, or jgd.grid"
            expected = "jgd.loguniform, jgd.uniform, jgd.integers or jgd.choice"
            refuse(f"{function}: {name}", expected, values, cure)
