"""A teacher and a student of a tile, compared column by column."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._divergences import Divergence, is_centred
from ._slopes import centred, sum_slopes
from ._softmax import log_ratio, Outcomes, Softmax, SoftmaxStats
from ._vocabulary import Vocabulary


class Pair(NamedTuple):
    """Teacher $p$ and student $q$ at their temperatures, for the rows of a tile."""

    teacher_logits: jax.Array  # [B, V]
    student_logits: jax.Array  # [B, V]
    p: SoftmaxStats | None  # None: the teacher's logits are log-probabilities
    q: SoftmaxStats
    log_sum_ratio: jax.Array | None  # see `normalize_pair`; None: as for p
    same_temperature: bool

    def softmaxes(self) -> tuple[Softmax, Softmax]:
        """The softmax of teacher and student."""
        t = self.teacher_logits
        if self.p is None:
            p = Softmax(t, jnp.exp(t), jnp.zeros_like(self.q.max), t)
        else:
            p = self.p.softmax(t)
        return p, self.q.softmax(self.student_logits)

    def log_ratio(self) -> jax.Array | None:
        """`log q - log p`, `[B, V]`, if it is known better than as their difference."""
        if self.p is None:
            return None
        assert self.log_sum_ratio is not None
        p, q = (self.p, self.teacher_logits), (self.q, self.student_logits)
        return log_ratio(
            p, q, self.log_sum_ratio, same_temperature=self.same_temperature
        )

    def recomputed_after(self, x):
        """The pair and `x` behind a barrier.

        To the compiler, what is computed from this pair is another computation: it does
        not keep the results of the first for the second.
        """
        stats = self.p, self.q, self.log_sum_ratio
        (p, q, log_sum_ratio), x = jax.lax.optimization_barrier((stats, x))
        return self._replace(p=p, q=q, log_sum_ratio=log_sum_ratio), x


class Comparison(NamedTuple):
    """A divergence, and its gradients by logits / temperature of the two models."""

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
    if pair.p is not None and is_centred(divergence):
        # The slopes of the student sum to 0: they are the gradient.
        return Comparison(value, d_teacher, slopes["student"][0])
    return Comparison(value, d_teacher, gradient("student"))
