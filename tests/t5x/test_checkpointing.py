"""The base from plain T5X's checkpoints, the adapter's own checkpoints, and the ways to native training and back."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import core as flax_core

from sira_jax.adapters import LoRAConfig, is_adapter, partition
from sira_jax.checkpoints.adapter_file import load_adapter
from sira_jax.checkpoints.fingerprint import fingerprint
from sira_jax.checkpoints.orbax import Checkpointer
from sira_jax.errors import CheckpointError, ConfigError
from sira_jax.training.config import OptimizerConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import fresh_state, split_params
from sira_jax.training.train_step import make_train_step
from tests.t5x.tiny_t5x import (
    MISSING,
    SEED,
    STEPS,
    T5XRun,
    encoder_decoder,
    example_batches,
    fresh_params,
    native_batch,
    t5x_model,
)

pytestmark = pytest.mark.t5x
pytest.importorskip("t5x", reason=MISSING, exc_type=ImportError)

LORA = LoRAConfig(rank=2, targets=("query", "wo"), dropout_rate=0.2)
MODULE = encoder_decoder(LORA)
BATCHES = list(example_batches(MODULE, STEPS, packed=False))


@pytest.fixture(scope="module")
def run():
    return T5XRun(t5x_model(MODULE))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Format -> (path, plain T5X's model, its parameters)."""
    from tests.t5x.plain_t5x import FORMATS, write_checkpoint

    return {
        name: write_checkpoint(tmp_path_factory.mktemp(name), file_format=name) for name in FORMATS
    }


def checkpointer(run, directory, base_path):
    from sira_jax.t5x_integration.checkpointing import AdapterCheckpointer

    return AdapterCheckpointer(
        run.initializer.global_train_state_shape,
        run.partitioner,
        str(directory),
        base_path=base_path,
    )


def restore(run, path, base_path=None, new=True):
    """As T5X restores: a new run's start, or a run's own checkpoint."""
    from sira_jax.t5x_integration.checkpointing import base_only

    options = {}
    if new:
        fallback = run.initializer.from_scratch(jax.random.PRNGKey(1)).state_dict()
        options = {"state_transformation_fns": [base_only], "fallback_state": fallback}
    return checkpointer(run, "unused", base_path).restore(path=str(path), **options)


def params_of(state):
    return jax.device_get(flax_core.unfreeze(state.params))


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))


@pytest.mark.parametrize("file_format", ["t5x", "orbax"])
def test_the_base_comes_from_plain_t5x_and_the_adapter_from_scratch(run, bases, file_format):
    path, plain, plain_params = bases[file_format]
    state = restore(run, path)
    adapter, base = split_params(params_of(state))
    assert_same(base, flax_core.unfreeze(plain_params))
    assert_same(adapter, split_params(fresh_params(MODULE))[0])
    # The steps of the base's training are not the adapter's.
    assert int(state.step) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(jax.device_get(state.param_states)))
    # A fresh LoRA computes nothing yet: these are two programs for the same function.
    batch = BATCHES[0]
    theirs = plain._compute_logits(plain_params, batch)
    ours = run.model._compute_logits(state.params, batch)
    real = batch["decoder_target_tokens"] > 0
    np.testing.assert_allclose(ours[real], theirs[real], rtol=1e-4, atol=1e-4)


def test_an_assignment_map_renames_on_the_way_in(run, bases):
    from t5x import utils

    from sira_jax.t5x_integration.checkpointing import base_only

    path, _, plain_params = bases["t5x"]
    inner = "target/encoder/layers_0/mlp/wi_"
    config = utils.RestoreCheckpointConfig(
        path=path,
        mode="specific",
        assignment_map=[
            (f"{inner}0/kernel", f"{inner}1/kernel"),
            (f"{inner}1/kernel", f"{inner}0/kernel"),
        ],
        state_transformation_fns=[base_only],
    )
    state = checkpointer(run, "unused", None).restore(
        path=path,
        state_transformation_fns=config.state_transformation_fns,
        fallback_state=run.initializer.from_scratch(jax.random.PRNGKey(1)).state_dict(),
    )
    ours, theirs = (
        params["encoder"]["layers_0"]["mlp"] for params in (params_of(state), plain_params)
    )
    assert_same(ours["wi_0"]["kernel"], theirs["wi_1"]["kernel"])
    assert_same(ours["wi_1"]["kernel"], theirs["wi_0"]["kernel"])


@pytest.fixture(scope="module")
def trained(run, bases, tmp_path_factory):
    """(state after two steps on the base, directory of its checkpoint, metrics of the next steps)."""
    run.state = restore(run, bases["t5x"][0])
    for batch in BATCHES[:2]:
        run.step(batch)
    state = jax.tree.map(lambda x: x.copy(), run.state)
    directory = tmp_path_factory.mktemp("run")
    checkpointer(run, directory, bases["t5x"][0]).save(state)
    later = [run.step(batch) for batch in BATCHES[2:]]
    return state, directory / "checkpoint_2", later


def test_a_run_holds_the_adapter_alone_and_resumes_exactly(run, bases, trained):
    from t5x import checkpoints

    state, path, later = trained
    target = checkpoints.load_t5x_checkpoint(str(path))["target"]
    adapter, others = partition(target, is_adapter)
    assert not others
    assert_same(adapter, split_params(params_of(state))[0])
    resumed = restore(run, path, bases["t5x"][0], new=False)
    assert_same(resumed.params, state.params)
    assert_same(resumed.param_states, state.param_states)
    assert int(resumed.step) == 2
    run.state = resumed
    for batch, expected in zip(BATCHES[2:], later, strict=True):
        assert run.step(batch)["loss"] == expected["loss"]


def test_without_a_base_of_its_own_a_run_holds_everything(run, bases, tmp_path):
    state = restore(run, bases["t5x"][0])
    checkpointer(run, tmp_path, None).save(state)
    assert_same(restore(run, tmp_path / "checkpoint_0", new=False).params, state.params)


def test_another_base_is_refused_on_resuming(run, trained, tmp_path):
    from tests.t5x.plain_t5x import write_checkpoint

    other, *_ = write_checkpoint(tmp_path, seed=5)
    with pytest.raises(
        CheckpointError, match=r"trained on the base model [0-9a-f]{64} \(/.*the loaded"
    ):
        restore(run, trained[1], other, new=False)


def test_without_the_base_an_adapter_alone_is_refused(run, trained):
    with pytest.raises(CheckpointError, match=r"base_path=None .*holds an adapter alone"):
        restore(run, trained[1], None, new=False)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"mlp_dim": 24}, r"decoder/layers_0/mlp/wi_0/kernel.* \(16, 24\).* \(16, 32\)"),
        ({"num_decoder_layers": 2}, r"not in the model: decoder/layers_1/"),
        ({"mlp_activations": ("relu",)}, r"not in the checkpoint: .*mlp/wi_0/kernel"),
    ],
)
@pytest.mark.parametrize("file_format", ["t5x", "orbax"])
def test_a_base_of_another_shape_is_refused(run, tmp_path, sizes, named, file_format):
    from tests.t5x.plain_t5x import write_checkpoint

    path, *_ = write_checkpoint(tmp_path, file_format=file_format, **sizes)
    with pytest.raises(CheckpointError, match=named) as raised:
        restore(run, path)
    assert str(raised.value).startswith(path)
    assert "\n" not in str(raised.value)


def test_a_missing_checkpoint_is_named(run, tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}/checkpoint_3: cannot be restored"):
        restore(run, tmp_path / "checkpoint_3")


# Native training and T5X.

OPTIMIZER = OptimizerConfig()


def native_step():
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    step = make_train_step(
        MODULE, optimizer, make_schedule(OPTIMIZER, STEPS), seed=SEED, num_steps=STEPS
    )
    return jax.jit(step)


@pytest.fixture(scope="module")
def native(run, bases):
    """(frozen base, states after each of STEPS native steps, losses)."""
    adapter, frozen = split_params(params_of(restore(run, bases["t5x"][0])))
    state = fresh_state(adapter, make_optimizer(OPTIMIZER, STEPS))
    step, states, losses = native_step(), [], []
    for batch in BATCHES:
        state, metrics = step(state, frozen, native_batch(batch))
        states.append(state)
        losses.append(float(metrics["loss"]))
    return frozen, states, losses


def save_native(directory, state, frozen):
    saver = Checkpointer(directory)
    meta = {"config": {}, "base_fingerprint": fingerprint(frozen)}
    rest = {"step": state.step, "optimizer": state.optimizer}
    saver.save(int(state.step), state.adapter, rest, {}, meta)
    saver.close()
    return directory / str(int(state.step))


def test_t5x_goes_on_where_native_training_stopped(run, bases, native, tmp_path):
    frozen, states, losses = native
    path = save_native(tmp_path, states[1], frozen)
    run.state = restore(run, path, bases["t5x"][0])
    assert int(run.state.step) == 2
    found = [run.step(batch)["loss"] for batch in BATCHES[2:]]
    np.testing.assert_allclose(found, losses[2:], rtol=1e-5)


def test_native_training_goes_on_where_t5x_stopped(native, trained):
    from sira_jax.t5x_integration.native import to_native

    frozen, _, losses = native
    state, step = to_native(jax.device_get(trained[0])), native_step()
    for batch, expected in zip(BATCHES[2:], losses[2:], strict=True):
        state, metrics = step(state, frozen, native_batch(batch))
        np.testing.assert_allclose(float(metrics["loss"]), expected, rtol=1e-5)


def test_a_native_checkpoint_of_another_base_is_refused(run, bases, native, tmp_path):
    _, states, _ = native
    path = save_native(tmp_path, states[1], {"another": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match="was trained on the base model"):
        restore(run, path, bases["t5x"][0])


# Adapter folders.


@pytest.fixture(scope="module")
def folder(run, bases, trained, tmp_path_factory):
    from t5x import utils

    from sira_jax.t5x_integration.checkpointing import AdapterCheckpointer
    from sira_jax.t5x_integration.export import export

    path = tmp_path_factory.mktemp("export") / "adapter"
    config = utils.RestoreCheckpointConfig(
        path=str(trained[1]),
        mode="specific",
        checkpointer_cls=lambda **kw: AdapterCheckpointer(**kw, base_path=bases["t5x"][0]),
    )
    export(run.model, run.partitioner, config, str(path))
    return path


def test_an_exported_adapter_is_a_folder_of_this_package(folder, trained):
    adapter, base = split_params(params_of(trained[0]))
    config, tree = load_adapter(folder, MODULE.config, fingerprint(base))
    assert config == LORA
    assert_same(tree, adapter)


def test_t5x_starts_from_a_folder(folder, trained, bases):
    run = T5XRun(t5x_model(MODULE, adapter_path=str(folder)), params_of(trained[0]))
    start = restore(run, bases["t5x"][0])
    assert_same(start.params, trained[0].params)


def test_a_folder_of_another_base_or_adapter_is_refused(folder):
    with pytest.raises(CheckpointError, match="fits its own base only"):
        T5XRun(t5x_model(MODULE, adapter_path=str(folder)))
    wide = encoder_decoder(LoRAConfig(rank=3, targets=("query", "wo")))
    with pytest.raises(CheckpointError, match=r"has adapter.rank=2, the model's is 3"):
        T5XRun(t5x_model(wide, adapter_path=str(folder)))


# What T5X's own parts would get wrong.


def test_t5xs_own_trainer_is_refused(run):
    with pytest.raises(ConfigError, match="AdapterTrainer"):
        run.model.loss_fn(run.state.params, BATCHES[0], jax.random.PRNGKey(0))


def test_an_optimizer_of_all_parameters_is_refused():
    from t5x import optimizers

    with pytest.raises(ConfigError, match=r"optimizer_def=.*AdapterOptimizer"):
        T5XRun(t5x_model(MODULE, optimizers.adamw(1e-3)))


def test_fields_are_checked():
    with pytest.raises(ConfigError, match=r"AdapterEncoderDecoderModel.seed=None .*whole number"):
        t5x_model(MODULE, seed=None)
    with pytest.raises(ConfigError, match="num_steps=0"):
        t5x_model(MODULE, num_steps=0)


def test_base_file_names_the_base(trained, bases):
    content = json.loads((Path(trained[1]) / "base.json").read_text())
    assert content["path"] == bases["t5x"][0]
