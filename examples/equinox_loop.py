# `make run ARGS="examples/equinox_loop.py"` builds an environment and runs this.
"""Distils a language model in Equinox and optax, from hidden states.

Equinox keeps kernels as `[out, in]`: their transpose goes to `LinearHead`, and the
logits are never all in memory.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import jaxkl


VOCAB, BATCH, LENGTH, STEPS = 1024, 4, 32, 20


class Decoder(eqx.Module):
    embed: eqx.nn.Embedding
    mix: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, width, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCAB, width, key=keys[0])
        self.mix = eqx.nn.Linear(width, width, key=keys[1])
        self.head = eqx.nn.Linear(width, VOCAB, use_bias=False, key=keys[2])

    def __call__(self, token):
        x = self.embed(token)
        return x + jax.nn.gelu(self.mix(x))


def source(model, tokens):
    """Returns the hidden states of `tokens`, `[batch, length]`, with the head."""
    return jaxkl.LinearHead(jax.vmap(jax.vmap(model))(tokens), model.head.weight.T)


def loss_fn(student, teacher, tokens, where):
    models = source(student, tokens), source(teacher, tokens)
    return jaxkl.distillation_loss(*models, temperature=2.0, where=where)


def make_step(optimizer):
    @eqx.filter_jit
    def step(student, state, teacher, tokens, where):
        grad = eqx.filter_value_and_grad(loss_fn)
        loss, grads = grad(student, teacher, tokens, where)
        updates, state = optimizer.update(grads, state, student)
        return eqx.apply_updates(student, updates), state, loss

    return step


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    student, teacher = Decoder(32, keys[0]), Decoder(64, keys[1])
    tokens = jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCAB)
    where = jnp.arange(LENGTH) < jnp.array([[LENGTH], [20], [9], [1]])  # padding
    optimizer = optax.adam(1e-2)
    state = optimizer.init(eqx.filter(student, eqx.is_array))
    step = make_step(optimizer)
    for i in range(1, STEPS + 1):
        student, state, loss = step(student, state, teacher, tokens, where)
        print(f"step {i:3}  loss {loss:.6f}")


if __name__ == "__main__":
    main()
