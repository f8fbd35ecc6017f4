r"""What the metrics say of a teacher's list: its masses, and its overlap with a top k.

A token lists $n$ different columns. A column is among the student's $n$ largest if
fewer than $n$ columns have a larger logit, so that columns with equal logits are in or
out together. Of the listed columns in the order of the student's logits, the first ones
are in, and the rest out: a bisection finds how many, with no sort of the vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._lists import positions
from ._numerics import zero_unless
from ._softmax import SoftmaxStats
from ._vocabulary import Vocabulary


class ListSums(NamedTuple):
    """The listed columns, repeated ones once: sums over the columns at hand.

    The first `number` slots of a row hold a column.
    """

    logits: jax.Array  # the student's, [B, k]; 0 in the other slots
    number: jax.Array  # [B]
    mass: jax.Array  # the teacher's, as the list has it, [B]

    @classmethod
    def of(
        cls,
        columns: jax.Array,
        log_probs: jax.Array,
        student: jax.Array,
        vocab: Vocabulary,
    ) -> "ListSums":
        """Of what `merge_repeated` returns, and the student's logits, `[B, V]`."""
        at = positions(columns, vocab)
        logits = student.at[at].get(mode="fill", fill_value=0)
        number = jnp.sum(columns < vocab.size, axis=-1).astype(student.dtype)
        mass = jnp.sum(jnp.exp(log_probs), axis=-1)
        first = vocab.on_first_shard
        return cls(logits, first(number), first(mass))

    @property
    def has_column(self) -> jax.Array:
        """Whether a slot holds a column, `[B, k]`."""
        slots = jnp.arange(self.logits.shape[-1], dtype=self.number.dtype)
        return slots[None, :] < self.number[:, None]


class ListStatistics(NamedTuple):
    """See `DistillationMetrics`, `[B]` each."""

    teacher_listed_mass: jax.Array
    student_listed_mass: jax.Array
    top_k_overlap: jax.Array


def count_larger(
    lists: ListSums, columns: jax.Array, student: jax.Array, vocab: Vocabulary
) -> jax.Array:
    """The number of columns at hand with a larger logit than each slot's, `[B, k]`.

    All columns are compared with all slots: in the lean plan, a block's logits are at
    hand once only.
    """

    def of_slot(slot):
        listed, column = slot
        return _count_larger(listed, column, student, vocab)

    return jax.lax.map(of_slot, (lists.logits.T, columns.T)).T


def _count_larger(
    listed: jax.Array, column: jax.Array, student: jax.Array, vocab: Vocabulary
) -> jax.Array:
    # No column is larger than itself, though its logit, made again, may be.
    is_other = vocab.columns[None, :] != column[:, None].astype(jnp.int32)
    is_larger = (student > listed[:, None]) & is_other
    return jnp.sum(is_larger, axis=-1).astype(student.dtype)


def number_among_top(lists: ListSums, larger: jax.Array) -> jax.Array:
    """The number of listed columns among the student's largest, `[B]`, from
    `count_larger` of all columns."""
    is_among = lists.has_column & (larger < lists.number[:, None])
    return jnp.sum(is_among, axis=-1).astype(larger.dtype)


def find_number_among_top(
    lists: ListSums, columns: jax.Array, student: jax.Array, vocab: Vocabulary
) -> jax.Array:
    """The same, by a bisection: a pass over the columns for each bit of `k`."""
    listed = jnp.where(lists.has_column, lists.logits, -jnp.inf)
    descending = jnp.argsort(listed, axis=-1, descending=True)
    at = lambda x, i: jnp.take_along_axis(x, i[:, None], axis=-1, mode="clip")[:, 0]
    low, high = jnp.zeros_like(lists.number, jnp.int32), lists.number.astype(jnp.int32)
    for _ in range(listed.shape[-1].bit_length()):
        middle = (low + high) // 2
        slot = at(descending, middle)
        larger = _count_larger(at(listed, slot), at(columns, slot), student, vocab)
        (larger,) = vocab.psum(larger)
        is_among = (larger < lists.number) & (middle < high)
        low = jnp.where(is_among, middle + 1, low)
        high = jnp.where(is_among, high, middle)
    return low.astype(student.dtype)


def list_statistics(
    lists: ListSums, number_among: jax.Array, at_1: SoftmaxStats
) -> ListStatistics:
    """From sums over all columns; `at_1` is the student's softmax at temperature 1."""
    q = zero_unless(lists.has_column, at_1.softmax(lists.logits).prob)
    q_mass = jnp.sum(q, axis=-1)
    overlap = number_among / jnp.maximum(lists.number, 1)
    # No comparison is true of NaN.
    is_nan = jnp.isnan(lists.mass) | jnp.isnan(q_mass)
    return ListStatistics(lists.mass, q_mass, jnp.where(is_nan, jnp.nan, overlap))
