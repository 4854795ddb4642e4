"""Training runs as pure pairs, and the supervised task behind most of them.

A run is to training what a transformation is to updates:

    init(setting, key) -> state             update(setting, state, batch) -> (state, metrics)
    evaluate(setting, state) -> metrics

The setting is any pytree of numbers: an optimizer, or a tuple or dict of one and other numbers
(a dropout rate, the strength of a penalty). The sweep's driver knows nothing but such runs; a
`Task` is the adapter for supervised learning, and `train` runs one setting alone.
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

    Callables that hold arrays should be pytrees of them (`jax.tree_util.Partial(f, data)`, or what
    `minibatches` gives): then the data are arguments of the compiled program, not constants in it.
    """

    init: Callable[..., Any]
    """key -> params; or (params, model_state) if `loss` has the full form."""
    loss: Callable[..., Any]
    """(params, batch) -> loss; or the full form (params, model_state, batch, key, setting) ->
    (loss, (metrics, model_state)), for batch norm, dropout and settings beyond the optimizer."""
    batch: Callable[..., Any]
    """step -> batch, the same for every setting; `minibatches` makes one, `stream` another."""
    evaluate: Callable[..., Any]
    """params -> dict of scalars, on held-out data; may take (params, model_state) or
    (params, model_state, setting)."""


class Run(NamedTuple):
    """A training run: all that the driver of a sweep knows. Any training can be one.

        run = jgd.Run(init, update, evaluate, batch)
        result = jgd.sweep(run, settings, steps=1000)

    All four are pure; the state is any pytree of arrays, random keys among them: an environment in
    place of data, two networks, a population.
    """

    init: Callable[..., Any]
    """(setting, key) -> state; with `begin`, (setting, key, what it returned) -> state."""
    update: Callable[[Any, Any, Any], tuple[Any, dict[str, Any]]]
    """(setting, state, batch) -> (state, metrics): a dict with the scalar "loss"; where it has
    "stride", |g . u|, the verdict can tell steps that are too long from batches that are noisy."""
    evaluate: Callable[[Any, Any], dict[str, Any]]
    """(setting, state) -> dict of scalars, at each report."""
    batch: Callable[..., Any]
    """step -> batch, or (step, seed=None) -> batch where seeds may have an order of their own."""
    begin: Callable[[jax.Array], Any] | None = None
    """Optional: key -> what all settings of a seed begin with, such as parameters: made once."""
    verdict: bool = True
    """Whether the loss says how a run went. False, as for the loss of a policy gradient: the table
    of a sweep then has no verdicts."""


def check_task(function: str, task: Any, *kinds: type[Any]) -> None:
    """Raise TypeError unless `task` is of one of these classes, and its fields are functions."""
    if not isinstance(task, kinds):
        cure = ". Call it" if callable(task) else ""
        refuse(f"{function}: task", " or ".join(f"a jgd.{k.__name__}" for k in kinds), task, cure)
    for name, field in task._asdict().items():
        if name == "verdict":
            admit(f"{function}: verdict of the run", field, bool)
        elif not callable(field) and (name, field) != ("begin", None):
            refuse(f"{function}: {name} of the task", "a function", field)


def start(run: Run, setting: Any, key: jax.Array) -> Any:
    """The state that a run begins with."""
    return run.init(setting, key, *(() if run.begin is None else (run.begin(key),)))


class TrainState(NamedTuple):
    """State of a supervised run."""

    params: Any
    opt_state: Any
    model_state: Any  # None in the short form
    key: Any  # split at each step; None in the short form


def _is_transformation(x: Any) -> bool:
    return isinstance(x, optax.GradientTransformation)


def optimizer_of(setting: Any) -> optax.GradientTransformationExtraArgs:
    """The one optimizer in a setting."""
    nodes = jax.tree.leaves(setting, is_leaf=_is_transformation)
    found = [node for node in nodes if _is_transformation(node)]
    if len(found) != 1:
        raise TypeError(
            f"a setting must hold exactly one optimizer, got {len(found)}. A sweep takes a dict for"
            " batches of settings by name"
        )
    return optax.with_extra_args_support(found[0])


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2


def _arity(f: Callable[..., Any]) -> int:
    """How many positional arguments a function takes without help."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(f).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def supervised(task: Task) -> Run:
    """Return the training run of a task: mini-batch gradients into the setting's optimizer.

    The optimizer's `update` is given the extra arguments `value` and `grad`, and the functions of
    the parameters `value_fn`, `grad_fn` and `obj_fn` (that is `value_fn`), in which batch, key and
    model state are those of the step. Line searches, `sophia` and `momo` need some of them; a
    function that is not called costs nothing.

    Raises: TypeError if `task` is no `Task`, or `loss` takes neither 2 nor 5 arguments.
    """
    check_task("supervised", task, Task)
    arity = _arity(task.loss)
    if arity not in (2, 5):
        raise TypeError(
            "loss must take (params, batch) or (params, model_state, batch, key, setting), got a"
            f" function of {arity} arguments"
        )
    full, seen = arity == 5, min(max(_arity(task.evaluate), 1), 3)

    def loss_of(*arguments: Any) -> Any:
        found = task.loss(*arguments)
        if full and not (_is_pair(found) and _is_pair(found[1])):
            refuse("loss", "a function that returns (loss, (metrics, model_state))", found)
        loss = found[0] if full else found
        if not is_number(loss) or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            refuse("loss", "a function that returns a real scalar", loss)
        if shape := jnp.shape(loss):
            raise TypeError(
                f"loss must return a scalar, got an array of shape {shape}. Take its mean"
            )
        return found

    def begin(key: jax.Array) -> Any:
        return task.init(jax.random.split(key)[0])

    def init(setting: Any, key: jax.Array, made: Any) -> TrainState:
        step_key = jax.random.split(key)[1]
        if full and not _is_pair(made):
            refuse("init", "a function that returns (params, model_state)", made)
        params, model_state = made if full else (made, None)
        for leaf in jax.tree.leaves(params):
            if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact):
                refuse("init", "a function that returns parameters of floats", leaf)
        opt_state = optimizer_of(setting).init(params)
        return TrainState(params, opt_state, model_state, step_key if full else None)

    def update(
        setting: Any, state: TrainState, batch: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        params, opt_state, model_state, key = state
        if full:
            key, now = jax.random.split(key)
            fixed = (model_state, batch, now, setting)
            value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
            (loss, (metrics, model_state)), grads = value_and_grad(params, *fixed)
        else:
            metrics: Mapping[str, Any] = {}
            fixed = (batch,)
            loss, grads = jax.value_and_grad(loss_of)(params, batch)

        # Optax's line searches refuse extra arguments that `value_fn` does not name. Optimizers
        # compute in float32, the model in the dtypes of its parameters.
        def value_fn(at: optax.Params, grad_fn: Any = None, obj_fn: Any = None) -> jax.Array:
            result = loss_of(like(at, params), *fixed)
            return result[0] if full else result

        def grad_fn(at: optax.Params, *_: Any) -> optax.Updates:
            return jax.grad(value_fn)(at)

        functions = dict(value_fn=value_fn, grad_fn=grad_fn, obj_fn=value_fn)
        updates, opt_state = optimizer_of(setting).update(
            grads, opt_state, params, value=loss, grad=grads, **functions
        )
        # sums of products: cheaper than dots where lanes are batched
        products = jax.tree.map(lambda g, u: jnp.sum(jnp.real(jnp.conj(g) * u)), grads, updates)
        stride = jnp.abs(jax.tree.reduce(jnp.add, products))
        params = optax.apply_updates(params, updates)
        state = TrainState(params, opt_state, model_state, key)
        return state, {**metrics, "loss": loss, "stride": stride}

    def evaluate(setting: Any, state: TrainState) -> dict[str, Any]:
        return task.evaluate(*(state.params, state.model_state, setting)[:seen])

    return Run(init, update, evaluate, task.batch, begin)


def with_sharpness(task: Task, batch: Any = None, iterations: int = 20) -> Run:
    """The training run of a task that also reports the "sharpness" of its training loss.

    It costs as much as `2 * iterations` steps at each report. `jgd.tuning.plots.plot_sharpness`
    draws it against 2 / learning_rate, the edge beyond which gradient descent oscillates.

    Args:
      batch: what the loss is taken on; None: the task's first batch.
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

        found = sharpness(loss, state.params, jax.random.key(0), iterations)
        return {**run.evaluate(setting, state), "sharpness": found}

    return run._replace(evaluate=evaluate)


# --- batches ---------------------------------------------------------------------------------


def minibatches(data: Any, batch_size: int | None, key: jax.Array) -> Callable[[Any], Any]:
    """step -> batch: the examples in a new order each epoch.

    Args:
      data: a pytree of arrays whose leading axis counts the n examples.
      batch_size: None is full batch, every example in its place at every step; 1 is one example.
        An epoch has floor(n / batch_size) steps: the examples left over sit out that epoch, other
        ones in the next.
      key: of the orders, one permutation per epoch.

    Returns: a callable pytree, whose leaves are the data and the key: passed to a compiled function
      the data are an argument, not a constant. With a batch size it may be called as
      (step, seed=seed): each seed, an int, has orders of its own.
    Raises: ValueError for arrays of unlike lengths, or a batch size outside 1 to n.
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
            key = jax.random.split(jax.random.fold_in(key, seed))[1]  # apart from the epochs' keys
        examples = len(jax.tree.leaves(data)[0])
        epoch, place = jnp.divmod(step, examples // self.batch_size)
        order = jax.random.permutation(jax.random.fold_in(key, epoch), examples)
        chosen = jax.lax.dynamic_slice_in_dim(order, place * self.batch_size, self.batch_size)
        return jax.tree.map(lambda x: x[chosen], data)


# --- one setting alone -----------------------------------------------------------------------


def train(
    task: Task | Run, setting: Any, steps: int, key: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """Train one setting alone, as one compiled scan.

    Args:
      task: a `Task`, or any `Run`.
      setting: an optimizer, or a pytree of one and other numbers. Other numbers do not compile
        again, and `jax.vmap` over the setting trains a batch.
      steps: how many, at least 1.
      key: of the initial parameters and, in the full form of the loss, of dropout and the like.

    Returns:
      The trained parameters (the final state, for a `Run` that is no task), and the history: a
      dict of arrays over the steps, with the training loss under "loss" and all that the loss
      reports. `train(supervised(task), ...)` gives the whole state of a task instead, with the
      statistics of its batch norms and the memory of its optimizer.
    Raises: ValueError for no steps, TypeError for an optimizer that is no pytree of its numbers.
    """
    check_task("train", task, Task, Run)
    check_numbers("train", setting)
    steps = admit("train: steps", steps, Count)
    check_key("train: key", key)
    with traceable("train: each function of the task"):
        return _train(Static(steps), _as_arguments(task), setting, key)


def _as_arguments(task: Any) -> Any:
    """A task as a jit argument: its callable pytrees keep their leaves, functions are structure."""
    hide = lambda f: Static(f) if jax.tree_util.all_leaves([f]) else f
    return type(task)(*map(hide, task))


def from_arguments(task: Any) -> Any:
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
