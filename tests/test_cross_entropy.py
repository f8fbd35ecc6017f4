"""`cross_entropy` against the oracle's, which is that of its distillation loss."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import jaxkl
from jaxkl import cross_entropy

from .alone import assert_gradients, expected_cross_entropy, make_student, pull_back
from .cases import rarely
from .helpers import assert_close
from .sources import per_token


SHAPE, VOCAB = (3, 5), 37
MORE = dict(label_smoothing=0.1, z_loss=1e-2)


def assert_matches(
    rng, source, shape=SHAPE, *, dtype="float32", reduction="mean", pad=0, tol=None,
    value_tol=5e-6, loss=cross_entropy, normalizer=None, **options,
):  # fmt: skip
    """Value and gradients, with masks, weights, and labels that are absent."""
    student = make_student(rng, source, shape, VOCAB, dtype, pad=pad)
    arguments = per_token(rng, shape, "labels", "where", vocab=VOCAB)
    weights = jnp.asarray(rng.uniform(0.1, 2, size=shape), jnp.float32)
    labels, where = arguments["labels"], arguments["where"]
    floats = dict(student=student, weights=weights)
    sizes = dict(vocab_size=VOCAB if pad else None, normalizer=normalizer)
    g = jnp.asarray(rng.normal(size=shape if reduction == "none" else ()))

    def f(student, weights):
        return loss(
            student, labels, where=where, weights=weights, reduction=reduction,
            **MORE, **sizes, **options,
        )  # fmt: skip

    value, gradients = pull_back(f, floats, g)
    expected = expected_cross_entropy(
        student, labels, where=where, weights=weights, reduction=reduction, cotangent=g,
        **MORE, **sizes,
    )  # fmt: skip
    is_double = dtype == "float64"
    assert value.dtype == (jnp.float64 if is_double else jnp.float32)
    assert_close(value, expected.loss, 1e-12 if is_double else value_tol)
    if reduction == "mean" and normalizer is None:
        # The slope of a weight is a difference of two terms as large as the loss.
        del floats["weights"]
    assert_gradients(floats, gradients, expected, tol, is_double)


@pytest.mark.parametrize(
    "source, reduction",
    [
        ("logits", "none"),
        ("head", "mean"),
        *rarely(("logits", "mean"), ("head", "none"), ("head", "sum")),
    ],
)
def test_all_arguments(rng, source, reduction):
    assert_matches(rng, source, reduction=reduction, pad=3)


@pytest.mark.parametrize("source", ["logits", *rarely("head")])
def test_normalizer(rng, source):
    assert_matches(rng, source, normalizer=jnp.float32(7.5))


@pytest.mark.parametrize("options", [dict(plan="lean"), *rarely(dict(tile=4))])
@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
def test_plans_and_tiles(rng, options, reduction):
    assert_matches(rng, "head", (2, 7), reduction=reduction, pad=2, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float16", "float64")])
def test_dtypes(rng, dtype):
    with jax.enable_x64(dtype == "float64"):
        assert_matches(rng, "head", dtype=dtype, value_tol=1e-5)


@ft.cache
def sharded(shape):
    mesh = jax.make_mesh(shape, ("data", "model"))
    axes = dict(token_axes="data", vocab_axis="model")
    return ft.partial(cross_entropy, mesh=mesh, **axes)


@pytest.mark.parametrize("source", ["head", *rarely("logits")])
@pytest.mark.parametrize("shape", [(2, 4), *rarely(((1, 8),), ((8, 1),))])
def test_meshes(rng, source, shape):
    # Neither tokens nor columns are a multiple of anything.
    assert_matches(rng, source, (7, 3), pad=2, loss=sharded(shape))


@pytest.mark.parametrize("shape", rarely(((2, 4),), ((1, 8),)))
def test_one_loss_a_token_on_a_mesh(rng, shape):
    assert_matches(rng, "head", (7, 3), reduction="none", loss=sharded(shape))
    assert_matches(rng, "head", (7, 3), loss=sharded(shape), plan="lean")


def test_inside_shard_map(rng):
    student = make_student(rng, "logits", (5,), 8)
    labels = jnp.array([0, 7, 3, -100, 4])
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    local = ft.partial(cross_entropy, axis_name="model")
    specs = P(None, "model"), P()
    loss = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    value, gradient = jax.jit(jax.value_and_grad(loss))(student, labels)
    expected = expected_cross_entropy(student, labels)
    assert_close(value, expected.loss, 1e-6)
    assert_close(gradient, expected.student, 1e-5)
    with pytest.raises(ValueError, match="`labels` must be the same on all devices"):
        spread = jax.shard_map(
            local, mesh=mesh, in_specs=(specs[0], P("model")), out_specs=P()
        )
        jax.eval_shape(spread, jnp.zeros((2, 8)), jnp.zeros(8, jnp.int32))


@pytest.mark.parametrize("plan", [None, *rarely("lean")])
def test_a_nearly_certain_label(plan):
    """The gradient by the label's logit is the sum of the others', 1e-6 here."""
    s = jnp.array([[0, -14.5, -15.2, -30], [-30, -15.2, -14.5, 0], [3, 3, -20, -30]])
    labels = jnp.array([0, 0, 1])
    head = jaxkl.LinearHead(s, jnp.eye(4))
    f = lambda student: cross_entropy(student, labels, reduction="none", plan=plan)
    value, gradients = pull_back(f, dict(student=head), jnp.ones(3))
    expected = expected_cross_entropy(s, labels, reduction="none")
    for i in range(3):
        assert_close(value[i], expected.loss[i], 1e-6)
        assert_close(gradients["student"].hidden[i], expected.student[i], 1e-6)


@pytest.mark.slow
def test_a_distillation_loss_that_is_all_cross_entropy_is_the_same(rng):
    student = make_student(rng, "head", (6,), VOCAB)
    labels = jnp.asarray(rng.integers(0, VOCAB, 6))
    alone = lambda student: cross_entropy(student, labels, **MORE)
    beside = lambda student: jaxkl.distillation_loss(
        student,
        jnp.zeros((6, VOCAB)),
        labels=labels,
        alpha=0.0,
        temperature=2.0,
        **MORE,
    )
    run = jax.jit(lambda s: [jax.value_and_grad(f)(s) for f in (alone, beside)])
    one, other = run(student)
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert_close(x, y, 1e-6)


def test_optax_has_the_same(rng):
    s = make_student(rng, "logits", (6,), VOCAB)
    labels = jnp.asarray(rng.integers(0, VOCAB, 6))
    mean = lambda s: jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(s, labels)
    )
    losses = lambda s: cross_entropy(s, labels), mean
    run = jax.jit(lambda s: [jax.value_and_grad(f)(s) for f in losses])
    for x, y in zip(*run(s), strict=True):
        assert_close(x, y, 1e-6)


def test_a_token_without_a_label_does_not_count(rng):
    s = make_student(rng, "head", (4,), VOCAB)
    s = jaxkl.LinearHead(s.hidden.at[1].set(jnp.nan), s.kernel)
    labels = jnp.array([3, -100, 0, 36])
    f = lambda s, labels: cross_entropy(s, labels, z_loss=0.1)
    step = jax.jit(jax.value_and_grad(f))
    value, grad = step(s, labels)
    kept = np.array([0, 2, 3])
    expected = expected_cross_entropy(
        jaxkl.LinearHead(s.hidden[kept], s.kernel), labels[kept], z_loss=0.1
    )
    assert_close(value, expected.loss, 5e-6)
    assert_close(grad.hidden[kept], expected.student.hidden, 1e-5)
    assert_close(grad.kernel, expected.student.kernel, 1e-5)
    assert not grad.hidden[1].any()
    value, grad = step(s, jnp.full(4, -100))
    assert value == 0 and not any(x.any() for x in jax.tree.leaves(grad))


@pytest.mark.slow
def test_transforms(rng):
    """vmap over batches, in a scan, with remat, compared with one call."""
    student = make_student(rng, "logits", (2, 4), 7)
    labels = jnp.asarray(rng.integers(0, 7, (2, 4)))
    loss = jax.checkpoint(ft.partial(cross_entropy, reduction="sum", z_loss=0.1))
    mapped = lambda s: jnp.sum(jax.vmap(loss)(s, labels))
    step = lambda total, x: (total + loss(*x), None)
    scanned = lambda s: jax.lax.scan(step, jnp.float32(0), (s, labels))[0]
    one, *others = (
        jax.jit(jax.value_and_grad(f))(student)
        for f in (lambda s: loss(s, labels), mapped, scanned)
    )
    for other in others:
        jax.tree.map(lambda x, y: assert_close(x, y, 1e-6), one, other)


def test_three_products_with_the_gradient(rng):
    student = make_student(rng, "head", (6,), VOCAB)
    labels = jnp.zeros(6, jnp.int32)
    program = lambda f: jax.jit(f).lower(student).as_text()
    count = lambda f: len(re.findall("stablehlo.dot_general", program(f)))
    loss = lambda student: cross_entropy(student, labels)
    assert count(loss) == 1
    assert count(jax.grad(loss)) == 3


def test_the_reference_has_the_same(rng):
    loss = jaxkl.reference.cross_entropy
    assert_matches(rng, "logits", reduction="none", pad=3, loss=loss)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(labels=jnp.full(3, 1)), ValueError, "`labels` must have the batch shape"),
        (
            dict(labels=jnp.full(2, 4)),
            ValueError,
            r"must be in \[0, 4\), or -100 for no",
        ),
        (dict(labels=jnp.zeros(2)), TypeError, "`labels` must be integers, got float"),
        (dict(labels=None), TypeError, "`labels` must be an array of integers"),
        (dict(reduction="avg"), ValueError, "`reduction` must be one of"),
        (dict(label_smoothing=1.5), ValueError, "`label_smoothing` must be in"),
        (dict(vocab_size=5), ValueError, "columns of `student`, 4, got 5"),
        (dict(mask=None), TypeError, "did you mean `where`"),
        (dict(student=3.0), ValueError, "`student` must be logits"),
    ],
)
def test_bad_arguments(arguments, error, match):
    good = dict(student=jnp.zeros((2, 4)), labels=jnp.array([0, -100]))
    with pytest.raises(error, match=match):
        cross_entropy(**good | arguments)


def test_a_traced_label_that_is_out_of_range_is_nan():
    labels = jnp.array([0, 4])
    loss = jax.jit(ft.partial(cross_entropy, reduction="none"))(
        jnp.zeros((2, 4)), labels
    )
    assert np.isfinite(loss[0]) and np.isnan(loss[1])
