r"""The softmax that every loss shares, and the log-ratio of two of them.

With $z = s / T$, $\log q = z - \mathrm{lse}(z)$. The maximum of a row and the sum of
its exponentials are the statistics that turn logits into a softmax.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from ._numerics import near_part, tanh_excess, zero_unless
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


def normalize(vocab: Vocabulary, models: Sequence[Model]) -> list[Model]:
    """The models with their sums of exponentials."""
    return _with_sums(models, vocab.psum(*_sums_of_exp(models)))


def normalize_pair(
    vocab: Vocabulary,
    p: Model,
    q: Model,
    others: Sequence[Model],
    *,
    same_temperature: bool,
) -> tuple[list[Model], jax.Array]:
    """`normalize` of all models, and `log(Z / U)` of the sums of `p` and `q`, `[B]`.

    With `u` and `z` the shifted logits of `p` and `q`, `U = Σ e^u` and `Z = Σ e^z`,
    it is computed as

        log1p(Δ / U) or -log1p(-Δ / Z),   Δ = Σ (e^z - e^u),

    and the terms of Δ without cancellation. Its error is relative to itself, not to
    log Z and log U. So log-ratios keep their digits where the models are near each
    other.
    """
    models = [p, q, *others]
    z_less_u = _difference_of_shifted(p, q, same_temperature)
    delta = jnp.sum(_exp_difference(p.shifted(), q.shifted(), z_less_u), axis=-1)
    *sums, delta = vocab.psum(*_sums_of_exp(models), delta)
    up = delta > 0
    smaller = jnp.where(up, sums[0], sums[1])
    log_sum_ratio = jnp.log1p(jnp.abs(delta) / smaller)
    return _with_sums(models, sums), jnp.where(up, log_sum_ratio, -log_sum_ratio)


def _sums_of_exp(models: Sequence[Model]) -> list[jax.Array]:
    return [jnp.sum(jnp.exp(model.shifted()), axis=-1) for model in models]


def _with_sums(models: Sequence[Model], sums: Sequence[jax.Array]) -> list[Model]:
    return [
        Model(logits, stats._replace(sum_exp=sum_exp))
        for (logits, stats), sum_exp in zip(models, sums, strict=True)
    ]


def _difference_of_shifted(p: Model, q: Model, same_temperature: bool) -> jax.Array:
    """`z - u`, the shifted logits of `q` less those of `p`."""
    if same_temperature:
        # The differences are exact where the logits are near.
        difference = q.stats.less_max(q.logits) - p.stats.less_max(p.logits)
        return q.stats.over_temperature(difference)
    # A compiler fuses the difference of two quotients so that it rounds one and not
    # the other, and equal models would differ. It does not fuse through a maximum.
    u, z = p.shifted(), q.shifted()
    lowest = jnp.finfo(u.dtype).min
    return jnp.maximum(z, lowest) - jnp.maximum(u, lowest)


def log_ratio(
    p: Model, q: Model, log_sum_ratio: jax.Array, *, same_temperature: bool
) -> jax.Array:
    """`log q - log p`, `[B, V]`; `log_sum_ratio` is what `normalize_pair` found."""
    ratio = _difference_of_shifted(p, q, same_temperature) - log_sum_ratio[:, None]
    absent_p, absent_q = p.logits == -jnp.inf, q.logits == -jnp.inf
    ratio = jnp.where(absent_q, -jnp.inf, ratio)
    return jnp.where(absent_p, jnp.where(absent_q, 0, jnp.inf), ratio)


def _exp_difference(u: jax.Array, z: jax.Array, z_less_u: jax.Array) -> jax.Array:
    """`e^z - e^u`, to the last digits where they are near."""
    near, r = near_part(z_less_u)
    exp_u, exp_z = jnp.exp(u), jnp.exp(z)
    series = (exp_z + exp_u) * ((0.5 + tanh_excess(r)) * r)
    return jnp.where(near, series, exp_z - exp_u)
