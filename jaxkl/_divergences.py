r"""The catalogue of divergences: elementwise functions of two log-probabilities.

A divergence is a callable `(log_p, log_q) -> f`, with `p` the teacher and `q` the
student; a token's divergence is the sum of `f` over the vocabulary. That is all a
divergence is: a user's own function of this form works wherever these do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._divergence_terms import (
    alpha_term,
    jensen_shannon_term,
    kl_term,
    log_ratio_of,
    q_less_p,
    skew_kl_term,
)
from ._softmax import Outcomes


Divergence = Callable[[jax.Array, jax.Array], jax.Array]


class _Divergence:
    """Base of the catalogue: a subclass defines `integrand`, of which it is the sum."""

    @property
    def kl_weights(self) -> tuple[float, float] | None:
        """See the function of this name."""
        return None

    def integrand(self, p: Outcomes, q: Outcomes, log_ratio: jax.Array) -> jax.Array:
        """The integrand `f`, from the two models and `log q - log p`."""
        raise NotImplementedError

    def __call__(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        p, q = Outcomes.of_log(log_p), Outcomes.of_log(log_q)
        return self.integrand(p, q, log_ratio_of(p, q))


def is_catalogued(divergence: Any) -> bool:
    """Whether it is one of ours. A user's subclass is not: its formula may differ."""
    own = isinstance(divergence, _Divergence)
    return own and type(divergence).__module__ == __name__


def kl_weights(divergence: Divergence) -> tuple[float, float] | None:
    """The weights of `KL(p ‖ q)` and `KL(q ‖ p)`, of which the divergence is a sum."""
    return divergence.kl_weights if is_catalogued(divergence) else None  # pyright: ignore[reportFunctionMemberAccess]


def evaluate(
    divergence: Divergence,
    p: Outcomes,
    q: Outcomes,
    log_ratio: jax.Array | None = None,
) -> jax.Array:
    """`divergence(log p, log q)`; ours use the probabilities and the log-ratio too."""
    if is_catalogued(divergence):
        log_ratio = log_ratio_of(p, q, log_ratio)
        return divergence.integrand(p, q, log_ratio)  # pyright: ignore[reportFunctionMemberAccess]
    return divergence(p.log, q.log)


def _check_number(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Checks a parameter, a Python number: it is part of the compiled program."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = type(value).__name__
        raise TypeError(f"`{name}` must be a Python number, got {value!r} ({kind}).")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        raise ValueError(f"`{name}` must be in {interval}, got {value}.")


@dataclasses.dataclass(frozen=True)
class ForwardKL(_Divergence):
    r"""Forward KL divergence $\mathrm{KL}(p \,\|\, q)$ of the student from the teacher.

    $$ D = \sum_v p_v \log \frac{p_v}{q_v}
         = \sum_v p_v\,(e^{r_v} - 1 - r_v), \qquad r = \log q - \log p, \qquad
       \frac{\partial D}{\partial z} = q - p. $$

    Covers the modes of the teacher (mean-seeking). Infinite where $q = 0 < p$, with the
    formula's finite gradient there; terms with $p = 0$ are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> p, q = jnp.array([0.25, 0.75]), jnp.array([0.5, 0.5])
      >>> print(f"{jaxkl.ForwardKL()(jnp.log(p), jnp.log(q)).sum():.4f}")
      0.1308

    References:
      Hinton, Vinyals, Dean. [Distilling the Knowledge in a Neural
      Network](https://arxiv.org/abs/1503.02531), 2015.
    """

    @property
    def kl_weights(self):
        return 1.0, 0.0

    def integrand(self, p, q, log_ratio):
        return kl_term(p, q, log_ratio)


@dataclasses.dataclass(frozen=True)
class ReverseKL(_Divergence):
    r"""Reverse KL divergence $\mathrm{KL}(q \,\|\, p)$ of the teacher from the student.

    $$ D = \sum_v q_v \log \frac{q_v}{p_v}, \qquad
       \frac{\partial D}{\partial z} = q\,(\log q - \log p - D). $$

    Seeks a mode of the teacher. Infinite where $p = 0 < q$.

    References:
      Gu, Dong, Wei, Huang. [MiniLLM: Knowledge Distillation of Large Language
      Models](https://arxiv.org/abs/2306.08543), 2023.
    """

    @property
    def kl_weights(self):
        return 0.0, 1.0

    def integrand(self, p, q, log_ratio):
        return kl_term(q, p, -log_ratio)


@dataclasses.dataclass(frozen=True)
class SymmetricKL(_Divergence):
    r"""$w\,\mathrm{KL}(p \,\|\, q) + (1 - w)\,\mathrm{KL}(q \,\|\, p)$.

    Jeffreys' divergence is twice its value at `weight=0.5`.

    Args:
      weight: $w$ in [0, 1].

    References:
      Jeffreys. [An invariant form for the prior probability in estimation
      problems](https://doi.org/10.1098/rspa.1946.0056), 1946.
    """

    weight: float = 0.5

    def __post_init__(self):
        _check_number("weight", self.weight, 0, 1)

    @property
    def kl_weights(self):
        return self.weight, 1 - self.weight

    def integrand(self, p, q, log_ratio):
        # An end of the interval leaves out the other term, which may be infinite.
        if self.weight == 1:
            return kl_term(p, q, log_ratio)
        if self.weight == 0:
            return kl_term(q, p, -log_ratio)
        forward = kl_term(p, q, log_ratio)
        reverse = kl_term(q, p, -log_ratio)
        return self.weight * forward + (1 - self.weight) * reverse


@dataclasses.dataclass(frozen=True)
class JensenShannon(_Divergence):
    r"""Generalised Jensen-Shannon divergence, with the weights of TRL and Liger.

    $$ m = \beta p + (1 - \beta) q, \qquad
       D = \beta\,\mathrm{KL}(p \,\|\, m) + (1 - \beta)\,\mathrm{KL}(q \,\|\, m). $$

    Always finite. It tends to 0 as $\beta$ tends to 0 or 1, and so is no interpolation
    of the two KL divergences; divided by $\beta (1 - \beta)$ it is one:
    $\mathrm{KL}(p \,\|\, q)$ at 0 and $\mathrm{KL}(q \,\|\, p)$ at 1.

    Args:
      beta: $\beta$ in (0, 1); in [0, 1] if `normalized`.
      normalized: Whether to divide by $\beta (1 - \beta)$.

    References:
      Agarwal et al. [On-Policy Distillation of Language
      Models](https://arxiv.org/abs/2306.13649), 2023.
    """

    beta: float = 0.5
    normalized: bool = False

    def __post_init__(self):
        if not isinstance(self.normalized, bool):
            raise TypeError(f"`normalized` must be a bool, got {self.normalized!r}.")
        ends = not self.normalized
        _check_number("beta", self.beta, 0, 1, open_low=ends, open_high=ends)

    def integrand(self, p, q, log_ratio):
        beta = self.beta
        if beta == 0:
            return kl_term(p, q, log_ratio)
        if beta == 1:
            return kl_term(q, p, -log_ratio)
        scale = beta * (1 - beta) if self.normalized else 1
        weights = beta / scale, (1 - beta) / scale
        return jensen_shannon_term(p, q, log_ratio, beta, weights)


@dataclasses.dataclass(frozen=True)
class SkewForwardKL(_Divergence):
    r"""Skewed forward KL, $\mathrm{KL}(p \,\|\, \alpha p + (1 - \alpha) q)$.

    Finite for $\alpha > 0$, with a bounded gradient.

    Args:
      alpha: $\alpha$ in [0, 1); at 0 it is `ForwardKL`.

    References:
      Ko, Kim, Chen, Yun. [DistiLLM: Towards Streamlined Distillation for Large Language
      Models](https://arxiv.org/abs/2402.03898), 2024.
    """

    alpha: float = 0.1

    def __post_init__(self):
        _check_number("alpha", self.alpha, 0, 1, open_high=True)

    def integrand(self, p, q, log_ratio):
        if self.alpha == 0:
            return kl_term(p, q, log_ratio)
        return skew_kl_term(p, q, log_ratio, self.alpha)


@dataclasses.dataclass(frozen=True)
class SkewReverseKL(_Divergence):
    r"""Skewed reverse KL, $\mathrm{KL}(q \,\|\, (1 - \alpha) p + \alpha q)$.

    Finite for $\alpha > 0$, with a bounded gradient.

    Args:
      alpha: $\alpha$ in [0, 1); at 0 it is `ReverseKL`.

    References:
      Ko, Kim, Chen, Yun. [DistiLLM: Towards Streamlined Distillation for Large Language
      Models](https://arxiv.org/abs/2402.03898), 2024.
    """

    alpha: float = 0.1

    def __post_init__(self):
        _check_number("alpha", self.alpha, 0, 1, open_high=True)

    def integrand(self, p, q, log_ratio):
        return SkewForwardKL(self.alpha).integrand(q, p, -log_ratio)


@dataclasses.dataclass(frozen=True)
class TotalVariation(_Divergence):
    r"""Total variation distance $\tfrac12 \sum_v |p_v - q_v|$, in [0, 1].

    Its gradient is taken as 0 where $p_v = q_v$.

    References:
      Wen, Li, Du, Mou. [f-Divergence Minimization for Sequence-Level Knowledge
      Distillation](https://arxiv.org/abs/2307.15190), 2023.
    """

    def integrand(self, p, q, log_ratio):
        gap = q_less_p(p, q, log_ratio)
        # Not `jnp.abs`, whose derivative at 0 is 1 or -1.
        return jnp.sign(gap) * gap / 2


@dataclasses.dataclass(frozen=True)
class AlphaDivergence(_Divergence):
    r"""Amari's alpha-divergence.

    $$ D = \frac{\sum_v p_v^\alpha q_v^{1 - \alpha} - 1}{\alpha (\alpha - 1)}, $$

    with its limits $\mathrm{KL}(p \,\|\, q)$ at 1 and $\mathrm{KL}(q \,\|\, p)$ at 0.
    At ½ it is four times the squared Hellinger distance.

    Args:
      alpha: $\alpha$, any finite number. From 1 on, $D$ is infinite where $q = 0 < p$;
        up to 0, where $p = 0 < q$.

    References:
      Amari. [Differential-Geometrical Methods in
      Statistics](https://doi.org/10.1007/978-1-4612-5056-2), 1985.
    """

    alpha: float

    def __post_init__(self):
        limit = float("inf")
        _check_number("alpha", self.alpha, -limit, limit, open_low=True, open_high=True)

    def integrand(self, p, q, log_ratio):
        return alpha_term(p, q, log_ratio, float(self.alpha))
