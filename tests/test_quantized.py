"""Matrices in few bits: their values, products, names, and models that hold them; needs qwix."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax import quantized
from sira_jax.adapters import METHODS, merge
from sira_jax.checkpoints import fingerprint, load_base_model
from sira_jax.errors import ConfigError
from sira_jax.models import Decoder
from sira_jax.training.config import ModelSource
from sira_jax.training.train_state import merge_params, split_params
from tests import make_stories260k, stories260k
from tests.adapters.test_every_method import FIELDS
from tests.hf_models import TINY_LLAMA, weights_by_rule, write_folder
from tests.quantized_quality import losses
from tests.tiny import decoder_config, decoder_params, make_batch

NF4 = np.asarray(
    # Of 2305.14314, appendix E.
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def drawn(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Multiples of a block's largest magnitude that its numbers are rounded to. qwix spreads it over half a step more than the
# largest integer.
GRIDS = {"int8": np.arange(-128, 128) / 127.5, "int4": np.arange(-8, 8) / 7.5, "nf4": NF4}


needs_qwix = pytest.mark.skipif(
    importlib.util.find_spec("qwix") is None, reason="qwix is not installed"
)
kinds = pytest.mark.parametrize("kind", [kind for kind in quantized.KINDS if kind != "none"])


@needs_qwix
@kinds
@pytest.mark.parametrize("shape", [(2, 128, 5), (1, 24, 3)])
def test_values_are_rounded_column_by_column(kind, shape):
    kernel = drawn(shape)
    held = quantized.quantize(jnp.asarray(kernel), kind)
    assert quantized.is_quantized(held)
    rounded = np.asarray(quantized.dequantize(held))
    rows = shape[1]
    block = rows if kind == "int8" else np.gcd(rows, quantized.BLOCK)
    for layer, column, start in np.ndindex(shape[0], shape[2], rows // block):
        here = (layer, slice(start * block, (start + 1) * block), column)
        grid = GRIDS[kind] * np.max(np.abs(kernel[here]))
        # The nearest of the grid, either of two where it lies between them, as the largest magnitude does.
        least = np.min(np.abs(kernel[here][:, None] - grid), axis=1)
        np.testing.assert_allclose(np.abs(rounded[here] - kernel[here]), least, atol=1e-5)
        assert np.max(np.min(np.abs(rounded[here][:, None] - grid), axis=1)) < 1e-5
    bits = {"int8": 8}.get(kind, 4)
    assert jax.dtypes.itemsize_bits(held.qvalue.dtype) == bits
    assert held.scale.dtype == jnp.float32


@needs_qwix
@kinds
def test_product_and_its_gradient_are_those_of_the_rounded_matrix(kind):
    held = quantized.quantize(jnp.asarray(drawn((16, 6))), kind)
    whole, x = quantized.dequantize(held), jnp.asarray(drawn((3, 4, 16), 1))

    def total(x, multiply):
        return jnp.sum(jnp.sin(multiply(x)))

    got = jax.value_and_grad(total)(x, lambda x: quantized.product(x, held))
    expected = jax.value_and_grad(total)(x, lambda x: x @ whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def quantized_tree(params, kind):
    def convert(path, leaf):
        is_projection = path[-1].key == "kernel" and path[0].key == "layers"
        return quantized.quantize(leaf, kind) if is_projection else leaf

    return jax.tree_util.tree_map_with_path(convert, jax.tree.map(jnp.asarray, params))


@needs_qwix
@pytest.mark.parametrize(
    "method",
    [
        name
        if name in ("lora", "sira", "dora", "rac_lora")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in METHODS
    ],
)
def test_every_method_computes_on_the_rounded_base(method):
    """Loss and gradients are those of the same model whose base holds the rounded numbers."""
    adapter = METHODS[method](**FIELDS.get(method, {}))
    model = Decoder(decoder_config(), adapter)
    adapter_tree, frozen = split_params(decoder_params(model))
    held = quantized_tree(frozen, "int8")
    rounded = jax.tree.map(quantized.dequantize, held, is_leaf=quantized.is_quantized)
    batch = make_batch([(5, 3), (7,)], 8)

    @jax.jit
    def loss(adapter_tree, frozen):
        logits = model.apply({"params": merge_params(adapter_tree, frozen)}, batch)
        return jnp.mean(jnp.sin(logits))

    got, expected = (jax.value_and_grad(loss)(adapter_tree, tree) for tree in (held, rounded))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


@needs_qwix
def test_layers_keep_no_whole_copy_of_the_base():
    """What the forward pass leaves for the backward pass has no float32 matrix of all layers."""
    model = Decoder(decoder_config(num_layers=3), METHODS["lora"]())
    adapter_tree, frozen = split_params(decoder_params(model))
    held = quantized_tree(frozen, "int8")
    batch = make_batch([(5, 3)], 11)

    def loss(adapter_tree):
        logits = model.apply({"params": merge_params(adapter_tree, held)}, batch)
        return jnp.mean(jnp.sin(logits))

    _, backward = jax.vjp(loss, adapter_tree)
    kept = [leaf for leaf in jax.tree.leaves(backward) if hasattr(leaf, "shape")]
    matrices = {
        leaf.qvalue.shape
        for leaf in jax.tree.leaves(held, is_leaf=quantized.is_quantized)
        if quantized.is_quantized(leaf)
    }
    assert kept
    assert not [leaf.shape for leaf in kept if leaf.shape in matrices and leaf.dtype == jnp.float32]


@needs_qwix
def test_merging_gives_whole_matrices():
    model = Decoder(decoder_config(), METHODS["lora"](targets="q"))
    adapter_tree, frozen = split_params(decoder_params(model))
    held = quantized_tree(frozen, "int8")
    rounded = jax.tree.map(quantized.dequantize, held, is_leaf=quantized.is_quantized)
    got, expected = (
        merge(model.adapter, merge_params(adapter_tree, tree)) for tree in (held, rounded)
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@needs_qwix
@kinds
def test_loading(tmp_path, kind):
    path = write_folder(tmp_path / "model", TINY_LLAMA, weights_by_rule(TINY_LLAMA))
    whole = load_base_model(path).params
    held = load_base_model(path, quantization=kind, scan_layers=True).params
    for where, leaf in jax.tree_util.tree_leaves_with_path(held, is_leaf=quantized.is_quantized):
        keys = [entry.key for entry in where]
        expected = whole
        for key in keys:
            expected = expected[key]
        assert quantized.is_quantized(leaf) == (keys[-1] == "kernel" and keys[0] == "layers")
        if quantized.is_quantized(leaf):
            expected = quantized.dequantize(quantized.quantize(expected, kind))
        np.testing.assert_array_equal(quantized.dequantize(leaf), expected)
    names = {fingerprint(whole), fingerprint(held)}
    apart = load_base_model(path, quantization=kind, scan_layers=False).params
    assert len(names) == 2
    assert fingerprint(apart) in names - {fingerprint(whole)}


def test_an_unknown_kind_is_a_mistake():
    with pytest.raises(ConfigError, match=r"model\.quantization='int3'.*none, int8, int4, nf4"):
        ModelSource(path="x", quantization="int3")


def test_without_qwix_the_option_is_a_mistake(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(quantized.importlib, "import_module", missing)
    quantized.check_available("none")
    with pytest.raises(ConfigError, match=r"model\.quantization='nf4'.*qwix is not installed"):
        quantized.check_available("nf4")


@needs_qwix
@pytest.mark.skipif(not stories260k.is_there(), reason="stories260K is not there")
def test_a_real_model_loses_little(tmp_path):
    make_stories260k.write(tmp_path)
    got = losses(str(tmp_path), stories=8, length=64)
    rise = {kind: value - got["none"] for kind, value in got.items()}
    assert abs(rise["int8"]) < 0.01
    assert rise["int8"] < min(rise["int4"], rise["nf4"])
    assert max(rise.values()) < 0.3
