"""Every named optimizer, in a few lines of the basic transformations.

Every optimizer returns a descent step: the last link multiplies by -learning_rate, and
`optax.apply_updates` adds the update to the parameters. Every number may be a tracer or a schedule,
and every optimizer can be vmapped as a lane.

In the docstrings, g is the gradient, p the parameters, u the update, t the step from 1, and m^ is m
with its bias correction. In "State", a tree has one array like each parameter array. A number given
as a schedule adds one step counter around the state. Accumulators are float32 for 16-bit
parameters.

A call raises TypeError for an argument of the wrong kind and ValueError for a concrete number out
of range. `update` raises `TreeError`, a ValueError, for trees, shapes or states that do not match,
and for missing parameters if weights decay or the formula contains p.

The families are `classic`, plain and momentum descent; `moments`, Adam and its variants;
`adaptive`, Adam with other directions or magnitudes; `normalized`, which divide before they
average; `signs`; `layerwise`, with trust ratios; `factored`, which store rows and columns of the
second moment; `orthogonal` and `kronecker`, for matrices; `dual`, follow the leader; `free`,
without a learning rate to tune; and `lifted`, optax's own optimizers as pytrees of their numbers.
"""

from jgd.optimizers import (
    adaptive,
    classic,
    dual,
    factored,
    free,
    kronecker,
    layerwise,
    lifted,
    moments,
    normalized,
    orthogonal,
    signs,
)
from jgd.optimizers.adaptive import *  # noqa: F403
from jgd.optimizers.classic import *  # noqa: F403
from jgd.optimizers.dual import *  # noqa: F403
from jgd.optimizers.factored import *  # noqa: F403
from jgd.optimizers.free import *  # noqa: F403
from jgd.optimizers.kronecker import *  # noqa: F403
from jgd.optimizers.layerwise import *  # noqa: F403
from jgd.optimizers.lifted import *  # noqa: F403
from jgd.optimizers.moments import *  # noqa: F403
from jgd.optimizers.normalized import *  # noqa: F403
from jgd.optimizers.orthogonal import *  # noqa: F403
from jgd.optimizers.signs import *  # noqa: F403

families = (
    classic,
    moments,
    adaptive,
    normalized,
    signs,
    layerwise,
    factored,
    orthogonal,
    kronecker,
    dual,
    free,
    lifted,
)

__all__ = sorted(name for family in families for name in family.__all__)  # pyright: ignore
