"""Mistakes seen in other libraries' fused heads: each test shows their formula fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkl import distillation_loss, LinearHead

from .cases import assert_matches, assert_source_gradient, evaluate, FORWARD
from .helpers import assert_close
from .sources import exact_logits, expected_of, make_head


pytestmark = pytest.mark.slow


def _kl(log_p, log_q):
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1).mean()


def test_a_vocabulary_padded_to_whole_blocks(rng):
    # tokamax `chunked_xla` splits V = 700 into blocks of 512, and fills up with zeros.
    head = make_head(rng, (6,), 5, 700)
    logits, _ = exact_logits(head)
    lse = np.log(np.exp(logits).sum(-1))
    blocks = jnp.pad(head.kernel, ((0, 0), (0, 324))).reshape(5, 2, 512)
    theirs = jax.nn.logsumexp(jnp.einsum("th,hbv->tbv", head.hidden, blocks), (1, 2))
    assert (np.asarray(theirs) > lse + 0.05).all()
    # Student = teacher leaves z_loss · lse² alone.
    ours = distillation_loss(head, head, z_loss=1.0, reduction="none", tile=4)
    assert_close(ours, lse**2, 5e-6)


def test_a_student_padded_with_zeros_to_the_teachers_width(rng):
    # In Liger's chunked distillation, identical models have a KL of 3.64.
    student = make_head(rng, (6,), 5, 100)
    widen = lambda head, value: dataclasses.replace(
        head,
        kernel=jnp.pad(head.kernel, ((0, 0), (0, 600))),
        bias=jnp.zeros(700).at[100:].set(value),
    )
    teacher = widen(student, -1e4)  # the same model, with padding
    logits = lambda head: head.hidden @ head.kernel
    log_q = jax.nn.log_softmax(jnp.pad(logits(student), ((0, 0), (0, 600))))
    log_p = jax.nn.log_softmax(logits(teacher) + teacher.bias[None, :])
    assert _kl(log_p, log_q) > 0.5
    value, grads = evaluate(student, teacher, vocab_size=100, tile=4)
    assert abs(value) < 1e-12
    assert all(abs(x).max() < 1e-6 for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("junk", [np.inf, np.nan])
def test_zero_times_the_head_as_an_accumulator(rng, junk):
    # With `W * 0`, one inf anywhere in the head makes all of `d kernel` NaN.
    student = make_head(rng, (6,), 5, 12)
    teacher = make_head(rng, (6,), 5, 11)
    spoilt = dataclasses.replace(student, kernel=student.kernel.at[2, 11].set(junk))
    assert np.isnan(spoilt.kernel * 0).any()
    for tile in (2, 6):
        _, grads = evaluate(spoilt, teacher, vocab_size=11, tile=tile)
        expected = expected_of(student, teacher, vocab_size=11)
        assert_source_gradient(student, grads["student"], expected.student, "student")
        assert_source_gradient(teacher, grads["teacher"], expected.teacher, "teacher")


def test_a_chunk_that_is_nearly_twice_as_large(rng):
    # Liger's `chunk(max(1, tokens // 1024))` makes one chunk of 2047 rows.
    tokens, size = 2047, 1024
    theirs = np.array_split(np.arange(tokens), max(1, tokens // size))
    assert max(map(len, theirs)) == 2047
    head = make_head(rng, (tokens,), 3, 7)

    is_jaxpr = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")

    def rows(jaxpr):
        """The numbers of rows of all logits in the program, whose vocabulary is 7."""
        for eqn in jaxpr.eqns:
            for x in eqn.outvars:
                if len(x.aval.shape) == 2 and x.aval.shape[1] == 7:
                    yield x.aval.shape[0]
            for inner in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr):
                if is_jaxpr(inner):
                    yield from rows(getattr(inner, "jaxpr", inner))

    f = jax.value_and_grad(lambda s: distillation_loss(s, head, tile=size))
    sizes = set(rows(jax.make_jaxpr(f)(head).jaxpr))
    assert max(sizes) == size


def test_a_wider_teacher_is_not_cut_in_silence(rng):
    # TRL's tiled loss warns, and drops the mass of the teacher's last columns.
    student = make_head(rng, (6,), 5, 11)
    teacher = make_head(rng, (6,), 4, 14)
    cut = LinearHead(teacher.hidden, teacher.kernel[:, :11])
    with pytest.raises(ValueError, match="`vocab_size`"):
        distillation_loss(student, teacher)
    lost = np.exp(exact_logits(teacher)[0])[:, 11:].sum()
    assert lost > 1
    # With `vocab_size` these columns are padding, in value and gradient.
    _, grads = assert_matches(student, teacher, FORWARD, vocab_size=11, tile=4)
    assert not grads["teacher"].kernel[:, 11:].any()
    assert_close(
        distillation_loss(student, teacher, vocab_size=11),
        distillation_loss(student, cut),
        1e-6,
    )
