"""The columns at hand, and what is known of all columns of their rows."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._math.softmax import finite_max, Model, SoftmaxStats
from .._math.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Row:
    """A token's logits over a temperature: that of the loss, or 1."""

    logits: str  # a name in `Columns.logits`
    at_1: bool = False


class RowStats(NamedTuple):
    """All that a column must know of the others of its row."""

    maxima: dict[str, jax.Array]  # the largest of each kind of logits, `[B]`
    sums: "dict[Statistic, Any]"


class Columns(NamedTuple):
    """Some columns of some tokens: the vocabulary, a device's slice of it, or a block.

    Without logits, it is what is known of all columns.
    """

    vocab: Vocabulary
    temperatures: Mapping[str, jax.Array | None]  # of each kind of logits; None: 1
    # "student", "teacher" and, beside a teacher's list, the student's "listed" logits,
    # `[B, k]`, and "unlisted", with -inf in the columns of the list.
    logits: dict[str, jax.Array]
    rows: RowStats

    def row(self, logits: str, *, at_1: bool) -> Row:
        """The row: the same one at both temperatures if that of the loss is 1."""
        return Row(logits, at_1 and self.temperatures[logits] is not None)

    def stats(self, row: Row) -> SoftmaxStats:
        temperature = None if row.at_1 else self.temperatures[row.logits]
        sum_exp = self.rows.sums.get(SumExp(row))
        return SoftmaxStats(self.rows.maxima[row.logits], temperature, sum_exp)

    def model(self, row: Row) -> Model:
        return Model(self.logits[row.logits], self.stats(row))

    def of_all(self) -> "Columns":
        """What is known of all columns."""
        return self._replace(logits={})


@dataclasses.dataclass(frozen=True)
class Statistic(abc.ABC):
    """A sum over the columns of a row, relative to its maximum, `[B]`.

    Its name is itself, so that terms which need the same one share it.
    """

    row: Row

    def __lt__(self, other: "Statistic") -> bool:
        return repr(self) < repr(other)  # JAX sorts the keys of a dict

    @property
    def rows(self) -> tuple[Row, ...]:
        """Those on whose maxima it depends."""
        return (self.row,)

    @abc.abstractmethod
    def of(self, c: Columns) -> Any:
        """The sum over the columns at hand, of whose rows the maxima are known."""

    @abc.abstractmethod
    def rescaled(
        self, x: Any, sums: "dict[Statistic, Any]", moves: dict[Row, jax.Array]
    ) -> Any:
        """The sum `x`, one of `sums`, once logits less their maximum move by `moves`,
        which are at most 0."""


class SumExp(Statistic):
    """`Σ e^z`."""

    def of(self, c):
        return sum_exp(c.model(self.row))

    def rescaled(self, x, sums, moves):
        del sums
        return x * jnp.exp(moves[self.row])


def sum_exp(model: Model) -> jax.Array:
    return jnp.sum(jnp.exp(model.shifted()), axis=-1)


def rescaled(
    stats: RowStats,
    new: dict[str, jax.Array],
    temperatures: Mapping[str, jax.Array | None],
) -> RowStats:
    """The sums relative to maxima that are as large or larger."""
    old, sums = stats
    moves = {}
    for row in dict.fromkeys(row for statistic in sums for row in statistic.rows):
        move = _move(old[row.logits], new[row.logits])
        moves[row] = _over(None if row.at_1 else temperatures[row.logits], move)
    return RowStats(new, {s: s.rescaled(x, sums, moves) for s, x in sums.items()})


def merged(
    stats: RowStats, more: RowStats, temperatures: Mapping[str, jax.Array | None]
) -> RowStats:
    """The statistics of two sets of columns together."""
    maxima = jax.tree.map(jnp.maximum, stats.maxima, more.maxima)
    both = (rescaled(x, maxima, temperatures).sums for x in (stats, more))
    return RowStats(maxima, jax.tree.map(jnp.add, *both))


def _move(old: jax.Array, new: jax.Array) -> jax.Array:
    """By how much logits less their maximum move, at most 0, if that grows to `new`."""
    move = finite_max(old) - finite_max(new)
    # Sums of no column, or of columns that are absent, are 0 and stay so.
    return jnp.where(old == -jnp.inf, jnp.finfo(old.dtype).min / 16, move)


def _over(temperature: jax.Array | None, x: jax.Array) -> jax.Array:
    if temperature is None:
        return x
    return jnp.maximum(x / temperature, jnp.finfo(x.dtype).min / 16)
