"""How much programs of `distillation_loss` hold, and how often they are traced.

Memory is read off programs that are compiled for shapes and never run.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import jaxkl

from .cases import each, KINDS, over_sources, rarely, rounded
from .sources import make_models


TOKENS, VOCAB = 4096, 32000


def temporaries(loss, teacher=None, dtype="float32", **arguments):
    """In sizes of the student's logits."""
    logits = jax.ShapeDtypeStruct((TOKENS, VOCAB), dtype)

    def f(s, t, arguments):
        value, *metrics = jax.tree.leaves(loss(s, t, **arguments))
        return value.sum(), metrics

    step = jax.jit(jax.value_and_grad(f, has_aux=True))
    lowered = step.lower(logits, logits if teacher is None else teacher, arguments)
    size = lowered.compile().memory_analysis().temp_size_in_bytes
    return size / (TOKENS * VOCAB * jnp.dtype(dtype).itemsize)


of_tokens = lambda dtype: jax.ShapeDtypeStruct((TOKENS,), dtype)
ARRAYS = dict.fromkeys(("temperature", "weights"), of_tokens(jnp.float32))
ARRAYS |= dict(labels=of_tokens(jnp.int32), where=of_tokens(bool))
EVERYTHING = dict(alpha=0.5, z_loss=1e-4, label_smoothing=0.1, vocab_size=VOCAB - 1)


@pytest.mark.parametrize(
    "options, arrays",
    [
        (EVERYTHING, ARRAYS),
        *rarely(({}, {}), (dict(temperature=2.0), {}), (dict(reduction="none"), {})),
        *rarely((dict(divergence=jaxkl.ReverseKL()), {})),
        *rarely((dict(differentiate_teacher=True), {})),
    ],
)
def test_no_temporary_of_the_size_of_the_logits(options, arrays):
    assert temporaries(partial(jaxkl.distillation_loss, **options), **arrays) < 0.1


@pytest.mark.parametrize("k", [32, 0])
def test_metrics_hold_no_logits(k):
    """Of a teacher's list of `k`, or of its logits; beside the rows of a tile."""
    slots = partial(jax.ShapeDtypeStruct, (TOKENS, k))
    teacher = jaxkl.SparseTeacher(slots(jnp.int32), slots(jnp.float32), tail="uniform")
    loss = jaxkl.distillation_loss_with_metrics
    assert temporaries(loss, teacher if k else None) < 0.1


def test_slopes_are_evaluated_again_and_not_kept():
    """In bfloat16 all tokens are one tile on a CPU, whose arrays are float32."""
    of = lambda x: partial(jaxkl.distillation_loss, divergence=x)
    arrays = lambda x: temporaries(of(x), dtype="bfloat16") / 2
    assert arrays(jaxkl.JensenShannon(0.5)) < 5.5  # slopes make it 6
    assert arrays(jaxkl.AlphaDivergence(0.5)) < 5.5


def test_plain_jax_breaks_the_memory_bound():
    def plain(s, t):
        log_q, log_p = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

    assert temporaries(plain) > 1


@over_sources("logits forward", slow=("head forward", *each("logits", KINDS)))
def test_one_trace_for_repeated_calls(rng, source, divergence):
    divergence, _ = divergence
    traces = 0

    @partial(jax.jit, static_argnames="divergence")
    def f(s, t, temperature, divergence):
        nonlocal traces
        traces += 1
        loss = partial(jaxkl.distillation_loss, divergence=divergence)
        return jax.value_and_grad(loss)(s, t, temperature=temperature)

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

    loss = jax.value_and_grad(partial(jaxkl.distillation_loss, divergence=counted))
    loss(rounded(rng, (3, 5)), rounded(rng, (3, 5)))
    first = traces
    for _ in range(3):
        loss = jax.value_and_grad(partial(jaxkl.distillation_loss, divergence=counted))
        loss(rounded(rng, (3, 5)), rounded(rng, (3, 5)))
    assert traces == first > 0
