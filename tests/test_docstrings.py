"""The examples in docstrings run, each with the names that its text assumes to exist."""

import ast
import os
import re
import textwrap
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training import X, Y, line_task

import jgd


def _examples():
    """Yield the indented Python blocks of docstrings that use jgd, with the place as id."""
    root = Path(jgd.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                continue
            text = (ast.get_docstring(node) or "") + "\n"
            for block in re.findall(r"(?:(?<=\n\n)|^)((?:    .*\n|\n)+)", text):
                code = textwrap.dedent(block).strip("\n")
                name = f"{path.relative_to(root.parent)} {getattr(node, 'name', '')}".strip()
                if re.search(r"\bj(gd|k|t)\.", code) and _parses(code):
                    yield pytest.param(code, id=name)


def _parses(code):
    try:
        ast.parse(code)
    except SyntaxError:  # a formula
        return False
    return True


def _keras_model():
    import keras

    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(X, Y, verbose=0)
    return model


def _assumed_names(code):
    """Return the names that an example uses without defining them."""
    import torch

    import jgd.compat.keras as jk
    import jgd.compat.torch as jt

    task = line_task()
    run = jgd.supervised(task)._replace(begin=None)
    params = task.init(jax.random.key(0))
    names = dict(
        jgd=jgd, jax=jax, jnp=jnp, np=np, optax=optax, jk=jk, jt=jt, task=task, params=params
    )
    names |= dict(init=task.init, loss=task.loss, evaluate=task.evaluate, batch=task.batch)
    names |= dict(loader=[task.batch(0)], key=jax.random.key(0), train=lambda tx: tx.init(params))
    names |= dict(grid=jgd.grid, random_search=jgd.random_search, loguniform=jgd.loguniform)
    names |= dict(other_lanes=jgd.grid(jgd.lion, learning_rate=[1e-3, 1e-2]))
    if "jgd.Run(init" in code:
        start = lambda tx, key: run.init(tx, key, task.init(key))
        names |= dict(init=start, update=run.update, evaluate=run.evaluate)
        names |= dict(settings=jgd.grid(jgd.adam, learning_rate=[0.1, 0.2]))
    if "optimizer.state_dict" in code:
        layer = torch.nn.Linear(2, 1)
        names["optimizer"] = torch.optim.Adam(layer.parameters(), 0.1)
        layer(torch.tensor(X)).mean().backward()
        names["optimizer"].step()
        names["params"] = [jnp.array(w.detach().numpy()) for w in layer.parameters()]
    if "jax.export" in code:
        names["step"] = lambda tx, params, state: tx.update(params, state, params)
    if "jgd.now(" in code:
        tx = jgd.adam(jgd.linear_schedule(0.1, 0.0, 10))
        lanes = jgd.stack([tx, tx])
        names |= dict(tx=tx, state=tx.init(params), lanes=lanes)
        names["states"] = jax.vmap(lambda tx: tx.init(params))(lanes)
    if "jgd.compat.optax" in code:
        rate = (1e-3, 0, 1000)
        ours = jgd.adamw(jgd.linear_schedule(*rate))
        theirs = optax.adamw(optax.linear_schedule(*rate))
        names |= dict(tx=ours, optax_tx=theirs, optax_state=theirs.init(params))
        names["jgd_state"] = ours.init(params)
        names["state"] = names["optax_state" if "state_from(state" in code else "jgd_state"]
    if "jgd.nnx." in code:
        from flax import nnx

        names |= dict(nnx=nnx, model=nnx.Linear(3, 1, rngs=nnx.Rngs(0)), rates=[0.1, 0.2], steps=5)
    if "model.optimizer" in code:
        names["model"] = _keras_model()
        names["params"] = [jnp.asarray(w) for w in names["model"].get_weights()]
    return names


EXAMPLES = list(_examples())


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code):
    exec(compile(code, "docstring", "exec"), _assumed_names(code))


def test_examples_are_found():
    assert len(EXAMPLES) >= 11
