"""The plan of a sweep, written before step 0: pure data, and all that decides about its numbers.

    groups      one structure each, and so one compiled program for each width in its menu
    lanes       settings x seeds of a group; lane id = setting * seeds + seed
    tiles       lanes that step together, `width` of them, in the order of their ids
    reports     the steps at which a tile reports; a chunk of the program lies between two
    rounds      the steps at which all tiles have met: the rungs of a halving, and the last step

Two sweeps of one plan agree bit for bit; at equal width a lane does not depend on its neighbours.
"""

import dataclasses
import hashlib
import math
import operator
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

import jgd
from jgd.tuning.prune import Halving

__all__ = [
    "Group",
    "Options",
    "Plan",
    "fingerprint",
    "make_plan",
    "plain",
    "ranked_by",
    "usual_width",
]

WIDTH = 64  # lanes of a small network then fit the cache of two cores
NARROW = 8
OVERHEAD = 8.0  # of a step, in lanes


@dataclasses.dataclass(frozen=True)
class Options:
    """What `jgd.sweep` may be told beside task, settings and steps; it says what each means."""

    seeds: int = 1
    key: int = 0
    order: Literal["shared", "own"] = "shared"
    width: int | None = None
    report_every: int | None = None
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    best: Literal["final", "ever"] = "final"
    target: float | None = None
    keep: int = 1
    halving: Halving | None = None
    stop: Any = None
    drop_diverged: bool = False
    budget: int | None = None
    seconds: float | None = None
    devices: int | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Settings of one structure."""

    name: str
    setting: str  # what one looks like
    axes: Mapping[str, list[float]]  # name -> a value for each setting
    fixed: Mapping[str, str]  # structural values that all share
    settings: int
    width: int  # lanes in a tile; the last one of a group is filled up
    menu: list[int]  # widths of tiles whose lanes have become fewer
    costs: list[float]  # the time of a step at each, in any unit

    def at_width(
        self, width: int, devices: int = 1, seconds: Mapping[int, float] | None = None
    ) -> "Group":
        """With this width and the menu below it; costs as measured, or as is usual.

        All widths are multiples of the number of devices.
        """
        share = -(-width // devices)
        menu = [share * devices]
        while share > 1:
            share //= 2
            menu.append(share * devices)
        overhead, slope = OVERHEAD, 1.0
        if seconds is not None and len(seconds) > 1:
            slope, overhead = np.polyfit(list(seconds), list(seconds.values()), 1)
            slope, overhead = max(slope, 1e-9), max(overhead, 0.0)
        costs = [float(overhead + slope * w) for w in menu]
        return dataclasses.replace(self, width=menu[0], menu=menu, costs=costs)


@dataclasses.dataclass(frozen=True)
class Plan:
    """See the head of this module."""

    steps: int
    seeds: int
    key: int
    reports: list[int]
    rounds: list[int]
    groups: list[Group]
    brackets: list[int]  # of each setting of all groups: which rungs are its own
    metrics: list[str]  # what `evaluate` reports, in its order
    metric: str  # the one to rank by
    mode: Literal["min", "max"]
    best: str  # which report counts: "final" or best "ever"
    target: float | None  # of the metric: the first to be there is best
    keep: int  # states of how many settings
    order: str  # of the batches: "shared", or each seed its "own"
    halving: Mapping[str, Any] | None
    stop: str | None
    drop_diverged: bool
    budget: int | None  # lane-steps
    seconds: float | None
    task: str  # a digest of its first batch and initial parameters
    versions: Mapping[str, str]
    device: str
    devices: int
    at_once: int  # tiles that run at the same time

    @property
    def lane_steps(self) -> int:
        """Those of a sweep in which lanes end at rungs and at the last step only."""
        counts = np.bincount(self.brackets).tolist()
        if self.halving is None:
            return self.steps * self.seeds * sum(counts)
        halving = Halving(**self.halving)
        total = 0
        for settings, rungs in zip(counts, halving.brackets(self.steps), strict=False):
            left = [halving.kept(settings, cuts) for cuts in range(len(rungs) + 1)]
            total += int(np.dot(left, np.diff([0, *rungs, self.steps])))
        return self.seeds * total

    @classmethod
    def of_json(cls, written: Mapping[str, Any]) -> "Plan":
        """The plan that was written."""
        fields = dict[str, Any](written)
        fields["groups"] = [Group(**group) for group in written["groups"]]
        return cls(**fields)

    def as_json(self) -> dict[str, Any]:
        return plain(dataclasses.asdict(self))


def make_plan(
    groups: Mapping[str, Any],
    steps: int,
    options: Options,
    *,
    metrics: list[str],
    usual_every: int | None = None,
    devices: int,
    at_once: int,
    task: str,
) -> Plan:
    """The plan of a sweep over groups of `Lanes`, at the usual width if none is given.

    Args:
      options: with metric and mode, as `ranked_by` says, and a monitor to stop by or none.
      usual_every: steps between reports, if the options do not say; None: a twentieth of all.

    Raises: ValueError for what is out of range.
    """
    assert options.metric is not None
    assert options.mode is not None
    halving, width, every = options.halving, options.width, options.report_every
    if every is None:
        every = max(1, steps // 20) if usual_every is None else usual_every
    counts = {"steps": steps, "seeds": options.seeds, "keep": options.keep, "report_every": every}
    if width is not None:
        counts["width"] = width
    counts = {name: operator.index(count) for name, count in counts.items()}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"sweep: {name} must be at least 1, got {count}")
    steps, seeds, every = counts["steps"], counts["seeds"], counts["report_every"]
    if steps < 4:
        raise ValueError(f"sweep: a verdict needs at least 4 steps, got {steps}")
    for name, known in {"order": ("shared", "own"), "best": ("final", "ever")}.items():
        if getattr(options, name) not in known:
            raise ValueError(
                f"sweep: {name} must be {' or '.join(map(repr, known))}, got"
                f" {getattr(options, name)!r}"
            )
    if options.target is not None and not math.isfinite(options.target):
        raise ValueError(f"sweep: target must be finite, got {options.target}")
    for name, bound in {"budget": options.budget, "seconds": options.seconds}.items():
        if bound is not None and not bound > 0:
            raise ValueError(f"sweep: {name} must be above 0, got {bound}")
    if halving is not None:
        if not isinstance(halving, Halving):
            raise ValueError(f"sweep: halving must be jgd.successive_halving(...), got {halving!r}")
        rungs = halving.brackets(steps)[0]
        if not rungs or len(set(rungs)) < len(rungs):
            raise ValueError(
                f"sweep: eta {halving.eta} and min_steps {halving.min_steps} make the rungs {rungs}"
                f" of {steps} steps: fewer min_steps or a greater eta wanted"
            )
    settings = sum(map(len, groups.values()))
    rungs = sorted({rung for rungs in halving.brackets(steps) for rung in rungs}) if halving else []
    return Plan(
        steps=steps,
        seeds=seeds,
        key=operator.index(options.key),
        reports=sorted({*range(every, steps, every), *rungs, steps}),
        rounds=[*rungs, steps],
        groups=[
            Group(
                name=name,
                setting=repr(lanes.settings),
                axes={axis: [float(x) for x in values] for axis, values in lanes.axes.items()},
                fixed={axis: repr(value) for axis, value in lanes.fixed.items()},
                settings=len(lanes),
                width=0,
                menu=[],
                costs=[],
            ).at_width(counts.get("width") or usual_width(len(lanes) * seeds, at_once), devices)
            for name, lanes in groups.items()
        ],
        brackets=halving.shares(settings, steps).tolist() if halving else [0] * settings,
        metrics=metrics,
        metric=options.metric,
        mode=options.mode,
        best=options.best,
        target=options.target,
        keep=counts["keep"],
        order=options.order,
        halving=halving._asdict() if halving else None,
        stop=None if options.stop is None else repr(options.stop),
        drop_diverged=options.drop_diverged,
        budget=options.budget,
        seconds=options.seconds,
        task=task,
        versions={
            "jgd": jgd.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
        },
        device=jax.devices()[0].device_kind,
        devices=devices,
        at_once=at_once,
    )


def usual_width(lanes: int, at_once: int, most: int = WIDTH) -> int:
    """The width of tiles where nothing is known: all cores are at work, but not for a few lanes."""
    return min(most, lanes, max(-(-lanes // at_once), NARROW))


def ranked_by(
    metrics: list[str], metric: str | None, mode: Literal["min", "max"] | None
) -> tuple[str, Literal["min", "max"]]:
    """The metric to rank by and which end is best, with the defaults that `sweep` documents."""
    if mode not in (None, "min", "max"):
        raise ValueError(f"sweep: mode must be 'min' or 'max', got {mode!r}")
    if metric not in (None, *metrics):
        raise ValueError(f"sweep: metric must be one of {', '.join(metrics)}, got {metric!r}")
    usual = [name for name in ("accuracy", "loss") if name in metrics]
    chosen = metric or (usual or metrics)[0]
    return chosen, mode or ("max" if "acc" in chosen else "min")


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


def plain(x: Any) -> Any:
    """As JSON knows it: no arrays, and null for what is not finite."""
    if isinstance(x, np.ndarray | np.generic):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [plain(item) for item in x]
    if isinstance(x, dict):
        return {name: plain(item) for name, item in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x
