"""The scripts on an encoder-decoder: a run from training to a merged Hugging Face folder."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from scripts.compare_plan import Options, plan_runs
from sira_jax.adapters import METHODS, LoRAConfig
from sira_jax.checkpoints import load_base_model, peft
from sira_jax.errors import CheckpointError, ConfigError, SiraError
from sira_jax.models import EncoderDecoderConfig, make_model
from sira_jax.training.logging import read_metrics
from sira_jax.training.train_state import init_adapter
from tests.checkpoints.t5x_files import t5x_weights, write_checkpoint
from tests.hf_models import write_folder
from tests.hf_t5_models import TINY_T5S, t5_weights_by_rule
from tests.integration.mistakes import assert_mistake, make_plan
from tests.scripts.adapter_runs import make_runner
from tests.scripts.conversions import run as convert
from tests.tiny_t5 import t5_config

SHAPE = {**TINY_T5S["byt5"], "vocab_size": 384}
CONFIG = """
from configs import base
from configs.adapters import lora


def get_config():
    config = base.get_config()
    config.model.path = {model!r}
    config.adapter = lora.get_config(rank=4)
    config.data.tasks = ("cldr_number_en", "cldr_relative_sw")
    config.data.vocabulary = "bytes"
    config.data.sequence_length = 128
    config.data.target_length = 64
    config.data.batch_size = 4
    config.train.num_steps = 12
    config.train.log_every = 4
    config.train.eval_every = 12
    config.train.checkpoint_every = 12
    config.optimizer.learning_rate = 0.02
    config.optimizer.warmup_steps = 1
    config.evaluate.loss_examples_per_task = 4
    config.evaluate.examples_per_task = 3
    config.decode.max_new_tokens = 8
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byt5")
    write_folder(folder / "model", SHAPE, t5_weights_by_rule(SHAPE))
    (folder / "tiny.py").write_text(CONFIG.format(model=str(folder / "model")))
    return folder


def test_train_evaluate_generate_merge(folder, monkeypatch, capsys):
    call = make_runner(folder, monkeypatch, capsys)
    printed = call("train", "--config={0}/tiny.py", "--workdir={0}/run", "--tensorboard=false")
    assert "lora:" in printed
    losses = [line["train/loss"] for line in read_metrics(folder / "run") if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.3

    call("evaluate", "--workdir={0}/run")
    results = json.loads((folder / "run/evaluation_test.json").read_text())
    assert results["examples"] == {"cldr_number_en": 3, "cldr_relative_sw": 3}

    (folder / "prompts.txt").write_text("Write the number 12.\nA longer prompt than the first\n")
    answers = call("generate", "--workdir={0}/run", "--file={0}/prompts.txt")
    assert len(answers.splitlines()) == 2

    convert("merge", folder / "run", folder / "merged")
    merged = load_base_model(folder / "merged")
    assert isinstance(merged.config, EncoderDecoderConfig)
    base = load_base_model(folder / "model")
    kernel = np.asarray(
        merged.params["decoder"]["layers"]["encoder_decoder_attention"]["key"]["kernel"]
    )
    start = base.params["decoder"]["layers"]["encoder_decoder_attention"]["key"]["kernel"]
    assert np.abs(kernel - start).max() > 1e-3


def test_a_t5x_checkpoint_becomes_a_folder(tmp_path, capsys):
    config = t5_config(scan_layers=False)
    weights = t5x_weights(config)
    write_checkpoint(tmp_path / "checkpoint_1", weights)
    sizes = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers")
    sizes += ("num_decoder_layers", "relpos_num_buckets", "relpos_max_distance")
    changes = [f"--set={name}={getattr(config, name)}" for name in sizes]
    arguments = (tmp_path / "checkpoint_1", tmp_path / "out", "--preset=t5-1.1-small", *changes)
    convert("t5x", *arguments)
    printed = capsys.readouterr().out
    assert "encoder_decoder_attention.key" in printed.replace("/", ".")
    loaded = load_base_model(tmp_path / "out", scan_layers=False)
    found = traverse_util.flatten_dict(loaded.params)
    assert found.keys() == weights.keys()
    for path, array in weights.items():
        np.testing.assert_array_equal(found[path], array, err_msg=str(path))
    for wrong, named in (("--set=emb_dim", "--set=emb_dim"), ("--set=emb_dim=16", "shape")):
        with pytest.raises(SiraError, match=named):
            convert("t5x", *arguments[:1], tmp_path / "no", *arguments[2:], wrong)
    with pytest.raises(ConfigError, match="--preset=smollm2-135m"):
        convert("t5x", *arguments[:1], tmp_path / "no", "--preset=smollm2-135m")
    assert not (tmp_path / "no").exists()


def test_a_comparison_of_all_methods_leaves_out_what_the_model_cannot_have(folder, capsys):
    config = Path(__file__).parents[2] / "configs/experiments/compare.py"
    overrides = {"data.vocabulary": "bytes", "data.target_length": 96}
    options = Options(
        config=str(config),
        model=str(folder / "model"),
        tasks=("cldr_number_en",),
        overrides=overrides,
    )
    by_method, sizes = plan_runs(options, folder / "compare")
    assert set(by_method) == set(sizes) == {"none", *METHODS} - {"milora"}
    assert "milora is left out: adapter.method='milora'" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"milora: adapter\.method"):
        plan_runs(dataclasses.replace(options, methods=("milora",)), folder / "compare")


def test_peft_is_refused(folder, tmp_path):
    base = load_base_model(folder / "model")
    lora = LoRAConfig(rank=2)
    adapter = init_adapter(make_model(base.config, lora), 0)
    for call in (
        lambda: peft.save_peft(tmp_path / "peft", lora, adapter, base.config, base.params),
        lambda: peft.load_peft(tmp_path / "peft", base.config, base.params),
    ):
        assert_mistake(CheckpointError, call, "encoder-decoder", "convert.py merge")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__target_length": 100_000}, "data.target_length=100000"),
        ({"adapter": {"method": "milora"}}, "adapter.method='milora'"),
        (
            {"adapter": {"method": "lora", "targets": ["decoder/qq"]}},
            "adapter.targets=('decoder/qq',)",
        ),
    ],
)
def test_mistakes(folder, changes, named):
    assert_mistake(ConfigError, lambda: make_plan(folder / "model", **changes), named)
