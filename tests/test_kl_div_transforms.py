"""`kl_div` under JAX's transformations, on meshes of 8 devices, and exported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from scipy.special import log_softmax

import jaxkl
from jaxkl import kl_div, reference

from .cases import rarely
from .helpers import assert_close


both = pytest.mark.parametrize("log_target", [False, True])


def loss(x, t, log_target=False):
    return kl_div(x, t, reduction="batchmean", log_target=log_target)


def closed_form(x, t, log_target):
    """Gradients of `loss` by `x` and `t`."""
    x, t = np.asarray(x, np.float64), np.asarray(t, np.float64)
    if log_target:
        return -np.exp(t) / len(x), np.exp(t) * (t - x + 1) / len(x)
    return -t / len(x), (np.log(t) + 1 - x) / len(x)


@pytest.fixture
def arrays(rng):
    def make(log_target=False, shape=(8, 6)):
        x, t = log_softmax(rng.normal(size=(2, *shape)), axis=-1).astype(np.float32)
        return jnp.asarray(x), jnp.asarray(t if log_target else np.exp(t))

    return make


@both
def test_vmap_scan_and_remat(arrays, log_target):
    x, t = arrays(log_target)
    f = functools.partial(kl_div, reduction="sum", log_target=log_target)
    grad = jax.grad(f, argnums=(0, 1))
    body = jax.checkpoint(lambda total, xt: (total + f(*xt), None))
    scanned = lambda *xt: jax.lax.scan(body, 0.0, xt)[0]
    step = lambda _, xt: (None, grad(*xt))

    @jax.jit  # one program for all, as compiling takes the time
    def run(x, t):
        gradients = {
            "under vmap": jax.vmap(grad)(x, t),
            "in a scan": jax.lax.scan(step, None, (x, t))[1],
            "of a scan of remat": jax.grad(scanned, argnums=(0, 1))(x, t),
        }
        return jax.vmap(f)(x, t), jax.vmap(f, in_axes=(0, None))(x, t[0]), gradients

    values, over_one, gradients = run(x, t)
    rows = kl_div(x, t, reduction="none", log_target=log_target).sum(-1)
    assert_close(values, rows, 1e-6)
    assert_close(over_one[0], rows[0], 1e-6)
    for way, found in gradients.items():
        for d, wanted in zip(found, closed_form(x, t, log_target), strict=True):
            assert_close(d, len(x) * wanted, 1e-5, way)


@both
def test_jacrev_and_hessian(arrays, log_target):
    x, t = arrays(log_target, (2, 3))
    f = functools.partial(kl_div, reduction="none", log_target=log_target)
    d_x, d_t = jax.jacrev(f, argnums=(0, 1))(x, t)
    diagonal = np.eye(6).reshape(2, 3, 2, 3)
    expected_x, expected_t = closed_form(x, t, log_target)
    assert_close(d_x, 2 * expected_x * diagonal, 1e-5)
    assert_close(d_t, 2 * expected_t * diagonal, 1e-5)
    f = functools.partial(loss, log_target=log_target)
    t_ = np.asarray(t, np.float64)
    d_tt = np.exp(t_) * (t_ - np.asarray(x) + 2) / 2 if log_target else 1 / t_ / 2
    d_xt = -np.exp(t_) / 2 if log_target else -np.ones((2, 3)) / 2
    grad = jax.grad(f, argnums=(0, 1))
    for outer in (jax.jacfwd, jax.jacrev):
        hessian = jax.jit(outer(grad, argnums=(0, 1)))(x, t)
        np.testing.assert_array_equal(hessian[0][0], np.zeros((2, 3, 2, 3)))
        assert_close(hessian[0][1], d_xt * diagonal, 1e-5)
        assert_close(hessian[1][0], d_xt * diagonal, 1e-5)
        assert_close(hessian[1][1], d_tt * diagonal, 1e-5)


def test_forward_mode_is_for_the_reference(arrays):
    x, t = arrays()
    f = functools.partial(kl_div, reduction="sum")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(f, (x, t), (x, t))
    f = functools.partial(reference.kl_div, reduction="sum")
    _, slope = jax.jvp(f, (x, t), (x, t))
    expected_x, expected_t = closed_form(x, t, False)
    assert_close(slope, 8 * (expected_x * x + expected_t * t).sum(), 1e-5)


def test_traces_once(arrays):
    x, t = arrays()
    traces = []

    @jax.jit
    def f(x, t):
        traces.append(x)
        return jax.grad(loss)(x, t)

    f(x, t)
    f(x + 1, t)
    assert len(traces) == 1
    compiled = jaxkl._torch.kl_div._kl_div
    loss(x, t)
    before = compiled._cache_size()
    loss(x + 1, t)
    assert compiled._cache_size() == before > 0


@both
def test_saves_only_the_arguments(arrays, log_target):
    x, t = (a.astype(jnp.bfloat16) for a in arrays(log_target, (64, 32)))
    pull = jax.vjp(functools.partial(loss, log_target=log_target), x, t[:1])[1]
    saved = [a for a in jax.tree.leaves(pull) if a.size > 1]
    assert sorted((a.shape, a.dtype.name) for a in saved) == [
        ((1, 32), "bfloat16"),
        ((64, 32), "bfloat16"),
    ]


def test_value_has_no_elementwise_temporary():
    size = 100_000
    x = jax.ShapeDtypeStruct((4, size), jnp.bfloat16)
    compiled = jax.jit(functools.partial(loss, log_target=True)).lower(x, x).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < size  # much less than one [4, size] array


@both
@pytest.mark.parametrize(
    "dtype, reduction",
    [("bfloat16", "batchmean"), *rarely(("bfloat16", "none"), ("float32", "mean"))],
)
@pytest.mark.filterwarnings("ignore:.*not the KL")
def test_export_with_symbolic_shapes(arrays, dtype, reduction, log_target):
    x, t = (a.astype(dtype) for a in arrays(log_target))
    b, v = jax.export.symbolic_shape("b, v")
    f = functools.partial(kl_div, reduction=reduction, log_target=log_target)

    step = jax.jit(functools.partial(run, f))
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((b, v), (1, v))]
    platforms = ("cpu", "tpu", "cuda")
    exported = jax.export.export(step, platforms=platforms)(*arguments)
    assert exported.platforms == platforms
    restored = jax.export.deserialize(exported.serialize())
    for rows in (3, 8):
        actual, expected = (g(x[:rows], t[:1]) for g in (restored.call, step))
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype == dtype
            assert_close(a, e, 1e-6 if dtype == "float32" else 1e-2)


# -- Meshes


def mesh_of(axis_type):
    return jax.make_mesh((8,), ("d",), axis_types=(axis_type,))


def run(f, x, t):
    """The value, and the gradients of its sum."""
    value, pull = jax.vjp(f, x, t)
    return value, *pull(jnp.ones_like(value))


@both
@pytest.mark.parametrize("check_vma", [True, *rarely(False)])
@pytest.mark.parametrize("replicated", ["target", *rarely("none", "input")])
def test_shard_map(arrays, replicated, check_vma, log_target):
    # 8 devices have a row each; a replicated argument is one row for all of them.
    arguments = dict(zip(("input", "target"), arrays(log_target), strict=True))
    specs = {name: P() if name == replicated else P("d") for name in arguments}
    if replicated in arguments:
        arguments[replicated] = arguments[replicated][:1]
    f = functools.partial(kl_div, reduction="sum", log_target=log_target)
    sharded = jax.shard_map(
        lambda x, t: jax.lax.psum(f(x, t), "d"),
        mesh=mesh_of(AxisType.Auto),
        in_specs=tuple(specs.values()),
        out_specs=P(),
        check_vma=check_vma,
    )
    both = [jax.jit(functools.partial(run, g)) for g in (sharded, f)]
    for a, e in zip(*(g(*arguments.values()) for g in both), strict=True):
        assert a.shape == e.shape
        assert_close(a, e, 1e-5)


@both
@pytest.mark.parametrize("reduction", ["batchmean", *rarely("none", "sum")])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, *rarely(AxisType.Auto)])
def test_sharded_arrays(arrays, axis_type, reduction, log_target):
    x, t = arrays(log_target)
    f = functools.partial(kl_div, reduction=reduction, log_target=log_target)
    step = jax.jit(functools.partial(run, f))
    expected = [step(x, t) for t in (t, t[:1])]
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        rows, copies = (NamedSharding(mesh, spec) for spec in (P("d"), P()))
        x = jax.device_put(x, rows)
        targets = jax.device_put(t, rows), jax.device_put(t[:1], copies)
        actual = [step(x, t) for t in targets]
    assert actual[0][1].sharding.spec[0] == "d"
    if axis_type == AxisType.Explicit:  # else each device may keep its row of `-t`
        assert actual[1][1].sharding.spec[0] == "d"
    for got, want in zip(actual, expected, strict=True):
        for a, e in zip(got, want, strict=True):
            assert_close(a, e, 1e-5)
