"""Zeros and infinities in the logits, and terms that have no part in the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl

from . import oracle
from .cases import (
    ALL,
    assert_matches,
    evaluate,
    FORWARD,
    over,
    rarely,
    rounded,
)
from .helpers import assert_close, TOLERANCE


QUICK = "forward", "reverse", "js_normalized"
inf = np.inf
SINGULAR = {
    # student, teacher
    "-inf in the teacher": ([0.5, 1, -1, 0], [-inf, 0.5, 1, -1]),
    "-inf in the student": ([-inf, 0.5, 1, -1], [0.5, 1, -1, 0]),
    "-inf in both": ([-inf, 0.5, 1, -1], [-inf, 1, -1, 0]),
    "-inf in both and in the teacher": ([-inf, 0.5, 1, -1], [-inf, -inf, -1, 0]),
    "-inf in both and in the student": ([-inf, -inf, 1, -1], [-inf, 2, -1, 0]),
    "-inf in both and in each": ([-inf, -inf, 1, -1], [-inf, 2, -inf, 0]),
    "one-hot teacher": ([0.5, 1, -1, 0], [-inf, 0, -inf, -inf]),
    "one-hot student": ([-inf, 0, -inf, -inf], [0.5, 1, -1, 0]),
    "one-hot both": ([-inf, 3, -inf, -inf], [-inf, 0, -inf, -inf]),
    "one-hot apart": ([-inf, 0, -inf, -inf], [0, -inf, -inf, -inf]),
    "huge, apart": ([1e4, -1e4, 0, 5], [-1e4, 1e4, 3, 0]),
    "huge student": ([1e4, -1e4, 0, 5], [0.5, 1, -1, 0]),
    "huge teacher": ([0.5, 1, -1, 0], [1e4, -1e4, 0, 5]),
    "huge, equal": ([1e4, -1e4, 0, 5], [1e4, -1e4, 0, 5]),
    "huge and -inf": ([1e4, -1e4, -inf, 5], [-1e4, 1e4, -inf, 5]),
    "probabilities that underflow": ([0, -300, 1, 0], [-300, 0, 0, 1]),
    "nothing singular": ([0.5, 1, -1, 0], [0, 1, 2, 3]),
}
# KL(p ‖ q) is infinite in the first rows, and KL(q ‖ p) in the second.
NO_STUDENT = {
    name for name, (s, t) in SINGULAR.items() if np.any(np.isinf(s) & ~np.isinf(t))
}
NO_TEACHER = {
    name for name, (s, t) in SINGULAR.items() if np.any(np.isinf(t) & ~np.isinf(s))
}


def _rows(dtype="float32"):
    rows = np.array(list(SINGULAR.values()))
    return jnp.asarray(rows[:, 0], dtype), jnp.asarray(rows[:, 1], dtype)


@pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16", "float16")])
@over(*QUICK, slow=[x for x in ALL if x not in QUICK])
def test_finite_wherever_the_mathematics_is(divergence, reference, dtype):
    s, t = _rows(dtype)
    arguments = dict(
        reduction="none",
        temperature=jnp.full(len(SINGULAR), 2, jnp.float32),
        teacher_temperature=jnp.full(len(SINGULAR), 1.5, jnp.float32),
    )
    value, grads = evaluate(s, t, divergence=divergence, **arguments)
    expected = oracle.distillation_loss(s, t, divergence=reference, **arguments)
    with np.errstate(over="ignore"):
        loss = expected.loss.astype(np.float32)  # where 1e86 is inf
    for i, name in enumerate(SINGULAR):
        assert_close(value[i], loss[i], 1e-6, f"value: {name}", floor=oracle.ROUNDING)
        overflows = np.isfinite(expected.loss[i]) and np.isinf(loss[i])
        for argument, grad in grads.items():
            want = getattr(expected, argument)[i]
            if np.isfinite(want).all() and not overflows:
                # A loss of 1e4 has terms of that size, and their rounding.
                finite = np.nan_to_num(expected.loss[i], posinf=0)
                scale = np.max(np.abs(want)) + 1e-2 * finite
                np.testing.assert_allclose(
                    np.asarray(grad[i], np.float64),
                    want.astype(np.float64),
                    rtol=0,
                    atol=TOLERANCE[str(grad.dtype)][1] * float(scale) + oracle.ROUNDING,
                    err_msg=f"{argument}: {name}",
                )


def test_the_singular_rows_have_the_gradients_to_test():
    # Without finite gradients the test above would compare nothing.
    for divergence, argument, without in (
        (oracle.forward_kl, "student", set()),
        (oracle.forward_kl, "teacher", NO_STUDENT),
        (oracle.reverse_kl, "student", NO_TEACHER),
        (oracle.reverse_kl, "teacher", set()),
        (oracle.jensen_shannon(0.5), "student", set()),
        (oracle.jensen_shannon(0.5), "teacher", set()),
    ):
        options = dict(divergence=divergence, reduction="none")
        grads = getattr(oracle.distillation_loss(*_rows(), **options), argument)
        finite = np.isfinite(grads).all(-1)
        found = {name for name, x in zip(SINGULAR, finite, strict=True) if x}
        assert found == SINGULAR.keys() - without


@pytest.mark.parametrize(
    "divergence", [FORWARD[0], jaxkl.AlphaDivergence(1)], ids=["forward", "alpha_one"]
)
def test_no_student_support_is_inf_with_the_formulas_gradient(divergence):
    s, t = jnp.array([[-inf, 0.0, 0.0]]), jnp.array([[0.0, 0.0, -inf]])
    value, grads = evaluate(s, t, divergence=divergence)
    assert value == inf
    assert_close(grads["student"], [[-0.5, 0.0, 0.5]], 1e-6)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "alpha, labels", [(0.0, [0, 1, 3]), *rarely((1.0, [2, 1, 3]), (0.5, [-100, 1, 3]))]
)
def test_terms_with_no_part_in_the_loss_may_be_infinite(rng, alpha, labels, traced):
    # The gradient to a weight is the loss of its token, which must not be 0 · inf.
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    s = s.at[:, 2].set(-inf)
    t = t if alpha == 0 else t.at[:, 2].set(-inf)
    numbers = dict(alpha=alpha, label_smoothing=0.0)
    assert_matches(
        s, t, FORWARD, weights=jnp.ones(3), labels=jnp.array(labels), expect=numbers,
        **{k: jnp.float32(x) if traced else x for k, x in numbers.items()},
    )  # fmt: skip


@pytest.mark.parametrize("junk", [np.nan, -inf], ids=str)
@pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16", "float64")])
def test_an_infinite_loss_without_weight(rng, dtype, junk):
    """It is no part of the gradient of a temperature that all tokens share."""
    with jax.enable_x64(dtype == "float64"):
        s, t = rounded(rng, (4, 5), dtype), rounded(rng, (4, 5), dtype)
        weights = jnp.array([1.0, 0.0, 0.0, 3.0], jnp.float32)
        options = dict(weights=weights, temperature=jnp.float32(2))
        want, expected = evaluate(s, t, **options)
        value, grads = evaluate(s.at[1, 2].set(junk), t, **options)
        tol = 1e-5 if dtype == "float32" else 1e-6
        assert_close(value, want, 1e-6)
        assert_close(grads["temperature"], expected["temperature"], 1e-6)
        got, want = (np.delete(x["weights"], 1) for x in (grads, expected))
        assert_close(got, want, tol)
        assert not np.isfinite(grads["weights"][1])  # it is the loss of the token


def test_no_weight_gives_a_mean_of_zero(rng):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    value, grads = evaluate(s, t, weights=jnp.zeros(4), temperature=jnp.float32(2))
    assert value == 0
    assert all(not grad.any() for grad in grads.values())
    # A normalizer gives something to divide by, and then weights have gradients.
    options = dict(weights=jnp.zeros(4), normalizer=jnp.float32(3))
    value, grads = assert_matches(s, t, FORWARD, **options)
    assert value == 0 and grads["weights"].all()
