"""What tells the decoders' families apart, against plain loops: values, gradients, layouts, memory policies, packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.errors import ConfigError
from sira_jax.models import Decoder
from sira_jax.models.decoder import attention_mask
from sira_jax.models.layers import capped_attention, soft_cap
from sira_jax.models.rope import LinearRopeScaling, rotary_frequencies
from tests.models import reference
from tests.models.families import ALL, FAMILIES, GEMMA2, GEMMA3
from tests.tiny import decoder_config, decoder_params, make_batch, shapes_of

PACKED = make_batch([(4, 4), (1, 6)], 8)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch):
    return model.apply({"params": params}, batch)


def apart(params, num_layers=3):
    """The parameters of scanned layers, as those of layers kept apart."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | {
        f"layers_{index}": jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        for index in range(num_layers)
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_loops(name):
    model = Decoder(decoder_config(**FAMILIES[name]))
    params = decoder_params(model)
    got = apply(model, params, PACKED)
    expected = reference.decoder(apart(params), model.config, PACKED)
    real = PACKED["decoder_segment_ids"] > 0
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[real], expected[real], rtol=5e-4, atol=5e-4)


CHANGES = {
    "activation": "silu",
    "qk_norm": False,
    "sandwich_norms": False,
    "norm_plus_one": False,
    "scale_embeddings": False,
    "query_pre_attn_scalar": None,
    "attention_softcap": None,
    "final_softcap": None,
    "sliding_window": 4,
    "window_pattern": (False, True),
    "rope_theta": 500.0,
    "rope_scaling": None,
    "local_rope_theta": None,
}


def test_each_field_moves_the_loops():
    """Or a field that is not read would go unseen above."""
    config = decoder_config(**ALL)
    params = apart(decoder_params(Decoder(config)))
    batch = {name: values[:1] for name, values in make_batch([(7,)], 7).items()}
    before = reference.decoder(params, config, batch)
    for field, value in CHANGES.items():
        after = reference.decoder(params, dataclasses.replace(config, **{field: value}), batch)
        assert np.abs(after - before).max() > 1e-2, field


def loss_and_gradients(config, params):
    @jax.jit
    def both(params):
        def loss(params):
            y = Decoder(config).apply({"params": params}, PACKED)
            real = (PACKED["decoder_segment_ids"] > 0)[..., None]
            return jnp.mean(jnp.where(real, jnp.sin(y), 0))

        return jax.value_and_grad(loss)(params)

    return jax.device_get(both(params))


@pytest.fixture(scope="module")
def scanned():
    """(parameters of all fields at once, loss and gradients with scanned layers)."""
    config = decoder_config(**ALL)
    params = decoder_params(Decoder(config))
    return params, loss_and_gradients(config, params)


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_layers_apart_have_the_gradients_of_scanned_ones(scanned, policy):
    params, (loss, gradients) = scanned
    config = decoder_config(**ALL, scan_layers=False, remat_policy=policy)
    assert_close(loss_and_gradients(config, apart(params)), (loss, apart(gradients)))


def test_recomputing_scanned_layers_changes_nothing(scanned):
    params, expected = scanned
    assert_close(loss_and_gradients(decoder_config(**ALL, remat_policy="full"), params), expected)


def test_gradients_are_differences_of_the_loops(scanned):
    params, (_, gradients) = scanned
    config = decoder_config(**ALL)
    exact = apart(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params))
    flat = apart(gradients)
    real = (PACKED["decoder_segment_ids"] > 0)[..., None]

    def loss():
        return np.mean(np.where(real, np.sin(reference.decoder(exact, config, PACKED)), 0))

    places = [
        ("layers_0", "attention", "q_norm", "scale"),
        ("layers_1", "attention", "k_norm", "scale"),
        ("layers_0", "post_attention_norm", "scale"),
        ("layers_2", "post_mlp_norm", "scale"),
        ("layers_1", "attention", "k", "kernel"),
        ("token_embedder", "embedding"),
    ]
    for path in places:
        leaf = functools.reduce(lambda tree, key: tree[key], path, exact)
        gradient = functools.reduce(lambda tree, key: tree[key], path, flat)
        place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        found = []
        for step in (1e-4, -1e-4):
            leaf[place] += step
            found.append(loss())
            leaf[place] -= step
        slope = (found[0] - found[1]) / 2e-4
        np.testing.assert_allclose(gradient[place], slope, rtol=2e-3, atol=1e-6, err_msg=str(path))


def test_one_block_is_compiled_for_layers_of_both_kinds():
    text = {}
    for layers in (3, 12):
        model = Decoder(decoder_config(**ALL | {"num_layers": layers}))
        params = jax.eval_shape(model.init, jax.random.key(0), PACKED)
        text[layers] = jax.jit(model.apply).lower(params, PACKED).as_text()
    assert text[3].count("dot_general") == text[12].count("dot_general")


def test_a_window_ends_where_it_says():
    """Layer by layer a token's reach grows by the window less one; beyond that nothing comes through."""
    model = Decoder(decoder_config(num_layers=2, sliding_window=3))
    params = decoder_params(model)
    batch = make_batch([(8,)], 8)
    before = apply(model, params, batch)
    batch["decoder_input_tokens"][0, 1] += 1
    moved = np.abs(apply(model, params, batch) - before)[0].max(axis=-1)
    np.testing.assert_array_equal(moved > 1e-5, [False] + [True] * 5 + [False] * 2)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_mask_of_a_window_cell_by_cell(window):
    segments = np.asarray([[1, 1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1]], np.int32)
    mask = np.asarray(attention_mask(segments, segments, 0, window))
    for row, t, s in np.ndindex(2, 7, 7):
        same = segments[row, s] == segments[row, t] != 0
        assert mask[row, t, s] == (same and 0 <= t - s < window)
    later = np.asarray(attention_mask(segments[:, 5:], segments, 5, window))
    np.testing.assert_array_equal(later, mask[:, 5:])


def test_packed_examples_are_alone_and_padding_on_the_left_counts_for_nothing():
    for fields in (GEMMA2, GEMMA3):
        model = Decoder(decoder_config(**fields))
        params = decoder_params(model)
        together = apply(model, params, PACKED)
        alone = {name: np.roll(values, 3, axis=1) for name, values in PACKED.items()}
        for values in alone.values():
            values[:, :3] = 0
        alone["decoder_segment_ids"][:, 7:] = 0
        shifted = apply(model, params, alone)
        np.testing.assert_allclose(shifted[0, 3:7], together[0, :4], rtol=1e-4, atol=1e-5)
        second = {name: np.roll(values, -4, axis=1) for name, values in PACKED.items()}
        second["decoder_segment_ids"][:, 4:] = 0
        got = apply(model, params, second)
        np.testing.assert_allclose(got[0, :4], together[0, 4:], rtol=1e-4, atol=1e-5)


def test_capped_attention_without_keys_is_finite():
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 4, 6)).astype(np.float32)
    mask = np.asarray([[[False, False], [True, False]]])
    out = capped_attention(q, k[:, :, :2], v[:, :, :2], mask, 1.0, 2.0)
    assert np.all(np.isfinite(out))
    np.testing.assert_allclose(out[0, 1, :2], v[0, [0, 0], 0], rtol=1e-6)


def test_caps_hold_in_bfloat16_and_logits_stay_float32():
    config = decoder_config(**ALL, dtype="bfloat16", param_dtype="bfloat16")
    model = Decoder(config)
    shapes = shapes_of(model, PACKED)
    plain = decoder_params(Decoder(decoder_config(**ALL)))
    params = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype) * 3, plain, shapes)
    y = np.asarray(apply(model, params, PACKED))
    assert y.dtype == np.float32
    assert np.all(np.abs(y) <= 4.0)
    assert np.abs(y).max() > 3.9
    # Of a cap that were applied in bfloat16, few values would be left near it.
    assert len(np.unique(y[y > 3.0])) > 100


def test_soft_cap():
    x = np.asarray([-1e9, -1.0, 0.0, 0.5, 1e9], np.float32)
    np.testing.assert_allclose(
        soft_cap(x, 2.0), [-2, -2 * np.tanh(0.5), 0, 2 * np.tanh(0.25), 2], rtol=1e-6
    )
    assert soft_cap(x, None) is x


def test_linear_scaling():
    plain = rotary_frequencies(8, 100.0, None)
    scaled = rotary_frequencies(8, 100.0, LinearRopeScaling(factor=4.0))
    np.testing.assert_allclose(scaled, plain / 4)
    for factor in (0.5, None, float("inf")):
        with pytest.raises(ConfigError, match=r"rope_scaling\.factor"):
            LinearRopeScaling(factor=factor)


def test_norms_of_gemma_start_at_zero():
    model = Decoder(decoder_config(**GEMMA3))
    params = jax.jit(model.init)(jax.random.key(0), PACKED)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    scales = [leaf for path, leaf in leaves if "scale" in jax.tree_util.keystr(path)]
    assert len(scales) == 7
    assert all(not np.any(jax.tree.leaves(scale)[0]) for scale in scales)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation", "gelu"),
        ("norm_plus_one", 1),
        ("qk_norm", "yes"),
        ("sandwich_norms", None),
        ("scale_embeddings", 2.0),
        ("query_pre_attn_scalar", 0.0),
        ("attention_softcap", -1.0),
        ("final_softcap", "30"),
        ("sliding_window", 0),
        ("sliding_window", 4.0),
        ("sliding_window", True),
        ("window_pattern", ()),
        ("window_pattern", (1, 0)),
        ("window_pattern", True),
        ("local_rope_theta", 10.0),
    ],
)
def test_wrong_fields_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"model\.{field}=.* is not allowed: "):
        decoder_config(**{field: value})


def test_layers_of_a_pattern():
    config = decoder_config(num_layers=5, sliding_window=4, window_pattern=[True, False])
    assert config.windowed_layers == (True, False, True, False, True)
    assert hash(config) == hash(dataclasses.replace(config))
    assert decoder_config().windowed_layers == (False, False)
    assert decoder_config(sliding_window=4).windowed_layers == (True, True)
