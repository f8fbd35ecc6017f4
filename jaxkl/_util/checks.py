"""Checks of arguments. A message says which, what was expected, and what came."""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


# In this range values, gradients and second derivatives are right in float32, where T³
# underflows below 3e-13 and T² overflows above 2e19. Every dtype holds its ends, or has
# no number beyond them. They are 9.5e-7 and 1.05e6.
TEMPERATURES = 2.0**-20, 2.0**20

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


def is_traced(x: Any) -> bool:
    """Whether the values of `x` are unknown, as inside `jax.jit`."""
    return isinstance(x, jax.core.Tracer)


def is_known(x: Any) -> bool:
    """Whether this process can look at the values of `x` now."""
    if not isinstance(x, jax.Array):
        return True
    return not is_traced(x) and (x.is_fully_addressable or x.is_fully_replicated)


def is_number(x: Any) -> bool:
    """Whether `x` is a Python number, and so is part of the program."""
    return isinstance(x, int | float) and not isinstance(x, bool)


def is_integer(x: Any) -> bool:
    """Whether `x` is an array or a NumPy scalar of integers."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.integer)


def array(name: str, x: Any, kind: str) -> jax.Array:
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        hint = ", which can be called: pass its array" if callable(x) else ""
        got = f"{type(x).__name__}{hint}"
        raise TypeError(f"`{name}` must be an array of {kind}, got {got}.") from error
    except OverflowError as error:
        raise ValueError(f"`{name}` must be an array of {kind}: {error}.") from error


def float_array(name: str, x: Any) -> jax.Array:
    x = array(name, x, "floats")
    if x.dtype.name not in FLOAT_DTYPES:
        raise TypeError(
            f"`{name}` must be floating-point, one of {', '.join(FLOAT_DTYPES)}; "
            f"got {x.dtype.name}."
        )
    return x


def bool_array(name: str, x: Any) -> jax.Array:
    x = array(name, x, "bools")
    if x.dtype != jnp.bool_:
        raise TypeError(f"`{name}` must be bool, got {x.dtype.name}.")
    return x


def int_array(name: str, x: Any) -> jax.Array:
    """`x` in int32; a value out of its range becomes the nearest end of the range."""
    # Without x64, `jnp.asarray` wraps the int64 of NumPy and of PyTorch.
    foreign = hasattr(x, "__array__") and not isinstance(x, jax.Array)
    x = np.asarray(x) if foreign else array(name, x, "integers")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be integers, got {x.dtype.name}.")
    held, holds = jnp.iinfo(x.dtype), jnp.iinfo(jnp.int32)
    if held.max > holds.max:
        x = x.clip(max(held.min, holds.min), holds.max)
    return jnp.asarray(x, jnp.int32)


def broadcast_shape(**arrays: jax.Array) -> tuple[int, ...]:
    """The shape that the arguments of these names broadcast to."""
    try:
        return jnp.broadcast_shapes(*(x.shape for x in arrays.values()))
    except ValueError:
        names = " and ".join(f"`{name}`" for name in arrays)
        shapes = " and ".join(str(x.shape) for x in arrays.values())
        raise ValueError(
            f"{names} must have shapes that broadcast, got {shapes}."
        ) from None


def of_shape(name: str, x: jax.Array, shape: tuple[int, ...], why: str) -> jax.Array:
    if x.shape != shape:
        raise ValueError(f"`{name}` must have {why} {shape}, got {x.shape}.")
    return x


def one_of(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"`{name}` must be one of {options}, got {value!r}.")


def boolean(name: str, value: Any, expected: str = "True or False") -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be {expected}, got {value!r}.")
    return bool(value)


def positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
    return int(value)


def scalar(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    positive: bool = False,
) -> Any:
    """A Python float or a scalar array, in the range that `in_range` checks."""
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value}.")
    if not isinstance(value, int | float):
        value = float_array(name, value)
        if value.ndim:
            raise ValueError(f"`{name}` must be a scalar, got shape {value.shape}.")
    value = in_range(name, value, low, high, positive=positive)
    # An int that 32 bits do not hold is no argument of a program.
    return float(value) if is_number(value) else value


def temperature(name: str, value: Any, shape: tuple[int, ...]) -> Any:
    """A Python number, an array that is a scalar or of `shape`, or None for exactly 1.

    It is in `TEMPERATURES`, as `in_range` checks.
    """
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value}.")
    if not isinstance(value, int | float):
        value = float_array(name, value)
        if value.ndim:
            of_shape(name, value, shape, "no shape or the batch shape")
    value = in_range(name, value, *TEMPERATURES)
    return None if is_number(value) and value == 1 else value


def in_range(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    positive: bool = False,
) -> Any:
    """`value`, if all of it is finite and in [low, high], or (0, high] if `positive`.

    If it is not, that is an error; a traced value becomes NaN where it is not.
    """
    if is_known(value):
        x = np.asarray(value, np.float64)
    else:
        # JAX would warn of a number that float16 cannot hold.
        x, high = value, min(high, float(jnp.finfo(value.dtype).max))
    good = (abs(x) < math.inf) & ((x > 0) if positive else (x >= low)) & (x <= high)
    if not is_known(value):
        return jnp.where(good, value, jnp.nan)
    if not good.all():
        if positive:
            expected = "positive and finite"
        else:
            expected = f"{'positive and ' * (low > 0)}in [{low:g}, {high:g}]"
            if high == math.inf:
                expected = f"at least {low:g}"
        raise ValueError(f"`{name}` must be {expected}, got {x[~good].flat[0]}.")
    return value
