"""Lane-steps per second of the default task: jgd's sweep beside what one would write instead.

    python benchmarks/lanes.py            # 512 lanes, a few rounds, two to five minutes

All contenders run in this process, one after the other in each round, so that a busy machine slows
them alike; the ratios are of medians. The task is that of `jgd sweep`: a 64-64-10 network on the
digits, batches of 128, Adam at 512 learning rates.

    sweep         jgd.sweep's program, tiles of 64 lanes: verdicts and held-out metrics included
    all at once   the same lanes in one hand-written jax.vmap of optax, inside a scan
    jitted step   one setting after another: a warm jitted optax step in a Python loop
    torch         the same loop in torch, if it is installed
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jgd
from jgd.tuning import driver
from jgd.tuning.tasks import digits

Contender = Callable[[], tuple[int, float]]  # -> lane-steps done, seconds they took


def swept(task: jgd.Task, rates: np.ndarray, steps: int, width: int) -> Contender:
    lanes = jgd.grid(jgd.adam, learning_rate=rates)
    options = dict(width=width, report_every=50)  # as `jgd sweep` reports, held-out metrics and all
    plan, groups, run = driver.prepare(task, {"adam": lanes}, steps, **options)

    def measure() -> tuple[int, float]:
        reports = driver.iter_plan(plan, groups, run)
        next(reports)  # compiled: the rest is warm
        started = time.perf_counter()
        for _ in reports:
            pass
        return plan.lane_steps - width * plan.reports[0], time.perf_counter() - started

    return measure


def all_at_once(task: jgd.Task, rates: np.ndarray, steps: int) -> Contender:
    """A user's own: every lane in one vmap, batches made in the scan."""

    def one_step(params, state, rate, batch):
        tx = optax.adam(rate)
        grads = jax.grad(task.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def chunk(params, states, rates, batch, start):
        def body(carry, step):
            vmapped = jax.vmap(one_step, (0, 0, 0, None))
            return vmapped(*carry, rates, batch(step)), None

        return jax.lax.scan(body, (params, states), start + jnp.arange(steps))[0]

    keys = jax.random.split(jax.random.key(0), len(rates))
    params = jax.jit(jax.vmap(task.init))(keys)
    states = jax.jit(jax.vmap(optax.adam(0.1).init))(params)
    rates = jnp.asarray(rates, jnp.float32)

    def measure() -> tuple[int, float]:
        started = time.perf_counter()
        jax.block_until_ready(chunk(params, states, rates, task.batch, 0))
        return steps * len(rates), time.perf_counter() - started

    measure()
    return measure


def jitted_step(task: jgd.Task, steps: int) -> Contender:
    tx = optax.adam(1e-3)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(task.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    batches = [jax.block_until_ready(task.batch(i)) for i in range(steps)]
    params = task.init(jax.random.key(0))

    def measure() -> tuple[int, float]:
        carry = params, tx.init(params)
        started = time.perf_counter()
        for batch in batches:
            carry = step(*carry, batch)
        jax.block_until_ready(carry)
        return steps, time.perf_counter() - started

    measure()
    return measure


def torch_loop(task: jgd.Task, steps: int) -> Contender:
    import torch

    as_torch = lambda x: torch.tensor(np.asarray(x))
    batches = [tuple(map(as_torch, task.batch(i))) for i in range(steps)]
    batches = [(images, labels.long()) for images, labels in batches]

    def measure() -> tuple[int, float]:
        net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        started = time.perf_counter()
        for images, labels in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        return steps, time.perf_counter() - started

    measure()
    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[64])
    options = parser.parse_args()
    task, rates = digits(), np.geomspace(1e-5, 1e-2, options.lanes)
    contenders: dict[str, Contender] = {
        f"sweep, {width} wide": swept(task, rates, options.steps, width) for width in options.widths
    }
    contenders["all at once"] = all_at_once(task, rates, options.steps)
    contenders["jitted step"] = jitted_step(task, 2 * options.steps)
    if importlib.util.find_spec("torch"):
        contenders["torch"] = torch_loop(task, 2 * options.steps)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, measure in contenders.items():
            done, seconds = measure()
            speeds[name].append(done / seconds)
    first = statistics.median(next(iter(speeds.values())))
    print(f"{options.lanes} lanes, {options.steps} steps, {jax.devices()[0].device_kind}")
    for name, seen in speeds.items():
        middle, low, high = statistics.median(seen), min(seen), max(seen)
        print(
            f"{name:16} {middle / 1e3:7.1f} thousand lane-steps/s ({low / 1e3:.1f} to"
            f" {high / 1e3:.1f})   sweep is {first / middle:5.2f} times that"
        )


if __name__ == "__main__":
    main()
