"""What to log beside a distillation loss."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .._engine.metrics import MetricValues
from .._engine.sharding import Prepared
from .._engine.student_terms import Label, Uniform
from .._math.numerics import weigh, zero_unless
from .arguments import IGNORED_LABEL


class MetricSums(NamedTuple):
    """`Σ w x` of each mean of `DistillationMetrics`, under the mean's name."""

    divergence: jax.Array
    kl: jax.Array
    cross_entropy: jax.Array | None
    student_entropy: jax.Array
    teacher_entropy: jax.Array
    top1_agreement: jax.Array
    teacher_listed_mass: jax.Array | None
    student_listed_mass: jax.Array | None
    top_k_overlap: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillationMetrics:
    r"""Means over tokens that add up: a pytree of sums, whose attributes are the means.

    With the weight $w$ of each token, which is 0 where `where` drops it, an attribute
    is $\sum w x / \sum w$. That of `cross_entropy` is over the tokens with a label. It
    is 0 where no token has weight, and NaN if a token with weight is. All are scalars
    in the dtype of the loss, or `[...]` with `per_token_metrics=True`, and constants to
    differentiation.

    The leaves are the sums alone, so whatever adds leaves up adds metrics up:

    - `a + b` are the metrics of the tokens of both, exactly, however many tokens each
      has; so is `sum` of a list. `zeros` is where a `jax.lax.scan` starts.
    - `jax.tree.map(lambda x: x.sum(axis), metrics)` does so for stacked metrics, as
      `jax.vmap` and `jax.lax.scan` return them, and for an axis of tokens.
    - `jax.lax.psum(metrics, axis)` does so over the devices of a mesh axis that spreads
      the tokens.

    With a mean in place of the sum, such as `jax.lax.pmean`, the attributes are the
    same but for `weight`. Means of the attributes themselves are wrong where weights
    differ. The `+` of float32 counts tokens exactly up to $2^{24}$, about 17 million.
    """

    sums: MetricSums
    r"""$\sum w x$ of each attribute, by its name."""

    weight: jax.Array
    r"""$\sum w$: the sum of `weights` over the tokens that `where` keeps."""

    label_weight: jax.Array | None
    r"""$\sum w$ over the tokens with a label. None without `labels`."""

    @property
    def divergence(self) -> jax.Array:
        """Mean divergence at the given temperatures, without the T² factor."""
        return _mean(self.sums.divergence, self.weight)

    @property
    def kl(self) -> jax.Array:
        r"""Mean $\mathrm{KL}(p \,\|\, q)$ at temperature 1, in nats. Beside a
        `SparseTeacher`, it and both entropies are of the outcomes that the loss
        compares, at its temperatures."""
        return _mean(self.sums.kl, self.weight)

    @property
    def cross_entropy(self) -> jax.Array | None:
        """Mean cross-entropy to the labels in nats, label smoothing included, over
        `label_weight`. None without `labels`."""
        if self.sums.cross_entropy is None or self.label_weight is None:
            return None
        return _mean(self.sums.cross_entropy, self.label_weight)

    @property
    def student_entropy(self) -> jax.Array:
        """Mean entropy of the student at temperature 1, in nats; see `kl`."""
        return _mean(self.sums.student_entropy, self.weight)

    @property
    def teacher_entropy(self) -> jax.Array:
        """Mean entropy of the teacher at temperature 1, in nats; see `kl`."""
        return _mean(self.sums.teacher_entropy, self.weight)

    @property
    def top1_agreement(self) -> jax.Array:
        """Share of the weight on tokens where the most likely column is the same."""
        return _mean(self.sums.top1_agreement, self.weight)

    @property
    def teacher_listed_mass(self) -> jax.Array | None:
        r"""Mean of $\sum_L p$, the probabilities in the list of a `SparseTeacher` as it
        was given: what the tail has to account for is the rest to 1. None for other
        teachers, like the two that follow."""
        return self._mean_of_list(self.sums.teacher_listed_mass)

    @property
    def student_listed_mass(self) -> jax.Array | None:
        r"""Mean of $\sum_L q$, what the student gives the columns of the list at the
        temperature of the loss."""
        return self._mean_of_list(self.sums.student_listed_mass)

    @property
    def top_k_overlap(self) -> jax.Array | None:
        r"""Mean share of the listed columns that are among the student's $k$ largest.

        $k$ is the number of different columns in the token's list: empty slots are not
        counted, and repeated columns once. A column is among the $k$ largest if fewer
        than $k$ columns have a larger logit. A token without any column has 0.
        """
        return self._mean_of_list(self.sums.top_k_overlap)

    def _mean_of_list(self, total: jax.Array | None) -> jax.Array | None:
        return None if total is None else _mean(total, self.weight)

    @classmethod
    def zeros(
        cls,
        *,
        labels: bool = False,
        sparse_teacher: bool = False,
        shape: tuple[int, ...] = (),
        dtype: DTypeLike = jnp.float32,
    ) -> "DistillationMetrics":
        """The metrics of no token: what `+` and a scan start from.

        They have the structure of the metrics to be added.

        Args:
          labels: Whether the loss has `labels`.
          sparse_teacher: Whether the teacher is a `SparseTeacher`.
          shape: `()`, or that of the tokens with `per_token_metrics=True`.
          dtype: That of the loss: float64 if an argument of it is, else float32.
        """
        zero = jnp.zeros(shape, dtype)
        of_labels, of_list = (zero if x else None for x in (labels, sparse_teacher))
        sums = MetricSums(zero, zero, of_labels, zero, zero, zero, *(of_list,) * 3)
        return cls(sums, zero, of_labels)

    def __add__(self, other: "DistillationMetrics") -> "DistillationMetrics":
        """The metrics of the tokens of both.

        Raises:
          ValueError: If an attribute is None in one of them and not in the other.
        """
        if not isinstance(other, DistillationMetrics):
            return NotImplemented
        differing = [
            name
            for name, x, y in zip(self.sums._fields, self.sums, other.sums, strict=True)
            if (x is None) != (y is None)
        ]
        if differing:
            flags = {"labels": "cross_entropy", "sparse_teacher": "top_k_overlap"}
            given = [f"{flag}=True" for flag, x in flags.items() if x in differing]
            raise ValueError(
                "`+` needs metrics with the same attributes; in one of these "
                f"{', '.join(differing)} is None, and in the other not: start from "
                f"`DistillationMetrics.zeros({', '.join(given)})`, or give both losses "
                "the same kinds of arguments."
            )
        return jax.tree.map(jnp.add, self, other)

    def __radd__(self, other: int) -> "DistillationMetrics":
        # `sum` starts at 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def compute(self) -> dict[str, jax.Array]:
        """The attributes by name, without those that are None: under `jit` too."""
        names = (*self.sums._fields, "weight")
        means = {name: getattr(self, name) for name in names}
        return {name: x for name, x in means.items() if x is not None}

    def to_dict(self) -> dict[str, float]:
        """`compute`, as Python floats for a logger: lists of them, if metrics are
        `[...]`. All come from the device in one transfer."""
        means = self.compute()
        values = jax.device_get(tuple(means.values()))
        return {name: x.tolist() for name, x in zip(means, values, strict=True)}


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """`total / weight`, and 0 without any weight."""
    is_empty = weight == 0
    return jnp.where(is_empty, 0, total / jnp.where(is_empty, 1, weight))


def metrics_of(
    prepared: Prepared,
    terms: tuple[jax.Array, ...],
    values: MetricValues,
    *,
    per_token: bool,
) -> DistillationMetrics:
    """The sums of what the engine returns, `[B]` each, or its tokens, `[...]`."""
    assert prepared.weight is not None
    weight = jax.lax.stop_gradient(prepared.weight)
    total: Callable[[jax.Array], jax.Array] = jnp.sum
    if per_token:
        total = lambda x: x.reshape(prepared.batch_shape)
    weighted = lambda x: total(weigh(weight, x))
    pairs = zip(prepared.operands.terms, terms, strict=True)
    of = {type(term): (term, value) for term, value in pairs}
    cross_entropy = label_weight = None
    if Label in of:
        label, cross_entropy = of[Label]
        of_labels = zero_unless(label.labels != IGNORED_LABEL, weight)
        if Uniform in of:
            smoothing = jnp.asarray(prepared.label_smoothing, weight.dtype)
            cross_entropy = weigh(1 - smoothing, cross_entropy)
            cross_entropy += weigh(smoothing, of[Uniform][1])
        cross_entropy = total(weigh(of_labels, cross_entropy))
        label_weight = total(of_labels)
    sums = MetricSums(
        weighted(terms[0]),  # that of the teacher
        weighted(values.kl),
        cross_entropy,
        weighted(values.student_entropy),
        weighted(values.teacher_entropy),
        weighted(values.top1_agreement),
        *(map(weighted, values.of_list) if values.of_list else (None,) * 3),
    )
    return DistillationMetrics(sums, total(weight), label_weight)
