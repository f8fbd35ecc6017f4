"""`kl_div` against float64 NumPy, which shares no code with it."""

import functools as ft
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, xlogy

import jaxkl
from jaxkl import kl_div, KLDivLoss, reference

from .cases import rarely
from .helpers import assert_close, TOLERANCE


both = pytest.mark.parametrize("log_target", [False, True])
every = pytest.mark.parametrize(
    "kl_div", [jaxkl.kl_div, reference.kl_div], ids=["jaxkl", "reference"]
)


def oracle(x, t, log_target):
    """Elementwise loss, and its gradients with respect to `x` and `t`."""
    x, t = np.asarray(x, np.float64), np.asarray(t, np.float64)
    if log_target:
        p = np.exp(t)
        return p * (t - x), -p, p * (t - x + 1)
    return xlogy(t, t) - t * x, -t, np.log(t) + 1 - x


@every
@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *rarely("float16")])
@pytest.mark.filterwarnings("ignore:.*is not the KL")
def test_value_and_gradients(rng, kl_div, dtype, log_target):
    # The logits are of order 1, as a saturated softmax hides errors.
    x, t = log_softmax(rng.normal(size=(2, 4, 5, 11)), axis=-1)
    x, t = jnp.asarray(x, dtype), jnp.asarray(t if log_target else np.exp(t), dtype)
    cotangent = jnp.asarray(rng.normal(size=x.shape), dtype)
    # The weight that each element has in the loss.
    weights = dict(none=1.0, sum=1.0, mean=1 / x.size, batchmean=1 / len(x))

    @jax.jit  # one program for all, as compiling takes the time
    def run(x, t):
        found = {}
        for reduction in weights:
            f = ft.partial(kl_div, reduction=reduction, log_target=log_target)
            value, pull = jax.vjp(f, x, t)
            g = cotangent if reduction == "none" else jnp.ones_like(value)
            found[reduction] = f(x, t), value, pull(g)
        return found

    terms, *slopes = oracle(x, t, log_target)
    tol, grad_tol = TOLERANCE[dtype]
    for reduction, (alone, value, grads) in run(x, t).items():
        is_array = reduction == "none"
        wanted = weights[reduction] * (terms if is_array else terms.sum())
        g = weights[reduction] * (np.asarray(cotangent, np.float64) if is_array else 1)
        assert value.dtype == dtype and value.shape == wanted.shape
        assert_close(value, wanted, tol, reduction)
        assert_close(alone, value, 1e-6, "not differentiated")
        for grad, slope, name in zip(grads, slopes, ("input", "target"), strict=True):
            assert grad.dtype == dtype
            assert_close(grad, g * slope, grad_tol, f"{reduction}, {name}")


@pytest.mark.parametrize("t", [1e-25, 1e-36])
def test_second_derivative_at_small_probabilities(t):
    t = jnp.float32(t)
    f = lambda t: kl_div(jnp.float32(-1.0), t, reduction="sum")
    second = jax.grad(jax.grad(f))
    # A compiler that knows the argument, and one that does not, simplify differently.
    for actual in (second(t), jax.jit(second)(t), jax.jit(lambda: second(t))()):
        assert_close(actual, 1 / np.float64(t), 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@both
def test_half_precision_rounds_once(rng, dtype, log_target):
    # The result is within half a unit in the last place of the float64 value. At a
    # vocabulary of 128256 the true KL is about 1e-3, which half precision would lose.
    logits = rng.normal(size=128256)
    x = jnp.asarray(log_softmax(logits + 0.05 * rng.normal(size=logits.shape)), dtype)
    t = log_softmax(logits)
    t = jnp.asarray(t if log_target else np.exp(t), dtype)
    f = lambda x, t, reduction: kl_div(x, t, reduction=reduction, log_target=log_target)
    loss, d_x, d_t = oracle(x, t, log_target)
    half_ulp = float(jnp.finfo(dtype).eps) / 2 * 1.01  # and float32 rounding
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    checks = [(f(x, t, "sum"), loss.sum()), (f(x, t, "none"), loss)]
    grads = jax.grad(f, argnums=(0, 1))(x, t, "sum")
    for actual, expected in [*checks, (grads[0], d_x), (grads[1], d_t)]:
        assert actual.dtype == dtype
        # Float32 itself rounds where terms of order 1 cancel.
        atol = tiny + 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(
            np.asarray(actual, np.float64), expected, rtol=half_ulp, atol=atol
        )


def test_half_precision_sum_does_not_overflow_on_the_way():
    # The sum, 80000, is beyond float16, but its mean over the batch is not.
    x, t = jnp.full((40, 20), -100.0, jnp.float16), jnp.ones((40, 20), jnp.float16)
    assert kl_div(x, t, reduction="batchmean") == 2000


@both
def test_broadcast_gradient_is_summed_in_float32(log_target):
    # Of 4096 terms of 0.3, bfloat16 cannot count past 256.
    x = jnp.full((4096, 1), -1.0, jnp.bfloat16)
    t = jnp.asarray(np.log([0.3]) if log_target else [0.3], jnp.bfloat16)
    f = lambda x, t: kl_div(x, t, reduction="sum", log_target=log_target)
    _, d_x, d_t = oracle(x, np.broadcast_to(t, x.shape), log_target)
    actual = jax.grad(f, argnums=(0, 1))(x, t)
    assert_close(actual[0], d_x, 4e-3, "d_input")
    assert_close(actual[1], d_t.sum(axis=0), 4e-3, "d_target")


@every
def test_zero_probabilities_cost_nothing(kl_div):
    x = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    t = jnp.array([[1.0, 0.0, 0.0]])
    assert_close(kl_div(x, t, reduction="batchmean"), np.log(2), 1e-6)
    d_x = jax.grad(lambda x: kl_div(x, t, reduction="batchmean"))(x)
    np.testing.assert_array_equal(d_x, -t)


def test_accepts_what_numpy_accepts():
    x, t = np.log(np.array([[0.5, 0.5]], np.float32)), [[0.25, 0.75]]
    expected = oracle(x, t, False)[0].sum()
    actual = kl_div(x, t, reduction="batchmean")  # pyright: ignore[reportArgumentType]
    assert_close(actual, expected, 1e-6)
    assert_close(kl_div(-1.0, 0.5, reduction="sum"), 0.5 * np.log(0.5) + 0.5, 1e-6)
    d_x, d_t = jax.grad(kl_div, argnums=(0, 1))(-1.0, 0.5, reduction="sum")
    assert_close(d_x, -0.5, 1e-6)
    assert_close(d_t, np.log(0.5) + 2, 1e-6)


NOT_FLOATS = "int32", "uint8", "bool", "complex64", "float8_e4m3fn"
ONES = np.ones((2, 3), np.float32)
BAD = [
    (dict(input=None), TypeError, "`input` must be .*, got NoneType"),
    (dict(target="abc"), TypeError, "`target` must be .*, got str"),
    (dict(target=[[1.0], [1.0, 2.0]]), TypeError, "`target` must be .*, got list"),
    (dict(target=1), TypeError, "`target` must be .*, got int"),
    *(
        ({x: ONES.astype(d)}, TypeError, f"`{x}` must be a floating-.* array, got {d}")
        for x in ("input", "target")
        for d in NOT_FLOATS
    ),
    (
        dict(target=np.ones((4, 3), np.float32)),
        ValueError,
        r"`input` and `target` must have shapes that broadcast.*\(2, 3\).*\(4, 3\)",
    ),
    (
        dict(reduction="avg"),
        ValueError,
        "`reduction` must be one of .*'none', 'sum', 'mean', 'batchmean'.*'avg'",
    ),
    (dict(reduction=None), ValueError, "`reduction` must be one of .*None"),
    (dict(reduction=["sum"]), ValueError, "`reduction` must be one of .*sum"),
    (dict(log_target=1), TypeError, "`log_target` must be a bool, got 1"),
    (dict(log_target=None), TypeError, "`log_target` must be a bool, got None"),
    (
        # as PyTorch's `KLDivLoss("batchmean")` has it
        dict(size_average="batchmean"),
        TypeError,
        "`size_average` must be a bool or None, got 'batchmean'",
    ),
    (dict(reduce=0), TypeError, "`reduce` must be a bool or None, got 0"),
]


@every
def test_bad_arguments(kl_div):
    for arguments, error, match in BAD:
        with pytest.raises(error, match=match):
            kl_div(**(dict(input=ONES, target=ONES, reduction="sum") | arguments))


def test_traced_option_is_refused():
    f = lambda log_target: kl_div(1.0, 1.0, reduction="sum", log_target=log_target)
    with pytest.raises(TypeError, match="`log_target` must be a bool"):
        jax.jit(f)(True)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: jaxkl.kl_div(x, x),
        lambda x: jaxkl.kl_div(x, x, reduction="elementwise_mean"),
        lambda x: jaxkl.kl_div(x, x, reduce=False),
        lambda x: jaxkl.KLDivLoss(size_average=False),
        lambda x: jaxkl.KLDivLoss()(x, x),
        lambda x: reference.kl_div(x, x),
        lambda x: reference.kl_div(x, x, size_average=True),
        lambda x: jax.jit(jaxkl.kl_div)(x, x),
    ],
)
def test_warnings_point_at_the_caller(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(jnp.ones(3))
    (warning,) = caught
    assert warning.category is UserWarning
    if "jit" not in call.__code__.co_names:  # JAX would stand in between
        assert warning.filename == __file__


def test_module_is_a_constant():
    loss = KLDivLoss(reduction="batchmean", log_target=True)
    assert loss == KLDivLoss(reduction="batchmean", log_target=True)
    assert loss != KLDivLoss(reduction="batchmean")
    assert hash(loss) == hash(KLDivLoss(reduction="batchmean", log_target=True))
    assert jax.tree.leaves(loss) == []
    assert "batchmean" in repr(loss)
    with pytest.raises(AttributeError):
        loss.reduction = "sum"  # pyright: ignore[reportAttributeAccessIssue]
    x = jnp.log(jnp.array([[0.5, 0.5]]))
    t = jnp.log(jnp.array([[0.25, 0.75]]))
    expected = oracle(x, t, True)[0].sum()
    assert_close(jax.jit(lambda loss, x, t: loss(x, t))(loss, x, t), expected, 1e-6)
    static = jax.jit(lambda loss, x, t: loss(input=x, target=t), static_argnums=0)
    assert_close(static(loss, x, t), expected, 1e-6)
