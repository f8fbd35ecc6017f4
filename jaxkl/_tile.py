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

from ._divergences import Divergence, ForwardKL
from ._numerics import entropy, log_softmax, zero_unless


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
    teacher_temperature: Any = None
    labels: Any = None  # -1: none
    mask: Any = None  # tokens that may be looked at

    def map_tokens(self, f):
        student, teacher, *rest = self
        sources = student.map_tokens(f), teacher.map_tokens(f)
        return Operands(*sources, *jax.tree.map(f, rest))


@dataclasses.dataclass(frozen=True)
class Spec:
    """All that is not an array."""

    divergence: Divergence
    vocab_size: int
    dtype: jnp.dtype
    reduce: bool = True  # sum over tokens
    statistics: bool = False
    tile: int | None = None


class Tile(NamedTuple):
    terms: Terms
    statistics: Statistics | None
    gradients: Operands  # of Σ weight · term; shared arrays: summed over the tile


def run_tile(spec: Spec, x: Operands, live: jax.Array) -> Tile:
    """All about a tile: the caller keeps what it wants, and XLA drops the rest.

    `live`, `[B]`, are the tokens to count in the gradients of shared arrays.
    """
    if x.mask is not None:
        student, teacher = x.student.mask_tokens(x.mask), x.teacher.mask_tokens(x.mask)
        x = x._replace(student=student, teacher=teacher)
    s = x.student.logits(spec.dtype, spec.vocab_size)
    t = x.teacher.logits(spec.dtype, spec.vocab_size)
    log_p = x.teacher.log_p(t, x.teacher_temperature)
    log_q, tempered_lse = log_softmax(s, x.student_temperature)
    plain_log_q, lse = log_softmax(s)

    compare = ft.partial(x.teacher.compare, spec.divergence)
    divergence, pull = jax.vjp(compare, log_p, log_q)
    f_p, f_q = pull(jnp.ones_like(divergence))
    hit = _is_label(x.labels, log_q)
    terms = Terms(
        divergence=divergence,
        label=-jnp.sum(zero_unless(hit, plain_log_q), axis=-1),
        uniform=-jnp.mean(plain_log_q, axis=-1),
        lse_squared=lse * lse,
    )
    terms = _present(x.weights, terms)

    d_s, d_student_temperature = _d_logits(x.weights, f_q, log_q, x.student_temperature)
    d_t, d_teacher_temperature = _d_logits(x.weights, f_p, log_p, x.teacher_temperature)
    d_s += _d_plain_logits(x.weights, plain_log_q, lse, hit)
    # 0 · NaN is NaN in a product too: leave out what has no weight and no finite loss.
    weighty = ft.reduce(jnp.logical_or, [w != 0 for w in jax.tree.leaves(x.weights)])
    live &= weighty | jnp.isfinite(divergence + tempered_lse)
    gradients = x._replace(
        student=x.student.pull(s, d_s, live),
        teacher=x.teacher.pull(t, d_t, live),
        weights=terms,
        student_temperature=d_student_temperature,
        teacher_temperature=d_teacher_temperature,
    )
    statistics = None
    if spec.statistics:
        statistics = _statistics(x.teacher, x.teacher.log_p(t, None), plain_log_q)
    return Tile(terms, statistics, gradients)


def weigh(weight, x):
    """`weight · x`, and 0 where the weight is, even if `x` is NaN or infinite there."""
    return weight * zero_unless((weight != 0) | jnp.isfinite(x), x)


def weighted_sum(weights: Terms, terms: Terms):
    """The loss of each token, `[B]`."""
    return sum(jax.tree.leaves(jax.tree.map(weigh, weights, terms)))


def _present(weights, terms):
    return Terms(
        *(None if w is None else x for w, x in zip(weights, terms, strict=True))
    )


def _is_label(labels, like):
    """`[B, V]`: one True in a row with a label. (A gather would not shard.)"""
    column = jax.lax.broadcasted_iota(jnp.int32, like.shape, 1)
    return jnp.zeros_like(like, bool) if labels is None else column == labels[:, None]


def _d_logits(weights, f_q, log_q, temperature):
    """Gradients of `weight · Σ_v f` to the logits, `[B, V]`, and temperature, `[B]`."""
    inner = f_q - jnp.exp(log_q) * jnp.sum(f_q, axis=-1, keepdims=True)
    weight = weights.divergence
    if temperature is None:
        return weigh(weight[:, None], inner), None
    weight = weight / temperature
    # ∂D/∂T = -Σ inner · z / T; as Σ inner = 0, log q may stand for z, with fewer digits
    # to cancel. Where `inner` is 0, z may be infinite.
    d_temperature = -jnp.sum(inner * zero_unless(inner != 0, log_q), axis=-1)
    return weigh(weight[:, None], inner), weigh(weight, d_temperature)


def _d_plain_logits(weights, log_q, lse, hit):
    """Gradient of the terms at temperature 1 to the student's logits, `[B, V]` or 0."""
    parts = []
    q = jnp.exp(log_q)
    if weights.label is not None:
        parts.append(weigh(weights.label[:, None], q - hit.astype(q.dtype)))
    if weights.uniform is not None:
        parts.append(weigh(weights.uniform[:, None], q - 1 / q.shape[-1]))
    if weights.lse_squared is not None:
        parts.append(weigh((2 * weights.lse_squared * lse)[:, None], q))
    return sum(parts)


def _statistics(teacher, log_p, log_q):
    agree = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
    return Statistics(
        kl=teacher.compare(ForwardKL(), log_p, log_q),
        student_entropy=entropy(log_q),
        teacher_entropy=teacher.entropy(log_p),
        top1_agreement=agree.astype(log_q.dtype),
    )
