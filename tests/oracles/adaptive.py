"""Rules that treat every element by itself, and gradient descent with noise."""

import numpy as np

from .classic import _average, adamax, adamw


def _ahead(b, nesterov=False):
    """Return a function x -> (average, debiased average); with nesterov, looking one step ahead."""
    average, t = _average(b), [0]

    def step(x):
        t[0] += 1
        m, c = average(x)
        if nesterov:
            return m, b * m / (1 - b ** (t[0] + 1)) + (1 - b) * x / c
        return m, m / c

    return step


# Kingma & Ba 2015, section 7.1; decay of Loshchilov & Hutter 2019
def adamaxw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-4):
    plain = adamax(learning_rate, b1, b2, eps)
    return lambda g, p: plain(g, p) - learning_rate * weight_decay * p


# Dozat 2016; decay of Loshchilov & Hutter 2019
def nadamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, weight_decay=1e-4):
    return adamw(learning_rate, b1, b2, eps, eps_root, weight_decay, nesterov=True)


# Liu et al. 2020
def radam(learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, threshold=5.0, nesterov=False):
    first, second, t = _ahead(b1, nesterov), _average(b2), [0]
    r_inf = 2 / (1 - b2) - 1

    def step(g, p):
        t[0] += 1
        _, m_hat = first(g)
        v, c2 = second(g * g)
        r = r_inf - 2 * t[0] * b2 ** t[0] / (1 - b2 ** t[0])
        if r < threshold:
            return -learning_rate * m_hat
        k = np.sqrt((r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r))
        return -learning_rate * k * m_hat / (np.sqrt(v / c2 + eps_root) + eps)

    return step


# Zhuang et al. 2020
def adabelief(learning_rate, b1=0.9, b2=0.999, eps=1e-16, eps_root=1e-16, nesterov=False):
    first, v, t = _ahead(b1, nesterov), [0.0], [0]

    def step(g, p):
        t[0] += 1
        m, m_hat = first(g)
        v[0] = b2 * v[0] + (1 - b2) * (g - m) ** 2 + eps_root
        return -learning_rate * m_hat / (np.sqrt(v[0] / (1 - b2 ** t[0])) + eps)

    return step


# Zaheer et al. 2018; both moments start at 1e-6 and are debiased
def yogi(learning_rate, b1=0.9, b2=0.999, eps=1e-3):
    first, v, t = _average(b1, 1e-6), [1e-6], [0]

    def step(g, p):
        t[0] += 1
        m, c1 = first(g)
        v[0] = v[0] - (1 - b2) * np.sign(v[0] - g * g) * g * g
        return -learning_rate * (m / c1) / (np.sqrt(v[0] / (1 - b2 ** t[0])) + eps)

    return step


# Zeiler 2012, algorithm 1
def adadelta(learning_rate=None, rho=0.9, eps=1e-6, weight_decay=0.0):
    gradients, steps, x = _average(rho), _average(rho), [0.0]

    def step(g, p):
        g = g + weight_decay * p
        s, _ = gradients(g * g)
        u = np.sqrt(x[0] + eps) / np.sqrt(s + eps) * g
        x[0], _ = steps(u * u)
        return -u if learning_rate is None else -learning_rate * u

    return step


# Riedmiller & Braun 1993; a turned gradient is forgotten: Igel & Huesken 2000, iRprop-
def rprop(learning_rate, eta_minus=0.5, eta_plus=1.2, min_step_size=1e-6, max_step_size=50.0):
    memory = {"size": learning_rate, "g": 0.0}

    def step(g, p):
        turn = g * memory["g"]
        factor = np.where(turn > 0, eta_plus, np.where(turn < 0, eta_minus, 1.0))
        memory["size"] = np.clip(memory["size"] * factor, min_step_size, max_step_size)
        memory["g"] = np.where(turn < 0, 0.0, g)
        return -memory["size"] * np.sign(memory["g"])

    return step


# Chen et al. 2023, algorithm 2
def lion(learning_rate, b1=0.9, b2=0.99, weight_decay=1e-3):
    m = [0.0]

    def step(g, p):
        u = np.sign(b1 * m[0] + (1 - b1) * g)
        m[0] = b2 * m[0] + (1 - b2) * g
        return -learning_rate * (u + weight_decay * p)

    return step


# Bernstein et al. 2018, algorithm 1
def sign_sgd(learning_rate):
    return lambda g, p: -learning_rate * np.sign(g)


# Bernstein et al. 2018, algorithm 2
def signum(learning_rate, beta=0.9):
    average = _average(beta)
    return lambda g, p: -learning_rate * np.sign(average(g)[0])


# Xie et al. 2022, whose 1 - beta is b
def adan(
    learning_rate,
    b1=0.98,
    b2=0.92,
    b3=0.99,
    eps=1e-8,
    eps_root=1e-8,
    weight_decay=0.0,
):
    gradients, differences, squares, last = _average(b1), _average(b2), _average(b3), []

    def step(g, p):
        d = g - last.pop() if last else 0 * g
        last.append(g)
        m, c1 = gradients(g)
        v, c2 = differences(d)
        n, c3 = squares((g + b2 * d) ** 2)
        u = (m / c1 + b2 * v / c2) / (np.sqrt(n / c3 + eps_root) + eps)
        return -learning_rate * (u + weight_decay * p)

    return step


# Ziyin et al. 2020
def laprop(learning_rate, b1=0.9, b2=0.999, eps=1e-15, weight_decay=0.0):
    first, second = _average(b1), _average(b2)

    def step(g, p):
        v, c2 = second(g * g)
        m, c1 = first(g / (np.sqrt(v / c2) + eps))
        return -learning_rate * (m / c1 + weight_decay * p)

    return step


# McMahan et al. 2013, algorithm 1
def ftrl(
    learning_rate,
    learning_rate_power=-0.5,
    initial_accumulator_value=0.1,
    l1=0.0,
    l2=0.0,
    l2_shrinkage=0.0,
    beta=0.0,
):
    n, z, q = [initial_accumulator_value], [0.0], -learning_rate_power

    def step(g, p):
        old, n[0] = n[0], n[0] + g * g
        sigma = (n[0] ** q - old**q) / learning_rate
        z[0] = z[0] + g + 2 * l2_shrinkage * p - sigma * p
        curve = (n[0] ** q + beta) / learning_rate + 2 * l2
        return (np.clip(z[0], -l1, l1) - z[0]) / curve - p

    return step


# Pagliardini et al. 2024
def ademamix(
    learning_rate,
    b1=0.9,
    b2=0.999,
    b3=0.9999,
    alpha=5.0,
    eps=1e-8,
    eps_root=0.0,
    weight_decay=0.0,
):
    fast, slow, second = _average(b1), _average(b3), _average(b2)

    def step(g, p):
        m, c1 = fast(g)
        old, _ = slow(g)
        v, c2 = second(g * g)
        u = (m / c1 + alpha * old) / (np.sqrt(v / c2 + eps_root) + eps)
        return -learning_rate * (u + weight_decay * p)

    return step


# Taniguchi et al. 2024; the first gradient only starts the second moment
def adopt(
    learning_rate,
    b1=0.9,
    b2=0.9999,
    eps=1e-6,
    nesterov=False,
    use_clipping=True,
    clip_value_fn=lambda t: t**0.25,
):
    first, v, t = _average(b1), [None], [0]

    def step(g, p):
        if v[0] is None:
            v[0] = g * g
            return 0 * g
        t[0] += 1
        x = g / np.maximum(np.sqrt(v[0]), eps)
        if use_clipping:
            x = np.clip(x, -clip_value_fn(t[0]), clip_value_fn(t[0]))
        m, _ = first(x)
        v[0] = b2 * v[0] + (1 - b2) * g * g
        return -learning_rate * (b1 * m + (1 - b1) * x if nesterov else m)

    return step


# Defazio & Jelassi 2021, algorithm 1; eps joins the rate too, as in the authors' program
def madgrad(learning_rate, momentum=0.9, weight_decay=0.0, eps=1e-6):
    memory = {"t": 0, "s": 0.0, "v": 0.0}

    def step(g, p):
        if memory["t"] == 0:
            memory["start"] = p + 0.0
        g = g + weight_decay * p
        memory["t"] += 1
        rate = (learning_rate + eps) * np.sqrt(memory["t"])
        memory["s"] = memory["s"] + rate * g
        memory["v"] = memory["v"] + rate * g * g
        z = memory["start"] - memory["s"] / (np.cbrt(memory["v"]) + eps)
        return (1 - momentum) * (z - p)

    return step


# Neelakantan et al. 2015; dtype: what the noise is drawn in, None for that of the gradient
def noisy_sgd(learning_rate, eta=0.01, gamma=0.55, key=0, dtype=None):
    import jax
    import optax

    memory = {"t": 0, "key": jax.random.key(key) if isinstance(key, int) else key}

    def step(g, p):
        memory["t"] += 1
        memory["key"], draw = jax.random.split(memory["key"])
        leaves = jax.tree.map(jax.numpy.asarray, g)
        noise = optax.tree.random_like(draw, leaves, jax.random.normal, dtype)
        deviation = np.sqrt(eta / memory["t"] ** gamma)
        return {k: -learning_rate * (g[k] + deviation * np.asarray(noise[k], float)) for k in g}

    return step


noisy_sgd.whole_tree = True
