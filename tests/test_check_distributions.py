"""`check_distributions`: what it accepts, what it names, and how `checkify` runs it."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from scipy.special import log_softmax

import jaxkl

from .cases import rarely
from .helpers import assert_close


inf, nan = float("inf"), float("nan")
LOG_PROBS = np.log([[0.5, 0.5], [0.25, 0.75]])
PROBS = np.array([[1.0, 0.0], [0.2, 0.8]])

# (input, target, log_target), and the message they give.
WRONG = {
    "probabilities": (PROBS, PROBS, False, r"`input`.*row \[0\] has 1\.0"),
    "nan": ([[0, -inf], [nan, 0]], PROBS, False, r"`input`.*row \[1\] has NaN"),
    "+inf": ([[0, inf], [0, 0]], PROBS, False, r"`input`.*row \[0\] has inf"),
    "-inf": (np.full((2, 2), -inf), PROBS, False, r"`input`.*row \[0\].* sum of 0\.0"),
    "unnormalised": (LOG_PROBS - 1, PROBS, False, r"`input`.*\[0\].* sum of 0\.36"),
    "negative": (LOG_PROBS, PROBS - 1e-3, False, r"`target`.*row \[0\] has -0\.001"),
    "counts": (LOG_PROBS, [[1, 0], [2, 2]], False, r"`target`.*row \[1\] sums to 4\.0"),
    "logs": (LOG_PROBS, LOG_PROBS, False, r"`target`.*probabilities.*\[0\] has -0\.69"),
    "not logs": (LOG_PROBS, PROBS, True, r"`target`.*log-prob.*row \[0\] has 1\.0"),
    "target nan": (LOG_PROBS, [[0, 1], [1, nan]], False, r"`target`.*\[1\] has NaN"),
    "target inf": (LOG_PROBS, [[0, 1], [1, inf]], False, r"`target`.*\[1\] sums to in"),
    # The message is about the first wrong row, whatever is wrong with the others.
    "two": (LOG_PROBS, [[1, 1], [nan, 0]], False, r"`target`.*row \[0\] sums to 2\.0"),
}
wrong = pytest.mark.parametrize("x, t, log_target, says", WRONG.values(), ids=WRONG)


@wrong
def test_names_the_first_wrong_row(x, t, log_target, says):
    x, t = np.asarray(x, np.float32), np.asarray(t, np.float32)
    with pytest.raises(ValueError, match=says):
        jaxkl.check_distributions(x, t, log_target)


def plain(x, t, log_target=False):
    return jaxkl.kl_div(x, t, reduction="sum", log_target=log_target)


def checking(x, t, log_target=False):
    jaxkl.check_distributions(x, t, log_target)
    return plain(x, t, log_target)


GOOD = X, T = LOG_PROBS.astype(np.float32), PROBS.astype(np.float32)


@pytest.mark.parametrize("log_target", [False, True])
def test_same_under_checkify_and_silent_without(log_target):
    loss = jax.jit(ft.partial(checking, log_target=log_target))
    checked = jax.jit(checkify.checkify(loss))
    for x, t, log, says in WRONG.values():
        if log == log_target:
            x, t = np.asarray(x, np.float32), np.asarray(t, np.float32)
            error, value = checked(x, t)
            with pytest.raises(ValueError, match=says):
                error.throw()
            np.testing.assert_array_equal(loss(x, t), value)


def test_costs_nothing_in_jit():
    compiled = [jax.jit(f).lower(*GOOD).compile() for f in (checking, plain)]
    flops = [x.cost_analysis()["flops"] for x in compiled]
    assert flops[0] == flops[1]


def test_transforms():
    assert_close(jax.jit(jax.grad(checking))(X, T), -T, 1e-6)
    assert jax.jit(jax.vmap(checking))(X, T).shape == (2,)
    error, _ = jax.jit(checkify.checkify(jax.vmap(jax.grad(checking))))(X, T)
    error.throw()
    error, _ = jax.jit(checkify.checkify(jax.vmap(checking)))(X, 2 * T)
    assert "`target` must hold probabilities" in error.get()


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float32", *rarely("float16", "float64")]
)
@pytest.mark.parametrize("size", [131072, *rarely(7)])
def test_takes_a_softmax_of_any_dtype(rng, dtype, size):
    with jax.enable_x64(True):
        uniform = np.full(size, -np.log(size))
        rows = np.stack([log_softmax(rng.normal(size=size)), uniform])
        x, t = jnp.asarray(rows, dtype), jnp.asarray(np.exp(rows), dtype)
        jaxkl.check_distributions(x, t)
        jaxkl.check_distributions(x, x, log_target=True)
        with pytest.raises(ValueError, match=r"`input`.*row \[0\] exponentiates"):
            jaxkl.check_distributions(x - 0.25, t)
        with pytest.raises(ValueError, match=r"`target`.*row \[1\] sums to 1\.2"):
            jaxkl.check_distributions(x, t.at[1].multiply(1.25))


def test_shapes():
    for arguments in ((X[0], T), (X[None], T[0]), (X[:0], T[:0])):
        jaxkl.check_distributions(*arguments)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((np.stack([X, X - 1]), T), ValueError, r"row \[1, 0\] exponentiates"),
        ((X[:, :0], T[:, :1]), ValueError, "sum of 0"),  # there are no outcomes
        ((X[0], 2 * T[0]), ValueError, r"row \[\] sums to 2"),
        ((np.float32(0), T), ValueError, "`input` must have an axis"),
        ((X, T[:, :1].repeat(3, 1)), ValueError, "`input` and `target`.*broadcast"),
        ((X, T.astype(int)), TypeError, "`target`"),
        ((X, T, 1), TypeError, "`log_target`"),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        jaxkl.check_distributions(*arguments)
