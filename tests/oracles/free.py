"""Rules that choose their own learning rate, or need no schedule."""

from collections import defaultdict

import numpy as np

from .classic import _average


def _dot(a, b):
    return sum(np.sum(a[k] * b[k]) for k in a)


def _distance(p, start):
    d = {k: p[k] - start[k] for k in p}
    return np.sqrt(_dot(d, d))


# Loizou et al. 2021 (sps), Garrigos et al. 2023 (sps+); optax scales the gradient before its norm
def polyak_sgd(max_learning_rate=1.0, scaling=1.0, f_min=0.0, eps=0.0, variant="sps"):
    def step(g, p, value):
        g = {k: scaling * x for k, x in g.items()}
        gap = max(value - f_min, 0.0) if variant == "sps+" else value - f_min
        square = _dot(g, g) + eps
        rate = min(gap / square, max_learning_rate) if square > np.finfo(float).eps else 0.0
        return {k: -rate * x for k, x in g.items()}

    return step


polyak_sgd.whole_tree = polyak_sgd.needs_value = True


# Mishchenko & Defazio 2023, algorithm 4, debiased
def prodigy(
    learning_rate=1.0,
    betas=(0.9, 0.999),
    beta3=None,
    eps=1e-8,
    estim_lr0=1e-6,
    estim_lr_coef=1.0,
    weight_decay=0.0,
    safeguard_warmup=False,
):
    (b1, b2), d0 = betas, estim_lr0
    b3 = np.sqrt(b2) if beta3 is None else beta3
    memory, start = {"t": 0, "d": d0, "r": 0.0}, {}
    m, v, s = defaultdict(float), defaultdict(float), defaultdict(float)

    def step(g, p):
        if not start:
            start.update({k: p[k] + 0.0 for k in p})
        memory["t"] += 1
        d = memory["d"]
        rate = d * learning_rate * np.sqrt(1 - b2 ** memory["t"]) / (1 - b1 ** memory["t"])
        gain = _dot(g, {k: start[k] - p[k] for k in p})
        memory["r"] = b3 * memory["r"] + d / d0 * rate * gain
        for k in g:
            m[k] = b1 * m[k] + (1 - b1) * d * g[k]
            v[k] = b2 * v[k] + (1 - b2) * (d * g[k]) ** 2
            s[k] = b3 * s[k] + d / d0 * (d if safeguard_warmup else rate) * g[k]
        size = sum(np.sum(np.abs(x)) for x in s.values())
        if size > 0:
            memory["d"] = d = max(d, estim_lr_coef * memory["r"] / size)
        return {k: -rate * (m[k] / (np.sqrt(v[k]) + d * eps) + weight_decay * p[k]) for k in g}

    return step


prodigy.whole_tree = True


# Defazio & Mishchenko 2023, the Adam variant, debiased
def dadapt_adamw(learning_rate=1.0, betas=(0.9, 0.999), eps=1e-8, estim_lr0=1e-6, weight_decay=0.0):
    (b1, b2), b3 = betas, np.sqrt(betas[1])
    memory = {"t": 0, "d": estim_lr0, "r": 0.0}
    m, v, s = defaultdict(float), defaultdict(float), defaultdict(float)

    def step(g, p):
        memory["t"] += 1
        d = memory["d"]
        rate = d * learning_rate * np.sqrt(1 - b2 ** memory["t"]) / (1 - b1 ** memory["t"])
        gain = _dot(g, {k: s[k] / (np.sqrt(v[k]) + eps) for k in g})
        memory["r"] = b3 * memory["r"] + (1 - b3) * rate * gain
        for k in g:
            m[k] = b1 * m[k] + (1 - b1) * rate * g[k]
            v[k] = b2 * v[k] + (1 - b2) * g[k] ** 2
            s[k] = b3 * s[k] + (1 - b3) * rate * g[k]
        size = sum(np.sum(np.abs(x)) for x in s.values())
        if size > 0:
            memory["d"] = max(d, memory["r"] / ((1 - b3) * size))
        return {k: -m[k] / (np.sqrt(v[k]) + eps) - rate * weight_decay * p[k] for k in g}

    return step


dadapt_adamw.whole_tree = True


# Ivgi, Hinder & Carmon 2023
def dog(learning_rate=1.0, init_step=("heuristic", 1e-6), eps=1e-8, weight_decay=None):
    (kind, number), memory, start = init_step, {"squares": 0.0}, {}

    def step(g, p):
        first = not start
        if first:
            start.update({k: p[k] + 0.0 for k in p})
            norm = np.sqrt(_dot(p, p))
            radii = {"distance": number, "heuristic": number * (1 + norm), "learning_rate": 0.0}
            memory["radius"] = radii[kind]
        g = {k: g[k] + (weight_decay or 0.0) * p[k] for k in g}
        memory["radius"] = max(memory["radius"], _distance(p, start))
        memory["squares"] += _dot(g, g)
        rate = memory["radius"] / np.sqrt(memory["squares"] + eps)
        if first and kind == "learning_rate":
            rate = number
        return {k: -learning_rate * rate * x for k, x in g.items()}

    return step


dog.whole_tree = True


# Khaled, Mishchenko & Jin 2023
def dowg(learning_rate=1.0, init_estim_sq_dist=None, eps=1e-4, weight_decay=None):
    memory, start = {"square": init_estim_sq_dist, "v": 0.0}, {}
    if init_estim_sq_dist is None:
        memory["square"] = eps

    def step(g, p):
        if not start:
            start.update({k: p[k] + 0.0 for k in p})
        g = {k: g[k] + (weight_decay or 0.0) * p[k] for k in g}
        memory["square"] = max(memory["square"], _distance(p, start) ** 2)
        memory["v"] += memory["square"] * _dot(g, g)
        rate = memory["square"] / (np.sqrt(memory["v"]) + eps)
        return {k: -learning_rate * rate * x for k, x in g.items()}

    return step


dowg.whole_tree = True


# Defazio et al. 2024: p is y; the rate of call t is that of t - 1, that of the weight t's own
def _schedule_free(direction, learning_rate, warmup_steps, b1, weight_lr_power):
    memory = {"t": 0, "peak": 0.0, "sum": 0.0}

    def warm(t):
        return learning_rate * min(t / warmup_steps, 1.0) if warmup_steps else learning_rate

    def step(g, p):
        if memory["t"] == 0:
            memory["z"] = p + 0.0
        memory["t"] += 1
        memory["peak"] = max(memory["peak"], warm(memory["t"]))
        weight = memory["peak"] ** weight_lr_power
        memory["sum"] += weight
        c = weight / memory["sum"] if memory["sum"] else 0.0
        x = (p - (1 - b1) * memory["z"]) / b1
        z = memory["z"] = memory["z"] - warm(memory["t"] - 1) * direction(g, p)
        x = (1 - c) * x + c * z
        return (1 - b1) * z + b1 * x - p

    return step


# Defazio et al. 2024
def schedule_free_sgd(
    learning_rate=1.0, warmup_steps=None, b1=0.9, weight_decay=None, weight_lr_power=2.0
):
    def direction(g, p):
        return g + (weight_decay or 0.0) * p

    return _schedule_free(direction, learning_rate, warmup_steps, b1, weight_lr_power)


# Defazio et al. 2024, algorithm 1
def schedule_free_adamw(
    learning_rate=0.0025,
    warmup_steps=None,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    weight_lr_power=2.0,
):
    second = _average(b2)

    def direction(g, p):
        v, c2 = second(g * g)
        return g / (np.sqrt(v / c2) + eps) + weight_decay * p

    return _schedule_free(direction, learning_rate, warmup_steps, b1, weight_lr_power)
