"""Mixtures: weighted sums of divergences."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax.typing import ArrayLike

from .._util import checks as check
from .catalogue import (
    catalogued,
    CataloguedDivergence,
    check_callable,
    Divergence,
    evaluate,
    evaluate_weighted,
    is_bounded,
    is_ours,
    is_zero,
    kl_weights,
)
from .parameters import check_parameter, REAL
from .terms import finite


@catalogued
@dataclasses.dataclass(frozen=True)
class Mixture(CataloguedDivergence):
    r"""A weighted sum of divergences, $\sum_i w_i D_i$, in one pass over the logits.

    The weights, like `beta`, `alpha` and `weight` of the other divergences, are Python
    numbers or arrays.

    - A number is part of the program: another number compiles another program.
    - An array is a scalar, or has an entry for each token, `[...]`. It may be traced,
      so a schedule compiles once. It is a constant to differentiation, and it gives the
      limits at the ends of its interval too. Arrays are the leaves of a divergence,
      which is a pytree, and one that holds them is not hashable. Traced values are not
      checked: out of range they make the loss NaN.

    A term of weight 0 plays no part, even where its divergence is infinite. A mixture
    of `ForwardKL`, `ReverseKL` and `SymmetricKL` costs as much as a `SymmetricKL`.

    Args:
      terms: Pairs of a weight $w$, any finite number or an array, and a divergence: one
        of the catalogue, a mixture, or a function of your own. The weights need not sum
        to 1.

    Raises:
      TypeError: For a weight that is neither a number nor an array of floats, and for a
        divergence that is not callable or hashable.
      ValueError: For terms that are not pairs, and weights that are not finite.

    Example:
      Forward KL on the first token, reverse KL on the second:

      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.zeros((2, 2)), jnp.array([[0.0, 1.0], [0.0, 1.0]])
      >>> w = jnp.array([1.0, 0.0])
      >>> mixture = jaxkl.Mixture(((w, jaxkl.ForwardKL()), (1 - w, jaxkl.ReverseKL())))
      >>> loss = jaxkl.distillation_loss(
      ...     student, teacher, divergence=mixture, reduction="none"
      ... )
      >>> print(f"{loss[0]:.4f} {loss[1]:.4f}")
      0.1109 0.1201

    References:
      Wu et al. [Rethinking Kullback-Leibler Divergence in Knowledge Distillation for
      Large Language Models](https://arxiv.org/abs/2404.02657), 2024.
    """

    terms: Sequence[tuple[ArrayLike, Divergence]]

    intervals: ClassVar = {"weight": REAL}

    def __post_init__(self):
        terms = _as_pairs(self.terms)
        for weight, divergence in terms:
            check_parameter("weight", weight, REAL)
            check_callable("divergence", divergence)
        object.__setattr__(self, "terms", terms)

    @property
    def members(self):
        return tuple(divergence for _, divergence in self.terms)

    def map_parameters(self, f):
        of_weight = lambda weight: f("weight", REAL, weight)
        # A user's function has no parameters.
        of_member = lambda d: d.map_parameters(f) if is_ours(d) else d
        terms = tuple((of_weight(w), of_member(d)) for w, d in self.terms)
        return self.replaced({"terms": terms})

    @property
    def kl_weights(self):
        total: list[Any] = [0.0, 0.0]
        for weight, divergence in self.terms:
            weights = kl_weights(divergence)
            if weights is None:
                return None
            for i, of_member in enumerate(weights):
                if not (is_zero(weight) or is_zero(of_member)):
                    total[i] = total[i] + weight * of_member
        return total[0], total[1]

    @property
    def is_bounded(self):
        return all(map(is_bounded, self.members))

    def integrand(self, p, q, log_ratio):
        total, given = [], log_ratio
        for weight, divergence in self.terms:
            log_ratio = finite(given) if is_bounded(divergence) else given
            if check.is_number(weight) and weight == 1:
                total.append(evaluate(divergence, p, q, log_ratio))
            elif not is_zero(weight):
                total.append(evaluate_weighted(weight, divergence, p, q, log_ratio))
        return sum(total[1:], total[0]) if total else jnp.zeros_like(log_ratio)


def _as_pairs(terms: Any) -> tuple[tuple[Any, Any], ...]:
    if isinstance(terms, Iterable):
        pairs = tuple(terms)
        if pairs and all(isinstance(x, tuple | list) and len(x) == 2 for x in pairs):
            return tuple(map(tuple, pairs))  # pyright: ignore[reportReturnType]
    raise ValueError(f"`terms` must be pairs of weight and divergence, got {terms!r}.")
