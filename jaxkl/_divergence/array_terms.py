r"""The terms of divergences whose parameter is an array, right at each of its values.

`terms` has the same terms with a number as parameter, which chooses between
formulas: limits, and forms for small and large values. An array cannot choose. These
formulas hold everywhere, the limits included.

Divergences are homogeneous of degree 1: $f = f_p + f_q$ with the slopes $f_p$ and $f_q$
by $\log p$ and $\log q$. Where the divergence is from a mixture
$m = (1 - w)\,x + w\,y$, with $e = m / x - 1 = w\,(y / x - 1)$, all three are multiples
of $q - p$ by

$$ \phi = \frac{\log (1 + e)}{e}, \qquad g = 1 - \phi, $$

which are smooth at $e = 0$. For $m = \beta p + (1 - \beta) q$, with $\phi_p$ of the
mixture from $p$ and $\phi_q$ from $q$, the normalised Jensen-Shannon divergence has

$$ f_q = (q - p)\,\phi_q, \qquad f_p = -(q - p)\,\phi_p, \qquad
   f = (q - p)\,(g_p - g_q). $$

$g_p$ and $g_q$ have opposite signs, and so nothing cancels.
"""

import jax
import jax.numpy as jnp

from .._math.numerics import Economized, NEAR, near_part, weigh, zero_unless
from .._math.softmax import Outcomes
from .terms import q_less_p


# Parameters have the dtype of the models, and a shape that broadcasts with theirs. They
# are constants: rules take no notice of their tangents.


# log(1 + e) = 2 artanh(y) with y = e / (2 + e), and artanh(y) = y + s(y²) y³.
_ARTANH = Economized([1 / (2 * k + 3) for k in range(18)], (0, 1 / 9), terms=5)


def _g_over_e(e: jax.Array) -> jax.Array:
    """`g / e`, for `|e| < 1/2`."""
    y = e / (2 + e)
    return (1 - y) / 2 * (1 - y * (1 - y) * _ARTANH(y * y))


@jax.custom_jvp
def _log_mean(
    r: jax.Array, low: jax.Array, high: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """φ and g of `m / x = low + high e^r`, with `low + high = 1`."""
    e = high * jnp.expm1(_limited(r))
    near, e_near = near_part(e)
    g = e_near * _g_over_e(e_near)
    # log(m / x), relative to the larger of 1 and e^r. A sum of positive numbers is at
    # least as large as the second, which may be the first to underflow.
    up, size = r > 0, jnp.abs(r)
    first, second = jnp.where(up, high, low), jnp.where(up, low, high)
    log_sum = jnp.log(first + second * jnp.exp(-size))
    log_sum = jnp.maximum(log_sum, jnp.log(second) - size)
    far = (jnp.maximum(_limited(r), 0) + log_sum) / jnp.where(near, 1, e)
    return jnp.where(near, 1 - g, far), jnp.where(near, g, 1 - far)


@_log_mean.defjvp
def _log_mean_jvp(primals, tangents):
    r, low, high = primals
    phi, g = _log_mean(*primals)
    exp_r = jnp.exp(_limited(r))
    e, growth = high * jnp.expm1(_limited(r)), high * exp_r
    near, e_near = near_part(e)
    # ∂φ/∂e = (1 / (1 + e) - φ) / e, and ∂e/∂r is the growth.
    slope_near = (_g_over_e(e_near) - 1 / (1 + e_near)) * growth
    slope_far = (1 / (low + growth) - phi) * (growth / jnp.where(near, 1, e))
    slope = jnp.where(near, slope_near, zero_unless(growth > 0, slope_far))
    return (phi, g), (slope * tangents[0], -slope * tangents[0])


def _limited(r: jax.Array) -> jax.Array:
    """`r`, not so large that `e^r` overflows: there φ is 0 to the last digit."""
    return jnp.minimum(r, jnp.log(jnp.finfo(r.dtype).max) - 1)


@jax.custom_jvp
def jensen_shannon_array_term(
    p: Outcomes, q: Outcomes, log_ratio: jax.Array, beta: jax.Array, scale: jax.Array
) -> jax.Array:
    """`scale` times the normalised divergence, whose limits are the two KLs."""
    _, g_p = _log_mean(log_ratio, beta, 1 - beta)
    _, g_q = _log_mean(-log_ratio, 1 - beta, beta)
    return weigh(scale * q_less_p(p, q, log_ratio), g_p - g_q)


@jensen_shannon_array_term.defjvp
def _jensen_shannon_array_term_jvp(primals, tangents):
    p, q, log_ratio, beta, scale = primals
    phi_p, _ = _log_mean(log_ratio, beta, 1 - beta)
    phi_q, _ = _log_mean(-log_ratio, 1 - beta, beta)
    difference = scale * q_less_p(p, q, log_ratio)
    # φ ends at a tiny number, where e^r overflows. The slope of an outcome that a model
    # lacks must be 0, as that of the temperature is its product with a logit of -inf.
    # It is not 0 at the end of the interval that is the KL from this model.
    f_p = zero_unless((p.prob > 0) | (beta == 1), weigh(difference, -phi_p))
    f_q = zero_unless((q.prob > 0) | (beta == 0), weigh(difference, phi_q))
    value = jensen_shannon_array_term(*primals)
    return value, f_p * tangents[0].log + f_q * tangents[1].log


@jax.custom_jvp
def skew_kl_array_term(
    p: Outcomes, q: Outcomes, log_ratio: jax.Array, alpha: jax.Array
) -> jax.Array:
    """The sum of this term is `KL(p ‖ m)`, `m = α p + (1-α) q`."""
    _, g = _log_mean(log_ratio, alpha, 1 - alpha)
    return weigh((1 - alpha) * q_less_p(p, q, log_ratio), g)


@skew_kl_array_term.defjvp
def _skew_kl_array_term_jvp(primals, tangents):
    # ∂/∂log q = (1-α) (q - p) b and ∂/∂log p = (1-α) (q - p) (a - φ), with the parts
    # a = α p / m and b = (1-α) q / m of the mixture.
    p, q, log_ratio, alpha = primals
    phi, g = _log_mean(log_ratio, alpha, 1 - alpha)
    of_p, of_q = alpha * p.prob, (1 - alpha) * q.prob
    m = of_p + of_q
    has_mass = m > 0
    m = jnp.where(has_mass, m, 1)
    # At α = 0 the mixture is q, also where that is 0.
    a, b = of_p / m, jnp.where(has_mass, of_q / m, 1 - alpha)
    difference = (1 - alpha) * q_less_p(p, q, log_ratio)
    # These two are equal. The first has the digits where e is large, the second near 0.
    f_p = weigh(difference, jnp.where(g > 0.2, a - phi, g - b))
    f_p = zero_unless(p.prob > 0, f_p)  # see `_jensen_shannon_array_term_jvp`
    value = skew_kl_array_term(*primals)
    return value, f_p * tangents[0].log + difference * b * tangents[1].log


@jax.custom_jvp
def alpha_array_term(
    p: Outcomes, q: Outcomes, log_ratio: jax.Array, alpha: jax.Array
) -> jax.Array:
    """`(α p + (1-α) q - p^α q^(1-α)) / (α (1-α))`: KL(p ‖ q) at 1, KL(q ‖ p) at 0."""
    beta = 1 - alpha
    sizes = jnp.abs(alpha), jnp.abs(beta)
    near, r = near_part(log_ratio, NEAR / jnp.maximum(1, jnp.maximum(*sizes)))
    # Σ_k c_k r^k / (k + 2)! with c_k = 1 + β + … + β^k divides by neither α nor β.
    last = 14 if r.dtype == jnp.float64 else 7
    coefficients = [jnp.ones_like(beta)]
    for _ in range(last):
        coefficients.append(1 + beta * coefficients[-1])
    total = jnp.zeros_like(r)
    for k in reversed(range(last + 1)):
        total = (coefficients[k] + total * r) / (k + 2)
    first = sizes[0] >= sizes[1]
    far = jnp.where(
        first,
        q.prob - p.prob - _excess(p, q, log_ratio, beta),
        p.prob - q.prob - _excess(q, p, -log_ratio, alpha),
    ) / jnp.where(first, alpha, beta)
    return jnp.where(near, p.prob * r * r * total, far)


@alpha_array_term.defjvp
def _alpha_array_term_jvp(primals, tangents):
    p, q, log_ratio, alpha = primals
    f_q = -_excess(q, p, -log_ratio, alpha)
    f_p = -_excess(p, q, log_ratio, 1 - alpha)
    value = alpha_array_term(*primals)
    return value, f_q * tangents[1].log + f_p * tangents[0].log


@jax.custom_jvp
def _excess(x: Outcomes, y: Outcomes, r: jax.Array, c: jax.Array) -> jax.Array:
    """`(x^(1-c) y^c - x) / c` with `r = log y - log x`; it is `x r` at c = 0."""
    near, scaled = near_part(zero_unless(c != 0, c * r), 1.0)
    is_tiny = jnp.abs(scaled) < 1e-20  # below it the limit is right to the last digit
    ratio = jnp.expm1(scaled) / jnp.where(is_tiny, 1, scaled)
    small = weigh(x.prob, r) * jnp.where(is_tiny, 1, ratio)
    large = (_power(x, y, c) - x.prob) / jnp.where(c != 0, c, 1)
    return jnp.where(near, small, large)


@_excess.defjvp
def _excess_jvp(primals, tangents):
    x, y, r, c = primals
    value = _excess(*primals)
    near, _ = near_part(zero_unless(c != 0, c * r), 1.0)
    power = jnp.where(near, x.prob + c * value, _power(x, y, c))
    return value, power * tangents[1].log + (value - power) * tangents[0].log


def _power(x: Outcomes, y: Outcomes, c: jax.Array) -> jax.Array:
    """`x^(1-c) y^c`, where a factor with exponent 0 is 1 even if it is 0."""
    absent = (x.log == -jnp.inf) & (y.log == -jnp.inf)
    log_x = zero_unless(c != 1, (1 - c) * x.log)
    log_y = zero_unless(c != 0, c * y.log)
    return jnp.exp(jnp.where(absent, -jnp.inf, log_x + log_y))
