"""Second derivatives by logits and temperature, with masked columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl

from .helpers import assert_close


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.slow
def test_masked_columns_are_as_if_absent(rng, reduction):
    s, t = (rng.normal(size=(2, 3)).astype(np.float32) for _ in range(2))
    masked = [np.insert(x, 1, -np.inf, axis=1) for x in (s, t)]
    options = dict(differentiate_teacher=True, reduction=reduction)
    total = lambda s, t, temperature: jnp.sum(
        jaxkl.distillation_loss(s, t, temperature=temperature, **options)
    )
    hessian = jax.jit(jax.hessian(total, argnums=(0, 1, 2)))
    kept = np.array([0, 2, 3])
    for row, row_ in zip(hessian(*masked, 2.0), hessian(s, t, 2.0), strict=True):
        for actual, expected in zip(row, row_, strict=True):
            actual = np.asarray(actual)
            assert np.isfinite(actual).all()
            for axis, size in enumerate(actual.shape):
                if size == 4:
                    actual = np.take(actual, kept, axis)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("temperature", [0.02, 1.0, 50.0])
def test_a_masked_column_at_any_temperature(rng, temperature):
    # The number that stands for -inf must stay finite when it is divided by T³.
    s, t = (rng.normal(size=(2, 3)).astype(np.float32) for _ in range(2))
    masked = [np.insert(x, 1, -np.inf, axis=1) for x in (s, t)]
    loss = lambda s, t, T: jaxkl.distillation_loss(s, t, temperature=T, t_squared=False)
    second = jax.jit(jax.hessian(loss, argnums=(0, 2)))
    T = jnp.float32(temperature)
    (_, by_logits), (_, by_temperature) = second(*masked, T)
    (_, *expected), (_, curvature) = second(s, t, T)
    assert not by_logits[:, 1].any()
    assert_close(np.delete(by_logits, 1, axis=1), *expected, 1e-5)
    assert_close(by_temperature, curvature, 1e-5)
