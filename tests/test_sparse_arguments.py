"""Empty lists, and what a list of columns cannot give."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, PartitionSpec as P

import jaxkl
import jaxkl.reference
from jaxkl import SparseTeacher

from .cases import rarely, rounded, squared_error


LOSSES = [jaxkl.distillation_loss, *rarely(jaxkl.reference.distillation_loss)]
FINITE_WITHOUT_MASS = [
    jaxkl.ForwardKL(),
    *rarely(jaxkl.JensenShannon(), jaxkl.TotalVariation(), squared_error),
]


def a_list_and_an_empty_one(rng, tail):
    log_probs = rng.uniform(-3, -1, (2, 2)).astype(np.float32)
    return SparseTeacher(np.array([[0, 3], [-1, -1]]), log_probs, tail=tail)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("divergence", FINITE_WITHOUT_MASS)
@pytest.mark.parametrize("tail", ["renormalize", "conditional"])
def test_an_empty_list_has_no_mass_to_renormalize(rng, loss, divergence, tail):
    s, teacher = rounded(rng, (2, 5)), a_list_and_an_empty_one(rng, tail)
    f = partial(loss, teacher=teacher, divergence=divergence, reduction="none")

    @jax.jit
    def run(s):
        each, pull = jax.vjp(f, s)
        kept = f(s, where=jnp.array([True, False]))
        return each, kept, *pull(jnp.ones(2))

    each, (first, dropped), grad = run(s)
    np.testing.assert_array_equal(np.isnan(each), [False, True])
    assert first > 0 and dropped == 0
    # Under "conditional", columns outside the list have no gradient.
    is_nan = np.isnan(grad)
    assert not is_nan[0].any() and is_nan[1].any()
    assert is_nan[1].all() or tail == "conditional"
    if divergence == jaxkl.ForwardKL() and tail == "renormalize":
        assert np.isnan(loss(s, teacher))


@pytest.mark.parametrize("tail", ["uniform", *rarely("drop", "bucket")])
def test_an_empty_list_has_a_meaning_under_other_tails(rng, tail):
    s, teacher = rounded(rng, (2, 5)), a_list_and_an_empty_one(rng, tail)
    loss = jax.jit(lambda *x: jaxkl.distillation_loss(*x, reduction="none"))
    _, empty = loss(s, teacher)
    log_q = jax.nn.log_softmax(s[1])
    expected = -np.log(5) - log_q.mean() if tail == "uniform" else 0
    np.testing.assert_allclose(empty, expected, rtol=1e-5)


ROWS = np.float32([[0, 2, 1], [np.inf, 0, 1], [0, np.nan, 1], [-np.inf] * 3])


@pytest.mark.parametrize("jit", [True, *rarely(False)])
def test_a_row_without_a_softmax(rng, jit):
    s, key = rounded(rng, (4, 3)), jax.random.key(0)

    def f(s, rows):
        lists = jaxkl.top_k_teacher(rows, 2), jaxkl.sampled_teacher(key, rows, 2)
        loss = lambda t: jaxkl.distillation_loss(s, t, reduction="none")
        return lists, [loss(t) for t in (rows, *lists)]

    lists, losses = (jax.jit(f) if jit else f)(s, ROWS)
    for teacher in lists:
        bad = np.isnan(teacher.log_probs)
        np.testing.assert_array_equal(bad, [[False] * 2] + [[True] * 2] * 3)
        assert np.isin(teacher.indices, range(3)).all()
    for loss in losses:
        np.testing.assert_array_equal(np.isnan(loss), [False, True, True, True])


# A divergence that holds an entry for each column.


def weighted(log_p, log_q):
    return jnp.arange(5.0) * jnp.exp(log_p) * (log_p - log_q)


NOT_ELEMENTWISE = "`divergence` must be elementwise.*SparseTeacher"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tail", ["renormalize", "bucket", "uniform"])
@pytest.mark.parametrize("k", [2, *rarely(5)])
def test_entries_of_columns_are_none_of_lists(rng, loss, tail, k):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    with jax.numpy_rank_promotion("allow"):
        assert np.isfinite(loss(s, t, divergence=weighted))  # logits have every column
        teacher = jaxkl.top_k_teacher(t, k, tail=tail)
        with pytest.raises(ValueError, match=NOT_ELEMENTWISE):
            loss(s, teacher, divergence=weighted)


def test_entries_of_columns_are_none_of_slices(rng):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    mesh = Mesh(jax.devices()[:1], ("model",))
    loss = partial(jaxkl.distillation_loss, divergence=weighted, axis_name="model")
    with pytest.raises(ValueError, match=NOT_ELEMENTWISE):
        jax.shard_map(loss, mesh=mesh, in_specs=P(None, "model"), out_specs=P())(s, t)
    s, t = rounded(rng, (4, 8)), rounded(rng, (4, 8))
    holds = lambda log_p, log_q: jnp.ones(8) * (log_p - log_q)
    axes = dict(mesh=jax.make_mesh((2,), ("model",)), token_axes=())
    loss = partial(jaxkl.distillation_loss, s, t, divergence=holds, **axes)
    with jax.numpy_rank_promotion("allow"):
        with pytest.raises(ValueError, match=NOT_ELEMENTWISE):
            loss(vocab_axis="model")
        assert np.isfinite(loss())  # Here each device has every column.


def head(kernel, t):
    student = jaxkl.LinearHead(jnp.ones((4, 2)), kernel)
    return jaxkl.distillation_loss(student, t)


@pytest.mark.parametrize(
    "f, rows, name",
    [
        (jaxkl.distillation_loss, 4, "student"),
        (jaxkl.distillation_loss_with_metrics, 4, "student"),
        (jaxkl.reference.distillation_loss, 4, "student"),
        (jaxkl.losses.softmax_kl_divergence, 4, "student_logits"),
        (head, 2, "student"),
        (lambda _, t: jaxkl.distillation_loss(jnp.ones((4, 3)), t), 4, "teacher"),
    ],
)
def test_a_symbolic_vocabulary(f, rows, name):
    (vocab,) = export.symbolic_shape("vocab")
    args = [jax.ShapeDtypeStruct((n, vocab), jnp.float32) for n in (rows, 4)]
    with pytest.raises(ValueError, match=f"`{name}` must have .* known .*got vocab"):
        export.export(jax.jit(f))(*args)
