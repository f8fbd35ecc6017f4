"""What tests of functions of the student alone share: an evaluation, and oracles."""

import jax
import numpy as np

from jaxkl import LinearHead

from . import oracle
from .cases import assert_source_gradient
from .helpers import assert_close
from .sources import exact_logits, make_head, rounded


def make_student(rng, source, shape, vocab, dtype="float32", *, pad=0):
    """Logits, or a head with a bias, a softcap and a scale."""
    if source == "logits":
        return rounded(rng, (*shape, vocab + pad), dtype)
    settings = dict(bias=True, softcap=4.0, scale=0.7)
    return make_head(rng, shape, 5, vocab + pad, dtype, **settings)


def pull_back(f, floats, cotangents, **others):
    """`f(**floats, **others)`, and the cotangents pulled back to the floats, in one
    program."""

    @jax.jit
    def run(floats, others, cotangents):
        value, vjp = jax.vjp(lambda floats: f(**floats, **others), floats)
        cotangents = jax.tree.map(lambda g, x: g.astype(x.dtype), cotangents, value)
        return value, vjp(cotangents)[0]

    return run(floats, others, cotangents)


def expected_cross_entropy(
    student, labels, *, where=None, vocab_size=None, **arguments
):
    """That of a distillation loss which is all cross-entropy."""
    logits, pull = exact_logits(student, vocab_size)
    counted = np.asarray(labels) != -100
    if where is not None:
        counted &= np.asarray(where)
    result = oracle.distillation_loss(
        logits, logits, labels=labels, alpha=0, where=counted, vocab_size=vocab_size,
        **arguments,
    )  # fmt: skip
    return result._replace(student=pull(result.student))


def expected_log_probs(student, tokens, *, cotangents, vocab_size=None, **arguments):
    """`tokens` are `[..., k]`."""
    logits, pull = exact_logits(student, vocab_size)
    result = oracle.token_log_probs(
        logits, tokens, cotangents=cotangents, vocab_size=vocab_size, **arguments
    )
    return result._replace(student=pull(result.student))


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
