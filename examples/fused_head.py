"""A language model's distillation step that never makes its logits, in Flax NNX.

The loss takes hidden states and the heads of student and teacher instead of logits.
Here the same student is trained both ways, on random tokens, to compare losses,
gradients and the memory that XLA plans for a step.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxkl


class Decoder(nnx.Module):
    """From tokens `[batch, length]` to hidden states and the head's kernel."""

    def __init__(self, vocab, width, rngs):
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(3)])
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.head = nnx.Linear(width, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x += self.attention(self.norms[0](x), mask=nnx.make_causal_mask(tokens))
        x += self.down(nnx.silu(self.up(self.norms[1](x))))
        return self.norms[2](x), self.head.kernel[...]


def from_logits(hidden, kernel):
    return hidden @ kernel


def from_heads(hidden, kernel):
    return jaxkl.LinearHead(hidden, kernel)


def compiled_step(source, structure, state, tokens):
    """A training step, and the bytes that it needs beside arguments and results."""

    def step(state, tokens):
        student, teacher, optimizer = nnx.merge(structure, state)

        def loss_fn(student):
            models = source(*student(tokens)), source(*teacher(tokens))
            return jaxkl.distillation_loss(*models, temperature=2.0)

        loss, grads = nnx.value_and_grad(loss_fn)(student)
        optimizer.update(student, grads)
        numbers = jnp.stack([loss, optax.tree.norm(grads)])
        return nnx.state((student, teacher, optimizer)), numbers

    compiled = jax.jit(step, donate_argnums=0).lower(state, tokens).compile()
    return compiled, compiled.memory_analysis().temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("vocab", 32768),
        ("batch", 8),
        ("length", 256),
        ("steps", 5),
    ):
        parser.add_argument(f"--{name}", default=default, type=int, help=f"{default}")
    args = parser.parse_args()
    # JAX multiplies float32 matrices in less on a GPU or TPU unless it is told not to.
    jax.config.update("jax_default_matmul_precision", "highest")

    student = Decoder(args.vocab, 128, nnx.Rngs(0))
    teacher = Decoder(args.vocab, 256, nnx.Rngs(1))
    optimizer = nnx.Optimizer(student, optax.adamw(1e-3), wrt=nnx.Param)
    structure, state = nnx.split((student, teacher, optimizer))
    shape = (args.steps, args.batch, args.length)
    batches = jax.random.randint(jax.random.key(2), shape, 0, args.vocab)

    numbers = []
    for source in (from_logits, from_heads):
        step, temp = compiled_step(source, structure, state, batches[0])
        print(f"{source.__name__:12}{temp / 2**20:8.1f} MiB of temporary memory a step")
        now = jax.tree.map(jnp.copy, state)  # a step takes over its argument's memory
        for tokens in batches:
            now, new = step(now, tokens)
            numbers.append(new)
    # [form, step, loss and norm of its gradient]
    numbers = np.asarray(numbers, np.float64).reshape(2, args.steps, 2)
    print("step    loss from logits    loss from heads    norms of gradients differ by")
    off = np.abs(numbers[1] / numbers[0] - 1)
    for i, (logits, heads) in enumerate(zip(*numbers[..., 0], strict=True)):
        print(f"{i + 1:4}{logits:20.6f}{heads:19.6f}{off[i, 1]:31.1e}")
    if not np.all(off < 1e-5):
        sys.exit("The two forms are NOT the same.")


if __name__ == "__main__":
    main()
