"""SmolLM2-135M on dates, relative times and function calls: the demo's experiment.

  python scripts/train.py --config=configs/experiments/starter.py:sira --workdir=runs/starter_sira

The argument after the colon is the method: none, lora or sira. LoRA's rank 16 gives a token as much rank as SiRA's 4 experts of
rank 4. Time and result: README.md, from `make demo`, which runs all three.
"""

from ml_collections import ConfigDict

from configs import base
from configs.adapters import lora, none, sira
from sira_jax.errors import check

ADAPTERS = {
    "none": none.get_config,
    "lora": lambda: lora.get_config(rank=16, alpha=32.0),
    # A gate of an untrained router is about 1/16: the larger scale lets the experts start as fast as LoRA does.
    "sira": lambda: sira.get_config(alpha=32.0, expert_dropout_rate=0.1),
}


def get_config(method: str = "sira") -> ConfigDict:
    """The experiment with one of ADAPTERS."""
    check(method in ADAPTERS, "the config's argument", method, f"one of {', '.join(ADAPTERS)}")
    config = base.get_config()
    config.adapter = ADAPTERS[method]()

    config.data.tasks = ("starter",)
    config.data.sequence_length = 256
    config.data.batch_size = 2
    config.data.too_long = "drop"  # A few function calls do not fit.

    config.train.num_steps = 36
    config.train.loss_chunk_size = 64  # Prompts carry no loss, so need no logits.
    config.train.log_every = 5
    config.train.eval_every = 18
    config.train.checkpoint_every = 18
    config.train.keep_checkpoints = 1

    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 5
    config.optimizer.end_factor = 0.1

    config.evaluate.loss_examples_per_task = 4
    config.evaluate.examples_per_task = 8
    config.decode.max_new_tokens = 64
    return config
