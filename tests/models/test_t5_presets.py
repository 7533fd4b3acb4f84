"""Published sizes of the T5 family: counts, and fields that are easy to get wrong."""

import math

import jax
import pytest

from sira_jax.errors import ConfigError
from sira_jax.models import make_model
from sira_jax.models.presets import count_parameters, preset
from sira_jax.models.t5_presets import T5_PRESETS

# As the published checkpoints have them.
PUBLISHED = {
    "t5-1.0-small": 60_506_624,
    "t5-1.0-base": 222_903_552,
    "t5-1.0-large": 737_668_096,
    "t5-1.0-3b": 2_851_598_336,
    "t5-1.0-11b": 11_307_321_344,
    "flan-t5-small": 76_961_152,
    "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
}
# In millions, as arXiv 2105.13626 has them (table 1).
BYT5 = {"small": 300, "base": 582, "large": 1230, "xl": 3740, "xxl": 12900}


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_parameter_count_is_the_published_one(name, total):
    assert count_parameters(preset(name)) == total


@pytest.mark.parametrize(("size", "millions"), BYT5.items())
def test_byt5_is_of_the_papers_size(size, millions):
    assert count_parameters(preset(f"byt5-{size}")) / 1e6 == pytest.approx(millions, rel=5e-3)


@pytest.mark.parametrize("changes", [{}, {"scan_layers": False}, {"relpos_per_layer": True}])
@pytest.mark.parametrize("name", ["t5-1.0-3b", "t5-1.1-small", "byt5-xxl", "t5-tiny"])
def test_count_is_that_of_the_model(name, changes):
    if changes and name != "t5-tiny":
        changes = changes | {"num_encoder_layers": 3, "num_decoder_layers": 2}
    config = preset(name, **changes)
    model = make_model(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), model.init_batch())
    leaves = jax.tree.leaves(variables["params"])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count_parameters(config)


def test_fields_that_counts_do_not_show():
    for name, config in T5_PRESETS.items():
        first = name.startswith("t5-1.0")
        assert config.tie_embeddings == first
        assert config.mlp_activations == (("relu",) if first else ("gelu", "linear"))
        deep = name.startswith("byt5")
        assert config.num_encoder_layers == config.num_decoder_layers * (3 if deep else 1)
        assert (config.norm_eps, config.decoder_start_id) == (1e-6, 0)
        assert (config.relpos_num_buckets, config.relpos_max_distance) == (32, 128)
        assert not config.relpos_per_layer
    for size in ("small", "base", "large", "xl", "xxl"):
        assert (
            preset(f"t5-1.1-{size}") == preset(f"T5-LM-adapt-{size}") == preset(f"flan-t5-{size}")
        )


def test_overrides_are_fields_of_its_config():
    assert preset("byt5-base", dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"model.num_layers=3.*num_encoder_layers"):
        preset("mt5-small", num_layers=3)
    with pytest.raises(ConfigError, match=r"'t5-1.2-small'.*smollm2-135m.*byt5-xxl"):
        preset("t5-1.2-small")
