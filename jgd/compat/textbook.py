"""Optimizers in the form of a textbook chapter, with the defaults of its classes.

They differ from jgd's optimizers of the same names in three ways. Momentum exists as a velocity and
as an average, whose steps are 1 - momentum times as long. The velocity includes the learning rate.
Epsilon, 1e-7 by default, is outside the root; eps=0 and eps_root=1e-7 put it inside.
"""

import optax
from optax import GradientTransformation

from jgd.arguments import Decay, Fraction, NonNegative, Number
from jgd.combinators import chain, divide, named, with_nesterov
from jgd.compat.shared import Beta, scale_by_uncorrected_adam
from jgd.pytree import as_pytree
from jgd.transforms import (
    identity,
    moving_average,
    root,
    running_sum,
    scale_by_learning_rate,
    scale_by_momentum,
    square,
)

__all__ = ["adagrad", "adam", "momentum", "momentum_average", "nesterov", "rmsprop", "sgd"]


@as_pytree
def sgd(learning_rate: Number = 0.01) -> GradientTransformation:
    """SGD: gradient descent, u = -learning_rate g.

    Args:
      learning_rate: 0.01 by default. May be a schedule.

    State: none.
    """
    return scale_by_learning_rate(learning_rate)


@as_pytree
def momentum(learning_rate: Number = 0.01, momentum: Fraction = 0.9) -> GradientTransformation:
    """Momentum as a velocity: v <- momentum v - learning_rate g, and u = v.

    On p^2 / 2 from p = 1 with a learning rate of 0.1 the first two steps are 0.1 and 0.18 long.

    Args:
      learning_rate: 0.01 by default. May be a schedule.
      momentum: in [0, 1], 0.9 by default. May be a schedule.

    State: `optax.TraceState(trace)`, one tree, the velocity.
    Differs from: `jgd.momentum` under a schedule, whose velocity excludes the learning rate.
    """
    return chain(scale_by_learning_rate(learning_rate), scale_by_momentum(momentum))


@as_pytree
def momentum_average(
    learning_rate: Number = 0.01, momentum: Fraction = 0.9
) -> GradientTransformation:
    """Momentum as an average: v <- momentum v + (1 - momentum) g, and u = -learning_rate v.

    Args: as in `momentum`.
    State: `MovingAverageState(average)`, one tree.
    Differs from: `momentum`, whose steps are 1 / (1 - momentum) times as long, 10 times at 0.9.
    """
    return chain(moving_average(momentum), scale_by_learning_rate(learning_rate))


@as_pytree
def nesterov(learning_rate: Number = 0.01, momentum: Fraction = 0.9) -> GradientTransformation:
    """Nesterov's momentum as a velocity, in the form that only needs the gradient at p.

        v' = momentum v - learning_rate g
        u = momentum v' - learning_rate g = momentum^2 v - (1 + momentum) learning_rate g

    The code of a tutorial has v' in place of the last v, which makes the first step 2.71 instead of
    1.9 times learning_rate g for a momentum of 0.9.

    Args, State: as in `momentum`.
    Differs from: `jgd.nesterov` under a schedule, whose velocity excludes the learning rate.
    Source: Bengio, Boulanger-Lewandowski & Pascanu 2013, equation 7, arXiv:1212.0901.
    """
    velocity = with_nesterov(scale_by_momentum(momentum))
    return chain(scale_by_learning_rate(learning_rate), velocity)


@as_pytree
def adagrad(
    learning_rate: Number = 0.01,
    eps: NonNegative = 1e-7,
    eps_root: NonNegative = 0.0,
    initial_accumulator_value: NonNegative = 0.0,
) -> GradientTransformation:
    """AdaGrad: s <- s + g^2, and u = -learning_rate g / (sqrt(s + eps_root) + eps).

    Args:
      learning_rate: 0.01 by default. May be a schedule.
      eps, eps_root: at least 0, outside and inside the root; 1e-7 and 0 by default.
      initial_accumulator_value: at least 0, the initial value of s; 0 by default.

    State: `optax.ScaleByRssState(sum_of_squares)`, one tree.
    Differs from: `jgd.adagrad` and Keras, whose s starts at 0.1 and whose eps is inside the root.
    """
    total = running_sum(initial_accumulator_value, name="sum_of_squares")
    quotient = divide(identity(), chain(square(), total, root(eps, eps_root)))
    quotients = named(quotient, record=optax.ScaleByRssState)
    return chain(quotients, scale_by_learning_rate(learning_rate))


@as_pytree
def rmsprop(
    learning_rate: Number = 0.01,
    decay: Decay = 0.99,
    eps: NonNegative = 1e-7,
    eps_root: NonNegative = 0.0,
) -> GradientTransformation:
    """RMSProp: with eps outside the root.

        v <- decay v + (1 - decay) g^2            u = -learning_rate g / (sqrt(v + eps_root) + eps)

    Args:
      learning_rate: 0.01 by default. May be a schedule.
      decay: in [0, 1), 0.99 by default. May be a schedule.
      eps, eps_root: at least 0, outside and inside the root; 1e-7 and 0 by default.

    State: `optax.ScaleByRmsState(nu)`, one tree.
    Differs from: `jgd.rmsprop`, whose decay is 0.9 by default and whose eps is inside the root.
    """
    magnitude = chain(square(), moving_average(decay, name="nu"), root(eps, eps_root))
    quotients = named(divide(identity(), magnitude), record=optax.ScaleByRmsState)
    return chain(quotients, scale_by_learning_rate(learning_rate))


@as_pytree
def adam(
    learning_rate: Number = 0.001,
    b1: Beta = 0.9,
    b2: Beta = 0.999,
    eps: NonNegative = 1e-7,
    eps_root: NonNegative = 0.0,
) -> GradientTransformation:
    """Adam: with eps added to the root before the bias correction.

        m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
        u = -learning_rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v + eps_root) + eps)

    A tutorial prints m / sqrt(1 - b1^t) over an uncorrected root. With the default decays its first
    step is 10 times the learning rate, and thousands of steps after it are too long as well.

    Args:
      learning_rate: 0.001 by default. May be a schedule.
      b1, b2: in [0, 1); 0.9 and 0.999 by default.
      eps, eps_root: at least 0, outside and inside the root; 1e-7 and 0 by default.

    State: `optax.ScaleByAdamState(count, mu, nu)`, two trees.
    Differs from: `jgd.adam`, the paper's algorithm 1, which adds eps after the bias correction.
    Source: Kingma & Ba 2015, the form before section 2.1, arXiv:1412.6980.
    """
    quotients = scale_by_uncorrected_adam(b1, b2, eps, eps_root)
    return chain(quotients, scale_by_learning_rate(learning_rate))
