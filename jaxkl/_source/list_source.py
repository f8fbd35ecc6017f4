"""A teacher's list, as the engine has it."""

import dataclasses
import functools as ft
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from .._math.numerics import loss_dtype, safe_log, zero_unless
from .._util import checks as check
from .base import Kind, Source
from .lists import merge_repeated, positions, unlisted_mass


_MOST_MASS = 1.02  # of list and rest: above it, these are no probabilities
_WITH_REST = "bucket", "uniform"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ListSource(Source):
    """A `SparseTeacher` that is checked, and later `ready`.

    Then a row has different columns in rising order, and its empty slots have a column
    beyond all others. Its `log_rest` is -inf where the tail has no rest.
    """

    columns: Any  # int32 [B, k]
    log_probs: Any  # [B, k]
    log_rest: Any  # [B, 1]; None: not known yet
    tail: str = dataclasses.field(metadata={"static": True})
    eps: float = dataclasses.field(metadata={"static": True})  # of the list as given
    # Whether the list and its rest are compared as a row of few outcomes. If not, it
    # has a logit for each column.
    is_row: bool = dataclasses.field(default=True, metadata={"static": True})

    kind: ClassVar[Kind] = "list"
    is_normalized: ClassVar[bool] = True

    def checked(self, name):
        del name
        return self

    @property
    def batch_shape(self):
        return self.columns.shape[:-1]

    @property
    def vocab_array(self):
        return None

    @property
    def has_rest(self) -> bool:
        """Whether all unlisted columns together are one more outcome."""
        return self.tail != "conditional"

    @property
    def has_lumped_rest(self) -> bool:
        """Whether the rest is one outcome, though its columns may be compared."""
        return self.tail != "uniform"

    def pad_columns(self, width):
        del width
        return self

    def partition_specs(self, token_axes, vocab_axis):
        del vocab_axis
        return self.map_fields(lambda *_: P(token_axes or None, None))

    def vjp(self, d_outputs, counted):
        del d_outputs, counted
        return self.map_fields(lambda _, x: jnp.zeros_like(x))  # it is a constant

    def with_checked_values(
        self, vocab_size: int, mask: jax.Array | None, is_bad: Any = False
    ) -> "ListSource":
        """The list, once the columns and masses of the tokens in `mask` are known to be
        right.

        Where they are traced and are not, where nothing is listed though the listed
        mass is to be 1, and where the traced `is_bad`, `[B]`, holds, the row is NaN.
        """
        values = _checked(self, vocab_size, mask, is_bad)
        if check.is_known(values.no_column) and (bad := values.no_column).any():
            raise ValueError(
                f"`teacher.indices` must be in [0, {vocab_size}), or -1 for an empty "
                f"slot, got {np.asarray(self.columns)[np.asarray(bad)][0]}."
            )
        if check.is_known(values.too_much) and (heavy := values.too_much).any():
            mass = np.asarray(values.mass)[np.asarray(heavy)][0]
            raise ValueError(
                f'`teacher.log_probs` must have a mass of at most 1 with tail="'
                f'{self.tail}", got {mass:.4g}: they are the log-probabilities of the '
                "whole vocabulary, as `jax.nn.log_softmax(logits / T)` has them. The "
                'tails "renormalize" and "conditional" take any logits.'
            )
        return dataclasses.replace(
            self, columns=values.columns, log_probs=values.log_probs
        )

    def ready(self, dtype, vocab):
        arrays = _ready(self, dtype, vocab.size)
        return dataclasses.replace(self, **arrays)

    def has_column(self, vocab_size: int) -> jax.Array:
        """Whether a slot holds a column, `[B, k]`."""
        return self.columns < vocab_size

    def logits(self, dtype, vocab):
        """Log-probabilities: those of the list and, elsewhere, what the tail says.

        None: its rows are of outcomes.
        """
        if self.is_row:
            return None
        number = jnp.sum(self.has_column(vocab.size), axis=-1, keepdims=True)
        outside = jnp.maximum(vocab.size - number, 1).astype(dtype)
        others = self.log_rest.astype(dtype) - jnp.log(outside)
        dense = jnp.broadcast_to(others, (others.shape[0], vocab.width))
        if vocab.valid is not None:
            dense = jnp.where(vocab.valid, dense, -jnp.inf)
        at = positions(self.columns, vocab)
        return dense.at[at].set(self.log_probs.astype(dtype), mode="drop")


class _Values(NamedTuple):
    """Of a list, what is wrong with it: bool `[B, k]` and `[B]`, and its arrays with
    NaN in rows where anything is."""

    no_column: jax.Array
    too_much: jax.Array
    mass: jax.Array
    columns: jax.Array
    log_probs: jax.Array


@ft.partial(jax.jit, static_argnums=1, inline=True)
def _checked(
    x: ListSource, vocab_size: int, mask: jax.Array | None, is_bad: Any
) -> _Values:
    columns = x.columns
    counted = jnp.ones(columns.shape[:1], bool) if mask is None else mask
    no_column = ((columns < -1) | (columns >= vocab_size)) & counted[:, None]
    is_nan = no_column.any(axis=-1) | is_bad
    listed = jnp.where(columns == -1, -jnp.inf, x.log_probs)
    mass = jnp.sum(jnp.exp(listed.astype(loss_dtype(listed))), axis=-1)
    if x.log_rest is not None and x.tail in _WITH_REST:
        mass += jnp.exp(x.log_rest[:, 0].astype(mass.dtype))
    if x.tail in ("renormalize", "conditional"):
        too_much = jnp.zeros_like(counted)
        is_nan |= (columns == -1).all(axis=-1)
    else:
        too_much = (mass > _MOST_MASS) & counted
    is_nan = (is_nan | too_much)[:, None]
    # The NaN is put at a column that exists, so that no tail leaves it out.
    columns = jnp.where(is_nan, 0, columns)
    log_probs = jnp.where(is_nan, jnp.nan, x.log_probs)
    return _Values(no_column, too_much, mass, columns, log_probs)


@ft.partial(jax.jit, static_argnums=(1, 2))
def _ready(x: ListSource, dtype: jnp.dtype, vocab_size: int) -> dict[str, jax.Array]:
    columns, log_probs = merge_repeated(x.columns, x.log_probs, dtype)
    has_rest = jnp.sum(columns < vocab_size, axis=-1, keepdims=True) < vocab_size
    if x.tail not in _WITH_REST:
        log_rest = jnp.full_like(log_probs[:, :1], -jnp.inf)
    elif x.log_rest is not None:
        log_rest = x.log_rest.astype(dtype)
    else:
        p = jnp.exp(log_probs)
        finite = zero_unless(p > 0, log_probs)
        # What the rounding of the log-probabilities, and of their exponentials, hides.
        least = x.eps / 2 * jnp.sum(p * (1 - finite), axis=-1)
        log_rest = safe_log(jnp.maximum(unlisted_mass(log_probs), least))[:, None]
    log_rest = jnp.where(has_rest, log_rest, -jnp.inf)
    return dict(columns=columns, log_probs=log_probs, log_rest=log_rest)
