"""The arrays of the battery. Reports quote these functions as they are."""

import itertools

import numpy as np
from numpy import inf, nan


def rounded(x, dtype):
    """`x` as float64 with the digits of `dtype`: the same in every framework."""
    from jax.numpy import dtype as as_dtype

    return np.real(np.asarray(x).astype(as_dtype(dtype))).astype(np.float64)


def rows(shape, other, log_target=False, seed=0):
    """Log-probabilities, targets, and numbers to multiply the gradient with."""
    rng = np.random.default_rng(seed)
    x, t = rng.normal(size=shape), rng.normal(size=other)
    if x.ndim and x.size:
        x = x - np.log(np.sum(np.exp(x), -1, keepdims=True))
    if t.ndim and t.size:
        t = t - np.log(np.sum(np.exp(t), -1, keepdims=True))
    return x, (t if log_target else np.exp(t)), np.array([2.0, 1.0, 3.0])


def special(cotangents=(0.0, 1.0, -2.0, inf)):
    """Each special `input` with each special `target` and each cotangent."""
    inputs = -1.0, 0.0, inf, -inf, nan, 1.5
    targets = 0.0, 1.0, 0.5, -0.5, inf, -inf, nan, 1e-25, 100.0, -0.0
    return np.array(list(itertools.product(inputs, targets, cotangents))).T


def special_in_half_precision():
    """Like `special`, without what overflows only inside PyTorch."""
    inputs = -1.0, 0.0, inf, -inf, nan, 1.5
    targets = 0.0, 1.0, 0.5, -0.5, inf, -inf, nan, -0.0
    return np.array(list(itertools.product(inputs, targets, [0.0, 1.0, -2.0]))).T


def second_order(shape, other, log_target, c_input, c_target):
    """Like `rows`, with cotangents for the two gradients."""
    x, t, g = rows(shape, other, log_target)
    return x, t, g, np.full(shape, c_input), np.full(other, c_target)


def special_second_order(c_input, c_target):
    x, t, g = special()
    return x, t, g, np.full_like(x, c_input), np.full_like(t, c_target)


def pair(shape, other):
    return rows(shape, other)[:2]


def ones(shape, other):
    return np.ones(shape), np.ones(other)


def masked(shape, where, log_target=False):
    """Like `rows`, with a mask or without."""
    x, t, g = rows(shape, shape, log_target)
    mask = np.random.default_rng(1).random(shape) < 0.7
    return (x, t, g, mask) if where else (x, t, g)
