r"""The phases of a loss, on the columns at hand.

With $z = s/T$, $\log q = z - \mathrm{lse}(z)$ and $D = \sum_v f(\log p_v, \log q_v)$,

$$ \frac{\partial D}{\partial z} = f_q - q \sum_v f_q, \qquad
   f_q = \frac{\partial f}{\partial \log q}, $$

and the same for the teacher. Names follow this: `d_z` is $\partial D / \partial z$.

The phases are `local_stats`, which a walk over blocks merges, `slope_sums`, of which a
divergence may have no need, and `finish`. `combined` comes before the last, and
`complete` after it, from sums over all columns.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._math.vocabulary import Vocabulary
from .comparison import Comparison
from .list_comparison import LISTED, listed_logits, UNLISTED
from .metrics import ColumnSums, Metrics, metrics_for, MetricValues, Top
from .operands import Operands, Spec
from .row_stats import Columns, RowStats, Statistic
from .term import Gradients


def _metrics(spec: Spec, x: Operands) -> tuple[Metrics, ...]:
    """Those of the teacher, if they are asked for."""
    if not spec.metrics or x.comparison is None:
        return ()
    return (metrics_for(x.comparison),)


def _needed(spec: Spec, x: Operands) -> list[Statistic]:
    """What all terms and metrics must know of all columns, without repetition."""
    c = Columns(spec.vocab, x.temperatures)
    asking = [*x.terms, *_metrics(spec, x)]
    return list(dict.fromkeys(s for x in asking for s in x.statistics(c)))


def columns_of(
    spec: Spec, x: Operands, vocab: Vocabulary, *, materialized: bool = False
) -> Columns:
    """The columns of `vocab`, without what is known of others.

    If the logits are `materialized`, they are complete before anything is made of them.
    XLA would fuse the gradient with a product of a head. On a TPU, this fusion takes
    several times as long as product and gradient do one after the other.
    """
    logits = {"student": x.student.logits(spec.dtype, vocab)}
    listed = {}
    if (comparison := x.comparison) is not None:
        teacher = comparison.teacher
        if comparison.has_columns:
            logits["teacher"] = teacher.logits(spec.dtype, vocab)
        of_student, needed = logits["student"], {s.row for s in _needed(spec, x)}
        for row in (LISTED, UNLISTED):
            if row in needed:
                listed[row.logits] = listed_logits(row, teacher, of_student, vocab)
    if materialized:
        logits = jax.lax.optimization_barrier(logits)
    return Columns(vocab, x.temperatures, logits | listed)


def local_stats(spec: Spec, x: Operands, c: Columns) -> RowStats:
    """The maxima of the columns at hand, and the sums relative to them."""
    needed = _needed(spec, x)
    sources = dict(zip(("student", "teacher"), x.sources, strict=False))
    maxima = {}
    for name in dict.fromkeys(row.logits for s in needed for row in s.rows):
        logits = c.logits[name]
        is_own = name in sources
        maxima[name] = sources[name].max(logits) if is_own else jnp.max(logits, axis=-1)
    maxima = jax.lax.stop_gradient(maxima)  # no result depends on them
    c = c._replace(rows=RowStats(maxima, {}))
    return RowStats(maxima, {s: s.of(c) for s in needed})


def slope_sums(x: Operands, c: Columns) -> tuple[Any, ...]:
    return tuple(term.slope_sums(c) for term in x.terms)


def combined(x: Operands, of_all: Columns, slopes: tuple[Any, ...]) -> tuple[Any, ...]:
    """What each term makes of all columns at once, before the last phase."""
    pairs = zip(x.terms, slopes, strict=True)
    return tuple(term.combined(of_all, sums) for term, sums in pairs)


class Sums(NamedTuple):
    """Sums over columns, of each term and of the metrics."""

    terms: tuple[Any, ...]
    metrics: tuple[ColumnSums, ...]

    def plus(self, other: "Sums") -> "Sums":
        """Of two sets of columns together."""
        add = lambda x, y: x.of_both(y) if isinstance(x, Top) else x + y
        return jax.tree.map(add, self, other, is_leaf=is_top)


def is_top(x: Any) -> bool:
    return isinstance(x, Top)


class Finished(NamedTuple):
    sums: Sums
    gradients: Operands  # of sources and temperatures; see `Result`
    counted: jax.Array  # see `Result`


def finish(
    spec: Spec,
    x: Operands,
    c: Columns,
    combined: tuple[Any, ...],
    counted: jax.Array,
    *,
    recompute: bool,
) -> Finished:
    """The terms of the loss, and its gradients.

    `counted`, `[B]`, are the tokens that count in the gradients of shared arrays;
    `recompute` is that of a `Plan`.
    """
    pairs = list(zip(x.terms, combined, strict=True))
    parts = [term.finish(c, of_term, recompute=recompute) for term, of_term in pairs]
    gradients = Gradients({}, {})
    for part in parts:
        gradients = gradients.plus(part.gradients)
    of_teacher = [y for term, y in pairs if isinstance(term, Comparison)]
    metrics = [metric.sums(c, *of_teacher) for metric in _metrics(spec, x)]
    sums = Sums(tuple(part.sums for part in parts), tuple(metrics))
    # 0 · NaN is NaN in the product for `d kernel`: a token without weight does not
    # count if its hidden states may not be finite.
    is_finite = jnp.isfinite(sum(part.lse for part in parts))
    counted &= x.is_weighted | is_finite
    return Finished(sums, x.with_gradients(gradients, c.logits), counted)


def complete(
    spec: Spec, x: Operands, of_all: Columns, combined: tuple[Any, ...], sums: Sums
) -> tuple[tuple[jax.Array, ...], tuple[MetricValues, ...]]:
    """The terms and the metrics, from sums over all columns."""
    each = zip(x.terms, combined, sums.terms, strict=True)
    metrics = zip(_metrics(spec, x), sums.metrics, strict=True)
    return (
        tuple(term.value(of_all, of_term, total) for term, of_term, total in each),
        tuple(metric.value(of_all, total) for metric, total in metrics),
    )
