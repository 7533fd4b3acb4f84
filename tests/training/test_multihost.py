"""How processes find each other and agree, without starting any; tests/integration/test_multihost.py starts some."""

import os
import subprocess
import sys

import jax
import pytest

from sira_jax.errors import ConfigError
from sira_jax.training.config import MeshConfig
from sira_jax.training.multihost import StopVote, is_main, settings
from sira_jax.training.partitioning import make_mesh

GIVEN = {
    "JAX_COORDINATOR_ADDRESS": "node7:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


def test_plain_environment_variables():
    assert settings(GIVEN | {"PATH": "x"}) == {
        "coordinator_address": "node7:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize("environ", [{}, {"JAX_COORDINATOR_ADDRESS": "a:1"}, {"SLURM_PROCID": "0"}])
def test_the_rest_is_left_to_jax(environ):
    assert settings(environ) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES is not set, but .*JAX_PROCESS_ID is"),
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not set"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS is not set"),
        ({"JAX_COORDINATOR_ADDRESS": "node7"}, "JAX_COORDINATOR_ADDRESS='node7'.*HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "node7:x"}, "JAX_COORDINATOR_ADDRESS='node7:x'"),
        ({"JAX_COORDINATOR_ADDRESS": "node7:70000"}, "JAX_COORDINATOR_ADDRESS="),
        ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES='four'"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES='0'"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID='4'.*0 to 3"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1'"),
    ],
)
def test_wrong_variables_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(GIVEN | changes)


def test_one_process_decides_alone():
    vote = StopVote(make_mesh(MeshConfig(), jax.devices()))
    received = []
    result = vote(lambda: received[-1] if received else None)
    assert result() is None
    # Of the step under way too.
    received.append("SIGTERM")
    assert result() == "SIGTERM"
    assert is_main()


def test_without_any_launcher_the_flag_is_a_mistake():
    script = (
        "from sira_jax.errors import ConfigError\n"
        "from sira_jax.training import multihost\n"
        "try:\n    multihost.initialize(5)\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    names = ("SLURM", "OMPI", "KUBERNETES", "JAX_", "TPU", "CLOUD_TPU")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "set JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES" in done.stdout
