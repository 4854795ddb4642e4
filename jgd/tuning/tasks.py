"""The task of `jgd sweep`: scikit-learn's handwritten digits and a small network."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import sklearn.datasets

from jgd.training import Task, minibatches

__all__ = ["digits"]


def digits(batch_size: int | None = 128, hidden: int = 64) -> Task:
    """Return a task on 1797 images of digits, 8 x 8 pixels each, of which 450 are held out.

    It trains a network 64-hidden-10 with rectified linear units on the cross-entropy, and reports
    "accuracy" and "loss" on the held-out images. The data come with scikit-learn; nothing is
    downloaded.

    Args:
      batch_size: images per batch. None: all images in each batch.
      hidden: width of the hidden layer.
    """
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    order = jax.random.permutation(jax.random.key(0), len(labels))
    images = jnp.asarray(images / 16, jnp.float32)[order]
    labels = jnp.asarray(labels, jnp.int32)[order]
    held_out = 450
    evaluate = jax.tree_util.Partial(_evaluate, images[:held_out], labels[:held_out])
    train = (images[held_out:], labels[held_out:])
    sizes = (images.shape[1], hidden, 10)
    init = functools.partial(_init, sizes)
    return Task(init, _loss, minibatches(train, batch_size, jax.random.key(1)), evaluate)


def _init(sizes: tuple[int, ...], key: jax.Array) -> list[dict[str, jax.Array]]:
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        key, layer_key = jax.random.split(key)
        scale = jnp.sqrt(2 / fan_in)
        weight = scale * jax.random.normal(layer_key, (fan_in, fan_out))

        layers.append({"weight": weight, "bias": jnp.zeros(fan_out)})
    return layers


def _logits(params: list[dict[str, jax.Array]], images: jax.Array) -> jax.Array:
    *hidden, last = params
    for layer in hidden:
        images = jax.nn.relu(images @ layer["weight"] + layer["bias"])
    return images @ last["weight"] + last["bias"]


def _loss(params: Any, batch: Any) -> jax.Array:
    images, labels = batch
    logits = _logits(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _evaluate(images: jax.Array, labels: jax.Array, params: Any) -> dict[str, jax.Array]:
    logits = _logits(params, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"accuracy": (logits.argmax(-1) == labels).mean(), "loss": losses.mean()}
