"""Joining of sweeps. Lanes of two sweeps are the same if group, setting digest and seed agree.

merge(a, b)             # one ranked result
take(facts, part)       # copies the facts about lanes that another sweep has trained
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jgd.checks import refuse
from jgd.nodes import brief
from jgd.tuning.plan import Group, Plan
from jgd.tuning.result import Facts, Result, make_result

__all__ = ["common_lanes", "merge", "take"]


def common_lanes(plan: Plan, other: Plan) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the lanes that two plans have in common, by group.

    Returns: group -> numbers of the lanes within the group, in `plan` and in `other`.
    """
    common = dict[str, tuple[np.ndarray, np.ndarray]]()
    seeds = np.arange(min(plan.seeds, other.seeds))
    for group in plan.groups:
        if group.name in other.index:
            pairs = _common_settings(group, other.groups[other.index[group.name]])
            settings, others = np.array(pairs, int).reshape(-1, 2, 1).transpose(1, 0, 2)
            lanes = (settings * plan.seeds + seeds).ravel()
            common[group.name] = lanes, (others * other.seeds + seeds).ravel()
    return common


def _common_settings(group: Group, other: Group) -> list[tuple[int, int]]:
    """Return pairs of equal settings of two groups; equal settings are paired in their order."""
    indices = {x: index for index, x in enumerate(_numbered(other.digests))}
    return [(k, indices[x]) for k, x in enumerate(_numbered(group.digests)) if x in indices]


def _numbered(digests: Sequence[str]) -> list[tuple[str, int]]:
    """Return each digest with the number of equal digests before it."""
    counters = collections.defaultdict[str, Iterator[int]](itertools.count)
    return [(digest, next(counters[digest])) for digest in digests]


def take(facts: Facts, part: Facts) -> None:
    """Copy the facts about all lanes that another sweep has too."""
    for name, (lanes, other_lanes) in common_lanes(facts.plan, part.plan).items():
        ids = facts.plan.offset(name) + lanes
        facts.ledger.take(ids, part.ledger, part.plan.offset(name) + other_lanes)
        curves, copied = facts.curves[name], part.curves[name]
        curves.train_loss[lanes] = copied.train_loss[other_lanes]
        for metric, values in curves.metrics.items():
            values[lanes] = copied.metrics[metric][other_lanes]


# --- results ---------------------------------------------------------------------------------

COMPARED = ("steps", "reports", "seeds", "metrics", "metric", "mode", "best", "target")


def merge(*results: Result) -> Result:
    """Rank the settings of several results together.

        one = jgd.sweep(task, jgd.grid(jgd.adam, learning_rate=[0.01, 0.1]), steps=100)
        two = jgd.sweep(task, {"lion": other_lanes}, steps=100)
        jgd.merge(one, two).rows

    Args:
      results: results of sweeps of one task. Whether their data are the same is not checked.

    Groups with the same name, structure and axes are united. A setting in several results counts
    once, with its values in the first of them. Another group with the same name gets a number:
    "adam (2)". The number of settings with states is at most the largest `keep` of the results; a
    setting whose state is not stored is ranked as well.

    Returns: a `Result` whose `plan` lists the settings of all results.
    Raises: TypeError if an argument is not a result; ValueError without results, or if results
      differ in steps, reports, seeds, metrics, metric, mode, best or target.
    """
    if not results:
        raise ValueError("merge: results must hold at least one result, got none")
    for result in results:
        if not isinstance(result, Result):
            refuse("merge: results", "results of jgd.sweep", result)
    groups, parts, first = dict[str, Group](), list[Facts](), results[0].plan
    for result in results:
        _check_comparable(first, result.plan)
        names = dict[str, str]()
        for group in result.plan.groups:
            names[group.name] = name = _free_name(group, groups, names.values())
            groups[name] = _united(groups.get(name), dataclasses.replace(group, name=name))
        renamed = [dataclasses.replace(g, name=names[g.name]) for g in result.plan.groups]
        curves = {names[name]: x for name, x in result.curves.items()}
        plan = dataclasses.replace(result.plan, groups=renamed)
        parts.append(Facts(plan, result.ledger, curves))
    plan = dataclasses.replace(
        first,
        groups=list(groups.values()),
        keep=max(result.plan.keep for result in results),
        halving=None,  # no rung has ranked all these settings
        rounds=[first.steps],
        brackets=[0] * sum(group.settings for group in groups.values()),
    )
    facts = Facts.of(plan)
    by_setting = dict[int, tuple[Any, Any]]()
    for part, result in reversed([*zip(parts, results, strict=True)]):  # the first result wins
        take(facts, part)
        for best in result.kept:
            group = part.plan.groups[result.plan.index[best.row["optimizer"]]]
            indices = {index: k for k, index in _common_settings(groups[group.name], group)}
            if (index := indices.get(best.row["setting"])) is None:
                continue  # it equals a setting of an earlier result
            setting = int(plan.first[plan.index[group.name]]) + index
            if best.state is not None or setting not in by_setting:
                by_setting[setting] = best.setting, best.state
    has_state = np.full(plan.lanes, False)
    with_state = [setting for setting, (_, state) in by_setting.items() if state is not None]
    has_state[plan.lanes_of(np.array(with_state, int))] = True
    setting_and_state = lambda setting, lane: by_setting.get(setting, (None, None))
    return make_result(facts, has_state, setting_and_state)


def _check_comparable(first: Plan, plan: Plan) -> None:
    """Raise ValueError if two plans rank their settings differently."""
    for name in COMPARED:
        expected, value = getattr(first, name), getattr(plan, name)
        if value != expected:
            raise ValueError(
                f"merge: {name} must be the same in all results, got {brief(expected)} and"
                f" {brief(value)}"
            )


def _free_name(group: Group, groups: Mapping[str, Group], used: Any) -> str:
    """Return the name of a group, with a number if a different group has the same name."""
    identity = lambda group: (group.structure, list(group.axes), group.fixed)
    names = (f"{group.name} ({n})" if n > 1 else group.name for n in itertools.count(1))
    free = lambda name: name not in groups or identity(groups[name]) == identity(group)
    return next(name for name in names if free(name) and name not in used)


def _united(first: Group | None, group: Group) -> Group:
    """Return the first group with the settings of the second group that it lacks."""
    if first is None:
        return group
    known = set(first.digests)
    new = [index for index, digest in enumerate(group.digests) if digest not in known]
    return dataclasses.replace(
        first,
        axes={name: [*x, *(group.axes[name][k] for k in new)] for name, x in first.axes.items()},
        settings=first.settings + len(new),
        digests=[*first.digests, *(group.digests[k] for k in new)],
    )
