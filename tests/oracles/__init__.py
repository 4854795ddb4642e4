"""Oracles: the papers' formulas in float64 NumPy, with which tests compare the optimizers.

An oracle is `(numbers) -> step`; `step(g, p)` returns the update to add to p, and keeps its
memories in its closure. It takes one array at a time. If the oracle has `whole_tree = True`, then
g, p and the update are dicts of arrays; if it has `needs_value = True`, the step is `step(g, p,
value)` with the loss as value. Some steps show their memories as `step.state`. Oracles follow the
papers and not jgd, with the arguments and conventions of optax where it has the rule.
"""

from .adaptive import (
    adabelief,
    adadelta,
    adamaxw,
    adan,
    ademamix,
    adopt,
    ftrl,
    laprop,
    lion,
    madgrad,
    nadamw,
    noisy_sgd,
    radam,
    rprop,
    sign_sgd,
    signum,
    yogi,
)
from .classic import (
    adagrad,
    adam,
    adamax,
    adamw,
    amsgrad,
    momentum,
    nadam,
    nesterov,
    rmsprop,
    sgd,
)
from .free import (
    dadapt_adamw,
    dog,
    dowg,
    polyak_sgd,
    prodigy,
    schedule_free_adamw,
    schedule_free_sgd,
)
from .layerwise import adafactor, fromage, lamb, lars, novograd, sm3
from .matrix import muon, shampoo, soap

__all__ = [
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "adan",
    "ademamix",
    "adopt",
    "amsgrad",
    "dadapt_adamw",
    "dog",
    "dowg",
    "fromage",
    "ftrl",
    "lamb",
    "laprop",
    "lars",
    "lion",
    "madgrad",
    "momentum",
    "muon",
    "nadam",
    "nadamw",
    "nesterov",
    "noisy_sgd",
    "novograd",
    "polyak_sgd",
    "prodigy",
    "radam",
    "rmsprop",
    "rprop",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sgd",
    "shampoo",
    "sign_sgd",
    "signum",
    "sm3",
    "soap",
    "yogi",
]
