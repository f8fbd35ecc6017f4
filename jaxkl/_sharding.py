"""Losses whose tokens and vocabulary are spread over the devices of a mesh."""

import dataclasses
import functools as ft
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec as P

from ._compat import has_explicit_axes
from ._engine import weighted_loss
from ._tile import Operands, Spec
from ._vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which mesh axes the tokens and the vocabulary are spread over."""

    mesh: Mesh | AbstractMesh
    token_axes: tuple[str, ...]
    vocab_axis: str | None

    @property
    def token_shards(self):
        return math.prod(self.mesh.shape[axis] for axis in self.token_axes)

    @property
    def vocab_shards(self):
        return 1 if self.vocab_axis is None else self.mesh.shape[self.vocab_axis]


def check_layout(mesh, token_axes, vocab_axis) -> Layout:
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"`mesh` must be a jax.sharding.Mesh, got {mesh!r}.")
    if isinstance(token_axes, str):
        token_axes = (token_axes,)
    if not isinstance(token_axes, Sequence):
        raise TypeError(
            f"`token_axes` must be a mesh axis or several, got {token_axes!r}."
        )
    token_axes = tuple(token_axes)
    names = ", ".join(map(repr, mesh.axis_names))
    named = [("token_axes", axis) for axis in token_axes]
    named += [] if vocab_axis is None else [("vocab_axis", vocab_axis)]
    for name, axis in named:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"`{name}` must be of the mesh axes {names}, got {axis!r}."
            )
    if len(set(token_axes)) < len(token_axes):
        raise ValueError(f"`token_axes` must differ, got {token_axes!r}.")
    if vocab_axis in token_axes:
        raise ValueError(
            f"`vocab_axis` must not be one of `token_axes`, got {vocab_axis!r} and "
            f"{token_axes!r}."
        )
    return Layout(mesh, token_axes, vocab_axis)


@ft.partial(jax.jit, static_argnums=(0, 1))
def sharded_weighted_loss(spec: Spec, layout: Layout, operands: Operands):
    """`weighted_loss` of global operands, each device on its tokens and columns."""
    tokens = operands.weights.divergence.shape[0]
    operands = _padded(operands, layout)
    width = operands.student.width // layout.vocab_shards
    axis = layout.vocab_axis
    vocab = Vocabulary(spec.vocab.size, width, axis, layout.vocab_shards)
    if axis is None:
        vocab = spec.vocab
    local_spec = dataclasses.replace(spec, vocab=vocab)
    by_token = P(layout.token_axes or None)

    def on_device(operands):
        loss, terms, statistics = weighted_loss(local_spec, operands)
        if spec.reduce and layout.token_axes:
            loss = jax.lax.psum(loss, layout.token_axes)
        return loss, terms, statistics

    specs = _specs(operands, layout)
    operands = jax.tree.map(ft.partial(_placed, layout), operands, specs)
    loss, terms, statistics = jax.shard_map(
        on_device,
        mesh=layout.mesh,
        in_specs=(specs,),
        out_specs=(P() if spec.reduce else by_token, by_token, by_token),
        check_vma=True,
    )(operands)

    def cut(x):
        return x if x.shape[0] == tokens else _placed(layout, x, P())[:tokens]

    loss = loss if spec.reduce else cut(loss)
    return loss, jax.tree.map(cut, terms), jax.tree.map(cut, statistics)


def _padded(operands, layout):
    """Tokens of weight 0 and padding columns, so that the mesh divides both; a token a
    device where there is none, as nothing of size 0 can be spread."""
    tokens = operands.weights.divergence.shape[0]
    widths = [x.width for x in operands[:2] if x.width is not None]
    more = -tokens % layout.token_shards if tokens else layout.token_shards
    width = -(-max(widths) // layout.vocab_shards) * layout.vocab_shards
    if layout.vocab_axis is not None:
        student, teacher = (x.pad_columns(width) for x in operands[:2])
        operands = operands._replace(student=student, teacher=teacher)
    if more:
        rows = lambda x: jnp.pad(x, ((0, more),) + ((0, 0),) * (x.ndim - 1))
        operands = operands.map_tokens(rows)
    return operands


def _specs(operands, layout) -> Any:
    rows = P(layout.token_axes or None)
    sources = (x.specs(layout.token_axes, layout.vocab_axis) for x in operands[:2])
    rest = jax.tree.map(lambda _: rows, operands[2:])
    return Operands(*sources, *rest)


def _placed(layout, x, spec):
    """Explicitly sharded axes want it said; others, XLA moves by itself."""
    if not has_explicit_axes(layout.mesh):
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(layout.mesh, spec))
