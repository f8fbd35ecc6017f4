r"""What each column must know of all columns of its row: maxima, and sums.

With $u = t / T_t$ and $z = s / T$, each less its maximum, and $d = z - u$, the sums are
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

Sums of two sets of columns add up once they are relative to the same maxima.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._math.numerics import near_part, tanh_excess
from .._math.softmax import finite_max, Model


class Maxima(NamedTuple):
    """The largest logit of each row, `[B]`."""

    student: Any
    teacher: Any = None
    unlisted: Any = None  # the student's, outside the teacher's list


class ReverseSums(NamedTuple):
    """The sum of $e^z d$; and those of $e^z$ and $e^z d$ below the top."""

    log_ratio: Any
    prob_below: Any
    log_ratio_below: Any


class Unlisted(NamedTuple):
    """Sums over the columns outside a list, relative to the largest of them."""

    sum_exp: Any  # Σ e^z
    shifted: Any  # Σ e^z z


class RowSums(NamedTuple):
    """Sums over columns, `[B]` each but for `listed`; None: not needed."""

    student: Any = None  # Σ e^z
    teacher: Any = None  # Σ e^u
    difference: Any = None  # Σ (e^z - e^u)
    student_at_1: Any = None  # Σ e^z at temperature 1, if that is another
    teacher_at_1: Any = None
    # At the temperature of the student's own terms: Σ e^z below the top, and Σ e^z z
    below: Any = None
    shifted: Any = None
    present: Any = None  # the number of columns that are not -inf
    reverse: ReverseSums | None = None
    # The student's logits of a teacher's list, `[B, k]`: each is in one set of columns,
    # and 0 in the others.
    listed: Any = None
    unlisted: Unlisted | None = None

    @property
    def student_only(self) -> Any:
        """`Σ e^z` at the temperature of the student's own terms."""
        return self.student if self.student_at_1 is None else self.student_at_1


class RowStats(NamedTuple):
    """All that a column must know of the others of its row."""

    maxima: Maxima
    sums: RowSums


def pair_sums(
    p: Model, q: Model, *, same_temperature: bool, reverse: bool
) -> dict[str, Any]:
    """The sums of `RowSums` that teacher and student have together."""
    u, z = p.shifted(), q.shifted()
    d = difference_of_shifted(p, q, same_temperature)
    difference = jnp.sum(_exp_difference(u, z, d), axis=-1)
    if not reverse:
        return dict(difference=difference)
    exp_z = jnp.exp(z)
    below = below_top(z) * exp_z
    sums = (jnp.sum(x, axis=-1) for x in (exp_z * d, below, below * d))
    return dict(difference=difference, reverse=ReverseSums(*sums))


# A probability above which a column is certainly the only one near the maximum.
CERTAIN = 0.75
TOP, _HUGE = 0.25, 1e30


def below_top(z: jax.Array) -> jax.Array:
    """1 for columns with `z < -1/4`, else 0."""
    # XLA on CPU fuses a minimum with a sum, but not a select.
    return jax.lax.stop_gradient(jnp.clip((-TOP - z) * _HUGE, 0, 1))


def sum_without_top(so_far: jax.Array, below: jax.Array, move: jax.Array) -> jax.Array:
    """The sum `below` the top, when the maximum moves by `move`; `so_far` has all.

    If it moves farther than the top reaches, all columns so far are below. If it does
    not, no column is certain until it moves again, or ever.
    """
    return jnp.where(move < -TOP, so_far, below)


def sum_exp(model: Model) -> jax.Array:
    return jnp.sum(jnp.exp(model.shifted()), axis=-1)


def log_sum_ratio(sums: RowSums) -> jax.Array:
    """`log(Z / U)`, `[B]`."""
    up = sums.difference > 0
    smaller = jnp.where(up, sums.teacher, sums.student)
    ratio = jnp.log1p(jnp.abs(sums.difference) / smaller)
    return jnp.where(up, ratio, -ratio)


def difference_of_shifted(p: Model, q: Model, same_temperature: bool) -> jax.Array:
    """`z - u`, the shifted logits of `q` less those of `p`."""
    if same_temperature:
        # The differences are exact where the logits are near.
        difference = q.stats.less_max(q.logits) - p.stats.less_max(p.logits)
        return q.stats.over_temperature(difference)
    # A compiler fuses the difference of two quotients so that it rounds one and not
    # the other, and equal models would differ. It does not fuse through a maximum.
    u, z = p.shifted(), q.shifted()
    lowest = jnp.finfo(u.dtype).min
    return jnp.maximum(z, lowest) - jnp.maximum(u, lowest)


def _exp_difference(u: jax.Array, z: jax.Array, z_less_u: jax.Array) -> jax.Array:
    """`e^z - e^u`, to the last digits where they are near."""
    near, r = near_part(z_less_u)
    exp_u, exp_z = jnp.exp(u), jnp.exp(z)
    series = (exp_z + exp_u) * ((0.5 + tanh_excess(r)) * r)
    return jnp.where(near, series, exp_z - exp_u)


def rescaled(
    stats: RowStats,
    new: Maxima,
    student_temperature: jax.Array | None,
    teacher_temperature: jax.Array | None,
) -> RowSums:
    """The sums relative to maxima that are as large or larger."""
    old, sums = stats
    z_at_1 = _move(old.student, new.student)
    z = _over(student_temperature, z_at_1)
    times = lambda x, move: None if x is None else x * jnp.exp(move)
    result = RowSums(
        student=times(sums.student, z),
        student_at_1=times(sums.student_at_1, z_at_1),
        listed=sums.listed,
        present=sums.present,
    )
    if sums.unlisted is not None:
        move = _over(student_temperature, _move(old.unlisted, new.unlisted))
        total, shifted = sums.unlisted
        moved = Unlisted(times(total, move), times(shifted + move * total, move))
        result = result._replace(unlisted=moved)
    if sums.below is not None:
        student_only = z if sums.student_at_1 is None else z_at_1
        below = sum_without_top(sums.student_only, sums.below, student_only)
        result = result._replace(below=times(below, student_only))
        if sums.shifted is not None:
            shifted = sums.shifted + student_only * sums.student_only
            result = result._replace(shifted=times(shifted, student_only))
    if sums.teacher is None:
        return result
    u_at_1 = _move(old.teacher, new.teacher)
    u = _over(teacher_temperature, u_at_1)
    # Σ (e^(z + a) - e^(u + b)) = e^a Σ (e^z - e^u) + (e^a - e^b) Σ e^u
    growth = _exp_difference(u, z, z - u)
    difference = sums.difference * jnp.exp(z) + growth * sums.teacher
    result = result._replace(
        teacher=times(sums.teacher, u),
        teacher_at_1=times(sums.teacher_at_1, u_at_1),
        difference=difference,
    )
    if sums.reverse is None:
        return result
    # d grows by z - u.
    prob_below = sum_without_top(sums.student, sums.reverse.prob_below, z)
    below = sum_without_top(sums.reverse.log_ratio, sums.reverse.log_ratio_below, z)
    reverse = ReverseSums(
        log_ratio=sums.reverse.log_ratio + (z - u) * sums.student,
        prob_below=prob_below,
        log_ratio_below=below + (z - u) * prob_below,
    )
    return result._replace(reverse=ReverseSums(*(times(x, z) for x in reverse)))


def merged(
    stats: RowStats,
    more: RowStats,
    student_temperature: jax.Array | None,
    teacher_temperature: jax.Array | None,
) -> RowStats:
    """The statistics of two sets of columns together."""
    maxima = jax.tree.map(jnp.maximum, stats.maxima, more.maxima)
    temperatures = student_temperature, teacher_temperature
    both = (rescaled(x, maxima, *temperatures) for x in (stats, more))
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
