"""scripts/convert.py on small models made here: what is written and what is printed."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from sira_jax.checkpoints import adapter_file, fingerprint, load_base_model
from sira_jax.training.train_state import merge_params
from tests.checkpoints.test_base_model import WORD_TOKENIZER
from tests.gguf_models import tokenizer_fields, write_gguf
from tests.hf_models import TINY_LLAMA, assert_same_params, weights_by_rule
from tests.integration.mistakes import contents
from tests.scripts.conversions import TEMPLATE, files, logits, make_run, run


@pytest.fixture(autouse=True)
def no_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SIRA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_hf(model, tmp_path, capsys, dtype):
    out = tmp_path / "new" / "out"
    run("hf", model, out, *([f"--dtype={dtype}"] if dtype else []))
    source = load_base_model(model, param_dtype=dtype or "float32")
    found = load_base_model(out, param_dtype=dtype or "float32")
    assert_same_params(found.params, source.params)
    assert found.config == source.config
    assert (found.special, found.chat_template) == (source.special, TEMPLATE)
    assert json.loads(found.tokenizer_json) == WORD_TOKENIZER
    stored = load_file(out / "model.safetensors")
    assert {str(array.dtype) for array in stored.values()} == {dtype or "float32"}
    printed = capsys.readouterr().out.splitlines()
    name = "model.layers.*.self_attn.k_proj.weight"
    assert f"{name} (16, 32) -> {name} {dtype or 'float32'}  (3 times)" in printed
    assert "lm_head.weight (384, 32) -> nothing: it follows from other tensors" in printed
    assert sum("rotary_emb.inv_freq (4,) -> nothing" in line for line in printed) == 1
    assert files(tmp_path / "new") == ["out"]


def test_gguf(tmp_path, capsys):
    shape = TINY_LLAMA | {"vocab_size": 270}
    fields = tokenizer_fields("smollm")
    write_gguf(tmp_path / "a.gguf", shape, weights_by_rule(shape), metadata=fields)
    run("gguf", tmp_path / "a.gguf", tmp_path / "out")
    source, found = load_base_model(tmp_path / "a.gguf"), load_base_model(tmp_path / "out")
    assert fingerprint(found.params) == fingerprint(source.params)
    assert found.config == source.config
    assert found.special == source.special
    assert json.loads(found.tokenizer_json) == json.loads(source.tokenizer_json)
    printed = capsys.readouterr().out.splitlines()
    line = "blk.*.attn_q.weight (32, 32) F32 -> model.layers.*.self_attn.q_proj.weight float32"
    assert f"{line}  (3 times)" in printed
    assert "output.weight (270, 32) F32 -> lm_head.weight float32" in printed


def test_gguf_without_a_tokenizer_and_with_factors_of_rotary_positions(tmp_path, capsys):
    factors = {"rope_freqs.weight": np.ones(4, np.float32)}
    write_gguf(tmp_path / "a.gguf", TINY_LLAMA, weights_by_rule(TINY_LLAMA), extra=factors)
    run("gguf", tmp_path / "a.gguf", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "no tokenizer is written: " in printed
    assert "rope_freqs.weight (4,) F32 -> rope_scaling of config.json" in printed
    assert not (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize(
    ("scan_layers", "choices"),
    [(True, ((None, 2), ("latest", 4), ("2", 2))), (False, (("best", 2), ("4", 4)))],
)
def test_adapter_of_each_checkpoint(model, tmp_path, capsys, scan_layers, choices):
    plan, saved = make_run(
        tmp_path / "run",
        model,
        "lora",
        steps=(2, 4),
        model__scan_layers=scan_layers,
        train__keep_best="validation/loss",
    )
    base = plan.load_base()
    for which, step in choices:
        out = tmp_path / f"out-{which}"
        run("adapter", tmp_path / "run", out, *([f"--checkpoint={which}"] if which else []))
        config, tree = adapter_file.load_adapter(out, base.config, fingerprint(base.params))
        assert config == plan.experiment.adapter
        assert_same_params(tree, saved[step])
        assert f"lora of {tmp_path / 'run'}, step {step} is in {out}" in capsys.readouterr().out


def test_adapter_prints_every_leaf_and_takes_folders(runs, model, tmp_path, capsys):
    run("adapter", runs / "milora", tmp_path / "a")
    printed = capsys.readouterr().out.splitlines()
    line = "layers/attention/q/adapter/lora_a (3, 32, 2) -> layers.*.attention.q.lora_a (32, 2)"
    assert f"{line}  (3 times)" in printed
    assert any(line.startswith("layers/adapter/router (3, ") for line in printed)
    run("adapter", tmp_path / "a", tmp_path / "b", f"--base={model}")
    assert contents(tmp_path / "a") == {
        path.parents[1] / "a" / path.name: data for path, data in contents(tmp_path / "b").items()
    }


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_to_peft_and_back(runs, model, tmp_path, capsys, method):
    run("to-peft", runs / method, tmp_path / "peft")
    printed = capsys.readouterr().out
    rank = 2 if method == "lora" else 3
    module = "base_model.model.model.layers.*.mlp.down_proj"
    assert f"layers.*.mlp.down: lora_a (48, {rank}), lora_b ({rank}, 32)" in printed
    assert f"-> {module}: lora_A.weight ({rank}, 48), lora_B.weight (32, {rank})" in printed
    assert "(3 times)" in printed
    content = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(model)
    assert content["use_dora"] == (method == "dora")

    run("from-peft", tmp_path / "peft", tmp_path / "back", f"--base={model}")
    assert f"{module}: lora_A.weight ({rank}, 48)" in capsys.readouterr().out
    base = load_base_model(model)
    config, tree = adapter_file.load_adapter(
        tmp_path / "back", base.config, fingerprint(base.params)
    )
    run("adapter", runs / method, tmp_path / "own")
    own = adapter_file.load_adapter(tmp_path / "own", base.config, fingerprint(base.params))
    expected = logits(base.config, merge_params(own[1], base.params), own[0])
    found = logits(base.config, merge_params(tree, base.params), config)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_from_peft_for_a_base_in_bfloat16(runs, model, tmp_path):
    run("to-peft", runs / "lora", tmp_path / "peft")
    out = tmp_path / "out"
    run("from-peft", tmp_path / "peft", out, f"--base={model}", "--param_dtype=bfloat16")
    base = load_base_model(model, param_dtype="bfloat16")
    assert adapter_file.read_header(out).fingerprint == fingerprint(base.params)


@pytest.mark.parametrize("method", ["lora", "dora", "reslora"])
def test_merge(runs, model, tmp_path, capsys, method):
    run("merge", runs / method, tmp_path / "out")
    printed = capsys.readouterr().out
    merged, base = load_base_model(tmp_path / "out"), load_base_model(model)
    assert json.loads(merged.tokenizer_json) == WORD_TOKENIZER
    assert (merged.special, merged.chat_template) == (base.special, TEMPLATE)
    assert merged.config == base.config
    run("adapter", runs / method, tmp_path / "own")
    config, tree = adapter_file.load_adapter(
        tmp_path / "own", base.config, fingerprint(base.params)
    )
    expected = logits(base.config, merge_params(tree, base.params), config)
    found = logits(merged.config, merged.params)
    line = printed.splitlines()[-1]
    assert line.startswith("logits of 128 random tokens, merged against adapted: largest")
    relative = float(line.split()[-1])
    if method == "reslora":
        # Other tokens than those of the script: the same but for a factor.
        measured = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert measured > 0.01
        assert relative == pytest.approx(measured, rel=0.5)
    else:
        assert relative < 1e-5
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert np.abs(found - logits(base.config, base.params)).max() > 0.05
    assert f"layers.*.mlp.down: kernel, lora_a (48, {3 if method == 'dora' else 2})" in printed


def test_merge_rounds_once(lora, model, tmp_path):
    run("merge", lora, tmp_path / "full", f"--base={model}")
    run("merge", lora, tmp_path / "half", f"--base={model}", "--dtype=bfloat16")
    full, half = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "half"))
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, array in full.items():
        assert half[name].dtype.name == "bfloat16"
        np.testing.assert_array_equal(half[name], array.astype(half[name].dtype), err_msg=name)
