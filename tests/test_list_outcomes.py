"""A list is a row of k + 1 outcomes, whose rest is a log-probability."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl import distillation_loss, SparseTeacher, top_k_teacher

from . import oracle
from .cases import ALL, assert_matches, evaluate, FORWARD, rarely
from .helpers import assert_close
from .sources import expected_of
from .test_meshes import axes_of


def lists_of(logits, k, T=1.0, dtype=np.float32, rest=True, tail="bucket"):
    """The k most likely columns, as a file has them, made by NumPy."""
    log_p = np.float64(oracle.log_softmax(np.float64(logits) / T))
    order = np.argsort(-log_p, -1)
    indices, others = order[..., :k], order[..., k:]
    at = lambda columns: np.take_along_axis(log_p, columns, -1)
    log_rest = np.log(np.exp(at(others)).sum(-1)).astype(np.float32)
    log_probs = at(indices).astype(dtype)
    rest = log_rest if rest else None
    return SparseTeacher(indices, log_probs, tail=tail, log_rest=rest)


@pytest.mark.parametrize("gap, T", [(95, 1.0), (24, 0.25), *rarely((88, 1), (9e3, 2))])
def test_a_student_that_gives_the_rest_next_to_nothing(rng, gap, T):
    s, t = rng.normal(size=(2, 7, 33)).astype(np.float32)
    teacher = lists_of(t, 5, T)
    np.put_along_axis(s, teacher.indices, np.float32(gap) + s[:, :5], -1)
    for name in ("forward", "js"):
        assert_matches(
            jnp.asarray(s), teacher, ALL[name], value_tol=1e-5, tol=5e-5,
            temperature=jnp.float32(T),
        )  # fmt: skip


@pytest.mark.parametrize("way", ["lean", "mesh", *rarely("fast")])
def test_the_rest_of_a_head_is_far_below(rng, monkeypatch, way):
    hidden, kernel = rng.normal(size=(6, 4)), rng.normal(size=(4, 300))
    kernel[:, :5] = 0
    hidden[:, 0], kernel[0, 5:], kernel[0, :5] = 10, -10, 1
    student = jaxkl.LinearHead(jnp.float32(hidden), jnp.float32(kernel))
    teacher = lists_of(rng.normal(size=(6, 300)), 5)
    teacher = replace(teacher, indices=np.tile(np.arange(5), (6, 1)))
    assert expected_of(student, teacher).loss > 50
    monkeypatch.setattr("jaxkl._engine.plan._columns", lambda *_: 128)
    axes = axes_of("2x4") if way == "mesh" else dict(plan=way)
    loss = partial(distillation_loss, **axes)
    assert_matches(student, teacher, FORWARD, loss=loss)


@pytest.mark.parametrize("name", ["reverse", *rarely("symmetric", "alpha_minus_one")])
@pytest.mark.parametrize(
    "tail, k, dtype",
    [
        ("bucket", 16, "float32"),
        ("uniform", 16, "float32"),
        ("bucket", 16, "float16"),
        *rarely(("uniform", 16, "float16")),
        *rarely(("bucket", 64, "float32"), ("uniform", 64, "float32")),
    ],
)
def test_a_rest_that_rounding_hides(rng, tail, k, dtype, name):
    """Some rows of the list have a mass of 1 or more, though not all is listed."""
    t = (20 * rng.normal(size=(256, 100))).astype(np.float32)
    s = jnp.asarray(t + 0.1 * rng.normal(size=t.shape), jnp.float32)
    teacher = lists_of(t, k, dtype=dtype, rest=False, tail=tail)
    assert (np.exp(np.float64(teacher.log_probs)).sum(-1) >= 1).any()
    mine, reference = ALL[name]
    T = jnp.float32(1)
    value, slopes = evaluate(s, teacher, divergence=mine, temperature=T)
    assert 0 < value < 0.1
    assert all(np.isfinite(x).all() for x in slopes.values())
    if name == "reverse" and dtype == "float32":
        known = lists_of(t, k, tail=tail)
        found, grads = evaluate(s, known, divergence=mine, temperature=T)
        exact = expected_of(s, known, divergence=reference)
        assert_close(found, exact.loss, 1e-3)
        assert_close(grads["student"], exact.student, 5e-3)
        np.testing.assert_allclose(value, float(exact.loss), rtol=0.1)


loss_of_tokens = jax.jit(partial(distillation_loss, reduction="none"))


@pytest.mark.parametrize("tail", ["bucket", *rarely("uniform", "drop")])
def test_a_mass_above_one(rng, tail):
    s, t = rng.normal(size=(2, 5, 40)).astype(np.float32)
    teacher = lists_of(t, 16, tail=tail)
    logits = np.take_along_axis(t, teacher.indices, -1)
    for wrong in (logits + 3, np.exp(teacher.log_probs), teacher.log_probs / 2):
        log_probs = teacher.log_probs.copy()
        log_probs[2] = wrong[2]
        bad = SparseTeacher(teacher.indices, log_probs, tail=tail)
        with pytest.raises(ValueError, match="`teacher.log_probs`.*mass of at most 1"):
            distillation_loss(s, bad)
        assert np.isfinite(distillation_loss(s, bad, where=np.arange(5) != 2))
        is_bad = np.isnan(loss_of_tokens(s, bad))
        np.testing.assert_array_equal(is_bad, np.arange(5) == 2)
        for free in ("renormalize", "conditional"):
            assert np.isfinite(loss_of_tokens(s, replace(bad, tail=free))).all()


def test_a_rest_that_makes_the_mass_too_large(rng):
    s, t = rng.normal(size=(2, 5, 40)).astype(np.float32)
    teacher = lists_of(t, 16)
    good = replace(teacher, log_rest=teacher.log_rest + np.float32(0.005))
    assert_matches(jnp.asarray(s), good, FORWARD, value_tol=1e-5)
    bad = replace(teacher, log_rest=np.zeros(5, np.float32))
    with pytest.raises(ValueError, match="`teacher.log_probs`.*mass"):
        distillation_loss(s, bad)
    with pytest.raises(ValueError, match="`teacher.log_rest`.*batch shape"):
        distillation_loss(s, replace(teacher, log_rest=np.zeros((5, 1), np.float32)))


def test_the_temperature_of_a_list(rng):
    s, t = rng.normal(size=(2, 5, 40)).astype(np.float32)
    made_at = partial(replace, lists_of(t, 16, 2.0))
    at_2 = made_at(temperature=2.0)
    want = distillation_loss(s, made_at(), temperature=2.0)
    at_1 = distillation_loss(s, made_at(), temperature=1.0)
    for good in (at_2, made_at(temperature=np.full(5, 2, np.float32))):
        loss = partial(distillation_loss, s, good)
        assert loss(temperature=2.0) == want
        assert loss(temperature=1.0, teacher_temperature=2.0) == at_1
        with pytest.raises(ValueError, match="`temperature` must be.*SparseTeacher, 2"):
            loss()
        with pytest.raises(ValueError, match="`teacher_temperature` must.*, 2, got 3"):
            loss(temperature=2.0, teacher_temperature=3.0)
    with pytest.raises(ValueError, match="`teacher_temperature` must be None"):
        distillation_loss(s, made_at(), teacher_temperature=2.0)
    with pytest.raises(ValueError, match="`temperature`"):
        made_at(temperature=0.0)
    # Traced values that differ cannot raise.
    T = np.float32([2, 2, 1, 2, 2])
    is_bad = np.isnan(loss_of_tokens(s, at_2, temperature=T))
    np.testing.assert_array_equal(is_bad, T != 2)


def test_a_list_is_a_pytree_with_a_temperature(rng):
    teacher = lists_of(rng.normal(size=(3, 9)), 4)
    number = replace(teacher, temperature=2.0)
    array = replace(teacher, temperature=np.full(3, 2, np.float32))
    assert SparseTeacher(array.indices, array.log_probs).tail == "bucket"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(array)]
    assert paths == [".indices", ".log_probs", ".log_rest", ".temperature"]
    assert len(jax.tree.leaves(number)) == 3
    assert jax.tree.map(lambda x: x, number).temperature == 2.0
    stacked = jax.tree.map(lambda *x: np.stack(x), array, array)
    assert stacked.temperature.shape == (2, 3)


@pytest.mark.parametrize("tail", ["bucket", *rarely("conditional")])
@pytest.mark.parametrize("T", [2.0, *rarely(1.0)])
def test_metrics_compare_the_models_at_the_temperature_of_the_loss(rng, T, tail):
    """Equal models have a KL of 0, and the same masses and entropies."""
    t = (2 * rng.normal(size=(5, 40))).astype(np.float32)
    teacher = top_k_teacher(t, 6, temperature=T, tail=tail)
    f = jax.jit(partial(jaxkl.distillation_loss_with_metrics, temperature=T))
    loss, metrics = f(t, teacher)
    assert abs(loss) < 1e-6 and abs(metrics.kl) < 1e-6
    assert_close(metrics.student_listed_mass, metrics.teacher_listed_mass, 1e-5)
    assert_close(metrics.student_entropy, metrics.teacher_entropy, 1e-5)
    assert f(t[::-1].copy(), teacher)[1].kl > 0.1


@pytest.mark.parametrize("tail", ["bucket", *rarely("renormalize", "conditional")])
def test_one_sort_and_no_dense_teacher(rng, tail):
    """Repeated columns are merged once, and the teacher never has V columns."""
    s = rng.normal(size=(5, 40)).astype(np.float32)
    teacher = lists_of(s, 6, tail=tail)
    f = lambda s: jaxkl.distillation_loss_with_metrics(s, teacher, temperature=2.0)
    text = jax.jit(jax.value_and_grad(f, has_aux=True)).lower(s).as_text()
    assert text.count("stablehlo.sort") == 2  # and one of the overlap
