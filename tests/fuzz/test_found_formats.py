"""Damaged GGUF files, tokenizers and T5X checkpoints that were once too much for their loaders: now each is one line."""

import base64
import json
import struct

import msgpack
import numpy as np
import pytest
from flax import serialization

import tasks
from sira_jax.checkpoints import load_base_model, t5x
from sira_jax.checkpoints.t5_tokenizer import tokenizer_from_spiece
from sira_jax.errors import (
    DataError,
    ModelFileError,
)
from sira_jax.tokenizer_text import check_charsmap
from tasks.vocabularies import TokenizersVocabulary
from tests.checkpoints import spiece
from tests.fuzz import model_files, tokenizer_files
from tests.fuzz.found import DEEP, edit, made, pipe
from tests.integration.mistakes import assert_mistake


@pytest.fixture
def gguf(tmp_path):
    return made(model_files.make_gguf_rope, tmp_path / "model") / "m.gguf"


# GGUF files.


def replace(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def test_gguf_tensors_that_share_their_bytes(gguf):
    data = gguf.read_bytes()
    places = targets_offsets(data)
    (first, second) = places[:2]
    gguf.write_bytes(data[:second] + data[first : first + 8] + data[second + 8 :])
    assert_mistake(ModelFileError, lambda: load_base_model(gguf), gguf, "overlap")


def targets_offsets(data):
    """Where the offsets of the first tensors stand: after their names, shapes and types."""
    found, at = [], data.index(b"token_embd.weight") - 8
    for _ in range(2):
        (length,) = struct.unpack_from("<Q", data, at)
        at += 8 + length
        (dims,) = struct.unpack_from("<I", data, at)
        at += 4 + 8 * dims + 4
        found.append(at)
        at += 8
    return found


def test_gguf_field_twice(gguf):
    key = b"llama.block_count"
    replace(gguf, b"llama.expert_coun", key)
    data = gguf.read_bytes()
    at = data.rindex(key)
    # The key that was replaced was longer by one letter.
    gguf.write_bytes(data[: at - 8] + struct.pack("<Q", len(key)) + key + data[at + len(key) + 1 :])
    assert_mistake(
        ModelFileError, lambda: load_base_model(gguf), gguf, "block_count is there twice"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_gguf_rope_positions(value, tmp_path):
    gguf = made(model_files.make_gguf_rope, tmp_path / "model") / "m.gguf"
    # Three numbers in one: linear scaling by 1 is none, and the divisors say Llama 3's.
    data = gguf.read_bytes()
    data = data.replace(struct.pack("<f", 2.0), struct.pack("<f", 1.0))
    key = b"rope.scaling.original_context_length"
    at = data.index(key) + len(key)
    data = data[:at] + struct.pack("<If", 6, value) + data[at + 8 :]
    data = data.replace(struct.pack("<f", 1.0) + bytes(28), struct.pack("<f", 3.0) + bytes(28))
    gguf.write_bytes(data)
    assert_mistake(ModelFileError, lambda: load_base_model(gguf), gguf)


def test_gguf_vector_that_is_quantised(gguf):
    data = gguf.read_bytes()
    name = b"blk.0.attn_norm.weight"
    at = data.index(name) + len(name)
    # One axis, of 32 values, in blocks of 32.
    gguf.write_bytes(data[: at + 4] + struct.pack("<QI", 32, 8) + data[at + 16 :])
    assert_mistake(ModelFileError, lambda: load_base_model(gguf), gguf, "vectors are not quantised")


# Tokenizers.


@pytest.mark.parametrize("table", ["", "<<<", base64.b64encode(bytes(40)).decode()])
def test_a_table_of_characters_that_makes_tokenizers_panic(table, tmp_path):
    path = made(tokenizer_files.make_json_tokenizers, tmp_path / "t") / "unigram" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"]["normalizers"][0]["precompiled_charsmap"] = table
    path.write_text(json.dumps(content))
    assert_mistake(
        DataError, lambda: tasks.make_vocabulary(f"tokenizers:{path}"), path, "precompiled_charsmap"
    )


def charsmap():
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(
        spiece.train()
    ).normalizer_spec.precompiled_charsmap


def test_a_sound_table_of_characters():
    check_charsmap(charsmap())


def test_tables_of_characters_that_lead_outside():
    data = charsmap()
    size = int.from_bytes(data[:4], "little")
    units, texts = np.frombuffer(data, "<u4", size // 4, 4), data[4 + size :]

    def check(changed=units, texts=texts, length=size):
        check_charsmap(length.to_bytes(4, "little") + changed.astype("<u4").tobytes() + texts)

    check()
    beyond = units.copy()
    beyond[0] = (len(units) << 10) | (units[0] & 0x3FF)
    with pytest.raises(ValueError, match="beyond its end"):
        check(beyond)
    leaves = np.flatnonzero((units < 1 << 31) & ((units >> 8) & 1 == 1))
    leaf = int(leaves[0])
    unit = int(units[leaf])
    value = leaf ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6))
    far = units.copy()
    far[value] = (1 << 31) | len(texts)
    with pytest.raises(ValueError, match="beyond its texts"):
        check(far)
    inside = units.copy()
    inside[value] = (1 << 31) | (texts.index("é".encode()) + 1)
    with pytest.raises(ValueError, match="into a character"):
        check(inside)
    for wrong in (0, size - 4, 2**32 - 1024):
        with pytest.raises(ValueError, match="length"):
            check(length=wrong)
    with pytest.raises(ValueError, match="no end"):
        check(texts=texts + b"x")
    with pytest.raises(ValueError, match="UTF-8"):
        check(texts=b"\xff\0")


@pytest.mark.parametrize("settings", ['{"eos_token": {}}', DEEP])
def test_tokenizer_config_json(settings, tmp_path):
    path = made(tokenizer_files.make_json_tokenizers, tmp_path / "t") / "bpe" / "tokenizer.json"
    (path.parent / "tokenizer_config.json").write_text(settings)
    assert_mistake(DataError, lambda: tasks.make_vocabulary(f"tokenizers:{path}"), path.parent)


@pytest.mark.parametrize("prefix", [None, "##"])
@pytest.mark.parametrize("merge", [["1", "x" * 60], "1 " + "x" * 60, ["1", ""]])
def test_merges_that_make_tokenizers_panic(merge, prefix, tmp_path):
    path = made(tokenizer_files.make_json_tokenizers, tmp_path / "t") / "bpe" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = [merge]
    content["model"]["continuing_subword_prefix"] = prefix
    content["model"]["vocab"]["x" * 60] = 1000
    path.write_text(json.dumps(content))
    if merge == ["1", ""] and prefix is None:  # makes "1"
        return
    assert_mistake(DataError, lambda: tasks.make_vocabulary(f"tokenizers:{path}"), path, "merge")


def test_a_piece_that_is_no_text(tmp_path):
    model = spiece.train().replace(b"<unk>", b"\xffunk>")
    named = ("m.model", "no UTF-8")
    assert_mistake(ModelFileError, lambda: tokenizer_from_spiece("m.model", model, 256), *named)
    (tmp_path / "m.model").write_bytes(model)
    vocabulary = f"sentencepiece:{tmp_path}/m.model"
    assert_mistake(DataError, lambda: tasks.make_vocabulary(vocabulary), *named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: model["vocab"].pop(model["unk_token"]), "cannot be used"),
        (lambda model: model.update(vocab={}, merges=[], unk_token=None), "no tokens"),
    ],
)
def test_a_tokenizer_that_cannot_encode(change, named, tmp_path):
    path = made(tokenizer_files.make_json_tokenizers, tmp_path / "t") / "spm" / "tokenizer.json"
    content = json.loads(path.read_text()) | {"added_tokens": [], "post_processor": None}
    change(content["model"])
    path.write_text(json.dumps(content))

    def use():
        TokenizersVocabulary(path, eos_id=1).encode("ünknown")

    assert_mistake(DataError, use, path, named)


# Checkpoints of T5X.


@pytest.fixture
def checkpoint(tmp_path):
    return made(model_files.make_t5x, tmp_path / "t5x") / "checkpoint_7" / "checkpoint"


def change_tree(path, change):
    tree = serialization.msgpack_restore(path.read_bytes())
    change(tree["optimizer"]["target"])
    path.write_bytes(
        msgpack.packb(tree, default=serialization._msgpack_ext_pack, strict_types=True)
    )


def load(path, config=model_files.T5X_CONFIG):
    return t5x.load_t5x(path, config)


def nested(depth):
    value = {"x": np.ones(1)}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda target: target.update({3: np.ones(2)}), "key 3"),
        (lambda target: target.update(a=nested(600)), "one another"),
        (lambda target: target.update(encoder=np.ones(3)), "missing"),
        (
            lambda target: target["token_embedder"]["embedding"]["metadata"].update(shape=5),
            "says 5",
        ),
        (
            lambda target: target["token_embedder"]["embedding"]["metadata"].update(shape="ab"),
            "says 'ab'",
        ),
        (
            lambda target: target.update(a={"__msgpack_chunked_array__": True, "shape": 4}),
            "not a msgpack file",
        ),
        (
            lambda target: target.update(a=msgpack.ExtType(1, msgpack.packb((4, "object", b"")))),
            "not a msgpack file",
        ),
        (
            lambda target: target.update(a=msgpack.ExtType(1, msgpack.packb(((4,), 5, b"")))),
            "not a msgpack file",
        ),
    ],
)
def test_t5x_trees(change, named, checkpoint):
    change_tree(checkpoint, change)
    assert_mistake(ModelFileError, lambda: load(checkpoint), checkpoint.parent, named)


def test_t5x_layers_without_number(tmp_path):
    path = made(model_files.make_t5x_scanned, tmp_path / "t5x") / "checkpoint_7" / "checkpoint"
    change_tree(
        path, lambda target: target["encoder"]["encoder"]["mlp"]["wo"]["kernel"].pop("metadata")
    )
    edit(path.parent / "target.encoder.encoder.mlp.wo.kernel" / ".zarray", shape=[12, 10**12, 4])
    assert_mistake(
        ModelFileError, lambda: load(path, model_files.T5X_SCANNED), path, f"{10**12} layers"
    )


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "[]", "9" * 5000])
def test_t5x_array_whose_description_ends_tensorstore(text, checkpoint):
    file = checkpoint.parent / "target.token_embedder.embedding" / ".zarray"
    file.write_text(text)
    assert_mistake(ModelFileError, lambda: load(checkpoint), file)


def test_t5x_chunks_that_hold_more_than_the_array(checkpoint):
    folder = checkpoint.parent / "target.token_embedder.embedding"
    edit(folder / ".zarray", chunks=[10**6, 10**6])
    assert_mistake(ModelFileError, lambda: load(checkpoint), folder, "chunks")


def test_t5x_chunk_that_is_a_pipe(checkpoint):
    folder = checkpoint.parent / "target.token_embedder.embedding"
    (folder / "0.0").unlink()
    pipe(folder / "0.0")
    assert_mistake(ModelFileError, lambda: load(checkpoint), folder / "0.0", "no regular file")
