"""What the engine is given, and what it returns."""

import dataclasses
import functools as ft
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from .._math.vocabulary import Vocabulary
from .._source.base import Source
from .._util.compat import to_varying, varying_axes
from .comparison import Comparison
from .metrics import MetricValues
from .term import Gradients


PlanName = Literal["fast", "lean"]


class Operands(NamedTuple):
    """All arrays of a loss, whose tokens are on one axis.

    A tree of flags, dtypes or gradients, one for each array, is an `Operands` too.
    """

    student: Any  # Source
    terms: tuple[Any, ...]  # Term
    student_temperature: Any = None  # [B]; None: 1
    mask: Any = None  # [B]: the tokens that `where` keeps; None: all
    rows: Any = None  # RowStats, if a walk has made them before

    @property
    def comparison(self) -> Comparison | None:
        """The term of a teacher, of which there is at most one."""
        found = [x for x in self.terms if isinstance(x, Comparison)]
        assert len(found) < 2
        return found[0] if found else None

    def _map_comparison(self, f: Callable[[Comparison], Comparison]) -> Self:
        terms = (f(x) if isinstance(x, Comparison) else x for x in self.terms)
        return self._replace(terms=tuple(terms))

    @property
    def sources(self) -> tuple[Any, ...]:
        """The student, and the teacher if there is one."""
        x = self.comparison
        return (self.student,) if x is None else (self.student, x.teacher)

    def with_sources(self, sources: Sequence[Any]) -> Self:
        student, *teachers = sources
        with_teacher = lambda x: dataclasses.replace(x, teacher=teachers[0])
        return self._replace(student=student)._map_comparison(with_teacher)

    @property
    def weights(self) -> tuple[Any, ...]:
        return tuple(term.weight for term in self.terms)

    def with_weights(self, weights: Iterable[Any]) -> Self:
        pairs = zip(self.terms, weights, strict=True)
        terms = tuple(dataclasses.replace(x, weight=weight) for x, weight in pairs)
        return self._replace(terms=terms)

    @property
    def tokens(self) -> int:
        return self.weights[0].shape[0]

    @property
    def per_token(self) -> jax.Array:
        """A number of each token, `[B]`: a weight."""
        weight = self.weights[0]
        return weight if weight.ndim == 1 else weight[:, 0]

    @property
    def is_weighted(self) -> jax.Array:
        """Whether any term of a token has a weight that is not 0, bool `[B]`."""
        return ft.reduce(jnp.logical_or, (term.is_weighted for term in self.terms))

    @property
    def temperatures(self) -> dict[str, jax.Array | None]:
        """That of each kind of logits: see `Columns`."""
        T = self.student_temperature
        temperatures = dict(student=T, listed=T, unlisted=T)
        if (x := self.comparison) is not None:
            temperatures["teacher"] = T if x.same_temperature else x.temperature
        return temperatures

    def map_sources(self, f: Callable[[Source], Source]) -> Self:
        return self.with_sources([f(source) for source in self.sources])

    def _map(self, of_source: Callable[[Source], Any], f: Callable[[Any], Any]) -> Self:
        """`of_source` of the sources, and `f` of all other arrays."""
        of_leaf = lambda x: of_source(x) if _is_source(x) else f(x)
        return jax.tree.map(of_leaf, self, is_leaf=_is_source)

    def map_tokens(self, f: Callable[[jax.Array], jax.Array]) -> Self:
        """`f` of each array that has a row for each token."""
        return self._map(lambda source: source.map_tokens(f), f)

    def padded(self, pad: Callable[[jax.Array, int], jax.Array]) -> Self:
        """`pad(array, padding)` of each array that has a row for each token.

        Padding tokens have no weight. Of a temperature or a sum of 0 a second
        derivative would be NaN, and theirs are 1.
        """
        one = lambda x: jax.tree.map(lambda _: 1, x)
        of_teacher = lambda x: dataclasses.replace(x, temperature=one(x.temperature))
        padding = jax.tree.map(lambda _: 0, self)._map_comparison(of_teacher)
        padding = padding._replace(
            student_temperature=one(self.student_temperature), rows=one(self.rows)
        )

        def of_leaf(x, padding):
            is_array = not _is_source(x)
            return pad(x, padding) if is_array else x.map_tokens(lambda x: pad(x, 0))

        return jax.tree.map(of_leaf, self, padding, is_leaf=_is_source)

    def shared_flags(self) -> Self:
        """A flag for each array: whether all tokens share it."""
        return self._map(lambda source: source.shared_flags(), lambda _: False)

    def by_column_flags(self) -> Self:
        """A flag for each array: whether its last axis is the columns."""
        return self._map(lambda source: source.by_column_flags(), lambda _: False)

    def partition_specs(
        self, token_axes: tuple[str, ...], vocab_axis: str | None
    ) -> Self:
        """How each array is spread over a mesh: a `PartitionSpec` in its place."""
        of_source = lambda source: source.partition_specs(token_axes, vocab_axis)
        return self._map(of_source, lambda _: P(token_axes or None))

    def with_gradients(
        self, gradients: Gradients, logits: Mapping[str, jax.Array]
    ) -> Self:
        """The `d_outputs` of the sources in their place, and so of temperatures.

        `logits` are those of whose gradients the `d_outputs` are made.
        """

        def of(source, name):
            return source.d_outputs(logits.get(name), gradients.logits.get(name))

        sources = zip(self.sources, ("student", "teacher"), strict=False)
        d_T = gradients.temperatures
        of_teacher = lambda x: dataclasses.replace(x, temperature=d_T.get("teacher"))
        x = self.with_sources([of(*source) for source in sources])
        x = x._map_comparison(of_teacher)
        return x._replace(student_temperature=d_T.get("student"))

    def match_varying(self, vocab_axis: str | None = None) -> Self:
        """Inside `shard_map`, casts all arrays to vary over the same mesh axes.

        The cast of a replicated array is where its gradient is summed over devices.
        Each slice of the vocabulary contributes a part of most gradients, so their
        arrays are cast to vary over `vocab_axis` too. The gradient of a weight is whole
        on each device, and weights are not cast to it.
        """
        axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(self)))
        axes -= {vocab_axis}
        every = axes if vocab_axis is None else axes | {vocab_axis}
        flags = jax.tree.map(lambda _: False, self)
        terms = tuple(term.whole_flags() for term in self.terms)
        mask = jax.tree.map(lambda _: True, self.mask)
        is_whole = flags._replace(terms=terms, mask=mask)
        cast = lambda whole, x: to_varying(x, axes if whole else every)
        return jax.tree.map(cast, is_whole, self)


def _is_source(x: Any) -> bool:
    return isinstance(x, Source)


@dataclasses.dataclass(frozen=True)
class Spec:
    """All of a loss that is not an array."""

    vocab: Vocabulary
    dtype: jnp.dtype
    reduce: bool = True  # whether the loss is summed over tokens
    metrics: bool = False  # whether they are asked for
    tile: int | None = None  # the user's choice
    plan: PlanName | None = None  # likewise
    passes_float16: bool = False  # whether a gradient does: see `Source`


class Result(NamedTuple):
    """What the engine returns of some tokens: of a tile, or of all of them."""

    terms: tuple[jax.Array, ...]  # the value of each
    metrics: tuple[MetricValues, ...]  # of the teacher, if they are asked for
    # Gradients of Σ weight · term. `run_tile` has the `d_outputs` of a source in place
    # of the source, and `pull_back` makes them the gradients of its arrays.
    gradients: Operands
    counted: jax.Array  # [B]: the tokens that count in gradients of shared arrays
    rows: Any = None  # RowStats, if the loss is not summed over tokens and they are new


# The loss, the terms and the metrics.
Outputs = tuple[Any, tuple[jax.Array, ...], tuple[MetricValues, ...]]
