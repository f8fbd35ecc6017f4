"""What the tests of `distillation_loss` share: divergences and an evaluation."""

import contextlib
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl import SparseTeacher
from jaxkl._engine import rule
from jaxkl._engine.sharding import sharded_weighted_loss

from . import oracle
from .helpers import assert_close, TOLERANCE
from .sources import expected_of, rounded as rounded


def squared_error(log_p, log_q):
    """A user's own divergence."""
    return (jnp.exp(log_p) - jnp.exp(log_q)) ** 2


# Each divergence of jaxkl beside its oracle.
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


def rarely(*values):
    """For `pytest.mark.parametrize`: values for `make test-slow` alone."""
    one = lambda x: x if isinstance(x, tuple) else (x,)
    return [pytest.param(*one(x), marks=pytest.mark.slow) for x in values]


def over(*names, slow=()):
    """Parametrises a test over divergences and oracles; the `slow` ones are marked."""
    case = lambda name, *marks: pytest.param(*ALL[name], id=name, marks=marks)
    cases = [case(name) for name in names]
    cases += [case(name, pytest.mark.slow) for name in slow]
    return pytest.mark.parametrize("divergence, reference", cases)


def over_sources(*names, slow=()):
    """Parametrises a test over "source divergence"; the divergence has its oracle."""

    def case(name, *marks):
        source, _, divergence = name.rpartition(" ")
        return pytest.param(source, ALL[divergence], id=name, marks=marks)

    cases = [case(name) for name in names]
    cases += [case(name, pytest.mark.slow) for name in slow]
    return pytest.mark.parametrize("source, divergence", cases)


def each(source, names):
    """For `over_sources`: divergences of one source."""
    return [f"{source} {name}" for name in names]


# A test of a formula takes the whole catalogue.
QUICK = ("forward", "js_normalized")
OTHERS = tuple(name for name in ALL if name not in QUICK)
over_all = over(*QUICK, slow=OTHERS)
over_catalogue = over(*CATALOGUE)
# A test of anything else takes one of each kind: two exponentials, infinite at p = 0, a
# mixture, and a user's own. All but the first are slow.
KINDS = ("reverse", "js_normalized", "user")
over_kinds = over("forward", slow=KINDS)

# Arguments that have a gradient, beside the models.
FLOATS = ("temperature", "teacher_temperature", "weights")


@cache
def compiled(loss, static):
    """One jitted function for each set of static arguments, which tests share."""

    @jax.jit
    def run(floats, others, cotangent):
        def f(floats):
            return loss(**floats, **others, **dict(static))

        value, vjp = jax.vjp(f, floats)
        g = jnp.broadcast_to(jnp.asarray(cotangent, value.dtype), value.shape)
        return value, vjp(g)[0]

    return run


@contextlib.contextmanager
def taking(monkeypatch):
    """Gives a function that makes the engine take a plan, until the end.

    A plan by which nothing is traced fails the test.
    """
    asked, traced = [], []

    def take(plan):
        asked.append(plan)
        forget_programs()
        monkeypatch.setattr(
            rule, "plan", lambda platform, work: traced.append(plan) or plan
        )

    yield take
    forget_programs()
    assert all(plan in traced for plan in asked)


def forget_programs():
    """Makes the engine trace again. `jax.clear_caches` also forgets all operations of
    JAX, each of which takes a compilation."""
    for run in rule._value, rule._forward, rule._backward:
        run.clear_cache()
    sharded_weighted_loss.clear_cache()
    compiled.cache_clear()


def evaluate(
    student, teacher, *, loss=jaxkl.distillation_loss, cotangent=1.0, **arguments
):
    """The jitted loss, and its gradients to the models and each float array given.

    The models may come from any source. A list is a constant: it has no gradient.
    """
    is_traced = lambda x: any(
        isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)
    )
    traced = {k: v for k, v in arguments.items() if is_traced(v)}
    static = {k: v for k, v in arguments.items() if k not in traced}
    floats = {k: v for k, v in traced.items() if k in FLOATS} | dict(student=student)
    others = {k: v for k, v in traced.items() if k not in FLOATS}
    if isinstance(teacher, SparseTeacher):
        others["teacher"] = teacher
    else:
        floats["teacher"] = teacher
        static.setdefault("differentiate_teacher", True)
    return compiled(loss, frozenset(static.items()))(floats, others, cotangent)


def assert_matches(
    student,
    teacher,
    divergence,
    *,
    value_tol=None,
    tol=None,
    expect=None,
    cotangent=1.0,
    **arguments,
):
    """Value and every gradient against the oracle, which is fed the rounded inputs.

    `tol` is that of the gradients. `expect` holds arguments of the oracle that differ
    from those of the loss.
    """
    mine, theirs = divergence
    value, grads = evaluate(
        student, teacher, divergence=mine, cotangent=cotangent, **arguments
    )
    for name in ("loss", "tile", "plan", "differentiate_teacher"):
        arguments.pop(name, None)
    arguments |= expect or {}
    expected = expected_of(
        student, teacher, divergence=theirs, cotangent=cotangent, **arguments
    )
    models = dict(student=student, teacher=teacher)
    floats = [arguments.get(name) for name in FLOATS]
    x64 = any(
        getattr(x, "dtype", None) == jnp.float64
        for x in (*jax.tree.leaves(models), *floats)
    )
    # The products that make a head's logits have roundings of their own. The loss is
    # float32 whatever the logits are, so its tolerance is float32's.
    dense = all(isinstance(x, jax.Array) for x in models.values())
    if value_tol is None:
        value_tol = 1e-12 if x64 else TOLERANCE["float32"][0] if dense else 5e-6
    assert value.dtype == (jnp.float64 if x64 else jnp.float32)
    assert_close(value, expected.loss, value_tol, "value")
    for name, grad in grads.items():
        if name in models:
            source, want = models[name], getattr(expected, name)
            assert_source_gradient(source, grad, want, name, tol, x64, tiny=dense)
        else:
            assert grad.dtype == arguments[name].dtype, name
            of = tol or _gradient_tolerance(grad.dtype, x64)
            assert_gradient(name, grad, expected, of, cotangent)
    return value, grads


def _gradient_tolerance(dtype, x64=False):
    if dtype == jnp.float64:
        return 1e-11
    # What is computed in float64 is rounded once.
    return 1e-6 if x64 and dtype == jnp.float32 else TOLERANCE[str(dtype)][1]


def assert_source_gradient(
    source, grad, expected, name, tol=None, x64=False, tiny=False
):
    """Compares logits, or each array of a head; `tiny` allows a dtype's last steps."""
    leaves = zip(
        jax.tree.leaves_with_path(source),
        jax.tree.leaves(grad),
        jax.tree.leaves(expected),
        strict=True,
    )
    for (path, x), actual, want in leaves:
        where = name + jax.tree_util.keystr(path)
        assert actual.shape == x.shape and actual.dtype == x.dtype, where
        of = tol or _gradient_tolerance(x.dtype, x64)
        assert_close(actual, want, of, where, _last_steps(x.dtype) if tiny else 0.0)


def _last_steps(dtype):
    """The size of float16's steps near 0, and of the oracle's rounding of a true 0."""
    return float(jnp.finfo(dtype).smallest_subnormal) + oracle.ROUNDING


def assert_gradient(name, grad, expected, tol, cotangent=1.0, rounding=0.0):
    """Compares to `tol` of the largest entry, or of the loss if that is larger.

    That is for temperature and weights alone. `T² D` hardly depends on T, and a mean
    hardly depends on a weight: the slope is the difference of two terms as large as the
    loss, and has their rounding.
    """
    want = np.asarray(getattr(expected, name), np.float64)
    scale = np.max(np.abs(want), where=np.isfinite(want), initial=0.0)
    if name in ("temperature", "weights"):
        loss = np.abs(np.asarray(cotangent * expected.loss, np.float64))
        scale = max(scale, np.max(loss, where=np.isfinite(loss), initial=0.0))
    atol = tol * scale + _last_steps(grad.dtype) + rounding
    np.testing.assert_allclose(
        np.asarray(grad, np.float64), want, rtol=0, atol=atol, err_msg=name
    )
