r"""The softmax that every loss shares.

With $z = s / T$, $\log q = z - \mathrm{lse}(z)$. The maximum of a row and the sum of
its exponentials are the statistics that turn logits into a softmax.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from .numerics import zero_unless


class Outcomes(NamedTuple):
    """Log-probabilities and probabilities of the same outcomes.

    They go together because an exponential costs as much as all the rest of a
    divergence.
    """

    log: jax.Array
    prob: jax.Array

    @classmethod
    def of_log(cls, log: jax.Array) -> Self:
        return cls(log, jnp.exp(log))

    @classmethod
    def known(cls, log: jax.Array, prob: jax.Array) -> Self:
        """`of_log(log)` to differentiation, with `prob` as the known value of
        `exp(log)`."""
        return cls(log, _known_exp(log, prob))


@jax.custom_jvp
def _known_exp(x, exp_x):
    del x
    return exp_x


@_known_exp.defjvp
def _known_exp_jvp(primals, tangents):
    x, exp_x = primals
    return _known_exp(x, exp_x), exp_x * tangents[0]


def entropy(x: Outcomes) -> jax.Array:
    """`-Σ_v p log p` with `0 log 0 = 0`, `[B]`, from `[B, V]`."""
    return -jnp.sum(x.prob * zero_unless(x.log > -jnp.inf, x.log), axis=-1)


class Softmax(NamedTuple):
    """The softmax of a tile: `[B, V]` each, but for `lse`, `[B]`."""

    log: jax.Array
    prob: jax.Array
    lse: jax.Array
    shifted: jax.Array  # logits / temperature, less their maximum

    @property
    def outcomes(self) -> Outcomes:
        return Outcomes(self.log, self.prob)


def finite_max(largest: jax.Array) -> jax.Array:
    """What is subtracted from the logits of a row, `[B]`.

    A row of -inf alone, or one with +inf, has no softmax. Its NaN comes from the logits
    themselves.
    """
    return zero_unless(jnp.abs(largest) != jnp.inf, largest)


class SoftmaxStats(NamedTuple):
    """The statistics, `[B]` each, that turn the logits of a row into its softmax."""

    max: jax.Array  # the largest logit of the vocabulary
    temperature: jax.Array | None = None  # None: 1
    sum_exp: jax.Array | None = None  # Σ_v e^shifted; None: not known yet

    def shifted(self, logits: jax.Array) -> jax.Array:
        """`logits / temperature`, less their maximum, `[B, V]`.

        The maximum is subtracted before the division, where the difference of two near
        logits is exact. So a constant added to all logits of a row costs no accuracy.
        """
        return self.over_temperature(self.less_max(logits))

    def less_max(self, logits: jax.Array) -> jax.Array:
        # XLA contracts `a * b - max` into one rounding, and the largest logit of a
        # program that ends in a product would differ from its own maximum. It does not
        # contract through a maximum, which it also fuses with the sum that follows.
        lowest = self._lowest(logits)
        largest = jnp.maximum(self._finite_max[:, None], lowest)
        return jnp.maximum(logits, lowest) - largest

    def over_temperature(self, x: jax.Array) -> jax.Array:
        """Of `[B, V]` or `[B]`."""
        if self.temperature is None:
            return x
        # One quotient in a row, not one in each column: a TPU takes ten instructions.
        return x * jnp.expand_dims(1 / self.temperature, range(1, x.ndim))

    @property
    def total(self) -> jax.Array:
        """`Σ_v e^shifted`, once it is known."""
        assert self.sum_exp is not None
        return self.sum_exp

    def softmax(self, logits: jax.Array) -> Softmax:
        x = self.shifted(logits)
        prob = jnp.exp(x) * (1 / self.total)[:, None]
        x = jnp.where(logits == -jnp.inf, -jnp.inf, x)
        return Softmax(x - jnp.log(self.total)[:, None], prob, self.lse, x)

    @property
    def lse(self) -> jax.Array:
        largest = self._finite_max
        if self.temperature is not None:
            largest = largest / self.temperature
        return largest + jnp.log(self.total)

    @property
    def _finite_max(self):
        return finite_max(self.max)

    def _lowest(self, logits: jax.Array) -> Any:
        """A finite number that stands for -inf, as the quotient of -inf by T has a
        second derivative of NaN.

        It stays finite when it is divided by T³, and its exponential is 0.
        """
        lowest = jnp.finfo(logits.dtype).min / 16
        if self.temperature is None:
            return lowest
        T = jax.lax.stop_gradient(self.temperature)[:, None]
        return lowest * jnp.minimum(T * T * T, 1)


class Model(NamedTuple):
    """The logits of a tile, `[B, V]`, and their statistics."""

    logits: jax.Array
    stats: SoftmaxStats

    def shifted(self) -> jax.Array:
        return self.stats.shifted(self.logits)

    def softmax(self) -> Softmax:
        return self.stats.softmax(self.logits)
