"""What tests of functions of the student alone share: an evaluation, and oracles."""

import jax

from jaxkl import LinearHead

from .cases import assert_source_gradient
from .helpers import assert_close
from .sources import (
    expected_cross_entropy as expected_cross_entropy,
    expected_log_probs as expected_log_probs,
)


def pull_back(f, floats, cotangents, **others):
    """`f(**floats, **others)`, and the cotangents pulled back to the floats, in one
    program."""

    @jax.jit
    def run(floats, others, cotangents):
        value, vjp = jax.vjp(lambda floats: f(**floats, **others), floats)
        cotangents = jax.tree.map(lambda g, x: g.astype(x.dtype), cotangents, value)
        return value, vjp(cotangents)[0]

    return run(floats, others, cotangents)


def assert_gradients(floats, gradients, expected, tol=None, x64=False):
    for name, x in floats.items():
        want = getattr(expected, name)
        if name == "student":
            dense = not isinstance(x, LinearHead)
            grad = gradients[name]
            assert_source_gradient(x, grad, want, name, tol, x64, tiny=dense)
        else:
            assert gradients[name].dtype == x.dtype
            assert_close(gradients[name], want, tol or (1e-11 if x64 else 1e-5), name)
