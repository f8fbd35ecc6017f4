"""`LinearHead`: hidden states and a kernel in place of logits."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
import jaxkl.reference
from jaxkl import distillation_loss, LinearHead

from . import oracle
from .cases import (
    assert_dropped_rows_may_hold_nan,
    assert_matches,
    assert_source_gradient,
    evaluate,
    FORWARD,
    over,
    rarely,
    REVERSE,
    rounded,
)
from .helpers import assert_close
from .sources import exact_logits, expected_of, make_head


def test_one_head_as_both_models(rng):
    head = make_head(rng, (5,), 4, 11, bias=True)
    f = lambda head: distillation_loss(head, head, divergence=jaxkl.ReverseKL())
    value, grad = jax.jit(jax.value_and_grad(f))(head)
    assert value == 0 and not any(x.any() for x in jax.tree.leaves(grad))


@pytest.mark.parametrize("reduction", ["mean", *rarely("sum")])
def test_only_cross_entropy(rng, reduction):
    student = make_head(rng, (6,), 5, 11, softcap=3.0)
    teacher = make_head(rng, (6,), 5, 11)
    _, grads = assert_matches(
        student,
        teacher,
        FORWARD,
        alpha=0.0,
        labels=jnp.array([0, 10, -100, 3, -100, 1]),
        reduction=reduction,
        normalizer=7 if reduction == "mean" else None,
    )
    assert not grads["teacher"].hidden.any() and not grads["teacher"].kernel.any()


# Masks and dropped tokens.


@over("js", slow=["forward", "reverse"])
def test_a_masked_vocabulary(rng, divergence, reference):
    student = make_head(rng, (5,), 4, 11, bias=True)
    teacher = make_head(rng, (5,), 4, 11, bias=True)
    mask = lambda head: dataclasses.replace(head, bias=head.bias.at[3:6].set(-jnp.inf))
    arguments = dict(temperature=jnp.float32(1.5), tile=2)
    _, grads = assert_matches(
        mask(student), mask(teacher), (divergence, reference), **arguments
    )
    for grad in (grads["student"], grads["teacher"]):
        assert not grad.kernel[:, 3:6].any() and not grad.bias[3:6].any()
    if divergence != jaxkl.ReverseKL():
        assert_matches(student, mask(teacher), (divergence, reference), **arguments)


@pytest.mark.parametrize("plan", rarely(dict(tile=2), dict(plan="lean")), ids=str)
def test_padding_columns_may_hold_nan(rng, plan):
    # In first and second derivatives, and those of plain autodiff.
    head = make_head(rng, (3,), 2, 5, bias=True)
    more = lambda x: [(0, 0)] * (x.ndim - 1) + [(0, 2)]
    pad = lambda x: jnp.pad(x, more(x), constant_values=jnp.nan)
    wide = dataclasses.replace(head, kernel=pad(head.kernel), bias=pad(head.bias))
    teacher = rounded(rng, (3, 5))

    @partial(jax.jit, static_argnums=(0, 1))
    def run(loss, options, head, teacher):
        f = lambda hidden, kernel, bias: loss(
            dataclasses.replace(head, hidden=hidden, kernel=kernel, bias=bias),
            teacher, vocab_size=5, **dict(options),
        )  # fmt: skip
        arrays = head.hidden, head.kernel, head.bias
        return jax.grad(f, (0, 1, 2))(*arrays), jax.jacrev(jax.grad(f))(*arrays)

    options = tuple(plan.items())
    for loss in distillation_loss, jaxkl.reference.distillation_loss:
        (d_hidden, *d_shared), second = run(loss, options, wide, pad(teacher))
        want, want_second = run(loss, options, head, teacher)
        assert_close(second, want_second, 1e-5)
        assert_close(d_hidden, want[0], 1e-5)
        for got, of_kept in zip(d_shared, want[1:], strict=True):
            assert_close(got, np.pad(of_kept, more(of_kept)), 1e-5)


@pytest.mark.slow
def test_a_kernel_without_padding_is_not_cut(rng):
    head = make_head(rng, (4,), 3, 5)
    f = lambda head, t: distillation_loss(head, t, tile=2)
    program = jax.jit(jax.grad(f)).lower(head, rounded(rng, (4, 5))).as_text()
    assert "tensor<3x5xf32>" in program
    assert not re.search(r"stablehlo.slice.*\(tensor<3x5xf32>", program)


@pytest.mark.parametrize("reduction, tile", [("none", 2), ("mean", None)])
@pytest.mark.parametrize("by", ["where", *rarely("weights")])
def test_a_dropped_row_may_hold_nan(rng, by, reduction, tile):
    settings = dict(bias=True, softcap=3.0)
    student = make_head(rng, (5,), 4, 11, **settings)
    teacher = make_head(rng, (5,), 3, 11, **settings)
    options = dict(by=by, reduction=reduction, tile=tile)
    assert_dropped_rows_may_hold_nan(student, teacher, **options)


def test_no_tokens(rng):
    student, teacher = (make_head(rng, (0, 3), 4, 11) for _ in range(2))
    value, grads = evaluate(student, teacher)
    assert value == 0 and not grads["student"].kernel.any()


# Precision.


def test_d_kernel_is_accumulated_in_float32(rng):
    # With 4096 tokens, 8 at a time, a bfloat16 sum over 512 tiles stalls.
    tokens, vocab, tile = 4096, 32, 8
    student = make_head(rng, (tokens,), 8, vocab, "bfloat16")
    # A feature and a column of constant sign make the sum grow.
    hidden = student.hidden.at[:, 0].set(1)
    student = dataclasses.replace(student, hidden=hidden)
    teacher = rounded(rng, (tokens, vocab)).at[:, 5].add(2)
    _, grads = evaluate(student, teacher, tile=tile, differentiate_teacher=False)
    s, _ = exact_logits(student)
    d_logits = oracle.distillation_loss(s, teacher).student.astype(np.float64)
    exact = np.asarray(hidden, np.float64).T @ d_logits

    def add(total, rows):
        x, d = rows
        return total + (x.T @ d).astype(jnp.bfloat16), None

    tiles = lambda x: x.reshape(-1, tile, x.shape[-1])
    rows = tiles(hidden), tiles(jnp.asarray(d_logits, jnp.bfloat16))
    narrow, _ = jax.lax.scan(add, jnp.zeros((8, vocab), jnp.bfloat16), rows)
    error = lambda x: np.abs(np.asarray(x, np.float64) - exact).max() / abs(exact).max()
    assert error(narrow) > 0.02
    assert error(grads["student"].kernel) < 4e-3


@pytest.mark.parametrize("tile", [100, *rarely(None)])
def test_d_bias_has_the_digits_of_a_float32_bias(rng, tile):
    """It needs no product, whose operands are bfloat16 here."""
    head = make_head(rng, (512,), 8, 37, "bfloat16")
    bias = jnp.asarray(rng.normal(size=37), jnp.float32)
    teacher = make_head(rng, (512,), 8, 37)
    exact = expected_of(LinearHead(head.hidden, head.kernel, bias), teacher).student

    @jax.jit
    def slope(bias, head, teacher):
        loss = lambda bias: jaxkl.distillation_loss(
            LinearHead(head.hidden, head.kernel, bias), teacher, tile=tile
        )
        return jax.grad(loss)(bias)

    assert_close(slope(bias, head, teacher), exact.bias, 5e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float16")])
def test_logits_are_not_rounded_to_half_precision(rng, dtype):
    student = make_head(rng, (6,), 64, 300, dtype)
    noise = jnp.asarray(0.02 * rng.normal(size=(64, 300)), jnp.float32)
    kernel = (student.kernel.astype(jnp.float32) + noise).astype(dtype)
    teacher = dataclasses.replace(student, kernel=kernel)
    expected = expected_of(student, teacher).loss.astype(np.float64)
    value, _ = evaluate(student, teacher)
    half = lambda head: np.asarray((head.hidden @ head.kernel).astype("float32"))
    rounded_first = oracle.distillation_loss(half(student), half(teacher)).loss
    assert abs(rounded_first / expected - 1) > 1e-4
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_a_small_gradient_is_no_float16_operand(rng):
    student, teacher = (make_head(rng, (64,), 4, 11, "float16") for _ in range(2))
    hidden, kernel = 256 * student.hidden, student.kernel / 256
    student = dataclasses.replace(student, hidden=hidden, kernel=kernel)
    # The gradient to the logits is below float16's smallest step, but not that to the
    # kernel.
    arguments = dict(weights=jnp.full(64, 1e-7), reduction="sum")
    _, grads = evaluate(student, teacher, **arguments)
    expected = expected_of(student, teacher, **arguments).student.kernel
    assert_close(grads["student"].kernel, expected, 1e-2)


@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
def test_a_small_loss_scale_survives_float16(rng, reduction):
    # The gradient of a mean over many tokens is below float16's range, so the caller's
    # loss scale must be applied before the gradient is rounded.
    student = make_head(rng, (4,), 5, 11, "float16")
    teacher = make_head(rng, (4,), 5, 11, "float16")
    scale = 2.0**16
    _, grads = evaluate(
        student,
        teacher,
        weights=jnp.full(4, 1.0),
        reduction=reduction,
        normalizer=4e6 if reduction == "mean" else None,
        cotangent=scale if reduction == "mean" else scale / 4e6,
    )
    expected = expected_of(student, teacher, cotangent=scale / 1e6)
    assert_source_gradient(student, grads["student"], expected.student, reduction, 1e-2)


# Matrix products and memory.


def _dots(f, *args):
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
    teacher = make_head(rng, (16,), 32, 128)
    args = student.hidden, student.kernel, student.bias, teacher

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
    assert _dots(f, *args) == expected


TILE, HIDDEN, VOCAB = 64, 32, 16000


def _memory(tokens, loss=distillation_loss, **options):
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    head = LinearHead(shape(tokens, HIDDEN), shape(HIDDEN, VOCAB))
    f = lambda s, t: loss(s, t, **options).sum()
    stats = jax.jit(jax.value_and_grad(f)).lower(head, head).compile().memory_analysis()
    return stats.temp_size_in_bytes


@pytest.mark.parametrize(
    "options", [dict(divergence=jaxkl.JensenShannon()), *rarely(dict(reduction="none"))]
)
def test_temporaries_are_those_of_a_tile(options):
    tokens = 4096
    few, many = (_memory(x, tile=TILE, **options) for x in (tokens, 2 * tokens))
    heads = 4 * HIDDEN * VOCAB * 4
    assert few < 12 * TILE * VOCAB * 4 + heads < 0.3 * tokens * VOCAB * 4
    # More tokens only add hidden states, their gradients and weights.
    assert many - few < 8 * tokens * HIDDEN * 4


def test_plain_jax_breaks_the_memory_bound():
    assert _memory(4096, loss=jaxkl.reference.distillation_loss) > 4096 * VOCAB * 4


@pytest.mark.parametrize("bad", [np.nan, *rarely(0.0)])
@pytest.mark.parametrize("tile", [None, 2])
def test_a_token_without_weight_needs_no_temperature(rng, bad, tile):
    student, teacher = make_head(rng, (5,), 4, 11), make_head(rng, (5,), 3, 11)
    weights = jnp.ones(5).at[1].set(0)
    grad = jax.jit(
        jax.grad(
            lambda head, temperature: distillation_loss(
                head, teacher, temperature=temperature, weights=weights, tile=tile
            )
        )
    )
    good = jnp.full(5, 2.0)
    actual = grad(student, good.at[1].set(bad))
    assert_source_gradient(student, actual, grad(student, good), "student")


# Heads as pytrees.


def test_is_a_pytree_of_its_arrays(rng):
    head = make_head(rng, (3,), 4, 11, bias=True, softcap=30.0, scale=0.5)
    leaves = jax.tree.leaves(head)
    assert [x.shape for x in leaves] == [(3, 4), (4, 11), (11,)]
    twice = jax.tree.map(lambda x: 2 * x, head)
    assert (twice.softcap, twice.scale) == (30.0, 0.5)
    assert_close(twice.kernel, 2 * head.kernel, 0)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(head)]
    assert names == [".hidden", ".kernel", ".bias"]
    assert len(jax.tree.leaves(LinearHead(head.hidden, head.kernel))) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        head.scale = 1.0


def test_softcap_and_scale_are_part_of_the_program(rng):
    head = make_head(rng, (3,), 4, 11)
    structures = {
        jax.tree.structure(dataclasses.replace(head, **settings))
        for settings in ({}, dict(softcap=2.0), dict(softcap=3.0), dict(scale=2.0))
    }
    assert len(structures) == 4


def test_params_in_a_dict_as_flax_has_them(rng):
    body = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    made = make_head(rng, (5,), 4, 11, bias=True)
    params = dict(body=body, head=dict(kernel=made.kernel, bias=made.bias))
    x, teacher = rounded(rng, (5, 6)), rounded(rng, (5, 11))

    def loss(params):
        hidden = jnp.tanh(x @ params["body"])
        return distillation_loss(LinearHead(hidden, **params["head"]), teacher)

    grads = jax.jit(jax.grad(loss))(params)
    hidden, pull = jax.vjp(lambda w: jnp.tanh(x @ w), body)
    expected = expected_of(dataclasses.replace(made, hidden=hidden), teacher).student
    assert_close(grads["head"]["kernel"], expected.kernel, 1e-5)
    assert_close(grads["head"]["bias"], expected.bias, 1e-5)
    assert_close(grads["body"], pull(jnp.float32(expected.hidden))[0], 1e-5)


def test_tied_embedding(rng):
    embedding, tokens = rounded(rng, (11, 4)), jnp.array([1, 5, 5, 0, 10])
    teacher = rounded(rng, (5, 11))
    f = lambda e: distillation_loss(LinearHead(e[tokens], e.T), teacher, tile=2)
    made = expected_of(LinearHead(embedding[tokens], embedding.T), teacher).student
    expected = np.float64(made.kernel.T)
    np.add.at(expected, np.asarray(tokens), np.float64(made.hidden))
    assert_close(jax.jit(jax.grad(f))(embedding), expected, 1e-5)


# Errors, which name the argument.

HIDDEN_4 = np.ones((5, 4), np.float32)
KERNEL = np.ones((4, 11), np.float32)


@pytest.mark.parametrize(
    "head, error, match",
    [
        (lambda: LinearHead(HIDDEN_4, KERNEL.T), ValueError, "student.kernel`"),
        (lambda: LinearHead(HIDDEN_4, KERNEL[0]), ValueError, "student.kernel`"),
        (lambda: LinearHead(np.float32(1), KERNEL), ValueError, "student.hidden`"),
        (lambda: LinearHead(HIDDEN_4, KERNEL[:, :0]), ValueError, "`student`.* 0"),
        (
            lambda: LinearHead(HIDDEN_4, KERNEL, KERNEL),
            ValueError,
            r"`student.bias`.*\(11,\).*\(4, 11\)",
        ),
        (
            lambda: LinearHead(HIDDEN_4, KERNEL, KERNEL[0, :5]),
            ValueError,
            r"`student.bias`",
        ),
        (
            lambda: LinearHead(HIDDEN_4.astype(int), KERNEL),
            TypeError,
            "student.hidden`",
        ),
        (
            lambda: LinearHead(HIDDEN_4, KERNEL.astype(int)),
            TypeError,
            "student.kernel`",
        ),
        (
            lambda: LinearHead(HIDDEN_4, KERNEL, np.ones(11, int)),
            TypeError,
            "`student.bias`",
        ),
        (lambda: LinearHead(HIDDEN_4, None), TypeError, "`student.kernel`"),
        (lambda: LinearHead("hidden", KERNEL), TypeError, "`student.hidden`"),
        (lambda: LinearHead(HIDDEN_4, KERNEL[:, :7]), ValueError, "`vocab_size`"),
        (lambda: LinearHead(HIDDEN_4[:3], KERNEL), ValueError, "batch shape"),
    ],
)
def test_errors_of_a_student(head, error, match):
    with pytest.raises(error, match=match):
        distillation_loss(head(), jnp.zeros((5, 11)))


def test_errors_of_a_teacher():
    with pytest.raises(ValueError, match="`teacher.kernel`"):
        distillation_loss(jnp.zeros((5, 11)), LinearHead(HIDDEN_4, KERNEL.T))
    with pytest.raises(ValueError, match="`vocab_size`"):
        head = LinearHead(HIDDEN_4, KERNEL)
        distillation_loss(jnp.zeros((5, 11)), head, vocab_size=12)


@pytest.mark.parametrize("softcap", [0, 0.0, -30.0, np.inf, np.nan])
def test_softcap_is_positive_and_finite(softcap):
    with pytest.raises(ValueError, match="`softcap`"):
        LinearHead(HIDDEN_4, KERNEL, softcap=softcap)


@pytest.mark.parametrize("name", ["softcap", "scale"])
@pytest.mark.parametrize("value", [np.ones(1), jnp.float32(2), True, "30"])
def test_softcap_and_scale_are_python_numbers(name, value):
    with pytest.raises(TypeError, match=f"`{name}`"):
        LinearHead(HIDDEN_4, KERNEL, **{name: value})


@pytest.mark.parametrize("scale", [np.inf, np.nan])
def test_scale_is_finite(scale):
    with pytest.raises(ValueError, match="`scale`"):
        LinearHead(HIDDEN_4, KERNEL, scale=scale)


def test_settings_are_keywords():
    with pytest.raises(TypeError):
        LinearHead(HIDDEN_4, KERNEL, None, 30.0)


@pytest.mark.parametrize("scale", [0.0, -0.5, *rarely(2)])
def test_any_finite_scale(rng, scale):
    student = make_head(rng, (5,), 4, 11, bias=True, scale=scale)
    assert_matches(student, rounded(rng, (5, 11)), REVERSE)
