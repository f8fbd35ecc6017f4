"""Precision: dtypes, masks that keep NaN out, and series that keep their digits."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def loss_dtype(*arrays: jax.Array | None) -> jnp.dtype:
    """Dtype of statistics and losses: float64 if an array has it, else float32."""
    is_double = any(x is not None and x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def zero_unless(condition: jax.Array | bool, x: jax.Array) -> jax.Array:
    """`x` where `condition`, else an exact 0, whatever `x` holds there."""
    return jnp.where(condition, x, jnp.zeros_like(x))


def safe_log(x: jax.Array) -> jax.Array:
    """`log x`; at 0 it is `-inf` with a gradient of 0."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)


def weigh(weight: jax.Array, x: jax.Array) -> jax.Array:
    """`weight · x`, and 0 where the weight is, even if `x` is NaN or infinite there."""
    return weight * zero_unless((weight != 0) | jnp.isfinite(x), x)


NEAR = 0.5  # |r| below which a difference is summed as a series


def near_part(
    ratio: jax.Array, limit: float | jax.Array = NEAR
) -> tuple[jax.Array, jax.Array]:
    """Whether a log-ratio is small; and the ratio there, 0 elsewhere."""
    near = jnp.abs(ratio) < limit
    return near, zero_unless(near, ratio)


def polynomial(x: jax.Array, coefficients: Sequence[float]) -> jax.Array:
    """`Σ_k coefficients[k] x^k`."""
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


class Economized:
    """A power series, cut short where it needs the fewest terms.

    The Chebyshev series of a function on an interval converges faster than its Taylor
    series. We cut the first, and write what is left as a polynomial again.
    """

    def __init__(
        self, taylor: Sequence[float], interval: tuple[float, float], terms: int
    ):
        """`terms` are those for float32; float64 takes all of `taylor`."""
        chebyshev = np.polynomial.Polynomial(taylor).convert(
            kind=np.polynomial.Chebyshev, domain=interval, window=(-1, 1)
        )
        short = chebyshev.truncate(terms).convert(kind=np.polynomial.Polynomial)
        self._short, self._long = short.coef.tolist(), list(taylor)

    def __call__(self, x: jax.Array) -> jax.Array:
        return polynomial(x, self._long if x.dtype == jnp.float64 else self._short)


_SECOND_ORDER = Economized(
    [1 / math.factorial(k + 2) for k in range(15)], (-NEAR, NEAR), terms=6
)


def second_order(r: jax.Array) -> jax.Array:
    """`e^r - 1 - r`, to the last bits for `|r| < NEAR`."""
    return r * r * _SECOND_ORDER(r)


def tanh_taylor(terms: int) -> list[float]:
    """The coefficients `c` of `tanh(r / 2) = Σ_k c[k] r^(2k + 1)`."""
    c = [0.5]  # The derivative of t(r) = tanh(r / 2) is (1 - t²) / 2.
    for k in range(1, terms):
        square = sum(c[i] * c[k - 1 - i] for i in range(k))
        c.append(-square / (4 * k + 2))
    return c


_TANH_EXCESS = Economized([2 * c for c in tanh_taylor(12)[1:]], (0, NEAR**2), terms=3)


def tanh_excess(r: jax.Array) -> jax.Array:
    """`tanh(r / 2) / (r / 2) - 1`, such that `(1 + tanh_excess(r)) r / 2` is right to
    the last bits for `|r| < NEAR`."""
    return r * r * _TANH_EXCESS(r * r)
