r"""Lists of a few columns in each row: their entries, and the mass that they leave.

A TPU takes some 40 ns for each entry of a scatter, one after the other, and copies the
array before and after. There we spread the entries over their columns by a product of
one-hot matrices: column `c` is `(c // 128, c % 128)`, and

$$ x_{hl} = \sum_j \delta_{h, h_j}\,v_j\,\delta_{l, l_j}. $$
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._math.numerics import zero_unless
from .._math.vocabulary import Vocabulary


def merge_repeated(
    indices: jax.Array, log_probs: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Sorted columns and their log-probabilities, `[B, k]`, repeated ones added up.

    Slots that are left over have a column beyond all others, and `-inf`.
    """
    none = jnp.iinfo(indices.dtype).max
    empty = indices < 0
    columns = jnp.where(empty, none, indices)
    log_probs = jnp.where(empty, -jnp.inf, log_probs.astype(dtype))
    columns, log_probs = jax.lax.sort((columns, log_probs), num_keys=1)
    is_new = columns[:, 1:] != columns[:, :-1]
    slot = jnp.cumsum(jnp.pad(is_new, ((0, 0), (1, 0))), axis=-1)
    at = jnp.arange(slot.shape[0])[:, None], slot
    # The sum is relative to the largest entry of a column: one entry stays exact.
    largest = jnp.full_like(log_probs, -jnp.inf).at[at].max(log_probs)
    relative = zero_unless(log_probs > -jnp.inf, jnp.exp(log_probs - largest[at]))
    total = jnp.zeros_like(log_probs).at[at].add(relative)
    columns = jnp.full_like(columns, none).at[at].set(columns)
    return columns, largest + jnp.log(jnp.maximum(total, 1))


def positions(columns: jax.Array, vocab: Vocabulary) -> tuple[jax.Array, jax.Array]:
    """Row and position of each entry within the tile, to index it with.

    Columns on other shards map out of bounds, as do empty slots.
    """
    rows = jnp.arange(columns.shape[0])[:, None]
    local = columns - jnp.asarray(vocab.start, columns.dtype)
    here = (columns >= 0) & (local >= 0) & (local < vocab.width)
    return rows, jnp.where(here, local, vocab.width)


def without_listed(
    logits: jax.Array, columns: jax.Array, vocab: Vocabulary
) -> jax.Array:
    """The logits, `[B, V]`, with `-inf` in the listed columns."""
    at = positions(columns, vocab)

    def product(logits, columns):
        listed = _product(jnp.ones(columns.shape, jnp.bfloat16), columns, logits)
        return jnp.where(listed > 0, -jnp.inf, logits)

    def scatter(logits, columns):
        return logits.at[at[0], columns].set(-jnp.inf, mode="drop")

    return _by_platform(product, scatter, logits, at[1])


def plus_listed(
    x: jax.Array, values: jax.Array, columns: jax.Array, vocab: Vocabulary
) -> jax.Array:
    """`x`, `[B, V]`, and the values, `[B, k]`, in their columns.

    The columns of a row are different, and 0 in `x`.
    """
    at = positions(columns, vocab)

    def product(x, values, columns):
        # XLA would widen the product before it moves it into the layout of `x`.
        spread = jax.lax.optimization_barrier(_product(values, columns, x))
        return x + spread.astype(x.dtype)

    def scatter(x, values, columns):
        return x.at[at[0], columns].add(values.astype(x.dtype), mode="drop")

    return _by_platform(product, scatter, x, values, at[1])


_LANES = 128
_MOST_ENTRIES = 512  # of a row, for a product


def _by_platform(product: Callable, scatter: Callable, x: Any, *entries: Any) -> Any:
    if entries[-1].shape[-1] > _MOST_ENTRIES:
        return scatter(x, *entries)
    return jax.lax.platform_dependent(x, *entries, tpu=product, default=scatter)


def _product(values: jax.Array, columns: jax.Array, like: jax.Array) -> jax.Array:
    """The values in their columns, of the shape of `like`, `[B, V]`, and 0 elsewhere.

    A value that is not finite, or whose column does not exist, is left out.
    """
    width = like.shape[-1]
    at_high, at_low = columns // _LANES, columns % _LANES
    values = zero_unless(jnp.isfinite(values), values)
    of_high = jax.nn.one_hot(at_high, -(-width // _LANES), dtype=values.dtype)
    of_low = jax.nn.one_hot(at_low, _LANES, dtype=values.dtype) * values[..., None]
    precision = jax.lax.Precision.HIGHEST if values.dtype != jnp.bfloat16 else None
    x = jnp.einsum("bkh,bkl->bhl", of_high, of_low, precision=precision)
    rows, high, low = x.shape
    return x.reshape(rows, high * low)[:, :width]


def unlisted_mass(log_probs: jax.Array) -> jax.Array:
    """`1 - Σ p`, `[B]`, of the listed log-probabilities, `[B, k]`."""
    # When one column has p ≈ 1, `1 - Σ p` cancels: subtract the others from `1 - p`.
    at_top = jax.nn.one_hot(jnp.argmax(log_probs, -1), log_probs.shape[-1], dtype=bool)
    top = jnp.max(log_probs, axis=-1)
    others = jnp.sum(zero_unless(~at_top, jnp.exp(log_probs)), axis=-1)
    return jnp.maximum(-jnp.expm1(top) - others, 0)
