# `make run ARGS="examples/fused_head.py"` builds an environment and runs this.
"""Distils a language model in Flax NNX without ever making its logits.

The loss takes hidden states and heads in place of logits. The program trains the same
student both ways. The losses agree, and the heads need less memory.
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
    """Maps tokens, `[batch, length]`, to hidden states and the head's kernel."""

    def __init__(self, vocab, width, rngs):
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x += self.attention(x, mask=nnx.make_causal_mask(tokens))
        return self.norm(x), self.head.kernel[...]


def train(source, vocab, batches):
    """Returns loss and gradient norm of each step, and a step's temporary memory."""
    models = Decoder(vocab, 128, nnx.Rngs(0)), Decoder(vocab, 256, nnx.Rngs(1))
    optimizer = nnx.Optimizer(models[0], optax.adamw(1e-3), wrt=nnx.Param)
    structure, state = nnx.split((*models, optimizer))

    def step(state, tokens):
        student, teacher, optimizer = nnx.merge(structure, state)

        def loss_fn(student):
            models = source(*student(tokens)), source(*teacher(tokens))
            return jaxkl.distillation_loss(*models, temperature=2.0)

        loss, grads = nnx.value_and_grad(loss_fn)(student)
        optimizer.update(student, grads)
        return nnx.state((student, teacher, optimizer)), (loss, optax.tree.norm(grads))

    step = jax.jit(step, donate_argnums=0).lower(state, batches[0]).compile()
    numbers = []
    for tokens in batches:
        state, new = step(state, tokens)
        numbers.append(new)
    temp = step.memory_analysis().temp_size_in_bytes
    return np.array(numbers, np.float64), temp


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"vocab": 32768, "batch": 8, "length": 256, "steps": 5}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", default=size, type=int, help=f"{size}")
    args = parser.parse_args()
    # By default JAX multiplies float32 matrices in lower precision on a GPU or TPU.
    jax.config.update("jax_default_matmul_precision", "highest")
    shape = (args.steps, args.batch, args.length)
    batches = jax.random.randint(jax.random.key(2), shape, 0, args.vocab)

    logits, temp = train(jnp.matmul, args.vocab, batches)
    print(f"logits  {temp / 2**20:8.1f} MiB of temporary memory a step")
    heads, temp = train(jaxkl.LinearHead, args.vocab, batches)
    print(f"heads   {temp / 2**20:8.1f} MiB of temporary memory a step")

    print("step    loss from logits    loss from heads    norms of gradients differ by")
    off = np.abs(heads / logits - 1)
    for i in range(args.steps):
        print(f"{i + 1:4}{logits[i, 0]:20.6f}{heads[i, 0]:19.6f}{off[i, 1]:31.1e}")
    if not np.all(off < 1e-5):
        sys.exit("The two forms are NOT the same.")


if __name__ == "__main__":
    main()
