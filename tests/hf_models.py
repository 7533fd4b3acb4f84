"""Small Hugging Face models made by rule, written without the code under test."""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

TINY_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_QWEN2 = {
    **TINY_LLAMA,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 32,
}
# Windows shorter than the sequences of the tests, heads that are not width / number, and caps that bend what they cap.
TINY_QWEN3 = {
    **TINY_LLAMA,
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 12,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
}
TINY_GEMMA2 = {
    **{key: value for key, value in TINY_LLAMA.items() if key != "hidden_act"},
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "head_dim": 12,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "sliding_window": 7,
}
TINY_GEMMA3 = {
    **{key: value for key, value in TINY_GEMMA2.items() if key != "attn_logit_softcapping"},
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "final_logit_softcapping": None,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 100.0,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
}
FAMILIES = {
    "llama": TINY_LLAMA,
    "qwen2": TINY_QWEN2,
    "qwen3": TINY_QWEN3,
    "gemma2": TINY_GEMMA2,
    "gemma3": TINY_GEMMA3,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tensor_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a checkpoint, from the fields of its config.json."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    hd = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    shapes = {"model.embed_tokens.weight": (v, d)}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        shapes |= {
            block + "input_layernorm.weight": (d,),
            block + "self_attn.q_proj.weight": (q, d),
            block + "self_attn.k_proj.weight": (kv, d),
            block + "self_attn.v_proj.weight": (kv, d),
            block + "self_attn.o_proj.weight": (d, q),
            block + "post_attention_layernorm.weight": (d,),
            block + "mlp.gate_proj.weight": (f, d),
            block + "mlp.up_proj.weight": (f, d),
            block + "mlp.down_proj.weight": (d, f),
        }
        if "gemma" in config["model_type"]:
            shapes |= {
                block + "pre_feedforward_layernorm.weight": (d,),
                block + "post_feedforward_layernorm.weight": (d,),
            }
        if config["model_type"] in ("qwen3", "gemma3_text"):
            shapes |= {
                block + "self_attn.q_norm.weight": (hd,),
                block + "self_attn.k_norm.weight": (hd,),
            }
        if config["model_type"] == "qwen2":
            shapes |= {
                block + "self_attn.q_proj.bias": (q,),
                block + "self_attn.k_proj.bias": (kv,),
                block + "self_attn.v_proj.bias": (kv,),
            }
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def weights_by_rule(config: Mapping) -> dict[str, np.ndarray]:
    """Returns the weights of a model, see `values_by_rule`."""
    norm_start = 0 if "gemma" in config["model_type"] else 1
    return values_by_rule(tensor_shapes(config), norm_start)


def values_by_rule(
    shapes: Mapping[str, tuple[int, ...]], norm_start: int = 1
) -> dict[str, np.ndarray]:
    """Returns the same float32 weights everywhere: they follow from the tensors' names and shapes.

    Element i of tensor `name` is the finaliser of MurmurHash3 of i + crc32(name), mapped to
    (-1, 1), times sqrt(3 / columns) in matrices; norms are `norm_start` + 0.2 of it (0 for Gemma,
    which adds the 1 itself), biases 0.5 of it.
    """
    weights = {}
    for name, shape in shapes.items():
        x = np.arange(math.prod(shape), dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
        x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
        x = x ^ (x >> 16)
        unit = x.astype(np.float64) / 2**31 - 1
        if name.endswith("norm.weight"):
            unit = norm_start + 0.2 * unit
        elif name.endswith("bias"):
            unit = 0.5 * unit
        else:
            unit = unit * math.sqrt(3 / shape[-1])
        weights[name] = unit.astype(np.float32).reshape(shape)
    return weights


def write_folder(
    path: Path, config: Mapping, weights: Mapping[str, np.ndarray], num_shards: int = 1
) -> Path:
    """Writes config.json and the weights with the safetensors library; returns `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file(dict(weights), path / "model.safetensors")
        return path
    names = list(weights)
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::num_shards]}
        save_file(part, path / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def stacked(weights: Mapping[str, np.ndarray], suffix: str) -> np.ndarray:
    """Returns all layers' matrices (L, in, out) or vectors (L, out), as the decoder has them."""
    layers = sorted(
        (name for name in weights if name.endswith(f".{suffix}")),
        key=lambda name: int(name.split(".")[2]),
    )
    return np.stack([weights[name].T for name in layers])


def assert_same_params(found: Mapping, expected: Mapping) -> None:
    """Asserts that two parameter trees have the same paths and, exactly, the same values."""
    found_leaves = jax.tree_util.tree_leaves_with_path(found)
    expected_leaves = jax.tree_util.tree_leaves_with_path(expected)
    assert [path for path, _ in found_leaves] == [path for path, _ in expected_leaves]
    for (path, leaf), (_, other) in zip(found_leaves, expected_leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), err_msg=str(path))
