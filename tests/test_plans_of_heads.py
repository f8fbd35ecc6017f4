"""Plans that CPUs do not take by themselves, asked for at sizes that nothing divides.

Tiles leave their products to a part of the tokens; or all tokens are taken at once, and
a block of columns at a time.
"""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxkl
from jaxkl import LinearHead
from jaxkl._engine.plan import Plan

from .cases import assert_matches, FORWARD, over, rarely, taking
from .helpers import assert_close
from .sources import make_head, rounded


TOKENS, VOCAB, TILE = 21, 29, 4
# Of three parts the last is padded, or takes tokens again; one part holds all tokens.
PLANS = {
    f"{order} {part}": Plan(TILE, order, True, part)
    for order in ("strided", "blocks")
    for part in (8, 24)
}
# The last of four blocks has fewer columns than the others.
PLANS["lean"] = Plan(None, "blocks", False, columns=8)


@pytest.fixture
def take(monkeypatch):
    with taking(monkeypatch) as take:
        yield take


over_plans = pytest.mark.parametrize(
    "name", ["strided 8", "lean", *rarely("blocks 24", "strided 24", "blocks 8")]
)


def heads(rng, dtype="float32", tokens=TOKENS):
    student = make_head(
        rng, (tokens,), 5, VOCAB, dtype, bias=True, softcap=3.0, scale=0.7
    )
    return student, make_head(rng, (tokens,), 3, VOCAB, dtype, scale=1.3)


def assert_same(actual, expected, tol=1e-5):
    for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert_close(x, y, tol)


@over_plans
@over("reverse", slow=["forward", "js", "user"])
def test_every_argument_at_once(rng, take, name, divergence, reference):
    take(PLANS[name])
    labels = rng.integers(0, VOCAB - 2, TOKENS)
    labels[3] = -100
    assert_matches(
        *heads(rng),
        (divergence, reference),
        temperature=jnp.asarray(rng.uniform(0.5, 3, TOKENS), jnp.float32),
        teacher_temperature=jnp.float32(1.5),
        weights=jnp.asarray(rng.uniform(0, 2, TOKENS), jnp.float32),
        where=jnp.asarray(rng.random(TOKENS) < 0.7),
        labels=jnp.asarray(labels),
        alpha=0.6,
        label_smoothing=0.2,
        z_loss=0.01,
        vocab_size=VOCAB - 2,
        cotangent=-1.7,
    )


@over_plans
def test_a_cotangent_for_each_token(rng, take, name):
    take(PLANS[name])
    cotangent = jnp.asarray(rng.normal(size=TOKENS), jnp.float32)
    assert_matches(*heads(rng), FORWARD, reduction="none", cotangent=cotangent)


@over_plans
@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float16")])
def test_half_precision(rng, take, name, dtype):
    take(PLANS[name])
    assert_matches(*heads(rng, dtype), FORWARD, temperature=2.0)


def test_sums_over_plans_are_in_float32(rng, take):
    """A sum of bfloat16 parts would round at each addition."""
    tokens = 256
    student, teacher = heads(rng, "bfloat16", tokens)
    slope = jax.grad(jaxkl.distillation_loss)
    take(Plan(TILE, "blocks", True, tokens))
    once = slope(student, teacher).kernel
    take(Plan(TILE, "blocks", True, TILE))
    summed = slope(student, teacher).kernel
    assert_close(summed, once, 2**-8)


@over_plans
def test_masked_tokens_may_hold_nan(rng, take, name):
    student, teacher = heads(rng)
    where = np.arange(TOKENS) % 3 != 0
    junk = lambda head: LinearHead(
        head.hidden.at[~where].set(jnp.nan),
        head.kernel,
        head.bias,
        softcap=head.softcap,
        scale=head.scale,
    )

    def run(student, teacher):
        loss = ft.partial(jaxkl.distillation_loss, where=where)
        return jax.jit(jax.value_and_grad(loss))(student, teacher)

    want = run(student, teacher)
    take(PLANS[name])
    assert_same(run(junk(student), junk(teacher)), want)


@over_plans
def test_tokens_of_weight_0_may_hold_nan(rng, take, name):
    student, teacher = heads(rng)
    weights = jnp.asarray(rng.integers(0, 2, TOKENS), jnp.float32)
    dropped = (weights == 0)[:, None]

    @jax.jit
    def grad(student):
        f = lambda x: jaxkl.distillation_loss(x, teacher, weights=weights)
        return jax.grad(f)(student)

    take(PLANS[name])
    with_nan = LinearHead(
        jnp.where(dropped, jnp.nan, student.hidden),
        student.kernel,
        bias=student.bias,
        softcap=student.softcap,
        scale=student.scale,
    )
    assert_same(grad(with_nan), grad(student))


@over_plans
@pytest.mark.parametrize("frozen", ["kernel, bias", *rarely("kernel", "hidden")])
def test_frozen_arrays(rng, take, name, frozen):
    student, teacher = heads(rng)
    arrays = dict(hidden=student.hidden, kernel=student.kernel, bias=student.bias)
    fixed = {x: arrays.pop(x) for x in frozen.split(", ")}

    def loss(arrays):
        head = LinearHead(**arrays, **fixed, softcap=3.0, scale=0.7)
        return jaxkl.distillation_loss(head, teacher)

    run = lambda: jax.jit(jax.value_and_grad(loss))(arrays)
    want = run()
    take(PLANS[name])
    assert_same(run(), want)


@over_plans
@pytest.mark.parametrize(
    "other", ["conditional", *rarely("logits", "bucket", "uniform", "drop")]
)
def test_a_head_beside_another_source(rng, take, name, other):
    student, _ = heads(rng)
    teacher = rounded(rng, (TOKENS, VOCAB))
    if other != "logits":
        teacher = jaxkl.top_k_teacher(teacher, 4, tail=other, temperature=1.5)
    loss = ft.partial(jaxkl.distillation_loss_with_metrics, temperature=1.5)
    grad = jax.value_and_grad(loss, has_aux=True)
    run = lambda: jax.jit(lambda *models: grad(*models))(student, teacher)
    want = run()
    take(PLANS[name])
    assert_same(run(), want)


@over_plans
def test_second_order(rng, take, name):
    student, teacher = heads(rng)
    direction = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), student
    )

    def slope(student):
        gradient = jax.grad(jaxkl.distillation_loss)(student, teacher)
        products = jax.tree.map(lambda x, y: jnp.sum(x * y), gradient, direction)
        return sum(jax.tree.leaves(products))

    run = lambda: jax.jit(jax.grad(slope))(student)
    want = run()
    take(PLANS[name])
    assert_same(run(), want, 2e-5)


@over_plans
def test_vmap(rng, take, name):
    student, teacher = heads(rng)
    batch = jnp.stack([student.hidden, student.hidden + 0.1])
    head = lambda hidden: LinearHead(hidden, student.kernel, student.bias)
    loss = lambda hidden: jaxkl.distillation_loss(head(hidden), teacher)
    grad = jax.value_and_grad(loss)
    want = jax.jit(lambda hidden: jax.lax.map(grad, hidden))(batch)
    take(PLANS[name])
    assert_same(jax.jit(jax.vmap(grad))(batch), want)


@pytest.mark.parametrize("name", ["blocks 8", "lean", *rarely("blocks 4")])
@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
def test_mesh(rng, take, reduction, name):
    student, teacher = heads(rng)
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    axes = dict(mesh=mesh, token_axes="data", vocab_axis="model")

    def run(**more):
        loss = ft.partial(jaxkl.distillation_loss, reduction=reduction, **more)
        summed = lambda s, t: jnp.sum(jnp.sin(loss(s, t)))
        return jax.jit(jax.value_and_grad(summed))(student, teacher)

    want = run()
    # There are 11 tokens on each device, and 8 columns, some of them padding.
    plans = {
        "blocks 8": Plan(TILE, "blocks", True, 8),
        "blocks 4": Plan(TILE, "blocks", True, 4),
        "lean": Plan(None, "blocks", False, columns=3),
    }
    take(plans[name])
    assert_same(run(**axes), want)


def test_plain_jit_of_sharded_tokens(rng, take):
    """Nothing is gathered but statistics and `d kernel`."""
    student, teacher = heads(rng, tokens=32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))

    def run(student, teacher):
        step = jax.jit(jax.value_and_grad(jaxkl.distillation_loss))
        return step(student, teacher), step.lower(student, teacher).compile().as_text()

    want, _ = run(student, teacher)
    take(Plan(8, "strided", True, 32))
    spread = lambda head: LinearHead(
        jax.device_put(head.hidden, rows),
        head.kernel,
        head.bias,
        softcap=head.softcap,
        scale=head.scale,
    )
    got, program = run(spread(student), spread(teacher))
    assert_same(got, want)
    for name in ("all-gather", "all-to-all", "collective-permute"):
        assert f"{name}(" not in program and f"{name}-start(" not in program
