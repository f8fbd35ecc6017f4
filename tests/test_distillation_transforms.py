"""`distillation_loss` under JAX's transformations, compilation and export."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxkl

from . import oracle
from .cases import assert_gradient, evaluate, over_kinds, rarely, rounded
from .helpers import assert_close


def test_vmap(rng):
    s, t = rounded(rng, (3, 5, 7)), rounded(rng, (5, 7))
    temperature = jnp.asarray(rng.uniform(1, 2, size=(3, 5)), jnp.float32)
    where = jnp.asarray(rng.random((3, 5)) < 0.6)

    def f(s, t, temperature, where):
        return jaxkl.distillation_loss(
            s, t, temperature=temperature, where=where, differentiate_teacher=True
        )

    grad = jax.value_and_grad(f, argnums=(0, 1, 2))
    in_axes = (0, None, 0, 0)
    value, grads = jax.jit(jax.vmap(grad, in_axes))(s, t, temperature, where)
    for i in range(3):
        expected = oracle.distillation_loss(
            s[i], t, temperature=temperature[i], where=where[i]
        )
        assert_close(value[i], expected.loss, 1e-6)
        assert_close(grads[0][i], expected.student, 1e-5)
        assert_close(grads[1][i], expected.teacher, 1e-5)
        assert_gradient("temperature", grads[2][i], expected, 1e-5)
    # The transpose of a broadcast: the gradient of a vmap, not the vmap of a gradient.
    total = lambda t: jax.vmap(f, in_axes)(s, t, temperature, where).sum()
    assert_close(jax.jit(jax.grad(total))(t), grads[1].sum(0), 1e-5)


def test_vmap_over_the_tokens_of_the_loss(rng):
    s, t = rounded(rng, (5, 7)), rounded(rng, (5, 7))
    value = jax.vmap(jaxkl.distillation_loss)(s, t)
    assert_close(value, jaxkl.distillation_loss(s, t, reduction="none"), 1e-6)


def test_scan_of_grad(rng):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    f = lambda s: jaxkl.distillation_loss(s, t, temperature=2.0)
    step = lambda s, _: (s - 0.5 * jax.grad(f)(s), f(s))
    _, losses = jax.jit(lambda s: jax.lax.scan(step, s, length=5))(s)
    x, expected = np.asarray(s, np.longdouble), []
    for _ in range(5):
        result = oracle.distillation_loss(x, t, temperature=2.0)
        expected.append(result.loss)
        x = x - 0.5 * result.student
    assert_close(losses, expected, 1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["", "checkpoint"])
def test_grad_of_scan(rng, wrap):
    s, t = rounded(rng, (3, 5, 7)), rounded(rng, (3, 5, 7))
    body = wrap(partial(jaxkl.distillation_loss, temperature=2.0, reduction="sum"))

    @jax.jit
    @jax.grad
    def grad(s):
        step = lambda total, st: (total + body(*st), None)
        return jax.lax.scan(step, jnp.float32(0), (s, t))[0]

    expected = oracle.distillation_loss(s, t, temperature=2.0, reduction="sum")
    assert_close(grad(s), expected.student, 1e-5)


def test_checkpoint(rng):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    f = lambda s: jaxkl.distillation_loss(2 * s, t, reduction="none").sum()
    value, grad = jax.jit(jax.value_and_grad(jax.checkpoint(f)))(s)
    expected = oracle.distillation_loss(2 * s, t, reduction="none")
    assert_close(value, expected.loss.sum(), 1e-6)
    assert_close(grad, 2 * expected.student, 1e-5)


def test_jacrev(rng):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    f = lambda s: jaxkl.distillation_loss(s, t, reduction="none")
    g = lambda s: oracle.distillation_loss(s, t, reduction="none").student
    expected = np.eye(3)[:, :, None] * g(s)
    assert_close(jax.jit(jax.jacrev(f))(s), expected, 1e-5)


def test_cond_and_while(rng):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    f = lambda s: jax.lax.cond(
        s[0, 0] > -jnp.inf,
        lambda s: jaxkl.distillation_loss(s, t),
        lambda s: jaxkl.distillation_loss(s, t, divergence=jaxkl.ReverseKL()),
        s,
    )
    assert_close(jax.jit(jax.grad(f))(s), oracle.distillation_loss(s, t).student, 1e-5)


def test_forward_mode_is_refused_by_jax(rng):
    # A fact of `custom_vjp`, here so that it is known. `jaxkl.reference` has it.
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    f = lambda s: jaxkl.distillation_loss(s, t)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(f, (s,), (s,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jacfwd(f)(s)


@over_kinds
def test_one_trace_for_repeated_calls(rng, divergence, reference):
    traces = 0

    @partial(jax.jit, static_argnames="divergence")
    def f(s, t, temperature, divergence):
        nonlocal traces
        traces += 1
        return jax.value_and_grad(jaxkl.distillation_loss)(
            s, t, temperature=temperature, divergence=divergence
        )

    for temperature in (1.0, 2.0, 3.0):
        s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
        # A new instance is the same divergence, wherever it has parameters.
        fields = getattr(divergence, "__dict__", None)
        again = type(divergence)(**fields) if fields else divergence
        f(s, t, temperature, divergence=again)
    assert traces == 1


def test_a_call_in_a_loop_does_not_trace_the_divergence_again(rng):
    traces = 0

    def counted(log_p, log_q):
        nonlocal traces
        traces += 1
        return (jnp.exp(log_p) - jnp.exp(log_q)) ** 2

    def call():
        s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
        jax.value_and_grad(partial(jaxkl.distillation_loss, divergence=counted))(s, t)

    call()
    first = traces
    for _ in range(3):
        call()
    assert first > 0
    assert traces == first


# Export: one artefact for three platforms, for any number of tokens.


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16")])
def test_export(rng, dtype, tile):
    def f(s, t, temperature, where):
        return jaxkl.distillation_loss(
            s, t, temperature=temperature, where=where, tile=tile
        )

    n, b = export.symbolic_shape("n, b")
    shapes = (
        jax.ShapeDtypeStruct((b, n, 11), dtype),
        jax.ShapeDtypeStruct((b, n, 11), dtype),
        jax.ShapeDtypeStruct((), jnp.float32),
        jax.ShapeDtypeStruct((b, n), bool),
    )
    grad = jax.jit(jax.value_and_grad(f, argnums=(0, 2)))
    exported = export.export(grad, platforms=("cpu", "tpu", "cuda"))(*shapes)
    again = export.deserialize(exported.serialize())
    assert set(again.platforms) == {"cpu", "tpu", "cuda"}
    for tokens in ((1, 1), (2, 9)):
        s, t = rounded(rng, (*tokens, 11), dtype), rounded(rng, (*tokens, 11), dtype)
        temperature, where = jnp.float32(1.5), jnp.asarray(rng.random(tokens) < 0.8)
        value, (d_s, d_T) = again.call(s, t, temperature, where)
        expected = oracle.distillation_loss(s, t, temperature=1.5, where=where)
        assert_close(value, expected.loss, 1e-6)
        assert_close(d_s, expected.student, 1e-5 if dtype == "float32" else 1e-2)
        assert_gradient("temperature", d_T, expected, 1e-5)


# Many devices: tokens over a mesh.


def _mesh(**axes):
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto)


@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("inside", [False, True], ids=["grad outside", "grad inside"])
def test_shard_map_over_tokens(rng, inside, tile):
    mesh = _mesh(data=8)
    s, t = rounded(rng, (24, 7)), rounded(rng, (24, 7))
    weights = jnp.asarray(rng.uniform(0, 2, size=24), jnp.float32)
    where = jnp.asarray(rng.random(24) < 0.7).at[:3].set(False)  # nothing on device 0
    temperature = jnp.float32(1.7)
    total = jnp.sum(jnp.where(where, weights, 0))

    def local(s, temperature, weights, t, where):
        value = jaxkl.distillation_loss(
            s, t, temperature=temperature, weights=weights, where=where,
            normalizer=total, tile=tile,
        )  # fmt: skip
        return jax.lax.psum(value, "data")

    grads = jax.value_and_grad(local, argnums=(0, 1, 2))
    rows = P("data")
    shard = partial(
        jax.shard_map, mesh=mesh, in_specs=(rows, P(), rows, rows, rows), check_vma=True
    )
    if inside:
        f = shard(grads, out_specs=(P(), (rows, P(), rows)))
    else:
        f = jax.value_and_grad(shard(local, out_specs=P()), argnums=(0, 1, 2))
    value, (d_s, d_T, d_w) = jax.jit(f)(s, temperature, weights, t, where)
    expected = oracle.distillation_loss(
        s, t, temperature=temperature, weights=weights, where=where,
        normalizer=float(total),
    )  # fmt: skip
    assert_close(value, expected.loss, 1e-6)
    assert_close(d_s, expected.student, 1e-5)
    assert_gradient("temperature", d_T, expected, 1e-5)
    assert_close(d_w, expected.weights, 1e-5)


@over_kinds
def test_shard_map_with_per_token_losses(rng, divergence, reference):
    mesh = _mesh(data=4, replica=2)
    s, t = rounded(rng, (8, 3, 7)), rounded(rng, (8, 3, 7))
    g = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    rows = P("data")

    @partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    def f(s, t):
        return jaxkl.distillation_loss(s, t, divergence=divergence, reduction="none")

    value, vjp = jax.vjp(lambda s: jax.jit(f)(s, t), s)
    expected = oracle.distillation_loss(
        s, t, divergence=reference, reduction="none", cotangent=g
    )
    assert_close(value, expected.loss, 1e-6)
    assert_close(vjp(g)[0], expected.student, 1e-5)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_jit_with_a_sharded_batch(rng, reduction):
    mesh = _mesh(data=8)
    s, t = rounded(rng, (16, 7)), rounded(rng, (16, 7))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    value, grads = evaluate(put(s), put(t), reduction=reduction)
    expected = oracle.distillation_loss(s, t, reduction=reduction)
    assert_close(value, expected.loss, 1e-6)
    assert_close(grads["student"], expected.student, 1e-5)
    assert_close(grads["teacher"], expected.teacher, 1e-5)


# Memory. Compiled for shapes, never run.

TOKENS, VOCAB = 4096, 32000


def _temporaries(loss, dtype="float32", **others):
    logits = jax.ShapeDtypeStruct((TOKENS, VOCAB), dtype)
    f = lambda s, t, others: loss(s, t, **others)
    step = jax.jit(jax.value_and_grad(f))
    stats = step.lower(logits, logits, others).compile().memory_analysis()
    return stats.temp_size_in_bytes / (TOKENS * VOCAB * jnp.dtype(dtype).itemsize)


def _per_token(dtype):
    return jax.ShapeDtypeStruct((TOKENS,), dtype)


MEMORY = {
    "plain": ({}, {}),
    "temperature": (dict(temperature=2.0), {}),
    "reverse": (dict(divergence=jaxkl.ReverseKL()), {}),
    "teacher": (dict(differentiate_teacher=True), {}),
    "none": (dict(reduction="none"), {}),
    "everything": (
        dict(alpha=0.5, z_loss=1e-4, label_smoothing=0.1, vocab_size=VOCAB - 1),
        dict(
            temperature=_per_token(jnp.float32),
            weights=_per_token(jnp.float32),
            labels=_per_token(jnp.int32),
            where=_per_token(bool),
        ),
    ),
}


@pytest.mark.parametrize("static, others", MEMORY.values(), ids=MEMORY)
def test_no_temporary_of_the_size_of_the_logits(static, others):
    f = lambda *args, **kw: jaxkl.distillation_loss(*args, **kw, **static).sum()
    assert _temporaries(f, **others) < 0.1


def test_slopes_are_evaluated_again_and_not_kept():
    """In bfloat16 all tokens are one tile on CPU, and its arrays are float32."""
    loss = partial(jaxkl.distillation_loss, divergence=jaxkl.JensenShannon(0.5))
    assert _temporaries(loss, "bfloat16") / 2 < 6.5  # arrays; with the slopes it is 7


def test_plain_jax_breaks_the_memory_bound():
    def plain(s, t):
        log_q, log_p = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

    assert _temporaries(plain) > 1
