"""Loaded and written folders against transformers itself (`make parity-setup`)."""

import numpy as np
import pytest

from sira_jax.checkpoints import SpecialTokens, load_base_model, save_hf_folder
from sira_jax.checkpoints.hf_config import to_hf_config
from sira_jax.checkpoints.tokenizer import tokenizer_from_gguf
from sira_jax.models.decoder import Decoder
from sira_jax.models.presets import count_parameters, preset
from sira_jax.models.rope import RopeScaling
from tests.gguf_models import tokenizer_fields
from tests.parity.reference_configs import CONFIGS, LLAMA3_ROPE, token_ids

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TOLERANCE = {"rtol": 0, "atol": 1e-4}


def theirs(model, ids_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(ids_BT)).logits.numpy()


def ours(model, ids_BT: np.ndarray) -> np.ndarray:
    batch = {"decoder_input_tokens": ids_BT}
    return np.asarray(Decoder(model.config).apply({"params": model.params}, batch))


def random_ids(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (2, 48))


def build(name: str, **changes: object):
    fields = {**CONFIGS[name], **changes}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        # As initialised, norms are 1, biases 0 and matrices so small that attention is flat.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.15))
    return model


@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("name", CONFIGS)
def test_folders_that_transformers_writes(tmp_path, name, shards):
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "shards" else "5GB")
    assert (tmp_path / "model.safetensors").exists() == (shards == "one file")
    loaded = load_base_model(tmp_path)
    ids = random_ids(loaded.config.vocab_size)
    np.testing.assert_allclose(ours(loaded, ids), theirs(model, ids), **TOLERANCE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_tied_and_untied_scaled_and_not(tmp_path, name, tied):
    model = build(name, tie_word_embeddings=tied, rope_scaling=dict(LLAMA3_ROPE))
    model.save_pretrained(tmp_path)
    loaded = load_base_model(tmp_path)
    assert loaded.config.rope_scaling == RopeScaling(factor=4.0, original_max_positions=16)
    assert loaded.config.tie_embeddings == tied
    ids = random_ids(loaded.config.vocab_size)
    expected = theirs(model, ids)
    np.testing.assert_allclose(ours(loaded, ids), expected, **TOLERANCE)


def test_bfloat16_weights_are_read_as_they_are(tmp_path):
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded = load_base_model(tmp_path, param_dtype="float32")
    ids = random_ids(loaded.config.vocab_size)
    np.testing.assert_allclose(ours(loaded, ids), theirs(model, ids), **TOLERANCE)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_folders_that_transformers_reads(tmp_path, name, scan_layers):
    build(name).save_pretrained(tmp_path / "a")
    model = load_base_model(tmp_path / "a", scan_layers=scan_layers)
    special = SpecialTokens(bos_id=1, eos_ids=(2, 3), pad_id=0)
    save_hf_folder(tmp_path / "b", model.config, model.params, special=special)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", dtype=torch.float32, attn_implementation="eager"
    )
    ids = random_ids(model.config.vocab_size)
    np.testing.assert_allclose(theirs(again, ids), ours(model, ids), **TOLERANCE)
    assert again.generation_config.eos_token_id == [2, 3]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation_is_the_same(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = load_base_model(tmp_path)
    ids = np.asarray([token_ids(loaded.config.vocab_size)])
    expected = model.generate(
        torch.tensor(ids), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    ).numpy()
    padded = np.pad(ids, ((0, 0), (0, 8)))  # what follows a token does not change it
    for place in range(ids.shape[1], padded.shape[1]):
        padded[:, place] = ours(loaded, padded)[:, place - 1].argmax(-1)
    np.testing.assert_array_equal(padded, expected)


def test_transformers_reads_the_tokenizer_that_is_written(tmp_path):
    fields = tokenizer_fields("llama-bpe")
    text = tokenizer_from_gguf("a.gguf", fields)
    build("llama").save_pretrained(tmp_path / "a")
    model = load_base_model(tmp_path / "a")
    template = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"
    save_hf_folder(
        tmp_path / "b",
        model.config,
        model.params,
        text,
        SpecialTokens(bos_id=1, eos_ids=(2,), pad_id=0),
        chat_template=template,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    ours_ = load_base_model(tmp_path / "b").tokenizer()
    for sentence in ("hello world 12345", "naïve\n\n日本語<|im_end|>"):
        assert tokenizer(sentence)["input_ids"] == ours_.encode(sentence).ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>hello"


@pytest.mark.parametrize(
    "name",
    ["smollm2-135m", "llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "qwen3-32b", "gemma-2-27b"]
    + [f"gemma-3-{size}" for size in ("270m", "4b", "27b")],
)
def test_presets_have_the_parameters_of_transformers_models(name):
    fields = to_hf_config(preset(name))
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == count_parameters(preset(name))
