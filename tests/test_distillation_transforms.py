"""`distillation_loss` under JAX's transformations, compilation and export."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxkl
from jaxkl import LinearHead, SparseTeacher

from . import oracle
from .cases import (
    assert_gradient,
    assert_source_gradient,
    each,
    evaluate,
    KINDS,
    over_kinds,
    over_sources,
    rarely,
    rounded,
)
from .helpers import assert_close
from .sources import expected_of, make_models, per_token, TAILS


VALUE_TOL = {"logits": 1e-6}  # other sources have 5e-6
CHECKPOINTS = {"": lambda f: f, "checkpoint": jax.checkpoint}


def tokens_of(source):
    """The arrays of a source that have a row for each token."""
    return source.hidden if isinstance(source, LinearHead) else source


def with_tokens(source, rows):
    return replace(source, hidden=rows) if isinstance(source, LinearHead) else rows


@pytest.mark.parametrize("source", ["head", *rarely("logits")])
def test_vmap(rng, source):
    # Students with hidden states of their own share a kernel and a teacher.
    student, _ = make_models(rng, source, (3, 5), 11)
    _, teacher = make_models(rng, source, (5,), 11)
    temperature, where = per_token(rng, (3, 5), "temperature", "where").values()
    tile = 2 if source == "head" else None

    def f(s, t, temperature, where):
        return jaxkl.distillation_loss(
            s, t, temperature=temperature, where=where, differentiate_teacher=True,
            tile=tile,
        )  # fmt: skip

    grad = jax.value_and_grad(f, argnums=(0, 1, 2))
    shared = jax.tree.map(lambda _: None, student)
    in_axes = with_tokens(shared, 0), None, 0, 0
    value, grads = jax.jit(jax.vmap(grad, in_axes))(
        student, teacher, temperature, where
    )
    for i in range(3):
        one = with_tokens(student, tokens_of(student)[i])
        expected = expected_of(one, teacher, temperature=temperature[i], where=where[i])
        assert_close(value[i], expected.loss, VALUE_TOL.get(source, 5e-6))
        d_student, d_teacher, d_T = jax.tree.map(lambda x: x[i], grads)  # noqa: B023
        assert_source_gradient(one, d_student, expected.student, "student")
        assert_source_gradient(teacher, d_teacher, expected.teacher, "teacher")
        assert_gradient("temperature", d_T, expected, 1e-5)
    # The gradient of a vmap transposes its broadcasts; the vmap of a gradient does not.
    total = lambda s, t: jax.vmap(f, in_axes)(s, t, temperature, where).sum()
    d_student, d_teacher = jax.jit(jax.grad(total, (0, 1)))(student, teacher)
    once = jax.tree.map(lambda x: x.sum(0), grads)
    assert_source_gradient(teacher, d_teacher, once[1], "teacher")
    shared = with_tokens(once[0], tokens_of(grads[0]))
    assert_source_gradient(student, d_student, shared, "student")


@pytest.mark.slow
def test_vmap_over_the_tokens_of_the_loss(rng):
    s, t = rounded(rng, (5, 7)), rounded(rng, (5, 7))
    value = jax.jit(jax.vmap(jaxkl.distillation_loss))(s, t)
    assert_close(value, oracle.distillation_loss(s, t, reduction="none").loss, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["head", *rarely("logits")])
def test_scan_of_grad(rng, source):
    student, teacher = make_models(rng, source, (5,), 11)
    tile = 2 if source == "head" else None
    f = lambda s: jaxkl.distillation_loss(s, teacher, temperature=2.0, tile=tile)
    descend = lambda x, d: x - 0.5 * d

    def step(s, _):
        value, grad = jax.value_and_grad(f)(s)
        return jax.tree.map(descend, s, grad), value

    _, losses = jax.jit(lambda s: jax.lax.scan(step, s, length=5))(student)
    exact, expected = jax.tree.map(lambda x: np.asarray(x, np.float64), student), []
    for _ in range(5):
        result = expected_of(exact, teacher, temperature=2.0)
        expected.append(result.loss)
        exact = jax.tree.map(descend, exact, result.student)
    assert_close(losses, expected, VALUE_TOL.get(source, 5e-6))


@pytest.mark.parametrize(
    "source, wrap",
    [
        ("head", "checkpoint"),
        *rarely(("head", "")),
        *rarely(*(("logits", wrap) for wrap in CHECKPOINTS)),
        *rarely(("bucket", "checkpoint"), ("renormalize", "checkpoint")),
    ],
)
def test_grad_of_scan(rng, source, wrap):
    student, teacher = make_models(rng, source, (3, 5), 11)
    tile = None if source == "logits" else 2
    body = partial(jaxkl.distillation_loss, temperature=2.0, reduction="sum", tile=tile)
    body = CHECKPOINTS[wrap](body)

    @jax.jit
    @jax.grad
    def grad(student):
        def step(total, rows):
            s, t = map(with_tokens, (student, teacher), rows)
            return total + body(s, t), None

        rows = tokens_of(student), tokens_of(teacher)
        return jax.lax.scan(step, jnp.float32(0), rows)[0]

    expected = expected_of(student, teacher, temperature=2.0, reduction="sum")
    assert_source_gradient(student, grad(student), expected.student, "student")


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["bucket", *rarely("renormalize", "conditional")])
def test_vmap_over_lists(rng, tail):
    s, teacher = make_models(rng, tail, (3, 4), 11)
    f = partial(jaxkl.distillation_loss, tile=2)
    expected = 3 * expected_of(s, teacher).student
    assert_close(jax.jit(jax.vmap(jax.grad(f)))(s, teacher), expected, 1e-5)


@pytest.mark.slow
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


@pytest.mark.slow
def test_cond(rng):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    f = lambda s: jax.lax.cond(
        s[0, 0] > -jnp.inf,
        lambda s: jaxkl.distillation_loss(s, t),
        lambda s: jaxkl.distillation_loss(s, t, divergence=jaxkl.ReverseKL()),
        s,
    )
    assert_close(jax.jit(jax.grad(f))(s), oracle.distillation_loss(s, t).student, 1e-5)


def test_forward_mode_is_refused(rng):
    # `custom_vjp` has no forward mode; `jaxkl.reference` has.
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    f = lambda s: jaxkl.distillation_loss(s, t)
    for forward in (lambda: jax.jvp(f, (s,), (s,)), lambda: jax.jacfwd(f)(s)):
        with pytest.raises(TypeError, match="forward-mode .* `jaxkl.reference`"):
            forward()
    with pytest.raises(TypeError, match="forward-mode"):  # JAX's, later
        jax.jvp(jax.jit(f), (s,), (s,))


@over_sources("logits forward", slow=("head forward", *each("logits", KINDS)))
def test_one_trace_for_repeated_calls(rng, source, divergence):
    divergence, _ = divergence
    traces = 0

    @partial(jax.jit, static_argnames="divergence")
    def f(s, t, temperature, divergence):
        nonlocal traces
        traces += 1
        return jax.value_and_grad(jaxkl.distillation_loss)(
            s, t, temperature=temperature, divergence=divergence
        )

    for temperature in (1.0, 2.0, 3.0):
        student, teacher = make_models(rng, source, (3,), 11)
        # A new instance is the same divergence, wherever it has parameters.
        fields = getattr(divergence, "__dict__", None)
        again = type(divergence)(**fields) if fields else divergence
        f(student, teacher, temperature, divergence=again)
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


# One exported artefact serves three platforms and any number of tokens.


@pytest.mark.usefixtures("all_platforms")
@pytest.mark.parametrize(
    "source, dtype, tile",
    [
        ("logits", "float32", 4),
        *rarely(("bucket", "float32", None), ("logits", "float32", None)),
        *rarely(*(("logits", "bfloat16", tile) for tile in (None, 4))),
        *rarely(*((x, "float32", None) for x in TAILS if x != "bucket")),
    ],
)
def test_export(rng, source, dtype, tile):
    draw = lambda *tokens: make_models(rng, source, tokens, 11, dtype)
    structure = jax.tree.structure(draw(1, 1)[1])

    def f(s, arrays, temperature, where):
        teacher = structure.unflatten(arrays)
        return jaxkl.distillation_loss(
            s, teacher, temperature=temperature, where=where, tile=tile
        )

    n, b = export.symbolic_shape("n, b")
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((b, n, x.shape[-1]), x.dtype), draw(1, 1)
    )
    grad = jax.jit(jax.value_and_grad(f, argnums=(0, 2)))
    exported = export.export(grad, platforms=("cpu", "tpu", "cuda"))(
        shapes[0],
        jax.tree.leaves(shapes[1]),
        jax.ShapeDtypeStruct((), jnp.float32),
        jax.ShapeDtypeStruct((b, n), bool),
    )
    again = export.deserialize(exported.serialize())
    assert set(again.platforms) == {"cpu", "tpu", "cuda"}
    for tokens in ((1, 1), (2, 9)):
        s, teacher = draw(*tokens)
        temperature, where = jnp.float32(1.5), jnp.asarray(rng.random(tokens) < 0.8)
        value, (d_s, d_T) = again.call(s, jax.tree.leaves(teacher), temperature, where)
        expected = expected_of(s, teacher, temperature=1.5, where=where)
        assert_close(value, expected.loss, VALUE_TOL.get(source, 5e-6))
        assert_source_gradient(s, d_s, expected.student, "student")
        assert_gradient("temperature", d_T, expected, 1e-5)


# Tokens are spread over the devices of a mesh.


def _mesh(**axes):
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto)


@pytest.mark.parametrize(
    "source, inside, tile",
    [
        ("head", False, 2),
        *rarely(
            ("logits", True, None),
            ("logits", True, 2),
            ("logits", False, None),
            ("logits", False, 2),
        ),
        *rarely(("head", True, None), ("head, bucket", False, 1)),
    ],
)
def test_shard_map_over_tokens(rng, source, inside, tile):
    # The gradient is taken inside or outside of shard_map.
    student, teacher = make_models(rng, source, (24,), 11)
    listed = isinstance(teacher, SparseTeacher)
    floats = dict(
        student=student,
        teacher=teacher,
        temperature=jnp.float32(1.7),
        **per_token(rng, 24, "weights"),
    )
    where = per_token(rng, 24, "where")["where"]
    where = where.at[:3].set(False)  # device 0 has nothing to count

    def local(floats, where):
        total = jnp.sum(jnp.where(where, floats["weights"], 0))
        value = jaxkl.distillation_loss(
            **floats, where=where, normalizer=jax.lax.psum(total, "data"), tile=tile,
            differentiate_teacher=not listed,
        )  # fmt: skip
        return jax.lax.psum(value, "data")

    rows = P("data")
    specs = dict(student=rows, teacher=rows, temperature=P(), weights=rows)
    for name in ("student", "teacher"):
        if isinstance(floats[name], LinearHead):
            specs[name] = replace(
                jax.tree.map(lambda _: P(), floats[name]), hidden=rows
            )
    grad = partial(jax.value_and_grad, allow_int=listed)
    shard = partial(
        jax.shard_map, mesh=_mesh(data=8), in_specs=(specs, rows), check_vma=True
    )
    if inside:
        f = shard(grad(local), out_specs=(P(), specs))
    else:
        f = grad(shard(local, out_specs=P()))
    value, grads = jax.jit(f)(floats, where)
    weights = floats["weights"]
    expected = expected_of(
        **floats, where=where, normalizer=float(weights[where].sum())
    )
    assert_close(value, expected.loss, VALUE_TOL.get(source, 5e-6))
    assert_source_gradient(student, grads["student"], expected.student, "student")
    if listed:
        assert not grads["teacher"].log_probs.any()  # constants, as documented
    else:
        assert_source_gradient(teacher, grads["teacher"], expected.teacher, "teacher")
    assert_gradient("temperature", grads["temperature"], expected, 1e-5)
    assert_close(grads["weights"], expected.weights, 1e-5)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
def test_jit_with_a_sharded_batch(rng, reduction):
    mesh = _mesh(data=8)
    s, t = rounded(rng, (16, 7)), rounded(rng, (16, 7))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    value, grads = evaluate(put(s), put(t), reduction=reduction)
    expected = oracle.distillation_loss(s, t, reduction=reduction)
    assert_close(value, expected.loss, 1e-6)
    assert_close(grads["student"], expected.student, 1e-5)
    assert_close(grads["teacher"], expected.teacher, 1e-5)


# Memory is read off programs that are compiled for shapes and never run.

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


@pytest.mark.parametrize(
    "static, others",
    [
        MEMORY["everything"],
        *rarely(*(x for k, x in MEMORY.items() if k != "everything")),
    ],
    ids=["everything", *(k for k in MEMORY if k != "everything")],
)
def test_no_temporary_of_the_size_of_the_logits(static, others):
    f = lambda *args, **kw: jaxkl.distillation_loss(*args, **kw, **static).sum()
    assert _temporaries(f, **others) < 0.1


def test_slopes_are_evaluated_again_and_not_kept():
    """In bfloat16 all tokens are one tile on a CPU, whose arrays are float32."""
    loss = partial(jaxkl.distillation_loss, divergence=jaxkl.JensenShannon(0.5))
    assert _temporaries(loss, "bfloat16") / 2 < 6.5  # arrays; slopes make it 7


def test_plain_jax_breaks_the_memory_bound():
    def plain(s, t):
        log_q, log_p = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

    assert _temporaries(plain) > 1
