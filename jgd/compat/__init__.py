"""Recipes of other frameworks, exact: `keras`, `torch` and the `textbook`; the states of `optax`.

    import jgd.compat.torch as jt       # not `torch`: the real one stays visible
    tx = jt.sgd(jt.multi_step_lr(0.1, milestones=[30, 60]), momentum=0.9)

The names are mechanical: an optimizer is the framework's class in lower case, a schedule or a
callback its class in snake case, and the arguments bear the framework's own names and defaults. All
are pytrees of their numbers. Neither framework is imported.

`jgd.compat.optax` converts states between optax and jgd, and those of jgd 0.1.
"""

from jgd.compat import keras as keras
from jgd.compat import optax as optax
from jgd.compat import textbook as textbook
from jgd.compat import torch as torch
