"""Our adapter folders: what is in them, both layouts, and what is refused."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sira_jax.adapters import METHODS, LoRAConfig, SiRAConfig
from sira_jax.checkpoints import adapter_file
from sira_jax.checkpoints.adapter_file import (
    abstract_adapter,
    load_adapter,
    read_header,
    save_adapter,
    tensor_places,
)
from sira_jax.errors import CheckpointError, ModelFileError, SiraError
from sira_jax.models import Decoder
from sira_jax.training.train_state import init_adapter, merge_params, split_params
from tests.adapters.test_every_method import make
from tests.hf_models import assert_same_params
from tests.integration.mistakes import assert_mistake, contents
from tests.tiny import decoder_config, decoder_params, draw, make_batch

BASE = "0123456789abcdef" * 4
LAYERS = 3
LORA = LoRAConfig(rank=2, targets=("q", "down"), overrides={"down": {"rank": 3, "alpha": 1.5}})
SIRA = SiRAConfig(rank=2, num_experts=3, num_selected_experts=2, targets=("v", "up"))


def model_config(scan_layers=True, **changes):
    return decoder_config(num_layers=LAYERS, scan_layers=scan_layers, **changes)


@functools.cache
def drawn(config):
    """A stacked adapter tree without zeros."""
    return draw(abstract_adapter(config, model_config()), seed=3)


def apart(tree):
    return {
        f"layers_{layer}": jax.tree.map(lambda x, at=layer: x[at], tree["layers"])
        for layer in range(LAYERS)
    }


def save(path, config=LORA, scan_layers=True):
    tree = drawn(config)
    tree = tree if scan_layers else apart(tree)
    save_adapter(path, config, tree, model_config(scan_layers), BASE)
    return path


@pytest.mark.parametrize("loaded_scanned", [True, False])
@pytest.mark.parametrize("saved_scanned", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_in_either_layout(tmp_path, method, saved_scanned, loaded_scanned):
    config = make(method)
    save(tmp_path, config, saved_scanned)
    found, tree = load_adapter(tmp_path, model_config(loaded_scanned), BASE)
    assert found == config
    expected = drawn(config)
    assert_same_params(tree, expected if loaded_scanned else apart(expected))


@pytest.mark.parametrize(
    "method",
    [
        m if m in ("lora", "sira", "milora") else pytest.param(m, marks=pytest.mark.slow)
        for m in METHODS
    ],
)
def test_expected_shapes_are_those_of_a_fresh_adapter(method):
    for scan_layers in (True, False):
        config = model_config(scan_layers)
        fresh = init_adapter(Decoder(config, make(method)), 0)
        expected = abstract_adapter(make(method), config)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(
            lambda x: (x.shape, x.dtype), expected
        )


def test_both_layouts_write_the_same_bytes(tmp_path):
    first, second = save(tmp_path / "a"), save(tmp_path / "b", scan_layers=False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_files_hold_a_tensor_a_layer_and_every_field(tmp_path):
    save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = {
        f"layers.{layer}.{projection}.{leaf}"
        for layer in range(LAYERS)
        for projection in ("attention.q", "mlp.down")
        for leaf in ("lora_a", "lora_b")
    }
    assert tensors.keys() == names
    leaf = drawn(LORA)["layers"]["mlp"]["down"]["adapter"]["lora_a"]
    assert leaf.shape == (3, 12, 3)
    for layer in range(LAYERS):
        np.testing.assert_array_equal(tensors[f"layers.{layer}.mlp.down.lora_a"], leaf[layer])
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "type": "sira_jax",
        "version": 1,
        "adapter": {
            "method": "lora",
            "rank": 2,
            "alpha": 8.0,
            "dropout_rate": 0.0,
            "targets": ["q", "down"],
            "overrides": [["down", {"alpha": 1.5, "rank": 3}]],
        },
        "base": {
            "fingerprint": BASE,
            "param_dtype": "float32",
            "num_layers": 3,
            "emb_dim": 8,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 4,
            "mlp_dim": 12,
        },
    }
    header = read_header(tmp_path)
    assert (header.config, header.fingerprint, header.param_dtype) == (LORA, BASE, "float32")


def test_leaves_of_a_blocks_own_module_keep_its_name():
    stacked = {"layers": {"adapter": {"pool": {"kernel": np.zeros((2, 4))}, "router": np.zeros(2)}}}
    separate = {"layers_1": {"adapter": {"router": np.zeros(())}}}
    assert tensor_places(stacked) == {
        f"layers.{layer}.adapter.{name}": (("layers", "adapter", *name.split(".")), layer)
        for layer in range(2)
        for name in ("pool.kernel", "router")
    }
    assert tensor_places(separate) == {
        "layers.1.adapter.router": (("layers_1", "adapter", "router"), None)
    }


def test_a_model_computes_the_same_after_the_round_trip(tmp_path):
    save(tmp_path, SIRA)
    batch = make_batch([(5, 3), (7,)], 8)
    model = Decoder(model_config(), SIRA)
    frozen = split_params(decoder_params(model))[1]
    _, tree = load_adapter(tmp_path, model_config(), BASE)
    params = merge_params(frozen, drawn(SIRA)), merge_params(frozen, tree)
    before, after = (model.apply({"params": p}, batch) for p in params)
    np.testing.assert_array_equal(before, after)


def test_saving_over_an_adapter_leaves_no_mixture(tmp_path, monkeypatch):
    save(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(adapter_file, "write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, SIRA)
    monkeypatch.undo()
    assert_mistake(ModelFileError, lambda: load(tmp_path), "adapter_config.json: no such file")
    save(tmp_path, SIRA)
    assert load(tmp_path)[0] == SIRA


def load(path, config=None, base=BASE):
    return load_adapter(path, config or model_config(), base)


def rewrite(change):
    """Edits the tensors."""

    def damage(path):
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def edit(change):
    """Edits adapter_config.json."""

    def damage(path):
        file = path / "adapter_config.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return damage


def write(name, data):
    return lambda path: (path / name).write_bytes(data)


def cut(name, size):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])


def adapter(**fields):
    return edit(lambda content: content["adapter"].update(fields))


def base(**fields):
    return edit(lambda content: content["base"].update(fields))


def top(**fields):
    return edit(lambda content: content.update(fields))


def drop(*names):
    def change(content):
        for name in names[:-1]:
            content = content[name]
        del content[names[-1]]

    return edit(change)


def rename(old, new):
    return lambda path: (path / old).rename(path / new)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q_A = "layers.0.attention.q.lora_a"
BAD_CONFIGS = [
    (top(type="other"), CheckpointError, f"{CONFIG}: type='other'", "'sira_jax'"),
    (drop("type"), CheckpointError, f"{CONFIG}: type=None", "'sira_jax'"),
    (top(peft_type="LORA"), CheckpointError, CONFIG, "PEFT", "from-peft"),
    (top(version=2), CheckpointError, f"{CONFIG}: version=2", "not allowed: 1"),
    (top(version=True), CheckpointError, f"{CONFIG}: version=True"),
    (top(extra=1), CheckpointError, f"{CONFIG}: unknown field extra=1", "type, version"),
    (drop("base"), CheckpointError, f"{CONFIG}: field base is missing"),
    (drop("adapter"), CheckpointError, f"{CONFIG}: field adapter is missing"),
    (top(base=[]), CheckpointError, f"{CONFIG}: base=[]", "an object"),
    (top(adapter="lora"), CheckpointError, f"{CONFIG}: adapter='lora'", "a mapping"),
    (adapter(method="loro"), CheckpointError, f"{CONFIG}: adapter.method='loro'", "lora", "sira"),
    (adapter(method="none"), CheckpointError, f"{CONFIG}: adapter.method='none'"),
    (adapter(method=["lora"]), CheckpointError, f"{CONFIG}: adapter.method=['lora']"),
    (adapter(experts=2), CheckpointError, f"{CONFIG}: adapter.experts=2", "alpha"),
    (adapter(rank=0), CheckpointError, f"{CONFIG}: adapter.rank=0", "at least 1"),
    (adapter(rank="2"), CheckpointError, f"{CONFIG}: adapter.rank='2'"),
    (adapter(rank=2**31), CheckpointError, f"{CONFIG}: adapter.rank=2147483648", "under 2**31"),
    (
        adapter(overrides=[["q", {"rank": 10**30}]]),
        CheckpointError,
        f"{CONFIG}: adapter.overrides.rank=1{'0' * 30}",
        "under 2**31",
    ),
    (adapter(targets=["qq"]), CheckpointError, f"{CONFIG}: adapter.targets=('qq',)", "matches no"),
    (adapter(targets=["("]), CheckpointError, f"{CONFIG}: adapter.targets='('"),
    (drop("base", "fingerprint"), CheckpointError, f"{CONFIG}: field base.fingerprint is missing"),
    (base(fingerprint="x"), CheckpointError, f"{CONFIG}: base.fingerprint='x'", "64 hexadecimal"),
    (base(fingerprint="f" * 64), CheckpointError, f"{CONFIG}: was trained on", "f" * 64, BASE),
    (base(param_dtype="int8"), CheckpointError, f"{CONFIG}: base.param_dtype='int8'", "bfloat16"),
    (base(num_layers=2), CheckpointError, f"{CONFIG}: base.num_layers=2", "has 3"),
    (base(mlp_dim="12"), CheckpointError, f"{CONFIG}: base.mlp_dim='12'", "whole number"),
    (base(vocab=3), CheckpointError, f"{CONFIG}: unknown field base.vocab=3", "num_layers"),
    (write(CONFIG, b'{"type": "sira'), ModelFileError, f"{CONFIG}: not valid JSON"),
    (write(CONFIG, b'{"type": "\xe9"}'), ModelFileError, f"{CONFIG}: not valid JSON"),
    (write(CONFIG, b"[1]"), ModelFileError, f"{CONFIG}: must hold a JSON object"),
    (rename(CONFIG, "config"), ModelFileError, f"{CONFIG}: no such file"),
]
BAD_WEIGHTS = [
    (adapter(rank=3), f"{WEIGHTS}: tensors of another shape: {Q_A} is (8, 2), expected (8, 3)"),
    (adapter(rank=2**31 - 1), "expected (8, 2147483647)"),
    (adapter(method="sira"), f"{WEIGHTS}: missing tensors: layers.0.attention.q.router"),
    (adapter(targets=["q"]), f"{WEIGHTS}: unexpected tensors: layers.0.mlp.down.lora_a", "3 more"),
    (adapter(targets=["q", "k", "down"]), f"{WEIGHTS}: missing tensors: layers.0.attention.k.lora"),
    (rewrite(lambda t: t.pop(Q_A)), f"{WEIGHTS}: missing tensors: {Q_A}"),
    (rewrite(lambda t: t.update(more=t[Q_A])), f"{WEIGHTS}: unexpected tensors: more"),
    (rewrite(lambda t: t.update({Q_A: t[Q_A].T.copy()})), f"{Q_A} is (2, 8), expected (8, 2)"),
    (rewrite(lambda t: t.update({Q_A: t[Q_A].astype("f2")})), f"F32: {Q_A} is F16"),
    (rewrite(lambda t: t.update({Q_A: t[Q_A].astype("i4")})), f"F32: {Q_A} is I32"),
    (cut(WEIGHTS, 4), f"{WEIGHTS}: truncated"),
    (cut(WEIGHTS, 300), f"{WEIGHTS}: truncated"),
    (cut(WEIGHTS, 2000), f"{WEIGHTS}: truncated"),
    (write(WEIGHTS, b""), f"{WEIGHTS}: truncated"),
    (write(WEIGHTS, (5).to_bytes(8, "little") + b"{nope"), f"{WEIGHTS}: header: not valid JSON"),
    (write(WEIGHTS, b"\x80\x05cos\nsystem\n"), f"{WEIGHTS}: truncated or not a safetensors file"),
    (rename(WEIGHTS, "adapter_model.bin"), "adapter_model.bin, a pickle", "never opened"),
    (rename(WEIGHTS, "weights"), f"{WEIGHTS}: no such file"),
]


@pytest.mark.parametrize(("damage", "error", "named"), [(d, e, n) for d, e, *n in BAD_CONFIGS])
def test_bad_configs_are_refused(tmp_path, damage, error, named):
    damage(save(tmp_path))
    before = contents(tmp_path)
    assert_mistake(error, lambda: load(tmp_path), tmp_path, *named)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("method", METHODS)
def test_absurd_sizes_are_refused_before_anything_is_made(tmp_path, method):
    file = save(tmp_path, make(method)) / CONFIG
    content = json.loads(file.read_text())
    for name in {"rank", "num_experts"} & set(content["adapter"]):
        file.write_text(json.dumps(content | {"adapter": content["adapter"] | {name: 2**31 - 1}}))
        with pytest.raises(
            SiraError, match=rf"{tmp_path}/adapter_\w+\.(json|safetensors): .*\d"
        ) as error:
            load(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("damage", "named"), [(d, n) for d, *n in BAD_WEIGHTS])
def test_bad_weights_are_refused(tmp_path, damage, named):
    damage(save(tmp_path))
    before = contents(tmp_path)
    assert_mistake(ModelFileError, lambda: load(tmp_path), tmp_path, *named)
    assert contents(tmp_path) == before


def test_paths_that_are_no_folder_are_refused(tmp_path):
    save(tmp_path / "a")
    no_folder = f"{tmp_path}/b: no such folder", "adapter_config.json"
    assert_mistake(ModelFileError, lambda: load(tmp_path / "b"), *no_folder)
    file = tmp_path / "a" / CONFIG
    assert_mistake(ModelFileError, lambda: load(file), f"{file}: is no folder")


def test_another_base_is_refused(tmp_path):
    save(tmp_path)
    bigger = model_config(mlp_dim=16)
    assert_mistake(CheckpointError, lambda: load(tmp_path, bigger), "base.mlp_dim=12", "has 16")
    half = model_config(param_dtype="bfloat16")
    named = "held in float32, this one is in bfloat16"
    assert_mistake(CheckpointError, lambda: load(tmp_path, half, "a" * 64), named)
    assert load(tmp_path, model_config(vocab_size=29))[0] == LORA


def test_a_tree_that_does_not_fit_is_not_written(tmp_path):
    tree = {"layers": {"attention": drawn(LORA)["layers"]["attention"]}}

    def save_part():
        save_adapter(tmp_path / "a", LORA, tree, model_config(), BASE)

    assert_mistake(CheckpointError, save_part, "missing tensors: layers.0.mlp.down.lora_a")
    assert not (tmp_path / "a").exists()
