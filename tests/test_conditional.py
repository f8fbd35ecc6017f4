"""The tail "conditional": both models, given that the outcome is listed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkl import distillation_loss, SparseTeacher, top_k_teacher

from .cases import ALL, assert_matches, evaluate, FORWARD, over, rarely, REVERSE
from .helpers import assert_close
from .sources import expected_of, make_models, rounded


conditional = partial(SparseTeacher, tail="conditional")


@pytest.mark.parametrize("T", [2.5, *rarely(1.0)])
def test_is_the_softmax_of_the_top_k_logits_on_either_side(rng, T):
    """As tunix, MaxText and NeMo-RL have it."""
    s, t = rounded(rng, (6, 40)), rounded(rng, (6, 40), scale=2.0)
    values, columns = jax.lax.top_k(t, 5)

    def theirs(s):
        log_p = jax.nn.log_softmax(values / T)
        log_q = jax.nn.log_softmax(jnp.take_along_axis(s, columns, -1) / T)
        return T * T * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

    mine = lambda s, teacher: distillation_loss(s, teacher, temperature=T)

    @jax.jit
    def run(s, t):
        made = conditional(columns, values / T)
        listed = top_k_teacher(t, 5, temperature=T, tail="conditional")
        found = *jax.value_and_grad(mine)(s, made), mine(s, listed)
        return found, jax.value_and_grad(theirs)(s)

    (value, grad, of_listed), (want, wanted) = run(s, t)
    assert_close(value, want, 5e-6)
    assert_close(grad, wanted, 1e-5)
    assert_close(of_listed, want, 5e-6)


@pytest.mark.parametrize("name", ["forward", *rarely("js", "reverse", "user")])
def test_columns_outside_the_list_have_no_part(rng, name):
    """Even where they have all the mass: the list has a maximum of its own."""
    s, teacher = make_models(rng, "conditional", (4,), 11)
    listed = np.zeros((4, 11), bool)
    for row, columns in zip(listed, np.asarray(teacher.indices), strict=True):
        row[columns[columns >= 0]] = True
    values = []
    for junk in (0.0, 300.0, -np.inf):
        other = jnp.where(listed, s, junk)
        value, grads = assert_matches(other, teacher, ALL[name], temperature=1.5)
        assert not grads["student"][~listed].any()
        values.append(value)
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1e-4, *rarely(1e-1)])
@over("forward", slow=["reverse", "js"])
def test_near_student_and_teacher_keep_their_digits(rng, noise, divergence, reference):
    t = rounded(rng, (8, 50), scale=3.0)
    s = t + rounded(rng, (8, 50), scale=noise)
    values, columns = jax.lax.top_k(t, 9)
    teacher = conditional(columns, values)
    value, grads = evaluate(s, teacher, divergence=divergence, reduction="none")
    expected = expected_of(s, teacher, divergence=reference, reduction="none")
    np.testing.assert_allclose(value, np.float64(expected.loss), rtol=2e-3)
    assert_close(grads["student"], expected.student, 1e-4)


def test_equal_models_are_exactly_equal(rng):
    """And one column is certain in both."""
    t = rounded(rng, (5, 20))
    values, columns = jax.lax.top_k(t, 6)
    one = jnp.array([[3], [0], [19], [2], [3]]), jnp.full((5, 1), -2.0)
    for teacher in ((columns, values), one):
        value, grads = evaluate(t, conditional(*teacher))
        assert value == 0 and not grads["student"].any()


def test_listed_columns_without_mass(rng):
    """Of a column that neither model has, nothing is asked."""
    s = rounded(rng, (2, 7)).at[:, 4].set(-jnp.inf)
    log_probs = jnp.log(jnp.array([[0.5, 0.0, 0.3], [0.5, 0.0, 0.3]]))
    teacher = conditional(jnp.array([[1, 4, 2]] * 2), log_probs)
    more = dict(reduction="none", value_tol=2e-6)
    there = s.at[1, 4].set(0.3)
    for student, pair in ((s, FORWARD), (s, REVERSE), (there, FORWARD)):
        assert_matches(student, teacher, pair, **more)
    value, _ = evaluate(there, teacher, divergence=REVERSE[0], reduction="none")
    np.testing.assert_array_equal(np.isinf(value), [False, True])
