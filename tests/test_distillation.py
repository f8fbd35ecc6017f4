"""`distillation_loss` of any source: value and gradients against the oracle."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl

from . import oracle
from .cases import (
    ALL,
    assert_matches,
    each,
    evaluate,
    FORWARD,
    KINDS,
    OTHERS,
    over,
    over_all,
    over_kinds,
    over_sources,
    rarely,
    rounded,
    USER,
)
from .helpers import assert_close, TOLERANCE
from .sources import expected_of, make_models, per_token, TAILS


VOCABULARIES = (1, 2, 700, 1001)


def _temperatures(kind, rng, shape):
    scalar = lambda number: dict(temperature=jnp.float32(number))
    return {
        "one": {},
        "scalar": scalar(1.7),
        "token": per_token(rng, shape, "temperature"),
        "separate": scalar(3) | per_token(rng, shape, "teacher_temperature"),
    }[kind]


@pytest.mark.parametrize(
    "dtype, temperature",
    [
        ("float32", "separate"),
        ("bfloat16", "scalar"),
        *rarely(("float32", "one"), ("float32", "scalar"), ("float32", "token")),
        *rarely(("float16", "separate")),
    ],
)
@over_kinds
def test_value_and_gradients_match_the_oracle(
    rng, divergence, reference, dtype, temperature
):
    s, t = rounded(rng, (3, 5, 11), dtype), rounded(rng, (3, 5, 11), dtype)
    arguments = _temperatures(temperature, rng, (3, 5))
    assert_matches(s, t, (divergence, reference), **arguments)


@over_sources(
    "logits js_normalized",
    "logits skew_forward",
    "renormalize user",
    "bucket reverse",
    "uniform reverse",
    "drop forward",
    slow=(
        *each("logits", ("forward", *(x for x in OTHERS if x != "skew_forward"))),
        *each("head", ("js_normalized", "forward", *OTHERS)),
        *each("renormalize", ("forward", "js", "alpha_half", "skew_reverse")),
        "renormalize total_variation",
        *each("bucket", ("js_normalized", "forward", "user")),
        *each("uniform", ("forward", "total_variation")),
        *each("conditional", ALL),
    ),
)
def test_every_divergence(rng, source, divergence):
    arguments = _temperatures("separate" if source == "logits" else "token", rng, (7,))
    if source == "head":
        arguments["teacher_temperature"] = jnp.float32(1.5)
    models = make_models(rng, source, (7,), 13 if source in TAILS else 1001)
    tile = None if source == "logits" else 3
    assert_matches(*models, divergence, tile=tile, **arguments)


@over_sources(
    "head, logits reverse",
    slow=("logits, head reverse", "head, logits user", "logits, head user"),
)
def test_two_sources(rng, source, divergence):
    assert_matches(*make_models(rng, source, (2, 5), 11), divergence, tile=3)


@pytest.mark.parametrize(
    "tail", ["bucket", *rarely("renormalize", "drop", "uniform", "conditional")]
)
def test_a_head_beside_a_list_in_bfloat16(rng, tail):
    models = make_models(rng, f"head, {tail}", (2, 5), 701, "bfloat16")
    assert_matches(*models, FORWARD, temperature=2.0, tile=3)


@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float32", "float16")])
@pytest.mark.parametrize("arguments", [dict(teacher_temperature=1.25), *rarely({})])
def test_temperature_as_a_python_number(rng, dtype, arguments):
    s, t = rounded(rng, (3, 5, 11), dtype), rounded(rng, (3, 5, 11), dtype)
    assert_matches(s, t, FORWARD, temperature=0.5, **arguments)


@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float32", "float16")])
@over("forward", slow=["js"])
def test_dtypes_of_heads(rng, divergence, reference, dtype):
    settings = dict(bias=True, softcap=3.0, scale=1.5)
    models = make_models(rng, "head", (2, 5), 37, dtype, **settings)
    assert_matches(*models, (divergence, reference), temperature=2.0, tile=4)


@over_sources(
    "logits forward",
    "head js_normalized",
    "bucket forward",
    slow=(*each("logits", KINDS), "head forward"),
)
def test_every_argument_at_once(rng, source, divergence):
    models = make_models(rng, source, (3, 5), 11, pad=(3, 1))
    arrays = per_token(rng, (3, 5), "temperature", "weights", "where", "labels")
    if source not in TAILS:
        arrays["teacher_temperature"] = jnp.float32(1.5)
    numbers = dict(alpha=0.3, label_smoothing=0.1, z_loss=1e-2, vocab_size=11, tile=4)
    assert_matches(*models, divergence, **arrays, **numbers)


@pytest.mark.parametrize(
    "source, dtypes",
    [
        ("head", ("float32", "float16")),
        *rarely(*(("logits", (x, "float32")) for x in ("bfloat16", "float16"))),
        *rarely(("logits", ("float32", "float16"))),
    ],
)
def test_models_of_different_dtypes(rng, source, dtypes):
    student, teacher = (
        make_models(rng, source, (4,), 37, dtype)[i] for i, dtype in enumerate(dtypes)
    )
    if source == "head":
        student = replace(student, hidden=student.hidden.astype("bfloat16"))
    weights = jnp.asarray(rng.uniform(0, 2, size=4), jnp.bfloat16)
    assert_matches(student, teacher, FORWARD, temperature=2.0, weights=weights)


@over_sources("head forward", slow=("logits forward", *each("logits", KINDS)))
def test_float64_under_x64(rng, source, divergence):
    with jax.enable_x64(True):
        student, teacher = make_models(rng, source, (3, 5), 11, "float64")
        if source == "head":
            teacher = jax.tree.map(lambda x: x.astype(jnp.float32), teacher)
        value, _ = assert_matches(
            student,
            teacher,
            divergence,
            temperature=jnp.asarray(rng.uniform(0.5, 3, size=(3, 5)), jnp.float64),
            labels=jnp.asarray(rng.integers(0, 11, size=(3, 5))),
            alpha=0.5,
            z_loss=0.01,
            tile=2 if source == "head" else None,
        )
    assert value.dtype == jnp.float64


@pytest.mark.parametrize(
    "wide",
    [
        "student",
        *rarely("teacher", "temperature", "teacher_temperature", "weights", None),
    ],
)
def test_loss_is_float64_iff_a_float_argument_is(rng, wide):
    with jax.enable_x64(True):
        dtype = lambda name: jnp.float64 if name == wide else jnp.float32
        one = lambda name: jnp.ones(4, dtype(name))
        s, t = (
            rounded(rng, (4, 7), dtype("student")),
            rounded(rng, (4, 7), dtype("teacher")),
        )
        names = ("temperature", "teacher_temperature", "weights")
        arguments = {name: one(name) for name in names}
        value, grads = evaluate(s, t, **arguments)
        assert value.dtype == (jnp.float64 if wide else jnp.float32)
        assert {name: g.dtype for name, g in grads.items()} == {
            name: dtype(name) for name in ("student", "teacher", *names)
        }
        assert jaxkl.distillation_loss(s, t, temperature=2.0).dtype == (
            jnp.float64 if wide in ("student", "teacher") else jnp.float32
        )


@pytest.mark.parametrize("temperature", [2, np.float64(2), *rarely(2.0, np.float32(2))])
def test_numpy_inputs_and_scalars(rng, temperature):
    s, t = rng.normal(size=(2, 4, 7)).astype(np.float32)
    value = jaxkl.distillation_loss(s, t, temperature=temperature)
    assert value.dtype == jnp.float32
    assert_close(value, oracle.distillation_loss(s, t, temperature=2).loss, 1e-6)


# Sizes, batch shapes and tiles.


@pytest.mark.parametrize(
    "source, tokens, vocab",
    [
        ("logits", 7, 1),
        ("head", 7, 1001),
        *rarely(("logits", 7, 2), ("logits", 7, 700), ("logits", 7, 1001)),
        *rarely(*(("logits", n, vocab) for n in (1, 130) for vocab in VOCABULARIES)),
        *rarely(("head", 1, 1), ("head", 1, 1001), ("head", 7, 1), ("head", 130, 700)),
    ],
)
def test_odd_sizes(rng, source, tokens, vocab):
    plain = dict(bias=False, softcap=None, scale=1.0)
    assert_matches(*make_models(rng, source, (tokens,), vocab, **plain), FORWARD)


@pytest.mark.parametrize(
    "source, tile, reduction",
    [
        ("logits", 3, "none"),
        ("head", 3, "none"),
        *rarely(("logits", 64, "mean")),
        *rarely(("logits", 3, "mean"), ("logits", 64, "none")),
        *rarely(("head, logits", 3, "mean")),
        *rarely(*(("logits", n, x) for n in (1, 16, 200) for x in ("none", "mean"))),
        *rarely(("head", 1, "mean"), ("head", 64, "mean"), ("head", 200, "none")),
        *rarely(("head, logits", 64, "none")),
    ],
)
def test_any_tile_gives_the_same_answer(rng, source, tile, reduction):
    models, g = make_models(rng, source, (130,), 7), 1.7
    names = "temperature", "weights", "where", "labels"
    if reduction == "none":
        g = rng.normal(size=130).astype(np.float32)
    options = dict(alpha=0.5, reduction=reduction, cotangent=g, tile=tile)
    assert_matches(*models, FORWARD, **per_token(rng, 130, *names, vocab=7), **options)


@pytest.mark.parametrize(
    "source, shape, reduction",
    [
        ("logits", (), "mean"),
        ("logits", (2, 1, 3), "none"),
        *rarely(("head", (2, 3), "none")),
        *rarely(("logits", (), "none"), ("logits", (2, 1, 3), "mean")),
        *rarely(*(("head", shape, "none") for shape in ((), (6,)))),
        *rarely(("head", (), "mean"), ("bucket", (2, 3), "none")),
        *rarely(*(("logits", x, "none") for x in ((1,), (6,), (2, 3)))),
        *rarely(*(("logits", x, "mean") for x in ((1,), (6,), (2, 3)))),
        *rarely(("bucket", (), "none")),
    ],
)
def test_batch_shapes(rng, source, shape, reduction):
    models = make_models(rng, source, shape, 11)
    options = dict(reduction=reduction, tile=4 if source == "head" else None)
    options["weights"] = jnp.asarray(rng.uniform(1, 2, size=shape), jnp.float32)
    g = np.float32(rng.normal(size=shape if reduction == "none" else ()))
    value, _ = assert_matches(*models, FORWARD, cotangent=g, **options)
    assert value.shape == (shape if reduction == "none" else ())


# The square of the temperature.


@over("forward", slow=["user"])
def test_t_squared_is_the_students_and_optional(rng, divergence, reference):
    divergence = divergence, reference
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    arguments = dict(temperature=jnp.float32(3), teacher_temperature=jnp.float32(2))
    value, _ = assert_matches(s, t, divergence, t_squared=False, **arguments)
    with_square = expected_of(s, t, divergence=reference, **arguments).loss
    assert_close(9 * np.float64(value), with_square, 1e-6)


# Labels, label smoothing and z-loss.


@pytest.mark.parametrize("alpha", [0.3, *rarely(0.0, 1.0)])
@pytest.mark.parametrize("label_smoothing", [0.1, *rarely(0.0, 1.0)])
def test_labels(rng, alpha, label_smoothing):
    s, t = rounded(rng, (6, 7)), rounded(rng, (6, 7))
    assert_matches(
        s,
        t,
        FORWARD,
        temperature=jnp.float32(2),
        labels=jnp.array([0, 6, -100, 3, -100, 1]),
        alpha=alpha,
        label_smoothing=label_smoothing,
        z_loss=0.02,
    )


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float32", "float16")])
@pytest.mark.parametrize("label_smoothing", [0.2, *rarely(0.0)])
def test_cross_entropy_matches_torch(rng, dtype, label_smoothing):
    import torch

    s, t = rounded(rng, (2, 4, 7), dtype), rounded(rng, (2, 4, 7), dtype)
    labels = np.array([[0, 6, -100, 3], [2, -100, 1, 1]])
    value, grads = evaluate(
        s,
        t,
        labels=jnp.asarray(labels),
        alpha=0.0,
        temperature=4.0,  # the cross-entropy does not use it
        label_smoothing=label_smoothing,
        reduction="none",
    )
    x = torch.tensor(np.asarray(s, np.float64).reshape(8, 7), requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        x,
        torch.tensor(labels.ravel()),
        label_smoothing=label_smoothing,
        reduction="none",
    )
    expected.sum().backward()
    assert_close(value.ravel(), expected.detach(), 1e-6, "value")
    assert_close(grads["student"].reshape(8, 7), x.grad, TOLERANCE[dtype][1], "grad")
    assert not grads["teacher"].any()


@pytest.mark.slow
def test_a_label_of_minus_100_drops_only_its_cross_entropy(rng):
    s, t = rounded(rng, (3, 7)), rounded(rng, (3, 7))
    f = lambda **kw: evaluate(s, t, reduction="none", z_loss=0.1, **kw)[0]
    got = f(labels=jnp.array([2, -100, 3]), alpha=0.25)
    lse = jax.nn.logsumexp(s, -1) ** 2 / 10
    assert_close(got[1], 0.25 * (f() - lse)[1] + lse[1], 1e-6)
    # The token still counts in the mean.
    arguments = dict(labels=jnp.array([2, -100, 3]), alpha=0.25, z_loss=0.1)
    assert_close(evaluate(s, t, **arguments)[0], got.mean(), 1e-6)


def test_z_loss_is_of_the_student_at_temperature_one(rng):
    s = rounded(rng, (5, 7))
    f = lambda s: jaxkl.distillation_loss(
        s, s, temperature=3.0, z_loss=0.5, reduction="sum"
    )
    plain = lambda s: 0.5 * jnp.sum(jax.nn.logsumexp(s, -1) ** 2)
    (value, grad), (want, want_grad) = jax.jit(
        lambda s: [jax.value_and_grad(x)(s) for x in (f, plain)]
    )(s)
    assert_close(value, want, 1e-6)
    # The teacher is the same array, and its own gradient must not leak in.
    assert_close(grad, want_grad, 1e-5)


def test_traced_alpha_smoothing_and_z_loss(rng):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    numbers = dict(alpha=0.25, label_smoothing=0.125, z_loss=0.0625)
    traced = {name: jnp.float32(x) for name, x in numbers.items()}
    labels = jnp.array([1, -100, 3, 0])
    assert_matches(s, t, FORWARD, labels=labels, expect=numbers, **traced)


# Reductions, masks, weights, normalizers and padding.


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(
    "masked, weighted", [(True, True), *rarely((True, False), (False, True), (0, 0))]
)
def test_reductions(rng, reduction, masked, weighted):
    s, t = rounded(rng, (3, 5, 7)), rounded(rng, (3, 5, 7))
    arguments = {}
    if masked:
        arguments["where"] = jnp.asarray(rng.random((3, 5)) < 0.6)
    if weighted:
        weights = rng.choice([0, 0.5, 2, 3], size=(3, 5))
        arguments["weights"] = jnp.asarray(weights, jnp.float32)
    g = rng.normal(size=(3, 5) if reduction == "none" else ()).astype(np.float32)
    value, grads = assert_matches(
        s, t, FORWARD, reduction=reduction, cotangent=g, **arguments
    )
    if masked and reduction == "none":
        assert not value[~arguments["where"]].any()
    if masked:
        assert not grads["student"][~arguments["where"]].any()


@pytest.mark.parametrize(
    "normalizer", [10, jnp.float32(2.5), *rarely(2.5, np.int64(10), jnp.int32(10))]
)
def test_normalizer_replaces_the_weight(rng, normalizer):
    s, t = rounded(rng, (6, 7)), rounded(rng, (6, 7))
    weights = jnp.asarray(rng.uniform(0, 2, size=6), jnp.float32)
    where = jnp.array([True, True, False, True, True, False])
    assert_matches(s, t, FORWARD, where=where, weights=weights, normalizer=normalizer)


def test_the_number_of_tokens_in_a_traced_mask_is_a_normalizer(rng):
    s, t = rounded(rng, (6, 7)), rounded(rng, (6, 7))
    where = jnp.array([True, True, False, True, True, False])

    @jax.jit
    def in_halves(where):
        count = jnp.sum(where)
        parts = [
            jaxkl.distillation_loss(
                s[part], t[part], where=where[part], normalizer=count
            )
            for part in (slice(2), slice(2, 6))
        ]
        return sum(parts)

    whole = oracle.distillation_loss(s, t, where=where).loss
    assert_close(in_halves(where), whole, 1e-6)


JUNK = (np.nan, np.inf, -np.inf, 1e30, 0.0, 50.0)


@pytest.mark.parametrize(
    "source, divergence, junk",
    [
        ("logits", FORWARD, JUNK),
        ("bucket", FORWARD, JUNK),
        ("head", FORWARD, np.nan),
        *rarely(("head", USER, np.nan)),
        *rarely(*(("logits", ALL[name], JUNK) for name in KINDS)),
        *rarely(*(("head", x, y) for x in (FORWARD, USER) for y in (np.inf, 1e30))),
    ],
)
def test_padding_columns_may_hold_anything(rng, source, divergence, junk):
    def spoil(x):
        if isinstance(x, jax.Array):
            return x.at[..., 11:].set(np.resize(junk, x.shape[-1] - 11))
        return replace(x, kernel=spoil(x.kernel), bias=spoil(x.bias))

    student, teacher = make_models(rng, source, (4,), 11, pad=(6, 9), bias=True)
    _, grads = assert_matches(
        spoil(student),
        teacher if source in TAILS else spoil(teacher),
        divergence,
        temperature=jnp.float32(2),
        labels=jnp.array([0, 10, 3, -100]),
        label_smoothing=0.1,
        alpha=0.5,
        z_loss=0.1,
        vocab_size=11,
        tile=2 if source == "head" else None,
    )
    wide = [x for x in jax.tree.leaves(grads) if x.shape and x.shape[-1] > 11]
    assert len(wide) == {"head": 4, "logits": 2, "bucket": 1}[source]
    assert not any(x[..., 11:].any() for x in wide)


@pytest.mark.slow
def test_vocab_size_may_equal_a_width(rng):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 9))
    assert_matches(s, t, FORWARD, vocab_size=7)


@over("reverse", "js_normalized", slow=("forward", "symmetric", "skew_reverse"))
@pytest.mark.parametrize("tile", [8, *rarely(None)])
def test_confident_rows_have_gradients_too(rng, divergence, reference, tile):
    # A normaliser near 1 has no digits left for unlikely outcomes. Their mass is all of
    # the likely one's gradient, and must be right in every row.
    t = rounded(rng, (65, 7), scale=12.0)
    s = t + rounded(rng, (65, 7), scale=0.3)
    arguments = dict(reduction="none")
    value, grads = evaluate(s, t, divergence=divergence, tile=tile, **arguments)
    expected = oracle.distillation_loss(s, t, divergence=reference, **arguments)
    np.testing.assert_allclose(value, np.float64(expected.loss), rtol=1e-3)
    for name in ("student", "teacher"):
        want = np.asarray(getattr(expected, name), np.float64)
        error = np.abs(np.asarray(grads[name], np.float64) - want).max(axis=-1)
        np.testing.assert_array_less(error, 1e-3 * np.abs(want).max(axis=-1))


# Relations.


@over_all
def test_equal_models_have_exactly_no_loss_and_no_gradient(rng, divergence, reference):
    s = rounded(rng, (5, 700), scale=3.0)
    temperature = jnp.asarray(rng.uniform(0.5, 3, size=5), jnp.float32)
    value, grads = evaluate(
        s, s, divergence=divergence, temperature=temperature, reduction="none"
    )
    assert not value.any() and not grads["temperature"].any()
    assert not grads["student"].any() and not grads["teacher"].any()


@pytest.mark.slow
@over("js_normalized", slow=[x for x in ALL if x != "js_normalized"])
def test_never_negative(rng, divergence, reference):
    t = rounded(rng, (64, 50), scale=2.0)
    noise = 10 ** rng.uniform(-7, 0, size=(64, 1))
    s = t + jnp.asarray(noise * rng.normal(size=(64, 50)), jnp.float32)
    value, _ = evaluate(s, t, divergence=divergence, reduction="none")
    assert (value >= 0).all() and value.any()


@pytest.mark.slow
def test_reverse_is_forward_with_the_models_exchanged(rng):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    arguments = dict(temperature=2.0, reduction="none")
    reverse, reverse_grads = evaluate(s, t, divergence=jaxkl.ReverseKL(), **arguments)
    forward, grads = evaluate(t, s, divergence=jaxkl.ForwardKL(), **arguments)
    assert_close(reverse, forward, 1e-6)
    assert_close(reverse_grads["student"], grads["teacher"], 1e-6)
    assert_close(reverse_grads["teacher"], grads["student"], 1e-6)
    assert np.abs(reverse - evaluate(s, t, **arguments)[0]).max() > 1e-2


@pytest.mark.slow
def test_jensen_shannon_is_symmetric_at_a_half_only(rng):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    f = lambda s, t, beta: evaluate(
        s, t, divergence=jaxkl.JensenShannon(beta), reduction="none"
    )[0]
    assert_close(f(s, t, 0.5), f(t, s, 0.5), 1e-6)
    assert_close(f(s, t, 0.2), f(t, s, 0.8), 1e-6)
    assert np.abs(f(s, t, 0.2) - f(t, s, 0.2)).max() > 1e-3


@over_kinds
def test_a_shift_of_the_logits_changes_nothing(rng, divergence, reference):
    # On this grid the shifted logits are exact in float32.
    s, t = (jnp.round(rounded(rng, (4, 7)) * 1024) / 1024 for _ in range(2))
    shift = jnp.array([[64.0], [-32.0], [0.0], [8.0]])
    s, t = jnp.stack([s, s + shift, s]), jnp.stack([t, t, t - shift])
    value, grads = evaluate(s, t, divergence=divergence, reduction="none")
    assert_close(value[1:], value[:1].repeat(2, 0), 1e-6)
    assert_close(grads["student"][1:], grads["student"][:1].repeat(2, 0), 1e-5)


@over("forward", slow=[x for x in ALL if x != "forward"])
def test_gradients_sum_to_zero_over_the_vocabulary(rng, divergence, reference):
    s, t = rounded(rng, (7, 1001)), rounded(rng, (7, 1001))
    temperatures = _temperatures("separate", rng, (7,))
    _, grads = evaluate(s, t, divergence=divergence, **temperatures)
    for grad in (grads["student"], grads["teacher"]):
        total, size = grad.sum(-1), np.abs(grad).sum(-1)
        assert (size > 0).all()
        np.testing.assert_array_less(np.abs(total), 1e-5 * size)


@over_kinds
def test_temperature_divides_the_logits(rng, divergence, reference):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    f = lambda s, t, T: evaluate(s, t, divergence=divergence, temperature=T)
    value, grads = f(s, t, jnp.float32(4))
    scaled, scaled_grads = f(s / 4, t / 4, jnp.float32(1))
    assert_close(value, 16 * scaled, 1e-6)
    assert_close(grads["student"], 4 * scaled_grads["student"], 1e-6)
