"""Teachers that list a few columns of each row, as top-k or samples."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl import distillation_loss, sampled_teacher, SparseTeacher, top_k_teacher

from . import oracle
from .cases import (
    ALL,
    assert_gradient,
    assert_matches,
    evaluate,
    FORWARD,
    rarely,
    rounded,
)
from .helpers import assert_close
from .sources import expected_of, make_list, make_models


# test_conditional.py has the tail that is left out.
over_tails = pytest.mark.parametrize(
    "tail", ["bucket", *rarely("renormalize", "drop", "uniform")]
)


# Values and gradients; test_distillation.py has what lists share with other teachers.

# Divergences that are finite at p = 0 have a meaning on every tail but "drop".
ANYWHERE = ("forward", "skew_forward", "skew_reverse", "js", "total_variation", "user")
INFINITE = ("reverse", "symmetric", "alpha_minus_one")


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_the_little_that_a_list_leaves_out_is_not_lost(rng, tail):
    # The list is the student's own, so all of the loss is in the mass outside it. In
    # float32, one less the listed mass would lose that.
    s = jnp.concatenate([rounded(rng, (9, 3)), rounded(rng, (9, 8)) - 14], axis=-1)
    log_q = np.asarray(oracle.log_softmax(np.asarray(s)), np.float64)
    indices = jnp.broadcast_to(jnp.arange(3), (9, 3))
    log_p = log_q[:, :3]
    if tail == "bucket":
        rest = np.exp(log_q[:, 3:]).sum(-1, keepdims=True)
        log_p = log_p + np.log1p(-3 * rest) - np.log1p(-rest)  # four times the rest
    teacher = SparseTeacher(indices, jnp.asarray(log_p, jnp.float32), tail=tail)
    losses = np.float64(expected_of(s, teacher, reduction="none").loss)
    assert (losses > 0).all() and (losses < 1e-4).all()
    value, _ = evaluate(s, teacher, reduction="none")
    np.testing.assert_allclose(value, losses, rtol=0.02 if tail == "bucket" else 1e-4)


@pytest.mark.parametrize("name", ["reverse", *rarely("forward")])
@pytest.mark.parametrize("gap", [*rarely(12), 30])
def test_the_rest_beside_a_nearly_certain_column(rng, gap, name):
    # In float32 its probability is 1 and the rest 0, where a reverse KL is infinite.
    t = rounded(rng, (9, 12)).at[:, 4].add(gap)
    teacher = top_k_teacher(t, 3)
    log_p = np.asarray(oracle.log_softmax(np.asarray(t)), np.float64)
    listed = np.take_along_axis(log_p, np.asarray(teacher.indices), -1)
    np.testing.assert_allclose(teacher.log_probs, listed, rtol=1e-5)
    exact = SparseTeacher(teacher.indices, listed, tail="bucket")
    s = rounded(rng, (9, 12))
    divergence, reference = ALL[name]
    value, grads = evaluate(s, teacher, divergence=divergence)
    expected = expected_of(s, exact, divergence=reference)
    assert_close(value, expected.loss, 5e-6)
    assert_close(grads["student"], expected.student, 1e-5)


@over_tails
@pytest.mark.parametrize("name", ["forward", "reverse", *rarely("js")])
def test_every_column_listed_is_the_dense_loss(rng, name, tail):
    # In float32, 1 - Σp is mere rounding, and must not become an outcome.
    s, t = rounded(rng, (5, 700)), rounded(rng, (5, 700), scale=2.0)
    order = np.argsort(rng.random((5, 700)), -1)
    log_probs = jax.nn.log_softmax(t)
    shuffled = jnp.take_along_axis(log_probs, jnp.asarray(order), -1)
    teacher = SparseTeacher(jnp.asarray(order), shuffled, tail=tail)
    divergence, reference = ALL[name]
    takes = {"drop": ("forward",), "renormalize": ("forward", "js")}
    if name not in takes.get(tail, (name,)):
        with pytest.raises(ValueError, match="`divergence`"):
            evaluate(s, teacher, divergence=divergence)
        return
    value, grads = evaluate(s, teacher, divergence=divergence)
    expected = oracle.distillation_loss(s, log_probs, divergence=reference)
    assert_close(value, expected.loss, 5e-6)
    assert_close(grads["student"], expected.student, 1e-5)


@pytest.mark.slow
@over_tails
def test_one_column(rng, tail):
    # A column that has all the mass is a label, and its loss a cross-entropy.
    s, labels = rounded(rng, (5, 11)), jnp.array([0, 10, 3, 3, 7])
    teacher = SparseTeacher(labels[:, None], jnp.zeros((5, 1)), tail=tail)
    value, grads = evaluate(s, teacher)
    expected = oracle.distillation_loss(s, s, labels=labels, alpha=0.0)
    assert_close(value, expected.loss, 2e-6)
    assert_close(grads["student"], expected.student, 1e-5)


@pytest.mark.slow
def test_repeated_columns_add_up(rng):
    s = rounded(rng, (1, 7))
    split = SparseTeacher(jnp.array([[2, 5, 2]]), jnp.log(jnp.array([[0.1, 0.5, 0.3]])))
    whole = SparseTeacher(jnp.array([[2, 5]]), jnp.log(jnp.array([[0.4, 0.5]])))
    for tail in ("bucket", "uniform"):
        both = [
            evaluate(s, SparseTeacher(x.indices, x.log_probs, tail=tail))
            for x in (split, whole)
        ]
        assert_close(both[0][0], both[1][0], 1e-6)
        assert_close(both[0][1]["student"], both[1][1]["student"], 1e-6)


def test_renormalize_takes_unnormalised_values(rng):
    s = rounded(rng, (4, 11))
    teacher = make_list(rng, (4,), 11, 4, "renormalize")
    for shift in (5.0, -120.0, 95.0):
        moved = replace(teacher, log_probs=teacher.log_probs + shift)
        value, grads = evaluate(s, moved)
        expected = expected_of(s, teacher)
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
    # The list has nearly all the mass, and its logarithms are rounded.
    t = rounded(rng, (64, 12), scale=3.0)
    teacher = top_k_teacher(t, 8, tail=tail)
    log_probs = teacher.log_probs.astype(jnp.bfloat16)
    mass = np.exp(np.asarray(log_probs, np.float64)).sum(-1)
    assert mass.max() > 1.0005
    s = rounded(rng, (64, 12))
    rounded_teacher = SparseTeacher(teacher.indices, log_probs, tail=tail)
    value_tol = 5e-3 if tail == "bucket" else 5e-6
    assert_matches(s, rounded_teacher, FORWARD, value_tol=value_tol)


@over_tails
def test_empty_rows_and_junk_that_where_drops(rng, tail):
    s, teacher = make_models(rng, tail, (4,), 11)
    where = jnp.array([True, False, True, False])
    indices = teacher.indices.at[1].set(-1)
    log_probs = teacher.log_probs.at[1].set(-jnp.inf).at[3].set(jnp.nan)
    spoilt = SparseTeacher(indices, log_probs, tail=tail)
    s = s.at[3].set(jnp.nan)
    _, grads = assert_matches(s, spoilt, FORWARD, where=where)
    assert not grads["student"][~where].any()


@pytest.mark.parametrize("tail", ["bucket", *rarely("renormalize")])
@pytest.mark.parametrize(
    "dtype", ["uint8", *rarely("int8", "int16", "uint16", "uint32")]
)
def test_any_integer_dtype(rng, dtype, tail):
    # Narrow dtypes, as on disk, cannot hold -1 or the size of the vocabulary.
    s = rounded(rng, (3, 70001))
    indices = jnp.array([[3, 90], [5, 7], [0, 101]])
    log_probs = jnp.log(jnp.array([[0.4, 0.3]] * 3))
    teacher = SparseTeacher(indices.astype(dtype), log_probs, tail=tail)
    wide = SparseTeacher(indices, log_probs, tail=tail)
    expected = distillation_loss(s, wide, tile=3)
    assert_close(distillation_loss(s, teacher, tile=3), expected, 1e-7)


@pytest.mark.slow
def test_temperature_divides_the_student_only(rng):
    s, t = rounded(rng, (5, 11)), rounded(rng, (5, 11))
    T = jnp.asarray(rng.uniform(0.5, 3, size=5), jnp.float32)
    teacher = top_k_teacher(t, 11, temperature=2.5)
    arguments = dict(temperature=T, teacher_temperature=2.5)
    value, grads = evaluate(s, teacher, **arguments)
    expected = oracle.distillation_loss(s, t, **arguments)
    assert_close(value, expected.loss, 5e-6)
    assert_close(grads["student"], expected.student, 1e-5)
    assert_gradient("temperature", grads["temperature"], expected, 1e-5)


# What lists refuse.


@pytest.mark.parametrize("name", INFINITE)
def test_renormalize_refuses_what_is_infinite_without_mass(rng, name):
    s, teacher = make_models(rng, "renormalize", (4,), 11)
    with pytest.raises(ValueError, match='`divergence`.*"renormalize".*"bucket"'):
        distillation_loss(s, teacher, divergence=ALL[name][0])


@pytest.mark.parametrize(
    "divergence",
    [
        jaxkl.AlphaDivergence(0),
        jaxkl.JensenShannon(1, normalized=True),
        jaxkl.SkewReverseKL(0),
        jaxkl.SymmetricKL(0),
        lambda log_p, log_q: jnp.exp(log_q) * (log_q - log_p),
    ],
)
def test_renormalize_refuses_the_limits_too(rng, divergence):
    s, teacher = make_models(rng, "renormalize", (4,), 11)
    f = jax.jit(partial(distillation_loss, divergence=divergence))
    with pytest.raises(ValueError, match="`divergence`"):
        f(s, teacher)


@pytest.mark.parametrize("name", [name for name in ALL if name != "forward"])
def test_drop_is_of_forward_kl_only(rng, name):
    s, teacher = make_models(rng, "drop", (4,), 11)
    with pytest.raises(ValueError, match='`divergence`.*ForwardKL.*"drop"'):
        distillation_loss(s, teacher, divergence=ALL[name][0])


def test_drop_refuses_a_subclass_that_may_have_another_formula(rng):
    class Half(jaxkl.ForwardKL):
        def __call__(self, log_p, log_q):
            return super().__call__(log_p, log_q) / 2

    teacher = top_k_teacher(rounded(rng, (3, 11)), 4, tail="drop")
    with pytest.raises(ValueError, match="`divergence` must be ForwardKL"):
        distillation_loss(rounded(rng, (3, 11)), teacher, divergence=Half())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["js", *rarely(*(x for x in ANYWHERE if x != "js"))])
def test_renormalize_takes_what_is_finite_without_mass(rng, name):
    s, teacher = make_models(rng, "renormalize", (2,), 5)
    divergence, reference = ALL[name]
    value = distillation_loss(s, teacher, divergence=divergence, tile=2)
    expected = expected_of(s, teacher, divergence=reference)
    assert_close(value, expected.loss, 5e-6)


loss_of_tokens = jax.jit(partial(distillation_loss, vocab_size=11, reduction="none"))


@over_tails
@pytest.mark.parametrize("slots", [slice(0, 1), slice(None)], ids=["one", "all"])
@pytest.mark.parametrize("bad", [11, *rarely(-2, 100)])
def test_columns_that_do_not_exist(rng, bad, slots, tail):
    s, teacher = rounded(rng, (4, 13)), make_list(rng, (4,), 11, 4, tail)
    indices = teacher.indices.at[2, slots].set(bad)
    wrong = SparseTeacher(indices, teacher.log_probs, tail=tail)
    with pytest.raises(ValueError, match=rf"`teacher.indices`.*\[0, 11\).*{bad}"):
        distillation_loss(s, wrong, vocab_size=11)
    is_bad = np.isnan(loss_of_tokens(s, wrong))
    np.testing.assert_array_equal(is_bad, [False, False, True, False])


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


def test_a_users_function_is_not_asked_of_what_neither_model_has(rng):
    # Some slots are empty or repeated, and some rests have no columns.
    textbook = lambda log_p, log_q: jnp.exp(log_p) * (log_p - log_q)
    squared = lambda log_p, log_q: (
        jnp.exp(log_p) * (log_p - log_q) ** 2
    )  # and its slope

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
    shape = jax.ShapeDtypeStruct
    student = jaxkl.LinearHead(
        shape((tokens, hidden), jnp.float32), shape((hidden, vocab), jnp.float32)
    )
    teacher = SparseTeacher(
        shape((tokens, k), jnp.int32), shape((tokens, k), jnp.float32), tail=tail
    )
    step = jax.jit(jax.value_and_grad(partial(distillation_loss, tile=tile)))
    stats = step.lower(student, teacher).compile().memory_analysis()
    bound = 14 * tile * vocab * 4 + 8 * tokens * (k + hidden) * 4
    assert stats.temp_size_in_bytes < bound < 0.3 * tokens * vocab * 4


# Top-k.


@pytest.mark.parametrize("temperature", [2.5, *rarely(1.0, "token")])
def test_top_k_matches_numpy(rng, temperature):
    t = rounded(rng, (3, 5, 37))
    T = temperature
    if T == "token":
        T = jnp.asarray(rng.uniform(0.5, 3, size=(3, 5)), jnp.float32)
    teacher = jax.jit(partial(top_k_teacher, k=6))(t, temperature=T)
    assert teacher.tail == "bucket" and teacher.indices.dtype == jnp.int32
    assert teacher.log_probs.dtype == jnp.float32
    scaled = np.asarray(t, np.float64) / np.broadcast_to(T, (3, 5))[..., None]
    log_probs = np.asarray(oracle.log_softmax(scaled), np.float64)
    order = np.argsort(-log_probs, -1)[..., :6]
    np.testing.assert_array_equal(teacher.indices, order)
    assert_close(teacher.log_probs, np.take_along_axis(log_probs, order, -1), 1e-6)


def test_top_k_of_ties_and_of_all(rng):
    teacher = top_k_teacher(jnp.zeros((2, 7)), 3, tail="drop")
    assert teacher.tail == "drop"
    assert all(len(set(row)) == 3 for row in teacher.indices.tolist())
    assert_close(teacher.log_probs, np.full((2, 3), -np.log(7)), 1e-6)
    everything = top_k_teacher(rounded(rng, (2, 7), "bfloat16"), 7)
    assert everything.log_probs.dtype == jnp.float32
    assert_close(jnp.exp(everything.log_probs).sum(-1), np.ones(2), 1e-6)


@pytest.mark.parametrize(
    "logits, k, options, error, match",
    [
        (np.zeros((2, 7)), 8, {}, ValueError, "`k`.* 7"),
        (np.zeros((2, 7)), 0, {}, ValueError, "`k`"),
        (np.zeros((2, 7)), 2.0, {}, TypeError, "`k`"),
        (np.zeros((2, 7), int), 2, {}, TypeError, "`logits_or_head`"),
        (np.zeros(()), 1, {}, ValueError, "`logits_or_head`"),
        (np.zeros((2, 7)), 2, dict(temperature=0.0), ValueError, "`temperature`"),
        (
            np.zeros((2, 7)),
            2,
            dict(temperature=np.ones(3)),
            ValueError,
            "`temperature`",
        ),
        (np.zeros((2, 7)), 2, dict(tail="none"), ValueError, "`tail`"),
    ],
)
def test_errors_of_top_k(logits, k, options, error, match):
    with pytest.raises(error, match=match):
        top_k_teacher(logits, k, **options)


# Samples.


def _counts(indices, vocab):
    return np.bincount(np.ravel(indices), minlength=vocab)


def _chi_square(counts, p):
    """How many standard deviations χ² is above its mean."""
    expected = counts.sum() * p
    statistic = np.sum((counts - expected) ** 2 / expected)
    freedom = len(p) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("vocab", [1000, *rarely(1, 2, 7)])
def test_samples_follow_the_softmax(rng, vocab):
    t = rounded(rng, (vocab,), scale=1.5)
    n = 400_000
    teacher = sampled_teacher(jax.random.key(1), t, n, temperature=2.0)
    assert teacher.indices.shape == (n,) and teacher.indices.dtype == jnp.int32
    assert teacher.tail == "renormalize"
    assert_close(jnp.exp(teacher.log_probs) * n, np.ones(n), 1e-5)
    counts = _counts(teacher.indices, vocab)
    assert len(counts) == vocab and counts.sum() == n
    if vocab > 1:
        p = np.exp(oracle.log_softmax(np.asarray(t, np.float64) / 2))
        assert _chi_square(counts, p.astype(float)) < 4
        assert _chi_square(counts, np.roll(p, 1).astype(float)) > 40


def test_rows_are_independent_and_have_their_own_temperature(rng):
    t = jnp.tile(rounded(rng, (5,)), (2, 2, 1))
    T = jnp.array([[0.5, 1.0], [1.0, 4.0]])
    n = 50_000
    draw = jax.jit(partial(sampled_teacher, num_samples=n))
    indices = np.asarray(draw(jax.random.key(2), t, temperature=T).indices)
    assert indices.shape == (2, 2, n)
    for at in np.ndindex(2, 2):
        p = np.exp(oracle.log_softmax(np.asarray(t[at], np.float64) / T[at]))
        assert _chi_square(_counts(indices[at], 5), p.astype(float)) < 4
    # Two rows of one distribution agree as often as by chance.
    p = np.exp(oracle.log_softmax(t[0, 0])).astype(float)
    agree, chance = (indices[0, 1] == indices[1, 0]).mean(), np.sum(p * p)
    assert abs(agree - chance) < 5 * np.sqrt(chance * (1 - chance) / n)
    # So do neighbours in a row, and other keys draw other columns.
    assert abs((indices[0, 1, 1:] == indices[0, 1, :-1]).mean() - chance) < 0.02
    other = draw(jax.random.key(3), t, temperature=T).indices
    assert abs((indices[0, 1] == np.asarray(other[0, 1])).mean() - chance) < 0.02


@pytest.mark.slow
def test_expected_gradient_is_the_dense_one(rng):
    # The rare column matters, as a top-k list never has it.
    rows, vocab = 40_000, 6
    s = rounded(rng, (vocab,))
    t = jnp.log(jnp.array([0.6, 0.2, 0.1, 0.08, 0.019, 0.001]))
    teacher = sampled_teacher(jax.random.key(4), jnp.tile(t, (rows, 1)), 3)
    many = jnp.tile(s, (rows, 1))
    f = lambda s: distillation_loss(s, teacher, reduction="sum")
    grads = np.asarray(jax.jit(jax.grad(f))(many), np.float64)
    error = grads.std(0) / np.sqrt(rows)
    expected = oracle.distillation_loss(s, t).student
    assert (np.abs(grads.mean(0) - expected) < 4 * error).all()
    top_k = top_k_teacher(jnp.tile(t, (rows, 1)), 3, tail="renormalize")
    biased = jax.grad(lambda s: distillation_loss(s, top_k))(many)[0] * rows
    assert (np.abs(np.asarray(biased) - expected) > 20 * error).any()


@pytest.mark.parametrize("vocab", [9, *rarely(70_000)])
def test_a_column_without_mass_is_never_drawn(rng, vocab):
    kept = rng.random(vocab) < 0.5
    kept[1], kept[-1] = True, False
    logits = np.where(kept, rng.normal(size=vocab), -np.inf).astype(np.float32)
    draw = jax.jit(partial(sampled_teacher, num_samples=100_000))
    indices = np.asarray(draw(jax.random.key(5), logits).indices)
    assert indices.min() >= 0 and indices.max() < vocab
    assert kept[indices].all()
    one = np.full(vocab, -np.inf, np.float32)
    one[3] = 80
    few = sampled_teacher(jax.random.key(6), one, 100)
    assert (few.indices == 3).all()


@pytest.mark.slow
def test_rare_columns_are_not_lost_to_float32(rng):
    # Half of the columns have 2e-8 each, which is below the spacing of float32 uniforms
    # and of a float32 sum near 1.
    vocab, n = 50_000, 200_000
    rare = rng.permutation(vocab) < vocab // 2
    p = np.where(rare, 2e-8, (1 - 2e-8 * rare.sum()) / (~rare).sum())
    draw = jax.jit(partial(sampled_teacher, num_samples=n))
    indices = draw(jax.random.key(7), np.log(p).astype(np.float32)).indices
    drawn = rare[np.asarray(indices)].sum()
    mean = n * p[rare].sum()
    assert mean > 90 and abs(drawn - mean) < 5 * np.sqrt(mean)
    counts = _counts(indices, vocab)[~rare]
    assert _chi_square(counts, np.full(len(counts), 1 / len(counts))) < 4


@pytest.mark.slow
def test_samples_under_vmap(rng):
    t = rounded(rng, (3, 4, 11))
    keys = jax.random.split(jax.random.key(8), 3)
    draw = partial(sampled_teacher, num_samples=5)
    together = jax.jit(jax.vmap(draw))(keys, t)
    for i in range(3):
        alone = draw(keys[i], t[i])
        np.testing.assert_array_equal(together.indices[i], alone.indices)


def test_errors_of_samples():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="`num_samples`"):
        sampled_teacher(key, np.zeros(7), 0)
    with pytest.raises(TypeError, match="`logits_or_head`"):
        sampled_teacher(key, np.zeros(7, int), 3)
    with pytest.raises(ValueError, match="`temperature`"):
        sampled_teacher(key, np.zeros(7), 3, temperature=-1.0)
