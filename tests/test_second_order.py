"""Second derivatives: those of plain JAX for every loss, and those of the oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
import jaxkl.reference
from jaxkl._engine.plan import Plan

from . import oracle
from .cases import ALL, over, rarely, taking
from .helpers import assert_close
from .registry import Batch, LOSSES, over_losses
from .sources import rounded
from .test_meshes import axes_of


TOKENS = 5
NONE = dict(reduction="none")
PLANS = {f"{o} {n}": Plan(2, o, True, n) for o in ("strided", "blocks") for n in (4, 6)}


def draw(rng, loss):
    """A weight is 0: learning to reweight examples (Ren et al., 2018) starts there."""
    batch = loss.make(rng, (TOKENS,), 7)
    if "weights" in batch.floats:
        batch.floats["weights"] = jnp.array([1.0, 0, 2, 0.5, 3])
    return batch


def assert_is_that_of_plain_jax(rng, loss, batch, *, tol=2e-5, floor=5e-6, **options):
    """Along a direction: forward over reverse, and reverse over a checkpointed one."""
    normal = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    along = jax.tree.map(normal, batch.floats)
    dot = lambda x, y: sum(map(jnp.vdot, *map(jax.tree.leaves, (x, y))))
    names = ("reduction", "normalizer", "vocab_size")
    shared = {name: options[name] for name in names if name in options}

    @jax.jit
    def second(moved, along, fixed):
        def gradient(**options):
            def total(moved):
                values = loss(Batch(moved, fixed), **options)
                return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(values))

            return jax.grad(total)

        mine = gradient(**options)
        plain = gradient(module=jaxkl.reference, **shared)
        forward = lambda f: jax.jvp(f, (moved,), (along,))[1]
        reverse = jax.grad(lambda x: dot(jax.checkpoint(mine)(x), along))(moved)
        return forward(plain), forward(mine), reverse

    plain, *found = second(batch.floats, along, batch.others)
    for mine in found:
        for x, y in zip(*map(jax.tree.leaves, (mine, plain)), strict=True):
            assert np.isfinite(y).all()
            assert_close(x, y, tol, floor=floor)


@over_losses("head", "cross_entropy of logits", "log_probs of logits")
def test_is_that_of_plain_jax(rng, loss):
    """The tiles do not divide the tokens: there are padding tokens."""
    options = {} if loss.function == "token_log_probs" else NONE
    tol = 5e-5 if "function" in loss.source else 2e-5
    assert_is_that_of_plain_jax(rng, loss, draw(rng, loss), tol=tol, tile=2, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("head", dict(plan="lean") | NONE),
        *rarely(("logits", {}), ("head", dict(reduction="sum")), ("head", NONE)),
        *rarely(("head", axes_of("2x4")), ("function", NONE)),
        *rarely(("logits, conditional", axes_of("2x4"))),
    ],
)
def test_of_other_programs(rng, name, options):
    loss = LOSSES[name]
    assert_is_that_of_plain_jax(rng, loss, draw(rng, loss), tol=5e-5, **options)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [PLANS["strided 4"], *rarely(*PLANS.values())])
@pytest.mark.parametrize("name", ["function", *rarely("head")])
def test_of_other_plans(rng, monkeypatch, name, plan):
    loss = LOSSES[name]
    with taking(monkeypatch) as take:
        take(plan)
        assert_is_that_of_plain_jax(rng, loss, draw(rng, loss), tol=5e-5)


@pytest.mark.slow
def test_of_equal_models(rng):
    """The gradient of the logits is 0 there; its derivative is not."""
    loss = LOSSES["head"]
    batch = draw(rng, loss)
    batch.floats["teacher"] = batch.floats["student"]
    assert_is_that_of_plain_jax(rng, loss, batch, tile=2)


def _cross_entropy(log_p, log_q):
    return -jnp.exp(log_p) * log_q


@pytest.mark.parametrize("divergence", [_cross_entropy, jaxkl.JensenShannon(0.5)])
def test_of_a_checkpointed_scan(rng, divergence):
    """There JAX drops rules of ours within the rule, and some tangents are 0."""
    s, t, along = rounded(rng, (3, 5)), rounded(rng, (3, 5)), rounded(rng, (3, 5))
    options = dict(divergence=divergence, differentiate_teacher=True)

    def total(module, s, t):
        step = lambda sum, x: (sum + module.distillation_loss(*x, **options), None)
        return jax.lax.scan(step, jnp.float32(0), (s, t))[0]

    @partial(jax.jit, static_argnums=(0, 1))
    def second(f, argnum, s, t):
        slope = lambda *x: jnp.vdot(jax.grad(f, argnum)(*x), along)
        return jax.grad(slope, argnum)(s, t)

    mine = jax.jit(jax.checkpoint(partial(total, jaxkl)))
    plain = partial(total, jaxkl.reference)
    for argnum in 0, 1:
        expected = second(plain, argnum, s, t)
        assert_close(second(mine, argnum, s, t), expected, 1e-5, floor=1e-6)


# Against the oracle.


def _split(shapes):
    """A function that cuts a vector into arrays of these shapes."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1].tolist()

    def split(x):
        parts = zip(jnp.split(x, ends), shapes, strict=True)
        return [part.reshape(shape) for part, shape in parts]

    return split


@pytest.mark.parametrize("reduction", ["mean", *rarely("none", "sum")])
@over("js_normalized", slow=[x for x in ALL if x != "js_normalized"])
def test_hessians_match_the_oracle(rng, divergence, reference, reduction):
    # Both logits, temperature and weights vary at once: mixed derivatives count too.
    names = ("student", "teacher", "temperature", "weights")
    split = _split([(2, 3), (2, 3), (2,), (2,)])
    x = rng.uniform(0.5, 1.5, size=16)
    g = rng.normal(size=2) if reduction == "none" else 1.0
    rest = dict(labels=np.array([1, 2]), alpha=0.75, z_loss=0.1, reduction=reduction)

    def theirs(x):
        cuts = np.split(x, [6, 12, 14])
        floats = [cuts[0].reshape(2, 3), cuts[1].reshape(2, 3), *cuts[2:]]
        grads = oracle.distillation_loss(
            *floats[:2], temperature=floats[2], weights=floats[3], **rest,
            divergence=reference, cotangent=g,
        )  # fmt: skip
        return np.concatenate([np.ravel(getattr(grads, name)) for name in names])

    def mine(x):
        floats = dict(zip(names, split(x), strict=True))
        value = jaxkl.distillation_loss(
            **floats, divergence=divergence, differentiate_teacher=True, **rest
        )
        return jnp.sum(g * value)

    points = [x]
    if divergence != jaxkl.TotalVariation():  # which has a kink at student = teacher
        points.append(np.concatenate([x[:6], x[:6], x[12:]]))
    twice = jax.jit(lambda x: (jax.hessian(mine)(x), jax.jacrev(jax.jacrev(mine))(x)))
    for x in points:
        expected = oracle.jacobian(theirs, x)
        with jax.enable_x64(True):
            over_reverse, reverse_reverse = twice(jnp.asarray(x))
        assert_close(over_reverse, expected, 1e-8, "forward over reverse")
        assert_close(reverse_reverse, expected, 1e-8, "reverse over reverse")


def test_hessian_of_a_masked_tiled_batch_in_float32(rng):
    s, t = rounded(rng, (5, 3)), rounded(rng, (5, 3))
    where = jnp.array([True, False, True, True, False])
    f = lambda s: jaxkl.distillation_loss(s, t, where=where, temperature=2.0, tile=2)
    gradient = lambda s: (
        oracle.distillation_loss(s, t, where=where, temperature=2.0).student
    )
    hessian = jax.jit(jax.hessian(f))(s)
    assert_close(hessian, oracle.jacobian(gradient, s), 1e-5)


# Columns that neither model has.


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_masked_columns_are_as_if_absent(rng, reduction):
    s, t = (rng.normal(size=(2, 3)).astype(np.float32) for _ in range(2))
    masked = [np.insert(x, 1, -np.inf, axis=1) for x in (s, t)]
    options = dict(differentiate_teacher=True, reduction=reduction)
    total = lambda s, t, temperature: jnp.sum(
        jaxkl.distillation_loss(s, t, temperature=temperature, **options)
    )
    hessian = jax.jit(jax.hessian(total, argnums=(0, 1, 2)))
    kept = np.array([0, 2, 3])
    for row, row_ in zip(hessian(*masked, 2.0), hessian(s, t, 2.0), strict=True):
        for actual, expected in zip(row, row_, strict=True):
            actual = np.asarray(actual)
            assert np.isfinite(actual).all()
            for axis, size in enumerate(actual.shape):
                if size == 4:
                    actual = np.take(actual, kept, axis)
            assert_close(actual, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.02, 1.0, 50.0])
def test_a_masked_column_at_any_temperature(rng, temperature):
    # The number that stands for -inf must stay finite when it is divided by T³.
    s, t = (rng.normal(size=(2, 3)).astype(np.float32) for _ in range(2))
    masked = [np.insert(x, 1, -np.inf, axis=1) for x in (s, t)]
    loss = lambda s, t, T: jaxkl.distillation_loss(s, t, temperature=T, t_squared=False)
    second = jax.jit(jax.hessian(loss, argnums=(0, 2)))
    T = jnp.float32(temperature)
    (_, by_logits), (_, by_temperature) = second(*masked, T)
    (_, *expected), (_, curvature) = second(s, t, T)
    assert not by_logits[:, 1].any()
    assert_close(np.delete(by_logits, 1, axis=1), *expected, 1e-5)
    assert_close(by_temperature, curvature, 1e-5)


def test_beside_metrics_over_devices(rng):
    """What metrics compare over devices has no derivative."""
    student, teacher = rounded(rng, (4, 8)), rounded(rng, (4, 8))
    with_metrics = partial(jaxkl.distillation_loss_with_metrics, **axes_of("2x4"))

    def second(loss):
        of_gradient = lambda s: jnp.sum(jax.grad(loss)(s, teacher) ** 2)
        return jax.jit(jax.grad(of_gradient))(student)

    found = second(lambda s, t: with_metrics(s, t)[0])
    assert_close(found, second(jaxkl.reference.distillation_loss), 1e-5)
