"""The losses of `jaxkl.losses`: one registry, and a test for each property."""

import functools as ft
import inspect
import itertools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.special import xlogy

import jaxkl
from jaxkl import losses
from jaxkl._math import elementwise

from . import oracle
from .cases import CATALOGUE, rarely
from .helpers import assert_close, TOLERANCE


LOG = "kl_divergence_with_log_targets"
PLAIN = ["kl_divergence", LOG, "generalized_kl_divergence"]
GRAD_TOL = TOLERANCE["float32"][1]
# Of gradients, which are rounded once, to the largest entry.
GRAD_TOLS = dict(float16=1e-3, bfloat16=2**-8, float32=GRAD_TOL, float64=1e-14)


def terms(name, x, y):
    """Terms of a loss and their slopes, in float64, from the formulas."""
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    with np.errstate(divide="ignore", invalid="ignore"):
        t, log_t = (np.exp(y), y) if name == LOG else (y, np.log(y))
        term = xlogy(t, t) - np.where(t > 0, t * x, 0)
        dx = -t
        if name == LOG:
            dy = np.where(t > 0, t * (log_t + 1 - x), 0)
        elif name == "kl_divergence":
            dy = np.where(t > 0, log_t + 1 - x, 0)
        else:
            term, dx = term - t + np.exp(x), dx + np.exp(x)
            dy = np.where(t > 0, log_t - x, 0)
    return term, dx, dy


def hellinger(log_p, log_q):
    # The last term would make a removed class, at log 0, NaN in value and slope.
    return (jnp.exp(log_p / 2) - jnp.exp(log_q / 2)) ** 2 + 0 * log_p * log_q


def exact_hellinger(log_p, log_q):
    p, q = np.exp(log_p / 2), np.exp(log_q / 2)
    return (p - q) ** 2, (p - q) * p, (q - p) * q


class Loss(NamedTuple):
    f: Callable
    row: Callable  # the value of a row in float64, and the slopes by `x` and `y`


def _plain(name):
    def row(x, y):
        term, *slopes = terms(name, x, y)
        return term.sum(), *slopes

    return Loss(getattr(losses, name), row)


def _softmax(f, reference):
    def row(x, y):
        options = dict(divergence=reference, temperature=2.0, t_squared=False)
        found = oracle.distillation_loss(x, y, **options, reduction="none")
        return found.loss, found.student, found.teacher

    return Loss(ft.partial(f, temperature=2.0), row)


def _divergence(mine, theirs):
    return _softmax(ft.partial(losses.softmax_divergence, divergence=mine), theirs)


LOSSES = {name: _plain(name) for name in PLAIN} | {
    "softmax_kl": _softmax(losses.softmax_kl_divergence, oracle.forward_kl),
    "hellinger": _divergence(hellinger, exact_hellinger),
    "reverse": _divergence(*CATALOGUE["reverse"]),
    "js": _divergence(*CATALOGUE["js"]),
}


def over_losses(*quick, slow=tuple(LOSSES)):
    """Parametrises a test over losses; those that are not `quick` are slow."""
    others = rarely(*(name for name in slow if name not in quick))
    return pytest.mark.parametrize("name", [*quick, *others])


mostly_one = over_losses(PLAIN[0], slow=PLAIN)


def draw(rng, name, shape, *dtypes):
    """Inputs of order 1, which are not normalised."""
    x, y = rng.normal(size=shape), rng.normal(size=shape)
    y = np.exp(y) if name in PLAIN and name != LOG else y
    dtypes = dtypes or ("float32",)
    return jnp.asarray(x, dtypes[0]), jnp.asarray(y, dtypes[-1])


@ft.partial(jax.jit, static_argnames=("name", "axis"))
def value_and_vjp(name, args, g, axis=-1, where=None):
    f = lambda *args: LOSSES[name].f(*args, axis=axis, where=where)
    value, vjp = jax.vjp(f, *args)
    return value, vjp(g.astype(value.dtype))


def expected(name, args, g, axis=-1, where=True):
    """Value and gradients of what `where` keeps, a row at a time."""
    shape = np.broadcast_shapes(*map(np.shape, (*args, where)))
    every = range(len(shape))
    axes = [every[i] for i in (every if axis is None else np.atleast_1d(axis))]
    rest = [i for i in every if i not in axes]
    order, batch = [*rest, *axes], [shape[i] for i in rest]
    moved = lambda a: np.broadcast_to(a, shape).transpose(order)
    x, y, keep = (moved(np.asarray(a)) for a in (*args, where))
    value, slopes = np.zeros(batch), np.zeros((2, *x.shape))
    for i in np.ndindex(*batch):
        if keep[i].any():
            value[i], *found = LOSSES[name].row(x[i][keep[i]], y[i][keep[i]])
            for slope, d in zip(slopes, found, strict=True):
                slope[(*i, keep[i])] = d
    g = np.expand_dims(g, axes)
    slopes = [g * d.transpose(np.argsort(order)) for d in slopes]
    return value, [unbroadcast(d, a.shape) for d, a in zip(slopes, args, strict=True)]


def unbroadcast(d, shape):
    d = d.sum(tuple(range(d.ndim - len(shape))))
    return d.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


def check(rng, name, args, axis=-1, where=None):
    """Compares value and gradients with the oracle's, and returns them.

    In half precision the inputs are rounded, but the loss is not. The oracle gets 1 for
    what is dropped, the gradient to which must be exactly 0.
    """
    keep = True if where is None else where
    f = ft.partial(LOSSES[name].f, axis=axis, where=where)
    g = rng.normal(size=jax.eval_shape(f, *args).shape)
    value, grads = value_and_vjp(name, args, g, axis, where)
    values, slopes = expected(name, args, g, axis, keep)
    double = any(a.dtype == jnp.float64 for a in args)
    assert value.dtype == (jnp.float64 if double else jnp.float32)
    assert value.shape == g.shape
    tol = (1e-14 if double else 1e-6) * (1 if name in PLAIN else 3)
    assert_close(value, values, tol, "value")
    for a, actual, slope in zip(args, grads, slopes, strict=True):
        assert actual.dtype == a.dtype and actual.shape == a.shape
        assert_close(actual, slope, GRAD_TOLS[str(a.dtype)], "gradient")
        if a.shape == np.shape(where):
            np.testing.assert_array_equal(actual[~where], 0)
    return value, grads


@pytest.mark.parametrize(
    "shape, dtype",
    [((3, 5, 11), "bfloat16"), ((7, 129), "float32")]
    + rarely(((3, 5, 11), "float16"), ((1, 1), "float32"), ((6,), "float32")),
)
@over_losses(*PLAIN, "softmax_kl")
def test_values_and_gradients(rng, name, shape, dtype):
    check(rng, name, draw(rng, name, shape, dtype))


@over_losses(PLAIN[0], "softmax_kl")
@pytest.mark.parametrize(
    "dtypes", [("float64", "bfloat16"), ("float64",), ("float16", "float32")]
)
def test_float64_in_one_input_makes_the_loss_float64(rng, name, dtypes):
    with jax.enable_x64(True):
        check(rng, name, draw(rng, name, (3, 7), *dtypes))


@over_losses(PLAIN[0], "softmax_kl")
def test_inputs_broadcast(rng, name):
    """The sum over 300 rows is in float32, and is rounded to bfloat16 once."""
    x, y = draw(rng, name, (300, 3, 5), "bfloat16")
    check(rng, name, (x[:, :1], y[0]))


@pytest.mark.parametrize(
    "axis", [1, None, *rarely(0, -3, ((0, 2),), ((-1, 0),), ((2, 1, 0),), ((),))]
)
@over_losses(*PLAIN, "hellinger")
def test_where_is_slicing_along_any_axis(rng, name, axis):
    """Whatever the dropped hold."""
    where = rng.random((3, 4, 5)) < 0.6
    # Some row has nothing left, whichever the axis is.
    where[0], where[:, 1], where[:, :, 2] = False, False, False
    args = draw(rng, name, where.shape)
    for junk in (np.nan, np.inf, -np.inf, 0.0):
        args = [jnp.where(where, a, junk) for a in args]
        value, _ = check(rng, name, args, axis, where)
        if name in PLAIN:
            plain = LOSSES[name].f(*args, axis, where)
            np.testing.assert_array_equal(value, plain)


@over_losses(PLAIN[0], "softmax_kl")
def test_where_broadcasts(rng, name):
    args = draw(rng, name, (4, 3))
    rows, columns = np.array([[1], [0], [0], [1]], bool), np.array([0, 1, 1], bool)
    true = np.array(True)
    for where, axis in ((rows, -1), (columns, -1), (columns, 0), (true, np.int32(1))):
        check(rng, name, args, axis, where)
    # An axis of size 1 grows to the size of `where`, as in optax.
    check(rng, name, [a[:1] for a in args], where=rows)


@over_losses(*PLAIN, "softmax_kl")
def test_nothing_left_is_zero_with_zero_gradient(name):
    for shape, where in (((3, 4), np.zeros((3, 4), bool)), ((3, 0), None)):
        nan = jnp.full(shape, jnp.nan, "bfloat16")
        value, grads = value_and_vjp(name, (nan, nan), np.ones(3), where=where)
        np.testing.assert_array_equal(value, np.zeros(3, np.float32), strict=True)
        np.testing.assert_array_equal(grads, np.zeros((2, *shape)))


@pytest.mark.parametrize("shape", [(4,), *rarely(((),))])
def test_temperature(rng, shape):
    """Of each row, or of all, with its gradient."""
    args = draw(rng, "softmax_kl", (3, 4, 5))
    temperature = jnp.asarray(rng.uniform(0.5, 4, size=shape), jnp.float32)
    g = rng.normal(size=4).astype(np.float32)

    @jax.jit
    def run(*args):
        f = lambda x, y, t: losses.softmax_kl_divergence(x, y, (-1, 0), temperature=t)
        value, vjp = jax.vjp(f, *args)
        return value, *vjp(g)

    rows = [np.swapaxes(x, 0, 1).reshape(4, 15) for x in args]
    options = dict(t_squared=False, reduction="none", cotangent=g)
    found = oracle.distillation_loss(*rows, temperature=temperature, **options)
    value, *grads, slope = run(*args, temperature)
    assert_close(value, found.loss, 3e-6)
    for d, want in zip(grads, (found.student, found.teacher), strict=True):
        assert_close(d, want.reshape(4, 3, 5).swapaxes(0, 1), GRAD_TOL)
    assert_close(slope, found.temperature, 3 * GRAD_TOL)


INF, NAN = np.inf, np.nan
E2, E5, E25 = np.exp([-2, -0.5, -0.25])
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
    (LOG, -2, -INF, 0, 0, 0),
    (LOG, -INF, -INF, 0, 0, 0),
    (LOG, -2, -1e4, 0, 0, 0),
    (LOG, -INF, -1e4, 0, 0, 0),
    (LOG, 0, 0, 0, -1, 1),
    (LOG, -INF, -0.5, INF, -E5, INF),
    (LOG, -1e4, 0, 1e4, -1, 1e4 + 1),
    (LOG, NAN, -INF, NAN, 0, NAN),
    (LOG, -2, NAN, NAN, NAN, NAN),
    ("generalized_kl_divergence", -2, 0, E2, E2, 0),
    # Beside a target of 1 this term would be a series.
    ("generalized_kl_divergence", -0.25, 0, E25, E25, 0),
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
    f = LOSSES[name].f
    term, dx_, dy_ = terms(name, -1.0, 0.25)
    tol = TOLERANCE[dtype][1]
    found, grads = value_and_vjp(name, args, np.ones(()))
    for a, e in ((found, value + term), (grads, [[dx, dx_], [dy, dy_]])):
        np.testing.assert_allclose(np.asarray(a, float), e, rtol=tol, atol=tol)
    # The gradient to one input must not meet the other's infinite slope.
    for i in (0, 1) if dtype == "float32" else ():
        np.testing.assert_array_equal(jax.grad(f, i)(*args), grads[i])
        of_one = lambda x: f(*(x if i == j else a for j, a in enumerate(args)))  # noqa: B023
        tangent = jax.jvp(of_one, (args[i],), (jnp.ones(2),))[1]
        np.testing.assert_allclose(tangent, jnp.sum(grads[i]), rtol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("far", [1, -1])
@pytest.mark.parametrize(
    "name, zero, one", [("kl_divergence", 0, 1), (LOG, -INF, 0), (LOG, -3e4, 0)]
)
def test_zero_times_the_largest_prediction(name, zero, one, far, dtype):
    x = jnp.array([far * float(jnp.finfo(dtype).max), -1], dtype)
    y = jnp.array([zero, one], dtype)
    value, grads = value_and_vjp(name, (x, y), np.ones(()))
    assert value == 1
    np.testing.assert_array_equal(np.asarray(grads, float), [[0, -1], [0, 2]])


@pytest.mark.parametrize("name", PLAIN)
def test_derivatives_at_singular_points_are_not_nan(name):
    x = jnp.array([-1.0, -jnp.inf, -2.0, -5.0])
    y = jnp.array([-jnp.inf, -jnp.inf, -1.0, -200.0]) if name == LOG else jnp.zeros(4)
    f = LOSSES[name].f

    @jax.jit
    def derivatives(x, y):
        first = jax.grad(f, (0, 1))(x, y)
        tangent = jax.jvp(f, (x, y), (jnp.ones(4), jnp.ones(4)))[1]
        second = jax.hessian(f, (0, 1))(x, y), jax.jacrev(jax.jacrev(f))(x, y)
        return tangent, first, second

    tangent, *others = derivatives(x, y)
    chex.assert_tree_all_finite(others)
    _, dx, dy = terms(name, x, y)
    assert_close(tangent, dx.sum() + dy.sum(), GRAD_TOL)


def test_generalized_does_not_cancel(rng):
    # With predictions and targets 1e-4 apart, the plain formula is all rounding.
    y = rng.dirichlet(np.ones(1000)).astype(np.float32)
    x = (np.log(y) * (1 + 1e-4 * rng.normal(size=1000))).astype(np.float32)
    r = x.astype(np.longdouble) - np.log(y.astype(np.longdouble))
    wanted = np.sum(y * (np.expm1(r) - r))
    assert 1e-9 < wanted < 1e-6
    plain = np.sum(y * (np.log(y) - x) - y + np.exp(x))
    assert abs(plain - wanted) > 0.1 * wanted
    value, (dx, _) = jax.value_and_grad(losses.generalized_kl_divergence, (0, 1))(x, y)
    # The rounding of log t is left: |log t| ε in r.
    assert_close(value, wanted, 1e-3)
    assert_close(dx, y * np.expm1(r), 1e-3)


def test_generalized_is_never_negative(rng):
    x = rng.normal(size=(50, 40)).astype(np.float32)
    y = np.exp(x) * (1 + np.float32(1e-7) * rng.normal(size=x.shape).astype("float32"))
    assert (losses.generalized_kl_divergence(x, y, axis=()) >= 0).all()


@pytest.mark.parametrize("dtype, tol", [("float32", 1e-6), ("float64", 2e-15)])
def test_generalized_is_accurate_on_both_sides_of_the_series(dtype, tol):
    # r goes from -3 to 3 through the switch at |r| = 0.5; each term is on its own.
    with jax.enable_x64(True):
        x = jnp.asarray([-3, -0.51, -0.49, -0.2, -0.01, 0.3, 0.49, 0.51, 3], dtype)
        args = x, jnp.ones_like(x)
        name = "generalized_kl_divergence"
        value, (slope, _) = value_and_vjp(name, args, np.ones(9), axis=())
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
    """In both modes, of what is kept."""
    x, y = draw(rng, name, (5,))
    keep = np.array([1, 1, 0, 1, 1], bool)
    if name == LOG:
        t = np.exp(y)
        second = 0 * t, -t, t * (y - x + 2)
    else:
        q = np.exp(x) * (name == "generalized_kl_divergence")
        second = q, -np.ones(5), 1 / np.asarray(y)
    xx, xy, yy = (np.diag(keep * np.asarray(d)) for d in second)
    f, args = ft.partial(LOSSES[name].f, where=keep), (0, 1)
    modes = itertools.product((jax.jacfwd, jax.jacrev), repeat=2)
    run = lambda *xy: [outer(inner(f, args), args)(*xy) for inner, outer in modes]
    for hessian in jax.jit(run)(x, y):
        for actual, wanted in zip(
            jax.tree.leaves(hessian), (xx, xy, xy, yy), strict=True
        ):
            assert_close(actual, wanted, GRAD_TOL)


@pytest.mark.slow
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_second_order_of_softmax(rng, outer):
    """Against the textbook formula, which JAX differentiates."""
    where = np.array([[1], [0], [1]], bool)

    def naive(s, t, temperature):
        s, t = (jnp.where(where, x, -1e30) / temperature for x in (s, t))
        log_q, log_p = jax.nn.log_softmax(s, axis=0), jax.nn.log_softmax(t, axis=0)
        return jnp.sum(jnp.exp(log_p) * jnp.where(where, log_p - log_q, 0), axis=0)

    def mine(s, t, temperature):
        return losses.softmax_kl_divergence(s, t, 0, where, temperature=temperature)

    every = (0, 1, 2)
    sine = lambda f: lambda *args: jnp.sum(jnp.sin(f(*args)))
    hessian = lambda f: jax.jit(outer(jax.jacrev(sine(f), every), every))
    with jax.enable_x64(True):
        args = *draw(rng, "softmax_kl", (3, 2), "float64"), jnp.float64(2.0)
        actual, wanted = hessian(mine)(*args), hessian(naive)(*args)
        chex.assert_trees_all_close(actual, wanted, rtol=1e-9, atol=1e-12)


def test_a_callable_sees_the_kept_classes_only(rng):
    s, t = draw(rng, "hellinger", (2, 6))
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


def test_a_second_call_compiles_nothing(rng):
    x, y = draw(rng, "kl_divergence", (2, 31))
    losses.kl_divergence(x, y)
    size = elementwise._sum._cache_size()
    losses.kl_divergence(x + 1, y, axis=1)
    assert elementwise._sum._cache_size() == size
    losses.kl_divergence(x, y, axis=0)
    assert elementwise._sum._cache_size() == size + 1


@over_losses(slow=[*PLAIN, "softmax_kl"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_property_any_input(name, data):
    # There is one shape, and so one compilation: only the numbers differ.
    special = [-INF, -1e4, -60.0, 0.0, 50.0][name not in PLAIN :]
    number = st.one_of(st.floats(-4, 4, width=32), st.sampled_from(special))
    array = lambda s: np.reshape(
        data.draw(st.lists(s, min_size=12, max_size=12)), (2, 6)
    )
    x, y = (array(number).astype(np.float32) for _ in range(2))
    where = array(st.booleans())
    if name in PLAIN and name != LOG:
        y = np.exp(np.minimum(y, 4))
    values, slopes = expected(name, (x, y), np.ones(2), where=where)
    value, grads = value_and_vjp(name, (x, y), np.ones(2), where=where)
    # The rounding of log-probabilities has the size of the logits.
    size = 0 if name in PLAIN else 0.1 * np.abs([x, y]).max()
    np.testing.assert_allclose(value, values, rtol=1e-5, atol=1e-5 * (1 + size))
    np.testing.assert_allclose(grads, slopes, rtol=1e-4, atol=1e-5 * (1 + size))
    if name not in PLAIN[:2]:
        assert (value >= 0).all()


X = np.zeros((2, 3), np.float32)
MASK = X == 0
ERRORS = [
    (dict(x=X.astype(int)), TypeError, "`x` must be floating.point.*int32"),
    (dict(x=X + 0j), TypeError, "`x` must be floating.point.*complex64"),
    (dict(y=MASK), TypeError, "`y` must be floating.point.*bool"),
    (dict(y=X[:, :2]), ValueError, r"`x` and `y`.*\(2, 3\).*\(2, 2\)"),
    (dict(where=X), TypeError, "`where` must be bool, got float32"),
    (dict(where=X.astype(int)), TypeError, "`where` must be bool, got int32"),
    (dict(where=MASK[0, :2]), ValueError, r"`where` must.*\(2, 3\), got \(2,\)"),
    (dict(where=MASK[None]), ValueError, r"`where` .*\(2, 3\), got \(1, 2, 3\)"),
    (dict(axis=2), ValueError, r"`axis` must be in \[-2, 2\) for 2 dimensions, got 2"),
    (dict(axis=(0, -3)), ValueError, r"`axis` must be in .* got \(0, -3\)"),
    (dict(axis=(1, -1)), ValueError, r"`axis` must not repeat an axis, got \(1, -1\)"),
    (dict(axis=1.0), TypeError, r"`axis` must be an int, .* got 1.0"),
    (dict(axis="0"), TypeError, r"`axis` must be an int, .* got '0'"),
    (dict(axis=[0]), TypeError, r"`axis` must be an int, .* got \[0\]"),
    (dict(x=0.5, y=0.5), ValueError, r"`axis` must be in \[-0, 0\) for 0 dim"),
]
OF_LOGITS = [
    (dict(y=X[:, :1]), ValueError, r"`y` .*class.*\(2, 1\)"),
    (dict(x=X[0, 0]), ValueError, r"`x` .*class.*got \(\)"),
    (dict(temperature=0.0), ValueError, "`temperature` must be pos"),
    (dict(temperature=X), ValueError, "`temperature` must have"),
    (dict(temperature="1"), TypeError, "`temperature` must be"),
]


@pytest.mark.parametrize("name", [*PLAIN, "softmax_kl", "hellinger"])
def test_bad_arguments(name):
    f = LOSSES[name].f
    names = [f"`{parameter}`" for parameter in inspect.signature(f).parameters]
    for arguments, error, match in ERRORS + OF_LOGITS * (name not in PLAIN):
        match = match.replace("`x`", names[0]).replace("`y`", names[1])
        arguments = dict(x=X, y=X) | arguments
        with pytest.raises(error, match=match):
            f(arguments.pop("x"), arguments.pop("y"), **arguments)


@pytest.mark.parametrize(
    "divergence, error, match",
    [
        (jaxkl.ReverseKL, TypeError, r"must be an instance, such as ReverseKL\(\)"),
        ("kl", TypeError, "`divergence` must be callable, got 'kl'"),
        (lambda p, q: jnp.sum(p - q), ValueError, "`divergence` must be elementwise"),
    ],
)
def test_bad_divergence(divergence, error, match):
    for where in (None, MASK):
        with pytest.raises(error, match=match):
            losses.softmax_divergence(X, X, divergence, where=where)


def test_a_divergence_that_closes_over_a_traced_value_is_an_error():
    f = lambda a: losses.softmax_divergence(X, X, lambda p, q: a * p, where=MASK)
    with pytest.raises(ValueError, match="`divergence` must not close over traced"):
        jax.jit(f)(2.0)
