"""Draw the path of every optimizer on one problem: `python docs/trajectories.py`.

The problem is f = (a^2 + 20 b^2) / 2, where a and b are the coordinates of x - (1, 1) rotated by 30
degrees. A path starts at x = (-0.6, 1.9) and has 50 steps. Of 40 learning rates, from 1e-4 to 1e4,
it has the one with the least geometric mean of f + 1e-6 whose path stays in the picture. All other
numbers have their defaults.
"""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jgd
from jgd import catalog

STEPS, CENTER, START = 50, np.array([1.0, 1.0]), (-0.6, 1.9)
ANGLE, CURVATURE = np.pi / 6, 20.0
TURN = np.array([[np.cos(ANGLE), np.sin(ANGLE)], [-np.sin(ANGLE), np.cos(ANGLE)]])
RATES = np.geomspace(1e-4, 1e4, 40)
FOLDER = Path(__file__).parent / "_static" / "trajectories"

SCALE, WIDTH, HEIGHT = 90, 400, 260  # pixels per unit of x, and size of the picture
LEVELS = (0.02, 0.1, 0.3, 0.7, 1.4, 2.5, 4.0, 6.0)


def loss(x):
    a, b = jnp.asarray(TURN, jnp.float32) @ (x[:, 0] - CENTER)
    return (a**2 + CURVATURE * b**2) / 2


def make(entry):
    """Return the optimizer as a function of its first number, and the values to try."""
    factory = jgd.get(entry.name)
    required = [name for name, default in entry.numbers.items() if default is ...]
    rate = next(iter(entry.numbers))
    others = dict.fromkeys(required[1:], 0.1)
    return lambda value: factory(**{rate: value}, **others)


@jax.jit
def path(tx):
    """Return the points of a path, including its start."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, _):
        x, state = carry
        value, grads = jax.value_and_grad(loss)(x)
        updates, state = tx.update(grads, state, x, value=value, obj_fn=loss)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    start = jnp.array(START)[:, None]  # a matrix, so that optimizers treat it as one
    _, points = jax.lax.scan(step, (start, tx.init(start)), length=STEPS)
    return jnp.concatenate([start[None], points])[..., 0]


def best(entry):
    """Return the best rate whose path stays in the picture, and this path."""
    values = jnp.asarray(RATES, jnp.float32)
    paths = np.asarray(jax.vmap(path)(jax.vmap(make(entry))(values)))
    losses = jax.vmap(jax.vmap(lambda x: loss(x[:, None])))(paths)
    losses = np.mean(np.log(losses + 1e-6), 1)
    outside = np.abs(paths - CENTER).max(1) > np.array([WIDTH, HEIGHT]) / (2 * SCALE)
    index = np.argmin(np.where(outside.any(1) | ~np.isfinite(losses), np.inf, losses))
    return RATES[index], paths[index]


def svg(points, text):
    """Return a picture of a path over contours. Its colors are legible on white and on black."""
    x, y = SCALE * (points - CENTER).T * [[1], [-1]] + [[WIDTH / 2], [HEIGHT / 2]]
    spots = [(f"{a:.1f}", f"{b:.1f}") for a, b in zip(x, y, strict=True)]
    radii = [SCALE * np.sqrt(2 * level) for level in LEVELS]
    rings = "".join(f'<ellipse rx="{r:.1f}" ry="{r / CURVATURE**0.5:.1f}"/>' for r in radii)
    line = " ".join(f"{a},{b}" for a, b in spots)
    dots = "".join(f'<circle cx="{a}" cy="{b}" r="2"/>' for a, b in spots)
    middle = f"translate({WIDTH / 2:g} {HEIGHT / 2:g}) rotate({-np.degrees(ANGLE):g})"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'<g transform="{middle}" fill="none" stroke="#999" stroke-opacity=".6">{rings}</g>'
        f'<polyline points="{line}" fill="none" stroke="#e4572e" stroke-width="1.5"/>'
        f'<g fill="#e4572e">{dots}</g><text x="8" y="18" font-family="sans-serif" '
        f'font-size="12" fill="#888">{text}</text></svg>\n'
    )


def main():
    warnings.simplefilter("ignore")  # some optimizers are deprecated in optax
    FOLDER.mkdir(parents=True, exist_ok=True)
    for entry in catalog.entries():
        rate, points = best(entry)
        (FOLDER / f"{entry.name}.svg").write_text(
            svg(points, f"{next(iter(entry.numbers))} = {rate:.2g}")
        )
        print(f"{entry.name:30}{rate:10.3g}{float(loss(points[-1][:, None])):12.3g}", flush=True)


if __name__ == "__main__":
    main()
