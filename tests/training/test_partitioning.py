"""The mesh and the table from logical to mesh axes, on one device and on abstract ones."""

import flax.linen as nn
import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from sira_jax.adapters import LoRAConfig, SiRAConfig
from sira_jax.errors import ConfigError
from sira_jax.models import Decoder
from sira_jax.training.config import MeshConfig
from sira_jax.training.partitioning import (
    RULES,
    batch_sharding,
    check_batch,
    make_mesh,
    param_shardings,
    replicated,
)
from sira_jax.training.train_state import abstract_params
from tests.models.families import FAMILIES
from tests.tiny import decoder_config


def abstract_mesh(**sizes):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1} | sizes
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


@pytest.mark.parametrize(
    ("fields", "devices", "shape"),
    [
        ({}, 8, (8, 1, 1, 1)),
        ({}, 1, (1, 1, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, 8, (2, 2, 2, 1)),
        ({"data": 1, "expert": -1}, 6, (1, 1, 1, 6)),
        ({"data": 1, "fsdp": 2, "tensor": 1, "expert": 2}, 4, (1, 2, 1, 2)),
    ],
)
def test_mesh_shape(fields, devices, shape):
    mesh = make_mesh(MeshConfig(**fields), devices=list(range(devices)))
    assert mesh.axis_names == ("data", "fsdp", "tensor", "expert")
    assert tuple(mesh.shape.values()) == shape
    assert sorted(mesh.devices.ravel()) == list(range(devices))


def test_default_mesh_has_all_devices():
    assert make_mesh(MeshConfig()).size == len(jax.devices())


@pytest.mark.parametrize(
    ("fields", "devices"),
    [
        ({"data": 3}, 8),
        ({"data": 2}, 8),
        ({"data": 16}, 8),
        ({"data": -1, "tensor": 3}, 8),
        ({"data": -1, "tensor": 16}, 8),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(fields, devices):
    with pytest.raises(ConfigError, match=rf"^mesh=.*{devices} devices"):
        make_mesh(MeshConfig(**fields), devices=list(range(devices)))


@pytest.mark.parametrize(
    ("sizes", "batch_size", "steps", "is_allowed"),
    [
        ({"data": 2, "fsdp": 2}, 8, 1, True),
        ({"data": 2, "fsdp": 2}, 8, 2, True),
        ({"data": 2, "fsdp": 2}, 8, 4, False),
        ({"data": 2, "fsdp": 2}, 6, 1, False),
        ({"tensor": 8}, 1, 1, True),
    ],
)
def test_batch_must_divide_over_the_devices(sizes, batch_size, steps, is_allowed):
    mesh = abstract_mesh(**sizes)
    if is_allowed:
        check_batch(mesh, batch_size, steps)
        return
    with pytest.raises(
        ConfigError, match=rf"data\.batch_size={batch_size}.*multiple of {4 * steps}"
    ):
        check_batch(mesh, batch_size, steps)


def specs(adapter, mesh, **changes):
    abstract = abstract_params(Decoder(decoder_config(**changes), adapter))
    shardings = param_shardings(abstract, mesh)
    return jax.tree.map(lambda sharding: tuple(sharding.spec), shardings)


def test_parameters_lie_where_the_table_says():
    adapter = SiRAConfig(num_experts=4, num_selected_experts=2, targets=("q", "down"))
    mesh = abstract_mesh(fsdp=2, tensor=2, expert=2)
    got = specs(adapter, mesh, vocab_size=24, tie_embeddings=False)
    layers = got["layers"]
    assert got["token_embedder"]["embedding"] == ("tensor", "fsdp")
    assert got["lm_head"]["kernel"] == ("fsdp", "tensor")
    assert got["final_norm"]["scale"] == (None,)
    # Scanned layers have their own axis in front, which is not sharded.
    assert layers["input_norm"]["scale"] == (None, None)
    assert layers["attention"]["q"]["kernel"] == (None, "fsdp", "tensor")
    assert layers["attention"]["k"]["kernel"] == (None, "fsdp", "tensor")
    assert layers["attention"]["o"]["kernel"] == (None, "tensor", "fsdp")
    assert layers["mlp"]["gate"]["kernel"] == (None, "fsdp", "tensor")
    assert layers["mlp"]["down"]["kernel"] == (None, "tensor", "fsdp")
    assert layers["mlp"]["down"]["adapter"] == {
        "router": (None, None, "expert"),
        "lora_a": (None, "expert", None, None),
        "lora_b": (None, "expert", None, None),
    }


def test_axis_that_does_not_divide_is_replicated():
    got = specs(None, abstract_mesh(tensor=2), vocab_size=23)
    assert got["token_embedder"]["embedding"] == (None, "fsdp")
    got = specs(SiRAConfig(num_experts=3, num_selected_experts=1), abstract_mesh(expert=2))
    assert got["layers"]["mlp"]["down"]["adapter"]["lora_a"] == (None, None, None, None)


def test_lora_is_replicated():
    got = specs(LoRAConfig(targets="q"), abstract_mesh(data=2, fsdp=2, tensor=2))
    assert all(
        axis is None for axis in sum(got["layers"]["attention"]["q"]["adapter"].values(), ())
    )


def test_every_logical_name_of_the_model_is_in_the_table():
    plain = decoder_config(tie_embeddings=False, qkv_bias=True)
    for config, adapter in (
        (plain, LoRAConfig()),
        (plain, SiRAConfig()),
        (decoder_config(**FAMILIES["all"]), None),
    ):
        model = Decoder(config, adapter)
        boxes = jax.tree.leaves(
            abstract_params(model), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
        )
        for box in boxes:
            assert isinstance(box, nn.LogicallyPartitioned)
            assert set(box.names) <= set(RULES), box


def test_batches_are_cut_by_rows_over_both_axes_of_data():
    mesh = abstract_mesh(data=2, fsdp=2)
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
    assert replicated(mesh).spec == PartitionSpec()
