"""Adapter configs: targets, overrides, wrong values, plain data; and the frozen projection."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.adapters import (
    METHODS,
    PROJECTIONS,
    AdaptedDense,
    AdapterContext,
    LoRAConfig,
    SiRAConfig,
    is_trained,
    make_config,
)
from sira_jax.errors import ConfigError
from tests.tiny import draw, shapes_of

PATHS = tuple(
    f"{module}/{name}"
    for module, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down")))
    for name in names
)


def adapted(config):
    return {path for path in PATHS if config.for_projection(path) is not None}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (PROJECTIONS, set(PATHS)),
        (("q", "v"), {"attention/q", "attention/v"}),
        (["down"], {"mlp/down"}),
        ("q|k", {"attention/q", "attention/k"}),
        ("attention/.*", {f"attention/{name}" for name in "qkvo"}),
        (("mlp/(gate|up)", "o"), {"mlp/gate", "mlp/up", "attention/o"}),
        (".*", set(PATHS)),
        # A pattern matches whole names, not parts of them.
        ("d", set()),
        ("attention", set()),
        ("at.*n/q", {"attention/q"}),
    ],
)
def test_targets_select_projections_by_name_pattern_and_path(targets, expected):
    assert adapted(LoRAConfig(targets=targets)) == expected


def test_overrides_change_only_what_they_match_and_later_ones_win():
    config = SiRAConfig(
        rank=4,
        num_experts=8,
        num_selected_experts=2,
        overrides={
            "mlp/.*": {"rank": 2, "num_experts": 4},
            "down": {"rank": 8, "alpha": 3.0, "capacity_factor": None},
            "v": {"expert_dropout_rate": 0.5},
        },
    )
    fields = {
        path: config.for_projection(path)
        for path in ("attention/q", "attention/v", "mlp/up", "mlp/down")
    }
    assert fields["attention/q"] == SiRAConfig(rank=4, num_experts=8, num_selected_experts=2)
    assert fields["attention/v"].expert_dropout_rate == 0.5
    assert (fields["mlp/up"].rank, fields["mlp/up"].num_experts) == (2, 4)
    assert (fields["mlp/down"].rank, fields["mlp/down"].num_experts) == (8, 4)
    assert fields["mlp/down"].scale == 3.0 / 8
    assert fields["mlp/down"].capacity_factor is None
    assert fields["mlp/up"].capacity_factor == 1.25


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"q": {"rnk": 2}}, "rnk"),
        ({"q": {"num_experts": 2}}, "num_experts"),
        ({"q": {"targets": ("k",)}}, "targets"),
        ({"q": {"overrides": {}}}, "overrides"),
        ({"q": {"rank": 0}}, "rank=0"),
        ({"q(": {"rank": 2}}, "q("),
        ({"": {"rank": 2}}, "''"),
        ({5: {"rank": 2}}, "5"),
        ({"q": 5}, "adapter.overrides"),
        (5, "adapter.overrides"),
        (None, "adapter.overrides"),
        (["q"], "adapter.overrides"),
    ],
)
def test_wrong_overrides_are_named(overrides, named):
    with pytest.raises(ConfigError) as error:
        LoRAConfig(overrides=overrides)
    assert "adapter.overrides" in str(error.value)
    assert named in str(error.value)


def test_override_that_contradicts_another_field_is_named():
    # Four of two experts cannot be selected.
    with pytest.raises(ConfigError, match=r"adapter\.overrides\['down'\].*num_selected_experts"):
        SiRAConfig(num_selected_experts=4, overrides={"down": {"num_experts": 2}})


BAD_SHARED = [
    ("rank", 0),
    ("rank", -1),
    ("rank", 2.0),
    ("rank", True),
    ("rank", "4"),
    ("rank", None),
    ("alpha", 0),
    ("alpha", -1.0),
    ("alpha", float("nan")),
    ("alpha", float("inf")),
    ("alpha", "8"),
    ("alpha", True),
    ("dropout_rate", 1.0),
    ("dropout_rate", -0.1),
    ("dropout_rate", float("nan")),
    ("dropout_rate", None),
    ("targets", ()),
    ("targets", ""),
    ("targets", ("q", 5)),
    ("targets", "(q"),
    ("targets", 5),
    ("targets", None),
]
BAD_SIRA = [
    ("num_experts", 0),
    ("num_experts", 4.0),
    ("num_selected_experts", 0),
    ("num_selected_experts", 17),
    ("capacity_factor", 0.0),
    ("capacity_factor", "1"),
    ("capacity_factor", float("inf")),
    ("eval_capacity_factor", -1.0),
    ("min_capacity", -1),
    ("min_capacity", 1.5),
    ("capacity_counts_k", 1),
    ("group_size", 0),
    ("renormalize", "no"),
    ("expert_dropout_rate", 1.0),
    ("expert_dropout_rate", -0.5),
    ("expert_dropout_position", "inside"),
    ("load_balance_loss_weight", -1.0),
    ("router_z_loss_weight", float("nan")),
    ("router_init_std", None),
    ("dispatch", "dense"),
    ("router_regularizer", "dropout"),
    ("router_regularizer", ()),
    ("router_regularizer", ("none", "load_balance")),
    ("router_regularizer", 5),
]


@pytest.mark.parametrize("config_class", METHODS.values())
@pytest.mark.parametrize(("field", "value"), BAD_SHARED)
def test_wrong_shared_fields_are_named(config_class, field, value):
    with pytest.raises(ConfigError, match=rf"\b{field}\b.* is not allowed: "):
        config_class(**{field: value})


@pytest.mark.parametrize(("field", "value"), BAD_SIRA)
def test_wrong_routing_fields_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"\b{field}\b.* is not allowed: "):
        SiRAConfig(**{field: value})


def test_every_field_of_sira_has_a_wrong_value_here():
    tried = {field for field, _ in BAD_SHARED + BAD_SIRA} | {"overrides"}
    assert tried == {field.name for field in dataclasses.fields(SiRAConfig)}


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(),
        LoRAConfig(rank=2, alpha=1.5, dropout_rate=0.1, targets="mlp/.*"),
        LoRAConfig(overrides={"mlp/.*": {"rank": 2}, "down": {"rank": 8}}),
        SiRAConfig(),
        SiRAConfig(
            num_experts=4,
            num_selected_experts=2,
            capacity_factor=None,
            group_size=7,
            targets=("q", "v"),
            overrides={"v": {"num_experts": 2, "rank": 1}, "q": {"alpha": 2.0}},
        ),
    ],
)
def test_plain_data_round_trip_through_sorted_json(config):
    """As a run directory's config.json does it, whose keys are sorted."""
    plain = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    again = make_config(plain)
    assert again == config
    assert hash(again) == hash(config)
    for path in PATHS:
        assert again.for_projection(path) == config.for_projection(path)


def test_configs_are_hashable_and_differ_by_their_fields():
    configs = {
        LoRAConfig(),
        LoRAConfig(rank=2),
        LoRAConfig(overrides={"q": {"rank": 2}}),
        SiRAConfig(),
    }
    assert len(configs) == 4
    assert LoRAConfig(targets=["q"]) in {LoRAConfig(targets=("q",))}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "adapter.method"),
        ({"method": "lorra"}, "adapter.method='lorra'"),
        ({"method": None}, "adapter.method"),
        ({"method": ["lora"]}, "adapter.method"),
        ({"method": "lora", "num_experts": 4}, "adapter.num_experts"),
        ({"method": "sira", "experts": 4}, "adapter.experts"),
        ({"method": "lora", "rank": -1}, "adapter.rank"),
        (None, "adapter"),
        (5, "adapter"),
    ],
)
def test_make_config_names_what_is_wrong(fields, named):
    with pytest.raises(ConfigError) as error:
        make_config(fields)
    assert named in str(error.value)


def test_method_none_is_the_frozen_model():
    assert make_config({"method": "none"}) is None


def test_trained_are_exactly_the_parameters_under_adapter():
    assert is_trained(("layers", "attention", "q", "adapter", "lora_a"))
    assert not is_trained(("layers", "attention", "q", "kernel"))
    assert not is_trained(("layers", "attention", "adapter_q", "kernel"))


def test_projection_without_adapter_is_a_plain_product():
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    module = AdaptedDense(features=5, use_bias=True)
    params = draw(shapes_of(module, x, AdapterContext()))
    assert set(params) == {"kernel", "bias"}
    y = module.apply({"params": params}, x, AdapterContext())
    np.testing.assert_allclose(y, x @ params["kernel"] + params["bias"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [LoRAConfig(rank=2), SiRAConfig(num_experts=4, rank=2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_compute_in_dtype_and_adapters_are_float32(config, dtype):
    module = AdaptedDense(features=5, adapter=config, dtype=dtype, param_dtype=dtype)
    x = jnp.ones((2, 3, 4), dtype)
    params = shapes_of(module, x, AdapterContext())
    assert params["kernel"].dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(params["adapter"])} == {jnp.dtype("float32")}
    shape = jax.eval_shape(module.apply, {"params": params}, x, AdapterContext())
    assert shape.dtype == dtype


@pytest.mark.parametrize("config", [LoRAConfig(rank=2), SiRAConfig(num_experts=4, rank=2)])
def test_every_adapter_parameter_has_a_logical_axis_name_for_each_axis(config):
    module = AdaptedDense(features=5, adapter=config)
    boxes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 2, 4)), AdapterContext())
    leaves = jax.tree.leaves(
        boxes["params"], is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )
    assert len(leaves) > 1
    for leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == len(leaf.value.shape)
