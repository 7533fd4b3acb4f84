"""Adapters against PEFT itself, in both directions (`make parity-setup`)."""

import itertools

import jax
import numpy as np
import pytest

from sira_jax.adapters import METHODS, make_config
from sira_jax.checkpoints import load_base_model
from sira_jax.checkpoints.adapter_file import abstract_adapter
from sira_jax.checkpoints.peft import can_export, load_peft, save_peft
from sira_jax.models import Decoder
from sira_jax.training.train_state import merge_params
from tests.hf_models import FAMILIES, TINY_LLAMA, TINY_QWEN2, weights_by_rule, write_folder
from tests.tiny import draw

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    # PEFT warns where an adapter lacks a tensor, or its config has a field that it does not know.
    pytest.mark.filterwarnings("error:Found missing adapter keys", "error:Unexpected keyword"),
]

MODELS = {"llama": TINY_LLAMA, "qwen2": TINY_QWEN2}
# Whose names and shapes alone are others: one method with a bare pair and one that reads the base.
OTHER_MODELS = ("qwen3", "gemma2", "gemma3")
TOLERANCE = {"rtol": 0, "atol": 1e-4}
OVERRIDDEN = {
    "rank": 2,
    "alpha": 3.0,
    "targets": ["q", "k", "o", "gate", "down"],
    "overrides": {"down": {"rank": 3}, "mlp/gate": {"alpha": 0.7}, "k": {"rank": 1, "alpha": 2.0}},
}
EXPORTED = {
    "lora": OVERRIDDEN,
    "lora on all": {"method": "lora"},
    "dora": OVERRIDDEN,
    "melora": OVERRIDDEN | {"num_blocks": 2},
    "multilora": OVERRIDDEN | {"num_branches": 2},
    "adamix": {"num_experts": 3},
    "dynamic_dora": {"rank": 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> Hugging Face folder of the small model."""
    root = tmp_path_factory.mktemp("bases")
    return {
        name: write_folder(root / name, config, weights_by_rule(config))
        for name, config in FAMILIES.items()
    }


def token_ids():
    return np.random.default_rng(0).integers(0, TINY_LLAMA["vocab_size"], (2, 24))


def ours(base, config, adapter):
    params = merge_params(adapter, base.params)
    batch = {"decoder_input_tokens": token_ids()}
    return np.asarray(Decoder(base.config, config).apply({"params": params}, batch))


def theirs(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(token_ids())).logits.numpy()


def transformers_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def drawn(config, base):
    """A trained adapter's tree: no zeros; buffers, such as masks, are ones."""
    tree = draw(abstract_adapter(config, base.config), seed=1, scale=0.25)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.ones_like(x) if path[-1].key.startswith("buffer_") else x, tree
    )


def test_every_method_that_is_exported_is_compared():
    compared = {fields.get("method", name) for name, fields in EXPORTED.items()}
    assert {name for name, config in METHODS.items() if can_export(config)} == compared


@pytest.mark.parametrize(
    ("method", "model", "scan_layers"),
    [
        *itertools.product(EXPORTED, MODELS, [True, False]),
        *itertools.product(["lora on all", "dora"], OTHER_MODELS, [True]),
    ],
)
def test_what_we_write_computes_the_same_in_peft(tmp_path, folders, method, model, scan_layers):
    config = make_config({"method": method} | EXPORTED[method])
    base = load_base_model(folders[model], scan_layers=scan_layers)
    adapter = drawn(config, base)
    save_peft(tmp_path, config, adapter, base.config, base.params, str(folders[model]))
    expected = ours(base, config, adapter)
    assert np.abs(expected - ours(base, None, {})).max() > 0.1

    adapted = peft.PeftModel.from_pretrained(transformers_model(folders[model]), tmp_path)
    np.testing.assert_allclose(theirs(adapted), expected, **TOLERANCE)
    # The base is found by the name that is written.
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_allclose(theirs(found), expected, **TOLERANCE)

    imported, tree = load_peft(tmp_path, base.config, base.params)
    np.testing.assert_allclose(ours(base, imported, tree), expected, **TOLERANCE)


PEFT_CONFIGS = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "an expression": {"target_modules": r".*\.(self_attn\.[qv]|mlp\.up)_proj"},
    "patterns": {
        "target_modules": ["q_proj", "gate_proj", "mlp.down_proj"],
        "rank_pattern": {"down_proj": 5, "self_attn.q_proj": 2},
        "alpha_pattern": {"gate_proj": 3},
    },
    "rslora": {"target_modules": ["k_proj", "o_proj"], "use_rslora": True},
    "rslora with patterns": {
        "target_modules": ["k_proj", "o_proj"],
        "use_rslora": True,
        "rank_pattern": {"o_proj": 2},
    },
    "dora": {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"up_proj": 2}},
    "gaussian": {"target_modules": ["down_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize(
    ("name", "model", "scan_layers"),
    [
        *itertools.product(PEFT_CONFIGS, MODELS, [True, False]),
        *itertools.product(["all-linear", "dora"], OTHER_MODELS, [False]),
    ],
)
def test_what_peft_writes_computes_the_same_here(tmp_path, folders, name, model, scan_layers):
    fields = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | PEFT_CONFIGS[name]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(transformers_model(folders[model]), peft.LoraConfig(**fields))
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:  # as made, B is zero and the magnitude that of the base
                parameter.add_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(tmp_path)
    expected = theirs(adapted)

    base = load_base_model(folders[model], scan_layers=scan_layers)
    config, tree = load_peft(tmp_path, base.config, base.params)
    assert config.method == ("dora" if name == "dora" else "lora")
    found = ours(base, config, tree)
    assert np.abs(found - ours(base, None, {})).max() > 0.1
    np.testing.assert_allclose(found, expected, **TOLERANCE)
