"""A cell for a teacher of 64 columns a token, and the student's logits."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxkl

from .harness import against_peers, Cell, jax_work, measure, Peer, Result
from .losses import T
from .torch_peers import torch_peers


def with_jaxkl():
    def loss(student, indices, log_probs):
        teacher = jaxkl.SparseTeacher(indices, log_probs, tail="renormalize")
        return jaxkl.distillation_loss(student, teacher, temperature=T)

    return loss


def with_plain_jax():
    def loss(student, indices, log_probs):
        log_p = jax.nn.log_softmax(log_probs)
        log_q = jnp.take_along_axis(jax.nn.log_softmax(student / T), indices, -1)
        return T * T * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

    return loss


def with_torch():
    import torch

    def loss(student, indices, log_probs):
        log_p = torch.log_softmax(log_probs, -1)
        log_q = torch.log_softmax(student / T, -1).gather(-1, indices)
        return T * T * (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    return loss


def in_float64(student, indices, log_probs):
    x = student.astype(np.float64) / T
    log_q = x - np.log(np.exp(x).sum(-1, keepdims=True))
    p = np.exp(log_probs.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    of_list = np.take_along_axis(log_q, indices, -1)
    gradient = np.exp(log_q)
    rows = np.arange(len(student))[:, None]
    np.subtract.at(gradient, (rows, indices), p)
    value = T * T * np.sum(p * (np.log(p) - of_list))
    return value / len(student), T * gradient / len(student)


def run(settings):
    tokens, vocab, k = (16, 1000, 8) if settings.smoke else (512, 32000, 64)
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 2, (2, tokens, vocab)).astype(np.float32)
    indices = np.argsort(-teacher, axis=-1)[:, :k].astype(np.int64)
    log_probs = np.take_along_axis(teacher, indices, -1) / np.float32(T)
    arrays = [student, indices, log_probs]
    expected = in_float64(*arrays)
    on_device = jax.device_put([student, indices.astype(np.int32), log_probs])

    def peer(title, make_loss, **more):
        def prepare():
            return jax_work(jax.value_and_grad(make_loss()), *on_device)

        return Peer(title, prepare, expected, **more)

    peers = [
        peer("jaxkl", with_jaxkl, optional=False),
        peer("plain JAX", with_plain_jax, optional=False),
        *torch_peers(with_torch, arrays, 1, expected),
    ]
    rows = measure(peers, settings)
    return Result(rows, against_peers(rows, None, 0.8), ("plain JAX", "torch.compile"))


CELLS = [
    Cell(
        "top-k-64",
        "Top-k teacher, k = 64, T = 2, logits [512, 32000] float32: value and gradient",
        run,
    )
]
