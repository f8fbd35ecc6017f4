"""The catalogue's elementwise functions of log-probabilities."""

import dataclasses
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl import JensenShannon

from . import oracle
from .cases import assert_matches, over, over_catalogue, rarely, rounded
from .helpers import assert_close


def _log_probs(rng, shape=(4, 7), scale=1.0):
    return jax.nn.log_softmax(rounded(rng, shape, scale=scale))


@over_catalogue
def test_a_divergence_is_the_sum_of_its_terms(rng, divergence, reference):
    log_p, log_q = _log_probs(rng), _log_probs(rng)
    terms = divergence(log_p, log_q)
    assert terms.shape == log_p.shape and terms.dtype == log_p.dtype
    # A sum of non-negative terms does not cancel.
    assert (terms >= 0).all()
    expected, _, _ = reference(*(np.asarray(x, np.longdouble) for x in (log_p, log_q)))
    assert_close(terms.sum(-1), expected.sum(-1), 2e-6)


@pytest.mark.parametrize("dtype, tol", [("float32", 2e-6), ("float64", 4e-15)])
@over("forward", "js", slow=["total_variation"])
def test_digits_of_a_term_near_and_far(divergence, reference, dtype, tol):
    # On both sides of 1/2 and 1, where series end. All ratios are exact in float32.
    sizes = np.array([2**-10, 0.125, 0.498, 0.502, 0.75, 0.998, 1.002, 3])
    ratios = np.round(np.concatenate([sizes, -sizes]) * 2**12) / 2**12
    with jax.enable_x64(dtype == "float64"):
        log_p = jnp.full(len(ratios), -1, dtype)
        log_q = log_p + jnp.asarray(ratios, dtype)
        terms, vjp = jax.vjp(divergence, log_p, log_q)
        f_p, f_q = vjp(jnp.ones_like(terms))
        arguments = (np.asarray(x, np.longdouble) for x in (log_p, log_q))
        expected, want_p, want_q = reference(*arguments)
    np.testing.assert_allclose(terms, expected.astype(np.float64), rtol=tol)
    np.testing.assert_allclose(f_p, want_p.astype(np.float64), rtol=tol)
    np.testing.assert_allclose(f_q, want_q.astype(np.float64), rtol=tol)


@over_catalogue
def test_zero_probability_in_both_is_no_term(rng, divergence, reference):
    log_p, log_q = (
        x.at[:, 2].set(-jnp.inf) for x in (_log_probs(rng), _log_probs(rng))
    )
    f = lambda log_p, log_q: divergence(log_p, log_q).sum()
    assert not divergence(log_p, log_q)[:, 2].any()
    for grad in jax.grad(f, argnums=(0, 1))(log_p, log_q):
        assert np.isfinite(grad).all() and not grad[:, 2].any()


@over_catalogue
def test_frozen_hashable_and_equal_by_value(divergence, reference):
    again = pickle.loads(pickle.dumps(divergence))
    assert again == divergence and hash(again) == hash(divergence)
    assert type(divergence).__name__ in repr(divergence)
    assert divergence != JensenShannon(0.123)
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        divergence.beta = 0.3


def test_parameters_tell_divergences_apart():
    assert JensenShannon(0.3) == JensenShannon(beta=0.3)
    assert JensenShannon(0.3) != JensenShannon(0.4)
    assert JensenShannon(0.3) != JensenShannon(0.3, normalized=True)
    assert JensenShannon() == JensenShannon(beta=0.5, normalized=False)
    assert jaxkl.ForwardKL() != jaxkl.ReverseKL()


NORMALIZED = partial(JensenShannon, normalized=True)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "make, name, values",
    [
        (JensenShannon, "beta", (0, 1, 0.0, 1.0, -0.1, 1.1, NAN)),
        (NORMALIZED, "beta", (-0.1, 1.1, NAN, INF)),
        (jaxkl.SymmetricKL, "weight", (-0.1, 1.1, NAN)),
        (jaxkl.SkewForwardKL, "alpha", (1, -0.1, NAN)),
        (jaxkl.SkewReverseKL, "alpha", (1, -0.1, NAN)),
        (jaxkl.AlphaDivergence, "alpha", (INF, NAN)),
    ],
)
def test_parameters_in_range(make, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}`"):
            make(value)


@pytest.mark.parametrize("beta", [0.0, 1 - 1e-6, 1, *rarely(0, 1e-6, 1e-3, 0.999, 1.0)])
def test_normalized_jensen_shannon_reaches_its_limits(rng, beta):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    pair = NORMALIZED(beta), oracle.jensen_shannon(beta, normalized=True)
    assert_matches(s, t, pair, value_tol=2e-6)


@pytest.mark.parametrize("beta", [1e-3, 0.9, *rarely(0.1, 0.999)])
def test_jensen_shannon_at_any_beta(rng, beta):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    pair = JensenShannon(beta), oracle.jensen_shannon(beta)
    assert_matches(s, t, pair, value_tol=2e-6)


class Twice(jaxkl.ForwardKL):
    def __call__(self, log_p, log_q):
        return 2 * super().__call__(log_p, log_q)


def test_a_users_formula_and_a_subclass_with_its_own(rng):
    """A callable needs no class."""
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    textbook = lambda log_p, log_q: jnp.exp(log_p) * (log_p - log_q)
    assert_matches(s, t, (textbook, oracle.forward_kl))
    twice = oracle.mixture((2, oracle.forward_kl))
    assert_matches(s, t, (Twice(), twice))
