"""Values and gradients of every loss, with all its arguments at once."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

import jaxkl.reference

from .cases import CATALOGUE, rarely
from .registry import check, LOSSES, over_losses, without_tokens


QUICK = (
    "logits", "head", "function", "head, logits", "logits, bucket", "logits, drop",
    "cross_entropy of logits", "cross_entropy of head", "log_probs of logits",
    "log_probs of head", "log_probs of function", "moving js_normalized",
)  # fmt: skip
# They have no reduction.
LOG_PROBS = [x for x in LOSSES if x.startswith("log_probs")]


@over_losses(*QUICK)
def test_match_the_oracle(rng, loss):
    """More columns than the vocabulary has, and a last tile that is not full."""
    options = {} if loss.function == "token_log_probs" else dict(reduction="none")
    if "head" in loss.source or "function" in loss.source:
        options["tile"] = 4
    check(loss, rng, loss.make(rng, (3, 5), 11, pad=2), vocab_size=11, **options)


@over_losses("logits", "head", "cross_entropy of head", without=LOG_PROBS)
@pytest.mark.parametrize("reduction", ["mean", *rarely("sum", 7.5)])
def test_reductions(rng, loss, reduction):
    """A number stands for a mean with this normalizer."""
    more = dict(reduction=reduction)
    if not isinstance(reduction, str):
        more = dict(normalizer=jnp.float32(reduction))
    check(loss, rng, loss.make(rng, (7,), 11), **more)


@over_losses("log_probs of head", slow=("logits", "head", "function", "head, bucket"))
def test_one_temperature_of_all_tokens(rng, loss):
    batch = loss.make(rng, (3, 5), 11).map(lambda _: jnp.float32(1.7), "temperature")
    check(loss, rng, batch)


@over_losses("logits", "head, bucket", "cross_entropy of head", "log_probs of function")
def test_of_the_reference(rng, loss):
    """Where a token that does not count holds NaN."""
    batch, spoilt = without_tokens(loss.make(rng, (5, 3), 11, pad=2), jnp.nan)
    options = dict(module=jaxkl.reference, vocab_size=11, tol=(1e-5, 2e-5))
    check(loss, rng, spoilt, exact=batch, **options)


@over_losses(
    "head", "head, conditional",
    slow=("logits", "function", "logits, bucket", "logits, uniform"),
)  # fmt: skip
@pytest.mark.parametrize("divergence", ["user", *rarely(*CATALOGUE)])
def test_divergences(rng, loss, divergence):
    """Of tiles and of lists, whose tests elsewhere have the forward KL."""
    loss = replace(loss, divergence=divergence)
    tile = {} if loss.source.startswith("logits") else dict(tile=2)
    check(loss, rng, loss.make(rng, (7,), 11), **tile)
