"""The learning rate schedulers of PyTorch: its classes in snake case, its arguments and defaults.

    import jgd.compat.torch as jt       # the name `torch` would hide PyTorch itself
    jt.sgd(jt.multi_step_lr(0.1, milestones=[30, 60]), momentum=0.9)
    jt.adamw(jt.one_cycle_lr(max_lr=0.1, total_steps=500),
             betas=(jt.one_cycle_momentum(max_lr=0.1, total_steps=500), 0.999))

The first argument is `lr`, the learning rate of PyTorch's optimizer. The others are those of the
scheduler, without `optimizer` and `last_epoch`. k is the step: the value at k is the learning rate
of update k, counted from 0, where each `scheduler.step()` follows an `optimizer.step()`. Step
counts may be traced and swept like all other numbers; in PyTorch they are integers. Where PyTorch
multiplies the current learning rate at each step, jgd computes the same rates in closed form.
`MultiplicativeLR`, a product over all steps, has no closed form and is missing.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from optax import Schedule

from jgd.arguments import (
    Boundaries,
    Count,
    Fraction,
    NonNegative,
    Number,
    NumberKind,
    Numbers,
    NumbersKind,
    Period,
    Positive,
)
from jgd.compat.keras.schedules import cosine_decay_restarts
from jgd.pytree import as_pytree
from jgd.ramps import as_float, as_vector, floor_ratio, ramp, safe_power
from jgd.schedules import (
    cosine_decay_schedule,
    join_schedules,
    linear_schedule,
    polynomial_schedule,
)

__all__ = [
    "chained_scheduler",
    "constant_lr",
    "cosine_annealing_lr",
    "cosine_annealing_warm_restarts",
    "cyclic_lr",
    "cyclic_momentum",
    "exponential_lr",
    "lambda_lr",
    "linear_lr",
    "multi_step_lr",
    "one_cycle_lr",
    "one_cycle_momentum",
    "polynomial_lr",
    "sequential_lr",
    "step_lr",
]

Factor = Annotated[Any, NumberKind("in (0, 1]", lambda x: (x > 0) & (x <= 1))]
Growth = Annotated[Any, NumberKind("at least 1", lambda x: x >= 1)]
Milestones = Annotated[
    Any, NumbersKind("at least 0", lambda x: np.min(np.asarray(x), initial=0) >= 0)
]


# --- one formula each ------------------------------------------------------------------------


@as_pytree
def lambda_lr(lr: NonNegative, lr_lambda: Numbers) -> Schedule:
    """Function of the step times the learning rate: lr lr_lambda(k).

    Args:
      lr: at least 0.
      lr_lambda: a function of the step, which may be traced; the numbers of a jgd schedule are
        leaves.
    """
    if not callable(lr_lambda):
        raise TypeError(f"lambda_lr: lr_lambda must be a function of the step, got {lr_lambda!r}")
    return lambda step: lr * lr_lambda(step)


@as_pytree
def step_lr(lr: NonNegative, step_size: Period, gamma: NonNegative = 0.1) -> Schedule:
    """Step decay: lr gamma^floor(k / step_size), which changes at multiples of `step_size`.

    Args:
      lr: at least 0, the value at step 0.
      step_size: at least 1, the number of steps between two decays.
      gamma: at least 0, the factor of each decay; 0.1 by default.
    """
    return lambda step: lr * safe_power(gamma, floor_ratio(as_float(step), step_size))


@as_pytree
def multi_step_lr(lr: NonNegative, milestones: Milestones, gamma: NonNegative = 0.1) -> Schedule:
    """Step decay at milestones: lr gamma^n, where n is the number of milestones at or below k.

    Args:
      lr: at least 0.
      milestones: steps, a sequence or an array in any order; a repeated one counts each time.
      gamma: at least 0, the factor of each decay; 0.1 by default.
    """
    edges = as_vector(milestones)

    def value(step: Any) -> Any:
        passed = jnp.sum(edges <= jnp.expand_dims(as_float(step), -1), -1)
        return lr * safe_power(gamma, as_float(passed))

    return value


@as_pytree
def constant_lr(lr: NonNegative, factor: Fraction = 1.0 / 3, total_iters: Count = 5) -> Schedule:
    """Constant factor: lr factor while k < total_iters, and lr from step total_iters on.

    Args:
      lr: at least 0.
      factor: in [0, 1], 1/3 by default; PyTorch divides by it and fails for 0.
      total_iters: at least 0, 5 by default; with 0 the factor applies forever, as in PyTorch.
    """

    def value(step: Any) -> Any:
        ended = (total_iters > 0) & (as_float(step) >= total_iters)
        return lr * jnp.where(ended, 1, factor)

    return value


@as_pytree
def linear_lr(
    lr: NonNegative,
    start_factor: Factor = 1.0 / 3,
    end_factor: Fraction = 1.0,
    total_iters: Count = 5,
) -> Schedule:
    """Linear change from lr start_factor at step 0 to lr end_factor from step total_iters on.

        value = lr (start_factor + (end_factor - start_factor) min(k / total_iters, 1))

    Args:
      lr: at least 0.
      start_factor: in (0, 1], 1/3 by default.
      end_factor: in [0, 1], 1 by default.
      total_iters: at least 0, 5 by default; with 0 the value is lr start_factor forever, as in
        PyTorch.
    """
    return linear_schedule(lr * start_factor, lr * end_factor, total_iters)


@as_pytree
def exponential_lr(lr: NonNegative, gamma: NonNegative) -> Schedule:
    """Exponential decay: lr gamma^k.

    Args:
      lr: at least 0, the value at step 0.
      gamma: at least 0; with 0 the value is 0 after step 0.
    """
    return lambda step: lr * safe_power(gamma, as_float(step))


@as_pytree
def polynomial_lr(lr: NonNegative, total_iters: Count = 5, power: NonNegative = 1.0) -> Schedule:
    """Polynomial decay: lr (1 - min(k / total_iters, 1))^power, which is 0 from total_iters on.

    Args:
      lr: at least 0, the value at step 0.
      total_iters: at least 0, 5 by default; with 0 the value is lr forever, as in PyTorch.
      power: at least 0; 1 (default) is linear.
    """
    return polynomial_schedule(lr, 0.0, power, total_iters)


@as_pytree
def cosine_annealing_lr(lr: NonNegative, T_max: Period, eta_min: Number = 0.0) -> Schedule:
    """Cosine annealing: eta_min + (lr - eta_min) (1 + cos(pi k / T_max)) / 2, with period 2 T_max.

    The value falls from lr at step 0 to `eta_min` at step T_max and rises to lr at step 2 T_max.

    Args:
      lr: at least 0.
      T_max: at least 1, half of the period.
      eta_min: the lowest value; 0 by default.

    Differs from: `jgd.cosine_decay_schedule`, which keeps its last value.
    """
    fall = cosine_decay_schedule(lr - eta_min, T_max)

    def value(step: Any) -> Any:
        now, period = as_float(step), 2 * T_max
        along = now - period * floor_ratio(now, period)
        return eta_min + fall(jnp.minimum(along, period - along))  # the rise mirrors the fall

    return value


@as_pytree
def cosine_annealing_warm_restarts(
    lr: NonNegative, T_0: Period, T_mult: Growth = 1, eta_min: Number = 0.0
) -> Schedule:
    """Cosine annealing with restarts at lr.

        value = eta_min + (lr - eta_min) (1 + cos(pi x)) / 2

    x goes from 0 to 1 within each cycle. Cycle i has T_0 T_mult^i steps. The step after its last
    one is the first step of the next cycle.

    Args:
      lr: at least 0, the value at the start of each cycle.
      T_0: at least 1, the length of the first cycle.
      T_mult: at least 1, the length of a cycle over that of the cycle before; 1 by default.
      eta_min: the lowest value; 0 by default.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983.
    """
    height = cosine_decay_restarts(lr - eta_min, T_0, T_mult)
    return lambda step: eta_min + height(step)


# --- one cycle, and one after another --------------------------------------------------------


@as_pytree
def one_cycle_lr(
    lr: NonNegative | None = None,
    max_lr: NonNegative | None = None,
    total_steps: Period | None = None,
    epochs: Period | None = None,
    steps_per_epoch: Period | None = None,
    pct_start: Fraction = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    cycle_momentum: bool = True,
    base_momentum: NonNegative = 0.85,
    max_momentum: NonNegative = 0.95,
    div_factor: Positive = 25.0,
    final_div_factor: Positive = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """One cycle: rise from max_lr / div_factor to max_lr, then fall almost to 0.

    With N = total_steps, the value is max_lr / div_factor at step 0, max_lr at step
    pct_start N - 1, and max_lr / (div_factor final_div_factor) from step N - 1 on. With three
    phases it is max_lr / div_factor again at step 2 pct_start N - 2. The ends of phases may fall
    between two steps.

    Args:
      lr: at least 0, the maximum if `max_lr` is None; else ignored, as PyTorch ignores the
        optimizer's learning rate.
      max_lr: at least 0, the maximum.
      total_steps: at least 1; None: epochs times steps_per_epoch.
      epochs, steps_per_epoch: at least 1; ignored if `total_steps` is given.
      pct_start: in [0, 1], the part of the steps in which the value rises; 0.3 by default.
      anneal_strategy: "cos" (default) for cosines between the ends of the phases, or "linear".
      cycle_momentum, base_momentum, max_momentum: ignored; see `one_cycle_momentum`.
      div_factor, final_div_factor: above 0; 25 and 1e4 by default.
      three_phase: True for three phases instead of two (default).

    Raises: ValueError without a maximum or a number of steps.
    Differs from: PyTorch, which extrapolates at step N and raises after it; a function of a traced
      step cannot raise, and keeps its last value. `jgd.cosine_onecycle_schedule` and
      `jgd.linear_onecycle_schedule`, which are optax's and end at step N.
    Source: Smith & Topin 2017, arXiv:1708.07120.
    """
    total = _total_steps("one_cycle_lr", total_steps, epochs, steps_per_epoch)
    peak = _given("one_cycle_lr", max_lr=max_lr, lr=lr)
    start = peak / div_factor
    between = (peak, start) if three_phase else (peak,)
    return _phases(total, pct_start, anneal_strategy, (start, *between, start / final_div_factor))


@as_pytree
def one_cycle_momentum(
    lr: NonNegative | None = None,
    max_lr: NonNegative | None = None,
    total_steps: Period | None = None,
    epochs: Period | None = None,
    steps_per_epoch: Period | None = None,
    pct_start: Fraction = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    cycle_momentum: bool = True,
    base_momentum: NonNegative = 0.85,
    max_momentum: NonNegative = 0.95,
    div_factor: Positive = 25.0,
    final_div_factor: Positive = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """Momentum (or beta1) of the one cycle policy, for use with `one_cycle_lr`.

    The value is `max_momentum` at step 0 and `base_momentum` at step pct_start N - 1, where the
    learning rate is highest. From step N - 1 on, or 2 pct_start N - 2 with three phases, it is
    `max_momentum` again.

    Args: as in `one_cycle_lr`.
    Raises: ValueError without a number of steps, and for cycle_momentum=False, with which PyTorch
      does not change the momentum.
    """
    if not cycle_momentum:
        raise _cycle_momentum_error("one_cycle_momentum")
    total = _total_steps("one_cycle_momentum", total_steps, epochs, steps_per_epoch)
    after = (max_momentum, max_momentum) if three_phase else (max_momentum,)
    return _phases(total, pct_start, anneal_strategy, (max_momentum, base_momentum, *after))


def _phases(total: Any, pct_start: Any, strategy: str, levels: tuple[Any, ...]) -> Schedule:
    """Return a schedule from level to level.

    Phase n ends at step n pct_start total - n, and the last one at step total - 1.
    """
    ends = [n * (pct_start * total - 1) for n in range(1, len(levels) - 1)]

    def value(step: Any) -> Any:
        now = jnp.minimum(as_float(step), total - 1)
        phase: Any = sum((now > end).astype(int) for end in ends)  # a phase includes its end
        knots, heights = (
            as_vector([as_float(x) for x in (0, *ends, total - 1)]),
            as_vector([*levels]),
        )
        left, right = knots[phase], knots[phase + 1]
        # the part of the phase that is left, so that small final values are exact
        rest = ramp(right - now, 0, right - left)
        if strategy == "cos":
            rest = jnp.sin(jnp.pi / 2 * rest) ** 2
        return heights[phase + 1] + (heights[phase] - heights[phase + 1]) * rest

    return value


@as_pytree
def cyclic_lr(
    lr: NonNegative | None = None,
    base_lr: NonNegative | None = None,
    max_lr: NonNegative | None = None,
    step_size_up: Period = 2000,
    step_size_down: Period | None = None,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: NonNegative = 1.0,
    scale_fn: Callable[[Any], Any] | None = None,
    scale_mode: Literal["cycle", "iterations"] = "cycle",
    cycle_momentum: bool = True,
    base_momentum: NonNegative = 0.8,
    max_momentum: NonNegative = 0.9,
) -> Schedule:
    """Cycles between two learning rates: base_lr + (max_lr - base_lr) triangle(k) scale(k).

    In each cycle the triangle rises from 0 to 1 in `step_size_up` steps and falls to 0 in
    `step_size_down` steps. The scale is 1 ("triangular"), 0.5^i in cycle i ("triangular2") or
    gamma^k ("exp_range").

    Args:
      lr: at least 0, the base if `base_lr` is None; else ignored, as PyTorch ignores the
        optimizer's learning rate.
      base_lr, max_lr: at least 0, the values where the triangle is 0 and 1.
      step_size_up: at least 1, 2,000 by default.
      step_size_down: at least 1; None (default): as `step_size_up`.
      mode: "triangular" (default), "triangular2" or "exp_range".
      gamma: at least 0, for "exp_range"; 1 by default.
      scale_fn: a function that replaces the scale of `mode`. Its argument is a float, which may be
        traced.
      scale_mode: the argument of `scale_fn`: "cycle" (default), counted from 1, or "iterations", k.
      cycle_momentum, base_momentum, max_momentum: ignored; see `cyclic_momentum`.

    Raises: ValueError without a base or a maximum.
    Source: Smith 2017, arXiv:1506.01186.
    """
    base = _given("cyclic_lr", base_lr=base_lr, lr=lr)
    peak = _given("cyclic_lr", max_lr=max_lr)
    swing = _swing(step_size_up, step_size_down, mode, gamma, scale_fn, scale_mode)
    return lambda step: base + (peak - base) * swing(as_float(step))


@as_pytree
def cyclic_momentum(
    lr: NonNegative | None = None,
    base_lr: NonNegative | None = None,
    max_lr: NonNegative | None = None,
    step_size_up: Period = 2000,
    step_size_down: Period | None = None,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: NonNegative = 1.0,
    scale_fn: Callable[[Any], Any] | None = None,
    scale_mode: Literal["cycle", "iterations"] = "cycle",
    cycle_momentum: bool = True,
    base_momentum: NonNegative = 0.8,
    max_momentum: NonNegative = 0.9,
) -> Schedule:
    """Momentum (or beta1) in cycles: max_momentum - (max_momentum - base_momentum) triangle scale.

    For use with `cyclic_lr`, whose triangle(k) and scale(k) it has: the value is `max_momentum` at
    step 0 and lowest where the learning rate is highest.

    Args: as in `cyclic_lr`.
    Raises: ValueError for cycle_momentum=False, with which PyTorch does not change the momentum.
    """
    if not cycle_momentum:
        raise _cycle_momentum_error("cyclic_momentum")
    swing = _swing(step_size_up, step_size_down, mode, gamma, scale_fn, scale_mode)
    return lambda step: max_momentum - (max_momentum - base_momentum) * swing(as_float(step))


def _swing(
    up: Any, down: Any, mode: str, gamma: Any, scale_fn: Any, scale_mode: str
) -> Callable[[jax.Array], Any]:
    """Return the function triangle(k) scale(k) of `cyclic_lr`."""
    down = up if down is None else down

    def value(now: jax.Array) -> Any:
        cycle = floor_ratio(now, up + down)
        along = now - cycle * (up + down)
        triangle = jnp.minimum(along / up, (up + down - along) / down)
        if scale_fn is not None:
            return triangle * scale_fn(cycle + 1 if scale_mode == "cycle" else now)
        if mode == "triangular2":
            return triangle * 0.5**cycle
        return triangle * safe_power(gamma, now) if mode == "exp_range" else triangle

    return value


def _given(name: str, **arguments: Any) -> Any:
    """Return the first argument that is not None."""
    for value in arguments.values():
        if value is not None:
            return value
    raise ValueError(f"{name}: {' or '.join(arguments)} must be a number, got None")


def _total_steps(name: str, total_steps: Any, epochs: Any, steps_per_epoch: Any) -> Any:
    """Return the number of steps of a cycle."""
    if total_steps is not None:
        return total_steps
    if epochs is None or steps_per_epoch is None:
        raise ValueError(
            f"{name}: total_steps, or both epochs and steps_per_epoch, must be numbers, got"
            f" total_steps=None and {'epochs' if epochs is None else 'steps_per_epoch'}=None"
        )
    return epochs * steps_per_epoch


def _cycle_momentum_error(name: str) -> ValueError:
    return ValueError(
        f"{name}: cycle_momentum must be True, got False. Pass a constant momentum to the optimizer"
        " instead of this schedule"
    )


# --- schedulers of schedulers ----------------------------------------------------------------


@as_pytree
def sequential_lr(lr: NonNegative, schedulers: Numbers, milestones: Boundaries) -> Schedule:
    """Sequence of schedules: schedulers[i](k - milestones[i-1]), with i milestones at or below k.

    Each schedule starts at a milestone and counts its steps from 0.

    Args:
      lr: at least 0, the learning rate of PyTorch's optimizer. It replaces the `lr` of each
        schedule, except `one_cycle_lr` and `cyclic_lr`, which have learning rates of their own. As
        in PyTorch, these two overwrite the optimizer's learning rate: the initial value of a
        `one_cycle_lr` becomes the `lr` of the schedules after it, and of the first schedule unless
        that is a `cosine_annealing_warm_restarts` or a `lambda_lr`. The initial value of a
        `cyclic_lr` does so only if it comes first.
      schedulers: n + 1 schedules of this module, or other functions of the step.
      milestones: n steps in rising order.

    Raises: ValueError if there are not n + 1 schedules for n milestones.
    Differs from: PyTorch for a `sequential_lr` or a `chained_scheduler` among the schedules, where
      PyTorch raises or, if it comes first, is one step off. Also where PyTorch's values depend on
      the steps before: a `cosine_annealing_lr` before a `one_cycle_lr` after its T_max, and a
      `constant_lr` of 0 steps.
    """
    count = len(milestones)
    if len(schedulers) != count + 1:
        raise ValueError(
            f"sequential_lr: schedulers must have length {count + 1} for {count} milestones, got"
            f" length {len(schedulers)}"
        )
    return lambda step: join_schedules(list(_rebased(lr, schedulers)), milestones)(step)


def _rebased(lr: Any, schedulers: Any) -> Iterator[Any]:
    """Yield the schedules with the `lr` that PyTorch gives them when it creates them in order."""
    bases = []
    for index, schedule in enumerate(schedulers):
        overwriting = ("div_factor", "step_size_up") if index == 0 else ("div_factor",)
        if _has_any(schedule, overwriting):
            lr = schedule(0)
        bases.append(lr)
    if not _has_any(schedulers[0], ("T_0", "lr_lambda")):  # these keep the first learning rate
        bases[0] = lr
    for schedule, base in zip(schedulers, bases, strict=True):
        has_own_rate = _has_any(schedule, ("max_lr",)) or not _has_any(schedule, ("lr",))
        yield schedule if has_own_rate else schedule._replace(lr=base)


def _has_any(schedule: Any, arguments: tuple[str, ...]) -> bool:
    """Return whether a schedule has one of these arguments, which tell the schedules apart."""
    return any(hasattr(schedule, name) for name in arguments)


@as_pytree
def chained_scheduler(lr: NonNegative, schedulers: Numbers) -> Schedule:
    """Product of schedules: lr times the product of schedulers[i](k), each with an `lr` of 1.

    Args:
      lr: at least 0, the learning rate of PyTorch's optimizer. The schedules' own is ignored.
      schedulers: schedules of this module that multiply the learning rate: `step_lr`,
        `multi_step_lr`, `constant_lr`, `linear_lr`, `exponential_lr`, `polynomial_lr`, and
        `cosine_annealing_lr` with `eta_min` 0 up to step T_max, after which PyTorch's values depend
        on the steps before.

    Raises: ValueError for an empty sequence, and for schedules that set the learning rate whatever
      it was before.
    """
    if not schedulers:
        raise ValueError("chained_scheduler: schedulers must have at least one schedule, got none")
    for schedule in schedulers:
        setting = ("max_lr", "T_0", "lr_lambda", "schedulers")
        if _has_any(schedule, setting) or not _has_any(schedule, ("lr",)):
            raise ValueError(
                "chained_scheduler: schedulers must be schedules that multiply the learning rate,"
                f" got {schedule!r}"
            )

    def value(step: Any) -> Any:
        product = lr
        for schedule in schedulers:
            product = product * schedule._replace(lr=1.0)(step)
        return product

    return value
