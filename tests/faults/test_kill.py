"""kill -9 at random moments: the run always goes on, and ends with the unbroken run's bits.

The moments are drawn from a seed, FAULTS_SEED (0 by default), FAULTS_ROUNDS of them (20): while the process starts, between
checkpoints, and inside the write of a checkpoint.
"""

import os
import time

import numpy as np
import pytest

from tests.faults.runs import bad_losses, finish, wait_until, writes
from tests.finished_runs import assert_same_run, steps

ROUNDS = int(os.environ.get("FAULTS_ROUNDS", "20"))
SEED = int(os.environ.get("FAULTS_SEED", "0"))
# Small ones, of which a run of the lab has about ten.
SPIKES = ("--config.bad_loss.spike_factor=1.03", "--config.bad_loss.window=3")
FLAGS = {
    "plain": (),
    "skip": ("--config.bad_loss.action=skip", "--config.bad_loss.patience=50", *SPIKES),
    "rewind": ("--config.bad_loss.action=rewind", "--config.bad_loss.patience=50", *SPIKES),
}


def kill_at_random(process, workdir, random):
    """Kills a run at a moment of a random kind, and returns the kind; None where it ended before."""
    kind = random.choice(["start", "between", "write"], p=[0.15, 0.25, 0.6])
    if kind == "start":
        time.sleep(random.uniform(0, 10))
    else:
        known, more = steps(workdir), random.integers(0, 3)
        newest = max(known, default=0)

        def is_far_enough():
            now = [step for step in steps(workdir) if step > newest]
            return len(now) >= min(more, 1) and max(now, default=newest) >= newest + 5 * more

        wait_until(is_far_enough, process)
        if kind == "write":
            wait_until(lambda: writes(workdir), process)
            time.sleep(random.uniform(0, 0.06))
        else:
            time.sleep(random.uniform(0, 0.3))
    if process.poll() is not None:
        return None
    process.kill()
    return kind


def killed_again_and_again(lab, folder, flags, rounds, random):
    """Run directories, all at their ends, and the kinds of the kills; counts those inside a write."""
    workdirs, kinds, inside = [folder / "0"], [], 0
    while len(kinds) < rounds:
        process = lab.train(workdirs[-1], *flags)
        kind = kill_at_random(process, workdirs[-1], random)
        status, _, err = finish(process)
        if kind is None:
            assert status == 0, err
            workdirs.append(folder / str(len(workdirs)))
            continue
        assert status == -9, err
        assert "error" not in err, err
        kinds.append(kind)
        inside += writes(workdirs[-1])
    status, _, err = lab.done(workdirs[-1], *flags)
    assert status == 0, err
    return workdirs, kinds, inside


@pytest.mark.parametrize(
    ("kind", "rounds"),
    [
        pytest.param("plain", ROUNDS, marks=pytest.mark.faults),
        pytest.param("skip", max(2, ROUNDS // 4), marks=pytest.mark.faults),
        pytest.param("rewind", max(2, ROUNDS // 4), marks=pytest.mark.faults),
        pytest.param("plain", 2, marks=pytest.mark.slow, id="short"),
    ],
)
def test_killed_runs_end_as_the_unbroken_one(lab, unbroken, tmp_path, say, kind, rounds):
    random = np.random.default_rng([SEED, rounds, len(kind)])
    since = time.monotonic()
    workdirs, kinds, inside = killed_again_and_again(lab, tmp_path, FLAGS[kind], rounds, random)
    reference = unbroken(*FLAGS[kind])
    skipped, left_out = bad_losses(reference)
    assert (skipped > 0) == (kind == "skip")
    assert (left_out > 0) == (kind == "rewind")
    for workdir in workdirs:
        assert_same_run(workdir, reference)
        assert not writes(workdir)
    counts = ", ".join(f"{kinds.count(name)} {name}" for name in sorted(set(kinds)))
    say(
        f"{kind}: {rounds} kills ({counts}; {inside} left an unfinished checkpoint), {len(workdirs)} runs to their ends,"
        f" all equal to the unbroken one ({skipped} skipped, {left_out} left out); {time.monotonic() - since:.0f} s"
    )
    if rounds >= 10:
        assert inside >= rounds // 4
