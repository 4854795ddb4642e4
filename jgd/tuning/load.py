"""Loading of a finished sweep from its folder: rows, curves, settings and states.

    load("runs/a", task).best.params

The folder holds the numbers of the settings and the leaves of the states. The structure of states
comes from the task; that of settings comes from a pickle in the folder, or from a template.
"""

import contextlib
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgd.training import Run, Task, supervised
from jgd.tuning.folder import SETTINGS, is_free, load_block
from jgd.tuning.join import common_lanes, merge
from jgd.tuning.lanes import state_of
from jgd.tuning.plan import Group, Plan
from jgd.tuning.result import Result, make_result
from jgd.tuning.segment import Segment, batches_of, read_result, read_segments, resume_command
from jgd.tuning.space import Lanes

__all__ = ["StoredStates", "load", "read_results", "stored_best"]


def load(folder: str | Path, task: Task | Run | None = None, *, template: Any = None) -> Result:
    """Load the result of a finished sweep, with its extensions, or of a search, from its folder.

        result = load("runs/a", task)
        result.best.params, result.best.setting

    Load only folders that you trust: if a task is given, settings.pickle is unpickled, and a pickle
    can run any code.

    Args:
      folder: the folder of a finished sweep.
      task: the task or run of the sweep. None: `best` and `kept` have neither setting nor state.
      template: the settings as they were given to `sweep`, or one setting of each structure. Needed
        only if the settings hold functions that cannot be pickled.

    Returns: a `Result` equal to the one that `sweep` returned.
    Raises: FileNotFoundError or ValueError, naming the file, if the folder is damaged or its sweep
      has not finished; ValueError for another task, or if a template is needed.
    """
    if batches := batches_of(Path(folder)):
        return merge(*(load(batch, task, template=template) for batch in batches))
    segments = read_segments(folder, resume=True)
    last = segments[-1]
    if not last.finished:
        why = "; ".join(last.notes) or f"{last.path} has not finished"
        raise ValueError(f"load: {why}. Finish the sweep first")
    states = StoredStates(last.plan, segments)
    if task is None:
        return make_result(last.facts, states.has_state)
    run = task if isinstance(task, Run) else supervised(task)
    settings = _settings(Path(folder), last.plan, template)
    leaves_of = states.__getitem__
    setting_and_state = lambda *best: stored_best(run, last.plan, settings, leaves_of, *best)
    return make_result(last.facts, states.has_state, setting_and_state)


def read_results(path: Path) -> Result:
    """Return the table and curves of the sweep in a folder, or of all batches of a search.

    Raises: as `read_result`.
    """
    batches = batches_of(path)
    if not batches:
        return read_result(path)
    if (path / f"batch-{len(batches)}").exists():
        raise ValueError(
            f"{path / f'batch-{len(batches)}.json'} is missing: the search has no table. Resume it"
            f" with: {resume_command(path)}, or resume=True in Python"
        )
    if len(batches) > 1 and is_free(batches[-1]):
        warnings.warn(f"{batches.pop()} has no table yet", stacklevel=2)
    return merge(*map(read_result, batches))


def stored_best(
    run: Run,
    plan: Plan,
    groups: Sequence[Any],
    leaves_of: Callable[[int], Sequence[Any]],
    setting: int,
    lane: int | None,
) -> tuple[Any, Any]:
    """Return a setting, and the state of one of its lanes; None without a lane.

    Args:
      groups: the batch of settings of each group.
      leaves_of: lane -> the leaves of its `Lane`.
    """
    group = plan.group_of(setting * plan.seeds)
    row = setting - int(plan.first[group])
    one = jax.tree.map(lambda x: x[row], groups[group])
    return one, None if lane is None else state_of(run, one, leaves_of(lane), plan.best)


class StoredStates:
    """The states in the last checkpoints of segments, indexed by the lanes of a plan.

    Attributes:
      has_state: mask of the lanes that have a state.
    """

    def __init__(self, plan: Plan, segments: Sequence[Segment]) -> None:
        self.has_state = np.full(plan.lanes, False)
        self._places = dict[int, tuple[Path, str, int]]()
        for segment in segments:
            lane_of = np.full(segment.plan.lanes, -1)
            for name, (lanes, own_lanes) in common_lanes(plan, segment.plan).items():
                lane_of[segment.plan.offset(name) + own_lanes] = plan.offset(name) + lanes
            blocks = segment.manifest["blocks"] if segment.manifest else {}
            for name, block in blocks.items():
                for row in np.flatnonzero(block["present"]).tolist():
                    if (lane := int(lane_of[block["lanes"][row]])) >= 0:
                        self._places[lane], self.has_state[lane] = (segment.path, name, row), True

    def __getitem__(self, lane: int) -> list[np.ndarray]:
        """Return the leaves of a lane."""
        path, name, row = self._places[lane]
        return [x[row] for x in load_block(path, name)]


# --- settings --------------------------------------------------------------------------------


def _settings(folder: Path, plan: Plan, template: Any) -> list[Any]:
    """Return the batch of settings of each group."""
    file = folder / SETTINGS
    try:
        written = pickle.loads(file.read_bytes())
        structures, leaves = zip(*(written[group.name] for group in plan.groups), strict=True)
    except Exception as error:  # a damaged pickle can raise any error
        raise ValueError(
            f"load: {file} is damaged: {error}. Rows and curves can still be loaded without a task"
        ) from None
    parts = zip(plan.groups, structures, leaves, strict=True)
    return [_settings_of(group, pickled, numbers, template) for group, pickled, numbers in parts]


def _settings_of(group: Group, pickled: bytes | None, leaves: Sequence[Any], template: Any) -> Any:
    """Return the settings of a group, in the structure that gives their digests in the plan."""
    as_trained = lambda x: jnp.asarray(x) if jnp.asarray(x).dtype == x.dtype else x
    leaves = list(map(as_trained, leaves))
    for tree in _candidates(pickled, template):
        structure = jax.tree.structure(tree)
        if structure.num_leaves == len(leaves):
            batch = jax.tree.unflatten(structure, leaves)
            if (
                Lanes(batch, {k: np.array(x) for k, x in group.axes.items()}).digests
                == group.digests
            ):
                return batch
    raise ValueError(
        f"load: template must be the settings given to sweep, since group {group.name!r} holds"
        " functions that cannot be pickled, or its code has changed"
    )


def _candidates(pickled: bytes | None, template: Any) -> Iterator[Any]:
    """Yield trees that may have the structure of a group's settings."""
    if pickled is not None:
        with contextlib.suppress(Exception):  # its module may be missing
            yield pickle.loads(pickled)
    yield template.settings if isinstance(template, Lanes) else template
    for tree in template.values() if isinstance(template, dict) else ():
        yield from _candidates(None, tree)
