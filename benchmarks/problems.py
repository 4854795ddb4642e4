"""Four small tasks for comparing optimizers: digits, sparse features, recall and regression.

Each is a `jgd.Task` whose `evaluate` reports "validation" and "test"; lower is better.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import jgd
import jgd.tuning.tasks

HELD_OUT = ("validation", "test")


class Problem(NamedTuple):
    """A task with its number of steps and the format of its results."""

    make: Callable[[], jgd.Task]
    steps: int
    title: str
    measure: str  # name of the quantity that "test" reports
    target: float
    edge: float  # right edge of the picture, where worse values are drawn
    log: bool  # True for a logarithmic axis
    digits: int  # decimals in the table


def digits() -> jgd.Task:
    """Return the task on scikit-learn's digits: 897 for training, 400 for validation, 500 for test.

    The model is the 64-64-10 network of `jgd sweep`; batches of 64 are drawn with replacement. The
    measure is the error in per cent; the cross-entropy decides between rates with equal errors.
    """
    network = jgd.tuning.tasks.digits()
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = jnp.asarray(images / 16, jnp.float32)[order]
    labels = jnp.asarray(labels, jnp.int32)[order]
    split = lambda begin, end: (images[begin:end], labels[begin:end])
    validation, test, train = split(0, 400), split(400, 900), split(900, None)

    def loss(
        data: Any, params: Any, _: Any, batch: Any, key: jax.Array, setting: Any
    ) -> tuple[Any, Any]:
        rows = jax.random.bits(key, (64,)) % len(data[1])
        return network.loss(params, (data[0][rows], data[1][rows])), ({}, None)

    def evaluate(validation: Any, test: Any, params: Any) -> dict[str, Any]:
        tuning, final = (network.evaluate.func(*data, params) for data in (validation, test))
        return {
            "validation": 100 * (1 - tuning["accuracy"]),
            "loss": tuning["loss"],
            "test": 100 * (1 - final["accuracy"]),
        }

    return jgd.Task(
        init=lambda key: (network.init(key), None),
        loss=jax.tree_util.Partial(loss, train),
        batch=lambda step: (),
        evaluate=jax.tree_util.Partial(evaluate, validation, test),
    )


def sparse(words: int = 2000, length: int = 20) -> jgd.Task:
    """Return a logistic regression on bags of words in which rare words are more informative.

    A bag has 20 of 2,000 words; word j has a frequency proportional to 1 / j. Labels are drawn from
    a teacher whose weights grow like sqrt(j). Every batch of 8 is new. The measure is the excess of
    the loss over the teacher's, on 2,000 bags.
    """
    rank = np.arange(1, words + 1)
    weights = np.random.default_rng(0).normal(size=words) * 2 * np.sqrt(rank / words)
    teacher = {"weight": jnp.asarray(weights, jnp.float32), "bias": jnp.zeros(())}

    def bags(key: jax.Array, n: int) -> jax.Array:
        uniform = jax.random.uniform(key, (n, length))
        return jnp.exp(uniform * math.log(words + 1)).astype(jnp.int32) - 1  # the quantile of 1 / j

    def logits(params: Any, bag: jax.Array) -> jax.Array:
        return params["weight"][bag].sum(-1) + params["bias"]

    def init(key: jax.Array) -> tuple[Any, None]:
        return {"weight": 0.01 * jax.random.normal(key, (words,)), "bias": jnp.zeros(())}, None

    def loss(
        teacher: Any, params: Any, _: Any, batch: Any, key: jax.Array, setting: Any
    ) -> tuple[Any, Any]:
        draws, coins = jax.random.split(key)
        bag = bags(draws, 8)
        labels = jax.random.uniform(coins, (8,)) < jax.nn.sigmoid(logits(teacher, bag))
        losses = optax.sigmoid_binary_cross_entropy(logits(params, bag), labels)
        return losses.mean(), ({}, None)

    def evaluate(teacher: Any, held_out: dict[str, jax.Array], params: Any) -> dict[str, Any]:
        def excess(bag: jax.Array) -> jax.Array:
            expected = jax.nn.sigmoid(logits(teacher, bag))
            loss = lambda p: optax.sigmoid_binary_cross_entropy(logits(p, bag), expected).mean()
            return loss(params) - loss(teacher)

        return {name: excess(bag) for name, bag in held_out.items()}

    held_out = {name: bags(jax.random.key(i), 2000) for i, name in enumerate(HELD_OUT)}
    return jgd.Task(
        init=init,
        loss=jax.tree_util.Partial(loss, teacher),
        batch=lambda step: (),
        evaluate=jax.tree_util.Partial(evaluate, teacher, held_out),
    )


def recall(words: int = 32, values: int = 16, pairs: int = 12, width: int = 24) -> jgd.Task:
    """Return a recall task: a sequence of words with values, then a word whose value is asked for.

    The model is one block of attention with 3,840 parameters. Every batch of 32 sequences is new.
    The measure is the cross-entropy on 500 sequences.
    """
    shapes = {
        "word": (words, width),
        "value": (values, width),
        "query": (width, width),
        "key": (width, width),
        "read": (width, width),
        "write": (width, width),
        "head": (width, values),
    }

    def sequences(key: jax.Array, n: int) -> tuple[jax.Array, ...]:
        uniform = jax.random.uniform(key, (n, words + pairs + 1))
        shown = jnp.argsort(uniform[:, :words], axis=-1)[:, :pairs]  # without repeated words
        shown_values = (uniform[:, words:-1] * values).astype(jnp.int32)
        index = (uniform[:, -1:] * pairs).astype(jnp.int32)
        at_index = lambda x: jnp.take_along_axis(x, index, axis=1)[:, 0]
        return shown, shown_values, at_index(shown), at_index(shown_values)

    def init(key: jax.Array) -> tuple[Any, None]:
        sizes = [math.prod(shape) for shape in shapes.values()]
        flat = jax.random.normal(key, (sum(sizes),)) / math.sqrt(width)
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        pairs = zip(shapes.items(), parts, strict=True)
        return {name: part.reshape(shape) for (name, shape), part in pairs}, None

    def cross_entropy(params: Any, data: tuple[jax.Array, ...]) -> jax.Array:
        shown, shown_values, query, answer = data
        pair, word = params["word"][shown] + params["value"][shown_values], params["word"][query]
        scores = jnp.einsum("nd,npd->np", word @ params["query"], pair @ params["key"])
        attention = jax.nn.softmax(scores / math.sqrt(width))
        read = jnp.einsum("np,npd->nd", attention, pair @ params["read"])
        hidden = word + read @ params["write"]
        hidden = hidden * jax.lax.rsqrt((hidden**2).mean(-1, keepdims=True) + 1e-6)
        logits = hidden @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()

    def loss(params: Any, _: Any, batch: Any, key: jax.Array, setting: Any) -> tuple[Any, Any]:
        return cross_entropy(params, sequences(key, 32)), ({}, None)

    def evaluate(held_out: dict[str, Any], params: Any) -> dict[str, Any]:
        return {name: cross_entropy(params, data) for name, data in held_out.items()}

    held_out = {name: sequences(jax.random.key(i), 500) for i, name in enumerate(HELD_OUT)}
    return jgd.Task(init, loss, lambda step: (), jax.tree_util.Partial(evaluate, held_out))


def regression(size: int = 48, rows: int = 128, condition: float = 1e4) -> jgd.Task:
    """Return linear least squares with a condition number of 10,000, full batches and no noise.

    Each seed has its own features, rotated at random so that no coordinate is an eigenvector. The
    measure is log10 of the squared error on other rows, relative to the error of zero weights.
    """
    spectrum = jnp.geomspace(1, condition**-0.5, size)

    def init(key: jax.Array) -> tuple[Any, Any]:
        normal = jax.random.normal(key, (size + 3 * rows + 1, size))
        rotation = jnp.linalg.qr(normal[:size])[0]
        # orthonormal columns, so that the condition number is exact in each of the three sets
        white = jnp.linalg.qr(normal[size:-1].reshape(3, rows, size) @ rotation)[0]
        features = math.sqrt(rows) * white * spectrum @ rotation.T
        solution = normal[-1]
        return {"weight": 0.1 * jnp.roll(solution, 1)}, (features, features @ solution)

    def error(params: Any, data: Any, part: int) -> jax.Array:
        features, targets = data
        return jnp.mean((features[part] @ params["weight"] - targets[part]) ** 2) / 2

    def loss(params: Any, data: Any, batch: Any, key: jax.Array, setting: Any) -> tuple[Any, Any]:
        return error(params, data, 0), ({}, data)

    def evaluate(params: Any, data: Any) -> dict[str, Any]:
        zero = jax.tree.map(jnp.zeros_like, params)
        log_ratio = lambda part: jnp.log10(error(params, data, part) / error(zero, data, part))
        return {"validation": log_ratio(1), "test": log_ratio(2)}

    return jgd.Task(init, loss, lambda step: (), evaluate)


PROBLEMS = {
    "digits": Problem(digits, 150, "digits", "test error, %", 6.0, 12.0, False, 1),
    "sparse": Problem(sparse, 1000, "sparse features", "excess test loss", 0.25, 0.36, False, 3),
    "recall": Problem(recall, 200, "recall", "test cross-entropy", 0.3, 3.0, True, 3),
    "regression": Problem(
        regression, 500, "regression", "log10 of error left", -3.0, 0.0, False, 2
    ),
}
