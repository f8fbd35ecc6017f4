"""Where a token's logits come from, and how a gradient gets back to there.

A new source is a frozen dataclass that derives from `Source` and is registered as a
pytree (`jax.tree_util.register_dataclass`). Its fields are arrays, or None, or have the
metadata `{"static": True}`. It sets `kind` and `shared`, and implements the abstract
methods. The other methods have defaults that fit a source of dense rows of logits, such
as `Logits`.
"""

import abc
import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from .._math.numerics import zero_unless
from .._math.vocabulary import Vocabulary
from .._util import checks as check


# "logits" are an argument, and so are in memory already. A "head" makes logits from
# arrays that all tokens share. A "list" is a teacher's few columns. Plans depend on it.
Kind = Literal["logits", "head", "list"]


class Given(abc.ABC):
    """What a user passes for a source, beside arrays of logits."""

    @abc.abstractmethod
    def checked(self, name: str) -> "Source":
        """The source, with its fields checked and made arrays.

        `name` is the argument, `"student"` or `"teacher"`, for the messages. Raises
        `TypeError` for a wrong type or dtype, `ValueError` for a wrong shape.
        """


class Source(Given):
    """A pytree of arrays with a row for each token, and of arrays that tokens share.

    The user's per-token arrays are `[..., n]`. `flattened` makes them `[B, n]`, and the
    engine takes them one tile of tokens at a time: then `B` is the size of the tile.
    """

    shared: ClassVar[frozenset[str]] = frozenset()  # the fields that all tokens share
    by_column: ClassVar[frozenset[str]] = frozenset()  # whose last axis is the columns
    kind: ClassVar[Kind]
    # Whether a few of the columns can be made without the others: see `take_columns`.
    makes_blocks: ClassVar[bool] = True
    # Whether `vjp` makes gradients of a token's own arrays where it is not counted.
    pulls_back_uncounted: ClassVar[bool] = True
    # Whether a teacher's logits are log-probabilities, at a temperature of its own.
    is_normalized: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the tokens, before they are flattened to one axis."""

    @property
    @abc.abstractmethod
    def vocab_array(self) -> Any:
        """An array whose last axis is the vocabulary, or the type of one; None, of a
        teacher: there is none."""

    @abc.abstractmethod
    def pad_columns(self, width: int) -> Self:
        """The source with padding columns, `width` columns in all."""

    @abc.abstractmethod
    def partition_specs(
        self, token_axes: tuple[str, ...], vocab_axis: str | None
    ) -> Self:
        """How each array is spread over a mesh: a `PartitionSpec` in its place."""

    @abc.abstractmethod
    def logits(self, dtype: jnp.dtype, vocab: Vocabulary) -> jax.Array:
        """The logits, `[B, vocab.width]` in `dtype`, with `-inf` in padding columns."""

    def d_outputs(self, logits: jax.Array, d_logits: jax.Array) -> jax.Array:
        """What `vjp` needs of the gradient of the logits, `[B, any]`.

        It is made in a tile. That of many tiles may be kept, in `output_dtype`, for one
        `vjp` of them all.
        """
        del logits
        return d_logits

    def output_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """The dtype in which `d_outputs` may be kept; `dtype` is that of the logits."""
        return dtype

    @abc.abstractmethod
    def vjp(self, d_outputs: jax.Array, counted: jax.Array) -> Self:
        """The gradient of each array, from `d_outputs`, in the array's place, or None
        where an array has none.

        Gradients of shared arrays are sums over the tokens that are `counted`, bool
        `[B]`, in at least float32. The others have their array's dtype or a wider one.
        Here the tokens may be on several axes, in place of `B`.
        """

    def linearized(self, asked: Self, *, with_terms: bool = False) -> Self:
        """The source, evaluated once if that keeps what a following `vjp` needs.

        `asked` has a leaf in the place of each array whose gradient is needed, and None
        in the place of the others.
        `with_terms` is whether the terms of tokens without weight are needed too.
        """
        del asked, with_terms
        return self

    def pulls_back_at_once(self, asked: Self) -> bool:
        """Whether one `vjp` of many tokens, after `linearized(asked)`, needs no memory
        but for its results and `d_outputs`, and so is better than one for each tile."""
        del asked
        return True

    @property
    def passes_float16(self) -> bool:
        """Whether gradients in float32 have been in float16 on their way, in which that
        of a mean may underflow without a loss scale."""
        return False

    @property
    def splits_columns(self) -> bool:
        """Whether the devices of a mesh axis can each make a part of the columns."""
        return True

    def with_weightless(self, weightless: jax.Array, dropped: jax.Array) -> Self:
        """The source, told which tokens have no weight, bool `[B]`.

        What they hold must not enter the gradients, even if it is NaN. Of them, those
        that are `dropped` have no weight whatever `weights` are.
        """
        del weightless, dropped
        return self

    @property
    def width(self) -> int | None:
        """The number of columns, padding included; None: it has no width."""
        return None if self.vocab_array is None else self.vocab_array.shape[-1]

    def map_fields(self, f: Callable[[str, Any], Any]) -> Self:
        """`f(name, array)` in the place of every array; absent ones stay None."""
        children = {
            x.name: jax.tree.map(ft.partial(f, x.name), getattr(self, x.name))
            for x in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
            if not x.metadata.get("static")
        }
        return dataclasses.replace(self, **children)  # pyright: ignore[reportArgumentType]

    def shared_flags(self) -> Self:
        """A flag in the place of every array: whether all tokens share it."""
        return self.map_fields(lambda name, _: name in self.shared)

    def by_column_flags(self) -> Self:
        """A flag in the place of every array: whether its last axis is the columns."""
        return self.map_fields(lambda name, _: name in self.by_column)

    def take_columns(self, start: jax.Array | int, width: int) -> Self:
        """The source with `width` of its columns, from `start` on."""
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, axis=-1)
        return self.map_fields(lambda name, x: take(x) if name in self.by_column else x)

    def map_tokens(self, f: Callable[[jax.Array], jax.Array]) -> Self:
        """`f(array)` in the place of every array with a row for each token."""
        return self.map_fields(lambda name, x: x if name in self.shared else f(x))

    def mask_tokens(self, mask: jax.Array) -> Self:
        """The source with zeros in the rows of tokens outside `mask`, `[B]`."""
        over = lambda x: jnp.expand_dims(mask, range(mask.ndim, x.ndim))
        return self.map_tokens(lambda x: zero_unless(over(x), x))

    def ready(self, dtype: jnp.dtype, vocab: Vocabulary) -> Self:
        """The source as all walks and rules take it: what is the same in all of them is
        made once, in `dtype`. Padding columns of shared arrays are 0."""
        del dtype, vocab
        return self

    def materialized(self) -> Self:
        """The source whose logits, if they are an argument, are one array.

        An accelerator may fuse the end of the program that made them, and round it in
        one fusion and not in another.
        """
        return self

    def with_max(self, vocab: Vocabulary) -> Self:
        """The source with its rows' maxima, if it is cheaper to find them for all
        tokens at once than for each tile."""
        del vocab
        return self

    def max(self, logits: jax.Array) -> jax.Array:
        """The largest logit of this device's columns, `[B]`."""
        return jnp.max(logits, axis=-1)


def flattened(source: Source) -> Source:
    """The source with its tokens on one axis."""
    return source.map_tokens(lambda x: x.reshape(-1, x.shape[-1]))


def pad_to_width(x: jax.Array, width: int) -> jax.Array:
    """`x` padded with columns of 0 to `width`."""
    more = width - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, more),)) if more else x


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
