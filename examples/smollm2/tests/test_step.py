"""Tests the losses on the student's own text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import model
import step
import train


@pytest.fixture(scope="module")
def parts(teacher_path, tmp_path_factory):
    """A task, the student's state, the frozen arrays and batches."""
    teacher = model.load(teacher_path)
    options = ["--length=32", f"--output={tmp_path_factory.mktemp('out')}"]
    _, args = train.parse_arguments([*options, "--on-policy=1", "--policy-gradient"])
    student = model.student_of(teacher, (0, 3))
    optimizer = nnx.Optimizer(student, train.optimizer_of(args), wrt=nnx.Param)
    structure, state = nnx.split((student, optimizer))
    _, task = train.make_task(args, "on-policy", teacher, None, structure, None)
    frozen = {"embedding": teacher.embedding, "kernel": teacher.embedding.T}
    frozen["teacher"] = nnx.state(teacher.model)
    tokens = jax.random.randint(jax.random.key(1), (1, 40, 32), 0, 264)
    batches = {"tokens": tokens, "labels": jnp.roll(tokens, -1, axis=-1)}
    batches["hidden"] = jnp.zeros((1, 40, 32, teacher.config.width))
    return teacher, task, state, frozen, batches


def log_probs(model, frozen, tokens):
    hidden = model(frozen["embedding"][tokens])
    return jax.nn.log_softmax(hidden @ frozen["kernel"])


def test_the_kl_on_own_text(parts):
    teacher, task, state, frozen, batches = parts
    task = dataclasses.replace(task, end=7, prompt_length=4)
    key = jax.random.key(0)
    own = jax.jit(lambda *x: step.student_text(task, *x))(state, frozen, batches, key)
    student, _ = nnx.merge(task.structure, state)
    log_q, log_p = (
        jax.jit(lambda x, model=model: log_probs(model, frozen, x))(own["tokens"][0])
        for model in (student, teacher.model)
    )
    where = own["labels"][0] >= 0
    assert 0 < where.sum() < where[:, 3:].size
    kl = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
    found = jax.jit(lambda *x: step.evaluate(task, *x))(state, frozen, batches)
    np.testing.assert_allclose(found["own_kl"], kl.mean(where=where), rtol=1e-4)


def test_the_policy_gradient(parts):
    """It is that of the rewards, which are constants, times `log q` of the tokens."""
    teacher, task, state, frozen, batches = parts
    batch = {name: x[0, :4] for name, x in batches.items()}
    batch["labels"] = batch["labels"].at[:, :9].set(-100)
    student, _ = nnx.merge(task.structure, state)
    structure, params = nnx.split(student)
    counted = jnp.sum(batch["labels"] >= 0)

    def at_labels(model):
        every = log_probs(model, frozen, batch["tokens"])[:, 9:]
        return jnp.take_along_axis(every, batch["labels"][:, 9:, None], axis=-1)

    def expected(params):
        log_q = at_labels(nnx.merge(structure, params))
        return -jnp.sum(reward * log_q) / counted

    def found(params):
        model = nnx.merge(structure, params)
        return task.loss(task, model, frozen, batch, 0, counted)[0]

    reward = jax.jit(lambda: at_labels(teacher.model) - at_labels(student))()
    value, gradient = jax.jit(jax.value_and_grad(found))(params)
    np.testing.assert_allclose(value, -jnp.sum(reward) / counted, rtol=1e-5)
    pairs = zip(
        *map(jax.tree.leaves, (gradient, jax.jit(jax.grad(expected))(params))),
        strict=True,
    )
    for new, old in pairs:
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-4 * abs(old).max())
