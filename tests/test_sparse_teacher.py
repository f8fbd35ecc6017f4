"""What lists alone have, as top-k or samples: test_values.py and its like have more."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl import distillation_loss, SparseTeacher, top_k_teacher

from . import oracle
from .cases import ALL, assert_matches, evaluate, FORWARD, rarely, rounded
from .helpers import assert_close
from .sources import expected_of, make_list, make_models


over_tails = pytest.mark.parametrize(
    "tail", ["bucket", *rarely("renormalize", "drop", "uniform", "conditional")]
)


@pytest.mark.parametrize("tail, tol", [("renormalize", 1e-4), ("bucket", 0.02)])
def test_the_little_that_a_list_leaves_out_is_not_lost(rng, tail, tol):
    """The list is the student's own, so all of the loss is in the mass outside it. In
    float32, one less the listed mass would lose that."""
    s = jnp.concatenate([rounded(rng, (9, 3)), rounded(rng, (9, 8)) - 14], axis=-1)
    log_q = np.asarray(oracle.log_softmax(np.asarray(s)), np.float64)
    log_p = log_q[:, :3]
    if tail == "bucket":
        rest = np.exp(log_q[:, 3:]).sum(-1, keepdims=True)
        log_p = log_p + np.log1p(-3 * rest) - np.log1p(-rest)  # four times the rest
    indices = np.broadcast_to(np.arange(3), (9, 3))
    teacher = SparseTeacher(indices, jnp.asarray(log_p, jnp.float32), tail=tail)
    losses = np.float64(expected_of(s, teacher, reduction="none").loss)
    assert (losses > 0).all() and (losses < 1e-4).all()
    value, _ = evaluate(s, teacher, reduction="none")
    np.testing.assert_allclose(value, losses, rtol=tol)


@pytest.mark.parametrize("name", ["reverse", *rarely("forward")])
@pytest.mark.parametrize("gap", [*rarely(12), 30])
def test_the_rest_beside_a_nearly_certain_column(rng, gap, name):
    # In float32 its probability is 1 and the rest 0, where a reverse KL is infinite.
    s, t = rounded(rng, (9, 12)), rounded(rng, (9, 12)).at[:, 4].add(gap)
    teacher = top_k_teacher(t, 3)
    log_p = np.asarray(oracle.log_softmax(np.asarray(t)), np.float64)
    listed = np.take_along_axis(log_p, np.asarray(teacher.indices), -1)
    np.testing.assert_allclose(teacher.log_probs, listed, rtol=1e-5)
    exact = SparseTeacher(teacher.indices, listed, tail="bucket")
    divergence, reference = ALL[name]
    value, grads = evaluate(s, teacher, divergence=divergence)
    expected = expected_of(s, exact, divergence=reference)
    assert_close(value, expected.loss, 5e-6)
    assert_close(grads["student"], expected.student, 1e-5)


@pytest.mark.parametrize(
    "tail, name",
    [
        ("bucket", "forward"),
        ("bucket", "reverse"),
        *rarely(("bucket", "js"), ("drop", "forward"), ("renormalize", "forward")),
        *rarely(("renormalize", "js"), ("uniform", "forward"), ("uniform", "reverse")),
        *rarely(("uniform", "js"), ("conditional", "forward"), ("conditional", "js")),
        *rarely(("conditional", "reverse")),
    ],
)
def test_every_column_listed_is_the_dense_loss(rng, name, tail):
    # In float32, 1 - Σp is mere rounding, and must not become an outcome.
    s, t = rounded(rng, (5, 700)), rounded(rng, (5, 700), scale=2.0)
    order = np.argsort(rng.random((5, 700)), -1)
    log_probs = jax.nn.log_softmax(t)
    shuffled = jnp.take_along_axis(log_probs, jnp.asarray(order), -1)
    teacher = SparseTeacher(jnp.asarray(order), shuffled, tail=tail)
    divergence, reference = ALL[name]
    value, grads = evaluate(s, teacher, divergence=divergence)
    expected = oracle.distillation_loss(s, log_probs, divergence=reference)
    assert_close(value, expected.loss, 5e-6)
    assert_close(grads["student"], expected.student, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["bucket", *rarely("renormalize", "drop", "uniform")])
def test_one_column_is_a_label(rng, tail):
    """Its loss is a cross-entropy."""
    s, labels = rounded(rng, (5, 11)), jnp.array([0, 10, 3, 3, 7])
    teacher = SparseTeacher(labels[:, None], jnp.zeros((5, 1)), tail=tail)
    value, grads = evaluate(s, teacher)
    expected = oracle.distillation_loss(s, s, labels=labels, alpha=0.0)
    assert_close(value, expected.loss, 2e-6)
    assert_close(grads["student"], expected.student, 1e-5)


def test_renormalize_takes_unnormalised_values(rng):
    s, teacher = make_models(rng, "renormalize", (4,), 11)
    expected = expected_of(s, teacher)
    for shift in (5.0, -120.0, 95.0):
        moved = replace(teacher, log_probs=teacher.log_probs + shift)
        value, grads = evaluate(s, moved)
        assert_close(value, expected.loss, 3e-5)
        assert_close(grads["student"], expected.student, 3e-5)


@over_tails
def test_a_listed_column_without_mass(rng, tail):
    s = rounded(rng, (2, 7)).at[1, 4].set(-jnp.inf)
    log_probs = jnp.log(jnp.array([[0.5, 0.0, 0.3], [0.5, 0.0, 0.3]]))
    teacher = SparseTeacher(jnp.array([[1, 4, 2]] * 2), log_probs, tail=tail)
    assert_matches(s, teacher, FORWARD, value_tol=2e-6)


@over_tails
def test_bfloat16_mass_above_one(rng, tail):
    """The list has nearly all the mass, and its logarithms are rounded."""
    teacher = top_k_teacher(rounded(rng, (64, 12), scale=3.0), 8, tail=tail)
    log_probs = teacher.log_probs.astype(jnp.bfloat16)
    assert np.exp(np.asarray(log_probs, np.float64)).sum(-1).max() > 1.0005
    teacher = SparseTeacher(teacher.indices, log_probs, tail=tail)
    s, value_tol = rounded(rng, (64, 12)), 5e-3 if tail == "bucket" else 5e-6
    assert_matches(s, teacher, FORWARD, value_tol=value_tol)


@pytest.mark.parametrize("tail", ["bucket", *rarely("renormalize")])
@pytest.mark.parametrize(
    "dtype", ["uint8", *rarely("int8", "int16", "uint16", "uint32")]
)
def test_any_integer_dtype(rng, dtype, tail):
    """Narrow dtypes, as on disk, cannot hold -1 or the size of the vocabulary."""
    s, indices = rounded(rng, (3, 70001)), jnp.array([[3, 90], [5, 7], [0, 101]])
    log_probs = jnp.log(jnp.array([[0.4, 0.3]] * 3))
    teacher = SparseTeacher(indices.astype(dtype), log_probs, tail=tail)
    wide = SparseTeacher(indices, log_probs, tail=tail)
    expected = distillation_loss(s, wide, tile=3)
    assert_close(distillation_loss(s, teacher, tile=3), expected, 1e-7)


def test_a_users_function_is_not_asked_of_what_neither_model_has(rng):
    """Some slots are empty or repeated, and some rests have no columns."""
    textbook = lambda log_p, log_q: jnp.exp(log_p) * (log_p - log_q)
    squared = lambda log_p, log_q: jnp.exp(log_p) * (log_p - log_q) ** 2  # and a slope

    def squared_reference(log_p, log_q):
        p, r = np.exp(log_p), log_p - log_q
        return p * r * r, p * (r * r + 2 * r), -2 * p * r

    some = make_list(rng, (4,), 7, 5, "bucket")
    s, every = rounded(rng, (4, 7)), top_k_teacher(rounded(rng, (4, 7)), 7)
    assert_matches(s, some, (squared, squared_reference))
    assert_matches(s, every, (textbook, oracle.forward_kl))


@over_tails
def test_no_temporary_of_all_tokens(tail):
    tokens, vocab, k, hidden, tile = 4096, 16000, 16, 32, 64
    shape = lambda *x, dtype="float32": jax.ShapeDtypeStruct(x, dtype)
    student = jaxkl.LinearHead(shape(tokens, hidden), shape(hidden, vocab))
    indices = shape(tokens, k, dtype="int32")
    teacher = SparseTeacher(indices, shape(tokens, k), tail=tail)
    step = jax.jit(jax.value_and_grad(partial(distillation_loss, tile=tile)))
    stats = step.lower(student, teacher).compile().memory_analysis()
    bound = 14 * tile * vocab * 4 + 8 * tokens * (k + hidden) * 4
    assert stats.temp_size_in_bytes < bound < 0.3 * tokens * vocab * 4


# What lists refuse.


class Half(jaxkl.ForwardKL):
    def __call__(self, log_p, log_q):
        return super().__call__(log_p, log_q) / 2


INFINITE = [
    *(ALL[name][0] for name in ("reverse", "symmetric", "alpha_minus_one")),
    jaxkl.AlphaDivergence(0),
    jaxkl.JensenShannon(1, normalized=True),
    jaxkl.SkewReverseKL(0),
    jaxkl.SymmetricKL(0),
    lambda log_p, log_q: jnp.exp(log_q) * (log_q - log_p),
]
NOT_FORWARD = [*(ALL[name][0] for name in ALL if name != "forward"), Half()]


@pytest.mark.parametrize(
    "tail, refused, match",
    [
        ("renormalize", INFINITE, '`divergence`.*"renormalize".*"bucket"'),
        ("drop", NOT_FORWARD, '`divergence` must be ForwardKL.*"drop"'),
    ],
)
def test_divergences_without_a_meaning_are_refused(rng, tail, refused, match):
    """Of `p = 0`, and of a part of a sum. A subclass may have another formula."""
    s, teacher = make_models(rng, tail, (4,), 11)
    for divergence in refused:
        for f in (lambda f: f, jax.jit):
            with pytest.raises(ValueError, match=match):
                f(partial(distillation_loss, divergence=divergence))(s, teacher)


FINITE = "js", "forward", "skew_forward", "skew_reverse", "total_variation", "user"


@pytest.mark.slow
@pytest.mark.parametrize("name", [FINITE[0], *rarely(*FINITE[1:])])
def test_renormalize_takes_what_is_finite_without_mass(rng, name):
    s, teacher = make_models(rng, "renormalize", (2,), 5)
    assert_matches(s, teacher, ALL[name], tile=2)


loss_of_tokens = jax.jit(partial(distillation_loss, vocab_size=11, reduction="none"))


@over_tails
@pytest.mark.parametrize("bad", [11, *rarely(-2, 100)])
def test_columns_that_do_not_exist(rng, bad, tail):
    """But a token that does not count may list them."""
    s, teacher = rounded(rng, (4, 13)), make_list(rng, (4,), 11, 4, tail)
    for slots in (slice(0, 1), slice(None)):
        wrong = replace(teacher, indices=teacher.indices.at[2, slots].set(bad))
        with pytest.raises(ValueError, match=rf"`teacher.indices`.*\[0, 11\).*{bad}"):
            distillation_loss(s, wrong, vocab_size=11)
        is_bad = np.isnan(loss_of_tokens(s, wrong))
        np.testing.assert_array_equal(is_bad, [False, False, True, False])
    where = np.arange(4) != 2
    assert np.isfinite(distillation_loss(s, wrong, vocab_size=11, where=where))


LISTED = np.zeros((5, 2), np.int32)
MASSES = np.full((5, 2), -1.0, np.float32)


@pytest.mark.parametrize(
    "teacher, options, error, match",
    [
        ((LISTED, MASSES), dict(teacher_temperature=2.0), ValueError, "teacher_temper"),
        ((LISTED, MASSES), dict(differentiate_teacher=True), ValueError, "`different"),
        ((MASSES, MASSES), {}, TypeError, "`teacher.indices`"),
        ((LISTED, LISTED), {}, TypeError, "`teacher.log_probs`"),
        ((LISTED, MASSES[:, :1]), {}, ValueError, "`teacher.log_probs`"),
        ((LISTED[:4], MASSES[:4]), {}, ValueError, "batch shape"),
        ((LISTED[0, 0], MASSES[0, 0]), {}, ValueError, "`teacher.indices`"),
    ],
)
def test_errors_name_the_argument(teacher, options, error, match):
    with pytest.raises(error, match=match):
        distillation_loss(jnp.zeros((5, 11)), SparseTeacher(*teacher), **options)


def test_other_errors():
    with pytest.raises(ValueError, match="`tail`"):
        SparseTeacher(LISTED, MASSES, tail="mean")
    with pytest.raises(TypeError):
        SparseTeacher(LISTED, MASSES, "drop")
    with pytest.raises(TypeError, match="`student`.*SparseTeacher"):
        distillation_loss(SparseTeacher(LISTED, MASSES), jnp.zeros((5, 11)))
