"""Training on eight devices is training on one: the same losses, parameters and checkpoints.

The devices are made of the CPU by a flag that holds for a whole process, so everything runs in a
process of its own (`python -m tests.training.test_devices DIRECTORY`) and is looked at here.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.quick import run_on_devices

REPOSITORY = Path(__file__).parents[2]
MESHES = {
    "one": {"data": 1},
    "data": {"data": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "expert": {"data": 4, "expert": 2},
}
STEPS = 3


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("devices")
    run_on_devices("tests.training.test_devices", directory)
    return json.loads((directory / "results.json").read_text())


@pytest.mark.parametrize("name", ["data", "all", "expert"])
def test_losses_and_parameters_are_those_of_one_device(results, name):
    one, many = results["one"], results[name]
    assert many["devices"] == 8
    assert many["metrics"].keys() == one["metrics"].keys()
    for metric in ("loss", "auxiliary_loss", "gradient_norm", "router/gate_entropy"):
        assert f"train/{metric}" in one["metrics"]
    for metric, values in one["metrics"].items():
        assert len(values) == STEPS
        np.testing.assert_allclose(many["metrics"][metric], values, rtol=1e-5, atol=1e-6)
    for path, values in one["adapter"].items():
        np.testing.assert_allclose(many["adapter"][path], values, rtol=1e-4, atol=3e-5)


def test_losses_change_from_step_to_step(results):
    """Or equal losses would say nothing of the updates."""
    losses = results["one"]["metrics"]["train/loss"]
    assert min(abs(a - b) for a, b in itertools.pairwise(losses)) > 1e-3


def test_checkpoint_of_one_mesh_goes_on_with_another(results):
    unbroken, resumed = results["one"], results["resumed"]
    assert resumed["resumed_from"] == 2
    for metric, values in unbroken["metrics"].items():
        np.testing.assert_allclose(resumed["metrics"][metric], values, rtol=1e-5, atol=1e-6)
    for path, values in unbroken["adapter"].items():
        np.testing.assert_allclose(resumed["adapter"][path], values, rtol=1e-4, atol=3e-5)


def test_arrays_are_cut_as_the_table_says(results):
    """Share of a leaf on each device."""
    shares = {name: results[name]["shares"] for name in MESHES}
    assert set(shares["data"].values()) == {1.0}
    assert shares["all"]["layers/mlp/gate/kernel"] == 0.25
    assert shares["all"]["layers/mlp/down/adapter/lora_a"] == 0.5
    assert shares["all"]["layers/mlp/down/adapter/lora_b"] == 1.0
    assert shares["expert"]["layers/mlp/down/adapter/lora_a"] == 0.5
    assert shares["expert"]["layers/mlp/down/adapter/router"] == 0.5
    assert shares["expert"]["layers/mlp/gate/kernel"] == 1.0


@pytest.mark.parametrize("name", MESHES)
def test_moments_lie_where_their_parameters_do(results, name):
    assert results[name]["moment_specs"] == results[name]["parameter_specs"]


def test_fingerprint_of_the_base_does_not_depend_on_the_mesh(results):
    assert len({results[name]["fingerprint"] for name in MESHES}) == 1


def main(directory: Path) -> None:
    """Trains on every mesh and writes results.json."""
    import jax

    from sira_jax.adapters import SiRAConfig
    from sira_jax.checkpoints import fingerprint
    from sira_jax.models import Decoder
    from sira_jax.training import partitioning
    from sira_jax.training.config import (
        DataConfig,
        ExperimentConfig,
        MeshConfig,
        ModelSource,
        OptimizerConfig,
        TrainConfig,
    )
    from sira_jax.training.logging import read_metrics
    from sira_jax.training.loop import Trainer
    from sira_jax.training.train_state import abstract_params, split_params
    from tests.tiny import decoder_config, decoder_params, make_batch

    # The resumed run compiles what another has compiled.
    jax.config.update("jax_compilation_cache_dir", str(directory / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    adapter = SiRAConfig(
        num_experts=4,
        num_selected_experts=2,
        rank=2,
        capacity_factor=1.0,
        min_capacity=1,
        expert_dropout_rate=0.2,
        router_init_std=0.5,
        targets=("down",),
    )
    config = decoder_config(vocab_size=24)
    model = Decoder(config, adapter)
    lengths = [(5, 3), (7,), (4, 2, 2), (8,), (6,), (3, 3), (8,), (2, 5)]

    class PowerCut(Exception):
        pass

    class Batches:
        position = 0
        last = STEPS

        def next_batch(self):
            self.position += 1
            if self.position > self.last:
                raise PowerCut
            return make_batch(lengths, 8, seed=self.position, vocab=24)

        def state(self):
            return {"position": self.position}

        def restore(self, state):
            self.position = state["position"]

    def make_trainer(workdir, mesh_sizes, last=STEPS):
        mesh_config = MeshConfig(**mesh_sizes)
        devices = jax.devices()[:1] if mesh_sizes == MESHES["one"] else jax.devices()
        mesh = partitioning.make_mesh(mesh_config, devices)
        experiment = ExperimentConfig(
            model=ModelSource(path="tiny"),
            adapter=adapter,
            data=DataConfig(tasks=("task",), batch_size=8, sequence_length=8),
            # A large epsilon, so that rounding of gradients near 0 does not turn whole steps.
            optimizer=OptimizerConfig(learning_rate=0.3, epsilon=1e-2),
            train=TrainConfig(num_steps=STEPS, log_every=1, checkpoint_every=2),
            mesh=mesh_config,
        )
        shardings = partitioning.param_shardings(abstract_params(Decoder(config)), mesh)
        frozen = jax.device_put(split_params(decoder_params(model))[1], shardings)
        batches = Batches()
        batches.last = last
        trainer = Trainer(experiment, model, frozen, batches, workdir, mesh, tensorboard=False)
        return trainer, frozen

    def name(path):
        return "/".join(entry.key for entry in path)

    def leaves(tree):
        return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def report(trainer, frozen, workdir):
        adapter = leaves(trainer.state.adapter)
        moments = next(
            part.mu
            for part in jax.tree.leaves(
                trainer.state.optimizer, is_leaf=lambda part: hasattr(part, "mu")
            )
            if hasattr(part, "mu")
        )
        lines = read_metrics(workdir)
        metrics = [key for key in lines[0] if key.startswith("train/")]
        shares = {
            path: leaf.addressable_shards[0].data.size / leaf.size
            for path, leaf in (leaves(frozen) | adapter).items()
        }
        return {
            "devices": len(next(iter(adapter.values())).sharding.device_set),
            "metrics": {key: [line[key] for line in lines] for key in metrics},
            "adapter": {path: np.asarray(leaf).tolist() for path, leaf in adapter.items()},
            "shares": shares,
            "parameter_specs": {path: placement(leaf) for path, leaf in adapter.items()},
            "moment_specs": {path: placement(leaf) for path, leaf in leaves(moments).items()},
            "fingerprint": fingerprint(frozen),
        }

    def placement(leaf):
        return sorted((shard.device.id, str(shard.index)) for shard in leaf.addressable_shards)

    results = {}
    for mesh_name, sizes in MESHES.items():
        workdir = directory / mesh_name
        trainer, frozen = make_trainer(workdir, sizes)
        assert trainer.run() == "done"
        results[mesh_name] = report(trainer, frozen, workdir)

    workdir = directory / "resumed"
    trainer, _ = make_trainer(workdir, MESHES["all"], last=2)
    try:
        trainer.run()
    except PowerCut:
        trainer, frozen = make_trainer(workdir, MESHES["expert"])
        results["resumed"] = {"resumed_from": trainer.latest_step()}
        assert trainer.run() == "done"
        results["resumed"] |= report(trainer, frozen, workdir)
    (directory / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
