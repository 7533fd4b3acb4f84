"""The decoder in plain loops of float64, written from the papers' equations, without adapters.

It shares no code with `sira_jax`: heads, queries and keys are visited one by one.
"""

import math

import numpy as np


def rms_norm(x, scale, epsilon):
    """arXiv 1910.07467, over the last axis of one vector."""
    return x / math.sqrt(sum(v * v for v in x) / len(x) + epsilon) * scale


def cap(x, limit):
    """arXiv 2408.00118, section 2; no limit leaves x."""
    return x if limit is None else limit * math.tanh(x / limit)


def llama3_frequency(frequency, factor, low, high, original):
    """Llama 3.1's rule for one frequency, by cases of its wave length."""
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def frequency(index, width, theta, scaling):
    """The frequency of pair `index` of a head."""
    plain = theta ** (-2 * index / width)
    if scaling is None:
        return plain
    if not hasattr(scaling, "low_freq_factor"):
        return plain / scaling.factor
    return llama3_frequency(
        plain,
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_positions,
    )


def rotate(vector, position, theta, scaling=None):
    """arXiv 2104.09864 as a product of complex numbers: pair i is (i, i + P / 2)."""
    width = len(vector)
    out = np.zeros(width)
    for i in range(width // 2):
        turn = np.exp(1j * position * frequency(i, width, theta, scaling))
        value = complex(vector[i], vector[i + width // 2]) * turn
        out[i], out[i + width // 2] = value.real, value.imag
    return out


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    """arXiv 1606.08415, its approximation."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(x, params, activation="silu"):
    """SwiGLU or GeGLU, arXiv 2002.05202."""
    gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
    function = {"silu": silu, "gelu_tanh": gelu_tanh}[activation]
    return (function(x @ gate) * (x @ up)) @ down


def attention(x, params, config, segments, positions, windowed=False):
    """Causal attention of one row (T, D); padding (segment 0) gives zeros."""
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    theta, scaling = config.rope_theta, config.rope_scaling
    if windowed and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None

    def project(name, count):
        y = x @ params[name]["kernel"] + params[name].get("bias", 0.0)
        y = y.reshape(len(x), count, width)
        if config.qk_norm and name != "v":
            scale = config.norm_plus_one + params[f"{name}_norm"]["scale"]
            y = np.stack([[rms_norm(h, scale, config.norm_eps) for h in token] for token in y])
        return y

    q, k, v = project("q", heads), project("k", kv_heads), project("v", kv_heads)
    out = np.zeros((len(x), heads, width))
    for t in range(len(x)):
        if segments[t] == 0:
            continue
        keys = [s for s in range(t + 1) if segments[s] == segments[t]]
        if windowed:
            keys = [s for s in keys if positions[t] - positions[s] < config.sliding_window]
        for h in range(heads):
            shared = h // (heads // kv_heads)
            turned = rotate(q[t, h], positions[t], theta, scaling)
            scores = []
            for s in keys:
                key = rotate(k[s, shared], positions[s], theta, scaling)
                score = turned @ key / math.sqrt(config.query_pre_attn_scalar or width)
                scores.append(cap(score, config.attention_softcap))
            weights = [math.exp(score - max(scores)) for score in scores]
            for weight, s in zip(weights, keys, strict=True):
                out[t, h] += weight / sum(weights) * v[s, shared]
    return out.reshape(len(x), heads * width) @ params["o"]["kernel"]


def decoder(params, config, batch):
    """Logits (B, T, V) of layers kept apart (`layers_0`, ...); at padding they mean nothing."""
    params = _float64(params)
    tokens = batch["decoder_input_tokens"]
    embedding = params["token_embedder"]["embedding"]
    head = embedding.T if config.tie_embeddings else params["lm_head"]["kernel"]
    logits = np.zeros((*tokens.shape, config.vocab_size))

    def norm(x, params):
        scale = config.norm_plus_one + params["scale"]
        return np.stack([rms_norm(token, scale, config.norm_eps) for token in x])

    def after(x, block, name):
        return norm(x, block[name]) if config.sandwich_norms else x

    for row in range(len(tokens)):
        x = embedding[tokens[row]] * (math.sqrt(config.emb_dim) if config.scale_embeddings else 1)
        segments, positions = (
            batch[name][row] for name in ("decoder_segment_ids", "decoder_positions")
        )
        for layer in range(config.num_layers):
            block = params[f"layers_{layer}"]
            pattern = config.window_pattern
            windowed = config.sliding_window is not None and pattern[layer % len(pattern)]
            h = norm(x, block["input_norm"])
            h = attention(h, block["attention"], config, segments, positions, windowed)
            x = x + after(h, block, "post_attention_norm")
            h = mlp(norm(x, block["mlp_norm"]), block["mlp"], config.activation)
            x = x + after(h, block, "post_mlp_norm")
        out = norm(x, params["final_norm"]) @ head
        logits[row] = np.vectorize(lambda x: cap(x, config.final_softcap))(out)
    return logits


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)
