"""What damaged files once did to the loaders, one test each: now it is one line that names the file."""

import base64
import json
import os
import struct

import msgpack
import numpy as np
import pytest
from flax import serialization
from ml_collections import ConfigDict

import tasks
from scripts import assemble, cli, run_results, sweep_plan
from scripts.launch.config import make_launch
from scripts.launch.tpus import TpuConfig
from sira_jax import json_text
from sira_jax.adapters import make_config
from sira_jax.checkpoints import load_base_model, read_base_model, t5x
from sira_jax.checkpoints.safetensors import read_json
from sira_jax.errors import (
    LONGEST_MESSAGE,
    CheckpointError,
    ConfigError,
    DataError,
    ModelFileError,
    SiraError,
    is_finite_number,
)
from sira_jax.files import open_binary
from sira_jax.tokenizer_text import check_charsmap
from tasks.finqa_program import ProgramError, execute
from tasks.vocabularies import TokenizersVocabulary
from tests.checkpoints import spiece
from tests.fuzz import data_files, targets
from tests.integration.mistakes import assert_mistake
from tests.scripts import synthetic_runs

DEEP = "[" * 100_000
MANY_DIGITS = "9" * 5000


def made(make, folder):
    folder.mkdir()
    make(folder)
    return folder


@pytest.fixture
def llama(tmp_path):
    return made(targets.make_llama, tmp_path / "model")


@pytest.fixture
def gguf(tmp_path):
    return made(targets.make_gguf_rope, tmp_path / "model") / "m.gguf"


# What all loaders share.


def test_a_message_is_one_printable_line_of_bounded_length():
    error = SiraError("a\nb\r\nc\0d\x1b[31m \ud800" + "x" * 100_000)
    message = str(error)
    assert message.startswith(r"a b c\x00d\x1b[31m \ud800xxx")
    assert message.isprintable()
    assert len(message) <= LONGEST_MESSAGE
    assert str(ConfigError("plain  text")) == "plain  text"


@pytest.mark.parametrize(
    "text", [DEEP, DEEP + "]" * 100_000, '{"a":' * 500 + "1" + "}" * 500, MANY_DIGITS, '"\\ud800"']
)
def test_json_that_python_reads_into_trouble(text, tmp_path):
    for form in (text, text.encode()):
        with pytest.raises(ValueError, match=r"nested|one another|digits|surrogates"):
            json_text.parse(form)
    (tmp_path / "x.json").write_text(text)
    assert_mistake(ModelFileError, lambda: read_json(str(tmp_path / "x.json")), tmp_path / "x.json")


def test_json_with_half_a_pair_of_surrogates_as_bytes():
    with pytest.raises(UnicodeDecodeError):
        json_text.parse(b'"\xed\xa0\x80"')
    assert json_text.parse(b'"\\ud83d\\ude00"') == "\U0001f600"
    assert json_text.parse("\ufeff[1]".encode()) == [1]


def test_a_number_beyond_all_floats_is_no_number():
    for value in (10**400, 1e39, -1e39, float("nan"), float("inf"), True, "1", None):
        assert not is_finite_number(value)
    for value in (10**38, 3.4e38, -1, 0.0):
        assert is_finite_number(value)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_no_file_has(name, tmp_path):
    with pytest.raises(OSError, match="no file can have this name"):
        open_binary(tmp_path / name)


def pipe(path):
    os.mkfifo(path)


def endless(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("put", [pipe, endless, os.mkdir])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"]
)
def test_no_regular_file_in_a_model(put, name, llama):
    (llama / name).unlink()
    put(llama / name)
    if name == "tokenizer.json":
        assert str(llama / name) in load_base_model(llama).tokenizer_error
    else:
        assert_mistake(ModelFileError, lambda: load_base_model(llama), llama / name)


# Hugging Face folders.


def change_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length])
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (b'"dtype":"F32"', b'"dtype":["F32"]', "unknown dtype"),
        (
            b'"shape":[8]',
            b'"shape":[' + b"9" * 4000 + b"," + b"9" * 4000 + b"]",
            "whole numbers under",
        ),
        (b'"model.norm.weight":', b'"model.norm.weight":1,"model.norm.weight":', "is there twice"),
        (b'"model.norm.weight":', b'"a\\nb":', "a b"),
        (b"{", b'{"deep":' + DEEP.encode(), "one another"),
    ],
)
def test_safetensors_header(old, new, named, llama):
    path = llama / "model.safetensors"
    change_header(path, lambda header: header.replace(old, new, 1))
    assert_mistake_of_any_length(ModelFileError, lambda: load_base_model(llama), llama, named)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "shard", ["a\0b", "\ud800", "../outside/model.safetensors", "/etc/passwd", "..", ""]
)
def test_shards_elsewhere(shard, tmp_path):
    folder = made(targets.make_sharded, tmp_path / "model")
    made(targets.make_llama, tmp_path / "outside")
    edit(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": shard})
    assert_mistake(ModelFileError, lambda: load_base_model(folder), folder)


@pytest.mark.parametrize(
    "field", ["rms_norm_eps", "rope_theta", "hidden_size", "max_position_embeddings"]
)
def test_config_json_with_a_number_beyond_all_floats(field, llama):
    edit(llama / "config.json", **{field: 10**400})
    file = llama / "config.json"
    assert_mistake_of_any_length(ModelFileError, lambda: load_base_model(llama), file, field)


def test_a_token_id_that_is_a_deep_value(llama):
    edit(llama / "generation_config.json", pad_token_id=[["x" * 10_000]])
    assert_mistake_of_any_length(
        ModelFileError, lambda: load_base_model(llama), llama, "pad_token_id"
    )


def assert_mistake_of_any_length(error, call, *named):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).isprintable()
    assert all(str(part) in str(caught.value) for part in named)


@pytest.mark.parametrize(
    "added", [3, [3], [{"content": "<|im_start|>"}], [{"content": "<|im_start|>", "id": "x"}]]
)
def test_added_tokens_that_are_none(added, llama):
    (llama / "generation_config.json").unlink()
    edit(llama / "config.json", bos_token_id=None)
    edit(llama / "tokenizer.json", added_tokens=added)
    assert read_base_model(llama).special.bos_id is None


def test_an_added_token_beyond_the_embedding(llama):
    (llama / "generation_config.json").unlink()
    edit(llama / "config.json", bos_token_id=None)
    edit(llama / "tokenizer.json", added_tokens=[{"content": "<|im_start|>", "id": 10**6}])
    assert read_base_model(llama).special.bos_id is None


def test_chat_templates_by_names_that_are_none(llama):
    edit(
        llama / "tokenizer_config.json",
        chat_template=[{"name": [1]}, {"name": "default", "template": "x"}],
    )
    assert read_base_model(llama).chat_template == "x"


def test_a_chat_template_that_is_none_is_named_with_its_model(llama):
    edit(llama / "tokenizer_config.json", chat_template="{% endfor %}")
    model = read_base_model(llama)

    def make():
        tasks.make_template("chat", chat_template=model.chat_template, origin=model.source)

    assert_mistake(ConfigError, make, f"{llama}: chat_template, line 1")


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
    gguf = made(targets.make_gguf_rope, tmp_path / "model") / "m.gguf"
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
    path = made(targets.make_json_tokenizers, tmp_path / "t") / "unigram" / "tokenizer.json"
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
    path = made(targets.make_json_tokenizers, tmp_path / "t") / "bpe" / "tokenizer.json"
    (path.parent / "tokenizer_config.json").write_text(settings)
    assert_mistake(DataError, lambda: tasks.make_vocabulary(f"tokenizers:{path}"), path.parent)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: model["vocab"].pop(model["unk_token"]), "cannot be used"),
        (lambda model: model.update(vocab={}, merges=[], unk_token=None), "no tokens"),
    ],
)
def test_a_tokenizer_that_cannot_encode(change, named, tmp_path):
    path = made(targets.make_json_tokenizers, tmp_path / "t") / "spm" / "tokenizer.json"
    content = json.loads(path.read_text()) | {"added_tokens": [], "post_processor": None}
    change(content["model"])
    path.write_text(json.dumps(content))

    def use():
        TokenizersVocabulary(path, eos_id=1).encode("ünknown")

    assert_mistake(DataError, use, path, named)


# Checkpoints of T5X.


@pytest.fixture
def checkpoint(tmp_path):
    return made(targets.make_t5x, tmp_path / "t5x") / "checkpoint_7" / "checkpoint"


def change_tree(path, change):
    tree = serialization.msgpack_restore(path.read_bytes())
    change(tree["optimizer"]["target"])
    path.write_bytes(
        msgpack.packb(tree, default=serialization._msgpack_ext_pack, strict_types=True)
    )


def load(path, config=targets.T5X_CONFIG):
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
    path = made(targets.make_t5x_scanned, tmp_path / "t5x") / "checkpoint_7" / "checkpoint"
    change_tree(
        path, lambda target: target["encoder"]["encoder"]["mlp"]["wo"]["kernel"].pop("metadata")
    )
    edit(path.parent / "target.encoder.encoder.mlp.wo.kernel" / ".zarray", shape=[12, 10**12, 4])
    assert_mistake(
        ModelFileError, lambda: load(path, targets.T5X_SCANNED), path, f"{10**12} layers"
    )


def test_t5x_chunks_that_hold_more_than_the_array(checkpoint):
    folder = checkpoint.parent / "target.token_embedder.embedding"
    edit(folder / ".zarray", chunks=[10**6, 10**6])
    assert_mistake(ModelFileError, lambda: load(checkpoint), folder, "chunks")


def test_t5x_chunk_that_is_a_pipe(checkpoint):
    folder = checkpoint.parent / "target.token_embedder.embedding"
    (folder / "0.0").unlink()
    pipe(folder / "0.0")
    assert_mistake(ModelFileError, lambda: load(checkpoint), folder / "0.0", "no regular file")


# Configs and results.


@pytest.mark.parametrize("pattern", ["a{99999999999999}", "(" * 5000 + ")" * 5000])
def test_patterns_that_cannot_be_compiled(pattern):
    assert_mistake_of_any_length(
        ConfigError,
        lambda: make_config({"method": "lora", "targets": [pattern]}),
        "adapter.targets",
    )


@pytest.mark.parametrize("text", [DEEP, '{"config": ' + MANY_DIGITS + "}", '{"config": 3}'])
def test_config_json_of_a_run(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert_mistake(
        ConfigError, lambda: assemble.read_experiment(None, str(tmp_path)), tmp_path / "config.json"
    )


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "a/../../b", 3, ""])
def test_a_sweep_whose_runs_would_lie_elsewhere(name, tmp_path):
    targets.make_sweep_plan(tmp_path)
    plan = json.loads((tmp_path / "sweep.json").read_text())
    plan["runs"][0]["name"] = name
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    assert_mistake(DataError, lambda: sweep_plan.load_sweep(tmp_path), tmp_path / "sweep.json")


@pytest.mark.parametrize("section", [True, 3, None, "text", [1]])
def test_a_section_of_a_launch_that_is_none(section):
    assert_mistake(ConfigError, lambda: make_launch({"job": section}), "job=", "a mapping")


def test_results_that_are_nested_too_deeply(tmp_path):
    (tmp_path / "router_test.json").write_text(DEEP)
    assert_mistake(
        DataError, lambda: run_results.read_runs({"a": tmp_path}), tmp_path / "router_test.json"
    )


def test_statistics_that_are_no_numbers(tmp_path):
    run = synthetic_runs.make_run(tmp_path / "run", routers=True)
    report = json.loads((run / "router_test.json").read_text())
    report["projections"]["mlp/down"]["gate_entropy"] = [{"a": 1}]
    (run / "router_test.json").write_text(json.dumps(report))
    named = (run / "router_test.json", "mlp/down: gate_entropy")
    assert_mistake(DataError, lambda: run_results.read_runs({"a": run}), *named)


@pytest.mark.parametrize("generation", [["v5e"], {}, None])
def test_a_generation_of_a_launch_that_is_no_text(generation):
    assert_mistake(ConfigError, lambda: TpuConfig(generation=generation), "tpu.generation")


def test_a_flag_whose_field_has_odd_characters():
    config = ConfigDict({"mesh": {"rules": ()}})
    for argument in ("mesh.rules\x7f=()", "mesh.=1", "=3", "mesh.rules[0].x=3", "mesh rules=1"):
        with pytest.raises(ConfigError, match=r"no such field|has no fields"):
            cli._check_fields(config, [f"--config.{argument}"])
    cli._check_fields(config, ["--config.mesh.rules[0]=1", "--config.mesh.rules=()"])


@pytest.mark.parametrize("alpha", [10**400, 1e300, "8", True])
def test_alpha_of_a_peft_adapter(alpha, tmp_path):
    targets.make_peft(tmp_path)
    edit(tmp_path / "dora/adapter_config.json", lora_alpha=alpha)
    file = tmp_path / "dora/adapter_config.json"
    assert_mistake_of_any_length(CheckpointError, lambda: targets.load_peft(file.parent), file)


# Data files.


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path / "data"))
    data_files.make_data(tmp_path / "made")
    return tmp_path / "made"


@pytest.mark.parametrize("line", [DEEP, MANY_DIGITS, '{"question": "\\ud800", "answer": "#### 1"}'])
def test_lines_of_a_data_file(line, data):
    path = data / "gsm8k/gsm8k/train.jsonl"
    path.write_text(f"{line}\n" * 3)
    assert_mistake(DataError, lambda: data_files.load_data(data / "gsm8k"), path, "lines 1, 2, 3")


def test_a_cell_without_end(data):
    path = data / "banking77/banking77/train.csv"
    path.write_text('text,category\na,b\n"' + "x" * 200_000)
    assert_mistake(DataError, lambda: data_files.load_data(data / "banking77"), path, "field limit")


@pytest.mark.parametrize("facts", [True, 3, "ab", {"a": 1}, [["a"]]])
def test_facts_that_are_no_list(facts, data):
    path = data / "finqa/finqa/test.json"
    rows = json.loads(path.read_text())
    rows[0]["qa"]["model_input"] = facts
    path.write_text(json.dumps(rows))
    assert_mistake(DataError, lambda: data_files.load_data(data / "finqa"), path, "model_input")


def test_a_program_that_names_a_step_of_thousands_of_digits():
    with pytest.raises(ProgramError, match="no earlier step"):
        execute(f"add(#{MANY_DIGITS}, 1)", [])
