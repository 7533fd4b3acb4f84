"""The small models that are compared with transformers, as fields of config.json."""

from tests.hf_models import TINY_GEMMA2, TINY_GEMMA3, TINY_LLAMA, TINY_QWEN2, TINY_QWEN3

NUM_TOKENS = 48
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # shorter than the sequences: the scaling counts
}
CONFIGS = {
    "llama": TINY_LLAMA,
    "llama-tied-scaled": {
        **TINY_LLAMA,
        "tie_word_embeddings": True,
        "rope_theta": 500.0,
        "rope_scaling": LLAMA3_ROPE,
    },
    "mistral-wide-heads": {
        **TINY_LLAMA,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "head_dim": 12,
        "num_key_value_heads": 1,
        "sliding_window": None,
    },
    "qwen2": {**TINY_QWEN2, "rope_theta": 1000000.0},
    "mistral-window": {
        **TINY_LLAMA,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 6,
    },
    "qwen2-window": {
        **TINY_QWEN2,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": TINY_QWEN3,
    "gemma2": TINY_GEMMA2,
    "gemma3": TINY_GEMMA3,
    "gemma3-scaled": {
        **TINY_GEMMA3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": False,
    },
}


def token_ids(vocab_size: int) -> list[int]:
    """The same ids everywhere: a linear congruential sequence."""
    return [(17 * place * place + 5 * place + 3) % vocab_size for place in range(NUM_TOKENS)]
