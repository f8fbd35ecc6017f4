"""All of `jaxkl.losses` under JAX's transformations, exported, and on a mesh."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from .cases import rarely
from .helpers import assert_close, TOLERANCE
from .test_losses import draw, expected, LOSSES, mostly_one, over_losses, PLAIN


GRAD_TOL = TOLERANCE["float32"][1]


def weighted(name):
    """The sum of a loss with weights, which are its cotangent."""
    return lambda x, y, where, g: jnp.sum(g * LOSSES[name].f(x, y, where=where))


def arguments(rng, name, shape):
    where = jnp.asarray(rng.random(shape) < 0.7)
    g = jnp.asarray(rng.normal(size=shape[:-1]), jnp.float32)
    return *draw(rng, name, shape), where, g


def assert_gradients(actual, wanted, name=""):
    for a, want in zip(actual, wanted, strict=True):
        assert_close(a, want, GRAD_TOL, name)


@over_losses(slow=[*PLAIN, "softmax_kl"])
def test_transforms(rng, name):
    args = x, y, where, g = arguments(rng, name, (4, 3, 5))
    f, total = LOSSES[name].f, weighted(name)
    grad = jax.grad(total, (0, 1))
    body = lambda carry, xs: (carry + total(*xs), None)
    scanned = lambda *args: jax.lax.scan(body, jnp.zeros(()), args)[0]
    remat = jax.grad(jax.checkpoint(total), (0, 1))
    step = lambda _, xs: (None, (grad(*xs), remat(*xs)))

    # One program is compiled only once.
    @jax.jit
    def run(*args):
        in_scan, remat_in_scan = jax.lax.scan(step, None, args)[1]
        return {
            "a scan": jax.grad(scanned, (0, 1))(*args),
            "in a scan": in_scan,
            "of remat, in a scan": remat_in_scan,
            "of remat": remat(*args),
            "under vmap": jax.vmap(jax.vmap(grad))(*args),
            "without": grad(*args),
        }

    _, wanted = expected(name, (x, y), g, where=where)
    for way, grads in run(*args).items():
        assert_gradients(grads, wanted, way)
    if name not in PLAIN:
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(lambda x: total(x, y, where, g), (x,), (x,))
        return
    np.testing.assert_array_equal(f(x, y), jax.vmap(jax.vmap(f))(x, y))
    jacobian = jax.jacrev(f)(x[0], y[0])
    np.testing.assert_array_equal(jacobian, jax.jacfwd(f)(x[0], y[0]))
    linear = jax.linearize(lambda x: total(x, y, where, g), x)[1]
    assert_close(linear(jnp.ones_like(x)), np.sum(wanted[0]), GRAD_TOL)


@pytest.mark.usefixtures("all_platforms")
@over_losses(PLAIN[0], slow=[*PLAIN, "softmax_kl"])
def test_export_for_all_platforms_and_any_shape(rng, name):
    """Of classes, a softmax must know how many there are."""
    dtype = "bfloat16" if name in PLAIN else "float32"
    args = *draw(rng, name, (3, 5), dtype), jnp.asarray(rng.random((3, 5)) < 0.7)
    shape = export.symbolic_shape("b, v") if name in PLAIN else (3, 5)
    f = lambda x, y, where: LOSSES[name].f(x, y, where=where).sum()
    grad = jax.jit(jax.value_and_grad(f, (0, 1)))
    shapes = [jax.ShapeDtypeStruct(shape, x.dtype) for x in args]
    exported = export.export(grad, platforms=["cpu", "tpu", "cuda"])(*shapes)
    rtol = 1e-2 if name in PLAIN else 1e-5
    chex.assert_trees_all_close(exported.call(*args), grad(*args), rtol=rtol)


def mesh_of(axis_type):
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


@pytest.mark.parametrize(
    "name, replicated",
    [
        (PLAIN[0], "targets"),
        *rarely(*((name, "targets") for name in (*PLAIN[1:], "softmax_kl"))),
        *rarely(*((name, x) for name in PLAIN for x in ("neither", "predictions"))),
    ],
)
def test_shard_map_over_the_batch(rng, name, replicated):
    x, y, where, g = arguments(rng, name, (16, 5))
    x = x[:1] if replicated == "predictions" else x
    y = y[:1] if replicated == "targets" else y
    args, total = (x, y, where, g), weighted(name)
    specs = tuple(P() if len(a) == 1 else P("data") for a in args)
    shard = partial(
        jax.shard_map, mesh=mesh_of(AxisType.Auto), in_specs=specs, check_vma=True
    )
    outside = shard(lambda *args: jax.lax.psum(total(*args), "data"), out_specs=P())
    # Here the only psum is the transpose of the replicated argument's broadcast.
    inside = shard(jax.grad(total, (0, 1)), out_specs=specs[:2])
    both = jax.jit(lambda *a: (jax.value_and_grad(outside, (0, 1))(*a), inside(*a)))
    values, wanted = expected(name, (x, y), g, where=where)
    (value, grads), found = both(*args)
    np.testing.assert_allclose(value, values @ np.asarray(g, float), rtol=1e-5)
    assert_gradients(grads, wanted)
    assert_gradients(found, wanted)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, *rarely(AxisType.Auto)])
@mostly_one
def test_sharded_batch_under_jit(rng, name, axis_type):
    x, y = draw(rng, name, (16, 5))
    f = lambda x, y: jnp.mean(LOSSES[name].f(x, y))
    values, wanted = expected(name, (x, y), np.full(16, 1 / 16))
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data"))
        args = jax.device_put((x, y), sharding)
        step = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*args).compile()
        value, grads = jax.device_get(step(*args))
        assert step(*args)[1][0].sharding.is_equivalent_to(sharding, 2)
    assert "all-gather" not in step.as_text()
    assert_close(value, values.mean(), GRAD_TOL)
    assert_gradients(grads, wanted)
