"""Rules that see an array as a matrix or a tensor: orthogonal steps, bases, preconditioners."""

import numpy as np

from .adaptive import _ahead
from .classic import adamw


def _along(x, matrix, axis):
    """Apply `matrix` to one axis: x_..i.. -> sum_i x_..i.. matrix_ij."""
    return np.moveaxis(np.tensordot(x, matrix, (axis, 0)), -1, axis)


def _gram(x, axis):
    others = tuple(i for i in range(x.ndim) if i != axis)
    return np.tensordot(x, x, (others, others))


# Jordan et al. 2024; adaptive: Bernstein & Newhouse 2024; consistent_rms: Liu et al. 2025
def muon(
    learning_rate,
    ns_coeffs=(3.4445, -4.7750, 2.0315),
    ns_steps=5,
    beta=0.95,
    eps=1e-8,
    weight_decay=0.0,
    nesterov=True,
    adaptive=False,
    adam_b1=0.9,
    adam_b2=0.999,
    adam_eps_root=0.0,
    adam_weight_decay=0.0,
    adam_learning_rate=None,
    consistent_rms=None,
):
    first = _ahead(beta, nesterov)
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    other = adamw(rate, adam_b1, adam_b2, eps, adam_eps_root, adam_weight_decay, nesterov)
    a, b, c = ns_coeffs

    def step(g, p):
        if np.ndim(g) != 2:
            return other(g, p)
        _, m = first(g)
        rows, columns = m.shape
        x = (m.T if rows > columns else m) / (np.linalg.norm(m) + eps)
        for _ in range(ns_steps):
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
        x = x.T if rows > columns else x
        if adaptive:
            x = np.sum(m * x) * x
        if consistent_rms is None:
            x = np.sqrt(max(1, columns / rows)) * x
        else:
            x = consistent_rms * np.sqrt(max(rows, columns)) * x
        return -learning_rate * (x + weight_decay * p)

    return step


# Vyas et al. 2024, as in the authors' program; mu and nu are in the coordinates of the bases,
# which are arbitrary if the first gradient has no full rank
def soap(
    learning_rate,
    b1=0.95,
    b2=0.95,
    shampoo_beta=None,
    eps=1e-8,
    weight_decay=0.01,
    precondition_frequency=10,
    max_precond_dim=10000,
    precondition_1d=False,
):
    beta, t = b2 if shampoo_beta is None else shampoo_beta, [0]
    state = {"mu": None, "nu": None, "preconditioners": {}, "bases": {}}
    sums, bases = state["preconditioners"], state["bases"]

    def rotate(x, back=False):
        for axis, q in bases.items():
            x = _along(x, q.T if back else q, axis)
        return x

    def step(g, p):
        g = np.asarray(g)
        if state["mu"] is None:
            state["mu"] = state["nu"] = np.zeros_like(g)
            for axis, n in enumerate(g.shape):
                if n <= max_precond_dim and (g.ndim > 1 or precondition_1d):
                    sums[axis] = (1 - beta) * _gram(g, axis)
                    bases[axis] = np.linalg.eigh(sums[axis])[1][:, ::-1]
            return np.zeros_like(g)
        t[0] += 1
        x = rotate(g)
        mu = b1 * state["mu"] + (1 - b1) * x
        nu = b2 * state["nu"] + (1 - b2) * x * x
        rate = learning_rate * np.sqrt(1 - b2 ** t[0]) / (1 - b1 ** t[0])
        u = -rate * rotate(mu / (np.sqrt(nu) + eps), back=True)
        u = u - learning_rate * weight_decay * (p + u)
        for axis in bases:
            sums[axis] = beta * sums[axis] + (1 - beta) * _gram(g, axis)
        if t[0] % precondition_frequency == 0:
            mu = rotate(mu, back=True)
            for axis, q in bases.items():
                order = np.argsort(-np.diag(q.T @ sums[axis] @ q), kind="stable")
                nu = np.take(nu, order, axis)
                bases[axis] = np.linalg.qr(sums[axis] @ q[:, order])[0]
            mu = rotate(mu)
        state.update(mu=mu, nu=nu)
        return u

    step.state = state
    return step


# Gupta, Koren & Singer 2018, algorithms 1 and 2
def shampoo(learning_rate, eps=1e-4, momentum=None, max_precond_dim=10000):
    state = {"preconditioners": {}, "mu": 0.0}
    sums = state["preconditioners"]

    def step(g, p):
        x = u = np.atleast_1d(g)
        axes = [i for i, n in enumerate(x.shape) if n <= max_precond_dim]
        for axis in axes:
            start = eps * np.eye(x.shape[axis])
            sums[axis] = sums.get(axis, start) + _gram(x, axis)
            w, q = np.linalg.eigh(sums[axis])
            root = q * np.maximum(w, eps) ** (-1 / (2 * len(axes))) @ q.T
            u = _along(u, root, axis)
        u = state["mu"] = u.reshape(np.shape(g)) + (momentum or 0.0) * state["mu"]
        return -learning_rate * u

    step.state = state
    return step
