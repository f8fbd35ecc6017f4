r"""The catalogue of divergences: elementwise functions of two log-probabilities.

A divergence is a callable `(log_p, log_q) -> f`, with `p` the teacher and `q` the
student; a token's divergence is the sum of `f` over the vocabulary. That is all a
divergence is: a user's own function of this form works wherever these do.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._math.numerics import zero_unless
from .._math.softmax import Outcomes
from .._util import checks as check
from .array_terms import (
    alpha_array_term,
    jensen_shannon_array_term,
    skew_kl_array_term,
)
from .parameters import (
    as_pytree,
    check_parameter,
    Interval,
    over_columns,
    Parametrised,
    REAL,
)
from .terms import (
    alpha_term,
    finite,
    jensen_shannon_term,
    kl_term,
    known_ratio,
    log_ratio_of,
    q_less_p,
    reverse_kl_term,
    skew_kl_term,
)


Divergence = Callable[[jax.Array, jax.Array], jax.Array]
Number = Any  # a Python number or an array, of a parameter


class CataloguedDivergence(Parametrised):
    """Base of the catalogue: a subclass defines `integrand`, of which it is the sum.

    The `intervals` are those of its parameters.
    """

    def __post_init__(self):
        for name, interval in self.intervals.items():
            check_parameter(name, getattr(self, name), interval)

    @property
    def kl_weights(self) -> tuple[Number, Number] | None:
        """See the function of this name."""
        return None

    @property
    def is_bounded(self) -> bool:
        """Whether it is finite of any models. Its log-ratio is finite then too."""
        return False

    @property
    def members(self) -> tuple[Divergence, ...]:
        """The divergences of which it is made."""
        return ()

    def integrand(self, p: Outcomes, q: Outcomes, log_ratio: jax.Array) -> jax.Array:
        """The integrand `f`, from the two models and `log q - log p`."""
        raise NotImplementedError

    def __call__(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        p, q = Outcomes.of_log(log_p), Outcomes.of_log(log_q)
        return self.integrand(p, q, self.log_ratio(p, q))

    def log_ratio(self, p: Outcomes, q: Outcomes) -> jax.Array:
        """`log q - log p`, as the integrand wants it."""
        log_ratio = log_ratio_of(p, q)
        return finite(log_ratio) if self.is_bounded else log_ratio


_CATALOGUE = set[type]()
_T = TypeVar("_T")


def catalogued(cls: type[_T]) -> type[_T]:
    """Makes a frozen dataclass a pytree of its arrays, and one of ours.

    A user's subclass is none of ours: its formula may differ.
    """
    cls = as_pytree(cls)
    _CATALOGUE.add(cls)
    return cls


def is_ours(divergence: Any) -> bool:
    return type(divergence) in _CATALOGUE


def foreign_members(divergence: Any) -> tuple[Any, ...]:
    """The functions of a user of which it is made, or which it is."""
    if not is_ours(divergence):
        return (divergence,)
    return sum(map(foreign_members, divergence.members), ())


def is_catalogued(divergence: Any) -> bool:
    """Whether it is one of ours, and made of nothing else."""
    return not foreign_members(divergence)


def check_callable(name: str, divergence: Any) -> None:
    """Checks that it can be a divergence: ours, or a function that can be static."""
    if isinstance(divergence, type):
        made = f"{divergence.__name__}()"
        raise TypeError(f"`{name}` must be an instance, such as {made}, got the class.")
    if not callable(divergence):
        raise TypeError(f"`{name}` must be callable, got {divergence!r}.")
    if not isinstance(divergence, Hashable):
        raise TypeError(f"`{name}` must be hashable, got {divergence!r}.")


def _is_between(parameter: Number) -> bool:
    """Whether it is a number in (0, 1), of a mixture of both models."""
    return check.is_number(parameter) and 0 < parameter < 1


def is_zero(parameter: Number) -> bool:
    """Whether it is 0 in every program: an array may be anything."""
    return check.is_number(parameter) and parameter == 0


def kl_weights(divergence: Divergence) -> tuple[Number, Number] | None:
    """The weights of `KL(p ‖ q)` and `KL(q ‖ p)`, of which the divergence is a sum.

    Each is a number, or an array with the axes of the divergence's own.
    """
    return divergence.kl_weights if is_ours(divergence) else None  # pyright: ignore[reportFunctionMemberAccess]


def is_bounded(divergence: Divergence) -> bool:
    """Whether it is one of ours that wants its log-ratio finite."""
    return is_ours(divergence) and divergence.is_bounded  # pyright: ignore[reportFunctionMemberAccess]


def evaluate(
    divergence: Divergence,
    p: Outcomes,
    q: Outcomes,
    log_ratio: jax.Array | None = None,
) -> jax.Array:
    """`divergence(log p, log q)`; ours use the probabilities and the log-ratio too,
    which for `is_bounded` is finite.

    It is 0 where both models have no probability.
    """
    if is_ours(divergence):
        ours: CataloguedDivergence = divergence  # pyright: ignore[reportAssignmentType]
        if log_ratio is None:
            return ours.integrand(p, q, ours.log_ratio(p, q))
        return ours.integrand(p, q, known_ratio(p.log, q.log, log_ratio))
    # Of an outcome that neither has, a user's function may be NaN, and so its slope. No
    # sensible function has a pole at probabilities of 1/2 and 1/4.
    absent = (p.log == -jnp.inf) & (q.log == -jnp.inf)
    log_p = jnp.where(absent, math.log(1 / 2), p.log)
    log_q = jnp.where(absent, math.log(1 / 4), q.log)
    return zero_unless(~absent, divergence(log_p, log_q))


def evaluate_weighted(
    weight: Number,
    divergence: Divergence,
    p: Outcomes,
    q: Outcomes,
    log_ratio: jax.Array,
) -> jax.Array:
    """`weight · f`, and 0 where the weight is, even if `f` is infinite there.

    The weight is an array, or a number that is not 0.
    """
    weight = over_columns(weight, log_ratio)
    if not check.is_number(weight):
        # We mask the operands: 0 times the slopes may be NaN. A divergence is 0 where
        # both models have a probability of 1/2, and a user's function is finite there.
        counts = weight != 0
        half = Outcomes(*(jnp.full_like(p.log, x) for x in (math.log(0.5), 0.5)))
        p, q = (_where(counts, x, half) for x in (p, q))
        log_ratio = zero_unless(counts, log_ratio)
    return weight * evaluate(divergence, p, q, log_ratio)


def _where(condition: jax.Array, x: Outcomes, y: Outcomes) -> Outcomes:
    return Outcomes(*(jnp.where(condition, *pair) for pair in zip(x, y, strict=True)))


@catalogued
@dataclasses.dataclass(frozen=True)
class ForwardKL(CataloguedDivergence):
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


@catalogued
@dataclasses.dataclass(frozen=True)
class ReverseKL(CataloguedDivergence):
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
        return reverse_kl_term(p, q, log_ratio)


@catalogued
@dataclasses.dataclass(frozen=True)
class SymmetricKL(CataloguedDivergence):
    r"""$w\,\mathrm{KL}(p \,\|\, q) + (1 - w)\,\mathrm{KL}(q \,\|\, p)$.

    Jeffreys' divergence is twice its value at `weight=0.5`.

    Args:
      weight: $w$ in [0, 1], a Python number or an array; see `jaxkl.Mixture`.

    References:
      Jeffreys. [An invariant form for the prior probability in estimation
      problems](https://doi.org/10.1098/rspa.1946.0056), 1946.
    """

    weight: ArrayLike = 0.5

    intervals: ClassVar = {"weight": Interval(0, 1)}

    @property
    def kl_weights(self):
        return self.weight, 1 - self.weight

    def integrand(self, p, q, log_ratio):
        weight: Number = self.weight
        if not check.is_number(weight):
            both = (weight, ForwardKL()), (1 - weight, ReverseKL())
            forward, reverse = (evaluate_weighted(*x, p, q, log_ratio) for x in both)
            return forward + reverse
        # An end of the interval leaves out the other term, which may be infinite.
        if weight == 1:
            return kl_term(p, q, log_ratio)
        if weight == 0:
            return reverse_kl_term(p, q, log_ratio)
        forward = kl_term(p, q, log_ratio)
        reverse = reverse_kl_term(p, q, log_ratio)
        return weight * forward + (1 - weight) * reverse


@catalogued
@dataclasses.dataclass(frozen=True)
class JensenShannon(CataloguedDivergence):
    r"""Generalised Jensen-Shannon divergence, with the weights of TRL and Liger.

    $$ m = \beta p + (1 - \beta) q, \qquad
       D = \beta\,\mathrm{KL}(p \,\|\, m) + (1 - \beta)\,\mathrm{KL}(q \,\|\, m). $$

    Always finite. It tends to 0 as $\beta$ tends to 0 or 1, and so is no interpolation
    of the two KL divergences; divided by $\beta (1 - \beta)$ it is one:
    $\mathrm{KL}(p \,\|\, q)$ at 0 and $\mathrm{KL}(q \,\|\, p)$ at 1.

    Args:
      beta: $\beta$ in (0, 1), or in [0, 1] if `normalized`: a Python number or an
        array; see `jaxkl.Mixture`. An array may hold 0 and 1 in either case.
      normalized: Whether to divide by $\beta (1 - \beta)$.

    References:
      Agarwal et al. [On-Policy Distillation of Language
      Models](https://arxiv.org/abs/2306.13649), 2023.
    """

    beta: ArrayLike = 0.5
    normalized: bool = False

    intervals: ClassVar = {"beta": Interval(0, 1)}

    def __post_init__(self):
        if not isinstance(self.normalized, bool):
            raise TypeError(f"`normalized` must be a bool, got {self.normalized!r}.")
        has_no_end = not self.normalized
        interval = Interval(0, 1, open_low=has_no_end, open_high=has_no_end)
        check_parameter("beta", self.beta, interval)

    @property
    def is_bounded(self):
        return _is_between(self.beta)

    def integrand(self, p, q, log_ratio):
        beta = over_columns(self.beta, log_ratio)
        if not check.is_number(beta):
            scale = jnp.ones_like(beta) if self.normalized else beta * (1 - beta)
            return jensen_shannon_array_term(p, q, log_ratio, beta, scale)
        if beta == 0:
            return kl_term(p, q, log_ratio)
        if beta == 1:
            return reverse_kl_term(p, q, log_ratio)
        scale = beta * (1 - beta) if self.normalized else 1
        weights = beta / scale, (1 - beta) / scale
        return jensen_shannon_term(p, q, log_ratio, beta, weights)


@catalogued
@dataclasses.dataclass(frozen=True)
class SkewForwardKL(CataloguedDivergence):
    r"""Skewed forward KL, $\mathrm{KL}(p \,\|\, \alpha p + (1 - \alpha) q)$.

    Finite for $\alpha > 0$, with a bounded gradient.

    Args:
      alpha: $\alpha$ in [0, 1), a Python number or an array; see `jaxkl.Mixture`. At
        0 it is `ForwardKL`.

    References:
      Ko, Kim, Chen, Yun. [DistiLLM: Towards Streamlined Distillation for Large Language
      Models](https://arxiv.org/abs/2402.03898), 2024.
    """

    alpha: ArrayLike = 0.1

    intervals: ClassVar = {"alpha": Interval(0, 1, open_high=True)}

    @property
    def is_bounded(self):
        return _is_between(self.alpha)

    def integrand(self, p, q, log_ratio):
        alpha = over_columns(self.alpha, log_ratio)
        if not check.is_number(alpha):
            return skew_kl_array_term(p, q, log_ratio, alpha)
        if alpha == 0:
            return kl_term(p, q, log_ratio)
        return skew_kl_term(p, q, log_ratio, alpha)


@catalogued
@dataclasses.dataclass(frozen=True)
class SkewReverseKL(CataloguedDivergence):
    r"""Skewed reverse KL, $\mathrm{KL}(q \,\|\, (1 - \alpha) p + \alpha q)$.

    Finite for $\alpha > 0$, with a bounded gradient.

    Args:
      alpha: $\alpha$ in [0, 1), a Python number or an array; see `jaxkl.Mixture`. At
        0 it is `ReverseKL`.

    References:
      Ko, Kim, Chen, Yun. [DistiLLM: Towards Streamlined Distillation for Large Language
      Models](https://arxiv.org/abs/2402.03898), 2024.
    """

    alpha: ArrayLike = 0.1

    intervals: ClassVar = {"alpha": Interval(0, 1, open_high=True)}

    @property
    def is_bounded(self):
        return _is_between(self.alpha)

    def integrand(self, p, q, log_ratio):
        return SkewForwardKL(self.alpha).integrand(q, p, -log_ratio)


@catalogued
@dataclasses.dataclass(frozen=True)
class TotalVariation(CataloguedDivergence):
    r"""Total variation distance $\tfrac12 \sum_v |p_v - q_v|$, in [0, 1].

    Its gradient is taken as 0 where $p_v = q_v$.

    References:
      Wen, Li, Du, Mou. [f-Divergence Minimization for Sequence-Level Knowledge
      Distillation](https://arxiv.org/abs/2307.15190), 2023.
    """

    @property
    def is_bounded(self):
        return True

    def integrand(self, p, q, log_ratio):
        gap = q_less_p(p, q, log_ratio)
        # Not `jnp.abs`, whose derivative at 0 is 1 or -1.
        return jnp.sign(gap) * gap / 2


@catalogued
@dataclasses.dataclass(frozen=True)
class AlphaDivergence(CataloguedDivergence):
    r"""Amari's alpha-divergence.

    $$ D = \frac{\sum_v p_v^\alpha q_v^{1 - \alpha} - 1}{\alpha (\alpha - 1)}, $$

    with its limits $\mathrm{KL}(p \,\|\, q)$ at 1 and $\mathrm{KL}(q \,\|\, p)$ at 0.
    At ½ it is four times the squared Hellinger distance.

    Args:
      alpha: $\alpha$, any finite number, or an array; see `jaxkl.Mixture`. From 1 on,
        $D$ is infinite where $q = 0 < p$; up to 0, where $p = 0 < q$.

    References:
      Amari. [Differential-Geometrical Methods in
      Statistics](https://doi.org/10.1007/978-1-4612-5056-2), 1985.
    """

    alpha: ArrayLike

    intervals: ClassVar = {"alpha": REAL}

    def integrand(self, p, q, log_ratio):
        alpha = over_columns(self.alpha, log_ratio)
        if not check.is_number(alpha):
            return alpha_array_term(p, q, log_ratio, alpha)
        return alpha_term(p, q, log_ratio, float(alpha))
