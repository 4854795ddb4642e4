"""Compare the speed of a sweep, in lane-steps per second, with that of its alternatives.

    python benchmarks/lanes.py                       # 512 lanes, two to five minutes
    python benchmarks/lanes.py --lanes 64 512 4096   # as in benchmarks/README.md
    python benchmarks/lanes.py --halving 1000        # the gain from successive halving

All contenders run in this process and take turns in each round, so that a busy machine slows them
alike. A ratio is the median over rounds. The task is that of `jgd sweep`: a 64-64-10 network on the
digits, batches of 128, and Adam at many learning rates. All programs are compiled before timing.

    sweep         the loop of jgd.sweep, with verdicts, held-out metrics and reports
    all at once   the same lanes in one hand-written jax.vmap of optax, inside a scan
    jitted step   one setting after another: a jitted optax step in a Python loop
    optuna        the same loop, with settings proposed by Optuna's TPE sampler
    torch         the same loop in PyTorch
    keras fit     the same training with Keras's `fit` on its JAX backend
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jgd
from jgd.tuning.sweep import PreparedSweep, TrainingArguments, prepare
from jgd.tuning.tasks import digits

Contender = Callable[[], tuple[int, float]]  # returns the number of lane-steps and their seconds


def seconds_of(prepared: PreparedSweep) -> float:
    """Run a sweep to its end and return its seconds."""
    started = time.perf_counter()
    while prepared.sweep.start():
        prepared.sweep.take()
        prepared.sweep.finish()
    return time.perf_counter() - started


def sweep(task: jgd.Task, rates: np.ndarray, steps: int, width: int | None) -> Contender:
    """Return jgd's sweep as a contender."""
    lanes = {"adam": jgd.grid(jgd.adam, learning_rate=rates)}
    # reports with held-out metrics, as often as in `jgd sweep`
    options = dict(width=width, report_every=max(steps // 4, 1))

    def measure() -> tuple[int, float]:
        prepared = prepare(TrainingArguments(task, lanes, steps, **options))
        return prepared.plan.lane_steps, seconds_of(prepared)

    measure()
    return measure


def measure_halving(task: jgd.Task, rates: np.ndarray, steps: int, rounds: int) -> None:
    """Print how many times as fast a sweep is with halving as without, in turns, after compilation.

    The ideal is the ratio of the planned lane-steps.
    """
    lanes = {"adam": jgd.grid(jgd.adam, learning_rate=rates)}
    kinds = {
        "full": None,
        "eta 2, first rung at 1/8": jgd.successive_halving(2, steps // 8),
        "eta 3, first rung at 1/27": jgd.successive_halving(3, steps // 27),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    executed, planned = {}, {}
    for _turn in range(rounds + 1):
        for name, halving in kinds.items():
            prepared = prepare(TrainingArguments(task, lanes, steps, width=64, halving=halving))
            seconds[name].append(seconds_of(prepared))
            executed[name] = prepared.sweep.schedule.lane_steps
            planned[name] = prepared.plan.lane_steps
    full, *others = kinds
    for name in others:
        ideal = planned[full] / planned[name]
        cold = seconds[full][0] / seconds[name][0]  # the first turn compiles
        warm = statistics.median(
            a / b for a, b in zip(seconds[full][1:], seconds[name][1:], strict=True)
        )
        print(
            f"halving, {name}: {warm:.2f} times as fast, {warm / ideal:.2f} of the ideal"
            f" {ideal:.2f}; with compilation {cold:.2f}; executed"
            f" {executed[name] / planned[name]:.3f} of the planned lane-steps"
        )


def all_at_once(task: jgd.Task, rates: np.ndarray, steps: int) -> Contender:
    """Return a hand-written vmap over all lanes, with batches generated inside the scan."""

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
    """Return a Python loop over a jitted optax step."""
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


def optuna_loop(task: jgd.Task, steps: int, trials: int) -> Contender:
    """Return a Python loop over a jitted optax step, for trials that Optuna proposes."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    @jax.jit
    def step(params, state, batch, rate):
        tx = optax.adam(rate)
        grads = jax.grad(task.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    evaluate, batches = jax.jit(task.evaluate), [task.batch(i) for i in range(steps)]
    params = task.init(jax.random.key(0))

    def measure() -> tuple[int, float]:
        study = optuna.create_study(direction="maximize")
        started = time.perf_counter()
        for _ in range(trials):
            trial = study.ask()
            rate = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
            carry = params, optax.adam(rate).init(params)
            for batch in batches:
                carry = step(*carry, batch, rate)
            study.tell(trial, float(evaluate(carry[0])["accuracy"]))
        return steps * trials, time.perf_counter() - started

    measure()
    return measure


def keras_fit(task: jgd.Task, steps: int) -> Contender:
    """Return Keras's `fit` on its JAX backend."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    images, labels = (np.concatenate(x) for x in zip(*map(task.batch, range(steps)), strict=True))
    layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.layers.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss)

    def measure() -> tuple[int, float]:
        started = time.perf_counter()
        model.fit(images, labels, batch_size=len(images) // steps, verbose=0)
        return steps, time.perf_counter() - started

    measure()
    return measure


def torch_loop(task: jgd.Task, steps: int) -> Contender:
    """Return a training loop in PyTorch."""
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


def race(task: jgd.Task, lanes: int, steps: int, rounds: int, width: int | None) -> None:
    """Measure all contenders in turns and print their speeds."""
    rates = np.geomspace(1e-5, 1e-2, lanes)
    contenders: dict[str, Contender] = {
        "sweep": sweep(task, rates, steps, width),
        "all at once": all_at_once(task, rates, steps),
        "jitted step": jitted_step(task, 400),
    }
    for name, module, make in (
        ("optuna", "optuna", lambda: optuna_loop(task, 200, 3)),
        ("torch", "torch", lambda: torch_loop(task, 400)),
        ("keras fit", "keras", lambda: keras_fit(task, 100)),
    ):
        if importlib.util.find_spec(module):
            contenders[name] = make()
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            lane_steps, seconds = measure()
            speeds[name].append(lane_steps / seconds)
    print(
        f"{lanes} settings, {steps} steps, {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    )
    for name, of_rounds in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(speeds["sweep"], of_rounds, strict=True))
        median, low, high = (f(of_rounds) / 1e3 for f in (statistics.median, min, max))
        print(
            f"{name:12} {median:6.1f} thousand lane-steps/s ({low:.1f} to {high:.1f})"
            f"   the sweep is {ratio:5.2f} times as fast"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, nargs="+", default=[512], help="numbers of lanes")
    parser.add_argument("--steps", type=int, help="steps of each lane; default: 100,000 / lanes")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument("--width", type=int, help="lanes per tile; default: chosen by the sweep")
    parser.add_argument(
        "--halving", type=int, metavar="STEPS", help="measure the gain from halving over so many"
    )
    options = parser.parse_args()
    task = digits()
    for lanes in options.lanes:
        if options.halving:
            measure_halving(task, np.geomspace(1e-5, 1e-2, lanes), options.halving, options.rounds)
        else:
            steps = options.steps or max(100_000 // lanes, 20)
            race(task, lanes, steps, options.rounds, options.width)


if __name__ == "__main__":
    main()
