"""Measure what checkpoints cost, and test that a sweep survives crashes.

    python benchmarks/crashes.py             # time with checkpoints every 5 seconds and without
    python benchmarks/crashes.py --kills 20  # kill -9 at random moments, then compare the results

Both run the default task with halving, so that checkpoints contain running tiles, waiting lanes and
best states.
"""

import argparse
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import jgd
from jgd.tuning.tasks import digits

LANES = {
    "adam": jgd.grid(jgd.adam, learning_rate=np.geomspace(1e-5, 1, 256)),
    "momentum": jgd.grid(jgd.momentum, learning_rate=np.geomspace(1e-4, 3, 256)),
}


def train(steps: int, folder: Path | None, every: float, *, resume: bool = False) -> None:
    """Run or resume the sweep with a checkpoint every `every` seconds."""
    halving = jgd.successive_halving(2, steps // 4)
    where = dict(folder=folder, checkpoint_every=every, resume=resume)
    jgd.sweep(digits(), LANES, steps, halving=halving, width=64, **where)


def overhead(steps: int, every: float, rounds: int) -> None:
    """Print what checkpoints cost: the same sweep runs with and without them, in turns."""
    seconds: dict[float, list[float]] = {every: [], np.inf: []}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(rounds + 1):  # the first turn warms the caches of the system
            for interval, measured in seconds.items():
                started = time.perf_counter()
                train(steps, Path(scratch) / f"{turn}-{interval}", interval)
                measured.append(time.perf_counter() - started)
    ratios = [a / b - 1 for a, b in zip(seconds[every], seconds[np.inf], strict=True)][1:]
    without = statistics.median(seconds[np.inf])
    print(
        f"checkpoints every {every:g} s cost {statistics.median(ratios):.1%} of {without:.0f} s"
        f" (rounds: {', '.join(f'{r:.1%}' for r in ratios)})"
    )


def kill_and_resume(kills: int, steps: int, longest: float, seed: int) -> None:
    """Kill a sweep and resume it, again and again; compare its files with an uninterrupted one."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        child = [sys.executable, __file__, "--child", str(steps)]
        subprocess.run([*child, str(whole)], check=True)
        done = 0
        while True:
            process = subprocess.Popen([*child, str(broken)], stderr=subprocess.DEVNULL)
            try:
                process.wait(rng.uniform(0.5, longest) if done < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
        names = ("results.csv", "results.json", "journal.jsonl")
        same = [(whole / name).read_bytes() == (broken / name).read_bytes() for name in names]
        with np.load(whole / "curves.npz") as a, np.load(broken / "curves.npz") as b:
            same.append(all(np.array_equal(a[name], b[name], equal_nan=True) for name in a))
        print(f"{done} kills; table, summary, journal and curves are the same: {same}")
        if not all(same) or process.returncode:
            raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="steps of each lane")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between checkpoints")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing")
    parser.add_argument("--kills", type=int, default=0, help="kill the sweep this many times")
    parser.add_argument("--longest", type=float, default=12.0, help="most seconds before a kill")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        steps, folder = int(options.child[0]), Path(options.child[1])
        resume = (folder / "plan.json").exists()
        train(steps, folder, 0.5, resume=resume)
    elif options.kills:
        kill_and_resume(options.kills, options.steps, options.longest, options.seed)
    else:
        overhead(options.steps, options.every, options.rounds)


if __name__ == "__main__":
    main()
