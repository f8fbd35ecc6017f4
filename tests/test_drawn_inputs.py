"""`distillation_loss` on drawn inputs against the oracle."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from . import oracle
from .cases import ALL, assert_gradient, evaluate
from .helpers import assert_close, TOLERANCE


SHAPES = [((), 3), ((1,), 1), ((5,), 2), ((2, 3), 11)]
NAMES = ["forward", "reverse", "js_normalized", "user"]
# Each shape is compiled once with each divergence; everything else is data.
COMPILED = [
    (
        shape,
        name,
        list(TOLERANCE)[(i + j) % 3],
        ("none", "mean")[(i + j) // 2 % 2],
        smooth,
    )
    for i, shape in enumerate(SHAPES)
    for j, (name, smooth) in enumerate(zip(NAMES, (False, True) * 2, strict=True))
]
ARGUMENTS = ("student", "teacher", "temperature", "teacher_temperature", "weights")
TEMPERED = {"temperature": "student", "teacher_temperature": "teacher"}


def _draw_logits(rng, shape, vocab, scale, dtype, masked):
    logits = scale * rng.normal(size=(*shape, vocab))
    if masked is not None:
        logits[..., masked] = -np.inf
    return jnp.asarray(logits, dtype)


def _largest_terms(floats, expected, temperature):
    """The slope is `-Σ_v x ∂L/∂x / T`, and is as exact as the terms of this sum."""
    x = np.asarray(floats[TEMPERED[temperature]], np.float64)
    x = np.where(np.isfinite(x), x, 0)
    slope = np.asarray(getattr(expected, TEMPERED[temperature]), np.float64)
    return np.max(np.abs(x * slope).sum(axis=-1) / np.asarray(floats[temperature]))


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    compiled=st.sampled_from(COMPILED),
    scale=st.sampled_from([0.01, 1.0, 5.0]),
    noise=st.sampled_from([None, 0.0, 0.3]),
    mask=st.booleans(),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    weights=st.sampled_from([[1.0], [0.0, 1.0], [0.0], [0.1, 7.0]]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_drawn_inputs(
    compiled, scale, noise, mask, kept, weights, alpha, label_smoothing, z_loss, seed
):
    (shape, vocab), name, dtype, reduction, smooth = compiled
    rng = np.random.default_rng(seed)
    # Both models mask one column, never all of them. Smoothing would put mass on the
    # masked column, and its loss would be infinite.
    masked = 0 if mask and vocab > 1 and not smooth else None
    t = _draw_logits(rng, shape, vocab, scale, dtype, masked)
    if noise is None:
        s = _draw_logits(rng, shape, vocab, scale, dtype, masked)
    else:
        s = (np.asarray(t, np.float32) + noise * rng.normal(size=t.shape)).astype(dtype)
        s = jnp.asarray(s)
    uniform = lambda: jnp.asarray(rng.uniform(0.5, 4, size=shape), jnp.float32)
    temperature = uniform()
    floats = dict(
        student=s,
        teacher=t,
        temperature=temperature,
        teacher_temperature=uniform() if noise is None else temperature,
        weights=jnp.asarray(rng.choice(weights, size=shape), jnp.float32),
    )
    numbers = dict(alpha=alpha, z_loss=z_loss)
    if smooth:
        numbers["label_smoothing"] = label_smoothing
    labels = rng.choice(
        [-100, vocab - 1, vocab // 2 if vocab > 2 else vocab - 1], shape
    )
    others = dict(
        labels=jnp.asarray(labels), where=jnp.asarray(rng.random(shape) < kept)
    )
    g = rng.normal(size=shape if reduction == "none" else ()).astype(np.float32)
    traced = {k: jnp.float32(x) for k, x in numbers.items()}
    options = dict(reduction=reduction, cotangent=g)
    value, grads = evaluate(
        **floats, **others, **traced, **options, divergence=ALL[name][0]
    )
    expected = oracle.distillation_loss(
        **floats, **others, **numbers, **options, divergence=ALL[name][1]
    )

    assert value.dtype == jnp.float32
    # The rounding of log-probabilities has their own size, not that of the small
    # differences between models or columns that make up the loss.
    conditioned = 1e-6 * (1 + scale) / min(scale, noise or 1.0)
    # The cross-entropy of a nearly certain label is a small difference of numbers of
    # order one. At student = teacher there is only the oracle's rounding.
    rounding = 1e-17 if alpha == 1.0 else 4e-7 * max(weights)
    assert_close(value, expected.loss, max(5e-6, conditioned), "value", rounding)
    for argument in ARGUMENTS:
        grad = grads[argument]
        assert grad.dtype == floats[argument].dtype
        assert grad.shape == floats[argument].shape
        assert np.isfinite(grad).all()
        tol = max(TOLERANCE[str(grad.dtype)][1], 3e-5, conditioned)
        slope = rounding * (1 + scale) * float(np.max(np.abs(g)))
        # At a certain outcome, f_p - p Σ f_p is a small difference of two losses.
        slope += 1e-6 * float(np.max(np.abs(g * expected.loss)))
        if argument in TEMPERED:
            slope += tol * _largest_terms(floats, expected, argument)
        assert_gradient(argument, grad, expected, tol, g, slope)
