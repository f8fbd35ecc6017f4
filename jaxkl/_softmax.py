r"""The softmax that every loss shares, and the log-ratio of two of them.

With $z = s / T$, $\log q = z - \mathrm{lse}(z)$. The maximum of a row and the sum of
its exponentials are the statistics that turn logits into a softmax.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from ._numerics import is_near, second_order, zero_unless
from ._vocabulary import Vocabulary


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
        # XLA on CPU fuses `maximum` with the sum that follows, but not a select.
        return jnp.maximum(logits - self._finite_max[:, None], self._lowest(logits))

    def over_temperature(self, x: jax.Array) -> jax.Array:
        return x if self.temperature is None else x / self.temperature[:, None]

    def softmax(self, logits: jax.Array) -> Softmax:
        assert self.sum_exp is not None
        x, largest = self.shifted(logits), self._finite_max
        prob = jnp.exp(x) / self.sum_exp[:, None]
        x = jnp.where(logits == -jnp.inf, -jnp.inf, x)
        log_sum = jnp.log(self.sum_exp)
        if self.temperature is not None:
            largest = largest / self.temperature
        return Softmax(x - log_sum[:, None], prob, largest + log_sum, x)

    @property
    def _finite_max(self):
        # A row of -inf alone, or one with +inf, has no softmax. Its NaN comes from the
        # logits themselves.
        return zero_unless(jnp.abs(self.max) != jnp.inf, self.max)

    def _lowest(self, logits):
        """A finite number that stands for -inf, as the quotient of -inf by T has a
        second derivative of NaN.

        It stays finite when it is divided by T³, and its exponential is 0.
        """
        lowest = jnp.finfo(logits.dtype).min / 16
        if self.temperature is None:
            return lowest
        T = jax.lax.stop_gradient(self.temperature)[:, None]
        return lowest * jnp.minimum(T * T * T, 1)


# A model of a tile: the statistics of its rows, and its logits, `[B, V]`.
Model = tuple[SoftmaxStats, jax.Array]


def normalize(vocab: Vocabulary, models: Sequence[Model]) -> list[SoftmaxStats]:
    """The statistics of each model, with its sum of exponentials."""
    return _with_sums(models, vocab.psum(*_sums_of_exp(models)))


def normalize_pair(
    vocab: Vocabulary,
    p: Model,
    q: Model,
    others: Sequence[Model],
    *,
    same_temperature: bool,
) -> tuple[list[SoftmaxStats], jax.Array]:
    """`normalize` of all models, and `log(Z / U)` of the sums of `p` and `q`, `[B]`.

    With `u` and `z` the shifted logits of `p` and `q`, `U = Σ e^u` and `Z = Σ e^z`,
    it is computed as

        log1p(Δ / U) or -log1p(-Δ / Z),   Δ = Σ (e^z - e^u),

    where no term of Δ cancels. Its error is relative to itself, not to log Z and log U.
    So log-ratios keep their digits where the two models are near each other.
    """
    models = [p, q, *others]
    u, z = (stats.shifted(logits) for stats, logits in (p, q))
    difference = _exp_difference(u, z, _difference_of_shifted(p, q, same_temperature))
    difference = jnp.sum(difference, axis=-1)
    *sums, difference = vocab.psum(*_sums_of_exp(models), difference)
    up = difference > 0
    smaller = jnp.where(up, sums[0], sums[1])
    log_ratio = jnp.log1p(jnp.abs(difference) / smaller)
    return _with_sums(models, sums), jnp.where(up, log_ratio, -log_ratio)


def _sums_of_exp(models):
    return [jnp.sum(jnp.exp(stats.shifted(x)), axis=-1) for stats, x in models]


def _with_sums(models, sums):
    pairs = zip(models, sums, strict=True)
    return [stats._replace(sum_exp=total) for (stats, _), total in pairs]


def _difference_of_shifted(p, q, same_temperature):
    """`z - u`, the shifted logits of `q` less those of `p`."""
    (p_stats, t), (q_stats, s) = p, q
    if same_temperature:
        # The differences are exact where the logits are near.
        return q_stats.over_temperature(q_stats.less_max(s) - p_stats.less_max(t))
    # A compiler fuses the difference of two quotients so that it rounds one and not
    # the other, and equal models would differ. It does not fuse through a maximum.
    u, z = p_stats.shifted(t), q_stats.shifted(s)
    lowest = jnp.finfo(u.dtype).min
    return jnp.maximum(z, lowest) - jnp.maximum(u, lowest)


def log_ratio(
    p: Model, q: Model, log_sum_ratio: jax.Array, *, same_temperature: bool
) -> jax.Array:
    """`log q - log p`, `[B, V]`; `log_sum_ratio` is what `normalize_pair` found."""
    (_, t), (_, s) = p, q
    shifted = _difference_of_shifted(p, q, same_temperature)
    ratio = jnp.where(s == -jnp.inf, -jnp.inf, shifted - log_sum_ratio[:, None])
    return jnp.where(t == -jnp.inf, jnp.where(s == -jnp.inf, 0, jnp.inf), ratio)


def _exp_difference(u, z, shift):
    """`e^z - e^u`, to the last digits where they are near; `shift` is `z - u`."""
    near, r = is_near(shift)
    exp_u = jnp.exp(u)
    return jnp.where(near, exp_u * (r + second_order(r)), jnp.exp(z) - exp_u)
