"""Our adapter folders of encoder-decoders; see test_adapter_file.py for what all folders have in common."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from sira_jax.adapters import LoRAConfig, SiRAConfig
from sira_jax.checkpoints.adapter_file import (
    abstract_adapter,
    load_adapter,
    read_header,
    save_adapter,
)
from sira_jax.errors import CheckpointError
from tests.hf_models import assert_same_params
from tests.tiny import decoder_config, draw
from tests.tiny_t5 import layers_apart, t5_config

BASE = "0123456789abcdef" * 4
LORA = LoRAConfig(rank=2, targets=("encoder/attention/query", "decoder/mlp/wo"))
SIRA = SiRAConfig(
    rank=2, num_experts=3, num_selected_experts=2, targets=("encoder/.*", "decoder/.*")
)


def in_layout(tree, scan_layers):
    return tree if scan_layers else layers_apart(tree, t5_config())


@pytest.mark.parametrize("loaded_scanned", [True, False])
@pytest.mark.parametrize("saved_scanned", [True, False])
@pytest.mark.parametrize("config", [LORA, SIRA], ids=["lora", "sira"])
def test_adapters_come_back_in_either_layout(tmp_path, config, saved_scanned, loaded_scanned):
    tree = draw(abstract_adapter(config, t5_config()), seed=3)
    saved = t5_config(scan_layers=saved_scanned)
    save_adapter(tmp_path, config, in_layout(tree, saved_scanned), saved, BASE)
    found, loaded = load_adapter(tmp_path, t5_config(scan_layers=loaded_scanned), BASE)
    assert found == config
    assert_same_params(loaded, in_layout(tree, loaded_scanned))


@pytest.fixture
def folder(tmp_path):
    tree = draw(abstract_adapter(LORA, t5_config()), seed=3)
    save_adapter(tmp_path, LORA, tree, t5_config(), BASE)
    return tmp_path


def test_tensors_are_named_by_stack_and_layer(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    paths = [("encoder", layer, "attention.query") for layer in range(3)]
    paths += [("decoder", layer, "mlp.wo") for layer in range(2)]
    assert tensors.keys() == {
        f"{stack}.layers.{layer}.{projection}.{leaf}"
        for stack, layer, projection in paths
        for leaf in ("lora_a", "lora_b")
    }
    tree = draw(abstract_adapter(LORA, t5_config()), seed=3)
    leaf = tree["decoder"]["layers"]["mlp"]["wo"]["adapter"]["lora_a"]
    np.testing.assert_array_equal(tensors["decoder.layers.1.mlp.wo.lora_a"], leaf[1])
    assert read_header(folder).sizes == {
        "num_encoder_layers": 3,
        "num_decoder_layers": 2,
        "emb_dim": 8,
        "num_heads": 3,
        "head_dim": 4,
        "mlp_dim": 12,
    }


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (t5_config(num_decoder_layers=3), "base.num_decoder_layers=2, but the loaded base has 3"),
        (decoder_config(), "base.num_encoder_layers=3, but the loaded base has None"),
    ],
)
def test_another_base_is_refused(folder, base, message):
    with pytest.raises(CheckpointError, match=message):
        load_adapter(folder, base, BASE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "unknown field base.num_kv_heads=3"),
        ({"head_dim": None}, "field base.head_dim is missing"),
        ({"num_decoder_layers": 0}, "base.num_decoder_layers=0 is not allowed"),
    ],
)
def test_a_base_that_is_wrongly_described_is_refused(folder, change, message):
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    base = content["base"] | change
    content["base"] = {name: value for name, value in base.items() if value is not None}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read_header(folder)
