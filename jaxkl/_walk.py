"""The walk over tokens, a tile at a time."""

import functools as ft

import jax
import jax.numpy as jnp

from ._compat import abstract_eval, zeros
from ._operands import Operands, Result, Spec
from ._plan import Plan
from ._tile import run_tile
from ._trees import cast, keep, merge, split


def walk(spec: Spec, perturbed: Operands, plan: Plan, operands: Operands) -> Result:
    """What the tiles make of all tokens.

    `perturbed` has the dtype of each gradient that is asked for, and False for the
    others, which are None in the result.
    """
    if plan.tile is None:
        counted = jnp.full_like(operands.weights.divergence, True, bool)
        result = run_tile(spec, operands, counted, recompute=plan.recompute)
        return result._replace(gradients=cast(perturbed, result.gradients))

    tiles = _ORDERS[plan.order](operands.tokens, plan.tile)
    is_shared = operands.shared_flags()  # before `with_max` adds an array
    operands = operands.map_sources(lambda source: source.with_max(spec.vocab))
    operands = operands.map_tokens(tiles.arrange)

    def run(i):
        """The rows of tile `i`, and its part of the gradients of shared arrays."""
        of_tile = operands.map_tokens(ft.partial(tiles.read, i))
        result = run_tile(spec, of_tile, tiles.counted(i), recompute=plan.recompute)
        gradients = keep(perturbed, result.gradients)
        rows, shared = split(is_shared, gradients)
        return result._replace(gradients=cast(perturbed, rows)), shared

    def step(carry, i):
        rows, totals = carry
        rows_of_tile, shared = run(i)
        rows = jax.tree.map(ft.partial(tiles.write, i), rows, rows_of_tile)
        return (rows, jax.tree.map(jnp.add, totals, shared)), None

    rows, totals = abstract_eval(run, 0)
    rows = jax.tree.map(lambda x: zeros(x, tiles.shape + x.shape[1:]), rows)
    totals = jax.tree.map(lambda x: zeros(x, x.shape), totals)
    (rows, totals), _ = jax.lax.scan(step, (rows, totals), jnp.arange(tiles.count))
    result = jax.tree.map(tiles.restore, rows)
    gradients = merge(result.gradients, cast(perturbed, totals))
    return result._replace(gradients=gradients)


class _Blocks:
    """Tiles of consecutive tokens, which are slices without a copy.

    The last tile starts early enough to be full. It writes some tokens again, with the
    same values, and does not count them again.
    """

    def __init__(self, tokens: int, tile: int):
        self.tokens, self.tile = tokens, tile
        self.count = -(-tokens // tile)
        self.shape = (tokens,)

    def _start(self, i):
        return jnp.minimum(i * self.tile, self.tokens - self.tile)

    def arrange(self, x: jax.Array) -> jax.Array:
        """The array as `read` takes it, and `write` fills one of `shape`."""
        return x

    def read(self, i, x: jax.Array) -> jax.Array:
        """The rows of tile `i`."""
        return jax.lax.dynamic_slice_in_dim(x, self._start(i), self.tile)

    def write(self, i, x: jax.Array, rows: jax.Array) -> jax.Array:
        """`x` with the rows of tile `i` in it."""
        return jax.lax.dynamic_update_slice_in_dim(x, rows, self._start(i), 0)

    def counted(self, i) -> jax.Array:
        """Which tokens of tile `i` are in no tile before it and are no padding."""
        return self._start(i) + jnp.arange(self.tile) >= i * self.tile

    def restore(self, x: jax.Array) -> jax.Array:
        """An array that `write` has filled, in the order of the tokens."""
        return x


class _Strided:
    """Tiles of every `count`-th token.

    A token axis that the partitioner has sharded stays sharded inside each tile; a
    block would be gathered. The tokens are padded at the end.
    """

    def __init__(self, tokens: int, tile: int):
        self.tokens, self.tile = tokens, tile
        self.count = -(-tokens // tile)
        self.shape = (tile, self.count)

    def arrange(self, x: jax.Array) -> jax.Array:
        rest = ((0, 0),) * (x.ndim - 1)
        x = jnp.pad(x, ((0, self.tile * self.count - self.tokens), *rest))
        return x.reshape(self.shape + x.shape[1:])

    def read(self, i, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)

    def write(self, i, x: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(x, rows, i, 1)

    def counted(self, i) -> jax.Array:
        return jnp.arange(self.tile) * self.count + i < self.tokens

    def restore(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])[: self.tokens]


_ORDERS = {"blocks": _Blocks, "strided": _Strided}
