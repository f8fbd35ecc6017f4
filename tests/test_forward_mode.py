"""Forward mode: that of `jaxkl.reference`, and the errors of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
import jaxkl.reference

from . import oracle
from .cases import over_kinds, rounded
from .helpers import assert_close


NAMES = ("student", "teacher", "temperature", "weights")


@over_kinds
def test_of_the_reference(rng, divergence, reference):
    with jax.enable_x64(True):
        s, t = rounded(rng, (2, 3, 7), "float64")
        primals = (s, t, jnp.asarray([1.5, 1, 2]), jnp.asarray([1.0, 0, 3]))
        tangents = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in primals)

        def f(*primals):
            options = dict(divergence=divergence, differentiate_teacher=True)
            options |= dict(zip(NAMES, primals, strict=True))
            return jaxkl.reference.distillation_loss(**options)

        @jax.jit
        def both(primals, tangents):
            value, linear = jax.linearize(f, *primals)
            return jax.jvp(f, primals, tangents), (value, linear(*tangents))

        arguments = dict(zip(NAMES, primals, strict=True))
        expected = oracle.distillation_loss(**arguments, divergence=reference)
        along = zip(NAMES, tangents, strict=True)
        want = sum(np.sum(getattr(expected, name) * np.asarray(x)) for name, x in along)
        for value, tangent in both(primals, tangents):
            assert_close(value, expected.loss, 1e-12)
            assert_close(tangent, want, 1e-11)


def test_a_constant_teacher_has_no_tangent(rng):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    f = lambda t: jaxkl.reference.distillation_loss(s, t)
    with pytest.warns(UserWarning, match="`teacher` is differentiated"):
        _, tangent = jax.jvp(f, (t,), (t,))
    assert tangent == 0


def test_is_refused(rng):
    # `custom_vjp` has no forward mode; `jaxkl.reference` has.
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    f = lambda s: jaxkl.distillation_loss(s, t)
    for forward in (lambda: jax.jvp(f, (s,), (s,)), lambda: jax.jacfwd(f)(s)):
        with pytest.raises(TypeError, match="forward-mode .* `jaxkl.reference`"):
            forward()
    with pytest.raises(TypeError, match="forward-mode"):  # JAX's, later
        jax.jvp(jax.jit(f), (s,), (s,))
