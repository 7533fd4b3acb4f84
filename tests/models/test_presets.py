"""Published sizes: counts, and fields that are easy to get wrong."""

import math

import jax
import jax.numpy as jnp
import pytest

from sira_jax.errors import ConfigError
from sira_jax.models.decoder import Decoder
from sira_jax.models.presets import PRESETS, count_parameters, preset
from sira_jax.models.rope import LinearRopeScaling, RopeScaling

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
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    # Published with what reads images: its encoder, and a projection of 1152 features to the width and their norm.
    "gemma-3-4b": 4_300_079_472 - 416_866_032 - (2560 + 1) * 1152,
    "gemma-3-12b": 12_187_325_040 - 416_866_032 - (3840 + 1) * 1152,
    "gemma-3-27b": 27_432_406_640 - 416_866_032 - (5376 + 1) * 1152,
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
    assert all(preset(name).qkv_bias == name.startswith("qwen2") for name in PRESETS)
    assert all(preset(name).qk_norm == name.startswith(("qwen3", "gemma-3")) for name in PRESETS)
    assert all(config.param_dtype == "float32" for config in PRESETS.values())


def test_fields_of_gemma_that_counts_do_not_show():
    two, three = preset("gemma-2-27b"), preset("gemma-3-27b")
    assert (two.query_pre_attn_scalar, three.query_pre_attn_scalar) == (144, 168)
    assert preset("gemma-2-9b").query_pre_attn_scalar is None
    assert (two.attention_softcap, two.final_softcap) == (50.0, 30.0)
    assert (three.attention_softcap, three.final_softcap) == (None, None)
    assert two.windowed_layers == (True, False) * 23
    assert three.windowed_layers == ((True,) * 5 + (False,)) * 10 + (True, True)
    assert (two.sliding_window, three.sliding_window) == (4096, 1024)
    assert preset("gemma-3-1b").sliding_window == 512
    assert (two.rope_theta, two.local_rope_theta) == (10000.0, None)
    assert (three.rope_theta, three.local_rope_theta) == (1e6, 10000.0)
    assert three.rope_scaling == LinearRopeScaling(factor=8.0)
    assert preset("gemma-3-1b").rope_scaling is None
    assert (preset("gemma-3-1b").max_positions, three.max_positions) == (32768, 131072)
    assert (preset("qwen3-8b").max_positions, preset("qwen3-32b").max_positions) == (32768, 40960)


def test_overrides_and_case():
    config = preset("Llama-3.2-1B", dtype="bfloat16", param_dtype="bfloat16")
    assert (config.dtype, config.num_layers) == ("bfloat16", 16)


def test_unknown_name_lists_the_names():
    with pytest.raises(ConfigError, match=r"'smollm3'.*tiny, smollm2-135m.*gemma-3-27b"):
        preset("smollm3")


def test_unknown_or_bad_override():
    with pytest.raises(ConfigError, match=r"model.depth=3.*num_layers"):
        preset("tiny", depth=3)
    with pytest.raises(ConfigError, match=r"num_layers=0"):
        preset("tiny", num_layers=0)
