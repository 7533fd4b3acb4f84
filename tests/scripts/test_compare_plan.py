"""From flags to checked runs, on a tiny model without a tokenizer."""

import dataclasses
import json

import pytest

from configs.experiments import compare as default_config
from scripts.compare_plan import Options, plan_runs, settings_of
from sira_jax.adapters import METHODS
from sira_jax.errors import CheckpointError, SiraError
from tests.hf_models import TINY_LLAMA, weights_by_rule, write_folder

CONFIG = default_config.__file__


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = {**TINY_LLAMA, "vocab_size": 384}
    return str(write_folder(tmp_path_factory.mktemp("model"), shape, weights_by_rule(shape)))


@pytest.fixture
def options(model):
    return Options(
        config=CONFIG,
        methods=("lora", "sira"),
        tasks=("cldr_number_en", "cldr_unit_sw"),
        model=model,
        num_steps=20,
        overrides={
            "data.vocabulary": "bytes",
            "data.sequence_length": 64,
            "decode.max_new_tokens": 16,
        },
    )


def plan(options, folder, **changes):
    return plan_runs(dataclasses.replace(options, **changes), folder / "out")


def test_the_runs_differ_in_the_adapter_and_the_seed_alone(options, tmp_path):
    by_method, sizes = plan(options, tmp_path, seeds=("3", "5"), rank=8)
    assert list(by_method) == ["lora", "sira"]
    lora, sira = by_method["lora"], by_method["sira"]
    assert [run.seed for run in lora] == [run.experiment.train.seed for run in lora] == [3, 5]
    assert lora[0].directory == tmp_path / "out" / "lora" / "seed3"
    assert sira[0].experiment != lora[0].experiment
    same = dataclasses.replace(sira[0].experiment, adapter=lora[0].experiment.adapter)
    assert same == lora[0].experiment
    experiment = lora[0].experiment
    assert experiment.data.tasks == ("cldr_number_en", "cldr_unit_sw")
    assert (experiment.train.num_steps, experiment.data.sequence_length) == (20, 64)
    assert experiment.adapter.rank == 8
    assert abs(sizes["sira"].deviation) < 0.1
    settings = settings_of(options, sizes)
    assert settings["sizes"]["sira"]["trained"] == sizes["sira"].trained
    assert not (tmp_path / "out").exists()


def test_all_are_the_frozen_model_and_every_method(options, tmp_path):
    by_method, sizes = plan(options, tmp_path, methods=("all",), budget="rank", rank=3)
    assert list(by_method) == ["none", *METHODS]
    assert [len(runs) for runs in by_method.values()] == [1] + [3] * len(METHODS)
    assert sizes["none"].trained == 0
    for method, runs in by_method.items():
        if method != "none" and METHODS[method].size_field == "rank":
            assert runs[0].experiment.adapter.rank == 3


def test_fields_of_one_method(options, tmp_path):
    sets = (
        "sira.expert_dropout_rate=0.25",
        "sira.targets=('q', 'v')",
        "sira.optimizer.learning_rate=0.5",
        "lora.adapter.alpha=2",
    )
    by_method, _ = plan(options, tmp_path, sets=sets, budget="rank", rank=4)
    sira, lora = by_method["sira"][0].experiment, by_method["lora"][0].experiment
    assert sira.adapter.expert_dropout_rate == 0.25
    assert sira.adapter.targets == ("q", "v")
    assert (sira.optimizer.learning_rate, lora.optimizer.learning_rate) == (0.5, 2e-3)
    assert lora.adapter.alpha == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("lora", "nora")}, r"--methods='nora' is not allowed: all, or some of none"),
        ({"methods": ("lora", "lora")}, r"--methods='lora,lora' is not allowed: .*each once"),
        ({"methods": ()}, r"--methods='' is not allowed: at least one"),
        ({"tasks": ("no_such_task",)}, r"no_such_task"),
        ({"seeds": ("0", "x")}, r"--seeds='x' is not allowed: whole numbers under 2\*\*32"),
        ({"seeds": ("-1",)}, r"--seeds='-1'"),
        ({"seeds": (str(2**32),)}, r"--seeds='4294967296'"),
        ({"seeds": ("1", "1")}, r"--seeds=\('1', '1'\) is not allowed: at least one, each once"),
        ({"rank": 0}, r"--rank=0 is not allowed"),
        ({"budget": "time"}, r"--budget='time' is not allowed: one of parameters, rank"),
        ({"model": "nowhere"}, r"model\.path='nowhere'"),
        ({"num_steps": 0}, r"train\.num_steps=0"),
        ({"sets": ("sira.rank=3",)}, r"--set='sira\.rank=3' is not allowed: the budget sets rank"),
        ({"sets": ("sira.rnk=3",)}, r"--set=sira\.rnk=3: no such field; it has .*rank"),
        ({"sets": ("sira.method='lora'",)}, r"--set=.*: no such field"),
        ({"sets": ("dora.alpha=3",)}, r"--set='dora\.alpha=3' is not allowed: a method of"),
        ({"sets": ("alpha=3",)}, r"--set=alpha=3: write METHOD\.FIELD=VALUE"),
        ({"sets": ("sira.data.pack=False",)}, r"--set=sira\.data\.pack=False: write METHOD"),
        ({"sets": ("sira.alpha=-1",)}, r"sira: adapter\.alpha=-1"),
        ({"sets": ("sira.alpha=high",)}, r"sira: adapter\.alpha='high'"),
        ({"overrides": {"adapter.alpha": 3}}, r"--config\.adapter\.alpha: use --set"),
        ({"overrides": {"train.seed": 3}}, r"--config\.train\.seed=3 is not allowed: use --seeds"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(options, tmp_path, changes, message):
    with pytest.raises(SiraError, match=message):
        plan(options, tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_a_config_that_knows_no_methods(options, tmp_path):
    file = tmp_path / "config.py"
    file.write_text("def get_config():\n    return None\n")
    with pytest.raises(SiraError, match="its get_config must take the method"):
        plan(options, tmp_path, config=str(file))


def test_a_directory_of_another_comparison_is_refused(options, tmp_path):
    by_method, _ = plan(options, tmp_path)
    run = by_method["sira"][1]
    (run.directory / "checkpoints" / "20").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"config\.json is missing or damaged"):
        plan(options, tmp_path)
    saved = dataclasses.replace(run.experiment, adapter=by_method["lora"][1].experiment.adapter)
    (run.directory / "config.json").write_text(json.dumps({"config": saved.to_dict()}))
    with pytest.raises(CheckpointError, match=r"was started with adapter\."):
        plan(options, tmp_path)
    (run.directory / "config.json").write_text(json.dumps({"config": run.experiment.to_dict()}))
    plan(options, tmp_path)
