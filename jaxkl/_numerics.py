"""Precision, and the softmax that every loss shares."""

import math
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
        return self.over_temperature(self.less_peak(logits))

    def less_peak(self, logits):
        # A maximum, not a select: XLA on CPU then fuses all this with the sum.
        return jnp.maximum(logits - self._finite_peak[:, None], self._lowest(logits))

    def over_temperature(self, x):
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

    def _lowest(self, logits):
        """In place of -inf, whose quotient by T has a second derivative of NaN: a
        number that stays finite, over T³ too, and of which e^x is 0."""
        lowest = jnp.finfo(logits.dtype).min / 16
        if self.temperature is None:
            return lowest
        T = jax.lax.stop_gradient(self.temperature)[:, None]
        return lowest * jnp.minimum(T * T * T, 1)


def normalize(vocab, models) -> dict[str, Rows]:
    """The rows of each `(rows, logits)`, by name, with their total."""
    return _with_totals(models, vocab.sum(*_totals(models)))


def normalize_pair(vocab, models, *, same_temperature):
    """The same, and `log(Z / U)` of the totals of the models "p" and "q", `[B]`.

    With `u` and `z` their shifted logits, `U = Σ e^u` and `Z = Σ e^z`, it is

        log1p(Δ / U) or -log1p(-Δ / Z),   Δ = Σ (e^z - e^u),

    where no term of Δ cancels. Its digits are relative to itself, not to the logarithms
    of the totals, so that log-ratios keep theirs where the models are near each other.
    """
    p, q = models["p"], models["q"]
    u, z = (rows.shifted(logits) for rows, logits in (p, q))
    difference = _exp_difference(u, z, _shift(p, q, same_temperature))
    difference = jnp.sum(difference, axis=-1)
    *totals, difference = vocab.sum(*_totals(models), difference)
    rows = _with_totals(models, totals)
    up = difference > 0
    smaller = jnp.where(up, rows["p"].total, rows["q"].total)
    scale = jnp.log1p(jnp.abs(difference) / smaller)
    return rows, jnp.where(up, scale, -scale)


def _totals(models):
    shifted = [rows.shifted(logits) for rows, logits in models.values()]
    return [jnp.sum(jnp.exp(x), axis=-1) for x in shifted]


def _with_totals(models, totals):
    pairs = zip(models.items(), totals, strict=True)
    return {name: rows._replace(total=total) for (name, (rows, _)), total in pairs}


def _shift(p, q, same_temperature):
    """The difference of the shifted logits, `z - u`."""
    (p_rows, t), (q_rows, s) = p, q
    if same_temperature:
        # Exact where the logits are near.
        return q_rows.over_temperature(q_rows.less_peak(s) - p_rows.less_peak(t))
    # Compilers fuse the difference of two quotients, and then it is not 0 where they
    # are equal: they round one and not the other. Not so behind a maximum.
    u, z = p_rows.shifted(t), q_rows.shifted(s)
    lowest = jnp.finfo(u.dtype).min
    return jnp.maximum(z, lowest) - jnp.maximum(u, lowest)


def log_ratio(p, q, log_scale, *, same_temperature):
    """`log q - log p` of two `(rows, logits)`, `[B, V]`."""
    (_, t), (_, s) = p, q
    ratio = _shift(p, q, same_temperature) - log_scale[:, None]
    ratio = jnp.where(s == -jnp.inf, -jnp.inf, ratio)
    return jnp.where(t == -jnp.inf, jnp.where(s == -jnp.inf, 0, jnp.inf), ratio)


def _exp_difference(u, z, shift):
    """`e^z - e^u`, to the last digits where they are near; `shift` is `z - u`."""
    near, r = is_near(shift)
    exp_u = jnp.exp(u)
    return jnp.where(near, exp_u * (r + second_order(r)), jnp.exp(z) - exp_u)


NEAR = 0.5  # |r| below which `e^r - 1 - r` is summed as a series


def is_near(ratio, limit=NEAR):
    """Whether a log-ratio is small, and its value there."""
    near = jnp.abs(ratio) < limit
    return near, zero_unless(near, ratio)


def series(r, coefficient):
    """`Σ_k coefficient(k) r^k / (k + 2)!`, to the last bits for `|r| < NEAR`."""
    terms = 8 if r.dtype == jnp.float32 else 15
    total = jnp.zeros_like(r)
    for k in reversed(range(terms)):
        total = total * r + coefficient(k) / math.factorial(k + 2)
    return total


def second_order(r):
    """`e^r - 1 - r`, to the last bits for `|r| < NEAR`."""
    return r * r * series(r, lambda k: 1.0)


def sums(vocab, f, prob):
    """`Σ_v f`, and that of `f` and of `prob` without a column of more than half."""
    small = prob <= 0.5
    others = zero_unless(small, f), zero_unless(small, prob)
    return vocab.sum(*_sum_rows(f, *others))


@jax.custom_jvp
def _sum_rows(*arrays):
    """The sum of each over its last axis. XLA on CPU reads them in one pass so."""
    zeros = (jnp.zeros((), arrays[0].dtype),) * len(arrays)
    add = lambda xs, ys: tuple(x + y for x, y in zip(xs, ys, strict=True))
    return tuple(jax.lax.reduce(arrays, zeros, add, (arrays[0].ndim - 1,)))


@_sum_rows.defjvp
def _sum_rows_jvp(primals, tangents):
    return _sum_rows(*primals), tuple(jnp.sum(d, axis=-1) for d in tangents)


def centred(f, prob, total, f_others, prob_others):
    """`f - prob · Σ_v f`.

    In a column of more than half this is `f · (1 - prob) - prob · Σ_others f`, as of a
    nearly certain one the difference of two large numbers would be rounding.
    """
    f_others, prob_others = f_others[:, None], prob_others[:, None]
    of_others = f * prob_others - prob * f_others
    return jnp.where(prob > 0.5, of_others, f - prob * total[:, None])


def entropy(x: Outcomes):
    """`-Σ_v p log p` with `0 log 0 = 0`, `[B]`, from `[B, V]`."""
    return -jnp.sum(x.prob * zero_unless(x.log > -jnp.inf, x.log), axis=-1)
