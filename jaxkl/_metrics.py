"""What to log beside a distillation loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._arguments import IGNORED_LABEL
from ._numerics import weigh, zero_unless
from ._operands import LossTerms, Statistics
from ._prepare import Prepared


class DistillationMetrics(NamedTuple):
    r"""Means over the counted weight, as scalars. Constants to differentiation.

    With no weight at all they are 0.
    """

    divergence: jax.Array
    """Mean divergence at the given temperatures, without the T² factor."""

    kl: jax.Array
    r"""Mean $\mathrm{KL}(p \,\|\, q)$ of the student at temperature 1, in nats."""

    cross_entropy: jax.Array | None
    """Mean cross-entropy to the labels, label smoothing included, over the weight of
    the labelled tokens. None without `labels`."""

    student_entropy: jax.Array
    """Mean entropy of the student at temperature 1, in nats."""

    teacher_entropy: jax.Array
    """Mean entropy of the teacher at temperature 1, in nats. That of a `SparseTeacher`
    is at the temperature of its list."""

    top1_agreement: jax.Array
    """Share of the weight on tokens where the most likely column is the same."""

    weight: jax.Array
    """The counted weight: the sum of `weights` over the tokens that `where` keeps."""


def metrics_of(
    prepared: Prepared, terms: LossTerms, statistics: Statistics
) -> DistillationMetrics:
    """The means of what the engine returns, `[B]` each."""
    weight = jax.lax.stop_gradient(prepared.weight)

    def mean(x, weight=weight):
        total = jnp.sum(weight)
        is_empty = total == 0
        ratio = jnp.sum(weigh(weight, x)) / jnp.where(is_empty, 1, total)
        return zero_unless(~is_empty, ratio)

    cross_entropy = None
    if terms.label is not None:
        cross_entropy = terms.label
        if terms.uniform is not None:
            smoothing = jnp.asarray(prepared.label_smoothing, weight.dtype)
            uniform = weigh(smoothing, terms.uniform)
            cross_entropy = (1 - smoothing) * terms.label + uniform
        is_labelled = prepared.operands.labels != IGNORED_LABEL
        cross_entropy = mean(cross_entropy, zero_unless(is_labelled, weight))
    return DistillationMetrics(
        divergence=mean(terms.divergence),
        kl=mean(statistics.kl),
        cross_entropy=cross_entropy,
        student_entropy=mean(statistics.student_entropy),
        teacher_entropy=mean(statistics.teacher_entropy),
        top1_agreement=mean(statistics.top1_agreement),
        weight=jnp.sum(weight),
    )
