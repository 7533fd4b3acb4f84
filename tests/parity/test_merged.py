"""A merged model as transformers computes it (`make parity-setup`)."""

import numpy as np
import pytest

from sira_jax.checkpoints import adapter_file, fingerprint, load_base_model
from sira_jax.training.train_state import merge_params
from tests.gguf_models import tokenizer_fields, write_gguf
from tests.hf_models import TINY_LLAMA, TINY_QWEN2, weights_by_rule
from tests.scripts.conversions import logits, make_run, run, token_ids

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

VOCAB = 384


def write_model(path, shape):
    """A GGUF file with a tokenizer and as many ids as there are bytes and more."""
    fields = tokenizer_fields("smollm")
    more = VOCAB - len(fields["tokenizer.ggml.tokens"])
    fields["tokenizer.ggml.tokens"] += [f"<{number}>" for number in range(more)]
    fields["tokenizer.ggml.token_type"] += [1] * more
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 256, "tie_word_embeddings": False}
    write_gguf(path, shape | sizes, weights_by_rule(shape | sizes), metadata=fields)


@pytest.mark.parametrize("shape", [TINY_LLAMA, TINY_QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_transformers_loads_what_merge_writes(tmp_path, monkeypatch, method, shape):
    monkeypatch.setenv("SIRA_CACHE", str(tmp_path / "cache"))
    source, merged = tmp_path / "a.gguf", tmp_path / "merged"
    write_model(source, shape)
    make_run(tmp_path / "run", source, method)
    run("merge", tmp_path / "run", merged)

    run("adapter", tmp_path / "run", tmp_path / "adapter")
    base = load_base_model(source)
    config, tree = adapter_file.load_adapter(
        tmp_path / "adapter", base.config, fingerprint(base.params)
    )
    ours = logits(base.config, merge_params(tree, base.params), config)
    assert np.abs(ours - logits(base.config, base.params)).max() > 0.05
    model = transformers.AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(token_ids(VOCAB))).logits.numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
    assert model.generation_config.eos_token_id == [2]

    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    for text in ("hello world 12", "naïve\n日本語"):
        assert tokenizer(text)["input_ids"] == base.tokenizer().encode(text).ids
