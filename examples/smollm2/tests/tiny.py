"""Writes a Llama that trains in a moment to a GGUF file, like SmolLM2."""

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from tokenizers import pre_tokenizers


LAYERS, WIDTH, FFN, HEADS, KV_HEADS = 4, 64, 96, 4, 2
MERGES = ["t h", "th e", "i n", "Ġ a", "e r", "o r", "a n"]  # 264 tokens


def write_gguf(path, *, seed=0, merges=MERGES):
    rng = np.random.default_rng(seed)
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in merges]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))

    def add(name, *shape):
        array = rng.normal(size=shape, scale=shape[-1] ** -0.5).astype(np.float32)
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", quantize(array, kind), raw_dtype=kind)

    def add_ones(name):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))

    add("token_embd", len(tokens), WIDTH)
    kv_width = WIDTH // HEADS * KV_HEADS
    for i in range(LAYERS):
        add_ones(f"blk.{i}.attn_norm")
        add_ones(f"blk.{i}.ffn_norm")
        add(f"blk.{i}.attn_q", WIDTH, WIDTH)
        add(f"blk.{i}.attn_k", kv_width, WIDTH)
        add(f"blk.{i}.attn_v", kv_width, WIDTH)
        add(f"blk.{i}.attn_output", WIDTH, WIDTH)
        add(f"blk.{i}.ffn_gate", FFN, WIDTH)
        add(f"blk.{i}.ffn_up", FFN, WIDTH)
        add(f"blk.{i}.ffn_down", WIDTH, FFN)
    add_ones("output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
