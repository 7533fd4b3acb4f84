"""Losses and gradients do not depend on the mesh, and what moves between devices is what shall move.

Eight devices are made of the CPU by a flag that holds for a whole process, so `mesh_run` runs in one of its own.
"""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.quick import QUICK_COMPILE, as_flags

REPOSITORY = Path(__file__).parents[2]
ONE = {"data": 1}
ALL = {"data": 1, "fsdp": 2, "tensor": 2, "expert": 2}
REFERENCE = ("decoder", ONE, {})
BY_DATA = ("decoder", {"data": 8}, {"group_size": 8, "dispatch": "ragged"})
FAST = [REFERENCE, BY_DATA, ("decoder", ALL, {})]
BY_EXPERT = ("decoder", {"data": 2, "fsdp": 2, "expert": 2}, {"dispatch": "einsum"})
BY_TENSOR = ("decoder", {"data": 2, "fsdp": 2, "tensor": 2}, {"dispatch": "ragged"})
MORE = [BY_EXPERT, BY_TENSOR, ("encoder_decoder", ONE, {}), ("encoder_decoder", ALL, {})]
SHAPES = [
    dict(zip(("data", "fsdp", "tensor", "expert"), sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if np.prod(sizes) == 8
]
SLOW = [
    (kind, ONE if shape is None else shape, {"dispatch": dispatch})
    for kind in ("decoder", "encoder_decoder")
    for dispatch in ("masked", "einsum", "ragged")
    for shape in (None, *SHAPES)
]


def name_of(case):
    kind, mesh, adapter = case
    sizes = [f"{axis}{size}" for axis, size in mesh.items() if size > 1]
    return "-".join([kind, *sizes, *(str(value) for value in adapter.values())])


def run_cases(cases, directory, timeout=1200, processes=1):
    """{name: (arrays, facts)}, of eight devices shared out over so many processes."""
    listed = [
        {"name": name_of(case), "kind": case[0], "mesh": case[1], "adapter": case[2]}
        for case in cases
    ]
    (directory / "cases.json").write_text(json.dumps(listed))
    flags = as_flags(QUICK_COMPILE, devices=8 // processes)
    common = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.training.mesh_run", directory / "cases.json", directory]
    started = []
    for index in range(processes):
        who = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }
        environ = os.environ | common | (who if processes > 1 else {})
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=REPOSITORY, env=environ, **pipes))
    try:
        for process in started:
            _, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:
            process.kill()
    return {case["name"]: read(directory, case["name"]) for case in listed}


def read(directory, name, process=0):
    with np.load(directory / f"{name}.npz") as arrays:
        values = dict(arrays)
    return values, json.loads((directory / f"{name}.{process}.json").read_text())


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        least = 1e-5 * np.max(np.abs(value)) if name.startswith("gradient/") else 1e-7
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=least, err_msg=name)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_cases(FAST, tmp_path_factory.mktemp("meshes"))


@pytest.fixture(scope="module")
def more_results(results, tmp_path_factory):
    return results | run_cases(MORE, tmp_path_factory.mktemp("more_meshes"))


def assert_one_devices(results, case):
    expected = results[name_of((case[0], ONE, {}))][0]
    got, facts = results[name_of(case)]
    assert facts["devices"] == 8
    assert_same(got, expected)


@pytest.mark.parametrize("case", FAST[1:], ids=name_of)
def test_losses_and_gradients_are_those_of_one_device(results, case):
    assert_one_devices(results, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [BY_EXPERT, BY_TENSOR, MORE[-1]], ids=name_of)
def test_losses_and_gradients_of_more_meshes_are_those_of_one_device(more_results, case):
    assert_one_devices(more_results, case)


@pytest.mark.slow
def test_the_reference_has_something_to_get_wrong(more_results):
    """Drops, different losses of the two steps, and a gradient in every leaf."""
    for kind in ("decoder", "encoder_decoder"):
        values = more_results[name_of((kind, ONE, {}))][0]
        assert abs(np.diff(values["metric/loss"])) > 1e-3
        assert np.all(values["metric/router/dropped_share"] > 0.02)
        gradients = [value for name, value in values.items() if name.startswith("gradient/")]
        assert gradients
        assert all(np.max(np.abs(value)) > 1e-5 for value in gradients)


def kinds(facts):
    return {kind for kind, _ in facts["collectives"]}


def test_with_data_alone_only_gradients_and_metrics_are_summed(results):
    """No token leaves its device, though a group here is a row and pairs are sorted by expert."""
    facts = results[name_of(BY_DATA)][1]
    assert kinds(facts) == {"all-reduce"}
    moved = sum(sum(counts) for _, counts in facts["collectives"])
    assert moved <= facts["trained"] + 100


@pytest.mark.slow
def test_with_fsdp_and_tensor_no_token_moves_along_the_batch(more_results):
    """What is gathered is the base's matrices, whole or a tensor's half; other sums are of activations along tensor."""
    facts = more_results[name_of(BY_TENSOR)][1]
    assert "all-to-all" not in kinds(facts)
    gathered = {
        count for kind, counts in facts["collectives"] if kind == "all-gather" for count in counts
    }
    matrices = (
        set(facts["weights"])
        | {size // 2 for size in facts["weights"]}
        | {size // 4 for size in facts["weights"]}
    )
    assert gathered <= matrices


@pytest.mark.slow
def test_experts_on_other_devices_get_their_tokens_by_all_to_all(more_results):
    assert "all-to-all" in kinds(more_results[name_of(BY_EXPERT)][1])


def test_two_processes_compute_what_one_device_does(results, tmp_path):
    case = ("decoder", ALL, {})
    name = name_of(case)
    got, facts = run_cases([case], tmp_path, processes=2)[name]
    assert_same(got, results[name_of(("decoder", ONE, {}))][0])
    # Each makes its own half of the batch.
    assert facts["rows"] == [0, 1, 2, 3]
    assert read(tmp_path, name, process=1)[1]["rows"] == [4, 5, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_compute_what_one_device_does(more_results, tmp_path, processes):
    """Rows that processes share, along tensor, too."""
    meshes = (ALL, {"data": 2, "tensor": 4}, {"data": 1, "expert": 8})
    cases = [(kind, mesh, {}) for kind in ("decoder", "encoder_decoder") for mesh in meshes]
    for name, (got, _) in run_cases(cases, tmp_path, processes=processes).items():
        assert_same(got, more_results[name.split("-")[0]][0])


@pytest.mark.slow
def test_every_shape_every_dispatch_and_both_kinds(tmp_path):
    results = run_cases(SLOW, tmp_path, timeout=7200)
    for case in SLOW:
        expected = results[name_of((case[0], ONE, {"dispatch": "masked"}))][0]
        assert_same(results[name_of(case)][0], expected)
