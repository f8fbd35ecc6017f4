"""PyTorch's conventions: arguments, warnings, dtypes and reductions of its losses.

The functions that warn are called by public functions: `stacklevel=3` is the line of
the user.
"""

import warnings

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._util import checks as check


def check_reduction(reduction: str) -> str:
    """`"none"`, `"sum"` (also for `"batchmean"`) or `"mean"`; warns as PyTorch does."""
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


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    for name, value in (("size_average", size_average), ("reduce", reduce)):
        if value is not None:
            check.boolean(name, value, "a bool or None")
    if reduce is not None and not reduce:
        over_elements = "none"
    else:
        over_elements = "mean" if size_average is None or size_average else "sum"
    warnings.warn(
        "`size_average` and `reduce` are deprecated, "
        f'use `reduction="{over_elements}"` instead.',
        stacklevel=3,
    )
    return over_elements


def check_arrays(
    input: ArrayLike, target: ArrayLike, log_target: bool
) -> tuple[Array, Array]:
    check.boolean("log_target", log_target, "a bool")
    input, target = _as_float("input", input), _as_float("target", target)
    check.broadcast_shape(input=input, target=target)
    return input, target


def _as_float(name: str, x: ArrayLike) -> Array:
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError):
        array, got = None, type(x).__name__
    else:
        got = array.dtype.name
    if array is None or got not in check.FLOAT_DTYPES:
        raise TypeError(
            f"`{name}` must be a floating-point array, got {got}. "
            f"Supported: {', '.join(check.FLOAT_DTYPES)}."
        )
    return array


def result_dtype(input: Array, target: Array) -> jnp.dtype:
    # As in PyTorch, a 0-d array does not widen one that has dimensions.
    if (input.ndim == 0) != (target.ndim == 0):
        return (input if input.ndim else target).dtype
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(input, target)


def promote(input: Array, target: Array) -> list[Array]:
    """Both arrays in at least float32, and in the shape that they broadcast to."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(input, target, jnp.float32)
    return list(jnp.broadcast_arrays(input.astype(dtype), target.astype(dtype)))


def reduce_loss(
    loss: Array, input: Array, over_elements: str, per_batch: bool
) -> Array:
    if over_elements == "mean":
        # The mean of nothing is a NaN whose derivative is 0.
        loss = jnp.sum(loss) + jnp.nan if loss.size == 0 else jnp.mean(loss)
    elif over_elements == "sum":
        loss = jnp.sum(loss)
    if per_batch and input.ndim > 0:
        loss = loss / jnp.asarray(input.shape[0], loss.dtype)
    return loss
