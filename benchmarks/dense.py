"""Cells for given logits: value, and gradient by the student's."""

from functools import partial

import jax
import numpy as np

from . import losses
from .harness import (
    against_peers,
    BYTES,
    bytes_alone,
    Cell,
    jax_work,
    measure,
    Peer,
    Result,
)
from .torch_peers import torch_peers


BOUNDS = {  # time against torch.compile, and against the best of the others
    "forward-kl": (1.0, 0.6),
    "reverse-kl": (0.8, 0.6),
    "jensen-shannon": (0.8, 0.8),
}


def run(name, settings):
    tokens, vocab = (16, 1000) if settings.smoke else (512, 32000)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(0, 2, (tokens, vocab)).astype(np.float32) for _ in range(2)]
    value, gradient = losses.in_float64(name, *arrays)
    expected = (value / tokens, gradient / tokens)
    on_device = jax.device_put(arrays)

    def peer(title, make_loss, **more):
        def prepare():
            return jax_work(jax.value_and_grad(make_loss(name)), *on_device)

        return Peer(title, prepare, expected, **more)

    peers = [
        peer("jaxkl", losses.with_jaxkl, optional=False),
        peer("plain JAX", losses.with_plain_jax, optional=False),
        peer("optax", losses.with_optax),
        peer("ejkernel", losses.with_ejkernel),
        bytes_alone(on_device, True),
        *torch_peers(partial(losses.with_torch, name), arrays, 1, expected),
    ]
    rows = measure(peers, settings)
    targets = against_peers(rows, *BOUNDS[name])
    return Result(rows, targets, ("plain JAX", "torch.compile", BYTES))


CELLS = [
    Cell(
        f"dense-512-{name}",
        f"{name}, T = 2, logits [512, 32000] float32: value and gradient",
        partial(run, name),
    )
    for name in losses.DIVERGENCES
]
