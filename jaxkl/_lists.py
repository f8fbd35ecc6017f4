"""Lists of a few columns in each row: their entries, and the mass that they leave."""

import jax
import jax.numpy as jnp

from ._numerics import zero_unless
from ._vocabulary import Vocabulary


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


def unlisted_mass(log_probs: jax.Array) -> jax.Array:
    """`1 - Σ p`, `[B]`, of the listed log-probabilities, `[B, k]`."""
    # When one column has p ≈ 1, `1 - Σ p` cancels: subtract the others from `1 - p`.
    at_top = jax.nn.one_hot(jnp.argmax(log_probs, -1), log_probs.shape[-1], dtype=bool)
    top = jnp.max(log_probs, axis=-1)
    others = jnp.sum(zero_unless(~at_top, jnp.exp(log_probs)), axis=-1)
    return jnp.maximum(-jnp.expm1(top) - others, 0)
