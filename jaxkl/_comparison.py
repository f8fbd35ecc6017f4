"""A teacher and a student of a tile, compared column by column."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._divergences import Divergence, is_centred
from ._slopes import centred, sum_slopes
from ._softmax import log_ratio, Model, Outcomes, Softmax
from ._vocabulary import Vocabulary


class Pair(NamedTuple):
    """Teacher and student of a tile, at their temperatures."""

    teacher: Model | jax.Array  # an array: log-probabilities, `[B, V]`
    student: Model
    log_sum_ratio: jax.Array | None  # see `normalize_pair`; None: not of two models
    same_temperature: bool

    def softmaxes(self) -> tuple[Softmax, Softmax]:
        """The softmax of teacher and student."""
        q = self.student.softmax()
        if isinstance(self.teacher, Model):
            return self.teacher.softmax(), q
        log_p = self.teacher
        return Softmax(log_p, jnp.exp(log_p), jnp.zeros_like(q.lse), log_p), q

    def log_ratio(self) -> jax.Array | None:
        """`log q - log p`, `[B, V]`, if it is known better than as their difference."""
        if self.log_sum_ratio is None:
            return None
        assert isinstance(self.teacher, Model)
        return log_ratio(
            self.teacher,
            self.student,
            self.log_sum_ratio,
            same_temperature=self.same_temperature,
        )

    def recomputed_after(self, x: Any) -> tuple["Pair", Any]:
        """The pair and `x` behind a barrier.

        To the compiler, what is computed from this pair is another computation: it does
        not keep the results of the first for the second.
        """
        models = [m for m in (self.teacher, self.student) if isinstance(m, Model)]
        stats = [model.stats for model in models], self.log_sum_ratio
        # Not the logits, which are in memory.
        (stats, log_sum_ratio), x = jax.lax.optimization_barrier((stats, x))
        *teacher, student = (
            model._replace(stats=of_model)
            for model, of_model in zip(models, stats, strict=True)
        )
        teacher = teacher[0] if teacher else self.teacher
        return Pair(teacher, student, log_sum_ratio, self.same_temperature), x


class Comparison(NamedTuple):
    """A divergence, and its gradients of the two models' logits / temperature."""

    divergence: jax.Array  # [B]: the sum over the columns of this device
    d_teacher: jax.Array  # [B, V]
    d_student: jax.Array  # [B, V]


# From (divergence, p, q, vocab, log_ratio) to the sum over this device's columns, [B].
SumTerms = Callable[
    [Divergence, Outcomes, Outcomes, Vocabulary, jax.Array | None], jax.Array
]


def compare_columns(
    sum_terms: SumTerms,
    divergence: Divergence,
    pair: Pair,
    vocab: Vocabulary,
    *,
    recompute: bool,
) -> Comparison:
    """Compares all columns; `recompute` is that of a `Plan`."""

    def of_both(pair):
        """The divergence, and for each model its slopes and probabilities."""
        p, q = pair.softmaxes()
        ratio = pair.log_ratio()

        def summed(log_p, log_q):
            models = Outcomes.known(log_p, p.prob), Outcomes.known(log_q, q.prob)
            return sum_terms(divergence, *models, vocab, ratio)

        value, vjp = jax.vjp(summed, p.log, q.log)
        f_p, f_q = vjp(jnp.ones_like(value))
        return value, {"teacher": (f_p, p.prob), "student": (f_q, q.prob)}

    value, slopes = of_both(pair)

    def gradient(model):
        slope, prob = slopes[model]
        sums = sum_slopes(vocab, slope, prob)
        if recompute:
            again, sums = pair.recomputed_after(sums)
            slope, prob = of_both(again)[1][model]
        return centred(slope, prob, sums)

    d_teacher = gradient("teacher")
    if pair.log_sum_ratio is not None and is_centred(divergence):
        # The slopes of the student sum to 0, as accurately as the log-ratio is known:
        # they are the gradient.
        return Comparison(value, d_teacher, slopes["student"][0])
    return Comparison(value, d_teacher, gradient("student"))
