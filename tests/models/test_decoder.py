"""The decoder against plain loops, and what must not change its results: layout, memory policy, packing, padding."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.adapters import LoRAConfig, SiRAConfig, merge
from sira_jax.errors import MergeError
from sira_jax.models import Decoder
from tests.models import reference
from tests.tiny import VOCAB, decoder_config, decoder_params, make_batch, shapes_of

LORA = LoRAConfig(rank=2)
SIRA = SiRAConfig(
    expert_dropout_rate=0.0,
    num_experts=4,
    num_selected_experts=2,
    rank=2,
    capacity_factor=None,
    router_init_std=1.0,
    load_balance_loss_weight=0.1,
    targets=("down",),
)
PACKED = make_batch([(4, 3), (2, 5)], 8)


@functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def apply(model, params, batch, deterministic=True, rngs=None):
    return model.apply(
        {"params": params},
        batch,
        deterministic=deterministic,
        rngs=rngs,
        mutable=["losses", "metrics"],
    )


def logits(model, params, batch):
    return np.asarray(apply(model, params, batch)[0])


def apart(params, num_layers=2):
    """The parameters of scanned layers, as those of layers kept apart."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | {
        f"layers_{index}": jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        for index in range(num_layers)
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "qkv_bias": True, "num_kv_heads": 1},
        {"num_layers": 3, "scan_layers": False, "rope_theta": 100.0},
    ],
)
def test_logits_are_the_loops(changes):
    model = Decoder(decoder_config(**changes))
    params = decoder_params(model)
    got = logits(model, params, PACKED)
    plain = params if not model.config.scan_layers else apart(params)
    expected = reference.decoder(plain, model.config, PACKED)
    real = PACKED["decoder_segment_ids"] > 0
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[real], expected[real], rtol=2e-4, atol=2e-4)


def test_parameter_tree():
    config = decoder_config(tie_embeddings=False, qkv_bias=True)
    batch = {"decoder_input_tokens": jnp.zeros((1, 2), jnp.int32)}
    shapes = jax.tree.map(lambda leaf: leaf.shape, shapes_of(Decoder(config), batch))
    assert shapes == {
        "token_embedder": {"embedding": (VOCAB, 8)},
        "layers": {
            "input_norm": {"scale": (2, 8)},
            "attention": {
                "q": {"kernel": (2, 8, 16), "bias": (2, 16)},
                "k": {"kernel": (2, 8, 8), "bias": (2, 8)},
                "v": {"kernel": (2, 8, 8), "bias": (2, 8)},
                "o": {"kernel": (2, 16, 8)},
            },
            "mlp_norm": {"scale": (2, 8)},
            "mlp": {
                "gate": {"kernel": (2, 8, 12)},
                "up": {"kernel": (2, 8, 12)},
                "down": {"kernel": (2, 12, 8)},
            },
        },
        "final_norm": {"scale": (8,)},
        "lm_head": {"kernel": (8, VOCAB)},
    }


def test_defaults_of_the_batch():
    """Without segments and positions a row is one example."""
    model = Decoder(decoder_config())
    params = decoder_params(model)
    batch = make_batch([(8,), (8,)], 8)
    bare = {"decoder_input_tokens": batch["decoder_input_tokens"]}
    np.testing.assert_array_equal(logits(model, params, batch), logits(model, params, bare))


def loss_and_grads(config, params, batch):
    model = Decoder(config, SIRA, num_tasks=2)

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
    return decoder_params(Decoder(decoder_config(), SIRA))


@pytest.fixture(scope="module")
def plain_result(sira_params):
    return loss_and_grads(decoder_config(), sira_params, PACKED)


def assert_trees_close(got, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected
    )


def test_scanned_layers_equal_layers_apart(sira_params, plain_result):
    (loss, (y, _)), grads = plain_result
    config = decoder_config(scan_layers=False)
    (loss2, (y2, metrics2)), grads2 = loss_and_grads(config, apart(sira_params), PACKED)
    np.testing.assert_allclose(y2, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss2, loss, rtol=1e-5)
    assert_trees_close(grads2, apart(grads))
    assert set(metrics2) == {"layers_0", "layers_1"}


@pytest.mark.parametrize(
    "policy",
    [
        "projections",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("full", "dots", "dots_no_batch")),
    ],
)
def test_memory_policies_change_nothing(policy, sira_params, plain_result):
    result = loss_and_grads(decoder_config(remat_policy=policy), sira_params, PACKED)
    assert_trees_close(result, plain_result)


@pytest.mark.parametrize("adapter", [None, SIRA], ids=["frozen", "sira"])
def test_the_policy_projections_computes_only_attention_again(adapter):
    def products(policy):
        model = Decoder(decoder_config(remat_policy=policy), adapter)
        params = decoder_params(model)

        def loss(params):
            return jnp.sum(model.apply({"params": params}, PACKED, method="features") ** 2)

        return count_products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    # The scores of attention, in the one block that is compiled.
    assert products("projections") == products("none") + 1
    assert products("full") > products("none") + 7


def count_products(jaxpr):
    inner = [part for e in jaxpr.eqns for part in jax.extend.core.jaxprs_in_params(e.params)]
    own = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)
    return own + sum(count_products(part) for part in inner)


def test_memory_policy_without_scan(sira_params, plain_result):
    config = decoder_config(remat_policy="full", scan_layers=False)
    (loss, (y, _)), grads = loss_and_grads(config, apart(sira_params), PACKED)
    np.testing.assert_allclose(y, plain_result[0][1][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, plain_result[0][0], rtol=1e-5)
    assert_trees_close(grads, apart(plain_result[1]))


def take(batch, row, start, size):
    """One example of a packed row, as the first of a row of 8."""
    out = {name: np.zeros((1, 8), values.dtype) for name, values in batch.items()}
    for name, values in batch.items():
        out[name][0, :size] = values[row, start : start + size]
    out["decoder_segment_ids"][0, :size] = 1
    return out


@pytest.fixture(scope="module")
def packed_models():
    """The frozen decoder, with LoRA and with SiRA without a limit: in all of them examples are alone."""
    models = [Decoder(decoder_config(), adapter) for adapter in (None, LORA, SIRA)]
    return [(model, decoder_params(model)) for model in models]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["frozen", "lora", "sira"])
def test_packed_examples_are_alone(packed_models, which):
    model, params = packed_models[which]
    together = logits(model, params, PACKED)
    for row, start, size in ((0, 0, 4), (0, 4, 3), (1, 0, 2), (1, 2, 5)):
        alone = logits(model, params, take(PACKED, row, start, size))
        np.testing.assert_allclose(
            together[row, start : start + size], alone[0, :size], rtol=1e-4, atol=1e-5
        )
    changed = {name: values.copy() for name, values in PACKED.items()}
    tokens = changed["decoder_input_tokens"]
    tokens[0, :4] = tokens[0, :4] % (VOCAB - 1) + 1
    tokens[0, 7] = 5  # Padding.
    after = logits(model, params, changed)
    np.testing.assert_array_equal(after[0, 4:7], together[0, 4:7])
    np.testing.assert_array_equal(after[1, :7], together[1, :7])
    assert np.abs(after[0, :4] - together[0, :4]).max() > 1e-2


@pytest.mark.parametrize("scan_layers", [True, False])
def test_merged_model_computes_the_same_without_adapters(scan_layers):
    adapter = LoRAConfig(rank=2, overrides=(("mlp/.*", {"alpha": 2.0}), ("down", {"rank": 3})))
    config = decoder_config(scan_layers=scan_layers, qkv_bias=True)
    model = Decoder(config, adapter)
    params = decoder_params(model)
    merged = merge(adapter, params)
    shapes = shapes_of(Decoder(config), PACKED)
    assert jax.tree.structure(merged) == jax.tree.structure(shapes)
    expected = logits(model, params, PACKED)
    np.testing.assert_allclose(
        logits(Decoder(config), merged, PACKED), expected, rtol=1e-4, atol=1e-4
    )


def test_model_with_routers_is_not_merged(packed_models):
    _, params = packed_models[2]
    with pytest.raises(MergeError, match="cannot be merged"):
        merge(SIRA, params)


def test_a_token_sees_none_that_follow(packed_models):
    model, params = packed_models[1]
    batch = make_batch([(8,), (8,)], 8)
    before = logits(model, params, batch)
    batch["decoder_input_tokens"][0, 5] += 1
    after = logits(model, params, batch)
    np.testing.assert_array_equal(after[0, :5], before[0, :5])
    assert np.all(np.abs(after[0, 5:] - before[0, 5:]).max(axis=-1) > 1e-4)


def test_padding_on_the_left_has_no_influence(packed_models):
    for model, params in packed_models:
        right = make_batch([(5,), (8,)], 8, seed=3)
        left = {name: values.copy() for name, values in right.items()}
        for values in left.values():
            values[0] = np.roll(values[0], 3)
        y, y_left = logits(model, params, right), logits(model, params, left)
        np.testing.assert_allclose(y_left[0, 3:], y[0, :5], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(y_left[1], y[1])
        assert np.all(np.isfinite(y_left))


def test_task_metrics_count_each_layers_tokens_by_task(sira_params):
    model = Decoder(decoder_config(), SIRA, num_tasks=3)
    batch = make_batch([(4, 3), (2, 5)], 8)
    batch["task_ids"] = np.asarray([[0] * 4 + [2] * 4, [1] * 2 + [0] * 6])
    _, sown = apply(model, sira_params, batch)
    stats = sown["metrics"]["layers"]["mlp"]["down"]["adapter"]["router"][0]
    np.testing.assert_array_equal(stats.tokens, [14, 14])
    # Position 7 of both rows is padding and belongs to no task.
    np.testing.assert_array_equal(stats.task_tokens_Z, [[9, 2, 3]] * 2)
    np.testing.assert_allclose(stats.task_kept_pairs_ZE.sum(-1), [[18, 4, 6]] * 2)
    np.testing.assert_allclose(stats.task_entropy_sum_Z.sum(-1), stats.entropy_sum, rtol=1e-5)


def test_without_tasks_no_task_metrics(sira_params):
    _, sown = apply(Decoder(decoder_config(), SIRA), sira_params, PACKED)
    stats = sown["metrics"]["layers"]["mlp"]["down"]["adapter"]["router"][0]
    assert stats.task_tokens_Z.shape == (2, 0)


def test_layers_draw_their_own_dropout():
    adapter = SiRAConfig(
        num_experts=4, num_selected_experts=4, rank=2, expert_dropout_rate=0.5, targets="q"
    )
    model = Decoder(decoder_config(), adapter)
    # Equal layers that change nothing: both routers see the same x and have the same logits.
    params = jax.tree.map(np.zeros_like, decoder_params(model))
    params["token_embedder"] = decoder_params(model)["token_embedder"]
    for norm in ("input_norm", "mlp_norm"):
        params["layers"][norm]["scale"] += 1
    batch = make_batch([(32,)], 32)
    rngs = {"expert_dropout": jax.random.key(0)}
    _, sown = apply(model, params, batch, deterministic=False, rngs=rngs)
    kept = sown["metrics"]["layers"]["attention"]["q"]["adapter"]["router"][0].kept_pairs_E
    assert kept.shape == (2, 4)
    assert not np.array_equal(kept[0], kept[1])
    _, again = apply(model, params, batch, deterministic=False, rngs=rngs)
    jax.tree.map(np.testing.assert_array_equal, sown, again)


def test_bfloat16_stays_near_and_keeps_router_and_logits_in_float32(sira_params):
    exact = Decoder(decoder_config(), SIRA)
    rough = Decoder(decoder_config(dtype="bfloat16", param_dtype="bfloat16"), SIRA)
    shapes = shapes_of(rough, PACKED)
    rounded = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), sira_params, shapes)
    assert shapes["layers"]["mlp"]["down"]["kernel"].dtype == jnp.bfloat16
    assert shapes["layers"]["mlp"]["down"]["adapter"]["router"].dtype == jnp.float32
    y, sown = apply(rough, rounded, PACKED)
    expected = logits(exact, sira_params, PACKED)
    assert y.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(sown)} == {jnp.dtype("float32")}
    real = PACKED["decoder_segment_ids"] > 0
    # A choice of experts may turn at the border, so closeness is asked of the bulk.
    errors = np.abs(np.asarray(y) - expected)[real]
    assert np.median(errors) < 0.05 * np.abs(expected[real]).mean()
