"""Precision: dtypes, masks that keep NaN out, and series that keep their digits."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def loss_dtype(*arrays: jax.Array | None) -> jnp.dtype:
    """Dtype of statistics and losses: float64 if an array has it, else float32."""
    is_double = any(x is not None and x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def zero_unless(condition: jax.Array | bool, x: jax.Array) -> jax.Array:
    """`x` where `condition`, else an exact 0, whatever `x` holds there."""
    return jnp.where(condition, x, jnp.zeros_like(x))


def weigh(weight: jax.Array, x: jax.Array) -> jax.Array:
    """`weight · x`, and 0 where the weight is, even if `x` is NaN or infinite there."""
    return weight * zero_unless((weight != 0) | jnp.isfinite(x), x)


NEAR = 0.5  # |r| below which `e^r - 1 - r` is summed as a series


def near_part(ratio: jax.Array, limit: float = NEAR) -> tuple[jax.Array, jax.Array]:
    """Whether a log-ratio is small; and the ratio there, 0 elsewhere."""
    near = jnp.abs(ratio) < limit
    return near, zero_unless(near, ratio)


def series(r: jax.Array, coefficient: Callable[[int], float]) -> jax.Array:
    """`Σ_k coefficient(k) r^k / (k + 2)!`, to the last bits for `|r| < NEAR`."""
    terms = 8 if r.dtype == jnp.float32 else 15
    total = jnp.zeros_like(r)
    for k in reversed(range(terms)):
        total = total * r + coefficient(k) / math.factorial(k + 2)
    return total


def second_order(r: jax.Array) -> jax.Array:
    """`e^r - 1 - r`, to the last bits for `|r| < NEAR`."""
    return r * r * series(r, lambda k: 1.0)
