"""x"""

from ml_collections import ConfigDict

from configs import base
from configs.adapters import lora, none, sira


def get_config(method: str = "sira") -> ConfigDict:
    """The experiment with one of the methods none, lora, sira."""
    config = base.get_config()
    if method == "sira":
        config.adapter = sira.get_config(alpha=32.0, expert_dropout_rate=0.1)
    elif method == "lora":
        config.adapter = lora.get_config(rank=16, alpha=32.0)
    elif method == "none":
        config.adapter = none.get_config()

    config.data.tasks = ("starter",)
    config.data.sequence_length = 256
    config.data.batch_size = 2
    config.data.too_long = "drop"
    config.train.num_steps = 90
    config.train.loss_chunk_size = 64
    config.train.log_every = 5
    config.train.eval_every = 30
    config.train.checkpoint_every = 30
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 6
    config.optimizer.end_factor = 0.1
    config.evaluate.loss_examples_per_task = 8
    config.evaluate.examples_per_task = 10
    config.decode.max_new_tokens = 64
    return config
