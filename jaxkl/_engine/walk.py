"""The walk over tokens, a tile at a time."""

import functools as ft
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._util.compat import abstract_eval, zeros
from .._util.trees import cast, combine, partition, select
from .operands import Operands, Result, Spec
from .orders import ORDERS, Tiles
from .plan import Plan
from .tile import masked, pull_back, run_tile


def walk(spec: Spec, asked: Operands, plan: Plan, operands: Operands) -> Result:
    """What the tiles make of all tokens.

    `asked` has the dtype of each gradient that is asked for, and None in the place of
    the others, which are None in the result.
    """
    sums, rows = partition(operands.shared_flags(), asked)
    # The sources of which a gradient that is asked for is a sum over tokens.
    waiting = [i for i, x in enumerate(sums.sources) if jax.tree.leaves(x)]
    leaves, structure = jax.tree.flatten(asked)
    flags = structure, tuple(leaves)
    every = range(len(operands.sources))
    overwrites_overlap = all(x.pulls_back_uncounted for x in operands.sources)
    order = ft.partial(ORDERS[plan.order], overwrites_overlap=overwrites_overlap)

    def finished(result, gradients):
        """The rows of a result, and its part of the gradients of shared arrays."""
        return result._replace(gradients=cast(rows, gradients)), select(sums, gradients)

    def of_tile(x, counted):
        x = _linearized(asked, every, x)
        result = run_tile(spec, flags, plan, x, counted)
        if plan.columns is not None:
            return finished(result, result.gradients)
        return finished(result, pull_back(x, result, every))

    def of_part(x, counted):
        assert plan.tile is not None
        tiles = order(counted.shape[0], plan.tile)
        return finished(
            *_run_part(spec, asked, flags, plan, waiting, tiles, x, counted)
        )

    all_counted = jnp.full_like(operands.per_token, True, bool)
    if plan.tile is None:
        whole = operands.map_sources(lambda source: source.materialized())
        result, totals = of_tile(whole, all_counted)
    else:
        f, size = of_tile, plan.tile
        if plan.part is not None and waiting:
            f, size = of_part, plan.part
        tiles = order(operands.tokens, size)
        operands = operands.map_sources(lambda source: source.with_max(spec.vocab))
        if tiles.count == 1:
            result, totals = f(operands, all_counted)
        else:
            without_outputs = lambda *x: (*f(*x), ())
            result, totals, _ = _scan(tiles, operands, without_outputs)
    gradients = combine(result.gradients, cast(sums, totals))
    return result._replace(gradients=gradients)


def _linearized(asked: Operands, sources: Iterable[int], x: Operands) -> Operands:
    """The operands, of which these sources are about to be pulled back."""
    x = masked(x)._replace(mask=None)
    # Terms are the gradients of weights.
    with_terms = any(dtype is not None for dtype in asked.weights)
    ready = list(x.sources)
    for i in sources:
        ready[i] = ready[i].linearized(asked.sources[i], with_terms=with_terms)
    return x.with_sources(ready)


def _run_part(
    spec: Spec,
    asked: Operands,
    flags: Any,
    plan: Plan,
    waiting: Sequence[int],
    tiles: Tiles,
    x: Operands,
    counted: jax.Array,
) -> tuple[Result, Operands]:
    """The result of a part of the tokens, and its gradients.

    The sources in `waiting` are not pulled back in each tile. The tiles write the
    `d_outputs` of these sources to one array, of which a single `vjp` makes the
    gradients of the part: one matrix product over many tokens, and not a sum of many
    products, which each tile would read and write.
    """
    others = [i for i in range(len(x.sources)) if i not in waiting]
    # What is asked for in each tile.
    now = list(asked.sources)
    for i in waiting:
        now[i] = jax.tree.map(lambda _: None, now[i])

    def of_tile(x, counted):
        x = _linearized(asked, others, x)
        # A tile that takes a token again writes its row again: that is harmless here.
        counted = jnp.full_like(counted, True)
        result = run_tile(spec, flags, plan, x, counted)
        gradients = pull_back(x, result, others)
        sources = list(gradients.sources)
        outputs = [
            sources[i].astype(x.sources[i].output_dtype(spec.dtype)) for i in waiting
        ]
        if plan.barrier_outputs:
            # Otherwise XLA fuses `outputs` with the update of the array, and not with
            # the sum of the terms, which reads all logits again.
            outputs = jax.lax.optimization_barrier(outputs)
        for i in waiting:
            sources[i] = now[i]
        gradients = cast(asked.with_sources(now), gradients.with_sources(sources))
        return result._replace(gradients=gradients), (), outputs

    result, _, outputs = _scan(tiles, x, of_tile)
    # The products take the tokens in the order of the tiles.
    unfinished = list(x.sources)
    for i, output in zip(waiting, outputs, strict=True):
        unfinished[i] = output
    counted = tiles.stacked(result.counted & counted)
    stacked = Result((), (), x.with_sources(unfinished), counted)
    x = _linearized(asked, waiting, x.map_tokens(tiles.stacked))
    pulled = pull_back(x, stacked, waiting).sources
    sources = list(result.gradients.sources)
    for i in waiting:
        sources[i] = pulled[i].map_tokens(tiles.unstacked)
    return result, result.gradients.with_sources(sources)


def _scan(
    tiles: Tiles,
    x: Operands,
    f: Callable[[Operands, jax.Array], tuple[Any, Any, Any]],
) -> tuple[Any, Any, Any]:
    """The rows, totals and outputs of all tiles.

    `f` makes them from a tile's operands and from which of its tokens are counted. Rows
    are in the order of the tokens, totals are summed, and outputs are `stacked`.
    """
    x = x.padded(tiles.arrange)

    def run(i):
        return f(x.map_tokens(ft.partial(tiles.read, i)), tiles.counted(i))

    def step(carry, i):
        rows, totals, outputs = carry
        new_rows, added, new_outputs = run(i)
        rows = jax.tree.map(ft.partial(tiles.write, i), rows, new_rows)
        totals = jax.tree.map(jnp.add, totals, added)
        outputs = jax.tree.map(ft.partial(tiles.stack, i), outputs, new_outputs)
        return (rows, totals, outputs), None

    def start(x, shape):
        return zeros(x, shape + x.shape[1:])

    rows, totals, outputs = abstract_eval(run, 0)
    rows = jax.tree.map(lambda x: start(x, tiles.shape), rows)
    totals = jax.tree.map(lambda x: zeros(x, x.shape), totals)
    outputs = jax.tree.map(lambda x: start(x, tiles.stacked_shape), outputs)
    carry = rows, totals, outputs
    (rows, totals, outputs), _ = jax.lax.scan(step, carry, jnp.arange(tiles.count))
    return jax.tree.map(tiles.restore, rows), totals, outputs
