"""What the engine is given, and what it returns."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp

from .._divergence.catalogue import Divergence
from .._divergence.parameters import join
from .._math.vocabulary import Vocabulary
from .._source.base import Source
from .._util.compat import to_varying, varying_axes


PlanName = Literal["fast", "lean"]


class LossTerms(NamedTuple):
    """The terms of a token's loss, `[B]` each, or the weights of these terms.

    All but the first are of the student alone: at temperature 1 if there is a
    divergence, else at the student's. A term is None if it is not part of the loss.
    """

    divergence: Any
    label: Any = None  # -log q[label], of the labels' shape
    uniform: Any = None  # -mean_v log q_v, for label smoothing
    lse_squared: Any = None
    entropy: Any = None

    @property
    def per_token(self) -> jax.Array:
        """One of them that is `[B]`, or the first of each token."""
        x = jax.tree.leaves(self)[0]
        return x if x.ndim == 1 else x[:, 0]

    @property
    def has_own_terms(self) -> bool:
        """Whether there are terms of the student alone."""
        return any(w is not None for w in self[1:])

    @property
    def any_nonzero(self) -> jax.Array:
        """Whether a token has any that is not 0, bool `[B]`."""
        of_token = lambda x: jnp.any(x != 0, axis=range(1, x.ndim))
        return ft.reduce(jnp.logical_or, map(of_token, jax.tree.leaves(self)))


class ListStatistics(NamedTuple):
    """See `DistillationMetrics`, `[B]` each."""

    teacher_listed_mass: jax.Array
    student_listed_mass: jax.Array
    top_k_overlap: jax.Array


class Statistics(NamedTuple):
    """What the metrics report beside the terms, at temperature 1, `[B]` each."""

    kl: jax.Array
    student_entropy: jax.Array
    teacher_entropy: jax.Array
    top1_agreement: jax.Array
    of_list: ListStatistics | None  # None: the teacher has no list


class Operands(NamedTuple):
    """All arrays of a loss. Those that are not in a source are `[B]`, but for labels.

    A tree of flags, dtypes or gradients, one for each array, is an `Operands` too.
    """

    student: Any  # Source
    teacher: Any  # Source
    weights: LossTerms
    student_temperature: Any = None  # None: 1
    teacher_temperature: Any = None  # None: 1, or the student's if they are the same
    labels: Any = None  # [B], or several a token, [B, k]; negative: none
    mask: Any = None  # the tokens that `where` keeps; None: all
    parameters: tuple[Any, ...] = ()  # those of the divergence that are arrays
    rows: Any = None  # RowStats, if a walk has made them before

    @property
    def tokens(self) -> int:
        return jax.tree.leaves(self.weights)[0].shape[0]

    def map_sources(self, f: Callable[[Source], Source]) -> Self:
        return self._replace(student=f(self.student), teacher=f(self.teacher))

    def map_tokens(self, f: Callable[[jax.Array], jax.Array]) -> Self:
        """`f` of each array that has a row for each token."""
        sources = (x.map_tokens(f) for x in self[:2])
        return type(self)(*sources, *jax.tree.map(f, self[2:]))

    def shared_flags(self) -> Self:
        """A flag for each array: whether all tokens share it."""
        flags = jax.tree.map(lambda _: False, self)
        student, teacher = self.student.shared_flags(), self.teacher.shared_flags()
        return flags._replace(student=student, teacher=teacher)

    def by_column_flags(self) -> Self:
        """A flag for each array: whether its last axis is the columns."""
        flags = jax.tree.map(lambda _: False, self)
        student, teacher = (x.by_column_flags() for x in self[:2])
        return flags._replace(student=student, teacher=teacher)

    def match_varying(self, vocab_axis: str | None = None) -> Self:
        """Inside `shard_map`, casts all arrays to vary over the same mesh axes.

        The cast of a replicated array is where its gradient is summed over devices.
        Each slice of the vocabulary contributes a part of most gradients, so their
        arrays are cast to vary over `vocab_axis` too. The gradient of a weight is whole
        on each device, and weights are not cast to it.
        """
        axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(self)))
        axes -= {vocab_axis}
        per_token = (self.weights, self.labels, self.mask)
        weights, labels, mask = jax.tree.map(lambda x: to_varying(x, axes), per_token)
        if vocab_axis is not None:
            axes |= {vocab_axis}
        rest = self._replace(weights=None, labels=None, mask=None)
        rest = jax.tree.map(lambda x: to_varying(x, axes), rest)
        return rest._replace(weights=weights, labels=labels, mask=mask)


@dataclasses.dataclass(frozen=True)
class Spec:
    """All of a loss that is not an array."""

    divergence: Divergence | None  # its static part; None: there is no teacher
    vocab: Vocabulary
    dtype: jnp.dtype
    reduce: bool = True  # whether the loss is summed over tokens
    statistics: bool = False
    same_temperature: bool = False  # whether the teacher has the student's
    tile: int | None = None  # the user's choice
    plan: PlanName | None = None  # likewise
    passes_float16: bool = False  # whether a gradient does: see `Source`

    def whole_divergence(self, x: Operands) -> Divergence:
        """The divergence with its arrays, `[B]` each."""
        return join(self.divergence, x.parameters)

    def teacher_temperature(self, x: Operands) -> jax.Array | None:
        return x.student_temperature if self.same_temperature else x.teacher_temperature


class Result(NamedTuple):
    """What the engine returns of some tokens: of a tile, or of all of them."""

    terms: Any  # LossTerms
    statistics: Statistics | None
    # Gradients of Σ weight · term. `run_tile` has the `d_outputs` of a source in place
    # of the source, and `pull_back` makes them the gradients of its arrays.
    gradients: Operands
    counted: jax.Array  # [B]: the tokens that count in gradients of shared arrays
    rows: Any = None  # RowStats, if the loss is not summed over tokens and they are new
