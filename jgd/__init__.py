"""jgd: optimizers for JAX that are pytrees of their numbers.

The names below are loaded when they are first used, so that `jgd --help` needs no jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "jgd.pytree": "Schedule Transformation TreeError as_pytree lane stack",
    "jgd.transforms": """
        add add_decayed_weights bias_correction chain decayed_max divide ema identity leafwise
        moving_average named nesterov_ema rms root running_max running_sum scale scale_by_adam
        scale_by_adamax scale_by_amsgrad scale_by_learning_rate scale_by_momentum scale_by_rms
        scale_by_rss scale_by_schedule scale_by_sign scale_by_stddev set_to_zero sign square
        subtract trace with_nesterov""",
    "jgd.optimizers": "adagrad adam adamax adamw amsgrad momentum nadam nesterov rmsprop sgd",
    "jgd.schedules": """
        constant_schedule cosine_decay_schedule cosine_onecycle_schedule exponential_decay
        inverse_sqrt_decay inverse_time_decay join_schedules linear_onecycle_schedule
        linear_schedule piecewise_constant piecewise_constant_schedule
        piecewise_interpolate_schedule polynomial_schedule sgdr_schedule warmup_constant_schedule
        warmup_cosine_decay_schedule warmup_exponential_decay_schedule
        warmup_stable_decay_schedule""",
    "jgd.training": "Run Task minibatches supervised train",
    "jgd.tuning.space": "choice grid loguniform random_search uniform",
    "jgd.tuning.sweep": "iter_sweep sweep",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from jgd.optimizers import *  # noqa: F403
    from jgd.pytree import *  # noqa: F403
    from jgd.schedules import *  # noqa: F403
    from jgd.training import *  # noqa: F403
    from jgd.transforms import *  # noqa: F403
    from jgd.tuning.space import *  # noqa: F403
    from jgd.tuning.sweep import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jgd' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
