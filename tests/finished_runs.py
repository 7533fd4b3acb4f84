"""What is compared of the directories of two runs that should have ended alike."""

import numpy as np
import orbax.checkpoint as ocp

from sira_jax.checkpoints import checksums
from sira_jax.checkpoints.orbax import whole_steps
from sira_jax.training.logging import read_metrics
from sira_jax.training.loop import CHECKPOINTS


def steps(workdir):
    """Steps of the whole checkpoints."""
    return whole_steps(workdir / CHECKPOINTS)


def final_arrays(workdir):
    """(step, every array by path) of the newest checkpoint, whose checksums hold."""
    step = steps(workdir)[-1]
    folder = workdir / CHECKPOINTS / str(step)
    assert checksums.problem(folder) is None
    arrays = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("adapter", "optimizer"):
            tree = checkpointer.restore(folder / item)
            for path, leaf in ocp.tree.to_flat_dict(tree).items():
                arrays[(item, *path)] = np.asarray(leaf)
    return step, arrays


def lines(workdir):
    """The log but for what is a time."""
    return [
        {name: value for name, value in line.items() if not name.startswith("speed/")}
        for line in read_metrics(workdir)
    ]


def assert_same_run(workdir, reference):
    """The runs end with the same bits and have the same log."""
    (step, arrays), (reference_step, expected) = final_arrays(workdir), final_arrays(reference)
    assert step == reference_step
    assert arrays.keys() == expected.keys()
    for path, array in arrays.items():
        assert array.tobytes() == expected[path].tobytes(), path
    assert lines(workdir) == lines(reference)
    for name in ("summary.json", "router.json"):
        assert (workdir / name).exists()
