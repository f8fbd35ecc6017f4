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
    ALL,
    assert_matches,
    CATALOGUE,
    evaluate,
    FORWARD,
    over,
    rarely,
    REVERSE,
)
from .helpers import assert_close
from .sources import rounded


DIGITS = {"float32": 2e-6, "float64": 4e-14}

ROWS = {
    # student, teacher
    "confident": ([20, 1, 0], [20, 0, 0.5]),
    "confident student": ([14, 0, 0.3], [-60, 0, 0.1]),
    "confident, tied teacher": ([20, 1, 0], [20, 20, 0.5]),
    "apart": ([0, -60, 3], [0, 2, 1]),
    "shifted": ([64, 65.5, 63.75], [-32, -31.5, -33.25]),
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


@pytest.mark.parametrize("dtype", ["float32", *rarely("float64")])
@each(
    CATALOGUE | SMALL, "reverse", "js", "total_variation",
    "skew_forward 1e-08", "skew_reverse 1e-05", "js_normalized 1e-08",
)  # fmt: skip
def test_confident_rows(divergence, dtype):
    assert_digits(divergence, dtype)


@each(CATALOGUE, "js")
def test_gradients_of_a_confident_teacher(divergence):
    rows = {"confident": ROWS["confident"], "swapped": ROWS["confident"][::-1]}
    assert_digits(divergence, "float32", rows, ("student", "teacher"))


@pytest.mark.parametrize("temperature", [1e4, 1e6])
@each(CATALOGUE, "forward")
def test_high_temperatures(rng, divergence, temperature):
    s, t = 3 * rng.normal(size=(2, 4, 9))
    rows = {str(i): pair for i, pair in enumerate(zip(s, t, strict=True))}
    floats = "student", "teacher", "temperature"
    temperature = np.full(len(rows), temperature)
    assert_digits(divergence, "float32", rows, floats, temperature=temperature)


@over("reverse", "js_normalized", slow=("forward", "symmetric", "skew_reverse"))
@pytest.mark.parametrize("tile", [8, *rarely(None)])
def test_confident_rows_have_gradients_too(rng, divergence, reference, tile):
    # A normaliser near 1 has no digits left for unlikely outcomes. Their mass is all of
    # the likely one's gradient, and must be right in every row.
    t = rounded(rng, (65, 7), scale=12.0)
    s = t + rounded(rng, (65, 7), scale=0.3)
    arguments = dict(reduction="none")
    value, grads = evaluate(s, t, divergence=divergence, tile=tile, **arguments)
    expected = oracle.distillation_loss(s, t, divergence=reference, **arguments)
    np.testing.assert_allclose(value, np.float64(expected.loss), rtol=1e-3)
    for name in ("student", "teacher"):
        want = np.asarray(getattr(expected, name), np.float64)
        error = np.abs(np.asarray(grads[name], np.float64) - want).max(axis=-1)
        np.testing.assert_array_less(error, 1e-3 * np.abs(want).max(axis=-1))


# A student close to its teacher.


@over("forward", slow=[x for x in CATALOGUE if x != "forward"])
def test_relatively_accurate_near_the_teacher(rng, divergence, reference):
    tokens, vocab = 2, 32000
    t = np.float32(rng.normal(size=(2, tokens, vocab)))
    noise = np.array([1e-4, 3e-3])[:, None, None] * rng.normal(size=t.shape)
    temperature = np.float32([1, 2])  # the second halves the noise
    s = t + noise * temperature[:, None]
    s, t = jnp.asarray(s, jnp.float32), jnp.asarray(t)
    temperatures = jnp.asarray(temperature)[None].repeat(2, 0)
    arguments = dict(temperature=temperatures, reduction="none")
    value, grads = evaluate(s, t, divergence=divergence, **arguments)
    expected = oracle.distillation_loss(s, t, divergence=reference, **arguments)
    # The true KL is about half the variance of the noise.
    kl = oracle.distillation_loss(s, t, **arguments).loss / temperature**2
    kl = kl.mean(-1).astype(np.float64)
    np.testing.assert_allclose(kl, [5e-9, 4.5e-6], rtol=0.1)
    assert (value >= 0).all()
    for i, (tol, grad_tol) in enumerate([(5e-3, 2e-2), (1e-4, 1e-3)]):
        want = expected.loss[i].astype(np.float64)
        np.testing.assert_allclose(value[i], want, rtol=tol)
        if divergence == jaxkl.TotalVariation():
            continue  # its slope is the sign of a difference below float32's rounding
        for j in range(tokens):
            assert_close(grads["student"][i, j], expected.student[i, j], grad_tol)
            assert_close(grads["teacher"][i, j], expected.teacher[i, j], grad_tol)


@over(
    "forward", "reverse", "js_normalized",
    slow=[x for x in ALL if x not in ("forward", "reverse", "js_normalized")],
)  # fmt: skip
def test_equal_models_have_exactly_no_loss_and_no_gradient(rng, divergence, reference):
    s = rounded(rng, (5, 32000), scale=3.0)
    temperature = jnp.asarray(rng.uniform(0.5, 3, size=5), jnp.float32)
    options = dict(temperature=temperature, reduction="none")
    value, grads = evaluate(s, s, divergence=divergence, **options)
    assert not value.any() and not any(grad.any() for grad in grads.values())


@pytest.mark.slow
@over("js_normalized", slow=[x for x in ALL if x != "js_normalized"])
def test_never_negative(rng, divergence, reference):
    t = rounded(rng, (64, 50), scale=2.0)
    noise = 10 ** rng.uniform(-7, 0, size=(64, 1))
    s = t + jnp.asarray(noise * rng.normal(size=(64, 50)), jnp.float32)
    value, _ = evaluate(s, t, divergence=divergence, reduction="none")
    assert (value >= 0).all() and value.any()


# Labels, lists and devices.


def test_cross_entropy_of_an_infinite_logit_is_nan():
    s, labels = jnp.array([[np.inf, 0, 1]]), jnp.array([0])
    for loss in (jaxkl.distillation_loss, jaxkl.reference.distillation_loss):
        options = dict(loss=loss, labels=labels, alpha=0.0)
        value, grads = evaluate(s, jnp.zeros_like(s), **options)
        assert np.isnan(value) and np.isnan(grads["student"][0, 0])


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
@pytest.mark.parametrize(
    "divergence", [REVERSE, *rarely((FORWARD,))], ids=["reverse", "forward"]
)
def test_a_list_that_has_all_columns(divergence, tail):
    # The tail is empty, and the loss is the dense one.
    s, t = (jnp.asarray([x], jnp.float32) for x in ROWS["confident"])
    teacher = jaxkl.top_k_teacher(t, 3, tail=tail)
    value, grads = evaluate(s, teacher, divergence=divergence[0])
    expected = oracle.distillation_loss(s, t, divergence=divergence[1])
    assert_close(value, expected.loss, 1e-5)
    assert_close(grads["student"], expected.student, 1e-5)


@pytest.mark.parametrize("outside", [True, *rarely(False)])
def test_a_list_beside_a_confident_student(outside):
    # The nearly certain column may be on the list or not.
    s = jnp.array([[14, 0, 0.3, 0.1, -0.2]])
    s = jnp.roll(s, -1) if outside else s
    t = jnp.array([[0.0, 1.0, 2.0, -6, -7]])
    teacher = jaxkl.top_k_teacher(t, 3, tail="bucket")
    value, grads = evaluate(s, teacher, divergence=jaxkl.ReverseKL())
    # The columns outside the list are one outcome: this is a model of four. Its last
    # logit is the log-sum-exp of theirs.
    merge = lambda x: np.append(x[:3], np.logaddexp(x[3], x[4]))
    rows = [merge(np.asarray(x[0], np.longdouble))[None] for x in (s, t)]
    expected = oracle.distillation_loss(*rows, divergence=oracle.reverse_kl)
    share = np.exp(np.asarray(s[0, 3:], np.longdouble))
    rest = expected.student[0, 3] * share / share.sum()
    # A list has only the digits that float32 leaves to 1 - Σ p, which is 6e-4 here.
    assert_close(value, expected.loss, 1e-4)
    assert_close(grads["student"][0], np.append(expected.student[0, :3], rest), 1e-4)


@over("reverse", slow=["forward"])
def test_a_vocabulary_over_devices(divergence, reference):
    mesh = jax.make_mesh((4,), ("model",))
    s, t = (jnp.asarray([x + [-1.0]]) for x in ROWS["confident student"])
    options = dict(labels=jnp.array([0]), alpha=0.5)
    over = dict(mesh=mesh, token_axes=(), vocab_axis="model")
    value, grads = evaluate(s, t, divergence=divergence, **options, **over)
    expected = oracle.distillation_loss(s, t, divergence=reference, **options)
    assert_close(value, expected.loss, 1e-6)
    assert_close(grads["student"], expected.student, 1e-6)


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


@pytest.mark.parametrize("lacked", [-80, *rarely(-20, -40)])
@over("forward", "reverse", slow=["js", "skew_forward", "skew_reverse"])
def test_a_column_that_one_model_nearly_lacks(rng, divergence, reference, lacked):
    """Its term is the probability of the other: no product with the ratio cancels."""
    near = rng.normal(size=(200, 5)).astype(np.float32)
    other = near + np.float32(0.05) * rng.normal(size=near.shape).astype(np.float32)
    other[:, 0] = lacked
    for s, t in ((near, other), (other, near)):
        loss = lambda s, t: jaxkl.distillation_loss(
            s, t, divergence=divergence, reduction="none"
        )
        expected = oracle.distillation_loss(
            s, t, divergence=reference, reduction="none"
        )
        found = jax.jit(loss)(s, t)
        np.testing.assert_allclose(found, expected.loss, rtol=1e-6)
