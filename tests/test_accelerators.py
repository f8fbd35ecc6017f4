"""What GPUs and TPUs run, where it is not what CPUs run: here on a CPU."""

import jax
import jax.numpy as jnp
import pytest

import jaxkl
from jaxkl import _engine

from .cases import assert_matches, over, rarely, rounded
from .helpers import assert_close
from .sources import make_head


TOKENS, VOCAB = 521, 53  # more tokens than one tile takes; in no other test


@pytest.fixture
def taken(monkeypatch):
    """The functions that were taken where it depends on the platform."""
    found = []

    def other(*args, default, cpu):
        found.append((default, cpu))
        return default(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", other)
    monkeypatch.setattr(_engine, "_MIB", 64)  # bytes: so that there are tiles
    jax.clear_caches()
    yield found
    jax.clear_caches()


@over("forward", slow=["reverse", "js", "user"])
def test_heads(rng, taken, divergence, reference):
    student = make_head(rng, (TOKENS,), 5, VOCAB, bias=True, softcap=3.0)
    teacher = make_head(rng, (TOKENS,), 3, VOCAB)
    temperature = jnp.asarray(rng.uniform(0.5, 3, size=TOKENS), jnp.float32)
    where = jnp.asarray(rng.random(TOKENS) < 0.7)
    assert_matches(
        student, teacher, (divergence, reference), temperature=temperature, where=where
    )
    (default, cpu), *_ = taken
    assert default.func is _engine._run_tiles and default.keywords["again"]
    assert not cpu.keywords["again"]
    for divergence, again in ((jaxkl.ReverseKL(), True), (jaxkl.ForwardKL(), False)):
        # The slopes of a forward KL are the gradient: their sum is not waited for.
        options = dict(divergence=divergence)
        slope = jax.grad(lambda s, x=options: jaxkl.distillation_loss(s, teacher, **x))
        assert again == ("optimization_barrier" in str(jax.make_jaxpr(slope)(student)))


@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float32")])
@pytest.mark.parametrize("tail", ["bucket", *rarely("uniform")])
def test_a_list_beside_logits(rng, taken, dtype, tail):
    s, t = rounded(rng, (TOKENS, VOCAB), dtype), rounded(rng, (TOKENS, VOCAB))
    teacher = jaxkl.top_k_teacher(t, 5, tail=tail)

    def run(loss):
        f = lambda s, teacher: loss(s, teacher, temperature=1.7)
        return jax.jit(jax.value_and_grad(f))(s, teacher)

    value, grad = run(jaxkl.distillation_loss)
    (default, cpu), *_ = taken
    assert default.func is _engine._run_tiles
    assert (cpu.func is _engine._run_whole) == (dtype == "bfloat16")
    want, wants = run(jaxkl.reference.distillation_loss)
    assert_close(value, want, 2e-6)
    assert_close(grad, wants, 1e-5 if dtype == "float32" else 1e-2)
