"""The experiment's config: each field refuses wrong values by name, and survives plain data."""

import dataclasses
import json

import pytest

from sira_jax.adapters import LoRAConfig, SiRAConfig
from sira_jax.errors import ConfigError
from sira_jax.training.bad_loss import BadLossConfig
from sira_jax.training.config import (
    DataConfig,
    DecodeConfig,
    EvaluateConfig,
    ExperimentConfig,
    MeshConfig,
    ModelSource,
    OptimizerConfig,
    TrainConfig,
    make_experiment,
)

NAN, INFINITY = float("nan"), float("inf")
MINIMAL = {
    "model": {"path": "model.gguf"},
    "data": {"tasks": ["a_task"]},
    "adapter": {"method": "none"},
}
SECTIONS = {
    "model": ModelSource,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "decode": DecodeConfig,
    "evaluate": EvaluateConfig,
    "mesh": MeshConfig,
    "bad_loss": BadLossConfig,
}
WRONG = {
    "bad_loss.action": ["ignore", None],
    "bad_loss.spike_factor": [1, 0.5, -2.0, NAN, INFINITY, None, "2"],
    "bad_loss.window": [0, 2.5, True],
    "bad_loss.patience": [0, -1, None],
    "model.path": ["", None, 5],
    "model.dtype": ["float64", None, "fp32"],
    "model.param_dtype": ["int8"],
    "model.remat_policy": ["some", True],
    "model.scan_layers": [1, "yes", None],
    "model.quantization": ["int3", None, 8],
    "data.tasks": [(), "", ("a", ""), ("a", 5), 5, None],
    "data.rates": ["even", None, ["equal"]],
    "data.temperature": [0.5, NAN, INFINITY, "2", True],
    "data.template": ["html"],
    "data.vocabulary": ["", None],
    "data.sequence_length": [1, 0, 8.0, True],
    "data.batch_size": [0, -1, "8"],
    "data.pack": [1, "true"],
    "data.too_long": ["truncate"],
    "optimizer.name": ["sgd"],
    "optimizer.learning_rate": [0, -1e-3, NAN, INFINITY, "1e-3", None],
    "optimizer.schedule": ["step"],
    "optimizer.warmup_steps": [-1, 1.5, 101],
    "optimizer.end_factor": [-0.1, 1.1],
    "optimizer.weight_decay": [-1, NAN],
    "optimizer.beta1": [-0.1, 1.0, 1.5],
    "optimizer.beta2": [-0.1, 1.0, None],
    "data.target_length": [-1, 0.5],
    "optimizer.epsilon": [-1e-8, 0, NAN],
    "optimizer.clip_norm": [0, -1.0, NAN, "1"],
    "train.num_steps": [0, 1.0, True, None],
    "train.seed": [-1, 0.5, 2**32],
    "train.accumulation_steps": [0, 3],
    "train.loss_chunk_size": [-1, 0.5],
    "train.log_every": [0],
    "train.eval_every": [-1],
    "train.checkpoint_every": [0],
    "train.keep_checkpoints": [0],
    "train.keep_best": [None, 5],
    "train.best_mode": ["most"],
    "decode.strategy": ["top_k"],
    "decode.max_new_tokens": [0],
    "decode.temperature": [0, -1.0, NAN],
    "decode.top_k": [-1, 1.5],
    "decode.top_p": [0, 1.1, -0.5, NAN],
    "decode.num_beams": [0],
    "decode.length_penalty": [-1.0, NAN],
    "decode.batch_size": [0],
    "decode.seed": [-1, 2**40],
    "evaluate.split": ["dev"],
    "evaluate.examples_per_task": [-1],
    "evaluate.loss_examples_per_task": [-1, 2.5],
    "mesh.data": [0, -2, "2", 1.0],
    "mesh.fsdp": [0, True],
    "mesh.tensor": [-3],
    "mesh.expert": [None],
    "mesh.rules": [3, {"width": "fsdp"}, {"embed": "model"}, (("embed",),)],
}


def with_field(path, value):
    section, field = path.split(".")
    return MINIMAL | {section: MINIMAL.get(section, {}) | {field: value}}


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in WRONG.items() for value in values]
)
def test_wrong_value_is_named(path, value):
    with pytest.raises(ConfigError) as error:
        make_experiment(with_field(path, value))
    message = str(error.value)
    assert path in message
    assert " is not allowed: " in message
    assert "\n" not in message


def test_every_field_has_a_wrong_value_here():
    fields = {
        f"{name}.{field.name}"
        for name, cls in SECTIONS.items()
        for field in dataclasses.fields(cls)
    }
    assert fields == set(WRONG)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({name: MINIMAL[name] for name in ("model", "data")}, "config.adapter"),
        ({name: MINIMAL[name] for name in ("model", "adapter")}, "config.data"),
        ({name: MINIMAL[name] for name in ("data", "adapter")}, "config.model"),
        (MINIMAL | {"trian": {}}, "trian"),
        (MINIMAL | {"train": {"steps": 5}}, "train.steps"),
        (MINIMAL | {"train": 5}, "train"),
        (MINIMAL | {"model": None}, "model"),
        (MINIMAL | {"model": {}}, "model.path"),
        (MINIMAL | {"data": {}}, "data.tasks"),
        (MINIMAL | {"adapter": 5}, "adapter"),
        (MINIMAL | {"adapter": {"method": "lora", "rnk": 4}}, "adapter.rnk"),
        (MINIMAL | {"adapter": {"method": "sira", "num_experts": 0}}, "adapter.num_experts"),
        (MINIMAL | {"mesh": {"data": -1, "tensor": -1}}, "mesh"),
        (5, "config"),
    ],
)
def test_wrong_structure_is_named(config, named):
    with pytest.raises(ConfigError) as error:
        make_experiment(config)
    assert named in str(error.value)


def test_contradictions_between_sections_are_named():
    accumulate = MINIMAL | {
        "data": {"tasks": ["a"], "batch_size": 6},
        "train": {"accumulation_steps": 4},
    }
    with pytest.raises(ConfigError, match=r"train\.accumulation_steps=4.*data\.batch_size=6"):
        make_experiment(accumulate)
    warmup = MINIMAL | {"optimizer": {"warmup_steps": 11}, "train": {"num_steps": 10}}
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps=11.*train\.num_steps=10"):
        make_experiment(warmup)


OTHER = {
    "model": {"path": "folder", "dtype": "bfloat16", "scan_layers": False, "remat_policy": "dots"},
    "data": {"tasks": ["a", "b"], "rates": "temperature", "temperature": 3.0, "pack": False},
    "adapter": {
        "method": "sira",
        "num_experts": 8,
        "group_size": 32,
        "targets": ["q", "mlp/.*"],
        "overrides": [["mlp/.*", {"rank": 2}], ["down", {"rank": 8, "num_experts": 4}]],
    },
    "optimizer": {"name": "adafactor", "clip_norm": None, "schedule": "rsqrt", "warmup_steps": 3},
    "train": {"num_steps": 7, "accumulation_steps": 2, "keep_best": ""},
    "decode": {"strategy": "beam", "num_beams": 2},
    "evaluate": {"split": "validation"},
    "mesh": {"data": 2, "tensor": -1},
}


@pytest.mark.parametrize("config", [MINIMAL, OTHER])
def test_plain_data_round_trip_through_sorted_json(config):
    experiment = make_experiment(config)
    plain = json.loads(json.dumps(experiment.to_dict(), sort_keys=True))
    again = make_experiment(plain)
    assert again == experiment
    assert again.to_dict() == experiment.to_dict()
    for section, fields in config.items():
        for field, value in fields.items():
            if field != "overrides":
                assert plain[section][field] == value


def test_defaults_are_the_dataclasses():
    experiment = make_experiment(MINIMAL)
    expected = ExperimentConfig(
        model=ModelSource(path="model.gguf"), adapter=None, data=DataConfig(tasks=("a_task",))
    )
    assert experiment == expected


def test_a_single_task_may_be_a_string():
    assert DataConfig(tasks="a_task") == DataConfig(tasks=("a_task",))


def test_adapter_section_chooses_the_class():
    for method, cls in (("lora", LoRAConfig), ("sira", SiRAConfig)):
        experiment = make_experiment(MINIMAL | {"adapter": {"method": method, "rank": 3}})
        assert experiment.adapter == cls(rank=3)
