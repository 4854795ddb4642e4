"""Optax's own optimizers, lifted by `as_pytree` to pytrees of their numbers.

The math, the defaults, the arguments and the states are optax's, and documented there. The numbers
are leaves, so that a sweep runs these optimizers as lanes.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import optax
import optax.contrib

from jgd.pytree import as_pytree
from jgd.sharding import apply_gathered

__all__ = [
    "acprop",
    "cocob",
    "galore",
    "momo",
    "momo_adam",
    "optimistic_adam",
    "optimistic_adam_v2",
    "optimistic_gradient_descent",
    "scale_by_acprop",
    "scale_by_cocob",
    "scale_by_galore",
    "scale_by_optimistic_gradient",
    "scale_by_simplified_ademamix",
    "simplified_ademamix",
    "sophia",
]


def _lift(
    factory: Callable[..., Any],
    docstring: str,
    structure: Iterable[str] = (),
    numbers: Iterable[str] = (),
) -> Callable[..., Any]:
    lifted = as_pytree(factory, structure=structure, numbers=numbers)
    lifted.__doc__, lifted.__module__ = docstring, __name__
    return lifted


def _gathering(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return `factory` with an update that gathers sharded arrays first.

    On explicit mesh axes JAX cannot derive the sharding of the products in these updates.
    """

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        tx = optax.with_extra_args_support(factory(*args, **kwargs))

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            return apply_gathered(functools.partial(tx.update, **extra), updates, state, params)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return build


scale_by_acprop = _lift(
    optax.contrib.scale_by_acprop,
    """u = g / (sqrt(s_old / (1 - b2^(t-1))) + eps): see `acprop`. Lifted from optax.""",
)
acprop = _lift(
    optax.contrib.acprop,
    """ACProp: the gradient over AdaBelief's magnitude of the previous step. Lifted from optax.

        u = -learning_rate g / (sqrt(s_old / (1 - b2^(t-1))) + eps), with a root of 1 at first

    State: `ScaleByBeliefState(count, mu, nu)`, two trees.
    Differs from: `adabelief`, which divides the average gradient by the current magnitude.
    Source: Zhuang et al. 2021, arXiv:2110.05454.
    """,
)
scale_by_cocob = _lift(
    optax.contrib.scale_by_cocob,
    """Coin betting: see `cocob`. The update already has the sign of descent. Lifted from optax.""",
)
cocob = _lift(
    optax.contrib.cocob,
    """COCOB: coin betting on the sign of each gradient, without a learning rate. Lifted from optax.

        u = p0 - p - G (1 + reward / L) / max(|g|_1 + L, alpha L)

    G, |g|_1 and the reward are sums over the steps; L is the largest |g| so far.

    State: `COCOBState(init_particles, cumulative_gradients, scale, subgradients, reward)`, five
      trees.
    Differs from: `dog`, which has one rate for the whole tree.
    Source: Orabona & Tommasi 2017, algorithm 2, arXiv:1705.07795.
    """,
)
scale_by_galore = _lift(
    _gathering(optax.contrib.scale_by_galore),
    """A base optimizer in a low-rank subspace of each matrix: see `galore`. Lifted from optax.""",
    structure=["rank", "update_proj_gap", "weight_dimension_numbers"],
)
galore = _lift(
    _gathering(optax.contrib.galore),
    """GaLore: Adam in a low-rank subspace of each matrix's gradient. Lifted from optax.

        u = -learning_rate scale P adam(P^T g), for P the first singular vectors of a past g

    State: `GaLoreState(count, base_optimizer_state, projector)`, Adam's state and the projector, in
      the shapes of the subspace. On explicit mesh axes each update gathers the gradients, the
      parameters and the state, and every device computes the whole step.
    Differs from: `soap`, which rotates into complete bases.
    Source: Zhao et al. 2024, algorithm 1, arXiv:2403.03507.
    """,
    structure=["rank", "update_proj_gap", "weight_dimension_numbers"],
)
momo = _lift(
    _gathering(optax.contrib.momo),
    """MoMo: momentum with Polyak's step on a model of the loss. Lifted from optax.

        u = -min(learning_rate, (f_model - lower_bound) / ||m||^2) m

    State: `MomoState(exp_avg, barf, gamma, lb, count)`, one tree. `update` takes `value=loss`.
      On explicit mesh axes `update` gathers the gradients, the parameters and the state.
    Differs from: `polyak_sgd`, which has no momentum.
    Source: Schaipp et al. 2024, algorithm 1, arXiv:2305.07583.
    """,
)
momo_adam = _lift(
    _gathering(optax.contrib.momo_adam),
    """MoMo-Adam: Adam with Polyak's step on a model of the loss. Lifted from optax.

        u = -min(learning_rate / (1 - b1^t), (f_model - lower_bound) / ||m||_D^2) m / D

    State: `MomoAdamState(exp_avg, exp_avg_sq, barf, gamma, lb, count)`, two trees. `update` takes
      `value=loss`. On explicit mesh axes `update` gathers the gradients, parameters and state.
    Differs from: `momo`, whose norm is Euclidean.
    Source: Schaipp et al. 2024, algorithm 2, arXiv:2305.07583.
    """,
)
scale_by_optimistic_gradient = _lift(
    optax.scale_by_optimistic_gradient,
    """u = (alpha + beta) g - beta g_old. Lifted from optax.""",
)
optimistic_gradient_descent = _lift(
    optax.optimistic_gradient_descent,
    """Optimistic gradient descent: for games, where plain descent circles. Lifted from optax.

        u = -learning_rate ((alpha + beta) g - beta g_old)

    State: `ScaleByOptimisticGradientState(is_initial_step, previous_gradient)`, one tree.
    Differs from: `nesterov`, which extrapolates along the sum of all gradients so far.
    Source: Mokhtari, Ozdaglar & Pattathil 2020, arXiv:1901.08511.
    """,
)
optimistic_adam = _lift(
    optax.optimistic_adam,
    """Optimistic Adam: an older signature, deprecated in optax. Lifted from optax.

        u = -((learning_rate + optimism) a - optimism a_old), for a the direction of NAdam

    State: the state of `adam` and one more tree.
    Differs from: `optimistic_adam_v2`, whose learning rate may be a schedule.
    Source: Daskalakis et al. 2018, algorithm 1, arXiv:1711.00141.
    """,
)
optimistic_adam_v2 = _lift(
    optax.optimistic_adam_v2,
    """Optimistic Adam: for games, where Adam circles. Lifted from optax.

        u = -learning_rate ((alpha + beta) a - beta a_old), for a the direction of NAdam

    State: the state of `adam` and one more tree.
    Differs from: `nadam`, whose update does not subtract the previous direction.
    Source: Daskalakis et al. 2018, algorithm 1, arXiv:1711.00141.
    """,
    numbers=["alpha", "beta", "b1", "b2", "eps", "eps_root"],
)
scale_by_simplified_ademamix = _lift(
    optax.contrib.scale_by_simplified_ademamix,
    """u = (m + alpha g) / (sqrt(v^) + eps): see `simplified_ademamix`. Lifted from optax.""",
)
simplified_ademamix = _lift(
    optax.contrib.simplified_ademamix,
    """Simplified AdEMAMix: AdEMAMix with one decaying sum and the gradient. Lifted from optax.

        m <- b1 m + g            u = -learning_rate (m + alpha g) / (sqrt(v^) + eps)

    State: `ScaleBySimplifiedAdEMAMixState(t, m, n)`, two trees.
    Differs from: `ademamix`, which adds two averages.
    Source: Morwani et al. 2025, arXiv:2502.02431.
    """,
)
sophia = _lift(
    optax.contrib.sophia,
    """Sophia: average gradient over a running estimate of the Hessian diagonal. Lifted from optax.

        u = -learning_rate (clip(m / max(gamma h, eps), 1) + weight_decay p)

    State: `SophiaState(count, mu, nu, hessian_fn_state)`, two trees. `update` takes
      `obj_fn=params -> loss`.
    Differs from: `adam`, which divides by a root mean square of gradients.
    Source: Liu et al. 2024, algorithm 3, arXiv:2305.14342.
    """,
    structure=["print_win_rate_every_n_steps"],
)
