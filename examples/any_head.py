# `make run ARGS="examples/any_head.py"` builds an environment and runs this.
"""Distils through heads that are functions, without ever making their logits.

There are four: the final norm and head of a Flax NNX and of a Flax Linen model, LoRA
factors on a frozen head, and a teacher of 8-bit weights. Each student is trained with
`jaxkl.FunctionHead`, and its first gradient is compared with that of plain JAX.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn, nnx

import jaxkl


def rms_normed(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def normed_product(params, hidden):
    return rms_normed(hidden) * params["scale"] @ params["kernel"]


def with_factors(params, hidden):
    hidden = rms_normed(hidden)
    return hidden @ params["kernel"] + hidden @ params["a"] @ params["b"]


def product(kernel, hidden):
    return hidden @ kernel


def of_8_bits(params, hidden):
    return (hidden @ params["kernel"].astype(hidden.dtype)) * params["scale"]


class NNXHead(nnx.Module):
    def __init__(self, width, vocab, rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.linear = nnx.Linear(width, vocab, use_bias=False, rngs=rngs)

    def __call__(self, hidden):
        return self.linear(self.norm(hidden))


def students(width, vocab):
    """Name: a function from parameters and hidden states to logits, and what learns and
    what is frozen of its parameters, which `join` puts together."""
    keys = jax.random.split(jax.random.key(1), 4)
    normal = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    alone = lambda learned, frozen: learned
    graph, state = nnx.split(NNXHead(width, vocab, nnx.Rngs(0)))
    of_graph = lambda state, hidden: nnx.merge(graph, state)(hidden)
    yield "NNX: norm, head", of_graph, state, None, alone

    module = nn.Sequential([nn.RMSNorm(), nn.Dense(vocab, use_bias=False)])
    variables = module.init(keys[0], jnp.zeros((1, width)))
    yield "Linen: norm, head", module.apply, variables, None, alone

    factors = dict(a=normal(keys[1], width, 4), b=jnp.zeros((4, vocab)))
    frozen = dict(kernel=normal(keys[2], width, vocab))
    yield "LoRA, frozen head", with_factors, factors, frozen, lambda x, y: x | y

    params = dict(scale=jnp.ones(width), kernel=normal(keys[3], width, vocab))
    yield "8-bit teacher", normed_product, params, None, alone


def plain_loss(student, teacher):
    """The mean of KL(teacher ‖ student), from all logits."""
    log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def train(steps, tile, inputs, teacher, apply, learned, frozen, join):
    """Loss before and after; memory of a step, ours and plain; how gradients differ.

    The gradients are those of the trained student.
    """
    of_teacher, teacher_params = teacher
    width = 2 * inputs.shape[-1]
    body = jax.random.normal(jax.random.key(2), (inputs.shape[-1], width))
    body /= inputs.shape[-1] ** 0.5
    optimizer = optax.adam(3e-3)

    def ours(*heads):
        heads = (jaxkl.FunctionHead(*x) for x in heads)
        return jaxkl.distillation_loss(*heads, tile=tile)

    def plainly(*heads):
        return plain_loss(*(apply(params, hidden) for apply, params, hidden in heads))

    def step(loss, weights, state, frozen, teacher_params, inputs):
        def loss_of(weights):
            params, body = join(weights["head"], frozen), weights["body"]
            student = apply, params, jnp.tanh(inputs @ body)
            return loss(student, (of_teacher, teacher_params, inputs))

        value, grads = jax.value_and_grad(loss_of)(weights)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(weights, updates), state, value, grads

    weights = dict(head=learned, body=body)
    state, more = optimizer.init(weights), (frozen, teacher_params, inputs)
    compiled = [
        jax.jit(step, static_argnums=0).lower(loss, weights, state, *more).compile()
        for loss in (ours, plainly)
    ]
    losses = []
    for _ in range(steps + 1):
        last = weights, state
        weights, state, loss, grads = compiled[0](*last, *more)
        losses.append(float(loss))
    plain = compiled[1](*last, *more)[3]
    off = lambda x, y: float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)))
    worst = max(map(off, *map(jax.tree.leaves, (grads, plain))))
    memory = [x.memory_analysis().temp_size_in_bytes / 2**20 for x in compiled]
    return losses[0], losses[-1], *memory, worst


def positive(text):
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"vocab": 4096, "tokens": 1024, "width": 32, "tile": 128, "steps": 30}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", default=size, type=positive, help=f"{size}")
    args = parser.parse_args()
    # By default JAX multiplies float32 matrices in lower precision on a GPU or TPU.
    jax.config.update("jax_default_matmul_precision", "highest")
    keys = jax.random.split(jax.random.key(0), 2)
    inputs = jax.random.normal(keys[0], (args.tokens, args.width))
    kernel = jax.random.normal(keys[1], (args.width, args.vocab))
    kernel *= 2 / args.width**0.5
    scale = jnp.max(jnp.abs(kernel), axis=0) / 127
    rounded = dict(kernel=jnp.round(kernel / scale).astype(jnp.int8), scale=scale)

    print("                     loss to teacher    MiB, temporary    gradients")
    print("student               first     last   jaxkl  plain JAX    differ by")
    worst = 0.0
    for name, *student in students(2 * args.width, args.vocab):
        teacher = (of_8_bits, rounded) if "8-bit" in name else (product, kernel)
        *numbers, off = train(args.steps, args.tile, inputs, teacher, *student)
        first, last, heads, logits = numbers
        print(f"{name:20}{first:7.4f}{last:9.4f}{heads:8.1f}{logits:11.1f}{off:13.1e}")
        worst = max(worst, off)
    if not worst < 1e-4:
        sys.exit("The gradients are NOT the same.")
    print("The gradients are the same.")


if __name__ == "__main__":
    main()
