"""The encoder-decoder against plain loops, and what must not change its results: layout, memory policy, packing, padding."""

import dataclasses
import functools
from pathlib import Path
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sira_jax.adapters import LoRAConfig, ResLoRAConfig, SiRAConfig
from sira_jax.adapters.adapter_set import AdapterSetConfig
from sira_jax.adapters.lora import LoRA
from sira_jax.errors import ConfigError
from sira_jax.models import EncoderDecoder, fresh_adapter
from tests.models import t5_reference
from tests.tiny_t5 import layers_apart, t5_batch, t5_config, t5_params

ALL = ("encoder/.*", "decoder/.*")
LORA = LoRAConfig(rank=2, targets=ALL)
SIRA = SiRAConfig(
    expert_dropout_rate=0.0,
    num_experts=4,
    num_selected_experts=2,
    rank=2,
    capacity_factor=None,
    router_init_std=1.0,
    load_balance_loss_weight=0.1,
    targets=("encoder/mlp/wo", "decoder/encoder_decoder_attention/key", "decoder/mlp/wi_0"),
)
PACKED = t5_batch([[(6, 2), (4, 4)], [(3, 5)]], (12, 7), num_tasks=2)


@functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def apply(model, params, batch, deterministic=True):
    return model.apply(
        {"params": params}, batch, deterministic=deterministic, mutable=["losses", "metrics"]
    )


def logits(model, params, batch):
    return np.asarray(apply(model, params, batch)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp_activations": ("relu",), "tie_embeddings": True, "scan_layers": False},
        {"mlp_activations": ("silu", "linear"), "relpos_per_layer": True},
        {"relpos_per_layer": True, "scan_layers": False, "num_encoder_layers": 1},
    ],
)
def test_logits_are_the_loops(changes):
    model = EncoderDecoder(t5_config(**changes))
    params = t5_params(model)
    plain = layers_apart(params, model.config) if model.config.scan_layers else params
    got = logits(model, params, PACKED)
    expected = t5_reference.encoder_decoder(plain, model.config, PACKED)
    real = PACKED["decoder_segment_ids"] > 0
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[real], expected[real], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["gated", "relu"])
def test_parameters_are_those_of_t5x(kind):
    """The list is T5X's minimal T5, of the sizes at its head."""
    text = (Path(__file__).parent / f"t5x_parameters_{kind}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    expected = {
        path: tuple(int(n) for n in sizes.split("x"))
        for path, sizes in (line.split() for line in lines)
    }
    plain = {"mlp_activations": ("relu",), "tie_embeddings": True} if kind == "relu" else {}
    model = EncoderDecoder(t5_config(scan_layers=False, **plain))
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.init_batch())["params"]
    got = traverse_util.flatten_dict(nn.unbox(shapes), sep="/")
    assert {path: leaf.shape for path, leaf in got.items()} == expected


def test_scanned_parameters_are_stacked_on_the_first_axis():
    apart = EncoderDecoder(t5_config(scan_layers=False, relpos_per_layer=True))
    scanned = EncoderDecoder(t5_config(relpos_per_layer=True))
    params = t5_params(scanned)
    shapes = jax.tree.map(jnp.shape, layers_apart(params, scanned.config))
    assert shapes == jax.tree.map(jnp.shape, t5_params(apart))
    assert params["encoder"]["layers"]["relpos_bias"]["rel_embedding"].shape == (3, 3, 8)


def test_every_parameter_has_logical_axes():
    model = EncoderDecoder(t5_config(), LORA)
    boxes = jax.eval_shape(model.init, jax.random.key(0), model.init_batch())["params"]
    leaves = jax.tree.leaves(boxes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(len(leaf.names) == leaf.value.ndim for leaf in leaves)


def test_without_segments_padding_is_token_0_and_targets_of_0():
    model = EncoderDecoder(t5_config())
    params = t5_params(model)
    batch = t5_batch([[(6, 3)], [(4, 5)]], (9, 7))
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    bare = {name: batch[name] for name in names}
    real = batch["decoder_segment_ids"] > 0
    expected = logits(model, params, batch)
    np.testing.assert_array_equal(logits(model, params, bare)[real], expected[real])
    # Without targets all of the decoder's tokens count, which no earlier one sees.
    bare.pop("decoder_target_tokens")
    np.testing.assert_array_equal(logits(model, params, bare)[real], expected[real])
    # The input's padding is not seen, whatever fills it in a batch with segments.
    other = dict(batch, encoder_input_tokens=batch["encoder_input_tokens"].copy())
    other["encoder_input_tokens"][0, 6:] = 5
    np.testing.assert_array_equal(logits(model, params, other)[real], expected[real])


def loss_and_grads(config, params, batch):
    model = EncoderDecoder(config, SIRA, num_tasks=2)

    @jax.jit
    def both(params):
        def loss(params):
            y, sown = model.apply(
                {"params": params}, batch, deterministic=False, mutable=["losses", "metrics"]
            )
            real = (batch["decoder_segment_ids"] > 0)[..., None]
            auxiliary = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sown["losses"]))
            return jnp.mean(jnp.where(real, jnp.sin(y), 0)) + auxiliary, (y, sown["metrics"])

        return jax.value_and_grad(loss, has_aux=True)(params)

    return jax.device_get(both(params))


@pytest.fixture(scope="module")
def sira_params():
    return t5_params(EncoderDecoder(t5_config(), SIRA))


@pytest.fixture(scope="module")
def plain_result(sira_params):
    return loss_and_grads(t5_config(), sira_params, PACKED)


def assert_trees_close(got, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected
    )


def test_layers_apart_and_recomputed_change_nothing(sira_params, plain_result):
    (loss, (y, _)), grads = plain_result
    config = t5_config(scan_layers=False, remat_policy="full")
    (loss2, (y2, _)), grads2 = loss_and_grads(config, layers_apart(sira_params, config), PACKED)
    np.testing.assert_allclose(y2, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss2, loss, rtol=1e-5)
    assert_trees_close(grads2, layers_apart(grads, config))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "projections", "dots"])
def test_memory_policies_change_nothing(policy, sira_params, plain_result):
    result = loss_and_grads(t5_config(remat_policy=policy), sira_params, PACKED)
    assert_trees_close(result, plain_result)


@pytest.fixture(scope="module")
def packed_models(sira_params):
    """The frozen model, with LoRA and with SiRA without a limit: in all of them examples are alone."""
    models = [EncoderDecoder(t5_config(), adapter) for adapter in (None, LORA)]
    pairs = [(model, t5_params(model)) for model in models]
    return [*pairs, (EncoderDecoder(t5_config(), SIRA), sira_params)]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["frozen", "lora", "sira"])
def test_packed_examples_are_alone(packed_models, which):
    model, params = packed_models[which]
    together = logits(model, params, PACKED)
    for row, (enc_start, enc_size), (start, size) in (
        (0, (0, 6), (0, 2)),
        (0, (6, 4), (2, 4)),
        (1, (0, 3), (0, 5)),
    ):
        alone = {name: np.zeros_like(values[:1]) for name, values in PACKED.items()}
        for name, values in PACKED.items():
            here = (enc_start, enc_size) if name.startswith("encoder") else (start, size)
            alone[name][0, : here[1]] = values[row, here[0] : sum(here)]
        for side in ("encoder", "decoder"):
            alone[f"{side}_segment_ids"] = (alone[f"{side}_segment_ids"] > 0).astype(np.int32)
        got = logits(model, params, alone)[0, :size]
        np.testing.assert_allclose(together[row, start : start + size], got, rtol=1e-4, atol=1e-5)


def merged_kernels(params):
    """(kernel + s A B of each projection, their paths), and the rest of the parameters."""
    flat = traverse_util.flatten_dict(params)
    kernels = {}
    for path in [path for path in flat if path[-1] == "lora_a"]:
        base = path[:-2]
        a, b = flat.pop(path), flat.pop((*base, "adapter", "lora_b"))
        kernels[base] = (a, b)
        flat[*base, "kernel"] = flat[*base, "kernel"] + LORA.scale * a @ b
    return traverse_util.unflatten_dict(flat), kernels


def test_loras_gradients_follow_from_the_merged_kernels(packed_models):
    """With W = W0 + s A B the chain rule gives dL/dA = s G B^T and dL/dB = s A^T G, G being dL/dW of the merged model."""
    model, params = packed_models[1]

    def loss(model, params):
        y = model.apply({"params": params}, PACKED)
        real = (PACKED["decoder_segment_ids"] > 0)[..., None]
        return jnp.mean(jnp.where(real, jnp.sin(y), 0))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    value, got = gradient(model, params)
    merged, kernels = merged_kernels(params)
    expected_value, plain = gradient(EncoderDecoder(model.config), merged)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    got, plain = traverse_util.flatten_dict(got), traverse_util.flatten_dict(plain)
    assert len(kernels) == len(model.config.projections) == 18
    for path, (a, b) in kernels.items():
        g = plain[*path, "kernel"]
        turned_a, turned_b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
        assert np.abs(g).max() > 1e-6
        for name, expected in (("lora_a", g @ turned_b), ("lora_b", turned_a @ g)):
            np.testing.assert_allclose(
                got[*path, "adapter", name], LORA.scale * expected, rtol=2e-3, atol=2e-6
            )


def test_task_metrics_count_the_tokens_of_the_stream_that_a_projection_reads(sira_params):
    model = EncoderDecoder(t5_config(), SIRA, num_tasks=3)
    batch = dict(PACKED)
    batch["encoder_task_ids"] = np.asarray([[0] * 6 + [2] * 6, [1] * 12])
    batch["task_ids"] = np.asarray([[0] * 2 + [2] * 5, [1] * 7])
    _, sown = apply(model, sira_params, batch)
    encoder, decoder = (sown["metrics"][name]["layers"] for name in ("encoder", "decoder"))
    stats = encoder["mlp"]["wo"]["adapter"]["router"][0]
    np.testing.assert_array_equal(stats.task_tokens_Z, [[6, 3, 4]] * 3)
    stats = decoder["encoder_decoder_attention"]["key"]["adapter"]["router"][0]
    np.testing.assert_array_equal(stats.task_tokens_Z, [[6, 3, 4]] * 2)
    stats = decoder["mlp"]["wi_0"]["adapter"]["router"][0]
    np.testing.assert_array_equal(stats.task_tokens_Z, [[2, 5, 4]] * 2)


def test_bfloat16_stays_near_and_keeps_router_and_logits_in_float32(sira_params):
    rough = EncoderDecoder(t5_config(dtype="bfloat16", param_dtype="bfloat16"), SIRA)
    shapes = jax.eval_shape(rough.init, jax.random.key(0), rough.init_batch())["params"]
    rounded = jax.tree.map(
        lambda leaf, shape: leaf.astype(shape.dtype), sira_params, nn.unbox(shapes)
    )
    table = rounded["encoder"]["relpos_bias"]["rel_embedding"]
    assert table.dtype == jnp.bfloat16
    y, sown = apply(rough, rounded, PACKED)
    expected = logits(EncoderDecoder(t5_config(), SIRA), sira_params, PACKED)
    assert y.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(sown)} == {jnp.dtype("float32")}
    real = PACKED["decoder_segment_ids"] > 0
    errors = np.abs(np.asarray(y) - expected)[real]
    assert np.median(errors) < 0.05 * np.abs(expected[real]).mean()


class Sum(nn.Module):
    """Keeps the shape of what a block is given."""

    @nn.compact
    def __call__(self, x_BTD, context):
        self.param("weight", nn.initializers.ones, ())
        self.sow(
            "metrics", "seen", jnp.stack([jnp.asarray(x_BTD.shape[1]), context.valid_BT.sum()])
        )
        return x_BTD.sum(axis=-1, keepdims=True)


class Shifted(LoRA):
    """LoRA plus what the block module returned, where it looked at the tokens that the projection reads."""

    @nn.compact
    def __call__(self, x_BTD, projection, context):
        y_BTF = super().__call__(x_BTD, projection, context)
        return y_BTF if context.block is None else y_BTF + context.block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks(LoRAConfig):
    """A method with a block module, for these tests alone."""

    method: ClassVar[str] = "blocks"

    def make_module(self):
        return Shifted(config=self, name="adapter")

    def make_block_module(self):
        return Sum(name="adapter")


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_block_modules_run_in_each_block_on_its_own_stream(scan_layers):
    model = EncoderDecoder(t5_config(scan_layers=scan_layers), Blocks(rank=2, targets=ALL))
    params = t5_params(model)
    assert "adapter" in params["encoder"]["layers" if scan_layers else "layers_1"]
    y, sown = apply(model, params, PACKED)
    assert np.abs(y - logits(EncoderDecoder(model.config, LORA), params, PACKED)).max() > 0.1
    for stack, layers, seen in (("encoder", 3, (12, 13)), ("decoder", 2, (7, 11))):
        metrics = sown["metrics"][stack]
        if scan_layers:
            np.testing.assert_array_equal(metrics["layers"]["adapter"]["seen"][0], [seen] * layers)
        else:
            assert set(metrics) == {f"layers_{layer}" for layer in range(layers)}
            for layer in metrics.values():
                np.testing.assert_array_equal(layer["adapter"]["seen"][0], seen)


def test_what_layers_hand_on_stays_in_its_stack():
    """ResLoRA's "block": a layer adds the pairs of the one before it, in the same stack; merging by hand says the same."""
    config = ResLoRAConfig(rank=2, connection="block", num_previous=1, targets=ALL)
    model = EncoderDecoder(t5_config(), config)
    params = t5_params(model)
    flat = traverse_util.flatten_dict(params)
    for path in [path for path in flat if path[-1] == "lora_a"]:
        a, b = flat.pop(path), flat.pop((*path[:-1], "lora_b"))
        own = a @ b
        before = np.concatenate([np.zeros_like(own[:1]), own[:-1]])
        kernel = (*path[:-2], "kernel")
        flat[kernel] = flat[kernel] + config.scale * (own + before)
    expected = logits(EncoderDecoder(model.config), traverse_util.unflatten_dict(flat), PACKED)
    got = logits(model, params, PACKED)
    real = PACKED["decoder_segment_ids"] > 0
    np.testing.assert_allclose(got[real], expected[real], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("connection", ["input", "middle"])
def test_carries_have_the_shape_of_what_a_projection_reads(connection):
    """Encoder and decoder are of unequal length here, and scanning asks for carries of one shape."""
    config = ResLoRAConfig(rank=2, connection=connection, targets=ALL)
    scanned = EncoderDecoder(t5_config(), config)
    apart = EncoderDecoder(t5_config(scan_layers=False), config)
    params = t5_params(scanned)
    expected = logits(apart, layers_apart(params, apart.config), PACKED)
    np.testing.assert_allclose(logits(scanned, params, PACKED), expected, rtol=1e-4, atol=1e-4)


def test_each_row_has_its_adapter_of_a_set(packed_models):
    (frozen, _), (single, params), _ = packed_models
    model = EncoderDecoder(t5_config(), AdapterSetConfig(members=(("a", LORA),)))
    flat = traverse_util.flatten_dict(params)
    named = {
        (*path[:-1], "a", path[-1]) if "adapter" in path else path: leaf
        for path, leaf in flat.items()
    }
    batch = dict(PACKED, adapter_ids=np.asarray([0, -1]))
    got = logits(model, traverse_util.unflatten_dict(named), batch)
    plain = {path: leaf for path, leaf in flat.items() if "adapter" not in path}
    without = logits(frozen, traverse_util.unflatten_dict(plain), PACKED)
    real = PACKED["decoder_segment_ids"] > 0
    with_it = logits(single, params, PACKED)
    np.testing.assert_allclose(got[0][real[0]], with_it[0][real[0]], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1][real[1]], without[1][real[1]], rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_is_the_models_adapter_tree():
    model = EncoderDecoder(t5_config(), LORA)
    shapes = jax.eval_shape(lambda key: fresh_adapter(model, key), jax.random.key(0))
    assert set(shapes) == {"encoder", "decoder"}
    assert shapes["decoder"]["layers"]["mlp"]["wo"]["adapter"]["lora_a"].shape == (2, 12, 2)
    nothing = EncoderDecoder(t5_config(), LoRAConfig(targets=("middle/.*",)))
    with pytest.raises(ConfigError, match="matches no projection"):
        jax.eval_shape(lambda key: fresh_adapter(nothing, key), jax.random.key(0))
