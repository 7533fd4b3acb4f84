"""What a run's checkpoints hold, and which of them a run or an evaluation refuses."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from sira_jax.adapters import SiRAConfig
from sira_jax.errors import CheckpointError
from sira_jax.training.config import DecodeConfig, MeshConfig, ModelSource
from sira_jax.training.loop import (
    CHECKPOINTS,
    CONFIG_FILE,
    abstract,
    make_checkpointer,
)
from sira_jax.training.resumable import check_adapter, check_resumable
from tests.training.tiny_run import ADAPTER, EXPERIMENT, FROZEN, STEPS, changed, trainer

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_checkpoints_are_every_second_step_and_every_evaluation(unbroken):
    checkpointer = make_checkpointer(unbroken[0], EXPERIMENT)
    assert checkpointer.all_steps() == [2, 4, 5, 6, 8]
    checkpointer.close()


def test_checkpoints_hold_nothing_of_the_base(unbroken):
    state = unbroken[1]
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(FROZEN))
    assert base > trained
    # Whole arrays are in the folders d; ocdbt.process_0 has them a second time.
    folder = unbroken[0] / CHECKPOINTS / "8"
    stored = sum(
        file.stat().st_size
        for name in ("adapter", "optimizer")
        for file in (folder / name / "d").iterdir()
    )
    assert stored < trained + base / 2


@pytest.mark.parametrize(
    ("experiment", "named"),
    [
        (changed("optimizer", learning_rate=0.02), "optimizer.learning_rate=0.01"),
        (changed("adapter", alpha=3.0), "adapter.alpha=8.0"),
        (changed("adapter", overrides={"q": {"alpha": 1.0}}), "adapter.overrides"),
        (changed("data", batch_size=4), "data.batch_size=2"),
        (changed("data", tasks=("task", "other")), "data.tasks=['task']"),
        (changed("train", seed=1), "train.seed=0"),
        (changed("train", num_steps=9), "train.num_steps=8"),
        (
            dataclasses.replace(EXPERIMENT, adapter=SiRAConfig(targets=("q", "down"))),
            "adapter.",
        ),
    ],
)
def test_another_config_is_refused(experiment, named):
    saved = json.loads(json.dumps(EXPERIMENT.to_dict(), sort_keys=True))
    with pytest.raises(CheckpointError) as error:
        check_resumable(saved, experiment.to_dict(), "runs/here")
    assert named in str(error.value)
    assert "runs/here" in str(error.value)


def test_run_directory_of_another_config_is_left_as_it_is(unbroken):
    before = (unbroken[0] / CONFIG_FILE).read_text()
    other = changed("optimizer", learning_rate=0.02)
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate=0\.01.*0\.02") as error:
        trainer(unbroken[0], experiment=other).run()
    assert str(unbroken[0]) in str(error.value)
    assert (unbroken[0] / CONFIG_FILE).read_text() == before


def test_what_does_not_change_a_step_may_change():
    current = changed("train", log_every=1, eval_every=2, checkpoint_every=3, keep_checkpoints=4)
    current = dataclasses.replace(
        current,
        model=ModelSource(path="elsewhere", remat_policy="full"),
        decode=DecodeConfig(strategy="beam"),
        mesh=MeshConfig(data=1, tensor=-1),
    )
    check_resumable(json.loads(json.dumps(EXPERIMENT.to_dict())), current.to_dict(), "here")


def test_adapter_must_compute_the_same_to_be_evaluated():
    """Fields that act in training alone may differ, and so may all that is no adapter's."""
    saved = json.loads(json.dumps(EXPERIMENT.to_dict()))
    check_adapter(saved, changed("adapter", dropout_rate=0.0), "here")
    check_adapter(saved, changed("train", num_steps=9), "here")
    with pytest.raises(CheckpointError, match=r"adapter\.alpha=8\.0"):
        check_adapter(saved, changed("adapter", alpha=4.0), "here")


def test_another_base_is_refused(unbroken):
    other = jax.tree.map(np.array, FROZEN)
    other["token_embedder"]["embedding"][3, 2] += 1e-3
    with pytest.raises(CheckpointError, match="was trained on the base model") as error:
        trainer(unbroken[0], frozen=other).run()
    assert str(unbroken[0]) in str(error.value)


def expected_shapes(unbroken):
    """The final state as arrays on the device, which `abstract` takes."""
    return jax.tree.map(jax.numpy.asarray, unbroken[1])


def targets_of(state):
    return abstract(state.adapter), abstract({"step": state.step, "optimizer": state.optimizer})


def damaged(content):
    """A file's content cut, emptied, changed in its middle, and None for no file."""
    middle = len(content) // 2
    changed = bytes(255 - byte for byte in content[middle : middle + 16])
    return (content[:middle], b"", content[:middle] + changed + content[middle + 16 :], None)


# Orbax leaves coroutines behind when it fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("item", ["adapter", "optimizer", "data", "meta", "metrics"])
def test_damaged_checkpoint_is_refused_or_restored_whole(tmp_path, unbroken, item):
    """Each file in turn is damaged in each way; arrays that are not what was saved never come back."""
    workdir, expected = unbroken
    folder = workdir / CHECKPOINTS / "8"
    files = [path for path in (folder / item).rglob("*") if path.is_file()]
    # The copy that Orbax merges from is not read again.
    files = [path.relative_to(folder) for path in files if "ocdbt.process_0" not in path.parts]
    plain = json.loads(json.dumps(EXPERIMENT.to_dict()))
    refused = 0
    for number, name in enumerate(files):
        for way, content in enumerate(damaged((folder / name).read_bytes())):
            copy = tmp_path / f"{number}-{way}"
            shutil.copytree(folder, copy / CHECKPOINTS / "8")
            path = copy / CHECKPOINTS / "8" / name
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            try:
                checkpointer = make_checkpointer(copy, EXPERIMENT)
                meta = checkpointer.restore_meta(8)
                adapter, rest, data = checkpointer.restore(
                    8, *targets_of(expected_shapes(unbroken))
                )
            except CheckpointError as error:
                refused += str(copy) in str(error)
                continue
            got = (adapter, rest["optimizer"])
            jax.tree.map(np.testing.assert_array_equal, got, (expected.adapter, expected.optimizer))
            assert data["data"] == {"position": STEPS}
            assert meta["config"] == plain
            checkpointer.close()
    assert refused >= 3


def test_trees_that_do_not_fit_are_refused(unbroken, tmp_path):
    other = dataclasses.replace(
        EXPERIMENT, adapter=dataclasses.replace(ADAPTER, rank=3, targets=("q", "down", "up"))
    )
    narrow = dataclasses.replace(EXPERIMENT, adapter=dataclasses.replace(ADAPTER, rank=1))
    checkpointer = make_checkpointer(unbroken[0], EXPERIMENT)
    for number, experiment in enumerate((other, narrow)):
        state = trainer(tmp_path / str(number), experiment=experiment).state
        with pytest.raises(CheckpointError):
            checkpointer.restore(8, *targets_of(state))
        with pytest.raises(CheckpointError):
            checkpointer.restore_adapter(8, targets_of(state)[0])
    checkpointer.close()
