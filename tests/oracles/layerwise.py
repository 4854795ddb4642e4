"""Rules with a number or a factor per array: norms, second moments of layers, rows and columns."""

import numpy as np

from .classic import _average


def _trust(p, u, min_norm=0.0, eps=0.0):
    a, b = (max(np.linalg.norm(x), min_norm) for x in (p, u))
    return a / (b + eps) if a and b else None


# You et al. 2020, algorithm 2, with phi(x) = x
def lamb(learning_rate, b1=0.9, b2=0.999, eps=1e-6, eps_root=0.0, weight_decay=0.0):
    first, second = _average(b1), _average(b2)

    def step(g, p):
        m, c1 = first(g)
        v, c2 = second(g * g)
        u = (m / c1) / (np.sqrt(v / c2 + eps_root) + eps) + weight_decay * p
        ratio = _trust(p, u)
        return -learning_rate * (1.0 if ratio is None else ratio) * u

    return step


# You, Gitman & Ginsburg 2017; the norm is that of the decayed gradient, no ratio at a zero norm
def lars(
    learning_rate,
    weight_decay=0.0,
    trust_coefficient=0.001,
    eps=0.0,
    momentum=0.9,
    nesterov=False,
):
    v = [0.0]

    def step(g, p):
        g = g + weight_decay * p
        ratio = _trust(p, g, eps=eps)
        u = learning_rate * (1.0 if ratio is None else trust_coefficient * ratio) * g
        v[0] = momentum * v[0] + u
        return -(u + momentum * v[0]) if nesterov else -v[0]

    return step


# Bernstein et al. 2020, algorithm 1
def fromage(learning_rate, min_norm=1e-6):
    def step(g, p):
        ratio = _trust(p, g, min_norm)
        moved = p - learning_rate * (1.0 if ratio is None else ratio) * g
        return moved / np.sqrt(1 + learning_rate**2) - p

    return step


# Ginsburg et al. 2019, algorithm 1
def novograd(learning_rate, b1=0.9, b2=0.25, eps=1e-6, eps_root=0.0, weight_decay=0.0):
    memory = {}

    def step(g, p):
        square = np.sum(g * g)
        memory["v"] = b2 * memory["v"] + (1 - b2) * square if memory else square
        u = g / (np.sqrt(memory["v"] + eps_root) + eps) + weight_decay * p
        memory["m"] = b1 * memory.get("m", 0.0) + u
        return -learning_rate * memory["m"]

    return step


# Anil et al. 2019, algorithm SM3-II, eps 1e-8 in the root; a scalar is AdaGrad's
def sm3(learning_rate, momentum=0.9):
    sums, average = {}, _average(momentum)

    def step(g, p):
        g, axes = np.asarray(g), range(max(np.ndim(g), 1))
        others = {i: tuple(j for j in range(np.ndim(g)) if j != i) for i in axes}
        nu = g * g + (np.minimum.reduce(np.broadcast_arrays(*sums.values())) if sums else 0.0)
        sums.update({i: np.max(nu, axis=others[i], keepdims=True) for i in axes})
        u = np.divide(g, np.sqrt(nu + 1e-8), out=np.zeros_like(g), where=nu > 0)
        return -learning_rate * average(u)[0]

    return step


# Shazeer & Stern 2018, algorithms 4 and 5; the two largest axes are factored
def adafactor(
    learning_rate=None,
    min_dim_size_to_factor=128,
    decay_rate=0.8,
    decay_offset=0,
    multiply_by_parameter_scale=True,
    clipping_threshold=1.0,
    momentum=None,
    dtype_momentum=None,
    weight_decay_rate=None,
    eps=1e-30,
    factored=True,
):
    memory = {"t": 0, "rows": 0.0, "columns": 0.0, "v": 0.0}
    average = _average(momentum) if momentum is not None else None

    def step(g, p):
        memory["t"] += 1
        b = 1 - (memory["t"] - decay_offset) ** -decay_rate
        s = g * g + eps
        order = np.argsort(np.shape(g), kind="stable")
        if factored and np.ndim(g) > 1 and np.shape(g)[order[-2]] >= min_dim_size_to_factor:
            small, large = order[-2], order[-1]
            rows = memory["rows"] = b * memory["rows"] + (1 - b) * s.mean(large, keepdims=True)
            columns = b * memory["columns"] + (1 - b) * s.mean(small, keepdims=True)
            memory["columns"] = columns
            v = rows * columns / rows.mean(small, keepdims=True)
        else:
            v = memory["v"] = b * memory["v"] + (1 - b) * s
        u = g / np.sqrt(v)
        if clipping_threshold is not None:
            u = u / max(1.0, np.sqrt(np.mean(u * u)) / clipping_threshold)
        if learning_rate is not None:
            u = learning_rate * u
        if multiply_by_parameter_scale:
            u = max(np.sqrt(np.mean(p * p)), 1e-3) * u
        if average is not None:
            u, _ = average(u)
        if weight_decay_rate is not None:
            u = u + weight_decay_rate * p
        return -u

    return step
