"""Which tokens are in a tile, and how arrays are cut into tiles and put together."""

import abc

import jax
import jax.numpy as jnp


class Tiles(abc.ABC):
    """`count` tiles of `tile` of the `tokens`.

    Arrays have a row for each token. A scan reads the rows of tile `i` from an array
    that `arrange` has prepared. It writes rows to an array whose first axes are
    `shape`, of which `restore` makes an array in the order of the tokens.

    It may stack rows instead, in an array whose first axes are `stacked_shape`, where
    the rows of a tile lie together. `stacked` has the order of such an array, and
    `unstacked` is the inverse.
    """

    shape: tuple[int, ...]
    stacked_shape: tuple[int, ...]

    def __init__(self, tokens: int, tile: int, *, overwrites_overlap: bool = True):
        """`overwrites_overlap` is whether a tile may write the row of a token that it
        does not count. It writes what is there already, which saves a read."""
        self.tokens, self.tile = tokens, tile
        self.overwrites_overlap = overwrites_overlap
        self.count = -(-tokens // tile)

    @abc.abstractmethod
    def arrange(self, x: jax.Array, padding: float = 0) -> jax.Array: ...

    @abc.abstractmethod
    def read(self, i: jax.Array, x: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def counted(self, i: jax.Array) -> jax.Array:
        """Which tokens of tile `i` are in no tile before it, and are no padding."""

    @abc.abstractmethod
    def write(self, i: jax.Array, x: jax.Array, rows: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def restore(self, x: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def stack(self, i: jax.Array, x: jax.Array, rows: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def stacked(self, x: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def unstacked(self, x: jax.Array) -> jax.Array: ...


class Blocks(Tiles):
    """Tiles of consecutive tokens, which are slices without a copy.

    The last tile starts early enough to be full. It has some tokens again, and does not
    count them again.
    """

    def __init__(self, tokens, tile, **options):
        super().__init__(tokens, tile, **options)
        self.shape = self.stacked_shape = (tokens,)

    def _start(self, i):
        return jnp.minimum(i * self.tile, self.tokens - self.tile)

    def arrange(self, x, padding=0):
        del padding
        return x

    def read(self, i, x):
        return jax.lax.dynamic_slice_in_dim(x, self._start(i), self.tile)

    def counted(self, i):
        return self._start(i) + jnp.arange(self.tile) >= i * self.tile

    def write(self, i, x, rows):
        if self.tokens % self.tile and not self.overwrites_overlap:
            rest = tuple(range(1, rows.ndim))
            is_new = jnp.expand_dims(self.counted(i), rest)
            rows = jnp.where(is_new, rows, self.read(i, x))
        return self.stack(i, x, rows)

    def stack(self, i, x, rows):
        return jax.lax.dynamic_update_slice_in_dim(x, rows, self._start(i), 0)

    restore = stacked = unstacked = arrange


class Strided(Tiles):
    """Tiles of every `count`-th token.

    A token axis that the partitioner has sharded stays sharded inside each tile; a
    block would be gathered. The tokens are padded at the end.
    """

    def __init__(self, tokens, tile, **options):
        super().__init__(tokens, tile, **options)
        self.shape, self.stacked_shape = (tile, self.count), (self.count, tile)

    def arrange(self, x, padding=0):
        rest = ((0, 0),) * (x.ndim - 1)
        more = self.tile * self.count - self.tokens
        x = jnp.pad(x, ((0, more), *rest), constant_values=padding)
        return x.reshape(self.shape + x.shape[1:])

    def read(self, i, x):
        return jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)

    def counted(self, i):
        return jnp.arange(self.tile) * self.count + i < self.tokens

    def write(self, i, x, rows):
        return jax.lax.dynamic_update_index_in_dim(x, rows, i, 1)

    def restore(self, x):
        return x.reshape(-1, *x.shape[2:])[: self.tokens]

    def stack(self, i, x, rows):
        return jax.lax.dynamic_update_index_in_dim(x, rows, i, 0)

    def stacked(self, x):
        return self.arrange(x).swapaxes(0, 1)

    def unstacked(self, x):
        return self.restore(x.swapaxes(0, 1))


ORDERS: dict[str, type[Tiles]] = {"blocks": Blocks, "strided": Strided}
