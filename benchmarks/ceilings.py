"""Measures what the machine can do, for the floors in `docs/performance.md`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .harness import Cell, find, jax_work, measure, Peer, Result, Work


def run(settings):
    tokens, vocab = (16, 1000) if settings.smoke else (512, 32000)
    hidden, wide = (32, 1000) if settings.smoke else (576, 49152)
    rng = np.random.default_rng(0)
    uniform = lambda *shape: jnp.asarray(rng.uniform(size=shape), jnp.float32)
    x, y, one = uniform(tokens, vocab), uniform(tokens, vocab), jnp.ones(1)
    h, k = uniform(4 * tokens, hidden), uniform(hidden, wide)

    over = jax.jit(lambda x: x + 1, donate_argnums=0)
    total = lambda f: lambda *arrays: jnp.sum(f(*arrays))
    works = {
        "read two arrays": partial(jax_work, total(jnp.subtract), x, y),
        "write a new array": partial(
            jax_work, lambda one: jnp.zeros(x.shape) + one, one
        ),
        "read two, write a new one": partial(jax_work, jnp.subtract, x, y),
        "read and write one in place": partial(in_place, over, x),
        "exp of one, summed": partial(jax_work, total(jnp.exp), x),
        "log of one, summed": partial(jax_work, total(jnp.log), x),
        "matrix product": partial(jax_work, jnp.matmul, h, k),
    }
    array, flops = x.nbytes / 1e9, 2 * h.shape[0] * hidden * wide / 1e9
    bytes_, units = "GB/s", x.size / 1e9
    rates = [(2 * array, bytes_), (array, bytes_), (3 * array, bytes_)]
    rates += [(2 * array, bytes_), (units, "10⁹ exp/s"), (units, "10⁹ log/s")]
    rates += [(flops, "GFLOP/s")]
    peers = [Peer(name, work, optional=False) for name, work in works.items()]
    rows = measure(peers, settings)
    for name, (amount, unit) in zip(works, rates, strict=True):
        if ms := find(rows, name).get("ms"):
            find(rows, name)["rate"] = f"{1e3 * amount / ms:.2f} {unit}"
    return Result(rows, [])


def in_place(f, x):
    held = [x + 0]

    def run():
        held[0] = jax.block_until_ready(f(held[0]))

    return Work(run)


CELLS = [Cell("ceilings", "What the machine can do: arrays [512, 32000] float32", run)]
