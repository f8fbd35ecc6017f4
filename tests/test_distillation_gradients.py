"""Gradients of `distillation_loss` to every float argument, and second derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

import jaxkl
import jaxkl.reference

from . import oracle
from .cases import (
    ALL,
    assert_gradient,
    assert_matches,
    evaluate,
    FORWARD,
    JENSEN_SHANNON,
    over,
    over_kinds,
    rarely,
    rounded,
)
from .helpers import assert_close
from .sources import expected_of, make_models, per_token


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


@pytest.mark.parametrize("reduction", ["none", *rarely("mean")])
@over("forward", slow=["user"])
def test_gradients_to_second_order_match_finite_differences(
    rng, divergence, reference, reduction
):
    with jax.enable_x64(True):
        arguments = (
            rng.normal(size=(2, 3)),
            rng.normal(size=(2, 3)),
            rng.uniform(1, 2, size=2),
            rng.uniform(1, 2, size=2),
        )
        f = jax.jit(
            lambda s, t, temperature, weights: jaxkl.distillation_loss(
                s,
                t,
                divergence=divergence,
                temperature=temperature,
                weights=weights,
                differentiate_teacher=True,
                reduction=reduction,
            )
        )
        check_grads(f, arguments, order=2, modes=["rev"])


def _flat(shapes):
    """Splits a vector into arrays of the given shapes."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    cuts = [int(c) for c in np.cumsum(sizes)[:-1]]
    split = lambda x: [
        part.reshape(shape)
        for part, shape in zip(np.split(x, cuts), shapes, strict=True)
    ]
    traced_split = lambda x: [
        part.reshape(shape)
        for part, shape in zip(jnp.split(x, cuts), shapes, strict=True)
    ]
    return split, traced_split, sum(sizes)


@over("js_normalized", slow=[x for x in ALL if x != "js_normalized"])
def test_hessians_match_the_oracle(rng, divergence, reference):
    _assert_hessians(rng, divergence, reference, "mean")


@pytest.mark.slow
@over("forward", "user")
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_hessians_of_the_other_reductions(rng, divergence, reference, reduction):
    _assert_hessians(rng, divergence, reference, reduction)


def _assert_hessians(rng, divergence, reference, reduction):
    # Both logits, temperature and weights vary at once: mixed derivatives count too.
    names = ("student", "teacher", "temperature", "weights")
    split, traced_split, size = _flat([(2, 3), (2, 3), (2,), (2,)])
    x = rng.uniform(0.5, 1.5, size=size)
    g = rng.normal(size=2) if reduction == "none" else 1.0
    rest = dict(labels=np.array([1, 2]), alpha=0.75, z_loss=0.1, reduction=reduction)

    def theirs(x):
        arguments = dict(zip(names, split(x), strict=True))
        grads = oracle.distillation_loss(
            **arguments, **rest, divergence=reference, cotangent=g
        )
        return np.concatenate([np.ravel(getattr(grads, name)) for name in names])

    def mine(x):
        s, t, temperature, weights = traced_split(x)
        value = jaxkl.distillation_loss(
            s,
            t,
            divergence=divergence,
            temperature=temperature,
            weights=weights,
            differentiate_teacher=True,
            **rest,
        )
        return jnp.sum(g * value)

    points = [x]
    if divergence != jaxkl.TotalVariation():  # which has a kink at student = teacher
        points.append(np.concatenate([x[:6], x[:6], x[12:]]))
    twice = jax.jit(lambda x: (jax.hessian(mine)(x), jax.jacrev(jax.jacrev(mine))(x)))
    for x in points:
        expected = oracle.jacobian(theirs, x)
        with jax.enable_x64(True):
            over_reverse, reverse_reverse = twice(jnp.asarray(x))
        assert_close(over_reverse, expected, 1e-8, "forward over reverse")
        assert_close(reverse_reverse, expected, 1e-8, "reverse over reverse")


@pytest.mark.parametrize(
    "source, reduction",
    [
        ("logits", "none"),
        ("head", "sum"),
        *rarely(("logits", "sum"), ("logits", "mean")),
    ],
)
def test_mixed_derivatives_at_a_weight_of_zero(rng, source, reduction):
    # Learning to reweight examples (Ren et al., 2018) starts with weights of zero.
    student, teacher = make_models(rng, source, (3,), 5)
    jacobian, tile = (jax.jacfwd, 2) if source == "head" else (jax.jacrev, None)
    arguments = dict(temperature=2.0, reduction=reduction)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    @jax.jit
    def slopes(student, teacher, weights):
        f = lambda s, w: jaxkl.distillation_loss(
            s, teacher, weights=w, tile=tile, **arguments
        ).sum()
        return jacobian(lambda w: ravel_pytree(jax.grad(f)(student, w))[0])(weights)

    weights = jnp.array([0.0, 1.0, 2.0])
    expected = oracle.jacobian(
        lambda w: flat(expected_of(student, teacher, weights=w, **arguments).student),
        weights,
    )
    assert_close(slopes(student, teacher, weights), expected, 1e-5)


def test_hessian_of_a_capped_head_at_the_teacher(rng):
    """The gradient of the logits is 0 there, and its derivative is not."""
    student, _ = make_models(rng, "head", (3,), 5, softcap=1.5)
    flat, unravel = ravel_pytree(student)

    def hessian(loss):
        f = lambda x: loss(unravel(x), student, temperature=2.0)
        return jax.jit(jax.hessian(f))(flat)

    expected = hessian(jaxkl.reference.distillation_loss)
    assert np.max(np.abs(expected)) > 1e-3
    assert_close(hessian(jaxkl.distillation_loss), expected, 1e-5)


@pytest.mark.parametrize(
    "source, divergence, reduction",
    [
        *rarely(("bucket", FORWARD, "mean"), ("renormalize", FORWARD, "mean")),
        ("head", FORWARD, "none"),  # the tiles do not divide the tokens
        *rarely(*(("head", JENSEN_SHANNON, x) for x in ("mean", "none"))),
    ],
)
def test_hessians_are_those_of_the_reference(rng, source, divergence, reduction):
    student, teacher = make_models(rng, source, (3,), 5)
    flat, unravel = ravel_pytree(student)

    def squared(x, loss, **options):
        options |= dict(divergence=divergence[0], reduction=reduction)
        return jnp.sum(loss(unravel(x), teacher, **options) ** 2)

    plain = partial(squared, loss=jaxkl.reference.distillation_loss)
    fused = partial(squared, loss=jaxkl.distillation_loss, tile=2)
    hessian = jax.jit(jax.hessian(plain))(flat)
    assert_close(jax.jit(jax.hessian(fused))(flat), hessian, 1e-5)
    if source == "head":
        assert_close(jax.jit(jax.jacrev(jax.grad(fused)))(flat), hessian, 1e-5)


def test_hessian_of_a_masked_tiled_batch_in_float32(rng):
    s, t = rounded(rng, (5, 3)), rounded(rng, (5, 3))
    where = jnp.array([True, False, True, True, False])
    f = lambda s: jaxkl.distillation_loss(s, t, where=where, temperature=2.0, tile=2)
    gradient = lambda s: (
        oracle.distillation_loss(s, t, where=where, temperature=2.0).student
    )
    hessian = jax.jit(jax.hessian(f))(s)
    assert_close(hessian, oracle.jacobian(gradient, s), 1e-5)


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
