r"""The mathematics of a loss, on the columns at hand.

With $z = s/T$, $\log q = z - \mathrm{lse}(z)$ and $D = \sum_v f(\log p_v, \log q_v)$,

$$ \frac{\partial D}{\partial z} = f_q - q \sum_v f_q, \qquad
   f_q = \frac{\partial f}{\partial \log q}, $$

and the same for the teacher. Names follow this: `d_z` is $\partial D / \partial z$, and
`q_at_1` the student's softmax at temperature 1. The student alone has more terms, which
are those of `_student_terms`.

Columns may be the whole vocabulary, a device's slice of it, or a block of a few. A
column learns of the others in four phases. Each makes sums (or maxima) over the columns
at hand. The caller adds up those of all columns, and gives them to the next phase:

1. `row_maxima`
2. `row_sums`
3. `Columns.sums_of_slopes`, of which a divergence may have no need
4. `finish`: the terms of the loss, which `complete` takes, and gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _student_terms as student_terms
from ._comparison import Comparison, OfEach, Pair
from ._divergences import ForwardKL, is_zero, kl_weights
from ._list_statistics import list_statistics, ListSums
from ._numerics import weigh, zero_unless
from ._operands import LossTerms, Operands, Spec, Statistics
from ._row_sums import Maxima, pair_sums, RowSums, sum_exp
from ._softmax import entropy, Model, Softmax, SoftmaxStats
from ._vocabulary import Vocabulary


class Columns(NamedTuple):
    """The columns at hand, of the tokens of `x`."""

    spec: Spec
    x: Operands
    vocab: Vocabulary  # these columns
    teacher: Any  # logits, [B, V]; None: there is no teacher
    student: jax.Array
    listed: tuple[jax.Array, jax.Array] | None  # see `Source.on_list`

    @classmethod
    def of(cls, spec: Spec, x: Operands, vocab: Vocabulary) -> "Columns":
        teacher = x.teacher.logits(spec.dtype, vocab)
        student = x.student.logits(spec.dtype, vocab)
        listed = x.teacher.on_list(student, vocab)
        return cls(spec, x, vocab, teacher, student, listed)

    @property
    def entries(self) -> tuple[jax.Array, jax.Array] | None:
        """`Source.entries`, if the metrics ask for them."""
        return self.x.teacher.entries(self.spec.dtype) if self.spec.statistics else None

    def made_first(self) -> "Columns":
        """The columns, with logits that are complete before anything is made of them.

        XLA would fuse the gradient with a product of a head. On a TPU, this fusion
        takes several times as long as product and gradient do one after the other.
        """
        logits = jax.lax.optimization_barrier((self.teacher, self.student))
        return self._replace(teacher=logits[0], student=logits[1])


class Models(NamedTuple):
    """The two models, and those of terms and statistics of one; None: not needed."""

    teacher: Model | None  # None: its logits are log-probabilities, or there are none
    student: Model
    teacher_at_1: Model | None
    alone: Model | None  # the student at `student_terms.temperature`

    @classmethod
    def of(cls, c: Columns, maxima: Maxima, sums: RowSums) -> "Models":
        spec, x = c.spec, c.x
        q, q_at_1 = _at_two_temperatures(
            c.student,
            SoftmaxStats(maxima.student, x.student_temperature, sums.student),
            sums.student_at_1,
        )
        p = p_at_1 = None
        if not x.teacher.is_normalized:
            p, p_at_1 = _at_two_temperatures(
                c.teacher,
                SoftmaxStats(maxima.teacher, spec.teacher_temperature(x), sums.teacher),
                sums.teacher_at_1,
            )
        has_more_terms = any(w is not None for w in x.weights[1:])
        alone = q if spec.divergence is None else q_at_1
        if not (spec.statistics or has_more_terms):
            alone = None
        return cls(p, q, p_at_1 if spec.statistics else None, alone)


def _at_two_temperatures(
    logits: jax.Array, stats: SoftmaxStats, sum_exp_at_1: jax.Array | None
) -> tuple[Model, Model]:
    if stats.temperature is None:
        sum_exp_at_1 = stats.sum_exp
    at_1 = SoftmaxStats(stats.max, None, sum_exp_at_1)
    return Model(logits, stats), Model(logits, at_1)


def row_maxima(c: Columns) -> Maxima:
    maxima = Maxima(c.x.student.max(c.student))
    if c.listed is not None:
        of_teacher, of_student = (jnp.max(x, axis=-1) for x in c.listed)
        maxima = maxima._replace(listed=Maxima(of_student, of_teacher))
    if c.x.teacher.is_normalized and not c.spec.statistics:
        return maxima
    return maxima._replace(teacher=c.x.teacher.max(c.teacher))


def row_sums(c: Columns, maxima: Maxima) -> RowSums:
    """The sums, relative to any `maxima`, such as those of all columns."""
    p, q, p_at_1, alone = Models.of(c, maxima, RowSums())
    sums = RowSums(student=sum_exp(q))
    if p is not None:
        sums = sums._replace(**_pair_sums(c, p, q, c.spec.same_temperature))
        if p_at_1 is not None and p.stats.temperature is not None:
            sums = sums._replace(teacher_at_1=sum_exp(p_at_1))
    if c.entries is not None:
        entries = ListSums.of(*c.entries, c.student, c.vocab)
        sums = sums._replace(entries=entries)
    if c.listed is not None:
        T = c.x.student_temperature
        sums = sums._replace(of_list=_list_sums(c, maxima, T))
        if T is not None and c.spec.statistics:
            sums = sums._replace(of_list_at_1=_list_sums(c, maxima, None))
    of_list = c.x.teacher.list_sums(q, c.vocab)
    if of_list is not None:
        sums = sums._replace(listed=of_list[0], unlisted=of_list[1])
    if alone is None:
        return sums
    if of_list is not None:
        _, unlisted = c.x.teacher.list_sums(alone, c.vocab)
        sums = sums._replace(unlisted_at_1=unlisted)
    if alone.stats.temperature is not q.stats.temperature:
        sums = sums._replace(student_at_1=sum_exp(alone))
    return sums._replace(**student_terms.sums(c.x.weights, alone))


def _pair_sums(
    c: Columns, p: Model, q: Model, same_temperature: bool
) -> dict[str, Any]:
    weights = kl_weights(c.spec.whole_divergence(c.x))
    reverse = weights is not None and not is_zero(weights[1])
    of_pair = pair_sums(p, q, same_temperature=same_temperature, reverse=reverse)
    return dict(teacher=sum_exp(p), **of_pair)


def _list_sums(c: Columns, maxima: Maxima, temperature: jax.Array | None) -> RowSums:
    p, q, _, same_temperature = _listed_pair(c, maxima, RowSums(), temperature)
    assert isinstance(p, Model)
    of_pair = _pair_sums(c, p, q, same_temperature)
    return RowSums(student=sum_exp(q), **of_pair)


def _listed_pair(
    c: Columns, maxima: Maxima, sums: RowSums, temperature: jax.Array | None
) -> Pair:
    """The models given that the outcome is listed, `[B, k]`."""
    assert c.listed is not None
    teacher, student = c.listed
    of_teacher = SoftmaxStats(maxima.listed.teacher, None, sums.teacher)
    of_student = SoftmaxStats(maxima.listed.student, temperature, sums.student)
    models = Model(teacher, of_teacher), Model(student, of_student)
    return Pair(*models, sums, temperature is None)


def sums_of_slopes(c: Columns, maxima: Maxima, sums: RowSums) -> OfEach:
    if c.spec.divergence is None:
        return OfEach(None, None)
    pair = _pair(c, Models.of(c, maxima, sums), maxima, sums)
    divergence = c.spec.whole_divergence(c.x)
    return c.x.teacher.sums_of_slopes(divergence, pair, c.vocab)


class TermSums(NamedTuple):
    """Sums over columns that make the terms of the loss and its statistics, `[B]`."""

    divergence: Any = None
    label: Any = None  # see `student_terms.label_and_uniform`
    uniform: Any = None
    kl: Any = None
    student_entropy: Any = None
    teacher_entropy: Any = None


class Tops(NamedTuple):
    """The first column with the largest logit, `[B]`: the least of those at hand."""

    student: jax.Array
    teacher: jax.Array


class Finished(NamedTuple):
    sums: TermSums
    tops: Tops | None
    # Of student, teacher and temperatures; see `Result`.
    gradients: Operands
    counted: jax.Array  # see `Result`


def finish(
    c: Columns,
    maxima: Maxima,
    sums: RowSums,
    of_slopes: OfEach,
    counted: jax.Array,
    *,
    recompute: bool,
) -> Finished:
    """The terms of the loss, and its gradients.

    `counted`, `[B]`, are the tokens that count in the gradients of shared arrays;
    `recompute` is that of a `Plan`.
    """
    spec, x, vocab = c.spec, c.x, c.vocab
    models = Models.of(c, maxima, sums)
    terms, d_logits, lse = TermSums(), _DLogits(), models.student.stats.lse
    p = None
    if spec.divergence is not None:
        pair = _pair(c, models, maxima, sums)
        p, q = pair.softmaxes()
        compared = x.teacher.compare(
            spec.whole_divergence(x), pair, vocab, of_slopes, recompute=recompute
        )
        terms = terms._replace(divergence=compared.divergence)
        d_logits, lse = _d_logits_of_pair(c, pair, compared), p.lse + q.lse
    tops = None
    if models.alone is not None:
        of_label, uniform = student_terms.label_and_uniform(x, models.alone, vocab)
        terms = terms._replace(label=of_label, uniform=uniform)
        d_logits = d_logits.plus(*_d_logits_alone(x, models.alone, sums, vocab))
        if spec.statistics:
            assert p is not None
            q_at_1 = models.alone.softmax()
            if c.listed is not None:
                statistics = _listed_statistics(c, maxima, sums, q_at_1)
            else:
                at_1 = models.teacher_at_1
                p_at_1 = p if at_1 is None else at_1.softmax()
                statistics = _statistics(x, p_at_1, q_at_1, vocab, sums)
            terms = terms._replace(**statistics)
            tops = Tops(
                _top(c.student, maxima.student, vocab),
                _top(c.teacher, maxima.teacher, vocab),
            )
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
    maxima: Maxima,
    sums: RowSums,
    terms: TermSums,
    tops: Tops | None,
    number_among_top: jax.Array | None,
) -> tuple[LossTerms, Statistics | None]:
    """The terms that have a weight, and the statistics, from sums over all columns.

    `number_among_top`, `[B]`, is that of a list: see `_list_statistics`.
    """
    of_loss = LossTerms(terms.divergence)
    if sums.below is not None:
        alone = student_terms.terms(
            spec, x, maxima.student, sums, terms.label, terms.uniform
        )
        of_loss = alone._replace(divergence=terms.divergence)
    if tops is None:
        return of_loss, None
    agree = (tops.student == tops.teacher).astype(spec.dtype)
    entropies = terms.student_entropy, terms.teacher_entropy
    of_list = None
    if number_among_top is not None:
        assert sums.entries is not None
        at_1 = SoftmaxStats(maxima.student, None, sums.alone)
        of_list = list_statistics(sums.entries, number_among_top, at_1)
    return of_loss, Statistics(terms.kl, *entropies, agree, of_list)


def _pair(c: Columns, models: Models, maxima: Maxima, sums: RowSums) -> Pair:
    if c.listed is not None:
        return _listed_pair(c, maxima, sums.of_list, c.x.student_temperature)
    teacher = c.teacher if models.teacher is None else models.teacher
    return Pair(teacher, models.student, sums, c.spec.same_temperature)


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
    if c.listed is not None:
        d_s = x.teacher.off_list(d_s, c.vocab)
    if spec.same_temperature:
        both = d_student_temperature, d_teacher_temperature
        d_student_temperature = jax.tree.map(jnp.add, *both)
        d_teacher_temperature = None
    return _DLogits(d_t, d_s, d_teacher_temperature, d_student_temperature)


def _d_logits_alone(
    x: Operands, alone: Model, sums: RowSums, vocab: Vocabulary
) -> tuple[Any, jax.Array | None]:
    """Of the terms of the student alone: the gradients to logits and temperature."""
    d_z: Any = student_terms.d_shifted(x, alone, sums, vocab)
    if alone.stats.temperature is None:
        return d_z, None
    is_weighted = x.weights.any_nonzero.astype(d_z.dtype)
    return _d_logits(is_weighted, d_z, alone.softmax(), alone.stats.temperature)


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


def _statistics(
    x: Operands, p: Softmax, q: Softmax, vocab: Vocabulary, sums: RowSums
) -> dict[str, jax.Array]:
    q_unlisted = None
    if sums.unlisted_at_1 is not None:
        q_unlisted = sums.unlisted_at_1 / sums.alone
    return dict(
        kl=x.teacher.divergence_of(
            ForwardKL(), p.outcomes, q.outcomes, vocab, q_unlisted
        ),
        student_entropy=entropy(q.outcomes),
        teacher_entropy=x.teacher.entropy(p.outcomes, vocab),
    )


def _listed_statistics(
    c: Columns, maxima: Maxima, sums: RowSums, q_at_1: Softmax
) -> dict[str, jax.Array]:
    """Those of the models given that the outcome is listed, but for the entropy of the
    student, which is of all columns."""
    of_list = sums.of_list if sums.of_list_at_1 is None else sums.of_list_at_1
    pair = _listed_pair(c, maxima, of_list, None)
    p, q = (model.outcomes for model in pair.softmaxes())
    kl = c.x.teacher.sum_terms(ForwardKL(), p, q, c.vocab, pair.log_ratio())
    student, teacher = entropy(q_at_1.outcomes), entropy(p)
    return dict(kl=kl, student_entropy=student, teacher_entropy=teacher)


def _top(logits: jax.Array, largest: jax.Array, vocab: Vocabulary) -> jax.Array:
    """The first column at hand that holds the largest logit of the row, `[B]`."""
    is_largest = logits == largest[:, None]
    return jnp.min(jnp.where(is_largest, vocab.columns, vocab.size), axis=-1)
