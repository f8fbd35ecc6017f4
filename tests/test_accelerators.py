"""What GPUs and TPUs run where it differs from what CPUs run: here on a CPU."""

import functools as ft
from dataclasses import replace

import jax
import pytest

import jaxkl

from .cases import rarely, rounded
from .registry import check, Loss, LOSSES
from .sources import make_head


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


@pytest.mark.parametrize(
    "name, divergence, dtype",
    [
        ("head", "forward", "float32"),
        ("logits, bucket", "forward", "bfloat16"),
        *rarely(
            *(("head", x, "float32") for x in ("reverse", "js", "user")),
            ("logits, bucket", "forward", "float32"),
            *(("logits, uniform", "forward", x) for x in ("float32", "bfloat16")),
        ),
    ],
)
def test_tiles(rng, taken, name, divergence, dtype):
    loss = replace(LOSSES[name], divergence=divergence)
    tol = None if name == "head" else (2e-6, 1e-2 if dtype == "bfloat16" else 1e-5)
    check(loss, rng, loss.make(rng, (TOKENS,), VOCAB, dtype), tile=64, tol=tol)
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
    # The KL divergences wait for no sum of slopes, but for sums of exponentials.
    assert "optimization_barrier" in program


@pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16")])
@pytest.mark.parametrize("tail", ["bucket", *rarely("drop", "renormalize", "uniform")])
@pytest.mark.parametrize("student", ["head", "logits"])
def test_a_tpu_spreads_a_list_by_products(rng, taken, student, tail, dtype):
    """With columns in several rows of lanes, the last of which is not full."""
    loss = Loss(f"{student}, {tail}")
    tile = dict(tile=4) if student == "head" else {}
    check(loss, rng, loss.make(rng, (9,), 301, dtype), **tile)
