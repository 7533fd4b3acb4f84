"""The decoder with real weights: karpathy's stories260K says what its author published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.checkpoints import load_base_model
from sira_jax.models.decoder import Decoder
from sira_jax.models.presets import count_parameters
from tests import make_stories260k, stories260k

pytestmark = pytest.mark.skipif(
    not stories260k.is_there(), reason=f"{stories260k.folder()} is not there (SIRA_TEST_DATA)"
)

# doc/stories260K.md of llama2.c: greedy decoding from BOS, 256 positions.
PUBLISHED = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She "
    'said, "I want to play with your ball, but I can\'t find it."\n'
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to "
    'do."\n'
    "Lily didn't want to help her mom, so she said, \"I'm sorry, mom. I didn't know what to do.\" "
    "Her mom said, \"Don't worry, Lily. We can help you."
)
STORY = (
    "Once upon a time, there was a little boy named Tom. He had a red ball and a big dog. One day, "
    "Tom and his dog went to the park to play. Tom threw the ball and the dog ran to get it. They "
    "were very happy. Then it started to rain, so they went home to eat."
)


@pytest.fixture(scope="module")
def model():
    return stories260k.read()


def perplexity(config, params, tokenizer) -> float:
    ids = np.asarray(tokenizer.encode(STORY))
    logits = Decoder(config).apply({"params": params}, {"decoder_input_tokens": ids[None]})
    log_probs = jax.nn.log_softmax(logits[0, :-1])
    return float(jnp.exp(-log_probs[np.arange(len(ids) - 1), ids[1:]].mean()))


def test_size(model):
    config, params, _ = model
    assert count_parameters(config) == 260_032
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 260_032


def test_tokenizer_round_trip(model):
    tokenizer = model[2]
    for text in (STORY, PUBLISHED, "naïve 日本 \n\n x", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_greedy_decoding_gives_the_published_text(model):
    config, params, tokenizer = model
    length = 256

    @jax.jit
    def next_token(ids_T, last):
        logits = Decoder(config).apply({"params": params}, {"decoder_input_tokens": ids_T[None]})
        return logits[0, last].argmax()

    ids = np.zeros(length + 1, np.int32)
    ids[0] = stories260k.BOS
    for last in range(length):
        ids[last + 1] = next_token(ids[:length], last)
    text = tokenizer.decode(ids.tolist())
    assert text == PUBLISHED


def test_perplexity_tells_the_right_layout_from_the_wrong_one(model):
    config, params, tokenizer = model
    right = perplexity(config, params, tokenizer)
    _, wrong_params = stories260k.read_model(
        stories260k.folder() / "stories260K.bin", right_layout=False
    )
    wrong = perplexity(config, wrong_params, tokenizer)
    assert right < 4  # 3.08 when this was written, and 41.8 with the wrong layout
    assert wrong > 5 * right


def test_folder_holds_the_same_model_and_tokenizer(model, tmp_path):
    config, params, tokenizer = model
    make_stories260k.write(tmp_path)
    loaded = load_base_model(tmp_path)
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    written = loaded.tokenizer()
    for text in (STORY, "Wapi ni duka? é 你", "two  spaces\nand lines"):
        ids = written.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text, bos=False)
        assert written.decode(ids) == text
