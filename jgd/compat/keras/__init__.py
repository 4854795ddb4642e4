"""Keras 3's optimizers, schedules and callbacks, with its names, defaults and results.

import jgd.compat.keras as jk
rate = jk.exponential_decay(0.1, decay_steps=100, decay_rate=0.96, staircase=True)
tx = jk.sgd(rate, momentum=0.9, nesterov=True, clipnorm=1.0)
"""

from jgd.compat.keras.callbacks import *  # noqa: F403
from jgd.compat.keras.lookup import get as get
from jgd.compat.keras.optimizers import *  # noqa: F403
from jgd.compat.keras.options import averaged_params as averaged_params
from jgd.compat.keras.options import loss_scale_optimizer as loss_scale_optimizer
from jgd.compat.keras.schedules import *  # noqa: F403
from jgd.compat.keras.state import state_from as state_from
