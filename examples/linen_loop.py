# `make run ARGS="examples/linen_loop.py"` builds an environment and runs this.
"""Distils a language model in Flax Linen and optax, from hidden states.

The student's head, a norm and a product, goes to the loss as a function, so that its
logits are never all in memory. The teacher's kernel goes as a `LinearHead`.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import jaxkl


VOCAB, BATCH, LENGTH, STEPS = 1024, 4, 32, 20


class Body(nn.Module):
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, self.width)(tokens)
        return x + nn.gelu(nn.Dense(self.width)(x))


HEAD = nn.Sequential([nn.RMSNorm(), nn.Dense(VOCAB, use_bias=False)])


def loss_fn(params, apply, tokens, teacher, where):
    hidden = apply({"params": params["body"]}, tokens)
    student = jaxkl.FunctionHead(HEAD.apply, {"params": params["head"]}, hidden)
    return jaxkl.distillation_loss(student, teacher, temperature=2.0, where=where)


@functools.partial(jax.jit, donate_argnums=0)
def step(state, tokens, teacher, where):
    grad = jax.value_and_grad(loss_fn)
    loss, grads = grad(state.params, state.apply_fn, tokens, teacher, where)
    return state.apply_gradients(grads=grads), loss


def main():
    keys = jax.random.split(jax.random.key(0), 5)
    tokens = jax.random.randint(keys[0], (BATCH, LENGTH), 0, VOCAB)
    where = jnp.arange(LENGTH) < jnp.array([[LENGTH], [20], [9], [1]])  # padding
    hidden = jax.random.normal(keys[1], (BATCH, LENGTH, 64))
    kernel = jax.random.normal(keys[2], (64, VOCAB)) / 8
    teacher = jaxkl.LinearHead(hidden, kernel)

    body = Body(32)
    params = {
        "body": body.init(keys[3], tokens)["params"],
        "head": HEAD.init(keys[4], hidden[..., :32])["params"],
    }
    optimizer = optax.adamw(1e-2)
    state = TrainState.create(apply_fn=body.apply, params=params, tx=optimizer)
    for i in range(1, STEPS + 1):
        state, loss = step(state, tokens, teacher, where)
        print(f"step {i:3}  loss {loss:.6f}")


if __name__ == "__main__":
    main()
