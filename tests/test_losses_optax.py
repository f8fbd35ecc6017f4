"""`jaxkl.losses` in place of optax's, in its own tests and in training."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.losses import _classification, _classification_test
from scipy.special import softmax

from jaxkl import losses

from .cases import rarely
from .helpers import assert_close, TOLERANCE


PLAIN = ["kl_divergence", "kl_divergence_with_log_targets", "generalized_kl_divergence"]
VALUE_TOL, GRAD_TOL = TOLERANCE["float32"]


class Replaced:
    """Runs a test class of optax with optax's function replaced by ours."""

    function: str

    def setUp(self):
        super().setUp()
        np.random.seed(0)
        ours = mock.Mock(side_effect=getattr(losses, self.function), spec=["__name__"])
        ours.__name__ = self.function
        patch = mock.patch.object(_classification, self.function, ours)
        patch.start()
        self.addCleanup(patch.stop)
        # A test that did not call ours would have tested optax.
        self.addCleanup(lambda: self.assertGreater(ours.call_count, 0))


class TestKLDivergence(Replaced, _classification_test.KLDivergenceTest):
    function = "kl_divergence"


class TestKLDivergenceWithLogTargets(
    Replaced, _classification_test.KLDivergenceWithLogTargetsTest
):
    function = "kl_divergence_with_log_targets"


class TestGeneralizedKLDivergence(
    Replaced, _classification_test.GeneralizedKLDivergenceTest
):
    function = "generalized_kl_divergence"


def draw(rng, name, shape):
    x = rng.normal(size=shape)
    y = rng.dirichlet(np.ones(shape[-1]), size=shape[:-1])
    y = np.log(y) if name == "kl_divergence_with_log_targets" else y
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


@pytest.mark.parametrize("axis", [-1, *rarely(((0, 1),), None)])
@pytest.mark.parametrize("where", ["none", "columns", *rarely("all", "rows")])
@pytest.mark.parametrize("name", PLAIN)
def test_same_as_optax(rng, name, where, axis):
    x, y = draw(rng, name, (4, 3, 6))
    where = {
        "none": None,
        "all": rng.random((4, 3, 6)) < 0.7,
        "rows": rng.random((4, 3, 1)) < 0.7,
        "columns": rng.random((1, 1, 6)) < 0.7,
    }[where]

    def value_grads_and_tangent(module):
        f = lambda x, y: getattr(module, name)(x, y, axis, where)
        value, vjp = jax.vjp(f, x, y)
        return value, vjp(jnp.cos(value)), jax.jvp(f, (x, y), (jnp.cos(x), x))[1]

    run = jax.jit(lambda: [value_grads_and_tangent(m) for m in (losses, optax.losses)])
    (value, grads, tangent), (value_, grads_, tangent_) = run()
    assert value.shape == value_.shape and value.dtype == value_.dtype
    assert_close(value, value_, 3 * VALUE_TOL)
    assert_close(grads[0], grads_[0], GRAD_TOL)
    assert_close(grads[1], grads_[1], GRAD_TOL)
    assert_close(tangent, tangent_, GRAD_TOL)


@pytest.mark.slow
def test_optax_has_nan_where_these_have_none():
    x, t = jnp.log(jnp.array([0.25, 0.25, 0.5])), jnp.array([0.0, 0.5, 0.5])
    gradient = [0, 1 + np.log(2), 1]
    grad = jax.grad(optax.losses.kl_divergence, 1)(x, t)
    np.testing.assert_array_equal(jnp.isnan(grad), [True, False, False])
    grad = jax.grad(losses.kl_divergence, 1)(x, t)
    np.testing.assert_allclose(grad, gradient, rtol=1e-6)

    # The class is masked, and so impossible, in the predictions too.
    masked = x.at[0].set(-jnp.inf)
    assert jnp.isnan(optax.losses.kl_divergence(masked, t))
    value, grads = jax.value_and_grad(losses.kl_divergence, (0, 1))(masked, t)
    np.testing.assert_allclose(value, np.log(2) / 2, rtol=1e-6)
    np.testing.assert_allclose(grads, [-t, gradient], rtol=1e-6)

    name = "kl_divergence_with_log_targets"
    value, grads = jax.value_and_grad(getattr(optax.losses, name), (0, 1))(
        x, jnp.log(t)
    )
    assert jnp.isnan(value) and jnp.isnan(grads[1][0])
    value, grads = jax.value_and_grad(getattr(losses, name), (0, 1))(x, jnp.log(t))
    np.testing.assert_allclose(value, np.log(2) / 2, rtol=1e-6)
    np.testing.assert_allclose(grads, [-t, [0, (1 + np.log(2)) / 2, 0.5]], rtol=1e-6)

    # A masked NaN stays in optax's gradient.
    where, bad = np.array([True, True, False]), x.at[2].set(jnp.nan)
    grad = lambda f: jax.grad(lambda t: f(bad, t, where=where))(t + 0.25)
    assert np.isnan(grad(optax.losses.kl_divergence)[2])
    assert grad(losses.kl_divergence)[2] == 0


def test_optax_rounds_in_bfloat16(rng):
    x = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(8, 512)), jnp.bfloat16))
    t = jax.nn.softmax(jnp.asarray(rng.normal(size=(8, 512)), jnp.bfloat16))
    x_, t_ = (np.asarray(a, np.float64) for a in (x, t))
    expected = np.sum(t_ * (np.log(t_) - x_), -1)
    assert_close(losses.kl_divergence(x, t), expected, VALUE_TOL)
    error = np.abs(np.asarray(optax.losses.kl_divergence(x, t), float) - expected)
    assert error.max() > 1e-3 * expected.max()


@pytest.fixture
def data(rng):
    inputs = rng.normal(size=(64, 5))
    return inputs, 2 * inputs @ rng.normal(size=(5, 7))


def train(loss, inputs, teacher_logits, steps=20):
    """A linear student under optax and Flax NNX: its losses and its parameters."""
    inputs, teacher_logits = jnp.asarray(inputs), jnp.asarray(teacher_logits)
    dtype = inputs.dtype
    init = nnx.initializers.constant(0.1)
    model = nnx.Linear(
        5, 7, kernel_init=init, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)
    )
    optimizer = nnx.Optimizer(model, optax.sgd(0.5, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        f = lambda model: loss(model(inputs), teacher_logits)
        value, grads = nnx.value_and_grad(f)(model)
        optimizer.update(model, grads)
        return value

    history = [step(model, optimizer) for _ in range(steps)]
    return np.array(history), np.asarray(model.kernel), np.asarray(model.bias)


LOSSES = {
    "softmax_kl_divergence": lambda s, t: losses.softmax_kl_divergence(
        s, t, temperature=2.0
    ).mean(),
    "kl_divergence": lambda s, t: losses.kl_divergence(
        jax.nn.log_softmax(s / 2), jax.nn.softmax(t / 2)
    ).mean(),
    "kl_divergence_with_log_targets": lambda s, t: (
        losses.kl_divergence_with_log_targets(
            jax.nn.log_softmax(s / 2), jax.nn.log_softmax(t / 2)
        ).mean()
    ),
}


@pytest.fixture
def trained_by_optax_in_float64(data):
    loss = lambda s, t: optax.losses.kl_divergence(
        jax.nn.log_softmax(s / 2), jax.nn.softmax(t / 2)
    ).mean()
    with jax.enable_x64(True):
        return train(loss, *data)


@pytest.mark.parametrize("name", [next(iter(LOSSES)), *rarely(*list(LOSSES)[1:])])
def test_training_step(data, trained_by_optax_in_float64, name):
    expected = trained_by_optax_in_float64
    assert expected[1].dtype == np.float64
    data = [x.astype(np.float32) for x in data]
    actual = train(LOSSES[name], *data)
    assert (np.diff(actual[0]) < 0).all() and actual[0][-1] < actual[0][0] / 2
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-5)


@pytest.mark.slow
def test_first_gradient_of_training(data):
    # The student's logits are equal, so the gradient is inputsᵀ (1/7 - p) / T.
    inputs, teacher_logits = data
    loss = lambda kernel: LOSSES["softmax_kl_divergence"](
        jnp.asarray(inputs, jnp.float32) @ kernel, jnp.asarray(teacher_logits)
    )
    grad = jax.grad(loss)(jnp.full((5, 7), 0.1, jnp.float32))
    slope = (1 / 7 - softmax(teacher_logits / 2, axis=-1)) / 2
    assert_close(grad, inputs.T @ slope / len(inputs), GRAD_TOL)
