"""Writes T5X's checkpoint format from its description, without the code under test and without T5X."""

from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore
from flax import serialization, traverse_util


def t5x_shapes(config, scanned=False):
    """Path -> shape of every parameter of the minimal T5, or of the scalable one with relative positions in each block."""
    d, f, e = config.emb_dim, config.mlp_dim, config.num_heads * config.head_dim
    relpos = (config.num_heads, config.relpos_num_buckets)
    shapes = {("token_embedder", "embedding"): (config.vocab_size, d)}
    stacks = {
        "encoder": (config.num_encoder_layers, ("attention",)),
        "decoder": (config.num_decoder_layers, ("self_attention", "encoder_decoder_attention")),
    }
    norms = {
        "attention": "pre_attention_layer_norm",
        "self_attention": "pre_self_attention_layer_norm",
        "encoder_decoder_attention": "pre_cross_attention_layer_norm",
    }
    gated = len(config.mlp_activations) == 2
    for stack, (count, attentions) in stacks.items():
        block = {("pre_mlp_layer_norm", "scale"): (d,), ("mlp", "wo", "kernel"): (f, d)}
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            block["mlp", name, "kernel"] = (d, f)
        for attention in attentions:
            block[norms[attention], "scale"] = (d,)
            heads = (config.num_heads, config.head_dim) if scanned else (e,)
            for name in ("query", "key", "value"):
                block[attention, name, "kernel"] = (d, *heads)
            block[attention, "out", "kernel"] = (*heads, d)
        if scanned:
            block["relpos_bias", "rel_embedding"] = relpos
            for path, (first, *rest) in block.items():
                shapes[stack, stack, *path] = (first, count, *rest)
        else:
            shapes[stack, "relpos_bias", "rel_embedding"] = relpos
            for layer in range(count):
                shapes |= {(stack, f"layers_{layer}", *path): own for path, own in block.items()}
        shapes[stack, f"{stack}_norm", "scale"] = (d,)
    if not config.tie_embeddings:
        shapes["decoder", "logits_dense", "kernel"] = (d, config.vocab_size)
    return shapes


def t5x_weights(config, scanned=False, dtype=np.float32, seed=0):
    """Path -> array, drawn anew."""
    rng = np.random.default_rng(seed)
    shapes = t5x_shapes(config, scanned)
    return {path: rng.normal(size=shape).astype(dtype) for path, shape in shapes.items()}


def write_checkpoint(folder: Path, weights, *, inline=(), driver="file", version=3) -> Path:
    """Writes a checkpoint's folder: parameters in zarr folders but for the `inline` ones, and a piece of optimizer state."""
    folder.mkdir(parents=True)
    target = {}
    for path, array in weights.items():
        if path in inline:
            target[path] = array
            continue
        name = "target." + ".".join(path)
        metadata = {
            "shape": list(array.shape),
            "chunks": [max(1, size // 2) for size in array.shape],
            "compressor": {"id": "gzip", "level": 1},
        }
        dtype = "bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.name
        store = tensorstore.open(
            {
                "driver": "zarr",
                "dtype": dtype,
                "kvstore": {"driver": "file", "path": str(folder / name)},
                "metadata": metadata,
            },
            create=True,
        ).result()
        store.write(array).result()
        target[path] = {
            "driver": "zarr",
            "dtype": dtype,
            "kvstore": {"driver": driver, "path": f"{name}/"}
            | ({"bucket": "t5x-dummy-bucket"} if driver == "gcs" else {}),
            "metadata": metadata,
        }
    content = {
        "version": version,
        "optimizer": {
            "target": traverse_util.unflatten_dict(target),
            "state": {"step": np.int32(7), "param_states": {"token_embedder": {"v": np.ones(3)}}},
        },
    }
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    return folder
