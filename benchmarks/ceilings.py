"""What the machine can do, for the floors in `docs/performance.md`."""

import jax
import jax.numpy as jnp
import numpy as np

from .harness import Cell, find, jax_work, measure, Peer, Result, Work


def run(settings):
    tokens, vocab = (16, 1000) if settings.smoke else (512, 32000)
    hidden, wide = (32, 1000) if settings.smoke else (576, 49152)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, y, scalar = normal(tokens, vocab), normal(tokens, vocab), normal(1)
    h, k = normal(4 * tokens, hidden), normal(hidden, wide)
    array, product = x.nbytes / 1e9, 2 * h.shape[0] * hidden * wide / 1e9
    works = {  # what is timed, its arguments, and how many units it handles
        "read two arrays": (lambda x, y: jnp.sum(x - y), (x, y), 2 * array, "GB/s"),
        "write a new array": (
            lambda s: jnp.zeros((tokens, vocab)) + s,
            (scalar,),
            array,
            "GB/s",
        ),
        "read two, write a new one": (lambda x, y: x - y, (x, y), 3 * array, "GB/s"),
        "write over an array": (lambda x: x + 1, (x,), 2 * array, "GB/s"),
        "read one, exp, sum": (
            lambda x: jnp.sum(jnp.exp(x)),
            (x,),
            x.size / 1e9,
            "exp/ns",
        ),
        "read one, log, sum": (
            lambda x: jnp.sum(jnp.log(x)),
            (x,),
            x.size / 1e9,
            "log/ns",
        ),
        "matrix product": (jnp.matmul, (h, k), product, "GFLOP/s"),
    }
    peers = [
        Peer(name, lambda f=f, args=args: jax_work(f, *args), optional=False)
        for name, (f, args, *_) in works.items()
        if name != "write over an array"
    ]
    donated = jax.jit(lambda x: x + 1, donate_argnums=0)
    peers.append(Peer("write over an array", lambda: _over(donated, x), optional=False))
    rows = measure(peers, settings)
    for name, (_, _, amount, unit) in works.items():
        if ms := find(rows, name).get("ms"):
            find(rows, name)["rate"] = f"{1e3 * amount / ms:.1f} {unit}"
    return Result(rows, [])


def _over(f, x):
    held = [x + 0]

    def run():
        held[0] = jax.block_until_ready(f(held[0]))

    return Work(run)


CELLS = [Cell("ceilings", "What the machine can do: arrays [512, 32000] float32", run)]
