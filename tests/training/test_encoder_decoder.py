"""Encoder-decoders in the trainer: every method, reports, merging, generation against full passes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.adapters import METHODS, count_model_parameters, is_trained, merge, split_trained
from sira_jax.adapters.trees import by_projection
from sira_jax.errors import ConfigError, DataError
from sira_jax.models import EncoderDecoder
from sira_jax.training.adapter_bank import AdapterBank
from sira_jax.training.config import DecodeConfig, OptimizerConfig
from sira_jax.training.decoding import generate
from sira_jax.training.evaluate import LossEvaluator
from sira_jax.training.merging import merge_error
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import (
    TrainState,
    count_trained,
    fresh_state,
    init_adapter,
    merge_params,
    split_params,
)
from sira_jax.training.train_step import make_train_step
from tests.adapters.test_every_method import FIELDS, MERGES, TARGETS
from tests.tiny import draw
from tests.tiny_t5 import layers_apart, t5_batch, t5_config, t5_params

BATCH = t5_batch([[(6, 2), (4, 3)], [(3, 5)]], (12, 7), num_tasks=2)
STEPS = 3
REFUSED = {"milora"}
FAST = ("lora", "sira")
methods = pytest.mark.parametrize(
    "method",
    [
        m if m in FAST else pytest.param(m, marks=pytest.mark.slow)
        for m in METHODS
        if m not in REFUSED
    ],
)


def make(method, scan_layers=True):
    adapter = METHODS[method](**{"targets": TARGETS} | FIELDS.get(method, {}))
    return EncoderDecoder(t5_config(scan_layers=scan_layers), adapter, num_tasks=2)


@functools.cache
def trained_run(method):
    """(model, fresh adapter, the adapter after each step, frozen before, frozen after)."""
    model = make(method)
    config = OptimizerConfig(learning_rate=0.05)
    optimizer = make_optimizer(config, STEPS)
    schedule = make_schedule(config, STEPS)
    step = jax.jit(make_train_step(model, optimizer, schedule, seed=0, num_steps=STEPS))
    fresh = init_adapter(model, 0)
    frozen = split_params(t5_params(model))[1]
    before = jax.tree.map(np.copy, frozen)
    state, seen = fresh_state(fresh, optimizer), []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, BATCH)
        assert np.isfinite(metrics["loss"])
        seen.append(jax.device_get(state.adapter))
    assert step._cache_size() == 1
    assert isinstance(state, TrainState)
    return model, fresh, seen, before, frozen


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
    return model.apply({"params": params}, batch)


@methods
def test_training_moves_every_trained_leaf_in_both_stacks_and_no_other(method):
    model, fresh, seen, before, frozen = trained_run(method)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    projections = {"/".join(path) for path in by_projection(fresh)}
    attentions = ("encoder/layers/attention", "decoder/layers/self_attention")
    attentions += ("decoder/layers/encoder_decoder_attention",)
    expected = {f"{name}/{last}" for name in attentions for last in ("key", "value")}
    assert projections == expected | {"encoder/layers/mlp/wo", "decoder/layers/mlp/wo"}
    for path, start in jax.tree_util.tree_leaves_with_path(split_trained(fresh)[0]):
        leaves = [functools.reduce(lambda tree, e: tree[e.key], path, tree) for tree in seen]
        assert any(np.any(np.asarray(leaf) != start) for leaf in leaves), path
    assert count_trained(fresh) == count_model_parameters(
        model.adapter, model.config.stacks, model.config.emb_dim
    )
    plain = logits(model.clone(adapter=None), frozen, BATCH)
    np.testing.assert_array_equal(logits(model, merge_params(fresh, frozen), BATCH), plain)
    assert np.abs(logits(model, merge_params(seen[-1], frozen), BATCH) - plain).max() > 1e-3


@methods
def test_merging(method):
    if method not in MERGES:
        pytest.skip(
            f"{method} has no merged model, which tests/adapters/test_every_method.py holds"
        )
    model, _, seen, _, frozen = trained_run(method)
    params = merge_params(seen[-1], frozen)
    error = merge_error(model, params, merge(model.adapter, params), BATCH)
    assert error["max_abs_difference"] < 1e-4


@pytest.mark.parametrize("method", ["lora", pytest.param("reslora", marks=pytest.mark.slow)])
def test_layers_apart_compute_the_same(method):
    model, apart = make(method), make(method, scan_layers=False)
    params = t5_params(model)
    got = logits(apart, layers_apart(params, model.config), BATCH)
    np.testing.assert_allclose(got, logits(model, params, BATCH), rtol=1e-5, atol=1e-5)


def test_what_cannot_work_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="a decoder with an encoder reads none"):
        init_adapter(make("milora"), 0)


def test_dynamic_dora_keeps_its_budget_over_stacks_of_different_depth():
    model, _, seen, _, _ = trained_run("dynamic_dora")
    masks = {path: leaves["buffer_mask"] for path, leaves in by_projection(seen[-1]).items()}
    layers = {
        "encoder": model.config.num_encoder_layers,
        "decoder": model.config.num_decoder_layers,
    }
    assert len(set(layers.values())) == 2
    budget = sum(layers[path[0]] * model.adapter.rank for path in masks)
    assert sum(float(mask.sum()) for mask in masks.values()) == budget
    # Global: not every projection and layer keeps the same number.
    assert len({float(count) for mask in masks.values() for count in mask.sum(axis=-1)}) > 1


def test_a_stage_of_xgblora_draws_layers_of_each_stack():
    model, fresh, *_ = trained_run("xgblora")
    for path, leaves in by_projection(fresh).items():
        active = np.asarray([np.any(leaf) for leaf in leaves["lora_a"]])
        assert active.sum() == model.adapter.num_layers_per_stage, path


def test_evaluation_and_router_report():
    model, _, seen, _, frozen = trained_run("sira")
    evaluator = LossEvaluator(model, frozen, [BATCH], ["a", "b"])
    metrics, report = evaluator.run(seen[-1])
    found = logits(model, merge_params(seen[-1], frozen), BATCH)
    nats = -np.asarray(jax.nn.log_softmax(found))
    targets, weights = BATCH["decoder_target_tokens"], BATCH["decoder_loss_weights"]
    nats = np.take_along_axis(nats, targets[..., None], axis=-1)[..., 0]
    assert metrics["validation/loss"] == pytest.approx(
        (nats * weights).sum() / weights.sum(), rel=1e-5
    )
    loads = report["projections"]
    assert set(loads) == {"/".join((p[0], *p[2:])) for p in by_projection(seen[-1])}
    assert np.shape(loads["encoder/attention/key"]["expert_load"]) == (3, 4)
    assert np.shape(loads["decoder/encoder_decoder_attention/key"]["task_expert_load"]) == (2, 2, 4)


PROMPTS = [[3, 1, 4, 2], [5], [9, 2, 6, 5, 3, 5, 8, 1]]
NEW = 5


@functools.cache
def drawn(method):
    """(model, params) with random adapters; experts drop no token, as a full pass has other groups than a cached one."""
    fields = FIELDS.get(method, {}) | ({"eval_capacity_factor": None} if method == "sira" else {})
    adapter = METHODS[method](targets=TARGETS, **fields)
    model = EncoderDecoder(t5_config(), adapter)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), model.init_batch())["params"])
    return model, draw(shapes, 1)


def next_logits(model, params, prompt, targets):
    batch = {
        "encoder_input_tokens": np.asarray([prompt], np.int32),
        "encoder_segment_ids": np.ones((1, len(prompt)), np.int32),
        "decoder_input_tokens": np.asarray([[0, *targets]], np.int32),
    }
    return np.asarray(model.apply({"params": params}, batch))[0, -1]


@pytest.mark.parametrize("method", ["sira", pytest.param("reslora", marks=pytest.mark.slow)])
def test_greedy_generation_is_that_of_full_passes(method):
    model, params = drawn(method)
    got = generate(model, params, PROMPTS, DecodeConfig(strategy="greedy", max_new_tokens=NEW))
    for prompt, tokens in zip(PROMPTS, got, strict=True):
        assert len(tokens) == NEW
        for count in range(0, NEW, 2):
            assert tokens[count] == next_logits(model, params, prompt, tokens[:count]).argmax()


@pytest.mark.slow
def test_beams_score_what_full_passes_score():
    model, params = drawn("sira")
    config = DecodeConfig(strategy="beam", num_beams=3, max_new_tokens=3, length_penalty=0.0)
    greedy = DecodeConfig(strategy="greedy", max_new_tokens=3)

    def score(prompt, tokens):
        steps = (next_logits(model, params, prompt, tokens[:n]) for n in range(len(tokens)))
        return sum(
            float(jax.nn.log_softmax(jnp.asarray(step))[token])
            for step, token in zip(steps, tokens, strict=True)
        )

    found = generate(model, params, PROMPTS[:2], config)
    for prompt, best, first in zip(
        PROMPTS, found, generate(model, params, PROMPTS[:2], greedy), strict=False
    ):
        assert score(prompt, best) >= score(prompt, first) - 1e-5


def test_long_prompts_are_refused():
    model, params = drawn("sira")
    limit = model.config.max_positions
    with pytest.raises(DataError, match=f"prompt 1 has {limit + 1} tokens"):
        generate(model, params, [[1], [1] * (limit + 1)], DecodeConfig(max_new_tokens=2))


def test_rows_of_a_batch_may_use_different_adapters():
    model, params = drawn("sira")
    adapter, frozen = split_params(params)
    bank = AdapterBank(model.config, frozen)
    bank.load("s", model.adapter, adapter)
    ids = [bank.index(name) for name in ("s", "base")]
    config = DecodeConfig(strategy="greedy", max_new_tokens=3)
    prompts = [PROMPTS[0], PROMPTS[0]]
    mixed = generate(bank.model(), bank.params(), prompts, config, adapter_ids=ids)
    alone = generate(model, params, prompts[:1], config)
    plain = generate(model.clone(adapter=None), frozen, prompts[:1], config)
    assert mixed == alone + plain


def test_trained_leaves_are_the_adapters():
    fresh = trained_run("lora")[1]
    paths = [tuple(e.key for e in path) for path, _ in jax.tree_util.tree_leaves_with_path(fresh)]
    assert paths
    assert all(map(is_trained, paths))
