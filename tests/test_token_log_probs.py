"""What `token_log_probs` alone has: test_values.py and its like have the rest."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from jaxkl import LinearHead, token_log_probs

from .cases import assert_source_gradient, rarely
from .helpers import assert_close
from .registry import Batch, pull_back
from .sources import expected_log_probs, make_head
from .test_meshes import axes_of


@pytest.mark.parametrize("plan", ["fast", *rarely("lean")])
def test_an_entropy_alone_on_a_mesh(rng, plan):
    """It has no sum of the last phase for devices to exchange."""
    student = make_head(rng, (7,), 5, 37, bias=True, softcap=4.0, scale=0.7)
    batch = Batch(dict(student=student), dict(tokens=np.zeros(7, int)))
    f = ft.partial(token_log_probs, with_entropy=True, plan=plan, **axes_of("2x4"))
    g = np.float32(rng.normal(size=7))
    entropy, gradients = pull_back(lambda x: f(**x.floats, **x.others)[1], batch, g)
    expected = expected_log_probs(
        student, np.zeros((7, 1), int), cotangents=(np.zeros((7, 1)), g)
    )
    assert_close(entropy, expected.entropy, 5e-6)
    assert_source_gradient(student, gradients["student"], expected.student, "student")


ROWS = [[0, -14.5, -15.2, -30], [-30, -15.2, 0, -14.5], [3, 3, -20, -30], [40, 0, 1, 2]]
TOKENS = [[0, 0, 1, -1], [2, 2, 2, 2], [0, 1, 1, -1], [0, 0, 0, 3]]


@pytest.mark.parametrize("k", [4, 0])
@pytest.mark.parametrize("plan", [None, *rarely("lean")])
def test_nearly_certain_tokens(k, plan):
    """Log-probabilities, entropies and gradients of 1e-6, a row at a time."""
    s, tokens = np.float32(ROWS), np.array(TOKENS)[:, : max(k, 1)]
    T = np.float32([1.0, 0.9, 1.3, 2.0])

    @jax.jit
    def run(s, T, g):
        head = LinearHead(s, jnp.eye(4))
        f = lambda head, T: token_log_probs(
            head, tokens if k else tokens[:, 0], temperature=T, with_entropy=True,
            plan=plan,
        )  # fmt: skip
        value, pull = jax.vjp(f, head, T)
        return *value, *pull(g)

    for g, g_entropy in ((1.3, 0.0), (0.0, -0.7)):
        like = np.full(tokens.shape if k else 4, g, np.float32)
        of_entropy = np.full(4, g_entropy, np.float32)
        log_probs, entropy, d_head, d_T = run(s, T, (like, of_entropy))
        expected = expected_log_probs(
            s, tokens, temperature=T, cotangents=(np.full(tokens.shape, g), of_entropy)
        )
        log_probs = log_probs.reshape(tokens.shape)
        for i in range(4):
            assert_close(log_probs[i], expected.log_probs[i], 2e-6, f"{i}")
            assert_close(entropy[i], expected.entropy[i], 2e-6, f"{i}")
            assert_close(d_head.hidden[i], expected.student[i], 3e-6, f"{i}")
            assert_close(d_T[i], expected.temperature[i], 3e-6, f"{i}")


def test_an_empty_slot_is_0_and_no_negative_zero(rng):
    s = rng.normal(size=(2, 5)).astype(np.float32)
    value = token_log_probs(s, np.array([[-1, -1], [-1, 2]]))
    np.testing.assert_array_equal(value == 0, [[True, True], [True, False]])
    assert not np.signbit(value[0]).any()


def test_products_and_arrays_as_large_as_the_logits(rng):
    head = make_head(rng, (96,), 5, 37, bias=True, softcap=4.0)
    tokens = rng.integers(0, 37, (96, 3))
    f = lambda head: token_log_probs(head, tokens, tile=8, with_entropy=True)[0].sum()
    text = jax.jit(jax.value_and_grad(f)).lower(head).as_text()
    assert len(re.findall("stablehlo.dot_general", text)) == 4
    assert "<8x37xf32>" in text
    assert not re.search("<(96x37|12x8x37|8x12x37|8x3x37)xf32>", text)


def test_tokens_that_differ_over_the_vocabulary_axis():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    local = ft.partial(token_log_probs, axis_name="model")
    specs = P(None, "model"), P("model")
    spread = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match="`tokens` must be the same on all devices"):
        jax.eval_shape(spread, jnp.zeros((2, 8)), jnp.zeros(8, jnp.int32))


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(tokens=np.full(3, 1)), ValueError, "`tokens` must have the batch shape"),
        (dict(tokens=np.full((2, 0), 1)), ValueError, "`tokens` must hold a token"),
        (dict(tokens=np.full((2, 3), 4)), ValueError, r"be in \[0, 4\), or -1 for an"),
        (dict(tokens=np.zeros(2)), TypeError, "`tokens` must be integers, got float"),
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
    x = jax.jit(token_log_probs)(np.zeros((2, 4)), np.array([[0, 4], [-2, 3]]))
    np.testing.assert_array_equal(np.isnan(x), [[False, True], [True, False]])
