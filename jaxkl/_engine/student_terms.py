r"""The terms of the student alone: of its labels, its log-sum-exp and its entropy.

With $z$ the logits over temperature less their maximum, $Z = \sum e^z$ and
$M = -\sum q z$,

$$ -\log q_v = \log Z - z_v, \qquad H = \log Z + M, \qquad
   \frac{\partial H}{\partial z} = -q\,(z + M). $$

These are sums of numbers of one sign, so that no digits cancel. Where one column has
almost all of a row, two more forms keep the digits. With the sum $\sum'$ over the
columns below the maximum, $\log Z = \log (1 + \sum' e^z)$, and that column has
$1 - q = \sum' e^z / Z$.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._math.numerics import weigh, zero_unless
from .._math.softmax import Model, Softmax
from .._math.vocabulary import Vocabulary
from .._source.lists import positions
from .row_stats import (
    Below,
    CERTAIN,
    Columns,
    Present,
    Row,
    Shifted,
    Statistic,
    SumExp,
    TOP,
)
from .term import d_logits, Gradients, Term, TermResult


@dataclasses.dataclass(frozen=True)
class StudentTerm(Term):
    """A term of the student at temperature 1, or at that of the loss."""

    at_1: bool = dataclasses.field(kw_only=True, metadata={"static": True})

    def row(self, c: Columns) -> Row:
        return c.row("student", at_1=self.at_1)

    def statistics(self, c):
        return [SumExp(self.row(c)), *self.own_statistics(self.row(c))]

    def own_statistics(self, row: Row) -> Sequence[Statistic]:
        """Those beside the sum that makes the softmax."""
        del row
        return []

    def sums(self, c: Columns, model: Model, q: Softmax) -> Any:
        """Sums over the columns at hand, of which `value` is made."""
        del c, model, q
        return ()

    @abc.abstractmethod
    def d_z(self, c: Columns, model: Model, q: Softmax) -> jax.Array:
        """The gradient of `weight · value` by `z`, `[B, V]`."""

    def finish(self, c, combined, *, recompute):
        del combined, recompute
        model = c.model(self.row(c))
        q = model.softmax()
        d_z = self.d_z(c, model, q)
        gradients = Gradients({"student": d_z}, {})
        if (temperature := model.stats.temperature) is not None:
            is_weighted = self.is_weighted.astype(d_z.dtype)
            of_logits, of_T = d_logits(is_weighted, d_z, q, temperature)
            gradients = Gradients({"student": of_logits}, {"student": of_T})
        return TermResult(self.sums(c, model, q), gradients, q.lse)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Label(StudentTerm):
    """`-log q` of one column a token."""

    labels: Any  # [B]; negative: none

    def own_statistics(self, row):
        return [Below(row)]

    def sums(self, c, model, q):
        """`-z` of each label."""
        is_label = _is_label(self.labels, model.logits, c.vocab)
        return -jnp.sum(zero_unless(is_label, q.shifted), axis=-1)

    def value(self, of_all, combined, sums):
        del combined
        of_row = lambda x: jnp.expand_dims(x, range(1, sums.ndim))
        total = of_all.stats(self.row(of_all)).total
        is_certain = of_row(_has_certain(total)) & (sums < TOP)
        # Of a certain column, z is 0 but for rounding. Its derivative is kept.
        rounding = jax.lax.stop_gradient(zero_unless(is_certain, sums))
        return of_row(_log_sum(self, of_all)) + (sums - rounding)

    def d_z(self, c, model, q):
        is_label = _is_label(self.labels, model.logits, c.vocab)
        less_than_one = jnp.where(q.prob > CERTAIN, self.others(c), 1 - q.prob)
        d_z = jnp.where(is_label, -less_than_one, q.prob)
        return weigh(self.weight[:, None], d_z)

    def others(self, c: Columns) -> jax.Array:
        """`1 - q` of the largest column, `[B, 1]`."""
        sums, row = c.rows.sums, self.row(c)
        return (sums[Below(row)] / sums[SumExp(row)])[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labels(Label):
    """`-log q` of several columns a token, `[B, k]`."""

    def sums(self, c, model, q):
        at = positions(self.labels, c.vocab)
        return -zero_unless(at[1] < c.vocab.width, _softmax_at(at, model).shifted)

    def d_z(self, c, model, q):
        """The sum of the gradients of the labels of each token."""
        weight, others, at = (
            self.weight,
            self.others(c),
            positions(self.labels, c.vocab),
        )
        # The device or block that holds a certain column holds all its labels.
        is_certain = _softmax_at(at, model).prob > CERTAIN
        of_certain = jnp.sum(zero_unless(is_certain, weight), -1, keepdims=True)
        of_others = jnp.sum(zero_unless(~is_certain, weight), -1, keepdims=True)
        certain = weigh(of_others, q.prob) - weigh(of_certain, others)
        total = of_certain + of_others
        d_z = jnp.where(q.prob > CERTAIN, certain, weigh(total, q.prob))
        return d_z.at[at].add(-zero_unless(~is_certain, weight), mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniform(StudentTerm):
    """`-log q` on average over the columns that are not -inf, for label smoothing: no
    label's share is spread over the others."""

    def own_statistics(self, row):
        return [Below(row), Present(row)]

    def sums(self, c, model, q):
        """`-Σ z`."""
        return -jnp.sum(zero_unless(_is_present(model), q.shifted), axis=-1)

    def value(self, of_all, combined, sums):
        del combined
        return _log_sum(self, of_all) + sums * self._share(of_all)

    def d_z(self, c, model, q):
        share = jnp.where(_is_present(model), self._share(c)[:, None], 0)
        return weigh(self.weight[:, None], q.prob - share)

    def _share(self, c: Columns) -> jax.Array:
        """What each column that is present gets of a label that is spread, `[B]`."""
        return 1 / jnp.maximum(c.rows.sums[Present(self.row(c))], 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LseSquared(StudentTerm):
    """The square of the log-sum-exp."""

    def value(self, of_all, combined, sums):
        del combined, sums
        lse = of_all.stats(self.row(of_all)).lse
        return lse * lse

    def d_z(self, c, model, q):
        return weigh(weigh(2 * self.weight, q.lse)[:, None], q.prob)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entropy(StudentTerm):
    """`-Σ q log q`."""

    has_long_gradient = True

    def own_statistics(self, row):
        return [Below(row), Shifted(row)]

    def value(self, of_all, combined, sums):
        del combined, sums
        return _log_sum(self, of_all) + self._mean_below(of_all)

    def d_z(self, c, model, q):
        above = q.shifted + self._mean_below(c)[:, None]
        # Where q is 0, the other factor may be infinite.
        d_entropy = -q.prob * zero_unless(q.prob != 0, above)
        return weigh(self.weight[:, None], d_entropy)

    def _mean_below(self, c: Columns) -> jax.Array:
        """`M`: by how much a logit of the row is below the largest, on average."""
        sums, row = c.rows.sums, self.row(c)
        return -sums[Shifted(row)] / sums[SumExp(row)]


def _log_sum(term: StudentTerm, of_all: Columns) -> jax.Array:
    sums, row = of_all.rows.sums, term.row(of_all)
    return log_of_sum(sums[SumExp(row)], sums[Below(row)])


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


def _is_present(model: Model) -> jax.Array:
    """Whether a column is neither masked nor padding, `[B, V]`."""
    return model.logits != -jnp.inf


def _is_label(labels: jax.Array, like: jax.Array, vocab: Vocabulary) -> jax.Array:
    """One True in each row with a label, `[B, V]`. (A gather would not shard.)"""
    # It is made like the logits, whose type may say how they are spread over a mesh.
    column = jnp.zeros_like(like, jnp.int32) + vocab.columns[None, :]
    return column == labels[:, None]


def _softmax_at(at: tuple[jax.Array, jax.Array], model: Model) -> Softmax:
    """The softmax of the columns at `positions`, `[B, k]`; 0 for those elsewhere."""
    listed = model.logits.at[at].get(mode="fill", fill_value=-jnp.inf)
    return model.stats.softmax(listed)
