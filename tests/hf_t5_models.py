"""Small models of the T5 family as Hugging Face has them, written without the code under test."""

import itertools
from collections.abc import Mapping

import numpy as np

from tests.hf_models import values_by_rule

TINY_T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
TINY_T5_1_1 = {**TINY_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
TINY_T5S = {
    "t5-1.0": TINY_T5,
    "t5-1.1": TINY_T5_1_1,
    "mt5": {
        **TINY_T5_1_1,
        "model_type": "mt5",
        "architectures": ["MT5ForConditionalGeneration"],
        "num_heads": 3,
        "d_kv": 16,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
    },
    "byt5": {**TINY_T5_1_1, "num_layers": 3, "num_decoder_layers": 1},
    "umt5": {
        **TINY_T5_1_1,
        "model_type": "umt5",
        "architectures": ["UMT5ForConditionalGeneration"],
    },
}


def t5_tensor_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a checkpoint, from the fields of its config.json."""
    d, f, v = config["d_model"], config["d_ff"], config["vocab_size"]
    e, h = config["num_heads"] * config["d_kv"], config["num_heads"]
    shapes = {"shared.weight": (v, d)}
    counts = {"encoder": config["num_layers"], "decoder": config["num_decoder_layers"]}
    for stack, count in counts.items():
        parts = ["SelfAttention"] + ["EncDecAttention"] * (stack == "decoder") + ["DenseReluDense"]
        for block, (place, part) in itertools.product(range(count), enumerate(parts)):
            layer = f"{stack}.block.{block}.layer.{place}."
            shapes[layer + "layer_norm.weight"] = (d,)
            if part == "DenseReluDense":
                gated = config["feed_forward_proj"].startswith("gated")
                for name in ("wi_0", "wi_1") if gated else ("wi",):
                    shapes[f"{layer}{part}.{name}.weight"] = (f, d)
                shapes[f"{layer}{part}.wo.weight"] = (d, f)
                continue
            shapes |= {f"{layer}{part}.{name}.weight": (e, d) for name in "qkv"}
            shapes[f"{layer}{part}.o.weight"] = (d, e)
            has_table = block == 0 or config["model_type"] == "umt5"
            if part == "SelfAttention" and has_table:
                table = (config["relative_attention_num_buckets"], h)
                shapes[f"{layer}{part}.relative_attention_bias.weight"] = table
        shapes[f"{stack}.final_layer_norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def t5_weights_by_rule(config: Mapping) -> dict[str, np.ndarray]:
    """Returns the same float32 weights everywhere; see `hf_models.values_by_rule`."""
    return values_by_rule(t5_tensor_shapes(config))


def t5_inputs(vocab_size: int) -> dict[str, list[list[int]]]:
    """The same ids everywhere: two inputs, the longer one farther than any bucket, the other padded, and targets."""
    rows, lengths, length, targets = 2, (150, 9), 150, 40
    inputs = [
        [
            (17 * place * place + 5 * place + 3 + 11 * row) % (vocab_size - 1) + 1
            if place < lengths[row]
            else 0
            for place in range(length)
        ]
        for row in range(rows)
    ]
    outputs = [
        [0] + [(13 * place * place + 7 * place + row) % vocab_size for place in range(targets - 1)]
        for row in range(rows)
    ]
    return {"encoder_input_tokens": inputs, "decoder_input_tokens": outputs}
