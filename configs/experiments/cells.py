"""What the cells of the tables share: the two scales, the methods, and the experiment of one cell.

`laptop` is SmolLM2-135M on two CPU cores, with data that need no agreement; `paper` is FLAN-T5 and mT5 XL on TPUs, `paper-SIZE`
another size. These models stand in for the paper's, so that its numbers are not to be expected.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import base
from configs.experiments.compare import adapter_of
from sira_jax.errors import ConfigError, check

# The paper's columns; configs/sweeps takes others by name.
METHODS = ("none", "lora", "adamix", "molora", "sira")
SIZES = ("small", "base", "large", "xl", "xxl")
PAPER, LAPTOP = "paper", "laptop"
SEEDS = (0, 1, 2)
# The English tasks are FLAN-T5's, the others need mT5's vocabulary.
_ENGLISH = ("finqa", "forumsum")
# A gate of an untrained router is about 1/16: the larger scale lets the experts start as fast as LoRA does.
_LAPTOP_ADAPTER: Mapping[str, Mapping[str, Any]] = {"sira": {"alpha": 32.0}}


def family(scale: str) -> str:
    """ "laptop" or "paper", the part of a scale before its size.

    Raises:
      ConfigError: there is no such scale.
    """
    name, _, size = scale.partition("-")
    known = name in (LAPTOP, PAPER) and (not size or (name == PAPER and size in SIZES))
    check(known, "scale", scale, f"{LAPTOP}, {PAPER} or {PAPER}-SIZE with {', '.join(SIZES)}")
    return name


def split_cell(cell: str, parts: int, form: str) -> list[str]:
    """The parts of a cell's name. Raises ConfigError where there are more or fewer than `parts`."""
    found = cell.split("/")
    if len(found) != parts or not all(found):
        raise ConfigError(f"the config's argument {cell!r} is not allowed: {form}")
    return found


def experiment(scale: str, tasks: tuple[str, ...], method: str, **adapter: Any) -> ConfigDict:
    """One cell: a method on tasks at a scale.

    Args:
      scale: "laptop", "paper" or "paper-SIZE".
      tasks: names of tasks or mixtures.
      method: an adapter's name, or "none".
      adapter: fields of the adapter that differ from its defaults.
    """
    config = base.get_config()
    config.adapter = adapter_of(method)
    config.data.tasks = tasks
    config.optimizer.schedule = "linear"
    config.optimizer.end_factor = 0.1
    config.train.keep_checkpoints = 1
    config.train.keep_best = ""  # The last step counts: all methods have then seen the same tokens.
    if family(scale) == LAPTOP:
        _laptop(config)
        config.adapter.update(_LAPTOP_ADAPTER.get(method, {}))
    else:
        _paper(config, tasks, scale.partition("-")[2] or "xl")
    with config.adapter.ignore_type():
        config.adapter.update(adapter)
    return config


def _laptop(config: ConfigDict) -> None:
    config.model.path = "smollm2-135m"
    config.data.sequence_length = 256
    config.data.batch_size = 1
    config.data.too_long = "drop"  # A few function calls do not fit.
    config.train.num_steps = 60
    config.train.loss_chunk_size = 64  # Prompts carry no loss, so need no logits.
    config.train.log_every = 10
    config.train.eval_every = 30
    config.train.checkpoint_every = 30
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 5
    config.evaluate.loss_examples_per_task = 8
    config.evaluate.examples_per_task = 24
    config.decode.max_new_tokens = 64


def _paper(config: ConfigDict, tasks: tuple[str, ...], size: str) -> None:
    model = "flan-t5" if set(tasks) <= set(_ENGLISH) else "mt5"
    config.model.path = f"models/{model}-{size}"  # A Hugging Face folder.
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.model.remat_policy = "dots_no_batch"
    config.data.sequence_length = 1024
    config.data.target_length = 128
    config.data.batch_size = 128
    config.data.pack = False
    config.data.too_long = "truncate_inputs"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.train.num_steps = 5000
    config.train.log_every = 100
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.evaluate.loss_examples_per_task = 256
    config.decode.max_new_tokens = 128
