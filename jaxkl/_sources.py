"""Where a token's logits come from, and how a gradient is pulled back to there.

A source is a pytree of per-token arrays, `[B, ...]`, and arrays that all tokens share.
The engine takes it one tile of tokens at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from ._numerics import entropy, log_softmax, zero_unless


class Source:
    """Base of the sources, which are dataclasses of arrays and static settings."""

    shared: ClassVar[frozenset[str]] = frozenset()  # fields that all tokens share
    # Whether the logits are an argument, and so in memory already.
    is_dense: ClassVar[bool] = False

    @property
    def width(self) -> int | None:
        """Columns, padding included; None: any number."""
        raise NotImplementedError

    def map_fields(self, f: Callable[[str, Any], Any]) -> Self:
        """`f(name, array)` of every array; absent ones stay None."""
        children = {
            x.name: f(x.name, getattr(self, x.name))
            for x in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
            if not x.metadata.get("static") and getattr(self, x.name) is not None
        }
        return dataclasses.replace(self, **children)  # pyright: ignore[reportArgumentType]

    def map_tokens(self, f: Callable[[jax.Array], jax.Array]) -> Self:
        return self.map_fields(lambda name, x: x if name in self.shared else f(x))

    def mask_tokens(self, mask: jax.Array) -> Self:
        """Zeroes all that is held of tokens outside `mask`, `[B]`, NaN too."""
        over = lambda x: mask.reshape(mask.shape + (1,) * (x.ndim - 1))
        return self.map_tokens(lambda x: zero_unless(over(x), x))

    def logits(self, dtype, vocab_size: int) -> jax.Array:
        """`[B, vocab_size]`."""
        raise NotImplementedError

    def pull(self, logits: jax.Array, d_logits: jax.Array, live: jax.Array) -> Self:
        """The gradient to every array, from that to the logits.

        Those of shared arrays are summed over the `live` tokens, `[B]`, and are in at
        least float32; the others are in their array's dtype.
        """
        raise NotImplementedError

    def log_p(self, logits: jax.Array, temperature: jax.Array | None) -> jax.Array:
        """As a teacher: its log-probabilities, `[B, V]`, from its logits."""
        return log_softmax(logits, temperature).log_probs

    def compare(self, divergence, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        """As a teacher: the divergence from it of each token, `[B]`."""
        return jnp.sum(divergence(log_p, log_q), axis=-1)

    def entropy(self, log_p: jax.Array) -> jax.Array:
        """As a teacher: its entropy, `[B]`, in nats."""
        return entropy(log_p)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logits(Source):
    """Logits that exist already, `[B, V]`."""

    values: Any

    is_dense: ClassVar[bool] = True

    @property
    def width(self):
        return self.values.shape[-1]

    def logits(self, dtype, vocab_size):
        return self.values[:, :vocab_size].astype(dtype)

    def pull(self, logits, d_logits, live):
        del logits, live
        return Logits(widen(d_logits, self.values.shape[-1]).astype(self.values.dtype))


def widen(d_logits: jax.Array, width: int) -> jax.Array:
    """Padding columns, which no term has seen, get a zero gradient."""
    return jnp.pad(d_logits, ((0, 0), (0, width - d_logits.shape[-1])))
