"""Small vocabularies, trained on the spot."""

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tasks import specs

EOS, PAD = "<|im_end|>", "<pad>"


def corpus():
    """Texts of a few tasks."""
    names = ("cldr_date_sw", "cldr_unit_te", "cldr_relative_am", "cldr_currency_name_bn")
    for name in names:
        for example in specs.get_task(name).source("validation"):
            yield example["inputs"]
            yield example["targets"]


@pytest.fixture(scope="session")
def sentencepiece_path(tmp_path_factory):
    """A SentencePiece model file of 400 pieces."""
    prefix = tmp_path_factory.mktemp("spm") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_prefix=str(prefix),
        vocab_size=400,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def tokenizer_json():
    """The text of a byte-level BPE tokenizer.json with special tokens, of 500 ids."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[PAD, "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer.to_str()
