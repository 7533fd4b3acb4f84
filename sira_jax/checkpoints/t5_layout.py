"""Where each parameter of an encoder-decoder is in a Hugging Face checkpoint of T5 and in one of T5X.

Axis letters: D residual width, E heads' width together, F MLP width, H heads, N buckets, V vocabulary; a Hugging Face matrix is
(out, in), ours and T5X's (in, out).
"""

from collections.abc import Iterator

from sira_jax.checkpoints.leaf import Layout, Leaf, Path
from sira_jax.models.encoder_decoder_config import EncoderDecoderConfig

# Our names of a block's parts, in order, and what Hugging Face calls them beside their place in the order.
_PARTS = {
    "encoder": (
        ("attention", "pre_attention_layer_norm", "SelfAttention"),
        ("mlp", "pre_mlp_layer_norm", "DenseReluDense"),
    ),
    "decoder": (
        ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
        ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
        ("mlp", "pre_mlp_layer_norm", "DenseReluDense"),
    ),
}
_EMBEDDING, _LOGITS = "shared.weight", "lm_head.weight"
_HEADS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_RELPOS = ("relpos_bias", "rel_embedding")
_RELPOS_NAME = "layer.0.SelfAttention.relative_attention_bias.weight"
# Matrices: Hugging Face has their axes the other way round.
_TRANSPOSED = ("kernel", "rel_embedding")


def t5_layout(config: EncoderDecoderConfig) -> Layout:
    """What a Hugging Face checkpoint holds.

    The embedding may be there under any of its names, further copies of it are passed over, and logits without a matrix of
    their own have the embedding's. Passed over is as well a table of relative positions that old checkpoints have, and no
    model uses, in the attention to the encoder.
    """
    table = (config.vocab_size, config.emb_dim)
    optional = {f"{stack}.embed_tokens.weight": table for stack in _PARTS}
    optional[_EMBEDDING] = table
    if config.tie_embeddings:
        optional[_LOGITS] = table
    names = tuple(optional)
    aliases = {_EMBEDDING: names, _LOGITS: names}
    optional["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = (
        config.relpos_num_buckets,
        config.num_heads,
    )
    return Layout(list(_leaves(config)), optional, aliases)


def t5x_layout(config: EncoderDecoderConfig) -> Layout:
    """What a T5X checkpoint holds, its layers taken apart: our own names and axes ("encoder/layers_0/mlp/wo/kernel")."""
    leaves = []
    for leaf in _leaves(config):
        names = ["/".join(leaf.path)]
        if leaf.stacked:
            stack, _, *inner = leaf.path
            names = ["/".join((stack, f"layers_{n}", *inner)) for n in range(leaf.shape[0])]
        leaves.append(Leaf(leaf.path, leaf.shape, tuple(names), leaf.stacked, transposed=False))
    return Layout(leaves)


def _leaves(config: EncoderDecoderConfig) -> Iterator[Leaf]:
    d = config.emb_dim
    yield _single(("token_embedder", "embedding"), (config.vocab_size, d), _EMBEDDING)
    for stack in config.stacks:
        (name,) = stack.prefix
        yield from _stack_leaves(config, name, stack.num_layers)
    if not config.tie_embeddings:
        path = ("decoder", "logits_dense", "kernel")
        yield _single(path, (d, config.vocab_size), _LOGITS)


def _stack_leaves(config: EncoderDecoderConfig, stack: str, num_layers: int) -> Iterator[Leaf]:
    block = list(_block_leaves(config, stack))
    relpos = (_RELPOS, (config.num_heads, config.relpos_num_buckets), _RELPOS_NAME)
    if config.relpos_per_layer:
        block.append(relpos)
    else:
        yield _single((stack, *_RELPOS), relpos[1], f"{stack}.block.0.{_RELPOS_NAME}")
    if config.scan_layers:
        for path, shape, name in block:
            names = tuple(f"{stack}.block.{layer}.{name}" for layer in range(num_layers))
            transposed = path[-1] in _TRANSPOSED
            yield Leaf((stack, "layers", *path), (num_layers, *shape), names, True, transposed)
    else:
        for layer in range(num_layers):
            for path, shape, name in block:
                place = (stack, f"layers_{layer}", *path)
                yield _single(place, shape, f"{stack}.block.{layer}.{name}")
    norm = (stack, f"{stack}_norm", "scale")
    yield _single(norm, (config.emb_dim,), f"{stack}.final_layer_norm.weight")


def _block_leaves(config: EncoderDecoderConfig, stack: str) -> Iterator[tuple[Path, tuple, str]]:
    """(path in the block, shape, name in the block) of each leaf but the relative positions."""
    d, f, e = config.emb_dim, config.mlp_dim, config.num_heads * config.head_dim
    for place, (part, norm, their_part) in enumerate(_PARTS[stack]):
        yield (norm, "scale"), (d,), f"layer.{place}.layer_norm.weight"
        if part == "mlp":
            matrices = {name: (name, (d, f)) for name in config.mlp_inputs} | {"wo": ("wo", (f, d))}
        else:
            matrices = {
                name: (theirs, (e, d) if name == "out" else (d, e))
                for name, theirs in _HEADS.items()
            }
        for name, (theirs, shape) in matrices.items():
            yield (part, name, "kernel"), shape, f"layer.{place}.{their_part}.{theirs}.weight"


def _single(path: Path, shape: tuple[int, ...], name: str) -> Leaf:
    return Leaf(path, shape, (name,), stacked=False, transposed=path[-1] in _TRANSPOSED)
