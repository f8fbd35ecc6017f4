"""A teacher's list and a student's row, compared on the list and on the rest."""

import jax
import jax.numpy as jnp

from ._comparison import Comparison, Pair
from ._compat import to_varying, varying_axes
from ._divergences import Divergence, evaluate
from ._lists import positions, safe_log
from ._numerics import zero_unless
from ._slopes import centred, SlopeSums, sum_slopes
from ._softmax import Outcomes
from ._vocabulary import Vocabulary


def compare_lists(
    divergence: Divergence,
    pair: Pair,
    vocab: Vocabulary,
    columns: jax.Array,
    log_p: jax.Array,
    rest: tuple[jax.Array, Outcomes],
    *,
    plain: bool,
) -> Comparison:
    """Compares the listed columns, `[B, k]`, and all others as one outcome.

    `rest` is whether there are others, and the teacher's outcome, `[B]`. If `plain`,
    the divergence is `Σ p (log p - log q)` of the list, without the rest.
    """
    logits, stats = pair.student
    at = positions(columns, vocab)
    has_rest, p_rest = rest
    is_here = at[1] < vocab.width
    p = Outcomes.of_log(log_p)

    listed = logits.at[at].get(mode="fill", fill_value=-jnp.inf)
    exp_listed = jnp.exp(stats.shifted(listed))
    exp_others = jnp.exp(stats.shifted(logits)).at[at].set(0, mode="drop")
    others_sum, listed_sum = vocab.psum(
        jnp.sum(exp_others, axis=-1), jnp.sum(exp_listed, axis=-1)
    )
    sum_exp = others_sum + listed_sum
    q = stats._replace(sum_exp=sum_exp).softmax(listed).outcomes
    # Mark both as varying now: a later implicit cast would psum their gradients.
    q_listed, q_rest = (
        to_varying(x / sum_exp, varying_axes(listed)) for x in (listed_sum, others_sum)
    )

    def divergences(log_q, log_q_rest):
        of_list = p, Outcomes.known(log_q, q.prob)
        of_rest = p_rest, Outcomes.known(log_q_rest, q_rest)
        if plain:
            value = plain_kl(*_equal_unless(is_here, *of_list))
            return value, jnp.zeros_like(log_q_rest)
        value = jnp.sum(evaluate_where(is_here, divergence, *of_list), axis=-1)
        return value, evaluate_where(has_rest, divergence, *of_rest)

    (of_list, of_rest), vjp = jax.vjp(divergences, q.log, safe_log(q_rest))
    f_q, f_rest = vjp((jnp.ones_like(of_list), jnp.ones_like(of_rest)))
    sums = sum_slopes(vocab, f_q, q.prob)
    total = sums.slope + f_rest
    # To an entry of the list, the rest is another column, and the other way round.
    with_rest = SlopeSums(
        total, sums.slope_of_others + f_rest, sums.prob_of_others + q_rest
    )
    d_listed = centred(f_q, q.prob, with_rest)
    without_rest = SlopeSums(total, sums.slope, q_listed)
    d_rest = centred(f_rest[:, None], q_rest[:, None], without_rest)
    # Each of the other columns has its part of `d_rest`, by its part of `q_rest`.
    has_mass = others_sum > 0
    part = zero_unless(has_mass, 1 / jnp.where(has_mass, others_sum, 1))
    d_student = exp_others * (part[:, None] * d_rest)
    d_student = d_student.at[at].add(d_listed, mode="drop")
    d_teacher = jnp.zeros_like(logits)  # a list is a constant
    return Comparison(of_list + vocab.on_first_shard(of_rest), d_teacher, d_student)


def _equal_unless(condition: jax.Array, *models: Outcomes) -> list[Outcomes]:
    """The models where `condition`, and equal outcomes elsewhere.

    A divergence of equal outcomes is 0. Of an outcome that neither model has, a user's
    function may be NaN.
    """
    return [Outcomes(*(zero_unless(condition, y) for y in x)) for x in models]


def evaluate_where(
    condition: jax.Array, divergence: Divergence, p: Outcomes, q: Outcomes
) -> jax.Array:
    """`f(log p, log q)` where `condition`, and 0 elsewhere."""
    p, q = _equal_unless(condition, p, q)
    return zero_unless(condition, evaluate(divergence, p, q))


def plain_kl(p: Outcomes, q: Outcomes) -> jax.Array:
    """`Σ p (log p - log q)`. The form without cancellation does not hold here, as the
    listed probabilities do not sum to 1."""
    return jnp.sum(p.prob * zero_unless(p.prob > 0, p.log - q.log), axis=-1)
