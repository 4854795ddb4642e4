"""The plan of a sweep: frozen data, written before step 0, that determine its results.

    groups      settings of one structure: one compiled program for each width
    settings    numbered over all groups, in their order
    lanes       one setting with one seed: lane = setting * seeds + seed
    tiles       `width` lanes of a group that step together
    reports     the steps at which a tile reports; a chunk runs from one report to the next
    rounds      the steps at which tiles wait for each other: the rungs of a halving, the last step

Two sweeps with the same plan agree bit for bit. At equal width a lane does not depend on the other
lanes of its tile.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from jgd.diagnosis import interval_ends
from jgd.tuning.options import SweepOptions, Training, values_of
from jgd.tuning.prune import Halving
from jgd.version import __version__

__all__ = [
    "FORMAT",
    "Group",
    "Plan",
    "fingerprint",
    "make_plan",
    "plain",
    "usual_width",
    "words_of",
]

FORMAT = 2  # version of the files in a folder: plan, journal, manifest and states
WIDTH = 64  # usual lanes in a tile: for a small network they fit the cache of two cores
NARROW = 8  # least width of tiles that are narrowed to use all cores
OVERHEAD = 8.0  # fixed cost of a step, in units of the cost of one lane
NEGATION = {"neg", "negative"}  # in both modes below, so that `mode` must be given
KNOWN = {  # mode -> words of a metric's name that imply it
    "max": {"accuracy", "acc", "auc", "f1", "r2", "reward", "return", "score", "bleu"} | NEGATION,
    "min": {"loss", "error", "nll", "mse", "mae", "perplexity"} | NEGATION,
}


@dataclass(frozen=True)
class Group:
    """Settings of one structure."""

    name: str
    setting: str  # repr of the batch of settings
    axes: Mapping[str, list[float]]  # name -> a value for each setting
    fixed: Mapping[str, str]  # structural values that all settings share
    settings: int  # number of settings
    width: int = 0  # lanes in a tile; the last tile of a group is padded
    widths: Sequence[int] = ()  # possible widths of its tiles, widest first
    costs: Sequence[float] = ()  # time of a step at each of these widths, in any unit
    structure: str = ""  # digest of the structure that the settings share
    digests: Sequence[str] = ()  # digest of each setting; see `Lanes`

    def at_width(
        self, width: int, devices: int = 1, seconds: Mapping[int, float] | None = None
    ) -> "Group":
        """Return the group with this width, and narrower ones by repeated halving.

        Args:
          devices: number of devices; all widths are multiples of it.
          seconds: measured time of a step at some widths; None: `OVERHEAD` + width.
        """
        share = -(-width // devices)
        widths = [share * devices]
        while share > 1:
            share //= 2
            widths.append(share * devices)
        overhead, slope = OVERHEAD, 1.0
        if seconds is not None and len(seconds) > 1:
            slope, overhead = np.polyfit(list(seconds), list(seconds.values()), 1)
            slope, overhead = max(slope, 1e-9), max(overhead, 0.0)
        costs = [float(overhead + slope * w) for w in widths]
        return dataclasses.replace(self, width=widths[0], widths=widths, costs=costs)


@dataclass(frozen=True, kw_only=True)
class Plan(SweepOptions):
    """Resolved options of a sweep, and the data derived from them."""

    # these are resolved here; in the user's options they may be None
    report_every: int = 1
    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    devices: int = 1
    steps: int
    reports: list[int]
    rounds: list[int]
    groups: list[Group]
    brackets: list[int]  # the bracket of each setting
    metrics: list[str]  # names, in the order of `evaluate`
    halving: Mapping[str, Any] | None
    stop: str | None
    task: str  # digest of the task's data, initial parameters and first metrics
    verdict: bool = True  # whether the training loss allows a verdict
    versions: Mapping[str, str]
    device: str
    at_once: int  # tiles that run at the same time
    format: int = FORMAT

    # --- settings and lanes by number

    @functools.cached_property
    def first(self) -> np.ndarray:
        """The first setting of each group, and at the end the number of settings."""
        return np.cumsum([0, *(group.settings for group in self.groups)])

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """The index of each group by its name."""
        return {group.name: index for index, group in enumerate(self.groups)}

    @property
    def sign(self) -> float:
        """-1 if the highest value of the metric is best, else 1."""
        return -1.0 if self.mode == "max" else 1.0

    @functools.cached_property
    def intervals(self) -> np.ndarray:
        """The steps at which intervals of the training loss end."""
        return interval_ends(self.rounds)

    @property
    def direction(self) -> str:
        return f"{self.metric}, {'higher' if self.mode == 'max' else 'lower'} is better"

    @property
    def lanes(self) -> int:
        return int(self.first[-1]) * self.seeds

    def lanes_of(self, settings: Any) -> np.ndarray:
        """Return the lanes of a setting, or of each of several: one for each seed."""
        return np.asarray(settings)[..., None] * self.seeds + np.arange(self.seeds)

    def offset(self, group: int | str) -> int:
        """Return the first lane of a group."""
        index = self.index[group] if isinstance(group, str) else group
        return int(self.first[index]) * self.seeds

    def group_of(self, lane: int) -> int:
        """Return the index of a lane's group."""
        return int(np.searchsorted(self.first * self.seeds, lane, side="right")) - 1

    def by_group(self, lanes: Any) -> dict[str, list[int]]:
        """Return the lanes of each group, numbered within it and in rising order.

        The groups are in the order of their first lane in `lanes`.
        """
        groups = np.searchsorted(self.first * self.seeds, lanes, side="right") - 1
        _, first = np.unique(groups, return_index=True)
        return {
            self.groups[group].name: np.sort(lanes[groups == group] - self.offset(group)).tolist()
            for group in groups[np.sort(first)].tolist()
        }

    def numbered(self, groups: Mapping[str, Any]) -> np.ndarray:
        """Return lanes numbered over all groups. Inverts `by_group`."""
        lanes = (self.offset(group) + np.asarray(ids, int) for group, ids in groups.items())
        return np.concatenate([np.zeros(0, int), *lanes])

    # --- rungs

    def cohorts(self, rung: int) -> list[tuple[np.ndarray, int]]:
        """Return the sets of settings that a rung ranks, each with the number that it keeps."""
        if self.halving is None:
            return []
        halving, brackets = Halving(**self.halving), np.array(self.brackets)
        # the settings of a cohort share a bracket and, if groups are ranked separately, a group
        groups = np.repeat(np.arange(len(self.groups)), np.diff(self.first))
        groups = groups if halving.within == "group" else np.zeros_like(groups)
        cohorts = list[tuple[np.ndarray, int]]()
        for bracket, rungs in enumerate(halving.brackets(self.steps)):
            for group in np.unique(groups[brackets == bracket]) if rung in rungs else ():
                settings = np.flatnonzero((brackets == bracket) & (groups == group))
                keep = halving.survivors(len(settings), rungs.index(rung) + 1)
                cohorts.append((settings, keep))
        return cohorts

    @property
    def lane_steps(self) -> int:
        """Lane-steps of the sweep if lanes end only at rungs and at the last step."""
        settings = np.bincount(self.brackets).tolist()
        if self.halving is None:
            return self.steps * self.seeds * sum(settings)
        halving = Halving(**self.halving)
        total = 0
        for n, rungs in zip(settings, halving.brackets(self.steps), strict=False):
            sizes = [halving.survivors(n, cuts) for cuts in range(len(rungs) + 1)]
            total += int(np.dot(sizes, np.diff([0, *rungs, self.steps])))
        return self.seeds * total

    # --- as JSON

    @classmethod
    def of_json(cls, written: Mapping[str, Any]) -> "Plan":
        """Return the plan in the content of a plan.json. Plans of jgd 0.1 have no `format`."""

        def known(cls: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
            return {f.name: entry[f.name] for f in dataclasses.fields(cls) if f.name in entry}

        groups = [Group(**known(Group, group)) for group in written["groups"]]
        return cls(**known(cls, {"format": 1, **written, "groups": groups}))

    def as_json(self) -> dict[str, Any]:
        """Return the plan as data for JSON."""
        return plain(dataclasses.asdict(self), null=False)  # keeps an inf on an axis


def make_plan(
    groups: Mapping[str, Any],
    steps: int,
    options: SweepOptions,
    *,
    halving: Halving | None = None,
    stop: Any = None,
    metrics: list[str],
    usual_every: int | None = None,
    devices: int,
    at_once: int,
    task: str,
    verdict: bool = True,
) -> Plan:
    """Return the plan of a sweep over groups of `Lanes`, with the usual width unless one is given.

    Args:
      usual_every: steps between reports if `options` has None; None: a twentieth of `steps`.

    Raises: ValueError for an argument out of its range.
    """
    every = options.report_every
    if every is None:
        every = max(1, steps // 20) if usual_every is None else usual_every
    metric, mode = ranked_by(metrics, options)
    rungs = _rungs(halving, steps)
    settings = sum(map(len, groups.values()))
    resolved = dict[str, Any](report_every=every, metric=metric, mode=mode, devices=devices)
    return Plan(
        **values_of(options, SweepOptions) | resolved,
        steps=steps,
        reports=sorted({*range(every, steps, every), *rungs, steps}),
        rounds=[*rungs, steps],
        groups=[
            Group(
                name=name,
                setting=repr(batch.settings),
                axes={axis: [float(x) for x in values] for axis, values in batch.axes.items()},
                fixed={axis: str(value) for axis, value in batch.fixed.items()},
                settings=len(batch),
                structure=batch.structure,
                digests=batch.digests,
            ).at_width(options.width or usual_width(len(batch) * options.seeds, at_once), devices)
            for name, batch in groups.items()
        ],
        brackets=halving.assign(settings, steps).tolist() if halving else [0] * settings,
        metrics=metrics,
        halving=halving._asdict() if halving else None,
        stop=None if stop is None else repr(stop),
        task=task,
        verdict=verdict,
        versions={
            "jgd": __version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
        },
        device=jax.devices()[0].device_kind,
        at_once=at_once,
    )


def _rungs(halving: Any, steps: int) -> list[int]:
    """Return the rungs of all brackets, in rising order."""
    if halving is None:
        return []
    if not isinstance(halving, Halving):
        raise ValueError(
            "sweep: halving must be jgd.successive_halving(...) or jgd.hyperband(...), got"
            f" {halving!r}"
        )
    rungs = halving.brackets(steps)[0]
    if not rungs or len(set(rungs)) < len(rungs):
        raise ValueError(
            f"sweep: halving must have distinct rungs, got {rungs or 'none'} for {steps} steps, eta"
            f" {halving.eta} and min_steps {halving.min_steps}. "
            + ("Raise eta or min_steps" if rungs else "Lower min_steps")
        )
    return rungs  # the first bracket has the rungs of all brackets


def usual_width(lanes: int, at_once: int, most: int = WIDTH) -> int:
    """Return the width of tiles without a measurement. Few lanes are divided among all cores."""
    return min(most, lanes, max(-(-lanes // at_once), NARROW))


def ranked_by(metrics: Sequence[str], options: Training) -> tuple[str, Any]:
    """Return the metric to rank by, and its mode.

    Raises: ValueError for an unknown metric, or without a mode that its name implies.
    """
    metric = options.metric
    if metric not in (None, *metrics):
        raise ValueError(f"sweep: metric must be one of {', '.join(metrics)}, got {metric!r}")
    usual = [name for name in ("accuracy", "loss") if name in metrics]
    metric = metric or (usual or metrics)[0]
    modes = [mode for mode, known in KNOWN.items() if known & words_of(metric)]
    if options.mode is None and len(modes) != 1:
        raise ValueError(
            f"sweep: mode must be 'min' or 'max' for the metric {metric!r}, whose name does not"
            " imply either, got None. Pass mode='max' if higher is better"
        )
    return metric, options.mode or modes[0]


def words_of(metric: str) -> set[str]:
    """Return the words of a metric's name, in lower case: {"val", "mse"} for valMSE."""
    camel = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
    return {word.lower() for word in re.split(rf"[\W_]+|{camel}", metric)}


def fingerprint(*trees: Any) -> str:
    """Return a digest of arrays: equal for equal structures, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def plain(x: Any, *, null: bool = True) -> Any:
    """Return data for JSON, with lists for arrays and, with `null`, None for NaN and infinity."""
    if isinstance(x, np.ndarray | np.generic):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [plain(item, null=null) for item in x]
    if isinstance(x, dict):
        return {name: plain(item, null=null) for name, item in x.items()}
    return None if null and isinstance(x, float) and not math.isfinite(x) else x
