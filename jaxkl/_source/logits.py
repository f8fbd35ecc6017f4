"""Logits that are an argument."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from .._util import checks as check
from .base import Given, Kind, pad_to_width, Source


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logits(Source):
    """Logits that exist already, `[B, V]`."""

    values: Any
    maxima: Any = None  # [B]; None: not known yet

    kind: ClassVar[Kind] = "logits"
    by_column: ClassVar[frozenset[str]] = frozenset({"values"})

    def checked(self, name):
        values = logits_array(name, self.values)
        if values.ndim == 0:
            raise ValueError(f"`{name}` must be logits [..., vocab], got a scalar.")
        return Logits(values)

    @property
    def batch_shape(self):
        return self.values.shape[:-1]

    @property
    def vocab_array(self):
        return self.values

    def pad_columns(self, width):
        return Logits(pad_to_width(self.values, width))

    def partition_specs(self, token_axes, vocab_axis):
        return Logits(P(token_axes or None, vocab_axis))

    def logits(self, dtype, vocab):
        return _widened(vocab.fit(self.values), dtype)

    def vjp(self, d_outputs, counted):
        del counted
        d_values = pad_to_width(d_outputs, self.values.shape[-1])
        return Logits(d_values.astype(self.values.dtype))

    def materialized(self):
        return Logits(jax.lax.optimization_barrier(self.values), self.maxima)

    def with_max(self, vocab):
        if vocab.valid is not None or self.values.shape[-1] != vocab.width:
            return self  # the columns without padding would be a copy
        values = jax.lax.stop_gradient(self.values)
        if values.dtype == jnp.bfloat16:
            values = _widened(values, jnp.dtype(jnp.float32))
        maxima = jnp.max(values, axis=-1)
        return Logits(self.values, maxima)

    def max(self, logits):
        if self.maxima is None:
            return super().max(logits)
        return self.maxima.astype(logits.dtype)


def _widened(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` in `dtype`, with the values that a bfloat16 array has.

    XLA leaves out a rounding to bfloat16 where it likes, in one fusion and not in
    another. On a CPU, where it has no barriers, we round again.
    """
    if x.dtype != jnp.bfloat16:
        return x.astype(dtype)
    finfo = jnp.finfo(x.dtype)
    rounded = lambda x: jax.lax.reduce_precision(
        x.astype(dtype), finfo.nexp, finfo.nmant
    )
    return jax.lax.platform_dependent(x, cpu=rounded, default=lambda x: x.astype(dtype))


def as_source(name: str, x: Given | ArrayLike) -> Source:
    """`x` as a source, once its arrays are checked."""
    source = (x if isinstance(x, Given) else Logits(x)).checked(name)
    if not isinstance(source.width, int | None):
        raise ValueError(
            f"`{name}` must have a vocabulary of known size, got {source.width}: only "
            "the number of tokens may be symbolic."
        )
    if source.width == 0:
        raise ValueError(f"`{name}` must have a vocabulary of at least 1, got 0.")
    return source


def logits_array(name: str, x: ArrayLike) -> jax.Array:
    """`x` as an array of floats, once it is no model, nor several arrays."""
    must = f"`{name}` must be one array of logits or a head"
    kind = type(x).__name__
    if isinstance(x, Given):
        raise TypeError(f"`{name}` must be an array of logits, got {kind}.")
    if isinstance(x, list | tuple) and any(map(_is_model, x)):
        several = "; for several teachers, add up the loss to each"
        raise TypeError(
            f"{must}, got a {kind} of {len(x)}: pass one of them, or for hidden states "
            "and their matrix a LinearHead(hidden, kernel)"
            f"{several if name == 'teacher' else ''}."
        )
    if callable(x):
        raise TypeError(
            f"{must}, got {kind}, which can be called: pass what it makes, or for a "
            "tile at a time LinearHead(hidden, kernel) or "
            "FunctionHead(apply, params, hidden)."
        )
    if hasattr(x, "logits"):
        raise TypeError(f"{must}, got {kind}: pass its `logits`.")
    return check.float_array(name, x)


def _is_model(x: Any) -> bool:
    """Whether `x` is an array, or a thing of another kind than numbers."""
    return getattr(x, "ndim", 0) > 0 or isinstance(x, Given) or callable(x)
