"""Every named optimizer, in a few lines of the basic transformations.

Each descends: the last link multiplies by -learning_rate, so that `optax.apply_updates` adds the
update to the parameters. Every number may be a tracer or a schedule, every optimizer a lane.

Common to all. A scheduled number adds one step counter around the state. Memories are float32 for
16-bit parameters. Wrong kinds of arguments raise TypeError in the call, concrete numbers out of
range ValueError; trees, shapes and states that do not fit raise `TreeError`, a ValueError, in
`update`, and so do missing parameters where weights decay or a formula has p.

The families: `classic`, the textbook's descent; `moments`, Adam and its kin; `adaptive`, Adam's
relatives; `normalized`, which divide first; `signs`; `layerwise`, trust ratios; `factored`, rows
and columns in place of a magnitude; `orthogonal` and `kronecker`, which treat a matrix as a matrix;
`dual`, which follow the leader;
`free`, which find their own rate; `lifted`, optax's own made pytrees of their numbers.
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
