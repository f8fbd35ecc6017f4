"""The divergence in CONTRIBUTING.md works everywhere."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl


GUIDE = pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def divergence():
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(block.split("\n\n\n")[1].strip().splitlines()) <= 10
    names = {"__name__": "guide"}
    exec(compile(block, str(GUIDE), "exec"), names)
    return names["SquaredHellinger"]()


def test_value_and_gradient(rng, divergence):
    s, t = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 6, 9)))
    t = t.at[:, 0].set(-jnp.inf)  # a masked column

    def by_hand(s):
        p, q = jax.nn.softmax(t), jax.nn.softmax(s)
        return jnp.mean(1 - jnp.sum(jnp.sqrt(p) * jnp.sqrt(q), -1))

    loss = lambda s: jaxkl.distillation_loss(s, t, divergence=divergence)
    value, grad = jax.value_and_grad(loss)(s)
    value_, grad_ = jax.value_and_grad(by_hand)(s)
    np.testing.assert_allclose(value, value_, rtol=1e-5)
    np.testing.assert_allclose(grad, grad_, atol=1e-6)
    assert loss(t) == 0
