"""seqio vocabularies of our own. Importing this module imports TensorFlow."""

import os
from collections.abc import Sequence

import numpy as np
import seqio
import tensorflow as tf

from tasks.vocabularies import TokenizersVocabulary


class HuggingFaceVocabulary(seqio.Vocabulary):
    """A Hugging Face tokenizer (`tokenizers.Tokenizer`) as a seqio vocabulary.

    The TensorFlow side calls the tokenizer through `tf.numpy_function`: it runs on the host and
    cannot be saved in a SavedModel.

    Args:
      tokenizer_json: a tokenizer.json, its text or its path.
      eos_id, bos_id, unk_id, pad_id: special ids, which a tokenizer.json does not state.
      skip_special_tokens: whether decoding leaves out special tokens.

    Raises:
      DataError: the file is missing or no tokenizer, or an id is not one of its ids.
    """

    def __init__(
        self,
        tokenizer_json: str | os.PathLike,
        *,
        eos_id: int | None,
        bos_id: int | None = None,
        unk_id: int | None = None,
        pad_id: int = 0,
        skip_special_tokens: bool = True,
    ):
        self._kwargs = {
            "eos_id": eos_id,
            "bos_id": bos_id,
            "unk_id": unk_id,
            "pad_id": pad_id,
            "skip_special_tokens": skip_special_tokens,
        }
        self._native = TokenizersVocabulary(tokenizer_json, **self._kwargs)
        super().__init__(extra_ids=0)

    @property
    def native(self) -> TokenizersVocabulary:
        """The same vocabulary without TensorFlow."""
        return self._native

    @property
    def bos_id(self) -> int | None:
        return self._native.bos_id

    @property
    def eos_id(self) -> int | None:
        return self._native.eos_id

    @property
    def unk_id(self) -> int | None:
        return self._native.unk_id

    @property
    def pad_id(self) -> int:
        return self._native.pad_id

    @property
    def _base_vocab_size(self) -> int:
        return self._native.vocab_size

    def _encode(self, s: str) -> Sequence[int]:
        return self._native.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._native.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(data: bytes | np.ndarray) -> np.ndarray:
            # Bytes in a graph, an array of one object when run eagerly.
            text = np.asarray(data, object).item().decode("utf-8")
            return np.asarray(self._native.encode(text), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(array: np.ndarray) -> np.ndarray:
            rows = array.reshape(-1, array.shape[-1])
            texts = [self._native.decode(row).encode("utf-8") for row in rows]
            return np.asarray(texts, object).reshape(array.shape[:-1])

        if isinstance(ids, tf.RaggedTensor):
            ids = ids.to_tensor(self.pad_id if self.eos_id is None else self.eos_id)
        texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        texts.set_shape(ids.shape[:-1])
        return texts

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HuggingFaceVocabulary):
            return False
        return self._native.fingerprint() == other._native.fingerprint()

    def __hash__(self) -> int:
        return hash(self._native.fingerprint())

    def __str__(self) -> str:
        return f"HuggingFaceVocabulary({self._native.fingerprint()})"

    def __getstate__(self) -> dict:
        return {"tokenizer_json": self._native.tokenizer_json, **self._kwargs}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)
