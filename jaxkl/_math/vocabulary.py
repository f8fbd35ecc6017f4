"""The columns at hand: the whole vocabulary, this device's slice, or a block of it.

A sum over the vocabulary is a sum over the columns of this device, and then
`Vocabulary.psum` over the devices, which does nothing if one device holds them all.
"""

import dataclasses
import itertools
from typing import Any, Self

import jax
import jax.numpy as jnp

from .._util.compat import varying_axes
from .numerics import zero_unless


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    size: int  # columns that count, on all devices
    width: int  # columns at hand; those beyond `size` are padding
    axis_name: str | None = None  # the mesh axis that holds the slices
    shards: int = 1

    @classmethod
    def whole(cls, size: int) -> Self:
        return cls(size, size)

    @classmethod
    def slice_of(cls, axis_name: str, width: int, size: int | None) -> Self:
        """This device's slice, of `width` columns, inside `shard_map`."""
        if not isinstance(axis_name, str):
            raise TypeError(f"`axis_name` must be a mesh axis, got {axis_name!r}.")
        try:
            index, shards = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
        except NameError as error:
            raise ValueError(
                "`axis_name` must be an axis of the mesh of an enclosing "
                f"`jax.shard_map`, got {axis_name!r}."
            ) from error
        if axis_name not in varying_axes(index):
            raise ValueError(
                f"`axis_name` {axis_name!r} must be an axis of a `jax.shard_map` with "
                "check_vma=True: without it gradients would be wrong, silently."
            )
        return cls(width * shards if size is None else size, width, axis_name, shards)

    @property
    def is_block(self) -> bool:
        """Whether these are only a few of the columns that a device holds."""
        return False

    def block(self, first: jax.Array | int, width: int) -> "Vocabulary":
        """The `width` columns from `first` on, of those that a device holds."""
        start, is_full = self.start + first, self.valid is None
        return _Block(self.size, width, self.axis_name, self.shards, start, is_full)

    def fit(self, logits: jax.Array) -> jax.Array:
        """The columns of a tile from `[B, any]`, with `-inf` in padding."""
        if self.axis_name is None:
            return logits[:, : self.size]
        valid = self.valid
        return logits if valid is None else jnp.where(valid[None, :], logits, -jnp.inf)

    @property
    def start(self) -> jax.Array | int:
        """The number of the first column."""
        if self.axis_name is None:
            return 0
        return jax.lax.axis_index(self.axis_name) * self.width

    @property
    def columns(self) -> jax.Array:
        """The numbers of the columns, `[width]`."""
        return jnp.arange(self.width, dtype=jnp.int32) + self.start

    @property
    def valid(self) -> jax.Array | None:
        """Which columns are no padding, `[width]`; None: all of them."""
        if self.width * self.shards == self.size:
            return None
        return self.columns < self.size

    def mask(self, x: jax.Array) -> jax.Array:
        """`x`, `[..., width]`, with 0 in padding, whatever `x` holds there."""
        valid = self.valid
        return x if valid is None else zero_unless(valid, x)

    def psum(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """The sum of each array over the devices, in one exchange.

        They are `[B]` or `[B, any]`. Likewise `pmax`, of arrays `[B]`, which is a
        constant to differentiation, and `pmin`.
        """
        if self.axis_name is None or not arrays:
            return arrays
        rows = [x[None] if x.ndim == 1 else x.T for x in arrays]
        summed = jax.lax.psum(jnp.concatenate(rows), self.axis_name)
        ends = list(itertools.accumulate(len(x) for x in rows[:-1]))
        pairs = zip(jnp.split(summed, ends), arrays, strict=True)
        return tuple(part[0] if x.ndim == 1 else part.T for part, x in pairs)

    def pmax(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        arrays = jax.lax.stop_gradient(arrays)
        if self.axis_name is None or not arrays:
            return arrays
        return tuple(jax.lax.pmax(jnp.stack(arrays), self.axis_name))

    def pmin(self, x: jax.Array) -> jax.Array:
        return x if self.axis_name is None else jax.lax.pmin(x, self.axis_name)

    def on_first_shard(self, x: jax.Array) -> jax.Array:
        """`x` on the first device and 0 on the others, so that a value that is the
        same on all of them enters a `psum` once."""
        return x if self.axis_name is None else zero_unless(self.start == 0, x)


@dataclasses.dataclass(frozen=True)
class _Block(Vocabulary):
    """A few of a device's columns. The sums over devices are not a block's to make."""

    first: Any = 0
    is_full: bool = True  # whether no column is padding

    @property
    def is_block(self):
        return True

    @property
    def start(self):
        return self.first

    @property
    def valid(self):
        return None if self.is_full else self.columns < self.size

    def fit(self, logits):
        valid = self.valid
        return logits if valid is None else jnp.where(valid[None, :], logits, -jnp.inf)

    def on_first_shard(self, x):
        return zero_unless(self.first == 0, x)
