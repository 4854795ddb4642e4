"""One line that names the thing and the cure, before anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import X, Y, _line

import jgd
from jgd.tuning.compiling import Compiler

ADAM = {"adam": jgd.grid(jgd.adam, learning_rate=[0.1, 0.2])}


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    def compiled(*_, **__):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(Compiler, "compiled", compiled)


def _with_nan(batch_size=4):
    data = X.copy()
    data[5, 1] = np.nan
    return jgd.minibatches((data, Y), batch_size, jax.random.key(0))


def _of(task=None, settings=ADAM, steps=10, **changes):
    return lambda: jgd.sweep((task or _line())._replace(**changes), settings, steps)


def _by_setting(params, model_state, setting):
    return {"loss": 0.0} if isinstance(setting, dict) else {"loss": 0.0, "accuracy": 0.0}


CASES = {
    "an empty dict": (_of(settings={}), "sweep: no settings"),
    "an empty grid": (
        lambda: jgd.grid(jgd.adam, learning_rate=[]),
        "grid: axis learning_rate has no values",
    ),
    "an unknown number": (lambda: jgd.grid(jgd.adam, rate=[0.1]), "rate"),
    "an unknown optimizer": (lambda: jgd.get("adamm"), "did you mean.*adam"),
    "no steps": (_of(steps=0), "sweep: steps must be at least 4, got 0"),
    "a negative rate": (
        _of(settings={"adam": jgd.grid(jgd.adam, learning_rate=[0.1, -0.2])}),
        "sweep: adam: learning_rate must be at least 0, got -0.2 in setting 1",
    ),
    "a rate that is none, in a batch without names": (
        _of(settings=jax.vmap(jgd.sgd)(jnp.array([0.1, jnp.nan]))),
        "sweep: sgd: learning_rate must be at least 0, got nan in setting 1",
    ),
    "NaN in the data": (_of(batch=_with_nan()), "NaN in the data, first in row 5"),
    "NaN in a batch": (
        _of(batch=lambda step: (jnp.full((2, 2), jnp.nan), jnp.ones(2))),
        "NaN in the first batch, first in row 0",
    ),
    "a loss that is no scalar": (
        _of(loss=lambda params, batch: batch[0] @ params["w"]),
        "loss must return a scalar, got an array of shape \\(4,\\)",
    ),
    "metrics that are no scalars": (
        _of(evaluate=lambda params: {"loss": params["w"]}),
        "metric loss of evaluate must be a scalar",
    ),
    "metrics that disagree": (
        _of(
            task=_line()._replace(evaluate=_by_setting),
            settings=ADAM | {"dict": jgd.grid(lambda x: {"tx": jgd.sgd(x)}, x=[0.1])},
        ),
        "the same metrics for all groups, got loss, accuracy for adam and loss for dict",
    ),
    "a metric nobody reports": (
        lambda: jgd.sweep(_line(), ADAM, 10, metric="accuracy"),
        "metric must be one of loss, got 'accuracy'",
    ),
    "a setting without an optimizer": (
        _of(settings={"x": {"rate": jnp.ones(3)}}),
        "a setting must hold exactly one optimizer, got 0",
    ),
    "an option that is none": (
        lambda: list(jgd.iter_sweep(_line(), ADAM, 10, patience=3)),
        "patience",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named(case):
    call, message = CASES[case]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
