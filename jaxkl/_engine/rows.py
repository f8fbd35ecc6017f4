"""A function of rows of logits, of any source: a tile of tokens at a time, on meshes
too, so that the logits of all tokens are never in memory."""

import abc
import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh, PartitionSpec as P

from .._math.vocabulary import Vocabulary
from .._source.base import Source
from .._util.compat import abstract_eval, many_devices, varying_axes, zeros
from .._util.trees import partition
from .evaluate import reshard
from .layout import Layout
from .orders import ORDERS
from .plan import tile_size


class Rows(NamedTuple):
    """Tokens on one axis."""

    source: Source
    temperature: jax.Array | None  # [B]; None: 1
    words: jax.Array | None = None  # the data of a random key for each token, [B, 2]

    @property
    def tokens(self) -> int:
        return self.source.batch_shape[0]

    def map_tokens(self, f: Callable[[jax.Array], jax.Array]) -> Self:
        return type(self)(self.source.map_tokens(f), *jax.tree.map(f, self[1:]))

    def with_key(self, key: jax.Array, axis_name: str | None) -> Self:
        """With a key for each token, from `key` and from the token's number among those
        of all devices.

        It is of a kind of which `vmap` draws what it does for one key alone. Inside
        `shard_map`, the axes over which tokens vary are taken to spread them.
        """
        words = jax.random.bits(key, (2,), jnp.uint32)
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        _, own = partition(self.source.shared_flags(), self.source)
        axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(own)))
        device = 0
        for axis in get_abstract_mesh().axis_names:
            if axis in axes and axis != axis_name:
                device = device * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
        numbers = device * self.tokens + jnp.arange(self.tokens, dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        return self._replace(words=jax.random.key_data(keys))


@dataclasses.dataclass(frozen=True)
class RowFunction(abc.ABC):
    """A function of the logits of some tokens, in `dtype`."""

    dtype: jnp.dtype

    @abc.abstractmethod
    def __call__(self, logits: jax.Array, rows: Rows, vocab: Vocabulary) -> Any:
        """Arrays with a row for each token, the same on all devices of the vocabulary,
        of the logits that are at hand, `[B, vocab.width]`, and the rows of others."""

    @abc.abstractmethod
    def tile(self, vocab: Vocabulary) -> int:
        """How many tokens to take at a time, at most, or nearly so."""


@ft.partial(jax.jit, static_argnums=range(4))
def map_rows(
    f: RowFunction, vocab: Vocabulary, layout: Layout | None, tile: int, rows: Rows
) -> Any:
    """`f` of all tokens. If there is a `layout`, the arrays are global."""
    if layout is None:
        return _over_tiles(f, vocab, tile, rows)
    tokens = rows.tokens
    if layout.vocab_axis is not None:
        width = rows.source.width
        assert width is not None
        width = -(-width // layout.vocab_shards)
        padded = rows.source.pad_columns(width * layout.vocab_shards)
        rows = rows._replace(source=padded)
        vocab = Vocabulary(vocab.size, width, layout.vocab_axis, layout.vocab_shards)
    # Nothing of size 0 can be spread: where there is no token, each device gets one.
    more = -tokens % layout.token_shards if tokens else layout.token_shards
    if more:
        rest = lambda x: ((0, 0),) * (x.ndim - 1)
        pad = lambda x: jnp.pad(x, ((0, more), *rest(x)), constant_values=1)
        rows = rows.map_tokens(pad)
    by_token = P(layout.token_axes or None)
    specs = Rows(
        rows.source.partition_specs(layout.token_axes, layout.vocab_axis),
        *jax.tree.map(lambda _: by_token, rows[1:]),
    )
    outputs = jax.shard_map(
        ft.partial(_over_tiles, f, vocab, tile),
        mesh=layout.mesh,
        in_specs=(specs,),
        out_specs=by_token,
        check_vma=True,
    )(jax.tree.map(ft.partial(reshard, layout), rows, specs))
    if not more:
        return outputs
    return jax.tree.map(lambda x: reshard(layout, x, P())[:tokens], outputs)


def _over_tiles(f: RowFunction, vocab: Vocabulary, tile: int, rows: Rows) -> Any:
    def of_tile(rows):
        return f(rows.source.logits(f.dtype, vocab), rows, vocab)

    tokens = rows.tokens
    # A symbolic number of tokens, in `jax.export`, has no number of tiles.
    if not isinstance(tokens, int) or tokens <= tile:
        return of_tile(rows)
    # Strides keep tokens that XLA's partitioner has spread where they are. They would
    # copy logits.
    is_local = any(map(varying_axes, jax.tree.leaves(rows)))
    is_local |= rows.source.kind == "logits" and not many_devices()
    tiles = ORDERS["blocks" if is_local else "strided"](tokens, tile_size(tokens, tile))
    rows = rows.map_tokens(ft.partial(tiles.arrange, padding=1))

    def run(i):
        return of_tile(rows.map_tokens(ft.partial(tiles.read, i)))

    def step(outputs, i):
        return jax.tree.map(ft.partial(tiles.write, i), outputs, run(i)), None

    start = lambda x: zeros(x, tiles.shape + x.shape[1:])
    start = jax.tree.map(start, abstract_eval(run, 0))
    outputs, _ = jax.lax.scan(step, start, jnp.arange(tiles.count))
    return jax.tree.map(tiles.restore, outputs)
