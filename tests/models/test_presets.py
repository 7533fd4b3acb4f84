"""Published sizes: counts, and fields that are easy to get wrong."""

import math

import jax
import jax.numpy as jnp
import pytest

from sira_jax.errors import ConfigError
from sira_jax.models.config import RopeScaling
from sira_jax.models.decoder import Decoder
from sira_jax.models.presets import PRESETS, count_parameters, preset

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_parameter_count_is_the_published_one(name, total):
    assert count_parameters(preset(name)) == total


def test_every_published_preset_has_its_count_checked():
    assert set(PRESETS) == {*PUBLISHED, "tiny"}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_count_is_that_of_the_decoder(name, scan_layers):
    config = preset(name, scan_layers=scan_layers)
    if not scan_layers and config.num_layers > 4:
        config = preset(name, scan_layers=False, num_layers=2)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    variables = jax.eval_shape(
        Decoder(config).init, jax.random.key(0), {"decoder_input_tokens": tokens}
    )
    leaves = jax.tree.leaves(variables["params"])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count_parameters(config)


def test_fields_that_counts_do_not_show():
    assert preset("smollm2-135m").rope_theta == 100000.0
    assert preset("smollm2-1.7b").rope_theta == 130000.0
    assert preset("smollm2-360m").norm_eps == 1e-5
    assert preset("llama-3-8b").rope_scaling is None
    assert preset("llama-3-8b").max_positions == 8192
    assert preset("llama-3.1-8b").rope_scaling == RopeScaling(factor=8.0)
    assert preset("llama-3.2-1b").rope_scaling == RopeScaling(factor=32.0)
    assert preset("llama-3.2-1b").max_positions == 131072
    assert preset("qwen2.5-7b").norm_eps == 1e-6
    assert preset("qwen2.5-14b").norm_eps == 1e-5
    assert all(preset(name).qkv_bias == name.startswith("qwen") for name in PRESETS)
    assert all(config.param_dtype == "float32" for config in PRESETS.values())


def test_overrides_and_case():
    config = preset("Llama-3.2-1B", dtype="bfloat16", param_dtype="bfloat16")
    assert (config.dtype, config.num_layers) == ("bfloat16", 16)


def test_unknown_name_lists_the_names():
    with pytest.raises(ConfigError, match=r"'smollm3'.*tiny, smollm2-135m.*qwen2.5-72b"):
        preset("smollm3")


def test_unknown_or_bad_override():
    with pytest.raises(ConfigError, match=r"model.depth=3.*num_layers"):
        preset("tiny", depth=3)
    with pytest.raises(ConfigError, match=r"num_layers=0"):
        preset("tiny", num_layers=0)
