"""Bad losses on a mesh of eight virtual devices: run by test_bad_loss.py in a process of its own, prints one JSON line."""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from sira_jax.training import partitioning
from sira_jax.training.bad_loss import BadLossConfig
from sira_jax.training.config import DataConfig, MeshConfig
from sira_jax.training.loop import Trainer
from tests.tiny import make_batch
from tests.training.tiny_run import EXPERIMENT, FROZEN, MODEL, Batches

LENGTHS = [(5, 3), (7,), (8,), (2, 2, 3)]
MESHES = {"one": {"data": 1}, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}}


class Poisoned(Batches):
    """Batches 4 and 5 are bad; `last` is the last that comes."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def next_batch(self):
        self.position += 1
        if self.position > self.last:
            raise KeyboardInterrupt
        batch = make_batch(LENGTHS, 8, seed=self.position)
        if self.position in (4, 5):
            batch["decoder_loss_weights"][0, 3] = np.nan
        return batch


def run(folder, action, sizes, last=1000):
    """The adapter's numbers after a run, or None where it was broken off."""
    experiment = dataclasses.replace(
        EXPERIMENT,
        data=DataConfig(tasks=("task",), batch_size=4, sequence_length=8),
        train=dataclasses.replace(EXPERIMENT.train, num_steps=6),
        bad_loss=BadLossConfig(action=action),
        mesh=MeshConfig(**sizes),
    )
    devices = jax.devices()[:1] if sizes == MESHES["one"] else jax.devices()
    mesh = partitioning.make_mesh(experiment.mesh, devices)
    place = partitioning.replicated(mesh)
    frozen = jax.device_put(FROZEN, place)
    trainer = Trainer(experiment, MODEL, frozen, Poisoned(last), folder, mesh, tensorboard=False)
    try:
        assert trainer.run() == "done"
    except KeyboardInterrupt:
        return None
    leaves = jax.tree.leaves(jax.device_get(trainer.state.adapter))
    return np.concatenate([leaf.ravel() for leaf in leaves])


def main(folder):
    results = {}
    for action in ("skip", "rewind"):
        one = run(folder / action / "one", action, MESHES["one"])
        whole = run(folder / action / "whole", action, MESHES["mesh"])
        assert run(folder / action / "cut", action, MESHES["mesh"], last=7) is None
        cut = run(folder / action / "cut", action, MESHES["mesh"])
        results[action] = {
            "devices": jax.device_count(),
            "difference": float(np.abs(one - whole).max()),
            "size": float(np.abs(one).max()),
            "resumed_is_equal": bool((cut == whole).all()),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
