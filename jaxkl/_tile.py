r"""The mathematics of one tile of tokens: terms of the loss and their gradients.

With $z = s/T$, $\log q = z - \mathrm{lse}(z)$ and $D = \sum_v f(\log p_v, \log q_v)$,

$$ \frac{\partial D}{\partial z} = f_q - q \sum_v f_q, \qquad
   f_q = \frac{\partial f}{\partial \log q}, $$

and likewise for the teacher.
"""

import dataclasses
import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._compat import to_varying, varying_axes
from ._divergences import Divergence, ForwardKL, is_centred
from ._numerics import (
    centred,
    entropy,
    log_ratio,
    normalize,
    normalize_pair,
    Outcomes,
    Rows,
    Softmax,
    sums,
    zero_unless,
)
from ._vocabulary import Vocabulary


class Terms(NamedTuple):
    """Terms of a token's loss, `[B]` each, or their weights. None: not part of it.

    All but the first are of the student at temperature 1.
    """

    divergence: Any
    label: Any = None  # -log q[label]
    uniform: Any = None  # -mean_v log q_v, for label smoothing
    lse_squared: Any = None


class Statistics(NamedTuple):
    """What metrics report beside the terms, at temperature 1, `[B]` each."""

    kl: jax.Array
    student_entropy: jax.Array
    teacher_entropy: jax.Array
    top1_agreement: jax.Array


class Operands(NamedTuple):
    """All arrays of a loss. Those that are no source are `[B]`."""

    student: Any  # Source
    teacher: Any  # Source
    weights: Terms
    student_temperature: Any = None  # None: 1
    teacher_temperature: Any = None  # None: 1, or the student's if they are the same
    labels: Any = None  # -1: none
    mask: Any = None  # tokens that may be looked at

    def map_tokens(self, f):
        student, teacher, *rest = self
        sources = student.map_tokens(f), teacher.map_tokens(f)
        return Operands(*sources, *jax.tree.map(f, rest))

    def alike(self, axis_name: str | None = None):
        """Inside `shard_map`, all varying over the same mesh axes.

        The cast of a replicated array is where its gradient is summed over devices. So
        what gets a share of its gradient from each slice of the vocabulary is cast to
        vary over `axis_name`; weights, whose gradient is whole on each, are not.
        """
        axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(self)))
        axes -= {axis_name}
        per_token = (self.weights, self.labels, self.mask)
        weights, labels, mask = jax.tree.map(lambda x: to_varying(x, axes), per_token)
        if axis_name is not None:
            axes |= {axis_name}
        rest = self._replace(weights=None, labels=None, mask=None)
        rest = jax.tree.map(lambda x: to_varying(x, axes), rest)
        return rest._replace(weights=weights, labels=labels, mask=mask)


@dataclasses.dataclass(frozen=True)
class Spec:
    """All that is not an array."""

    divergence: Divergence
    vocab: Vocabulary
    dtype: jnp.dtype
    reduce: bool = True  # sum over tokens
    statistics: bool = False
    same_temperature: bool = False  # of teacher and student
    tile: int | None = None

    def teacher_temperature(self, x: Operands) -> jax.Array | None:
        return x.student_temperature if self.same_temperature else x.teacher_temperature


class Tile(NamedTuple):
    terms: Terms
    statistics: Statistics | None
    gradients: Operands  # of Σ weight · term; shared arrays: summed over the tile


@ft.partial(jax.jit, static_argnums=0, static_argnames="again", inline=True)
def run_tile(spec: Spec, x: Operands, live: jax.Array, *, again=False) -> Tile:
    """All about a tile: the caller keeps what it wants, and XLA drops the rest.

    `live`, `[B]`, are the tokens to count in the gradients of shared arrays. `again`:
    to evaluate slopes a second time, rather than keep them until their sum is known.
    """
    if x.mask is not None:
        student, teacher = x.student.mask_tokens(x.mask), x.teacher.mask_tokens(x.mask)
        x = x._replace(student=student, teacher=teacher)
    vocab = spec.vocab
    s = x.student.logits(spec.dtype, vocab)
    t = x.teacher.logits(spec.dtype, vocab)
    rows = _rows(spec, x, s, t)
    plain_q = None if rows.plain_q is None else rows.plain_q.softmax(s)
    p, q = _models(x, rows, s, t)
    found = x.teacher.against(spec.divergence, rows.q, s, vocab)
    if found is None:
        share, inner_p, inner_q = _one_by_one(spec, x, rows, s, t, again)
    else:
        (share, inner_q), inner_p = found, jnp.zeros_like(t)
    terms, d_label = _terms(x, share, plain_q, vocab)
    pull_back = ft.partial(_d_logits, x.weights)
    d_t, d_teacher_temperature = pull_back(inner_p, p, spec.teacher_temperature(x))
    d_s, d_student_temperature = pull_back(inner_q, q, x.student_temperature)
    if spec.same_temperature and d_student_temperature is not None:
        d_student_temperature += d_teacher_temperature
        d_teacher_temperature = None
    d_s += _d_plain_logits(x.weights, plain_q, d_label, vocab)
    # 0 · NaN is NaN in a product too: leave out what has no weight and no finite loss.
    weighty = ft.reduce(jnp.logical_or, [w != 0 for w in jax.tree.leaves(x.weights)])
    live &= weighty | jnp.isfinite(terms.divergence + q.lse)
    gradients = x._replace(
        student=x.student.pull(s, d_s, live),
        teacher=x.teacher.pull(t, d_t, live),
        weights=terms,
        student_temperature=d_student_temperature,
        teacher_temperature=d_teacher_temperature,
    )
    statistics = None
    if spec.statistics:
        assert plain_q is not None
        plain_p = p if rows.plain_p is None else rows.plain_p.softmax(t)
        plain = plain_p.outcomes, plain_q.outcomes
        statistics = _statistics(x.teacher, *plain, vocab)
    return Tile(terms, statistics, gradients)


def weigh(weight, x):
    """`weight · x`, and 0 where the weight is, even if `x` is NaN or infinite there."""
    return weight * zero_unless((weight != 0) | jnp.isfinite(x), x)


def weighted_sum(weights: Terms, terms: Terms):
    """The loss of each token, `[B]`."""
    return sum(jax.tree.leaves(jax.tree.map(weigh, weights, terms)))


class _Rows(NamedTuple):
    """Of teacher and student, tempered and at temperature 1; None: of no use."""

    p: Rows | None
    q: Rows
    log_scale: jax.Array | None = None  # of the tempered pair
    plain_p: Rows | None = None
    plain_q: Rows | None = None

    @property
    def tempered(self):
        return _Rows(self.p, self.q, self.log_scale)


def _rows(spec, x, s, t) -> _Rows:
    s_peak, t_peak = spec.vocab.max(x.student.peak(s), x.teacher.peak(t))
    needs_plain = spec.statistics or any(w is not None for w in x.weights[1:])
    teacher_temperature = spec.teacher_temperature(x)
    models = {"q": (Rows(s_peak, x.student_temperature), s)}
    if needs_plain and x.student_temperature is not None:
        models["plain_q"] = Rows(s_peak), s
    if x.teacher.is_normalized:
        # Log-probabilities are the same at any temperature.
        rows, log_scale = normalize(spec.vocab, models), None
    else:
        models["p"] = Rows(t_peak, teacher_temperature), t
        if spec.statistics and teacher_temperature is not None:
            models["plain_p"] = Rows(t_peak), t
        same = spec.same_temperature
        rows, log_scale = normalize_pair(spec.vocab, models, same_temperature=same)
    p, q = rows.get("p"), rows["q"]
    plain_q = rows.get("plain_q", q) if needs_plain else None
    return _Rows(p, q, log_scale, rows.get("plain_p", p), plain_q)


def _models(x, rows, s, t) -> tuple[Softmax, Softmax]:
    """Of teacher and student."""
    if rows.p is None:
        p = Softmax(t, jnp.exp(t), jnp.zeros_like(rows.q.total), t)
    else:
        p = rows.p.softmax(t)
    return p, rows.q.softmax(s)


def _one_by_one(spec, x, rows, s, t, again):
    """`Σ_v f` of the columns at hand, and its gradients to the logits over T."""
    share, *slopes = _slopes(spec, x, rows, s, t)

    def inner(i):
        f, prob = slopes[i]
        total, *others = sums(spec.vocab, f, prob)
        if again:
            # To the compiler, what comes behind the barrier is another computation.
            fresh, total, others = jax.lax.optimization_barrier(
                (rows.tempered, total, others)
            )
            f, prob = _slopes(spec, x, fresh, s, t)[1 + i]
        return centred(f, prob, total, *others)

    if rows.p is not None and is_centred(spec.divergence):
        return share, inner(0), slopes[1][0]
    return share, inner(0), inner(1)


def _slopes(spec, x, rows, s, t):
    """`Σ_v f` of the columns at hand, and of either model slopes, as `∂f/∂log q`, with
    the probabilities."""
    p, q = _models(x, rows, s, t)
    ratio = None
    if rows.p is not None:
        models = (rows.p, t), (rows.q, s)
        same = spec.same_temperature
        ratio = log_ratio(*models, rows.log_scale, same_temperature=same)

    def compare(log_p, log_q):
        outcomes = Outcomes.known(log_p, p.prob), Outcomes.known(log_q, q.prob)
        return x.teacher.compare(spec.divergence, *outcomes, spec.vocab, ratio)

    share, pull = jax.vjp(compare, p.log, q.log)
    f_p, f_q = pull(jnp.ones_like(share))
    return share, (f_p, p.prob), (f_q, q.prob)


def _terms(x, share, plain_q, vocab):
    """All terms that have a weight, and the gradient of `-log q[label]`, `[B, V]`."""
    if plain_q is None:
        return Terms(*vocab.sum(share)), None
    log_q, lse = plain_q.log, plain_q.lse
    hit = _is_label(x.labels, log_q, vocab)
    label = -jnp.sum(zero_unless(hit, log_q), axis=-1)
    others = jnp.sum(zero_unless(~hit, plain_q.prob), axis=-1)
    uniform = -jnp.sum(vocab.mask(log_q), axis=-1) / vocab.size
    divergence, label, others, uniform = vocab.sum(share, label, others, uniform)
    # A row with a logit of +inf is NaN, though that is not among the others.
    others = jnp.where(jnp.isnan(label), label, others)
    # Of a nearly certain label, log q has its digits in the others' probabilities.
    certain = others < 0.5
    label = jnp.where(certain, -jnp.log1p(-zero_unless(certain, others)), label)
    terms = Terms(divergence, label, uniform, lse * lse)
    pairs = zip(x.weights, terms, strict=True)
    terms = Terms(*(None if w is None else term for w, term in pairs))
    return terms, jnp.where(hit, -others[:, None], plain_q.prob)


def _is_label(labels, like, vocab):
    """`[B, V]`: one True in a row with a label. (A gather would not shard.)"""
    # Made like `like`, whose type may say how it is spread over a mesh.
    column = jnp.zeros_like(like, jnp.int32) + vocab.columns[None, :]
    return jnp.zeros_like(like, bool) if labels is None else column == labels[:, None]


def _d_logits(weights, inner, model, temperature):
    """Gradients of `weight · Σ_v f` to the logits, `[B, V]`, and temperature, `[B]`,
    from that of `Σ_v f` to `logits / temperature`.

    The second is this device's share, as is that to hidden states: both are summed
    over devices outside, once.
    """
    weight = weights.divergence
    if temperature is None:
        return weigh(weight[:, None], inner), None
    # A token without weight, or of padding, may have no temperature.
    weight = weigh(weight, 1 / temperature)
    # ∂D/∂T = -Σ inner · z / T; as Σ inner = 0, z may be less its maximum, with fewer
    # digits to cancel. Where `inner` is 0, z may be infinite.
    d_temperature = -jnp.sum(inner * zero_unless(inner != 0, model.shifted), axis=-1)
    return weigh(weight[:, None], inner), weigh(weight, d_temperature)


def _d_plain_logits(weights, plain_q, d_label, vocab):
    """Gradient of the terms at temperature 1 to the student's logits, `[B, V]` or 0."""
    if plain_q is None:
        return 0
    parts = []
    q, lse = plain_q.prob, plain_q.lse
    if weights.label is not None:
        parts.append(weigh(weights.label[:, None], d_label))
    if weights.uniform is not None:
        inner = vocab.mask(q - 1 / vocab.size)
        parts.append(weigh(weights.uniform[:, None], inner))
    if weights.lse_squared is not None:
        parts.append(weigh((2 * weights.lse_squared * lse)[:, None], q))
    return sum(parts)


def _statistics(teacher, p, q, vocab):
    agree = _argmax(p.log, vocab) == _argmax(q.log, vocab)
    kl, student_entropy, teacher_entropy = vocab.sum(
        teacher.compare(ForwardKL(), p, q, vocab),
        entropy(q),
        teacher.entropy(p, vocab),
    )
    return Statistics(kl, student_entropy, teacher_entropy, agree.astype(q.log.dtype))


def _argmax(x, vocab):
    """The first column that holds the maximum, `[B]`."""
    here = jnp.max(x, axis=-1)
    (top,) = vocab.max(here)
    column = jax.lax.argmax(x, 1, jnp.int32) + vocab.start
    return vocab.min(jnp.where(here == top, column, vocab.size))
