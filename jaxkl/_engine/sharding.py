"""A loss whose arguments are checked, on one device or spread over a mesh."""

import dataclasses
import functools as ft
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

from .._math.vocabulary import Vocabulary
from .._util.compat import has_explicit_axes
from .operands import Operands, Outputs, Spec
from .rule import weighted_loss


@dataclasses.dataclass(frozen=True)
class Layout:
    """How tokens and vocabulary are spread over a mesh."""

    mesh: Mesh | AbstractMesh
    token_axes: tuple[str, ...]  # the mesh axes of the tokens
    vocab_axis: str | None  # that of the vocabulary; None: each device has all of it

    @property
    def token_shards(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.token_axes)

    @property
    def vocab_shards(self) -> int:
        return 1 if self.vocab_axis is None else self.mesh.shape[self.vocab_axis]

    def without_vocab_axis(self) -> "Layout":
        """Its devices split the tokens instead."""
        if self.vocab_axis is None:
            return self
        return Layout(self.mesh, (*self.token_axes, self.vocab_axis), None)


def as_layout(
    mesh: Mesh | AbstractMesh | None,
    token_axes: str | Sequence[str] | None,
    vocab_axis: str | None,
    axis_name: str | None,
) -> Layout | None:
    """The checked layout; None if there is no mesh."""
    if mesh is None:
        axes = {"token_axes": token_axes, "vocab_axis": vocab_axis}
        for name, axis in axes.items():
            if axis is not None:
                raise ValueError(f"`{name}` must be None without `mesh`, got {axis!r}.")
        return None
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"`mesh` must be a jax.sharding.Mesh, got {mesh!r}.")
    if axis_name is not None:
        raise ValueError(
            "`axis_name` must be None with a mesh, whose axis is `vocab_axis`; got "
            f"{axis_name!r}."
        )
    if token_axes is None:
        if vocab_axis is None:
            raise ValueError("`mesh` needs `token_axes`, `vocab_axis` or both.")
        token_axes = ()
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


class Prepared(NamedTuple):
    """A loss whose arguments are checked, with its tokens flattened to one axis."""

    spec: Spec
    operands: Operands
    layout: Layout | None  # None: not on a mesh
    batch_shape: tuple[int, ...]
    factor: jax.Array | None = None  # of the loss, see `Folded`; None: 1
    # Of metrics: the weights before the normaliser, `[B]`, and how labels are smoothed.
    weight: jax.Array | None = None
    label_smoothing: Any = 0.0


def evaluate(prepared: Prepared) -> Outputs:
    """The loss, a scalar or `[...]`, and the engine's terms and metrics."""
    loss, terms, metrics = outputs_of(prepared)
    if prepared.factor is not None:
        loss = loss * prepared.factor
    if not prepared.spec.reduce:
        loss = ft.reduce(jnp.add, loss).reshape(prepared.batch_shape)
    return loss, terms, metrics


def outputs_of(prepared: Prepared) -> Outputs:
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
        loss, terms, metrics = weighted_loss(local_spec, operands)
        if spec.reduce and layout.token_axes:
            loss = jax.lax.psum(loss, layout.token_axes)
        return loss, terms, metrics

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

        def pad(x, padding):
            rest = ((0, 0),) * (x.ndim - 1)
            return jnp.pad(x, ((0, more), *rest), constant_values=padding)

        operands = operands.padded(pad)
    return operands


def reshard(layout: Layout, x: jax.Array, spec: P) -> jax.Array:
    """`x` spread as `spec` says. XLA does that itself unless mesh axes are explicit."""
    if not has_explicit_axes(layout.mesh):
        return x
    return jax.sharding.reshard(x, NamedSharding(layout.mesh, spec))
