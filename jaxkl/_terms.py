r"""Elementwise terms of which divergences are made, without cancellation.

With $r = \log q - \log p$, the textbook integrand of $\mathrm{KL}(p \,\|\, q)$ is
$-p\,r$: terms of both signs and of first order in $r$, whose sum is of second order.
Near student = teacher a float32 sum of them is noise. As $\sum_v (q_v - p_v) = 0$,

$$ \mathrm{KL}(p \,\|\, q) = \sum_v p_v\,(e^{r_v} - 1 - r_v), $$

where every term is non-negative and of second order. All terms here are of that form:
never negative, relatively accurate near student = teacher, and exactly 0 with a zero
gradient where the two are equal. Derivatives are written out, as those of the branches
would cancel again; `0 log 0 = 0` holds in both.
"""

import functools as ft
import math

import jax
import jax.numpy as jnp

from ._numerics import Outcomes, zero_unless


_NEAR = 0.5  # |r| below which `e^r - 1 - r` is summed as a series


def _series(r, coefficient):
    """`Σ_k coefficient(k) r^k / (k + 2)!`, to the last bits for `|r| < _NEAR`."""
    terms = 8 if r.dtype == jnp.float32 else 15
    total = jnp.zeros_like(r)
    for k in reversed(range(terms)):
        total = total * r + coefficient(k) / math.factorial(k + 2)
    return total


def second_order(r):
    """`e^r - 1 - r`, to the last bits for `|r| < _NEAR`."""
    return r * r * _series(r, lambda k: 1.0)


def is_near(log_ratio, limit=_NEAR):
    """Whether the log-ratio is small, and its value there."""
    near = jnp.abs(log_ratio) < limit
    return near, zero_unless(near, log_ratio)


def log_ratio_of(p: Outcomes, q: Outcomes):
    """`log q - log p`; 0 where both are `-inf`: an outcome that neither model has."""
    return _log_ratio(p.log, q.log)


def _log_ratio(log_p, log_q):
    absent = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    return zero_unless(~absent, log_q - log_p)


def difference(p: Outcomes, q: Outcomes):
    """`q - p`, to the last digits where they are near, and 0 where they are equal."""
    near, r = is_near(log_ratio_of(p, q))
    return jnp.where(near, p.prob * jnp.expm1(r), q.prob - p.prob)


@jax.custom_jvp
def kl_term(p: Outcomes, q: Outcomes, log_ratio):
    """`p (e^r - 1 - r)` with `r = log_ratio = log q - log p`: summed, KL(p ‖ q).

    `log_ratio` is an argument because a caller may know it better than the difference
    of two rounded logarithms.
    """
    near, r = is_near(log_ratio)
    p_log_ratio = p.prob * zero_unless(p.prob > 0, log_ratio)
    return jnp.where(near, p.prob * second_order(r), q.prob - p.prob - p_log_ratio)


@kl_term.defjvp
def _kl_term_jvp(primals, tangents):
    # ∂/∂log q = p (e^r - 1), ∂/∂log p = -p r: these two are the whole derivative.
    (p, q, log_ratio), (d_p, d_q, _) = primals, tangents
    near, r = is_near(log_ratio)
    p_log_ratio = p.prob * zero_unless(p.prob > 0, log_ratio)
    p_expm1 = jnp.where(near, p.prob * (r + second_order(r)), q.prob - p.prob)
    return kl_term(*primals), p_expm1 * d_q.log - p_log_ratio * d_p.log


def mixture(p: Outcomes, q: Outcomes, beta):
    """`m = β p + (1 - β) q`, β in (0, 1), with `log(m / p)` and `log(m / q)`."""
    log_m, log_m_over_p, log_m_over_q = _log_mixture(p.log, q.log, beta)
    m = Outcomes.known(log_m, beta * p.prob + (1 - beta) * q.prob)
    return m, log_m_over_p, log_m_over_q


@ft.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _log_mixture(log_p, log_q, beta):
    r = _log_ratio(log_p, log_q)
    up = r > 0
    # The larger of p and q is factored out; log1p and expm1 keep small differences.
    gain = jnp.log1p(jnp.where(up, beta, 1 - beta) * jnp.expm1(-jnp.abs(r)))
    log_m = jnp.where(up, log_q, log_p) + gain
    return log_m, gain + zero_unless(up, r), gain - zero_unless(~up, r)


@_log_mixture.defjvp
def _log_mixture_jvp(beta, primals, tangents):
    (log_p, log_q), (d_log_p, d_log_q) = primals, tangents
    # The share of q in the mixture, (1 - β) q / m.
    share = jax.nn.sigmoid(_log_ratio(log_p, log_q) + math.log((1 - beta) / beta))
    d_ratio = d_log_q - d_log_p
    d_log_m = (1 - share) * d_log_p + share * d_log_q
    tangent = d_log_m, share * d_ratio, (share - 1) * d_ratio
    return _log_mixture(log_p, log_q, beta), tangent


def _excess(x: Outcomes, y: Outcomes, c):
    """`(x^(1-c) y^c - x) / c`, which tends to `x (log y - log x)` at c = 0."""
    r = log_ratio_of(x, y)
    if c == 0:
        return x.prob * zero_unless(x.prob > 0, r)
    near, cr = is_near(c * r, 1.0)
    absent = (x.log == -jnp.inf) & (y.log == -jnp.inf)
    # One factor alone drops out at exponent 0: 0^0 = 1, as the limit has it.
    log_power = (1 - c) * x.log + c * y.log if c != 1 else y.log
    power = jnp.exp(jnp.where(absent, -jnp.inf, log_power))
    return jnp.where(near, x.prob * jnp.expm1(cr), power - x.prob) / c


@ft.partial(jax.custom_jvp, nondiff_argnums=(2,))
def alpha_term(p: Outcomes, q: Outcomes, alpha):
    """`(α p + (1-α) q - p^α q^(1-α)) / (α (1-α))`: KL(p ‖ q) at 1, KL(q ‖ p) at 0."""
    beta = 1 - alpha
    limit = _NEAR / max(1.0, abs(alpha), abs(beta))
    near, r = is_near(log_ratio_of(p, q), limit)
    # Σ_k (1 + β + … + β^k) r^k / (k + 2)!, in which no small α or β is divided by.
    series = _series(r, lambda k: sum(beta**j for j in range(k + 1)))
    if abs(alpha) >= abs(beta):
        far = (q.prob - p.prob - _excess(p, q, beta)) / alpha
    else:
        far = (p.prob - q.prob - _excess(q, p, alpha)) / beta
    return jnp.where(near, p.prob * r * r * series, far)


@alpha_term.defjvp
def _alpha_term_jvp(alpha, primals, tangents):
    # ∂/∂log q = (q - p^α q^(1-α)) / α and ∂/∂log p = (p - p^α q^(1-α)) / (1-α).
    (p, q), (d_p, d_q) = primals, tangents
    f_q, f_p = -_excess(q, p, alpha), -_excess(p, q, 1 - alpha)
    return alpha_term(p, q, alpha), f_q * d_q.log + f_p * d_p.log
