"""T5 in plain loops of float64, written from arXiv 1910.10683 and 2002.05202, without adapters.

It shares no code with `sira_jax`: heads, queries and keys are visited one by one, and relative positions are differences of
positions.
"""

import math

import numpy as np

from tests.models.reference import rms_norm


def bucket(offset, num_buckets, max_distance, bidirectional):
    """The bucket of key position - query position, by the published rule."""
    base = 0
    if bidirectional:
        num_buckets //= 2
        base = num_buckets if offset > 0 else 0
        distance = abs(offset)
    else:
        distance = max(-offset, 0)
    exact = num_buckets // 2
    if distance < exact:
        return base + distance
    # The smallest nudge keeps quotients that are whole numbers from being rounded under them.
    ratio = math.log(distance / exact) / math.log(max_distance / exact)
    return base + min(num_buckets - 1, exact + math.floor(ratio * (num_buckets - exact) + 1e-9))


def activation(name, x):
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "silu":
        return x / (1 + np.exp(-x))
    assert name == "linear"
    return x


def mlp(x, params, config):
    names = ["wi"] if len(config.mlp_activations) == 1 else ["wi_0", "wi_1"]
    hidden = 1.0
    for name, kind in zip(names, config.mlp_activations, strict=True):
        hidden = hidden * activation(kind, x @ params[name]["kernel"])
    return hidden @ params["wo"]["kernel"]


def attention(x, source, params, config, sees, bias):
    """One row: x (T, D) attends to source (S, D); `sees(t, s)` is a bool and `bias(h, t, s)` a number."""
    heads, width = config.num_heads, config.head_dim
    q = (x @ params["query"]["kernel"]).reshape(len(x), heads, width)
    k = (source @ params["key"]["kernel"]).reshape(len(source), heads, width)
    v = (source @ params["value"]["kernel"]).reshape(len(source), heads, width)
    out = np.zeros((len(x), heads, width))
    for t in range(len(x)):
        keys = [s for s in range(len(source)) if sees(t, s)]
        for h in range(heads):
            scores = [q[t, h] @ k[s, h] + bias(h, t, s) for s in keys]
            weights = [math.exp(score - max(scores)) for score in scores]
            for weight, s in zip(weights, keys, strict=True):
                out[t, h] += weight / sum(weights) * v[s, h]
    return out.reshape(len(x), heads * width) @ params["out"]["kernel"]


def encoder_decoder(params, config, batch):
    """Logits (B, T, V) of layers kept apart (`layers_0`, ...); at padding they mean nothing."""
    params = _float64(params)
    embedding = params["token_embedder"]["embedding"]
    rows = []
    for row in range(len(batch["decoder_input_tokens"])):
        one = {name: values[row] for name, values in batch.items()}
        encoded = _encode(params["encoder"], config, one, embedding)
        x = _decode(params["decoder"], config, one, embedding, encoded)
        if config.tie_embeddings:
            rows.append(x / math.sqrt(config.emb_dim) @ embedding.T)
        else:
            rows.append(x @ params["decoder"]["logits_dense"]["kernel"])
    return np.stack(rows)


def _norm(x, params, config):
    return np.stack([rms_norm(token, params["scale"], config.norm_eps) for token in x])


def _bias(stack, block, config, positions, bidirectional):
    table = (block if config.relpos_per_layer else stack)["relpos_bias"]["rel_embedding"]

    def value(h, t, s):
        offset = positions[s] - positions[t]
        return table[
            h, bucket(offset, config.relpos_num_buckets, config.relpos_max_distance, bidirectional)
        ]

    return value


def _encode(stack, config, row, embedding):
    x = embedding[row["encoder_input_tokens"]]
    segments = row["encoder_segment_ids"]
    for layer in range(config.num_encoder_layers):
        block = stack[f"layers_{layer}"]
        bias = _bias(stack, block, config, row["encoder_positions"], True)
        h = _norm(x, block["pre_attention_layer_norm"], config)
        x = x + attention(
            h,
            h,
            block["attention"],
            config,
            lambda t, s: segments[t] > 0 and segments[t] == segments[s],
            bias,
        )
        x = x + mlp(_norm(x, block["pre_mlp_layer_norm"], config), block["mlp"], config)
    return _norm(x, stack["encoder_norm"], config)


def _decode(stack, config, row, embedding, encoded):
    x = embedding[row["decoder_input_tokens"]]
    segments, theirs = row["decoder_segment_ids"], row["encoder_segment_ids"]
    for layer in range(config.num_decoder_layers):
        block = stack[f"layers_{layer}"]
        bias = _bias(stack, block, config, row["decoder_positions"], False)
        h = _norm(x, block["pre_self_attention_layer_norm"], config)
        x = x + attention(
            h,
            h,
            block["self_attention"],
            config,
            lambda t, s: s <= t and segments[t] > 0 and segments[t] == segments[s],
            bias,
        )
        x = x + attention(
            _norm(x, block["pre_cross_attention_layer_norm"], config),
            encoded,
            block["encoder_decoder_attention"],
            config,
            lambda t, s: segments[t] > 0 and segments[t] == theirs[s],
            lambda h, t, s: 0.0,
        )
        x = x + mlp(_norm(x, block["pre_mlp_layer_norm"], config), block["mlp"], config)
    return _norm(x, stack["decoder_norm"], config)


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)
