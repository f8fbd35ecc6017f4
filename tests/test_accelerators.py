"""What GPUs and TPUs run where it differs from what CPUs run: here on a CPU."""

import functools as ft

import jax
import jax.numpy as jnp
import pytest

import jaxkl

from .cases import assert_matches, FORWARD, over, rarely, rounded
from .sources import make_head, make_models


TOKENS, VOCAB = 521, 53  # sizes that are in no other test, and that no tile divides


@pytest.fixture
def taken(monkeypatch, all_platforms):
    """Takes the accelerators' way wherever the program depends on the platform, and
    that of TPUs where they have their own.

    It is a list of the plans that were taken.
    """
    plans = []

    def on_accelerator(*args, default, **platforms):
        if isinstance(default, ft.partial):  # of the walk, with its plan
            _, _, plan = default.args
            assert platforms["cpu"].args[2] != plan
            plans.append(plan)
        return platforms.get("tpu", default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_accelerator)
    return plans


@pytest.mark.usefixtures("all_platforms")
def test_each_platform_has_its_own_program(rng):
    """The platforms are those of users, and not the one that other tests make do with.

    Accelerators have the slopes twice, and a barrier keeps XLA from storing them.
    """
    s, t = rounded(rng, (TOKENS, VOCAB)), rounded(rng, (TOKENS, VOCAB))
    options = dict(divergence=jaxkl.JensenShannon(), tile=64)
    grad = jax.grad(lambda s: jaxkl.distillation_loss(s, t, **options))
    traced = jax.jit(grad).trace(s)
    for platform, twice in ("cpu", False), ("tpu", True), ("cuda", True):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" in program) == twice


@over("forward", slow=["reverse", "js", "user"])
def test_heads(rng, taken, divergence, reference):
    student = make_head(rng, (TOKENS,), 5, VOCAB, bias=True, softcap=3.0)
    teacher = make_head(rng, (TOKENS,), 3, VOCAB)
    assert_matches(
        student,
        teacher,
        (divergence, reference),
        temperature=jnp.asarray(rng.uniform(0.5, 3, size=TOKENS), jnp.float32),
        where=jnp.asarray(rng.random(TOKENS) < 0.7),
        tile=64,
    )
    assert taken and all(plan.tile == 64 and plan.recompute for plan in taken)


@pytest.mark.parametrize(
    "divergence", [jaxkl.JensenShannon(), *rarely(jaxkl.ReverseKL(), jaxkl.ForwardKL())]
)
@pytest.mark.parametrize("tile", [64, *rarely(None)])
def test_slopes_are_computed_twice(rng, taken, divergence, tile):
    student, teacher = (make_head(rng, (TOKENS,), 5, VOCAB) for _ in range(2))
    options = dict(divergence=divergence, tile=tile)
    loss = lambda student: jaxkl.distillation_loss(student, teacher, **options)
    program = jax.jit(jax.grad(loss)).lower(student).as_text()
    assert taken
    # The gradient of the KL divergences waits for no sum of slopes.
    has_barrier = "optimization_barrier" in program
    assert has_barrier == (divergence == jaxkl.JensenShannon())


@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float32")])
@pytest.mark.parametrize("tail", ["bucket", *rarely("uniform")])
def test_a_list_beside_logits(rng, taken, dtype, tail):
    s, t = rounded(rng, (TOKENS, VOCAB), dtype), rounded(rng, (TOKENS, VOCAB))
    teacher = jaxkl.top_k_teacher(t, 5, tail=tail, temperature=1.7)
    more = dict(temperature=1.7, tile=64, value_tol=2e-6)
    assert_matches(s, teacher, FORWARD, **more)
    assert taken and all(plan.tile == 64 and plan.recompute for plan in taken)


@pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16")])
@pytest.mark.parametrize("tail", ["bucket", *rarely("drop", "renormalize", "uniform")])
@pytest.mark.parametrize("student", ["head", "logits"])
def test_a_tpu_spreads_a_list_by_products(rng, taken, student, tail, dtype):
    """With columns in several rows of lanes, the last of which is not full."""
    models = make_models(rng, f"{student}, {tail}", (9,), 301, dtype)
    tile = 4 if student == "head" else None
    assert_matches(*models, FORWARD, temperature=2.0, tile=tile)
