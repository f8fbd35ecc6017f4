"""Two ways to walk over tokens, `[B, ...]`, a tile at a time."""

import jax
import jax.numpy as jnp


class Blocks:
    """Consecutive tokens. The last tile starts early enough to be full: it writes some
    tokens again, the same, and `live` keeps them from being added again."""

    def __init__(self, tokens, tile):
        self.tokens, self.tile = tokens, tile
        self.count = -(-tokens // tile)
        self.shape = (tokens,)

    def _start(self, i):
        return jnp.minimum(i * self.tile, self.tokens - self.tile)

    def arrange(self, x):
        return x

    def read(self, i, x):
        return jax.lax.dynamic_slice_in_dim(x, self._start(i), self.tile)

    def write(self, i, x, y):
        return jax.lax.dynamic_update_slice_in_dim(x, y, self._start(i), 0)

    def live(self, i):
        return self._start(i) + jnp.arange(self.tile) >= i * self.tile

    def restore(self, x):
        return x


class Strided:
    """Every `count`-th token: a token axis that the partitioner has sharded stays so
    inside each tile, where a block would have to be gathered. Padded at the end."""

    def __init__(self, tokens, tile):
        self.tokens, self.tile = tokens, tile
        self.count = -(-tokens // tile)
        self.shape = (tile, self.count)

    def arrange(self, x):
        rest = ((0, 0),) * (x.ndim - 1)
        x = jnp.pad(x, ((0, self.tile * self.count - self.tokens), *rest))
        return x.reshape(self.shape + x.shape[1:])

    def read(self, i, x):
        return jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)

    def write(self, i, x, y):
        return jax.lax.dynamic_update_index_in_dim(x, y, i, 1)

    def live(self, i):
        return jnp.arange(self.tile) * self.count + i < self.tokens

    def restore(self, x):
        return x.reshape(-1, *x.shape[2:])[: self.tokens]
