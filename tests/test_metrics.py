"""`distillation_loss_with_metrics`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl

from . import oracle
from .cases import assert_source_gradient, FORWARD, JENSEN_SHANNON, over_kinds, rounded
from .helpers import assert_close
from .sources import exact_logits, expected_of, make_models, per_token


FIELDS = oracle.Metrics._fields


def _assert_metrics(actual, expected, tol=1e-6):
    assert (actual.cross_entropy is None) == (expected.cross_entropy is None)
    for name in FIELDS:
        got, want = getattr(actual, name), getattr(expected, name)
        if want is not None:
            assert got.shape == () and got.dtype == jnp.float32, name
            assert_close(got, want, tol, name)


@pytest.mark.parametrize(
    "dtype, reduction", [("float32", "mean"), ("bfloat16", "none"), ("float16", "sum")]
)
@over_kinds
def test_metrics_match_the_oracle(rng, divergence, reference, reduction, dtype):
    s, t = rounded(rng, (2, 9, 5), dtype), rounded(rng, (2, 9, 5), dtype)
    names = "where", "weights", "labels", "temperature"
    counted = per_token(rng, (2, 9), *names, vocab=5)
    counted["teacher_temperature"] = jnp.float32(2)
    rest = dict(divergence=divergence, reduction=reduction, alpha=0.5, z_loss=0.1)
    f = jax.jit(
        lambda s, t, counted: jaxkl.distillation_loss_with_metrics(
            s, t, **counted, **rest
        )
    )
    loss, metrics = f(s, t, counted)
    expected = oracle.metrics(s, t, divergence=reference, **counted)
    _assert_metrics(metrics, expected)
    # The loss is the same as without metrics.
    plain = jax.jit(
        lambda s, t, counted: jaxkl.distillation_loss(s, t, **counted, **rest)
    )
    assert_close(loss, plain(s, t, counted), 1e-6)


@pytest.mark.parametrize(
    "source", ["head", "renormalize", "bucket", "uniform", "conditional"]
)
def test_metrics_of_heads_and_lists(rng, source):
    student, teacher = make_models(rng, source, (3, 5), 11, pad=(3, 1))
    shared = per_token(rng, (3, 5), "weights", "where")
    shared |= dict(temperature=1.5, vocab_size=11)
    mine, theirs = JENSEN_SHANNON
    f = partial(jaxkl.distillation_loss_with_metrics, divergence=mine)
    run, alpha = f, 1.0
    if source == "head":
        alpha, shared["teacher_temperature"] = 0.5, 2.0
        shared |= per_token(rng, (3, 5), "labels")
        run = jax.value_and_grad(partial(f, alpha=alpha, tile=4), has_aux=True)
    found = jax.jit(partial(run, **shared))(student, teacher)
    expected = expected_of(student, teacher, divergence=theirs, alpha=alpha, **shared)
    if source == "head":
        found, d_student = found
        assert_source_gradient(student, d_student, expected.student, "student")
    value, metrics = found
    assert_close(value, expected.loss, 5e-6)
    (s, _), (t, _) = exact_logits(student, 11), exact_logits(teacher, 11)
    _assert_metrics(metrics, oracle.metrics(s, t, divergence=theirs, **shared), 5e-6)


def test_without_labels_there_is_no_cross_entropy(rng):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    loss, metrics = jaxkl.distillation_loss_with_metrics(s, t, temperature=3.0)
    assert isinstance(metrics, jaxkl.DistillationMetrics)
    assert metrics.cross_entropy is None
    _assert_metrics(metrics, oracle.metrics(s, t, temperature=3.0))
    assert_close(loss, 9 * metrics.divergence, 1e-6)


def test_cross_entropy_is_reported_even_where_alpha_gives_it_no_part(rng):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    labels = jnp.array([0, 4, -100, 2])
    _, metrics = jaxkl.distillation_loss_with_metrics(s, t, labels=labels)
    _assert_metrics(metrics, oracle.metrics(s, t, labels=labels))


def test_divergence_is_reported_even_where_alpha_gives_it_no_part(rng):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    arguments = dict(labels=jnp.array([0, 4, -100, 2]), temperature=2.0)
    _, metrics = jaxkl.distillation_loss_with_metrics(s, t, alpha=0.0, **arguments)
    _assert_metrics(metrics, oracle.metrics(s, t, **arguments))


def test_has_aux_and_no_gradient_through_the_metrics(rng):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    f = jax.jit(jax.value_and_grad(jaxkl.distillation_loss_with_metrics, has_aux=True))
    (loss, metrics), grad = f(s, t)
    plain, plain_grad = jax.jit(jax.value_and_grad(jaxkl.distillation_loss))(s, t)
    assert_close(loss, plain, 1e-6)
    assert_close(grad, plain_grad, 1e-6)
    _assert_metrics(metrics, oracle.metrics(s, t))

    def through_the_metrics(s):
        _, metrics = jaxkl.distillation_loss_with_metrics(s, t)
        return sum(jax.tree.leaves(metrics))

    assert not jax.jit(jax.grad(through_the_metrics))(s).any()


def test_metrics_are_a_pytree(rng):
    s, t = rounded(rng, (3, 4, 5)), rounded(rng, (3, 4, 5))
    labels = jnp.asarray(rng.integers(0, 5, size=(3, 4)))
    f = lambda s, t, labels: jaxkl.distillation_loss_with_metrics(s, t, labels=labels)
    _, metrics = jax.vmap(f)(s, t, labels)
    leaves, treedef = jax.tree.flatten(metrics)
    assert len(leaves) == len(FIELDS) and all(x.shape == (3,) for x in leaves)
    again = jax.tree.unflatten(treedef, leaves)
    assert isinstance(again, jaxkl.DistillationMetrics)
    doubled = jax.tree.map(lambda x: 2 * x, metrics)
    assert_close(doubled.kl, 2 * metrics.kl, 1e-6)


def test_a_normalizer_is_no_part_of_the_metrics(rng):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    _, metrics = jaxkl.distillation_loss_with_metrics(s, t, normalizer=100.0)
    _assert_metrics(metrics, oracle.metrics(s, t))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("how", ["masked", "unlabelled", "empty"])
def test_metrics_of_nothing_are_zero(rng, how, reduction):
    shape = (0,) if how == "empty" else (4,)
    s, t = rounded(rng, (*shape, 5)), rounded(rng, (*shape, 5))
    labels = jnp.full(shape, -100 if how == "unlabelled" else 0)
    where = jnp.full(shape, how == "unlabelled")
    if how == "masked":
        s = jnp.full_like(s, np.nan)
    f = lambda s: jaxkl.distillation_loss_with_metrics(
        s, t, labels=labels, where=where, alpha=0.5, reduction=reduction
    )
    (_, metrics), vjp = jax.vjp(jax.jit(f), s)
    _assert_metrics(metrics, oracle.metrics(s, t, labels=labels, where=where))
    assert metrics.cross_entropy == 0
    ones = jax.tree.map(jnp.ones_like, f(s))
    assert np.isfinite(vjp(ones)[0]).all()


def test_dropped_rows_do_not_enter(rng):
    s, t = rounded(rng, (5, 5)), rounded(rng, (5, 5))
    where = jnp.array([True, False, True, False, False])
    s, t = s.at[1].set(np.nan).at[3].set(np.inf), t.at[3].set(-np.inf).at[4].set(np.nan)
    _, metrics = jaxkl.distillation_loss_with_metrics(s, t, where=where)
    _assert_metrics(metrics, oracle.metrics(s[::2][:2], t[::2][:2]))


def test_singular_rows(rng):
    inf = np.inf
    s = jnp.array([[-inf, 0.5, 1], [-inf, 0, -inf], [1e4, -1e4, 0]])
    t = jnp.array([[-inf, 1.0, 0], [-inf, 3, -inf], [1e4, 0, -1e4]])
    _, metrics = jaxkl.distillation_loss_with_metrics(s, t)
    _assert_metrics(metrics, oracle.metrics(s, t))


def test_kl_is_accurate_near_the_teacher(rng):
    t = rounded(rng, (2, 32000))
    s = t + rounded(rng, (2, 32000), scale=3e-3)
    _, metrics = jaxkl.distillation_loss_with_metrics(s, t, temperature=2.0)
    expected = oracle.metrics(s, t, temperature=2.0)
    assert_close(metrics.kl, expected.kl, 1e-4)
    assert_close(metrics.divergence, expected.divergence, 1e-4)


def test_vocab_size(rng):
    s, t = rounded(rng, (4, 8)), rounded(rng, (4, 6))
    s, t = s.at[:, 5:].set(np.inf), t.at[:, 5:].set(99.0)
    _, metrics = jaxkl.distillation_loss_with_metrics(s, t, vocab_size=5)
    _assert_metrics(metrics, oracle.metrics(s, t, vocab_size=5))


def test_metrics_of_a_large_batch_hold_no_logits():
    tokens, vocab = 4096, 32000
    logits = jax.ShapeDtypeStruct((tokens, vocab), jnp.float32)
    step = jax.value_and_grad(jaxkl.distillation_loss_with_metrics, has_aux=True)
    stats = jax.jit(step).lower(logits, logits).compile().memory_analysis()
    assert stats.temp_size_in_bytes < 0.1 * 4 * tokens * vocab


def test_second_tile_counts_too(rng):
    s, t = rounded(rng, (37, 5)), rounded(rng, (37, 5))
    f = lambda s: jaxkl.distillation_loss_with_metrics(s, t, tile=8)
    (loss, metrics), grad = jax.value_and_grad(f, has_aux=True)(s)
    _assert_metrics(metrics, oracle.metrics(s, t))
    expected = oracle.distillation_loss(s, t, divergence=FORWARD[1])
    assert_close(loss, expected.loss, 1e-6)
    assert_close(grad, expected.student, 1e-5)
