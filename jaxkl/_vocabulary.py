"""The columns that a tile holds: the vocabulary, or this device's slice of it.

Whatever is summed over the vocabulary is summed over the columns at hand, and then by
`Vocabulary.sum` over the devices. Where there is one slice, that does nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ._compat import varying_axes
from ._numerics import zero_unless


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    size: int  # columns that count, on all devices
    width: int  # columns of a tile; beyond `size` they are padding
    axis_name: str | None = None  # the mesh axis that holds the slices
    shards: int = 1

    @classmethod
    def whole(cls, size: int):
        return cls(size, size)

    @classmethod
    def slice_of(cls, axis_name: str, width: int, size: int | None):
        """This device's, of `width` columns, inside `shard_map`."""
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

    def fit(self, x):
        """Of logits, `[B, any]`, the columns of a tile: `-inf` in padding."""
        if self.axis_name is None:
            return x[:, : self.size]
        valid = self.valid
        return x if valid is None else jnp.where(valid[None, :], x, -jnp.inf)

    @property
    def start(self):
        """The number of the first column."""
        if self.axis_name is None:
            return 0
        return jax.lax.axis_index(self.axis_name) * self.width

    @property
    def columns(self):
        """Their numbers, `[width]`."""
        return jnp.arange(self.width, dtype=jnp.int32) + self.start

    @property
    def valid(self):
        """Columns that are no padding, `[width]`; None: all."""
        if self.width * self.shards == self.size:
            return None
        return self.columns < self.size

    def mask(self, x):
        """0 in padding, whatever `x`, `[..., width]`, holds there."""
        valid = self.valid
        return x if valid is None else zero_unless(valid, x)

    def sum(self, *arrays):
        """Of each array over the devices, in one exchange; all are of one shape."""
        if self.axis_name is None:
            return arrays
        return tuple(jax.lax.psum(jnp.stack(arrays), self.axis_name))

    def max(self, *arrays):
        """Likewise; a constant to differentiation."""
        arrays = jax.lax.stop_gradient(arrays)
        if self.axis_name is None:
            return arrays
        return tuple(jax.lax.pmax(jnp.stack(arrays), self.axis_name))

    def min(self, x):
        return x if self.axis_name is None else jax.lax.pmin(x, self.axis_name)

    def once(self, x):
        """`x` on one device, 0 on the others: for what is the same on all."""
        return x if self.axis_name is None else zero_unless(self.start == 0, x)
