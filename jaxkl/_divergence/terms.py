r"""Elementwise terms of which the divergences are made, without cancellation.

With $r = \log q - \log p$, the textbook integrand of $\mathrm{KL}(p \,\|\, q)$ is
$-p\,r$: terms of both signs and of first order in $r$, whose sum is of second order.
Near student = teacher a float32 sum of them is noise. As $\sum_v (q_v - p_v) = 0$,

$$ \mathrm{KL}(p \,\|\, q) = \sum_v p_v\,(e^{r_v} - 1 - r_v), $$

where every term is non-negative and of second order. All terms here have that form.
They are never negative, relatively accurate near student = teacher, and exactly 0 with
a zero gradient where the two are equal. We write out the derivatives, because autodiff
of the branches would cancel again. Values and derivatives obey `0 log 0 = 0`.
"""

import functools as ft
import math

import jax
import jax.numpy as jnp

from .._math.numerics import (
    Economized,
    NEAR,
    near_part,
    polynomial,
    tanh_excess,
    tanh_taylor,
    zero_unless,
)
from .._math.softmax import Outcomes


def log_ratio_of(p: Outcomes, q: Outcomes) -> jax.Array:
    """`log q - log p`; it is 0 for an outcome that neither model has."""
    absent = (p.log == -jnp.inf) & (q.log == -jnp.inf)
    return zero_unless(~absent, q.log - p.log)


@jax.custom_jvp
def known_ratio(log_p, log_q, ratio):
    """`ratio`, which is known better than as `log_q - log_p`, the difference of two
    rounded logarithms; to differentiation it is that."""
    del log_p, log_q
    return ratio


@known_ratio.defjvp
def _known_ratio_jvp(primals, tangents):
    d_log_p, d_log_q, _ = tangents
    return known_ratio(*primals), d_log_q - d_log_p


def finite(r: jax.Array) -> jax.Array:
    limit = jnp.finfo(r.dtype).max / 2
    return jnp.clip(r, -limit, limit)


# The functions below take two models and their `log_ratio`, `log q - log p`. The
# mixtures of Jensen-Shannon and of the skewed divergences want it `finite`.


@jax.custom_jvp
def q_less_p(p: Outcomes, q: Outcomes, log_ratio: jax.Array) -> jax.Array:
    """`q - p`, to the last digits where they are near, and 0 where they are equal."""
    near, difference, _, far = _differences(p, q, log_ratio)
    return jnp.where(near, difference, far)


@q_less_p.defjvp
def _q_less_p_jvp(primals, tangents):
    (p, q, _), (d_p, d_q, _) = primals, tangents
    return q_less_p(*primals), q.prob * d_q.log - p.prob * d_p.log


def _differences(p, q, r):
    """Whether `r` is small; `q - p` there, and by how much it is more than the first
    order, `r (p + q) / 2`; and `q - p` elsewhere.

    `q - p` is `(p + q) tanh(r / 2)`, whose series is one in r²: it needs half as many
    terms as a series of `e^r`.
    """
    first = (p.prob + q.prob) * (r / 2)
    more = first * tanh_excess(r)
    return r * r < NEAR**2, first + more, more, q.prob - p.prob


@jax.custom_jvp
def kl_term(p: Outcomes, q: Outcomes, log_ratio: jax.Array) -> jax.Array:
    """`p (e^r - 1 - r)` with `r = log_ratio`. Its sum is KL(p ‖ q)."""
    near, difference, more, far = _differences(p, q, log_ratio)
    slope, rest = jnp.where(near, difference, -2 * p.prob), jnp.where(near, more, far)
    # What p lacks has no logarithm.
    return jnp.where(p.prob == 0, q.prob, slope * (log_ratio / 2) + rest)


@kl_term.defjvp
def _kl_term_jvp(primals, tangents):
    # ∂/∂log q = p (e^r - 1) and ∂/∂log p = -p r are the whole derivative, the one
    # through r included.
    (p, q, log_ratio), (d_p, d_q, _) = primals, tangents
    slope = (
        q_less_p(p, q, log_ratio) * d_q.log - _prob_times(p.prob, log_ratio) * d_p.log
    )
    return kl_term(*primals), slope


@jax.custom_jvp
def reverse_kl_term(p: Outcomes, q: Outcomes, log_ratio: jax.Array) -> jax.Array:
    """`kl_term(q, p, -log_ratio)`, of the same parts as `kl_term(p, q, log_ratio)`."""
    near, difference, more, far = _differences(p, q, log_ratio)
    slope, rest = jnp.where(near, difference, 2 * q.prob), jnp.where(near, more, far)
    return jnp.where(q.prob == 0, p.prob, slope * (log_ratio / 2) - rest)


@reverse_kl_term.defjvp
def _reverse_kl_term_jvp(primals, tangents):
    (p, q, log_ratio), (d_p, d_q, _) = primals, tangents
    slope = (
        _prob_times(q.prob, log_ratio) * d_q.log - q_less_p(p, q, log_ratio) * d_p.log
    )
    return reverse_kl_term(*primals), slope


def _prob_times(prob: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """The product, with `0 · inf = 0`."""
    return prob * zero_unless(prob > 0, log_ratio)


@ft.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def jensen_shannon_term(
    p: Outcomes,
    q: Outcomes,
    log_ratio: jax.Array,
    beta: float,
    weights: tuple[float, float],
) -> jax.Array:
    """The sum of this term is `a KL(p ‖ m) + b KL(q ‖ m)`, with `m = β p + (1-β) q`.

    β is in (0, 1), and `weights` are a and b, which are to each other as β to 1-β.
    """
    if beta == 0.5:
        return weights[0] * _halves_term(p, q, log_ratio)
    m_over_p, m_over_q = _log_mixture_ratios(log_ratio, beta)
    m = _mixture(p, q, beta)
    return weights[0] * kl_term(p, m, m_over_p) + weights[1] * kl_term(q, m, m_over_q)


@jensen_shannon_term.defjvp
def _jensen_shannon_term_jvp(beta, weights, primals, tangents):
    # The contributions of m add up to 0. So ∂/∂log p = -a p log(m / p), with a = β but
    # for a common factor, and ∂/∂log q = -b q log(m / q).
    (p, q, log_ratio), (d_p, d_q, _) = primals, tangents
    m_over_p, m_over_q = _log_mixture_ratios(log_ratio, beta)
    f_p = p.prob * m_over_p * -weights[0]
    f_q = q.prob * m_over_q * -weights[1]
    value = jensen_shannon_term(*primals, beta, weights)
    return value, f_p * d_p.log + f_q * d_q.log


@ft.partial(jax.custom_jvp, nondiff_argnums=(3,))
def skew_kl_term(
    p: Outcomes, q: Outcomes, log_ratio: jax.Array, alpha: float
) -> jax.Array:
    """The sum of this term is `KL(p ‖ m)`, `m = α p + (1-α) q`, with α in (0, 1)."""
    m_over_p, _ = _log_mixture_ratios(log_ratio, alpha)
    return kl_term(p, _mixture(p, q, alpha), m_over_p)


@skew_kl_term.defjvp
def _skew_kl_term_jvp(alpha, primals, tangents):
    # ∂/∂log m = m - p = (1-α) (q - p). Of it, ∂log m/∂log p = α p / m goes to p, and
    # ∂log m/∂log q = (1-α) q / m to q. p also gets -p log(m / p).
    (p, q, log_ratio), (d_p, d_q, _) = primals, tangents
    m_over_p, _ = _log_mixture_ratios(log_ratio, alpha)
    m = _mixture(p, q, alpha).prob
    slope = (1 - alpha) * q_less_p(p, q, log_ratio) / jnp.where(m > 0, m, 1)
    f_p = slope * alpha * p.prob - p.prob * m_over_p
    f_q = slope * (1 - alpha) * q.prob
    value = skew_kl_term(*primals, alpha)
    return value, f_p * d_p.log + f_q * d_q.log


def _mixture(p: Outcomes, q: Outcomes, beta: float) -> Outcomes:
    """`β p + (1-β) q`. Its `log` is a placeholder: terms read `prob` and log-ratios."""
    prob = beta * p.prob + (1 - beta) * q.prob
    return Outcomes(jnp.zeros_like(prob), prob)


@ft.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _log_mixture_ratios(r: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """`log(m / p)` and `log(m / q)` of `m = β p + (1-β) q`, from `r = log(q / p)`.

    They are finite, as `r` is, so that their product with a probability of 0 is 0.
    """
    if beta == 0.5:
        return _halves_ratios(r)
    if not _MODERATE <= beta <= 1 - _MODERATE:
        return _log_blend(r, beta, 1 - beta), _log_blend(-r, 1 - beta, beta)
    # We factor out the larger of p and q; log1p and expm1 keep small differences.
    up = r > 0
    gain = jnp.log1p(jnp.where(up, beta, 1 - beta) * jnp.expm1(-jnp.abs(r)))
    return gain + zero_unless(up, r), gain - zero_unless(~up, r)


_MODERATE = 1 / 16  # the least β and 1-β for which the quick form keeps its digits


@_log_mixture_ratios.defjvp
def _log_mixture_ratios_jvp(beta, primals, tangents):
    (r,), (d_r,) = primals, tangents
    log_odds = math.log1p(-beta) - math.log(beta)
    share_q = jax.nn.sigmoid(r + log_odds)  # (1-β) q / m
    share_p = jax.nn.sigmoid(-r - log_odds)
    return _log_mixture_ratios(r, beta), (share_q * d_r, -share_p * d_r)


def _log_blend(r: jax.Array, a: float, b: float) -> jax.Array:
    """`log(a + b e^r)`, `a + b = 1`, to the last digits for any weights and any `r`."""
    change = b * jnp.expm1(r)
    # This is a sum of positive numbers, relative to the larger of 1 and e^r.
    low, high = jnp.where(r < 0, a, b), jnp.where(r < 0, b, a)
    far = jnp.maximum(r, 0) + jnp.log(low + high * jnp.exp(-jnp.abs(r)))
    return jnp.where(jnp.abs(change) < 0.5, jnp.log1p(change), far)


# At β = 1/2, we use that `log(m / p) = r / 2 + log cosh(r / 2)`, and that the sum of
# `p log(p / m)` and `q log(q / m)` is `p + q` times `(r / 2) tanh(r / 2)` less
# `log cosh(r / 2)`. These are series in r², of few terms for small |r|. Farther away
# the logarithms themselves do.
_TANH, _SMALL = tanh_taylor(20), (0, NEAR**2)
_LOG_COSH = Economized([c / (4 * k + 4) for k, c in enumerate(_TANH)], _SMALL, terms=3)
_HALVES_TERM = Economized(
    [c * (2 * k + 1) / (4 * k + 4) for k, c in enumerate(_TANH)], _SMALL, terms=4
)


def _halves_ratios(r):
    """`_log_mixture_ratios` at β = 1/2."""
    near, larger = jnp.abs(r) < NEAR, _halves_over_larger(r)
    even, odd = r * r * _LOG_COSH(r * r), r / 2
    m_over_p = jnp.where(near, even + odd, larger + jnp.maximum(r, 0))
    return m_over_p, jnp.where(near, even - odd, larger - jnp.minimum(r, 0))


def _halves_term(p, q, r):
    """`p log(p / m) + q log(q / m)` at β = 1/2."""
    both = p.prob + q.prob
    near = both * (r * r * _HALVES_TERM(r * r))
    far = both * _halves_over_larger(r) + jnp.minimum(p.prob, q.prob) * jnp.abs(r)
    return jnp.where(jnp.abs(r) < NEAR, near, -far)


def _halves_over_larger(r):
    """The log of m over the larger of p and q."""
    return jnp.log(0.5 + 0.5 * jnp.exp(-jnp.abs(r)))


_LEAST_EXPONENT = 1e-20  # below it the limit is right to the last digit


def _excess(x: Outcomes, y: Outcomes, r: jax.Array, c: float) -> jax.Array:
    """`(x^(1-c) y^c - x) / c` with `r = log y - log x`; it tends to `x r` at c = 0."""
    if abs(c) < _LEAST_EXPONENT:
        return _prob_times(x.prob, r)
    near, cr = near_part(c * r, 1.0)
    absent = (x.log == -jnp.inf) & (y.log == -jnp.inf)
    # At exponent 0 a factor drops out, as 0^0 = 1 in the limit.
    log_power = (1 - c) * x.log + c * y.log if c != 1 else y.log
    power = jnp.exp(jnp.where(absent, -jnp.inf, log_power))
    return jnp.where(near, x.prob * jnp.expm1(cr), power - x.prob) / c


@ft.partial(jax.custom_jvp, nondiff_argnums=(3,))
def alpha_term(
    p: Outcomes, q: Outcomes, log_ratio: jax.Array, alpha: float
) -> jax.Array:
    """`(α p + (1-α) q - p^α q^(1-α)) / (α (1-α))`: KL(p ‖ q) at 1, KL(q ‖ p) at 0."""
    beta = 1 - alpha
    limit = NEAR / max(1.0, abs(alpha), abs(beta))
    near, r = near_part(log_ratio, limit)
    # Σ_k (1 + β + … + β^k) r^k / (k + 2)! does not divide by a small α or β.
    terms = range(15 if r.dtype == jnp.float64 else 8)
    geometric = [sum(beta**j for j in range(k + 1)) for k in terms]
    total = polynomial(r, [geometric[k] / math.factorial(k + 2) for k in terms])
    if abs(alpha) >= abs(beta):
        far = (q.prob - p.prob - _excess(p, q, log_ratio, beta)) / alpha
    else:
        far = (p.prob - q.prob - _excess(q, p, -log_ratio, alpha)) / beta
    return jnp.where(near, p.prob * r * r * total, far)


@alpha_term.defjvp
def _alpha_term_jvp(alpha, primals, tangents):
    # ∂/∂log q = (q - p^α q^(1-α)) / α and ∂/∂log p = (p - p^α q^(1-α)) / (1-α).
    (p, q, log_ratio), (d_p, d_q, _) = primals, tangents
    f_q = -_excess(q, p, -log_ratio, alpha)
    f_p = -_excess(p, q, log_ratio, 1 - alpha)
    return alpha_term(*primals, alpha), f_q * d_q.log + f_p * d_p.log
