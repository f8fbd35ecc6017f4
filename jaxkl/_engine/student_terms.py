r"""The terms of the student alone: of its labels, its log-sum-exp and its entropy.

With $z$ the logits over temperature less their maximum, $Z = \sum e^z$ and
$M = -\sum q z$,

$$ -\log q_v = \log Z - z_v, \qquad H = \log Z + M, \qquad
   \frac{\partial H}{\partial z} = -q\,(z + M). $$

These are sums of numbers of one sign, so that no digits cancel. Where one column has
almost all of a row, two more forms keep the digits. With the sum $\sum'$ over the
columns below the maximum, $\log Z = \log (1 + \sum' e^z)$, and that column has
$1 - q = \sum' e^z / Z$.

A label is one column a token, `[B]`, or a list of them, `[B, k]`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .._math.numerics import weigh, zero_unless
from .._math.softmax import Model, Softmax, SoftmaxStats
from .._math.vocabulary import Vocabulary
from .._source.lists import positions
from .operands import LossTerms, Operands, Spec
from .row_sums import below_top, CERTAIN, RowSums, TOP


def temperature(spec: Spec, x: Operands) -> jax.Array | None:
    """That of these terms: 1 beside a divergence, else the student's."""
    return x.student_temperature if spec.divergence is None else None


def sums(weights: LossTerms, q: Model) -> dict[str, Any]:
    """The sums of `RowSums` that these terms need."""
    z = q.shifted()
    exp_z = jnp.exp(z)
    result = dict(below=jnp.sum(below_top(z) * exp_z, axis=-1))
    if weights.uniform is not None:
        result["present"] = jnp.sum(_is_present(q).astype(z.dtype), axis=-1)
    if weights.entropy is not None:
        result["shifted"] = jnp.sum(exp_z * z, axis=-1)
    return result


def label_and_uniform(
    x: Operands, q: Model, vocab: Vocabulary
) -> tuple[jax.Array | None, jax.Array | None]:
    """Sums over the columns at hand: `-z` of each label, and `-Σ z`, `[B]`.

    The first has the shape of the labels. The second is made if it has a weight, and is
    over the columns that are not -inf: no label's share is spread over the others.
    """
    z, uniform = q.softmax().shifted, None
    if x.weights.uniform is not None:
        uniform = -jnp.sum(zero_unless(_is_present(q), z), axis=-1)
    if x.labels is None:
        return None, uniform
    if x.labels.ndim == 1:
        is_label = _is_label(x.labels, q.logits, vocab)
        return -jnp.sum(zero_unless(is_label, z), axis=-1), uniform
    at = positions(x.labels, vocab)
    listed = _softmax_at(at, q).shifted
    return -zero_unless(at[1] < vocab.width, listed), uniform


def terms(
    spec: Spec,
    x: Operands,
    largest: jax.Array,
    sums: RowSums,
    label: jax.Array | None,
    uniform: jax.Array | None,
) -> LossTerms:
    """The terms that have a weight, from sums over all columns."""
    log_sum = log_of_sum(sums.student_only, sums.below)
    result, weights = LossTerms(None), x.weights
    if weights.label is not None:
        assert label is not None
        of_row = lambda x: jnp.expand_dims(x, range(1, label.ndim))
        is_certain = of_row(_has_certain(sums.student_only)) & (label < TOP)
        # Of a certain column, z is 0 but for rounding. Its derivative is kept.
        rounding = jax.lax.stop_gradient(zero_unless(is_certain, label))
        result = result._replace(label=of_row(log_sum) + (label - rounding))
    if weights.uniform is not None:
        assert uniform is not None
        result = result._replace(uniform=log_sum + uniform * _share(sums))
    if weights.lse_squared is not None:
        lse = SoftmaxStats(largest, temperature(spec, x), sums.student_only).lse
        result = result._replace(lse_squared=lse * lse)
    if weights.entropy is not None:
        result = result._replace(entropy=log_sum + _mean_below(sums))
    return result


def d_shifted(
    x: Operands, model: Model, sums: RowSums, vocab: Vocabulary
) -> jax.Array | int:
    """The gradient of `Σ weight · term` by `z`, `[B, V]`, or 0."""
    weights, q, parts = x.weights, model.softmax(), []
    if weights.label is not None:
        of_labels = _d_label if x.labels.ndim == 1 else _d_labels
        others = sums.below / sums.student_only
        parts.append(of_labels(weights.label, x.labels, model, q, others, vocab))
    if weights.uniform is not None:
        d_uniform = q.prob - jnp.where(_is_present(model), _share(sums)[:, None], 0)
        parts.append(weigh(weights.uniform[:, None], d_uniform))
    if weights.lse_squared is not None:
        d_lse = weigh(2 * weights.lse_squared, q.lse)
        parts.append(weigh(d_lse[:, None], q.prob))
    if weights.entropy is not None:
        above = q.shifted + _mean_below(sums)[:, None]
        # Where q is 0, the other factor may be infinite.
        d_entropy = -q.prob * zero_unless(q.prob != 0, above)
        parts.append(weigh(weights.entropy[:, None], d_entropy))
    return sum(parts)


@jax.custom_jvp
def log_of_sum(total: jax.Array, below: jax.Array) -> jax.Array:
    """`log Z`, `[B]`, where Z is `total` and the sum below the maximum is `below`."""
    return jnp.where(_has_certain(total), jnp.log1p(below), jnp.log(total))


@log_of_sum.defjvp
def _log_of_sum_jvp(primals, tangents):
    # `below` has the digits, but its derivative lacks the largest column.
    return log_of_sum(*primals), tangents[0] / primals[0]


def _has_certain(total: jax.Array) -> jax.Array:
    """Whether a row has a certain column, `[B]`: with Z at most 4/3, of which it has 1.

    A row of -inf alone has Z = 0.
    """
    return (total > 0.5) & (total < 1 / CERTAIN)


def _mean_below(sums: RowSums) -> jax.Array:
    """`M`: by how much a logit of the row is below the largest, on average, `[B]`."""
    return -sums.shifted / sums.student_only


def _is_present(model: Model) -> jax.Array:
    """Whether a column is neither masked nor padding, `[B, V]`."""
    return model.logits != -jnp.inf


def _share(sums: RowSums) -> jax.Array:
    """What each column that is present gets of a label that is spread, `[B]`."""
    return 1 / jnp.maximum(sums.present, 1)


def _is_label(labels: jax.Array, like: jax.Array, vocab: Vocabulary) -> jax.Array:
    """One True in each row with a label, `[B, V]`. (A gather would not shard.)"""
    # It is made like the logits, whose type may say how they are spread over a mesh.
    column = jnp.zeros_like(like, jnp.int32) + vocab.columns[None, :]
    return column == labels[:, None]


def _softmax_at(at: tuple[jax.Array, jax.Array], model: Model) -> Softmax:
    """The softmax of the columns at `positions`, `[B, k]`; 0 for those elsewhere."""
    listed = model.logits.at[at].get(mode="fill", fill_value=-jnp.inf)
    return model.stats.softmax(listed)


def _d_label(
    weight: jax.Array,
    label: jax.Array,
    model: Model,
    q: Softmax,
    others: jax.Array,
    vocab: Vocabulary,
) -> jax.Array:
    """`weight · (q - onehot)`, `[B, V]`; `others` are `1 - q` of the largest column."""
    is_label = _is_label(label, model.logits, vocab)
    less_than_one = jnp.where(q.prob > CERTAIN, others[:, None], 1 - q.prob)
    return weigh(weight[:, None], jnp.where(is_label, -less_than_one, q.prob))


def _d_labels(
    weight: jax.Array,
    labels: jax.Array,
    model: Model,
    q: Softmax,
    others: jax.Array,
    vocab: Vocabulary,
) -> jax.Array:
    """The sum of `_d_label` over the labels of each token, `[B, V]`."""
    at = positions(labels, vocab)
    # The device or block that holds a certain column holds all its labels.
    is_certain = _softmax_at(at, model).prob > CERTAIN
    of_certain = jnp.sum(zero_unless(is_certain, weight), axis=-1)
    of_others = jnp.sum(zero_unless(~is_certain, weight), axis=-1)
    certain = weigh(of_others[:, None], q.prob) - weigh(of_certain, others)[:, None]
    total = (of_certain + of_others)[:, None]
    d_z = jnp.where(q.prob > CERTAIN, certain, weigh(total, q.prob))
    return d_z.at[at].add(-zero_unless(~is_certain, weight), mode="drop")
