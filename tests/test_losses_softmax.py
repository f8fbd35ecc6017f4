import functools as ft

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads
from scipy.special import log_softmax

import jaxkl
from jaxkl import losses

from .cases import rarely
from .helpers import assert_close, TOLERANCE


VALUE_TOL, GRAD_TOL = TOLERANCE["float32"]

FORWARD, REVERSE = jaxkl.ForwardKL(), jaxkl.ReverseKL()


def hellinger(log_p, log_q):
    # The last term would make a removed class, at log 0, NaN in value and slope.
    return (jnp.exp(log_p / 2) - jnp.exp(log_q / 2)) ** 2 + 0 * log_p * log_q


def kl_oracle(s, t, temperature):
    """KL(softmax(t / T) ‖ softmax(s / T)) of rows, and its gradients, in float64."""
    temperature = np.asarray(temperature, np.float64)[..., None]
    s, t = np.asarray(s, np.float64), np.asarray(t, np.float64)
    log_q, log_p = log_softmax(s / temperature, -1), log_softmax(t / temperature, -1)
    p, q = np.exp(log_p), np.exp(log_q)
    value = np.sum(p * (log_p - log_q), -1)
    ds = (q - p) / temperature
    dt = p * (log_p - log_q - value[..., None]) / temperature
    return value, ds, dt, -np.sum(s * ds + t * dt, -1) / temperature[..., 0]


@ft.partial(jax.jit, static_argnames=("divergence", "axis"))
def value_and_vjp(s, t, temperature, g, where=None, divergence=FORWARD, axis=-1):
    def f(s, t, temperature):
        options = dict(temperature=temperature)
        return losses.softmax_divergence(s, t, divergence, axis, where, **options)

    value, vjp = jax.vjp(f, s, t, jnp.asarray(temperature, jnp.float32))
    return value, vjp(jnp.asarray(g, value.dtype))


def draw(rng, shape, dtype="float32"):
    return (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *rarely("float16")])
@pytest.mark.parametrize(
    "divergence, shape",
    [(FORWARD, (3, 5, 11)), *rarely((FORWARD, (129,)), (REVERSE, (7, 33)))],
)
def test_value_and_grads_match_oracle(rng, divergence, shape, dtype):
    s, t = draw(rng, shape, dtype)
    g = rng.normal(size=shape[:-1])
    # There is a temperature for each row, or one for all.
    temperature = rng.uniform(0.5, 4, size=shape[:-1] if len(shape) == 3 else ())
    value, grads = value_and_vjp(s, t, temperature, g, divergence=divergence)
    value_, ds, dt, d_temperature = kl_oracle(s, t, np.float32(temperature))
    if divergence == REVERSE:
        value_, dt, ds, d_temperature = kl_oracle(t, s, np.float32(temperature))
    assert value.dtype == jnp.float32 and value.shape == shape[:-1]
    assert_close(value, value_, 3 * VALUE_TOL)
    assert grads[0].dtype == grads[1].dtype == dtype
    for actual, slope in zip(grads[:2], (ds, dt), strict=True):
        assert_close(actual, g[..., None] * slope, TOLERANCE[dtype][1])
    d_temperature = g * d_temperature
    d_temperature = d_temperature if np.ndim(temperature) else d_temperature.sum()
    assert_close(grads[2], d_temperature, 3 * GRAD_TOL)


def test_softmax_kl_divergence_is_the_divergence_forward_kl(rng):
    s, t = draw(rng, (3, 4, 5))
    where = rng.random((3, 4, 5)) < 0.7
    options = dict(axis=(0, 1), where=where, temperature=2.0)

    @jax.jit
    def run(s, t):
        log_q, p = jax.nn.log_softmax(s / 2), jax.nn.softmax(t / 2)
        return (
            losses.softmax_kl_divergence(s, t, **options),
            losses.softmax_divergence(s, t, FORWARD, **options),
            losses.softmax_kl_divergence(s, t, temperature=2.0),
            losses.kl_divergence(log_q, p),
        )

    actual, expected, plain, softened = run(s, t)
    np.testing.assert_array_equal(actual, expected)
    assert actual.shape == (5,) and (actual > 0).all()
    # Without T², it is the KL divergence of the softened distributions.
    assert_close(plain, softened, 1e-5)


@pytest.mark.parametrize(
    "axis, axes",
    [((-1, 0), (2, 0)), *rarely((0, (0,)), (-2, (1,)), ((), ()), (None, (0, 1, 2)))],
)
@pytest.mark.parametrize("masked", [True, *rarely(False)])
def test_axis(rng, axis, axes, masked):
    shape = (3, 4, 5)
    s, t = draw(rng, shape)
    # Some columns are removed, and all classes of some row, whichever the axis is.
    where = rng.random(shape) < 0.6
    where[0], where[:, 1], where[:, :, 2] = False, False, False
    rest = [i for i in range(3) if i not in axes]
    rows = lambda x: np.transpose(x, (*rest, *axes)).reshape(
        -1, int(np.prod([shape[i] for i in axes]))
    )
    g = rng.normal(size=[shape[i] for i in rest])
    mask = where if masked else None
    value, (ds, dt, d_temperature) = value_and_vjp(s, t, 2.0, g, mask, axis=axis)
    assert value.shape == g.shape
    total = 0
    for i, keep in enumerate(rows(where if masked else np.ones_like(where))):
        row = np.zeros((4, len(keep)))
        if keep.any():
            value_, *grads = kl_oracle(rows(s)[i, keep], rows(t)[i, keep], 2.0)
            row[0], row[1, keep], row[2, keep] = value_, grads[0], grads[1]
            total += g.ravel()[i] * grads[2]
        np.testing.assert_allclose(value.ravel()[i], row[0, 0], rtol=1e-5, atol=1e-7)
        for actual, slope in ((rows(ds), row[1]), (rows(dt), row[2])):
            expected = g.ravel()[i] * slope
            np.testing.assert_allclose(actual[i], expected, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(actual[i][~keep], 0)
    np.testing.assert_allclose(d_temperature, total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, *rarely(np.inf, -np.inf, 0.0)])
@pytest.mark.parametrize(
    "divergence", [hellinger, *rarely(FORWARD, REVERSE, jaxkl.JensenShannon(0.3))]
)
def test_where_is_slicing_whatever_the_removed_hold(rng, divergence, bad):
    s, t = draw(rng, (3, 9))
    keep = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1], bool)
    g = rng.normal(size=3)
    value_, grads_ = value_and_vjp(
        s[:, keep], t[:, keep], 2.0, g, divergence=divergence
    )
    s, t = (x.at[:, ~keep].set(bad) for x in (s, t))
    value, grads = value_and_vjp(s, t, 2.0, g, keep, divergence=divergence)
    assert_close(value, value_, VALUE_TOL)
    for actual, expected in zip(grads[:2], grads_[:2], strict=True):
        assert_close(actual[:, keep], expected, GRAD_TOL)
        np.testing.assert_array_equal(actual[:, ~keep], 0)
    assert_close(grads[2], grads_[2], GRAD_TOL)


def test_a_callable_sees_the_kept_classes_only(rng):
    s, t = draw(rng, (2, 6))
    where = np.array([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    # A function that is 1 everywhere counts them.
    count = lambda log_p, log_q: jnp.ones_like(log_p)
    np.testing.assert_array_equal(
        losses.softmax_divergence(s, t, count, where=where), [3, 0]
    )
    # A function with poles at probabilities 0 and 1 and at p = q has finite gradients.
    pole = lambda log_p, log_q: (
        jnp.sqrt(jnp.abs(log_p - log_q)) * jnp.log1p(-jnp.exp(log_p)) * log_q**2
    )
    f = lambda s, t: losses.softmax_divergence(s, t, pole, where=where).sum()
    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(f, (0, 1)))(s, t))
    # A class that is impossible in only one of the models still counts.
    s, where = jnp.array([-jnp.inf, 0.0, 0.0]), np.array([True, True, False])
    gap = lambda log_p, log_q: jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))
    value = losses.softmax_divergence(s, jnp.zeros(3), gap, where=where)
    np.testing.assert_allclose(value, 1, rtol=1e-6)


@pytest.mark.parametrize("divergence", [FORWARD, *rarely(hellinger)])
def test_no_class_left_is_zero_with_zero_gradient(divergence):
    nan = jnp.full((3, 4), jnp.nan)
    value, grads = value_and_vjp(
        nan, nan, 2.0, np.ones(3), np.zeros((3, 4), bool), divergence=divergence
    )
    for actual in (value, *grads):
        np.testing.assert_array_equal(actual, np.zeros(actual.shape))
    no_class = jnp.zeros((3, 0), jnp.bfloat16)
    value = losses.softmax_kl_divergence(no_class, no_class)
    np.testing.assert_array_equal(value, np.zeros(3, np.float32), strict=True)


def test_batch_and_where_broadcast(rng):
    s, t = draw(rng, (300, 5), "bfloat16")
    t = t[0]
    g = rng.uniform(0.5, 1.5, size=300)
    value, (ds, dt, _) = value_and_vjp(s, t, 1.0, g)
    value_, ds_, dt_, _ = kl_oracle(s, np.broadcast_to(t, (300, 5)), 1.0)
    assert_close(value, value_, 3 * VALUE_TOL)
    assert_close(ds, g[:, None] * ds_, 1e-2)
    # The sum over 300 rows is in float32, and is rounded to bfloat16 once.
    assert_close(dt, np.sum(g[:, None] * dt_, 0), 2**-8)
    rows = rng.random((300, 1)) < 0.5
    actual = losses.softmax_kl_divergence(s, t, where=rows)
    assert_close(actual, value_ * rows[:, 0], 3 * VALUE_TOL)


INF = np.inf


@pytest.mark.parametrize(
    "student, teacher, value, ds, dt",
    [
        ([0, 0, -INF], [0, 0, -INF], 0, [0, 0, 0], [0, 0, 0]),
        ([0, 0, 0], [0, 0, -INF], np.log(1.5), [-1 / 6, -1 / 6, 1 / 3], [0, 0, 0]),
        ([0, 0, -INF], [0, 0, 0], INF, [1 / 6, 1 / 6, -1 / 3], None),
        ([1e4, 0, 0], [1e4, 0, 0], 0, [0, 0, 0], [0, 0, 0]),
        ([0, 1e4, 0], [1e4, 0, 0], 1e4, [-1, 1, 0], [0, 0, 0]),
    ],
)
def test_singular_points(student, teacher, value, ds, dt):
    s, t = (jnp.array([x, [0.0, 1.0, 2.0]]) for x in (student, teacher))
    value_, grads = value_and_vjp(s, t, 1.0, np.ones(2))
    np.testing.assert_allclose(value_, [value, 0], rtol=1e-6)
    np.testing.assert_allclose(grads[0], [ds, np.zeros(3)], rtol=1e-5, atol=1e-7)
    if dt is not None:
        np.testing.assert_allclose(grads[1], [dt, np.zeros(3)], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_no_cancellation_near_the_teacher(rng):
    t = rng.normal(size=(4, 1000)).astype(np.float32)
    s = (t + 1e-4 * rng.normal(size=t.shape)).astype(np.float32)
    value_, ds, _, _ = kl_oracle(s, t, 1.0)
    value, grads = value_and_vjp(s, t, 1.0, np.ones(4))
    assert (value_ < 1e-8).all()
    assert_close(value, value_, 1e-2)
    assert_close(grads[0], ds, 1e-2)
    value, grads = value_and_vjp(t, t, 1.0, np.ones(4))
    assert not any(np.any(x) for x in (value, *grads))


def naive(s, t, temperature, where):
    """The textbook formula, for JAX to differentiate."""
    logits = [jnp.where(where, x, -1e30) / temperature for x in (s, t)]
    log_q, log_p = (jax.nn.log_softmax(x, axis=0) for x in logits)
    return jnp.sum(jnp.exp(log_p) * jnp.where(where, log_p - log_q, 0), axis=0)


@pytest.mark.slow
def test_float64_and_second_order(rng):
    where = np.array([[1], [0], [1]], bool)
    with jax.enable_x64(True):
        s, t = draw(rng, (3, 2), "float64")
        temperature = jnp.float64(2.0)

        def f(s, t, temperature):
            options = dict(axis=0, temperature=temperature)
            return losses.softmax_kl_divergence(s, t, **options)

        def masked(s, t):
            options = dict(axis=0, where=where, temperature=2.0)
            return losses.softmax_kl_divergence(s, t, **options)

        def check_hessian(hessian, f, f_naive, *args):
            argnums = tuple(range(len(args)))
            sine = lambda f: lambda *args: jnp.sum(jnp.sin(f(*args)))
            actual = jax.jit(hessian(sine(f), argnums))(*args)
            expected = jax.jit(jax.hessian(sine(f_naive), argnums))(*args)
            chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-12)

        check_grads(jax.jit(f), (s, t, temperature), order=1, modes=["rev"])
        f_naive = lambda *args: naive(*args, np.ones((3, 2), bool))
        check_hessian(jax.hessian, f, f_naive, s, t, temperature)
        reverse_twice = lambda f, argnums: jax.jacrev(jax.jacrev(f, argnums), argnums)
        f_naive = lambda *args: naive(*args, 2.0, where)
        check_hessian(reverse_twice, masked, f_naive, s[:, 1:], t[:, 1:])
        assert f(s, t, temperature).dtype == jnp.float64
        # Float32 logits stay float32 beside Python's numbers.
        s, t = s.astype(jnp.float32), t.astype(jnp.bfloat16)
        assert losses.softmax_kl_divergence(s, t, temperature=2.0).dtype == jnp.float32
        nothing = losses.softmax_kl_divergence(s[:0], t[:0], axis=0)
        assert nothing.dtype == jnp.float32
        nothing = losses.softmax_kl_divergence(s[:0].astype(float), t[:0], axis=0)
        assert nothing.dtype == jnp.float64


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.slow
def test_property_any_logits(data):
    # There is one shape, and so one compilation: only the numbers differ.
    number = st.one_of(st.floats(-8, 8, width=32), st.sampled_from([-1e4, 0.0, 30.0]))
    row = lambda s: np.array(data.draw(st.lists(s, min_size=12, max_size=12)))
    s, t = (row(number).astype(np.float32).reshape(2, 6) for _ in range(2))
    where = row(st.booleans()).reshape(2, 6)
    temperature = np.float32(data.draw(st.floats(0.25, 8, width=32)))
    value, grads = value_and_vjp(s, t, temperature, np.ones(2), where)
    for i in range(2):
        keep = where[i]
        assert value[i] >= 0
        if not keep.any():
            assert value[i] == 0
            continue
        value_, ds, dt, _ = kl_oracle(s[i, keep], t[i, keep], temperature)
        # The rounding of log-probabilities has the size of the scaled logits.
        size = np.abs([s[i, keep], t[i, keep]]).max() / temperature
        atol = 1e-6 * (1 + size) / min(1, temperature)
        np.testing.assert_allclose(value[i], value_, rtol=1e-4, atol=atol)
        np.testing.assert_allclose(grads[0][i, keep], ds, rtol=1e-4, atol=atol)
        np.testing.assert_allclose(grads[1][i, keep], dt, rtol=1e-4, atol=atol)


X = jnp.zeros((2, 3))


def traced(x):
    return jax.jit(
        lambda a: losses.softmax_divergence(X, X, lambda p, q: a * p, where=X == 0)
    )(x)


@pytest.mark.parametrize(
    "f, error, match",
    [
        (lambda f: f(X.astype(int), X), TypeError, "`student_logits` must.*int32"),
        (
            lambda f: f(X, X > 0),
            TypeError,
            "`teacher_logits` must be floating.point.*bool",
        ),
        (
            lambda f: f(X, X[:, :2]),
            ValueError,
            r"`student_logits` and `teacher.*\(2, 2",
        ),
        (lambda f: f(X, X[:, :1]), ValueError, r"`teacher_logits` .*class.*\(2, 1\)"),
        (lambda f: f(X[0, 0], X), ValueError, r"`student_logits` .*class.*got \(\)"),
        (lambda f: f(X, X, where=X), TypeError, "`where` must be bool, got float32"),
        (lambda f: f(X, X, where=X[0, :2] == 0), ValueError, r"`where` .*got \(2,\)"),
        (lambda f: f(X, X, 2), ValueError, r"`axis` must be in \[-2, 2\)"),
        (lambda f: f(X, X, (1, 1)), ValueError, "`axis` must not repeat"),
        (lambda f: f(X, X, temperature=0.0), ValueError, "`temperature` must be pos"),
        (lambda f: f(X, X, temperature=X), ValueError, "`temperature` must have"),
        (lambda f: f(X, X, temperature="1"), TypeError, "`temperature` must be"),
    ],
)
def test_bad_arguments(f, error, match):
    with pytest.raises(error, match=match):
        f(losses.softmax_kl_divergence)
    other = lambda s, t, *args, **kwargs: losses.softmax_divergence(
        s, t, hellinger, *args, **kwargs
    )
    with pytest.raises(error, match=match):
        f(other)


@pytest.mark.parametrize("where", [None, np.ones(3, bool)])
@pytest.mark.parametrize(
    "divergence, error, match",
    [
        (jaxkl.ReverseKL, TypeError, r"must be an instance, such as ReverseKL\(\)"),
        ("kl", TypeError, "`divergence` must be callable, got 'kl'"),
        (lambda p, q: jnp.sum(p - q), ValueError, "`divergence` must be elementwise"),
    ],
)
def test_bad_divergence(divergence, where, error, match):
    with pytest.raises(error, match=match):
        losses.softmax_divergence(X, X, divergence, where=where)


def test_a_divergence_that_closes_over_a_traced_value_is_an_error():
    with pytest.raises(ValueError, match="`divergence` must not close over traced"):
        traced(2.0)
