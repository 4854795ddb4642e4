"""Grids and samples: batches of settings that know their axes.

    lanes = grid(jgd.adam, learning_rate=np.logspace(-4, -1, 64), b1=[0.8, 0.9])     # 128 lanes
    lanes = random_search(jgd.adam, 500, key, learning_rate=loguniform(1e-5, 1e-1))
    jax.vmap(train)(lanes)                                  # to jax, just the batch of settings

The factory is any function from numbers to a setting. Numbers make lanes of one program; values
that change the structure (None, a bool, a string) make groups.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from jgd.arguments import Static, is_number
from jgd.lanes import refuse_functions
from jgd.pytree import Schedule, Transformation

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
    """Return a batch of settings as `Lanes`; leaves that differ become the axes.

    They are named by their paths; a link of a chain is named by its factory, as in
    adam.learning_rate, and so is what differs in a schedule if nothing else in it does.

    Raises: ValueError if the leaves have no leading axis of one length.
    """
    if isinstance(settings, Lanes):
        return settings
    refuse_functions("sweep", settings)
    leaves = jax.tree_util.tree_leaves_with_path(settings)
    sizes = {np.shape(leaf)[:1] for _, leaf in leaves}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"a batch of settings needs one leading axis on all its numbers, got {settings!r};"
            " build it with jgd.grid, jgd.random_search, jgd.stack or jax.vmap of the factory"
        )
    columns = list[tuple[list[str], np.ndarray]]()
    for names, (path, leaf) in zip(_names(settings), leaves, strict=True):
        values = np.asarray(leaf)
        names = [*names, jax.tree_util.keystr(path).lstrip(".")]
        for place, column in enumerate(values.reshape(len(values), -1).T):
            if (column != column[0]).any() or len(leaves) == 1:
                # a leaf may be an array in each setting
                array = [f"{name}[{place}]" for name in names[1:]]
                columns.append((array if values.ndim > 1 else names, column))
    taken = collections.Counter(name for names, _ in columns for name in set(names))
    unique = lambda names: next((name for name in names if taken[name] == 1), names[-1])
    return Lanes(settings, {unique(names): column for names, column in columns})


def _names(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield two names of each leaf: by the argument it belongs to, and by its path in its link."""
    inside = lambda x: isinstance(x, Transformation) and x is not node
    for path, child in jax.tree_util.tree_leaves_with_path(node, is_leaf=inside):
        text = jax.tree_util.keystr(path).lstrip(".")
        if not inside(child):
            argument = text.partition(".")[0]
            scheduled = isinstance(getattr(node, argument, None), Schedule)
            yield prefix + (argument if scheduled else text), prefix + text
        elif isinstance(node, Transformation):
            named = isinstance(path[-1], jax.tree_util.DictKey)
            yield from _names(child, f"{path[-1].key if named else _word(child)}.")
        else:
            yield from _names(child, f"{prefix}{text}.")


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
    """Return a uniform distribution. Raises ValueError unless low < high."""
    if not low < high:
        raise ValueError(f"uniform: low must be below high, got {low} and {high}")
    return Uniform(low, high)


def loguniform(low: float, high: float) -> LogUniform:
    """Return a log-uniform distribution. Raises ValueError unless 0 < low < high."""
    if not 0 < low < high:
        raise ValueError(f"loguniform: bounds must satisfy 0 < low < high, got {low} and {high}")
    return LogUniform(low, high)


def choice(values: Iterable[Any]) -> Choice:
    """Return a uniform distribution over values. Raises ValueError if there are none."""
    values = tuple(values)
    if not values:
        raise ValueError("choice: values must hold at least one value")
    return Choice(values)


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
    columns = {}
    for name, values in axes.items():
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise ValueError(f"grid: axis {name} must be a sequence of values, got {values!r}")
        columns[name] = list(np.asarray(values) if _is_array(values) else values)
        if not columns[name]:
            raise ValueError(f"grid: axis {name} has no values")
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
    return _drawn("random_search", factory, n, distributions, uniform)


def sobol_search(
    factory: Callable[..., Any], n: int, key: jax.Array, /, **distributions: Distribution
) -> Any:
    """Return n settings of a scrambled Sobol sequence: evenly spread, best for n a power of two.

    Args, returns and raises: as `random_search`. The sequence is SciPy's.
    """

    def quantiles(d: int) -> np.ndarray:
        sequence = scipy.stats.qmc.Sobol(d, rng=_seed(key))
        return sequence.random_base2(max(0, math.ceil(math.log2(n))))[:n].T

    return _drawn("sobol_search", factory, n, distributions, quantiles)


def halton_search(
    factory: Callable[..., Any], n: int, key: jax.Array, /, **distributions: Distribution
) -> Any:
    """Return n settings of a scrambled Halton sequence: evenly spread for any n.

    Args, returns and raises: as `random_search`. The sequence is SciPy's.
    """
    quantiles = lambda d: scipy.stats.qmc.Halton(d, rng=_seed(key)).random(n).T
    return _drawn("halton_search", factory, n, distributions, quantiles)


def _seed(key: jax.Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def _drawn(
    name: str,
    factory: Callable[..., Any],
    n: int,
    distributions: Mapping[str, Distribution],
    quantiles: Callable[[int], np.ndarray],
) -> Any:
    """Return settings at quantiles of shape (distributions, n) in [0, 1)."""
    if n < 1 or not distributions:
        raise ValueError(
            f"{name}: n and the number of distributions must be at least 1, got {n} and"
            f" {len(distributions)}"
        )
    rows = zip(distributions.values(), quantiles(len(distributions)), strict=True)
    draws = [distribution.at(u) for distribution, u in rows]
    return batch(factory, list(distributions), list(zip(*draws, strict=True)))


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray | jax.Array)


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
            settings = jax.vmap(build)({k: jnp.asarray(v, float) for k, v in axes.items()})
        else:
            one = factory(**fixed)
            settings = jax.tree.map(lambda x: jnp.asarray(x, float)[None], one)
        shown = [f"{names[i]}={_word(fixed.get(names[i], 'number'))}" for i in sorted(mixed)]
        label = ", ".join(shown)
        label = f"{label} ({len(batches)})" if label in batches else label
        batches[label] = Lanes(settings, axes, fixed, members)
    return batches if len(batches) > 1 else next(iter(batches.values()))


def _word(value: Any) -> str:
    """Return a structural value in a word: itself if it is plain, else the name of its factory."""
    if value is None or isinstance(value, bool | int | float | str):
        return str(value)
    if isinstance(value, Transformation | Schedule):
        return repr(value).partition("(")[0]
    return getattr(value, "__name__", type(value).__name__)


def _try_each_value(
    factory: Callable[..., Any], names: list[str], points: Sequence[tuple[Any, ...]]
) -> None:
    """Call the factory once with each value, so that it refuses a bad one before any training."""
    tried = set()
    for point in points:
        values = {(i, repr(x)) for i, x in enumerate(point)}
        if not values <= tried:
            tried |= values
            setting = factory(**dict(zip(names, point, strict=True)))
            refuse_functions(getattr(factory, "__name__", "factory"), setting)
