"""ResLoRA against its equations in plain numpy: chains of layers, their gradients, decoders, and what merging makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import (
    AdaptedDense,
    AdapterContext,
    LayerLink,
    LoRAConfig,
    ResLoRAConfig,
    make_config,
    merge,
)
from sira_jax.adapters.reslora import merge_with_inputs
from sira_jax.errors import ConfigError, MergeError
from sira_jax.models import Decoder
from tests.adapters.mixtures import differences
from tests.tiny import decoder_config, decoder_params, draw, make_batch, shapes_of

PATH = "attention/q"
B, T = 2, 3
BATCH = make_batch([(4, 3), (6,)], 8)
KINDS = {
    "input": {"connection": "input"},
    "repeat": {"connection": "input", "first_input": "repeat"},
    "block": {"connection": "block", "num_previous": 2},
    "middle": {"connection": "middle", "num_previous": 2},
}
kinds = pytest.mark.parametrize("kind", KINDS)
# Of whole models, which take seconds each to compile; `make test-all` has them all.
few_kinds = pytest.mark.parametrize(
    "kind",
    [k if k in ("block", "input") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)


def chain(config, params, inputs, rng=None, deterministic=True):
    """Outputs of the same projection in consecutive layers, each given its own input."""
    features = params[0]["kernel"].shape[-1]
    module = AdaptedDense(features=features, adapter=config, path=PATH)
    d_in, shape = inputs[0].shape[-1], inputs[0].shape[:2]
    carry = {PATH: config.initial_carry(d_in, features, shape, jnp.float32)}
    outputs = []
    for n, (layer, x_BTD) in enumerate(zip(params, inputs, strict=True)):
        link = LayerLink(carry)
        rngs = None if rng is None else {"dropout": jax.random.fold_in(rng, n)}
        context = AdapterContext(link=link, deterministic=deterministic)
        outputs.append(module.apply({"params": layer}, x_BTD, context, rngs=rngs))
        assert jax.tree.map(jnp.shape, link.next) == jax.tree.map(jnp.shape, carry)
        carry = link.next
    return outputs


def reference(config, params, inputs):
    """The equations, in float64, layer by layer and token by token."""
    outputs = []
    for n, layer in enumerate(params):
        y = np.zeros((*inputs[n].shape[:2], layer["kernel"].shape[1]))
        for place in np.ndindex(inputs[n].shape[:2]):
            x = [np.asarray(x_BTD[place], np.float64) for x_BTD in inputs]
            a = [np.asarray(each["adapter"]["lora_a"], np.float64) for each in params]
            b = [np.asarray(each["adapter"]["lora_b"], np.float64) for each in params]
            earlier = [n - i for i in range(1, config.num_previous + 1) if n - i >= 0]
            if config.connection == "input":
                before = sum((x[i] for i in earlier), np.zeros_like(x[n]))
                if n == 0 and config.first_input == "repeat":
                    before = x[0]
                delta = (x[n] + before) @ a[n] @ b[n]
            elif config.connection == "block":
                delta = sum(x[n] @ a[i] @ b[i] for i in [n, *earlier])
            else:
                delta = sum(x[i] @ a[i] for i in [n, *earlier]) @ b[n]
            y[place] = x[n] @ np.asarray(layer["kernel"], np.float64) + config.scale * delta
        outputs.append(y)
    return outputs


def make_chain(config, layers, d_in, d_out, seed=0):
    module = AdaptedDense(features=d_out, adapter=config, path=PATH)
    shapes = shapes_of(module, np.ones((1, 1, d_in), np.float32), AdapterContext())
    params = [draw(shapes, seed + layer, scale=0.7) for layer in range(layers)]
    rng = np.random.default_rng(seed)
    return params, [rng.normal(size=(B, T, d_in)).astype(np.float32) for _ in range(layers)]


@kinds
@settings(max_examples=4, deadline=None)
@given(
    rank=st.integers(1, 3),
    layers=st.integers(1, 5),
    previous=st.integers(1, 6),
    d_in=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_layers_compute_the_equations(kind, rank, layers, previous, d_in, seed):
    fields = dict(KINDS[kind])
    if "num_previous" in fields:
        fields["num_previous"] = previous
    config = ResLoRAConfig(rank=rank, alpha=1.7, **fields)
    params, inputs = make_chain(config, layers, d_in, 4, seed)
    outputs = jax.jit(functools.partial(chain, config))(params, inputs)
    for got, expected in zip(outputs, reference(config, params, inputs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@kinds
def test_gradients_are_those_of_finite_differences(kind):
    config = ResLoRAConfig(rank=2, alpha=3.0, **KINDS[kind])
    params, inputs = make_chain(config, 4, 3, 2)
    rng = np.random.default_rng(5)
    cotangents = [rng.normal(size=(B, T, 2)) for _ in params]

    def loss(run, adapters, inputs):
        full = [{**layer, "adapter": own} for layer, own in zip(params, adapters, strict=True)]
        outputs = run(config, full, inputs)
        return sum((y * c).sum() for y, c in zip(outputs, cotangents, strict=True))

    adapters = [layer["adapter"] for layer in params]
    grads = jax.jit(jax.grad(functools.partial(loss, chain), argnums=(0, 1)))(adapters, inputs)
    wanted = differences(functools.partial(loss, reference), (adapters, inputs), step=1e-4)
    for grad, slope in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(grad, slope, rtol=1e-3, atol=1e-3)


@kinds
def test_without_a_link_it_is_a_first_layer(kind):
    config = ResLoRAConfig(rank=2, **KINDS[kind])
    params, inputs = make_chain(config, 1, 3, 4)
    module = AdaptedDense(features=4, adapter=config, path=PATH)
    y = module.apply({"params": params[0]}, inputs[0], AdapterContext())
    np.testing.assert_allclose(y, chain(config, params, inputs)[0], rtol=1e-6, atol=1e-6)
    factor = 2 if kind == "repeat" else 1
    lora = AdaptedDense(features=4, adapter=LoRAConfig(rank=2, alpha=8.0 * factor))
    expected = lora.apply({"params": params[0]}, inputs[0], AdapterContext())
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@kinds
def test_dropout_acts_on_the_input_of_the_pair_in_training_alone(kind):
    """A and B as identities show a pair's input: every feature is there, scaled, or gone; the frozen product stays whole."""
    size, rate = 4, 0.5
    config = ResLoRAConfig(rank=size, alpha=float(size), dropout_rate=rate, **KINDS[kind])
    eye = np.eye(size, dtype=np.float32)
    layer = {"kernel": np.zeros_like(eye), "adapter": {"lora_a": eye, "lora_b": eye}}
    ones = [np.ones((40, 25, size), np.float32)] * 2
    rng = jax.random.key(0)
    whole = [np.unique(y) for y in chain(config, [layer] * 2, ones, rng)]
    first, second = chain(config, [layer] * 2, ones, rng, deterministic=False)
    assert all(values.shape == (1,) for values in whole)
    kept = whole[0][0] / (1 - rate)
    np.testing.assert_allclose(np.unique(first), [0.0, kept])
    np.testing.assert_allclose(np.mean(first == 0), rate, atol=0.03)
    # "middle" adds the pair's own input, under its own mask, to what came under the first layer's.
    expected = [0.0, 2.0, 4.0] if kind == "middle" else [0.0, 4.0]
    np.testing.assert_allclose(np.unique(second), expected)
    frozen = {"kernel": eye, "adapter": {"lora_a": eye, "lora_b": np.zeros_like(eye)}}
    for y in chain(config, [frozen] * 2, ones, rng, deterministic=False):
        np.testing.assert_array_equal(y, 1.0)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, batch):
    return model.apply({"params": params}, batch)


def unstack(params, layers):
    flat = {name: leaf for name, leaf in params.items() if name != "layers"}
    for layer in range(layers):
        flat[f"layers_{layer}"] = jax.tree.map(lambda x, at=layer: x[at], params["layers"])
    return flat


@few_kinds
def test_scanned_recomputed_layers_have_the_values_and_gradients_of_separate_ones(kind):
    layers = 4
    adapter = ResLoRAConfig(rank=2, overrides=(("down", {"rank": 3}),), **KINDS[kind])
    scanned = Decoder(decoder_config(num_layers=layers, remat_policy="full"), adapter)
    apart = Decoder(decoder_config(num_layers=layers, scan_layers=False), adapter)
    params = decoder_params(scanned, scale=0.3)
    weights = np.random.default_rng(0).normal(size=(2, 8, 23))

    def loss(params, model):
        logits = model.apply({"params": params}, BATCH)
        return jnp.sum(logits * weights), logits

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, stacked), stacked_grads = run(params, scanned)
    (_, separate), separate_grads = run(unstack(params, layers), apart)
    np.testing.assert_allclose(stacked, separate, rtol=2e-4, atol=2e-5)
    got, expected = unstack(stacked_grads, layers), separate_grads
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = got
        for entry in path:
            other = other[entry.key]
        tolerance = 1e-4 * max(np.abs(leaf).max(), 1.0)
        np.testing.assert_allclose(other, leaf, rtol=1e-3, atol=tolerance, err_msg=str(path))


@few_kinds
def test_decoding_token_by_token_is_one_pass(kind):
    model = Decoder(decoder_config(num_layers=3), ResLoRAConfig(rank=2, **KINDS[kind]))
    params = decoder_params(model)
    tokens = np.random.default_rng(0).integers(1, 23, (2, 6)).astype(np.int32)
    whole = logits_of(model, params, {"decoder_input_tokens": tokens})

    @jax.jit
    def call(variables, tokens, position):
        positions = jnp.full(tokens.shape, position) + jnp.arange(tokens.shape[1])
        batch = {"decoder_input_tokens": tokens, "decoder_positions": positions}
        return model.apply(variables, batch, cache_length=6, mutable=["cache"])

    logits, cache = call({"params": params}, tokens[:, :3], 0)
    pieces = [logits]
    for position in range(3, 6):
        now = tokens[:, position : position + 1]
        logits, cache = call({"params": params} | cache, now, position)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["input", "repeat", "middle"])
def test_bfloat16_carries_in_its_own_type_and_stays_near_float32(kind):
    adapter = ResLoRAConfig(rank=2, **KINDS[kind])
    exact = Decoder(decoder_config(num_layers=3), adapter)
    half = Decoder(decoder_config(num_layers=3, dtype="bfloat16"), adapter)
    params = decoder_params(exact, scale=0.3)
    expected, got = logits_of(exact, params, BATCH), logits_of(half, params, BATCH)
    assert np.abs(got - expected).mean() < 0.2 * np.std(expected)


# Merging.


def drawn_model(scan_layers, **fields):
    model = Decoder(
        decoder_config(num_layers=4, scan_layers=scan_layers), ResLoRAConfig(rank=2, **fields)
    )
    params = decoder_params(Decoder(decoder_config(num_layers=4), model.adapter), scale=0.2)
    return model, params if scan_layers else unstack(params, 4)


def kernel_of(params, layer, path, scan_layers):
    at = params["layers" if scan_layers else f"layers_{layer}"]
    for name in path.split("/"):
        at = at[name]
    return {
        "kernel": at["kernel"][layer] if scan_layers else at["kernel"],
        **{
            name: leaf[layer] if scan_layers else leaf
            for name, leaf in at.get("adapter", {}).items()
        },
    }


scans = pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])


@scans
@pytest.mark.parametrize("previous", [1, 2, 9])
def test_block_merges_exactly(scan_layers, previous):
    overrides = (("down", {"rank": 3, "num_previous": 1}),)
    model, params = drawn_model(
        scan_layers, connection="block", num_previous=previous, overrides=overrides
    )
    merged = merge(model.adapter, params)
    plain = logits_of(model.clone(adapter=None), merged, BATCH)
    np.testing.assert_allclose(plain, logits_of(model, params, BATCH), rtol=1e-4, atol=1e-4)


def merged_share(params, merged, layer, path, scale, scan_layers):
    """The a in kernel + (1 + a) s A B, read off a merged kernel."""
    before = kernel_of(params, layer, path, scan_layers)
    change = kernel_of(merged, layer, path, scan_layers)["kernel"] - before["kernel"]
    delta = scale * before["lora_a"] @ before["lora_b"]
    factor = np.sum(change * delta) / np.sum(delta * delta)
    np.testing.assert_allclose(change, factor * delta, rtol=1e-3, atol=1e-4)
    return factor - 1


@scans
@pytest.mark.parametrize("kind", ["input", "repeat", "middle"])
@pytest.mark.parametrize("merge_by", ["weights", "inputs"])
def test_merge_takes_earlier_layers_in_by_the_ratio_of_norms(scan_layers, kind, merge_by):
    model, params = drawn_model(scan_layers, merge_by=merge_by, **KINDS[kind])
    config = model.adapter
    rng = np.random.default_rng(3)
    norms = {path: rng.uniform(0.5, 2.0, 4) for path in model.config.projections}
    if merge_by == "inputs":
        merged = merge_with_inputs(config, params, norms)
    else:
        merged = merge(config, params)
    for path in ("attention/q", "mlp/down"):
        layers = [kernel_of(params, n, path, scan_layers) for n in range(4)]
        sizes = list(norms[path])
        if merge_by == "weights":
            whole = [
                np.linalg.norm(
                    each["kernel"] + config.scale * np.asarray(each["lora_a"]) @ each["lora_b"]
                )
                for each in layers
            ]
            sizes = [whole[0], whole[0], whole[1], whole[2]]
            if kind == "middle":
                sizes = [
                    size * np.linalg.norm(each["lora_a"])
                    for size, each in zip(sizes, layers, strict=True)
                ]
        for n in range(4):
            earlier = [n - i for i in range(1, config.num_previous + 1) if n - i >= 0]
            expected = sum(sizes[i] / sizes[n] for i in earlier)
            if n == 0 and kind == "repeat":
                expected = 1.0
            share = merged_share(params, merged, n, path, config.scale, scan_layers)
            np.testing.assert_allclose(share, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["input", "repeat", "middle"])
def test_merge_by_inputs_is_exact_where_layers_get_multiples_of_one_input(kind):
    """Then the earlier layers' part is a multiple of the layer's own, which is what the merge assumes."""
    config = ResLoRAConfig(rank=2, **KINDS[kind])
    params, inputs = make_chain(config, 3, 3, 4)
    inputs = [inputs[0] * factor for factor in (1.0, 0.5, 3.0)]
    for layer in params:
        layer["adapter"]["lora_a"] = params[0]["adapter"]["lora_a"]
    tree = {f"layers_{n}": {"attention": {"q": layer}} for n, layer in enumerate(params)}
    hidden = [x @ params[0]["adapter"]["lora_a"] for x in inputs]
    norms = [np.linalg.norm(each) for each in (hidden if kind == "middle" else inputs)]
    merged = merge_with_inputs(config, tree, {PATH: np.asarray(norms)})
    for n, y in enumerate(chain(config, params, inputs)):
        plain = inputs[n] @ merged[f"layers_{n}"]["attention"]["q"]["kernel"]
        np.testing.assert_allclose(plain, y, rtol=1e-4, atol=1e-4)


def test_a_norm_of_zero_counts_as_an_equal_one():
    model, params = drawn_model(True, connection="input")
    norms = {path: np.array([0.0, 2.0, 0.0, 3.0]) for path in model.config.projections}
    merged = merge_with_inputs(model.adapter, params, norms)
    for n, expected in enumerate([0, 1, 1, 1]):
        share = merged_share(params, merged, n, PATH, model.adapter.scale, True)
        np.testing.assert_allclose(share, expected, atol=1e-4)


def test_merging_that_cannot_be_is_refused_with_the_reason():
    model, params = drawn_model(True, connection="middle", merge_by="inputs")
    with pytest.raises(MergeError, match=r"merge_by='inputs' needs norms of .*merge_with_inputs"):
        merge(model.adapter, params)
    good = {path: np.ones(4) for path in model.config.projections}
    merge_with_inputs(model.adapter, params, good)
    for bad in (np.ones(3), np.array([1, 1, np.nan, 1]), np.array([1, -1, 1, 1])):
        with pytest.raises(MergeError, match=r"norms\['mlp/up'\].* 4 finite numbers"):
            merge_with_inputs(model.adapter, params, good | {"mlp/up": bad})
    with pytest.raises(MergeError, match=r"norms\[.*\]=\[\] is not allowed"):
        merge_with_inputs(model.adapter, params, {})
    with pytest.raises(MergeError, match=r"one projection at a time: .*whole model"):
        model.adapter.merge({}, jnp.zeros((2, 2)))


@pytest.mark.parametrize(
    ("field", "fields", "allowed"),
    [
        ("connection", {"connection": "output"}, "one of input, block, middle"),
        ("num_previous", {"num_previous": 0}, "at least 1"),
        ("num_previous", {"num_previous": True}, "at least 1"),
        ("num_previous", {"connection": "input", "num_previous": 2}, "only 1"),
        ("first_input", {"first_input": "same"}, "one of zero, repeat"),
        ("merge_by", {"merge_by": "outputs"}, "one of weights, inputs"),
    ],
)
def test_wrong_fields_are_named(field, fields, allowed):
    with pytest.raises(ConfigError, match=rf"adapter\.{field}=.*{allowed}"):
        make_config({"method": "reslora"} | fields)


def test_flops_count_every_pair_of_a_block_shortcut():
    block = ResLoRAConfig(rank=3, connection="block", num_previous=2)
    assert block.flops_per_token(5, 7).total == 3 * 2 * 3 * (5 + 7)
    assert ResLoRAConfig(rank=3, connection="input").flops_per_token(5, 7).total == 2 * 3 * 12
