"""Every loss under JAX's transformations, without jit, and exported."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxkl import FunctionHead, LinearHead

from .helpers import assert_close
from .registry import (
    assert_expected,
    Batch,
    check,
    LOSSES,
    over_losses,
    pull_back,
    with_tokens,
)


STILL = [x for x in LOSSES if not x.startswith("moving")]


def stacked(rng, loss, n=2, *, tokens=5, vocab=7):
    """Batches, one array of each of their arrays, and the cotangents of the losses."""
    batches = [loss.make(rng, (tokens,), vocab) for _ in range(n)]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    cotangents = [loss.cotangent(rng, batch) for batch in batches]
    return batches, cotangents, stack(batches), stack(cotangents)


def assert_each(loss, batches, cotangents, value, gradients):
    for i, (batch, g) in enumerate(zip(batches, cotangents, strict=True)):
        one = jax.tree.map(lambda x: x[i], (value, gradients))  # noqa: B023
        assert_expected(loss, batch, *one, loss.expected(batch, g), cotangent=g)


@over_losses("head", "logits, bucket", "log_probs of head")
def test_vmap(rng, loss):
    batches, cotangents, stack, g = stacked(rng, loss)
    run = jax.jit(jax.vmap(partial(pull_back, loss)))
    assert_each(loss, batches, cotangents, *run(stack, g))


@over_losses("head", slow=("logits", "function", "logits, bucket"))
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_vmap_beside_shared_arrays(rng, loss, inside):
    """The gradient of a vmap transposes broadcasts; the vmap of a gradient does not."""
    batch = loss.make(rng, (3, 4), 7)
    is_head = lambda x: isinstance(x, LinearHead | FunctionHead)
    of_head = lambda x: with_tokens(jax.tree.map(lambda _: None, x), 0)
    axis = lambda x: of_head(x) if is_head(x) else 0 if np.ndim(x) else None
    axes = jax.tree.map(axis, batch, is_leaf=is_head)
    one = lambda floats, others: loss(Batch(floats, others), reduction="sum")

    def run(f, batch, g):
        if not inside:
            total = lambda batch: jax.vmap(one, tuple(axes))(*batch).sum()
            return pull_back(total, batch, g)
        each = jax.jit(jax.vmap(jax.value_and_grad(one), tuple(axes)))
        value, gradients = each(*batch)
        # What they share has the sum of its gradients.
        sum_of = lambda x, d: g * (d if x.shape == d.shape else d.sum(0))
        return value.sum(), jax.tree.map(sum_of, batch.floats, gradients)

    check(loss, rng, batch, run=run, reduction="sum")


def test_jacrev(rng):
    loss = LOSSES["logits"]
    floats, others = batch = loss.make(rng, (3,), 5)
    f = lambda s: loss(Batch(floats | dict(student=s), others), reduction="none")
    _, expected = loss.expected(batch, np.ones(3), reduction="none")
    got = jax.jit(jax.jacrev(f))(floats["student"])
    assert_close(got, np.eye(3)[:, :, None] * np.float64(expected.student), 1e-5)


@over_losses("function", "cross_entropy of head")
def test_grad_of_a_scan_of_remat(rng, loss):
    """Micro-batches, whose losses are added up."""
    batches, cotangents, stack, g = stacked(rng, loss)

    @jax.checkpoint
    def one(floats, others, g):
        value = loss(Batch(floats, others))
        return sum(map(jnp.vdot, *map(jax.tree.leaves, (value, g)))), value

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(floats, others, g):
        def step(total, batch):
            part, value = one(*batch)
            return total + part, value

        return jax.lax.scan(step, jnp.float32(0), (floats, others, g))

    (_, value), gradients = run(*stack, g)
    assert_each(loss, batches, cotangents, value, gradients)


def without_jit(f, batch, cotangent):
    value, vjp = jax.vjp(lambda floats: f(Batch(floats, batch.others)), batch.floats)
    return value, vjp(jax.tree.map(jnp.asarray, cotangent))[0]


@over_losses("logits", "log_probs of head")
def test_without_jit(rng, loss):
    check(loss, rng, loss.make(rng, (5,), 7), run=without_jit)


@over_losses("head", slow=("logits, bucket", "log_probs of function"))
def test_under_cond(rng, loss):
    """A branch that is not taken has no part."""
    batch = loss.make(rng, (5,), 7)

    def run(f, batch, cotangent):
        def either(batch):
            taken = batch.others["where"].any()
            nothing = lambda batch: jax.tree.map(lambda x: x * jnp.nan, f(batch))
            return jax.lax.cond(taken, f, nothing, batch)

        return pull_back(either, batch, cotangent)

    check(loss, rng, batch, run=run)


@pytest.mark.usefixtures("all_platforms")
@over_losses("logits", "log_probs of head", slow=STILL)
def test_export(rng, loss):
    """One artefact serves three platforms and any number of tokens."""
    draw = lambda *shape: loss.make(rng, shape, 11)
    few, more = draw(1, 2), draw(3, 4)
    leaves, structure = jax.tree.flatten(few)
    n, b = export.symbolic_shape("n, b")

    def symbolic(x, y):
        # The arrays that have tokens differ in the first two axes.
        tokens = (b, n) if x.shape != y.shape else ()
        return jax.ShapeDtypeStruct((*tokens, *x.shape[len(tokens) :]), x.dtype)

    shapes = [symbolic(*x) for x in zip(leaves, jax.tree.leaves(more), strict=True)]

    def run(leaves, g):
        value, gradients = pull_back(loss, structure.unflatten(leaves), g)
        return jax.tree.leaves(value), jax.tree.leaves(gradients)

    of = lambda leaves: loss(structure.unflatten(leaves))
    g = jax.eval_shape(of, shapes)
    exported = export.export(jax.jit(run), platforms=("cpu", "tpu", "cuda"))(shapes, g)
    again = export.deserialize(exported.serialize())
    assert set(again.platforms) == {"cpu", "tpu", "cuda"}
    for batch in few, more:
        g = loss.cotangent(rng, batch)
        value, gradients = again.call(jax.tree.leaves(batch), g)
        gradients = jax.tree.unflatten(jax.tree.structure(batch.floats), gradients)
        assert_expected(
            loss, batch, value, gradients, loss.expected(batch, g), cotangent=g
        )
