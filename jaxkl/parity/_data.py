"""The arrays of the battery: `input`, `target`, and cotangents to pull back."""

import itertools

import jax.numpy as jnp
import numpy as np
from numpy import inf, nan


INPUTS = -1.0, 0.0, inf, -inf, nan, 1.5
TARGETS = 0.0, 1.0, 0.5, -0.5, inf, -inf, nan, -0.0


def rounded(x, dtype):
    """`x` as float64 with the digits of `dtype`: the same in every framework."""
    return np.real(np.asarray(x).astype(jnp.dtype(dtype))).astype(np.float64)


def rows(shape, other, log_target=False):
    """Log-probabilities, targets, and numbers to multiply the gradient with."""
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=shape), rng.normal(size=other)
    x, t = map(_normalised, (x, t))
    return x, (t if log_target else np.exp(t)), np.array([2.0, 1.0, 3.0])


def _normalised(x):
    sizes = np.log(np.sum(np.exp(x), -1, keepdims=True)) if x.ndim and x.size else 0
    return x - sizes


def masked(shape, where, log_target=False):
    """Like `rows`, with a mask or without."""
    mask = np.random.default_rng(1).random(shape) < 0.7
    return *rows(shape, shape, log_target), *([mask] if where else [])


def special(half=False):
    """Each special `input` with each special `target` and each cotangent.

    In half precision without what overflows only inside PyTorch: there jaxkl computes
    in float32 and stays finite.
    """
    targets = TARGETS if half else (*TARGETS, 1e-25, 100.0)
    cotangents = (0.0, 1.0, -2.0) if half else (0.0, 1.0, -2.0, inf)
    return np.array(list(itertools.product(INPUTS, targets, cotangents))).T


def second_order(make, c_input, c_target):
    """The numbers of `make()`, with cotangents for the two gradients."""
    x, t, g = make()
    return x, t, g, np.full_like(x, c_input), np.full_like(t, c_target)
