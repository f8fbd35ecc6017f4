"""Values and gradients keep their digits in rows where a textbook formula loses them.

The result is a small difference of large numbers where one outcome is nearly certain,
the models are close, the temperature is high, or a mixture has a small weight.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl

from . import oracle
from .cases import (
    assert_matches,
    CATALOGUE,
    evaluate,
    FORWARD,
    over,
    rarely,
    REVERSE,
)
from .helpers import assert_close


DIGITS = {"float32": 2e-6, "float64": 4e-14}

ROWS = {
    # student, teacher
    "confident": ([20, 1, 0], [20, 0, 0.5]),
    "confident student": ([14, 0, 0.3], [-60, 0, 0.1]),
    "confident, tied teacher": ([20, 1, 0], [20, 20, 0.5]),
    "apart": ([0, -60, 3], [0, 2, 1]),
}
SMALL = {
    f"{name} {weight}": (mine(weight), theirs(weight))
    for weight in (1e-3, 1e-5, 1e-6, 1e-8)
    for name, mine, theirs in (
        ("skew_forward", jaxkl.SkewForwardKL, oracle.skew_forward_kl),
        ("skew_reverse", jaxkl.SkewReverseKL, oracle.skew_reverse_kl),
        ("js", jaxkl.JensenShannon, oracle.jensen_shannon),
        (
            "js_normalized",
            lambda beta: jaxkl.JensenShannon(beta, normalized=True),
            lambda beta: oracle.jensen_shannon(beta, normalized=True),
        ),
    )
}


def each(divergences, *quick):
    """Parametrises a test over divergences; those that are not quick are slow."""
    marks = lambda name: () if name in quick else pytest.mark.slow
    cases = [
        pytest.param(pair, id=name, marks=marks(name))
        for name, pair in divergences.items()
    ]
    return pytest.mark.parametrize("divergence", cases)


in_dtypes = pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)]
)


def assert_digits(divergence, dtype, rows=ROWS, floats=("student",), **arguments):
    """Compares each row on its own, as the gradients of others may be much larger."""
    mine, theirs = divergence
    with jax.enable_x64(dtype == "float64"):
        s, t = (jnp.asarray(x, dtype) for x in zip(*rows.values(), strict=True))
        arguments = {k: jnp.asarray(x, dtype) for k, x in arguments.items()}
        arguments |= dict(reduction="none", t_squared=False)
        value, grads = evaluate(s, t, divergence=mine, **arguments)
        expected = oracle.distillation_loss(s, t, divergence=theirs, **arguments)
        tol = DIGITS[dtype]
        for i, name in enumerate(rows):
            assert_close(value[i], expected.loss[i], tol, f"value: {name}")
            for argument in floats:
                grad, want = grads[argument], getattr(expected, argument)
                assert_close(grad[i], want[i], tol, f"{argument}: {name}")


@in_dtypes
@each(CATALOGUE, "reverse", "js", "total_variation")
def test_confident_rows(divergence, dtype):
    assert_digits(divergence, dtype)


@in_dtypes
@each(SMALL, "skew_forward 1e-08", "skew_reverse 1e-05", "js_normalized 1e-08")
def test_mixtures_of_a_small_weight(divergence, dtype):
    assert_digits(divergence, dtype)


@each(CATALOGUE, "js")
def test_gradients_of_a_confident_teacher(divergence):
    rows = {"confident": ROWS["confident"], "swapped": ROWS["confident"][::-1]}
    assert_digits(divergence, "float32", rows, ("student", "teacher"))


@pytest.mark.parametrize("temperature", [1e4, 1e6])
@over("forward", slow=["reverse", "js", "alpha_half", "total_variation"])
def test_high_temperatures(rng, divergence, reference, temperature):
    s, t = 3 * rng.normal(size=(2, 4, 9))
    rows = {str(i): pair for i, pair in enumerate(zip(s, t, strict=True))}
    floats = "student", "teacher", "temperature"
    pair = divergence, reference
    assert_digits(
        pair, "float32", rows, floats, temperature=np.full(len(rows), temperature)
    )


@pytest.mark.slow
@over("reverse", slow=["forward", "js"])
def test_a_temperature_of_each_model(rng, divergence, reference):
    s, t = 3 * rng.normal(size=(2, 4, 9))
    assert_matches(
        jnp.float32(s),
        jnp.float32(t),
        (divergence, reference),
        temperature=jnp.float32(1.5),
        teacher_temperature=jnp.float32(0.7),
        t_squared=False,
        value_tol=2e-6,
        tol=1e-5,
    )


def test_cross_entropy_of_a_nearly_certain_label():
    s = jnp.array([[0, -14.5, -15.2, -30], [-30, -15.2, -14.5, 0]])
    labels = jnp.array([0, 0])
    options = dict(labels=labels, alpha=0.0, reduction="none")
    value, grads = evaluate(s, jnp.zeros_like(s), **options)
    expected = oracle.distillation_loss(s, jnp.zeros_like(s), **options)
    assert_close(expected.loss[0], 7.548e-7, 1e-3)
    for i in range(2):
        assert_close(value[i], expected.loss[i], 1e-6)
        assert_close(grads["student"][i], expected.student[i], 1e-6)


def test_cross_entropy_of_an_infinite_logit_is_nan():
    s, labels = jnp.array([[np.inf, 0, 1]]), jnp.array([0])
    for loss in (jaxkl.distillation_loss, jaxkl.reference.distillation_loss):
        value, grads = evaluate(
            s, jnp.zeros_like(s), loss=loss, labels=labels, alpha=0.0
        )
        assert np.isnan(value) and np.isnan(grads["student"][0, 0])


@pytest.mark.parametrize(
    "divergence", [REVERSE, *rarely((FORWARD,))], ids=["reverse", "forward"]
)
def test_a_list_that_has_all_columns(divergence):
    # With all columns listed the tails are empty, and the loss is the dense one.
    mine, theirs = divergence
    s, t = (jnp.asarray([x], jnp.float32) for x in ROWS["confident"])
    for tail in ("bucket", "uniform"):
        teacher = jaxkl.top_k_teacher(t, 3, tail=tail)
        loss = lambda s, teacher=teacher: jaxkl.distillation_loss(
            s, teacher, divergence=mine
        )
        value, grad = jax.jit(jax.value_and_grad(loss))(s)
        expected = oracle.distillation_loss(s, t, divergence=theirs)
        assert_close(value, expected.loss, 1e-5, tail)
        assert_close(grad, expected.student, 1e-5, tail)


@pytest.mark.parametrize("outside", [True, *rarely(False)])
def test_a_list_beside_a_confident_student(outside):
    # The nearly certain column may be on the list or not.
    s = jnp.array([[14, 0, 0.3, 0.1, -0.2]])
    s = jnp.roll(s, -1) if outside else s
    t = jnp.array([[0.0, 1.0, 2.0, -6, -7]])
    teacher = jaxkl.top_k_teacher(t, 3, tail="bucket")
    loss = lambda s: jaxkl.distillation_loss(s, teacher, divergence=jaxkl.ReverseKL())
    value, grad = jax.jit(jax.value_and_grad(loss))(s)
    # The columns outside the list are one outcome: this is a model of four. Its last
    # logit is the log-sum-exp of theirs.
    merge = lambda x: np.append(x[:3], np.logaddexp(x[3], x[4]))
    rows = [merge(np.asarray(x[0], np.longdouble))[None] for x in (s, t)]
    expected = oracle.distillation_loss(*rows, divergence=oracle.reverse_kl)
    share = np.exp(np.asarray(s[0, 3:], np.longdouble))
    rest = expected.student[0, 3] * share / share.sum()
    # A list has only the digits that float32 leaves to 1 - Σ p, which is 6e-4 here.
    assert_close(value, expected.loss, 1e-4)
    assert_close(grad[0], np.append(expected.student[0, :3], rest), 1e-4)


@over("reverse", slow=["forward"])
def test_a_vocabulary_over_devices(divergence, reference):
    mesh = jax.make_mesh((4,), ("model",))
    s, t = (jnp.asarray([x + [-1.0]]) for x in ROWS["confident student"])
    labels = jnp.array([0])

    def loss(s, t, labels, divergence):
        options = dict(labels=labels, alpha=0.5, divergence=divergence)
        where = dict(mesh=mesh, token_axes=(), vocab_axis="model")
        return jaxkl.distillation_loss(s, t, **options, **where)

    step = jax.jit(jax.value_and_grad(loss), static_argnums=3)
    value, grad = step(s, t, labels, divergence)
    options = dict(labels=labels, alpha=0.5, divergence=reference)
    expected = oracle.distillation_loss(s, t, **options)
    assert_close(value, expected.loss, 1e-6)
    assert_close(grad, expected.student, 1e-6)


def test_logits_far_apart():
    s, t = jnp.array([[1e30, -1e30]]), jnp.zeros((1, 2))
    value, grads = evaluate(s, t)
    assert_close(value, 1e30, 1e-6)
    assert_close(grads["student"], [[0.5, -0.5]], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1e-40, *rarely(-1e-40, 1e-25)])
def test_alpha_that_hardly_differs_from_its_limit(rng, alpha):
    s, t = jnp.float32(rng.normal(size=(2, 3, 7)))
    mine = jaxkl.AlphaDivergence(alpha), oracle.reverse_kl
    assert_matches(s, t, mine, reduction="none", cotangent=jnp.float32([1.5, 1, -2]))
