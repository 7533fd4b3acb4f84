"""PEFT folders without PEFT: names, shapes and scales, the way back, and what is refused. tests/parity has PEFT itself."""

import functools
import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sira_jax.adapters import METHODS, make_config
from sira_jax.checkpoints import peft
from sira_jax.checkpoints.adapter_file import abstract_adapter
from sira_jax.errors import CheckpointError, ModelFileError
from sira_jax.models import Decoder
from sira_jax.training.train_state import merge_params, split_params
from tests.adapters.test_every_method import make
from tests.hf_models import assert_same_params
from tests.integration.mistakes import assert_mistake, contents
from tests.tiny import decoder_config, decoder_params, draw, make_batch

LAYERS = 3
BATCH = make_batch([(5, 3), (7,)], 8)
EXPORTED = [name for name in METHODS if peft.can_export(METHODS[name])]
REFUSED = [name for name in METHODS if name not in EXPORTED]
OVERRIDDEN = {
    "rank": 2,
    "alpha": 5.0,
    "dropout_rate": 0.1,
    "targets": ["q", "v", "gate", "down"],
    "overrides": {"down": {"rank": 3}, "gate": {"alpha": 2.5}},
}


def model_config(scan_layers=True):
    return decoder_config(num_layers=LAYERS, scan_layers=scan_layers, qkv_bias=True)


@functools.cache
def frozen(scan_layers=True):
    params = decoder_params(Decoder(model_config()))
    return params if scan_layers else apart(params)


def apart(tree):
    layers = {
        f"layers_{layer}": jax.tree.map(lambda x, at=layer: x[at], tree["layers"])
        for layer in range(LAYERS)
    }
    return {name: leaf for name, leaf in tree.items() if name != "layers"} | layers


def drawn(config, seed=3):
    """A stacked adapter tree without zeros, but for masks and scores, which keep their kind."""
    shapes = abstract_adapter(config, model_config())
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.ones_like(x) if path[-1].key.startswith("buffer_") else x,
        draw(shapes, seed, 0.3),
    )


def save(path, config, scan_layers=True, name=None):
    tree = drawn(config) if scan_layers else apart(drawn(config))
    peft.save_peft(path, config, tree, model_config(scan_layers), frozen(scan_layers), name)
    return path


def logits(config, adapter, scan_layers=True):
    model = Decoder(model_config(scan_layers), config)
    params = merge_params(adapter, split_params(frozen(scan_layers))[1])
    return model.apply({"params": params}, BATCH)


def read(path):
    content = json.loads((path / "adapter_config.json").read_text())
    return content, load_file(path / "adapter_model.safetensors")


def test_the_methods_that_are_one_pair_a_projection_are_exported():
    assert {"lora", "dora", "melora", "multilora", "adamix"} <= set(EXPORTED)
    assert {"sira", "molora", "mov", "milora", "malora", "reslora"} <= set(REFUSED)


def test_lora_has_pefts_names_shapes_and_values(tmp_path):
    config = make_config({"method": "lora"} | OVERRIDDEN)
    content, tensors = read(save(tmp_path, config, name="some/base"))
    assert content["peft_type"] == "LORA"
    assert content["task_type"] == "CAUSAL_LM"
    assert content["base_model_name_or_path"] == "some/base"
    assert content["bias"] == "none"
    assert content["target_modules"] == ["down_proj", "gate_proj", "q_proj", "v_proj"]
    assert (content["r"], content["lora_alpha"], content["lora_dropout"]) == (2, 5, 0.1)
    assert content["rank_pattern"] == {"down_proj": 3}
    assert content["alpha_pattern"] == {"gate_proj": 2.5}
    assert not content["use_dora"]
    assert not content["use_rslora"]
    expected = {}
    for layer in range(LAYERS):
        for name, d_in, d_out, rank in (
            ("self_attn.q_proj", 8, 16, 2),
            ("self_attn.v_proj", 8, 8, 2),
            ("mlp.gate_proj", 8, 12, 2),
            ("mlp.down_proj", 12, 8, 3),
        ):
            module = f"base_model.model.model.layers.{layer}.{name}"
            expected[f"{module}.lora_A.weight"] = (rank, d_in)
            expected[f"{module}.lora_B.weight"] = (d_out, rank)
    assert {name: array.shape for name, array in tensors.items()} == expected
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}
    leaves = drawn(config)["layers"]["mlp"]["down"]["adapter"]
    for layer in range(LAYERS):
        module = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        for own, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            array = tensors[f"{module}.{theirs}.weight"]
            np.testing.assert_array_equal(array, leaves[own][layer].T)


def test_the_commonest_rank_and_alpha_need_no_pattern(tmp_path):
    overrides = {name: {"rank": 3, "alpha": 1.5} for name in ("q", "k", "v", "o")}
    config = make_config({"method": "lora", "rank": 2, "overrides": overrides})
    content, _ = read(save(tmp_path, config))
    assert (content["r"], content["lora_alpha"]) == (3, 1.5)
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert content["rank_pattern"] == dict.fromkeys(mlp, 2)
    assert content["alpha_pattern"] == dict.fromkeys(mlp, 8)


def test_dora_stores_the_whole_magnitude(tmp_path):
    config = make_config({"method": "dora"} | OVERRIDDEN)
    content, tensors = read(save(tmp_path, config))
    assert content["use_dora"]
    kernel = np.asarray(frozen()["layers"]["attention"]["q"]["kernel"], np.float64)
    delta = drawn(config)["layers"]["attention"]["q"]["adapter"]["magnitude_delta"]
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector"
        norms = [math.sqrt(sum(kernel[layer, :, f] ** 2)) for f in range(16)]
        np.testing.assert_allclose(tensors[name], norms + delta[layer], rtol=1e-5)


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", EXPORTED)
def test_what_comes_back_computes_the_same(tmp_path, method, scan_layers):
    config = make(method)
    save(tmp_path, config, scan_layers)
    found, tree = peft.load_peft(tmp_path, model_config(scan_layers), frozen(scan_layers))
    assert found.method == ("dora" if method == "dora" else "lora")
    shapes = abstract_adapter(found, model_config(scan_layers))
    assert jax.tree.map(lambda x: x.shape, tree) == jax.tree.map(lambda x: x.shape, shapes)
    expected = logits(config, drawn(config) if scan_layers else apart(drawn(config)), scan_layers)
    plain = Decoder(model_config(scan_layers)).apply({"params": frozen(scan_layers)}, BATCH)
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(logits(found, tree, scan_layers), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_and_dora_come_back_as_they_were(tmp_path, method):
    config = make_config({"method": method} | OVERRIDDEN)
    save(tmp_path, config)
    found, tree = peft.load_peft(tmp_path, model_config(), frozen())
    for path in ("attention/q", "attention/v", "mlp/gate", "mlp/down"):
        assert found.for_projection(path).scale == config.for_projection(path).scale
        assert found.for_projection(path).rank == config.for_projection(path).rank
    assert found.dropout_rate == config.dropout_rate
    if method == "lora":
        assert_same_params(tree, drawn(config))
    else:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), tree, drawn(config))


@pytest.mark.parametrize("method", REFUSED)
def test_other_methods_are_refused_with_the_reason(tmp_path, method):
    config = make(method)

    def export():
        save(tmp_path / "a", config)

    named = f"adapter.method={method!r} cannot be written", "one low-rank pair", "dora, lora"
    assert_mistake(CheckpointError, export, *named)
    assert not (tmp_path / "a").exists()


def test_a_tree_of_another_config_is_refused(tmp_path):
    lora = make_config({"method": "lora", "rank": 2})
    bigger = make_config({"method": "lora", "rank": 3})

    def export():
        peft.save_peft(tmp_path / "a", bigger, drawn(lora), model_config(), frozen())

    assert_mistake(
        CheckpointError, export, "layers.0.attention.k.lora_a is (8, 2), expected (8, 3)"
    )
    assert not (tmp_path / "a").exists()


# Reading what PEFT may write.

Q, DOWN = "self_attn.q_proj", "mlp.down_proj"
SIZES = {Q: (8, 16), DOWN: (12, 8)}


def peft_folder(path, modules=(Q, DOWN), ranks=None, dtype=np.float32, **fields):
    """A PEFT folder as peft 0.21 writes one; returns its tensors."""
    rng = np.random.default_rng(5)
    tensors = {}
    for layer in range(LAYERS):
        for module in modules:
            d_in, d_out = SIZES[module]
            rank = (ranks or {}).get(module, 2)
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = rng.normal(size=(rank, d_in)).astype(dtype)
            tensors[f"{name}.lora_B.weight"] = rng.normal(size=(d_out, rank)).astype(dtype)
    content = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "somewhere/base",
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 6,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": 2,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["down_proj", "q_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(content | fields))
    save_file(tensors, path / "adapter_model.safetensors")
    return tensors


def load(path, scan_layers=True):
    return peft.load_peft(path, model_config(scan_layers), frozen(scan_layers))


def full_names(*modules):
    return [f"model.layers.{layer}.{module}" for layer in range(LAYERS) for module in modules]


@pytest.mark.parametrize(
    "targets",
    [
        ["down_proj", "q_proj"],
        ["self_attn.q_proj", "mlp.down_proj"],
        full_names(Q, DOWN),
        r".*\.(self_attn\.q|mlp\.down)_proj",
        "all-linear",
    ],
)
def test_target_modules_in_all_their_forms(tmp_path, targets):
    tensors = peft_folder(tmp_path, target_modules=targets)
    config, tree = load(tmp_path)
    assert config == make_config(
        {"method": "lora", "rank": 2, "alpha": 6, "dropout_rate": 0.05, "targets": ["q", "down"]}
    )
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    leaf = tree["layers"]["mlp"]["down"]["adapter"]["lora_b"]
    np.testing.assert_array_equal(leaf[1], tensors[name].T)
    _, separate = load(tmp_path, scan_layers=False)
    assert_same_params(separate, apart(tree))


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"mlp.down_proj": 9}},
        {
            "rank_pattern": dict.fromkeys(full_names(DOWN), 3),
            "alpha_pattern": {f"^{name}": 9.0 for name in full_names(DOWN)},
        },
        {"r": 3, "lora_alpha": 9, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}},
        # The first that fits counts, and a name fits only after a dot.
        {
            "rank_pattern": {"wn_proj": 5, "down_proj": 3, "mlp.down_proj": 7},
            "alpha_pattern": {"down_proj": 9, "^down_proj": 7},
        },
    ],
)
def test_patterns_give_a_projection_its_own_rank_and_alpha(tmp_path, patterns):
    peft_folder(tmp_path, ranks={DOWN: 3}, **patterns)
    config, _ = load(tmp_path)
    found = {name: config.for_projection(name) for name in ("attention/q", "mlp/down")}
    assert {name: (one.rank, one.alpha) for name, one in found.items()} == {
        "attention/q": (2, 6),
        "mlp/down": (3, 9),
    }


def test_rank_stabilised_scales(tmp_path):
    peft_folder(tmp_path, ranks={DOWN: 3}, rank_pattern={"down_proj": 3}, use_rslora=True)
    config, _ = load(tmp_path)
    for path, rank in (("attention/q", 2), ("mlp/down", 3)):
        assert config.for_projection(path).scale == pytest.approx(6 / math.sqrt(rank), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_half_precision_is_read_exactly(tmp_path, dtype):
    tensors = peft_folder(tmp_path, dtype=jax.numpy.dtype(dtype))
    _, tree = load(tmp_path)
    leaf = tree["layers"]["attention"]["q"]["adapter"]["lora_a"]
    assert leaf.dtype == np.float32
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    np.testing.assert_array_equal(leaf[2], tensors[name].T.astype(np.float32))


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BAD_FIELDS = [
    ({"peft_type": "IA3"}, "peft_type='IA3'", "LORA"),
    ({"peft_type": None}, "peft_type=None", "LORA"),
    ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'", "CAUSAL_LM"),
    ({"bias": "all"}, "bias='all'", "none"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']", "only null"),
    ({"layers_to_transform": [0, 1]}, "layers_to_transform=[0, 1]", "only null"),
    ({"layers_to_transform": 2}, "layers_to_transform=2"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    ({"lora_bias": True}, "lora_bias=True"),
    ({"exclude_modules": "v_proj"}, "exclude_modules='v_proj'"),
    ({"some_new_option": 3}, "some_new_option=3", "only null, false or empty"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'", "gaussian"),
    ({"use_dora": "yes"}, "use_dora='yes'", "true or false"),
    ({"target_modules": ["q_proj", "lm_head"]}, "target_modules='lm_head'", "q_proj, k_proj"),
    ({"target_modules": []}, "target_modules=[]", "q_proj"),
    ({"target_modules": None}, "target_modules=None", "q_proj"),
    ({"target_modules": ["q_proj", full_names(DOWN)[0]]}, "all 3 layers of mlp.down_proj"),
    ({"r": 0}, "r=0", "over 0"),
    ({"r": "2"}, "r='2'"),
    ({"lora_alpha": True}, "lora_alpha=True", "over 0"),
    ({"lora_dropout": 1.5}, "adapter.dropout_rate=1.5"),
    ({"rank_pattern": {"q_proj": "3"}}, "rank_pattern={'q_proj': '3'}"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern=['q_proj']"),
    ({"alpha_pattern": {"(a+)+q_proj": 3}}, "alpha_pattern='(a+)+q_proj'", "regular expressions"),
    ({"alpha_pattern": {full_names(Q)[0]: 3}}, "self_attn.q_proj other values in other layers"),
    ({"type": "sira_jax", "peft_type": None}, "peft_type=None"),
]


@pytest.mark.parametrize(("fields", "named"), [(f, n) for f, *n in BAD_FIELDS])
def test_fields_that_would_compute_something_else_are_refused(tmp_path, fields, named):
    peft_folder(tmp_path, **fields)
    file = tmp_path / CONFIG
    assert_mistake(CheckpointError, lambda: load(tmp_path), file, *named)


def change(edit):
    def damage(path):
        tensors = load_file(path / WEIGHTS)
        edit(tensors)
        save_file(tensors, path / WEIGHTS)

    return damage


def peft_without_layer(path):
    """An expression as target, and a layer that has no adapter."""
    tensors = peft_folder(path, target_modules=".*_proj")
    kept = {name: array for name, array in tensors.items() if "layers.2.self" not in name}
    save_file(kept, path / WEIGHTS)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD_FILES = [
    (change(lambda t: t.pop(A)), f"{WEIGHTS}: missing tensors: {A}"),
    (change(lambda t: t.update(extra=t[A])), f"{WEIGHTS}: unexpected tensors: extra"),
    (change(lambda t: t.update({A: t[A].T.copy()})), f"{A} is (8, 2), expected (2, 8)"),
    (change(lambda t: t.update({A: t[A].astype("i4")})), f"{A} is I32", "F32, F16, BF16"),
    (lambda path: peft_folder(path, r=3), f"{A} is (2, 8), expected (3, 8)"),
    (lambda path: peft_folder(path, modules=(Q,)), "missing tensors", DOWN),
    (peft_without_layer, "missing tensors", "layers.2.self_attn.q_proj.lora_A"),
    (lambda path: peft_folder(path, use_dora=True), "missing tensors", "lora_magnitude_vector"),
    (lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:900]), "truncated"),
    (lambda path: (path / WEIGHTS).rename(path / "adapter_model.bin"), "adapter_model.bin, a pickle"),
    (lambda path: (path / WEIGHTS).rename(path / "weights"), f"{WEIGHTS}: no such file"),
    (lambda path: (path / CONFIG).write_text('{"r": 2'), f"{CONFIG}: not valid JSON"),
    (lambda path: (path / CONFIG).unlink(), f"{CONFIG}: no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "named"), [(d, n) for d, *n in BAD_FILES])
def test_damaged_folders_are_refused(tmp_path, damage, named):
    peft_folder(tmp_path)
    damage(tmp_path)
    before = contents(tmp_path)
    assert_mistake(ModelFileError, lambda: load(tmp_path), tmp_path, *named)
    assert contents(tmp_path) == before


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    assert_mistake(ModelFileError, lambda: load(tmp_path / "a"), f"{tmp_path}/a: no such folder")
