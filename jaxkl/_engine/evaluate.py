"""A loss whose arguments are checked, on one device or spread over a mesh."""

import dataclasses
import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from .._math.vocabulary import Vocabulary
from .._util.compat import has_explicit_axes
from .layout import Layout
from .metrics import Statistics
from .operands import Operands, Spec
from .rule import Outputs, weighted_loss


class Prepared(NamedTuple):
    """A loss whose arguments are checked, with its tokens flattened to one axis."""

    spec: Spec
    operands: Operands
    layout: Layout | None  # None: not on a mesh
    weight: jax.Array  # [B], before the normaliser
    label_smoothing: Any
    batch_shape: tuple[int, ...]
    factor: jax.Array | None = None  # of the loss, see `Folded`; None: 1


def evaluate(
    prepared: Prepared,
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[Statistics, ...]]:
    """The loss, a scalar or `[...]`, and the engine's terms and statistics."""
    loss, terms, statistics = weighted_terms(prepared)
    if prepared.factor is not None:
        loss = loss * prepared.factor
    if not prepared.spec.reduce:
        loss = ft.reduce(jnp.add, loss).reshape(prepared.batch_shape)
    return loss, terms, statistics


def weighted_terms(prepared: Prepared) -> Outputs:
    """What `weighted_loss` returns, of tokens that may be spread over a mesh."""
    spec, operands, layout, *_ = prepared
    if layout is None:
        return weighted_loss(spec, operands)
    # Without `jit`, each step would be a program of all devices, and they may wait for
    # each other for ever.
    with jax.disable_jit(False):
        return sharded_weighted_loss(spec, layout, operands)


@ft.partial(jax.jit, static_argnums=(0, 1))
def sharded_weighted_loss(spec: Spec, layout: Layout, operands: Operands) -> Outputs:
    """`weighted_loss` of global operands, each device on its tokens and columns."""
    tokens = operands.tokens
    operands = _padded(operands, layout)
    vocab = spec.vocab
    if layout.vocab_axis is not None:
        width = operands.student.width // layout.vocab_shards
        vocab = Vocabulary(vocab.size, width, layout.vocab_axis, layout.vocab_shards)
    local_spec = dataclasses.replace(spec, vocab=vocab)

    def on_device(operands):
        loss, terms, statistics = weighted_loss(local_spec, operands)
        if spec.reduce and layout.token_axes:
            loss = jax.lax.psum(loss, layout.token_axes)
        return loss, terms, statistics

    specs = operands.partition_specs(layout.token_axes, layout.vocab_axis)
    operands = jax.tree.map(ft.partial(reshard, layout), operands, specs)
    by_token = P(layout.token_axes or None)
    outputs = jax.shard_map(
        on_device,
        mesh=layout.mesh,
        in_specs=(specs,),
        out_specs=(P() if spec.reduce else by_token, by_token, by_token),
        check_vma=True,
    )(operands)

    def without_padding(x):
        if x.ndim == 0 or x.shape[0] == tokens:
            return x
        return reshard(layout, x, P())[:tokens]

    return jax.tree.map(without_padding, outputs)


def _padded(operands: Operands, layout: Layout) -> Operands:
    """With padding columns and with tokens of weight 0, so that the mesh divides both.

    Nothing of size 0 can be spread: where there is no token, each device gets one.
    """
    tokens = operands.tokens
    if layout.vocab_axis is not None:
        widths = [x.width for x in operands.sources if x.width is not None]
        width = -(-max(widths) // layout.vocab_shards) * layout.vocab_shards
        operands = operands.map_sources(lambda source: source.pad_columns(width))
    more = -tokens % layout.token_shards if tokens else layout.token_shards
    if more:
        rows = lambda x: jnp.pad(x, ((0, more),) + ((0, 0),) * (x.ndim - 1))
        operands = operands.map_tokens(rows)
    return operands


def reshard(layout: Layout, x: jax.Array, spec: P) -> jax.Array:
    """`x` spread as `spec` says. XLA does that itself unless mesh axes are explicit."""
    if not has_explicit_axes(layout.mesh):
        return x
    return jax.sharding.reshard(x, NamedSharding(layout.mesh, spec))
