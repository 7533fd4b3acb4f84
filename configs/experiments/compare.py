"""Any method on the CLDR tasks, the same but for the adapter: what scripts/compare.py trains.

  python scripts/compare.py --workdir=runs/compare --methods=all --model=PATH --task=cldr_all --budget=parameters --rank=32
  python scripts/train.py --config=configs/experiments/compare.py:molora --workdir=runs/molora

The argument after the colon is the method, a file of configs/adapters; its fields are those of that file. scripts/compare.py
sets model, tasks, steps, seed and the size that the budget allows; docs/comparison.md says what is equal.
"""

import importlib

from ml_collections import ConfigDict

from configs import base
from sira_jax.adapters import METHODS
from sira_jax.errors import ConfigError, check


def adapter_of(method: str) -> ConfigDict:
    """The adapter section that configs/adapters/METHOD.py gives."""
    check(
        method == "none" or method in METHODS,
        "the config's argument",
        method,
        f"one of none, {', '.join(METHODS)}",
    )
    name = f"configs.adapters.{method}"
    try:
        return importlib.import_module(name).get_config()
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(f"the method {method} has no configs/adapters/{method}.py") from None


def get_config(method: str = "lora") -> ConfigDict:
    """The experiment with one method's adapter."""
    config = base.get_config()
    config.adapter = adapter_of(method)

    config.data.tasks = ("cldr_all",)
    config.data.sequence_length = 256
    config.data.batch_size = 8
    config.data.too_long = "drop"

    config.train.num_steps = 300
    config.train.loss_chunk_size = 64  # Prompts carry no loss, so need no logits.
    config.train.log_every = 20
    config.train.checkpoint_every = 100
    config.train.keep_checkpoints = 1
    config.train.keep_best = ""  # The last step counts: all methods have then seen the same tokens.

    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 10
    config.optimizer.end_factor = 0.1

    config.evaluate.loss_examples_per_task = 4
    config.evaluate.examples_per_task = 8
    config.decode.max_new_tokens = 64
    return config
