"""What to log beside a distillation loss."""

from typing import NamedTuple

import jax


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
    """Mean entropy of the teacher at temperature 1, in nats."""

    top1_agreement: jax.Array
    """Share of the weight on tokens where the most likely column is the same."""

    weight: jax.Array
    """The counted weight: the sum of `weights` over the tokens that `where` keeps."""
