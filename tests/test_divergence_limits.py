"""Derivatives of the catalogue, ends of its parameters, and singular points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl

from . import oracle
from .cases import CATALOGUE, rounded
from .helpers import assert_close


pytestmark = pytest.mark.slow

# The ends of each parameter, beside the divergence they must give.
LIMITS = {
    "alpha_zero": (jaxkl.AlphaDivergence(0), oracle.reverse_kl),
    "alpha_one": (jaxkl.AlphaDivergence(1), oracle.forward_kl),
    "js_normalized_zero": (jaxkl.JensenShannon(0, True), oracle.forward_kl),
    "js_normalized_one": (jaxkl.JensenShannon(1, True), oracle.reverse_kl),
    "symmetric_one": (jaxkl.SymmetricKL(1), oracle.forward_kl),
    "symmetric_zero": (jaxkl.SymmetricKL(0), oracle.reverse_kl),
    "skew_forward_zero": (jaxkl.SkewForwardKL(0), oracle.forward_kl),
    "skew_reverse_zero": (jaxkl.SkewReverseKL(0), oracle.reverse_kl),
}
over_everything = pytest.mark.parametrize(
    "divergence, reference",
    [pytest.param(*x, id=name) for name, x in (CATALOGUE | LIMITS).items()],
)


def _centred(log_p, log_q, divergence):
    """The sum, and its gradients to the logits.

    These do not depend on how `f` is written: `c (q - p)` added to it changes nothing.
    """
    f, f_p, f_q = divergence(log_p, log_q)
    p, q = np.exp(log_p), np.exp(log_q)
    d_t = f_p - p * np.sum(f_p, -1, keepdims=True)
    d_s = f_q - q * np.sum(f_q, -1, keepdims=True)
    return f.sum(-1), d_t, d_s


def _ours(divergence):
    def with_derivatives(log_p, log_q):
        f, vjp = jax.vjp(divergence, log_p, log_q)
        return f, *vjp(jnp.ones_like(f))

    return with_derivatives


@over_everything
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_value_and_derivatives(rng, divergence, reference, scale):
    log_p, log_q = (
        jax.nn.log_softmax(rounded(rng, (6, 11), scale=scale)) for _ in range(2)
    )
    got = _centred(log_p, log_q, _ours(divergence))
    exact = (oracle.log_softmax(x) for x in (log_p, log_q))
    expected = _centred(*exact, reference)
    for name, actual, want in zip(("value", "d_t", "d_s"), got, expected, strict=True):
        assert_close(actual, want, 1e-5, name)


@over_everything
def test_near_the_teacher(rng, divergence, reference):
    """And neither value nor derivative at the teacher."""
    t = rounded(rng, (4, 500))
    for noise in (1e-2, 1e-4):
        s = t + rounded(rng, t.shape, scale=noise)
        log_p, log_q = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
        total = divergence(log_p, log_q).sum(-1)
        exact = (oracle.log_softmax(x) for x in (t, s))
        expected = reference(*exact)[0].sum(-1).astype(np.float64)
        assert (divergence(log_p, log_q) >= 0).all()
        # The rounding of the logarithms, about 1e-7, relative to the noise.
        tol = 0.02 if noise == 1e-4 else 2e-4
        np.testing.assert_allclose(total, expected, rtol=tol)
    for x in _centred(log_p, log_p, _ours(divergence)):
        assert not np.asarray(x).any()


@over_everything
def test_where_one_model_has_no_mass(rng, divergence, reference):
    log_p, log_q = (jax.nn.log_softmax(rounded(rng, (1, 7))) for _ in range(2))
    gone = lambda x: jax.nn.log_softmax(x.at[0, 2].set(-jnp.inf))
    for p, q in ((gone(log_p), log_q), (log_p, gone(log_q))):
        f, f_p, f_q = _ours(divergence)(p, q)
        with np.errstate(all="ignore"):
            wanted = reference(*(np.asarray(x, np.longdouble) for x in (p, q)))
            expected = _centred(np.float64(p), np.float64(q), lambda *_: wanted)  # noqa: B023
        total = np.asarray(expected[0], np.float64)
        assert not np.isnan(f).any()
        np.testing.assert_allclose(f.sum(-1), total, rtol=1e-5)
        if np.isfinite(total).all():
            assert_close(
                f_q - jnp.exp(q) * f_q.sum(-1, keepdims=True), expected[2], 1e-5
            )
            assert np.isfinite(f_p).all()


@pytest.mark.parametrize("step", [1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("end, sign", [(0, 1), (0, -1), (1, 1), (1, -1)])
def test_alpha_divergence_is_continuous_at_its_limits(rng, end, sign, step):
    log_p, log_q = (jax.nn.log_softmax(rounded(rng, (6, 11))) for _ in range(2))
    alpha = end + sign * step
    got = _centred(log_p, log_q, _ours(jaxkl.AlphaDivergence(alpha)))
    exact = [oracle.log_softmax(x) for x in (log_p, log_q)]
    expected = _centred(*exact, oracle.alpha_divergence(alpha))
    for actual, want in zip(got, expected, strict=True):
        assert_close(actual, want, 1e-5)


@pytest.mark.parametrize("alpha", [0.5, 2.0, -1.0, 3.0])
def test_alpha_divergence_is_its_definition(rng, alpha):
    log_p, log_q = (oracle.log_softmax(rounded(rng, (6, 11))) for _ in range(2))
    power = np.exp(alpha * log_p + (1 - alpha) * log_q).sum(-1)
    expected = (power - 1) / (alpha * (alpha - 1))
    ours = jaxkl.AlphaDivergence(alpha)(jnp.float32(log_p), jnp.float32(log_q))
    assert_close(ours.sum(-1), expected, 5e-6)
