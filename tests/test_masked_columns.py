"""Columns at -inf or at the lowest number: every argument's gradient, and every term."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl

from . import oracle
from .cases import assert_matches
from .sources import rounded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
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
