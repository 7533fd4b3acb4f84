"""T5X's partitioner on eight devices gives the losses of one: model parallelism, data parallelism, experts over devices.

The devices are made of the CPU by a flag that holds for a whole process, so everything runs in a process of its own
(`python -m tests.t5x.test_devices DIRECTORY`) and is looked at here.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sira_jax.adapters import SiRAConfig
from tests.quick import run_on_devices
from tests.t5x.tiny_t5x import (
    MISSING,
    T5XRun,
    encoder_decoder,
    example_batches,
    fresh_params,
    t5x_model,
)

pytestmark = pytest.mark.t5x
if __name__ != "__main__":
    pytest.importorskip("t5x", reason=MISSING, exc_type=ImportError)

STEPS = 2
# Of T5X: how many devices the model is split over; the others split the batch.
LAYOUTS = {
    "model": {"submesh": (1, 1, 1, 8)},
    "experts": {"submesh": (1, 1, 1, 8), "expert": "model"},
    "data": {"submesh": (1, 1, 1, 2), "rank": "model"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("devices")
    run_on_devices("tests.t5x.test_devices", directory)
    return json.loads((directory / "results.json").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_those_of_one_device(results, name):
    one, many = results["one"], results[name]
    assert many["devices"] == 8
    for metric in ("loss", "auxiliary_loss", "gradient_norm", "router/gate_entropy"):
        found = [step[metric] for step in many["metrics"]]
        expected = [step[metric] for step in one["metrics"]]
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=metric)


def test_arrays_are_where_the_rules_say(results):
    assert results["model"]["kernel"] == [16, 4]
    assert results["model"]["lora_a"] == [8, 16, 2]
    assert results["experts"]["lora_a"] == results["experts"]["moment"] == [1, 16, 2]
    assert results["data"]["kernel"] == [16, 16]
    assert results["data"]["lora_a"] == results["data"]["moment"] == [8, 16, 1]


def _shard(x):
    return list(x.addressable_shards[0].data.shape)


def _main(directory):
    from t5x import partitioning

    from sira_jax.t5x_integration.logical_axes import logical_axis_rules

    adapter = SiRAConfig(
        rank=2, num_experts=8, num_selected_experts=2, targets="query", dropout_rate=0.1
    )
    module = encoder_decoder(adapter, num_heads=8, head_dim=4)
    params = fresh_params(module)
    batches = list(example_batches(module, STEPS, packed=True, size=8))
    results = {}

    class OneDevice(partitioning.PjitPartitioner):
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "model"))

    for name, layout in ({"one": {}} | LAYOUTS).items():
        layout = dict(layout)
        submesh = layout.pop("submesh", (1, 1, 1, 1))
        kind = OneDevice if name == "one" else partitioning.PjitPartitioner
        partitioner = kind(
            model_parallel_submesh=submesh, logical_axis_rules=logical_axis_rules(**layout)
        )
        run = T5XRun(t5x_model(module), params, partitioner=partitioner)
        metrics = [run.step(batch) for batch in batches]
        query = run.state.params["encoder"]["layers_0"]["attention"]["query"]
        moments = run.state.param_states[1][0].mu["encoder"]["layers_0"]["attention"]["query"]
        results[name] = {
            "devices": len(query["kernel"].sharding.device_set),
            "metrics": metrics,
            "kernel": _shard(query["kernel"]),
            "lora_a": _shard(query["adapter"]["lora_a"]),
            "moment": _shard(moments["adapter"]["lora_a"]),
        }
    (Path(directory) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    _main(sys.argv[1])
