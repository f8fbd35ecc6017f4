"""Random cases of `kl_div` against PyTorch in float64."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, HealthCheck, settings, strategies as st

from jaxkl import kl_div


with warnings.catch_warnings():
    # PyTorch uses what NumPy and Python have deprecated.
    warnings.simplefilter("ignore")
    import torch


inf, nan = float("inf"), float("nan")
# Shapes and dtypes are few: each pair is compiled once, for all options.
SHAPES = [((2, 3), (2, 3)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((2, 3), ())]
DTYPES = [("float32",) * 2, ("bfloat16",) * 2, ("float16", "bfloat16")]
OPTIONS = list(itertools.product(["none", "sum", "mean", "batchmean"], [False, True]))
EPS = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-23}


def values(low, high, special):
    # Half of the cases have ordinary values only, as NaN hides errors elsewhere.
    ordinary = st.floats(low, high, width=16)
    return st.one_of(
        st.lists(ordinary, min_size=6, max_size=6),
        st.lists(ordinary | st.sampled_from(special), min_size=6, max_size=6),
    )


@functools.cache
def compiled(shapes, dtypes):
    @jax.jit
    def run(x, t):
        results = []
        for reduction, log_target in OPTIONS:
            f = functools.partial(kl_div, reduction=reduction, log_target=log_target)
            value, pull = jax.vjp(f, x, t)
            results.append((value, *pull(jnp.ones_like(value))))
        return results

    return run


def expected(x, t, reduction, log_target):
    """PyTorch's value and gradients, with the size of the terms that were added up."""
    x, t = (torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (x, t))
    f = functools.partial(
        torch.nn.functional.kl_div, reduction=reduction, log_target=log_target
    )
    value = f(x, t)
    grads = torch.autograd.grad(value, (x, t), torch.ones_like(value))
    with torch.no_grad():
        p = t.exp() if log_target else t
        log_p = t if log_target else t.abs().log()
        size = p.abs() * (1 + log_p.abs() + x.abs())
        size = torch.maximum(size, 2 + log_p.abs() + x.abs())
        size = size[size.isfinite()].sum().item()
    return [a.detach().numpy() for a in (value, *grads)], size


@pytest.mark.slow
@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from(OPTIONS),
    values(-8, 1, [inf, -inf, nan, 0.0]),
    values(0, 2, [0.0, 1.0, -0.5, inf, -inf, nan]),
    st.booleans(),
)
def test_drawn_cases(shapes, dtypes, options, x, t, negate):
    t = [-v for v in t] if negate else t  # log-probabilities are negative
    x, t = (
        jnp.asarray(np.resize(v, shape), dtype)
        for v, shape, dtype in zip((x, t), shapes, dtypes, strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "mean" warns
        result = compiled(shapes, dtypes)(x, t)[OPTIONS.index(options)]
        values, size = expected(x, t, *options)
    for actual, value, of in zip(result, values, ("value", "x", "t"), strict=True):
        assert actual.shape == value.shape
        tol = EPS[actual.dtype.name]
        np.testing.assert_allclose(
            np.asarray(actual, np.float64),
            value,
            rtol=2 * tol,
            atol=8 * EPS["float32"] * size + 1e-7,
            err_msg=f"{of} {options} {x} {t}",
        )
