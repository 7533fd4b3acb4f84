"""Loaded and written T5 folders against transformers itself (`make parity-setup`)."""

import functools

import jax
import numpy as np
import pytest

from sira_jax.checkpoints import SpecialTokens, load_base_model, save_hf_folder
from sira_jax.checkpoints.hf_models import write_model_config
from sira_jax.checkpoints.t5_tokenizer import byte_tokenizer
from sira_jax.models import make_model
from sira_jax.models.presets import count_parameters, preset
from tests.checkpoints.spiece import train
from tests.hf_models import write_folder
from tests.hf_t5_models import TINY_T5S, t5_inputs, t5_weights_by_rule

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TOLERANCE = {"rtol": 0, "atol": 1e-4}
BATCH = {name: np.asarray(ids, np.int32) for name, ids in t5_inputs(64).items()}


def read(folder):
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def theirs(model):
    inputs = torch.tensor(BATCH["encoder_input_tokens"])
    with torch.no_grad():
        return model(
            input_ids=inputs,
            attention_mask=(inputs != 0).long(),
            decoder_input_ids=torch.tensor(BATCH["decoder_input_tokens"]),
        ).logits.numpy()


def ours(model):
    return np.asarray(make_model(model.config).apply({"params": model.params}, BATCH))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("t5")
    return {
        name: write_folder(root / name, config, t5_weights_by_rule(config))
        for name, config in TINY_T5S.items()
    }


@pytest.mark.parametrize("name", TINY_T5S)
def test_folders_that_transformers_writes(tmp_path, folders, name):
    model = read(folders[name])
    model.save_pretrained(tmp_path, max_shard_size="20KB" if name == "t5-1.1" else "5GB")
    np.testing.assert_allclose(ours(load_base_model(tmp_path)), theirs(model), **TOLERANCE)


@pytest.mark.parametrize("name", TINY_T5S)
def test_models_that_transformers_makes_have_one_matrix_under_either_name(tmp_path, name):
    """What is made there anew shares embedding and logits, and all but T5 1.0 leave them unscaled."""
    fields = {key: value for key, value in TINY_T5S[name].items() if key != "architectures"}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(tmp_path)
    loaded = load_base_model(tmp_path)
    assert loaded.config.tie_embeddings == (name == "t5-1.0")
    np.testing.assert_allclose(ours(loaded), theirs(model), **TOLERANCE)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("name", TINY_T5S)
def test_folders_that_transformers_reads(tmp_path, folders, name, scan_layers):
    model = load_base_model(folders[name], scan_layers=scan_layers)
    special = SpecialTokens(eos_ids=(1,), pad_id=0)
    save_hf_folder(tmp_path, model.config, model.params, special=special)
    again = read(tmp_path)
    np.testing.assert_allclose(theirs(again), ours(model), **TOLERANCE)
    assert again.generation_config.decoder_start_token_id == 0
    assert again.generation_config.eos_token_id == [1]


@pytest.mark.parametrize("name", ["t5-1.1", "umt5"])
def test_greedy_generation_is_the_same(folders, name):
    inputs = torch.tensor(BATCH["encoder_input_tokens"])
    expected = (
        read(folders[name])
        .generate(
            input_ids=inputs,
            attention_mask=(inputs != 0).long(),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
        .numpy()
    )
    loaded = load_base_model(folders[name])
    model = make_model(loaded.config)

    @functools.partial(jax.jit, static_argnums=2)
    def step(cache, batch, length):
        variables = {"params": loaded.params} | ({} if cache is None else {"cache": cache})
        logits, changed = model.apply(variables, batch, cache_length=length, mutable=["cache"])
        return logits[:, -1].argmax(-1), changed["cache"]

    tokens = np.zeros((2, 1), np.int32)
    first = {"encoder_input_tokens": BATCH["encoder_input_tokens"], "decoder_input_tokens": tokens}
    found, (chosen, cache) = [tokens[:, 0]], step(None, first, 16)
    for place in range(1, 12):
        found.append(np.asarray(chosen))
        later = {
            "decoder_input_tokens": chosen[:, None],
            "decoder_positions": np.full((2, 1), place, np.int32),
        }
        chosen, cache = step(cache, later, 16)
    found.append(np.asarray(chosen))
    np.testing.assert_array_equal(np.stack(found, axis=1), expected)


def test_transformers_reads_the_tokenizers_that_are_written(tmp_path, folders):
    for name, text in (("spiece", None), ("bytes", byte_tokenizer())):
        if text is None:
            source = tmp_path / "source"
            config = {**TINY_T5S["t5-1.1"], "vocab_size": 384}
            write_folder(source, config, t5_weights_by_rule(config))
            (source / "spiece.model").write_bytes(train())
            loaded = load_base_model(source)
            text = loaded.tokenizer_json
        model = load_base_model(folders["byt5"])
        special = SpecialTokens(eos_ids=(1,), pad_id=0)
        save_hf_folder(tmp_path / name, model.config, model.params, text, special)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        mine = load_base_model(tmp_path / name).tokenizer()
        for sentence in ("the quick fox", " naïve  café 12"):
            assert tokenizer(sentence)["input_ids"] == mine.encode(sentence).ids
    byt5 = transformers.ByT5Tokenizer()
    for sentence in ("the quick fox", " naïve  café 12\n日本語", ""):
        assert byt5(sentence)["input_ids"] == mine.encode(sentence).ids
        assert byt5.decode(byt5(sentence)["input_ids"], skip_special_tokens=True) == sentence


@pytest.mark.parametrize("name", ["t5-1.0-small", "t5-1.1-base", "mt5-small", "byt5-small"])
def test_presets_have_the_parameters_of_transformers_models(name):
    config = preset(name)
    fields = write_model_config(config)
    theirs_ = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(theirs_)
    # There the logits' matrix is the embedding until a checkpoint says otherwise.
    own = 0 if config.tie_embeddings else config.vocab_size * config.emb_dim
    assert model.num_parameters() + own == count_parameters(config)
