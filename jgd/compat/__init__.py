"""Optimizers, schedules and callbacks that compute what Keras, PyTorch and a textbook compute.

    import jgd.compat.torch as jt       # the name `torch` would hide PyTorch itself
    tx = jt.sgd(jt.multi_step_lr(0.1, milestones=[30, 60]), momentum=0.9)

The modules `keras` and `torch` name an optimizer like the framework's class in lower case, and a
schedule or a callback like its class in snake case. Arguments have the framework's names and
defaults. All are pytrees of their numbers. Neither framework is imported. `textbook` has the
optimizers of a textbook chapter.

`optax` converts states between optax and jgd, and states of jgd 0.1.
"""

from jgd.compat import keras as keras
from jgd.compat import optax as optax
from jgd.compat import textbook as textbook
from jgd.compat import torch as torch
