"""The fields of DecoderConfig that tell families apart, on the sizes of `tests.tiny`: windows shorter than the examples."""

from sira_jax.models.rope import LinearRopeScaling

QWEN3 = {"num_layers": 3, "head_dim": 6, "qk_norm": True, "tie_embeddings": False}
MISTRAL = {"num_layers": 3, "sliding_window": 2}
GEMMA2 = {
    "num_layers": 3,
    "head_dim": 6,
    "activation": "gelu_tanh",
    "norm_plus_one": True,
    "sandwich_norms": True,
    "scale_embeddings": True,
    "query_pre_attn_scalar": 10.0,
    "attention_softcap": 1.5,
    "final_softcap": 4.0,
    "sliding_window": 3,
    "window_pattern": (True, False),
}
GEMMA3 = {
    **{name: value for name, value in GEMMA2.items() if not name.endswith("softcap")},
    "qk_norm": True,
    "window_pattern": (True, True, False),
    "rope_theta": 1000.0,
    "rope_scaling": LinearRopeScaling(factor=8.0),
    "local_rope_theta": 20.0,
}
# All fields at once, which no published family has.
ALL = {**GEMMA3, "attention_softcap": 1.5, "final_softcap": 4.0, "window_pattern": (True, False)}
FAMILIES = {"qwen3": QWEN3, "mistral": MISTRAL, "gemma2": GEMMA2, "gemma3": GEMMA3, "all": ALL}
