"""PyTorch's conventions: arguments, warnings, dtypes and reductions of its losses.

The functions that warn are called by public functions, so that `stacklevel=3` is the
user's line.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def check_reduction(reduction):
    """Warns as PyTorch does; `"none"`, `"sum"` or `"mean"` (`"batchmean"` is a sum)."""
    totals = {"none": "none", "sum": "sum", "mean": "mean", "batchmean": "sum"}
    if reduction == "mean":
        warnings.warn(
            '`reduction="mean"` divides by the number of elements, which is not the KL '
            'divergence; `reduction="batchmean"` divides by the batch size, and is.',
            stacklevel=3,
        )
    elif reduction == "elementwise_mean":
        warnings.warn(
            '`reduction="elementwise_mean"` is deprecated, use `reduction="mean"`.',
            stacklevel=3,
        )
        return "mean"
    elif not (isinstance(reduction, str) and reduction in totals):
        raise ValueError(
            f"`reduction` must be one of {tuple(totals)}, got {reduction!r}."
        )
    return totals[reduction]


def legacy_reduction(size_average, reduce):
    for name, value in (("size_average", size_average), ("reduce", reduce)):
        if value is not None:
            _check_bool(name, value, "a bool or None")
    if reduce is not None and not reduce:
        total = "none"
    else:
        total = "mean" if size_average is None or size_average else "sum"
    warnings.warn(
        "`size_average` and `reduce` are deprecated, "
        f'use `reduction="{total}"` instead.',
        stacklevel=3,
    )
    return total


def check_arrays(input, target, log_target) -> tuple[Array, Array]:
    _check_bool("log_target", log_target, "a bool")
    input, target = _as_float("input", input), _as_float("target", target)
    try:
        jnp.broadcast_shapes(input.shape, target.shape)
    except ValueError:
        raise ValueError(
            "`input` and `target` must have shapes that broadcast, got "
            f"{input.shape} and {target.shape}."
        ) from None
    return input, target


def _check_bool(name, value, expected):
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be {expected}, got {value!r}.")


def _as_float(name, x):
    try:
        x = jnp.asarray(x)
        got = x.dtype.name
    except (TypeError, ValueError):
        got = type(x).__name__
    if got not in ("float16", "bfloat16", "float32", "float64"):
        raise TypeError(
            f"`{name}` must be a floating-point array, got {got}. "
            "Supported: float16, bfloat16, float32, float64."
        )
    return x


def result_dtype(input, target):
    # As PyTorch: a 0-d array does not widen one that has dimensions.
    if (input.ndim == 0) != (target.ndim == 0):
        return (input if input.ndim else target).dtype
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(input, target)


def widen(input, target):
    """Both arrays in at least float32, and in their broadcast shape."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(input, target, jnp.float32)
    return jnp.broadcast_arrays(input.astype(dtype), target.astype(dtype))


def reduce_loss(loss, input, total, per_batch):
    if total == "mean":
        # Of nothing: a NaN, of which the derivative by the cotangent is 0.
        loss = jnp.sum(loss) + jnp.nan if loss.size == 0 else jnp.mean(loss)
    elif total == "sum":
        loss = jnp.sum(loss)
    if per_batch and input.ndim > 0:
        loss = loss / jnp.asarray(input.shape[0], loss.dtype)
    return loss
