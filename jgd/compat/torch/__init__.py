"""PyTorch's optimizers and schedulers, with its names, defaults and results.

import jgd.compat.torch as jt       # the name `torch` would hide PyTorch itself
tx = jt.sgd(jt.multi_step_lr(0.1, milestones=[30, 60]), momentum=0.9)
tx = jgd.chain(jt.clip_grad_norm(1.0), jt.adam(1e-3, betas=(0.9, 0.99)))
"""

from jgd.compat.torch.callbacks import *  # noqa: F403
from jgd.compat.torch.optimizers import *  # noqa: F403
from jgd.compat.torch.schedules import *  # noqa: F403
from jgd.compat.torch.state import state_from as state_from
