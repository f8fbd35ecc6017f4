"""All of `jaxkl.losses` under JAX's transformations, exported, and on a mesh."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxkl import losses

from .cases import rarely
from .helpers import assert_close, TOLERANCE
from .test_losses import draw, PLAIN
from .test_losses_softmax import hellinger


_, GRAD_TOL = TOLERANCE["float32"]
LOSSES = {name: getattr(losses, name) for name in PLAIN} | {
    "softmax": partial(losses.softmax_kl_divergence, temperature=2.0),
    "hellinger": partial(
        losses.softmax_divergence, divergence=hellinger, axis=-2, temperature=2.0
    ),
}
mostly_one = pytest.mark.parametrize("name", [PLAIN[0], *rarely(*PLAIN[1:])])


@pytest.mark.parametrize("name", rarely(*PLAIN, "hellinger"))
def test_transforms(rng, name):
    f = LOSSES[name]
    x, y = draw(rng, name, (4, 3, 5))
    where = jnp.asarray(rng.random((4, 3, 5)) < 0.7)
    total = lambda x, y, where: jnp.sum(jnp.sin(f(x, y, where=where)))
    body = lambda carry, xs: (carry + total(*xs), None)
    scanned = lambda x, y: jax.lax.scan(body, jnp.zeros(()), (x, y, where))[0]
    body_of_grads = lambda _, xs: (None, jax.grad(total, (0, 1))(*xs))
    checkpointed = jax.grad(jax.checkpoint(total), (0, 1))
    checkpointed = jax.vmap(checkpointed) if name == "hellinger" else checkpointed

    # One program is compiled only once.
    @jax.jit
    def all_grads(x, y):
        return (
            jax.grad(total, (0, 1))(x, y, where),
            jax.grad(scanned, (0, 1))(x, y),
            jax.lax.scan(body_of_grads, None, (x, y, where))[1],
            checkpointed(x, y, where),
            jax.vmap(jax.grad(total, (0, 1)))(x, y, where),
        )

    value, grads = jax.value_and_grad(total, (0, 1))(x, y, where)
    # The value is the same number whether or not a gradient is asked for.
    digits, tol = 0, dict(rtol=GRAD_TOL)
    if name == "hellinger":
        digits, tol = 1e-6, dict(rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value, total(x, y, where), rtol=digits)
    for other in all_grads(x, y):
        chex.assert_trees_all_close(other, grads, **tol)
    if name == "hellinger":
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(lambda x: total(x, y, where), (x,), (x,))
        return
    np.testing.assert_array_equal(f(x, y), jax.vmap(jax.vmap(f))(x, y))
    jacobian = jax.jacrev(f)(x[0], y[0])
    np.testing.assert_array_equal(jacobian, jax.jacfwd(f)(x[0], y[0]))
    linear = jax.linearize(lambda x: total(x, y, where), x)[1]
    assert_close(linear(jnp.ones_like(x)), jnp.sum(grads[0]), GRAD_TOL)


@mostly_one
def test_export_for_all_platforms_and_any_shape(rng, name):
    b, v = export.symbolic_shape("b, v")
    args = *draw(rng, name, (3, 5), "bfloat16"), jnp.asarray(rng.random((3, 5)) < 0.7)
    _assert_exported(name, (b, v), args, 1e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("all_platforms")
def test_export_of_softmax_for_all_platforms(rng):
    args = *draw(rng, "softmax", (3, 5)), jnp.asarray(rng.random((3, 5)) < 0.7)
    _assert_exported("softmax", (3, 5), args, 1e-5)


def _assert_exported(name, shape, args, rtol):
    f = lambda x, y, where: LOSSES[name](x, y, where=where).sum()
    grad = jax.jit(jax.value_and_grad(f, (0, 1)))
    shapes = [jax.ShapeDtypeStruct(shape, x.dtype) for x in args]
    exported = export.export(grad, platforms=["cpu", "tpu", "cuda"])(*shapes)
    chex.assert_trees_all_close(exported.call(*args), grad(*args), rtol=rtol)


@pytest.mark.parametrize(
    "name, replicated",
    [
        (PLAIN[0], "targets"),
        *rarely(*((name, "targets") for name in PLAIN[1:])),
        *rarely(*((name, x) for name in PLAIN for x in ("neither", "predictions"))),
        *rarely(("softmax", "targets")),
    ],
)
def test_shard_map_over_the_batch(rng, name, replicated):
    x, y = draw(rng, name, (16, 5))
    x = x[:1] if replicated == "predictions" else x
    y = y[:1] if replicated == "targets" else y
    where = jnp.asarray(rng.random((16, 5)) < 0.7)
    weights = jnp.asarray(rng.normal(size=16), jnp.float32)

    def total(x, y, where, weights):
        return jnp.sum(LOSSES[name](x, y, where=where) * weights)

    args = x, y, where, weights
    specs = tuple(P() if len(a) == 1 else P("data") for a in args)
    shard = partial(
        jax.shard_map, mesh=_mesh(AxisType.Auto), in_specs=specs, check_vma=True
    )
    expected = jax.jit(jax.value_and_grad(total, (0, 1)))(*args)
    outside = shard(lambda *args: jax.lax.psum(total(*args), "data"), out_specs=P())
    actual = jax.jit(jax.value_and_grad(outside, (0, 1)))(*args)
    tol = (
        dict(rtol=1e-4, atol=1e-6)
        if name == "softmax"
        else dict(rtol=GRAD_TOL, atol=1e-5)
    )
    chex.assert_trees_all_close(actual, expected, **tol)
    # The only psum is the transpose of the replicated argument's broadcast.
    inside = shard(jax.grad(total, (0, 1)), out_specs=specs[:2])
    chex.assert_trees_all_close(jax.jit(inside)(*args), expected[1], **tol)


def _mesh(axis_type):
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, *rarely(AxisType.Auto)])
@mostly_one
def test_sharded_batch_under_jit(rng, name, axis_type):
    x, y = draw(rng, name, (16, 5))
    f = lambda x, y: jnp.mean(LOSSES[name](x, y))
    expected = jax.value_and_grad(f, (0, 1))(x, y)
    mesh = _mesh(axis_type)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data"))
        args = jax.device_put((x, y), sharding)
        step = jax.jit(jax.value_and_grad(f, (0, 1)))
        actual = step(*args)
        hlo = step.lower(*args).compile().as_text()
    assert actual[1][0].sharding.is_equivalent_to(sharding, 2)
    assert "all-gather" not in hlo
    chex.assert_trees_all_close(jax.device_get(actual), expected, rtol=GRAD_TOL)
