r"""What the metrics say of a teacher's list: its masses, and its overlap with a top k.

A token lists $n$ different columns. A column is among the student's $n$ largest if
fewer than $n$ columns have a larger logit, so that columns with equal logits are in or
out together. Of the listed columns in the order of the student's logits, the first ones
are in, and the rest out: a bisection finds how many, with no sort of the vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._math.vocabulary import Vocabulary
from .._source.list_source import ListSource
from .list_comparison import StudentRow


class ListStatistics(NamedTuple):
    """See `DistillationMetrics`, `[B]` each."""

    teacher_listed_mass: jax.Array
    student_listed_mass: jax.Array
    top_k_overlap: jax.Array


def count_larger(
    columns: jax.Array, listed: jax.Array, student: jax.Array, vocab: Vocabulary
) -> jax.Array:
    """The number of columns at hand with a larger logit than each slot's, `[B, k]`.

    All columns are compared with all slots: in the lean plan, a block's logits are at
    hand once only.
    """

    def of_slot(slot):
        listed, column = slot
        return _count_larger(listed, column, student, vocab)

    return jax.lax.map(of_slot, (listed.T, columns.T)).T


def _count_larger(
    listed: jax.Array, column: jax.Array, student: jax.Array, vocab: Vocabulary
) -> jax.Array:
    # No column is larger than itself, though its logit, made again, may be.
    is_other = vocab.columns[None, :] != column[:, None].astype(jnp.int32)
    is_larger = (student > listed[:, None]) & is_other
    return jnp.sum(is_larger, axis=-1).astype(student.dtype)


def number_among_top(
    columns: jax.Array, larger: jax.Array, vocab: Vocabulary
) -> jax.Array:
    """The number of listed columns among the student's largest, `[B]`, from
    `count_larger` of all columns."""
    has_column = columns < vocab.size
    number = jnp.sum(has_column, axis=-1, keepdims=True).astype(larger.dtype)
    is_among = has_column & (larger < number)
    return jnp.sum(is_among, axis=-1).astype(larger.dtype)


def find_number_among_top(
    columns: jax.Array, listed: jax.Array, student: jax.Array, vocab: Vocabulary
) -> jax.Array:
    """The same, by a bisection: a pass over the columns for each bit of `k`."""
    has_column = columns < vocab.size
    number = jnp.sum(has_column, axis=-1).astype(jnp.int32)
    listed = jnp.where(has_column, listed, -jnp.inf)
    descending = jnp.argsort(listed, axis=-1, descending=True)
    at = lambda x, i: jnp.take_along_axis(x, i[:, None], axis=-1, mode="clip")[:, 0]
    low, high = jnp.zeros_like(number), number
    for _ in range(listed.shape[-1].bit_length()):
        middle = (low + high) // 2
        slot = at(descending, middle)
        larger = _count_larger(at(listed, slot), at(columns, slot), student, vocab)
        (larger,) = vocab.psum(larger)
        is_among = (larger < number.astype(larger.dtype)) & (middle < high)
        low = jnp.where(is_among, middle + 1, low)
        high = jnp.where(is_among, high, middle)
    return low.astype(student.dtype)


def list_statistics(
    teacher: ListSource, row: StudentRow, number_among: jax.Array, vocab_size: int
) -> ListStatistics:
    """From what is known of all columns."""
    k = teacher.columns.shape[-1]
    number = jnp.sum(teacher.has_column(vocab_size), axis=-1)
    p_mass = jnp.sum(jnp.exp(teacher.log_probs), axis=-1)
    q_mass = jnp.sum(jax.nn.softmax(row.z, axis=-1)[:, :k], axis=-1)
    overlap = number_among / jnp.maximum(number, 1).astype(number_among.dtype)
    # No comparison is true of NaN.
    is_nan = jnp.isnan(p_mass) | jnp.isnan(q_mass)
    return ListStatistics(p_mass, q_mass, jnp.where(is_nan, jnp.nan, overlap))
