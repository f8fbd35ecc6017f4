"""Questions to JAX about meshes and devices, and the places where versions differ."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which `x` differs between devices, inside `jax.shard_map`."""
    aval = x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)
    manual = getattr(aval, "mat", None)  # JAX >= 0.10
    if manual is not None:
        return manual.varying
    return getattr(aval, "vma", None) or frozenset()


def to_varying(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """`x` cast to vary over `axes` too. The transpose of the cast is a `psum`."""
    axes = tuple(sorted(set(axes) - varying_axes(x)))
    if not axes:
        return x
    return jax.lax.pcast(x, axes, to="varying")


def match_varying(*arrays: jax.Array) -> list[jax.Array]:
    """Inside `jax.shard_map`, the arrays cast to vary over the same mesh axes.

    A cotangent must vary as its argument does. The transpose of the cast is the psum
    that the gradient of a replicated argument needs.
    """
    axes = frozenset[str]().union(*map(varying_axes, arrays))
    return [to_varying(x, axes) for x in arrays]


def abstract_eval(f: Callable, *args: Any) -> Any:
    """`jax.eval_shape`, whose types know over which mesh axes they vary."""
    jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr.out_avals)


def zeros(like: Any, shape: tuple[int, ...]) -> jax.Array:
    """Zeros of that shape that vary over mesh axes as the type `like` does."""
    return to_varying(jnp.zeros(shape, like.dtype), varying_axes(like))


def has_explicit_axes(mesh: Mesh | AbstractMesh) -> bool:
    """Whether arrays on the mesh carry their sharding in their type."""
    return any(t == jax.sharding.AxisType.Explicit for t in mesh.axis_types)


def many_devices() -> bool:
    """Whether a program may run on several devices."""
    try:
        return max(jax.device_count(), jax.device_count("cpu")) > 1
    except RuntimeError:  # no CPU platform
        return jax.device_count() > 1


def is_explicitly_sharded(x: jax.Array) -> bool:
    """Whether the type of `x` says that it is spread over a mesh."""
    return any(axes is not None for axes in jax.typeof(x).sharding.spec)
