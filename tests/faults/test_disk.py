"""A full disk, and checkpoints that have changed on it."""

import json
import os
import subprocess

import numpy as np
import pytest

from sira_jax.checkpoints import checksums
from sira_jax.training.loop import CHECKPOINTS
from tests.faults.runs import finish, the_error, wait_until
from tests.finished_runs import assert_same_run, steps

pytestmark = pytest.mark.faults


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path):
    """Takes all the room that is left."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (65536, 4096, 256, 1):
            while True:
                try:
                    os.write(descriptor, b"0" * size)
                except OSError:
                    break
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("after", [0, 30])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(lab, unbroken, small_disk, say, after):
    workdir, filler = small_disk / "run", small_disk / "filler"
    process = lab.train(workdir)
    assert wait_until(lambda: workdir.exists() and max(steps(workdir), default=0) >= after, process)

    def full():
        fill(filler)
        # Old checkpoints that go make room, which is taken too.
        return False

    wait_until(full, process)
    status, _, err = finish(process)
    assert status == 2, err
    error = the_error(err)
    assert "No space left on device" in error
    assert str(workdir) in error
    left = steps(workdir)
    say(f"full after step {after}: {error.replace(str(small_disk), '')}")
    for step in left[-1:]:
        assert (
            f"the last good one is {workdir / CHECKPOINTS / str(step)}" in error
            or "metrics" in error
        )
        assert checksums.problem(workdir / CHECKPOINTS / str(step)) is None
    assert bool(left) == (after > 0)

    # Still full: the same line, and nothing is lost.
    status, _, err = lab.done(workdir)
    assert status == 2, err
    assert "No space left on device" in the_error(err)
    assert steps(workdir) == left

    filler.unlink()
    status, _, err = lab.done(workdir)
    assert status == 0, err
    assert_same_run(workdir, unbroken())


DAMAGES = {
    "cut": lambda content, random: content[: int(random.integers(0, len(content)))],
    "bit": lambda content, random: flipped(content, random, 1),
    "bits": lambda content, random: flipped(content, random, 9),
    "zeros": lambda content, random: bytes(len(content)),
    "gone": lambda content, random: None,
}


def flipped(content, random, count):
    content = bytearray(content)
    for place in random.integers(0, 8 * len(content), count):
        content[place // 8] ^= 1 << (place % 8)
    return bytes(content)


def damage(folder, way, random, part=None):
    """Damages a file drawn at random, and returns its name in the checkpoint."""
    files = sorted(
        path
        for path in (folder / part if part else folder).rglob("*")
        if path.is_file() and path.stat().st_size > 1 and path.name not in UNREAD
    )
    path = files[random.integers(len(files))]
    content = path.read_bytes()
    changed = DAMAGES[way](content, random)
    while changed == content:
        changed = DAMAGES[way](content, random)
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    return str(path.relative_to(folder))


# Without the checksums a checkpoint counts as one of an older version; the other is read by nobody.
UNREAD = (checksums.CHECKSUMS, "commit_success.txt")


@pytest.mark.parametrize("way", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(lab, unbroken, tmp_path, say, way):
    random = np.random.default_rng(len(way))
    workdir = tmp_path / "run"
    process = lab.train(workdir)
    assert wait_until(lambda: len([s for s in steps(workdir) if s >= 40]) >= 2, process)
    process.kill()
    finish(process)
    before, newest = steps(workdir)[-2:]
    name = damage(workdir / CHECKPOINTS / str(newest), way, random)
    status, _, err = lab.done(workdir)
    assert status == 0, err
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert f"{newest} is damaged: {name} " in warning
    assert warning.endswith(f"the run goes on from {before}")
    say(f"{way}: {warning.replace(str(workdir), '')}")
    assert_same_run(workdir, unbroken())


@pytest.mark.parametrize("script", ["evaluate.py", "generate.py"])
def test_a_damaged_checkpoint_is_an_error_for_those_who_name_it(lab, unbroken, tmp_path, script):
    random = np.random.default_rng(0)
    workdir = tmp_path / "run"
    subprocess.run(["cp", "-r", str(unbroken()), str(workdir)], check=True)
    name = damage(workdir / CHECKPOINTS / str(lab.steps), "bit", random, "adapter")
    flags = ["--prompt=What"] if script == "generate.py" else [f"--data_dir={lab.data}"]
    for which in ("latest", str(lab.steps)):
        process = lab.start(script, f"--workdir={workdir}", f"--checkpoint={which}", *flags)
        status, _, err = finish(process)
        assert status == 2, err
        error = the_error(err)
        assert f"{lab.steps}: is damaged: {name} has changed since it was written" in error
        assert f"there are also {', '.join(map(str, steps(workdir)[:-1]))}" in error
    assert json.loads((workdir / "config.json").read_text())
