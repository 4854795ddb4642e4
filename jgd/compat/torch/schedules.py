"""The learning rate schedulers of PyTorch: its classes in snake case, its arguments and defaults.

    import jgd.compat.torch as jt       # not `torch`: the real one stays visible
    jt.sgd(jt.multi_step_lr(0.1, milestones=[30, 60]), momentum=0.9)
    jt.adamw(jt.one_cycle_lr(max_lr=0.1, total_steps=500),
             betas=(jt.one_cycle_momentum(max_lr=0.1, total_steps=500), 0.999))

The first argument is `lr`, the rate of torch's optimizer; then come those of the scheduler, without
`optimizer` and `last_epoch`. k is the step: the value at k is the rate of update k, counted from 0,
where `scheduler.step()` follows `optimizer.step()`. Numbers of steps are numbers like all others,
traced and swept; torch wants integers. Torch multiplies the rate it finds, step by step; these are
the same rates in closed form. `MultiplicativeLR`, a product over all steps, has none.
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
from jgd.ramps import as_float, as_vector, ramp, safe_power, whole_ratio
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
    """lr lr_lambda(k).

    Args:
      lr: at least 0.
      lr_lambda: a function of the step, which may be traced; a schedule keeps its numbers.
    """
    if not callable(lr_lambda):
        raise TypeError(f"lambda_lr: lr_lambda must be a function of the step, got {lr_lambda!r}")
    return lambda step: lr * lr_lambda(step)


@as_pytree
def step_lr(lr: NonNegative, step_size: Period, gamma: NonNegative = 0.1) -> Schedule:
    """lr gamma^floor(k / step_size); a multiple of step_size has the lower value already.

    Args:
      lr: at least 0, the value at step 0.
      step_size: at least 1.
      gamma: at least 0.
    """
    return lambda step: lr * safe_power(gamma, whole_ratio(as_float(step), step_size))


@as_pytree
def multi_step_lr(lr: NonNegative, milestones: Milestones, gamma: NonNegative = 0.1) -> Schedule:
    """lr gamma^n, for the number n of milestones at or below k.

    At a milestone the new value holds, after the last one it stays.

    Args:
      lr: at least 0.
      milestones: steps, a sequence or an array in any order; one that is repeated counts again.
      gamma: at least 0.
    """
    edges = as_vector(milestones)

    def value(step: Any) -> Any:
        passed = jnp.sum(edges <= jnp.expand_dims(as_float(step), -1), -1)
        return lr * safe_power(gamma, as_float(passed))

    return value


@as_pytree
def constant_lr(lr: NonNegative, factor: Fraction = 1.0 / 3, total_iters: Count = 5) -> Schedule:
    """lr factor while k < total_iters, lr from total_iters on.

    Args:
      lr: at least 0.
      factor: in [0, 1]; torch fails on the way back from 0.
      total_iters: at least 0; 0 keeps the factor for ever, as in torch.
    """

    def value(step: Any) -> Any:
        over = (total_iters > 0) & (as_float(step) >= total_iters)
        return lr * jnp.where(over, 1, factor)

    return value


@as_pytree
def linear_lr(
    lr: NonNegative,
    start_factor: Factor = 1.0 / 3,
    end_factor: Fraction = 1.0,
    total_iters: Count = 5,
) -> Schedule:
    """lr (start_factor + (end_factor - start_factor) min(k / total_iters, 1)).

    lr start_factor at step 0, lr end_factor from total_iters on.

    Args:
      lr: at least 0.
      start_factor: in (0, 1].
      end_factor: in [0, 1].
      total_iters: at least 0; 0 keeps the start for ever, as in torch.
    """
    return linear_schedule(lr * start_factor, lr * end_factor, total_iters)


@as_pytree
def exponential_lr(lr: NonNegative, gamma: NonNegative) -> Schedule:
    """lr gamma^k.

    Args:
      lr: at least 0, the value at step 0.
      gamma: at least 0; 0 leaves nothing after step 0.
    """
    return lambda step: lr * safe_power(gamma, as_float(step))


@as_pytree
def polynomial_lr(lr: NonNegative, total_iters: Count = 5, power: NonNegative = 1.0) -> Schedule:
    """lr (1 - min(k / total_iters, 1))^power: 0 from total_iters on.

    Args:
      lr: at least 0, the value at step 0.
      total_iters: at least 0; 0 keeps lr for ever, as in torch.
      power: at least 0; 1 is linear.
    """
    return polynomial_schedule(lr, 0.0, power, total_iters)


@as_pytree
def cosine_annealing_lr(lr: NonNegative, T_max: Period, eta_min: Number = 0.0) -> Schedule:
    """eta_min + (lr - eta_min) (1 + cos(pi k / T_max)) / 2, for ever.

    lr at step 0, `eta_min` at T_max, and then up again: lr at 2 T_max, the period.

    Args:
      lr: at least 0.
      T_max: at least 1.
      eta_min: the lowest value.

    Differs from: `jgd.cosine_decay_schedule`, which stays at its end.
    """
    fall = cosine_decay_schedule(lr - eta_min, T_max)

    def value(step: Any) -> Any:
        now, period = as_float(step), 2 * T_max
        along = now - period * whole_ratio(now, period)
        return eta_min + fall(jnp.minimum(along, period - along))  # the way back is the way there

    return value


@as_pytree
def cosine_annealing_warm_restarts(
    lr: NonNegative, T_0: Period, T_mult: Growth = 1, eta_min: Number = 0.0
) -> Schedule:
    """eta_min + (lr - eta_min) (1 + cos(pi x)) / 2, with x from 0 to 1 within each cycle.

    Cycle i has T_0 T_mult^i steps. The step at which it would end is the first of the next: lr.

    Args:
      lr: at least 0.
      T_0: at least 1.
      T_mult: at least 1; 1 (default): all cycles alike.
      eta_min: the lowest value.

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
    """Up from max_lr / div_factor to max_lr and down to almost nothing, along cosines or lines.

    With N = total_steps: max_lr / div_factor at step 0, max_lr at pct_start N - 1, and
    max_lr / (div_factor final_div_factor) from N - 1 on. With three phases it passes
    max_lr / div_factor again, at 2 pct_start N - 2. These ends may fall between two steps.

    Args:
      lr: at least 0, the maximum where `max_lr` is None; else ignored, as torch ignores the
        optimizer's rate.
      max_lr: at least 0.
      total_steps: at least 1; None: epochs times steps_per_epoch.
      epochs, steps_per_epoch: at least 1; ignored beside `total_steps`.
      pct_start: in [0, 1].
      anneal_strategy: "cos" or "linear".
      cycle_momentum, base_momentum, max_momentum: for `one_cycle_momentum`; no matter here.
      div_factor, final_div_factor: above 0.
      three_phase: True for three phases instead of two.

    Raises: ValueError without a maximum or a number of steps.
    Differs from: torch at step N, where it runs a step past the end, and beyond, where it raises: a
      function of a traced step cannot, and holds the last value. `jgd.cosine_onecycle_schedule`
      and `jgd.linear_onecycle_schedule`, which are optax's and end at N.
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
    """The momentum, or beta1, beside `one_cycle_lr`, of whose arguments it takes the same.

    `max_momentum` at step 0, `base_momentum` at pct_start N - 1, where the rate is highest,
    `max_momentum` again at N - 1, or at 2 pct_start N - 2 with three phases, and from there on.

    Raises: ValueError without a number of steps, and for cycle_momentum=False: then torch leaves
      the optimizer the momentum it has.
    """
    if not cycle_momentum:
        raise _unmoved("one_cycle_momentum")
    total = _total_steps("one_cycle_momentum", total_steps, epochs, steps_per_epoch)
    after = (max_momentum, max_momentum) if three_phase else (max_momentum,)
    return _phases(total, pct_start, anneal_strategy, (max_momentum, base_momentum, *after))


def _phases(total: Any, pct_start: Any, strategy: str, levels: tuple[Any, ...]) -> Schedule:
    """From level to level; the phases end at n pct_start total - n, and the last at total - 1."""
    ends = [n * (pct_start * total - 1) for n in range(1, len(levels) - 1)]

    def value(step: Any) -> Any:
        now = jnp.minimum(as_float(step), total - 1)
        phase: Any = sum((now > end).astype(int) for end in ends)  # at its end a phase still holds
        knots, heights = (
            as_vector([as_float(x) for x in (0, *ends, total - 1)]),
            as_vector([*levels]),
        )
        left, right = knots[phase], knots[phase + 1]
        # the rest of the way: exact at the end, where little is left of the rate
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
    """base_lr + (max_lr - base_lr) triangle(k) scale(k), for ever.

    The triangle is 0 at step 0, 1 at `step_size_up`, 0 again at step_size_up + step_size_down, one
    cycle. The scale is 1 ("triangular"), halves with each cycle ("triangular2") or is gamma^k
    ("exp_range").

    Args:
      lr: at least 0, the base where `base_lr` is None; else ignored, as torch ignores the
        optimizer's rate.
      base_lr, max_lr: at least 0, where the triangle is 0 and 1.
      step_size_up: at least 1.
      step_size_down: at least 1; None: as `step_size_up`.
      mode: "triangular", "triangular2" or "exp_range".
      gamma: at least 0, for "exp_range".
      scale_fn: a function in the place of `mode`, of the cycle counted from 1 or of k, a float that
        may be traced.
      scale_mode: "cycle" or "iterations", what `scale_fn` is a function of.
      cycle_momentum, base_momentum, max_momentum: for `cyclic_momentum`; no matter here.

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
    """max_momentum - (max_momentum - base_momentum) triangle(k) scale(k).

    The momentum, or beta1, beside `cyclic_lr`, of whose arguments it takes the same.
    `max_momentum` at step 0, `base_momentum` where the triangle of scale 1 is highest.

    Raises: ValueError for cycle_momentum=False: then torch leaves the optimizer the momentum it
      has.
    """
    if not cycle_momentum:
        raise _unmoved("cyclic_momentum")
    swing = _swing(step_size_up, step_size_down, mode, gamma, scale_fn, scale_mode)
    return lambda step: max_momentum - (max_momentum - base_momentum) * swing(as_float(step))


def _swing(
    up: Any, down: Any, mode: str, gamma: Any, scale_fn: Any, scale_mode: str
) -> Callable[[jax.Array], Any]:
    """triangle(k) scale(k)."""
    down = up if down is None else down

    def value(now: jax.Array) -> Any:
        cycle = whole_ratio(now, up + down)
        along = now - cycle * (up + down)
        triangle = jnp.minimum(along / up, (up + down - along) / down)
        if scale_fn is not None:
            return triangle * scale_fn(cycle + 1 if scale_mode == "cycle" else now)
        if mode == "triangular2":
            return triangle * 0.5**cycle
        return triangle * safe_power(gamma, now) if mode == "exp_range" else triangle

    return value


def _given(name: str, **arguments: Any) -> Any:
    """The first of the arguments that is not None."""
    for value in arguments.values():
        if value is not None:
            return value
    raise ValueError(f"{name}: {' or '.join(arguments)} must be a number, got None")


def _total_steps(name: str, total_steps: Any, epochs: Any, steps_per_epoch: Any) -> Any:
    if total_steps is not None:
        return total_steps
    if epochs is None or steps_per_epoch is None:
        raise ValueError(
            f"{name}: total_steps, or both epochs and steps_per_epoch, must be numbers, got"
            " total_steps=None and "
            f"{'epochs' if epochs is None else 'steps_per_epoch'}=None"
        )
    return epochs * steps_per_epoch


def _unmoved(name: str) -> ValueError:
    return ValueError(
        f"{name}: cycle_momentum must be True, got False, which leaves the optimizer its momentum:"
        " pass that instead of a schedule"
    )


# --- schedulers of schedulers ----------------------------------------------------------------


@as_pytree
def sequential_lr(lr: NonNegative, schedulers: Numbers, milestones: Boundaries) -> Schedule:
    """schedulers[i](k - milestones[i-1]), for the number i of milestones at or below k.

    Each counts from its own 0, and at a milestone the next one holds.

    Args:
      lr: at least 0, the rate of torch's optimizer, which is one: it takes the place of the `lr` of
        each of the schedulers, so that their own does not matter. Not of `one_cycle_lr` and
        `cyclic_lr`, which have their own rates and, in torch, write them over the optimizer's:
        the rate from which `one_cycle_lr` starts is the base of all after it and of the first of
        all, if that one goes on from the rate it finds; that of a `cyclic_lr` only if it comes
        first. Here they do the same.
      schedulers: n + 1 schedules of this module, or other functions of the step.
      milestones: n steps in rising order.

    Raises: ValueError if the lengths do not fit.
    Differs from: torch where a scheduler of schedulers is among them: it raises, or in the first
      place is a step off. So too for what depends on its path there: a `cosine_annealing_lr` in
      front of a `one_cycle_lr`, beyond its T_max, and a `constant_lr` of no steps.
    """
    count = len(milestones)
    if len(schedulers) != count + 1:
        raise ValueError(
            f"sequential_lr: schedulers must be {count + 1} for {count} milestones, got"
            f" {len(schedulers)}"
        )
    return lambda step: join_schedules(list(_rebased(lr, schedulers)), milestones)(step)


def _rebased(lr: Any, schedulers: Any) -> Iterator[Any]:
    """The schedulers with the base rates that torch gives them, when made in their order."""
    bases = []
    for index, schedule in enumerate(schedulers):
        writes = ("div_factor", "step_size_up") if index == 0 else ("div_factor",)
        if _has(schedule, writes):
            lr = schedule(0)
        bases.append(lr)
    if not _has(schedulers[0], ("T_0", "lr_lambda")):  # these keep the rate they were made with
        bases[0] = lr
    for schedule, base in zip(schedulers, bases, strict=True):
        own = _has(schedule, ("max_lr",)) or not _has(schedule, ("lr",))
        yield schedule if own else schedule._replace(lr=base)


def _has(schedule: Any, arguments: tuple[str, ...]) -> bool:
    return any(hasattr(schedule, name) for name in arguments)


@as_pytree
def chained_scheduler(lr: NonNegative, schedulers: Numbers) -> Schedule:
    """lr times the product of schedulers[i](k), each with 1 as its base rate.

    Args:
      lr: at least 0, the rate of torch's optimizer; that of each of the schedulers does not matter.
      schedulers: schedules of this module that scale the rate: `step_lr`, `multi_step_lr`,
        `constant_lr`, `linear_lr`, `exponential_lr`, `polynomial_lr`, and `cosine_annealing_lr`
        with `eta_min` 0 up to its T_max, beyond which torch's product depends on its path.

    Raises: ValueError for none, and for schedulers that set the rate whatever it was before.
    """
    if not schedulers:
        raise ValueError("chained_scheduler: schedulers must be at least one, got none")
    for schedule in schedulers:
        sets = ("max_lr", "T_0", "lr_lambda", "schedulers")
        if _has(schedule, sets) or not _has(schedule, ("lr",)):
            raise ValueError(
                f"chained_scheduler: schedulers must be such that scale the rate, got {schedule!r}"
            )

    def value(step: Any) -> Any:
        product = lr
        for schedule in schedulers:
            product = product * schedule._replace(lr=1.0)(step)
        return product

    return value
