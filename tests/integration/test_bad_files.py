"""Damaged or wrong model files and run directories: each is a SiraError of one line, and nothing is written or lost."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from scripts import assemble
from sira_jax.checkpoints import checksums, fingerprint, load_base_model
from sira_jax.errors import CheckpointError, ConfigError, ModelFileError
from sira_jax.training import loop
from sira_jax.training.train_state import init_adapter, split_params
from tests.gguf_models import write_gguf
from tests.hf_models import tensor_shapes, weights_by_rule
from tests.integration.mistakes import SHAPE, assert_mistake, contents, make_plan

pytestmark = pytest.mark.usefixtures("no_cache")


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
    named = ("model-00001-of-00002.safetensors", "no such file")
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
        # Not damage, but another run's.
        checksums.write(step)

    return damage


CHECKPOINTS = [
    (lambda step: shutil.rmtree(step.parent), "latest", "--workdir={workdir}: has no checkpoints"),
    (shutil.rmtree, "latest", "{workdir}/checkpoints: has no whole checkpoint"),
    (cut_arrays, "latest", "{step}: is damaged: "),
    (lambda step: shutil.rmtree(step / "adapter"), "latest", "{step}: is damaged: "),
    (cut("meta/metadata", 40), "best", "{step}: is damaged: "),
    (write("adapter/manifest.ocdbt", b""), "latest", "{step}: is damaged: "),
    (write("meta/metadata", b""), "best", "{step}: is damaged: "),
    (edit_meta(dict.clear), "best", "{step}"),
    (edit_meta(lambda m: m.update(base_fingerprint="ab12")), "best", "{step}: was trained on", "ab12"),
    (
        edit_meta(lambda m: m["config"]["adapter"].update(rank=4)),
        "2",
        "{step}: was started with adapter.rank=4, the config has 2",
    ),
]  # fmt: skip


# Threads that read arrays must not write stack traces beside the message.
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("damage", "which", "named"), [(d, w, n) for d, w, *n in CHECKPOINTS])
def test_checkpoint(damage, which, named, run, tmp_path):
    plan, frozen, unharmed = run
    workdir = shutil.copytree(unharmed, tmp_path / "run")
    step = workdir / "checkpoints/2"
    damage(step)
    before = contents(workdir)

    def restore():
        assemble.restore_adapter(
            plan.experiment, plan.mesh, plan.model(0), frozen, str(workdir), which
        )

    named = [part.format(workdir=workdir, step=step) for part in named]
    assert_mistake(CheckpointError, restore, *named)
    assert contents(workdir) == before


@pytest.mark.parametrize("which", ["3", "newest", "²"])
def test_unknown_step(which, run):
    plan, frozen, workdir = run
    before = contents(workdir)

    def restore():
        assemble.restore_adapter(
            plan.experiment, plan.mesh, plan.model(0), frozen, str(workdir), which
        )

    assert_mistake(ConfigError, restore, f"--checkpoint='{which}'", "best, latest", "steps 2")
    assert contents(workdir) == before


def test_an_adapter_without_a_run(run):
    plan, frozen, _ = run

    def restore():
        assemble.restore_adapter(plan.experiment, plan.mesh, plan.model(0), frozen, "", "best")

    assert_mistake(ConfigError, restore, "--workdir=DIR is needed")


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
