"""Gradients of `distillation_loss` to every float argument, and to constants."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
import jaxkl.reference

from . import oracle
from .cases import (
    assert_gradient,
    assert_matches,
    evaluate,
    FORWARD,
    over_kinds,
    rarely,
    rounded,
)
from .helpers import assert_close
from .sources import per_token


@pytest.mark.parametrize("reduction", ["none", *rarely("mean")])
@over_kinds
def test_cotangents_scale_the_gradients(rng, divergence, reference, reduction):
    s, t = rounded(rng, (3, 5, 7)), rounded(rng, (3, 5, 7))
    g = rng.normal(size=(3, 5)) if reduction == "none" else np.array(-3.7)
    arrays = per_token(rng, (3, 5), "temperature", "weights", "labels", vocab=7)
    arrays["teacher_temperature"] = jnp.float32(1.5)
    options = dict(cotangent=np.float32(g), reduction=reduction, alpha=0.5, z_loss=0.01)
    assert_matches(s, t, (divergence, reference), **arrays, **options)


@pytest.mark.parametrize("reduction", ["none", *rarely("mean")])
@over_kinds
def test_value_is_the_same_under_grad(rng, divergence, reference, reduction):
    s, t = rounded(rng, (33, 7)), rounded(rng, (33, 7))
    arguments = dict(divergence=divergence, reduction=reduction)
    plain = jax.jit(partial(jaxkl.distillation_loss, **arguments))(s, t)
    under_grad, _ = evaluate(s, t, **arguments)
    # The same sums in the same order differ by no more than a compiler's last bits.
    plain, under_grad = np.asarray(plain), np.asarray(under_grad)
    np.testing.assert_array_max_ulp(plain, under_grad, maxulp=8)


# Float arguments and constants.


@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
def test_constants_have_a_zero_gradient(rng, reduction):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    constants = dict(alpha=0.5, z_loss=0.1, label_smoothing=0.1)
    if reduction == "mean":
        constants["normalizer"] = 3.0
    constants = {name: jnp.float32(x) for name, x in constants.items()}

    def f(s, constants):
        return jaxkl.distillation_loss(
            s, t, labels=jnp.array([0, 1, 2, -100]), reduction=reduction, **constants
        ).sum()

    d_s, d_constants = jax.jit(jax.grad(f, argnums=(0, 1)))(s, constants)
    assert d_s.any()
    assert d_constants.keys() == constants.keys()
    assert all(g.shape == () and g == 0 for g in d_constants.values())


@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
@over_kinds
def test_teacher_is_a_constant_unless_differentiated(
    rng, divergence, reference, reduction
):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7), "bfloat16")
    # The gradient to a shared temperature still passes through both models.
    arguments = dict(
        divergence=divergence,
        reduction=reduction,
        temperature=jnp.asarray(rng.uniform(1, 2, size=4), jnp.float32),
    )
    value, frozen = evaluate(s, t, differentiate_teacher=False, **arguments)
    value_, learned = evaluate(s, t, differentiate_teacher=True, **arguments)
    assert frozen["teacher"].dtype == t.dtype and not frozen["teacher"].any()
    assert learned["teacher"].any()
    assert_close(value, value_, 1e-6)
    expected = oracle.distillation_loss(s, t, **arguments | {"divergence": reference})
    assert_close(frozen["student"], expected.student, 1e-5)
    assert_gradient("temperature", frozen["temperature"], expected, 1e-5)


@over_kinds
def test_temperatures_of_a_constant_teacher(rng, divergence, reference):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    arguments = dict(temperature=jnp.float32(1.5), teacher_temperature=jnp.float32(2))
    _, grads = evaluate(
        s, t, divergence=divergence, differentiate_teacher=False, **arguments
    )
    expected = oracle.distillation_loss(s, t, divergence=reference, **arguments)
    for name in arguments:
        assert_gradient(name, grads[name], expected, 1e-5)


@pytest.mark.parametrize("argument", ["temperature", "teacher_temperature", "weights"])
def test_gradient_to_one_argument_alone(rng, argument):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    floats = dict(temperature=1.5, teacher_temperature=2.0)
    floats["weights"] = jnp.asarray(rng.uniform(0, 2, size=4), jnp.float32)

    def f(x):
        return jaxkl.distillation_loss(s, t, **floats | {argument: x})

    x = jnp.asarray(floats[argument], jnp.float32)
    expected = oracle.distillation_loss(s, t, **floats | {argument: x})
    assert_gradient(argument, jax.jit(jax.grad(f))(x), expected, 1e-5)


@pytest.mark.parametrize("reduction", ["none", *rarely("sum", "mean")])
def test_a_weight_of_zero_has_a_gradient(rng, reduction):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    weights = jnp.array([0.0, 1.0, 0.0, 3.0])
    _, grads = assert_matches(s, t, FORWARD, weights=weights, reduction=reduction)
    assert grads["weights"].all()


@over_kinds
def test_descending_the_gradient_reaches_the_teacher(divergence, reference):
    # This tests the sign and the direction: the minimum is at student = teacher.
    rng = np.random.default_rng(1)
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    f = lambda s: jaxkl.distillation_loss(s, t, divergence=divergence, reduction="sum")

    @jax.jit
    def train(s):
        step = lambda s, _: (s - jax.grad(f)(s), f(s))
        return jax.lax.scan(step, s, length=500)

    s, losses = train(s)
    assert losses[-1] < 1e-3 * losses[0]
    np.testing.assert_allclose(jax.nn.softmax(s), jax.nn.softmax(t), atol=2e-2)


@pytest.mark.parametrize("junk", [np.nan, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16", "float64")])
def test_d_weights_beside_an_infinite_loss_without_weight(rng, dtype, junk):
    with jax.enable_x64(dtype == "float64"):
        s, t = rounded(rng, (4, 5), dtype), rounded(rng, (4, 5), dtype)
        weights = jnp.array([1.0, 0.0, 0.0, 3.0], jnp.float32)
        _, expected = evaluate(s, t, weights=weights)
        spoilt = s.at[1, 2].set(junk)
        value, grads = evaluate(spoilt, t, weights=weights)
        assert np.isfinite(value)
        got, want = (np.delete(x["weights"], 1) for x in (grads, expected))
        assert_close(got, want, 1e-5 if dtype == "float32" else 1e-6)
        assert not np.isfinite(grads["weights"][1])  # it is the loss of the token
