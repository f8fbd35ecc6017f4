"""Where a token's logits come from, and how a gradient is pulled back to there.

A source is a pytree of per-token arrays, `[B, ...]`, and arrays that all tokens share.
The engine takes it one tile of tokens at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax

from ._numerics import zero_unless


@dataclasses.dataclass(frozen=True)
class Source:
    """Base of the sources: which fields all tokens share."""

    shared: ClassVar[frozenset[str]] = frozenset()

    def map_fields(self, f: Callable[[str, Any], Any]) -> Self:
        """`f(name, array)` of every array; absent ones stay None."""
        arrays = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        present = {k: f(k, x) for k, x in arrays.items() if isinstance(x, jax.Array)}
        return dataclasses.replace(self, **present)

    def map_tokens(self, f: Callable[[jax.Array], jax.Array]) -> Self:
        return self.map_fields(lambda name, x: x if name in self.shared else f(x))

    def mask_tokens(self, mask: jax.Array) -> Self:
        """Zeroes all that is held of tokens outside `mask`, `[B]`, NaN too."""
        over = lambda x: mask.reshape(mask.shape + (1,) * (x.ndim - 1))
        return self.map_tokens(lambda x: zero_unless(over(x), x))

    @property
    def width(self) -> int:
        """Number of columns, padding included."""
        raise NotImplementedError

    def logits(self, dtype) -> jax.Array:
        """`[B, width]`."""
        raise NotImplementedError

    def pull(self, logits: jax.Array, d_logits: jax.Array, live: jax.Array) -> Self:
        """The gradient to every array, from that to the logits.

        Those of shared arrays are summed over the `live` tokens, `[B]`, and come in at
        least float32; the others come in their array's dtype.
        """
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logits(Source):
    """Logits that exist already, `[B, V]`."""

    values: Any

    @property
    def width(self):
        return self.values.shape[-1]

    def logits(self, dtype):
        return self.values.astype(dtype)

    def pull(self, logits, d_logits, live):
        del logits, live
        return Logits(d_logits.astype(self.values.dtype))
