"""Configs of encoder-decoders, and the stacks of layers that both families tell of."""

import jax
import pytest

from sira_jax.errors import ConfigError
from sira_jax.models import EncoderDecoderConfig, Stack, make_model
from tests.tiny import decoder_config

SIZES = {
    "vocab_size": 23,
    "emb_dim": 8,
    "num_heads": 3,
    "head_dim": 4,
    "mlp_dim": 12,
    "num_encoder_layers": 3,
    "num_decoder_layers": 2,
}


def test_a_decoder_is_one_stack_at_the_root():
    config = decoder_config()
    assert config.stacks == (Stack((), 2, config.projections),)
    assert list(config.projections)[:2] == ["attention/q", "attention/k"]


def test_an_encoder_decoder_is_two_stacks():
    config = EncoderDecoderConfig(**SIZES)
    encoder, decoder = config.stacks
    assert (encoder.prefix, encoder.num_layers) == (("encoder",), 3)
    assert (decoder.prefix, decoder.num_layers) == (("decoder",), 2)
    assert encoder.projections == {
        "encoder/attention/query": (8, 12),
        "encoder/attention/key": (8, 12),
        "encoder/attention/value": (8, 12),
        "encoder/attention/out": (12, 8),
        "encoder/mlp/wi_0": (8, 12),
        "encoder/mlp/wi_1": (8, 12),
        "encoder/mlp/wo": (12, 8),
    }
    assert len(decoder.projections) == 11
    assert decoder.projections["decoder/encoder_decoder_attention/out"] == (12, 8)
    assert config.projections == encoder.projections | decoder.projections


def test_a_plain_mlp_has_one_input_projection():
    config = EncoderDecoderConfig(**SIZES, mlp_activations=["relu"])
    assert config.mlp_activations == ("relu",)
    assert "encoder/mlp/wi" in config.projections
    assert "encoder/mlp/wi_0" not in config.projections


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("emb_dim", 0, "over 0"),
        ("num_encoder_layers", True, "over 0"),
        ("mlp_activations", ("relu", "tanh"), "relu, gelu, silu, linear"),
        ("mlp_activations", (), "one or two"),
        ("relpos_num_buckets", 30, "multiple of 4"),
        ("relpos_max_distance", 16, "over relpos_num_buckets / 2 = 16"),
        ("decoder_start_id", 23, "vocab_size - 1 = 22"),
        ("norm_eps", 0, "over 0"),
        ("tie_embeddings", 1, "a bool"),
        ("dtype", "float64", "float32"),
        ("remat_policy", "some", "dots"),
    ],
)
def test_what_is_not_allowed_is_said(field, value, allowed):
    with pytest.raises(ConfigError, match=f"model.{field}=.*{allowed}"):
        EncoderDecoderConfig(**SIZES | {field: value})


def test_a_model_comes_of_its_config():
    model = make_model(decoder_config(), num_tasks=2)
    assert model.num_tasks == 2
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.init_batch())
    assert "layers" in shapes["params"]
    with pytest.raises(ConfigError, match="DecoderConfig"):
        make_model({"emb_dim": 8})
