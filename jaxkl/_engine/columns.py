r"""The mathematics of a loss, on the columns at hand.

With $z = s/T$, $\log q = z - \mathrm{lse}(z)$ and $D = \sum_v f(\log p_v, \log q_v)$,

$$ \frac{\partial D}{\partial z} = f_q - q \sum_v f_q, \qquad
   f_q = \frac{\partial f}{\partial \log q}, $$

and the same for the teacher. Names follow this: `d_z` is $\partial D / \partial z$, and
`q_at_1` the student's softmax at temperature 1. The student alone has more terms, which
are those of `student_terms`.

Columns may be the whole vocabulary, a device's slice of it, or a block of a few. A
column learns of the others in four phases. Each makes sums (or maxima) over the columns
at hand. The caller adds up those of all columns, and gives them to the next phase:

1. `row_maxima`
2. `row_sums`
3. `slope_sums`, of which a divergence may have no need
4. `finish`: the terms of the loss, which `complete` takes, and gradients.

A teacher's list is compared between the second and the last: see `list_comparison`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._divergence.catalogue import Divergence, ForwardKL, is_zero, kl_weights
from .._math.numerics import weigh, zero_unless
from .._math.softmax import entropy, Model, Softmax, SoftmaxStats
from .._math.vocabulary import Vocabulary
from .._source.lists import plus_listed, positions, without_listed
from . import student_terms
from .comparison import (
    compare_columns,
    Comparison,
    Pair,
    PerModel,
    sum_terms,
    sums_of_slopes,
)
from .list_comparison import compare_list, ListComparison, student_row
from .list_statistics import list_statistics
from .operands import ListStatistics, LossTerms, Operands, Spec, Statistics
from .row_sums import Maxima, pair_sums, RowStats, RowSums, sum_exp, Unlisted


class Columns(NamedTuple):
    """The columns at hand, of the tokens of `x`."""

    spec: Spec
    x: Operands
    vocab: Vocabulary  # these columns
    teacher: Any  # logits, [B, V]; None: there are none
    student: jax.Array
    unlisted: Any  # the student's, with -inf in the columns of a list; None: not needed

    @classmethod
    def of(cls, spec: Spec, x: Operands, vocab: Vocabulary) -> "Columns":
        teacher = x.teacher.logits(spec.dtype, vocab)
        student = x.student.logits(spec.dtype, vocab)
        unlisted = None
        of_list = has_outcomes(spec, x) and x.teacher.has_rest
        if of_list or (spec.statistics and x.teacher.kind == "list"):
            unlisted = without_listed(student, x.teacher.columns, vocab)
        return cls(spec, x, vocab, teacher, student, unlisted)

    def materialized(self) -> "Columns":
        """The columns, with logits that are complete before anything is made of them.

        XLA would fuse the gradient with a product of a head. On a TPU, this fusion
        takes several times as long as product and gradient do one after the other.
        """
        logits = jax.lax.optimization_barrier((self.teacher, self.student))
        return self._replace(teacher=logits[0], student=logits[1])


def has_outcomes(spec: Spec, x: Operands) -> bool:
    """Whether the teacher is a row of few outcomes, which its list and the rest are."""
    return spec.divergence is not None and x.teacher.kind == "list" and x.teacher.is_row


class Models(NamedTuple):
    """Softmaxes of the columns at hand; None: not needed."""

    teacher: Model | None  # at their temperatures
    student: Model | None
    teacher_at_1: Model | None  # of the metrics, where these are at temperature 1
    student_only: Model | None  # the student at `student_terms.temperature`

    @classmethod
    def of(cls, c: Columns, maxima: Maxima, sums: RowSums) -> "Models":
        spec, x = c.spec, c.x
        q, student_only = _at_two_temperatures(
            c.student,
            SoftmaxStats(maxima.student, x.student_temperature, sums.student),
            sums.student_at_1,
        )
        p = p_at_1 = None
        if c.teacher is not None:
            p, p_at_1 = _at_two_temperatures(
                c.teacher,
                SoftmaxStats(maxima.teacher, spec.teacher_temperature(x), sums.teacher),
                sums.teacher_at_1,
            )
        is_list = x.teacher.kind == "list"
        if spec.divergence is None:
            student_only = q
        if not (spec.statistics and not is_list or x.weights.has_own_terms):
            student_only = None
        if not spec.statistics or is_list:
            p_at_1 = None
        return cls(p, None if has_outcomes(spec, x) else q, p_at_1, student_only)


def _at_two_temperatures(
    logits: jax.Array, stats: SoftmaxStats, sum_exp_at_1: jax.Array | None
) -> tuple[Model, Model]:
    if stats.temperature is None and sum_exp_at_1 is None:
        sum_exp_at_1 = stats.sum_exp
    at_1 = SoftmaxStats(stats.max, None, sum_exp_at_1)
    return Model(logits, stats), Model(logits, at_1)


def row_stats(c: Columns) -> RowStats:
    """The maxima of the columns at hand, and the sums relative to them."""
    maxima = row_maxima(c)
    return RowStats(maxima, row_sums(c, maxima))


def row_maxima(c: Columns) -> Maxima:
    """The maxima of the columns at hand: constants, on which no result depends."""
    maxima = Maxima(c.x.student.max(c.student))
    if c.teacher is not None:
        maxima = maxima._replace(teacher=c.x.teacher.max(c.teacher))
    if c.unlisted is not None:
        maxima = maxima._replace(unlisted=jnp.max(c.unlisted, axis=-1))
    return jax.lax.stop_gradient(maxima)


def row_sums(c: Columns, maxima: Maxima) -> RowSums:
    """The sums, relative to any `maxima`, such as those of all columns."""
    spec, x = c.spec, c.x
    p, q, p_at_1, student_only = Models.of(c, maxima, RowSums())
    sums = RowSums()
    if q is not None:
        sums = sums._replace(student=sum_exp(q))
    if p is not None:
        assert q is not None
        sums = sums._replace(teacher=sum_exp(p), **_pair_sums(c, p, q))
        if p_at_1 is not None and p.stats.temperature is not None:
            sums = sums._replace(teacher_at_1=sum_exp(p_at_1))
    if x.teacher.kind == "list" and (q is None or spec.statistics):
        at = positions(x.teacher.columns, c.vocab)
        listed = c.student.at[at].get(mode="fill", fill_value=0)
        sums = sums._replace(listed=listed)
    if c.unlisted is not None:
        z = SoftmaxStats(maxima.unlisted, x.student_temperature).shifted(c.unlisted)
        exp_z = jnp.exp(z)
        of_rest = (jnp.sum(y, axis=-1) for y in (exp_z, exp_z * z))
        sums = sums._replace(unlisted=Unlisted(*of_rest))
    if student_only is None:
        return sums
    if q is None or student_only.stats.temperature is not q.stats.temperature:
        sums = sums._replace(student_at_1=sum_exp(student_only))
    return sums._replace(**student_terms.sums(x.weights, student_only))


def _pair_sums(c: Columns, p: Model, q: Model) -> dict[str, Any]:
    weights = kl_weights(c.spec.whole_divergence(c.x))
    reverse = weights is not None and not is_zero(weights[1])
    same_temperature = c.spec.same_temperature
    return pair_sums(p, q, same_temperature=same_temperature, reverse=reverse)


def listed_of(spec: Spec, x: Operands, rows: RowStats) -> ListComparison | None:
    """The comparison of a teacher's list, from the statistics of all columns."""
    if not has_outcomes(spec, x):
        return None
    return _list_comparison(spec, x, rows, spec.whole_divergence(x))


def _list_comparison(
    spec: Spec, x: Operands, rows: RowStats, divergence: Divergence
) -> ListComparison:
    T, vocab = x.student_temperature, spec.vocab
    return compare_list(divergence, x.teacher, T, rows, vocab.size)


def slope_sums(c: Columns, rows: RowStats) -> PerModel:
    if c.teacher is None:
        return PerModel(None, None)
    pair = _pair(c, Models.of(c, *rows), rows.sums)
    return sums_of_slopes(c.spec.whole_divergence(c.x), pair, c.vocab)


class TermSums(NamedTuple):
    """Sums over columns that make the terms of the loss and its statistics, `[B]`."""

    divergence: Any = None
    label: Any = None  # see `student_terms.label_and_uniform`
    uniform: Any = None
    kl: Any = None
    student_entropy: Any = None
    teacher_entropy: Any = None


class Top(NamedTuple):
    """The first column with the largest logit, and that logit, `[B]`."""

    logit: jax.Array
    column: jax.Array

    @classmethod
    def of(cls, logits: jax.Array, vocab: Vocabulary) -> "Top":
        first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return cls(jnp.max(logits, axis=-1), first + vocab.start)

    def of_both(self, other: "Top") -> "Top":
        """Of two sets of columns together."""
        is_first = (other.logit == self.logit) & (other.column < self.column)
        is_other = (other.logit > self.logit) | is_first
        pairs = zip(self, other, strict=True)
        return Top(*(jnp.where(is_other, y, x) for x, y in pairs))


class Finished(NamedTuple):
    sums: TermSums
    tops: PerModel | None  # Top
    # Of student, teacher and temperatures; see `Result`.
    gradients: Operands
    counted: jax.Array  # see `Result`


def finish(
    c: Columns,
    rows: RowStats,
    of_slopes: PerModel,
    listed: ListComparison | None,
    counted: jax.Array,
    *,
    recompute: bool,
) -> Finished:
    """The terms of the loss, and its gradients.

    `counted`, `[B]`, are the tokens that count in the gradients of shared arrays;
    `recompute` is that of a `Plan`.
    """
    spec, x, vocab = c.spec, c.x, c.vocab
    models = Models.of(c, *rows)
    terms, d_logits, lse = TermSums(), _DLogits(), 0.0
    if models.student is not None:
        lse = models.student.stats.lse
    pair = None
    if listed is not None:
        of_list = vocab.on_first_shard(listed.divergence)
        terms = terms._replace(divergence=of_list)
        d_logits, lse = _d_logits_of_list(c, rows, listed), listed.q.lse
    elif spec.divergence is not None:
        pair = _pair(c, models, rows.sums)
        divergence = spec.whole_divergence(x)
        compared = compare_columns(
            divergence, pair, vocab, of_slopes, recompute=recompute
        )
        terms = terms._replace(divergence=compared.divergence)
        p, q = pair.softmaxes()
        d_logits, lse = _d_logits_of_pair(c, pair, compared), p.lse + q.lse
    if models.student_only is not None:
        of_label, uniform = student_terms.label_and_uniform(
            x, models.student_only, vocab
        )
        terms = terms._replace(label=of_label, uniform=uniform)
        d_logits = d_logits.plus(
            *_d_logits_student_only(x, models.student_only, rows.sums, vocab)
        )
    tops = None
    if spec.statistics:
        if listed is None and x.teacher.kind == "list" and x.teacher.has_lumped_rest:
            # A user's function compares all columns, and the statistics the rest.
            listed = _list_comparison(spec, x, rows, ForwardKL())
        if listed is not None:
            statistics = jax.tree.map(vocab.on_first_shard, _statistics_of_list(listed))
            of_teacher = _top_of_list(x, spec.dtype)
        else:
            assert pair is not None
            statistics = _statistics(pair, models, vocab)
            of_teacher = Top.of(c.teacher, vocab)
        terms = terms._replace(**statistics)
        tops = PerModel(of_teacher, Top.of(c.student, vocab))
    # 0 · NaN is NaN in the product for `d kernel`: a token without weight does not
    # count if its hidden states may not be finite.
    counted &= x.weights.any_nonzero | jnp.isfinite(lse)
    gradients = x._replace(
        student=x.student.d_outputs(c.student, d_logits.student),
        teacher=x.teacher.d_outputs(c.teacher, d_logits.teacher),
        student_temperature=d_logits.student_temperature,
        teacher_temperature=d_logits.teacher_temperature,
    )
    return Finished(terms, tops, gradients, counted)


def complete(
    spec: Spec,
    x: Operands,
    rows: RowStats,
    terms: TermSums,
    tops: PerModel | None,
    number_among_top: jax.Array | None,
) -> tuple[LossTerms, Statistics | None]:
    """The terms that have a weight, and the statistics, from sums over all columns.

    `number_among_top`, `[B]`, is that of a list: see `list_statistics`.
    """
    maxima, sums = rows
    of_loss = LossTerms(terms.divergence)
    if sums.below is not None:
        student_only = student_terms.terms(
            spec, x, maxima.student, sums, terms.label, terms.uniform
        )
        of_loss = student_only._replace(divergence=terms.divergence)
    if tops is None:
        return of_loss, None
    agree = (tops.student.column == tops.teacher.column).astype(spec.dtype)
    entropies = terms.student_entropy, terms.teacher_entropy
    of_list = None
    if number_among_top is not None:
        vocab = spec.vocab
        row = student_row(x.teacher, x.student_temperature, rows, vocab.size)
        of_list = list_statistics(x.teacher, row, number_among_top, vocab.size)
        # They are the same on all devices, but JAX cannot know that.
        of_list = ListStatistics(*vocab.psum(*map(vocab.on_first_shard, of_list)))
    return of_loss, Statistics(terms.kl, *entropies, agree, of_list)


def _pair(c: Columns, models: Models, sums: RowSums) -> Pair:
    assert models.teacher is not None and models.student is not None
    return Pair(models.teacher, models.student, sums, c.spec.same_temperature)


class _DLogits(NamedTuple):
    """Gradients of the loss to logits, `[B, V]`, and temperatures, `[B]`, or None.

    Those of temperatures are sums over the columns at hand.
    """

    teacher: Any = None
    student: Any = 0
    teacher_temperature: Any = None
    student_temperature: Any = None

    def plus(self, d_s: Any, d_temperature: jax.Array | None) -> "_DLogits":
        """With the gradients of more terms to the student and its temperature."""
        if d_temperature is not None:
            self = self._replace(student_temperature=d_temperature)
        return self._replace(student=self.student + d_s)


def _d_logits_of_pair(c: Columns, pair: Pair, compared: Comparison) -> _DLogits:
    spec, x = c.spec, c.x
    (p, q), weight = pair.softmaxes(), x.weights.divergence
    d_t, d_teacher_temperature = _d_logits(
        weight, compared.d_teacher, p, spec.teacher_temperature(x)
    )
    d_s, d_student_temperature = _d_logits(
        weight, compared.d_student, q, x.student_temperature
    )
    if spec.same_temperature:
        both = d_student_temperature, d_teacher_temperature
        d_student_temperature = jax.tree.map(jnp.add, *both)
        d_teacher_temperature = None
    return _DLogits(d_t, d_s, d_teacher_temperature, d_student_temperature)


def _d_logits_student_only(
    x: Operands, student_only: Model, sums: RowSums, vocab: Vocabulary
) -> tuple[Any, jax.Array | None]:
    """Of the terms of the student alone: the gradients to logits and temperature."""
    d_z: Any = student_terms.d_shifted(x, student_only, sums, vocab)
    if student_only.stats.temperature is None:
        return d_z, None
    is_weighted = x.weights.any_nonzero.astype(d_z.dtype)
    return _d_logits(
        is_weighted, d_z, student_only.softmax(), student_only.stats.temperature
    )


def _d_logits(
    weight: jax.Array, d_z: jax.Array, model: Softmax, temperature: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of `weight · D` to the logits, `[B, V]`, and temperature, `[B]`.

    The second is a sum over this device's columns. It is summed over devices once,
    outside, as is the gradient of hidden states.
    """
    if temperature is None:
        return weigh(weight[:, None], d_z), None
    # The temperature of a token without weight may be NaN, and that of padding is 0.
    weight = weigh(weight, 1 / temperature)
    # ∂D/∂T = -Σ d_z · z / T. As Σ d_z = 0, the maximum may be subtracted from z,
    # which leaves fewer digits to cancel. Where d_z is 0, z may be infinite.
    d_temperature = -jnp.sum(d_z * zero_unless(d_z != 0, model.shifted), axis=-1)
    return weigh(weight[:, None], d_z), weigh(weight, d_temperature)


def _d_logits_of_list(c: Columns, rows: RowStats, listed: ListComparison) -> _DLogits:
    """Of the comparison of a list."""
    x, T = c.x, c.x.student_temperature
    weight = x.weights.divergence
    d_T = None
    if listed.d_temperature is not None:
        d_T = c.vocab.on_first_shard(weigh(weight, listed.d_temperature))
        weight = weigh(weight, 1 / T)
    d_listed = weigh(weight[:, None], listed.d_listed)
    d_logits = jnp.zeros_like(c.student)
    if listed.d_rest is not None:
        # Each column outside the list has its share of the rest.
        assert rows.sums.unlisted is not None
        total = rows.sums.unlisted.sum_exp
        share = weigh(weight, listed.d_rest) / jnp.where(total > 0, total, 1)
        z = SoftmaxStats(rows.maxima.unlisted, T).shifted(c.unlisted)
        d_logits = weigh(share[:, None], jnp.exp(z))
    array = x.student.vocab_array
    if x.student.kind == "logits" and not x.weights.has_own_terms:
        # Nothing is added to these, and they are rounded once here or later.
        d_listed = d_listed.astype(array.dtype)
    d_logits = plus_listed(d_logits, d_listed, x.teacher.columns, c.vocab)
    return _DLogits(None, d_logits, None, d_T)


def _statistics(pair: Pair, models: Models, vocab: Vocabulary) -> dict[str, jax.Array]:
    """Of the models at temperature 1; beside a list, as they are compared."""
    p, q = pair.softmaxes()
    if models.teacher_at_1 is not None:
        assert models.student_only is not None
        p, q = models.teacher_at_1.softmax(), models.student_only.softmax()
    return dict(
        kl=sum_terms(ForwardKL(), p.outcomes, q.outcomes, vocab),
        student_entropy=entropy(q.outcomes),
        teacher_entropy=entropy(p.outcomes),
    )


def _statistics_of_list(listed: ListComparison) -> dict[str, jax.Array]:
    return dict(
        kl=listed.kl,
        student_entropy=entropy(listed.q.outcomes),
        teacher_entropy=entropy(listed.p.outcomes),
    )


def _top_of_list(x: Operands, dtype: jnp.dtype) -> Top:
    """The first of the most likely columns of a list."""
    log_probs = x.teacher.log_probs.astype(dtype)
    at = jnp.argmax(log_probs, axis=-1)[:, None]
    column = jnp.take_along_axis(x.teacher.columns, at, axis=-1)[:, 0]
    return Top(jnp.max(log_probs, axis=-1), column.astype(jnp.int32))
