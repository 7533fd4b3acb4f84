"""What users get wrong: each mistake is a SiraError of one line that names what is wrong, and nothing is written or lost."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from safetensors.numpy import save_file

from scripts import assemble
from sira_jax.checkpoints import fingerprint, load_base_model
from sira_jax.errors import CheckpointError, ConfigError, DataError, ModelFileError, SiraError
from sira_jax.training import loop
from sira_jax.training.config import make_experiment
from sira_jax.training.train_state import init_adapter, split_params
from tasks import bfcl
from tests.gguf_models import write_gguf
from tests.hf_models import TINY_LLAMA, tensor_shapes, weights_by_rule, write_folder
from tests.integration.test_whole_run import CONFIG, script

TASK = "cldr_number_en"
SHAPE = {**TINY_LLAMA, "vocab_size": 384, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder without a tokenizer, and one with fewer ids than there are bytes."""
    folder = tmp_path_factory.mktemp("models") / "model"
    write_folder(folder, SHAPE, weights_by_rule(SHAPE))
    few_ids = {**SHAPE, "vocab_size": 96}
    write_folder(folder.with_name("few_ids"), few_ids, weights_by_rule(few_ids))
    return folder


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    """Neither downloaded data nor cached models; returns where they would be."""
    monkeypatch.setenv("SIRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SIRA_DATA_DIR", raising=False)
    return tmp_path / "cache"


def fields(model, **changes):
    """Plain fields of a small experiment; keys are sections, or section__field."""
    config = {
        "model": {"path": str(model)},
        "adapter": {"method": "sira", "rank": 2, "num_experts": 4, "num_selected_experts": 2},
        "data": {
            "tasks": [TASK],
            "vocabulary": "bytes",
            "sequence_length": 128,
            "batch_size": 4,
        },
        "train": {"num_steps": 2},
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            config.setdefault(section, {})[field] = value
        else:
            config[section] = value
    return config


def make_plan(model, **changes):
    return assemble.Plan(make_experiment(fields(model, **changes)))


def contents(folder):
    """Every file below a folder with its bytes; nothing where there is no folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_mistake(error, call, *named):
    """Asserts that the call raises exactly this class with one readable line that has these parts."""
    with pytest.raises(SiraError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 600
    for part in named:
        assert str(part) in message


ALL_STEPS = {"schedule": "linear", "warmup_steps": 3}
CONFIGS = [
    ({"trian": {"num_steps": 5}}, "config='trian' is not allowed", "sections adapter, data"),
    ({"train__stpes": 5}, "train.stpes=5", "num_steps"),
    ({"train__num_steps": "many"}, "train.num_steps='many'", "a whole number of at least 1"),
    ({"train__num_steps": 0}, "train.num_steps=0", "at least 1"),
    ({"optimizer__learning_rate": -1.0}, "optimizer.learning_rate=-1.0", "at least 0"),
    ({"optimizer": ALL_STEPS}, "optimizer.warmup_steps=3", "train.num_steps=2"),
    ({"train__accumulation_steps": 3}, "train.accumulation_steps=3", "data.batch_size=4"),
    ({"train__keep_best": "validation/los"}, "train.keep_best='validation/los'", "validation/loss"),
    ({"mesh": {"data": 7, "tensor": 7}}, "mesh=", "'tensor': 7", "devices at hand"),
    ({"mesh": {"data": -1, "fsdp": -1}}, "mesh=", "at most one axis of -1"),
    ({"adapter": {"rank": 4}}, "adapter.method=None", "one of none, lora, sira"),
    ({"adapter": {"method": "lroa"}}, "adapter.method='lroa'", "one of none, lora, sira"),
    ({"adapter__experts": 8}, "adapter.experts=8", "num_experts"),
    ({"adapter__rank": 2.0}, "adapter.rank=2.0", "a whole number"),
    ({"adapter__num_selected_experts": 9}, "adapter.num_selected_experts=9", "num_experts=4"),
    ({"adapter__targets": ["query"]}, "adapter.targets", "query", "projection"),
    ({"adapter__targets": ["q", "vv"]}, "adapter.targets", "'vv'", "projection"),
    ({"adapter__targets": ["("]}, "adapter.targets='('", "regular expressions"),
    ({"adapter__overrides": {"down": {"rnk": 8}}}, "adapter.overrides['down']", "rnk", "rank"),
    ({"adapter__overrides": {"dwn": {"rank": 8}}}, "adapter.overrides", "'dwn'", "projection"),
    ({"data__template": "chat"}, "template='chat'", "chat_template"),
    ({"data__sequence_length": 257}, "data.sequence_length=257", "256 positions"),
    ({"decode__max_new_tokens": 256}, "decode.max_new_tokens=256", "256 positions"),
    ({"data__tasks": [TASK, TASK]}, "data.tasks=", f"{TASK} is in it twice"),
    ({"model__path": "smollm-135m"}, "model.path='smollm-135m'", "smollm2-135m"),
    ({"model__path": "smollm2-135m"}, "model.path='smollm2-135m'", "download_data.py smollm2-135m"),
    ({"model__path": "bfcl"}, "model.path='bfcl'", "a model"),
]


@pytest.mark.parametrize(("changes", "named"), [(c, named) for c, *named in CONFIGS])
def test_config(changes, named, model, no_cache):
    assert_mistake(ConfigError, lambda: make_plan(model, **changes).load_tasks("train"), *named)
    assert contents(no_cache) == {}


def test_a_vocabulary_with_more_ids_than_the_model(model):
    few_ids = model.with_name("few_ids")
    assert_mistake(ConfigError, lambda: make_plan(few_ids), "data.vocabulary='bytes'", "96", "259")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__tasks": ["cldr_nubmer_en"]}, ("'cldr_nubmer_en'", TASK)),
        ({"data__tasks": ["bfcl_simple"]}, ("BFCL_v4_simple_python.json", "download_data.py bfcl")),
        ({"data__vocabulary": "byte"}, ("vocabulary='byte'", "bytes, sentencepiece:/path")),
        ({"data__vocabulary": "sentencepiece:/none"}, ("/none", "No such file")),
        ({"data__vocabulary": "sentencepiece:{file}"}, ("{file}",)),
        ({"data__vocabulary": "tokenizers:{file}"}, ("{file}", "not a tokenizer")),
        ({"data__sequence_length": 8}, (f"task {TASK}, train example 0", "length=8", "too_long")),
        (
            {"data__sequence_length": 8, "data__too_long": "drop"},
            (f"task {TASK}: none of its", "length=8"),
        ),
    ],
)
def test_data(changes, named, model, tmp_path):
    file = tmp_path / "noise.model"
    file.write_bytes(b"\x80\x02no vocabulary")
    changes = {k: v.format(file=file) if isinstance(v, str) else v for k, v in changes.items()}

    def load():
        plan = make_plan(model, **changes)
        plan.pipeline(*plan.load_tasks("train"))

    assert_mistake(DataError, load, *(part.format(file=file) for part in named))


def test_a_model_without_the_tokenizer_that_is_asked_for(model):
    missing = model / "tokenizer.json"
    assert_mistake(ModelFileError, lambda: make_plan(model, data__vocabulary="model"), missing)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"id": "simple_1", "question": [[{"role": "us', "lines 2"),
        ('{"id": "simple_1", "question": []}', "lines 2"),
        ('{"id": "simple_1", "question": [[]], "function": [{}]}', "line 2: unexpected structure"),
        ('{"id": "simple_7", "question": [[]], "function": [{}]}', "line 2: no answer for id"),
    ],
)
def test_a_damaged_line_of_bfcl(line, named, model, tmp_path, monkeypatch):
    parameters = {"type": "dict", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    good = {
        "id": "simple_0",
        "question": [[{"role": "user", "content": "Double 4."}]],
        "function": [{"name": "double", "description": "", "parameters": parameters}],
    }
    answers = [{"id": f"simple_{i}", "ground_truth": [{"double": {"n": [4]}}]} for i in (0, 1)]
    for name in bfcl.FILES.values():
        (tmp_path / "bfcl/possible_answer").mkdir(parents=True, exist_ok=True)
        (tmp_path / "bfcl" / name).write_text(json.dumps(good) + "\n")
        text = "".join(json.dumps(answer) + "\n" for answer in answers)
        (tmp_path / "bfcl/possible_answer" / name).write_text(text)
    damaged = tmp_path / "bfcl" / bfcl.FILES["bfcl_multiple"]
    damaged.write_text(f"{json.dumps(good)}\n{line}\n")
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path))
    plan = make_plan(model, data__tasks=["bfcl_simple"])
    assert_mistake(DataError, lambda: plan.load_tasks("train"), damaged, named)


@pytest.fixture
def generate():
    """scripts/generate.py; its flags, whose names other scripts use too, are taken back."""
    before = set(flags.FLAGS)
    yield importlib.import_module("scripts.generate")
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    del sys.modules["scripts.generate"]


@pytest.mark.parametrize(
    ("error", "prompts", "named"),
    [
        (DataError, b"", ("--file={file}", "has no prompts")),
        (DataError, b"one\n\nthree\n", ("--file={file}, line 2", "is empty")),
        (DataError, b"one\ncaf\xe9\n", ("--file={file}", "UTF-8", "byte 7")),
        (DataError, None, ("--file={file}", "No such file")),
    ],
)
def test_prompts(error, prompts, named, generate, tmp_path):
    file = tmp_path / "prompts.txt"
    if prompts is not None:
        file.write_bytes(prompts)
    flags.FLAGS(["generate.py", f"--file={file}"])
    assert_mistake(error, lambda: generate.main([]), *(part.format(file=file) for part in named))


def cut(name, size):
    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return damage


def tensors(**changes):
    """Rewrites the weights with other tensors; None leaves one out, "_" stands for a dot."""

    def damage(folder):
        shapes = tensor_shapes(SHAPE) | {n.replace("_", "."): s for n, s in changes.items()}
        arrays = {n: np.zeros(s, np.float32) for n, s in shapes.items() if s is not None}
        save_file(arrays, folder / "model.safetensors")

    return damage


def config_json(**changes):
    def damage(folder):
        (folder / "config.json").write_text(json.dumps(SHAPE | changes))

    return damage


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def gguf_file(name="llama", size=None):
    """Writes small.gguf of an architecture, cut after `size` bytes."""

    def damage(folder):
        shape = {**SHAPE, "num_hidden_layers": 1}
        write_gguf(folder / "small.gguf", shape | {"model_type": name}, weights_by_rule(shape))
        if size:
            cut("small.gguf", size)(folder)

    return damage


HEADER_BEYOND = (1 << 20).to_bytes(8, "little") + b"{}"
SHARDS = json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
MODELS = [
    (".", shutil.rmtree, "{path}: no such file or folder"),
    (".", cut("model.safetensors", 5000), "model.safetensors: truncated"),
    (".", write("model.safetensors", HEADER_BEYOND), "model.safetensors", "1048576 goes beyond"),
    (".", tensors(model_norm_weight=None), "missing tensors: model.norm.weight"),
    (".", tensors(model_rope_weight=(3,)), "unexpected tensors: model.rope.weight"),
    (".", tensors(model_norm_weight=(31,)), "model.norm.weight is (31,), expected (32,)"),
    (".", rename("model.safetensors", "pytorch_model.bin"), "only in pytorch_model.bin, a pickle"),
    (".", rename("model.safetensors", "weights"), "no weights", "model.safetensors"),
    (".", rename("config.json", "config"), "config.json: no such file"),
    (".", write("config.json", b'{"model_type": "lla'), "config.json: not valid JSON"),
    (".", config_json(model_type="gpt2"), "config.json: model_type='gpt2'", "llama, mistral"),
    (".", config_json(num_attention_heads=0), "config.json: num_attention_heads=0", "over 0"),
    (".", config_json(rope_scaling={"rope_type": "yarn"}), "rope_scaling.rope_type='yarn'"),
    ("config.json", lambda folder: None, "config.json: neither a GGUF file nor a folder"),
    ("small.gguf", gguf_file(size=20), "small.gguf: truncated"),
    ("small.gguf", gguf_file(size=900), "small.gguf: truncated"),
    ("small.gguf", gguf_file(size=20000), "small.gguf: truncated: tensor"),
    ("small.gguf", write("small.gguf", b"GGML\3\0\0\0"), "small.gguf: not a GGUF file", "GGML"),
    ("small.gguf", gguf_file("mamba"), "general.architecture='mamba'", "llama, qwen2"),
]


@pytest.mark.parametrize(("name", "damage", "named"), [(n, d, named) for n, d, *named in MODELS])
def test_model_file(name, damage, named, model, tmp_path, no_cache):
    folder = shutil.copytree(model, tmp_path / "damaged")
    damage(folder)
    path = folder / name
    before = contents(folder)
    named = [part.format(path=path) for part in named]
    assert_mistake(ModelFileError, lambda: load_base_model(path), folder, *named)
    assert contents(folder) == before
    assert contents(no_cache) == {}


def test_a_shard_that_is_not_there(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "sharded")
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(SHARDS)
    named = ("model-00001-of-00002.safetensors", "No such file")
    assert_mistake(ModelFileError, lambda: load_base_model(folder), *named)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A run directory with a checkpoint of step 2; (plan, frozen parameters, directory)."""
    plan = make_plan(model)
    frozen = split_params(plan.load_base().params)[1]
    workdir = tmp_path_factory.mktemp("run") / "run"
    config = plan.experiment.to_dict()
    meta = {"config": config, "base_fingerprint": fingerprint(frozen)}
    checkpointer = loop.make_checkpointer(workdir, plan.experiment)
    adapter = init_adapter(plan.model(0), 0)
    checkpointer.save(2, adapter, {"step": np.int32(2)}, {"data": {}}, meta)
    checkpointer.close()
    (workdir / "config.json").write_text(json.dumps(meta))
    return plan, frozen, workdir


def cut_arrays(step):
    """Halves the largest file of the adapter's arrays."""
    largest = max((step / "adapter").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def edit_meta(change):
    def damage(step):
        meta = json.loads((step / "meta/metadata").read_text())
        change(meta)
        (step / "meta/metadata").write_text(json.dumps(meta))

    return damage


CHECKPOINTS = [
    (lambda step: shutil.rmtree(step.parent), "latest", "--workdir={workdir}: has no checkpoints"),
    (shutil.rmtree, "latest", "{workdir}/checkpoints: has no whole checkpoint"),
    (cut_arrays, "latest", "{step}: cannot be restored"),
    (lambda step: shutil.rmtree(step / "adapter"), "latest", "{step}: cannot be restored"),
    (cut("meta/metadata", 40), "best", "{step}: cannot be restored"),
    (write("meta/metadata", b""), "best", "{step}: cannot be restored"),
    (edit_meta(dict.clear), "best", "{step}"),
    (edit_meta(lambda m: m.update(base_fingerprint="ab12")), "best", "{step}: was trained on", "ab12"),
    (
        edit_meta(lambda m: m["config"]["adapter"].update(rank=4)),
        "2",
        "{step}: was started with adapter.rank=4, the config has 2",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "which", "named"), [(d, w, n) for d, w, *n in CHECKPOINTS])
def test_checkpoint(damage, which, named, run, tmp_path):
    plan, frozen, unharmed = run
    workdir = shutil.copytree(unharmed, tmp_path / "run")
    step = workdir / "checkpoints/2"
    damage(step)
    before = contents(workdir)

    def restore():
        assemble.restore_adapter(plan, plan.model(0), frozen, str(workdir), which)

    named = [part.format(workdir=workdir, step=step) for part in named]
    assert_mistake(CheckpointError, restore, *named)
    assert contents(workdir) == before


@pytest.mark.parametrize("which", ["3", "newest", "²"])
def test_unknown_step(which, run):
    plan, frozen, workdir = run
    before = contents(workdir)

    def restore():
        assemble.restore_adapter(plan, plan.model(0), frozen, str(workdir), which)

    assert_mistake(ConfigError, restore, f"--checkpoint='{which}'", "best, latest", "steps 2")
    assert contents(workdir) == before


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "--workdir={workdir}"),
        (b"", "{workdir}/config.json"),
        (b'{"config": {"model": {"pa', "{workdir}/config.json"),
        (b'{"config": "\xe9"}', "{workdir}/config.json"),
        (b"[]", "{workdir}/config.json"),
        (b'{"config": {"train": {}}}', "config.model is missing"),
    ],
)
def test_config_of_a_run(text, named, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    before = contents(tmp_path)
    named = named.format(workdir=tmp_path)
    assert_mistake(ConfigError, lambda: assemble.read_experiment(None, str(tmp_path)), named)
    assert contents(tmp_path) == before
