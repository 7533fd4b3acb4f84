"""Small base models of each format, and reading them as the scripts do."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from gguf import GGMLQuantizationType as Kind

import tasks
from scripts import assemble
from sira_jax.checkpoints import load_base_model, read_base_model, t5x
from sira_jax.checkpoints.gguf_header import read_header
from sira_jax.models import ModelConfig, make_model
from sira_jax.training.train_state import abstract_params
from tasks.download import cache_root
from tests import make_stories260k as make_stories
from tests.checkpoints import spiece, t5x_files
from tests.fuzz import tokenizer_files
from tests.gguf_models import tokenizer_fields, write_gguf
from tests.hf_models import (
    LLAMA3_ROPE,
    TINY_GEMMA2,
    TINY_GEMMA3,
    TINY_LLAMA,
    TINY_QWEN2,
    weights_by_rule,
    write_folder,
)
from tests.hf_t5_models import TINY_T5, TINY_T5S, t5_weights_by_rule
from tests.tiny_t5 import t5_config

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 12, "vocab_size": 16}


def check_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
    """Asserts that parameters have the shapes that the model itself would make."""
    found = jax.tree.map(lambda x: tuple(x.shape), params)
    assert found == _model_shapes(config), "parameters do not have the shapes of the config"


@functools.lru_cache(maxsize=256)
def _model_shapes(config: ModelConfig) -> Any:
    shapes = nn.unbox(abstract_params(make_model(config)))
    return jax.tree.map(lambda x: tuple(x.shape), shapes)


def use_tokenizer(model: Any) -> None:
    """Encodes and decodes as training and generation do, where the model has a tokenizer; ids must be whole numbers."""
    special = model.special
    for index in (special.bos_id, special.pad_id, *special.eos_ids):
        assert index is None or (type(index) is int and 0 <= index < model.config.vocab_size), (
            special
        )
    if model.tokenizer_json is None:  # it is asked for only where it is needed
        assert model.source in model.tokenizer_error
        return
    vocabulary = assemble._make_vocabulary("model", model)
    vocabulary.decode(vocabulary.encode(tokenizer_files.TEXT))
    if model.chat_template is not None:
        template = tasks.make_template(
            "chat", chat_template=model.chat_template, origin=model.source
        )
        template.render("x")


def load_model(path: Path, **options: Any) -> None:
    described = read_base_model(path)
    model = load_base_model(path, **options)
    assert model.config == described.config
    check_params(model.config, model.params)
    use_tokenizer(model)


# Hugging Face folders.


def make_llama(folder: Path) -> None:
    shape = {**TINY_LLAMA, **SMALL, "vocab_size": 272, "rope_scaling": LLAMA3_ROPE}
    write_folder(folder, shape, weights_by_rule(shape))
    (folder / "tokenizer.json").write_text(tokenizer_files.bpe_tokenizer())
    template = "{% for m in messages %}{{ bos_token }}{{ m['content'] | trim }}{% endfor %}"
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(ids))


def make_sharded(folder: Path) -> None:
    shape = {**TINY_QWEN2, **SMALL, "use_sliding_window": True, "max_window_layers": 1}
    write_folder(folder, shape, weights_by_rule(shape), num_shards=2)


def make_gemma3(folder: Path) -> None:
    shape = {**TINY_GEMMA3, **SMALL, "layer_types": ["sliding_attention", "full_attention"]}
    weights = {f"language_model.{name}": array for name, array in weights_by_rule(shape).items()}
    write_folder(folder, {"model_type": "gemma3", "text_config": shape}, weights)


def make_t5(folder: Path) -> None:
    shape = {
        **TINY_T5,
        "d_model": 8,
        "d_ff": 12,
        "d_kv": 4,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "vocab_size": 256,
    }
    write_folder(folder, shape, t5_weights_by_rule(shape))
    (folder / "spiece.model").write_bytes(spiece.train())
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 100}))


def make_umt5(folder: Path) -> None:
    shape = {**TINY_T5S["umt5"], "d_model": 8, "d_ff": 12, "d_kv": 4, "vocab_size": 384}
    write_folder(folder, shape, t5_weights_by_rule(shape), num_shards=3)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))


# GGUF files.


def make_gguf(folder: Path) -> None:
    shape = {**TINY_LLAMA, **SMALL, "vocab_size": 272}
    write_gguf(
        folder / "m.gguf", shape, weights_by_rule(shape), metadata=tokenizer_fields("smollm")
    )


def make_gguf_gemma(folder: Path) -> None:
    shape = {**TINY_GEMMA2, **SMALL, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 32}
    kinds = {
        "mlp.gate": Kind.Q8_0,
        "mlp.down": Kind.Q4_0,
        "v_proj": Kind.Q4_1,
        "embed": Kind.F16,
        "mlp.up": Kind.BF16,
    }
    write_gguf(
        folder / "m.gguf",
        shape,
        weights_by_rule(shape),
        kinds=kinds,
        metadata=tokenizer_files.spm_fields(),
    )


def make_gguf_rope(folder: Path) -> None:
    """Few fields, so that each has its turn."""
    shape = {**TINY_LLAMA, **SMALL, "tie_word_embeddings": True}
    extra = {"rope_freqs.weight": np.ones(1, np.float32)}
    write_gguf(
        folder / "m.gguf",
        shape,
        weights_by_rule(shape),
        extra=extra,
        metadata={
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 2.0,
            "llama.rope.scaling.original_context_length": 64,
            "llama.rope.dimension_count": 2,
            "llama.expert_count": 0,
            "general.alignment": 32,
        },
    )


def load_gguf(folder: Path) -> None:
    load_model(folder / "m.gguf", cache_dir=str(folder.parent / "cache"))


# Checkpoints of T5X.

T5X_CONFIG = t5_config(
    emb_dim=4, vocab_size=130, num_encoder_layers=1, num_decoder_layers=2, scan_layers=False
)
T5X_SCANNED = dataclasses.replace(T5X_CONFIG, scan_layers=True, relpos_per_layer=True)


def make_t5x(folder: Path) -> None:
    weights = t5x_files.t5x_weights(T5X_CONFIG)
    inline = {path for path in weights if "scale" in path or "value" in path}
    t5x_files.write_checkpoint(folder / "checkpoint_7", weights, inline=inline)
    (folder / "spiece.model").write_bytes(spiece.train())


def make_t5x_scanned(folder: Path) -> None:
    weights = t5x_files.t5x_weights(T5X_SCANNED, scanned=True)
    inline = {path for path in weights if "mlp" not in path}
    t5x_files.write_checkpoint(folder / "checkpoint_7", weights, inline=inline)
    (folder / "spiece.model").write_bytes(spiece.train())


def load_t5x(folder: Path) -> None:
    config = T5X_SCANNED if folder.name == "scanned" else T5X_CONFIG
    model = t5x.load_t5x(folder, config, spiece=folder / "spiece.model")
    check_params(config, model.params)
    use_tokenizer(model)


# True files, where they are.


def make_stories260k(folder: Path) -> None:
    make_stories.write(folder)


def make_smollm2(folder: Path) -> None:
    """The header alone; `load_smollm2` makes the file as long as it was."""
    header = read_header(smollm2_path())
    start = min(tensor.offset for tensor in header.tensors.values())
    with open(smollm2_path(), "rb") as file:
        (folder / "m.gguf").write_bytes(file.read(start))


def smollm2_path() -> str:
    return str(cache_root() / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf")


def load_smollm2(folder: Path) -> None:
    path = folder / "m.gguf"
    if path.is_file() and not path.is_symlink():
        os.truncate(path, os.path.getsize(smollm2_path()))  # zeros, which take no room
    use_tokenizer(read_base_model(path))
