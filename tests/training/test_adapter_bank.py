"""Loading, listing, picking and unloading adapters on one base."""

import functools

import jax
import numpy as np
import pytest

from sira_jax.adapters import LoRAConfig, SiRAConfig
from sira_jax.errors import CheckpointError, ConfigError
from sira_jax.models import Decoder
from sira_jax.training.adapter_bank import BASE, AdapterBank
from sira_jax.training.train_state import merge_params, split_params
from tests.tiny import decoder_config, decoder_params, make_batch

LORA = LoRAConfig(rank=2)
SIRA = SiRAConfig(num_experts=3, num_selected_experts=2, rank=2, targets=("q", "down"))
BATCH = make_batch([(8,), (5, 3), (7,)], 8)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
    return model.apply({"params": params}, batch)


@pytest.fixture(scope="module")
def frozen():
    return decoder_params(Decoder(decoder_config()), seed=7)


@pytest.fixture(scope="module")
def trees():
    """The parameters of three adapters, drawn apart."""
    configs = {"en": LORA, "sw": LORA, "fi": SIRA}
    return {
        name: (config, split_params(decoder_params(Decoder(decoder_config(), config), seed))[0])
        for seed, (name, config) in enumerate(configs.items())
    }


@pytest.fixture
def bank(frozen, trees):
    loaded = AdapterBank(decoder_config(), frozen)
    for name, (config, adapter) in trees.items():
        loaded.load(name, config, adapter)
    return loaded


def assert_rows_use(bank, trees, frozen, names):
    """That a batch whose rows name these adapters has the logits of each alone."""
    ids = np.asarray([bank.index(name) for name in names], np.int32)
    found = logits(bank.model(), bank.params(), BATCH | {"adapter_ids": ids})
    for row, name in enumerate(names):
        config, adapter = trees.get(name, (None, {}))
        single = Decoder(decoder_config(), config)
        expected = logits(single, merge_params(adapter, frozen), BATCH)
        np.testing.assert_allclose(found[row], expected[row], rtol=1e-5, atol=1e-5)


def test_rows_use_what_they_name_before_and_after_an_unload(bank, trees, frozen):
    assert bank.names() == ("en", "sw", "fi")
    assert [bank.index(name) for name in (*bank.names(), BASE)] == [0, 1, 2, -1]
    assert_rows_use(bank, trees, frozen, ["fi", "en", "sw"])
    bank.unload("en")
    assert bank.names() == ("sw", "fi")
    assert bank.index("fi") == 1
    assert_rows_use(bank, trees, frozen, ["fi", BASE, "sw"])
    # What was unloaded can be loaded again, and comes last.
    bank.load("en", *trees["en"])
    assert bank.names() == ("sw", "fi", "en")


def test_picking_among_the_loaded_compiles_nothing(bank):
    run = jax.jit(lambda params, batch: bank.model().apply({"params": params}, batch))
    for ids in ([0, 1, 2], [-1, -1, 0], [2, 2, 2]):
        run(bank.params(), BATCH | {"adapter_ids": np.asarray(ids, np.int32)})
    assert run._cache_size() == 1
    assert bank.model() == bank.model()
    assert hash(bank.model()) == hash(bank.model())


def test_nothing_is_copied(bank, trees, frozen):
    adapter, base = split_params(bank.params())
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, own: leaf is own, base, frozen)))
    own = trees["sw"][1]["layers"]["attention"]["q"]["adapter"]
    assert adapter["layers"]["attention"]["q"]["adapter"]["sw"]["lora_a"] is own["lora_a"]


def test_an_empty_bank_is_the_frozen_model(frozen):
    bank = AdapterBank(decoder_config(), frozen)
    assert bank.names() == ()
    assert bank.model(2) == Decoder(decoder_config(), None, 2)
    plain = logits(Decoder(decoder_config()), frozen, BATCH)
    ids = np.full(3, bank.index(BASE), np.int32)
    found = logits(bank.model(), bank.params(), BATCH | {"adapter_ids": ids})
    np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("name", ["", "1st", "a-b", "a/b", "a b", "äh", "config", "base", None, 3])
def test_names_that_are_not_allowed(name, bank, trees):
    with pytest.raises(ConfigError, match=r"adapter name .* is not allowed: letters") as error:
        bank.load(name, *trees["en"])
    assert repr(name) in str(error.value)
    assert bank.names() == ("en", "sw", "fi")


def test_a_name_that_is_taken(bank, trees):
    with pytest.raises(ConfigError, match="'sw' is loaded already"):
        bank.load("sw", *trees["en"])


@pytest.mark.parametrize("use", [AdapterBank.index, AdapterBank.unload])
def test_a_name_that_is_unknown(use, bank):
    with pytest.raises(ConfigError, match="'swa' is not loaded; there are base, en, sw, fi"):
        use(bank, "swa")


def without(tree, *path):
    """The tree without one leaf."""
    if len(path) == 1:
        return {key: value for key, value in tree.items() if key != path[0]}
    return tree | {path[0]: without(tree[path[0]], *path[1:])}


def test_trees_that_do_not_fit(bank, trees):
    adapter = trees["en"][1]
    place = "layers/attention/q/adapter"
    wrong = [
        (LORA, without(adapter, *place.split("/"), "lora_b"), f"missing tensors: {place}/lora_b"),
        (LORA, trees["fi"][1], "unexpected tensors"),
        (LoRAConfig(rank=3), adapter, "lora_a is (2, 16, 2), expected (2, 16, 3)"),
        (LORA, {f"layers_{i}": adapter["layers"] for i in range(2)}, "missing tensors"),
        (LORA, {}, "missing tensors"),
    ]
    for config, tree, named in wrong:
        with pytest.raises(CheckpointError) as error:
            bank.load("new", config, tree)
        message = str(error.value)
        assert message.startswith("adapter 'new' does not fit its config and the base: ")
        assert named in message
        assert "\n" not in message
    with pytest.raises(ConfigError, match="matches no projection"):
        bank.load("new", LoRAConfig(targets=("qq",)), {})
    assert bank.names() == ("en", "sw", "fi")
