"""`distillation_loss_with_metrics`."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl

from . import oracle
from .cases import (
    assert_source_gradient,
    JENSEN_SHANNON,
    over_kinds,
    rarely,
    rounded,
)
from .helpers import assert_close
from .sources import (
    exact_logits,
    expected_of,
    make_head,
    make_list,
    make_models,
    per_token,
)


FIELDS = oracle.Metrics._fields


# The oracle may have no entropy of a list, which `DistillationMetrics` always has.
OPTIONAL = (
    "cross_entropy", "teacher_listed_mass", "student_listed_mass", "top_k_overlap"
)  # fmt: skip


def _assert_metrics(actual, expected, tol=1e-6, shape=(), dtype="float32"):
    for name in FIELDS:
        got, want = getattr(actual, name), getattr(expected, name)
        if name in OPTIONAL:
            assert (got is None) == (want is None), name
        if want is not None:
            assert got.shape == shape and got.dtype == dtype, name
            assert_close(got, want, tol, name)


with_metrics = jaxkl.distillation_loss_with_metrics


@pytest.mark.parametrize(
    "dtype, reduction",
    [("bfloat16", "none"), *rarely(("float32", "mean"), ("float16", "sum"))],
)
@over_kinds
def test_metrics_match_the_oracle(rng, divergence, reference, reduction, dtype):
    s, t = rounded(rng, (2, 9, 5), dtype), rounded(rng, (2, 9, 5), dtype)
    names = "where", "weights", "labels", "temperature"
    counted = per_token(rng, (2, 9), *names, vocab=5)
    counted["teacher_temperature"] = jnp.float32(2)
    rest = dict(divergence=divergence, reduction=reduction, alpha=0.5, z_loss=0.1)
    f = jax.jit(lambda s, t, counted: with_metrics(s, t, **counted, **rest))
    # Dropped tokens hold anything.
    spoil = lambda x, junk: jnp.where(counted["where"][..., None], x, junk)
    loss, metrics = f(spoil(s, jnp.nan), spoil(t, -jnp.inf), counted)
    expected = oracle.metrics(s, t, divergence=reference, **counted)
    _assert_metrics(metrics, expected)
    # The loss is the same as without metrics.
    plain = rest | dict(divergence=reference)
    assert_close(loss, oracle.distillation_loss(s, t, **counted, **plain).loss, 1e-6)


@pytest.mark.parametrize(
    "source", ["head", "bucket", *rarely("renormalize", "uniform", "conditional")]
)
def test_metrics_of_heads_and_lists(rng, source):
    student, teacher = make_models(rng, source, (3, 5), 11, pad=(3, 1))
    shared = per_token(rng, (3, 5), "weights", "where")
    shared |= dict(temperature=1.5, vocab_size=11)
    mine, theirs = JENSEN_SHANNON
    f = partial(with_metrics, divergence=mine)
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


LABELS = dict(labels=np.array([0, 4, -100, 2]))


@pytest.mark.parametrize(
    "arguments, options",
    [
        (dict(temperature=3.0), {}),
        (LABELS, {}),
        (LABELS | dict(temperature=2.0), dict(alpha=0.0)),
        *rarely(({}, dict(normalizer=100.0))),
    ],
)
def test_metrics_of_what_is_no_part_of_the_loss(rng, arguments, options):
    """Without labels there is no cross-entropy."""
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    _, metrics = jax.jit(partial(with_metrics, **arguments, **options))(s, t)
    assert isinstance(metrics, jaxkl.DistillationMetrics)
    _assert_metrics(metrics, oracle.metrics(s, t, **arguments))


def test_has_aux_and_no_gradient_through_the_metrics(rng):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    weights = per_token(rng, (4,), "weights")["weights"].at[0].set(1)

    @jax.jit
    def run(s, weights):
        f = lambda s, weights: with_metrics(s, t, weights=weights)
        (loss, metrics), grad = jax.value_and_grad(f, has_aux=True)(s, weights)
        of_metrics = lambda *x: sum(jax.tree.leaves(f(*x)[1]))
        return loss, metrics, grad, jax.grad(of_metrics, (0, 1))(s, weights)

    loss, metrics, grad, through = run(s, weights)
    expected = oracle.distillation_loss(s, t, weights=weights)
    assert_close(loss, expected.loss, 1e-6)
    assert_close(grad, expected.student, 1e-5)
    _assert_metrics(metrics, oracle.metrics(s, t, weights=weights))
    assert not any(x.any() for x in through)


@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
@pytest.mark.parametrize("how", ["masked", "unlabelled", "empty"])
def test_metrics_of_nothing_are_zero(rng, how, reduction):
    shape = (0,) if how == "empty" else (4,)
    s, t = rounded(rng, (*shape, 5)), rounded(rng, (*shape, 5))
    labels = jnp.full(shape, -100 if how == "unlabelled" else 0)
    where = jnp.full(shape, how == "unlabelled")
    if how == "masked":
        s = jnp.full_like(s, np.nan)
    options = dict(labels=labels, where=where, alpha=0.5, reduction=reduction)
    f = lambda s: with_metrics(s, t, **options)
    (_, metrics), vjp = jax.vjp(jax.jit(f), s)
    _assert_metrics(metrics, oracle.metrics(s, t, labels=labels, where=where))
    assert metrics.cross_entropy == 0
    ones = jax.tree.map(jnp.ones_like, jax.eval_shape(f, s))
    assert np.isfinite(vjp(ones)[0]).all()


def test_singular_rows(rng):
    inf = np.inf
    s = jnp.array([[-inf, 0.5, 1], [-inf, 0, -inf], [1e4, -1e4, 0]])
    t = jnp.array([[-inf, 1.0, 0], [-inf, 3, -inf], [1e4, 0, -1e4]])
    _, metrics = with_metrics(s, t)
    _assert_metrics(metrics, oracle.metrics(s, t))


def test_kl_is_accurate_near_the_teacher(rng):
    t = rounded(rng, (2, 32000))
    s = t + rounded(rng, (2, 32000), scale=3e-3)
    _, metrics = with_metrics(s, t, temperature=2.0)
    expected = oracle.metrics(s, t, temperature=2.0)
    assert_close(metrics.kl, expected.kl, 1e-4)
    assert_close(metrics.divergence, expected.divergence, 1e-4)


# Sums over micro-batches.


def _batch(rng, shape, vocab=11):
    """A student's logits, a list, and weights, some of them 0, labels and a mask."""
    student, teacher = (
        rounded(rng, (*shape, vocab)),
        make_list(rng, shape, vocab, 4, "uniform"),
    )
    return student, teacher, per_token(rng, shape, "weights", "labels", "where")


@jax.jit
def _metrics(student, teacher, counted):
    return with_metrics(student, teacher, **counted)[1]


def test_micro_batches_add_up(rng):
    """One has another number of tokens, and one has no label and one no weight."""
    batch = _batch(rng, (17,))
    _, _, counted = batch
    counted["labels"] = counted["labels"].at[:6].set(-100)
    counted["weights"] = counted["weights"].at[6:12].set(0)
    ends = [0, 6, 12, 17]
    parts = [
        _metrics(*jax.tree.map(lambda x, i=i, j=j: x[i:j], batch))
        for i, j in zip(ends[:-1], ends[1:], strict=True)
    ]
    assert parts[0].cross_entropy == 0 and parts[1].kl == 0
    expected = oracle.metrics(*batch[:2], **counted)
    _assert_metrics(parts[0] + parts[1] + parts[2], expected)
    _assert_metrics(sum(reversed(parts)), expected)
    # This is not the mean of the means.
    mean_of_means = np.mean([x.kl for x in parts])
    assert abs(mean_of_means - expected.kl) > 0.05 * expected.kl


def test_zeros_are_the_metrics_of_no_token(rng):
    batch = _batch(rng, (6,))
    metrics = _metrics(*batch)
    zeros = jaxkl.DistillationMetrics.zeros(labels=True, sparse_teacher=True)
    assert len(zeros.to_dict()) == 10 and not any(zeros.to_dict().values())
    for total in (zeros + metrics, metrics + zeros):
        for x, y in zip(*map(jax.tree.leaves, (total, metrics)), strict=True):
            assert x == y and x.dtype == y.dtype
    dense = rounded(rng, (6, 5))
    _, metrics = with_metrics(dense, dense)
    zeros = jaxkl.DistillationMetrics.zeros()
    assert jax.tree.structure(zeros) == jax.tree.structure(metrics)


def test_a_scan_adds_up(rng):
    """In the carry, or stacked and summed."""
    batch = _batch(rng, (3, 5))

    @jax.jit
    def run(batch):
        def step(total, batch):
            metrics = _metrics(*batch)
            return total + metrics, metrics

        zeros = jaxkl.DistillationMetrics.zeros(labels=True, sparse_teacher=True)
        total, stacked = jax.lax.scan(step, zeros, batch)
        assert isinstance(stacked, jaxkl.DistillationMetrics)
        return total, jax.tree.map(lambda x: x.sum(0), stacked)

    expected = oracle.metrics(*batch[:2], **batch[2])
    for total in run(batch):
        _assert_metrics(total, expected)


def test_only_like_metrics_add_up():
    zeros = jaxkl.DistillationMetrics.zeros
    plain, labelled, listed = zeros(), zeros(labels=True), zeros(sparse_teacher=True)
    with pytest.raises(ValueError, match="cross_entropy is None.*zeros\\(labels=True"):
        plain + labelled
    with pytest.raises(ValueError, match="teacher_listed_mass, student.*is None"):
        listed + plain
    with pytest.raises(TypeError, match="unsupported operand"):
        plain + 1  # pyright: ignore[reportOperatorIssue]
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + plain  # pyright: ignore[reportOperatorIssue]


def test_nan_stays(rng):
    student, teacher, counted = _batch(rng, (6,))
    labels = counted["labels"].at[2].set(1)
    counted |= dict(weights=jnp.ones(6), where=jnp.ones(6, bool), labels=labels)
    spoilt = student.at[2, 3].set(np.nan)
    good = _metrics(student, teacher, counted)
    total = (good + _metrics(spoilt, teacher, counted)).to_dict()
    assert total.pop("weight") == 12
    # That columns agree is a comparison, which of NaN is false.
    assert 0 <= total.pop("top1_agreement") < 1
    assert total.pop("teacher_listed_mass") > 0
    assert total.pop("teacher_entropy") > 0
    assert len(total) == 6 and all(map(np.isnan, total.values()))
    ok = _metrics(spoilt, teacher, counted | dict(where=jnp.arange(6) != 2))
    assert all(map(np.isfinite, (good + ok).to_dict().values()))


def test_numbers_to_log(rng):
    batch = _batch(rng, (6,))
    expected = oracle.metrics(*batch[:2], **batch[2])
    logged = _metrics(*batch).to_dict()
    assert list(logged) == list(FIELDS)
    assert all(type(x) is float for x in logged.values())
    traced = jax.jit(lambda batch: _metrics(*batch).compute())(batch)
    for name in FIELDS:
        assert_close(logged[name], getattr(expected, name), 1e-6, name)
        assert_close(traced[name], getattr(expected, name), 1e-6, name)
    assert json.loads(json.dumps(logged)) == logged


# Of each token.


@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
def test_metrics_of_each_token(rng, reduction):
    student, teacher, counted = _batch(rng, (3, 5))
    f = partial(with_metrics, reduction=reduction, per_token_metrics=True)
    loss, metrics = jax.jit(partial(f, **counted))(student, teacher)
    assert loss.shape == (() if reduction == "mean" else (3, 5))
    of_token = lambda i: oracle.metrics(
        *jax.tree.map(lambda x: x[i][None], (student, teacher)),
        **jax.tree.map(lambda x: x[i][None], counted),
    )
    tokens = [of_token(i) for i in np.ndindex(3, 5)]
    shaped = lambda *x: np.reshape(np.asarray(x, np.float64), (3, 5))
    _assert_metrics(metrics, jax.tree.map(shaped, *tokens), shape=(3, 5))
    assert metrics.kl[0, 0].shape == () and len(metrics.to_dict()["kl"]) == 3
    assert np.any(metrics.weight == 0) and not np.any(metrics.kl[metrics.weight == 0])
    total = jax.tree.map(jnp.sum, metrics)
    _assert_metrics(total, oracle.metrics(student, teacher, **counted))


def test_per_token_metrics_is_a_bool(rng):
    s = rounded(rng, (4, 5))
    with pytest.raises(TypeError, match="`per_token_metrics` must be True or False"):
        with_metrics(s, s, per_token_metrics=1)  # pyright: ignore[reportArgumentType]


# Of a teacher's list.


@pytest.mark.parametrize("tail", ["renormalize", *rarely("bucket", "conditional")])
@pytest.mark.parametrize("plan", ["lean", *rarely("fast")])
def test_lists_over_tiles_and_blocks(rng, monkeypatch, plan, tail):
    monkeypatch.setattr("jaxkl._engine.plan._columns", lambda *_: 128)
    student = make_head(rng, (13,), 5, 300, bias=True, softcap=3.0)
    teacher = make_list(rng, (13,), 300, 60, tail)
    counted = per_token(rng, (13,), "temperature", "weights", "where")
    tile = 4 if plan == "fast" else None
    f = partial(with_metrics, plan=plan, tile=tile)
    run = lambda student, teacher, counted: f(student, teacher, **counted)
    (_, metrics), grad = jax.jit(jax.value_and_grad(run, has_aux=True))(
        student, teacher, counted
    )
    s, _ = exact_logits(student)
    _assert_metrics(metrics, oracle.metrics(s, teacher, **counted), 5e-6)
    assert 0.1 < metrics.top_k_overlap < 0.9
    expected = expected_of(student, teacher, **counted)
    assert_source_gradient(student, grad, expected.student, "student")


@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float32")])
def test_overlap_of_equal_logits(rng, dtype):
    """Of few different numbers: equal columns are in or out together."""
    student = jnp.asarray(rng.integers(0, 4, (40, 23)), dtype)
    teacher = make_list(rng, (40,), 23, 7, "bucket")
    _assert_metrics(_metrics(student, teacher, {}), oracle.metrics(student, teacher))


@pytest.mark.slow
def test_overlap_with_itself_and_of_all_columns_is_one(rng):
    t = rounded(rng, (5, 9))
    for k in (4, 9):
        metrics = _metrics(t, jaxkl.top_k_teacher(t, k), {})
        assert metrics.top_k_overlap == 1
        assert_close(metrics.student_listed_mass, metrics.teacher_listed_mass, 1e-6)
    s = t.at[:, 2].set(-np.inf)
    assert _metrics(s, jaxkl.top_k_teacher(-t, 9), {}).top_k_overlap == 1


def test_a_list_of_nothing_has_no_overlap(rng):
    teacher = make_list(rng, (3,), 11, 4, "bucket")
    indices = teacher.indices.at[1].set(-1)
    teacher = jaxkl.SparseTeacher(indices, teacher.log_probs, tail="bucket")
    student = rounded(rng, (3, 11))
    _assert_metrics(_metrics(student, teacher, {}), oracle.metrics(student, teacher))


@pytest.mark.parametrize("plan", ["lean", *rarely("fast")])
def test_an_empty_list_agrees_with_no_column(plan):
    """Nor with the first, which is the student's largest."""
    kernel = jnp.zeros((2, 11)).at[:, 0].set(1)
    student = jaxkl.LinearHead(jnp.ones((3, 2)), kernel)
    slots = jnp.full((3, 4), -1)
    teacher = jaxkl.SparseTeacher(slots, jnp.zeros((3, 4)), tail="bucket")
    _, metrics = with_metrics(student, teacher, plan=plan)
    assert metrics.top1_agreement == 0


def test_a_list_in_float64(rng):
    with jax.enable_x64(True):
        student = rounded(rng, (3, 7), "float64")
        teacher = make_list(rng, (3,), 7, 3, "bucket")
        expected = oracle.metrics(student, teacher)
        metrics = _metrics(student, teacher, {})
        _assert_metrics(metrics, expected, 1e-12, dtype="float64")


def test_metrics_of_a_list_that_nobody_takes_cost_no_exchange(rng):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    student, teacher = rounded(rng, (5, 12)), make_list(rng, (5,), 12, 3, "bucket")
    options = dict(mesh=mesh, vocab_axis="model")
    plain = partial(jaxkl.distillation_loss, **options)
    dropped = lambda *x: with_metrics(*x, **options)[0]

    def exchanges(loss):
        lowered = jax.jit(jax.value_and_grad(loss)).lower(student, teacher)
        return lowered.compile().as_text().count(" all-reduce(")

    assert exchanges(dropped) == exchanges(plain) > 0
