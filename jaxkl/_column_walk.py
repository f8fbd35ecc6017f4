"""The walk over blocks of columns, with all tokens at once: the lean plan.

Each pass makes the logits of a block. The first has running maxima and sums, the last
the gradients; the one between is for divergences whose gradient needs sums of slopes.
The gradient of a kernel is written a block at a time, in its own dtype. Nothing is held
that is as large as all logits, or as a kernel in float32.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._columns import Columns, finish, row_maxima, row_sums, sums_of_slopes
from ._compat import abstract_eval, zeros
from ._list_statistics import count_larger, number_among_top
from ._operands import Operands, Result, Spec
from ._plan import Plan
from ._row_sums import moved, RowStats
from ._tile import completed, masked, over_devices, pull_back, slopes_over_devices
from ._trees import cast, keep, merge, split


def walk_columns(
    spec: Spec, perturbed: Operands, plan: Plan, operands: Operands
) -> Result:
    """What the blocks make of all tokens; see `walk`."""
    assert plan.columns is not None
    vocab, width = spec.vocab, min(plan.columns, spec.vocab.width)
    over_blocks = ft.partial(_over_blocks, vocab.width, width)
    x = masked(operands)._replace(mask=None)
    temperatures = x.student_temperature, spec.teacher_temperature(x)

    def columns(start, width):
        of_block = x.map_sources(lambda source: source.take_columns(start, width))
        return Columns.of(spec, of_block, vocab.block(start, width))

    def add_sums(carry, start, width):
        maxima, sums = carry
        block = columns(start, width)
        new = jax.tree.map(jnp.maximum, maxima, row_maxima(block))
        sums = moved(sums, maxima, new, *temperatures)
        return RowStats(new, jax.tree.map(jnp.add, sums, row_sums(block, new)))

    def first_sums():
        block = columns(0, width)
        maxima = row_maxima(block)
        return RowStats(maxima, row_sums(block, maxima))

    def row_stats():
        maxima, sums = _zeros(abstract_eval(first_sums))
        maxima = jax.tree.map(lambda x: x - jnp.inf, maxima)
        here, sums = over_blocks(add_sums, RowStats(maxima, sums))
        maxima = over_devices(vocab.pmax, here)
        sums = moved(sums, here, maxima, *temperatures)
        return RowStats(maxima, over_devices(vocab.psum, sums))

    maxima, sums = rows = x.rows or row_stats()

    def slopes(start, width):
        return sums_of_slopes(columns(start, width), maxima, sums)

    def add_slopes(of_slopes, start, width):
        return jax.tree.map(jnp.add, of_slopes, slopes(start, width))

    of_slopes = over_blocks(add_slopes, _zeros(abstract_eval(lambda: slopes(0, width))))
    of_slopes = slopes_over_devices(vocab, of_slopes)

    everything = jnp.full_like(x.weights.per_token, True, bool)
    asked = _with_gradients(perturbed)
    by_column = _with_gradients(operands.by_column_flags())

    def finished(start, width):
        """The last phase; the gradients that are sums over blocks, and the others."""
        block = columns(start, width).made_first()
        done = finish(block, maxima, sums, of_slopes, everything, recompute=False)
        result = Result(None, None, done.gradients, done.counted)
        pulled = pull_back(block.x, result, ("student", "teacher"))
        summed, written = split(by_column, keep(asked, _with_gradients(pulled)))
        larger = None
        if block.entries is not None:
            assert sums.entries is not None
            listed, _ = block.entries
            larger = count_larger(sums.entries, listed, block.student, block.vocab)
        return (done.sums, larger, summed), done.tops, cast(asked, written)

    def add_finished(carry, start, width):
        totals, tops, arrays = carry
        added, new_tops, written = finished(start, width)
        write = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, -1)
        totals = jax.tree.map(jnp.add, totals, added)
        tops = jax.tree.map(jnp.minimum, tops, new_tops)
        return totals, tops, jax.tree.map(write, arrays, written)

    totals, tops, arrays = abstract_eval(lambda: finished(0, width))
    _, whole = split(by_column, keep(asked, _with_gradients(operands)))
    carry = (
        _zeros(totals),
        jax.tree.map(lambda x: zeros(x, x.shape) + vocab.size, tops),
        jax.tree.map(lambda x, full: zeros(x, full.shape), arrays, whole),
    )
    (terms, larger, summed), tops, arrays = over_blocks(add_finished, carry)
    number = None
    if larger is not None:
        assert sums.entries is not None
        number = number_among_top(sums.entries, *vocab.psum(larger))
    terms, statistics = completed(spec, x, maxima, sums, terms, tops, number)
    gradients = operands._replace(weights=terms, **merge(summed, arrays))
    new_rows = rows if x.rows is None and not spec.reduce else None
    return Result(terms, statistics, cast(perturbed, gradients), everything, new_rows)


def _with_gradients(x: Operands) -> dict[str, Any]:
    """What columns contribute to: the gradient of a weight is a term of the loss."""
    names = "student", "teacher", "student_temperature", "teacher_temperature"
    return {name: getattr(x, name) for name in names}


def _over_blocks(
    columns: int, width: int, step: Callable[[Any, Any, int], Any], carry: Any
) -> Any:
    """The carry after `step(carry, start, width)` of each block, the last a rest."""
    # With second derivatives, logits are made again rather than kept.
    step = jax.checkpoint(step, static_argnums=2)
    count, rest = divmod(columns, width)

    def body(carry, i):
        return step(carry, i * width, width), None

    carry, _ = jax.lax.scan(body, carry, jnp.arange(count))
    return step(carry, count * width, rest) if rest else carry


def _zeros(types: Any) -> Any:
    return jax.tree.map(lambda x: zeros(x, x.shape), types)
