"""Losses that are sums of elementwise terms, of predictions taken as given."""

import functools as ft
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from . import _checks as check
from ._numerics import is_near, loss_dtype, second_order, zero_unless


def elementwise(loss, args, axis, where):
    """Validates, and sums `loss.term` over `axis` where `where` holds."""
    (x, y), shape, axes, where = broadcast(args, axis, where)
    return _sum(x, y, where, loss=loss, shape=shape, axes=axes)


def broadcast(args, axis, where):
    """The arguments as arrays, the shape they broadcast to, the axes counted from 0."""
    args = {name: check.float_array(name, x) for name, x in args.items()}
    try:
        shape = jnp.broadcast_shapes(*(x.shape for x in args.values()))
    except ValueError:
        names = " and ".join(f"`{name}`" for name in args)
        shapes = " and ".join(str(x.shape) for x in args.values())
        msg = f"{names} must have shapes that broadcast, got {shapes}."
        raise ValueError(msg) from None
    if where is not None:
        where = check.array("where", where, "bools")
        if where.dtype != bool:
            raise TypeError(f"`where` must be bool, got {where.dtype}.")
        try:
            # An axis of size 1 may grow, as in optax; a new one would shift `axis`.
            grown = jnp.broadcast_shapes(shape, where.shape)
            if len(grown) != len(shape):
                raise ValueError
        except ValueError:
            msg = f"`where` must broadcast to shape {shape}, got {where.shape}."
            raise ValueError(msg) from None
        shape = grown
    return tuple(args.values()), shape, _check_axis(axis, len(shape)), where


def _check_axis(axis, ndim):
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
    # Convert before broadcasting: a broadcast operand's gradient is summed in float32.
    dtype = loss_dtype(log_predictions, targets)
    log_predictions = jnp.broadcast_to(log_predictions.astype(dtype), shape)
    targets = jnp.broadcast_to(targets.astype(dtype), shape)
    if where is not None:
        # The operands, not the term: 0 * NaN is NaN in the backward pass.
        where = jnp.broadcast_to(where, shape)
        log_predictions = jnp.where(where, log_predictions, -jnp.inf)
        targets = jnp.where(where, targets, loss.zero_target)
    return _total(loss, axes, log_predictions, targets)


class _Loss(NamedTuple):
    """Elementwise functions of log-predictions and targets."""

    term: Callable
    slopes: Callable  # the derivative of `term` by each
    zero_target: float  # beside a log-prediction of `-inf`: a term of 0
    # `term` without a select, if no prediction is `-inf`: XLA on CPU fuses it with the
    # sum, and holds no array of terms.
    quick: Callable | None = None


# It has a `custom_jvp`, not a `custom_vjp`: optax's losses have a forward mode and a
# drop-in may not lose it. The slopes are plain JAX, so all orders exist.
@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _total(loss, axes, x, y):
    total = lambda f: lambda x, y: jnp.sum(f(x, y), axis=axes)
    exact = total(loss.term)
    if loss.quick is None or x.size == 0:
        return exact(x, y)
    quick = total(loss.quick)
    choose = lambda x, y: jax.lax.cond(jnp.min(x) > -jnp.inf, quick, exact, x, y)
    return jax.lax.platform_dependent(x, y, cpu=choose, default=exact)


def _total_jvp(loss, axes, primals, tangents):
    # An input that is not differentiated comes as a symbolic zero, and costs nothing.
    # Nor does it make a NaN, as 0 would if its slope is infinite.
    pairs = zip(loss.slopes(*primals), tangents, strict=True)
    terms = [slope * d for slope, d in pairs if not isinstance(d, SymbolicZero)]
    tangent = jnp.sum(ft.reduce(operator.add, terms), axis=axes)
    return _total(loss, axes, *primals), tangent


_total.defjvp(_total_jvp, symbolic_zeros=True)


def _log_ratio(log_predictions, targets):
    """log t - log q; finite where t = 0, if log q is finite or -inf."""
    zero = targets == 0
    # Only -inf is replaced, so that NaN in the predictions still reaches the loss.
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
    """At least -1000, of which the exponential is 0: times 0 it is 0, and so is it less
    any finite number, which the lowest of all numbers would overflow."""
    return jnp.maximum(log, -1e3)


KL = _Loss(_kl_term, _kl_slopes, 0.0, _kl_quick)


def _log_target_ratio(log_predictions, log_targets):
    """t, and log t - log q as `_log_ratio`."""
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


KL_LOG_TARGETS = _Loss(
    _kl_log_targets_term,
    _kl_log_targets_slopes,
    -math.inf,
    _kl_log_targets_quick,
)


def _near_ratio(log_predictions, targets):
    """r = log q - log t, where it is small, and r with the other places zeroed."""
    r = -_log_ratio(log_predictions, targets)
    near, r_near = is_near(r)
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


GENERALIZED_KL = _Loss(_generalized_kl_term, _generalized_kl_slopes, 0.0)
