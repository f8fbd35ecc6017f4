"""A loss whose arguments are checked, as the user gets it."""

import functools as ft

import jax
import jax.numpy as jnp

from ._engine import Outputs, weighted_loss
from ._operands import LossTerms, Statistics
from ._prepare import Prepared
from ._sharding import sharded_weighted_loss


def evaluate(prepared: Prepared) -> tuple[jax.Array, LossTerms, Statistics | None]:
    """The loss, a scalar or `[...]`, and the engine's terms and statistics."""
    loss, terms, statistics = weighted_terms(prepared)
    if prepared.factor is not None:
        loss = loss * prepared.factor
    if not prepared.spec.reduce:
        loss = ft.reduce(jnp.add, jax.tree.leaves(loss)).reshape(prepared.batch_shape)
    return loss, terms, statistics


def weighted_terms(prepared: Prepared) -> Outputs:
    """What `weighted_loss` returns, of tokens that may be spread over a mesh."""
    spec, operands, layout, *_ = prepared
    if layout is None:
        return weighted_loss(spec, operands)
    # Without `jit`, each step would be a program of all devices, and they may wait for
    # each other for ever.
    with jax.disable_jit(False):
        return sharded_weighted_loss(spec, layout, operands)
