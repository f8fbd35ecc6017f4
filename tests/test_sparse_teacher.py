"""Teachers of a few columns a row: lists, top-k and samples."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import jaxkl
from jaxkl import distillation_loss, sampled_teacher, SparseTeacher, top_k_teacher
from jaxkl._sparse_from_logits import _draw

from . import oracle
from .cases import ALL, assert_gradient, assert_source_gradient, rarely, rounded
from .helpers import assert_close
from .sources import exact_logits, make_head


TAILS = ("renormalize", "drop", "bucket", "uniform")
over_tails = pytest.mark.parametrize(
    "tail", ["bucket", *rarely("renormalize", "drop", "uniform")]
)


def _log(x):
    with np.errstate(divide="ignore"):
        return np.log(x)


def _outcomes(log_q, indices, log_probs, tail):
    """The two distributions that a tail compares in one row, and a matrix.

    It sums the columns that make an outcome: `[outcomes, vocab]`, of 0 and 1.
    """
    vocab = len(log_q)
    used = indices >= 0
    p = np.zeros(vocab)
    np.add.at(p, indices[used], np.exp(np.asarray(log_probs, np.float64)[used]))
    listed = np.isin(np.arange(vocab), indices[used])
    rest = 0.0 if listed.all() else max(1 - p.sum(), 0.0)
    columns = np.eye(vocab)
    if tail == "renormalize":
        p = p / p.sum()
    elif tail == "uniform":
        p = np.where(listed, p, rest / max((~listed).sum(), 1))
        p = p / p.sum()
    else:
        p, columns = p[listed], columns[listed]
        if tail == "bucket" and not listed.all():
            p = np.append(p, rest)
            columns = np.concatenate([columns, 1.0 * ~listed[None]])
    return _log(p), _log(columns @ np.exp(log_q)), columns


def _expected(
    student, teacher, divergence=oracle.forward_kl, *, temperature=1.0, where=None
):
    """Mean loss, per-token losses, and the gradient of the mean to the logits."""
    s = np.asarray(student, np.float64)
    rows = s.reshape(-1, s.shape[-1])
    indices, log_probs = (
        np.asarray(x).reshape(len(rows), -1)
        for x in (teacher.indices, teacher.log_probs)
    )
    T = np.broadcast_to(np.asarray(temperature, np.float64), s.shape[:-1]).ravel()
    keep = np.ones(len(rows)) if where is None else np.ravel(where)
    losses, grads = np.zeros(len(rows)), np.zeros_like(rows)
    for i in np.flatnonzero(keep):
        log_q = np.asarray(oracle.log_softmax(rows[i] / T[i]), np.float64)
        log_p, log_Q, columns = _outcomes(log_q, indices[i], log_probs[i], teacher.tail)
        with np.errstate(all="ignore"):
            f, _, f_Q = (np.asarray(x, np.float64) for x in divergence(log_p, log_Q))
            if teacher.tail == "drop":  # no whole sum, where the oracle's `q - p` is 0
                f_Q = -np.exp(log_p)
                f = np.where(f_Q == 0, 0, f_Q * (log_Q - log_p))
        q = np.exp(log_q)
        # ∂ log Q / ∂ log q, where there is any.
        Q = np.exp(log_Q)
        shares = columns * q / np.where(Q > 0, Q, 1)[:, None]
        f_q = f_Q @ shares
        losses[i] = T[i] ** 2 * f.sum()
        grads[i] = T[i] * (f_q - q * f_q.sum())
    count = keep.sum()
    shape = s.shape[:-1]
    return losses.sum() / count, losses.reshape(shape), grads.reshape(s.shape) / count


@cache
def _compiled(static):
    f = partial(distillation_loss, **dict(static))
    return jax.jit(jax.value_and_grad(f))


def _evaluate(student, teacher, **arguments):
    traced = {k: v for k, v in arguments.items() if isinstance(v, jax.Array)}
    static = frozenset((k, v) for k, v in arguments.items() if k not in traced)
    return _compiled(static)(student, teacher, **traced)


def _teacher(rng, shape, vocab, k, tail, dtype="float32"):
    """Some slots empty, others repeated; their mass is below one."""
    indices = rng.integers(0, vocab, size=(*shape, k))
    indices[..., -1] = indices[..., 0]
    indices[..., 1] = -1
    log_probs = np.log(rng.dirichlet(np.ones(k + 1), size=shape)[..., :k])
    return SparseTeacher(jnp.asarray(indices), jnp.asarray(log_probs, dtype), tail=tail)


# Value and gradient.

# Divergences that have a meaning on a tail; the others are refused.
ANYWHERE = ("forward", "skew_forward", "skew_reverse", "js", "total_variation", "user")
INFINITE = ("reverse", "symmetric", "alpha_minus_one")
PAIRS = [
    *(("renormalize", name) for name in ("forward", "user")),
    *rarely(("renormalize", "js"), ("renormalize", "alpha_half")),
    *rarely(("renormalize", "total_variation"), ("renormalize", "skew_reverse")),
    ("drop", "forward"),
    *(("bucket", name) for name in ("reverse", "js_normalized")),
    *rarely(("bucket", "forward"), ("bucket", "user")),
    ("uniform", "reverse"),
    *rarely(("uniform", "forward"), ("uniform", "total_variation")),
]


@pytest.mark.parametrize("tail, name", PAIRS)
def test_tails_match_their_definition(rng, tail, name):
    divergence, reference = ALL[name]
    s, teacher = rounded(rng, (7, 13)), _teacher(rng, (7,), 13, 5, tail)
    arguments = dict(temperature=jnp.asarray(rng.uniform(0.5, 3, size=7), jnp.float32))
    value, grad = _evaluate(s, teacher, divergence=divergence, tile=3, **arguments)
    loss, _, d_student = _expected(s, teacher, reference, **arguments)
    assert value.dtype == jnp.float32
    assert_close(value, loss, 5e-6)
    assert_close(grad, d_student, 1e-5)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_the_little_that_a_list_leaves_out_is_not_lost(rng, tail):
    # The list is the student's own: all of the loss is the mass outside it, which one
    # less the listed mass would not hold in float32.
    s = jnp.concatenate([rounded(rng, (9, 3)), rounded(rng, (9, 8)) - 14], axis=-1)
    log_q = np.asarray(oracle.log_softmax(np.asarray(s)), np.float64)
    indices = jnp.broadcast_to(jnp.arange(3), (9, 3))
    log_p = log_q[:, :3]
    if tail == "bucket":
        rest = np.exp(log_q[:, 3:]).sum(-1, keepdims=True)
        log_p = log_p + np.log1p(-3 * rest) - np.log1p(-rest)  # four times the rest
    teacher = SparseTeacher(indices, jnp.asarray(log_p, jnp.float32), tail=tail)
    _, losses, _ = _expected(s, teacher)
    assert (losses > 0).all() and (losses < 1e-4).all()
    value = distillation_loss(s, teacher, reduction="none")
    np.testing.assert_allclose(value, losses, rtol=0.02 if tail == "bucket" else 1e-4)


@pytest.mark.parametrize("gap", [*rarely(12), 30])
def test_the_rest_beside_a_nearly_certain_column(rng, gap):
    # In float32 its probability is 1, and 1 - p is 0: a reverse KL would be infinite.
    t = rounded(rng, (9, 12)).at[:, 4].add(gap)
    teacher = top_k_teacher(t, 3)
    log_p = np.asarray(oracle.log_softmax(np.asarray(t)), np.float64)
    listed = np.take_along_axis(log_p, np.asarray(teacher.indices), -1)
    np.testing.assert_allclose(teacher.log_probs, listed, rtol=1e-5)
    exact = SparseTeacher(teacher.indices, listed, tail="bucket")
    s = rounded(rng, (9, 12))
    for name in ("forward", "reverse"):
        divergence, reference = ALL[name]
        value, grad = _evaluate(s, teacher, divergence=divergence)
        loss, _, d_student = _expected(s, exact, reference)
        assert_close(value, loss, 5e-6)
        assert_close(grad, d_student, 1e-5)


@over_tails
def test_beside_a_head(rng, tail):
    student = make_head(rng, (2, 5), 4, 701, "bfloat16", bias=True, softcap=3.0)
    teacher = _teacher(rng, (2, 5), 701, 6, tail, "bfloat16")
    value, grad = _evaluate(student, teacher, temperature=2.0, tile=3)
    logits, pull = exact_logits(student)
    loss, _, d_logits = _expected(logits, teacher, temperature=2.0)
    assert_close(value, loss, 5e-6)
    assert_source_gradient(student, grad, pull(d_logits), tail)


@over_tails
def test_every_column_listed_is_the_dense_loss(rng, tail):
    # In float32, 1 - Σp is rounding: it must not become an outcome.
    s, t = rounded(rng, (5, 700)), rounded(rng, (5, 700), scale=2.0)
    order = np.argsort(rng.random((5, 700)), -1)
    log_probs = jax.nn.log_softmax(t)
    shuffled = jnp.take_along_axis(log_probs, jnp.asarray(order), -1)
    teacher = SparseTeacher(jnp.asarray(order), shuffled, tail=tail)
    names = ("forward",) if tail == "drop" else ("forward", "reverse", "js")
    for name in names:
        divergence, reference = ALL[name]
        expected = oracle.distillation_loss(s, log_probs, divergence=reference)
        if tail == "renormalize" and name == "reverse":
            with pytest.raises(ValueError, match="`divergence`"):
                _evaluate(s, teacher, divergence=divergence)
            continue
        value, grad = _evaluate(s, teacher, divergence=divergence)
        assert_close(value, expected.loss, 5e-6)
        assert_close(grad, expected.student, 1e-5)


@over_tails
def test_one_column(rng, tail):
    # A single column of all the mass: a label, whose loss is a cross-entropy.
    s, labels = rounded(rng, (5, 11)), jnp.array([0, 10, 3, 3, 7])
    teacher = SparseTeacher(labels[:, None], jnp.zeros((5, 1)), tail=tail)
    value, grad = _evaluate(s, teacher)
    expected = oracle.distillation_loss(s, s, labels=labels, alpha=0.0)
    assert_close(value, expected.loss, 2e-6)
    assert_close(grad, expected.student, 1e-5)


def test_repeated_columns_add_up(rng):
    s = rounded(rng, (1, 7))
    split = SparseTeacher(jnp.array([[2, 5, 2]]), jnp.log(jnp.array([[0.1, 0.5, 0.3]])))
    whole = SparseTeacher(jnp.array([[2, 5]]), jnp.log(jnp.array([[0.4, 0.5]])))
    for tail in ("bucket", "uniform"):
        both = [
            _evaluate(s, SparseTeacher(x.indices, x.log_probs, tail=tail))
            for x in (split, whole)
        ]
        assert_close(both[0][0], both[1][0], 1e-6)
        assert_close(both[0][1], both[1][1], 1e-6)


def test_renormalize_takes_unnormalised_values(rng):
    s = rounded(rng, (4, 11))
    teacher = _teacher(rng, (4,), 11, 4, "renormalize")
    for shift in (5.0, -120.0, 95.0):
        moved = SparseTeacher(teacher.indices, teacher.log_probs + shift)
        value, grad = _evaluate(s, moved)
        loss, _, d_student = _expected(s, teacher)
        assert_close(value, loss, 3e-5)
        assert_close(grad, d_student, 3e-5)


@over_tails
def test_a_listed_column_without_mass(rng, tail):
    s = rounded(rng, (2, 7)).at[1, 4].set(-jnp.inf)
    log_probs = jnp.log(jnp.array([[0.5, 0.0, 0.3], [0.5, 0.0, 0.3]]))
    teacher = SparseTeacher(jnp.array([[1, 4, 2]] * 2), log_probs, tail=tail)
    value, grad = _evaluate(s, teacher)
    loss, _, d_student = _expected(s.at[1, 4].set(-1e4), teacher)
    assert_close(value, loss, 2e-6)
    assert_close(grad, d_student, 1e-5)


@over_tails
def test_bfloat16_mass_above_one(rng, tail):
    # Rounded logarithms of a list with nearly all the mass.
    t = rounded(rng, (64, 12), scale=3.0)
    teacher = top_k_teacher(t, 8, tail=tail)
    log_probs = teacher.log_probs.astype(jnp.bfloat16)
    mass = np.exp(np.asarray(log_probs, np.float64)).sum(-1)
    assert mass.max() > 1.0005
    s = rounded(rng, (64, 12))
    rounded_teacher = SparseTeacher(teacher.indices, log_probs, tail=tail)
    value, grad = _evaluate(s, rounded_teacher)
    loss, _, d_student = _expected(s, rounded_teacher)
    assert_close(value, loss, 5e-3 if tail == "bucket" else 5e-6)
    assert_close(grad, d_student, 1e-5)


@over_tails
def test_empty_rows_and_junk_that_where_drops(rng, tail):
    s, teacher = rounded(rng, (4, 11)), _teacher(rng, (4,), 11, 4, tail)
    where = jnp.array([True, False, True, False])
    indices = teacher.indices.at[1].set(-1)
    log_probs = teacher.log_probs.at[1].set(-jnp.inf).at[3].set(jnp.nan)
    spoilt = SparseTeacher(indices, log_probs, tail=tail)
    value, grad = _evaluate(s.at[3].set(jnp.nan), spoilt, where=where)
    loss, _, d_student = _expected(s, teacher, where=where)
    assert_close(value, loss, 5e-6)
    assert_close(grad, d_student, 1e-5)
    assert not grad[~where].any()


@pytest.mark.parametrize(
    "dtype", ["uint8", *rarely("int8", "int16", "uint16", "uint32")]
)
def test_any_integer_dtype(rng, dtype):
    # As on disk: narrow dtypes hold no -1, or not the size of the vocabulary.
    s = rounded(rng, (3, 70001))
    indices = jnp.array([[3, 90], [5, 7], [0, 101]])
    log_probs = jnp.log(jnp.array([[0.4, 0.3]] * 3))
    for tail in ("bucket", "renormalize"):
        teacher = SparseTeacher(indices.astype(dtype), log_probs, tail=tail)
        wide = SparseTeacher(indices, log_probs, tail=tail)
        expected = distillation_loss(s, wide, tile=3)
        assert_close(distillation_loss(s, teacher, tile=3), expected, 1e-7)


@pytest.mark.parametrize("shape", [(2, 3), *rarely(((),))])
def test_batch_shapes_and_per_token_losses(rng, shape):
    s, teacher = rounded(rng, (*shape, 11)), _teacher(rng, shape, 11, 4, "bucket")
    f = partial(distillation_loss, reduction="none")
    value, vjp = jax.vjp(jax.jit(lambda s: f(s, teacher)), s)
    g = rounded(rng, shape)
    _, losses, d_student = _expected(s, teacher)
    assert value.shape == shape
    assert_close(value, losses, 5e-6)
    expected = np.asarray(g)[..., None] * d_student * losses.size
    assert_close(vjp(g)[0], expected, 1e-5)


def test_temperature_divides_the_student_only(rng):
    s, t = rounded(rng, (5, 11)), rounded(rng, (5, 11))
    T = jnp.asarray(rng.uniform(0.5, 3, size=5), jnp.float32)
    teacher = top_k_teacher(t, 11, temperature=2.5)

    @jax.jit
    def grads(s, T):
        f = lambda s, T: distillation_loss(s, teacher, temperature=T)
        return jax.value_and_grad(f, (0, 1))(s, T)

    value, (d_student, d_T) = grads(s, T)
    both = dict(temperature=T, teacher_temperature=2.5)
    expected = oracle.distillation_loss(s, t, **both)
    assert_close(value, expected.loss, 5e-6)
    assert_close(d_student, expected.student, 1e-5)
    assert_gradient("temperature", d_T, expected, 1e-5)


def test_labels_weights_and_z_loss_beside_it(rng):
    s, t = rounded(rng, (5, 11)), rounded(rng, (5, 13))
    teacher = top_k_teacher(t[:, :9], 9)
    dense = jnp.full((5, 2), -jnp.inf)
    dense = jnp.concatenate([t[:, :9], dense], -1)
    arguments = dict(
        labels=jnp.array([0, -100, 3, 8, 2]),
        weights=jnp.array([1.0, 0.5, 0.0, 2.0, 1.0]),
        alpha=0.4,
        label_smoothing=0.1,
        z_loss=0.01,
        vocab_size=11,
    )
    s_wide = jnp.pad(s, ((0, 0), (0, 3)), constant_values=jnp.nan)
    value, grad = _evaluate(s_wide, teacher, tile=2, **arguments)
    expected = oracle.distillation_loss(s_wide, dense, **arguments)
    assert_close(value, expected.loss, 5e-6)
    assert_close(grad, expected.student, 1e-5)


# Refusals.


@pytest.mark.parametrize("name", INFINITE)
def test_renormalize_refuses_what_is_infinite_without_mass(rng, name):
    s, teacher = rounded(rng, (4, 11)), _teacher(rng, (4,), 11, 4, "renormalize")
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
    s, teacher = rounded(rng, (4, 11)), _teacher(rng, (4,), 11, 4, "renormalize")
    f = jax.jit(partial(distillation_loss, divergence=divergence))
    with pytest.raises(ValueError, match="`divergence`"):
        f(s, teacher)


@pytest.mark.parametrize("name", [name for name in ALL if name != "forward"])
def test_drop_is_of_forward_kl_only(rng, name):
    s, teacher = rounded(rng, (4, 11)), _teacher(rng, (4,), 11, 4, "drop")
    with pytest.raises(ValueError, match='`divergence`.*ForwardKL.*"drop"'):
        distillation_loss(s, teacher, divergence=ALL[name][0])


@pytest.mark.parametrize("name", ["js", *rarely(*(x for x in ANYWHERE if x != "js"))])
def test_renormalize_takes_what_is_finite_without_mass(rng, name):
    s, teacher = rounded(rng, (2, 5)), _teacher(rng, (2,), 5, 3, "renormalize")
    value = distillation_loss(s, teacher, divergence=ALL[name][0], tile=2)
    assert_close(value, _expected(s, teacher, ALL[name][1])[0], 5e-6)


@over_tails
@pytest.mark.parametrize("slots", [slice(0, 1), slice(None)], ids=["one", "all"])
@pytest.mark.parametrize("bad", [11, *rarely(-2, 100)])
def test_columns_that_do_not_exist(rng, bad, slots, tail):
    s, teacher = rounded(rng, (4, 13)), _teacher(rng, (4,), 11, 4, tail)
    indices = teacher.indices.at[2, slots].set(bad)
    wrong = SparseTeacher(indices, teacher.log_probs, tail=tail)
    with pytest.raises(ValueError, match=rf"`teacher.indices`.*\[0, 11\).*{bad}"):
        distillation_loss(s, wrong, vocab_size=11)
    f = jax.jit(partial(distillation_loss, vocab_size=11, reduction="none"))
    np.testing.assert_array_equal(np.isnan(f(s, wrong)), [False, False, True, False])


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


# Metrics, the reference, transformations, memory.


@pytest.mark.parametrize("tail", ["renormalize", "bucket", "uniform"])
def test_metrics(rng, tail):
    s, teacher = rounded(rng, (6, 11)), _teacher(rng, (6,), 11, 4, tail)
    where = jnp.array([True, True, False, True, True, True])
    f = partial(jaxkl.distillation_loss_with_metrics, divergence=jaxkl.JensenShannon())
    value, metrics = jax.jit(f)(s, teacher, temperature=2.0, where=where)
    shared = dict(where=where)
    loss = _expected(s, teacher, ALL["js"][1], temperature=2.0, **shared)[0]
    assert_close(value, loss, 5e-6)
    assert_close(metrics.divergence, loss / 4, 5e-6)
    assert_close(metrics.kl, _expected(s, teacher, **shared)[0], 5e-6)
    assert metrics.weight == 5 and metrics.cross_entropy is None
    dense = oracle.metrics(s, s, where=where)
    assert_close(metrics.student_entropy, dense.student_entropy, 5e-6)
    kept = np.flatnonzero(where)
    rows = [
        _outcomes(np.zeros(11), *(np.asarray(x)[i] for x in (
            teacher.indices, teacher.log_probs)), tail)[0]
        for i in kept
    ]  # fmt: skip
    if tail == "bucket":
        return
    rows = np.stack(rows)
    agree = rows.argmax(-1) == np.asarray(s)[kept].argmax(-1)
    assert_close(metrics.top1_agreement, agree.mean(), 1e-6)
    entropy = -(np.exp(rows) * np.maximum(rows, -1e4)).sum(-1).mean()
    assert_close(metrics.teacher_entropy, entropy, 5e-6)


@over_tails
def test_the_reference_agrees(rng, tail):
    s, teacher = rounded(rng, (5, 11)), _teacher(rng, (5,), 11, 4, tail)
    f = partial(jaxkl.reference.distillation_loss, temperature=2.0)
    value, grad = jax.jit(jax.value_and_grad(f))(s, teacher)
    loss, _, d_student = _expected(s, teacher, temperature=2.0)
    assert_close(value, loss, 5e-6)
    assert_close(grad, d_student, 1e-5)


def test_a_users_function_is_not_asked_of_what_neither_model_has(rng):
    # Slots that are empty or repeated, and a rest without columns.
    textbook = lambda log_p, log_q: jnp.exp(log_p) * (log_p - log_q)
    squared = lambda log_p, log_q: (
        jnp.exp(log_p) * (log_p - log_q) ** 2
    )  # and its slope

    def squared_reference(log_p, log_q):
        p, r = np.exp(log_p), log_p - log_q
        return p * r * r, p * (r * r + 2 * r), -2 * p * r

    some = _teacher(rng, (4,), 7, 5, "bucket")
    s, every = rounded(rng, (4, 7)), top_k_teacher(rounded(rng, (4, 7)), 7)
    references = {textbook: oracle.forward_kl, squared: squared_reference}
    for divergence, reference in references.items():
        for teacher in (some, every):
            value, grad = _evaluate(s, teacher, divergence=divergence)
            loss, _, d_student = _expected(s, teacher, reference)
            assert_close(value, loss, 5e-6)
            assert_close(grad, d_student, 1e-5)


@over_tails
def test_export_for_any_number_of_tokens(rng, tail):
    (b,) = jax.export.symbolic_shape("b")
    arrays = ((b, 11), "float32"), ((b, 4), "int32"), ((b, 4), "float32")
    shapes = [jax.ShapeDtypeStruct(*x) for x in arrays]
    run = lambda s, *lists: distillation_loss(s, SparseTeacher(*lists, tail=tail))
    exported = jax.export.export(jax.jit(jax.value_and_grad(run)))(*shapes)
    s, teacher = rounded(rng, (3, 11)), _teacher(rng, (3,), 11, 4, tail)
    indices = teacher.indices.astype(jnp.int32)
    value, grad = exported.call(s, indices, teacher.log_probs)
    loss, _, d_student = _expected(s, teacher)
    assert_close(value, loss, 5e-6)
    assert_close(grad, d_student, 1e-5)


@pytest.mark.parametrize("tail", ["bucket", *rarely("renormalize")])
def test_transformations(rng, tail):
    s, teacher = rounded(rng, (3, 4, 11)), _teacher(rng, (3, 4), 11, 4, tail)
    f = partial(distillation_loss, tile=2)
    _, _, expected = _expected(s, teacher)
    assert_close(jax.jit(jax.vmap(jax.grad(f)))(s, teacher), 3 * expected, 1e-5)

    @jax.jit
    @jax.grad
    def total(s):
        step = lambda total, x: (total + jax.checkpoint(f)(*x), None)
        return jax.lax.scan(step, jnp.float32(0), (s, teacher))[0]

    assert_close(total(s), 3 * expected, 1e-5)
    one = jax.tree.map(lambda x: x[0, :2, :], teacher)
    small = s[0, :2]
    of = lambda loss: jax.jit(jax.hessian(lambda s: loss(s, one) ** 2))(small)
    assert_close(of(f), of(jaxkl.reference.distillation_loss), 1e-5)


def test_shard_map_over_tokens(rng):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    student, teacher = (
        make_head(rng, (16,), 4, 11),
        _teacher(rng, (16,), 11, 4, "bucket"),
    )
    head = jaxkl.LinearHead(P("data"), P())

    @jax.jit
    @jax.value_and_grad
    @partial(jax.shard_map, mesh=mesh, in_specs=((head, P("data")),), out_specs=P())
    def f(sources):
        student, log_probs = sources
        start = 2 * jax.lax.axis_index("data")
        indices = jax.lax.dynamic_slice_in_dim(teacher.indices, start, 2)
        local = SparseTeacher(indices, log_probs, tail="bucket")
        value = distillation_loss(student, local, reduction="sum", tile=1)
        return jax.lax.psum(value, "data") / 16

    value, (grad, d_log_probs) = f((student, teacher.log_probs))
    logits, pull = exact_logits(student)
    loss, _, d_logits = _expected(logits, teacher)
    assert_close(value, loss, 5e-6)
    assert_source_gradient(student, grad, pull(d_logits), "")
    assert not d_log_probs.any()  # constants, as documented


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


@pytest.mark.parametrize("temperature", [1.0, 2.5, "token"])
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
        (np.zeros((2, 7), int), 2, {}, TypeError, "`logits`"),
        (np.zeros(()), 1, {}, ValueError, "`logits`"),
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
    """Standard deviations by which χ² is above its mean."""
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
    # Two rows of one distribution agree as often as chance has it.
    p = np.exp(oracle.log_softmax(t[0, 0])).astype(float)
    agree, chance = (indices[0, 1] == indices[1, 0]).mean(), np.sum(p * p)
    assert abs(agree - chance) < 5 * np.sqrt(chance * (1 - chance) / n)
    # So do neighbours in a row, and other keys draw other columns.
    assert abs((indices[0, 1, 1:] == indices[0, 1, :-1]).mean() - chance) < 0.02
    other = draw(jax.random.key(3), t, temperature=T).indices
    assert abs((indices[0, 1] == np.asarray(other[0, 1])).mean() - chance) < 0.02


@pytest.mark.slow
def test_expected_gradient_is_the_dense_one(rng):
    # The column that is rare matters: a top-k list never has it.
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


def test_no_step_at_a_column_without_mass(rng):
    # A parallel cumulative sum of more than 256 rounds one into some of them. Levels at
    # every step find it, where draws would take 10⁸.
    weights = rng.random((200, 358)) * (rng.random((200, 358)) < 0.5)
    weights = jnp.asarray(weights, jnp.float32)
    total = jnp.cumsum(weights, axis=-1)
    drawn = _draw(weights, total / total[:, -1:])
    assert jnp.take_along_axis(weights, drawn, axis=-1).all()


def test_rare_columns_are_not_lost_to_float32(rng):
    # Half of the columns have 2e-8 each: below the spacing of float32 uniforms, and
    # of a sum near 1.
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
    with pytest.raises(TypeError, match="`logits`"):
        sampled_teacher(key, np.zeros(7, int), 3)
    with pytest.raises(ValueError, match="`temperature`"):
        sampled_teacher(key, np.zeros(7), 3, temperature=-1.0)
