r"""The mathematics of one tile of tokens: terms of the loss and their gradients.

With $z = s/T$, $\log q = z - \mathrm{lse}(z)$ and $D = \sum_v f(\log p_v, \log q_v)$,

$$ \frac{\partial D}{\partial z} = f_q - q \sum_v f_q, \qquad
   f_q = \frac{\partial f}{\partial \log q}, $$

and the same for the teacher. Names follow this: `d_z` is $\partial D / \partial z$, and
`q_at_1` the student's softmax at temperature 1.
"""

import functools as ft
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ._comparison import Pair
from ._divergences import ForwardKL
from ._numerics import weigh, zero_unless
from ._operands import LossTerms, Operands, Result, Spec, Statistics
from ._softmax import (
    entropy,
    Model,
    normalize,
    normalize_pair,
    Softmax,
    SoftmaxStats,
)
from ._sources import Source
from ._vocabulary import Vocabulary


@ft.partial(jax.jit, static_argnums=0, static_argnames="recompute", inline=True)
def run_tile(
    spec: Spec, x: Operands, counted: jax.Array, *, recompute: bool = False
) -> Result:
    """All there is to know of a tile: XLA drops what the caller does not use.

    `counted`, `[B]`, are the tokens that count in the gradients of shared arrays;
    `recompute` is that of a `Plan`.
    """
    vocab = spec.vocab
    x = _masked(x)
    t = x.teacher.logits(spec.dtype, vocab)
    s = x.student.logits(spec.dtype, vocab)
    pair, p_at_1, q_at_1 = _normalize(spec, x, t, s)
    p, q = pair.softmaxes()

    compared = x.teacher.compare(spec.divergence, pair, vocab, recompute=recompute)
    terms, d_label = _terms(x, compared.divergence, q_at_1, vocab)

    weight = x.weights.divergence
    teacher_temperature = spec.teacher_temperature(x)
    d_t, d_teacher_temperature = _d_logits(
        weight, compared.d_teacher, p, teacher_temperature
    )
    d_s, d_student_temperature = _d_logits(
        weight, compared.d_student, q, x.student_temperature
    )
    if spec.same_temperature:
        both = d_student_temperature, d_teacher_temperature
        d_student_temperature = jax.tree.map(jnp.add, *both)
        d_teacher_temperature = None
    d_s += _d_logits_at_1(x.weights, q_at_1, d_label, vocab)

    # 0 · NaN is NaN in the product for `d kernel`: a token without weight does not
    # count if its divergence or lse is not finite.
    has_weight = ft.reduce(jnp.logical_or, [w != 0 for w in jax.tree.leaves(x.weights)])
    counted &= has_weight | jnp.isfinite(terms.divergence + q.lse)
    gradients = x._replace(
        student=x.student.d_outputs(s, d_s),
        teacher=x.teacher.d_outputs(t, d_t),
        weights=terms,
        student_temperature=d_student_temperature,
        teacher_temperature=d_teacher_temperature,
    )
    statistics = None
    if spec.statistics:
        assert q_at_1 is not None
        statistics = _statistics(x.teacher, p_at_1, q_at_1, vocab)
    return Result(terms, statistics, gradients, counted)


def pull_back(x: Operands, result: Result, sources: Sequence[str]) -> Operands:
    """The gradients of a result, with those of the named sources' arrays."""
    x, gradients = _masked(x), result.gradients
    for name in sources:
        pulled = getattr(x, name).vjp(getattr(gradients, name), result.counted)
        gradients = gradients._replace(**{name: pulled})
    return gradients


def _masked(x: Operands) -> Operands:
    if x.mask is None:
        return x
    return x.map_sources(lambda source: source.mask_tokens(x.mask))


def _normalize(
    spec: Spec, x: Operands, t: jax.Array, s: jax.Array
) -> tuple[Pair, Softmax, Softmax | None]:
    """The models at their temperatures, and teacher and student at temperature 1.

    The last is None if it is not needed.
    """
    vocab = spec.vocab
    needs_q_at_1 = spec.statistics or any(w is not None for w in x.weights[1:])
    student_max, teacher_max = x.student.max(s), None
    if x.teacher.is_normalized:
        (student_max,) = vocab.pmax(student_max)
    else:
        student_max, teacher_max = vocab.pmax(student_max, x.teacher.max(t))
    q = Model(s, SoftmaxStats(student_max, x.student_temperature))
    others = {}
    if needs_q_at_1 and q.stats.temperature is not None:
        others["q_at_1"] = Model(s, SoftmaxStats(student_max))
    if teacher_max is None:
        # Log-probabilities are the same at any temperature.
        q, *normalized = normalize(vocab, [q, *others.values()])
        pair = Pair(t, q, None, spec.same_temperature)
    else:
        p = Model(t, SoftmaxStats(teacher_max, spec.teacher_temperature(x)))
        if spec.statistics and p.stats.temperature is not None:
            others["p_at_1"] = Model(t, SoftmaxStats(teacher_max))
        (p, q, *normalized), log_sum_ratio = normalize_pair(
            vocab, p, q, list(others.values()), same_temperature=spec.same_temperature
        )
        pair = Pair(p, q, log_sum_ratio, spec.same_temperature)
    others = dict(zip(others, normalized, strict=True))
    p, q = pair.softmaxes()
    p_at_1 = others["p_at_1"].softmax() if "p_at_1" in others else p
    q_at_1 = others["q_at_1"].softmax() if "q_at_1" in others else q
    return pair, p_at_1, q_at_1 if needs_q_at_1 else None


def _terms(
    x: Operands, divergence: jax.Array, q_at_1: Softmax | None, vocab: Vocabulary
) -> tuple[LossTerms, jax.Array | None]:
    """The terms that have a weight; the gradient of `-log q[label]`, `[B, V]`.

    `divergence` is the sum over this device's columns.
    """
    if q_at_1 is None:
        return LossTerms(*vocab.psum(divergence)), None
    log_q, lse = q_at_1.log, q_at_1.lse
    is_label = _is_label(x.labels, log_q, vocab)
    label = -jnp.sum(zero_unless(is_label, log_q), axis=-1)
    others = jnp.sum(zero_unless(~is_label, q_at_1.prob), axis=-1)
    uniform = -jnp.sum(vocab.mask(log_q), axis=-1) / vocab.size
    divergence, label, others, uniform = vocab.psum(divergence, label, others, uniform)
    # A row with a logit of +inf is NaN, and this column may not be among the others.
    others = jnp.where(jnp.isnan(label), label, others)
    # When a label has q ≈ 1, `log q` has lost its digits; `1 - Σ_others q` has not.
    is_certain = others < 0.5
    accurate = -jnp.log1p(-zero_unless(is_certain, others))
    label = jnp.where(is_certain, accurate, label)
    terms = LossTerms(divergence, label, uniform, lse * lse)
    pairs = zip(x.weights, terms, strict=True)
    terms = LossTerms(*(None if w is None else term for w, term in pairs))
    return terms, jnp.where(is_label, -others[:, None], q_at_1.prob)


def _is_label(
    labels: jax.Array | None, like: jax.Array, vocab: Vocabulary
) -> jax.Array:
    """One True in each row with a label, `[B, V]`. (A gather would not shard.)"""
    # It is made like `like`, whose type may say how it is spread over a mesh.
    column = jnp.zeros_like(like, jnp.int32) + vocab.columns[None, :]
    return jnp.zeros_like(like, bool) if labels is None else column == labels[:, None]


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


def _d_logits_at_1(
    weights: LossTerms,
    q_at_1: Softmax | None,
    d_label: jax.Array | None,
    vocab: Vocabulary,
) -> jax.Array | int:
    """The gradient of the terms at temperature 1 to the logits, `[B, V]`, or 0."""
    if q_at_1 is None or d_label is None:
        return 0
    parts = []
    q, lse = q_at_1.prob, q_at_1.lse
    if weights.label is not None:
        parts.append(weigh(weights.label[:, None], d_label))
    if weights.uniform is not None:
        d_uniform = vocab.mask(q - 1 / vocab.size)
        parts.append(weigh(weights.uniform[:, None], d_uniform))
    if weights.lse_squared is not None:
        parts.append(weigh((2 * weights.lse_squared * lse)[:, None], q))
    return sum(parts)


def _statistics(
    teacher: Source, p: Softmax, q: Softmax, vocab: Vocabulary
) -> Statistics:
    agree = _argmax(p.log, vocab) == _argmax(q.log, vocab)
    kl, student_entropy, teacher_entropy = vocab.psum(
        teacher.sum_terms(ForwardKL(), p.outcomes, q.outcomes, vocab),
        entropy(q.outcomes),
        teacher.entropy(p.outcomes, vocab),
    )
    return Statistics(kl, student_entropy, teacher_entropy, agree.astype(q.log.dtype))


def _argmax(x: jax.Array, vocab: Vocabulary) -> jax.Array:
    """The first column that holds the maximum, `[B]`."""
    largest_here = jnp.max(x, axis=-1)
    (largest,) = vocab.pmax(largest_here)
    column = jax.lax.argmax(x, 1, jnp.int32) + vocab.start
    return vocab.pmin(jnp.where(largest_here == largest, column, vocab.size))
