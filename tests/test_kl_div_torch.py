"""`kl_div` and `KLDivLoss` beside the installed PyTorch.

These tests add sizes, special values of first order and every pair of dtypes to the
battery of `jaxkl parity`, which `test_parity.py` runs.
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
from .helpers import assert_close


with warnings.catch_warnings():
    # PyTorch uses what NumPy and Python have deprecated.
    warnings.simplefilter("ignore")
    import torch

inf, nan = float("inf"), float("nan")
DTYPES = ("float16", "bfloat16", "float32", "float64")
PAIRS = list(itertools.product(DTYPES, DTYPES))
SOME_PAIRS = [(x, x) for x in DTYPES] + [
    ("bfloat16", "float16"),
    ("float16", "float32"),
]
REDUCTIONS = ("none", "sum", "mean", "batchmean")
INPUTS = (-1.0, 0.0, inf, -inf, nan, 1.5)
TARGETS = (0.0, 1.0, 0.5, -0.5, inf, -inf, nan, 1e-25, 100.0, -0.0)
# One unit in the last place allows for one rounding at another place.
EPS = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-12}

torch_kl_div = torch.nn.functional.kl_div
both = pytest.mark.parametrize("log_target", [False, True])
every = pytest.mark.parametrize(
    "kl_div", [jaxkl.kl_div, reference.kl_div], ids=["jaxkl", "reference"]
)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not the KL|reduction: 'mean'|.*deprecated")
        warnings.filterwarnings("ignore", "size_average and reduce")
        yield


def to_jax(x):
    return jnp.asarray(x.detach().double().numpy(), str(x.dtype).split(".")[1])


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


def compare(kl_div, x, t, *, tol=None, **options):
    """Value and both gradients of JAX arrays `x`, `t`, at a cotangent that varies."""
    compare_all(kl_div, x, t, [options], tol)


def compare_all(kl_div, x, t, all_options, tol=None):
    def varying(value):
        return 1 + jnp.arange(value.size, dtype=value.dtype).reshape(value.shape) % 3

    @jax.jit  # one program for all, as compiling takes the time
    def run(x, t):
        results = []
        for options in all_options:
            value, pull = jax.vjp(functools.partial(kl_div, **options), x, t)
            results.append((value, *pull(varying(value))))
        return results

    for options, actual in zip(all_options, run(x, t), strict=True):
        x_, t_ = to_torch(x), to_torch(t)
        value_ = torch_kl_div(x_, t_, **options)
        g_ = to_torch(varying(actual[0]), False)
        expected = value_, *torch.autograd.grad(value_, (x_, t_), g_)
        for a, e, name in zip(
            actual, expected, ("", "d_input", "d_target"), strict=True
        ):
            agree(a, e, tol, f"{name} {options}")


@pytest.fixture
def arrays(rng):
    def make(shape, other, log_target, dtypes=("float32", "float32")):
        x = -rng.uniform(0.1, 3, size=shape)
        t = -rng.uniform(0.1, 3, size=other)
        return jnp.asarray(x, dtypes[0]), jnp.asarray(
            t if log_target else np.exp(t), dtypes[1]
        )

    return make


# -- Special values


def grid(dtype, *more):
    columns = np.array(list(itertools.product(INPUTS, TARGETS, *more)), np.float64).T
    return [jnp.asarray(c, dtype) for c in columns]


@both
def test_special_values_of_the_reference(log_target):
    x, t = grid("float32")
    # The reference is documented to have NaN at cotangent 0 and a negative target.
    compare(reference.kl_div, x, t, reduction="none", log_target=log_target, tol=1e-6)


@both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_second_order_special_values(dtype, log_target):
    # (input, target, g): g is the first cotangent, (c_x, c_t) are the gradients'.
    x, t, g = grid(dtype, [0.0, 1.0, -2.0, inf])
    f = lambda x, t: jaxkl.kl_div(x, t, reduction="none", log_target=log_target)
    x_, t_, g_ = map(to_torch, (x, t, g))
    value_ = torch_kl_div(x_, t_, reduction="none", log_target=log_target)
    grads_ = torch.autograd.grad(value_, (x_, t_), g_, create_graph=True)
    pull = jax.jit(
        lambda c: jax.vjp(lambda x, t, g: jax.vjp(f, x, t)[1](g), x, t, g)[1](c)
    )
    for c_x, c_t in itertools.product([0.0, 1.0], [0.0, 1.0, -3.0]):
        second = pull((jnp.full_like(x, c_x), jnp.full_like(t, c_t)))
        second_ = torch.autograd.grad(
            grads_,
            (x_, t_, g_),
            (torch.full_like(x_, c_x), torch.full_like(t_, c_t)),
            retain_graph=True,
            allow_unused=True,
        )
        for actual, expected, name in zip(second, second_, "xtg", strict=True):
            if expected is None:
                expected = torch.zeros_like(x_)
            if name == "g" and c_t == 0 and not log_target:
                # A linear rule cannot have this: PyTorch's 0 · log(-1) = 0.
                actual = jnp.where(t < 0, 0, actual)
                expected = torch.where(t_ < 0, 0, expected)
            agree(actual, expected, 1e-6, f"{name} at {c_x, c_t}")


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


# -- Shapes and reductions

SHAPES = [
    ((), ()),
    ((2, 3, 5), (2, 3, 5)),  # [B, T, V]: batchmean divides by B alone
    ((3,), (2, 3)),  # batchmean divides by 3, the size of the input
    ((2, 1), (1, 3)),
    ((2, 3), ()),
    ((0, 3), (0, 3)),
]
MORE_SHAPES = [
    ((4,), (4,)),
    ((2, 3), (2, 3)),
    ((2, 3), (3,)),
    ((), (2, 3)),
    ((0,), (0,)),
    ((2, 0), (2, 0)),
    ((1, 3), (0, 3)),
]


@pytest.mark.parametrize(
    "kl_div", [jaxkl.kl_div, *rarely(reference.kl_div)], ids=["jaxkl", "reference"]
)
@both
@pytest.mark.parametrize("shape, other", [*SHAPES, *rarely(*MORE_SHAPES)], ids=str)
def test_shapes_and_reductions(arrays, kl_div, shape, other, log_target):
    x, t = arrays(shape, other, log_target)
    every = [dict(reduction=r, log_target=log_target) for r in REDUCTIONS]
    compare_all(kl_div, x, t, every)


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


LEGACY = list(itertools.product([None, True, False], repeat=2))


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "elementwise_mean", "foo"])
@every
def test_legacy_arguments(arrays, kl_div, reduction):
    x, t = arrays((2, 3), (2, 3), False)
    x_, t_ = to_torch(x, False), to_torch(t, False)
    for size_average, reduce in LEGACY:
        arguments = (size_average, reduce, reduction)
        if reduction == "foo" and size_average is reduce is None:
            with pytest.raises(ValueError, match="foo"):
                kl_div(x, t, *arguments)
            with pytest.raises(ValueError, match="foo"):
                torch_kl_div(x_, t_, *arguments)
        else:
            agree(kl_div(x, t, *arguments), torch_kl_div(x_, t_, *arguments))


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "elementwise_mean", "foo"])
def test_module(arrays, reduction):
    x, t = arrays((2, 3), (2, 3), True)
    x_, t_ = to_torch(x, False), to_torch(t, False)
    for legacy, log_target in itertools.product(LEGACY, [False, True]):
        loss = jaxkl.KLDivLoss(*legacy, reduction, log_target)
        loss_ = torch.nn.KLDivLoss(*legacy, reduction, log_target)
        assert (loss.reduction, loss.log_target) == (loss_.reduction, loss_.log_target)
        if loss.reduction == "foo":  # PyTorch too raises only at the call
            with pytest.raises(ValueError, match="foo"):
                loss(x, t)
            with pytest.raises(ValueError, match="foo"):
                loss_(x_, t_)
        else:
            agree(loss(x, t), loss_(x_, t_))


def test_module_and_function_differ_in_the_same_place(arrays):
    x, t = arrays((2, 3), (2, 3), False)
    function = jaxkl.kl_div(x, t, False, reduction="batchmean")
    module = jaxkl.KLDivLoss(False, reduction="batchmean")(x, t)
    assert_close(module, 2 * function, 1e-6)


# -- Dtypes


@both
@pytest.mark.parametrize(
    "dtypes",
    [*SOME_PAIRS, *rarely(*((x,) for x in PAIRS if x not in SOME_PAIRS))],
    ids="-".join,
)
def test_dtypes(arrays, dtypes, log_target):
    x, t = arrays((2, 3), (2, 3), log_target, dtypes)
    tol = 4 * max(EPS[d] for d in dtypes)  # PyTorch rounds to the narrower dtype
    options = dict(reduction="none", log_target=log_target)

    @jax.jit
    def run(x, t):
        value, pull = jax.vjp(functools.partial(jaxkl.kl_div, **options), x, t)
        plain = reference.kl_div(x, t, **options)
        return plain, value, *pull(jnp.ones_like(value))

    plain, value, *grads = run(x, t)
    x_, t_ = to_torch(x), to_torch(t)
    value_ = torch_kl_div(x_, t_, **options)
    grads_ = torch.autograd.grad(value_, (x_, t_), torch.ones_like(value_))
    pairs = zip((value, *grads), (value_, *grads_), strict=True)
    for actual, expected in pairs:
        assert f"torch.{actual.dtype}" == str(expected.dtype)
        assert_close(actual, expected.detach().double(), tol)
    assert plain.dtype == value.dtype
    assert_close(plain, value, EPS[str(value.dtype)])


@every
@pytest.mark.parametrize("dtypes", PAIRS, ids="-".join)
def test_a_0d_array_does_not_widen(kl_div, dtypes):
    for shape, other in [((), ()), ((2,), ()), ((), (2,))]:
        x, t = jnp.full(shape, -1, dtypes[0]), jnp.full(other, 0.5, dtypes[1])
        for reduction, log_target in itertools.product(["none", "sum"], [False, True]):
            options = dict(reduction=reduction, log_target=log_target)
            expected = torch_kl_div(to_torch(x), to_torch(t), **options).dtype
            actual = jax.eval_shape(functools.partial(kl_div, **options), x, t).dtype
            assert f"torch.{actual}" == str(expected)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
@pytest.mark.parametrize("position", [0, 1])
def test_other_dtypes_are_errors(dtype, position):
    arguments = [jnp.ones(3), jnp.ones(3)]
    arguments[position] = jnp.ones(3, dtype)
    with pytest.raises(TypeError, match=("`input`", "`target`")[position]):
        jaxkl.kl_div(*arguments, reduction="sum")
    with pytest.raises(RuntimeError, match="not supported"):
        torch_kl_div(*(torch.tensor(np.asarray(a)) for a in arguments), reduction="sum")


@pytest.mark.parametrize("shapes", [((2, 3), (4, 3)), ((2, 3), (2,)), ((0,), (2,))])
def test_shapes_that_do_not_broadcast_are_errors(shapes):
    x, t = map(jnp.ones, shapes)
    with pytest.raises(ValueError, match="`input` and `target`"):
        jaxkl.kl_div(x, t, reduction="sum")
    with pytest.raises(RuntimeError, match="must match"):
        torch_kl_div(to_torch(x), to_torch(t), reduction="sum")


@both
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_half_precision_is_nearer_to_float64(rng, dtype, reduction, log_target):
    logits = torch.tensor(rng.normal(size=(4, 4096)))
    x = torch.log_softmax(
        logits + 0.05 * torch.tensor(rng.normal(size=logits.shape)), 1
    )
    t = torch.log_softmax(logits, 1)
    x, t = (
        x.to(getattr(torch, dtype)),
        (t if log_target else t.exp()).to(getattr(torch, dtype)),
    )
    options = dict(reduction=reduction, log_target=log_target)
    exact = torch_kl_div(x.double(), t.double(), **options).numpy()
    theirs = torch_kl_div(x, t, **options).double().numpy()
    ours = np.asarray(jaxkl.kl_div(to_jax(x), to_jax(t), **options), np.float64)
    error, their_error = (np.abs(x - exact).sum() for x in (ours, theirs))
    # One number might happen to round to the same.
    assert error < their_error if reduction == "none" else error <= their_error


# -- Warnings


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "elementwise_mean"])
def test_warnings_come_when_pytorch_warns(reduction):
    x, t = jnp.ones(3), torch.ones(3)

    def caught(f, *arguments):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            result = f(*arguments)
        return result, [w.category for w in record]

    for legacy in LEGACY:
        arguments = (*legacy, reduction)
        _, ours = caught(jaxkl.kl_div, x, x, *arguments)
        _, plain = caught(reference.kl_div, x, x, *arguments)
        _, theirs = caught(torch_kl_div, t, t, *arguments)
        assert ours == plain == theirs
        loss, ours = caught(jaxkl.KLDivLoss, *arguments)
        loss_, theirs = caught(torch.nn.KLDivLoss, *arguments)
        assert ours == theirs
        _, ours = caught(loss, x, x)
        _, theirs = caught(loss_, t, t)
        assert ours == theirs


# -- Higher order, and forward mode


@both
def test_hessian(arrays, log_target):
    x, t = arrays((2, 3), (1, 3), log_target, ("float64", "float64"))
    options = dict(reduction="batchmean", log_target=log_target)
    f = lambda x, t: jaxkl.kl_div(x, t, **options)
    expected = torch.autograd.functional.hessian(
        lambda x, t: torch_kl_div(x, t, **options), (to_torch(x), to_torch(t))
    )
    for hessian in (
        jax.hessian(f, argnums=(0, 1)),
        jax.jacrev(jax.grad(f, argnums=(0, 1)), argnums=(0, 1)),
    ):
        actual = jax.jit(hessian)(x, t)
        for i, j in itertools.product(range(2), repeat=2):
            agree(actual[i][j], expected[i][j], name=f"{i, j}")


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
def test_forward_mode_of_the_reference(arrays, rng, reduction, log_target):
    x, t = arrays((2, 3), (3,), log_target, ("float64", "float64"))
    d_x, d_t = (jnp.asarray(rng.normal(size=a.shape)) for a in (x, t))
    options = dict(reduction=reduction, log_target=log_target)
    value_, slope_ = torch.func.jvp(
        functools.partial(torch_kl_div, **options),
        (to_torch(x, False), to_torch(t, False)),
        (to_torch(d_x, False), to_torch(d_t, False)),
    )
    f = functools.partial(reference.kl_div, **options)

    @jax.jit
    def run(x, t, d_x, d_t):
        _, linear = jax.linearize(f, x, t)
        return *jax.jvp(f, (x, t), (d_x, d_t)), linear(d_x, d_t)

    for actual, expected in zip(
        run(x, t, d_x, d_t), (value_, slope_, slope_), strict=True
    ):
        agree(actual, expected)


# -- PyTorch's own samples


@pytest.fixture(scope="module")
def op_info():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    (op,) = [op for op in op_db if op.name == "nn.functional.kl_div"]
    return op


@pytest.mark.parametrize("dtype", rarely("float32", "float16", "bfloat16", "float64"))
def test_pytorch_samples(op_info, dtype):
    torch.manual_seed(0)
    samples = op_info.sample_inputs("cpu", getattr(torch, dtype), requires_grad=True)
    samples = [(s.input.detach(), s.args[0].detach(), s.kwargs) for s in samples]
    assert len(samples) == 16
    pairs = [tuple(map(to_jax, s[:2])) for s in samples]

    @jax.jit  # one program for all, as compiling takes the time
    def run(pairs):
        results = []
        for (x, t), (_, _, options) in zip(pairs, samples, strict=True):
            f, plain = (functools.partial(k, **options) for k in both_kl_div)
            slope = jax.jvp(plain, (x, t), (jnp.ones_like(x), jnp.ones_like(t)))[1]
            orders = [first_and_second_order(k, x, t) for k in (f, plain)]
            results.append((*orders, slope))
        return results

    both_kl_div = jaxkl.kl_div, reference.kl_div
    for (x_, t_, options), result in zip(samples, run(pairs), strict=True):
        f_ = functools.partial(op_info, **options)
        expected = first_and_second_order_torch(f_, x_, t_)
        ours, plain, slope = result
        for a, b, e in zip(ours, plain, expected, strict=True):
            assert a.dtype.name == b.dtype.name == dtype
            assert_close(a, e.double(), 4 * EPS[dtype])
            assert_close(b, e.double(), 4 * EPS[dtype])
        ones_ = torch.ones_like(x_), torch.ones_like(t_)
        _, slope_ = torch.func.jvp(f_, (x_, t_), ones_)
        assert_close(slope, slope_.double(), 8 * EPS[dtype])


def first_and_second_order_torch(f, *primals):
    primals = [x.clone().requires_grad_() for x in primals]
    value = f(*primals)
    grads = torch.autograd.grad(
        value, primals, torch.ones_like(value), create_graph=True
    )
    # The gradient to `input` does not contain `input`: it is zero, or PyTorch's None.
    second = torch.autograd.grad(
        grads, primals, [torch.ones_like(g) for g in grads], materialize_grads=True
    )
    return [x.detach() for x in (value, *grads, *second)]


def first_and_second_order(f, *primals):
    def grads(*primals):
        value, pull = jax.vjp(f, *primals)
        return pull(jnp.ones_like(value))

    first, pull = jax.vjp(grads, *primals)
    return f(*primals), *first, *pull(jax.tree.map(jnp.ones_like, first))
