"""What surviving a crash costs, and whether it works.

    python benchmarks/crashes.py             # checkpoints every 5 seconds against none
    python benchmarks/crashes.py --kills 20  # kill -9 at random moments, each time to the same end

Both on the default task, with halving, so that there are tiles at work, lanes that wait and best
states to keep.
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


def trained(steps: int, folder: Path | None, every: float, *, resume: bool = False) -> None:
    halving = jgd.successive_halving(2, steps // 4)
    where = dict(folder=folder, checkpoint_every=every, resume=resume)
    jgd.sweep(digits(), LANES, steps, halving=halving, width=64, **where)


def overhead(steps: int, every: float, rounds: int) -> None:
    """Of checkpoints: the same sweep with and without them, in turns."""
    seconds: dict[float, list[float]] = {every: [], np.inf: []}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(rounds + 1):  # the first one warms the caches of the system
            for interval, seen in seconds.items():
                started = time.perf_counter()
                trained(steps, Path(scratch) / f"{turn}-{interval}", interval)
                seen.append(time.perf_counter() - started)
    ratios = [a / b - 1 for a, b in zip(seconds[every], seconds[np.inf], strict=True)][1:]
    alone = statistics.median(seconds[np.inf])
    print(
        f"checkpoints every {every:g} s cost {statistics.median(ratios):.1%} of {alone:.0f} s"
        f" (rounds: {', '.join(f'{r:.1%}' for r in ratios)})"
    )


def killed(kills: int, steps: int, longest: float, seed: int) -> None:
    """Begin a sweep, kill it, resume it, kill it ...: the end is that of one nobody touched."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        child = [sys.executable, __file__, "--child", str(steps)]
        subprocess.run([*child, str(whole)], check=True)
        done = 0
        while True:
            process = subprocess.Popen([*child, str(broken)], stderr=subprocess.DEVNULL)
            try:
                process.wait(dice.uniform(0.5, longest) if done < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
        names = ("results.csv", "results.json", "journal.jsonl")
        same = [(whole / name).read_bytes() == (broken / name).read_bytes() for name in names]
        with np.load(whole / "curves.npz") as a, np.load(broken / "curves.npz") as b:
            same.append(all(np.array_equal(a[name], b[name], equal_nan=True) for name in a))
        print(f"{done} kills; table, summary, journal, curves the same: {same}")
        if not all(same) or process.returncode:
            raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--every", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--longest", type=float, default=12.0, help="seconds before a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        steps, folder = int(options.child[0]), Path(options.child[1])
        resume = (folder / "plan.json").exists()
        trained(steps, folder, 0.5, resume=resume)
    elif options.kills:
        killed(options.kills, options.steps, options.longest, options.seed)
    else:
        overhead(options.steps, options.every, options.rounds)


if __name__ == "__main__":
    main()
