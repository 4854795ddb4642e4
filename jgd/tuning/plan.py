"""The plan of a sweep, written before step 0: pure data, and all that decides about its numbers.

    groups      one structure each, and so one compiled program
    lanes       settings x seeds of a group; lane id = setting * seeds + seed
    tiles       lanes that step together, `width` of them, in the order they are run
    reports     the steps at which a tile reports; a chunk of the program lies between two

Two sweeps of one plan agree bit for bit; at equal width a lane does not depend on its neighbours.
"""

import dataclasses
import hashlib
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

import jgd

__all__ = ["Group", "Plan", "Tile", "fingerprint", "make_plan"]

WIDTH = 64  # lanes of a small network then fit the cache of two cores


@dataclasses.dataclass(frozen=True)
class Group:
    """Settings of one structure."""

    name: str
    setting: str  # what one looks like
    axes: Mapping[str, list[float]]  # name -> a value for each setting
    fixed: Mapping[str, str]  # structural values that all share
    settings: int
    width: int  # lanes in a tile


@dataclasses.dataclass(frozen=True)
class Tile:
    """Lanes of a group that step together; the last one of a group is filled up to its width."""

    group: int
    lanes: list[int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """See the head of this module."""

    steps: int
    seeds: int
    key: int
    reports: list[int]
    groups: list[Group]
    tiles: list[Tile]
    metrics: list[str]  # what `evaluate` reports, in its order
    task: str  # a digest of its first batch and initial parameters
    versions: Mapping[str, str]
    device: str

    @property
    def lane_steps(self) -> int:
        return self.steps * sum(len(tile.lanes) for tile in self.tiles)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_plan(
    groups: Mapping[str, Any],
    steps: int,
    *,
    seeds: int,
    key: int,
    width: int | None,
    report_every: int | None,
    task: str,
    metrics: list[str],
) -> Plan:
    """The plan of a sweep over groups of `Lanes`.

    Raises: ValueError for a count that is not positive.
    """
    every = max(1, steps // 20) if report_every is None else report_every
    counts = {"steps": steps, "seeds": seeds, "width": width or 0, "report_every": every}
    counts = {name: operator.index(count) for name, count in counts.items()}
    for name, count in counts.items():
        if count < 1 and (name != "width" or width is not None):
            raise ValueError(f"sweep: {name} must be at least 1, got {count}")
    steps, seeds, every = counts["steps"], counts["seeds"], counts["report_every"]
    if steps < 4:
        raise ValueError(f"sweep: a verdict needs at least 4 steps, got {steps}")
    planned, tiles = [], []
    for index, (name, lanes) in enumerate(groups.items()):
        total = len(lanes) * seeds
        planned.append(
            Group(
                name=name,
                setting=repr(lanes.settings),
                axes={axis: [float(x) for x in values] for axis, values in lanes.axes.items()},
                fixed={axis: repr(value) for axis, value in lanes.fixed.items()},
                settings=len(lanes),
                width=counts["width"] or min(WIDTH, total),
            )
        )
        step = planned[-1].width
        ids = list(range(total))
        tiles += [Tile(index, ids[first : first + step]) for first in range(0, total, step)]
    return Plan(
        steps=steps,
        seeds=seeds,
        key=operator.index(key),
        reports=sorted({*range(every, steps, every), steps}),
        groups=planned,
        tiles=tiles,
        metrics=metrics,
        task=task,
        versions={
            "jgd": jgd.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
        },
        device=jax.devices()[0].device_kind,
    )


def fingerprint(*trees: Any) -> str:
    """A digest of the arrays in some trees: equal for equal structures, shapes and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
