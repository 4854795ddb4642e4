"""Joins sweeps: two lanes are the same if group, digest of the setting, and seed agree.

merge(a, b)             # one ranked result
take(facts, part)       # facts about the lanes that another sweep has trained
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
    """Return the lanes that two plans have in common, by group, numbered within it in each plan."""
    common = dict[str, tuple[np.ndarray, np.ndarray]]()
    seeds = np.arange(min(plan.seeds, other.seeds))
    for group in plan.groups:
        if group.name in other.index:
            pairs = _common_settings(group, other.groups[other.index[group.name]])
            here, there = np.array(pairs, int).reshape(-1, 2, 1).transpose(1, 0, 2)
            lanes = (here * plan.seeds + seeds).ravel(), (there * other.seeds + seeds).ravel()
            common[group.name] = lanes
    return common


def _common_settings(group: Group, other: Group) -> list[tuple[int, int]]:
    """Return the settings that two groups have in common; of equal ones the first is the first."""
    places = {x: place for place, x in enumerate(_numbered(other.digests))}
    return [(k, places[x]) for k, x in enumerate(_numbered(group.digests)) if x in places]


def _numbered(digests: Sequence[str]) -> list[tuple[str, int]]:
    """Return digests, each with the number of equal ones before it."""
    seen = collections.defaultdict[str, Iterator[int]](itertools.count)
    return [(digest, next(seen[digest])) for digest in digests]


def take(facts: Facts, part: Facts) -> None:
    """Take over the facts about all lanes that another sweep has as well."""
    for name, (here, there) in common_lanes(facts.plan, part.plan).items():
        lanes, others = facts.plan.offset(name) + here, part.plan.offset(name) + there
        facts.ledger.take(lanes, part.ledger, others)
        mine, theirs = facts.curves[name], part.curves[name]
        mine.train_loss[here] = theirs.train_loss[there]
        for metric, values in mine.metrics.items():
            values[here] = theirs.metrics[metric][there]


# --- results ---------------------------------------------------------------------------------

COMPARED = ("steps", "reports", "seeds", "metrics", "metric", "mode", "best", "target")


def merge(*results: Result) -> Result:
    """Rank the settings of several results together.

        one = jgd.sweep(task, jgd.grid(jgd.adam, learning_rate=[0.01, 0.1]), steps=100)
        two = jgd.sweep(task, {"lion": other_lanes}, steps=100)
        jgd.merge(one, two).rows

    Args:
      results: of sweeps of one task; that their data are the same is not checked.

    Groups of the same name, structure and axes are united; a setting that several results hold
    counts once, as in the first of them. Another group whose name is taken gets a number:
    "adam (2)". At most the largest `keep` of the results are kept with their states; a setting
    whose state is not stored is ranked all the same.

    Returns: a `Result`, whose `plan` lists the settings of all.
    Raises: TypeError for what is no result; ValueError for no result, or for results that do not
      compare: other steps, reports, seeds, metrics, mode, best or target.
    """
    if not results:
        raise ValueError("merge: results must hold at least one result, got none")
    for result in results:
        if not isinstance(result, Result):
            refuse("merge: results", "results of jgd.sweep", result)
    groups, parts, first = dict[str, Group](), list[Facts](), results[0].plan
    for result in results:
        _refuse_unlike(first, result.plan)
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
        halving=None,  # no rung ranks all of them
        rounds=[first.steps],
        brackets=[0] * sum(group.settings for group in groups.values()),
    )
    facts = Facts.of(plan)
    stored = dict[int, tuple[Any, Any]]()
    for part, result in reversed([*zip(parts, results, strict=True)]):  # the first one wins
        take(facts, part)
        for best in result.kept:
            group = part.plan.groups[result.plan.index[best.row["optimizer"]]]
            places = {there: k for k, there in _common_settings(groups[group.name], group)}
            if (place := places.get(best.row["setting"])) is None:
                continue  # equal to a setting of an earlier result
            setting = int(plan.first[plan.index[group.name]]) + place
            if best.state is not None or setting not in stored:
                stored[setting] = best.setting, best.state
    held = np.full(plan.lanes, False)
    whole = [setting for setting, (_, state) in stored.items() if state is not None]
    held[plan.lanes_of(np.array(whole, int))] = True
    known = lambda setting, lane: stored.get(setting, (None, None))
    return make_result(facts, held, known)


def _refuse_unlike(first: Plan, plan: Plan) -> None:
    for name in COMPARED:
        mine, theirs = getattr(first, name), getattr(plan, name)
        if mine != theirs:
            raise ValueError(
                f"merge: {name} must be the same in all results, got {brief(mine)} and"
                f" {brief(theirs)}"
            )


def _free_name(group: Group, groups: Mapping[str, Group], used: Any) -> str:
    """Return the name of a group, with a number if another group has it."""
    kind = lambda group: (group.structure, list(group.axes), group.fixed)
    names = (f"{group.name} ({n})" if n > 1 else group.name for n in itertools.count(1))
    free = lambda name: name not in groups or kind(groups[name]) == kind(group)
    return next(name for name in names if free(name) and name not in used)


def _united(first: Group | None, group: Group) -> Group:
    """Return the settings of the first group, and those of the other one that it lacks."""
    if first is None:
        return group
    known = set(first.digests)
    new = [place for place, digest in enumerate(group.digests) if digest not in known]
    return dataclasses.replace(
        first,
        axes={name: [*x, *(group.axes[name][k] for k in new)] for name, x in first.axes.items()},
        settings=first.settings + len(new),
        digests=[*first.digests, *(group.digests[k] for k in new)],
    )
