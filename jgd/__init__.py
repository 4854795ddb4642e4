"""jgd: optimizers for JAX that are pytrees of their numbers.

Each public name is imported when it is first used, so `jgd --help` does not import jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jgd.version import __version__ as __version__

_MODULES = {
    "jgd.pytree": "Schedule Transformation as_pytree",
    "jgd.lanes": "lane stack",
    "jgd.trees": "TreeError leafwise",
    "jgd.combinators": "add chain divide named subtract with_nesterov",
    "jgd.transforms": """
        add_decayed_weights add_noise bias_correction decayed_max ema identity moving_average
        nesterov_ema rms root running_max running_sum scale scale_by_learning_rate
        scale_by_momentum scale_by_schedule scale_by_sign set_to_zero sign square trace""",
    "jgd.rules": "difference per_leaf",
    "jgd.norms": """
        centralize scale_by_param_block_norm scale_by_param_block_rms scale_by_trust_ratio""",
    "jgd.clipping": """
        adaptive_grad_clip clip clip_by_block_rms clip_by_global_norm normalize
        normalize_by_update_norm zero_nans""",
    "jgd.wrappers": """
        accumulate average_params averaged_params cautious lookahead per_layer schedule_free
        schedule_free_eval_params""",
    "jgd.precision": """
        compensated loss_scale loss_scaled master_weights skip_nonfinite stochastic_rounding""",
    "jgd.groups": "param_groups scale_by_path scale_by_width",
    "jgd.optimizers.classic": """
        adagrad momentum nesterov noisy_sgd rmsprop scale_by_rms scale_by_rss scale_by_stddev
        sgd""",
    "jgd.optimizers.moments": """
        adam adamax adamaxw adamw amsgrad nadam nadamw scale_by_adam scale_by_adamax
        scale_by_amsgrad""",
    "jgd.optimizers.adaptive": """
        adabelief adan ademamix radam scale_by_adan scale_by_ademamix scale_by_belief
        scale_by_radam scale_by_yogi yogi""",
    "jgd.optimizers.normalized": """
        adadelta adopt laprop scale_by_adadelta scale_by_adopt scale_by_laprop""",
    "jgd.optimizers.signs": "lion rprop scale_by_lion scale_by_rprop sign_sgd signum",
    "jgd.optimizers.layerwise": "fromage lamb lars novograd scale_by_novograd",
    "jgd.optimizers.factored": "adafactor scale_by_factored_rms scale_by_sm3 sm3",
    "jgd.optimizers.orthogonal": "muon scale_by_muon",
    "jgd.optimizers.kronecker": "scale_by_shampoo scale_by_soap shampoo soap",
    "jgd.optimizers.dual": "ftrl madgrad scale_by_madgrad",
    "jgd.optimizers.free": """
        dadapt_adamw dog dowg polyak_sgd prodigy scale_by_polyak schedule_free_adamw
        schedule_free_sgd""",
    "jgd.optimizers.lifted": """
        acprop cocob galore momo momo_adam optimistic_adam optimistic_adam_v2
        optimistic_gradient_descent scale_by_acprop scale_by_cocob scale_by_galore
        scale_by_optimistic_gradient scale_by_simplified_ademamix simplified_ademamix sophia""",
    "jgd.schedules": """
        constant_schedule cosine_decay_schedule cosine_onecycle_schedule exponential_decay
        inverse_sqrt_decay inverse_time_decay join_schedules linear_onecycle_schedule
        linear_schedule piecewise_constant piecewise_constant_schedule
        piecewise_interpolate_schedule polynomial_schedule sgdr_schedule warmup_constant_schedule
        warmup_cosine_decay_schedule warmup_exponential_decay_schedule
        warmup_stable_decay_schedule""",
    "jgd.inspection": "now",
    "jgd.catalog": "get",
    "jgd.training": "Run Task minibatches supervised train with_sharpness",
    "jgd.tuning.prune": "hyperband successive_halving",
    "jgd.tuning.distributions": "choice integers loguniform uniform",
    "jgd.tuning.space": "grid halton_search random_search sobol_search",
    "jgd.tuning.streams": "stream",
    "jgd.tuning.join": "merge",
    "jgd.tuning.load": "load",
    "jgd.tuning.sweep": "iter_sweep sweep",
    "jgd.tuning.propose": "optuna_search",
}
_SUBMODULES = ("compat", "nnx", "regularization", "stopping")
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from jgd.catalog import get as get
    from jgd.clipping import *  # noqa: F403
    from jgd.combinators import *  # noqa: F403
    from jgd.groups import *  # noqa: F403
    from jgd.inspection import *  # noqa: F403
    from jgd.lanes import *  # noqa: F403
    from jgd.norms import *  # noqa: F403
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
    from jgd.precision import *  # noqa: F403
    from jgd.pytree import *  # noqa: F403
    from jgd.rules import *  # noqa: F403
    from jgd.schedules import *  # noqa: F403
    from jgd.training import *  # noqa: F403
    from jgd.transforms import *  # noqa: F403
    from jgd.trees import *  # noqa: F403
    from jgd.tuning.distributions import *  # noqa: F403
    from jgd.tuning.join import merge as merge
    from jgd.tuning.load import load as load
    from jgd.tuning.propose import *  # noqa: F403
    from jgd.tuning.prune import *  # noqa: F403
    from jgd.tuning.space import *  # noqa: F403
    from jgd.tuning.streams import *  # noqa: F403
    from jgd.tuning.sweep import *  # noqa: F403
    from jgd.wrappers import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"jgd.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'jgd' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBMODULES})
