"""Inputs on which other libraries are wrong: each test has their formula beside ours.

As in `test_known_wrong.py`, a test fails too if it no longer shows the mistake.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl import cross_entropy, distillation_loss, SparseTeacher, token_log_probs

from . import oracle
from .cases import (
    ALL,
    assert_matches,
    assert_source_gradient,
    evaluate,
    over,
    over_catalogue,
    REVERSE,
    rounded,
)
from .helpers import assert_close
from .registry import Batch, check, LOSSES, pull_back
from .sources import (
    expected_cross_entropy,
    expected_log_probs,
    expected_of,
    make_head,
    TAILS,
)


pytestmark = pytest.mark.slow


def _kl(log_p, log_q):
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


def _assert_exactly_nothing(model, divergence):
    value, grads = evaluate(model, model, divergence=divergence, cotangent=1.3)
    assert value == 0
    assert not any(x.any() for x in jax.tree.leaves(grads))


@over_catalogue
def test_equal_bfloat16_logits_of_a_large_vocabulary(rng, divergence, reference):
    # In plain JAX the gradient of equal models is rounding, not 0.
    del reference
    s = rounded(rng, (2, 248_320), "bfloat16", scale=3.0)
    log_p = jax.nn.log_softmax(s.astype("float32"))
    theirs = jax.grad(lambda s: _kl(log_p, jax.nn.log_softmax(s)).sum())
    assert theirs(s.astype("float32")).any()
    _assert_exactly_nothing(s, divergence)


@over("forward", "reverse", "js")
def test_equal_bfloat16_heads_of_a_large_vocabulary(rng, divergence, reference):
    del reference
    more = dict(bias=True, softcap=4.0, scale=0.7)
    head = make_head(rng, (2,), 5, 248_320, "bfloat16", **more)
    _assert_exactly_nothing(head, divergence)


@over_catalogue
def test_a_float32_student_of_a_bfloat16_teacher(rng, divergence, reference):
    # ms-swift normalises each in its own dtype: most of its divergences are negative.
    s = rounded(rng, (32, 1001))
    t = s.astype("bfloat16")
    theirs = _kl(*(jax.nn.log_softmax(x).astype("float32") for x in (t, s)))
    assert (theirs < 0).any()
    ours, grads = evaluate(s, t, divergence=divergence, reduction="none")
    expected = oracle.distillation_loss(s, t, divergence=reference, reduction="none")
    assert (ours > 0).all()
    assert_close(ours, expected.loss, 1e-4)
    if divergence == jaxkl.TotalVariation():
        return  # its slope is the sign of a difference below float32's rounding
    assert_close(grads["student"], expected.student, 1e-3)
    assert_close(grads["teacher"], expected.teacher, 1e-2)


@over("js", "js_normalized", "skew_forward", "skew_reverse")
@pytest.mark.parametrize("source", ["logits", "list"])
def test_a_mixture_that_underflows(source, divergence, reference):
    # Liger has 0 · log(0 / 0) where both log-probabilities are below -104.
    s = jnp.array([[0, -110, -150, -1, -0.5], [2, -200, -106, 0, -300]], jnp.float32)
    t = jnp.array([[0.3, -140, -108, 0, -1], [1, -105, -400, 2, -300]], jnp.float32)
    log_p, log_q = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    assert np.isnan(jnp.sum(p * (log_p - jnp.log((p + q) / 2)), -1)).all()
    teacher = t
    if source == "list":
        teacher = SparseTeacher(jnp.arange(5)[None].repeat(2, 0), log_p)
    value, grads = assert_matches(s, teacher, (divergence, reference), cotangent=1.3)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("tail", ["bucket", "uniform", "conditional"])
def test_reverse_kl_where_a_list_has_minus_inf(rng, tail):
    # In TRL the product is masked there: it is finite where KL(q ‖ p) is not.
    s = rounded(rng, (1, 7))
    log_probs = jnp.log(jnp.array([[0.5, 0.0, 0.3]]))
    teacher = SparseTeacher(jnp.array([[1, 4, 2]]), log_probs, tail=tail)
    for name in ("reverse", "symmetric"):
        value, grads = evaluate(s, teacher, divergence=ALL[name][0])
        assert value == np.inf
        assert expected_of(s, teacher, divergence=ALL[name][1]).loss == np.inf
        # It is -inf or NaN beside a rest, and about 1e36 where rows are dense.
        assert not np.abs(grads["student"][0, 1]) < 1e30
    # A mixture is finite, and so is KL(q ‖ p) where the student has nothing either.
    assert_matches(s, teacher, ALL["js"], cotangent=1.3)
    assert_matches(s.at[0, 4].set(-np.inf), teacher, REVERSE, cotangent=1.3)


@pytest.mark.parametrize("module", [jaxkl, jaxkl.reference])
@pytest.mark.parametrize(
    "name", ["head", "head, logits", "cross_entropy of head", "log_probs of head"]
)
def test_a_cap_with_a_bias_and_a_scale(rng, name, module):
    # TRL leaves the cap out, CCE caps before the bias.
    loss = LOSSES[name]
    batch = loss.make(rng, (6,), 37, bias=True, softcap=2.0, scale=0.6)
    _assert_caps_last(batch.floats["student"])
    check(loss, rng, batch, module=module, tol=(5e-6, 1e-5))


def test_a_cap_beside_metrics(rng):
    loss = LOSSES["head"]
    batch = loss.make(rng, (6,), 37, bias=True, softcap=2.0, scale=0.6)
    f = lambda *x, **y: jaxkl.distillation_loss_with_metrics(*x, **y)[0]
    check(loss, rng, batch, f=f)


def _assert_caps_last(head):
    x = head.scale * (head.hidden @ head.kernel)
    cap = lambda x: head.softcap * jnp.tanh(x / head.softcap)
    ours, theirs = cap(x + head.bias[None]), cap(x) + head.bias[None]
    uncapped = x + head.bias[None]
    assert jnp.abs(ours - theirs).max() > 0.1 and jnp.abs(ours - uncapped).max() > 0.1


# Liger's kernels have a 16-bit number of the token: the last ones alias the first.
MANY = 70_001


@pytest.mark.parametrize(
    "name",
    [
        f"{f}{source}"
        for f in ("", "cross_entropy of ", "log_probs of ")
        for source in ("logits", "head")
    ],
)
def test_more_tokens_than_16_bits_count(rng, name):
    loss = LOSSES[name]
    batch = loss.make(rng, (MANY,), 5)
    check(loss, rng, batch)
    if loss.function != "token_log_probs":
        check(loss, rng, batch, reduction="none")


@pytest.mark.parametrize("tail", ["bucket", "conditional"])
def test_more_lists_than_16_bits_count(rng, tail):
    s = rounded(rng, (MANY, 5))
    teacher = jaxkl.top_k_teacher(rounded(rng, (MANY, 5)), 2, tail=tail)
    value, grads = evaluate(s, teacher, reduction="none", cotangent=1.3)
    # Each token has a loss of its own: those beyond 16 bits are enough.
    late = slice(65_530, None, 7)
    part = jax.tree.map(lambda x: x[late], teacher)
    expected = expected_of(s[late], part, reduction="none", cotangent=1.3)
    assert_close(value[late], expected.loss, 5e-6)
    assert_close(grads["student"][late], expected.student, 1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_repeated_columns_of_a_list(rng, tail):
    # A scatter that sets keeps one of them, a gather counts the student's twice.
    s = rounded(rng, (2, 11))
    indices = jnp.array([[2, 5, 2, 7, 2], [0, 10, 10, -1, 0]])
    log_probs = jnp.log(jnp.asarray(rng.dirichlet(np.ones(6), 2)[:, :5], jnp.float32))
    teacher = SparseTeacher(indices, log_probs, tail=tail)
    once = jnp.zeros_like(s).at[jnp.arange(2)[:, None], indices].set(jnp.exp(log_probs))
    assert (once.sum(-1) < jnp.exp(log_probs).sum(-1) - 0.05).all()
    for divergence in ("forward", "js", "reverse"):
        if divergence == "forward" or tail in ("bucket", "uniform", "conditional"):
            more = dict(temperature=1.7, cotangent=1.3)
            assert_matches(s, teacher, ALL[divergence], **more)


def test_repeated_tokens(rng):
    # The gradient of a gather that is written back by a scatter that sets is one of k.
    s = rounded(rng, (2, 11))
    tokens = jnp.array([[2, 5, 2, 7, 2], [0, 10, 10, -1, 0]])
    g = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    f = lambda batch: token_log_probs(**batch.floats, tokens=tokens)
    value, gradients = pull_back(f, Batch(dict(student=s), {}), g)
    expected = expected_log_probs(s, tokens, cotangents=(g, np.zeros(2)))
    assert_close(value, expected.log_probs, 1e-6)
    assert_close(gradients["student"], expected.student, 1e-5)
    rows = jnp.arange(2)[:, None]
    kept = jnp.where(tokens >= 0, tokens, 11)
    once = jnp.zeros_like(s).at[rows, kept].set(g, mode="drop")
    theirs = once - jax.nn.softmax(s) * jnp.where(tokens >= 0, g, 0).sum(-1)[:, None]
    assert np.abs(theirs - expected.student.astype(float)).max() > 0.1


@pytest.mark.parametrize("loss", ["distillation_loss", "cross_entropy"])
def test_means_over_unequal_micro_batches(rng, loss):
    # TRL takes the mean of means, in which a token of a short batch counts for more.
    student, teacher = (make_head(rng, (13,), n, 37) for n in (5, 3))
    labels = jnp.asarray(rng.integers(0, 37, 13))
    where = jnp.arange(13) % 4 != 2
    parts = [slice(0, 2), slice(2, 3), slice(3, 10), slice(10, 13)]  # one is all masked
    take = lambda head, part: replace(head, hidden=head.hidden[part])

    def of_part(student, part, **more):
        x, more = take(student, part), more | dict(where=where[part])
        if loss == "cross_entropy":
            return cross_entropy(x, labels[part], z_loss=0.01, **more)
        more |= dict(labels=labels[part], alpha=0.7)
        return distillation_loss(x, take(teacher, part), **more)

    @jax.jit
    @jax.value_and_grad
    def whole(student):
        return sum(of_part(student, part, normalizer=where.sum()) for part in parts)

    value, grads = whole(student)
    arguments = dict(labels=labels, where=where)
    if loss == "cross_entropy":
        expected = expected_cross_entropy(student, z_loss=0.01, **arguments)
    else:
        expected = expected_of(student, teacher, alpha=0.7, **arguments)
    assert_close(value, expected.loss, 5e-6)
    assert_source_gradient(student, grads, expected.student, "student")
    theirs = np.mean([of_part(student, part) for part in parts])
    assert abs(theirs / float(expected.loss) - 1) > 0.01


@pytest.mark.parametrize("plan", ["dense", "fast", "lean"])
def test_the_gradient_of_a_nearly_certain_label(plan):
    # Liger's is `q - 1`: beyond a gap of 17 it is 0.
    gaps = np.arange(10, 81, 5)
    s = np.zeros((len(gaps), 6), np.float32)
    s[:, 1:] = -gaps[:, None] - np.linspace(0, 1, 5)
    labels = jnp.asarray(np.arange(len(gaps)) % 6)
    s = np.stack([np.roll(row, shift) for row, shift in zip(s, labels, strict=True)])
    s = jnp.asarray(s)
    theirs = jax.nn.softmax(s) - jax.nn.one_hot(labels, 6)
    expected = expected_cross_entropy(s, labels, reduction="none")
    at_label = lambda x: np.take_along_axis(
        np.asarray(x, np.float64), np.asarray(labels)[:, None], -1
    )
    error = lambda x: np.abs(at_label(x) / at_label(expected.student) - 1)
    assert (error(theirs)[gaps > 17] == 1).all()
    student, more = s, dict(labels=labels)
    if plan != "dense":
        student, more["plan"] = jaxkl.LinearHead(s, jnp.eye(6)), plan
    f = lambda batch: cross_entropy(**batch.floats, reduction="none", **more)
    batch = Batch(dict(student=student), {})
    value, gradients = pull_back(f, batch, np.ones(len(gaps), np.float32))
    gradient = gradients["student"]
    gradient = gradient if plan == "dense" else gradient.hidden
    np.testing.assert_allclose(value, expected.loss.astype(float), rtol=1e-6)
    assert error(gradient).max() < 1e-6
