"""Precision, and the softmax that every loss shares."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def loss_dtype(*arrays) -> jnp.dtype:
    """Dtype of statistics and losses: float64 if an array is, else float32."""
    is_double = any(x is not None and x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def zero_unless(condition, x):
    """`x` where `condition`, else an exact 0, whatever `x` holds there."""
    return jnp.where(condition, x, jnp.zeros_like(x))


class LogSoftmax(NamedTuple):
    log_probs: jax.Array  # [B, V]
    lse: jax.Array  # [B]


def log_softmax(logits, temperature, vocab, peak=None) -> LogSoftmax:
    """Log-probabilities of `logits / temperature`, `[B, V]`, and the normaliser, `[B]`.

    The maximum is subtracted before the division, where the difference of two near
    logits is exact; a constant added to all logits of a row then costs no accuracy.
    `peak`, `[B]`, is that maximum over the vocabulary, if it is known.
    """
    if peak is None:
        (peak,) = vocab.max(jnp.max(logits, axis=-1))
    # A row of -inf only, or one with +inf, has no softmax: NaN comes from `logits`.
    peak = jnp.where(jnp.abs(peak) == jnp.inf, jnp.zeros_like(peak), peak)
    shifted = logits - peak[:, None]
    if temperature is not None:
        # Only the finite entries: the second derivative of -inf / T would be NaN.
        absent = shifted == -jnp.inf
        tempered = zero_unless(~absent, shifted) / temperature[:, None]
        shifted, peak = jnp.where(absent, -jnp.inf, tempered), peak / temperature
    log_sum = jnp.log(vocab.sum(jnp.sum(jnp.exp(shifted), axis=-1)))
    return LogSoftmax(shifted - log_sum[:, None], peak + log_sum)


def entropy(log_probs):
    """`-Σ_v p log p` with `0 log 0 = 0`, `[B]`, from `[B, V]`."""
    finite = zero_unless(log_probs > -jnp.inf, log_probs)
    return -jnp.sum(jnp.exp(log_probs) * finite, axis=-1)
