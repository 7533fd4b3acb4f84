"""What every method of the registry promises, on a small decoder: identity, what moves, counts, layouts, merging."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.adapters import METHODS, count_model_parameters, is_trained, merge, split_trained
from sira_jax.errors import MergeError
from sira_jax.models import Decoder
from sira_jax.training.config import OptimizerConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import (
    TrainState,
    abstract_params,
    count_trained,
    init_adapter,
    merge_params,
    split_params,
)
from sira_jax.training.train_step import make_train_step
from tests.tiny import decoder_config, decoder_params, draw, make_batch

BATCH = make_batch([(5, 3), (7,)], 8)
STEPS, LAYERS = 4, 3
# Small sizes where a method's defaults are too large for a decoder of width 8.
FIELDS = {
    "sira": {"num_experts": 4, "num_selected_experts": 2},
    "molora": {"num_experts": 3},
    "mov": {"num_experts": 3},
    "adamix": {"num_experts": 3},
    "malora": {"num_experts": 3, "shared_dim": 3},
    "milora": {"rank": 2, "num_selected_experts": 3},
    "xgblora": {"num_layers_per_stage": 1, "merge_every": 2},
    "rac_lora": {"merge_every": 2},
    "dynamic_dora": {"prune_every": 1},
}
MERGES = {
    "lora",
    "adamix",
    "multilora",
    "dora",
    "dynamic_dora",
    "melora",
    "reslora",
    "xgblora",
    "rac_lora",
}
FIELDS["reslora"] = {"connection": "block", "num_previous": 1}


# Attention and MLP, an input and two outputs; fewer projections are fewer programs to compile.
TARGETS = ("k", "v", "down")


def make(method, **changes):
    return METHODS[method](**{"targets": TARGETS} | FIELDS.get(method, {}) | changes)


@functools.cache
def trained_run(method):
    """(model, fresh adapter, adapter after STEPS steps, frozen before, frozen after)."""
    model = Decoder(decoder_config(num_layers=LAYERS), make(method))
    config = OptimizerConfig(learning_rate=0.05)
    optimizer = make_optimizer(config, STEPS)
    step = jax.jit(
        make_train_step(model, optimizer, make_schedule(config, STEPS), seed=0, num_steps=STEPS)
    )
    fresh = init_adapter(model, 0)
    frozen = split_params(decoder_params(model))[1]
    before = jax.tree.map(np.copy, frozen)
    state = TrainState(
        step=jnp.int32(0), adapter=fresh, optimizer=optimizer.init(split_trained(fresh)[0])
    )
    seen = [fresh]
    for _ in range(STEPS):
        state, metrics = step(state, frozen, BATCH)
        assert np.isfinite(metrics["loss"])
        seen.append(jax.device_get(state.adapter))
    assert step._cache_size() == 1
    return model, fresh, seen, before, frozen


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
    return model.apply({"params": params}, batch)


# Every method compiles programs of its own; those whose own files start and train them anyway run here under `make test-all`.
HERE = ("lora", "sira", "reslora", "xgblora")
methods = pytest.mark.parametrize(
    "method", [m if m in HERE else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
# Every method compiles programs of its own: of the costlier checks the fast suite runs those of two.
thorough = pytest.mark.parametrize(
    "method",
    [m if m in ("lora", "sira") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)


@methods
def test_a_fresh_adapter_changes_nothing_at_all(method):
    model, fresh, _, _, frozen = trained_run(method)
    adapted = logits(model, merge_params(fresh, frozen), BATCH)
    plain = logits(Decoder(model.config), frozen, BATCH)
    np.testing.assert_array_equal(adapted, plain)


@methods
def test_steps_move_every_trained_leaf_and_nothing_else(method):
    _, fresh, seen, before, frozen = trained_run(method)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    trained = jax.tree_util.tree_leaves_with_path(split_trained(fresh)[0])
    assert trained
    for path, start in trained:
        moments = [split_trained(adapter)[0] for adapter in seen[1:]]
        for entry in path:
            moments = [tree[entry.key] for tree in moments]
        assert any(np.any(np.asarray(leaf) != start) for leaf in moments), path
    plain = logits(Decoder(decoder_config(num_layers=LAYERS)), frozen, BATCH)
    model = trained_run(method)[0]
    assert np.abs(logits(model, merge_params(seen[-1], frozen), BATCH) - plain).max() > 1e-3


@methods
def test_counted_parameters_are_the_trained_ones(method):
    model, fresh, *_ = trained_run(method)
    config = model.config
    expected = count_model_parameters(model.adapter, config.stacks, config.emb_dim)
    assert count_trained(fresh) == expected
    for d_in, d_out in config.projections.values():
        flops = model.adapter.flops_per_token(d_in, d_out)
        assert flops.total >= flops.router >= 0
        assert flops.total > 0


@methods
def test_adapter_parameters_are_float32_with_a_name_for_each_axis(method):
    model = trained_run(method)[0]
    leaves = jax.tree_util.tree_leaves_with_path(
        split_params(abstract_params(model))[0],
        is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )
    for path, leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned), path
        assert len(leaf.names) == len(leaf.value.shape)
        assert leaf.names[0] == "layers"
        assert leaf.value.dtype == jnp.float32


@thorough
def test_scanned_and_separate_layers_compute_the_same(method):
    model = trained_run(method)[0]
    unstacked = Decoder(decoder_config(num_layers=LAYERS, scan_layers=False), model.adapter)
    params = drawn(model)
    stacked, separate = logits(model, params, BATCH), logits(unstacked, apart(params), BATCH)
    np.testing.assert_allclose(stacked, separate, rtol=2e-4, atol=2e-5)


def drawn(model, seed=1):
    """All parameters of a model drawn, buffers as they start: masks of ones stay masks."""
    params = decoder_params(model, seed)
    adapter = init_adapter(model, 0)
    trained, buffers = split_trained(adapter)
    trained = draw(jax.eval_shape(lambda: trained), seed, 0.3)
    return merge_params(split_params(params)[1], trained, buffers)


def apart(params):
    """Parameters with the layers stacked, as those of a model whose layers are not."""
    layers = {
        f"layers_{layer}": jax.tree.map(lambda x, at=layer: x[at], params["layers"])
        for layer in range(LAYERS)
    }
    return {name: leaf for name, leaf in params.items() if name != "layers"} | layers


@thorough
def test_content_of_padding_changes_no_real_token(method):
    model = trained_run(method)[0]
    params = drawn(model)
    real = BATCH["decoder_segment_ids"] > 0
    noise = np.random.default_rng(3).integers(1, 20, real.shape)
    other = BATCH | {
        "decoder_input_tokens": np.where(real, BATCH["decoder_input_tokens"], noise).astype(
            np.int32
        )
    }
    first, second = logits(model, params, BATCH), logits(model, params, other)
    np.testing.assert_allclose(first[real], second[real], rtol=1e-5, atol=1e-6)


@thorough
def test_packed_examples_do_not_see_one_another(method):
    """With evaluation's unlimited capacity a token's result does not depend on its row's other examples."""
    model = trained_run(method)[0]
    params = drawn(model)
    together = logits(model, params, BATCH)[0, 5:8]
    alone = {name: value[:1, 5:8] for name, value in BATCH.items()}
    np.testing.assert_allclose(together, logits(model, params, alone)[0], rtol=2e-4, atol=2e-5)


@methods
@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_merged_model_equals_the_adapted_one_or_is_refused(method, scan_layers):
    """Stacked: as trained; apart: as drawn, which spares a compilation of the step."""
    model, _, seen, _, frozen = trained_run(method)
    params = merge_params(seen[-1], frozen)
    if not scan_layers:
        params = apart(drawn(model))
        model = Decoder(decoder_config(num_layers=LAYERS, scan_layers=False), model.adapter)
    if method not in MERGES:
        with pytest.raises(MergeError, match=rf"{method}.*:") as error:
            merge(model.adapter, params)
        assert "\n" not in str(error.value)
        return
    merged = merge(model.adapter, params)
    assert not any(
        "adapter" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(merged)
    )
    plain = logits(Decoder(model.config), merged, BATCH)
    np.testing.assert_allclose(plain, logits(model, params, BATCH), rtol=1e-4, atol=1e-5)


@thorough
def test_bfloat16_stays_finite_and_near_float32(method):
    model = trained_run(method)[0]
    half = Decoder(decoder_config(num_layers=LAYERS, dtype="bfloat16"), model.adapter)
    params = drawn(model)
    exact, rounded = logits(model, params, BATCH), logits(half, params, BATCH)
    real = BATCH["decoder_segment_ids"] > 0
    assert np.isfinite(rounded[real]).all()
    spread = np.std(exact[real])
    assert np.abs(rounded[real] - exact[real]).mean() < 0.2 * spread


@methods
def test_fields_of_training_alone_do_not_change_an_evaluation(method):
    config = make(method)
    assert config.training_fields <= set(config.to_dict())
    assert all(is_trained(("a", "adapter", name)) for name in ("lora_a", "router"))
