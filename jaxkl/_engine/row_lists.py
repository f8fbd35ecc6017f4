"""Lists of columns, of rows of logits: the largest, or some drawn at random.

A function of rows, of any source, takes a tile of tokens at a time, on meshes too, so
that the logits of all tokens are never in memory. Where devices hold slices of the
vocabulary, they exchange the few candidates of each, and never logits.
"""

import abc
import dataclasses
import functools as ft
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh, PartitionSpec as P

from .._math.softmax import finite_max
from .._math.vocabulary import Vocabulary
from .._source.base import Source
from .._source.lists import without_listed
from .._util.compat import abstract_eval, many_devices, varying_axes, zeros
from .._util.trees import partition
from .orders import ORDERS
from .plan import tile_size
from .sharding import Layout, reshard


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


_TILE_BYTES = 64 * 2**20  # of an array that is as large as a tile
_MAX_TILE = 1024  # tokens
# Each tile of a head reads the whole kernel, which takes an accelerator as long as the
# product of some 240 to 560 tokens.
_LEAST_TILE = 384


@dataclasses.dataclass(frozen=True)
class TopK(RowFunction):
    """The `k` largest columns and their log-probabilities, `[B, k]` each, the largest
    first, and the log of the mass of the others, `[B]`."""

    k: int

    def tile(self, vocab):
        rows = _TILE_BYTES // (vocab.width * self.dtype.itemsize)
        return min(max(rows, _LEAST_TILE), _MAX_TILE)

    def __call__(self, logits, rows, vocab):
        over = lambda x: _over_temperature(x, rows.temperature)
        values, columns = _largest(logits, vocab, self.k)
        largest = values[:, :1]
        z = over(values - largest)
        # Of the other columns a log-sum-exp of their own: in `1 - Σp` it would be lost.
        others = without_listed(logits, columns, vocab)
        (of_others,) = vocab.pmax(jnp.max(others, axis=-1))
        shifted = over(others - finite_max(of_others)[:, None])
        (total,) = vocab.psum(jnp.sum(jnp.exp(shifted), axis=-1))
        z_rest = over(of_others[:, None] - largest) + jnp.log(total)[:, None]
        # When one column has p ≈ 1, log p = -log(1 + the sum of all others), which
        # would round to 1. Of a row without a softmax the first term is NaN, not 0.
        z_all = jnp.concatenate([z[:, 1:], z_rest], axis=-1)
        sum_less_one = jnp.expm1(z[:, :1]) + jnp.sum(jnp.exp(z_all), -1, keepdims=True)
        log_sum = jnp.log1p(sum_less_one)
        return columns, z - log_sum, (z_rest - log_sum)[:, 0]


def _largest(
    logits: jax.Array, vocab: Vocabulary, k: int
) -> tuple[jax.Array, jax.Array]:
    """The `k` largest logits of each row and their columns, `[B, k]`.

    Of equal ones the first, so that no padding is among them.
    """
    values, at = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    columns = at + vocab.start
    if vocab.axis_name is None:
        return values, columns
    flat = lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2])
    values, columns = (flat(of_all_shards(x, vocab)) for x in (values, columns))
    values, at = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(columns, at, axis=-1)


def of_all_shards(x: jax.Array, vocab: Vocabulary) -> jax.Array:
    """`[B, shards, any]` of `[B, any]` on each device: an `all_gather`, whose result
    JAX knows to be the same on all of them."""
    parts = zeros(jax.typeof(x), (x.shape[0], vocab.shards, *x.shape[1:]))
    parts = parts.at[:, jax.lax.axis_index(vocab.axis_name)].set(x)
    return jax.lax.psum(parts, vocab.axis_name)


def _over_temperature(x: jax.Array, temperature: jax.Array | None) -> jax.Array:
    if temperature is None:
        return x
    return x / jnp.expand_dims(temperature, range(1, x.ndim))


@dataclasses.dataclass(frozen=True)
class Samples(RowFunction):
    r"""Columns that are drawn, int32 `[B, number]`, and which rows have no softmax to
    draw from, bool `[B]`.

    With noise $g$ that is distributed as Gumbel, the largest entry of $\log w + g$ is a
    draw by the weights $w$. It is drawn first among groups of groups of columns, then
    among the groups in it, then among the columns of a group: that takes noise for
    $3 \sqrt[3] V$ entries. A largest entry, unlike a cumulative sum, is the same
    wherever the columns are, and so are the masses of groups, which are sums of
    integers. So samples do not depend on how the vocabulary is spread over devices.
    """

    number: int

    def tile(self, vocab):
        rows = _TILE_BYTES // (vocab.width * self.dtype.itemsize)
        of_noise = _TILE_BYTES // (self.number * _group_size(vocab) * 4)
        return min(max(rows, _LEAST_TILE), max(of_noise, 1), _MAX_TILE)

    def __call__(self, logits, rows, vocab):
        T, words = rows.temperature, rows.words
        assert words is not None
        size = _group_size(vocab)
        groups = _Groups.of(vocab, size)
        x = groups.split(logits)  # [B, held, size]
        largest = groups.of_all(jnp.max(x, axis=-1), -jnp.inf)  # [B, groups]
        (largest,) = vocab.pmax(largest)
        shift = groups.held_of(finite_max(largest))
        z = _over_temperature(x - shift[..., None], T)
        # Each sum fits into 31 bits, and rounding is within 1e-5 of it.
        unit = 2.0 ** (31 - size.bit_length())
        weights = jnp.round(unit * jnp.exp(z)).astype(jnp.int32)
        mass = groups.of_all(jnp.sum(weights, axis=-1, dtype=jnp.int32), 0)
        is_nan = jnp.isnan(logits).any(axis=-1).astype(jnp.int32)
        mass, is_nan = vocab.psum(mass, is_nan)
        top = jnp.max(largest, axis=-1)
        log_mass = _over_temperature(largest - finite_max(top)[:, None], T)
        log_mass += jnp.log(mass.astype(self.dtype))

        keys = jax.random.wrap_key_data(words, impl="threefry2x32")
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys).T
        outer = -log_mass.shape[-1] % size
        outer = jnp.pad(log_mass, ((0, 0), (0, outer)), constant_values=-jnp.inf)
        outer = outer.reshape(outer.shape[0], outer.shape[1] // size, size)
        total = jax.nn.logsumexp(outer, axis=-1)[:, None]
        drawn = _argmax(total + self._noise(keys[0], total.shape[-1]))
        at = _argmax(_take(outer, drawn) + self._noise(keys[1], size))
        drawn = drawn * size + at  # the group, [B, number]
        is_held, at = groups.place(drawn)
        score = _take(z, at) + self._noise(keys[2], size)
        score = jnp.where(is_held[..., None], score, -jnp.inf)
        at = _argmax(score)
        columns = drawn * size + at
        if vocab.axis_name is not None:
            best = jnp.take_along_axis(score, at[..., None], axis=-1)[..., 0]
            best, columns = (of_all_shards(x, vocab) for x in (best, columns))
            winner = jnp.argmax(best, axis=1, keepdims=True)
            columns = jnp.take_along_axis(columns, winner, axis=1)[:, 0]
        is_bad = (is_nan > 0) | ~jnp.isfinite(top)
        if T is not None:
            is_bad |= jnp.isnan(T)
        return jnp.where(is_bad[:, None], 0, columns), is_bad

    def _noise(self, keys: jax.Array, entries: int) -> jax.Array:
        """Gumbel noise for each draw and entry, `[B, number, entries]`.

        What a rare column needs to be drawn is its upper end, where 32 bits of a
        uniform number near 0 have the digits that 23 bits near 1 have not.
        """
        shape = self.number, entries
        bits = jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(keys)
        uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
        # It is finite, so that a column without mass is never drawn.
        uniform = jnp.minimum(uniform, 1 - 2.0**-24)
        return -jnp.log(-jnp.log1p(-uniform)).astype(self.dtype)


def _group_size(vocab: Vocabulary) -> int:
    """That of groups which depend on the size of the vocabulary alone."""
    return math.ceil(vocab.size ** (1 / 3))


def _argmax(x: jax.Array) -> jax.Array:
    return jax.lax.argmax(x, x.ndim - 1, jnp.int32)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """`[B, number, size]`, the rows `at`, `[B, number]`, of `[B, any, size]`."""
    return jax.vmap(lambda x, at: x.at[at].get(mode="clip"))(x, at)


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Groups of `size` columns, of which a device holds `held` from the one that its
    first column is in, though maybe not all columns of these."""

    size: int
    count: int  # on all devices
    held: int
    vocab: Vocabulary

    @classmethod
    def of(cls, vocab: Vocabulary, size: int) -> "_Groups":
        before = 0 if vocab.axis_name is None else size - 1
        held = -(-(vocab.width + before) // size)
        return cls(size, -(-vocab.size // size), held, vocab)

    @property
    def numbers(self) -> jax.Array:
        first = self.vocab.start // self.size
        return jnp.arange(self.held, dtype=jnp.int32) + first

    def split(self, logits: jax.Array) -> jax.Array:
        """The columns at hand by groups, `[B, held, size]`, with `-inf` for others."""
        more = self.held * self.size - logits.shape[-1]
        x = jnp.pad(logits, ((0, 0), (0, more)), constant_values=-jnp.inf)
        if self.vocab.axis_name is not None:
            x = jnp.roll(x, self.vocab.start % self.size, axis=-1)
        return x.reshape(x.shape[0], self.held, self.size)

    def of_all(self, x: jax.Array, fill: float) -> jax.Array:
        """`[B, count]` of `[B, held]`, with `fill` for groups of other devices."""
        if self.vocab.axis_name is None:
            return x
        every = jnp.full_like(x, fill, shape=(x.shape[0], self.count))
        return every.at[:, self.numbers].set(x, mode="drop")

    def held_of(self, x: jax.Array) -> jax.Array:
        """`[B, held]` of `[B, count]`."""
        if self.vocab.axis_name is None:
            return x
        return jnp.take(x, self.numbers, axis=1, mode="fill", fill_value=0)

    def place(self, groups: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whether each of the groups is held, and which of those that are."""
        at = groups - self.numbers[0]
        return (at >= 0) & (at < self.held), at
