"""How the tokens and the vocabulary of a loss are spread over a mesh."""

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh


@dataclasses.dataclass(frozen=True)
class Layout:
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
