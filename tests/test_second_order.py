"""Second derivatives: those of plain JAX for every loss, and those of the oracle."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
import jaxkl.reference

from . import oracle
from .cases import ALL, over, rarely, taking
from .helpers import assert_close
from .sources import make_function, make_models, per_token, rounded
from .test_function_head import PLANS
from .test_moving_parameters import MOVING
from .test_sharding import sharded


class Case(NamedTuple):
    """A loss, and where its derivatives are taken."""

    make: Callable[[np.random.Generator], tuple[Any, Any]]  # what moves, and the rest
    loss: Callable[..., Any]  # of `jaxkl` or its reference, and of what is made
    tol: float = 2e-5
    floor: float = 0.0  # what plain JAX may leave of a true 0
    take: Any = None  # the plan that the engine is made to take


TOKENS = 5


def make_distillation(rng, source, *, equal=False):
    """Models, temperatures, and weights, one of which is 0: learning to reweight
    examples (Ren et al., 2018) starts there."""
    settings = dict(softcap=1.5) if "head" in source else {}
    if source == "function":
        student, teacher = (make_function(rng, (TOKENS,), n, 7) for n in (5, 3))
    else:
        student, teacher = make_models(rng, source, (TOKENS,), 7, **settings)
    if equal:
        teacher = student
    moved = dict(student=student, weights=jnp.array([1.0, 0, 2, 0.5, 3]))
    moved |= per_token(rng, (TOKENS,), "temperature")
    if source in ("logits", "head", "function"):
        moved["teacher"], fixed = teacher, {}
    else:
        fixed = dict(teacher=teacher)
    return moved, fixed | per_token(rng, (TOKENS,), "where")


def distillation(
    source,
    *,
    tol=2e-5,
    floor=0.0,
    take=None,
    fused=jaxkl.distillation_loss,
    made=None,
    **options,
):
    """`fused` has options that the plain loss does not take; `made` are those of
    `make_distillation`."""

    def loss(module, moved, fixed):
        f = fused if module is jaxkl else module.distillation_loss
        both = dict(differentiate_teacher="teacher" in moved)
        return f(**moved, **fixed, **both, **options)

    make = partial(make_distillation, source=source, **made or {})
    return Case(make, loss, tol, floor, take)


def moving(name):
    def make(rng):
        moved, fixed = make_distillation(rng, "logits")
        return moved, fixed | dict(divergence=MOVING[name].pair(TOKENS)[0])

    return distillation("logits", reduction="none")._replace(make=make)


def cross_entropy(source):
    def make(rng):
        moved = dict(student=make_models(rng, source, (TOKENS,), 7)[0])
        return moved, dict(labels=jnp.array([1, -100, 6, 0, 3]))

    more = dict(label_smoothing=0.1, z_loss=0.01, reduction="none")
    loss = lambda module, moved, fixed: module.cross_entropy(**moved, **fixed, **more)
    return Case(make, loss)


def log_probs(*places):
    def make(rng):
        student = rounded(rng, (TOKENS, 7))
        tokens = jnp.asarray(rng.integers(-1, 7, (TOKENS, *places)))
        moved = dict(student=student, **per_token(rng, (TOKENS,), "temperature"))
        return moved, dict(tokens=tokens)

    def loss(module, moved, fixed):
        both = module.token_log_probs(**moved, **fixed, with_entropy=True)
        return jnp.concatenate([x.ravel() for x in both])

    return Case(make, loss)


none = dict(reduction="none")
# The tiles do not divide the tokens: there are padding tokens.
padded = dict(tile=2, reduction="none")
QUICK = {
    "head": distillation("head", **padded),
    "cross_entropy": cross_entropy("logits"),
    "log_probs": log_probs(3),
}
SLOW = {
    "conditional": distillation("head, conditional", **none),
    "function": distillation("function", tol=5e-5, **padded),
    "moving": moving("js_normalized"),
    "logits": distillation("logits", tile=2),
    "logits, none": distillation("logits", **none),
    "sum": distillation("head", reduction="sum"),
    # The gradient of the logits is 0 where the models are equal; its derivative is not.
    "equal heads": distillation("head", made=dict(equal=True), floor=1e-6),
    "heads, none": distillation("head", **none),
    "function, none": distillation("function", tol=5e-5, **none),
    "lean": distillation("head", plan="lean", **none),
    "mesh": distillation("head", fused=sharded("2x4")),
    "cross_entropy of a head": cross_entropy("head"),
    "log_probs of one": log_probs(),
    **{
        f"function, {name}": distillation("function", tol=5e-5, take=PLANS[name])
        for name in PLANS
    },
    **{
        f"{tail}, list": distillation(tail, tile=2)
        for tail in ("bucket", "renormalize", "uniform")
    },
    "drop, list": distillation("drop", tile=2, floor=1e-6),
    **{f"moving {name}": moving(name) for name in MOVING if name != "js_normalized"},
}
over_cases = pytest.mark.parametrize(
    "case",
    [
        *QUICK.values(),
        *rarely(*((case,) for case in SLOW.values())),
    ],
    ids=[*QUICK, *SLOW],
)


@over_cases
def test_is_that_of_plain_jax(rng, monkeypatch, case):
    """Along a direction: forward over reverse, and reverse over a checkpointed one."""
    moved, fixed = case.make(rng)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    along = jax.tree.map(draw, moved)
    dot = lambda x, y: sum(map(jnp.vdot, *map(jax.tree.leaves, (x, y))))

    @jax.jit
    def second(moved, along, fixed):
        def gradient(module):
            total = lambda x: jnp.sum(jnp.sin(case.loss(module, x, fixed)))
            return jax.grad(total)

        def forward(module):
            return jax.jvp(gradient(module), (moved,), (along,))[1]

        mine = jax.checkpoint(gradient(jaxkl))
        reverse = jax.grad(lambda x: dot(mine(x), along))(moved)
        return forward(jaxkl.reference), forward(jaxkl), reverse

    if case.take is None:
        plain, *mine = second(moved, along, fixed)
    else:
        with taking(monkeypatch) as take:
            take(case.take)
            plain, *mine = second(moved, along, fixed)
    for found in mine:
        for x, y in zip(*map(jax.tree.leaves, (found, plain)), strict=True):
            assert_close(x, y, case.tol, floor=case.floor)


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
    with_metrics = sharded("2x4", jaxkl.distillation_loss_with_metrics)

    def second(loss):
        of_gradient = lambda s: jnp.sum(jax.grad(loss)(s, teacher) ** 2)
        return jax.jit(jax.grad(of_gradient))(student)

    found = second(lambda s, t: with_metrics(s, t)[0])
    assert_close(found, second(jaxkl.reference.distillation_loss), 1e-5)
