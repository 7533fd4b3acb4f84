"""Small tokenizers of each kind, and using them."""

import json
from pathlib import Path

import tasks
from sira_jax.checkpoints.t5_tokenizer import tokenizer_from_spiece
from sira_jax.checkpoints.tokenizer import tokenizer_from_gguf
from tests.checkpoints import spiece
from tests.gguf_models import tokenizer_fields

TEXT = "hello world, 123 times\n日本 <extra_id_0>"


def bpe_tokenizer() -> str:
    """A byte-level tokenizer.json, as a GGUF file has it."""
    return tokenizer_from_gguf("", tokenizer_fields("llama-bpe"))


def spm_fields() -> dict[str, object]:
    """A SentencePiece BPE of a GGUF file."""
    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(8)),
        "▁",
        *"helowrd,",
        "he",
        "ll",
    ]
    types = [3, 3, 3, 2, *[6] * 8, *[1] * (len(pieces) - 12)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(place) for place in range(len(pieces))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
    }


def make_json_tokenizers(folder: Path) -> None:
    """Byte-level BPE, SentencePiece's BPE, and T5's unigrams with their table of characters."""
    kinds = {
        "bpe": (bpe_tokenizer(), "<|im_end|>"),
        "spm": (tokenizer_from_gguf("", spm_fields()), "<eos>"),
        "unigram": (tokenizer_from_spiece("", spiece.train(), 256, 100), "</s>"),
    }
    for name, (text, eos) in kinds.items():
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(text)
        settings = {"eos_token": {"content": eos}, "pad_token": None}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))


def make_spieces(folder: Path) -> None:
    for kind in ("unigram", "bpe"):
        (folder / kind).mkdir()
        (folder / kind / "spiece.model").write_bytes(spiece.train(model_type=kind))


def _use_vocabulary(spec: str) -> None:
    vocabulary = tasks.make_vocabulary(spec)
    ids = vocabulary.encode(TEXT)
    vocabulary.decode(ids)
    vocabulary.id_to_text(ids[0] if ids else 0)
    assert all(0 <= index < vocabulary.vocab_size for index in ids)


def load_json_tokenizer(folder: Path) -> None:
    _use_vocabulary(f"tokenizers:{folder}/tokenizer.json")


def load_spiece(folder: Path) -> None:
    _use_vocabulary(f"sentencepiece:{folder}/spiece.model")
