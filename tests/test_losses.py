import functools as ft

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads
from scipy.special import xlogy

from jaxkl import losses
from jaxkl._math import elementwise

from .cases import rarely
from .helpers import assert_close, TOLERANCE


PLAIN = ["kl_divergence", "kl_divergence_with_log_targets", "generalized_kl_divergence"]
mostly_one = pytest.mark.parametrize("name", [PLAIN[0], *rarely(*PLAIN[1:])])
VALUE_TOL, GRAD_TOL = TOLERANCE["float32"]


def oracle(name, x, y):
    """Terms of the loss and their slopes, in float64, from the formulas."""
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.exp(y) if name == "kl_divergence_with_log_targets" else y
        log_t = y if name == "kl_divergence_with_log_targets" else np.log(y)
        term = xlogy(t, t) - np.where(t > 0, t * x, 0)
        dx = -t
        if name == "kl_divergence_with_log_targets":
            dy = np.where(t > 0, t * (log_t + 1 - x), 0)
        elif name == "kl_divergence":
            dy = np.where(t > 0, log_t + 1 - x, 0)
        else:
            term, dx = term - t + np.exp(x), dx + np.exp(x)
            dy = np.where(t > 0, log_t - x, 0)
    return term, dx, dy


def draw(rng, name, shape, dtype="float32"):
    """Inputs of order 1, which are not normalised."""
    x, y = rng.normal(size=shape), rng.normal(size=shape)
    if name != "kl_divergence_with_log_targets":
        y = np.exp(y)
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)


@ft.partial(jax.jit, static_argnames=("name", "axis"))
def value_and_vjp(name, args, g, axis=-1, where=None):
    f = lambda *args: getattr(losses, name)(*args, axis, where)
    value, vjp = jax.vjp(f, *args)
    return value, vjp(g.astype(value.dtype))


@pytest.mark.parametrize(
    "shape, dtype",
    [((3, 5, 11), "bfloat16"), ((7, 129), "float32"), ((2, 0), "float32")]
    + rarely(((3, 5, 11), "float32"), ((3, 5, 11), "float16"))
    + rarely(((1, 1), "float32"), ((6,), "float32")),
)
@pytest.mark.parametrize("name", PLAIN)
def test_value_and_grads_match_oracle(rng, name, shape, dtype):
    x, y = draw(rng, name, shape, dtype)
    g = rng.normal(size=shape[:-1])
    value, grads = value_and_vjp(name, (x, y), g)
    term, dx, dy = oracle(name, x, y)
    assert value.dtype == jnp.float32 and value.shape == shape[:-1]
    # In half precision the inputs are rounded, but the loss is not.
    assert_close(value, term.sum(-1), VALUE_TOL, "value")
    for actual, slope in zip(grads, (dx, dy), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, g[..., None] * slope, TOLERANCE[dtype][1], "grad")


@pytest.mark.parametrize("name", PLAIN)
def test_half_precision_accumulates_in_float32(rng, name):
    # A bfloat16 sum of 4096 terms is off by percents.
    x, y = draw(rng, name, (2, 4096), "bfloat16")
    assert_close(getattr(losses, name)(x, y), oracle(name, x, y)[0].sum(-1), VALUE_TOL)


@mostly_one
def test_float64_in_one_input_makes_the_loss_float64(rng, name):
    f = getattr(losses, name)
    with jax.enable_x64(True):
        x, y = draw(rng, name, (3, 7), "float64")
        term, dx, dy = oracle(name, x, y)
        value, grads = value_and_vjp(name, (x, y), np.ones(3))
        assert value.dtype == grads[0].dtype == grads[1].dtype == jnp.float64
        for actual, expected in zip(
            (value, *grads), (term.sum(-1), dx, dy), strict=True
        ):
            assert_close(actual, expected, 1e-14)

        y = y.astype(jnp.bfloat16)
        value, grads = value_and_vjp(name, (x, y), np.ones(3))
        term, dx, dy = oracle(name, x, y)
        assert value.dtype == grads[0].dtype == jnp.float64
        assert grads[1].dtype == jnp.bfloat16
        assert_close(value, term.sum(-1), 1e-14)
        assert_close(grads[0], dx, 1e-14)
        assert_close(grads[1], dy, 1e-2)

        x, y = x.astype(jnp.float16), y.astype(jnp.float32)
        assert f(x, y).dtype == jnp.float32


@mostly_one
def test_inputs_broadcast(rng, name):
    x, y = draw(rng, name, (300, 3, 5), "bfloat16")
    x, y = x[:, :1], y[0]
    g = rng.uniform(0.5, 1.5, size=(300, 3))
    value, (dx, dy) = value_and_vjp(name, (x, y), g)
    x_, y_ = (np.broadcast_to(a, (300, 3, 5)) for a in (x, y))
    term, dx_, dy_ = oracle(name, x_, y_)
    assert_close(value, term.sum(-1), VALUE_TOL)
    assert_close(dx, (g[..., None] * dx_).sum(1, keepdims=True), 1e-2)
    # The sum over 300 rows is in float32, and is rounded to bfloat16 once.
    assert_close(dy, (g[..., None] * dy_).sum(0), 2**-8)


@pytest.mark.parametrize(
    "axis", [1, None, *rarely(0, -1, -3, ((0, 2),), ((-1, 0),), ((2, 1, 0),), ((),))]
)
@pytest.mark.parametrize("name", PLAIN)
def test_axis(rng, name, axis):
    x, y = draw(rng, name, (3, 4, 5))
    axes = (0, 1, 2) if axis is None else axis
    term, dx, dy = oracle(name, x, y)
    term = term.sum(axes)
    g = rng.normal(size=term.shape)
    value, grads = value_and_vjp(name, (x, y), g, axis)
    assert value.shape == term.shape
    assert_close(value, term, VALUE_TOL)
    for actual, slope in zip(grads, (dx, dy), strict=True):
        assert_close(actual, np.expand_dims(g, axes) * slope, GRAD_TOL)
    numpy_axis = np.int32(1)
    np.testing.assert_array_equal(
        getattr(losses, name)(x, y, axis=numpy_axis),
        getattr(losses, name)(jnp.moveaxis(x, 1, -1), jnp.moveaxis(y, 1, -1)),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", PLAIN)
def test_where_is_slicing_whatever_the_dropped_hold(rng, name, bad):
    x, y = draw(rng, name, (2, 9))
    keep = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1], bool)
    g = rng.normal(size=2)
    value_, grads_ = value_and_vjp(name, (x[:, keep], y[:, keep]), g)
    x, y = (a.at[:, ~keep].set(bad) for a in (x, y))
    value, grads = value_and_vjp(name, (x, y), g, where=keep)
    assert_close(value, value_, VALUE_TOL)
    np.testing.assert_array_equal(value, getattr(losses, name)(x, y, where=keep))
    for actual, expected in zip(grads, grads_, strict=True):
        assert_close(actual[:, keep], expected, GRAD_TOL)
        np.testing.assert_array_equal(actual[:, ~keep], 0)


@mostly_one
def test_where_broadcasts(rng, name):
    f = getattr(losses, name)
    x, y = draw(rng, name, (4, 3))
    rows, columns = np.array([[1], [0], [0], [1]], bool), np.array([0, 1, 1], bool)
    term = oracle(name, x, y)[0]
    assert_close(f(x, y, where=rows), (term * rows).sum(-1), VALUE_TOL)
    assert_close(f(x, y, -1, columns), (term * columns).sum(-1), VALUE_TOL)
    assert_close(f(x, y, 0, columns), (term * columns).sum(0), VALUE_TOL)
    assert_close(f(x, y, where=True), term.sum(-1), VALUE_TOL)
    # An axis of size 1 grows to the size of `where`, as in optax.
    term = oracle(name, x[:1], y[:1])[0]
    assert_close(f(x[:1], y[:1], where=rows), (term * rows).sum(-1), VALUE_TOL)


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_left_is_zero_with_zero_gradient(name):
    nan = jnp.full((3, 4), jnp.nan)
    where = np.zeros((3, 4), bool)
    value, grads = value_and_vjp(name, (nan, nan), np.ones(3), where=where)
    for actual in (value, *grads):
        np.testing.assert_array_equal(actual, np.zeros(actual.shape))


INF, NAN = np.inf, np.nan
E2, E5 = np.exp(-2.0), np.exp(-0.5)
SINGULAR = [
    # log prediction, target, value, d log prediction, d target
    ("kl_divergence", -2, 0, 0, 0, 0),
    ("kl_divergence", -INF, 0, 0, 0, 0),
    ("kl_divergence", 0, 1, 0, -1, 1),
    ("kl_divergence", -INF, 0.5, INF, -0.5, INF),
    ("kl_divergence", -1e4, 0.5, 5e3 + np.log(0.5) / 2, -0.5, 1e4 + 1 + np.log(0.5)),
    ("kl_divergence", NAN, 0, NAN, 0, 0),
    ("kl_divergence", -2, NAN, NAN, NAN, NAN),
    ("kl_divergence", -2, -0.5, NAN, 0.5, NAN),
    ("kl_divergence_with_log_targets", -2, -INF, 0, 0, 0),
    ("kl_divergence_with_log_targets", -INF, -INF, 0, 0, 0),
    ("kl_divergence_with_log_targets", -2, -1e4, 0, 0, 0),
    ("kl_divergence_with_log_targets", -INF, -1e4, 0, 0, 0),
    ("kl_divergence_with_log_targets", 0, 0, 0, -1, 1),
    ("kl_divergence_with_log_targets", -INF, -0.5, INF, -E5, INF),
    ("kl_divergence_with_log_targets", -1e4, 0, 1e4, -1, 1e4 + 1),
    ("kl_divergence_with_log_targets", NAN, -INF, NAN, 0, NAN),
    ("kl_divergence_with_log_targets", -2, NAN, NAN, NAN, NAN),
    ("generalized_kl_divergence", -2, 0, E2, E2, 0),
    ("generalized_kl_divergence", -0.5, 0, E5, E5, 0),
    ("generalized_kl_divergence", -INF, 0, 0, 0, 0),
    ("generalized_kl_divergence", 0, 1, 0, 0, 0),
    ("generalized_kl_divergence", -INF, 0.5, INF, -0.5, INF),
    ("generalized_kl_divergence", -1e4, 1, 1e4 - 1, -1, 1e4),
    ("generalized_kl_divergence", NAN, 0, NAN, NAN, 0),
    ("generalized_kl_divergence", -2, NAN, NAN, NAN, NAN),
]


@pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16", "float16")])
@pytest.mark.parametrize("name, x, y, value, dx, dy", SINGULAR)
def test_singular_points(name, x, y, value, dx, dy, dtype):
    # The ordinary element beside it must stay as it is.
    args = jnp.array([x, -1], dtype), jnp.array([y, 0.25], dtype)
    f = getattr(losses, name)
    term, dx_, dy_ = oracle(name, -1.0, 0.25)
    expected = value + term, [dx, dx_], [dy, dy_]
    tol = TOLERANCE[dtype][1]
    value, grads = value_and_vjp(name, args, np.ones(()))
    for a, e in zip((value, *grads), expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, float), e, rtol=tol, atol=tol)
    # The gradient to one input must not meet the other's infinite slope.
    if dtype == "float32":
        for i in (0, 1):
            np.testing.assert_array_equal(jax.grad(f, i)(*args), grads[i])
        ones = jnp.ones(2)
        tangent = jax.jvp(lambda x: f(x, args[1]), (args[0],), (ones,))[1]
        np.testing.assert_allclose(tangent, jnp.sum(grads[0]), rtol=1e-6)
        tangent = jax.jvp(lambda y: f(args[0], y), (args[1],), (ones,))[1]
        np.testing.assert_allclose(tangent, jnp.sum(grads[1]), rtol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("far", [1, -1])
@pytest.mark.parametrize(
    "name, zero, one",
    [
        ("kl_divergence", 0, 1),
        ("kl_divergence_with_log_targets", -INF, 0),
        ("kl_divergence_with_log_targets", -3e4, 0),
    ],
)
def test_zero_times_the_largest_prediction(name, zero, one, far, dtype):
    x = jnp.array([far * float(jnp.finfo(dtype).max), -1], dtype)
    y = jnp.array([zero, one], dtype)
    value, grads = value_and_vjp(name, (x, y), np.ones(()))
    assert value == 1
    np.testing.assert_array_equal(np.asarray(grads, float), [[0, -1], [0, 2]])


@pytest.mark.parametrize("name", PLAIN)
def test_derivatives_at_singular_points_are_not_nan(name):
    log_zero = name == "kl_divergence_with_log_targets"
    x = jnp.array([-1.0, -jnp.inf, -2.0, -5.0])
    y = jnp.array([-jnp.inf, -jnp.inf, -1.0, -200.0]) if log_zero else x.at[:].set(0.0)
    f = getattr(losses, name)

    @jax.jit
    def derivatives(x, y):
        first = jax.grad(f, (0, 1))(x, y)
        return first, jax.hessian(f, (0, 1))(x, y), jax.jacrev(jax.jacrev(f))(x, y)

    chex.assert_tree_all_finite(derivatives(x, y))
    _, tangent = jax.jvp(f, (x, y), (jnp.ones(4), jnp.ones(4)))
    term, dx, dy = oracle(name, x, y)
    assert_close(tangent, dx.sum() + dy.sum(), GRAD_TOL)


def test_generalized_does_not_cancel(rng):
    # With predictions and targets 1e-4 apart, the plain formula is all rounding.
    y = rng.dirichlet(np.ones(1000)).astype(np.float32)
    x = (np.log(y) * (1 + 1e-4 * rng.normal(size=1000))).astype(np.float32)
    r = x.astype(np.longdouble) - np.log(y.astype(np.longdouble))
    expected = np.sum(y * (np.expm1(r) - r))
    assert 1e-9 < expected < 1e-6
    plain = np.sum(y * (np.log(y) - x) - y + np.exp(x))
    assert abs(plain - expected) > 0.1 * expected
    value, (dx, _) = jax.value_and_grad(losses.generalized_kl_divergence, (0, 1))(x, y)
    # The rounding of log t is left: |log t| ε in r.
    assert_close(value, expected, 1e-3)
    assert_close(dx, y * np.expm1(r), 1e-3)


def test_generalized_is_never_negative_and_zero_at_equality(rng):
    x = jnp.asarray(rng.normal(size=(50, 40)), jnp.float32)
    y = jnp.exp(x) * (1 + jnp.asarray(1e-7 * rng.normal(size=x.shape), jnp.float32))
    assert (losses.generalized_kl_divergence(x, y, axis=()) >= 0).all()
    zero = jnp.zeros((1,))
    value, grads = jax.value_and_grad(
        lambda *args: losses.generalized_kl_divergence(*args).sum(), (0, 1)
    )(zero, zero + 1)
    assert value == grads[0] == grads[1] == 0


@pytest.mark.parametrize("dtype, tol", [("float32", 1e-6), ("float64", 2e-15)])
def test_generalized_is_accurate_on_both_sides_of_the_series(dtype, tol):
    # r goes from -3 to 3 through the switch at |r| = 1; each term is on its own.
    with jax.enable_x64(True):
        x = jnp.asarray([-3, -1.01, -0.99, -0.5, -0.01, 0.3, 0.99, 1.01, 3], dtype)
        y = jnp.ones_like(x)
        grad = jax.vmap(jax.grad(losses.generalized_kl_divergence), (0, 0))
        value = losses.generalized_kl_divergence(x, y, axis=())
        slope = grad(x[:, None], y[:, None])[:, 0]
    r = np.asarray(x, np.longdouble)
    np.testing.assert_allclose(value, np.expm1(r) - r, rtol=3 * tol)
    np.testing.assert_allclose(slope, np.expm1(r), rtol=tol)


def test_generalized_second_derivative_where_the_ratio_overflows():
    # q = e^40 is within float32's range, and q / t = e^100 is not.
    x, y = jnp.array([40.0]), jnp.exp(jnp.array([-60.0]))
    second = jax.jacrev(jax.jacrev(losses.generalized_kl_divergence))(x, y)
    np.testing.assert_allclose(second, [[np.exp(40.0)]], rtol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_hessian(rng, name):
    x, y = draw(rng, name, (5,))
    t = np.exp(y) if name == "kl_divergence_with_log_targets" else np.asarray(y)
    if name == "kl_divergence_with_log_targets":
        xx, xy, yy = 0 * t, -t, t * (y - x + 2)
    else:
        q = np.exp(x) * (name == "generalized_kl_divergence")
        xx, xy, yy = q, -np.ones(5), 1 / t
    f, args = getattr(losses, name), (0, 1)
    hessians = [
        jax.hessian(f, args),
        jax.jacrev(jax.jacrev(f, args), args),
        jax.jacfwd(jax.jacfwd(f, args), args),
        jax.jacrev(jax.jacfwd(f, args), args),
    ]
    for (xx_, xy_), (yx_, yy_) in jax.jit(lambda *a: [h(*a) for h in hessians])(x, y):
        for actual, expected in ((xx_, xx), (xy_, xy), (yx_, xy), (yy_, yy)):
            assert_close(actual, np.diag(expected), GRAD_TOL)


@mostly_one
def test_check_grads(rng, name):
    f = getattr(losses, name)
    where = rng.random((3, 7)) < 0.7
    with jax.enable_x64(True):
        args = draw(rng, name, (3, 7), "float64")
        masked = jax.jit(lambda x, y: f(x, y, 0, where))
        check_grads(masked, args, order=1, modes=["fwd", "rev"])


def test_a_second_call_compiles_nothing(rng):
    x, y = draw(rng, "kl_divergence", (2, 31))
    losses.kl_divergence(x, y)
    size = elementwise._sum._cache_size()
    losses.kl_divergence(x + 1, y, axis=1)
    assert elementwise._sum._cache_size() == size
    losses.kl_divergence(x, y, axis=0)
    assert elementwise._sum._cache_size() == size + 1


elements = st.one_of(
    st.floats(-4, 4, width=32), st.sampled_from([-INF, -1e4, -60.0, 0.0, 50.0])
)


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.slow
def test_property_any_input(name, data):
    # There is one shape, and so one compilation: only the numbers differ.
    draw_array = lambda s: np.array(data.draw(st.lists(s, min_size=12, max_size=12)))
    x = np.asarray(draw_array(elements).reshape(2, 6), np.float32)
    y = np.asarray(draw_array(elements).reshape(2, 6), np.float32)
    where = draw_array(st.booleans()).reshape(2, 6)
    if name != "kl_divergence_with_log_targets":
        y = np.exp(np.minimum(y, 4))
    term, dx, dy = oracle(name, x, y)
    value, grads = value_and_vjp(name, (x, y), np.ones(2), where=where)
    total = np.sum(np.where(where, term, 0), -1)
    np.testing.assert_allclose(value, total, rtol=1e-5, atol=1e-5)
    for actual, slope in zip(grads, (dx, dy), strict=True):
        expected = np.where(where, slope, 0)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    if name == "generalized_kl_divergence":
        assert (value >= 0).all()


ERRORS = [
    (dict(x=jnp.ones(3, int)), TypeError, "`log_predictions` must be float.*int32"),
    (dict(y=np.ones(3, bool)), TypeError, "`.*targets` must be floating.point.*bool"),
    (dict(x=np.ones(3, complex)), TypeError, "`log_predictions` must.*complex64"),
    (dict(x=jnp.ones((2, 4))), ValueError, r"`log_pred.* and `.*targets`.*\(2, 4\).*3"),
    (dict(where=np.ones(3)), TypeError, "`where` must be bool, got float32"),
    (dict(where=np.ones(3, int)), TypeError, "`where` must be bool, got int32"),
    (dict(where=np.ones(4, bool)), ValueError, r"`where` must.*\(3,\), got \(4,\)"),
    (dict(where=np.ones((2, 3), bool)), ValueError, r"`where` .*\(3,\), got \(2, 3\)"),
    (dict(axis=1), ValueError, r"`axis` must be in \[-1, 1\) for 1 dimensions, got 1"),
    (dict(axis=(0, -2)), ValueError, r"`axis` must be in .* got \(0, -2\)"),
    (dict(axis=(0, -1)), ValueError, r"`axis` must not repeat an axis, got \(0, -1\)"),
    (dict(axis=1.0), TypeError, r"`axis` must be an int, .* got 1.0"),
    (dict(axis="0"), TypeError, r"`axis` must be an int, .* got '0'"),
    (dict(axis=[0]), TypeError, r"`axis` must be an int, .* got \[0\]"),
    (dict(x=0.5, y=0.5), ValueError, r"`axis` must be in \[-0, 0\) for 0 dim"),
]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("kwargs, error, match", ERRORS)
def test_bad_arguments(name, kwargs, error, match):
    kwargs = dict(x=jnp.zeros(3), y=jnp.ones(3)) | kwargs
    x, y = kwargs.pop("x"), kwargs.pop("y")
    with pytest.raises(error, match=match):
        getattr(losses, name)(x, y, **kwargs)
