"""`kl_div` and `KLDivLoss` beside the installed PyTorch.

These tests add to the battery of `jaxkl parity`, which `test_parity.py` runs.
"""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl import reference

from .cases import rarely


with warnings.catch_warnings():
    # PyTorch uses what NumPy and Python have deprecated.
    warnings.simplefilter("ignore")
    import torch

inf, nan = float("inf"), float("nan")
DTYPES = ("float16", "bfloat16", "float32", "float64")
REDUCTIONS = ("none", "sum", "mean", "batchmean")
INPUTS = (-1.0, 0.0, inf, -inf, nan, 1.5)
TARGETS = (0.0, 1.0, 0.5, -0.5, inf, -inf, nan, 1e-25, 100.0, -0.0)
# One unit in the last place allows for one rounding at another place.
EPS = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-12}

torch_kl_div = torch.nn.functional.kl_div
both = pytest.mark.parametrize("log_target", [False, True])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not the KL|reduction: 'mean'|.*deprecated")
        warnings.filterwarnings("ignore", "size_average and reduce")
        yield


def to_torch(x, requires_grad=True):
    dtype = getattr(torch, jnp.asarray(x).dtype.name)
    x = torch.tensor(np.array(x, np.float64)).to(dtype)
    return x.requires_grad_(requires_grad)


def agree(actual, expected, tol=None, name=""):
    """Compares dtypes, shapes, NaN and infinities, and each number to `tol`."""
    dtype = str(expected.dtype).split(".")[1]
    assert actual.dtype.name == dtype, name
    assert actual.shape == tuple(expected.shape), name
    expected = expected.detach().double().numpy()
    # float16 overflows in PyTorch's intermediates and not in ours: no case does so.
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        expected,
        rtol=EPS[dtype] if tol is None else tol,
        atol=EPS[dtype]
        * np.max(np.abs(expected), initial=0, where=np.isfinite(expected))
        if tol is None
        else 0,
        err_msg=name,
    )


# -- Special values


@both
def test_special_values_of_the_reference(log_target):
    # It is documented to have NaN at cotangent 0 and a negative target.
    columns = np.array(list(itertools.product(INPUTS, TARGETS)), np.float32).T
    g = 1 + np.arange(len(columns[0]), dtype=np.float32) % 3
    options = dict(reduction="none", log_target=log_target)

    @jax.jit
    def run(x, t):
        value, pull = jax.vjp(functools.partial(reference.kl_div, **options), x, t)
        return value, *pull(g)

    x_, t_ = map(to_torch, columns)
    value_ = torch_kl_div(x_, t_, **options)
    expected = value_, *torch.autograd.grad(value_, (x_, t_), torch.tensor(g))
    for a, e in zip(run(*columns), expected, strict=True):
        agree(a, e, 1e-6)


@pytest.fixture
def flush_subnormals():
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype, tiny", [("float32", 5e-39), ("float64", 5e-310)])
def test_a_subnormal_target_is_0(flush_subnormals, dtype, tiny):
    """XLA flushes it to 0 on a CPU, and so does PyTorch with `set_flush_denormal`."""
    x = jnp.full(20, -1, dtype)
    t = torch.full((20,), tiny, dtype=getattr(torch, dtype), requires_grad=True)
    x_ = to_torch(x)
    value_ = torch_kl_div(x_, t, reduction="none")
    expected = value_, *torch.autograd.grad(value_, (x_, t), torch.ones_like(value_))
    f = functools.partial(jaxkl.kl_div, reduction="none")
    value, pull = jax.vjp(jax.jit(f), x, jnp.asarray(t.detach().numpy()))
    for a, e in zip((value, *pull(jnp.ones_like(x))), expected, strict=True):
        np.testing.assert_array_equal(a, e.detach().numpy())
        assert not np.any(np.nan_to_num(a))


# -- Shapes


@both
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    "shape, other",
    [((0, 3), (1, 3)), ((2,), ()), *rarely(((0, 3), (0, 3)), ((1,), (0,)), ((0,), ()))],
    ids=str,
)
def test_special_values_that_are_broadcast(shape, other, reduction, log_target):
    """A gradient may be a sum times NaN, a sum over nothing, or one that cancels."""
    f = functools.partial(jaxkl.kl_div, reduction=reduction, log_target=log_target)
    f_ = functools.partial(torch_kl_div, reduction=reduction, log_target=log_target)

    @jax.jit
    def run(x, t, g):
        pull = lambda x, t, g: jax.vjp(f, x, t)[1](g)
        grads, again = jax.vjp(pull, x, t, g)
        return f(x, t), *grads, *again(grads)

    for x, t in itertools.product((-1.0, inf, nan), TARGETS):
        x, t = jnp.full(shape, x, "float32"), jnp.full(other, t, "float32")
        value = jax.eval_shape(f, x, t)
        for ends in [(1, -1), (0, 0)]:
            g = jnp.linspace(*ends, value.size, dtype=x.dtype).reshape(value.shape)
            arrays_ = x_, t_, g_ = to_torch(x), to_torch(t), to_torch(g)
            value_ = f_(x_, t_)
            grads_ = torch.autograd.grad(value_, (x_, t_), g_, create_graph=True)
            second_ = torch.autograd.grad(
                grads_, arrays_, [d.detach() for d in grads_], allow_unused=True
            )
            second_ = [
                torch.zeros_like(x) if d is None else d
                for x, d in zip(arrays_, second_, strict=True)
            ]
            expected = value_, *grads_, *second_
            names = ("value", "d_x", "d_t", "d_xx", "d_tt", "d_g")
            for a, e, name in zip(run(x, t, g), expected, names, strict=True):
                agree(a, e, name=f"{name} at {ends}")


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "elementwise_mean", "foo"])
def test_module(reduction):
    """It keeps the options that PyTorch's keeps, and a wrong one until the call."""
    booleans = [None, True, False]
    for arguments in itertools.product(booleans, booleans, [reduction], booleans[1:]):
        loss, loss_ = jaxkl.KLDivLoss(*arguments), torch.nn.KLDivLoss(*arguments)
        assert (loss.reduction, loss.log_target) == (loss_.reduction, loss_.log_target)


@pytest.mark.parametrize("kl_div", [jaxkl.kl_div, reference.kl_div])
def test_a_0d_array_does_not_widen(kl_div):
    shapes = [((), ()), ((2,), ()), ((), (2,))]
    every = itertools.product(DTYPES, DTYPES, shapes, ["none", "sum"], [False, True])
    for *dtypes, (shape, other), reduction, log_target in every:
        x, t = jnp.full(shape, -1, dtypes[0]), jnp.full(other, 0.5, dtypes[1])
        options = dict(reduction=reduction, log_target=log_target)
        expected = torch_kl_div(to_torch(x), to_torch(t), **options).dtype
        actual = jax.eval_shape(functools.partial(kl_div, **options), x, t).dtype
        assert f"torch.{actual}" == str(expected), (dtypes, shape, other)


# -- Higher order, and forward mode


@both
def test_hessian_pattern_at_zero_probability(log_target):
    x = jnp.array([-1.0, -2.0, -0.5])
    t = jnp.array([0.3, 0.0, -inf if log_target else 0.5])
    f = lambda t: jaxkl.kl_div(x, t, reduction="sum", log_target=log_target)
    f_ = lambda t: torch_kl_div(to_torch(x), t, reduction="sum", log_target=log_target)
    expected = torch.autograd.functional.hessian(f_, to_torch(t))
    agree(jax.jacrev(jax.grad(f))(t), expected)
    assert expected.isnan().any()


@both
@pytest.mark.parametrize("reduction", ["none", *rarely(*REDUCTIONS[1:])])
def test_forward_mode_of_the_reference(rng, reduction, log_target):
    x, t = -rng.uniform(0.1, 3, size=(2, 3)), rng.uniform(0.1, 1, size=3)
    primals, tangents = (x, t), tuple(rng.normal(size=a.shape) for a in (x, t))
    options = dict(reduction=reduction, log_target=log_target)
    value_, slope_ = torch.func.jvp(
        functools.partial(torch_kl_div, **options),
        tuple(map(torch.tensor, primals)),
        tuple(map(torch.tensor, tangents)),
    )
    f = functools.partial(reference.kl_div, **options)

    @jax.jit
    def run(primals, tangents):
        linear = jax.linearize(f, *primals)[1]
        return *jax.jvp(f, primals, tangents), linear(*tangents)

    found = run(primals, tangents)
    for actual, expected in zip(found, (value_, slope_, slope_), strict=True):
        agree(actual, expected)
