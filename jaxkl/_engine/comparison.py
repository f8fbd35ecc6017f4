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

from .._divergence.catalogue import Divergence, evaluate, is_zero, kl_weights
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

    def log_ratio(self) -> jax.Array:
        """`log q - log p`, `[B, V]`, better than as the difference of the two."""
        of_sums = log_sum_ratio(self.teacher, self.student, self.sums.difference)
        ratio = self.shifted_difference() - of_sums[:, None]
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
        stats = self.teacher.stats, self.student.stats, self.sums
        (of_teacher, of_student, sums), x = jax.lax.optimization_barrier((stats, x))
        teacher = self.teacher._replace(stats=of_teacher)
        student = self.student._replace(stats=of_student)
        return Pair(teacher, student, sums, self.same_temperature), x


class ComparedColumns(NamedTuple):
    """A divergence, and its gradients of the two models' logits / temperature."""

    divergence: jax.Array  # [B]: the sum over the columns at hand
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


def sum_terms(
    divergence: Divergence,
    p: Outcomes,
    q: Outcomes,
    vocab: Vocabulary,
    log_ratio: jax.Array | None = None,
) -> jax.Array:
    """The divergence of each token, `[B]`, from teacher `p` and student `q`, `[B, V]`:
    the sum over the columns at hand."""
    p, q, log_ratio = jax.tree.map(vocab.mask, (p, q, log_ratio))
    return jnp.sum(vocab.mask(evaluate(divergence, p, q, log_ratio)), axis=-1)


def sums_of_slopes(divergence: Divergence, pair: Pair, vocab: Vocabulary) -> PerModel:
    """`SlopeSums` over the columns at hand; None where the gradient needs none."""
    _, slopes = _slopes(divergence, pair, vocab)
    sums = PerModel(*(_sum_slopes(*of_model) for of_model in slopes))
    return sums if kl_weights(divergence) is None else sums._replace(student=None)


def compare_columns(
    divergence: Divergence,
    pair: Pair,
    vocab: Vocabulary,
    sums: PerModel,
    *,
    recompute: bool,
) -> ComparedColumns:
    """Compares the columns at hand; `sums` are those of all columns.

    `recompute` is that of a `Plan`.
    """
    value, slopes = _slopes(divergence, pair, vocab)

    def gradient(model):
        (slope, prob), total = getattr(slopes, model), getattr(sums, model)
        if recompute:
            again, total = pair.recomputed_after(total)
            of_each = _slopes(divergence, again, vocab)[1]
            slope, prob = getattr(of_each, model)
        return _centred(slope, prob, total)

    if kl_weights(divergence) is not None:
        d_student = _known_gradient(divergence, pair)
    else:
        d_student = gradient("student")
    return ComparedColumns(value, gradient("teacher"), d_student)


def _slopes(
    divergence: Divergence, pair: Pair, vocab: Vocabulary
) -> tuple[jax.Array, PerModel]:
    """The divergence, and of each model its slopes and probabilities."""
    p, q = pair.softmaxes()
    ratio = pair.log_ratio()

    def summed(log_p, log_q):
        models = Outcomes.known(log_p, p.prob), Outcomes.known(log_q, q.prob)
        return sum_terms(divergence, *models, vocab, ratio)

    value, vjp = jax.vjp(summed, p.log, q.log)
    f_p, f_q = vjp(jnp.ones_like(value))
    return value, PerModel((f_p, p.prob), (f_q, q.prob))


class SlopeSums(NamedTuple):
    """Sums over the vocabulary, `[B]` each.

    "Others" are the columns with a probability of at most one half.
    """

    slope: jax.Array
    slope_of_others: jax.Array
    prob_of_others: jax.Array


def _sum_slopes(slope: jax.Array, prob: jax.Array) -> SlopeSums:
    """The sums of `slope` and `prob`, `[B, V]`, over the columns at hand."""
    is_other = prob <= 0.5
    others = zero_unless(is_other, slope), zero_unless(is_other, prob)
    return SlopeSums(*_sum_rows(slope, *others))


def _centred(slope: jax.Array, prob: jax.Array, sums: SlopeSums) -> jax.Array:
    """The gradient by the logits, `slope - prob · Σ slope`, `[B, V]`."""
    total, slope_of_others, prob_of_others = (x[:, None] for x in sums)
    of_largest = slope * prob_of_others - prob * slope_of_others
    return jnp.where(prob > 0.5, of_largest, slope - prob * total)


@jax.custom_jvp
def _sum_rows(*arrays):
    """The sum of each array over its last axis; XLA on CPU reads them in one pass."""
    zeros = (jnp.zeros((), arrays[0].dtype),) * len(arrays)
    add = lambda xs, ys: tuple(x + y for x, y in zip(xs, ys, strict=True))
    return tuple(jax.lax.reduce(arrays, zeros, add, (arrays[0].ndim - 1,)))


@_sum_rows.defjvp
def _sum_rows_jvp(primals, tangents):
    return _sum_rows(*primals), tuple(jnp.sum(d, axis=-1) for d in tangents)


def _known_gradient(divergence: Divergence, pair: Pair) -> jax.Array:
    """The gradient of `a KL(p ‖ q) + b KL(q ‖ p)` by the student's logits."""
    weights = kl_weights(divergence)
    assert weights is not None
    forward, reverse = weights
    p, q = pair.softmaxes()
    gradients = []
    if not is_zero(forward):
        of_forward = q_less_p(p.outcomes, q.outcomes, pair.log_ratio())
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
    prob_below, below, mean = (
        (x / total)[:, None]
        for x in (reverse.prob_below, reverse.log_ratio_below, reverse.log_ratio)
    )
    is_most = q > CERTAIN
    factor, mean = jnp.where(is_most, prob_below, 1), jnp.where(is_most, below, mean)
    # Where q is 0, the other factor may be infinite.
    return zero_unless(q > 0, q * (pair.shifted_difference() * factor - mean))


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
        pair = self.pair(c)
        compared = compare_columns(
            self.whole_divergence, pair, c.vocab, combined, recompute=recompute
        )
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
        del of_all, combined
        return sums
