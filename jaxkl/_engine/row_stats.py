r"""The columns at hand, and what is known of all columns of their rows.

That is their maxima, and sums that keep the digits of what is made of them. With
$u = t / T_t$ and $z = s / T$, each less its maximum, and $d = z - u$, the sums are
$\sum e^u$, $\sum e^z$ and a few more. They make three things accurate:

- The log-ratio is $\log q - \log p = d - \log (Z / U)$ of the sums $Z = \sum e^z$ and
  $U = \sum e^u$. $\log (Z / U)$ is computed from $\Delta = \sum (e^z - e^u)$, whose
  terms do not cancel: its error is relative to itself, not to $\log Z$ and $\log U$.
- The gradient of $\mathrm{KL}(q \,\|\, p)$ is $q\,(d - \sum e^z d / Z)$, in which the
  normalisers have cancelled. In a column that is certain, with $q > 3/4$, the
  difference cancels too. There it is $q\,(d \sum' e^z - \sum' e^z d) / Z$, with sums
  over the other columns.
- What the student has alone keeps its digits by the sum over the other columns, if one
  column is certain: see `student_terms`.

The certain column is told from the others by $z \ge -1/4$ in one phase and by
$q > 3/4$ in another: where one has $q > 3/4$, all others have $z < -1$. Nothing may
depend on $z = 0$ in the largest column. The logits may be products that the compiler
rounds in one fusion and not in another, or may have been made again.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._math.numerics import near_part, tanh_excess, zero_unless
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
    logits: Mapping[str, jax.Array] = MappingProxyType({})
    rows: RowStats = RowStats({}, {})

    def row(self, logits: str, *, at_1: bool) -> Row:
        """The row: the same one at both temperatures if that of the loss is 1."""
        return Row(logits, at_1 and self.temperatures[logits] is not None)

    def stats(self, row: Row) -> SoftmaxStats:
        temperature = None if row.at_1 else self.temperatures[row.logits]
        sum_exp = self.rows.sums.get(SumExp(row))
        return SoftmaxStats(self.rows.maxima[row.logits], temperature, sum_exp)

    def model(self, row: Row) -> Model:
        return Model(self.logits[row.logits], self.stats(row))


@dataclasses.dataclass(frozen=True)
class Statistic(abc.ABC):
    """A sum over the columns of a row, relative to its maximum, `[B]`.

    It is the key of its sum in a dict: equal ones are made once and shared.
    """

    row: Row

    def __lt__(self, other: "Statistic") -> bool:
        # JAX sorts the keys of a dict: this order is the same in all processes.
        return repr(self) < repr(other)

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


# A probability above which a column is certainly the only one near the maximum.
CERTAIN = 0.75
TOP, _EXP_TOP = 0.25, math.exp(-0.25)


class Below(Statistic):
    """`Σ' e^z`: the sum below the top."""

    def of(self, c):
        return jnp.sum(_below_top(jnp.exp(c.model(self.row).shifted())), axis=-1)

    def rescaled(self, x, sums, moves):
        move = moves[self.row]
        return _sum_without_top(sums[SumExp(self.row)], x, move) * jnp.exp(move)


class Shifted(Statistic):
    """`Σ e^z z`."""

    def of(self, c):
        z = c.model(self.row).shifted()
        return jnp.sum(jnp.exp(z) * z, axis=-1)

    def rescaled(self, x, sums, moves):
        move = moves[self.row]
        return (x + move * sums[SumExp(self.row)]) * jnp.exp(move)


class Present(Statistic):
    """The number of columns that are not -inf."""

    def of(self, c):
        logits = c.logits[self.row.logits]
        return jnp.sum((logits != -jnp.inf).astype(logits.dtype), axis=-1)

    def rescaled(self, x, sums, moves):
        del sums, moves
        return x


class Listed(Statistic):
    """The logits of a list, `[B, k]`: 0 in the columns that are not at hand."""

    @property
    def rows(self):
        return ()  # it is relative to no maximum

    def of(self, c):
        return c.logits[self.row.logits]

    def rescaled(self, x, sums, moves):
        del sums, moves
        return x


class ReverseSums(NamedTuple):
    """The sum of $e^z d$; and those of $e^z$ and $e^z d$ below the top."""

    log_ratio: jax.Array
    prob_below: jax.Array
    log_ratio_below: jax.Array


# Columns of which the roundings of a difference of exponentials add up to nothing.
_MANY = 1024


class PairSums(NamedTuple):
    """What a teacher `p` and a student `q` have together, `[B]` each."""

    difference: jax.Array  # Σ (e^z - e^u)
    reverse: ReverseSums | None  # None: not needed

    @classmethod
    def of(
        cls, p: Model, q: Model, *, same_temperature: bool, reverse: bool
    ) -> "PairSums":
        u, z = p.shifted(), q.shifted()
        exp_z, exp_u = jnp.exp(z), jnp.exp(u)
        d, over_temperature = _undivided_difference(p, q, same_temperature)
        if z.shape[-1] >= _MANY:
            less = exp_z - exp_u
        else:
            less = _exp_difference(u, z, over_temperature(d))
        difference = jnp.sum(less, axis=-1)
        if not reverse:
            return cls(difference, None)
        # XLA on GPUs would store a comparison that both sums below the top share.
        below, d_below = _below_top(exp_z), zero_unless(z < -TOP, exp_z * d)
        reverse_sums = ReverseSums(
            log_ratio=over_temperature(jnp.sum(exp_z * d, axis=-1)),
            prob_below=jnp.sum(below, axis=-1),
            log_ratio_below=over_temperature(jnp.sum(d_below, axis=-1)),
        )
        return cls(difference, reverse_sums)


@dataclasses.dataclass(frozen=True)
class Paired(Statistic):
    """The `PairSums` of the row of the student and that of a teacher."""

    teacher: Row
    same_temperature: bool
    reverse: bool

    @property
    def rows(self):
        return self.row, self.teacher

    def of(self, c):
        return PairSums.of(
            c.model(self.teacher),
            c.model(self.row),
            same_temperature=self.same_temperature,
            reverse=self.reverse,
        )

    def rescaled(self, x, sums, moves):
        z, u = moves[self.row], moves[self.teacher]
        of_student, of_teacher = sums[SumExp(self.row)], sums[SumExp(self.teacher)]
        # Σ (e^(z + a) - e^(u + b)) = e^a Σ (e^z - e^u) + (e^a - e^b) Σ e^u
        growth = _exp_difference(u, z, z - u)
        difference = x.difference * jnp.exp(z) + growth * of_teacher
        if x.reverse is None:
            return PairSums(difference, None)
        # d grows by z - u.
        prob_below = _sum_without_top(of_student, x.reverse.prob_below, z)
        below = _sum_without_top(x.reverse.log_ratio, x.reverse.log_ratio_below, z)
        reverse = ReverseSums(
            log_ratio=x.reverse.log_ratio + (z - u) * of_student,
            prob_below=prob_below,
            log_ratio_below=below + (z - u) * prob_below,
        )
        return PairSums(difference, ReverseSums(*(x * jnp.exp(z) for x in reverse)))


def log_sum_ratio(p: Model, q: Model, difference: jax.Array) -> jax.Array:
    """`log(Z / U)`, `[B]`."""
    up = difference > 0
    smaller = jnp.where(up, p.stats.total, q.stats.total)
    ratio = jnp.log1p(jnp.abs(difference) / smaller)
    return jnp.where(up, ratio, -ratio)


def difference_of_shifted(p: Model, q: Model, same_temperature: bool) -> jax.Array:
    """`z - u`, the shifted logits of `q` less those of `p`."""
    d, over_temperature = _undivided_difference(p, q, same_temperature)
    return over_temperature(d)


def _undivided_difference(p: Model, q: Model, same_temperature: bool):
    """`z - u` but for a temperature, and what divides it, or its sums, by that."""
    if same_temperature:
        # The differences are exact where the logits are near.
        difference = q.stats.less_max(q.logits) - p.stats.less_max(p.logits)
        return difference, q.stats.over_temperature
    # A compiler fuses the difference of two quotients so that it rounds one and not
    # the other, and equal models would differ. It does not fuse through a maximum.
    u, z = p.shifted(), q.shifted()
    lowest = jnp.finfo(u.dtype).min
    return jnp.maximum(z, lowest) - jnp.maximum(u, lowest), lambda x: x


def _exp_difference(u: jax.Array, z: jax.Array, z_less_u: jax.Array) -> jax.Array:
    """`e^z - e^u`, to the last digits where they are near."""
    near, r = near_part(z_less_u)
    exp_u, exp_z = jnp.exp(u), jnp.exp(z)
    series = (exp_z + exp_u) * ((1 + tanh_excess(r)) * (r / 2))
    return jnp.where(near, series, exp_z - exp_u)


def _below_top(exp_z: jax.Array) -> jax.Array:
    """`e^z` of columns with `z < -1/4`, else 0."""
    return zero_unless(exp_z < _EXP_TOP, exp_z)


def _sum_without_top(so_far: jax.Array, below: jax.Array, move: jax.Array) -> jax.Array:
    """The sum `below` the top, when the maximum moves by `move`; `so_far` has all.

    If it moves farther than the top reaches, all columns so far are below. If it does
    not, no column is certain until it moves again, or ever.
    """
    return jnp.where(move < -TOP, so_far, below)
