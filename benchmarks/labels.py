"""Losses of a head and the labels of its tokens, without a teacher.

Each function makes a named loss of hidden states, a kernel, labels and one number a
token: the mean cross-entropy, or the mean of these numbers times the log-probabilities
of the labels.
"""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np

import jaxkl

from . import heads
from .harness import (
    Cell,
    jax_work,
    measure,
    Peer,
    ratio,
    Result,
    Target,
    time_ratio,
    Work,
)
from .torch_peers import torch_peers


LOSSES = ("cross-entropy", "log-probs")


def with_jaxkl(name):
    def cross_entropy(h, k, labels, factors):
        del factors
        return jaxkl.cross_entropy(jaxkl.LinearHead(h, k), labels)

    def log_probs(h, k, labels, factors):
        head = jaxkl.LinearHead(h, k)
        return jnp.mean(factors * jaxkl.token_log_probs(head, labels))

    return {"cross-entropy": cross_entropy, "log-probs": log_probs}[name]


def _from_log_probs(name, log_probs):
    def loss(h, k, labels, factors):
        logits = jnp.dot(h, k, preferred_element_type=jnp.float32)
        factors = -1 if name == "cross-entropy" else factors
        return jnp.mean(factors * log_probs(logits, labels))

    return loss


def with_plain_jax(name):
    """Makes the usual loss: `log_softmax`, and the columns of the labels."""

    def log_probs(logits, labels):
        listed = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)
        return listed[:, 0]

    return _from_log_probs(name, log_probs)


def with_optax(name):
    from optax.losses import softmax_cross_entropy_with_integer_labels

    return _from_log_probs(
        name, lambda *x: -softmax_cross_entropy_with_integer_labels(*x)
    )


def with_tokamax(name):
    """Makes its loss in chunks of XLA: the kernels do not compile without a TPU."""
    if name != "cross-entropy":
        raise ImportError("tokamax has no log-probabilities of tokens")
    from tokamax import linear_softmax_cross_entropy_loss

    def loss(h, k, labels, factors):
        del factors
        return linear_softmax_cross_entropy_loss(
            h, labels, k, reduction="mean", implementation="xla"
        )

    return loss


def with_torch(name):
    import torch
    import torch.nn.functional as F

    def loss(h, k, labels, factors):
        labels = labels.to(torch.int64)
        if name == "cross-entropy":
            return F.cross_entropy(h @ k, labels)
        return torch.mean(-factors * F.cross_entropy(h @ k, labels, reduction="none"))

    return loss


MAKERS = {
    "jaxkl": with_jaxkl,
    "plain JAX": with_plain_jax,
    "optax": with_optax,
    "tokamax": with_tokamax,
}


@ft.cache
def arrays(tokens, hidden, vocab):
    rng = np.random.default_rng(1)
    labels = rng.integers(vocab, size=tokens).astype(np.int32)
    factors = rng.normal(size=tokens).astype(np.float32)
    return [*heads.arrays(tokens, hidden, vocab)[:2], labels, factors]


@ft.cache
def expected(name, shape):
    """Computes value and gradients by hidden states and kernel, in float64."""
    h, k, labels, factors = arrays(*shape)
    h, k = h.astype(np.float64), k.astype(np.float64)
    weights = (-1 if name == "cross-entropy" else factors) * np.ones(len(h)) / len(h)
    value, d_hidden, d_kernel = 0.0, np.empty(h.shape), np.zeros(k.shape)
    for start in range(0, len(h), 128):
        part = slice(start, start + 128)
        logits = h[part] @ k
        logits -= logits.max(-1, keepdims=True)
        log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        at = np.arange(len(log_q)), labels[part]
        value += weights[part] @ log_q[at]
        d_logits = -np.exp(log_q)
        d_logits[at] += 1
        d_logits *= weights[part, None]
        d_hidden[part] = d_logits @ k.T
        d_kernel += h[part].T @ d_logits
    return value, d_hidden, d_kernel


def products(name, shape):
    """Makes the matrix products alone: log-probabilities make their logits twice."""
    h, k = jax.device_put(heads.arrays(*shape)[:2])
    g = jax.device_put(np.ones((shape[0], shape[2]), np.float32))
    steps = [(jnp.matmul, h, k)] * (1 if name == "cross-entropy" else 2)
    steps += [(lambda g, k: g @ k.T, g, k), (lambda h, g: h.T @ g, h, g)]
    works = [jax_work(*step) for step in steps]

    def run():
        for work in works:
            work.run()

    return Work(run)


def run(name, settings):
    shape = heads.sizes(settings)
    base = "3 GEMMs" if name == "cross-entropy" else "4 GEMMs"

    def jax_peer(title):
        def prepare():
            loss = MAKERS[title](name)
            inputs = jax.device_put(arrays(*shape))
            return jax_work(jax.value_and_grad(loss, (0, 1)), *inputs)

        optional = title in ("optax", "tokamax")
        return Peer(title, prepare, expected(name, shape), optional=optional)

    peers = [
        *map(jax_peer, MAKERS),
        Peer(base, lambda: products(name, shape), optional=False),
        *torch_peers(
            lambda: with_torch(name), arrays(*shape), 2, expected(name, shape)
        ),
    ]
    rows = measure(peers, settings)
    temp = ratio(rows, "temp_bytes", "jaxkl", "plain JAX")
    targets = [
        Target(f"time ÷ {base}", time_ratio(rows, "jaxkl", base), 1.25),
        Target("time ÷ plain JAX", time_ratio(rows, "jaxkl", "plain JAX"), 1.0),
        Target("temp ÷ plain JAX", temp, 1 / 8, "{:.3f}"),
    ]
    return Result(rows, targets, (base, "plain JAX"))


CELLS = [
    Cell(
        f"labels-{name}",
        f"SmolLM2's head, H 576, V 49152, float32, 2048 tokens, {name} of labels: "
        "value and gradient to hidden and kernel",
        ft.partial(run, name),
    )
    for name in LOSSES
]
