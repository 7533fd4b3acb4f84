"""The tokenizer of a Hugging Face folder, from whichever file has it, as the text of a tokenizer.json."""

import os

from sira_jax.checkpoints.model_file import opening
from sira_jax.checkpoints.safetensors import parse_json, read_json
from sira_jax.checkpoints.t5_tokenizer import SPIECE, byte_tokenizer, tokenizer_from_spiece
from sira_jax.errors import ModelFileError
from sira_jax.files import read_bytes

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_BYTE_TOKENIZERS = ("ByT5Tokenizer",)


def read_tokenizer(path: str, vocab_size: int) -> str:
    """Returns the text of tokenizer.json, or of what the folder's other files of a tokenizer amount to.

    Args:
      path: the folder.
      vocab_size: rows of the model's embedding.

    Raises:
      ModelFileError: naming the file, if there is none or it is wrong.
    """
    file_path = os.path.join(path, TOKENIZER)
    text = read_text(path, TOKENIZER)
    if text is not None:
        parse_json(file_path, text)
        return text
    settings = read_optional_json(path, TOKENIZER_CONFIG)
    spiece_path = os.path.join(path, SPIECE)
    if os.path.exists(spiece_path):
        with opening(spiece_path):
            data = read_bytes(spiece_path)
        extra_ids = settings.get("extra_ids")
        if extra_ids is not None and (type(extra_ids) is not int or extra_ids < 0):
            raise ModelFileError(
                f"{os.path.join(path, TOKENIZER_CONFIG)}: extra_ids={extra_ids!r} is not "
                f"supported: a whole number of at least 0"
            )
        return tokenizer_from_spiece(spiece_path, data, vocab_size, extra_ids)
    if settings.get("tokenizer_class") in _BYTE_TOKENIZERS:
        return byte_tokenizer()
    raise ModelFileError(f"{file_path}: no such file")


def read_text(path: str, name: str) -> str | None:
    """The text of a file of the folder, None if it is not there; ModelFileError if it is no UTF-8."""
    file_path = os.path.join(path, name)
    if not os.path.exists(file_path):
        return None
    with opening(file_path):
        data = read_bytes(file_path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ModelFileError(f"{file_path}: not UTF-8 text") from None
    return text.replace("\r\n", "\n")


def read_optional_json(path: str, name: str) -> dict:
    """The object in a file of the folder, empty if it is not there."""
    file_path = os.path.join(path, name)
    return read_json(file_path) if os.path.exists(file_path) else {}
