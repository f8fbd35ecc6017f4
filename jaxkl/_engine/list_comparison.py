r"""A teacher's list and a student's row, as two rows of k + 1 outcomes.

To the student, all columns outside the list $L$ are one more outcome, with the logit

$$ z_\mathrm{rest} = \log \sum_{v \notin L} e^{s_v / T}, \qquad
   \frac{\partial z_\mathrm{rest}}{\partial s_v}
     = \frac{e^{s_v / T - z_\mathrm{rest}}}{T}. $$

The sum is relative to the largest logit outside the list, however far that is below the
largest of the row. With the listed logits the rows are complete, on every device, and
are compared as any other rows are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._divergence.catalogue import Divergence, ForwardKL, is_zero, kl_weights
from .._math.numerics import safe_log, zero_unless
from .._math.softmax import Model, Softmax, SoftmaxStats
from .._math.vocabulary import Vocabulary
from .._source.list_source import ListSource
from .comparison import compare_columns, Pair, sums_of_slopes
from .row_sums import pair_sums, RowStats, RowSums, sum_exp


class ListComparison(NamedTuple):
    """What a row of outcomes makes: `[B, k]` for those of the list, else `[B]`."""

    divergence: jax.Array
    kl: jax.Array  # KL(p ‖ q)
    p: Softmax
    q: Softmax
    d_listed: jax.Array  # the gradient by their z
    d_rest: jax.Array | None  # that by z_rest; None: the rest is no outcome
    d_temperature: jax.Array | None


def compare_list(
    divergence: Divergence,
    teacher: ListSource,
    temperature: jax.Array | None,
    rows: RowStats,
    vocab_size: int,
) -> ListComparison:
    """Compares the list with the student's row, from the statistics of all columns."""
    k = teacher.columns.shape[-1]
    row, log_p = student_row(teacher, temperature, rows, vocab_size), teacher.log_probs
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
    d_temperature = None
    if temperature is not None:
        by_temperature = d_z * zero_unless(d_z != 0, row.mean[:, : z.shape[-1]])
        d_temperature = -jnp.sum(by_temperature, axis=-1) / temperature
    return ListComparison(value, kl, p, q, d_z[:, :k], d_rest, d_temperature)


class StudentRow(NamedTuple):
    """The listed columns, and the rest if its sums are known, `[B, k + 1]`."""

    z: jax.Array  # logits of these outcomes, at temperature 1
    mean: jax.Array  # -T ∂z/∂T: of a column z itself, of the rest a mean of its columns


def student_row(
    teacher: ListSource,
    temperature: jax.Array | None,
    rows: RowStats,
    vocab_size: int,
) -> StudentRow:
    maxima, sums = rows
    listed = jnp.where(teacher.has_column(vocab_size), sums.listed, -jnp.inf)
    largest = jnp.max(listed, axis=-1)
    if sums.unlisted is None:
        z = _shifted(SoftmaxStats(jax.lax.stop_gradient(largest), temperature), listed)
        return StudentRow(z, z)
    largest = jnp.maximum(jax.lax.stop_gradient(largest), maxima.unlisted)
    stats = SoftmaxStats(largest, temperature)
    z, top = (_shifted(stats, x) for x in (listed, maxima.unlisted[:, None]))
    total, shifted = (x[:, None] for x in sums.unlisted)
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
    weights = kl_weights(divergence)
    reverse = weights is not None and not is_zero(weights[1])
    sums = RowSums(
        student=q.stats.sum_exp,
        teacher=p.stats.sum_exp,
        **pair_sums(p, q, same_temperature=True, reverse=reverse),
    )
    pair, columns = Pair(p, q, sums, True), Vocabulary.whole(z.shape[-1])
    slopes = sums_of_slopes(divergence, pair, columns)
    compared = compare_columns(divergence, pair, columns, slopes, recompute=False)
    of_kl = compared
    if type(divergence) is not ForwardKL:
        of_kl = compare_columns(ForwardKL(), pair, columns, slopes, recompute=False)
    value, kl = compared.divergence, of_kl.divergence
    return value, kl, *pair.softmaxes(), compared.d_student


def _compare_listed(log_p: jax.Array, z: jax.Array):
    """`Σ p (log p - log q)` of the list alone: its probabilities do not sum to 1, for
    which the form without cancellation does not hold."""
    q, prob = _model(z).softmax(), jnp.exp(log_p)
    p = Softmax(log_p, prob, jnp.zeros_like(q.lse), log_p)
    value = jnp.sum(prob * zero_unless(prob > 0, log_p - q.log), axis=-1)
    return value, value, p, q, q.prob * jnp.sum(prob, -1, keepdims=True) - prob
