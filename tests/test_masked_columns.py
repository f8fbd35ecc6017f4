"""Columns at -inf or at the lowest number, and temperatures that are extreme."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
import jaxkl.reference
from jaxkl._util.checks import TEMPERATURES

from . import oracle
from .cases import assert_matches, FORWARD, over, rarely
from .helpers import assert_close
from .registry import check, LOSSES
from .sources import rounded
from .test_meshes import axes_of


over_modules = pytest.mark.parametrize(
    "loss",
    [jaxkl.distillation_loss, jaxkl.reference.distillation_loss],
    ids=["engine", "reference"],
)


@pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16", "float64")])
@pytest.mark.parametrize("kinds", [slice(1), *rarely(slice(3))], ids=["one", "three"])
def test_slopes_of_temperatures_beside_arrays(rng, kinds, dtype):
    # Slopes that are tiny where they should be 0 are not, times the lowest number.
    with jax.enable_x64(dtype == "float64"):
        s, t = rounded(rng, (8, 7), dtype), rounded(rng, (8, 7), dtype)
        for i, low in enumerate((-jnp.inf, jnp.finfo(s.dtype).min)):
            s, t = s.at[i::4, 3].set(low), t.at[i + 2 :: 4, 3].set(low)
        x = jnp.asarray(np.resize([0.3, 0.9, 1e-6], 8), jnp.float32)
        terms = (
            (0.5, jaxkl.SkewForwardKL, oracle.skew_forward_kl),
            (1.0, jaxkl.JensenShannon, oracle.jensen_shannon),
            (jnp.float32(0.25), jaxkl.SkewReverseKL, oracle.skew_reverse_kl),
        )[kinds]
        mixture = jaxkl.Mixture(tuple((w, mine(x)) for w, mine, _ in terms))
        by_token = oracle.by_token(
            [
                oracle.mixture(*((w, theirs(y)) for w, _, theirs in terms))
                for y in np.asarray(x, np.float64)
            ]
        )
        temperatures = dict(
            temperature=jnp.full(8, 2, jnp.float32),
            teacher_temperature=jnp.full(8, 1.5, jnp.float32),
        )
        assert_matches(s, t, (mixture, by_token), reduction="none", **temperatures)


def masked_models(rng):
    return [x.at[:, 2].set(-jnp.inf) for x in (rounded(rng, (3, 5)) for _ in "st")]


@over("forward", slow=["js", "reverse"])
def test_temperatures_at_the_ends_of_their_range(rng, divergence, reference):
    """The models are nearly certain, or nearly alike."""
    s, t = masked_models(rng)
    for T in map(jnp.float32, TEMPERATURES):
        for name in "temperature", "teacher_temperature":
            assert_matches(s, t, (divergence, reference), **{name: T})


@pytest.mark.slow
@over("forward", "js", "reverse")
def test_derivatives_at_the_ends_of_the_temperatures(rng, divergence, reference):
    del reference
    s, t = masked_models(rng)

    @jax.jit
    def derivatives(s, t, T):
        f = lambda s, T: jaxkl.distillation_loss(
            s, t, divergence=divergence, temperature=T
        )
        return *jax.value_and_grad(f, (0, 1))(s, T), *jax.hessian(f, (0, 1))(s, T)

    value, gradients, *hessian = derivatives(s, t, 1.0)
    assert np.isfinite(np.hstack([x.ravel() for x in jax.tree.leaves(hessian)])).all()
    for T in TEMPERATURES:
        # Of logits that are larger by T, T² D is larger by T².
        got = derivatives(s * T, t * T, T)
        want = value * T**2, [x * T for x in gradients], *hessian
        for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            assert_close(x, y, 1e-5)


def test_a_float16_temperature_may_be_at_the_ends(rng):
    s = rounded(rng, (2, 5))
    T = jnp.asarray([TEMPERATURES[0], 6e4, 4e-7, jnp.inf], jnp.float16)
    f = lambda T: jaxkl.distillation_loss(s, s, temperature=T)
    np.testing.assert_array_equal(jax.jit(jax.vmap(f))(T), [0, 0, np.nan, np.nan])


def own_kl(log_p, log_q):
    """A user's own, which is NaN where neither model has the outcome."""
    return jnp.exp(log_p) * (log_p - log_q)


SHARES = np.float32([0.5, 0.0, 2.0])
OWN = {
    "own": (own_kl, oracle.forward_kl),
    "in a mixture": (
        jaxkl.Mixture(((1.0, own_kl), (0.5, jaxkl.ReverseKL()))),
        oracle.mixture((1.0, oracle.forward_kl), (0.5, oracle.reverse_kl)),
    ),
    "weighted by an array": (
        jaxkl.Mixture(((jnp.asarray(SHARES), own_kl), (1.0, jaxkl.ForwardKL()))),
        oracle.by_token([oracle.mixture((1 + w, oracle.forward_kl)) for w in SHARES]),
    ),
}


@over_modules
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("own", "float32"),
        *rarely(
            ("own", "bfloat16"),
            ("in a mixture", "float32"),
            ("weighted by an array", "float32"),
        ),
    ],
)
def test_a_users_divergence_does_not_see_what_neither_model_has(rng, name, dtype, loss):
    s, t = rounded(rng, (3, 5), dtype), rounded(rng, (3, 5), dtype)
    kept = np.array([0, 2, 4, 6, 7])
    hide = lambda x: jnp.full((3, 8), -jnp.inf, dtype).at[:, kept].set(x)
    options = dict(loss=loss, temperature=jnp.float32(2), value_tol=2e-6)
    _, grads = assert_matches(hide(s), hide(t), OWN[name], **options)
    for model in "student", "teacher":
        assert not np.delete(grads[model], kept, axis=1).any()


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@over_modules
@pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16", "float64")])
def test_labels_are_spread_over_the_columns_that_are_there(rng, dtype, loss, smoothing):
    with jax.enable_x64(dtype == "float64"):
        s, t = rounded(rng, (4, 7), dtype), rounded(rng, (4, 7), dtype)
        hidden = np.array([[2, 3], [0, 2], [5, 6], [1, 4]])
        s, t = (x.at[np.arange(4)[:, None], hidden].set(-jnp.inf) for x in (s, t))
        labels = jnp.array([0, 5, 3, 0])
        smoothing = np.float32(smoothing)
        value, _ = assert_matches(
            s, t, FORWARD, labels=labels, loss=loss, alpha=0.3, vocab_size=6,
            label_smoothing=jnp.asarray(smoothing),
            expect=dict(label_smoothing=float(smoothing)),
        )  # fmt: skip
        assert np.isfinite(value)


@pytest.mark.parametrize(
    "options", [dict(plan="lean"), *rarely(axes_of("2x4"), dict(tile=2))]
)
def test_labels_are_spread_by_heads_with_masked_columns(rng, options):
    # Blocks and devices count the columns together, of padding none.
    loss = LOSSES["head"]
    batch = loss.make(rng, (5,), 305, pad=2, softcap=None, bias=True)
    masked = np.array([0, 1, 2, 130, 131, 299, 300, 305])
    mask = lambda x: replace(x, bias=x.bias.at[masked].set(-jnp.inf))
    batch = batch.map(mask, "student", "teacher")
    others = dict(labels=jnp.array([5, 200, 304, -100, 17]), where=jnp.ones(5, bool))
    batch = batch._replace(others=batch.others | others)
    check(loss, rng, batch, vocab_size=305, **options)


def test_a_label_at_minus_infinity(rng):
    s, t = rounded(rng, (2, 5)).at[:, 2].set(-jnp.inf), rounded(rng, (2, 5))
    f = jax.jit(
        lambda s, t, smoothing: jaxkl.distillation_loss_with_metrics(
            s, t, labels=jnp.array([2, 0]), alpha=0.0, label_smoothing=smoothing
        )
    )
    # Half of a label makes the loss infinite. Nothing of it is nothing.
    loss, metrics = f(s, t, 0.5)
    assert loss == np.inf and metrics.cross_entropy == np.inf
    loss, metrics = f(s, t, 1.0)
    expected = oracle.distillation_loss(
        s, t, labels=np.array([2, 0]), alpha=0.0, label_smoothing=1.0
    )
    assert_close(loss, expected.loss, 1e-6)
    assert_close(metrics.cross_entropy, expected.loss, 1e-6)
