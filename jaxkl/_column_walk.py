"""The walk over blocks of columns, with all tokens at once: the lean plan.

Three passes make the logits of a block each time. The first has running maxima and
sums, the last the gradients; the one between is of the divergences whose gradient needs
sums of slopes. The gradient of a kernel is written a block at a time, in its own dtype:
nothing is held that is as large as a head or as all logits.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._columns import Columns, finish, row_maxima, row_sums, sums_of_slopes
from ._compat import abstract_eval, zeros
from ._operands import Operands, Result, Spec
from ._plan import Plan
from ._row_sums import Maxima, moved
from ._tile import completed, masked, over_devices, pull_back, slopes_over_devices
from ._trees import cast, keep, merge, split


def walk_columns(
    spec: Spec, perturbed: Operands, plan: Plan, operands: Operands
) -> Result:
    """What the blocks make of all tokens; see `walk`."""
    assert plan.columns is not None
    vocab = spec.vocab
    x = masked(operands)._replace(mask=None)
    everything = jnp.full_like(x.weights.divergence, True, bool)
    over_blocks = ft.partial(_over_blocks, vocab.width, min(plan.columns, vocab.width))
    less, same = spec.temperatures(x), None

    def columns(start, width):
        of_block = x.map_sources(lambda source: source.take_columns(start, width))
        return Columns.of(spec, of_block, vocab.block(start, width))

    def with_sums(carry, start, width):
        maxima, sums = carry
        block = columns(start, width)
        new = jax.tree.map(jnp.maximum, maxima, row_maxima(block))
        sums = moved(sums, maxima, new, x, spec)
        return new, jax.tree.map(jnp.add, sums, row_sums(block, new))
