"""MiLoRA while decoding: the prompt's gates are kept and reused, and the result is that of one pass."""

import functools

import jax
import numpy as np
import pytest

from sira_jax.adapters import MiLoRAConfig
from sira_jax.adapters.milora import POOLINGS
from sira_jax.models import Decoder
from sira_jax.training.config import DecodeConfig
from sira_jax.training.decoding import generate, left_pad
from tests.tiny import VOCAB, decoder_config, decoder_params

LENGTHS = (5, 2, 4)
NEW = 3
WHOLE = max(LENGTHS) + NEW


@functools.cache
def make(scan_layers, pooling="attention"):
    """A decoder whose gates differ much from prompt to prompt."""
    model = Decoder(
        decoder_config(scan_layers=scan_layers),
        MiLoRAConfig(rank=2, alpha=2.0, pooling=pooling, num_selected_experts=2),
    )
    params = decoder_params(model, scale=0.4)
    embedder = params["token_embedder"]
    embedder["embedding"] = embedder["embedding"] * 4
    return model, params


def draw_prompts(seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, size).tolist() for size in LENGTHS]


@functools.partial(jax.jit, static_argnums=0)
def extend(model, variables, batch):
    return model.apply(variables, batch, cache_length=WHOLE, mutable=["cache"])


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, batch):
    return model.apply({"params": params}, batch)


def one_pass(model, params, prompts, new, marked=True):
    """Logits of each prompt + new in one pass without a cache; the loss weights, if `marked`, say where prompts end."""
    shape = (len(prompts), WHOLE)
    batch = {
        "decoder_input_tokens": np.zeros(shape, np.int32),
        "decoder_segment_ids": np.zeros(shape, np.int32),
        "decoder_loss_weights": np.zeros(shape, np.float32),
    }
    for row, prompt in enumerate(prompts):
        tokens = [*prompt, *new[row]]
        batch["decoder_input_tokens"][row, : len(tokens)] = tokens
        batch["decoder_segment_ids"][row, : len(tokens)] = 1
        batch["decoder_loss_weights"][row, len(prompt) - 1 : len(tokens)] = marked
    return np.asarray(run(model, params, batch))


def gates_in(cache):
    paths = jax.tree_util.tree_leaves_with_path(cache)
    return [leaf for path, leaf in paths if path[-1].key == "milora_gates"]


@pytest.mark.parametrize(
    ("scan_layers", "pooling"),
    [
        (True, "attention"),
        pytest.param(False, "attention", marks=pytest.mark.slow),
        *(pytest.param(True, p, marks=pytest.mark.slow) for p in POOLINGS if p != "attention"),
    ],
)
def test_decoding_token_by_token_is_one_pass_with_the_prompts_gates(scan_layers, pooling):
    model, params = make(scan_layers, pooling)
    prompts = draw_prompts(0)
    new = np.random.default_rng(1).integers(1, VOCAB, (len(prompts), NEW)).astype(np.int32)
    batch = left_pad(prompts, max(LENGTHS), 0)
    logits, cache = extend(model, {"params": params}, batch)
    kept = gates_in(cache)
    shape = (len(prompts), 7)
    assert [leaf.shape for leaf in kept] == ([(2, *shape)] if scan_layers else [shape] * 2)
    pieces = [logits[:, -1:]]
    for step in range(NEW):
        one = {
            "decoder_input_tokens": new[:, step : step + 1],
            "decoder_positions": np.array(LENGTHS)[:, None] + step,
        }
        logits, cache = extend(model, {"params": params} | cache, one)
        pieces.append(logits)
    for before, after in zip(kept, gates_in(cache), strict=True):
        np.testing.assert_array_equal(before, after)
    got = np.concatenate(pieces, axis=1)
    whole = one_pass(model, params, prompts, new)
    # Routed by the whole text, the logits are others: the reuse shows.
    anew = one_pass(model, params, prompts, new, marked=False)
    for row, size in enumerate(LENGTHS):
        at = slice(size - 1, size + NEW)
        np.testing.assert_allclose(got[row], whole[row, at], rtol=2e-3, atol=2e-3)
    assert np.abs(anew - whole).max() > 0.1


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_beams_keep_their_prompts_gates(scan_layers):
    """Beam search over a batch finds what beam search by one-pass scores, without a cache, finds for each prompt."""
    model, params = make(scan_layers)
    prompts = draw_prompts(2)
    config = DecodeConfig(strategy="beam", num_beams=2, max_new_tokens=NEW, batch_size=3)
    beams = [[([], 0.0)] * 2 for _ in prompts]
    for step in range(NEW):
        rows = [
            one_pass(model, params, prompts, [own[beam][0] for own in beams]) for beam in (0, 1)
        ]
        for row, own in enumerate(beams):
            grown = []
            # All beams start equal, so only one is extended at first.
            for beam, (new, score) in enumerate(own[: 1 if step == 0 else 2]):
                logits = rows[beam][row, LENGTHS[row] + step - 1]
                logs = logits - np.logaddexp.reduce(logits)
                grown += [([*new, token], score + logs[token]) for token in range(VOCAB)]
            beams[row] = sorted(grown, key=lambda each: -each[1])[:2]
    assert generate(model, params, prompts, config) == [own[0][0] for own in beams]
