"""How many lanes step together: measured, on the task itself.

On a CPU a tile should fit the cache, on a GPU it should fill the device; neither is known from the
shapes. So a chunk is compiled at doubling widths and timed, until wider ones are no faster a lane.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jgd.tuning.plan import Plan, usual_width
from jgd.tuning.programs import Program

__all__ = ["choose_widths"]

WORTH_IT = 300_000  # lane-steps: below them the sweep is over before the probe is
NARROWEST = 16
WORSE = 1.05  # a width within 5 per cent of the best is as good
_known: dict[str, dict[int, float]] = {}


def choose_widths(plan: Plan, programs: list[Program], settings: list[Any]) -> Plan:
    """The plan with the width of each group chosen by a probe, where that is worth its time."""
    groups = []
    for group, program, some in zip(plan.groups, programs, settings, strict=True):
        lanes = group.settings * plan.seeds
        if lanes * plan.steps < WORTH_IT or lanes <= NARROWEST:
            # gradients, updates and activations: about three times the state
            most = max(1, int(_memory() / plan.at_once / (4 * _bytes_of_lane(program))))
            groups.append(group.at_width(min(group.width, most), plan.devices))
            continue
        seconds = _probed(plan, program, some, lanes)
        if not seconds:  # not even the narrowest fits the memory
            groups.append(group.at_width(plan.devices, plan.devices))
            continue
        best = min(t / w for w, t in seconds.items())
        width = min(w for w, t in seconds.items() if t / w <= WORSE * best)
        width = min(width, usual_width(lanes, plan.at_once, width))
        groups.append(group.at_width(width, plan.devices, seconds))
    return dataclasses.replace(plan, groups=groups)


def _probed(plan: Plan, program: Program, settings: Any, lanes: int) -> dict[int, float]:
    """Seconds of a step at each width, from memory or by trying."""
    name = _structure(plan, program, lanes)
    known = _known.get(name) or _remembered().get(name)
    if known is None:
        known = _measured(program, settings, lanes, plan.devices, _memory() / plan.at_once)
        _remember(name, known)
    _known[name] = known = {int(width): seconds for width, seconds in known.items()}
    return known


def _structure(plan: Plan, program: Program, lanes: int) -> str:
    """What a probe is remembered by: device, task, how many lanes there are and how big one is.

    Groups of about as many lanes of about as much memory share one probe.
    """
    size = _bytes_of_lane(program)
    many = f"2^{np.ceil(np.log2(lanes)):.0f} lanes of 2^{np.log2(size + 1):.0f} bytes"
    return f"{plan.devices} x {plan.device}, task {plan.task}, {many}"


def _measured(
    program: Program, settings: Any, lanes: int, devices: int, memory: float
) -> dict[int, float]:
    """Widths double until two in a row are no better, or memory ends; then all are timed anew."""
    tried: dict[int, float] = {}
    best, worse = np.inf, 0
    width = NARROWEST * devices
    while worse < 2 and width < 2 * lanes:
        ids = [i % lanes for i in range(width)]
        state = program.start(settings, ids, width)
        if _bytes_of(program.compiled(state, 0).compiled) > memory:
            break
        warm = program.chunk(state, 0, 1)[0]
        tried[width] = _seconds(program, warm, 4)
        share = tried[width] / width
        best, worse = min(best, share), 0 if share < best / WORSE else worse + 1
        width *= 2
    times: dict[int, list[float]] = {width: [] for width in tried}
    for _ in range(3):
        for width, step in tried.items():
            ids = [i % lanes for i in range(width)]
            steps = int(np.clip(0.03 / step, 4, 200))
            times[width].append(_seconds(program, program.start(settings, ids, width), steps))
    return {width: min(seen) for width, seen in times.items()}


def _seconds(program: Program, state: Any, steps: int) -> float:
    """Of a step, over so many; the state is given away."""
    jax.block_until_ready(state)
    started = time.perf_counter()
    jax.block_until_ready(program.chunk(state, 0, min(steps, program.steps)))
    return (time.perf_counter() - started) / min(steps, program.steps)


def _bytes_of(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0
    return analysis.temp_size_in_bytes + 2 * analysis.output_size_in_bytes


def _bytes_of_lane(program: Program) -> int:
    leaves = jax.tree.leaves(program.shapes(1))
    return sum(x.size * x.dtype.itemsize for x in leaves)


def _memory() -> float:
    """Bytes that tiles may take: half of the device, a quarter of a host that is the device."""
    stats = jax.devices()[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return limit / 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4


# --- what is remembered ----------------------------------------------------------------------


def _file() -> Path | None:
    """Beside the compiled programs, where jax is told to keep those."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    return Path(folder) / "widths.json" if folder else None


def _remembered() -> dict[str, dict[int, float]]:
    path = _file()
    try:
        return json.loads(path.read_text()) if path and path.exists() else {}
    except (OSError, json.JSONDecodeError):  # of no importance: it is measured again
        return {}


def _remember(name: str, seconds: dict[int, float]) -> None:
    path = _file()
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({**_remembered(), name: seconds}, indent=1))
        part.replace(path)
    except OSError:  # a full or read-only disk costs the next sweep a probe
        pass
