"""Small GGUF files written with the gguf package, permuted as llama.cpp's converter does."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
GEMMA_NAMES = {
    **BLOCK_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, block_names: Mapping[str, str] = BLOCK_NAMES) -> str:
    parts = name.split(".")
    if parts[1] == "layers":
        return f"blk.{parts[2]}.{block_names['.'.join(parts[3:-1])]}.{parts[-1]}"
    stem = {"embed_tokens": "token_embd", "norm": "output_norm", "weight": "output"}[parts[1]]
    return f"{stem}.weight"


def permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: each head's halves interleaved."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def add_config(writer: gguf.GGUFWriter, config: Mapping) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    if config.get("counts_by_layer"):
        layers = config["num_hidden_layers"]
        writer.add_head_count([config["num_attention_heads"]] * layers)
        writer.add_head_count_kv([config["num_key_value_heads"]] * layers)
    else:
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if config.get("sliding_window") and "gemma" in config["model_type"]:
        writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def write_gguf(
    path: Path,
    config: Mapping,
    weights: Mapping[str, np.ndarray],
    kinds: Mapping[str, Kind] | None = None,
    metadata: Mapping[str, object] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a GGUF file and returns the weights it stands for, in Hugging Face order.

    Args:
      path: the file.
      config: fields of a config.json.
      weights: Hugging Face tensors.
      kinds: pattern in a tensor's name -> how it is quantised; float32 if none matches.
      metadata: further fields; text, numbers, flags, and lists of them.
      extra: further tensors under their GGUF names.
    """
    writer = gguf.GGUFWriter(path, config["model_type"].removesuffix("_text"))
    is_gemma = "gemma" in config["model_type"]
    block_names = (GEMMA_NAMES if is_gemma else BLOCK_NAMES) | QK_NORMS
    add_config(writer, config)
    for key, value in (metadata or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    meant = {}
    for name, array in weights.items():
        heads = None
        if config["model_type"] == "llama" and ".q_proj" in name:
            heads = config["num_attention_heads"]
        if config["model_type"] == "llama" and ".k_proj" in name:
            heads = config["num_key_value_heads"]
        kind = next((k for pattern, k in (kinds or {}).items() if pattern in name), Kind.F32)
        if array.ndim == 1:
            kind = Kind.F32
        stored = array if heads is None else permute(array, heads)
        if is_gemma and name.endswith("norm.weight"):
            stored = stored + np.float32(1)
        packed = gguf.quants.quantize(stored, kind)
        writer.add_tensor(gguf_name(name, block_names), packed, raw_dtype=kind)
        # Quantising works along a row, so it makes no difference in which order the rows are.
        meant[name] = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        if is_gemma and name.endswith("norm.weight"):
            meant[name] = stored - np.float32(1)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def byte_level_alphabet() -> list[str]:
    """The 256 characters that stand for bytes, as GPT-2 assigns them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (chr(256 + n) for n in range(256 - len(plain)))
    return [chr(byte) if byte in plain else next(others) for byte in range(256)]


def tokenizer_fields(pre: str, **changes: object) -> dict[str, object]:
    """Fields of a byte-level BPE: three control tokens, bytes, merges, a user-defined token."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "1 2", "12 3", "Ġ 1"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_level_alphabet()]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<tool>"]
    types = [3] * 3 + [1] * (len(tokens) - 4) + [4]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        **changes,
    }
    return {key: value for key, value in fields.items() if value is not None}
