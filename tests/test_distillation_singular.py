"""Zeros, infinities, dropped rows, and a student close to its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl

from . import oracle
from .cases import (
    assert_gradient,
    assert_matches,
    CATALOGUE,
    evaluate,
    FLOATS,
    FORWARD,
    over,
    over_all,
    over_kinds,
    rarely,
    rounded,
    USER,
)
from .helpers import assert_close, TOLERANCE
from .sources import per_token


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


@over_all
def test_finite_wherever_the_mathematics_is(divergence, reference):
    _assert_singular(divergence, reference, "float32")


@pytest.mark.slow
@over("forward", slow=["js"])
@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float16")])
def test_finite_in_half_precision_too(divergence, reference, dtype):
    _assert_singular(divergence, reference, dtype)


def _assert_singular(divergence, reference, dtype):
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
    def finite(divergence, argument):
        s, t = _rows()
        grads = oracle.distillation_loss(s, t, divergence=divergence, reduction="none")
        ok = np.isfinite(getattr(grads, argument)).all(-1)
        return {name for name, x in zip(SINGULAR, ok, strict=True) if x}

    everything = set(SINGULAR)
    assert finite(oracle.forward_kl, "student") == everything
    assert finite(oracle.forward_kl, "teacher") == everything - NO_STUDENT
    assert finite(oracle.reverse_kl, "student") == everything - NO_TEACHER
    assert finite(oracle.reverse_kl, "teacher") == everything
    assert finite(oracle.jensen_shannon(0.5), "student") == everything
    assert finite(oracle.jensen_shannon(0.5), "teacher") == everything


@pytest.mark.parametrize(
    "divergence", [FORWARD[0], jaxkl.AlphaDivergence(1)], ids=["forward", "alpha_one"]
)
def test_no_student_support_is_inf_with_the_formulas_gradient(divergence):
    s, t = jnp.array([[-inf, 0.0, 0.0]]), jnp.array([[0.0, 0.0, -inf]])
    value, grads = evaluate(s, t, divergence=divergence)
    assert value == inf
    assert_close(grads["student"], [[-0.5, 0.0, 0.5]], 1e-6)


def test_cross_entropy_of_a_label_without_mass_is_infinite(rng):
    s, t = rounded(rng, (2, 5)).at[0, 2].set(-inf), rounded(rng, (2, 5))
    arguments = dict(labels=jnp.array([2, 2]), alpha=0.0, reduction="none")
    value, _ = evaluate(s, t, **arguments)
    assert value[0] == inf and np.isfinite(value[1])


def test_an_infinite_token_leaves_the_other_gradients_alone(rng):
    s, t = rounded(rng, (5, 7)), rounded(rng, (5, 7))
    s = s.at[2, 3].set(-inf)
    value, grads = evaluate(s, t, differentiate_teacher=False)
    assert value == inf
    assert_close(grads["student"], oracle.distillation_loss(s, t).student, 1e-5)


@over_kinds
def test_columns_masked_in_both_models_are_as_if_absent(rng, divergence, reference):
    s, t = rounded(rng, (4, 9)), rounded(rng, (4, 9))
    kept = np.array([0, 2, 3, 5, 8])
    hide = lambda x: jnp.full_like(x, -inf).at[:, kept].set(x[:, kept])
    arguments = dict(
        divergence=divergence, temperature=jnp.float32(2), alpha=0.5, z_loss=0.1
    )
    value, grads = evaluate(
        hide(s), hide(t), labels=jnp.array([0, 2, 8, -100]), **arguments
    )
    # Without these columns the labels have other numbers.
    expected = oracle.distillation_loss(
        s[:, kept], t[:, kept], labels=np.array([0, 1, 4, -100]),
        **arguments | dict(divergence=reference),
    )  # fmt: skip
    assert_close(value, expected.loss, 1e-6)
    assert_gradient("temperature", grads["temperature"], expected, 1e-5)
    hidden = np.setdiff1d(np.arange(9), kept)
    for name in ("student", "teacher"):
        assert_close(grads[name][:, kept], getattr(expected, name), 1e-5)
        assert not grads[name][:, hidden].any()


def test_terms_with_no_part_in_the_loss_may_be_infinite(rng):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    s = s.at[:, 2].set(-inf)
    # At alpha = 0 the divergence is infinite and the cross-entropy is not.
    assert_matches(s, t, FORWARD, labels=jnp.array([0, 1, 3]), alpha=0.0)
    # At alpha = 1, or with a label of -100, it is the other way round.
    t = t.at[:, 2].set(-inf)
    assert_matches(s, t, FORWARD, labels=jnp.array([2, 1, 3]), alpha=1.0)
    assert_matches(s, t, FORWARD, labels=jnp.array([-100, 1, 3]), alpha=0.5)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("alpha", [0.0, *rarely(1.0)])
def test_weights_of_terms_with_no_part_in_the_loss(rng, alpha, traced):
    # The gradient to a weight is the loss of its token, which must not be 0 · inf.
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    s = s.at[:, 2].set(-inf)
    t = t if alpha == 0 else t.at[:, 2].set(-inf)
    numbers = dict(alpha=alpha, label_smoothing=0.0)
    arguments = {k: jnp.float32(x) if traced else x for k, x in numbers.items()}
    assert_matches(
        s,
        t,
        FORWARD,
        weights=jnp.ones(3),
        labels=jnp.array([0 if alpha == 0 else 2, 1, 3]),
        expect=numbers,
        **arguments,
    )


# Dropped tokens.

JUNK = {
    "NaN": [np.nan] * 5,
    "one NaN": [0, 1, np.nan, 0, 1],
    "inf": [0, inf, 0, 0, 1],
    "all -inf": [-inf] * 5,
    "largest": [3e38] * 5,
}


@pytest.mark.parametrize("reduction", ["none", *rarely("mean")])
@over_kinds
def test_where_drops_a_token_whatever_it_holds(rng, divergence, reference, reduction):
    junk = jnp.asarray(list(JUNK.values()), jnp.float32)
    n = len(junk)
    # The student, the teacher or both hold junk, between tokens that count.
    s, t = rounded(rng, (4 * n, 5)), rounded(rng, (4 * n, 5))
    dropped = np.arange(4 * n) % 4 != 0
    s = s.at[1::4].set(junk).at[3::4].set(junk)
    t = t.at[2::4].set(junk).at[3::4].set(junk)
    names = "temperature", "teacher_temperature", "weights", "labels"
    arguments = per_token(rng, 4 * n, *names, vocab=5)
    arguments |= dict(where=jnp.asarray(~dropped), alpha=0.5, z_loss=0.1)
    g = np.float32(rng.normal(size=4 * n) if reduction == "none" else 1)
    options = dict(reduction=reduction, cotangent=g)
    value, grads = assert_matches(s, t, (divergence, reference), **arguments, **options)
    for name, grad in grads.items():
        assert not grad[dropped].any(), name
    if reduction == "none":
        assert not value[dropped].any()


@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
@pytest.mark.parametrize(
    "names",
    [FLOATS, *rarely(*(((name,),) for name in FLOATS))],
    ids=["all", *FLOATS],
)
def test_where_drops_a_token_of_which_another_argument_is_nan(rng, names, reduction):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    where = jnp.array([True, False, True, False])
    x = jnp.array([1.5, np.nan, 2.0, np.nan])
    spoilt = dict.fromkeys(names, x)
    assert_matches(s, t, FORWARD, where=where, reduction=reduction, **spoilt)


@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
def test_a_token_without_weight_is_no_part_of_temperatures_gradient(rng, reduction):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    arguments = dict(reduction=reduction, weights=jnp.array([1.0, 0.0, 2.0]))
    arguments["temperature"] = jnp.float32(2)
    _, expected = evaluate(s, t, **arguments)
    _, grads = evaluate(s.at[1].set(np.nan), t, **arguments)
    assert_close(grads["temperature"], expected["temperature"], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", *rarely("sum")])
@pytest.mark.parametrize(
    "divergence", [FORWARD[0], *rarely(USER[0])], ids=["forward", "user"]
)
def test_where_equals_slicing(rng, divergence, reduction):
    s, t = rounded(rng, (20, 7)), rounded(rng, (20, 7))
    where = rng.random(20) < 0.5
    arguments = dict(divergence=divergence, reduction=reduction, temperature=2.0)
    value, grads = evaluate(s, t, where=jnp.asarray(where), **arguments)
    value_, grads_ = evaluate(s[where], t[where], **arguments)
    assert_close(value, value_, 1e-6)
    for name in ("student", "teacher"):
        assert_close(grads[name][where], grads_[name], 1e-6)
        assert not grads[name][~where].any()


@pytest.mark.parametrize("reduction", ["mean", *rarely("none", "sum")])
@pytest.mark.parametrize(
    "how", ["masked", "masked junk", "empty", *rarely("empty batch")]
)
def test_no_token_gives_zero_with_a_zero_gradient(rng, how, reduction):
    shape = {"empty": (0,), "empty batch": (2, 0)}.get(how, (2, 3))
    s, t = rounded(rng, (*shape, 5)), rounded(rng, (*shape, 5))
    if how == "masked junk":
        s, t = jnp.full_like(s, np.nan), jnp.full_like(t, inf)
    value, grads = evaluate(
        s,
        t,
        temperature=jnp.float32(2),
        teacher_temperature=jnp.float32(3),
        weights=jnp.ones(shape),
        where=jnp.zeros(shape, bool),
        labels=jnp.zeros(shape, int),
        alpha=0.5,
        z_loss=0.1,
        reduction=reduction,
    )
    assert value.shape == (shape if reduction == "none" else ())
    assert value.dtype == jnp.float32 and not value.any()
    assert all(not grad.any() for grad in grads.values())


def test_no_weight_gives_a_mean_of_zero(rng):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    value, grads = evaluate(s, t, weights=jnp.zeros(4), temperature=jnp.float32(2))
    assert value == 0
    assert all(not grad.any() for grad in grads.values())
    # A normalizer gives something to divide by, and then weights have gradients.
    value, grads = assert_matches(
        s, t, FORWARD, weights=jnp.zeros(4), normalizer=jnp.float32(3)
    )
    assert value == 0 and grads["weights"].all()


# A student close to its teacher.


@over("forward", slow=[x for x in CATALOGUE if x != "forward"])
def test_relatively_accurate_near_the_teacher(rng, divergence, reference):
    tokens, vocab = 2, 32000
    t = np.float32(rng.normal(size=(2, tokens, vocab)))
    noise = np.array([1e-4, 3e-3])[:, None, None] * rng.normal(size=t.shape)
    temperature = np.float32([1, 2])  # the second halves the noise
    s = t + noise * temperature[:, None]
    s, t = jnp.asarray(s, jnp.float32), jnp.asarray(t)
    arguments = dict(
        temperature=jnp.asarray(temperature)[None].repeat(2, 0), reduction="none"
    )
    value, grads = evaluate(s, t, divergence=divergence, **arguments)
    expected = oracle.distillation_loss(s, t, divergence=reference, **arguments)
    # The true KL is about half the variance of the noise.
    kl = oracle.distillation_loss(s, t, **arguments).loss / temperature**2
    kl = kl.mean(-1).astype(np.float64)
    np.testing.assert_allclose(kl, [5e-9, 4.5e-6], rtol=0.1)
    assert (value >= 0).all()
    for i, (tol, grad_tol) in enumerate([(5e-3, 2e-2), (1e-4, 1e-3)]):
        np.testing.assert_allclose(
            value[i], expected.loss[i].astype(np.float64), rtol=tol
        )
        if divergence == jaxkl.TotalVariation():
            continue  # its slope is the sign of a difference below float32's rounding
        for j in range(tokens):
            assert_close(grads["student"][i, j], expected.student[i, j], grad_tol)
            assert_close(grads["teacher"][i, j], expected.teacher[i, j], grad_tol)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float16")])
@over("forward", slow=["js"])
def test_half_precision_logits_lose_nothing_more(rng, divergence, reference, dtype):
    t = rounded(rng, (4, 1001), dtype)
    s = (t.astype(jnp.float32) + rounded(rng, (4, 1001), scale=0.05)).astype(dtype)
    value, _ = assert_matches(
        s, t, (divergence, reference), reduction="none", value_tol=1e-5, tol=1e-2
    )
    assert value.dtype == jnp.float32


@over("reverse", slow=["forward", "js"])
def test_equal_models_of_a_large_vocabulary(rng, divergence, reference):
    del reference
    s = rounded(rng, (4, 32000), scale=2.0)
    value, grads = evaluate(s, s, divergence=divergence, temperature=0.7)
    assert value == 0
    assert not grads["student"].any() and not grads["teacher"].any()


@pytest.mark.slow
@over_kinds
def test_jitted_and_eager_agree_at_a_singular_point(divergence, reference):
    s, t = _rows()
    f = lambda s: jaxkl.distillation_loss(s, t, divergence=divergence, reduction="none")
    assert_close(jax.jit(f)(s), f(s), 1e-6)
