"""The mesh and the table from logical to mesh axes, on one device and on abstract ones."""

import dataclasses
import json

import flax.linen as nn
import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from sira_jax.adapters import METHODS, LoRAConfig, SiRAConfig
from sira_jax.errors import ConfigError
from sira_jax.models import Decoder, make_model
from sira_jax.placement import FREE
from sira_jax.training.config import MeshConfig
from sira_jax.training.partitioning import (
    RULES,
    axes_spec,
    batch_sharding,
    check_batch,
    check_groups,
    make_mesh,
    make_rules,
    param_shardings,
    replicated,
)
from sira_jax.training.train_state import abstract_params
from tests.adapters.test_every_method import FIELDS
from tests.models.families import FAMILIES
from tests.tiny import decoder_config
from tests.tiny_t5 import t5_config


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
        "router": (None, "tensor", "expert"),
        "lora_a": (None, "expert", "tensor", None),
        "lora_b": (None, "expert", None, None),
    }
    # Of q it is the output that lies along tensor.
    assert layers["attention"]["q"]["adapter"] == {
        "router": (None, None, "expert"),
        "lora_a": (None, "expert", None, None),
        "lora_b": (None, "expert", None, "tensor"),
    }


def test_axis_that_does_not_divide_is_replicated():
    got = specs(None, abstract_mesh(tensor=2), vocab_size=23)
    assert got["token_embedder"]["embedding"] == (None, "fsdp")
    got = specs(SiRAConfig(num_experts=3, num_selected_experts=1), abstract_mesh(expert=2))
    assert got["layers"]["mlp"]["down"]["adapter"]["lora_a"][:2] == (None, None)


def test_lora_is_cut_along_tensor_alone():
    got = specs(LoRAConfig(targets=("q", "o")), abstract_mesh(data=2, fsdp=2, tensor=2))
    layers = got["layers"]["attention"]
    none = (None, None, None)
    assert layers["q"]["adapter"] == {"lora_a": none, "lora_b": (None, None, "tensor")}
    assert layers["o"]["adapter"] == {"lora_a": (None, "tensor", None), "lora_b": none}


def test_a_config_changes_the_table():
    config = MeshConfig(rules={"adapter_heads": None, "embed": ["data", "fsdp"], "vocab": "expert"})
    rules = make_rules(config)
    assert set(rules) == set(RULES)
    changed = {name for name in RULES if rules[name] != RULES[name]}
    assert changed == {"adapter_heads", "embed", "vocab"}
    mesh = abstract_mesh(data=2, fsdp=2, tensor=2, expert=2)
    abstract = abstract_params(Decoder(decoder_config(vocab_size=24), LoRAConfig(targets="q")))
    got = jax.tree.map(lambda x: tuple(x.spec), param_shardings(abstract, mesh, rules))
    assert got["token_embedder"]["embedding"] == ("expert", ("data", "fsdp"))
    q = got["layers"]["attention"]["q"]
    assert q["kernel"] == (None, ("data", "fsdp"), "tensor")
    assert q["adapter"]["lora_b"] == (None, None, None)
    # What a run directory keeps is read back.
    assert make_rules(MeshConfig(**json.loads(json.dumps(dataclasses.asdict(config))))) == rules


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (3, "mesh.rules=3 is not allowed: pairs"),
        ((("embed",),), "mesh.rules=.* is not allowed: pairs"),
        ({"width": "fsdp"}, "mesh.rules='width' is not allowed: logical axes are batch, "),
        ({"embed": "model"}, r"mesh.rules\['embed'\]=.*'model'.*data, fsdp, tensor, expert"),
        ({"embed": ("fsdp", "fsdp")}, r"mesh.rules\['embed'\]="),
        ((("embed", None), ("embed", "fsdp")), "mesh.rules=.*each logical axis once"),
    ],
)
def test_wrong_rules_are_refused(rules, message):
    with pytest.raises(ConfigError, match=message):
        MeshConfig(rules=rules)


def test_a_mesh_axis_cuts_one_axis_of_an_array_and_only_where_it_divides():
    mesh, rules = abstract_mesh(data=2, fsdp=3), RULES | {"mlp": ("fsdp", "data")}
    assert axes_spec(("batch", "mlp"), (6, 6), mesh, rules) == PartitionSpec(
        ("data", "fsdp", "expert"), None
    )
    assert axes_spec((None, "mlp"), (6, 9), mesh, rules) == PartitionSpec(None, "fsdp")
    assert axes_spec((None, "mlp"), (6, 4), mesh, rules) == PartitionSpec(None, None)
    free = axes_spec(("batch", FREE), (2, 4), mesh, rules)
    assert free == PartitionSpec("data", PartitionSpec.UNCONSTRAINED)


@pytest.mark.parametrize(
    ("group_size", "rows", "is_allowed"),
    [(None, 4, True), (6, 4, True), (12, 4, True), (9, 4, False), (24, 4, False), (24, 8, True)],
)
def test_routing_groups_must_fit_a_device(group_size, rows, is_allowed):
    adapter = SiRAConfig(targets=("q", "down"), overrides=(("down", {"group_size": group_size}),))
    arguments = (adapter, ("attention/q", "mlp/down"), rows, (12, 6))
    if is_allowed:
        check_groups(abstract_mesh(data=2), RULES, *arguments)
        return
    # On one device any size is good.
    check_groups(abstract_mesh(tensor=2), RULES, *arguments)
    with pytest.raises(
        ConfigError, match=rf"adapter.group_size={group_size} is not allowed.*a divisor"
    ):
        check_groups(abstract_mesh(data=2), RULES, *arguments)


def test_every_logical_name_of_the_model_is_in_the_table():
    plain = decoder_config(tie_embeddings=False, qkv_bias=True)
    for config, adapter in (
        *((plain, METHODS[name](**FIELDS.get(name, {}))) for name in METHODS),
        (decoder_config(**FAMILIES["all"]), None),
        (t5_config(), LoRAConfig()),
    ):
        model = make_model(config, adapter)
        boxes = jax.tree.leaves(
            abstract_params(model), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
        )
        for box in boxes:
            assert isinstance(box, nn.LogicallyPartitioned)
            assert set(box.names) <= {*RULES, None}, box


def test_batches_are_cut_by_rows_over_all_axes_but_tensor():
    mesh = abstract_mesh(data=2, fsdp=2)
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp", "expert"))
    assert replicated(mesh).spec == PartitionSpec()
