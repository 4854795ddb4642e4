"""Training runs as pure pairs, and the supervised task behind most of them.

A run consists of pure functions, as a gradient transformation does:

    init(setting, key) -> state             update(setting, state, batch) -> (state, metrics)
    evaluate(setting, state) -> metrics

The setting is any pytree of numbers: an optimizer, or a tuple or dict of one optimizer and other
numbers (a dropout rate, the strength of a penalty). A sweep trains any run; `supervised` makes a
run of a `Task`, and `train` trains one setting alone.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jgd.arguments import Static, is_number
from jgd.checks import Count, admit, check_key, refuse, traceable
from jgd.diagnosis import sharpness
from jgd.lanes import check_numbers
from jgd.trees import like

__all__ = [
    "Run",
    "Task",
    "TrainState",
    "check_task",
    "minibatches",
    "start",
    "supervised",
    "train",
    "with_sharpness",
]


class Task(NamedTuple):
    """Supervised learning, as four functions.

    A callable that contains arrays should be a pytree (`jax.tree_util.Partial(f, data)`, or the
    result of `minibatches`), so that the data are arguments of the compiled program and not
    constants.
    """

    init: Callable[..., Any]
    """key -> params; or (params, model_state) if `loss` has the full form."""
    loss: Callable[..., Any]
    """(params, batch) -> loss; or the full form (params, model_state, batch, key, setting) ->
    (loss, (metrics, model_state)), for batch norm, dropout and settings beyond the optimizer."""
    batch: Callable[..., Any]
    """step -> batch, the same for every setting, for example from `minibatches` or `stream`."""
    evaluate: Callable[..., Any]
    """params -> dict of scalars, on held-out data; may take (params, model_state) or
    (params, model_state, setting)."""


class Run(NamedTuple):
    """A training run as pure functions, for any kind of training.

        run = jgd.Run(init, update, evaluate, batch)
        result = jgd.sweep(run, settings, steps=1000)

    The state is any pytree of arrays and random keys, so that a run can also train on an
    environment in place of data, or train two networks or a population.
    """

    init: Callable[..., Any]
    """(setting, key) -> state; with `begin`, (setting, key, result of `begin`) -> state."""
    update: Callable[[Any, Any, Any], tuple[Any, dict[str, Any]]]
    """(setting, state, batch) -> (state, metrics). The metrics are a dict with the scalar "loss".
    If it also has "stride", |g . u|, the verdict can distinguish steps that are too long from noisy
    batches."""
    evaluate: Callable[[Any, Any], dict[str, Any]]
    """(setting, state) -> dict of scalars, called at each report."""
    batch: Callable[..., Any]
    """step -> batch, or (step, seed=None) -> batch if each seed may have its own order."""
    begin: Callable[[jax.Array], Any] | None = None
    """Optional: key -> the initial values that all settings of a seed share, such as parameters. It
    is called once per seed."""
    verdict: bool = True
    """True (default) judges the loss curve. False, for example for a policy gradient, leaves the
    verdicts out of the table of a sweep."""


def check_task(function: str, task: Any, *kinds: type[Any]) -> None:
    """Raise TypeError unless `task` is of one of these classes and its fields are functions."""
    if not isinstance(task, kinds):
        hint = ". Call it" if callable(task) else ""
        refuse(f"{function}: task", " or ".join(f"a jgd.{k.__name__}" for k in kinds), task, hint)
    for name, field in task._asdict().items():
        if name == "verdict":
            admit(f"{function}: verdict of the run", field, bool)
        elif not callable(field) and (name, field) != ("begin", None):
            refuse(f"{function}: {name} of the task", "a function", field)


def start(run: Run, setting: Any, key: jax.Array) -> Any:
    """Return the initial state of a run."""
    return run.init(setting, key, *(() if run.begin is None else (run.begin(key),)))


class TrainState(NamedTuple):
    """State of a supervised run."""

    params: Any
    opt_state: Any
    model_state: Any  # None if the loss has the short form
    key: Any  # split at each step; None if the loss has the short form


def _is_transformation(x: Any) -> bool:
    return isinstance(x, optax.GradientTransformation)


def optimizer_of(setting: Any) -> optax.GradientTransformationExtraArgs:
    """Return the one optimizer in a setting."""
    nodes = jax.tree.leaves(setting, is_leaf=_is_transformation)
    found = [node for node in nodes if _is_transformation(node)]
    if len(found) != 1:
        raise TypeError(
            f"a setting must hold exactly one optimizer, got {len(found)}. For several optimizers,"
            " pass `sweep` a dict with one batch of settings per name"
        )
    return optax.with_extra_args_support(found[0])


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2


def _arity(f: Callable[..., Any]) -> int:
    """Return the number of positional arguments of a function that have no default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(f).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def supervised(task: Task) -> Run:
    """Return the training run of a task, which updates by mini-batch gradients.

    The `update` of the setting's optimizer receives the extra arguments `value`, `grad`,
    `value_fn`, `grad_fn` and `obj_fn`. The last three are functions of the parameters with the
    batch, key and model state of the step; `obj_fn` is `value_fn`. Line searches, `sophia` and
    `momo` need some of these. A function that is not called costs nothing.

    Raises: TypeError if `task` is not a `Task`, or `loss` takes neither 2 nor 5 arguments.
    """
    check_task("supervised", task, Task)
    arity = _arity(task.loss)
    if arity not in (2, 5):
        raise TypeError(
            "loss must take (params, batch) or (params, model_state, batch, key, setting), got a"
            f" function of {arity} arguments"
        )
    full, evaluate_arity = arity == 5, min(max(_arity(task.evaluate), 1), 3)

    def loss_of(*arguments: Any) -> Any:
        result = task.loss(*arguments)
        if full and not (_is_pair(result) and _is_pair(result[1])):
            refuse("loss", "a function that returns (loss, (metrics, model_state))", result)
        loss = result[0] if full else result
        if not is_number(loss) or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            refuse("loss", "a function that returns a real scalar", loss)
        if shape := jnp.shape(loss):
            raise TypeError(
                f"loss must return a scalar, got an array of shape {shape}. Take its mean"
            )
        return result

    def begin(key: jax.Array) -> Any:
        return task.init(jax.random.split(key)[0])

    def init(setting: Any, key: jax.Array, initial: Any) -> TrainState:
        step_key = jax.random.split(key)[1]
        if full and not _is_pair(initial):
            refuse("init", "a function that returns (params, model_state)", initial)
        params, model_state = initial if full else (initial, None)
        for leaf in jax.tree.leaves(params):
            if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact):
                refuse("init", "a function that returns floating-point parameters", leaf)
        opt_state = optimizer_of(setting).init(params)
        return TrainState(params, opt_state, model_state, step_key if full else None)

    def update(
        setting: Any, state: TrainState, batch: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        params, opt_state, model_state, key = state
        if full:
            key, loss_key = jax.random.split(key)
            fixed = (model_state, batch, loss_key, setting)
            value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
            (loss, (metrics, model_state)), grads = value_and_grad(params, *fixed)
        else:
            metrics: Mapping[str, Any] = {}
            fixed = (batch,)
            loss, grads = jax.value_and_grad(loss_of)(params, batch)

        # Optax's line searches reject extra arguments that `value_fn` does not name. The cast is
        # needed since optimizers compute in float32, but the model in its parameters' dtypes.
        def value_fn(at: optax.Params, grad_fn: Any = None, obj_fn: Any = None) -> jax.Array:
            result = loss_of(like(at, params), *fixed)
            return result[0] if full else result

        def grad_fn(at: optax.Params, *_: Any) -> optax.Updates:
            return jax.grad(value_fn)(at)

        functions = dict(value_fn=value_fn, grad_fn=grad_fn, obj_fn=value_fn)
        updates, opt_state = optimizer_of(setting).update(
            grads, opt_state, params, value=loss, grad=grads, **functions
        )
        # Sums of products are cheaper than dot products where lanes are batched.
        products = jax.tree.map(lambda g, u: jnp.sum(jnp.real(jnp.conj(g) * u)), grads, updates)
        stride = jnp.abs(jax.tree.reduce(jnp.add, products))
        params = optax.apply_updates(params, updates)
        state = TrainState(params, opt_state, model_state, key)
        return state, {**metrics, "loss": loss, "stride": stride}

    def evaluate(setting: Any, state: TrainState) -> dict[str, Any]:
        return task.evaluate(*(state.params, state.model_state, setting)[:evaluate_arity])

    return Run(init, update, evaluate, task.batch, begin)


def with_sharpness(task: Task, batch: Any = None, iterations: int = 20) -> Run:
    """Return the training run of a task that also reports the "sharpness" of its training loss.

    Each report costs as much as `2 * iterations` steps. `jgd.tuning.plots.plot_sharpness` plots the
    sharpness against 2 / learning_rate, the edge beyond which gradient descent oscillates.

    Args:
      task: a `Task`.
      batch: the batch on which the sharpness is computed. None (default): the task's first batch.
      iterations: see `jgd.diagnosis.sharpness`.
    """
    check_task("with_sharpness", task, Task)
    iterations = admit("with_sharpness: iterations", iterations, Count)
    run, full = supervised(task), _arity(task.loss) == 5
    batch = task.batch(0) if batch is None else batch

    def evaluate(setting: Any, state: TrainState) -> dict[str, Any]:
        def loss(params: Any) -> jax.Array:
            if full:
                return task.loss(params, state.model_state, batch, state.key, setting)[0]
            return task.loss(params, batch)

        eigenvalue = sharpness(loss, state.params, jax.random.key(0), iterations)
        return {**run.evaluate(setting, state), "sharpness": eigenvalue}

    return run._replace(evaluate=evaluate)


# --- batches ---------------------------------------------------------------------------------


def minibatches(data: Any, batch_size: int | None, key: jax.Array) -> Callable[[Any], Any]:
    """Return a function step -> batch, which visits the examples in a new order in each epoch.

    Args:
      data: a pytree of arrays whose leading axis counts the n examples.
      batch_size: number of examples per batch. None: every batch is all data in the given order.
        An epoch has floor(n / batch_size) steps. It leaves out the remaining examples, which differ
        from epoch to epoch.
      key: random key of the orders, one permutation per epoch.

    Returns: a callable pytree whose leaves are the data and the key, so that the data are an
      argument of a compiled function and not a constant. With a batch size it also accepts
      (step, seed=seed); each int seed has its own orders.
    Raises: ValueError for arrays of different lengths, or a batch size outside 1 to n.
    """
    check_numbers("minibatches", data, "data")
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(
            f"minibatches: data must have one leading length, got {sorted(sum(sizes, ()))}"
        )
    ((examples,),) = sizes
    data = jax.tree.map(jnp.asarray, data)
    if batch_size is None:
        return jax.tree_util.Partial(_full_batch, data)
    size: int = admit("minibatches: batch_size", batch_size, int)
    check_key("minibatches: key", key)
    if not 1 <= size <= examples:
        raise ValueError(f"minibatches: batch_size must be in 1 to {examples}, got {size}")
    return jax.tree_util.Partial(_Minibatch(size), data, key)


def _full_batch(data: Any, step: Any) -> Any:
    return data


class _Minibatch(NamedTuple):
    batch_size: int

    def __call__(self, data: Any, key: jax.Array, step: Any, seed: Any = None) -> Any:
        if seed is not None:
            # The split makes the key of a seed differ from the keys of the epochs.
            key = jax.random.split(jax.random.fold_in(key, seed))[1]
        examples = len(jax.tree.leaves(data)[0])
        epoch, index = jnp.divmod(step, examples // self.batch_size)
        order = jax.random.permutation(jax.random.fold_in(key, epoch), examples)
        chosen = jax.lax.dynamic_slice_in_dim(order, index * self.batch_size, self.batch_size)
        return jax.tree.map(lambda x: x[chosen], data)


# --- training of one setting -----------------------------------------------------------------


def train(
    task: Task | Run, setting: Any, steps: int, key: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """Train one setting alone, as one compiled scan.

    Args:
      task: a `Task`, or any `Run`.
      setting: an optimizer, or a pytree of one optimizer and other numbers. New values of the
        numbers do not compile again, and `jax.vmap` over the setting trains a batch.
      steps: number of steps, at least 1.
      key: random key of the initial parameters and, if the loss has the full form, of each step.

    Returns:
      The trained parameters (for a `Run`, the final state) and the history, a dict of arrays over
      the steps with the training loss under "loss" and the other metrics of the loss.
      `train(supervised(task), ...)` returns the whole state of a task, including the model state
      and the optimizer state.
    Raises: ValueError for steps below 1, TypeError for an optimizer that is not a pytree of its
      numbers.
    """
    check_task("train", task, Task, Run)
    check_numbers("train", setting)
    steps = admit("train: steps", steps, Count)
    check_key("train: key", key)
    with traceable("train: each function of the task"):
        return _train(Static(steps), _as_arguments(task), setting, key)


def _as_arguments(task: Any) -> Any:
    """Return a task as a jit argument: callable pytrees keep their leaves, functions are static."""
    as_static = lambda f: Static(f) if jax.tree_util.all_leaves([f]) else f
    return type(task)(*map(as_static, task))


def from_arguments(task: Any) -> Any:
    """Return the task of a result of `_as_arguments`."""
    return type(task)(*(f.value if isinstance(f, Static) else f for f in task))


@functools.partial(jax.jit, static_argnums=0)
def _train(steps: Static, task: Any, setting: Any, key: jax.Array) -> Any:
    task = from_arguments(task)
    run = task if isinstance(task, Run) else supervised(task)

    def step(state: Any, index: Any) -> tuple[Any, dict[str, Any]]:
        state, metrics = run.update(setting, state, run.batch(index))
        return state, {name: x for name, x in metrics.items() if name != "stride"}

    state, history = jax.lax.scan(step, start(run, setting, key), jnp.arange(steps.value))
    return (state.params if isinstance(task, Task) else state), history
