"""Grids and samples: batches of settings that know their axes.

    lanes = grid(jgd.adam, learning_rate=np.logspace(-4, -1, 64), b1=[0.8, 0.9])     # 128 lanes
    lanes = random_search(jgd.adam, 500, key, learning_rate=loguniform(1e-5, 1e-1))
    jax.vmap(train)(lanes)                                  # JAX sees only the batch of settings

The factory is any function from numbers to a setting. Numbers make lanes of one program; values
that change the structure (None, a bool, a string) make groups.
"""

import collections
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from jgd.arguments import Static, is_number
from jgd.checks import admit, check_key, refuse, traceable
from jgd.lanes import check_numbers, length
from jgd.pytree import Schedule, Transformation
from jgd.tuning.distributions import Distribution, check_distributions, sequence_of

__all__ = ["Lanes", "batch", "grid", "halton_search", "lanes_of", "random_search", "sobol_search"]


@jax.tree_util.register_pytree_node_class
class Lanes:
    """A batch of settings of one structure, and the values of its axes.

    Transformations of JAX see only the settings: `jax.vmap(train)(lanes)` trains them, and
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

    @functools.cached_property
    def structure(self) -> str:
        """A digest of what all settings share: structure, and the paths and dtypes of numbers."""
        bare = jax.tree.map(lambda _: 0, self.settings)
        paths = [f"{path} {x.dtype} {x.shape[1:]}" for path, x in self._numbers()]
        text = " ".join([repr(bare), str(jax.tree.structure(bare)), *paths])
        return _digest(re.sub(r" at 0x[0-9a-f]+", "", text).encode())

    @functools.cached_property
    def digests(self) -> list[str]:
        """A digest of each setting: the same for equal structure and numbers, in any process."""
        flat = lambda x: np.ascontiguousarray(x).reshape(len(x), math.prod(x.shape[1:]))
        columns = [flat(x).view(np.uint8) for _, x in self._numbers()]
        rows = np.concatenate([np.zeros((len(self), 0), np.uint8), *columns], axis=1)
        return [_digest(self.structure.encode() + row.tobytes()) for row in rows]

    def _numbers(self) -> list[tuple[str, np.ndarray]]:
        """Return path and value of each number, in the dtype in which it is trained."""
        leaves = jax.tree_util.tree_leaves_with_path(self.settings)
        return [(jax.tree_util.keystr(path), np.asarray(jnp.asarray(x))) for path, x in leaves]

    def __repr__(self) -> str:
        varied = ", ".join([*self.axes, *(f"{k}={v}" for k, v in self.fixed.items())])
        return f"<{len(self)} lanes over {varied}>"

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.settings,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> Any:
        return children[0]  # a transformation of JAX returns plain settings


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def lanes_of(settings: Any) -> Lanes:
    """Return a batch of settings as `Lanes`; leaves that differ become the axes.

    An axis is named by the path of its leaf. In it, a link of a chain is named by its factory, as
    in adam.learning_rate. If a schedule differs in one number only, the axis has the name of the
    argument that holds the schedule.

    Raises: ValueError if the leaves have no leading axis of one length.
    """
    if isinstance(settings, Lanes):
        return settings
    if not length("sweep", settings):
        raise ValueError("sweep: settings must hold at least one setting, got none")
    leaves = jax.tree_util.tree_leaves_with_path(settings)
    columns = list[tuple[list[str], np.ndarray]]()
    for names, (path, leaf) in zip(_names(settings), leaves, strict=True):
        values = np.asarray(leaf)
        names = [*names, jax.tree_util.keystr(path).lstrip(".")]
        for place, column in enumerate(values.reshape(len(values), -1).T):
            if (column != column[0]).any() or len(leaves) == 1:
                # a leaf may be an array in each setting
                array = [f"{name}[{place}]" for name in names[1:]]
                columns.append((array if values.ndim > 1 else names, column))
    counts = collections.Counter(name for names, _ in columns for name in set(names))
    unique = lambda names: next((name for name in names if counts[name] == 1), names[-1])
    return Lanes(settings, {unique(names): column for names, column in columns})


def _names(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield two names for each leaf: by the argument that holds it, and by its path in its link."""
    inside = lambda x: isinstance(x, Transformation) and x is not node
    for path, child in jax.tree_util.tree_leaves_with_path(node, is_leaf=inside):
        text = jax.tree_util.keystr(path).lstrip(".")
        if not inside(child):
            argument = text.partition(".")[0]
            scheduled = isinstance(getattr(node, argument, None), Schedule)
            yield prefix + (argument if scheduled else text), prefix + text
        elif isinstance(node, Transformation):
            named = isinstance(path[-1], jax.tree_util.DictKey)
            yield from _names(child, f"{path[-1].key if named else _short_name(child)}.")
        else:
            yield from _names(child, f"{prefix}{text}.")


# --- batches of settings ---------------------------------------------------------------------


def grid(factory: Callable[..., Any], /, **axes: Any) -> Any:
    """Return settings over the product of the axes; the last axis varies fastest.

    Args:
      factory: function from numbers to a setting, called with one value of each axis by keyword.
      axes: sequences of values. Numbers make lanes; None, bools and strings make structure.

    Returns: `Lanes`; or, if structure varies, a dict of `Lanes` by the label of each structure.
    Raises: ValueError without axes or for an empty axis, and any error of the factory.
    """
    if not axes:
        raise ValueError("grid: axes must hold at least one axis, got none")
    columns = {name: sequence_of(f"grid: axis {name}", values) for name, values in axes.items()}
    product = itertools.product(*columns.values())
    return batch(factory, [dict(zip(columns, point, strict=True)) for point in product])


def random_search(
    factory: Callable[..., Any], n: int, key: jax.Array, /, **distributions: Distribution
) -> Any:
    """Return n settings drawn from distributions.

    Args:
      factory: function from numbers to a setting, called with one value of each distribution by
        keyword.
      n: number of settings, at least 1.
      key: random key. Equal keys give equal settings on all machines.
      distributions: `loguniform`, `uniform`, `integers` or `choice`, by name.

    Returns and raises: as `grid`.
    """
    uniform = lambda d: np.asarray(jax.random.uniform(key, (d, n)), np.float64)
    return _drawn("random_search", factory, n, key, distributions, uniform)


def sobol_search(
    factory: Callable[..., Any], n: int, key: jax.Array, /, **distributions: Distribution
) -> Any:
    """Return n settings of a scrambled Sobol sequence: evenly spread, best if n is a power of two.

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
    """Return the settings at n quantiles of each distribution.

    Args:
      name: function that errors name.
      quantiles: number of distributions -> an array of shape (distributions, n) in [0, 1).
    """
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
    points = zip(*draws, strict=True)
    return batch(factory, [dict(zip(distributions, point, strict=True)) for point in points])


def is_scalar(x: Any) -> bool:
    """Return whether a value makes lanes. Other values are structure."""
    return is_number(x) and np.ndim(x) == 0


def batch(factory: Callable[..., Any], points: Sequence[Mapping[str, Any]]) -> Any:
    """Return the settings at points: `Lanes`, or a dict of `Lanes` if structure varies.

    Args:
      points: the arguments of each call of the factory. If a point lacks a name that others have,
        the factory's default for it counts as structure.
    """
    names = list(dict.fromkeys(name for point in points for name in point))
    groups = dict[tuple[Any, ...], list[int]]()
    for index, point in enumerate(points):
        kinds = (
            (n, None if is_scalar(point[n]) else Static(point[n])) for n in names if n in point
        )
        groups.setdefault(tuple(kinds), []).append(index)
    _try_each_value(factory, points)
    constant = {name for name in names if all((name, None) in structure for structure in groups)}
    batches = {}
    for structure, members in groups.items():
        fixed = {name: node.value for name, node in structure if node is not None}
        varied = [name for name, node in structure if node is None]
        axes = {name: np.array([float(points[m][name]) for m in members]) for name in varied}
        if axes:
            build = lambda numbers, fixed=fixed: factory(**numbers, **fixed)
            with traceable("factory"):
                settings = jax.vmap(build)({k: jnp.asarray(v, float) for k, v in axes.items()})
        else:
            one = factory(**fixed)
            settings = jax.tree.map(lambda x: jnp.asarray(x, float)[None], one)
        shown = {**dict.fromkeys(names, "default"), **dict.fromkeys(varied, "number"), **fixed}
        shown = {name: _short_name(x) for name, x in shown.items() if name not in constant}
        label = ", ".join(f"{name}={x}" for name, x in shown.items())
        label = f"{label} ({len(batches)})" if label in batches else label
        batches[label] = Lanes(settings, axes, fixed, members)
    return batches if len(batches) > 1 else next(iter(batches.values()))


def _short_name(value: Any) -> str:
    """Return a plain structural value as text, and the name of the factory of any other."""
    if value is None or isinstance(value, bool | int | float | str):
        return str(value)
    if isinstance(value, Transformation | Schedule):
        return repr(value).partition("(")[0]
    return getattr(value, "__name__", type(value).__name__)


def _try_each_value(factory: Callable[..., Any], points: Sequence[Mapping[str, Any]]) -> None:
    """Call the factory once with each value, so that it rejects a bad value before any training."""

    if not callable(factory):
        refuse("factory", "a function from numbers to a setting", factory)
    tried = set()
    for point in points:
        values = {(name, repr(x)) for name, x in point.items()}
        if not values <= tried:
            tried |= values
            setting = factory(**point)
            check_numbers(getattr(factory, "__name__", "factory"), setting)
