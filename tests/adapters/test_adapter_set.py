"""A batch of rows with different adapters against each adapter alone, for every method and what methods hand on."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import METHODS, AdaptedDense, AdapterContext, LoRAConfig, SiRAConfig, merge
from sira_jax.adapters.adapter_set import AdapterSet, AdapterSetConfig, is_member_name
from sira_jax.adapters.base import ADAPTER, BUFFER
from sira_jax.errors import ConfigError, MergeError
from sira_jax.models import Decoder
from sira_jax.routing import RouterStats
from sira_jax.training.config import DecodeConfig
from sira_jax.training.decoding import generate
from sira_jax.training.train_state import init_adapter, merge_params, split_params
from tests.adapters.test_every_method import make
from tests.tiny import decoder_config, decoder_params, draw, make_batch, shapes_of

BATCH = make_batch([(5, 3), (7,), (4, 4), (), (8,), (6,), (2, 3)], 8)
SIRA = SiRAConfig(
    num_experts=4,
    num_selected_experts=2,
    rank=2,
    router_init_std=1.0,
    targets=("q", "down"),
)
MEMBERS = (
    ("wide", LoRAConfig(rank=3)),
    ("few", LoRAConfig(rank=1, alpha=2.0, targets=("v", "mlp/.*"), overrides={"up": {"rank": 2}})),
    ("sparse", SIRA),
    ("tight", dataclasses.replace(SIRA, eval_capacity_factor=0.5, min_capacity=1, targets=("o",))),
)
SET = AdapterSetConfig(members=MEMBERS)
IDS = np.asarray([0, 2, -1, 1, 3, 2, 3], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
    return model.apply({"params": params}, batch)


def alone(params, name):
    """The parameters of a model with this member alone: what lies under adapter/NAME lies under adapter; None for the base."""
    flat = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        if ADAPTER not in path:
            flat[path] = leaf
        elif path[path.index(ADAPTER) + 1] == name:
            flat[tuple(key for key in path if key != name)] = leaf
    return traverse_util.unflatten_dict(flat)


def model_of(index, members, **changes):
    """(model, name) of one member, or of the base."""
    name, config = members[index] if index >= 0 else (None, None)
    return Decoder(decoder_config(**changes), config), name


def assert_rows_are_their_own(members, params, batch, ids, **changes):
    mixed = Decoder(decoder_config(**changes), AdapterSetConfig(members=members))
    found = logits(mixed, params, batch | {"adapter_ids": ids})
    others = []
    for index in range(-1, len(members)):
        model, name = model_of(index, members, **changes)
        expected = logits(model, alone(params, name), batch)
        rows = ids == index
        np.testing.assert_allclose(found[rows], expected[rows], rtol=1e-5, atol=1e-5)
        others.append(expected)
    # The adapters differ, or the comparison would say little.
    real = batch["decoder_segment_ids"] > 0
    for first, second in itertools.pairwise(others):
        assert np.abs(first - second)[real].max() > 1e-2


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"scan_layers": False, "qkv_bias": True}, marks=pytest.mark.slow)]
)
def test_each_row_has_the_logits_of_its_adapter_alone(changes):
    params = decoder_params(Decoder(decoder_config(**changes), SET))
    assert_rows_are_their_own(MEMBERS, params, BATCH, IDS, **changes)


def test_rows_are_bitwise_their_own_in_a_batch_of_the_same_shape():
    """Not promised of every compiler, but what float32 on the CPU gives: nothing is added up in another order."""
    params = decoder_params(Decoder(decoder_config(), SET))
    found = logits(Decoder(decoder_config(), SET), params, BATCH | {"adapter_ids": IDS})
    for index in (-1, 0, 1):
        model, name = model_of(index, MEMBERS)
        expected = logits(model, alone(params, name), BATCH)
        np.testing.assert_array_equal(found[index == IDS], expected[index == IDS])


@settings(max_examples=6, deadline=None)
@given(
    ids=st.lists(st.integers(-1, 3), min_size=7, max_size=7),
    seed=st.integers(0, 100),
)
def test_whatever_the_assignment(ids, seed):
    params = decoder_params(Decoder(decoder_config(), SET), seed)
    assert_rows_are_their_own(MEMBERS, params, BATCH, np.asarray(ids, np.int32))


def set_with(method):
    """(members, parameters) of a method beside a LoRA."""
    members = (("other", LoRAConfig(rank=2)), ("own", make(method)))
    model = Decoder(decoder_config(), AdapterSetConfig(members=members))
    trees = [split_params(decoder_params(model, scale=1.0))[1]]
    for index, (name, _) in enumerate(members):
        fresh = init_adapter(model_of(index, members)[0], 0)
        drawn = traverse_util.flatten_dict(draw(jax.eval_shape(lambda tree=fresh: tree), 1, 0.3))
        for path, leaf in traverse_util.flatten_dict(fresh).items():
            at = path.index(ADAPTER) + 1
            # Buffers keep the values they start with: a mask is 0 or 1.
            leaf = leaf if path[-1].startswith(BUFFER) else drawn[path]
            trees.append(traverse_util.unflatten_dict({(*path[:at], name, *path[at:]): leaf}))
    return members, merge_params(*trees)


METHOD_IDS = np.asarray([1, 0, 1, -1, 0, 1, 1], np.int32)


# One that changes the frozen product, one with a block module and a cache of its own, one that hands on from layer to layer.
@pytest.mark.parametrize(
    "method",
    [
        "milora",
        pytest.param("dora", marks=pytest.mark.slow),
        pytest.param("reslora", marks=pytest.mark.slow),
    ],
)
def test_a_method_beside_another(method):
    members, params = set_with(method)
    assert_rows_are_their_own(members, params, BATCH, METHOD_IDS)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_beside_another(method):
    members, params = set_with(method)
    assert_rows_are_their_own(members, params, BATCH, METHOD_IDS)
    assert_generates_as_alone(members, params, DecodeConfig(max_new_tokens=4))


def test_other_rows_are_padding_to_a_router():
    """Groups may span rows: a token of another adapter's row takes no place in an expert's queue."""
    tight = dataclasses.replace(
        SIRA, group_size=2 * 8, eval_capacity_factor=0.25, min_capacity=1, targets=("down",)
    )
    members = (("a", tight), ("b", LoRAConfig(rank=2)))
    params = decoder_params(Decoder(decoder_config(), AdapterSetConfig(members=members)))
    batch = make_batch([(8,), (8,), (8,), (8,)], 8)
    ids = np.asarray([1, 0, 0, 1], np.int32)
    mixed = Decoder(decoder_config(), AdapterSetConfig(members=members))
    found = logits(mixed, params, batch | {"adapter_ids": ids})
    padded = batch | {"decoder_segment_ids": batch["decoder_segment_ids"] * (ids == 0)[:, None]}
    single, own = Decoder(decoder_config(), tight), alone(params, "a")
    np.testing.assert_allclose(
        found[ids == 0], logits(single, own, padded)[ids == 0], rtol=1e-5, atol=1e-5
    )
    crowded = logits(single, own, batch)
    assert np.abs(found[ids == 0] - crowded[ids == 0]).max() > 1e-3


def test_statistics_are_of_the_own_rows():
    model = Decoder(decoder_config(), SET)
    params = decoder_params(model)
    observe = jax.jit(functools.partial(model.apply, mutable=["metrics"]))
    _, sown = observe({"params": params}, BATCH | {"adapter_ids": IDS})
    for name, place in (("q", "attention"), ("down", "mlp")):
        (stats,) = sown["metrics"]["layers"][place][name]["adapter"]["sparse"]["router"]
        assert isinstance(stats, RouterStats)
        np.testing.assert_array_equal(stats.tokens, [7 + 6] * 2)


PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3, 5, 8], [9], [7, 9, 3, 2], [3, 1, 4], [11, 12]]
PROMPT_IDS = [0, 1, -1, 1, -1, 1, 0]


def assert_generates_as_alone(members, params, config):
    """Generates for prompts of all members and the base together, and for those of each alone; returns the answers."""
    ids = [min(index, len(members) - 1) for index in PROMPT_IDS]
    mixed = Decoder(decoder_config(), AdapterSetConfig(members=members))
    found = generate(mixed, params, PROMPTS, config, eos_ids=(5,), adapter_ids=ids)
    for index in range(-1, len(members)):
        model, name = model_of(index, members)
        chosen = [place for place, own in enumerate(ids) if own == index]
        prompts = [PROMPTS[place] for place in chosen]
        expected = generate(model, alone(params, name), prompts, config, eos_ids=(5,))
        assert [found[place] for place in chosen] == expected
    return found


@pytest.mark.parametrize(
    "config",
    [
        # Batches of 4: prompts are sorted by length, and the last batch is filled up with copies of one.
        pytest.param(DecodeConfig(max_new_tokens=6, batch_size=4), marks=pytest.mark.slow),
        pytest.param(
            DecodeConfig(max_new_tokens=5, batch_size=4, strategy="beam", num_beams=3),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["greedy", "beam"],
)
def test_generation_is_that_of_each_adapter_alone(config):
    members = MEMBERS[1:3]
    params = decoder_params(Decoder(decoder_config(), AdapterSetConfig(members=members)), scale=1.0)
    found = assert_generates_as_alone(members, params, config)
    # Places 0 and 5 hold the same prompt for two adapters; enough answers differ.
    assert found[0] != found[5]
    assert len({tuple(answer) for answer in found}) >= 5


# Hooks that hand something from layer to layer and from a block to its projections.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summing(LoRAConfig):
    """Adds what the layer before added, and a gate that the block makes of its input."""

    factor: float = 0.5

    def make_module(self):
        return SummingModule(config=self, name=ADAPTER)

    def make_block_module(self):
        return GateModule(name=ADAPTER)

    def initial_carry(self, d_in, d_out, batch_shape, dtype):
        return jnp.zeros((*batch_shape, d_out), dtype)


class GateModule(nn.Module):
    @nn.compact
    def __call__(self, x_BTD, context):
        valid_BT1 = context.valid_or_all(x_BTD.shape[:2])[..., None]
        weight_D = self.param(
            "weight",
            nn.with_logical_partitioning(nn.initializers.ones, ("adapter_in",)),
            x_BTD.shape[-1:],
        )
        return jnp.tanh(jnp.sum(x_BTD * weight_D * valid_BT1, axis=(1, 2)))


class SummingModule(nn.Module):
    config: Summing

    @nn.compact
    def __call__(self, x_BTD, projection, context):
        lora_a_DR = self.param(
            "lora_a",
            nn.with_logical_partitioning(nn.initializers.ones, ("adapter_in", "rank")),
            projection.shape,
        )
        added_BTF = context.block[:, None, None] * (x_BTD @ lora_a_DR)
        added_BTF += self.config.factor * context.link.previous[projection.path]
        context.link.next[projection.path] = added_BTF
        return projection(x_BTD) + added_BTF


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_carries_and_block_values_reach_their_own_member(scan_layers):
    members = (
        ("plain", LoRAConfig(rank=2)),
        ("first", Summing(targets=("q", "down"))),
        ("second", Summing(factor=-1.5, targets=("down", "v"))),
    )
    ids = np.asarray([1, 2, 0, -1, 2, 1, 0], np.int32)
    changes = {"num_layers": 3, "scan_layers": scan_layers}
    model = Decoder(decoder_config(**changes), AdapterSetConfig(members=members))
    params = decoder_params(model)
    assert_rows_are_their_own(members, params, BATCH, ids, **changes)


# Cost.


def compiled_dense(adapter, rows=8, length=16, d_in=64, d_out=96):
    """The compiled program of one projection."""
    dense = AdaptedDense(d_out, adapter, path="attention/q")
    x_BTD = np.zeros((rows, length, d_in), np.float32)
    ids_B = np.zeros(rows, np.int32)

    def run(params, x_BTD, ids_B):
        return dense.apply({"params": params}, x_BTD, AdapterContext(adapter_ids_B=ids_B))

    params = shapes_of(dense, x_BTD, AdapterContext())
    return jax.jit(run).lower(params, x_BTD, ids_B).compile()


def test_loras_share_one_frozen_product():
    rank, tokens, d_in, d_out = 2, 8 * 16, 64, 96
    frozen = 2 * tokens * d_in * d_out
    low_rank = 2 * tokens * rank * (d_in + d_out)
    lora = LoRAConfig(rank=rank)
    flops = {}
    for count in (1, 2, 4):
        members = tuple((f"n{i}", lora) for i in range(count))
        compiled = compiled_dense(AdapterSetConfig(members=members).for_projection("attention/q"))
        flops[count] = compiled.cost_analysis()["flops"]
        # What is elementwise is counted too: scaling, adding and choosing, a few for each output.
        elementwise = 8 * count * tokens * d_out
        assert 0 <= flops[count] - frozen - count * low_rank <= elementwise
    assert flops[4] < frozen + 4 * (low_rank + 8 * tokens * d_out) < 2 * frozen


# The config.


def test_a_projection_without_members_has_no_adapter():
    few = AdapterSetConfig(members=(("a", LoRAConfig(targets="q")), ("b", LoRAConfig(targets="v"))))
    assert few.for_projection("mlp/up") is None
    restricted = few.for_projection("attention/v")
    assert [config is None for _, config in restricted.members] == [True, False]
    assert AdapterSetConfig().for_projection("attention/q") is None
    assert few.count_parameters(8, 4) == 2 * 4 * (8 + 4)
    assert few.flops_per_token(8, 4).total == 2 * few.count_parameters(8, 4)
    assert few.to_dict()["members"]["a"]["targets"] == ["q"]
    assert few.second_pass is None


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ((("a", LoRAConfig()), ("a", SIRA)), "'a' is not allowed: each name once"),
        ((("1a", SIRA),), "'1a'"),
        ((("a/b", SIRA),), "'a/b'"),
        ((("", SIRA),), "''"),
        (((5, SIRA),), "adapter.members=5"),
        ((("name", SIRA),), "'name'"),
        ((("a", "lora"),), "adapter.members['a']='lora'"),
        ((("a", SET),), "adapter.members['a']"),
    ],
)
def test_wrong_members_are_named(members, named):
    with pytest.raises(ConfigError) as error:
        AdapterSetConfig(members=members)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_the_sets_own_fields_are_fixed():
    with pytest.raises(TypeError, match="rank"):
        AdapterSetConfig(members=MEMBERS, rank=8)
    assert hash(AdapterSetConfig(members=MEMBERS)) == hash(SET)


def test_names_that_flax_would_refuse_are_no_names():
    class Bound(nn.Module):
        @nn.compact
        def __call__(self):
            module = AdapterSet(config=SET, name="x")
            return [name for name in (*vars(module), *dir(module)) if is_member_name(name)]

    assert Bound().apply({}) == []
    assert is_member_name("sw")
    assert is_member_name("X_2")


@pytest.mark.parametrize("ids", [None, np.zeros((3,), np.int32), np.zeros((7, 8), np.int32)])
def test_missing_or_misshapen_ids_are_named(ids):
    model = Decoder(decoder_config(), SET)
    params = decoder_params(model)
    with pytest.raises(ConfigError, match=r"adapter_ids.shape=.*\(7,\)"):
        model.apply({"params": params}, BATCH | {"adapter_ids": ids})


def test_as_many_ids_as_prompts():
    model = Decoder(decoder_config(), SET)
    with pytest.raises(ConfigError, match=r"adapter_ids=\[0\].*2 prompts"):
        generate(model, decoder_params(model), [[1], [2]], DecodeConfig(), adapter_ids=[0])


def test_a_set_is_not_trained_and_not_merged():
    model = Decoder(decoder_config(), SET)
    params = decoder_params(model)
    with pytest.raises(ConfigError, match="train each adapter alone"):
        init_adapter(model, 0)
    with pytest.raises(ConfigError, match="train each adapter alone"):
        model.apply({"params": params}, BATCH | {"adapter_ids": IDS}, deterministic=False)
    with pytest.raises(MergeError, match="merge one adapter alone"):
        merge(SET, params)
