"""`LinearHead`: hidden states and a kernel in place of logits."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl import distillation_loss, LinearHead

from .cases import assert_matches, FORWARD, rarely, REVERSE, rounded
from .helpers import assert_close
from .registry import LOSSES
from .sources import expected_of, make_head
from .test_masks import of_columns
from .test_second_order import assert_is_that_of_plain_jax


def test_one_head_as_both_models(rng):
    head = make_head(rng, (5,), 4, 11, bias=True)
    f = lambda head: distillation_loss(head, head, divergence=jaxkl.ReverseKL())
    value, grad = jax.jit(jax.value_and_grad(f))(head)
    assert value == 0 and not any(x.any() for x in jax.tree.leaves(grad))


def test_only_cross_entropy(rng):
    student = make_head(rng, (6,), 5, 11, softcap=3.0)
    teacher = make_head(rng, (6,), 5, 11)
    more = dict(labels=jnp.array([0, 10, -100, 3, -100, 1]), alpha=0.0, normalizer=7)
    _, grads = assert_matches(student, teacher, FORWARD, **more)
    assert not grads["teacher"].hidden.any() and not grads["teacher"].kernel.any()


@pytest.mark.parametrize("plan", rarely(dict(tile=2), dict(plan="lean")), ids=str)
def test_second_derivatives_where_padding_columns_hold_nan(rng, plan):
    loss = LOSSES["head"]
    spoil = lambda x: of_columns(x, slice(7, None), jnp.nan)
    batch = loss.make(rng, (5,), 7, pad=2).map(spoil, "student", "teacher")
    more = dict(tol=5e-5, vocab_size=7) | plan
    assert_is_that_of_plain_jax(rng, loss, batch, **more)


@pytest.mark.slow
def test_a_kernel_without_padding_is_not_cut(rng):
    head = make_head(rng, (4,), 3, 5)
    f = lambda head, t: distillation_loss(head, t, tile=2)
    program = jax.jit(jax.grad(f)).lower(head, rounded(rng, (4, 5))).as_text()
    assert "tensor<3x5xf32>" in program
    assert not re.search(r"stablehlo.slice.*\(tensor<3x5xf32>", program)


@pytest.mark.parametrize("scale", [0.0, -0.5, *rarely(2)])
def test_any_finite_scale(rng, scale):
    student = make_head(rng, (5,), 4, 11, bias=True, scale=scale)
    assert_matches(student, rounded(rng, (5, 11)), REVERSE)


# Heads as pytrees.


def test_is_a_pytree_of_its_arrays(rng):
    head = make_head(rng, (3,), 4, 11, bias=True, softcap=30.0, scale=0.5)
    paths = jax.tree.leaves_with_path(head)
    shapes = {jax.tree_util.keystr(path): x.shape for path, x in paths}
    assert shapes == {".hidden": (3, 4), ".kernel": (4, 11), ".bias": (11,)}
    twice = jax.tree.map(lambda x: 2 * x, head)
    assert (twice.softcap, twice.scale) == (30.0, 0.5)
    assert_close(twice.kernel, 2 * head.kernel, 0)
    assert len(jax.tree.leaves(LinearHead(head.hidden, head.kernel))) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        head.scale = 1.0
    # The settings are part of the program.
    settings = dict(softcap=2.0), dict(softcap=3.0), dict(scale=2.0), {}
    others = {jax.tree.structure(dataclasses.replace(head, **x)) for x in settings}
    assert len(others) == 4


def test_tied_embedding(rng):
    embedding, tokens = rounded(rng, (11, 4)), jnp.array([1, 5, 5, 0, 10])
    teacher = rounded(rng, (5, 11))
    f = lambda e: distillation_loss(LinearHead(e[tokens], e.T), teacher, tile=2)
    made = expected_of(LinearHead(embedding[tokens], embedding.T), teacher).student
    expected = np.float64(made.kernel.T)
    np.add.at(expected, np.asarray(tokens), np.float64(made.hidden))
    assert_close(jax.jit(jax.grad(f))(embedding), expected, 1e-5)


# Errors, which name the argument.

X = np.ones((5, 4), np.float32)
KERNEL = np.ones((4, 11), np.float32)


@pytest.mark.parametrize(
    "arrays, error, match",
    [
        ((X, KERNEL.T), ValueError, "student.kernel`"),
        ((X, KERNEL[0]), ValueError, "student.kernel`"),
        ((np.float32(1), KERNEL), ValueError, "student.hidden`"),
        ((X, KERNEL[:, :0]), ValueError, "`student`.* 0"),
        ((X, KERNEL, KERNEL), ValueError, r"`student.bias`.*\(11,\).*\(4, 11\)"),
        ((X, KERNEL, KERNEL[0, :5]), ValueError, r"`student.bias`"),
        ((X.astype(int), KERNEL), TypeError, "student.hidden`"),
        ((X, KERNEL.astype(int)), TypeError, "student.kernel`"),
        ((X, KERNEL, np.ones(11, int)), TypeError, "`student.bias`"),
        ((X, None), TypeError, "`student.kernel`"),
        (("hidden", KERNEL), TypeError, "`student.hidden`"),
        ((X, KERNEL[:, :7]), ValueError, "`vocab_size`"),
        ((X[:3], KERNEL), ValueError, "batch shape"),
    ],
)
def test_errors_of_a_student(arrays, error, match):
    with pytest.raises(error, match=match):
        distillation_loss(LinearHead(*arrays), jnp.zeros((5, 11)))


def test_errors_of_a_teacher():
    with pytest.raises(ValueError, match="`teacher.kernel`"):
        distillation_loss(jnp.zeros((5, 11)), LinearHead(X, KERNEL.T))
    with pytest.raises(ValueError, match="`vocab_size`"):
        distillation_loss(jnp.zeros((5, 11)), LinearHead(X, KERNEL), vocab_size=12)


@pytest.mark.parametrize(
    "name, value, error",
    [("softcap", x, ValueError) for x in (0, 0.0, -30.0, np.inf, np.nan)]
    + [("scale", x, ValueError) for x in (np.inf, np.nan)]
    + [
        (name, x, TypeError)
        for name in ("softcap", "scale")
        for x in (np.ones(1), jnp.float32(2), True, "30")
    ],
)
def test_settings_are_finite_python_numbers(name, value, error):
    with pytest.raises(error, match=f"`{name}`"):
        LinearHead(X, KERNEL, **{name: value})


def test_settings_are_keywords():
    with pytest.raises(TypeError):
        LinearHead(X, KERNEL, None, 30.0)
