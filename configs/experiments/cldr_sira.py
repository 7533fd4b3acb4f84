"""x"""

from configs import base
from configs.adapters import sira


def get_config():
    """The experiment."""
    config = base.get_config()
    config.adapter = sira.get_config()
    config.data.tasks = ("cldr_en", "cldr_sw")
    config.data.sequence_length = 128
    config.data.batch_size = 4
    config.train.num_steps = 4
    config.train.loss_chunk_size = 128
    config.train.log_every = 1
    config.train.checkpoint_every = 2
    config.evaluate.loss_examples_per_task = 4
    config.evaluate.examples_per_task = 2
    config.decode.max_new_tokens = 16
    return config
