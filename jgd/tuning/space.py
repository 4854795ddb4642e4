"""Grids and samples: batches of settings that remember what was varied.

    lanes = grid(jgd.adam, learning_rate=np.logspace(-4, -1, 64), b1=[0.8, 0.9])     # 128 lanes
    lanes = random_search(jgd.adam, 500, key, learning_rate=loguniform(1e-5, 1e-1))
    jax.vmap(train)(lanes)                                  # to jax, just the batch of settings

The factory is any function from numbers to a setting, so the axes are what one thinks in. Numbers
make lanes of one program; values that change the structure (None, a bool, a string) make groups.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from jgd.arguments import Static, is_number
from jgd.lanes import refuse_functions

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
      fixed: name -> the structural value that all of them share.
    """

    def __init__(
        self, settings: Any, axes: Mapping[str, np.ndarray], fixed: Mapping[str, Any] | None = None
    ) -> None:
        self.settings = settings
        self.axes = dict(axes)
        self.fixed = dict(fixed or {})

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
        return children[0]  # whatever has gone through jax is the settings themselves


def lanes_of(settings: Any) -> Lanes:
    """A batch of settings as `Lanes`; the leaves that differ become the axes, by their paths.

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
    """Values between low and high, each alike."""

    low: float
    high: float

    def at(self, u: np.ndarray) -> np.ndarray:
        """The values of quantiles in [0, 1)."""
        return self.low + (self.high - self.low) * u


class LogUniform(NamedTuple):
    """Values between low and high, each order of magnitude alike."""

    low: float
    high: float

    def at(self, u: np.ndarray) -> np.ndarray:
        """The values of quantiles in [0, 1)."""
        return self.low * (self.high / self.low) ** u


class Choice(NamedTuple):
    """One of several values, each alike; they may be structure."""

    values: tuple[Any, ...]

    def at(self, u: np.ndarray) -> list[Any]:
        """The values of quantiles in [0, 1)."""
        return [self.values[int(x * len(self.values))] for x in u]


Distribution = Uniform | LogUniform | Choice


def uniform(low: float, high: float) -> Uniform:
    """Uniform between low and high. Raises ValueError unless low < high."""
    if not low < high:
        raise ValueError(f"uniform: low must be below high, got {low} and {high}")
    return Uniform(low, high)


def loguniform(low: float, high: float) -> LogUniform:
    """Uniform in the logarithm between low and high. Raises ValueError unless 0 < low < high."""
    if not 0 < low < high:
        raise ValueError(f"loguniform: 0 < low < high wanted, got {low} and {high}")
    return LogUniform(low, high)


def choice(values: Iterable[Any]) -> Choice:
    """One of the values, each alike. Raises ValueError if there are none."""
    values = tuple(values)
    if not values:
        raise ValueError("choice: needs at least one value")
    return Choice(values)


# --- batches of settings ---------------------------------------------------------------------


def grid(factory: Callable[..., Any], /, **axes: Any) -> Any:
    """Settings over the product of the axes, the last one fastest.

    Args:
      factory: numbers to a setting; called with each axis by its name.
      axes: a sequence of values each. Numbers become lanes; None, bools and strings structure.

    Returns: `Lanes`; or, if structure varies, a dict of them, one for each structure, by its label.
    Raises: ValueError for no axes or an empty one, and whatever the factory raises for a value.
    """
    if not axes:
        raise ValueError("grid: needs at least one axis")
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
    """n settings drawn from the distributions.

    Args:
      factory: numbers to a setting; called with each of them by its name.
      n: how many.
      key: of the draws; one key gives the same settings everywhere.
      distributions: `loguniform`, `uniform` or `choice` each.

    Returns and raises: as `grid`.
    """
    uniform = lambda d: np.asarray(jax.random.uniform(key, (d, n)), np.float64)
    return _drawn("random_search", factory, n, distributions, uniform)


def sobol_search(
    factory: Callable[..., Any], n: int, key: jax.Array, /, **distributions: Distribution
) -> Any:
    """n settings of a scrambled Sobol sequence: spread out evenly, best for n a power of two.

    Args, returns and raises: as `random_search`. The sequence is SciPy's.
    """

    def quantiles(d: int) -> np.ndarray:
        sequence = scipy.stats.qmc.Sobol(d, rng=_seed(key))
        return sequence.random_base2(max(0, math.ceil(math.log2(n))))[:n].T

    return _drawn("sobol_search", factory, n, distributions, quantiles)


def halton_search(
    factory: Callable[..., Any], n: int, key: jax.Array, /, **distributions: Distribution
) -> Any:
    """n settings of a scrambled Halton sequence: spread out evenly for any n.

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
    """Settings at the quantiles, of shape (distributions, n), in [0, 1)."""
    if n < 1 or not distributions:
        raise ValueError(f"{name}: needs at least one draw of at least one distribution")
    rows = zip(distributions.values(), quantiles(len(distributions)), strict=True)
    draws = [distribution.at(u) for distribution, u in rows]
    return batch(factory, list(distributions), list(zip(*draws, strict=True)))


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray | jax.Array)


def is_scalar(x: Any) -> bool:
    """Whether a value makes lanes; everything else is structure."""
    return is_number(x) and np.ndim(x) == 0


def batch(factory: Callable[..., Any], names: list[str], points: Sequence[tuple[Any, ...]]) -> Any:
    """The settings at some points: `Lanes`, or a dict of them where structure varies."""
    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for point in points:  # what is no number is structure
        structure = tuple((i, Static(x)) for i, x in enumerate(point) if not is_scalar(x))
        groups.setdefault(structure, []).append(point)
    _try_each_value(factory, names, points)
    mixed = {i for structure in groups for i, _ in structure}
    batches = {}
    for structure, members in groups.items():
        fixed = {names[i]: node.value for i, node in structure}
        varied = [i for i in range(len(names)) if names[i] not in fixed]
        axes = {names[i]: np.array([float(point[i]) for point in members]) for i in varied}
        if axes:
            build = lambda numbers, fixed=fixed: factory(**numbers, **fixed)
            settings = jax.vmap(build)({k: jnp.asarray(v, float) for k, v in axes.items()})
        else:
            one = factory(**fixed)
            settings = jax.tree.map(lambda x: jnp.asarray(x, float)[None], one)
        shown = [f"{names[i]}={fixed.get(names[i], 'number')}" for i in sorted(mixed)]
        label = ", ".join(shown)
        batches[f"{label} ({len(batches)})" if label in batches else label] = Lanes(
            settings, axes, fixed
        )
    return batches if len(batches) > 1 else next(iter(batches.values()))


def _try_each_value(
    factory: Callable[..., Any], names: list[str], points: Sequence[tuple[Any, ...]]
) -> None:
    """Call the factory once with each value, so that a bad one is refused before any training."""
    tried = set()
    for point in points:
        values = {(i, repr(x)) for i, x in enumerate(point)}
        if not values <= tried:
            tried |= values
            setting = factory(**dict(zip(names, point, strict=True)))
            refuse_functions(getattr(factory, "__name__", "factory"), setting)
