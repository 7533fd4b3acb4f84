"""Where each parameter of a decoder is in a Hugging Face checkpoint, and how a tree of them, or of
any other model's, is filled from a checkpoint.

Axis letters: L layers, D residual width, F MLP width, V vocabulary; a Hugging Face matrix is (out,
in), ours (in, out).

A leaf's memory is taken once, in its final type, filled a few rows at a time and handed to JAX
before the next one is begun, the largest first: a load needs little more host memory than the model
itself.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import numpy as np

from sira_jax.checkpoints.leaf import Layout, Leaf, Path
from sira_jax.checkpoints.safetensors import TensorSource, row_chunks
from sira_jax.checkpoints.t5_layout import t5_layout
from sira_jax.errors import ModelFileError
from sira_jax.models import DecoderConfig, EncoderDecoderConfig, ModelConfig
from sira_jax.quantized import quantize

ShardingFn = Callable[[Path, tuple[int, ...]], jax.sharding.Sharding | None]
LayoutFn = Callable[[ModelConfig], Layout]
_ALIGNMENT = 64  # JAX on CPU takes over a buffer without a copy when it is aligned so
_LISTED = 8  # tensors named in one message


def leaves(config: ModelConfig) -> list[Leaf]:
    """Returns every leaf of a model's parameters, in the order of a Hugging Face checkpoint."""
    return hf_layout(config).leaves


def hf_layout(config: ModelConfig) -> Layout:
    """Returns what a Hugging Face checkpoint of a model holds."""
    return _HF_LAYOUTS[type(config)](config)


def _decoder_layout(config: DecoderConfig) -> Layout:
    """`rotary_emb.inv_freq` buffers of old checkpoints are passed over, and so is an `lm_head.weight`
    beside tied embeddings.
    """
    optional = {}
    if config.tie_embeddings:
        optional["lm_head.weight"] = (config.vocab_size, config.emb_dim)
    return Layout(_decoder_leaves(config), optional, ignored_suffix="rotary_emb.inv_freq")


def _decoder_leaves(config: DecoderConfig) -> list[Leaf]:
    d, f = config.emb_dim, config.mlp_dim
    q = config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    block = [
        (("input_norm", "scale"), (d,), "input_layernorm.weight"),
        (("attention", "q", "kernel"), (d, q), "self_attn.q_proj.weight"),
        (("attention", "k", "kernel"), (d, kv), "self_attn.k_proj.weight"),
        (("attention", "v", "kernel"), (d, kv), "self_attn.v_proj.weight"),
        (("attention", "o", "kernel"), (q, d), "self_attn.o_proj.weight"),
        (("mlp", "gate", "kernel"), (d, f), "mlp.gate_proj.weight"),
        (("mlp", "up", "kernel"), (d, f), "mlp.up_proj.weight"),
        (("mlp", "down", "kernel"), (f, d), "mlp.down_proj.weight"),
    ]
    if config.sandwich_norms:
        # What other families call post_attention is the norm before the MLP.
        block += [
            (("post_attention_norm", "scale"), (d,), "post_attention_layernorm.weight"),
            (("mlp_norm", "scale"), (d,), "pre_feedforward_layernorm.weight"),
            (("post_mlp_norm", "scale"), (d,), "post_feedforward_layernorm.weight"),
        ]
    else:
        block += [(("mlp_norm", "scale"), (d,), "post_attention_layernorm.weight")]
    if config.qk_norm:
        block += [
            (("attention", "q_norm", "scale"), (config.head_dim,), "self_attn.q_norm.weight"),
            (("attention", "k_norm", "scale"), (config.head_dim,), "self_attn.k_norm.weight"),
        ]
    if config.qkv_bias:
        block += [
            (("attention", "q", "bias"), (q,), "self_attn.q_proj.bias"),
            (("attention", "k", "bias"), (kv,), "self_attn.k_proj.bias"),
            (("attention", "v", "bias"), (kv,), "self_attn.v_proj.bias"),
        ]

    def single(path: Path, shape: tuple[int, ...], name: str, transposed: bool = False) -> Leaf:
        return Leaf(path, shape, (name,), stacked=False, transposed=transposed)

    table = [
        single(("token_embedder", "embedding"), (config.vocab_size, d), "model.embed_tokens.weight")
    ]
    layers = range(config.num_layers)
    if config.scan_layers:
        for path, shape, name in block:
            names = tuple(f"model.layers.{layer}.{name}" for layer in layers)
            stacked_shape = (config.num_layers, *shape)
            table.append(
                Leaf(
                    ("layers", *path),
                    stacked_shape,
                    names,
                    stacked=True,
                    transposed=path[-1] == "kernel",
                )
            )
    else:
        table += [
            single(
                (f"layers_{layer}", *path),
                shape,
                f"model.layers.{layer}.{name}",
                path[-1] == "kernel",
            )
            for layer in layers
            for path, shape, name in block
        ]
    table.append(single(("final_norm", "scale"), (d,), "model.norm.weight"))
    if not config.tie_embeddings:
        table.append(
            single(("lm_head", "kernel"), (d, config.vocab_size), "lm_head.weight", transposed=True)
        )
    return table


_HF_LAYOUTS: Mapping[type, Callable[..., Layout]] = MappingProxyType(
    {DecoderConfig: _decoder_layout, EncoderDecoderConfig: t5_layout}
)


def check_tensors(
    source: TensorSource, config: ModelConfig, layout_of: LayoutFn = hf_layout
) -> None:
    """Raises ModelFileError, in one message, if a tensor is missing, unexpected or of another
    shape.
    """
    num_layers = sum(stack.num_layers for stack in config.stacks)
    if num_layers > len(source.shapes):  # also keeps absurd counts from being listed
        raise ModelFileError(
            f"{source.path}: {len(source.shapes)} tensors cannot make {num_layers} layers"
        )
    layout = layout_of(config).stored_in(source.shapes)
    expected = {name: leaf.tensor_shape for leaf in layout.leaves for name in leaf.names}
    ignored = layout.ignored_suffix
    found = {
        name: tuple(shape)
        for name, shape in source.shapes.items()
        if not (ignored and name.endswith(ignored))
    }
    problems = differences(expected, found, layout.optional, source.stored_name)
    if problems:
        raise ModelFileError(f"{source.path}: {problems}")


def differences(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    shown: Callable[[str], str] = str,
    most: int = _LISTED,
) -> str:
    """Names the tensors that are missing, unexpected or of another shape; empty if there are none.

    Args:
      expected: name -> shape of those that must be there.
      found: the same of those that are.
      optional: of those that may be there.
      shown: what a tensor is called in the message.
      most: tensors of each kind that are named; the rest are counted.
    """
    allowed = {**expected, **optional}
    kinds = {
        "missing tensors": [shown(name) for name in expected if name not in found],
        "unexpected tensors": [shown(name) for name in found if name not in allowed],
        "tensors of another shape": [
            f"{shown(name)} is {tuple(found[name])}, expected {shape}"
            for name, shape in allowed.items()
            if name in found and tuple(found[name]) != shape
        ],
    }
    return "; ".join(f"{what}: {listed(names, most)}" for what, names in kinds.items() if names)


def listed(names: list[str], most: int = _LISTED) -> str:
    """The first `most` names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def load_params(
    source: TensorSource,
    config: ModelConfig,
    sharding_fn: ShardingFn | None = None,
    layout_of: LayoutFn = hf_layout,
    quantization: str = "none",
) -> dict:
    """Returns a model's parameter tree, read from `source`.

    Args:
      source: the checkpoint's tensors.
      config: what the tensors must fit; `param_dtype` and `scan_layers` give the leaves' type and
        layout.
      sharding_fn: (path, shape) -> the leaf's sharding, or None for an array on the default device.
        Every process reads only the rows that its own devices hold.
      layout_of: config -> what `source` holds.
      quantization: how the projections' matrices are held, see `quantized`; each is converted before the next is read.

    Raises:
      ModelFileError: before anything is read if the tensors do not fit, else if a file turns out to
        be truncated.
    """
    check_tensors(source, config, layout_of)
    dtype = jax.numpy.dtype(config.param_dtype)
    params: dict = {}
    table = layout_of(config).stored_in(source.shapes).leaves
    # Largest first: while JAX takes a leaf over, two copies of that leaf may exist; at the start
    # there is room for it.
    for leaf in sorted(table, key=lambda leaf: -leaf.size):
        sharding = sharding_fn(leaf.path, leaf.shape) if sharding_fn else None
        *parents, last = leaf.path
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        array = _load_leaf(source, leaf, dtype, sharding).block_until_ready()
        node[last] = quantize(array, quantization if _is_projection(leaf.path) else "none")
    return params


def _is_projection(path: Path) -> bool:
    """Whether a leaf is the matrix of a projection in a block: what is most of a model, and what adapters sit on."""
    return path[-1] == "kernel" and any(name.startswith("layers") for name in path)


def _load_leaf(
    source: TensorSource, leaf: Leaf, dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    if sharding is None:
        (array,) = _read_blocks(source, leaf, dtype, [_bounds((), leaf.shape)]).values()
        return jax.device_put(array)
    index_map = sharding.addressable_devices_indices_map(leaf.shape)
    blocks = _read_blocks(
        source, leaf, dtype, [_bounds(index, leaf.shape) for index in index_map.values()]
    )
    return jax.make_array_from_callback(
        leaf.shape, sharding, lambda index: blocks[_bounds(index, leaf.shape)]
    )


Bounds = tuple[tuple[int, int], ...]  # (start, stop) along each axis


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    slices = (*index, *([slice(None)] * (len(shape) - len(index))))
    return tuple(item.indices(size)[:2] for item, size in zip(slices, shape, strict=True))


def _read_blocks(
    source: TensorSource, leaf: Leaf, dtype: np.dtype, wanted: list[Bounds]
) -> dict[Bounds, np.ndarray]:
    """Reads the wanted blocks of a leaf; each row of the checkpoint is read once, whatever the
    number of blocks.
    """
    blocks = {
        bounds: _aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
        for bounds in wanted
    }
    for layer, name in enumerate(leaf.names):
        parts = []  # (bounds, block) of this layer, both in the checkpoint's axis order
        for bounds, block in blocks.items():
            if leaf.stacked:
                (first, last), *bounds = bounds
                if not first <= layer < last:
                    continue
                block = block[layer - first]
            parts.append((bounds[::-1], block.T) if leaf.transposed else (tuple(bounds), block))
        parts = [(bounds, block) for bounds, block in parts if block.size]
        if not parts:
            continue
        start = min(bounds[0][0] for bounds, _ in parts)
        stop = max(bounds[0][1] for bounds, _ in parts)
        for row, rows in row_chunks(source, name, start, stop):
            for bounds, block in parts:
                _copy_overlap(row, rows, bounds, block)
    return blocks


def _copy_overlap(row: int, rows: np.ndarray, bounds: Bounds, block: np.ndarray) -> None:
    (first, last), *columns = bounds
    begin, end = max(row, first), min(row + len(rows), last)
    if begin < end:
        columns = tuple(slice(start, stop) for start, stop in columns)
        block[begin - first : end - first] = rows[(slice(begin - row, end - row), *columns)]


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + nbytes].view(dtype).reshape(shape)


def flatten(params: Mapping) -> dict[Path, object]:
    """Returns {path: leaf} of a nested mapping."""
    flat = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update({(key, *path): leaf for path, leaf in flatten(value).items()})
        else:
            flat[(key,)] = value
    return flat
