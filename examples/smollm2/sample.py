"""Lets a model write text: with a key-value cache, for many prompts at a time."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx


def empty_cache(model, windows, length):
    """Keys and values of every layer, `[layers, windows, length, heads, width]`."""
    block = model.layers
    layers, _, width = block.attn_k.kernel.shape
    heads = width // block.head_width
    shape = layers, windows, length, heads, block.head_width
    return (jnp.zeros(shape, block.attn_k.dtype),) * 2


def write(model, embedding, prompts, count, key=None, temperature=1.0):
    """Continues prompts, `[windows, length]`, by tokens, `[windows, count]`.

    They are drawn with the key, or without one the most likely.
    """
    windows, length = prompts.shape
    cache = empty_cache(model, windows, length + count)
    hidden, cache = model(embedding[prompts], cache)

    def step(carry, i):
        hidden, cache = carry
        logits = jnp.matmul(hidden, embedding.T, preferred_element_type=jnp.float32)
        if key is None:
            tokens = jnp.argmax(logits, axis=-1)
        else:
            own = jax.random.fold_in(key, i)
            tokens = jax.random.categorical(own, logits / temperature)
        hidden, cache = model(embedding[tokens][:, None], cache, length + i)
        return (hidden[:, 0], cache), tokens

    _, tokens = jax.lax.scan(step, (hidden[:, -1], cache), jnp.arange(count))
    return tokens.T


def own_text(model, embedding, batches, length, end, key, temperature=1.0):
    """Batches, `[batches, windows, length]`, whose text after a prompt is the model's.

    Its tokens up to the first `end` are the labels. The prompt, the first tokens of a
    window, has none, and neither has a window whose text ends in its prompt.
    """
    tokens = batches["tokens"]
    shape, window = tokens.shape, tokens.shape[-1]
    prompts = tokens.reshape(-1, window)[:, :length]
    own = write(model, embedding, prompts, 1 + window - length, key, temperature)
    ended = jnp.cumsum(own == end, axis=1) - (own == end) > 0
    short = batches["labels"].reshape(-1, window)[:, length - 1, None] < 0
    labels = jnp.where(ended | short, -100, own)
    labels = jnp.pad(labels, ((0, 0), (length - 1, 0)), constant_values=-100)
    text = jnp.concatenate([prompts, own[:, :-1]], axis=1)
    return {"tokens": text.reshape(shape), "labels": labels.reshape(shape)}


@partial(jax.jit, static_argnames=("structure", "count"))
def _most_likely(structure, state, embedding, prompts, count):
    return write(nnx.merge(structure, state), embedding, prompts, count)


def continuation(teacher, model, text, count):
    """Continues the text with the most likely token at each step."""
    prompts = jnp.array([teacher.tokenizer.encode(text).ids])
    tokens = _most_likely(*nnx.split(model), teacher.embedding, prompts, count)
    return teacher.tokenizer.decode(tokens[0].tolist())
