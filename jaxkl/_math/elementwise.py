"""Losses that are sums of elementwise terms, of predictions taken as given."""

import functools as ft
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from .._util import checks as check
from .numerics import loss_dtype, near_part, second_order, zero_unless


# Of a loss over axes: an axis, several of them, or None for all.
Axis = int | tuple[int, ...] | None


def elementwise(
    loss: "ElementwiseLoss",
    args: dict[str, ArrayLike],
    axis: Axis,
    where: ArrayLike | None,
) -> jax.Array:
    """The sum of `loss.term` over `axis`, of the arguments that `where` keeps."""
    (x, y), shape, axes, where = broadcast(args, axis, where)
    return _sum(x, y, where, loss=loss, shape=shape, axes=axes)


def broadcast(
    args: dict[str, ArrayLike], axis: Axis, where: ArrayLike | None
) -> tuple[tuple[jax.Array, ...], tuple[int, ...], tuple[int, ...], jax.Array | None]:
    """The arguments as arrays, the shape they broadcast to, the axes counted from 0,
    and the mask as an array."""
    arrays = {name: check.float_array(name, x) for name, x in args.items()}
    shape = check.broadcast_shape(**arrays)
    if where is not None:
        where = check.bool_array("where", where)
        try:
            # An axis of size 1 may grow, as in optax; a new axis would shift `axis`.
            grown = jnp.broadcast_shapes(shape, where.shape)
            if len(grown) != len(shape):
                raise ValueError
        except ValueError:
            msg = f"`where` must broadcast to shape {shape}, got {where.shape}."
            raise ValueError(msg) from None
        shape = grown
    return tuple(arrays.values()), shape, _check_axis(axis, len(shape)), where


def _check_axis(axis: Axis, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    try:
        axes = tuple(map(operator.index, axis if isinstance(axis, tuple) else (axis,)))
    except TypeError:
        msg = f"`axis` must be an int, a tuple of ints or None, got {axis!r}."
        raise TypeError(msg) from None
    if any(not -ndim <= i < ndim for i in axes):
        msg = f"`axis` must be in [-{ndim}, {ndim}) for {ndim} dimensions, got {axis}."
        raise ValueError(msg)
    axes = tuple(i % ndim for i in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"`axis` must not repeat an axis, got {axis}.")
    return axes


@ft.partial(jax.jit, static_argnames=("loss", "shape", "axes"))
def _sum(log_predictions, targets, where, *, loss, shape, axes):
    # Convert before broadcasting, so that the gradient of an operand that is broadcast
    # is summed in float32.
    dtype = loss_dtype(log_predictions, targets)
    log_predictions = jnp.broadcast_to(log_predictions.astype(dtype), shape)
    targets = jnp.broadcast_to(targets.astype(dtype), shape)
    if where is not None:
        # Mask the operands, not the term: 0 · NaN is NaN in the backward pass.
        where = jnp.broadcast_to(where, shape)
        log_predictions = jnp.where(where, log_predictions, -jnp.inf)
        targets = jnp.where(where, targets, loss.zero_target)
    return _total(loss, axes, log_predictions, targets)


class ElementwiseLoss(NamedTuple):
    """Elementwise functions of log-predictions and targets."""

    term: Callable
    slopes: Callable  # the derivative of `term` by each
    zero_target: float  # the target whose term is 0 at a log-prediction of -inf
    # `term` without a select, for predictions that are not -inf: XLA on CPU fuses it
    # with the sum, and holds no array of terms.
    quick: Callable | None = None


# This is a `custom_jvp`, not a `custom_vjp`: optax's losses have a forward mode, which
# a drop-in replacement must not lose. The slopes are plain JAX, so all orders exist.
@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _total(loss, axes, x, y):
    def exact(x, y):
        return jnp.sum(loss.term(x, y), axis=axes)

    if loss.quick is None or x.size == 0:
        return exact(x, y)

    def quick(x, y):
        return jnp.sum(loss.quick(x, y), axis=axes)

    def choose(x, y):
        return jax.lax.cond(jnp.min(x) > -jnp.inf, quick, exact, x, y)

    return jax.lax.platform_dependent(x, y, cpu=choose, default=exact)


def _total_jvp(loss, axes, primals, tangents):
    # The tangent of an input that is not differentiated is a symbolic zero, and costs
    # nothing. An array of zeros would make NaN of an infinite slope.
    pairs = zip(loss.slopes(*primals), tangents, strict=True)
    terms = [slope * d for slope, d in pairs if not isinstance(d, SymbolicZero)]
    tangent = jnp.sum(ft.reduce(operator.add, terms), axis=axes)
    return _total(loss, axes, *primals), tangent


_total.defjvp(_total_jvp, symbolic_zeros=True)


def _log_ratio(log_predictions, targets):
    """`log t - log q`; finite where t = 0, if log q is finite or -inf."""
    zero = targets == 0
    # Replace nothing but -inf, so that a NaN in the predictions reaches the loss.
    drop = zero & (log_predictions == -jnp.inf)
    return jnp.log(jnp.where(zero, 1, targets)) - jnp.where(drop, 0, log_predictions)


def _kl_term(log_predictions, targets):
    return targets * _log_ratio(log_predictions, targets)


def _kl_slopes(log_predictions, targets):
    slope = jnp.where(targets == 0, 0, _log_ratio(log_predictions, targets) + 1)
    return -targets, slope


def _kl_quick(log_predictions, targets):
    return targets * (_finite(jnp.log(targets)) - log_predictions)


def _finite(log):
    """A logarithm of at least -1000, the exponential of which is 0.

    The product of 0 and this is 0, also once a finite number is subtracted from it; the
    lowest of all numbers would overflow there.
    """
    return jnp.maximum(log, -1e3)


KL = ElementwiseLoss(_kl_term, _kl_slopes, 0.0, _kl_quick)


def _log_target_ratio(log_predictions, log_targets):
    """`t`, and `log t - log q` as in `_log_ratio`."""
    targets = jnp.exp(log_targets)
    zero = targets == 0
    drop = zero & (log_predictions == -jnp.inf)
    log_ratio = jnp.where(zero, 0, log_targets) - jnp.where(drop, 0, log_predictions)
    return targets, log_ratio


def _kl_log_targets_term(log_predictions, log_targets):
    targets, log_ratio = _log_target_ratio(log_predictions, log_targets)
    return targets * log_ratio


def _kl_log_targets_slopes(log_predictions, log_targets):
    targets, log_ratio = _log_target_ratio(log_predictions, log_targets)
    return -targets, targets * (log_ratio + 1)


def _kl_log_targets_quick(log_predictions, log_targets):
    return jnp.exp(log_targets) * (_finite(log_targets) - log_predictions)


KL_LOG_TARGETS = ElementwiseLoss(
    _kl_log_targets_term,
    _kl_log_targets_slopes,
    -math.inf,
    _kl_log_targets_quick,
)


def _near_ratio(log_predictions, targets):
    """`r = log q - log t`, where it is small, and `r` there with 0 elsewhere."""
    r = -_log_ratio(log_predictions, targets)
    near, r_near = near_part(r)
    near &= targets != 0
    return r, near, zero_unless(near, r_near)


def _generalized_kl_term(log_predictions, targets):
    r, near, r_near = _near_ratio(log_predictions, targets)
    difference = jnp.exp(log_predictions) - targets
    return jnp.where(near, targets * second_order(r_near), difference - targets * r)


def _generalized_kl_slopes(log_predictions, targets):
    r, near, r_near = _near_ratio(log_predictions, targets)
    difference = jnp.exp(log_predictions) - targets
    slope = jnp.where(near, targets * jnp.expm1(r_near), difference)
    return slope, jnp.where(targets == 0, 0, -r)


GENERALIZED_KL = ElementwiseLoss(_generalized_kl_term, _generalized_kl_slopes, 0.0)
