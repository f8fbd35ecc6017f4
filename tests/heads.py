"""What the tests of heads share: an oracle by the chain rule, and an evaluation."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

import jaxkl
from jaxkl import LinearHead

from . import oracle
from .cases import assert_gradient
from .helpers import assert_close, TOLERANCE


def make_head(rng, shape, hidden, vocab, dtype="float32", *, bias=False, **settings):
    """A head whose logits are of order one."""
    kernel = rng.normal(size=(hidden, vocab)) / np.sqrt(hidden)
    return LinearHead(
        jnp.asarray(rng.normal(size=(*shape, hidden)), dtype),
        jnp.asarray(kernel, dtype),
        jnp.asarray(rng.normal(size=vocab), dtype) if bias else None,
        **settings,
    )


def exact_logits(source, vocab_size=None):
    """Logits in float64, and the function that pulls a gradient back to the source.

    Padding columns are sliced away first: they may hold anything.
    """
    if not isinstance(source, LinearHead):
        return np.asarray(source, np.float64), lambda d: d
    hidden, kernel = (np.asarray(x, np.float64) for x in (source.hidden, source.kernel))
    width, kernel = kernel.shape[1], kernel[:, :vocab_size]
    x = source.scale * (hidden @ kernel)
    if source.bias is not None:
        x = x + np.asarray(source.bias, np.float64)[:vocab_size]
    cap = source.softcap
    logits = x if cap is None else cap * np.tanh(x / cap)

    def pull(d_logits):
        d_logits = np.asarray(d_logits, np.float64)
        d_x = d_logits if cap is None else d_logits / np.cosh(x / cap) ** 2
        rows = d_x.reshape(-1, d_x.shape[-1])
        wide = lambda d: np.pad(
            d, ((0, 0),) * (d.ndim - 1) + ((0, width - d.shape[-1]),)
        )
        flat = hidden.reshape(-1, hidden.shape[-1])
        return LinearHead(
            source.scale * (d_x @ kernel.T),
            source.scale * wide(flat.T @ rows),
            None if source.bias is None else wide(rows.sum(0)),
        )

    return logits, pull


def expected_of(student, teacher, *, vocab_size=None, **arguments):
    """The oracle's result, with the gradients of the sources in place of logits'."""
    s, pull_s = exact_logits(student, vocab_size)
    t, pull_t = exact_logits(teacher, vocab_size)
    result = oracle.distillation_loss(s, t, vocab_size=vocab_size, **arguments)
    return result._replace(
        student=pull_s(result.student), teacher=pull_t(result.teacher)
    )


@cache
def _compiled(loss, static):
    @jax.jit
    def run(sources, floats, others, cotangent):
        def f(sources, floats):
            return loss(*sources, **floats, **others, **dict(static))

        value, vjp = jax.vjp(f, sources, floats)
        g = jnp.broadcast_to(jnp.asarray(cotangent, value.dtype), value.shape)
        return value, *vjp(g)

    return run


FLOATS = ("temperature", "teacher_temperature", "weights")


def evaluate(
    student, teacher, *, loss=jaxkl.distillation_loss, cotangent=1.0, **arguments
):
    """The jitted loss, gradients to both sources, and those to float arrays."""
    arguments.setdefault("differentiate_teacher", True)
    traced = {k: v for k, v in arguments.items() if isinstance(v, jax.Array)}
    static = frozenset((k, v) for k, v in arguments.items() if k not in traced)
    floats = {k: v for k, v in traced.items() if k in FLOATS}
    others = {k: v for k, v in traced.items() if k not in FLOATS}
    value, (d_s, d_t), d_floats = _compiled(loss, static)(
        (student, teacher), floats, others, cotangent
    )
    return value, dict(student=d_s, teacher=d_t, **d_floats)


def assert_source_gradient(source, grad, expected, name, tol=None):
    leaves = zip(
        jax.tree.leaves_with_path(source),
        jax.tree.leaves(grad),
        jax.tree.leaves(expected),
        strict=True,
    )
    for (path, x), actual, want in leaves:
        where = name + jax.tree_util.keystr(path)
        assert actual.shape == x.shape and actual.dtype == x.dtype, where
        assert_close(actual, want, tol or TOLERANCE[str(x.dtype)][1], where)


def assert_matches(
    student,
    teacher,
    divergence,
    *,
    cotangent=1.0,
    value_tol=5e-6,
    tol=None,
    **arguments,
):
    """Value and every gradient, against the oracle."""
    mine, theirs = divergence
    value, grads = evaluate(
        student, teacher, divergence=mine, cotangent=cotangent, **arguments
    )
    for name in ("tile", "differentiate_teacher", "loss"):
        arguments.pop(name, None)
    expected = expected_of(
        student,
        teacher,
        divergence=theirs,
        cotangent=cotangent,
        **arguments,
    )
    assert value.dtype == jnp.float32
    assert_close(value, expected.loss, value_tol, "value")
    for name, source in (("student", student), ("teacher", teacher)):
        assert_source_gradient(source, grads[name], getattr(expected, name), name, tol)
    for name in FLOATS:
        if name in grads:
            assert_gradient(name, grads[name], expected, tol or 1e-5, cotangent)
    return value, grads
