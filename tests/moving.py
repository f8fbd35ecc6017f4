"""Divergences whose parameter is an array, beside their oracles."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxkl import (
    AlphaDivergence,
    ForwardKL,
    JensenShannon,
    Mixture,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
)

from . import oracle
from .cases import squared_error


class Moving(NamedTuple):
    """A divergence of one parameter, its oracle, and values with all its limits."""

    make: Callable[[Any], Any]
    oracle: Callable[[Any], Any]
    values: tuple[float, ...] = (0.3, 0, 1e-6, 0.5, 1 - 1e-6, 1, 0.9)

    def array(self, tokens, dtype="float32"):
        return jnp.resize(jnp.asarray(self.values, dtype), tokens)

    def over(self, tokens, where=None, dtype="float32"):
        """The divergence of all tokens, and the oracle of those in `where`."""
        x = self.array(tokens, dtype)
        exact = np.asarray(x, np.float64)
        kept = exact.ravel() if where is None else exact[np.asarray(where)]
        return self.make(x), oracle.by_token([self.oracle(value) for value in kept])


def _skew(of):
    # At α = 1 the mixture is the model itself.
    return lambda x: oracle.mixture((0, of(0))) if x == 1 else of(x)


MOVING = {
    "symmetric": Moving(SymmetricKL, oracle.symmetric_kl),
    "js": Moving(JensenShannon, oracle.jensen_shannon),
    "js_normalized": Moving(
        lambda x: JensenShannon(x, normalized=True),
        lambda x: oracle.jensen_shannon(x, normalized=True),
    ),
    "skew_forward": Moving(
        SkewForwardKL, oracle.skew_forward_kl, (0.3, 0, 1e-6, 0.5, 1 - 1e-6, 0.9)
    ),
    "skew_reverse": Moving(
        SkewReverseKL, oracle.skew_reverse_kl, (0.3, 0, 1e-6, 0.5, 1 - 1e-6, 0.9)
    ),
    "alpha": Moving(
        AlphaDivergence,
        oracle.alpha_divergence,
        (0.3, 0, 1e-6, 0.5, 1, -1, 2, 1 + 1e-6),
    ),
    "kls": Moving(
        lambda x: Mixture(
            ((x, ForwardKL()), (0.5, ReverseKL()), (1 - x, SymmetricKL(x)))
        ),
        lambda x: oracle.mixture(
            (x, oracle.forward_kl),
            (0.5, oracle.reverse_kl),
            (1 - x, oracle.symmetric_kl(x)),
        ),
    ),
    "mixture": Moving(
        lambda x: Mixture(
            ((x, ReverseKL()), (2.0, JensenShannon(x)), (1 - x, squared_error))
        ),
        lambda x: oracle.mixture(
            (x, oracle.reverse_kl),
            (2, oracle.jensen_shannon(x)),
            (1 - x, oracle.squared_error),
        ),
    ),
}
