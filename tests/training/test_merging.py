"""The error of a merge, and the norms that merges by inputs take."""

import jax
import numpy as np
import pytest

from sira_jax.adapters import LoRAConfig, ResLoRAConfig, merge
from sira_jax.adapters.reslora import merge_with_inputs
from sira_jax.errors import MergeError
from sira_jax.models import Decoder
from sira_jax.models.layers import RMSNorm
from sira_jax.training.merging import measure_norms, merge_error
from tests.tiny import decoder_config, decoder_params, make_batch

BATCH = make_batch([(4, 3), (6,)], 8)


def make(adapter, scan_layers=True):
    model = Decoder(decoder_config(num_layers=3, scan_layers=scan_layers), adapter)
    return model, decoder_params(model, scale=0.2)


@pytest.mark.parametrize("adapter", [LoRAConfig(rank=2), ResLoRAConfig(rank=2, num_previous=2)])
def test_error_of_an_exact_merge_is_rounding(adapter):
    model, params = make(adapter)
    error = merge_error(model, params, merge(adapter, params), BATCH)
    assert set(error) == {"max_abs_difference", "relative_difference"}
    assert 0 <= error["relative_difference"] < 1e-5
    assert error["max_abs_difference"] < 1e-5


@pytest.mark.parametrize("connection", ["input", pytest.param("middle", marks=pytest.mark.slow)])
@pytest.mark.parametrize("merge_by", ["inputs", pytest.param("weights", marks=pytest.mark.slow)])
def test_error_of_an_approximate_merge_is_that_of_the_valid_logits(connection, merge_by):
    adapter = ResLoRAConfig(rank=2, connection=connection, merge_by=merge_by)
    model, params = make(adapter)
    if merge_by == "inputs":
        merged = merge_with_inputs(adapter, params, measure_norms(model, params, [BATCH]))
    else:
        merged = merge(adapter, params)
    valid = BATCH["decoder_segment_ids"] > 0
    adapted = np.asarray(model.apply({"params": params}, BATCH), np.float64)[valid]
    plain = np.asarray(Decoder(model.config).apply({"params": merged}, BATCH), np.float64)[valid]
    error = merge_error(model, params, merged, BATCH)
    change = plain - adapted
    expected = {
        "max_abs_difference": np.abs(change).max(),
        "relative_difference": np.linalg.norm(change) / np.linalg.norm(adapted),
    }
    assert expected["relative_difference"] > 1e-3
    for name, value in expected.items():
        np.testing.assert_allclose(error[name], value, rtol=1e-3)


def test_error_leaves_padding_out_and_takes_a_batch_without_segments():
    model, params = make(LoRAConfig(rank=2))
    plain = jax.tree.map(np.asarray, merge(model.adapter, params))
    tokens = BATCH["decoder_input_tokens"][:, :4]
    short = {"decoder_input_tokens": tokens}
    moved = dict(plain, token_embedder={"embedding": plain["token_embedder"]["embedding"] + 1.0})
    assert merge_error(model, params, moved, short)["max_abs_difference"] > 0.1
    padded = short | {"decoder_segment_ids": np.zeros_like(tokens)}
    assert merge_error(model, params, moved, padded) == {
        "max_abs_difference": 0.0,
        "relative_difference": 0.0,
    }


@pytest.mark.parametrize("connection", ["input", "middle"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_norms_are_those_of_what_enters_the_projections(connection, scan_layers):
    adapter = ResLoRAConfig(rank=2, connection=connection, merge_by="inputs")
    model, params = make(adapter)
    apart = Decoder(decoder_config(num_layers=3, scan_layers=False), adapter)
    separate = {name: leaf for name, leaf in params.items() if name != "layers"}
    for n in range(3):
        separate[f"layers_{n}"] = jax.tree.map(lambda x, n=n: x[n], params["layers"])
    other = make_batch([(3,), (2, 2)], 8, seed=4)
    squares = {"attention/k": np.zeros(3), "mlp/up": np.zeros(3)}
    for batch in (BATCH, other):
        valid = batch["decoder_segment_ids"] > 0
        _, seen = apart.apply(
            {"params": separate},
            batch,
            capture_intermediates=lambda module, _: isinstance(module, RMSNorm),
            mutable=["intermediates"],
        )
        for n in range(3):
            block, own = seen["intermediates"][f"layers_{n}"], separate[f"layers_{n}"]
            for name, norm in (("attention/k", "input_norm"), ("mlp/up", "mlp_norm")):
                x = np.asarray(block[norm]["__call__"][0], np.float64)[valid]
                if connection == "middle":
                    module, projection = name.split("/")
                    x = x @ own[module][projection]["adapter"]["lora_a"]
                squares[name][n] += np.sum(x * x)
    run = (model, params) if scan_layers else (apart, separate)
    norms = measure_norms(*run, [BATCH, other])
    assert set(norms) == set(model.config.projections)
    for name, total in squares.items():
        np.testing.assert_allclose(norms[name], np.sqrt(total), rtol=1e-4)


def test_norms_of_an_adapter_that_has_none_are_refused():
    for adapter in (LoRAConfig(rank=2), ResLoRAConfig(rank=2, merge_by="inputs")):
        model, params = make(adapter)
        with pytest.raises(MergeError, match="no norms were measured"):
            measure_norms(model, params, [BATCH])
