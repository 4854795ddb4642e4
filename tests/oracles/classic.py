"""Gradient descent, momentum, AdaGrad, RMSProp and the family of Adam."""

import numpy as np


def _average(b, start=0.0):
    memory = {"a": start, "weight": 1.0}

    def step(x):
        memory["a"] = b * memory["a"] + (1 - b) * x
        memory["weight"] *= b
        return memory["a"], 1 - memory["weight"]

    return step


def sgd(learning_rate, momentum=None, nesterov=False):
    v = [0.0]

    def step(g, p):
        if momentum is None:
            return -learning_rate * g
        v[0] = momentum * v[0] + g
        return -learning_rate * (g + momentum * v[0] if nesterov else v[0])

    return step


def momentum(learning_rate, momentum=0.9):
    return sgd(learning_rate, momentum)


def nesterov(learning_rate, momentum=0.9):
    return sgd(learning_rate, momentum, True)


def adagrad(learning_rate, initial_accumulator_value=0.1, eps=1e-7):
    s = [initial_accumulator_value]

    def step(g, p):
        s[0] = s[0] + g * g
        root = np.sqrt(s[0] + eps)
        return -learning_rate * np.divide(g, root, out=np.zeros_like(g + root), where=root != 0)

    return step


def rmsprop(
    learning_rate,
    decay=0.9,
    eps=1e-8,
    initial_scale=0.0,
    eps_in_sqrt=True,
    centered=False,
    momentum=None,
    nesterov=False,
    bias_correction=False,
):
    squares, mean, velocity = _average(decay, initial_scale), _average(decay), [0.0]

    def step(g, p):
        v, c = squares(g * g)
        m, _ = mean(g)
        if bias_correction:
            v, m = v / c, m / c
        if centered:
            v = v - m * m
        u = -learning_rate * g / (np.sqrt(v + eps) if eps_in_sqrt else np.sqrt(v) + eps)
        if momentum is None:
            return u
        velocity[0] = momentum * velocity[0] + u
        return u + momentum * velocity[0] if nesterov else velocity[0]

    return step


def adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=False):
    first, second, t = _average(b1), _average(b2), [0]

    def step(g, p):
        t[0] += 1
        m, c1 = first(g)
        v, c2 = second(g * g)
        m_hat = m / c1
        if nesterov:
            m_hat = b1 * m / (1 - b1 ** (t[0] + 1)) + (1 - b1) * g / c1
        return -learning_rate * m_hat / (np.sqrt(v / c2 + eps_root) + eps)

    return step


def nadam(learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
    return adam(learning_rate, b1, b2, eps, eps_root, nesterov=True)


def adamw(
    learning_rate,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    weight_decay=1e-4,
    nesterov=False,
    independent_decay=False,
):
    plain = adam(learning_rate, b1, b2, eps, eps_root, nesterov)
    rate = 1.0 if independent_decay else learning_rate
    return lambda g, p: plain(g, p) - rate * weight_decay * p


def amsgrad(
    learning_rate,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    bias_correction_mu=True,
    bias_correction_nu=True,
):
    first, second, x = _average(b1), _average(b2), [0.0]

    def step(g, p):
        m, c1 = first(g)
        v, c2 = second(g * g)
        x[0] = np.maximum(x[0], v / c2 if bias_correction_nu else v)
        m_hat = m / c1 if bias_correction_mu else m
        return -learning_rate * m_hat / (np.sqrt(x[0] + eps_root) + eps)

    return step


def adamax(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    first, x = _average(b1), [0.0]

    def step(g, p):
        m, c1 = first(g)
        x[0] = np.maximum(b2 * x[0], np.abs(g) + eps)
        return -learning_rate * (m / c1) / x[0]

    return step
