r"""What the metrics report beside a loss.

Of a list they say its masses, and its overlap with a top k. A token lists $n$ different
columns. A column is among the student's $n$ largest if fewer than $n$ columns have a
larger logit, so that columns with equal logits are in or out together. Of the listed
columns in the order of the student's logits, the first ones are in, and the rest out: a
bisection finds how many, with no sort of the vocabulary.
"""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._divergence.catalogue import ForwardKL
from .._math.softmax import entropy
from .._math.vocabulary import Vocabulary
from .._source.sparse_teacher import ListSource
from .._util.compat import zeros
from .comparison import Comparison, PerModel, terms
from .list_comparison import (
    compare_list,
    ListComparison,
    LISTED,
    student_row,
    StudentRow,
    UNLISTED,
)
from .row_stats import Columns, Listed, Shifted, Statistic, SumExp


class ListMetricValues(NamedTuple):
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


def list_metric_values(
    teacher: ListSource, row: StudentRow, number_among: jax.Array, vocab_size: int
) -> ListMetricValues:
    """From what is known of all columns."""
    k = teacher.columns.shape[-1]
    number = jnp.sum(teacher.has_column(vocab_size), axis=-1)
    p_mass = jnp.sum(jnp.exp(teacher.log_probs), axis=-1)
    q_mass = jnp.sum(jax.nn.softmax(row.z, axis=-1)[:, :k], axis=-1)
    overlap = number_among / jnp.maximum(number, 1).astype(number_among.dtype)
    # No comparison is true of NaN.
    is_nan = jnp.isnan(p_mass) | jnp.isnan(q_mass)
    return ListMetricValues(p_mass, q_mass, jnp.where(is_nan, jnp.nan, overlap))


class MetricValues(NamedTuple):
    """What is reported beside the terms, `[B]` each: at temperature 1, or beside a list
    as it is compared."""

    kl: jax.Array
    student_entropy: jax.Array
    teacher_entropy: jax.Array
    top1_agreement: jax.Array
    of_list: ListMetricValues | None  # None: the teacher has no list


class Top(NamedTuple):
    """The first column with the largest logit, and that logit, `[B]`."""

    logit: jax.Array
    column: jax.Array

    @classmethod
    def of(cls, logits: jax.Array, vocab: Vocabulary) -> "Top":
        first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return cls(jnp.max(logits, axis=-1), first + vocab.start)

    @classmethod
    def of_none(cls, types: "Top") -> "Top":
        """Of no column, which is none of a row of -inf either."""
        logit, column = (zeros(x, x.shape) for x in types)
        return cls(logit - jnp.inf, column + jnp.iinfo(column.dtype).max)

    def of_both(self, other: "Top") -> "Top":
        """Of two sets of columns together."""
        is_first = (other.logit == self.logit) & (other.column < self.column)
        is_other = (other.logit > self.logit) | is_first
        pairs = zip(self, other, strict=True)
        return Top(*(jnp.where(is_other, y, x) for x, y in pairs))

    def of_devices(self, logit: jax.Array, vocab: Vocabulary) -> "Top":
        """Of the columns of all devices, of which `logit` is the largest."""
        column = jnp.where(self.logit == logit, self.column, vocab.size)
        return Top(logit, vocab.pmin(column))


class ColumnSums(NamedTuple):
    """Sums over columns, `[B]` each, but for tops, of which there is the larger."""

    kl: jax.Array
    student_entropy: jax.Array
    teacher_entropy: jax.Array
    tops: PerModel  # Top
    # `count_larger`, `[B, k]`; None: not needed, or all columns are at hand together.
    larger: jax.Array | None = None


class Metrics(abc.ABC):
    """Those of a comparison. They go through the phases of terms, and have neither a
    weight nor a gradient."""

    def __init__(self, comparison: Comparison):
        self.comparison, self.teacher = comparison, comparison.teacher

    @abc.abstractmethod
    def statistics(self, c: Columns) -> Sequence[Statistic]: ...

    @abc.abstractmethod
    def sums(self, c: Columns, combined: Any) -> ColumnSums:
        """Of the columns at hand; `known` is that of the comparison."""

    def value(self, of_all: Columns, sums: ColumnSums) -> MetricValues:
        agree = sums.tops.student.column == sums.tops.teacher.column
        return MetricValues(
            kl=sums.kl,
            student_entropy=sums.student_entropy,
            teacher_entropy=sums.teacher_entropy,
            top1_agreement=agree.astype(sums.kl.dtype),
            of_list=None,
        )


class DenseMetrics(Metrics):
    """At temperature 1; beside a list, at the temperatures of the loss."""

    def _rows(self, c):
        at_1 = self.teacher.kind != "list"
        return [c.row(name, at_1=at_1) for name in ("teacher", "student")]

    def statistics(self, c):
        return list(map(SumExp, self._rows(c)))

    def sums(self, c, combined):
        del combined
        p, q = (c.model(row).softmax() for row in self._rows(c))
        return ColumnSums(
            jnp.sum(terms(ForwardKL(), p.outcomes, q.outcomes, c.vocab), axis=-1),
            entropy(q.outcomes),
            entropy(p.outcomes),
            PerModel(*(Top.of(c.logits[x], c.vocab) for x in ("teacher", "student"))),
        )


class ListMetrics(Metrics):
    """Of the outcomes of a list and the rest, as the loss compares them."""

    def statistics(self, c):
        return [Listed(LISTED), SumExp(UNLISTED), Shifted(UNLISTED)]

    def sums(self, c, combined):
        student = c.logits["student"]
        tops = PerModel(self._top(student.dtype), Top.of(student, c.vocab))
        entropies = entropy(combined.q.outcomes), entropy(combined.p.outcomes)
        of_list = map(c.vocab.on_first_shard, (combined.kl, *entropies))
        return ColumnSums(*of_list, tops=tops, larger=self._larger(c))

    def _larger(self, c: Columns) -> jax.Array | None:
        if not c.vocab.is_block:
            return None  # see `value`
        of_list = self.teacher.columns, c.rows.sums[Listed(LISTED)]
        return count_larger(*of_list, c.logits["student"], c.vocab)

    def _top(self, dtype: jnp.dtype) -> Top:
        """The first of the most likely columns of the list."""
        log_probs = self.teacher.log_probs.astype(dtype)
        at = jnp.argmax(log_probs, axis=-1)[:, None]
        column = jnp.take_along_axis(self.teacher.columns, at, axis=-1)[:, 0]
        return Top(jnp.max(log_probs, axis=-1), column.astype(jnp.int32))

    def value(self, of_all, sums):
        columns, vocab = self.teacher.columns, of_all.vocab
        if sums.larger is not None:
            number = number_among_top(columns, sums.larger, vocab)
        else:
            listed, student = of_all.rows.sums[Listed(LISTED)], of_all.logits["student"]
            number = find_number_among_top(columns, listed, student, vocab)
        row = student_row(self.teacher, of_all)
        of_list = list_metric_values(self.teacher, row, number, vocab.size)
        # They are the same on all devices, but JAX cannot know that.
        of_list = vocab.psum(*map(vocab.on_first_shard, of_list))
        return super().value(of_all, sums)._replace(of_list=ListMetricValues(*of_list))


class LumpedListMetrics(ListMetrics):
    """The same of a list whose loss, of a user's function, is one of all columns."""

    def sums(self, c, combined):
        del combined
        outcomes = compare_list(ForwardKL(), self.teacher, c)
        return super().sums(c, outcomes)


class SpreadListMetrics(ListMetrics):
    """Of all columns, over which a list has spread its rest."""

    def statistics(self, c):
        return [*super().statistics(c), *DenseMetrics(self.comparison).statistics(c)]

    def sums(self, c, combined):
        dense = DenseMetrics(self.comparison).sums(c, combined)
        return dense._replace(larger=self._larger(c))


def metrics_for(comparison: Comparison) -> Metrics:
    if isinstance(comparison, ListComparison):
        return ListMetrics(comparison)
    if comparison.teacher.kind != "list":
        return DenseMetrics(comparison)
    is_lumped = comparison.teacher.has_lumped_rest
    return (LumpedListMetrics if is_lumped else SpreadListMetrics)(comparison)
