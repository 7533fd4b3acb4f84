"""T5X's searches over this package's caches give what the model gives without a cache, and what native decoding gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.adapters import MiLoRAConfig, SiRAConfig
from sira_jax.training.config import DecodeConfig
from sira_jax.training.decoding import generate
from tests.t5x.tiny_t5x import (
    MISSING,
    decoder,
    encoder_decoder,
    example_batches,
    random_params,
    t5x_model,
)

pytestmark = pytest.mark.t5x
pytest.importorskip("t5x", reason=MISSING, exc_type=ImportError)

SIRA = {"rank": 2, "num_experts": 4, "num_selected_experts": 2}
EOS = 1
# Routers by token, and by prompt, whose state is in the cache.
T5 = encoder_decoder(SiRAConfig(**SIRA, targets=("query", "wo")))
DECODERS = {
    "sira": decoder(SiRAConfig(**SIRA, targets=("q", "down"))),
    "milora": decoder(
        MiLoRAConfig(rank=2, targets=("q", "v", "up"), num_selected_experts=1), scan_layers=False
    ),
}


def sharp_params(module):
    """Parameters under which greedy search does not repeat one token for ever."""
    return random_params(module, seed=1, scale=0.6)


def next_logits(module, params, batch, sequences, place):
    """Logits (R, V) after token `place` of `sequences`, by the whole forward pass; rows are batch rows times beams."""
    beams = len(sequences) // len(batch["encoder_input_tokens"])
    tokens = jnp.where(jnp.arange(sequences.shape[1]) <= place, sequences, 0)
    whole = {
        "encoder_input_tokens": jnp.repeat(batch["encoder_input_tokens"], beams, axis=0),
        "decoder_input_tokens": tokens,
        "decoder_segment_ids": jnp.ones_like(tokens),
        "encoder_segment_ids": jnp.repeat(batch["encoder_input_tokens"] > 0, beams, 0).astype(int),
    }
    return module.apply({"params": params}, whole)[:, place]


@pytest.fixture(scope="module")
def t5():
    batch = next(example_batches(T5, 1, packed=False, size=3, length=7))
    return sharp_params(T5), batch


def test_greedy_of_an_encoder_decoder(t5):
    from t5x import decoding

    params, batch = t5
    model = t5x_model(T5, decode_fn=decoding.temperature_sample)
    decodes = jax.jit(
        lambda p, b: model.predict_batch_with_aux(p, b, decoder_params={"temperature": 0.0})[0]
    )(params, batch)
    length = batch["decoder_input_tokens"].shape[1]
    tokens = np.zeros((3, length + 1), np.int32)
    forward = jax.jit(lambda t, i: next_logits(T5, params, batch, t[:, :-1], i))
    ended = np.zeros(3, bool)
    for place in range(length):
        best = np.argmax(forward(tokens, place), axis=-1)
        tokens[:, place + 1] = np.where(ended, 0, best)
        ended |= tokens[:, place + 1] == EOS
    np.testing.assert_array_equal(decodes, tokens[:, 1:])
    assert len(np.unique(decodes)) > 5


def test_beam_search_of_an_encoder_decoder(t5):
    from t5x import decoding

    params, batch = t5
    model = t5x_model(T5)
    decodes, aux = jax.jit(
        lambda p, b: model.predict_batch_with_aux(p, b, num_decodes=3, return_all_decodes=True)
    )(params, batch)

    def without_cache(state):
        # T5X's beam search counts all rows' place by one number.
        return next_logits(T5, params, batch, state.sequences, state.cur_index), state.cache

    prompts = jnp.zeros_like(batch["decoder_input_tokens"])
    expected, scores = jax.jit(
        lambda: decoding.beam_search(
            prompts, {"unused": jnp.zeros((3, 1))}, without_cache, EOS, num_decodes=3
        )
    )()
    np.testing.assert_array_equal(decodes, expected)
    np.testing.assert_allclose(aux["scores"], scores, rtol=1e-5)
    assert len(np.unique(np.asarray(decodes).reshape(9, -1), axis=0)) == 9


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_of_a_decoder_is_native_decodings(name):
    module = DECODERS[name]
    params = sharp_params(module)
    length = 10
    # SeqIO puts a 0 before each prompt.
    prompts = [[0, 9, 4, 6], [0, 5], [0, 7, 8, 3, 2, 11]]
    inputs, attention = np.zeros((2, 3, length), np.int32)
    for row, prompt in enumerate(prompts):
        inputs[row, : len(prompt)] = prompt
        attention[row, : len(prompt)] = 1
    batch = {"decoder_input_tokens": inputs, "decoder_causal_attention": attention}
    model = t5x_model(module)
    decodes = jax.jit(
        lambda p, b: model.predict_batch_with_aux(p, b, decoder_params={"temperature": 0.0})[0]
    )(params, batch)
    config = DecodeConfig(max_new_tokens=length)
    expected = generate(module, params, prompts, config, eos_ids=(EOS,))
    for row, prompt in enumerate(prompts):
        room = length - len(prompt) + 1
        found = np.asarray(decodes[row][:room]).tolist()
        found = found[: found.index(EOS)] if EOS in found else found
        assert found == expected[row][:room]
        assert len(set(found)) > 2


def test_several_samples_of_a_decoder_keep_to_their_rows():
    """Greedy samples of a row are equal, whatever the number of rows in the cache."""
    module = DECODERS["sira"]
    params = sharp_params(module)
    inputs = np.asarray([[0, 9, 4, 0, 0, 0], [0, 5, 0, 0, 0, 0]], np.int32)
    attention = np.asarray([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]], np.int32)
    batch = {"decoder_input_tokens": inputs, "decoder_causal_attention": attention}
    model = t5x_model(module)

    def predict(num_decodes):
        return model.predict_batch_with_aux(
            params,
            batch,
            num_decodes=num_decodes,
            decoder_params={"temperature": 0.0},
        )[0]

    one, two = jax.jit(predict, static_argnums=0)(1), jax.jit(predict, static_argnums=0)(2)
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one[0], one[1])


def test_scores_are_sums_of_log_probabilities(t5):
    params, _ = t5
    batch = next(example_batches(T5, 1, packed=True))
    model = t5x_model(T5)
    scores = model.score_batch(params, batch)
    logits = T5.apply({"params": params}, batch)
    log_probs = jax.nn.log_softmax(logits)
    expected = np.zeros(len(scores))
    for row, place in zip(*np.nonzero(batch["decoder_loss_weights"]), strict=True):
        expected[row] += log_probs[row, place, batch["decoder_target_tokens"][row, place]]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
