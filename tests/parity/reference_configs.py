"""The small models that are compared with transformers, as fields of config.json."""

from tests.hf_models import TINY_LLAMA, TINY_QWEN2

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
}


def token_ids(vocab_size: int) -> list[int]:
    """The same ids everywhere: a linear congruential sequence."""
    return [(17 * place * place + 5 * place + 3) % vocab_size for place in range(NUM_TOKENS)]
