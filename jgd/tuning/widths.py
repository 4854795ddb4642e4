"""The choice of the width of tiles, by a probe: chunks of the task itself are timed.

On a CPU a tile should fit the cache, on a GPU it should fill the device, and neither is known from
the shapes. A chunk is compiled at doubling widths and timed until wider tiles are no faster per
lane. The times are stored in memory, and in a file beside JAX's compilation cache.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jgd.tuning import devices
from jgd.tuning.engine import Engine, Program
from jgd.tuning.lanes import Lane
from jgd.tuning.plan import Plan, usual_width

__all__ = ["choose_widths"]

WORTH_IT = 300_000  # lane-steps from which on a probe takes less time than the sweep
NARROWEST = 16  # lanes per device of the first width
WORSE = 1.05  # widths whose time per lane is within 5 per cent of the best are as good
_known: dict[str, dict[int, float]] = {}


def choose_widths(plan: Plan, engine: Engine) -> Plan:
    """Return the plan with a width for each group, from a probe if the sweep is long enough."""
    groups = []
    for index, group in enumerate(plan.groups):
        lanes = group.settings * plan.seeds
        if lanes * plan.steps < WORTH_IT or lanes <= NARROWEST:
            # gradients, updates and activations take about three times the memory of the state
            of_lane = 4 * engine.programs[index].bytes_of_lane()
            fitting = max(1, int(_memory() / plan.at_once / of_lane))
            groups.append(group.at_width(min(group.width, fitting), plan.devices))
            continue
        seconds = _probed(plan, engine, index)
        if not seconds:  # not even the narrowest width fits in memory
            groups.append(group.at_width(plan.devices, plan.devices))
            continue
        best = min(t / w for w, t in seconds.items())
        width = min(w for w, t in seconds.items() if t / w <= WORSE * best)
        width = min(width, usual_width(lanes, plan.at_once, width))
        groups.append(group.at_width(width, plan.devices, seconds))
    return dataclasses.replace(plan, groups=groups)


def _probed(plan: Plan, engine: Engine, group: int) -> dict[int, float]:
    """Return the seconds of a step at each width: stored times, or else measured times."""
    key = _key(plan, engine, group)
    times = _known.get(key) or _read().get(key)
    if times is None:
        times = _measured(plan, engine, group)
        _write(key, times)
    _known[key] = times = {int(width): seconds for width, seconds in times.items()}
    return times


def _key(plan: Plan, engine: Engine, group: int) -> str:
    """Return the key of a probe: device, task, and the powers of 2 next to lanes and their size."""
    lanes, size = plan.groups[group].settings * plan.seeds, engine.programs[group].bytes_of_lane()
    many = f"2^{np.ceil(np.log2(lanes)):.0f} lanes of 2^{np.log2(size + 1):.0f} bytes"
    return f"{plan.devices} x {plan.device}, task {plan.task}, {many}"


def _measured(plan: Plan, engine: Engine, group: int) -> dict[int, float]:
    """Return the seconds of a step at doubling widths: the least of several measurements.

    Doubling ends when two widths in a row are no faster per lane, or when memory is used up.
    """
    program, memory = engine.programs[group], _memory() / plan.at_once
    lanes = plan.groups[group].settings * plan.seeds
    first, width = plan.offset(group), NARROWEST * plan.devices
    ids = [first + i % lanes for i in range(width)]
    rows = devices.to_host(engine.begin(group, ids, width))
    repeated = lambda width: jax.tree.map(lambda x: np.resize(x, (width, *x.shape[1:])), rows)
    batches, seconds = engine.batches.of(0), dict[int, float]()
    best, worse = np.inf, 0
    while worse < 2 and width < 2 * lanes:
        lanes_of_width = program.pad(repeated(width), width)
        first_step = program.chunk(lanes_of_width, batches, 0, 1)
        if program.chunks[width].bytes() > memory:
            break
        seconds[width] = _seconds(program, first_step().lanes, batches, min(4, plan.steps))
        share = seconds[width] / width
        best, worse = min(best, share), 0 if share < best / WORSE else worse + 1
        width *= 2
    times: dict[int, list[float]] = {width: [] for width in seconds}
    for _ in range(3):
        for width, step in seconds.items():
            steps = min(int(np.clip(0.03 / step, 4, 200)), plan.steps)
            fresh = program.pad(repeated(width), width)
            times[width].append(_seconds(program, fresh, batches, steps))
    return {width: min(each) for width, each in times.items()}


def _seconds(program: Program, lanes: Lane, batches: Any, steps: int) -> float:
    """Return the seconds of a step, averaged over `steps`. Donates the lanes."""
    chunk = program.chunk(jax.block_until_ready(lanes), batches, 0, steps)
    started = time.perf_counter()
    jax.block_until_ready(chunk())
    return (time.perf_counter() - started) / steps


def _memory() -> float:
    """Return the bytes that tiles may use: half of a device's memory or a quarter of the host's."""
    stats = jax.devices()[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return limit / 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4


# --- the file ---------------------------------------------------------------------------------


def _file() -> Path | None:
    """Return the path of the file of times; None if JAX has no compilation cache."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    return Path(folder) / "widths.json" if folder else None


def _read() -> dict[str, dict[int, float]]:
    """Return the times in the file by their keys."""
    path = _file()
    try:
        return json.loads(path.read_text()) if path and path.exists() else {}
    except (OSError, json.JSONDecodeError):  # times that cannot be read are measured again
        return {}


def _write(key: str, seconds: dict[int, float]) -> None:
    """Add times to the file."""
    path = _file()
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({**_read(), key: seconds}, indent=1))
        part.replace(path)
    except OSError:  # after a full or read-only disk, the next process measures again
        pass
