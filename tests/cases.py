"""What the tests of `distillation_loss` share: divergences, data, an evaluation."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl

from . import oracle
from .helpers import assert_close, TOLERANCE


def squared_error(log_p, log_q):
    """A user's own divergence."""
    return (jnp.exp(log_p) - jnp.exp(log_q)) ** 2


# Each of jaxkl's own beside its oracle, and a user's.
CATALOGUE = {
    "forward": (jaxkl.ForwardKL(), oracle.forward_kl),
    "reverse": (jaxkl.ReverseKL(), oracle.reverse_kl),
    "symmetric": (jaxkl.SymmetricKL(0.3), oracle.symmetric_kl(0.3)),
    "js": (jaxkl.JensenShannon(0.5), oracle.jensen_shannon(0.5)),
    "js_normalized": (
        jaxkl.JensenShannon(0.1, normalized=True),
        oracle.jensen_shannon(0.1, normalized=True),
    ),
    "skew_forward": (jaxkl.SkewForwardKL(0.1), oracle.skew_forward_kl(0.1)),
    "skew_reverse": (jaxkl.SkewReverseKL(0.2), oracle.skew_reverse_kl(0.2)),
    "total_variation": (jaxkl.TotalVariation(), oracle.total_variation),
    "alpha_half": (jaxkl.AlphaDivergence(0.5), oracle.alpha_divergence(0.5)),
    "alpha_two": (jaxkl.AlphaDivergence(2.0), oracle.alpha_divergence(2.0)),
    "alpha_minus_one": (jaxkl.AlphaDivergence(-1.0), oracle.alpha_divergence(-1.0)),
}
USER = (squared_error, oracle.squared_error)
ALL = CATALOGUE | {"user": USER}
FORWARD, REVERSE, JENSEN_SHANNON = (CATALOGUE[x] for x in ("forward", "reverse", "js"))


_QUICK = ("forward", "js_normalized")


def rarely(*values):
    """For `pytest.mark.parametrize`: values of which only CI runs all."""
    one = lambda x: x if isinstance(x, tuple) else (x,)
    return [pytest.param(*one(x), marks=pytest.mark.slow) for x in values]


def over(*names, slow=()):
    """Parametrises a test over divergences and their oracles; `slow`: in CI only."""
    case = lambda name, *marks: pytest.param(*ALL[name], id=name, marks=marks)
    cases = [case(name) for name in names]
    cases += [case(name, pytest.mark.slow) for name in slow]
    return pytest.mark.parametrize("divergence, reference", cases)


# All of the catalogue where the formula of the divergence is what is tested.
over_all = over("forward", "js_normalized", slow=[x for x in ALL if x not in _QUICK])
over_catalogue = over(*CATALOGUE)
# Where it is something else: one of each kind (two exponentials, p = 0 infinite, a
# mixture, a user's own), all but one in CI.
over_kinds = over("forward", slow=("reverse", "js_normalized", "user"))

# Arguments that have a gradient.
FLOATS = ("student", "teacher", "temperature", "teacher_temperature", "weights")


def rounded(rng, shape, dtype="float32", scale=1.0):
    """Logits of order one: a saturated softmax hides missing mass and wrong padding."""
    return jnp.asarray(scale * rng.normal(size=shape), dtype)


@cache
def _compiled(loss, static):
    """One jitted function for each set of static arguments, which tests share."""

    @jax.jit
    def run(floats, others, cotangent):
        def f(floats):
            return loss(**floats, **others, **dict(static))

        value, vjp = jax.vjp(f, floats)
        g = jnp.broadcast_to(jnp.asarray(cotangent, value.dtype), value.shape)
        return value, vjp(g)[0]

    return run


def evaluate(
    student, teacher, *, loss=jaxkl.distillation_loss, cotangent=1.0, **arguments
):
    """The jitted loss, and its gradients to the logits and each float array given."""
    arguments |= dict(student=student, teacher=teacher)
    arguments.setdefault("differentiate_teacher", True)
    traced = {k: v for k, v in arguments.items() if isinstance(v, jax.Array)}
    static = frozenset((k, v) for k, v in arguments.items() if k not in traced)
    floats = {k: v for k, v in traced.items() if k in FLOATS}
    others = {k: v for k, v in traced.items() if k not in FLOATS}
    return _compiled(loss, static)(floats, others, cotangent)


def assert_matches(
    student, teacher, divergence, *, tol=None, expect=None, cotangent=1.0, **arguments
):
    """Value and every gradient against the oracle, which is fed the rounded inputs.

    `expect` holds arguments of the oracle that differ from those of the loss.
    """
    mine, theirs = divergence
    value, grads = evaluate(
        student, teacher, divergence=mine, cotangent=cotangent, **arguments
    )
    for name in ("loss", "tile", "differentiate_teacher"):
        arguments.pop(name, None)
    arguments |= expect or {}
    arguments |= dict(student=student, teacher=teacher)
    expected = oracle.distillation_loss(
        divergence=theirs, cotangent=cotangent, **arguments
    )
    floats = [arguments.get(name) for name in FLOATS]
    x64 = any(getattr(x, "dtype", None) == jnp.float64 for x in floats)
    # The loss is float32 whatever the logits are, so its tolerance is float32's.
    value_tol, _ = tol or ((1e-12, None) if x64 else TOLERANCE["float32"])
    assert value.dtype == (jnp.float64 if x64 else jnp.float32)
    assert_close(value, expected.loss, value_tol, "value")
    for name, grad in grads.items():
        dtype = arguments[name].dtype
        assert grad.dtype == dtype, name
        if tol:
            grad_tol = tol[1]
        elif dtype == jnp.float64:
            grad_tol = 1e-11
        else:
            grad_tol = TOLERANCE[str(dtype)][1]
        assert_gradient(name, grad, expected, grad_tol, cotangent)
    return value, grads


def assert_gradient(name, grad, expected, tol, cotangent=1.0, rounding=0.0):
    """To `tol` of the largest entry; for temperature and weights, also of the loss.

    `T² D` hardly depends on T, nor a mean on a weight: the slope is a difference of two
    terms of the size of the loss itself, and no better known than these.
    """
    want = np.asarray(getattr(expected, name), np.float64)
    scale = np.max(np.abs(want), where=np.isfinite(want), initial=0.0)
    if name in ("temperature", "weights"):
        loss = np.abs(np.asarray(cotangent * expected.loss, np.float64))
        scale = max(scale, np.max(loss, where=np.isfinite(loss), initial=0.0))
    # Below these are float16's steps near 0, and the oracle's rounding of a true 0.
    floor = float(jnp.finfo(grad.dtype).smallest_subnormal) + oracle.ROUNDING
    atol = tol * scale + floor + rounding
    np.testing.assert_allclose(
        np.asarray(grad, np.float64), want, rtol=0, atol=atol, err_msg=name
    )
