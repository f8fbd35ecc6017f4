"""What `distillation_loss` alone has: divergences, arguments that are left out, shapes,
models of two dtypes, and constants."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl

from . import oracle
from .cases import (
    ALL,
    assert_gradient,
    assert_matches,
    each,
    evaluate,
    FORWARD,
    over,
    over_kinds,
    over_sources,
    rarely,
    rounded,
)
from .helpers import assert_close, TOLERANCE
from .registry import check, over_losses
from .sources import make_models, per_token, TAILS


@over_sources(
    "logits skew_forward",
    "head js_normalized",
    "head, logits reverse",
    "renormalize user",
    "bucket reverse",
    "uniform reverse",
    slow=(
        *each("logits", (x for x in ALL if x != "skew_forward")),
        *each("head", (x for x in ALL if x != "js_normalized")),
        *("logits, head reverse", "head, logits user", "logits, head user"),
        *each("renormalize", ("js", "alpha_half", "skew_reverse", "total_variation")),
        *each("bucket", ("js_normalized", "user")),
        *each("uniform", ("forward", "total_variation")),
        *each("conditional", ALL),
    ),
)
def test_every_divergence(rng, source, divergence):
    """Beside little of the labels, whose gradients would hide its own."""
    models = make_models(rng, source, (3, 5), 13, pad=(3, 1))
    arrays = per_token(rng, (3, 5), "temperature", "weights", "where", "labels")
    if source not in TAILS:
        arrays["teacher_temperature"] = jnp.float32(1.5)
    assert_matches(
        *models, divergence, **arrays, alpha=0.9, label_smoothing=0.1, z_loss=1e-3,
        vocab_size=13, reduction="none", tile=4,
        cotangent=np.float32(rng.normal(size=(3, 5))),
    )  # fmt: skip


OF_TOKENS = np.float32([0.5, 3, 1, 0, 2, 0.7])
WHERE = np.array([True, True, False, True, True, False])
LABELS = dict(labels=np.array([0, 6, -100, 3, -100, 1]))
ARRAY = np.array(1.7, np.float32)
ARGUMENTS = {
    "temperature": dict(temperature=ARRAY),
    "numbers": dict(temperature=0.5, teacher_temperature=1.25),
    "no square": dict(
        temperature=OF_TOKENS + 0.5, teacher_temperature=ARRAY, t_squared=False
    ),
    "sum": dict(weights=OF_TOKENS, reduction="sum"),
    "where": dict(where=WHERE, reduction="none"),
    "normalizer": dict(weights=OF_TOKENS, where=WHERE, normalizer=10),
    "labels": LABELS | dict(alpha=0.3),
}
RARE_ARGUMENTS = {
    "none": {},
    "temperatures": dict(temperature=OF_TOKENS + 0.5),
    "teacher_temperature": dict(teacher_temperature=OF_TOKENS + 0.5),
    "weights": dict(weights=OF_TOKENS),
    "normalizer of a sum of weights": dict(weights=OF_TOKENS, normalizer=ARRAY),
    "number of tokens": dict(where=WHERE, normalizer=np.array(4)),
    "only labels": LABELS | dict(alpha=0.0, label_smoothing=0.1),
    "labels of no part": LABELS | dict(alpha=1.0, z_loss=0.02),
    "uniform labels": LABELS | dict(alpha=0.25, label_smoothing=1.0),
    "z_loss": dict(temperature=ARRAY, z_loss=0.02),
    "vocab_size": dict(vocab_size=7),
}


@pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16", "float16")])
@pytest.mark.parametrize(
    "arguments",
    [*ARGUMENTS.values(), *rarely(*RARE_ARGUMENTS.values())],
    ids=[*ARGUMENTS, *RARE_ARGUMENTS],
)
def test_arguments_alone(rng, dtype, arguments):
    """What is left out, or is a number, is no array of the program."""
    wider = 2 if "vocab_size" in arguments else 0
    s, t = rounded(rng, (6, 7), dtype), rounded(rng, (6, 7 + wider), dtype)
    array = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    assert_matches(s, t, FORWARD, **{k: array(x) for k, x in arguments.items()})


def test_traced_numbers(rng):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    numbers = dict(alpha=0.25, label_smoothing=0.125, z_loss=0.0625)
    traced = {name: jnp.float32(x) for name, x in numbers.items()}
    labels = jnp.array([1, -100, 3, 0])
    assert_matches(s, t, FORWARD, labels=labels, expect=numbers, **traced)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float32", "float16")])
@pytest.mark.parametrize("label_smoothing", [0.2, *rarely(0.0)])
def test_cross_entropy_matches_torch(rng, dtype, label_smoothing):
    import torch

    s, labels = rounded(rng, (8, 7), dtype), np.array([0, 6, -100, 3, 2, -100, 1, 1])
    options = dict(label_smoothing=label_smoothing, reduction="none")
    of_labels = dict(labels=jnp.asarray(labels), alpha=0.0, temperature=4.0)
    value, grads = evaluate(s, s, **of_labels, **options)
    x = torch.tensor(np.asarray(s, np.float64), requires_grad=True)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = cross_entropy(x, torch.tensor(labels), **options)
    expected.sum().backward()
    assert_close(value, expected.detach(), 1e-6, "value")
    assert_close(grads["student"], x.grad, TOLERANCE[dtype][1], "grad")
    assert not grads["teacher"].any()


@pytest.mark.parametrize("x", [2, np.float64(2), *rarely(2.0, np.float32(2))])
def test_numpy_inputs(rng, x):
    s, t = rng.normal(size=(2, 4, 7)).astype(np.float32)
    value = jaxkl.distillation_loss(s, t, temperature=x)
    assert value.dtype == jnp.float32
    assert_close(value, oracle.distillation_loss(s, t, temperature=2).loss, 1e-6)
    numbers = [[1.0, 2.0]], ([np.float32(1), np.float32(2)],)
    assert jaxkl.distillation_loss(*numbers) == 0


@over_losses("logits", slow=("head", "logits, bucket", "log_probs of logits"))
@pytest.mark.parametrize(
    "shape, vocab",
    [((), 1001), ((2, 1, 3), 1), *rarely(((130,), 700), ((1,), 2), ((6,), 1001))],
)
def test_shapes(rng, loss, shape, vocab):
    batch = loss.make(rng, shape, vocab)
    batch = batch._replace(others=batch.others | dict(where=jnp.ones(shape, bool)))
    options = {} if loss.function == "token_log_probs" else dict(reduction="none")
    check(loss, rng, batch, **options)


# Dtypes.


@pytest.mark.parametrize(
    "source, dtypes",
    [
        ("head", ("float32", "float16")),
        ("head", ("float64", "float32")),
        *rarely(*(("logits", (x, "float32")) for x in ("bfloat16", "float16"))),
        *rarely(*(("logits", (x, "float32")) for x in ("float16", "float64"))),
    ],
)
def test_models_of_different_dtypes(rng, source, dtypes):
    with jax.enable_x64("float64" in dtypes):
        student, teacher = (
            make_models(rng, source, (4,), 37, x)[i] for i, x in enumerate(dtypes)
        )
        if dtypes == ("float32", "float16"):
            student = replace(student, hidden=student.hidden.astype("bfloat16"))
        weights = jnp.asarray(rng.uniform(0, 2, size=4), jnp.bfloat16)
        assert_matches(
            student, teacher, FORWARD, temperature=2.0, weights=weights, tile=3
        )


FLOATS = ("student", "teacher", "temperature", "teacher_temperature", "weights")


@pytest.mark.parametrize("wide", ["student", *rarely(*FLOATS[1:], None)])
def test_loss_is_float64_iff_a_float_argument_is(rng, wide):
    with jax.enable_x64(True):
        dtypes = {x: jnp.float64 if x == wide else jnp.float32 for x in FLOATS}
        ones = {x: jnp.ones(4, dtypes[x]) for x in FLOATS[2:]}
        s, t = (rounded(rng, (4, 7), dtypes[name]) for name in FLOATS[:2])
        value, grads = evaluate(s, t, **ones)
        assert value.dtype == (jnp.float64 if wide else jnp.float32)
        assert {name: g.dtype for name, g in grads.items()} == dtypes
        assert jaxkl.distillation_loss(s, t, temperature=2.0).dtype == (
            jnp.float64 if wide in FLOATS[:2] else jnp.float32
        )


# Constants.


@over_losses("head", slow=("logits", "function"))
@pytest.mark.parametrize("name", ["temperature", "weights", *rarely(*FLOATS[:2])])
def test_gradient_of_one_argument_alone(rng, loss, name):
    batch = loss.make(rng, (5,), 7)
    check(loss, rng, batch.move(*(x for x in batch.floats if x != name)))


def test_numbers_have_a_zero_gradient(rng):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    numbers = dict(alpha=0.5, z_loss=0.1, label_smoothing=0.1, normalizer=3.0)
    numbers = {name: jnp.float32(x) for name, x in numbers.items()}
    labels = jnp.array([0, 1, 2, -100])
    f = lambda s, numbers: jaxkl.distillation_loss(s, t, labels=labels, **numbers)
    d_s, d_numbers = jax.jit(jax.grad(f, argnums=(0, 1)))(s, numbers)
    assert d_s.any() and d_numbers.keys() == numbers.keys()
    assert all(g.shape == () and g == 0 for g in d_numbers.values())


@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@over_kinds
def test_a_teacher_is_a_constant(rng, divergence, reference, own, reduction):
    """Gradients to temperatures still pass through both models."""
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7), "bfloat16")
    arguments = dict(temperature=jnp.asarray(rng.uniform(1, 2, size=4), jnp.float32))
    arguments |= dict(teacher_temperature=jnp.float32(2)) if own else {}
    options = dict(divergence=divergence, reduction=reduction)
    value, grads = evaluate(s, t, differentiate_teacher=False, **arguments, **options)
    options["divergence"] = reference
    expected = oracle.distillation_loss(s, t, **arguments, **options)
    assert_close(value, expected.loss, 1e-6)
    assert grads["teacher"].dtype == t.dtype and not grads["teacher"].any()
    assert_close(grads["student"], expected.student, 1e-5)
    for name in arguments:
        assert_gradient(name, grads[name], expected, 1e-5)


@pytest.mark.parametrize("vocab", [7, 1100])
@over("reverse", "js", slow=["forward", "total_variation"])
def test_a_temperature_that_both_models_have(rng, divergence, reference, vocab):
    """It divides sums; those of many columns are made in another way."""
    s, t = (jnp.float32(rng.normal(size=(5, vocab))) for _ in range(2))
    weights = dict(weights=jnp.float32(rng.uniform(0.5, 2, size=5)))
    pair = divergence, reference
    assert_matches(s, t, pair, temperature=jnp.float32(2.5), cotangent=1.5, **weights)
