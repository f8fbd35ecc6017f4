"""Precision, and the softmax that every loss shares."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


_LOWEST = -1e30  # of logits, less their maximum: e^x is 0 there at any temperature


def loss_dtype(*arrays) -> jnp.dtype:
    """Dtype of statistics and losses: float64 if an array is, else float32."""
    is_double = any(x is not None and x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def zero_unless(condition, x):
    """`x` where `condition`, else an exact 0, whatever `x` holds there."""
    return jnp.where(condition, x, jnp.zeros_like(x))


class Outcomes(NamedTuple):
    """Logarithms of probabilities, with the probabilities: an exponential costs as
    much as all the rest of a divergence."""

    log: jax.Array
    prob: jax.Array

    @classmethod
    def of_log(cls, log):
        return cls(log, jnp.exp(log))

    @classmethod
    def known(cls, log, prob):
        """As a function of `log`, though `prob` is there already."""
        return cls(log, _known_exp(log, prob))


@jax.custom_jvp
def _known_exp(x, exp_x):
    del x
    return exp_x


@_known_exp.defjvp
def _known_exp_jvp(primals, tangents):
    x, exp_x = primals
    return _known_exp(x, exp_x), exp_x * tangents[0]


class Softmax(NamedTuple):
    """Of a tile, all but `lse` `[B, V]`."""

    log: jax.Array
    prob: jax.Array
    lse: jax.Array  # [B]
    shifted: jax.Array  # logits / temperature, less their maximum

    @property
    def outcomes(self):
        return Outcomes(self.log, self.prob)


class Rows(NamedTuple):
    """What makes logits, `[B, V]`, a distribution, `[B]` each."""

    peak: jax.Array  # the largest logit of the vocabulary
    temperature: jax.Array | None = None  # None: 1
    total: jax.Array | None = None  # Σ_v e^shifted; None: not known yet

    def shifted(self, logits):
        """`logits / temperature`, less their maximum.

        It is subtracted before the division, where the difference of two near logits is
        exact; a constant added to all logits of a row then costs no accuracy.
        """
        # Finite, as the second derivative of -inf / T would be NaN. A maximum, not a
        # select: XLA on CPU then fuses all this with the sum.
        x = jnp.maximum(logits - self._finite_peak[:, None], _LOWEST)
        return x if self.temperature is None else x / self.temperature[:, None]

    def softmax(self, logits):
        assert self.total is not None
        x, peak = self.shifted(logits), self._finite_peak
        prob = jnp.exp(x) / self.total[:, None]
        x = jnp.where(logits == -jnp.inf, -jnp.inf, x)
        log_total = jnp.log(self.total)
        if self.temperature is not None:
            peak = peak / self.temperature
        return Softmax(x - log_total[:, None], prob, peak + log_total, x)

    @property
    def _finite_peak(self):
        # A row of -inf only, or one with +inf, has no softmax: NaN comes from `logits`.
        return zero_unless(jnp.abs(self.peak) != jnp.inf, self.peak)


def normalize(vocab, *models) -> list[Rows]:
    """The rows of each `(rows, logits)`, with their total."""
    totals = [jnp.sum(jnp.exp(rows.shifted(x)), axis=-1) for rows, x in models]
    pairs = zip(models, vocab.sum(*totals), strict=True)
    return [rows._replace(total=total) for (rows, _), total in pairs]


def entropy(x: Outcomes):
    """`-Σ_v p log p` with `0 log 0 = 0`, `[B]`, from `[B, V]`."""
    return -jnp.sum(x.prob * zero_unless(x.log > -jnp.inf, x.log), axis=-1)
