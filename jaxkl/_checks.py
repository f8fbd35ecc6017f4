"""Argument checks. A message names the argument, what was expected and what came."""

import math

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


def is_traced(x) -> bool:
    """Whether the value of `x` is unknown, as inside `jax.jit`."""
    return isinstance(x, jax.core.Tracer)


def is_known(x) -> bool:
    """Whether the values of `x` can be looked at: by this process, and now."""
    if not isinstance(x, jax.Array):
        return True
    return not is_traced(x) and (x.is_fully_addressable or x.is_fully_replicated)


def is_number(x) -> bool:
    """A Python number: part of the program, not of its arguments."""
    return isinstance(x, int | float) and not isinstance(x, bool)


def is_integer(x) -> bool:
    """An array or NumPy scalar of integers."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.integer)


def float_array(name: str, x) -> jax.Array:
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        kind = type(x).__name__
        raise TypeError(f"`{name}` must be an array of floats, got {kind}.") from error
    if x.dtype.name not in FLOAT_DTYPES:
        raise TypeError(
            f"`{name}` must be floating-point, one of {', '.join(FLOAT_DTYPES)}; "
            f"got {x.dtype.name}."
        )
    return x


def int_array(name: str, x) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be integers, got {x.dtype.name}.")
    return x


def of_shape(name: str, x: jax.Array, shape: tuple[int, ...], why: str) -> jax.Array:
    if x.shape != shape:
        raise ValueError(f"`{name}` must have {why} {shape}, got {x.shape}.")
    return x


def one_of(name: str, value, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"`{name}` must be one of {options}, got {value!r}.")


def boolean(name: str, value) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def positive_int(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
    return int(value)


def scalar(name: str, value, low: float, high: float = math.inf, *, positive=False):
    """A Python number, or a scalar array; checked to be in range where it is known."""
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value}.")
    if not isinstance(value, int | float):
        value = float_array(name, value)
        if value.ndim:
            raise ValueError(f"`{name}` must be a scalar, got shape {value.shape}.")
    if is_known(value):
        in_range(name, value, low, high, positive=positive)
    return value


def temperature(name, value, shape):
    """`shape`, or None for exactly 1."""
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value}.")
    if isinstance(value, int | float):
        in_range(name, value, 0, positive=True)
        return None if value == 1 else jnp.full(shape, float(value), jnp.float32)
    value = float_array(name, value)
    if value.ndim:
        of_shape(name, value, shape, "no shape or the batch shape")
    if is_known(value):
        in_range(name, value, 0, positive=True)
    return jnp.broadcast_to(value, shape)


def in_range(name: str, value, low: float, high: float = math.inf, *, positive=False):
    """All of a known `value` is finite and in [low, high], or positive."""
    x = np.asarray(value, np.float64)
    good = np.isfinite(x) & ((x > 0) if positive else (x >= low)) & (x <= high)
    if not good.all():
        if positive:
            expected = "positive and finite"
        else:
            expected = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"`{name}` must be {expected}, got {x[~good].flat[0]}.")


def hashable(name: str, value) -> None:
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(f"`{name}` must be hashable, got {value!r}.") from error
