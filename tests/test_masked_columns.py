"""Columns at -inf or at the lowest number, and temperatures that are extreme."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl._checks import TEMPERATURES

from . import oracle
from .cases import assert_matches, over, rarely
from .helpers import assert_close
from .sources import rounded


@pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16", "float64")])
def test_slopes_of_temperatures_beside_arrays(rng, dtype):
    # Slopes that are tiny where they should be 0 are not, times the lowest number.
    with jax.enable_x64(dtype == "float64"):
        s, t = rounded(rng, (8, 7), dtype), rounded(rng, (8, 7), dtype)
        for i, low in enumerate((-jnp.inf, jnp.finfo(s.dtype).min)):
            s, t = s.at[i::4, 3].set(low), t.at[i + 2 :: 4, 3].set(low)
        x = jnp.asarray(np.resize([0.3, 0.9, 1e-6], 8), jnp.float32)
        kinds = jaxkl.JensenShannon, jaxkl.SkewForwardKL, jaxkl.SkewReverseKL
        of = oracle.jensen_shannon, oracle.skew_forward_kl, oracle.skew_reverse_kl
        weights = 1.0, 0.5, jnp.float32(0.25)
        mixture = jaxkl.Mixture(
            tuple((w, kind(x)) for w, kind in zip(weights, kinds, strict=True))
        )
        by_token = oracle.by_token(
            [
                oracle.mixture(*((w, f(y)) for w, f in zip(weights, of, strict=True)))
                for y in np.asarray(x, np.float64)
            ]
        )
        temperatures = dict(
            temperature=jnp.full(8, 2, jnp.float32),
            teacher_temperature=jnp.full(8, 1.5, jnp.float32),
        )
        assert_matches(s, t, (mixture, by_token), reduction="none", **temperatures)


@over("forward", slow=["js", "reverse"])
def test_temperatures_at_the_ends_of_their_range(rng, divergence, reference):
    s, t = (x.at[:, 2].set(-jnp.inf) for x in (rounded(rng, (3, 5)) for _ in "st"))
    low, high = TEMPERATURES

    @jax.jit
    def derivatives(s, t, T):
        f = lambda s, T: jaxkl.distillation_loss(
            s, t, divergence=divergence, temperature=T
        )
        return *jax.value_and_grad(f, (0, 1))(s, T), *jax.hessian(f, (0, 1))(s, T)

    value, gradients, *hessian = derivatives(s, t, 1.0)
    assert np.isfinite(np.hstack([x.ravel() for x in jax.tree.leaves(hessian)])).all()
    for T in low, high:
        # Of logits that are larger by T, T² D is larger by T².
        got = derivatives(s * T, t * T, T)
        want = value * T**2, [x * T for x in gradients], *hessian
        for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            assert_close(x, y, 1e-5)
        # Others are nearly certain, or nearly alike.
        for name in "temperature", "teacher_temperature":
            assert_matches(s, t, (divergence, reference), **{name: jnp.float32(T)})


def test_a_float16_temperature_may_be_at_the_ends(rng):
    s = rounded(rng, (2, 5))
    T = jnp.asarray([TEMPERATURES[0], 6e4, 4e-7, jnp.inf], jnp.float16)
    f = lambda T: jaxkl.distillation_loss(s, s, temperature=T)
    np.testing.assert_array_equal(jax.jit(jax.vmap(f))(T), [0, 0, np.nan, np.nan])
