"""Damaged checkpoints, leftovers of kills, and a device without room."""

import resource
import shutil
import time

import jax
import numpy as np
import pytest

from sira_jax.checkpoints import checksums
from sira_jax.checkpoints.orbax import TRASH, whole_steps
from sira_jax.errors import CheckpointError, StorageError
from sira_jax.files import write_text
from sira_jax.training import checkpoint_files
from sira_jax.training.loop import CHECKPOINTS, make_checkpointer
from tests.training.tiny_run import EXPERIMENT, Batches, assert_same_run, changed, trainer

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture
def copy(unbroken, tmp_path):
    """A finished run whose last checkpoint is 8, as it was at step 6, which is 8's predecessor."""
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    return workdir


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def test_every_file_of_a_checkpoint_has_a_checksum(unbroken):
    folder = unbroken[0] / CHECKPOINTS / "8"
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert len(files) > 20
    for path in files:
        name = str(path.relative_to(folder))
        content = path.read_bytes()
        if not content or name in (checksums.CHECKSUMS, "commit_success.txt"):
            continue
        flip(path)
        assert checksums.problem(folder) == f"{name} has changed since it was written"
        path.write_bytes(content)
    assert checksums.problem(folder) is None


@pytest.mark.parametrize("name", ["adapter", "optimizer", "data", "meta", "metrics"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(copy, unbroken, capsys, name, cut):
    folder = copy / CHECKPOINTS / "8"
    path = max((folder / name).rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    if cut:
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip(path)
    run = trainer(copy)
    assert run.latest_step() == 6
    problem = f"{path.relative_to(folder)} has changed since it was written"
    warning = f"warning: {folder} is damaged: {problem}; it is 8.damaged now, and the run goes on from 6\n"
    assert capsys.readouterr().err == warning
    assert run.run() == "done"
    assert_same_run(copy, run.state, unbroken)
    assert (copy / CHECKPOINTS / "8.damaged").is_dir()
    assert trainer(copy).latest_step() == 8


def test_damage_of_several_and_of_what_is_read_of_all(copy, capsys):
    folder = copy / CHECKPOINTS
    flip(folder / "8" / "checksums.json")
    shutil.rmtree(folder / "6" / "optimizer")
    flip(folder / "5" / "metrics" / "metrics")
    flip(folder / "2" / "meta" / "metadata")
    run = trainer(copy)
    assert run.latest_step() == 4
    assert whole_steps(folder) == [2, 4]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" is damaged")[0] for line in lines] == [
        f"warning: {folder / step}" for step in ("8", "6", "5")
    ]


def test_without_a_sound_checkpoint_the_run_is_refused(copy):
    for step in whole_steps(copy / CHECKPOINTS):
        flip(copy / CHECKPOINTS / str(step) / "data" / "metadata")
    before = sorted(path.name for path in (copy / CHECKPOINTS).iterdir())
    with pytest.raises(CheckpointError, match=r"all checkpoints are damaged \(8: data/metadata"):
        trainer(copy)
    assert sorted(path.name for path in (copy / CHECKPOINTS).iterdir()) == before


def test_what_a_kill_leaves_is_removed(copy):
    left = [copy / CHECKPOINTS / name for name in ("9.orbax-checkpoint-tmp", f"{TRASH}/4")]
    for folder in left:
        shutil.copytree(copy / CHECKPOINTS / "8", folder)
    checkpoint_files.prepare(copy / CHECKPOINTS)
    assert not any(folder.exists() for folder in left)
    assert whole_steps(copy / CHECKPOINTS) == [2, 4, 5, 6, 8]


def test_old_checkpoints_are_removed_whole_and_leave_nothing(tmp_path):
    """One goes only once its successor is there, and by its name first."""
    seen = []

    def look(step):
        folder = tmp_path / CHECKPOINTS
        seen.append([checksums.problem(folder / str(step)) for step in whole_steps(folder)])

    experiment = changed("train", keep_checkpoints=1, checkpoint_every=1, keep_best="")
    trainer(tmp_path, Batches(look), experiment=experiment).run()
    assert not any(problem for problems in seen for problem in problems)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["8"]


def test_set_aside_twice(copy):
    names = []
    for step in ("8", "6"):
        folder = copy / CHECKPOINTS / step
        names.append(checkpoint_files.set_aside(folder.rename(folder.with_name("7"))).name)
    assert names == ["7.damaged", "7.damaged1"]


def test_a_named_damaged_checkpoint_is_an_error_that_names_the_others(copy):
    checkpointer = make_checkpointer(copy, EXPERIMENT)
    flip(copy / CHECKPOINTS / "6" / "optimizer" / "manifest.ocdbt")
    checkpointer.check(8)
    checkpointer.check(6, ("adapter", "meta"))
    with pytest.raises(CheckpointError) as error:
        checkpointer.check(6)
    assert str(error.value) == (
        f"{copy / CHECKPOINTS / '6'}: is damaged: optimizer/manifest.ocdbt has changed since it was written;"
        " there are also 2, 4, 5, 8"
    )
    checkpointer.close()


@pytest.fixture
def no_room():
    """no_room(): from here on no file can grow beyond a kilobyte; undone at the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_is_one_line_and_the_last_good_checkpoint_stays(
    tmp_path, unbroken, no_room, caplog
):
    """The limit on the size of files makes the very writes of TensorStore and Orbax fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step):
        if step == 4:
            # Saved meanwhile; on a busy machine it may still be under way.
            while not whole_steps(tmp_path / CHECKPOINTS):
                time.sleep(0.01)
            no_room()

    # Nothing is logged meanwhile, which would fail first.
    experiment = changed("train", log_every=100, eval_every=0)
    with pytest.raises(StorageError) as error:
        trainer(tmp_path, Batches(fill), experiment=experiment).run()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder = tmp_path / CHECKPOINTS
    assert str(error.value) == (
        f"{folder}: a checkpoint cannot be written: File too large; the last good one is {folder / '2'}, and the same command"
        " goes on from it"
    )
    assert whole_steps(folder) == [2]
    assert not [record for record in caplog.records if record.exc_info]
    resumed = trainer(tmp_path)
    assert resumed.latest_step() == 2
    assert resumed.run() == "done"
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.state), unbroken[1])


def test_no_room_for_a_small_file_names_it(tmp_path, no_room):
    path = tmp_path / "summary.json"
    write_text(path, "old")
    no_room()
    with pytest.raises(StorageError) as error:
        write_text(path, "new" * 1000)
    assert str(error.value) == f"{path}: cannot be written: File too large"
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_state_of_an_older_version_is_taken(copy, unbroken):
    """Checkpoints without checksums, as those before them."""
    for step in whole_steps(copy / CHECKPOINTS):
        (copy / CHECKPOINTS / str(step) / checksums.CHECKSUMS).unlink()
    run = trainer(copy)
    assert run.resume() == 8
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.state), unbroken[1])
