"""`token_log_probs` against an oracle, with a cotangent for each of its numbers."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import jaxkl
from jaxkl import token_log_probs

from .alone import assert_gradients, expected_log_probs, make_student, pull_back
from .cases import rarely
from .helpers import assert_close
from .sources import per_token, rounded


SHAPE, VOCAB = (3, 5), 37


def some_tokens(rng, shape, k):
    """Some slots are empty, others repeat a column."""
    tokens = rng.integers(0, VOCAB, size=(*shape, k))
    tokens[..., -1] = tokens[..., 0]
    return jnp.asarray(np.where(rng.random(tokens.shape) < 0.2, -1, tokens))


def assert_matches(
    rng, source, k=4, shape=SHAPE, *, dtype="float32", per_place=True, pad=0, tol=None,
    value_tol=5e-6, f=token_log_probs, **options,
):  # fmt: skip
    """Values and gradients; a k of 0 stands for tokens that are `[...]`."""
    student = make_student(rng, source, shape, VOCAB, dtype, pad=pad)
    more = per_token(rng, shape, "temperature", "where")
    where, temperature = more["where"], more["temperature"]
    if not per_place:
        temperature = jnp.float32(1.7)
    tokens = some_tokens(rng, shape, max(k, 1))
    g = [jnp.asarray(rng.normal(size=x)) for x in (tokens.shape, shape)]
    floats = dict(student=student, temperature=temperature)
    sizes = dict(vocab_size=VOCAB if pad else None)

    def both(student, temperature):
        return f(
            student, tokens if k else tokens[..., 0], temperature=temperature,
            where=where, with_entropy=True, **sizes, **options,
        )  # fmt: skip

    like = (g[0] if k else g[0][..., 0], g[1])
    (log_probs, entropy), gradients = pull_back(both, floats, like)
    expected = expected_log_probs(
        student, tokens, temperature=temperature, where=where, cotangents=g, **sizes
    )
    is_double = dtype == "float64"
    value_tol = 1e-12 if is_double else value_tol
    assert log_probs.dtype == (jnp.float64 if is_double else jnp.float32)
    assert log_probs.shape == (tokens.shape if k else shape)
    assert_close(log_probs.reshape(tokens.shape), expected.log_probs, value_tol)
    assert_close(entropy, expected.entropy, value_tol)
    assert_gradients(floats, gradients, expected, tol, is_double)


@pytest.mark.parametrize(
    "source, k",
    [("logits", 4), ("head", 0), *rarely(("logits", 0), ("head", 4), ("head", 1))],
)
def test_all_arguments(rng, source, k):
    assert_matches(rng, source, k, pad=3)


@pytest.mark.parametrize("options", [dict(plan="lean"), *rarely(dict(tile=4))])
@pytest.mark.parametrize("k", [4, *rarely(0)])
def test_plans_and_tiles(rng, k, options):
    assert_matches(rng, "head", k, (2, 7), pad=2, per_place=False, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float64")])
def test_dtypes(rng, dtype):
    with jax.enable_x64(dtype == "float64"):
        tol = 1e-5 if dtype == "float64" else 1e-2  # the temperature is float32
        assert_matches(rng, "head", dtype=dtype, value_tol=1e-5, tol=tol)


@ft.cache
def sharded(shape):
    mesh = jax.make_mesh(shape, ("data", "model"))
    axes = dict(token_axes="data", vocab_axis="model")
    return ft.partial(token_log_probs, mesh=mesh, **axes)


@pytest.mark.parametrize(
    "source, k", [("head", 4), *rarely(("logits", 4), ("head", 0))]
)
@pytest.mark.parametrize("shape", [(2, 4), *rarely(((1, 8),), ((8, 1),))])
def test_meshes(rng, source, k, shape):
    # Neither tokens nor columns are a multiple of anything.
    assert_matches(rng, source, k, (7, 3), pad=2, f=sharded(shape))


@pytest.mark.parametrize("shape", rarely(((2, 4),), ((1, 8),)))
def test_the_lean_plan_on_a_mesh(rng, shape):
    assert_matches(rng, "head", 4, (7, 3), f=sharded(shape), plan="lean")


@pytest.mark.parametrize("plan", ["fast", *rarely("lean")])
def test_an_entropy_alone_on_a_mesh(rng, plan):
    """It has no sum of the last phase for devices to exchange."""
    student = make_student(rng, "head", (7,), VOCAB, "float32")
    tokens, g = jnp.zeros(7, int), jnp.asarray(rng.normal(size=7), jnp.float32)
    f = ft.partial(sharded((2, 4)), with_entropy=True, plan=plan)
    entropy, gradients = pull_back(
        lambda student: f(student, tokens)[1], dict(student=student), g
    )
    cotangents = np.zeros((7, 1)), g
    expected = expected_log_probs(student, tokens[:, None], cotangents=cotangents)
    assert_close(entropy, expected.entropy, 5e-6)
    assert_gradients(dict(student=student), gradients, expected, None, False)


def test_inside_shard_map(rng):
    student, tokens = rounded(rng, (5, 8)), jnp.asarray(rng.integers(-1, 8, (5, 3)))
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    local = ft.partial(token_log_probs, axis_name="model")
    specs = P(None, "model"), P()
    f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    g = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    of_tokens = lambda student: f(student, tokens)
    value, gradients = pull_back(of_tokens, dict(student=student), g)
    expected = expected_log_probs(student, tokens, cotangents=(g, np.zeros(5)))
    assert_close(value, expected.log_probs, 1e-6)
    assert_close(gradients["student"], expected.student, 1e-5)
    with pytest.raises(ValueError, match="`tokens` must be the same on all devices"):
        spread = jax.shard_map(
            local, mesh=mesh, in_specs=(specs[0], P("model")), out_specs=P()
        )
        jax.eval_shape(spread, jnp.zeros((2, 8)), jnp.zeros(8, jnp.int32))


ROWS = [[0, -14.5, -15.2, -30], [-30, -15.2, 0, -14.5], [3, 3, -20, -30], [40, 0, 1, 2]]
TOKENS = [[0, 0, 1, -1], [2, 2, 2, 2], [0, 1, 1, -1], [0, 0, 0, 3]]


@pytest.mark.parametrize("k", [4, 0])
@pytest.mark.parametrize("plan", [None, *rarely("lean")])
def test_nearly_certain_tokens(k, plan):
    """Log-probabilities, entropies and gradients of 1e-6, a row at a time."""
    s = jnp.array(ROWS)
    tokens = jnp.array(TOKENS)[:, : max(k, 1)]
    temperature = jnp.array([1.0, 0.9, 1.3, 2.0])
    floats = dict(student=jaxkl.LinearHead(s, jnp.eye(4)), temperature=temperature)

    def f(student, temperature):
        return token_log_probs(
            student, tokens if k else tokens[:, 0], temperature=temperature,
            with_entropy=True, plan=plan,
        )  # fmt: skip

    for g, g_entropy in ((1.3, 0.0), (0.0, -0.7)):
        like = jnp.full(tokens.shape if k else 4, g), jnp.full(4, g_entropy)
        value, gradients = pull_back(f, floats, like)
        expected = expected_log_probs(
            s, tokens, temperature=temperature,
            cotangents=(np.full(tokens.shape, g), like[1]),
        )  # fmt: skip
        for i in range(4):
            log_probs = value[0].reshape(tokens.shape)[i]
            assert_close(log_probs, expected.log_probs[i], 2e-6, f"{i}")
            assert_close(value[1][i], expected.entropy[i], 2e-6, f"{i}")
            d_s, d_T = gradients["student"].hidden[i], gradients["temperature"][i]
            assert_close(d_s, expected.student[i], 3e-6, f"{i}")
            assert_close(d_T, expected.temperature[i], 3e-6, f"{i}")


@pytest.mark.parametrize(
    "token_log_probs", [token_log_probs, jaxkl.reference.token_log_probs]
)
def test_masked_places_and_padding_may_hold_nan(rng, token_log_probs):
    head = make_student(rng, "head", (4,), VOCAB)
    kernel = head.kernel.at[:, 30:].set(jnp.nan)
    nan = jaxkl.LinearHead(head.hidden.at[1].set(jnp.nan), kernel)
    where, tokens = jnp.array([1, 0, 1, 1], bool), jnp.array([3, 99, 0, 29])
    more = dict(where=where, vocab_size=30, with_entropy=True)
    f = lambda head, temperature: token_log_probs(
        head, tokens, temperature=temperature, **more
    )
    temperature = jnp.array([1, jnp.nan, 2, 1])
    floats = dict(head=nan, temperature=temperature)
    (log_probs, entropy), grads = pull_back(f, floats, (jnp.ones(4), jnp.ones(4)))
    assert log_probs[1] == 0 and entropy[1] == 0
    assert all(np.isfinite(x).all() for x in (log_probs, entropy))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert not grads["head"].hidden[1].any() and not grads["head"].kernel[:, 30:].any()
    assert grads["head"].kernel[:, :30].any()


def test_an_empty_slot_is_0_and_has_no_gradient(rng):
    s = rounded(rng, (2, 5))
    f = lambda s: token_log_probs(s, jnp.array([[-1, -1], [-1, 2]]))
    value, grads = pull_back(lambda s: f(s), dict(s=s), jnp.ones((2, 2)))
    assert not value[0].any() and value[1, 0] == 0 and not grads["s"][0].any()
    assert not np.signbit(value[0]).any()


@pytest.mark.slow
def test_transforms(rng):
    """vmap over batches, in a scan, with remat, compared with one call."""
    student = rounded(rng, (2, 4, 7))
    tokens = jnp.asarray(rng.integers(-1, 7, (2, 4, 3)))
    ratios = lambda s, tokens: jnp.sum(jnp.exp(token_log_probs(s, tokens)))
    ratios = jax.checkpoint(ratios)
    mapped = lambda s: jnp.sum(jax.vmap(ratios)(s, tokens))
    step = lambda total, x: (total + ratios(*x), None)
    scanned = lambda s: jax.lax.scan(step, jnp.float32(0), (s, tokens))[0]
    one, *others = (
        jax.jit(jax.value_and_grad(f))(student)
        for f in (lambda s: ratios(s, tokens), mapped, scanned)
    )
    for other in others:
        jax.tree.map(lambda x, y: assert_close(x, y, 1e-6), one, other)


def test_products_and_arrays_as_large_as_the_logits(rng):
    head = make_student(rng, "head", (96,), VOCAB)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (96, 3)))
    f = lambda head: jnp.sum(
        token_log_probs(head, tokens, tile=8, with_entropy=True)[0]
    )
    text = jax.jit(jax.value_and_grad(f)).lower(head).as_text()
    assert len(re.findall("stablehlo.dot_general", text)) == 4
    assert f"<8x{VOCAB}xf32>" in text
    assert not re.search(
        rf"<(96x{VOCAB}|12x8x{VOCAB}|8x12x{VOCAB}|8x3x{VOCAB})xf32>", text
    )


@pytest.mark.parametrize("source, k, pad", [("head", 0, 3), *rarely(("logits", 4, 3))])
def test_the_reference_has_the_same(rng, source, k, pad):
    assert_matches(rng, source, k, pad=pad, f=jaxkl.reference.token_log_probs)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(tokens=jnp.full(3, 1)), ValueError, "`tokens` must have the batch shape"),
        (dict(tokens=jnp.full((2, 0), 1)), ValueError, "`tokens` must hold a token"),
        (dict(tokens=jnp.full((2, 3), 4)), ValueError, r"be in \[0, 4\), or -1 for an"),
        (dict(tokens=jnp.zeros(2)), TypeError, "`tokens` must be integers, got float"),
        (dict(temperature=0.0), ValueError, "`temperature` must be positive"),
        (dict(with_entropy=1), TypeError, "`with_entropy` must be True or False"),
        (dict(plan="lean", tile=3), ValueError, "`tile` must be None"),
        (dict(mask=None), TypeError, "did you mean `where`"),
    ],
)
def test_bad_arguments(arguments, error, match):
    good = dict(student=jnp.zeros((2, 4)), tokens=jnp.array([0, -1]))
    with pytest.raises(error, match=match):
        token_log_probs(**good | arguments)


def test_a_traced_token_that_is_out_of_range_is_nan():
    tokens = jnp.array([[0, 4], [-2, 3]])
    x = jax.jit(token_log_probs)(jnp.zeros((2, 4)), tokens)
    np.testing.assert_array_equal(np.isnan(x), [[False, True], [True, False]])
