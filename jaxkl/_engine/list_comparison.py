r"""A teacher's list and a student's row, as two rows of k + 1 outcomes.

To the student, all columns outside the list $L$ are one more outcome, with the logit

$$ z_\mathrm{rest} = \log \sum_{v \notin L} e^{s_v / T}, \qquad
   \frac{\partial z_\mathrm{rest}}{\partial s_v}
     = \frac{e^{s_v / T - z_\mathrm{rest}}}{T}. $$

The sum is relative to the largest logit outside the list, however far that is below the
largest of the row. With the listed logits the rows are complete, on every device, and
are compared as any other rows are.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._divergence.catalogue import Divergence, ForwardKL
from .._math.numerics import safe_log, weigh, zero_unless
from .._math.softmax import Model, Softmax, SoftmaxStats
from .._math.vocabulary import Vocabulary
from .._source.lists import plus_listed, positions, without_listed
from .._source.sparse_teacher import ListSource
from .comparison import (
    compare_columns,
    Comparison,
    divergence_of,
    needs_reverse_sums,
    Pair,
    sums_of_slopes,
)
from .row_stats import Columns, Listed, PairSums, Row, Shifted, sum_exp, SumExp
from .term import Gradients, TermResult


LISTED, UNLISTED = Row("listed"), Row("unlisted")


def listed_logits(
    row: Row, teacher: ListSource, student: jax.Array, vocab: Vocabulary
) -> jax.Array:
    """The student's logits in the list, `[B, k]`, or outside it, `[B, V]`."""
    if row == UNLISTED:
        return without_listed(student, teacher.columns, vocab)
    at = positions(teacher.columns, vocab)
    return student.at[at].get(mode="fill", fill_value=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ListComparison(Comparison):
    """One of the few outcomes of a list."""

    has_columns = False

    # The dtype of the student's logits, if nothing else has a part in their gradient.
    d_dtype: jnp.dtype | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )

    def statistics(self, c):
        of_list = [Listed(LISTED), SumExp(UNLISTED), Shifted(UNLISTED)]
        return of_list if self.teacher.has_rest else of_list[:1]

    def combined(self, of_all, slopes):
        return compare_list(self.whole_divergence, self.teacher, of_all)

    def finish(self, c, combined, *, recompute):
        weight, T = self.weight, c.temperatures["student"]
        d_T = None
        if T is not None:
            d_T = c.vocab.on_first_shard(weigh(weight, combined.d_temperature))
            weight = weigh(weight, 1 / T)
        d_listed = weigh(weight[:, None], combined.d_listed)
        d_student = jnp.zeros_like(c.logits["student"])
        if combined.d_rest is not None:
            # Each column outside the list has its share of the rest.
            rest = c.model(UNLISTED)
            total = rest.stats.total
            share = weigh(weight, combined.d_rest) / jnp.where(total > 0, total, 1)
            d_student = weigh(share[:, None], jnp.exp(rest.shifted()))
        if self.d_dtype is not None:
            # Nothing is added to these, and they are rounded once here or later.
            d_listed = d_listed.astype(self.d_dtype)
        d_student = plus_listed(d_student, d_listed, self.teacher.columns, c.vocab)
        gradients = Gradients({"student": d_student}, {"student": d_T})
        value = c.vocab.on_first_shard(combined.divergence)
        return TermResult(value, gradients, combined.q.lse)

    def value(self, of_all, combined, sums):
        del of_all, combined
        return sums


class ComparedList(NamedTuple):
    """What a row of outcomes makes: `[B, k]` for those of the list, else `[B]`."""

    divergence: jax.Array
    kl: jax.Array  # KL(p ‖ q)
    p: Softmax
    q: Softmax
    d_listed: jax.Array  # the gradient by their z
    d_rest: jax.Array | None  # that by z_rest; None: the rest is no outcome
    d_temperature: jax.Array | None


def compare_list(
    divergence: Divergence, teacher: ListSource, of_all: Columns
) -> ComparedList:
    """Compares the list with the student's row, from the statistics of all columns."""
    k = teacher.columns.shape[-1]
    row, log_p = student_row(teacher, of_all), teacher.log_probs
    z = row.z
    if teacher.has_rest:
        log_p = jnp.concatenate([log_p, teacher.log_rest], axis=-1)
    else:
        z = z[:, :k]
    if teacher.tail == "drop":
        value, kl, p, q, d_z = _compare_listed(log_p, z)
    else:
        value, kl, p, q, d_z = _compare_rows(divergence, log_p, z)
    d_rest = d_z[:, k] if teacher.has_rest else None
    d_temperature, T = None, of_all.temperatures["student"]
    if T is not None:
        by_temperature = d_z * zero_unless(d_z != 0, row.mean[:, : z.shape[-1]])
        d_temperature = -jnp.sum(by_temperature, axis=-1) / T
    return ComparedList(value, kl, p, q, d_z[:, :k], d_rest, d_temperature)


class StudentRow(NamedTuple):
    """The listed columns, and the rest if its sums are known, `[B, k + 1]`."""

    z: jax.Array  # logits of these outcomes, at temperature 1
    mean: jax.Array  # -T ∂z/∂T: of a column z itself, of the rest a mean of its columns


def student_row(teacher: ListSource, of_all: Columns) -> StudentRow:
    maxima, sums = of_all.rows
    T = of_all.temperatures["student"]
    has_column = teacher.has_column(of_all.vocab.size)
    listed = jnp.where(has_column, sums[Listed(LISTED)], -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(listed, axis=-1))
    if SumExp(UNLISTED) not in sums:
        z = _shifted(SoftmaxStats(largest, T), listed)
        return StudentRow(z, z)
    stats = SoftmaxStats(jnp.maximum(largest, maxima["unlisted"]), T)
    z, top = (_shifted(stats, x) for x in (listed, maxima["unlisted"][:, None]))
    total, shifted = (sums[x(UNLISTED)][:, None] for x in (SumExp, Shifted))
    mean = top + shifted / jnp.where(total > 0, total, 1)
    both = (z, top + safe_log(total)), (z, mean)
    return StudentRow(*(jnp.concatenate(x, axis=-1) for x in both))


def _shifted(stats: SoftmaxStats, logits: jax.Array) -> jax.Array:
    return jnp.where(logits == -jnp.inf, -jnp.inf, stats.shifted(logits))


def _model(logits: jax.Array) -> Model:
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    total = sum_exp(Model(logits, SoftmaxStats(largest)))
    return Model(logits, SoftmaxStats(largest, None, total))


def _compare_rows(divergence: Divergence, log_p: jax.Array, z: jax.Array):
    p, q = _model(log_p), _model(z)
    reverse = needs_reverse_sums(divergence)
    sums = PairSums.of(p, q, same_temperature=True, reverse=reverse)
    pair, columns = Pair(p, q, sums, True), Vocabulary.whole(z.shape[-1])
    slopes = sums_of_slopes(divergence, pair, columns)
    compared = compare_columns(divergence, pair, columns, slopes)
    value = kl = divergence_of(slopes, compared.divergence)
    if type(divergence) is not ForwardKL:
        of_kl = slopes._replace(student=None)
        compared_by_kl = compare_columns(ForwardKL(), pair, columns, of_kl)
        kl = divergence_of(of_kl, compared_by_kl.divergence)
    return value, kl, *pair.softmaxes(), compared.d_student


def _compare_listed(log_p: jax.Array, z: jax.Array):
    """`Σ p (log p - log q)` of the list alone: its probabilities do not sum to 1, for
    which the form without cancellation does not hold."""
    q, prob = _model(z).softmax(), jnp.exp(log_p)
    p = Softmax(log_p, prob, jnp.zeros_like(q.lse), log_p)
    value = jnp.sum(prob * zero_unless(prob > 0, log_p - q.log), axis=-1)
    return value, value, p, q, q.prob * jnp.sum(prob, -1, keepdims=True) - prob
