"""A loss whose arguments are checked, as the user gets it."""

import jax

from ._engine import weighted_loss
from ._operands import LossTerms, Statistics
from ._prepare import Prepared
from ._sharding import sharded_weighted_loss


def evaluate(prepared: Prepared) -> tuple[jax.Array, LossTerms, Statistics | None]:
    """The loss, a scalar or `[...]`, and the engine's terms and statistics."""
    loss, terms, statistics = weighted_terms(prepared)
    if not prepared.spec.reduce:
        loss = sum(jax.tree.leaves(loss)).reshape(prepared.batch_shape)
    return loss, terms, statistics


def weighted_terms(
    prepared: Prepared,
) -> tuple[LossTerms, LossTerms, Statistics | None]:
    """What `weighted_loss` returns, of tokens that may be spread over a mesh."""
    spec, operands, layout, *_ = prepared
    if layout is None:
        return weighted_loss(spec, operands)
    return sharded_weighted_loss(spec, layout, operands)
