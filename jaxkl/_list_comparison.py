"""A teacher's list and a student's row, compared on the list and on the rest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._comparison import Comparison, OfEach, Pair
from ._compat import to_varying, varying_axes
from ._divergences import Divergence, evaluate
from ._lists import positions, safe_log
from ._numerics import zero_unless
from ._slopes import centred, SlopeSums, sum_slopes
from ._softmax import Model, Outcomes
from ._vocabulary import Vocabulary


class List(NamedTuple):
    """A teacher's list, `[B, k]`, and the outcome that all other columns are."""

    columns: jax.Array
    log_p: jax.Array
    has_rest: jax.Array  # [B]: whether there are other columns
    p_rest: Outcomes  # [B]
    # Whether the divergence is `Σ p (log p - log q)` of the list, without the rest.
    plain: bool

    def sums(self, student: Model, vocab: Vocabulary) -> tuple[jax.Array, jax.Array]:
        """`Σ e^z` over the columns at hand that are listed, and over the others."""
        at = positions(self.columns, vocab)
        exp_others = self._exp_others(student, at)
        exp_listed = jnp.exp(student.stats.shifted(_listed(student, at)))
        return jnp.sum(exp_listed, axis=-1), jnp.sum(exp_others, axis=-1)

    def sums_of_slopes(
        self, divergence: Divergence, pair: Pair, vocab: Vocabulary
    ) -> OfEach:
        _, (f_q, _), q, _ = self._slopes(divergence, pair, vocab)
        return OfEach(None, sum_slopes(f_q, q.prob))

    def compare(
        self, divergence: Divergence, pair: Pair, vocab: Vocabulary, sums: OfEach
    ) -> Comparison:
        """Compares the listed columns, and all others as one outcome."""
        value, (f_q, f_rest), q, q_rest = self._slopes(divergence, pair, vocab)
        sums_of_list: SlopeSums = sums.student
        total = sums_of_list.slope + f_rest
        # To an entry of the list, the rest is another column, and the other way round.
        with_rest = SlopeSums(
            total,
            sums_of_list.slope_of_others + f_rest,
            sums_of_list.prob_of_others + q_rest,
        )
        d_listed = centred(f_q, q.prob, with_rest)
        q_listed = pair.sums.listed / _total(pair)
        without_rest = SlopeSums(total, sums_of_list.slope, q_listed)
        d_rest = centred(f_rest[:, None], q_rest[:, None], without_rest)
        # Each of the other columns has its part of `d_rest`, by its part of `q_rest`.
        unlisted = pair.sums.unlisted
        has_mass = unlisted > 0
        part = zero_unless(has_mass, 1 / jnp.where(has_mass, unlisted, 1))
        at = positions(self.columns, vocab)
        d_student = self._exp_others(pair.student, at) * (part[:, None] * d_rest)
        d_student = d_student.at[at].add(d_listed, mode="drop")
        d_teacher = jnp.zeros_like(d_student)  # a list is a constant
        return Comparison(value, d_teacher, d_student)

    def _slopes(
        self, divergence: Divergence, pair: Pair, vocab: Vocabulary
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array], Outcomes, jax.Array]:
        """The divergence, its slopes of list and rest, and the student's outcomes."""
        at = positions(self.columns, vocab)
        is_here = at[1] < vocab.width
        listed = _listed(pair.student, at)
        sum_exp = _total(pair)
        stats = pair.student.stats._replace(sum_exp=sum_exp)
        q = stats.softmax(listed).outcomes
        # Mark it as varying now: a later implicit cast would psum its gradient.
        q_rest = to_varying(pair.sums.unlisted / sum_exp, varying_axes(listed))
        p = Outcomes.of_log(self.log_p)

        def divergences(log_q, log_q_rest):
            of_list = p, Outcomes.known(log_q, q.prob)
            of_rest = self.p_rest, Outcomes.known(log_q_rest, q_rest)
            if self.plain:
                value = plain_kl(*_equal_unless(is_here, *of_list))
                return value, jnp.zeros_like(log_q_rest)
            value = jnp.sum(evaluate_where(is_here, divergence, *of_list), axis=-1)
            return value, evaluate_where(self.has_rest, divergence, *of_rest)

        (of_list, of_rest), vjp = jax.vjp(divergences, q.log, safe_log(q_rest))
        slopes = vjp((jnp.ones_like(of_list), jnp.ones_like(of_rest)))
        return of_list + vocab.on_first_shard(of_rest), slopes, q, q_rest

    def _exp_others(self, student: Model, at: tuple[jax.Array, jax.Array]) -> jax.Array:
        """`e^z` of the columns that are not listed, and 0 in the others, `[B, V]`."""
        return jnp.exp(student.shifted()).at[at].set(0, mode="drop")


def _listed(student: Model, at: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The logits of the listed columns, `[B, k]`, `-inf` for those not at hand."""
    return student.logits.at[at].get(mode="fill", fill_value=-jnp.inf)


def _total(pair: Pair) -> jax.Array:
    """`Σ e^z`, with the rounding of its two parts, so that these are shares of it."""
    return pair.sums.unlisted + pair.sums.listed


def _equal_unless(condition: jax.Array, *models: Outcomes) -> list[Outcomes]:
    """The models where `condition`, and equal outcomes elsewhere.

    A divergence of equal outcomes is 0. Of an outcome that neither model has, a user's
    function may be NaN.
    """
    return [Outcomes(*(zero_unless(condition, y) for y in x)) for x in models]


def evaluate_where(
    condition: jax.Array,
    divergence: Divergence,
    p: Outcomes,
    q: Outcomes,
    log_ratio: jax.Array | None = None,
) -> jax.Array:
    """`f(log p, log q)` where `condition`, and 0 elsewhere."""
    p, q = _equal_unless(condition, p, q)
    if log_ratio is not None:
        log_ratio = zero_unless(condition, log_ratio)
    return zero_unless(condition, evaluate(divergence, p, q, log_ratio))


def plain_kl(p: Outcomes, q: Outcomes) -> jax.Array:
    """`Σ p (log p - log q)`. The form without cancellation does not hold here, as the
    listed probabilities do not sum to 1."""
    return jnp.sum(p.prob * zero_unless(p.prob > 0, p.log - q.log), axis=-1)
