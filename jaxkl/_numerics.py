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
    shifted: jax.Array  # [B, V]: logits / temperature, less their maximum


def log_softmax(vocab, *models) -> list[LogSoftmax]:
    """Of each `(logits, peak, temperature)`: log-probabilities, `[B, V]`, of
    `logits / temperature`, and their normaliser, `[B]`.

    `peak`, `[B]`, is the largest logit of the vocabulary. It is subtracted before the
    division, where the difference of two near logits is exact; a constant added to all
    logits of a row then costs no accuracy.
    """
    shifted, peaks = [], []
    for logits, peak, temperature in models:
        # A row of -inf only, or one with +inf, has no softmax: NaN comes from `logits`.
        peak = jnp.where(jnp.abs(peak) == jnp.inf, jnp.zeros_like(peak), peak)
        x = logits - peak[:, None]
        if temperature is not None:
            # Only the finite entries: the second derivative of -inf / T would be NaN.
            absent = x == -jnp.inf
            tempered = zero_unless(~absent, x) / temperature[:, None]
            x, peak = jnp.where(absent, -jnp.inf, tempered), peak / temperature
        shifted.append(x)
        peaks.append(peak)
    sums = vocab.sum(*(jnp.sum(jnp.exp(x), axis=-1) for x in shifted))
    return [
        LogSoftmax(x - jnp.log(total)[:, None], peak + jnp.log(total), x)
        for x, peak, total in zip(shifted, peaks, sums, strict=True)
    ]


def entropy(log_probs):
    """`-Σ_v p log p` with `0 log 0 = 0`, `[B]`, from `[B, V]`."""
    finite = zero_unless(log_probs > -jnp.inf, log_probs)
    return -jnp.sum(jnp.exp(log_probs) * finite, axis=-1)
