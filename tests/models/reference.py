"""The decoder in plain loops of float64, written from the papers' equations, without adapters.

It shares no code with `sira_jax`: heads, queries and keys are visited one by one.
"""

import math

import numpy as np


def rms_norm(x, scale, epsilon):
    """arXiv 1910.07467, over the last axis of one vector."""
    return x / math.sqrt(sum(v * v for v in x) / len(x) + epsilon) * scale


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


def mlp(x, params):
    """SwiGLU, arXiv 2002.05202."""
    gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
    return (silu(x @ gate) * (x @ up)) @ down


def attention(x, params, config, segments, positions):
    """Causal attention of one row (T, D); padding (segment 0) gives zeros."""
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim

    def project(name, count):
        y = x @ params[name]["kernel"] + params[name].get("bias", 0.0)
        return y.reshape(len(x), count, width)

    q, k, v = project("q", heads), project("k", kv_heads), project("v", kv_heads)
    out = np.zeros((len(x), heads, width))
    for t in range(len(x)):
        if segments[t] == 0:
            continue
        keys = [s for s in range(t + 1) if segments[s] == segments[t]]
        for h in range(heads):
            shared = h // (heads // kv_heads)
            turned = rotate(q[t, h], positions[t], config.rope_theta, config.rope_scaling)
            scores = []
            for s in keys:
                key = rotate(k[s, shared], positions[s], config.rope_theta, config.rope_scaling)
                scores.append(turned @ key / math.sqrt(width))
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

    def norm(x, scale):
        return np.stack([rms_norm(token, scale, config.norm_eps) for token in x])

    for row in range(len(tokens)):
        x = embedding[tokens[row]]
        segments, positions = (
            batch[name][row] for name in ("decoder_segment_ids", "decoder_positions")
        )
        for layer in range(config.num_layers):
            block = params[f"layers_{layer}"]
            h = norm(x, block["input_norm"]["scale"])
            x = x + attention(h, block["attention"], config, segments, positions)
            x = x + mlp(norm(x, block["mlp_norm"]["scale"]), block["mlp"])
        logits[row] = norm(x, params["final_norm"]["scale"]) @ head
    return logits


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)
