"""A merged model as transformers computes it (`make parity-setup`)."""

import numpy as np
import pytest

from sira_jax.checkpoints import adapter_file, fingerprint, load_base_model
from sira_jax.models import Decoder
from sira_jax.training.train_state import merge_params
from tests.gguf_models import tokenizer_fields, write_gguf
from tests.hf_models import TINY_LLAMA, TINY_QWEN2, weights_by_rule
from tests.scripts.conversions import make_run, run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("shape", [TINY_LLAMA, TINY_QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_transformers_loads_what_merge_writes(tmp_path, monkeypatch, method, shape):
    monkeypatch.setenv("SIRA_CACHE", str(tmp_path / "cache"))
    shape = shape | {"vocab_size": 384, "max_position_embeddings": 256}
    if shape["model_type"] == "qwen2":
        shape = shape | {"tie_word_embeddings": False}
    source = tmp_path / "a.gguf"
    fields = tokenizer_fields("smollm")
    fields["tokenizer.ggml.tokens"] += [f"<{n}>" for n in range(384 - 270)]
    fields["tokenizer.ggml.token_type"] += [1] * (384 - 270)
    write_gguf(source, shape, weights_by_rule(shape), metadata=fields)
    make_run(tmp_path / "run", source, method)
    run("merge", tmp_path / "run", tmp_path / "merged")

    run("adapter", tmp_path / "run", tmp_path / "adapter")
    base = load_base_model(source)
    config, tree = adapter_file.load_adapter(
        tmp_path / "adapter", base.config, fingerprint(base.params)
    )
    ids = np.random.default_rng(0).integers(0, 384, (2, 24))
    params = merge_params(tree, base.params)
    ours = Decoder(base.config, config).apply({"params": params}, {"decoder_input_tokens": ids})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
    assert (
        np.abs(
            ours
            - Decoder(base.config).apply({"params": base.params}, {"decoder_input_tokens": ids})
        ).max()
        > 0.05
    )

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = "hello world 12"
    assert tokenizer(text)["input_ids"] == base.tokenizer().encode(text).ids
    assert model.generation_config.eos_token_id == [2]
