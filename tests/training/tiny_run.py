"""A run of a few steps that tests start, stop and resume."""

import dataclasses

import jax
import numpy as np

from sira_jax.adapters import LoRAConfig
from sira_jax.models import Decoder
from sira_jax.training.config import (
    DataConfig,
    ExperimentConfig,
    ModelSource,
    OptimizerConfig,
    TrainConfig,
)
from sira_jax.training.logging import read_metrics
from sira_jax.training.loop import CONFIG_FILE, Trainer
from sira_jax.training.partitioning import make_mesh
from sira_jax.training.train_state import split_params
from tests.tiny import decoder_config, decoder_params, make_batch

# Dropout, so that the result depends on every step's random keys.
ADAPTER = LoRAConfig(rank=2, dropout_rate=0.3, targets=("q", "down"))
STEPS = 8
# Checkpoints, log lines and evaluations at steps that do not fall together.
EXPERIMENT = ExperimentConfig(
    model=ModelSource(path="tiny"),
    adapter=ADAPTER,
    data=DataConfig(tasks=("task",), batch_size=2, sequence_length=8),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2, schedule="cosine"),
    train=TrainConfig(
        num_steps=STEPS,
        log_every=3,
        eval_every=5,
        checkpoint_every=2,
        keep_checkpoints=10,
    ),
)
MODEL = Decoder(decoder_config(num_layers=1), ADAPTER)
FROZEN = split_params(decoder_params(MODEL))[1]


class Batches:
    """Batch i is a function of i; `before(i)` is called as step i is about to start."""

    def __init__(self, before=lambda step: None, change=lambda step, batch: batch):
        self.position = 0
        self._before, self._change = before, change

    def next_batch(self):
        self.position += 1
        self._before(self.position)
        batch = make_batch([(5, 3), (7,)], 8, seed=self.position)
        return self._change(self.position, batch)

    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]


def evaluate(adapter):
    return {"validation/loss": sum(float(np.sum(leaf)) for leaf in jax.tree.leaves(adapter))}


def trainer(workdir, data=None, experiment=EXPERIMENT, evaluate=evaluate, frozen=FROZEN):
    model = Decoder(MODEL.config, experiment.adapter)
    return Trainer(
        experiment,
        model,
        frozen,
        data or Batches(),
        workdir,
        make_mesh(experiment.mesh),
        evaluate=evaluate,
        tensorboard=False,
    )


def changed(section, **fields):
    return dataclasses.replace(
        EXPERIMENT, **{section: dataclasses.replace(getattr(EXPERIMENT, section), **fields)}
    )


def assert_same_run(workdir, state, unbroken):
    expected_dir, expected = unbroken
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)

    def lines(directory):
        return [
            {name: value for name, value in line.items() if not name.startswith("speed/")}
            for line in read_metrics(directory)
        ]

    assert lines(workdir) == lines(expected_dir)
    assert (workdir / CONFIG_FILE).read_text() == (expected_dir / CONFIG_FILE).read_text()
