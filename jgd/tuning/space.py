"""Grids and samples: batches of settings that know their axes.

    lanes = grid(jgd.adam, learning_rate=np.logspace(-4, -1, 64), b1=[0.8, 0.9])     # 128 lanes
    lanes = random_search(jgd.adam, 500, key, learning_rate=loguniform(1e-5, 1e-1))
    jax.vmap(train)(lanes)                                  # to jax, just the batch of settings

The factory is any function from numbers to a setting. Numbers make lanes of one program; values
that change the structure (None, a bool, a string) make groups.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from jgd.arguments import Static, is_number
from jgd.checks import FINITE, admit, check_key, refuse, traceable
from jgd.lanes import check_numbers, length
from jgd.nodes import brief

__all__ = [
    "Choice",
    "Distribution",
    "Lanes",
    "LogUniform",
    "Uniform",
    "choice",
    "grid",
    "halton_search",
    "loguniform",
    "random_search",
    "sobol_search",
    "uniform",
]


@jax.tree_util.register_pytree_node_class
class Lanes:
    """A batch of settings of one structure, and the values of its axes.

    Any transformation of jax sees the settings alone: `jax.vmap(train)(lanes)` trains them, and
    `jgd.lane(lanes, k)` is setting k.

    Attributes:
      settings: the batch; each leaf has a leading axis of `len(lanes)`.
      axes: name -> one value per setting.
      fixed: name -> the structural value that all settings share.
      points: index of each setting among the points that `batch` was called with.
    """

    def __init__(
        self,
        settings: Any,
        axes: Mapping[str, np.ndarray],
        fixed: Mapping[str, Any] | None = None,
        points: Sequence[int] = (),
    ) -> None:
        self.settings = settings
        self.axes = dict(axes)
        self.fixed = dict(fixed or {})
        self.points = points

    def __len__(self) -> int:
        leaves = jax.tree.leaves(self.settings)
        return len(leaves[0]) if leaves else max([1, *map(len, self.axes.values())])

    def __repr__(self) -> str:
        varied = ", ".join([*self.axes, *(f"{k}={v}" for k, v in self.fixed.items())])
        return f"<{len(self)} lanes over {varied}>"

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.settings,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> Any:
        return children[0]  # after a transformation of jax: the settings themselves


def lanes_of(settings: Any) -> Lanes:
    """Return a batch of settings as `Lanes`; leaves that differ become the axes, by their paths.

    Raises: ValueError if the leaves have no leading axis of one length.
    """
    if isinstance(settings, Lanes):
        return settings
    if not length("sweep", settings):
        raise ValueError("sweep: no settings")
    leaves = jax.tree_util.tree_leaves_with_path(settings)
    axes = {}
    for path, leaf in leaves:
        name, values = jax.tree_util.keystr(path).lstrip("."), np.asarray(leaf)
        columns = values.reshape(len(values), -1).T  # a leaf may be an array in each setting
        for place, column in enumerate(columns):
            if (column != column[0]).any() or len(leaves) == 1:
                axes[f"{name}[{place}]" if values.ndim > 1 else name] = column
    return Lanes(settings, axes)


# --- distributions ---------------------------------------------------------------------------


class Uniform(NamedTuple):
    """Uniform distribution between low and high."""

    low: float
    high: float

    def at(self, u: np.ndarray) -> np.ndarray:
        """Return the values at quantiles in [0, 1)."""
        return self.low + (self.high - self.low) * u


class LogUniform(NamedTuple):
    """Distribution between low and high whose logarithm is uniform."""

    low: float
    high: float

    def at(self, u: np.ndarray) -> np.ndarray:
        """Return the values at quantiles in [0, 1)."""
        return self.low * (self.high / self.low) ** u


class Choice(NamedTuple):
    """Uniform distribution over values, which may be structure."""

    values: tuple[Any, ...]

    def at(self, u: np.ndarray) -> list[Any]:
        """Return the values at quantiles in [0, 1)."""
        return [self.values[int(x * len(self.values))] for x in u]


Distribution = Uniform | LogUniform | Choice


def uniform(low: float, high: float) -> Uniform:
    """Return a uniform distribution. Raises ValueError unless low < high, both finite."""
    low, high = _bounds("uniform", low, high)
    if not low < high:
        raise ValueError(f"uniform: low must be below high, got {low} and {high}")
    return Uniform(low, high)


def loguniform(low: float, high: float) -> LogUniform:
    """Return a log-uniform distribution. Raises ValueError unless 0 < low < high, both finite."""
    low, high = _bounds("loguniform", low, high)
    if not 0 < low < high:
        raise ValueError(f"loguniform: bounds must satisfy 0 < low < high, got {low} and {high}")
    return LogUniform(low, high)


def _bounds(function: str, low: Any, high: Any) -> tuple[float, float]:
    finite = Annotated[float, FINITE]
    return admit(f"{function}: low", low, finite), admit(f"{function}: high", high, finite)


def choice(values: Iterable[Any]) -> Choice:
    """Return a uniform distribution over values. Raises ValueError if there are none."""
    return Choice(tuple(_sequence("choice: the sequence", values)))


def _sequence(label: str, values: Any) -> list[Any]:
    """Return values as a list. Raises ValueError for none, or for something that has no order."""
    of_jgd = isinstance(values, Distribution | Lanes)
    if isinstance(values, str | bytes | Mapping | Set) or of_jgd or not np.iterable(values):
        raise ValueError(f"{label} must be a sequence of values, got {brief(values)}")
    several = list(np.asarray(values) if isinstance(values, jax.Array) else values)
    if not several:
        raise ValueError(f"{label} has no values")
    return several


def check_distributions(function: str, distributions: Mapping[str, Any]) -> None:
    """Raise TypeError unless each value is a distribution."""
    if not isinstance(distributions, Mapping) or not all(isinstance(n, str) for n in distributions):
        refuse(f"{function}: space", "a dict of distributions by name", distributions)
    for name, values in distributions.items():
        if not isinstance(values, Distribution):
            cure = ". Use jgd.choice for values, or jgd.grid"
            expected = "jgd.loguniform, jgd.uniform or jgd.choice"
            refuse(f"{function}: {name}", expected, values, cure)


# --- batches of settings ---------------------------------------------------------------------


def grid(factory: Callable[..., Any], /, **axes: Any) -> Any:
    """Return settings over the product of the axes; the last axis varies fastest.

    Args:
      factory: function from numbers to a setting; called with a value of each axis by its name.
      axes: sequences of values. Numbers make lanes; None, bools and strings make structure.

    Returns: `Lanes`; or, if structure varies, a dict of `Lanes` by the label of each structure.
    Raises: ValueError for no axes or an empty one, and what the factory raises for a value.
    """
    if not axes:
        raise ValueError("grid: axes must hold at least one axis, got none")
    columns = {name: _sequence(f"grid: axis {name}", values) for name, values in axes.items()}
    return batch(factory, list(columns), list(itertools.product(*columns.values())))


def random_search(
    factory: Callable[..., Any], n: int, key: jax.Array, /, **distributions: Distribution
) -> Any:
    """Return n settings drawn from distributions.

    Args:
      factory: function from numbers to a setting; called with each number by its name.
      n: number of settings, at least 1.
      key: random key; one key gives the same settings on all machines.
      distributions: `loguniform`, `uniform` or `choice`, by name.

    Returns and raises: as `grid`.
    """
    uniform = lambda d: np.asarray(jax.random.uniform(key, (d, n)), np.float64)
    return _drawn("random_search", factory, n, key, distributions, uniform)


def sobol_search(
    factory: Callable[..., Any], n: int, key: jax.Array, /, **distributions: Distribution
) -> Any:
    """Return n settings of a scrambled Sobol sequence: evenly spread, best for n a power of two.

    Args, returns and raises: as `random_search`. The sequence is SciPy's.
    """

    def quantiles(d: int) -> np.ndarray:
        sequence = scipy.stats.qmc.Sobol(d, rng=_seed(key))
        return sequence.random_base2(max(0, math.ceil(math.log2(n))))[:n].T

    return _drawn("sobol_search", factory, n, key, distributions, quantiles)


def halton_search(
    factory: Callable[..., Any], n: int, key: jax.Array, /, **distributions: Distribution
) -> Any:
    """Return n settings of a scrambled Halton sequence: evenly spread for any n.

    Args, returns and raises: as `random_search`. The sequence is SciPy's.
    """
    quantiles = lambda d: scipy.stats.qmc.Halton(d, rng=_seed(key)).random(n).T
    return _drawn("halton_search", factory, n, key, distributions, quantiles)


def _seed(key: jax.Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def _drawn(
    name: str,
    factory: Callable[..., Any],
    n: int,
    key: jax.Array,
    distributions: Mapping[str, Distribution],
    quantiles: Callable[[int], np.ndarray],
) -> Any:
    """Return settings at quantiles of shape (distributions, n) in [0, 1)."""
    n = admit(f"{name}: n", n, int)
    check_key(f"{name}: key", key)
    check_distributions(name, distributions)
    if n < 1 or not distributions:
        raise ValueError(
            f"{name}: n and the number of distributions must be at least 1, got {n} and"
            f" {len(distributions)}"
        )
    rows = zip(distributions.values(), quantiles(len(distributions)), strict=True)
    draws = [distribution.at(u) for distribution, u in rows]
    return batch(factory, list(distributions), list(zip(*draws, strict=True)))


def is_scalar(x: Any) -> bool:
    """Return whether a value makes lanes; other values are structure."""
    return is_number(x) and np.ndim(x) == 0


def batch(factory: Callable[..., Any], names: list[str], points: Sequence[tuple[Any, ...]]) -> Any:
    """Return the settings at points: `Lanes`, or a dict of `Lanes` where structure varies."""
    groups = dict[tuple[Any, ...], list[int]]()
    for index, point in enumerate(points):
        structure = tuple((i, Static(x)) for i, x in enumerate(point) if not is_scalar(x))
        groups.setdefault(structure, []).append(index)
    _try_each_value(factory, names, points)
    mixed = {i for structure in groups for i, _ in structure}
    batches = {}
    for structure, members in groups.items():
        fixed = {names[i]: node.value for i, node in structure}
        varied = [i for i in range(len(names)) if names[i] not in fixed]
        axes = {names[i]: np.array([float(points[m][i]) for m in members]) for i in varied}
        if axes:
            build = lambda numbers, fixed=fixed: factory(**numbers, **fixed)
            with traceable("factory"):
                settings = jax.vmap(build)({k: jnp.asarray(v, float) for k, v in axes.items()})
        else:
            one = factory(**fixed)
            settings = jax.tree.map(lambda x: jnp.asarray(x, float)[None], one)
        shown = [f"{names[i]}={fixed.get(names[i], 'number')}" for i in sorted(mixed)]
        label = ", ".join(shown)
        label = f"{label} ({len(batches)})" if label in batches else label
        batches[label] = Lanes(settings, axes, fixed, members)
    return batches if len(batches) > 1 else next(iter(batches.values()))


def _try_each_value(
    factory: Callable[..., Any], names: list[str], points: Sequence[tuple[Any, ...]]
) -> None:
    """Call the factory once with each value, so that it refuses a bad one before any training."""
    if not callable(factory):
        refuse("factory", "a function from numbers to a setting", factory)
    tried = set()
    for point in points:
        values = {(i, repr(x)) for i, x in enumerate(point)}
        if not values <= tried:
            tried |= values
            setting = factory(**dict(zip(names, point, strict=True)))
            check_numbers(getattr(factory, "__name__", "factory"), setting)
