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
from .._util.trees import cast, combine, partition, select
from .comparison import SlopeSums
from .metrics import Top
from .operands import Operands, Result, Spec
from .phases import (
    columns_of,
    combined,
    complete,
    finish,
    is_top,
    local_stats,
    slope_sums,
    Sums,
)
from .plan import Plan
from .row_stats import Columns, merged, rescaled, RowStats


@ft.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def run_tile(
    spec: Spec, asked: Any, plan: Plan, x: Operands, counted: jax.Array
) -> Result:
    """All there is to know of a tile: XLA drops what the caller does not use.

    `counted`, `[B]`, are the tokens that count in the gradients of shared arrays, and
    `asked` is that of `walk`, as its structure and leaves. The sources are pulled back
    here if the columns are in blocks, and else by the caller: see `Result`.
    """
    x = masked(x)
    blocks = _Blocks.of(spec, x, plan.columns)
    rows = x.rows
    if rows is None:
        merge_rows = ft.partial(merged, temperatures=x.temperatures)
        of_block = ft.partial(local_stats, spec, x)
        rows = blocks.fold(of_block, merge_rows, _no_rows)
        rows = _rows_over_devices(spec.vocab, x, rows)
    add = ft.partial(jax.tree.map, jnp.add)
    slopes = blocks.fold(lambda c: slope_sums(x, c._replace(rows=rows)), add, _zeros)
    slopes = _slopes_over_devices(spec.vocab, slopes)
    if blocks.whole is None:
        of_all = Columns(spec.vocab, x.temperatures, rows=rows)
        of_terms = combined(x, of_all, slopes)
        of_blocks = asked[0].unflatten(asked[1])
        sums, gradients = _finished(blocks, of_blocks, rows, of_terms, counted)
    else:
        of_all = blocks.whole._replace(rows=rows)
        of_terms = combined(x, of_all, slopes)
        done = finish(spec, x, of_all, of_terms, counted, recompute=plan.recompute)
        sums, gradients, counted = done
    sums = _sums_over_devices(spec.vocab, sums)
    terms, metrics = complete(spec, x, of_all, of_terms, sums)
    kept = rows if x.rows is None and not spec.reduce else None
    return Result(terms, metrics, gradients.with_weights(terms), counted, kept)


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
        is_long = x.rows is not None and any(term.has_long_gradient for term in x.terms)
        whole = columns_of(spec, x, spec.vocab, materialized=is_long)
        return cls(spec, x, spec.vocab.width, whole)

    def at(
        self, start: jax.Array | int, width: int, *, materialized: bool = False
    ) -> tuple[Operands, Columns]:
        x = self.x.map_sources(lambda source: source.take_columns(start, width))
        vocab = self.spec.vocab.block(start, width)
        return x, columns_of(self.spec, x, vocab, materialized=materialized)

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
        merge: Callable[[Any, Any], Any],
        empty: Callable[[Any], Any],
    ) -> Any:
        """`f` of all blocks, merged; `empty` makes that of none from its types."""
        if self.whole is not None:
            return f(self.whole)
        of_block = lambda start, width: f(self.at(start, width)[1])
        start = empty(abstract_eval(lambda: of_block(0, self.width)))

        def step(carry, start, width):
            return merge(carry, of_block(start, width))

        return self.scan(step, start)


def _finished(
    blocks: _Blocks,
    asked: Operands,
    rows: RowStats,
    of_terms: tuple[Any, ...],
    counted: jax.Array,
) -> tuple[Sums, Operands]:
    """The last pass, and its gradients of what columns contribute to: not of weights,
    whose gradients are terms of the loss."""
    spec, x = blocks.spec, blocks.x
    asked = asked.with_weights([None] * len(x.terms))
    by_column, added = partition(x.by_column_flags(), asked)

    def finished(start, width):
        """What is added up, and the gradients of the block's own columns."""
        x, c = blocks.at(start, width, materialized=True)
        c = c._replace(rows=rows)
        done = finish(spec, x, c, of_terms, counted, recompute=False)
        result = Result((), (), done.gradients, done.counted)
        pulled = pull_back(x, result, range(len(x.sources)))
        return (done.sums, select(added, pulled)), cast(by_column, pulled)

    def step(carry, start, width):
        (sums, total), arrays = carry
        (of_block, summed), written = finished(start, width)
        write = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, -1)
        added = sums.plus(of_block), jax.tree.map(jnp.add, total, summed)
        return added, jax.tree.map(write, arrays, written)

    (sums, summed), arrays = abstract_eval(lambda: finished(0, blocks.width))
    start = jax.tree.map(_nothing, sums, is_leaf=is_top)
    whole = select(by_column, x)
    arrays = jax.tree.map(lambda x, full: zeros(x, full.shape), arrays, whole)
    (sums, summed), arrays = blocks.scan(step, ((start, _zeros(summed)), arrays))
    return sums, combine(summed, arrays)


def _nothing(type_of: Any) -> Any:
    """What adds nothing to a sum, or a `Top`, of that type."""
    return Top.of_none(type_of) if is_top(type_of) else _zeros(type_of)


def _zeros(types: Any) -> Any:
    return jax.tree.map(lambda x: zeros(x, x.shape), types)


def _no_rows(types: RowStats) -> RowStats:
    maxima, sums = _zeros(types)
    return RowStats(jax.tree.map(lambda x: x - jnp.inf, maxima), sums)


def _rows_over_devices(vocab: Vocabulary, x: Operands, here: RowStats) -> RowStats:
    """The statistics of the columns of all devices."""
    if vocab.axis_name is None:
        return here
    maxima = _exchanged(vocab.pmax, here.maxima)
    sums = rescaled(here, maxima, x.temperatures).sums
    return RowStats(maxima, _exchanged(vocab.psum, sums))


def _slopes_over_devices(vocab: Vocabulary, sums: Any) -> Any:
    # Each model has an exchange of its own: most often only one is needed.
    exchange = ft.partial(_exchanged, vocab.psum)
    return jax.tree.map(exchange, sums, is_leaf=lambda x: isinstance(x, SlopeSums))


def _sums_over_devices(vocab: Vocabulary, sums: Sums) -> Sums:
    if vocab.axis_name is None:
        return sums
    leaves, structure = jax.tree.flatten(sums, is_leaf=is_top)
    added = iter(vocab.psum(*(x for x in leaves if not is_top(x))))
    largest = iter(vocab.pmax(*(x.logit for x in leaves if is_top(x))))
    of_all = lambda x: x.of_devices(next(largest), vocab) if is_top(x) else next(added)
    return structure.unflatten(map(of_all, leaves))


def _exchanged(reduce: Any, tree: Any) -> Any:
    """The tree of sums or maxima over the devices, in one exchange."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(reduce(*leaves))


def pull_back(x: Operands, result: Result, sources: Sequence[int]) -> Operands:
    """The gradients of a result, with those of the arrays of these sources."""
    x, pulled = masked(x), list(result.gradients.sources)
    for i in sources:
        pulled[i] = x.sources[i].vjp(pulled[i], result.counted)
    return result.gradients.with_sources(pulled)


def masked(x: Operands) -> Operands:
    """The operands, with zeros in the rows of tokens that do not count."""
    if x.mask is None:
        return x
    return x.map_sources(lambda source: source.mask_tokens(x.mask))
