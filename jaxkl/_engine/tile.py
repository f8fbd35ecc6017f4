"""A tile: some tokens, with all columns of the vocabulary or of this device.

The columns are taken all at once, or a block of a few at a time. With blocks, each pass
makes the logits of a block again: the first has running maxima and sums, the last the
gradients, and the one between is for divergences whose gradient needs sums of slopes.
The gradient of a kernel is written a block at a time, in its own dtype. Nothing is held
that is as large as all logits, or as a kernel in float32.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._math.vocabulary import Vocabulary
from .._util.compat import abstract_eval, zeros
from .._util.trees import cast, keep, merge, split
from .columns import (
    Columns,
    complete,
    finish,
    listed_of,
    row_stats,
    slope_sums,
    TermSums,
    Top,
)
from .comparison import PerModel
from .list_comparison import ListComparison
from .list_statistics import count_larger, find_number_among_top, number_among_top
from .operands import LossTerms, Operands, Result, Spec, Statistics
from .plan import Plan
from .row_sums import merged, rescaled, RowStats


@ft.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def run_tile(
    spec: Spec, asked: Any, plan: Plan, x: Operands, counted: jax.Array
) -> Result:
    """All there is to know of a tile: XLA drops what the caller does not use.

    `counted`, `[B]`, are the tokens that count in the gradients of shared arrays, and
    `asked` is the `gradient_dtypes` of `walk`, as its structure and leaves. The sources
    are pulled back here if the columns are in blocks, and else by the caller: see
    `Result`.
    """
    x = masked(x)
    blocks = _Blocks.of(spec, x, plan.columns)
    temperatures = x.student_temperature, spec.teacher_temperature(x)
    rows = x.rows
    if rows is None:
        merge_rows = lambda x, y: merged(x, y, *temperatures)
        rows = _over_devices(spec, x, blocks.fold(row_stats, merge_rows, _no_rows))
    add = ft.partial(jax.tree.map, jnp.add)
    slopes = blocks.fold(lambda c: slope_sums(c, rows), add, _zeros)
    slopes = _slopes_over_devices(spec.vocab, slopes)
    listed = listed_of(spec, x, rows)
    number = None
    if blocks.whole is None:
        gradient_dtypes = asked[0].unflatten(asked[1])
        done, gradients = _finished(
            blocks, gradient_dtypes, rows, slopes, listed, counted
        )
        gradients = x._replace(**gradients)
        if done.larger is not None:
            (larger,) = spec.vocab.psum(done.larger)
            number = number_among_top(x.teacher.columns, larger, spec.vocab)
    else:
        c = blocks.whole
        done = finish(c, rows, slopes, listed, counted, recompute=plan.recompute)
        gradients, counted = done.gradients, done.counted
        if spec.statistics and x.teacher.kind == "list":
            of_list = x.teacher.columns, rows.sums.listed
            number = find_number_among_top(*of_list, c.student, spec.vocab)
    terms, statistics = _completed(spec, x, rows, done.sums, done.tops, number)
    kept = rows if x.rows is None and not spec.reduce else None
    return Result(terms, statistics, gradients._replace(weights=terms), counted, kept)


class _Done(NamedTuple):
    """What the last pass adds up: sums of terms, and what is merged otherwise."""

    sums: TermSums
    tops: PerModel | None
    larger: jax.Array | None  # see `count_larger`
    gradients: Any  # those that are sums over columns

    def plus(self, other: "_Done") -> "_Done":
        is_top = lambda x: isinstance(x, Top)
        tops = jax.tree.map(Top.of_both, self.tops, other.tops, is_leaf=is_top)
        added = jax.tree.map(
            jnp.add, self._replace(tops=None), other._replace(tops=None)
        )
        return added._replace(tops=tops)


class _Blocks(NamedTuple):
    """The columns of `x`, `width` at a time."""

    spec: Spec
    x: Operands
    width: int
    whole: Columns | None  # all of them, if they are one block

    @classmethod
    def of(cls, spec: Spec, x: Operands, width: int | None) -> "_Blocks":
        if width is not None:
            return cls(spec, x, min(width, spec.vocab.width), None)
        c = Columns.of(spec, x, spec.vocab)
        if x.rows is not None and x.weights.entropy is not None:
            c = c.materialized()  # the gradient of an entropy is long
        return cls(spec, x, spec.vocab.width, c)

    def at(self, start: jax.Array | int, width: int) -> Columns:
        x = self.x.map_sources(lambda source: source.take_columns(start, width))
        return Columns.of(self.spec, x, self.spec.vocab.block(start, width))

    def scan(self, step: Callable[[Any, Any, int], Any], carry: Any) -> Any:
        """The carry after `step(carry, start, width)` of each block; the last is a
        rest."""
        # With second derivatives, logits are made again rather than kept.
        step = jax.checkpoint(step, static_argnums=2)
        count, rest = divmod(self.spec.vocab.width, self.width)

        def body(carry, i):
            return step(carry, i * self.width, self.width), None

        carry, _ = jax.lax.scan(body, carry, jnp.arange(count))
        return step(carry, count * self.width, rest) if rest else carry

    def fold(
        self,
        f: Callable[[Columns], Any],
        combine: Callable[[Any, Any], Any],
        empty: Callable[[Any], Any],
    ) -> Any:
        """`f` of all blocks combined; `empty` makes that of none from its types."""
        if self.whole is not None:
            return f(self.whole)
        start = empty(abstract_eval(lambda: f(self.at(0, self.width))))

        def step(carry, start, width):
            return combine(carry, f(self.at(start, width)))

        return self.scan(step, start)


def _finished(
    blocks: _Blocks,
    gradient_dtypes: Operands,
    rows: RowStats,
    slopes: PerModel,
    listed: ListComparison | None,
    counted: jax.Array,
) -> tuple[_Done, dict[str, Any]]:
    """The last pass, and its gradients of what columns contribute to."""
    spec, x = blocks.spec, blocks.x
    asked = _with_gradients(gradient_dtypes)
    by_column = _with_gradients(x.by_column_flags())

    def finished(start, width):
        """What is added up, and the gradients of the block's own columns."""
        c = blocks.at(start, width).materialized()
        done = finish(c, rows, slopes, listed, counted, recompute=False)
        result = Result(None, None, done.gradients, done.counted)
        pulled = pull_back(c.x, result, ("student", "teacher"))
        summed, written = split(by_column, keep(asked, _with_gradients(pulled)))
        larger = None
        if spec.statistics and x.teacher.kind == "list":
            columns, of_list = x.teacher.columns, rows.sums.listed
            larger = count_larger(columns, of_list, c.student, c.vocab)
        return _Done(done.sums, done.tops, larger, summed), cast(asked, written)

    def step(carry, start, width):
        total, arrays = carry
        done, written = finished(start, width)
        write = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, -1)
        return total.plus(done), jax.tree.map(write, arrays, written)

    types, arrays = abstract_eval(lambda: finished(0, blocks.width))
    total = _zeros(types)
    if total.tops is not None:
        nothing = lambda x: Top(x.logit - jnp.inf, x.column + spec.vocab.size)
        total = total._replace(tops=PerModel(*map(nothing, total.tops)))
    _, whole = split(by_column, keep(asked, _with_gradients(x)))
    arrays = jax.tree.map(lambda x, full: zeros(x, full.shape), arrays, whole)
    done, arrays = blocks.scan(step, (total, arrays))
    return done, merge(done.gradients, arrays)


def _with_gradients(x: Operands) -> dict[str, Any]:
    """What columns contribute to: the gradient of a weight is a term of the loss."""
    names = "student", "teacher", "student_temperature", "teacher_temperature"
    return {name: getattr(x, name) for name in names}


def _zeros(types: Any) -> Any:
    return jax.tree.map(lambda x: zeros(x, x.shape), types)


def _no_rows(types: RowStats) -> RowStats:
    maxima, sums = _zeros(types)
    return RowStats(jax.tree.map(lambda x: x - jnp.inf, maxima), sums)


def _over_devices(spec: Spec, x: Operands, here: RowStats) -> RowStats:
    """The statistics of the columns of all devices."""
    if spec.vocab.axis_name is None:
        return here
    maxima = _exchanged(spec.vocab.pmax, here.maxima)
    temperatures = x.student_temperature, spec.teacher_temperature(x)
    sums = rescaled(here, maxima, *temperatures)
    return RowStats(maxima, _exchanged(spec.vocab.psum, sums))


def _slopes_over_devices(vocab: Vocabulary, sums: PerModel) -> PerModel:
    # Each model has an exchange of its own: most often only one is needed.
    return PerModel(*(_exchanged(vocab.psum, of_model) for of_model in sums))


def _exchanged(reduce: Any, tree: Any) -> Any:
    """The tree of sums or maxima over the devices, in one exchange."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(reduce(*leaves)) if leaves else tree


def _completed(
    spec: Spec,
    x: Operands,
    rows: RowStats,
    terms: TermSums,
    tops: PerModel | None,
    number: jax.Array | None,
) -> tuple[LossTerms, Statistics | None]:
    """The terms and statistics, from the last pass over the columns of this device."""
    vocab = spec.vocab
    terms = _exchanged(vocab.psum, terms)
    if tops is not None and vocab.axis_name is not None:
        logits = vocab.pmax(*(top.logit for top in tops))
        first = lambda top, largest: Top(
            largest, vocab.pmin(jnp.where(top.logit == largest, top.column, vocab.size))
        )
        tops = PerModel(*map(first, tops, logits))
    return complete(spec, x, rows, terms, tops, number)


def pull_back(x: Operands, result: Result, sources: Sequence[str]) -> Operands:
    """The gradients of a result, with those of the named sources' arrays."""
    x, gradients = masked(x), result.gradients
    for name in sources:
        pulled = getattr(x, name).vjp(getattr(gradients, name), result.counted)
        gradients = gradients._replace(**{name: pulled})
    return gradients


def masked(x: Operands) -> Operands:
    """The operands, with zeros in the rows of tokens that do not count."""
    if x.mask is None:
        return x
    return x.map_sources(lambda source: source.mask_tokens(x.mask))
