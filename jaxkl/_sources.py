"""Where a token's logits come from, and how a gradient is pulled back to there.

A source is a pytree of per-token arrays, `[B, ...]`, and arrays that all tokens share.
The engine takes it one tile of tokens at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ._divergences import evaluate
from ._numerics import entropy, Outcomes, Rows, zero_unless
from ._vocabulary import Vocabulary


class Source:
    """Base of the sources, which are dataclasses of arrays and static settings."""

    shared: ClassVar[frozenset[str]] = frozenset()  # fields that all tokens share
    # Whether the logits are an argument, and so in memory already.
    is_dense: ClassVar[bool] = False

    @property
    def columns(self) -> Any:
        """The array whose last axis is the vocabulary; None: there is none."""
        return None

    @property
    def width(self) -> int | None:
        """Columns, padding included; None: any number."""
        return None if self.columns is None else self.columns.shape[-1]

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

    def drop_padding(self, vocab: Vocabulary) -> Self:
        """Without the NaN that padding columns of shared arrays may hold."""
        del vocab
        return self

    def pad_columns(self, width: int) -> Self:
        """With padding columns, `width` in all."""
        raise NotImplementedError

    def specs(self, token_axes: tuple[str, ...], vocab_axis: str | None) -> Self:
        """How each array is spread over a mesh, a `PartitionSpec` in its place."""
        raise NotImplementedError

    def logits(self, dtype, vocab: Vocabulary) -> jax.Array:
        """`[B, width]`, with `-inf` in padding columns."""
        raise NotImplementedError

    def pull(self, logits: jax.Array, d_logits: jax.Array, live: jax.Array) -> Self:
        """The gradient to every array, from that to the logits.

        Those of shared arrays are summed over the `live` tokens, `[B]`, and are in at
        least float32; the others are in their array's dtype, or a wider one.
        """
        raise NotImplementedError

    def with_peak(self, vocab: Vocabulary) -> Self:
        """With what is cheaper found for all tokens at once than in each tile."""
        del vocab
        return self

    def peak(self, logits: jax.Array) -> jax.Array:
        """The largest logit of the columns at hand, `[B]`."""
        return jnp.max(logits, axis=-1)

    @property
    def is_normalized(self) -> bool:
        """As a teacher: whether the logits are log-probabilities already."""
        return False

    # The two below are this device's shares: `vocab.sum` of them is the whole.

    def compare(
        self, divergence, p: Outcomes, q: Outcomes, vocab: Vocabulary, log_ratio=None
    ):
        """As a teacher: the divergence from it of each token, `[B]`."""
        p, q, log_ratio = jax.tree.map(vocab.mask, (p, q, log_ratio))
        return jnp.sum(vocab.mask(evaluate(divergence, p, q, log_ratio)), axis=-1)

    def against(
        self, divergence, rows: Rows, logits: jax.Array, vocab: Vocabulary
    ) -> tuple[jax.Array, jax.Array] | None:
        """As a teacher: the divergence from it of each token, `[B]`, this device's
        share, and the gradient to the student's `logits / temperature`, `[B, width]`.

        None: all columns are to be compared, one by one.
        """
        del divergence, rows, logits, vocab
        return None

    def entropy(self, p: Outcomes, vocab: Vocabulary) -> jax.Array:
        """As a teacher: its entropy, `[B]`, in nats."""
        del vocab
        return entropy(p)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logits(Source):
    """Logits that exist already, `[B, V]`."""

    values: Any
    peaks: Any = None  # [B]; None: not known yet

    is_dense: ClassVar[bool] = True

    @property
    def columns(self):
        return self.values

    def pad_columns(self, width):
        return Logits(widen(self.values, width))

    def specs(self, token_axes, vocab_axis):
        return Logits(P(token_axes or None, vocab_axis))

    def logits(self, dtype, vocab):
        return vocab.fit(self.values).astype(dtype)

    def with_peak(self, vocab):
        if vocab.valid is not None or self.values.shape[-1] != vocab.width:
            return self  # without its padding it would be a copy
        peaks = jnp.max(jax.lax.stop_gradient(self.values), axis=-1)
        return Logits(self.values, peaks)

    def peak(self, logits):
        known = self.peaks is not None
        return self.peaks.astype(logits.dtype) if known else super().peak(logits)

    def pull(self, logits, d_logits, live):
        del logits, live
        return Logits(widen(d_logits, self.values.shape[-1]).astype(self.values.dtype))


def widen(x: jax.Array, width: int) -> jax.Array:
    """With columns of 0: the gradient of padding columns, which no term has seen."""
    more = width - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, more),)) if more else x
