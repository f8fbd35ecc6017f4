"""Losses in JAX for `benchmarks/gpu.py`, and what the device can do at most."""

import functools as ft
import inspect
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxkl

from . import losses
from .harness import memory_of


def value_and_gradient(peer, form, divergence, options):
    """Makes the function to measure. Plain JAX casts its bfloat16 logits to float32."""
    if unknown := options.keys() - _options():
        raise NotImplementedError(f"this jaxkl has no option {', '.join(unknown)}")

    def ours(student, teacher):
        return jaxkl.distillation_loss(
            student,
            teacher,
            divergence=losses.DIVERGENCES[divergence],
            temperature=losses.T,
            **options,
        )

    loss = ours if peer == "jaxkl" else losses.with_plain_jax(divergence)
    head = jaxkl.LinearHead if peer == "jaxkl" else jnp.matmul
    if form == "dense":
        return jax.value_and_grad(loss)
    return jax.value_and_grad(
        lambda h, k, th, tk: loss(head(h, k), head(th, tk)), argnums=(0, 1)
    )


def _options():
    return inspect.signature(jaxkl.distillation_loss).parameters.keys()


class Program:
    transposed = False  # whether kernels are [vocab, hidden]

    def __init__(self, *which):
        self._f = jax.jit(value_and_gradient(*which))

    def outputs_of(self, arrays, dtype):
        precision = "highest" if dtype == "float32" else None
        with jax.default_matmul_precision(precision):
            return self._f(*(jnp.asarray(x, dtype) for x in arrays))

    def prepare(self, shapes):
        """Compiles, and then draws the arguments; returns facts."""
        shapes = {name: tuple(shape) for name, shape in shapes.items()}
        args = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in shapes.values()]
        start = time.perf_counter()
        self._compiled = self._f.lower(*args).compile()
        seconds = time.perf_counter() - start
        self.arguments = draw(shapes)
        return {"compile_s": seconds} | memory_of(self._compiled)

    def run(self):
        return self._compiled(*self.arguments)

    wait = staticmethod(jax.block_until_ready)

    def run_for_peak(self):
        """Runs once; returns outputs and facts.

        The device's peak is of the whole process, in which the compiler may have tried
        several kernels on buffers of its own. If these were larger, the peak of the run
        is not known.
        """
        before = _peak_bytes()
        outputs = self.wait(self.run())
        peak = _peak_bytes()
        if peak is None:
            return outputs, {}
        if peak > before:
            return outputs, {"peak_bytes": peak}
        return outputs, {"peak_of_compiler_bytes": before}

    @staticmethod
    def to_numpy(x):
        return np.asarray(x).astype(np.float32)


def _peak_bytes():
    """Returns the most that was allocated so far, or None on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def draw(shapes):
    """Draws bfloat16 arrays; logits have a deviation of 2."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [
        _normal(key, shape, shape[0] ** -0.5 if name.endswith("kernel") else 2.0)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    ]
    return jax.block_until_ready(arrays)


@ft.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, deviation):
    """Draws block by block, as a whole draw takes more memory than the losses do."""
    blocks = 64
    block = shape[0] // blocks, shape[1]

    def draw_block(key):
        return jax.random.normal(key, block, jnp.bfloat16) * jnp.bfloat16(deviation)

    return jax.lax.map(draw_block, jax.random.split(key, blocks)).reshape(shape)


def ceilings(tokens, hidden, vocab, median_ms):
    """Yields the rates of a copy and of the three shapes of a head's products."""
    logits, h, k = draw(
        {
            "logits": (tokens, vocab),
            "hidden": (tokens, hidden),
            "kernel": (hidden, vocab),
        }
    )

    def measure(f, *args):
        f = jax.jit(f).lower(*args).compile()
        return median_ms(lambda: f(*args), jax.block_until_ready)

    ms = measure(lambda x: x + 1, logits)  # XLA would not copy without an operation
    yield {"peer": "copy", "ms": ms, "gb_per_s": 2 * logits.nbytes / ms / 1e6}
    for name, f, *args in (
        ("logits = hidden @ kernel", jnp.matmul, h, k),
        ("d hidden = d logits @ kernel.T", lambda d, k: d @ k.T, logits, k),
        ("d kernel = hidden.T @ d logits", lambda h, d: h.T @ d, h, logits),
    ):
        ms = measure(f, *args)
        flops = 2 * tokens * hidden * vocab
        yield {"peer": name, "ms": ms, "tflop_per_s": flops / ms / 1e9}


def device():
    device = jax.devices()[0]
    return {"platform": device.platform, "device": device.device_kind}
