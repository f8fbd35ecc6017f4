"""`jaxkl.losses` in place of optax's, in its own tests.

`jaxkl parity`, which `test_parity.py` runs, compares numbers.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.losses import _classification, _classification_test

from jaxkl import losses

from .helpers import assert_close, TOLERANCE
from .test_losses import LOG, PLAIN


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


@pytest.mark.slow
def test_optax_has_nan_where_these_have_none():
    """What these have instead is in `test_losses.py`: there are its singular points."""
    x, t = jnp.log(jnp.array([0.25, 0.25, 0.5])), jnp.array([0.0, 0.5, 0.5])
    # A class is masked, and so impossible, in the predictions too; a NaN is masked.
    impossible, bad = x.at[0].set(-jnp.inf), x.at[2].set(jnp.nan)
    where = np.array([True, True, False])
    for name, *args, keep in (
        (PLAIN[0], x, t, None),
        (PLAIN[0], impossible, t, None),
        (LOG, x, jnp.log(t), None),
        (PLAIN[0], bad, t + 0.25, where),
    ):
        grads = (jax.grad(getattr(m, name), (0, 1)) for m in (optax.losses, losses))
        theirs, ours = (np.array(grad(*args, where=keep)) for grad in grads)
        assert np.isnan(theirs).any() and np.isfinite(ours).all()


def test_optax_rounds_in_bfloat16(rng):
    x = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(8, 512)), jnp.bfloat16))
    t = jax.nn.softmax(jnp.asarray(rng.normal(size=(8, 512)), jnp.bfloat16))
    x_, t_ = (np.asarray(a, np.float64) for a in (x, t))
    expected = np.sum(t_ * (np.log(t_) - x_), -1)
    assert_close(losses.kl_divergence(x, t), expected, TOLERANCE["float32"][0])
    error = np.abs(np.asarray(optax.losses.kl_divergence(x, t), float) - expected)
    assert error.max() > 1e-3 * expected.max()
