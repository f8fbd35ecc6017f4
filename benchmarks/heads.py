"""Cells for hidden states and two heads of SmolLM2's size, in place of logits."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

import jaxkl

from . import losses
from .harness import (
    Cell,
    find,
    jax_work,
    measure,
    Peer,
    ratio,
    Result,
    Target,
    time_ratio,
    Work,
)
from .torch_peers import torch_peers, torch_work


LOSS = "forward-kl"


def sizes(settings):
    """Returns tokens, hidden, vocab."""
    return (64, 32, 1000) if settings.smoke else (2048, 576, 49152)


@cache
def arrays(tokens, hidden, vocab):
    """Draws hidden and kernel of student and teacher; logits have a deviation of 2."""
    rng = np.random.default_rng(0)

    def normal(shape, deviation):
        return rng.normal(0, deviation, shape).astype(np.float32)

    return [
        array
        for _ in range(2)
        for array in (
            normal((tokens, hidden), 2),
            normal((hidden, vocab), hidden**-0.5),
        )
    ]


@cache
def expected(tokens, hidden, vocab):
    """Computes value and gradients by the student's arrays, in float64."""
    h, k, th, tk = arrays(tokens, hidden, vocab)
    wide, teacher_wide = k.astype(np.float64), tk.astype(np.float64)
    value, d_hidden, d_kernel = 0.0, np.empty(h.shape), np.zeros(k.shape)
    for start in range(0, tokens, 128):
        part = slice(start, start + 128)
        loss, d_logits = losses.in_float64(
            LOSS, h[part] @ wide, th[part] @ teacher_wide
        )
        value += loss / tokens
        d_hidden[part] = d_logits @ wide.T / tokens
        d_kernel += h[part].T.astype(np.float64) @ d_logits / tokens
    return value, d_hidden, d_kernel


def fused(h, k, th, tk):
    student, teacher = jaxkl.LinearHead(h, k), jaxkl.LinearHead(th, tk)
    return losses.with_jaxkl(LOSS)(student, teacher)


def from_logits(loss):
    return lambda h, k, th, tk: loss(h @ k, th @ tk)


def torch_loss():
    import torch

    loss = losses.with_torch(LOSS)

    def with_heads(h, k, th, tk):
        with torch.no_grad():
            teacher = th @ tk
        return loss(h @ k, teacher)

    return with_heads


def liger(shape):
    """Makes Liger's chunked loss, compiled by torch, on kernels `[vocab, hidden]`.

    Its Jensen-Shannon divergence is the forward KL at `beta=0`.
    """
    import torch
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    h, k, th, tk = arrays(*shape)
    labels = torch.zeros(shape[0], dtype=torch.int64)  # all tokens count

    def loss(h, k, th, tk):
        value = LigerFusedLinearJSDFunction.apply(
            *(h, k, th, tk, labels, None, None, 0.0, 1.0, 0.0, -100, losses.T)
        )
        return losses.T**2 * value

    kernels = [np.ascontiguousarray(kernel.T) for kernel in (k, tk)]
    return torch_work(loss, [h, kernels[0], th, kernels[1]], 2, compile=False)


def as_ours(outputs):
    value, (d_hidden, d_kernel) = outputs
    return value, (d_hidden, d_kernel.T)


def gemms(shape, gradient):
    """Makes only the necessary matrix products, one after another."""
    h, k, th, tk = jax.device_put(arrays(*shape))
    steps = [(jnp.matmul, h, k), (jnp.matmul, th, tk)]
    if gradient:
        g = jax.device_put(np.ones((shape[0], shape[2]), np.float32))
        steps.append((lambda g, k: g @ k.T, g, k))
        steps.append((lambda h, g: h.T @ g, h, g))
    works = [jax_work(*step) for step in steps]

    def run():
        for work in works:
            work.run()

    return Work(run)


def jax_peer(title, make_loss, shape, *, gradient=True, **more):
    def prepare():
        loss = make_loss()
        f = jax.value_and_grad(loss, (0, 1)) if gradient else loss
        return jax_work(f, *jax.device_put(arrays(*shape)))

    return Peer(title, prepare, expected(*shape)[: 3 if gradient else 1], **more)


def run_2048(settings):
    shape = sizes(settings)
    peers = [
        jax_peer("jaxkl", lambda: fused, shape, optional=False),
        Peer("4 GEMMs", lambda: gemms(shape, True), optional=False),
        jax_peer(
            "plain JAX",
            lambda: from_logits(losses.with_plain_jax(LOSS)),
            shape,
            optional=False,
        ),
        jax_peer("optax", lambda: from_logits(losses.with_optax(LOSS)), shape),
        jax_peer("ejkernel", lambda: from_logits(losses.with_ejkernel(LOSS)), shape),
        Peer("Liger", lambda: liger(shape), expected(*shape), seen=as_ours),
        *torch_peers(torch_loss, arrays(*shape), 2, expected(*shape)),
    ]
    rows = measure(peers, settings)
    temp = ratio(rows, "temp_bytes", "jaxkl", "plain JAX")
    targets = [
        Target("time ÷ 4 GEMMs", time_ratio(rows, "jaxkl", "4 GEMMs"), 1.25),
        Target("time ÷ plain JAX", time_ratio(rows, "jaxkl", "plain JAX"), 0.9),
        Target("time ÷ torch.compile", time_ratio(rows, "jaxkl", "torch.compile"), 1.0),
        Target("temp ÷ plain JAX", temp, 1 / 8, "{:.3f}"),
    ]
    return Result(rows, targets, ("4 GEMMs", "plain JAX"))


def run_forward(settings):
    shape = sizes(settings)
    peers = [
        jax_peer("jaxkl", lambda: fused, shape, gradient=False, optional=False),
        Peer("2 GEMMs", lambda: gemms(shape, False), optional=False),
        jax_peer(
            "plain JAX",
            lambda: from_logits(losses.with_plain_jax(LOSS)),
            shape,
            gradient=False,
            optional=False,
        ),
    ]
    rows = measure(peers, settings)
    temp = ratio(rows, "temp_bytes", "jaxkl", "plain JAX")
    ours = find(rows, "jaxkl").get("temp_bytes")
    with_gradient = jax.jit(jax.value_and_grad(fused, (0, 1)))
    memory = with_gradient.lower(*arrays(*shape)).compile().memory_analysis()
    targets = [
        Target("time ÷ 2 GEMMs", time_ratio(rows, "jaxkl", "2 GEMMs"), 1.25),
        Target("temp ÷ plain JAX", temp, 1 / 8, "{:.3f}"),
        Target("temp ÷ its own with gradient", ours / memory.temp_size_in_bytes, 1.0),
    ]
    return Result(rows, targets, ("2 GEMMs", "plain JAX"))


def run_scaling(settings):
    tokens, hidden, vocab = sizes(settings)
    counts = [tokens // 2, tokens, tokens * 2]
    names = [f"jaxkl, {n} tokens" for n in counts]
    peers = [
        jax_peer(name, lambda: fused, (n, hidden, vocab), optional=False)
        for name, n in zip(names, counts, strict=True)
    ]
    rows = measure(peers, settings)
    base = find(rows, names[0])
    targets = []
    for name, n in zip(names[1:], counts[1:], strict=True):
        row, factor = find(rows, name), n // counts[0]
        time = time_ratio(rows, name, names[0])
        grown = (row["temp_bytes"] - base["temp_bytes"]) / 2**20
        outputs = (row["output_bytes"] - base["output_bytes"]) / 2**20
        what = f"{factor}x the tokens"
        if time is not None:
            time = abs(time / factor - 1)
        targets += [
            Target(f"{what}: time per token off by", time, 0.1),
            Target(f"{what}: more temp than more output, MiB", grown - outputs, 0.5),
        ]
    return Result(rows, targets, (names[0],))


SIZE = "SmolLM2's heads, H 576, V 49152, float32, forward-kl, T = 2"
CELLS = [
    Cell(
        "heads-2048",
        f"{SIZE}, 2048 tokens: value and gradient to hidden and kernel",
        run_2048,
    ),
    Cell("heads-forward", f"{SIZE}, 2048 tokens: value alone", run_forward),
    Cell(
        "heads-scaling",
        f"{SIZE}, 1024, 2048 and 4096 tokens: value and gradient",
        run_scaling,
    ),
]
