r"""The divergence of the student from a teacher, column by column, and its gradient.

The slopes are $f_q = \partial f / \partial \log q$. By the softmax,
$\partial \log q_v / \partial z_w = \delta_{vw} - q_w$, and so

$$ \frac{\partial}{\partial z_w} \sum_v f_v = f_{q,w} - q_w \sum_v f_{q,v}. $$

We sum the computed $f_q$ rather than use a closed form of the sum, so that rounding of
the normaliser cancels. If one column has $q > 1/2$, the difference above is one of two
nearly equal numbers. As $1 - q_w = \sum_{v \ne w} q_v$, we write it there as

$$ f_{q,w} \sum_{v \ne w} q_v - q_w \sum_{v \ne w} f_{q,v}. $$
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from .._divergence.catalogue import (
    Divergence,
    evaluate,
    is_bounded,
    is_zero,
    kl_weights,
)
from .._divergence.parameters import join
from .._divergence.terms import q_less_p
from .._math.numerics import weigh, zero_unless
from .._math.softmax import Model, Outcomes, Softmax
from .._math.vocabulary import Vocabulary
from .._util import checks as check
from .row_stats import (
    CERTAIN,
    Columns,
    difference_of_shifted,
    log_sum_ratio,
    Paired,
    PairSums,
    Row,
    SumExp,
)
from .term import d_logits, Gradients, Term, TermResult


class Pair(NamedTuple):
    """Teacher and student at their temperatures, on the columns at hand."""

    teacher: Model
    student: Model
    sums: PairSums  # over all columns, as those of the models
    same_temperature: bool

    def softmaxes(self) -> tuple[Softmax, Softmax]:
        """The softmax of teacher and student."""
        return self.teacher.softmax(), self.student.softmax()

    def shifted_difference(self) -> jax.Array:
        """The shifted logits of the student less those of the teacher, `[B, V]`."""
        return difference_of_shifted(self.teacher, self.student, self.same_temperature)

    def log_ratio(self, divergence: Divergence) -> jax.Array:
        """`log q - log p`, `[B, V]`, better than as the difference of the two.

        It is infinite in a column that one model lacks, if the divergence may be; and
        not if it is a KL whose first model lacks the column, which has no part then.
        """
        of_sums = log_sum_ratio(self.teacher, self.student, self.sums.difference)
        ratio = self.shifted_difference() - of_sums[:, None]
        if is_bounded(divergence):
            return ratio
        forward, reverse = kl_weights(divergence) or (1, 1)
        if not is_zero(forward):
            ratio = jnp.where(self.student.logits == -jnp.inf, -jnp.inf, ratio)
        if not is_zero(reverse):
            ratio = jnp.where(self.teacher.logits == -jnp.inf, jnp.inf, ratio)
        return ratio


class ComparedColumns(NamedTuple):
    """A divergence, and its gradients of the two models' logits / temperature."""

    divergence: jax.Array | None  # [B]; None: its sum is known with those of slopes
    d_teacher: jax.Array  # [B, V]
    d_student: jax.Array  # [B, V]


class PerModel(NamedTuple):
    """The same of both models."""

    teacher: Any
    student: Any


def needs_reverse_sums(divergence: Divergence) -> bool:
    """Whether its known gradient is one of `KL(q ‖ p)` too."""
    weights = kl_weights(divergence)
    return weights is not None and not is_zero(weights[1])


def terms(
    divergence: Divergence,
    p: Outcomes,
    q: Outcomes,
    vocab: Vocabulary,
    log_ratio: jax.Array | None = None,
) -> jax.Array:
    """The terms of teacher `p` and student `q` in the columns at hand, `[B, V]`, whose
    sum is the divergence."""
    p, q, log_ratio = jax.tree.map(vocab.mask, (p, q, log_ratio))
    return vocab.mask(evaluate(divergence, p, q, log_ratio))


def sums_of_slopes(divergence: Divergence, pair: Pair, vocab: Vocabulary) -> PerModel:
    """`SlopeSums` over the columns at hand; None where the gradient needs none."""
    f, of_teacher, of_student = _slopes(divergence, pair, vocab)
    is_known = kl_weights(divergence) is not None
    student = None if is_known else _sum_slopes(*of_student, f)
    return PerModel(_sum_slopes(*of_teacher), student)


def compare_columns(
    divergence: Divergence, pair: Pair, vocab: Vocabulary, sums: PerModel
) -> ComparedColumns:
    """Compares the columns at hand; `sums` are those of all columns."""
    f, of_teacher, of_student = _slopes(divergence, pair, vocab)
    d_teacher = _centred(*of_teacher, sums.teacher)
    if sums.student is None:
        value, d_student = jnp.sum(f, axis=-1), _known_gradient(divergence, pair)
        return ComparedColumns(value, d_teacher, d_student)
    return ComparedColumns(None, d_teacher, _centred(*of_student, sums.student))


def divergence_of(sums: PerModel, compared: Any) -> jax.Array:
    """The divergence, from sums over all columns of slopes and of what is compared."""
    return compared if sums.student is None else sums.student.divergence


_Slopes = tuple[jax.Array, jax.Array]  # slopes and probabilities, `[B, V]`


def _slopes(
    divergence: Divergence, pair: Pair, vocab: Vocabulary
) -> tuple[jax.Array, _Slopes, _Slopes]:
    """The terms, `[B, V]`, and the slopes of the teacher and of the student."""
    p, q = pair.softmaxes()
    ratio = pair.log_ratio(divergence)

    def of_logs(log_p, log_q):
        models = Outcomes.known(log_p, p.prob), Outcomes.known(log_q, q.prob)
        return terms(divergence, *models, vocab, ratio)

    f, vjp = jax.vjp(of_logs, p.log, q.log)
    f_p, f_q = vjp(jnp.ones_like(f))
    return f, (f_p, p.prob), (f_q, q.prob)


class SlopeSums(NamedTuple):
    """Sums over the vocabulary, `[B]` each.

    "Others" are the columns with a probability of at most one half.
    """

    slope_of_largest: jax.Array
    slope_of_others: jax.Array
    prob_of_others: jax.Array
    divergence: jax.Array | None = None  # beside the slopes of the student


def _sum_slopes(
    slope: jax.Array, prob: jax.Array, f: jax.Array | None = None
) -> SlopeSums:
    """The sums of these, `[B, V]`, over the columns at hand."""
    # Another comparison than below: XLA on GPUs would store one that they share.
    largest = zero_unless(prob > 0.5, slope)
    return SlopeSums(
        jnp.sum(largest, axis=-1),
        jnp.sum(slope - largest, axis=-1),
        jnp.sum(zero_unless(prob <= 0.5, prob), axis=-1),
        None if f is None else jnp.sum(f, axis=-1),
    )


def _centred(slope: jax.Array, prob: jax.Array, sums: SlopeSums) -> jax.Array:
    """The gradient by the logits, `slope - prob · Σ slope`, `[B, V]`."""
    # What "others" leave is the largest column, if one has more than one half.
    prob_of_largest = jnp.maximum(1 - sums.prob_of_others, 0.25)
    of_largest = sums.slope_of_largest / prob_of_largest
    of_largest = of_largest * sums.prob_of_others - sums.slope_of_others
    total = sums.slope_of_largest + sums.slope_of_others
    others = slope - prob * total[:, None]
    return jnp.where(prob > 0.5, prob * of_largest[:, None], others)


def _known_gradient(divergence: Divergence, pair: Pair) -> jax.Array:
    """The gradient of `a KL(p ‖ q) + b KL(q ‖ p)` by the student's logits."""
    weights = kl_weights(divergence)
    assert weights is not None
    forward, reverse = weights
    p, q = pair.softmaxes()
    gradients = []
    if not is_zero(forward):
        ratio = pair.log_ratio(divergence)
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
    """`q (log q - log p - KL(q ‖ p))`, `[B, V]`; see `row_stats`."""
    reverse, total = pair.sums.reverse, pair.student.stats.total
    assert reverse is not None
    # A certain column is all that is not below the top.
    of_top = total - reverse.prob_below
    d_top = reverse.log_ratio - reverse.log_ratio_below
    d_top = d_top / jnp.where(of_top > 0, of_top, 1)
    of_certain = (d_top * reverse.prob_below - reverse.log_ratio_below) / total
    mean = reverse.log_ratio / total
    others = pair.shifted_difference() - mean[:, None]
    return q * jnp.where(q > CERTAIN, of_certain[:, None], others)


STUDENT, TEACHER = Row("student"), Row("teacher")


@dataclasses.dataclass(frozen=True)
class Comparison(Term):
    """A divergence from a teacher, at temperatures of their own."""

    has_columns: ClassVar[bool] = True  # whether it is one of logits of all columns

    teacher: Any  # Source
    parameters: tuple[Any, ...]  # those of the divergence that are arrays, [B] each
    temperature: Any = None  # of the teacher, [B]; None: 1, or the student's
    divergence: Divergence = dataclasses.field(
        kw_only=True, metadata={"static": True}
    )  # but for its arrays
    # Whether the teacher has the temperature of the student.
    same_temperature: bool = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def whole_divergence(self) -> Divergence:
        """The divergence with its arrays."""
        return join(self.divergence, self.parameters)

    def whole_flags(self):
        flags = jax.tree.map(lambda _: False, self)
        return dataclasses.replace(flags, weight=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseComparison(Comparison):
    """One of two rows of all columns."""

    @property
    def _paired(self) -> Paired:
        reverse = needs_reverse_sums(self.whole_divergence)
        return Paired(STUDENT, TEACHER, self.same_temperature, reverse)

    def statistics(self, c):
        return [SumExp(STUDENT), SumExp(TEACHER), self._paired]

    def pair(self, c: Columns) -> Pair:
        models = c.model(TEACHER), c.model(STUDENT)
        return Pair(*models, c.rows.sums[self._paired], self.same_temperature)

    def slope_sums(self, c):
        return sums_of_slopes(self.whole_divergence, self.pair(c), c.vocab)

    def finish(self, c, combined, *, recompute):
        if recompute:
            # To the compiler, what is made of these is another computation: it does not
            # keep the slopes for it. The logits are in memory, and the teacher's sums
            # may be unused.
            sums = c.rows, combined.student
            rows, of_student = jax.lax.optimization_barrier(sums)
            c, combined = c._replace(rows=rows), combined._replace(student=of_student)
        pair = self.pair(c)
        compared = compare_columns(self.whole_divergence, pair, c.vocab, combined)
        p, q = pair.softmaxes()
        T, T_teacher = c.temperatures["student"], c.temperatures["teacher"]
        d_t, d_T_teacher = d_logits(self.weight, compared.d_teacher, p, T_teacher)
        d_s, d_T = d_logits(self.weight, compared.d_student, q, T)
        if self.same_temperature:
            d_T, d_T_teacher = jax.tree.map(jnp.add, d_T, d_T_teacher), None
        gradients = Gradients(
            {"student": d_s, "teacher": d_t}, {"student": d_T, "teacher": d_T_teacher}
        )
        return TermResult(compared.divergence, gradients, p.lse + q.lse)

    def value(self, of_all, combined, sums):
        del of_all
        return divergence_of(combined, sums)
