"""A tile: some tokens, with all columns of the vocabulary or of this device."""

import functools as ft
from collections.abc import Sequence
from typing import Any

import jax

from ._columns import (
    Columns,
    complete,
    finish,
    row_maxima,
    row_sums,
    sums_of_slopes,
    TermSums,
    Tops,
)
from ._comparison import OfEach
from ._list_statistics import find_number_among_top
from ._operands import LossTerms, Operands, Result, Spec, Statistics
from ._row_sums import Maxima, RowStats, RowSums
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
    x = masked(x)
    columns = Columns.of(spec, x, vocab)
    if x.rows is not None and x.weights.entropy is not None:
        columns = columns.made_first()  # the gradient of an entropy is long
    maxima, sums = x.rows or _row_stats(columns)
    of_slopes = slopes_over_devices(vocab, sums_of_slopes(columns, maxima, sums))
    done = finish(columns, maxima, sums, of_slopes, counted, recompute=recompute)
    number_among_top = None
    if columns.entries is not None:
        assert sums.entries is not None
        number_among_top = find_number_among_top(
            sums.entries, columns.entries[0], columns.student, vocab
        )
    terms, statistics = completed(
        spec, x, maxima, sums, done.sums, done.tops, number_among_top
    )
    gradients = done.gradients._replace(weights=terms)
    rows = RowStats(maxima, sums) if x.rows is None and not spec.reduce else None
    return Result(terms, statistics, gradients, done.counted, rows)


def _row_stats(c: Columns) -> RowStats:
    maxima = over_devices(c.vocab.pmax, row_maxima(c))
    return RowStats(maxima, over_devices(c.vocab.psum, row_sums(c, maxima)))


def completed(
    spec: Spec,
    x: Operands,
    maxima: Maxima,
    sums: RowSums,
    terms: TermSums,
    tops: Tops | None,
    number_among_top: jax.Array | None,
) -> tuple[LossTerms, Statistics | None]:
    """`complete`, from the last phase's sums over the columns of this device."""
    terms = over_devices(spec.vocab.psum, terms)
    tops = jax.tree.map(spec.vocab.pmin, tops)
    return complete(spec, x, maxima, sums, terms, tops, number_among_top)


def over_devices(reduce: Any, tree: Any) -> Any:
    """The tree of sums or maxima over the devices, `[B]` each, in one exchange."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(reduce(*leaves)) if leaves else tree


def slopes_over_devices(vocab: Vocabulary, sums: OfEach) -> OfEach:
    # Each model has an exchange of its own: most often only one is needed.
    return OfEach(*(over_devices(vocab.psum, of_model) for of_model in sums))


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
