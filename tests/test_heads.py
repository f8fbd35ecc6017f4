"""Heads of both kinds: what they round, what they compute once, and what they hold."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
import jaxkl.reference
from jaxkl import distillation_loss, FunctionHead, LinearHead

from . import oracle
from .cases import (
    assert_matches,
    assert_source_gradient,
    CATALOGUE,
    evaluate,
    JENSEN_SHANNON,
    rarely,
)
from .helpers import assert_close
from .sources import (
    capped,
    exact_logits,
    expected_of,
    make_function,
    make_head,
    make_models,
    normed,
    rounded,
)


@pytest.mark.parametrize(
    "source, name",
    [("head", "js"), *rarely(("head", "forward"), ("head", "reverse"))]
    + rarely(("function", "js")),
)
def test_a_masked_vocabulary(rng, source, name):
    """Also of the teacher alone."""
    student, teacher = make_models(rng, source, (5,), 11, softcap=None, bias=True)
    mask = lambda bias: bias.at[3:6].set(-jnp.inf)
    of = lambda x: replace(x, bias=mask(x.bias))
    if source == "function":
        teacher = replace(teacher, apply=normed)
        of = lambda x: replace(x, params=x.params | dict(bias=mask(x.params["bias"])))
    masked = of(student), of(teacher)
    more = dict(temperature=jnp.float32(1.5), tile=2, tol=2e-5)
    _, grads = assert_matches(*masked, CATALOGUE[name], **more)
    for x in jax.tree.leaves((grads["student"], grads["teacher"])):
        assert x.shape[-1] != 11 or not x[..., 3:6].any()
    if name != "reverse":
        assert_matches(student, masked[1], CATALOGUE[name], **more)


# Precision.


def as_function(head):
    product = lambda kernel, x: jnp.dot(x, kernel, preferred_element_type="float32")
    return FunctionHead(product, head.kernel, head.hidden)


@pytest.mark.parametrize("form", ["head", "function"])
def test_sums_over_tiles_are_in_float32(rng, form):
    # With 4096 tokens, 8 at a time, a bfloat16 sum over 512 tiles stalls.
    tokens, vocab, tile = 4096, 32, 8
    head = make_head(rng, (tokens,), 8, vocab, "bfloat16")
    # A feature and a column of constant sign make the sum grow.
    head = replace(head, hidden=head.hidden.at[:, 0].set(1))
    teacher = rounded(rng, (tokens, vocab)).at[:, 5].add(2)
    d_logits = oracle.distillation_loss(exact_logits(head)[0], teacher).student
    exact = np.asarray(head.hidden, np.float64).T @ d_logits.astype(np.float64)

    def add(total, rows):
        x, d = rows
        return total + (x.T @ d).astype(jnp.bfloat16), None

    tiles = lambda x: x.reshape(-1, tile, x.shape[-1])
    rows = tiles(head.hidden), tiles(jnp.asarray(d_logits, jnp.bfloat16))
    narrow, _ = jax.lax.scan(add, jnp.zeros((8, vocab), jnp.bfloat16), rows)
    error = lambda x: np.abs(np.asarray(x, np.float64) - exact).max() / abs(exact).max()
    assert error(narrow) > 0.02
    student = head if form == "head" else as_function(head)
    slope = jax.jit(jax.grad(partial(distillation_loss, tile=tile)))(student, teacher)
    mine = slope.kernel if form == "head" else slope.params
    assert mine.dtype == jnp.bfloat16 and error(mine) < 4e-3


def in_half(params, x):
    return normed(params, x).astype("float16")


@pytest.mark.parametrize(
    "apply, dtype, reduction",
    [
        (None, "float16", "mean"),
        (in_half, "float32", "mean"),
        *rarely((None, "float16", "none"), (normed, "float16", "mean")),
    ],
)
def test_a_small_loss_scale_survives_float16(rng, apply, dtype, reduction):
    """The gradient of a mean over many tokens is below float16's range, so the caller's
    loss scale must be applied before it is rounded; also where only logits are float16.
    """
    if apply is None:
        student = exact = make_head(rng, (4,), 5, 11, dtype)
    else:
        student = make_function(rng, (4,), 5, 11, dtype, apply)
        exact = replace(student, apply=normed)
    teacher = rounded(rng, (4, 11), dtype)
    scale = 2.0**16
    scaled = dict(normalizer=4e6, cotangent=scale)
    if reduction == "none":
        scaled = dict(reduction="none", cotangent=scale / 4e6)
    _, grads = evaluate(student, teacher, weights=jnp.full(4, 1.0), **scaled)
    want = expected_of(exact, teacher, cotangent=scale / 1e6).student
    assert_source_gradient(student, grads["student"], want, reduction, 1e-2)


def test_a_half_gradient_meets_the_cotangent_in_float32(rng):
    student, teacher = make_models(rng, "head", (5,), 16, "bfloat16")
    _, pull = jax.vjp(lambda s: distillation_loss(s, teacher), student)
    g = np.float32(1 + 2**-8 - 2**-12)  # in bfloat16 it would be 1
    of = lambda g: jax.tree.leaves(pull(g))
    for d, one in zip(of(g), of(np.float32(1)), strict=True):
        want = (one.astype("float32") * g).astype("bfloat16")
        np.testing.assert_array_equal(d.astype("float32"), want.astype("float32"))
        assert np.any(d != one)


@pytest.mark.parametrize("tile", [100, *rarely(None)])
def test_d_bias_has_the_digits_of_a_float32_bias(rng, tile):
    """It needs no product, whose operands are bfloat16 here."""
    head = make_head(rng, (512,), 8, 37, "bfloat16")
    head = replace(head, bias=rounded(rng, (37,)))
    teacher = make_head(rng, (512,), 8, 37)
    slope = jax.jit(
        jax.grad(
            lambda bias: distillation_loss(replace(head, bias=bias), teacher, tile=tile)
        )
    )
    assert_close(slope(head.bias), expected_of(head, teacher).student.bias, 5e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float16")])
def test_logits_are_not_rounded_to_half_precision(rng, dtype):
    student = make_head(rng, (6,), 64, 300, dtype)
    noise = rounded(rng, (64, 300), scale=0.02)
    kernel = (student.kernel.astype(jnp.float32) + noise).astype(dtype)
    teacher = replace(student, kernel=kernel)
    expected = expected_of(student, teacher).loss.astype(np.float64)
    half = lambda head: np.asarray((head.hidden @ head.kernel).astype("float32"))
    rounded_first = oracle.distillation_loss(half(student), half(teacher)).loss
    assert abs(rounded_first / expected - 1) > 1e-4
    value = jax.jit(distillation_loss)(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_a_small_gradient_is_no_float16_operand(rng):
    """That to the logits is below float16's smallest step, but not `d kernel`."""
    student, teacher = (make_head(rng, (64,), 4, 11, "float16") for _ in range(2))
    hidden, kernel = 256 * student.hidden, student.kernel / 256
    student = replace(student, hidden=hidden, kernel=kernel)
    arguments = dict(weights=jnp.full(64, 1e-7), reduction="sum")
    _, grads = evaluate(student, teacher, **arguments)
    expected = expected_of(student, teacher, **arguments).student.kernel
    assert_close(grads["student"].kernel, expected, 1e-2)


# Matrix products and memory.


def dots(f, *args):
    text = jax.jit(f).lower(*args).compile().as_text()
    return len(re.findall(r" = \S+ dot\(", text))


@pytest.mark.parametrize(
    "program",
    [
        "value",
        "constant teacher",
        *rarely("both", "frozen kernel", "hidden", "student", "one tile"),
    ],
)
def test_products_are_computed_once(rng, program):
    student = make_head(rng, (16,), 64, 128, bias=True)
    args = student.hidden, student.kernel, student.bias, make_head(rng, (16,), 32, 128)

    def loss(hidden, kernel, bias, teacher, tile=4, **options):
        student = LinearHead(hidden, kernel, bias)
        return distillation_loss(student, teacher, tile=tile, **options)

    frozen = lambda h, k, b, t: loss(h, jax.lax.stop_gradient(k), b, t)
    # The teacher is a constant by default.
    both = partial(loss, differentiate_teacher=True)
    programs = {
        "value": (loss, 2),
        "frozen kernel": (jax.value_and_grad(frozen, (0, 1, 2)), 3),
        "constant teacher": (jax.value_and_grad(loss, (0, 1, 3)), 4),
        "both": (jax.value_and_grad(both, (0, 1, 3)), 6),
        "hidden": (jax.value_and_grad(loss, 0), 3),
        "student": (jax.value_and_grad(loss, (0, 1)), 4),
        "one tile": (jax.value_and_grad(partial(loss, tile=16), (0, 1)), 4),
    }
    f, expected = programs[program]
    assert dots(f, *args) == expected


@pytest.mark.slow
@pytest.mark.parametrize("tile", [4, *rarely(16)])
@pytest.mark.parametrize("apply", [normed, *rarely(capped)])
def test_products_of_a_function_are_computed_once(rng, apply, tile):
    head = make_function(rng, (16,), 5, 128, apply=apply)
    teacher = rounded(rng, (16, 128))

    def loss(params, hidden):
        student = FunctionHead(apply, params, hidden)
        return distillation_loss(student, teacher, tile=tile)

    def frozen(params, hidden):
        kernel = jax.lax.stop_gradient(params["kernel"])
        return loss(params | dict(kernel=kernel), hidden)

    args = head.params, head.hidden
    assert dots(loss, *args) == 1
    assert dots(jax.grad(loss, (0, 1)), *args) == 3
    assert dots(jax.grad(frozen, (0, 1)), *args) == 2
    assert dots(jax.grad(loss, 0), *args) == 3
    of_bias = lambda bias, params, hidden: loss(params | dict(bias=bias), hidden)
    assert dots(jax.grad(of_bias), head.params["bias"], *args) == 1


TILE, HIDDEN, VOCAB = 64, 32, 16000


def memory(form, tokens, loss=distillation_loss, **options):
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    hidden, kernel = shape(tokens, HIDDEN), shape(HIDDEN, VOCAB)
    head = LinearHead(hidden, kernel)
    if form != "head":
        params = dict(scale=shape(HIDDEN), kernel=kernel, bias=shape(VOCAB))
        head = FunctionHead(form, params, hidden)
    f = lambda s, t: loss(s, t, **options).sum()
    stats = jax.jit(jax.value_and_grad(f)).lower(head, head).compile().memory_analysis()
    return stats.temp_size_in_bytes


@pytest.mark.parametrize(
    "form, options",
    [
        ("head", dict(divergence=JENSEN_SHANNON[0])),
        *rarely(("head", dict(reduction="none")), (normed, {}), (capped, {})),
    ],
)
def test_temporaries_are_those_of_a_tile(form, options):
    tokens = 4096
    few, many = (memory(form, x, tile=TILE, **options) for x in (tokens, 2 * tokens))
    heads = 4 * HIDDEN * VOCAB * 4
    assert few < 12 * TILE * VOCAB * 4 + heads < 0.3 * tokens * VOCAB * 4
    # More tokens only add hidden states, their gradients and weights.
    most = 8 if form == "head" else 12
    assert many - few < most * tokens * HIDDEN * 4


def test_plain_jax_breaks_the_memory_bound():
    plain = jaxkl.reference.distillation_loss
    assert memory("head", 4096, loss=plain) > 4096 * VOCAB * 4
