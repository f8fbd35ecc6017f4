"""The few places where JAX versions differ."""

from collections.abc import Iterable

import jax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes, inside `jax.shard_map`, over which `x` differs between devices."""
    aval = jax.typeof(x)
    manual = getattr(aval, "mat", None)  # JAX >= 0.10
    if manual is not None:
        return manual.varying
    return getattr(aval, "vma", None) or frozenset()


def to_varying(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """`x`, typed as differing over `axes` too. Its transpose is a `psum` over them."""
    axes = tuple(sorted(set(axes) - varying_axes(x)))
    if not axes:
        return x
    return jax.lax.pcast(x, axes, to="varying")
