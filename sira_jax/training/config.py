"""The experiment as plain frozen data. ml_collections configs (and later gin) fill these in; each checks itself.

`make_experiment` turns the nested mapping of a config file into an `ExperimentConfig` and is the single place where a wrong
field, type or value is found, before anything is loaded.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sira_jax.adapters import AdapterConfig, make_config
from sira_jax.errors import ConfigError, check, is_finite_number, is_whole_number
from sira_jax.models.config import DTYPES, REMAT_POLICIES
from sira_jax.quantized import KINDS
from sira_jax.training.axis_rules import MESH_AXES, freeze_rules
from sira_jax.training.bad_loss import BadLossConfig

STRATEGIES = ("greedy", "sample", "beam")
OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("constant", "linear", "cosine", "rsqrt")
TEMPLATES = ("plain", "chat")
TOO_LONG = ("error", "drop", "truncate_inputs")


def _check_int(field: str, value: object, least: int) -> None:
    check(
        is_whole_number(value) and value >= least,
        field,
        value,
        f"a whole number of at least {least}",
    )


def _check_range(field: str, value: object, low: float, high: float = math.inf) -> None:
    allowed = f"a number of at least {low}" if high == math.inf else f"a number in [{low}, {high}]"
    check(is_finite_number(value) and low <= value <= high, field, value, allowed)


def _check_seed(field: str, value: object) -> None:
    # JAX's keys hold 32 bits: a larger seed would repeat a smaller one.
    _check_int(field, value, 0)
    check(value < 2**32, field, value, "a whole number under 2**32")


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    check(value in choices, field, value, f"one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which base model, and how it is held and computed.

    Attributes:
      path: a GGUF file, a Hugging Face folder, or a name that scripts/download_data.py knows.
      dtype: type of the computation.
      param_dtype: type the frozen base is held in.
      remat_policy: see DecoderConfig.
      scan_layers: see DecoderConfig.
      quantization: how the frozen projections are held: "none", "int8", "int4" or "nf4" (docs/scaling.md has the loss in
        quality); the others need qwix.
    """

    path: str = ""
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat_policy: str = "none"
    scan_layers: bool = True
    quantization: str = "none"

    def __post_init__(self):
        is_path = isinstance(self.path, str) and self.path != ""
        check(is_path, "model.path", self.path, "a model file, folder or known name")
        _check_choice("model.dtype", self.dtype, DTYPES)
        _check_choice("model.param_dtype", self.param_dtype, DTYPES)
        _check_choice("model.remat_policy", self.remat_policy, REMAT_POLICIES)
        check(isinstance(self.scan_layers, bool), "model.scan_layers", self.scan_layers, "a bool")
        _check_choice("model.quantization", self.quantization, KINDS)

    @property
    def options(self) -> dict[str, Any]:
        """What the loaders of base models take as fields of the model's config."""
        fields = dataclasses.asdict(self)
        del fields["path"], fields["quantization"]
        return fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tasks, and how their examples become batches.

    Attributes:
      tasks: names of tasks or mixtures.
      rates: "mixture" keeps the rates the mixture was registered with, "equal", "proportional" (to the number of examples)
        or "temperature" (proportional to the number of examples to the power 1 / temperature).
      temperature: for rates "temperature".
      template: "plain" (input, new line, target) or "chat" (the model's own chat template).
      vocabulary: "model" for the base model's tokenizer, or what tasks/vocabularies.py takes ("bytes", "sentencepiece:FILE").
      sequence_length: T, tokens a row; of the encoder's rows where the model has an encoder.
      target_length: tokens a row of the decoder behind an encoder; 0 for sequence_length. Decoder-only models ignore it.
      batch_size: B, rows a step over all devices.
      pack: put several examples in a row; they neither attend to nor are counted across one another.
      too_long: what happens to an example of more than T tokens.
    """

    tasks: tuple[str, ...] = ()
    rates: str = "mixture"
    temperature: float = 2.0
    template: str = "plain"
    vocabulary: str = "model"
    sequence_length: int = 256
    target_length: int = 0
    batch_size: int = 8
    pack: bool = True
    too_long: str = "error"

    def __post_init__(self):
        is_listed = isinstance(self.tasks, str | list | tuple)
        check(is_listed, "data.tasks", self.tasks, "names of tasks or mixtures")
        tasks = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)
        object.__setattr__(self, "tasks", tasks)
        are_names = len(tasks) > 0 and all(isinstance(name, str) and name for name in tasks)
        check(are_names, "data.tasks", tasks, "at least one name of a task or mixture")
        _check_choice("data.rates", self.rates, ("mixture", "equal", "proportional", "temperature"))
        _check_range("data.temperature", self.temperature, 1.0)
        _check_choice("data.template", self.template, TEMPLATES)
        is_text = isinstance(self.vocabulary, str) and self.vocabulary != ""
        check(is_text, "data.vocabulary", self.vocabulary, '"model" or a vocabulary')
        _check_int("data.sequence_length", self.sequence_length, 2)
        _check_int("data.target_length", self.target_length, 0)
        _check_int("data.batch_size", self.batch_size, 1)
        check(isinstance(self.pack, bool), "data.pack", self.pack, "a bool")
        _check_choice("data.too_long", self.too_long, TOO_LONG)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer of the adapter's parameters and its learning-rate schedule.

    Attributes:
      name: "adamw" (arXiv 1711.05101) or "adafactor" (arXiv 1804.04235).
      learning_rate: the schedule's peak.
      schedule: after warm-up "constant", "linear" or "cosine" down to end_factor * learning_rate at the last step, or
        "rsqrt" (learning_rate * sqrt(warmup_steps / step)).
      warmup_steps: linear warm-up from 0.
      end_factor: see `schedule`.
      weight_decay: decoupled weight decay: each step takes learning_rate * weight_decay * parameter off.
      beta1, beta2, epsilon: AdamW's.
      clip_norm: largest global norm of the gradient; None for no clipping.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    end_factor: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0

    def __post_init__(self):
        _check_choice("optimizer.name", self.name, OPTIMIZERS)
        _check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        _check_range("optimizer.learning_rate", self.learning_rate, 0.0)
        check(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "over 0")
        _check_int("optimizer.warmup_steps", self.warmup_steps, 0)
        _check_range("optimizer.end_factor", self.end_factor, 0.0, 1.0)
        _check_range("optimizer.weight_decay", self.weight_decay, 0.0)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _check_range(f"optimizer.{name}", value, 0.0, 1.0)
            check(value < 1, f"optimizer.{name}", value, "in [0, 1)")
        _check_range("optimizer.epsilon", self.epsilon, 0.0)
        # B starts at zero, so A's first gradient is zero: without epsilon its update would be 0 / 0.
        check(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "over 0")
        if self.clip_norm is not None:
            _check_range("optimizer.clip_norm", self.clip_norm, 0.0)
            check(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "over 0, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Attributes:
      num_steps: optimizer steps.
      seed: the one seed; keys are folded from it by step and purpose.
      accumulation_steps: microbatches a step; divides data.batch_size.
      loss_chunk_size: target positions whose logits are computed at once; positions that carry no loss then cost nothing.
        0 computes the logits of every position in one product (better on accelerators, and needed where the batch is
        sharded over devices).
      log_every: steps between lines of metrics.jsonl and TensorBoard.
      eval_every: steps between evaluations on the validation split; 0 for none but the last.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: newest checkpoints kept, besides the best one.
      keep_best: metric of the evaluation whose best checkpoint is kept, for example "validation/loss"; "" for none.
      best_mode: "min" or "max".
    """

    num_steps: int = 100
    seed: int = 0
    accumulation_steps: int = 1
    loss_chunk_size: int = 0
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    keep_best: str = "validation/loss"
    best_mode: str = "min"

    def __post_init__(self):
        _check_int("train.num_steps", self.num_steps, 1)
        _check_seed("train.seed", self.seed)
        _check_int("train.accumulation_steps", self.accumulation_steps, 1)
        _check_int("train.loss_chunk_size", self.loss_chunk_size, 0)
        _check_int("train.log_every", self.log_every, 1)
        _check_int("train.eval_every", self.eval_every, 0)
        _check_int("train.checkpoint_every", self.checkpoint_every, 1)
        _check_int("train.keep_checkpoints", self.keep_checkpoints, 1)
        check(isinstance(self.keep_best, str), "train.keep_best", self.keep_best, "a metric's name")
        _check_choice("train.best_mode", self.best_mode, ("min", "max"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How text is generated.

    Attributes:
      strategy: "greedy", "sample" or "beam".
      max_new_tokens: most tokens after the prompt; generation also stops at an end-of-sequence token.
      temperature, top_k, top_p: for "sample"; top_k=0 and top_p=1 switch those off (arXiv 1904.09751 for top-p).
      num_beams: for "beam".
      length_penalty: for "beam": scores are divided by length to this power.
      batch_size: prompts decoded at once.
      seed: for "sample".
    """

    strategy: str = "greedy"
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 4
    length_penalty: float = 1.0
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self):
        _check_choice("decode.strategy", self.strategy, STRATEGIES)
        _check_int("decode.max_new_tokens", self.max_new_tokens, 1)
        _check_range("decode.temperature", self.temperature, 0.0)
        check(
            self.temperature > 0,
            "decode.temperature",
            self.temperature,
            "over 0 (greedy is a strategy)",
        )
        _check_int("decode.top_k", self.top_k, 0)
        _check_range("decode.top_p", self.top_p, 0.0, 1.0)
        check(self.top_p > 0, "decode.top_p", self.top_p, "in (0, 1]")
        _check_int("decode.num_beams", self.num_beams, 1)
        _check_range("decode.length_penalty", self.length_penalty, 0.0)
        _check_int("decode.batch_size", self.batch_size, 1)
        _check_seed("decode.seed", self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What evaluation measures.

    Attributes:
      split: split that is decoded by scripts/evaluate.py.
      examples_per_task: most examples a task that are decoded; 0 for all.
      loss_examples_per_task: most validation examples a task for the loss during training; 0 for all.
    """

    split: str = "test"
    examples_per_task: int = 0
    loss_examples_per_task: int = 64

    def __post_init__(self):
        _check_choice("evaluate.split", self.split, ("train", "validation", "test"))
        _check_int("evaluate.examples_per_task", self.examples_per_task, 0)
        _check_int("evaluate.loss_examples_per_task", self.loss_examples_per_task, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged, and what is cut along which of their axes.

    Attributes:
      data, fsdp, tensor, expert: devices along each mesh axis; -1, in one of them, stands for the devices that are left.
        docs/scaling.md says what is cut along which.
      rules: changes to the table in training/axis_rules.py: pairs of a logical axis and the mesh axes it is cut along, for
        example (("adapter_mlp", None), ("embed", ("data", "fsdp"))); a mapping is taken too.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    rules: Any = ()

    def __post_init__(self):
        object.__setattr__(self, "rules", freeze_rules("mesh.rules", self.rules))
        sizes = self.sizes
        for name, size in sizes.items():
            check(
                is_whole_number(size) and (size == -1 or size > 0),
                f"mesh.{name}",
                size,
                "over 0, or -1",
            )
        check(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "at most one axis of -1")

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> devices, as given."""
        return {name: getattr(self, name) for name in MESH_AXES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything a run depends on."""

    model: ModelSource
    adapter: AdapterConfig | None
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    mesh: MeshConfig = MeshConfig()
    bad_loss: BadLossConfig = dataclasses.field(default_factory=BadLossConfig)

    def __post_init__(self):
        steps = self.train.accumulation_steps
        check(
            self.data.batch_size % steps == 0,
            "train.accumulation_steps",
            steps,
            f"a divisor of data.batch_size={self.data.batch_size}",
        )
        warmup, last = self.optimizer.warmup_steps, self.train.num_steps
        check(warmup <= last, "optimizer.warmup_steps", warmup, f"at most train.num_steps={last}")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data that `make_experiment` reads back."""
        fields = {
            field.name: dataclasses.asdict(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name != "adapter"
        }
        fields["data"]["tasks"] = list(self.data.tasks)
        fields["adapter"] = self.adapter.to_dict() if self.adapter else {"method": "none"}
        return fields


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


def make_experiment(config: Mapping[str, Any]) -> ExperimentConfig:
    """Builds the experiment from nested plain data.

    Raises:
      ConfigError: on an unknown section or field, a wrong type, or a value out of range; it names the field.
    """
    check(isinstance(config, Mapping), "config", config, "a mapping of sections")
    known = ("adapter", *SECTIONS)
    for name in config:
        check(name in known, "config", name, f"sections {', '.join(sorted(known))}")
    for name in ("model", "data", "adapter"):
        if name not in config:
            raise ConfigError(f"config.{name} is missing: it is needed")
    sections = {
        name: _make_section(cls, config[name], name)
        for name, cls in SECTIONS.items()
        if name in config
    }
    return ExperimentConfig(adapter=make_config(config["adapter"]), **sections)


def _make_section(cls: type, fields: Mapping[str, Any], name: str) -> Any:
    check(isinstance(fields, Mapping), name, fields, "a mapping of fields")
    known = [field.name for field in dataclasses.fields(cls)]
    for field in fields:
        check(field in known, f"{name}.{field}", fields[field], f"fields are {', '.join(known)}")
    return cls(**fields)
