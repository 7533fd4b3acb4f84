"""A tiny run through the loop: stopped in any way and resumed, it ends as one without a stop."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from sira_jax.adapters import LoRAConfig, SiRAConfig
from sira_jax.errors import CheckpointError, ConfigError, TrainingError
from sira_jax.models import Decoder
from sira_jax.training.config import (
    DataConfig,
    DecodeConfig,
    ExperimentConfig,
    MeshConfig,
    ModelSource,
    OptimizerConfig,
    TrainConfig,
)
from sira_jax.training.logging import METRICS_FILE, read_metrics
from sira_jax.training.loop import (
    CHECKPOINTS,
    CONFIG_FILE,
    Trainer,
    abstract,
    check_adapter,
    check_resumable,
    make_checkpointer,
)
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


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    """All runs here share their programs through JAX's cache on disk."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    values = (str(tmp_path_factory.mktemp("programs")), 0.0, -1)
    for name, value in zip(names, values, strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(run directory, final state) of a run without a stop."""
    workdir = tmp_path_factory.mktemp("unbroken")
    run = trainer(workdir)
    assert run.run() == "done"
    return workdir, jax.device_get(run.state)


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


def test_unbroken_run(unbroken):
    workdir, state = unbroken
    assert int(state.step) == STEPS
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == [3, 5, 6, 8, 8]
    train_lines = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train_lines] == [3, 6, 8]
    assert [line["step"] for line in lines if "validation/loss" in line] == [5, 8]
    # Means over the steps since the last line: the learning rate shows which.
    peak, rates = 0.01, [0.0, 0.005]
    rates += [peak * (1 + np.cos(np.pi * i / (STEPS - 1 - 2))) / 2 for i in range(STEPS - 2)]
    for line, steps in zip(train_lines, (rates[:3], rates[3:6], rates[6:]), strict=True):
        np.testing.assert_allclose(line["train/learning_rate"], np.mean(steps), rtol=1e-5)
        assert line["train/tokens"] == 15
        assert line["speed/seconds_per_step"] > 0
    config = json.loads((workdir / CONFIG_FILE).read_text())
    assert config["config"]["train"]["num_steps"] == STEPS
    assert len(config["base_fingerprint"]) == 64


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


@pytest.mark.parametrize("stop_at", [1, 5])
def test_sigterm_saves_the_step_under_way_and_the_run_goes_on_from_it(tmp_path, unbroken, stop_at):
    def terminate(step):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stopped = trainer(tmp_path, Batches(terminate))
    assert stopped.run() == "SIGTERM"
    assert stopped.latest_step() == stop_at
    assert int(stopped.state.step) == stop_at
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed = trainer(tmp_path)
    assert resumed.run() == "done"
    assert_same_run(tmp_path, resumed.state, unbroken)


def test_ctrl_c_saves_too(tmp_path):
    def interrupt(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = trainer(tmp_path, Batches(interrupt))
    assert stopped.run() == "SIGINT"
    assert stopped.latest_step() == 3


def test_signal_in_the_last_step_is_a_finished_run(tmp_path, unbroken):
    def terminate(step):
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    run = trainer(tmp_path, Batches(terminate))
    assert run.run() == "done"
    assert_same_run(tmp_path, run.state, unbroken)


@pytest.mark.parametrize("crash_at", [2, 7])
def test_crash_loses_only_the_steps_since_the_checkpoint(tmp_path, unbroken, crash_at):
    class PowerCut(Exception):
        pass

    def crash(step):
        if step == crash_at:
            raise PowerCut

    with pytest.raises(PowerCut):
        trainer(tmp_path, Batches(crash)).run()
    # The crash may have torn the last line, and may have left lines of steps that are run again.
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "train/loss": 1.0}\n{"step": 9, "tr')
    resumed = trainer(tmp_path)
    assert resumed.latest_step() == {2: None, 7: 6}[crash_at]
    assert resumed.run() == "done"
    assert_same_run(tmp_path, resumed.state, unbroken)


def test_finished_run_is_left_as_it_is(tmp_path, unbroken):
    shutil.copytree(unbroken[0], tmp_path / "run")

    def refuse(step):
        raise AssertionError("a step was run")

    again = trainer(tmp_path / "run", Batches(refuse))
    assert again.run() == "done"
    assert_same_run(tmp_path / "run", again.state, unbroken)


@pytest.mark.parametrize("what", ["weight", "base"])
def test_what_is_no_number_stops_the_run_and_spoils_nothing(tmp_path, unbroken, what):
    def poison(step, batch):
        if step == 4:
            batch["decoder_loss_weights"][0, 3] = np.nan
        return batch

    if what == "base":
        spoilt = jax.tree.map(np.array, FROZEN)
        spoilt["final_norm"]["scale"][0] = np.inf
        with pytest.raises(
            TrainingError, match=r"loss is nan at step 1; there is no checkpoint yet"
        ):
            trainer(tmp_path, frozen=spoilt).run()
        return
    with pytest.raises(TrainingError) as error:
        trainer(tmp_path, Batches(change=poison)).run()
    good = tmp_path / CHECKPOINTS / "2"
    assert str(error.value) == f"loss is nan at step 4; the last good checkpoint is {good}"
    assert all(np.isfinite(value) for line in read_metrics(tmp_path) for value in line.values())
    # With the data mended, the run ends as if nothing had been.
    resumed = trainer(tmp_path)
    assert resumed.latest_step() == 2
    assert resumed.run() == "done"
    assert_same_run(tmp_path, resumed.state, unbroken)


def test_evaluation_that_is_no_number_stops_the_run(tmp_path):
    values = iter([1.0, float("nan")])
    run = trainer(tmp_path, evaluate=lambda _: {"validation/loss": next(values)})
    good = tmp_path / CHECKPOINTS / "6"
    with pytest.raises(TrainingError, match=rf"validation/loss is nan at step 8; .* {good}$"):
        run.run()
    assert run.latest_step() == 6


@pytest.mark.parametrize(
    ("mode", "best", "kept"), [("min", 3, [3, 8]), ("max", 5, [5, 8]), ("off", None, [8])]
)
def test_best_and_newest_are_kept(tmp_path, mode, best, kept):
    values = iter([0.5, 0.4, 0.1, 0.3, 0.9, 0.2, 0.8, 0.6])
    options = {"keep_best": ""} if mode == "off" else {"best_mode": mode}
    experiment = changed("train", eval_every=1, keep_checkpoints=1, **options)
    run = trainer(
        tmp_path, experiment=experiment, evaluate=lambda _: {"validation/loss": next(values)}
    )
    assert run.run() == "done"
    checkpointer = make_checkpointer(tmp_path, experiment)
    assert checkpointer.best_step() == best
    assert checkpointer.all_steps() == kept
    checkpointer.close()


def test_evaluation_without_the_kept_metric_loses_no_step(tmp_path):
    experiment = changed("train", checkpoint_every=100, keep_best="validation/bleu")
    with contextlib.suppress(ConfigError, TrainingError):
        trainer(tmp_path, experiment=experiment).run()
    checkpointer = make_checkpointer(tmp_path, experiment)
    assert checkpointer.latest_step() == STEPS
    checkpointer.close()


def test_run_without_evaluation(tmp_path):
    run = trainer(tmp_path, evaluate=None)
    assert run.run() == "done"
    assert not any("validation/loss" in line for line in read_metrics(tmp_path))
    assert run.latest_step() == STEPS


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
