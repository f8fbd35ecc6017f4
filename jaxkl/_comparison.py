"""A teacher and a student, compared column by column."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _checks as check
from ._divergence_terms import q_less_p
from ._divergences import Divergence, is_zero, kl_weights
from ._numerics import weigh, zero_unless
from ._row_sums import CERTAIN, difference_of_shifted, log_sum_ratio, RowSums
from ._slopes import centred, sum_slopes
from ._softmax import Model, Outcomes, Softmax
from ._vocabulary import Vocabulary


class Pair(NamedTuple):
    """Teacher and student at their temperatures, on the columns at hand."""

    teacher: Model | jax.Array  # an array: log-probabilities, `[B, V]`
    student: Model
    sums: RowSums  # over all columns
    same_temperature: bool

    def softmaxes(self) -> tuple[Softmax, Softmax]:
        """The softmax of teacher and student."""
        q = self.student.softmax()
        if isinstance(self.teacher, Model):
            return self.teacher.softmax(), q
        log_p = self.teacher
        return Softmax(log_p, jnp.exp(log_p), jnp.zeros_like(q.lse), log_p), q

    def shifted_difference(self) -> jax.Array:
        """The shifted logits of the student less those of the teacher, `[B, V]`."""
        assert isinstance(self.teacher, Model)
        return difference_of_shifted(self.teacher, self.student, self.same_temperature)

    def log_ratio(self) -> jax.Array | None:
        """`log q - log p`, `[B, V]`, if it is known better than as their difference."""
        if not isinstance(self.teacher, Model):
            return None
        ratio = self.shifted_difference() - log_sum_ratio(self.sums)[:, None]
        absent_p = self.teacher.logits == -jnp.inf
        absent_q = self.student.logits == -jnp.inf
        ratio = jnp.where(absent_q, -jnp.inf, ratio)
        return jnp.where(absent_p, jnp.where(absent_q, 0, jnp.inf), ratio)

    def recomputed_after(self, x: Any) -> tuple["Pair", Any]:
        """The pair and `x` behind a barrier.

        To the compiler, what is computed from this pair is another computation: it does
        not keep the results of the first for the second.
        """
        # Not the logits, which are in memory.
        of_models = [m.stats for m in self[:2] if isinstance(m, Model)]
        (of_models, sums), x = jax.lax.optimization_barrier(((of_models, self.sums), x))
        student = self.student._replace(stats=of_models.pop())
        teacher = self.teacher
        if isinstance(teacher, Model):
            teacher = teacher._replace(stats=of_models.pop())
        return Pair(teacher, student, sums, self.same_temperature), x


class Comparison(NamedTuple):
    """A divergence, and its gradients of the two models' logits / temperature."""

    divergence: jax.Array  # [B]: the sum over the columns at hand
    d_teacher: jax.Array  # [B, V]
    d_student: jax.Array  # [B, V]


class OfEach(NamedTuple):
    """The same of both models."""

    teacher: Any
    student: Any


# From (divergence, p, q, vocab, log_ratio) to the sum over the columns at hand, [B].
SumTerms = Callable[
    [Divergence, Outcomes, Outcomes, Vocabulary, jax.Array | None], jax.Array
]


def sums_of_slopes(
    sum_terms: SumTerms, divergence: Divergence, pair: Pair, vocab: Vocabulary
) -> OfEach:
    """`SlopeSums` over the columns at hand; None where the gradient needs none."""
    _, slopes = _slopes(sum_terms, divergence, pair, vocab)
    sums = OfEach(*(sum_slopes(*of_model) for of_model in slopes))
    return (
        sums._replace(student=None) if _has_known_gradient(divergence, pair) else sums
    )


def compare_columns(
    sum_terms: SumTerms,
    divergence: Divergence,
    pair: Pair,
    vocab: Vocabulary,
    sums: OfEach,
    *,
    recompute: bool,
) -> Comparison:
    """Compares the columns at hand; `sums` are those of all columns.

    `recompute` is that of a `Plan`.
    """
    value, slopes = _slopes(sum_terms, divergence, pair, vocab)

    def gradient(model):
        (slope, prob), total = getattr(slopes, model), getattr(sums, model)
        if recompute:
            again, total = pair.recomputed_after(total)
            of_each = _slopes(sum_terms, divergence, again, vocab)[1]
            slope, prob = getattr(of_each, model)
        return centred(slope, prob, total)

    if _has_known_gradient(divergence, pair):
        d_student = _known_gradient(divergence, pair)
    else:
        d_student = gradient("student")
    return Comparison(value, gradient("teacher"), d_student)


def _slopes(
    sum_terms: SumTerms, divergence: Divergence, pair: Pair, vocab: Vocabulary
) -> tuple[jax.Array, OfEach]:
    """The divergence, and of each model its slopes and probabilities."""
    p, q = pair.softmaxes()
    ratio = pair.log_ratio()

    def summed(log_p, log_q):
        models = Outcomes.known(log_p, p.prob), Outcomes.known(log_q, q.prob)
        return sum_terms(divergence, *models, vocab, ratio)

    value, vjp = jax.vjp(summed, p.log, q.log)
    f_p, f_q = vjp(jnp.ones_like(value))
    return value, OfEach((f_p, p.prob), (f_q, q.prob))


def _has_known_gradient(divergence: Divergence, pair: Pair) -> bool:
    """Whether the sums of the pair are all that the student's gradient needs."""
    return isinstance(pair.teacher, Model) and kl_weights(divergence) is not None


def _known_gradient(divergence: Divergence, pair: Pair) -> jax.Array:
    """The gradient of `a KL(p ‖ q) + b KL(q ‖ p)` by the student's logits."""
    weights = kl_weights(divergence)
    assert weights is not None
    forward, reverse = weights
    p, q = pair.softmaxes()
    gradients = []
    if not is_zero(forward):
        ratio = pair.log_ratio()
        assert ratio is not None
        of_forward = q_less_p(p.outcomes, q.outcomes, ratio)
        gradients.append(_weighted(forward, of_forward))
    if not is_zero(reverse):
        gradients.append(_weighted(reverse, _reverse_gradient(pair, q.prob)))
    return sum(gradients[1:], gradients[0]) if gradients else jnp.zeros_like(q.prob)


def _weighted(weight: Any, gradient: jax.Array) -> jax.Array:
    """Of a number, or of an array, `[B]`, which leaves out what it has at 0."""
    if check.is_number(weight):
        return weight * gradient
    return weigh(weight[:, None], gradient)


def _reverse_gradient(pair: Pair, q: jax.Array) -> jax.Array:
    """`q (log q - log p - KL(q ‖ p))`, `[B, V]`; see `_row_sums`."""
    reverse, total = pair.sums.reverse, pair.sums.student
    assert reverse is not None
    is_most = q > CERTAIN
    factor, mean = (
        jnp.where(is_most, below[:, None], of_all)
        for below, of_all in (
            (reverse.prob_below / total, 1),
            (reverse.log_ratio_below / total, (reverse.log_ratio / total)[:, None]),
        )
    )
    # Where q is 0, the other factor may be infinite.
    return zero_unless(q > 0, q * (pair.shifted_difference() * factor - mean))
