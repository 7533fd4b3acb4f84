"""Generation with a cache against what full forward passes give, and beams against all sequences."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import LoRAConfig, SiRAConfig
from sira_jax.errors import DataError
from sira_jax.models import Decoder
from sira_jax.training.config import DecodeConfig
from sira_jax.training.decoding import NEVER, cut_at_stop, filter_logits, generate, left_pad
from tests.models.families import FAMILIES
from tests.tiny import decoder_config, decoder_params

PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3, 5, 8], [9], [7, 9, 3, 2]]
NEW = 6
LORA = LoRAConfig(rank=2)
SIRA = SiRAConfig(
    num_experts=4,
    num_selected_experts=2,
    rank=2,
    capacity_factor=0.5,
    router_init_std=1.0,
    targets=("q", "down"),
)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, segments):
    batch = {"decoder_input_tokens": tokens, "decoder_segment_ids": segments}
    return model.apply({"params": params}, batch)


def next_log_probs(model, params, sequences, length=24):
    """Log-probabilities of the token after each sequence, from one full pass without a cache."""
    tokens, segments = (np.zeros((len(sequences), length), np.int32) for _ in range(2))
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        segments[row, : len(sequence)] = 1
    logits = _logits(model, params, tokens, segments)
    last = np.asarray([len(sequence) - 1 for sequence in sequences])
    return np.asarray(jax.nn.log_softmax(logits[np.arange(len(sequences)), last]), np.float64)


def greedy_by_full_passes(model, params, prompts, limit, eos_ids=()):
    sequences, done = [list(prompt) for prompt in prompts], [False] * len(prompts)
    for _ in range(limit):
        best = next_log_probs(model, params, sequences).argmax(axis=-1)
        for row, token in enumerate(best.tolist()):
            done[row] = done[row] or token in eos_ids
            if not done[row]:
                sequences[row].append(token)
    return [s[len(p) :] for s, p in zip(sequences, prompts, strict=True)]


def build(adapter=None, seed=0, **changes):
    model = Decoder(decoder_config(**changes), adapter)
    return model, decoder_params(model, seed, scale=1.0)


@pytest.fixture(scope="module")
def frozen():
    return build()


@pytest.fixture(scope="module")
def expected(frozen):
    return greedy_by_full_passes(*frozen, PROMPTS, NEW)


GREEDY = DecodeConfig(max_new_tokens=NEW)


def test_greedy_is_the_argmax_of_full_passes(frozen, expected):
    # The tiny model does not repeat itself, or the comparison would say little.
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    assert max(len(set(row)) for row in expected) > 3
    assert generate(*frozen, PROMPTS, GREEDY) == expected


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        (LORA, {"scan_layers": False, "qkv_bias": True, "tie_embeddings": False}),
        (SIRA, {}),
    ],
)
def test_greedy_of_other_models(adapter, changes):
    model, params = build(adapter, **changes)
    expected = greedy_by_full_passes(model, params, PROMPTS, NEW)
    assert generate(model, params, PROMPTS, GREEDY) == expected


@pytest.mark.parametrize(("family", "scan_layers"), [("mistral", False), ("all", True)])
def test_greedy_of_models_with_windows(family, scan_layers):
    """Prompts shorter and longer than the window, padded on the left, and new tokens that leave it behind."""
    # With tied embeddings, scaled ones most of all, random models repeat what they are given.
    fields = FAMILIES[family] | {"scan_layers": scan_layers, "tie_embeddings": False}
    model, params = build(LORA, **fields)
    expected = greedy_by_full_passes(model, params, PROMPTS, NEW)
    assert max(len(set(row)) for row in expected) > 2
    assert generate(model, params, PROMPTS, GREEDY) == expected
    wide = build(LORA, **fields | {"sliding_window": 63})[0]
    assert greedy_by_full_passes(wide, params, PROMPTS, NEW) != expected


def test_prompts_do_not_see_their_batch(frozen, expected):
    """Unequal lengths in small batches, and in another order."""
    small = DecodeConfig(max_new_tokens=NEW, batch_size=2)
    assert generate(*frozen, PROMPTS, small) == expected
    assert generate(*frozen, PROMPTS[::-1], small) == expected[::-1]
    assert generate(*frozen, [], small) == []


def test_stops_before_the_end_of_sequence(frozen, expected):
    eos_ids = (expected[0][2], expected[2][4])
    stopped = generate(*frozen, PROMPTS, GREEDY, eos_ids=eos_ids)
    assert stopped == [cut_at_stop(row, eos_ids) for row in expected]
    assert len({len(row) for row in stopped}) > 1
    assert stopped == greedy_by_full_passes(*frozen, PROMPTS, NEW, eos_ids)
    # Any token may be the padding, and a stop most of all.
    assert generate(*frozen, PROMPTS, GREEDY, eos_ids=eos_ids, pad_id=eos_ids[0]) == stopped


def test_cut_at_stop():
    assert cut_at_stop([5, 2, 7, 2], (2, 7)) == [5]
    assert cut_at_stop([2], (2,)) == []
    assert cut_at_stop([5, 6], ()) == [5, 6]


def test_progress_is_told(frozen):
    counts = []
    generate(
        *frozen, PROMPTS, DecodeConfig(max_new_tokens=NEW, batch_size=2), on_batch=counts.append
    )
    assert counts == [2, 2, 1]


def test_longest_prompt_that_fits_is_exact(frozen):
    model, params = frozen
    prompt = np.random.default_rng(0).integers(1, 23, 64 - NEW).tolist()
    sequence = list(prompt)
    for _ in range(NEW):
        best = next_log_probs(model, params, [sequence], length=64).argmax(axis=-1)
        sequence.append(int(best[0]))
    assert generate(model, params, [prompt], GREEDY) == [sequence[len(prompt) :]]


@pytest.mark.parametrize("prompts", [[[1], []], [[1], [1] * (64 - NEW + 1)]])
def test_prompts_of_impossible_length_are_named(frozen, prompts):
    with pytest.raises(DataError, match=rf"prompt 1 has {len(prompts[1])} tokens: 1 to 58"):
        generate(*frozen, prompts, GREEDY)


def test_left_pad():
    batch = left_pad([[5, 6], [7, 8, 9]], 4, pad_id=1)
    np.testing.assert_array_equal(batch["decoder_input_tokens"], [[1, 1, 5, 6], [1, 7, 8, 9]])
    np.testing.assert_array_equal(batch["decoder_segment_ids"], [[0, 0, 1, 1], [0, 1, 1, 1]])
    np.testing.assert_array_equal(batch["decoder_positions"], [[0, 0, 0, 1], [0, 0, 1, 2]])
    with pytest.raises(DataError, match="prompt 0 has 5 tokens"):
        left_pad([[1] * 5], 4, pad_id=0)


# Sampling.


def test_sampling_the_best_of_one_is_greedy(frozen, expected):
    config = DecodeConfig(strategy="sample", top_k=1, temperature=3.0, max_new_tokens=NEW)
    assert generate(*frozen, PROMPTS, config) == expected


def filtered(logits, top_k, top_p):
    """One row: the ids that stay, by sorting and adding up."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = [i for i in order if logits[i] >= logits[order[min(top_k, len(order)) - 1]]]
    exps = {i: np.exp(logits[i] - logits[order[0]]) for i in order}
    total, stay, before = sum(exps.values()), [], 0.0
    for i in order:
        if before / total >= top_p and logits[i] < logits[stay[-1]]:
            break
        stay.append(i)
        before += exps[i]
    return set(stay)


@settings(max_examples=40, deadline=None)
@given(
    # Few distinct values, so that ties come up.
    logits=st.lists(st.integers(-6, 6), min_size=8, max_size=8),
    top_k=st.integers(0, 10),
    top_p=st.sampled_from([0.01, 0.33, 0.5, 0.77, 0.95, 1.0]),
)
def test_filter_is_the_definition(logits, top_k, top_p):
    row = np.asarray([logits], np.float32) * 0.7
    kept = np.asarray(filter_logits(row, top_k, top_p))[0]
    stay = filtered(row[0].astype(np.float64), top_k, top_p)
    assert {i for i in range(8) if kept[i] != NEVER} == stay
    np.testing.assert_array_equal(kept[sorted(stay)], row[0, sorted(stay)])


@pytest.mark.parametrize("fields", [{}, {"temperature": 2.0, "top_k": 9, "top_p": 0.8}])
def test_draws_have_the_models_frequencies(frozen, fields):
    draws = 4000
    config = DecodeConfig(
        strategy="sample",
        max_new_tokens=1,
        batch_size=draws,
        seed=1,
        **{"temperature": 3.0} | fields,
    )
    rows = generate(*frozen, [PROMPTS[0]] * draws, config)
    counts = np.bincount([row[0] for row in rows], minlength=23)
    logits = next_log_probs(*frozen, [PROMPTS[0]])[0] / config.temperature
    stay = filtered(logits, config.top_k, config.top_p)
    probs = np.asarray([np.exp(logits[i]) if i in stay else 0.0 for i in range(23)])
    probs /= probs.sum()
    assert not counts[probs == 0].any()
    error = np.sqrt(probs * (1 - probs) / draws)
    assert np.all(np.abs(counts / draws - probs) <= 4.5 * error + 1e-12)
    assert (counts > 0).sum() > 2
    assert generate(*frozen, [PROMPTS[0]] * draws, config) == rows
    if not fields:
        other = dataclasses.replace(config, seed=2)
        assert generate(*frozen, [PROMPTS[0]] * draws, other) != rows


# Beam search.


@pytest.fixture(scope="module")
def four_tokens():
    return build(vocab_size=4, seed=2)


def best_of_all(model, params, prompt, limit, eos_ids, penalty):
    """The best of all sequences that end in a stop or have `limit` tokens, by score / length^penalty."""
    scores = {}
    grown = {(): 0.0}
    for _ in range(limit):
        prefixes = list(grown)
        # In one batch of fixed size, so that one program serves all.
        rows = [[*prompt, *prefix] for prefix in prefixes]
        filling = [[0]] * (16 - len(rows))
        log_probs = next_log_probs(model, params, rows + filling)
        extended = {}
        for prefix, row in zip(prefixes, log_probs, strict=False):
            for token in range(4):
                sequence, score = (*prefix, token), grown[prefix] + row[token]
                if token in eos_ids or len(sequence) == limit:
                    scores[sequence] = score / len(sequence) ** penalty
                else:
                    extended[sequence] = score
        grown = extended
    ranked = sorted(scores, key=scores.get, reverse=True)
    assert scores[ranked[0]] - scores[ranked[1]] > 1e-4, "two sequences are as good as equal"
    return ranked[0], len(scores)


@pytest.mark.parametrize(
    ("eos_ids", "penalty", "pad_id"),
    [((2,), 0.0, 0), ((1, 3), 0.5, 1), ((2,), 3.0, 3)],
)
def test_enough_beams_find_the_best_of_all_sequences(four_tokens, eos_ids, penalty, pad_id):
    config = DecodeConfig(strategy="beam", num_beams=4**3, max_new_tokens=3, length_penalty=penalty)
    prompts = [[1, 2], [3], [0, 3, 2, 1]]
    got = generate(*four_tokens, prompts, config, eos_ids=eos_ids, pad_id=pad_id)
    for prompt, tokens in zip(prompts, got, strict=True):
        best, _ = best_of_all(*four_tokens, prompt, 3, eos_ids, penalty)
        assert tokens == cut_at_stop(list(best), eos_ids)


def test_the_best_of_all_is_not_always_the_greedy_one(four_tokens):
    """Or the comparison above would hold for a search that does not search."""
    prompts = list(itertools.product(range(4), repeat=2))
    greedy = greedy_by_full_passes(*four_tokens, prompts, 3)
    beams = generate(
        *four_tokens,
        prompts,
        DecodeConfig(strategy="beam", num_beams=64, max_new_tokens=3, length_penalty=0.0),
    )
    differing = [i for i in range(16) if greedy[i] != beams[i]]
    assert differing
    for i in differing[:3]:
        assert tuple(beams[i]) == best_of_all(*four_tokens, prompts[i], 3, (), 0.0)[0]


def test_one_beam_is_greedy(frozen, expected):
    eos_ids = (expected[0][2],)
    config = DecodeConfig(strategy="beam", num_beams=1, max_new_tokens=NEW)
    got = generate(*frozen, PROMPTS, config, eos_ids=eos_ids)
    assert got == [cut_at_stop(row, eos_ids) for row in expected]


@pytest.mark.slow
def test_beams_of_layers_apart_and_of_batches_agree():
    model, params = build(LORA)
    config = DecodeConfig(strategy="beam", num_beams=3, max_new_tokens=4, batch_size=5)
    together = generate(model, params, PROMPTS, config, eos_ids=(4,))
    alone = DecodeConfig(strategy="beam", num_beams=3, max_new_tokens=4, batch_size=1)
    assert generate(model, params, PROMPTS, alone, eos_ids=(4,)) == together
    apart = Decoder(decoder_config(scan_layers=False), LORA)
    layers = {
        f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(2)
    }
    rest = {name: value for name, value in params.items() if name != "layers"}
    assert generate(apart, rest | layers, PROMPTS, config, eos_ids=(4,)) == together


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3"])
def test_cached_logits_of_ragged_prompts_are_those_of_full_passes(family):
    """Prompts of 1, 4 and 7 tokens in one call, then token by token, each row against its own full pass."""
    model = Decoder(decoder_config(**FAMILIES[family]))
    params = decoder_params(model)
    rng = np.random.default_rng(0)
    lengths, more = (1, 4, 7), 5
    rows = [rng.integers(1, 23, length + more).tolist() for length in lengths]
    full = np.zeros((3, 12), np.int32)
    for row, tokens in enumerate(rows):
        full[row, : len(tokens)] = tokens
    segments = (np.arange(12) < [[length + more] for length in lengths]).astype(np.int32)
    expected = _logits(model, params, full, segments)

    @jax.jit
    def feed(variables, batch):
        return model.apply(variables, batch, cache_length=12, mutable=["cache"])

    prompts = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    y, cache = feed({"params": params}, left_pad(prompts, 7, pad_id=9))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            y[row, 7 - length :], expected[row, :length], rtol=1e-4, atol=1e-4
        )
    for step in range(more):
        at = np.asarray(lengths) + step
        batch = {
            "decoder_input_tokens": full[np.arange(3), at][:, None],
            "decoder_positions": at[:, None],
        }
        y, cache = feed({"params": params} | cache, batch)
        np.testing.assert_allclose(
            y[:, 0], expected[np.arange(3), at], rtol=1e-4, atol=1e-4, err_msg=str(step)
        )


def test_cached_logits_are_those_of_a_full_pass(frozen):
    """Not only their argmax: prompt in one call, then token by token."""
    model, params = frozen
    tokens = np.asarray([PROMPTS[2], PROMPTS[2][::-1]], np.int32)
    full = jax.jit(model.apply)({"params": params}, {"decoder_input_tokens": tokens})

    @jax.jit
    def feed(variables, batch):
        return model.apply(variables, batch, cache_length=9, mutable=["cache"])

    y, cache = feed({"params": params}, {"decoder_input_tokens": tokens[:, :3]})
    parts = [y]
    for t in range(3, 7):
        batch = {
            "decoder_input_tokens": tokens[:, t : t + 1],
            "decoder_positions": np.full((2, 1), t),
        }
        y, cache = feed({"params": params} | cache, batch)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, rtol=1e-4, atol=1e-5)
