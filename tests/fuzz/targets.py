"""What is fuzzed: for each format, how a small sound file is made and how it is read as the scripts do."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from gguf import GGMLQuantizationType as Kind

import tasks
from scripts import assemble, cli, run_results, sweep_plan, table_cells
from scripts.launch.config import make_launch
from scripts.launch.targets import TARGETS as LAUNCHERS
from sira_jax import json_text
from sira_jax.adapters import METHODS
from sira_jax.checkpoints import load_base_model, peft, read_base_model, t5x
from sira_jax.checkpoints.adapter_file import abstract_adapter, load_adapter, save_adapter
from sira_jax.checkpoints.gguf_header import read_header
from sira_jax.checkpoints.t5_tokenizer import tokenizer_from_spiece
from sira_jax.checkpoints.tokenizer import tokenizer_from_gguf
from sira_jax.errors import ConfigError
from sira_jax.files import read_bytes
from sira_jax.models import ModelConfig, make_model
from sira_jax.training.config import make_experiment
from sira_jax.training.train_state import abstract_params
from tasks.download import cache_root
from tests import make_stories260k as make_stories
from tests import stories260k
from tests.adapters.test_every_method import make
from tests.checkpoints import spiece, t5x_files
from tests.fuzz import data_files
from tests.gguf_models import tokenizer_fields, write_gguf
from tests.hf_models import (
    LLAMA3_ROPE,
    TINY_GEMMA2,
    TINY_GEMMA3,
    TINY_LLAMA,
    TINY_QWEN2,
    weights_by_rule,
    write_folder,
)
from tests.hf_t5_models import TINY_T5, TINY_T5S, t5_weights_by_rule
from tests.integration.mistakes import fields
from tests.scripts import flagged, synthetic_runs
from tests.tiny import decoder_config, decoder_params, draw
from tests.tiny_t5 import t5_config

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 12, "vocab_size": 16}
TEXT = "hello world, 123 times\n日本 <extra_id_0>"
BASE = "0123456789abcdef" * 4


@dataclasses.dataclass(frozen=True)
class Target:
    """One format.

    Attributes:
      make: writes folders of sound files, each a case of its own, into an empty folder.
      load: reads one of them, wherever it is by then, and raises AssertionError if what it got does not agree with itself.
      names_file: the error must name a file of the folder; otherwise it names a field.
      in_suite: cases of the ordinary suite.
    """

    make: Callable[[Path], None]
    load: Callable[[Path], None]
    names_file: bool = True
    in_suite: int = 40


def check_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
    """Asserts that parameters have the shapes that the model itself would make."""
    found = jax.tree.map(lambda x: tuple(x.shape), params)
    assert found == _model_shapes(config), "parameters do not have the shapes of the config"


@functools.lru_cache(maxsize=256)
def _model_shapes(config: ModelConfig) -> Any:
    shapes = nn.unbox(abstract_params(make_model(config)))
    return jax.tree.map(lambda x: tuple(x.shape), shapes)


def use_tokenizer(model: Any) -> None:
    """Encodes and decodes as training and generation do, where the model has a tokenizer; ids must be whole numbers."""
    special = model.special
    for index in (special.bos_id, special.pad_id, *special.eos_ids):
        assert index is None or (type(index) is int and 0 <= index < model.config.vocab_size), (
            special
        )
    if model.tokenizer_json is None:  # it is asked for only where it is needed
        assert model.source in model.tokenizer_error
        return
    vocabulary = assemble._make_vocabulary("model", model)
    vocabulary.decode(vocabulary.encode(TEXT))
    if model.chat_template is not None:
        template = tasks.make_template(
            "chat", chat_template=model.chat_template, origin=model.source
        )
        template.render("x")


def load_model(path: Path, **options: Any) -> None:
    described = read_base_model(path)
    model = load_base_model(path, **options)
    assert model.config == described.config
    check_params(model.config, model.params)
    use_tokenizer(model)


# Hugging Face folders.


def bpe_tokenizer() -> str:
    """A byte-level tokenizer.json, as a GGUF file has it."""
    return tokenizer_from_gguf("", tokenizer_fields("llama-bpe"))


def make_llama(folder: Path) -> None:
    shape = {**TINY_LLAMA, **SMALL, "vocab_size": 272, "rope_scaling": LLAMA3_ROPE}
    write_folder(folder, shape, weights_by_rule(shape))
    (folder / "tokenizer.json").write_text(bpe_tokenizer())
    template = "{% for m in messages %}{{ bos_token }}{{ m['content'] | trim }}{% endfor %}"
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(ids))


def make_sharded(folder: Path) -> None:
    shape = {**TINY_QWEN2, **SMALL, "use_sliding_window": True, "max_window_layers": 1}
    write_folder(folder, shape, weights_by_rule(shape), num_shards=2)


def make_gemma3(folder: Path) -> None:
    shape = {**TINY_GEMMA3, **SMALL, "layer_types": ["sliding_attention", "full_attention"]}
    weights = {f"language_model.{name}": array for name, array in weights_by_rule(shape).items()}
    write_folder(folder, {"model_type": "gemma3", "text_config": shape}, weights)


def make_t5(folder: Path) -> None:
    shape = {
        **TINY_T5,
        "d_model": 8,
        "d_ff": 12,
        "d_kv": 4,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "vocab_size": 256,
    }
    write_folder(folder, shape, t5_weights_by_rule(shape))
    (folder / "spiece.model").write_bytes(spiece.train())
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 100}))


def make_umt5(folder: Path) -> None:
    shape = {**TINY_T5S["umt5"], "d_model": 8, "d_ff": 12, "d_kv": 4, "vocab_size": 384}
    write_folder(folder, shape, t5_weights_by_rule(shape), num_shards=3)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))


# GGUF files.


def make_gguf(folder: Path) -> None:
    shape = {**TINY_LLAMA, **SMALL, "vocab_size": 272}
    write_gguf(
        folder / "m.gguf", shape, weights_by_rule(shape), metadata=tokenizer_fields("smollm")
    )


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


def make_gguf_gemma(folder: Path) -> None:
    shape = {**TINY_GEMMA2, **SMALL, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 32}
    kinds = {
        "mlp.gate": Kind.Q8_0,
        "mlp.down": Kind.Q4_0,
        "v_proj": Kind.Q4_1,
        "embed": Kind.F16,
        "mlp.up": Kind.BF16,
    }
    write_gguf(folder / "m.gguf", shape, weights_by_rule(shape), kinds=kinds, metadata=spm_fields())


def make_gguf_rope(folder: Path) -> None:
    """Few fields, so that each has its turn."""
    shape = {**TINY_LLAMA, **SMALL, "tie_word_embeddings": True}
    extra = {"rope_freqs.weight": np.ones(1, np.float32)}
    write_gguf(
        folder / "m.gguf",
        shape,
        weights_by_rule(shape),
        extra=extra,
        metadata={
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 2.0,
            "llama.rope.scaling.original_context_length": 64,
            "llama.rope.dimension_count": 2,
            "llama.expert_count": 0,
            "general.alignment": 32,
        },
    )


def load_gguf(folder: Path) -> None:
    load_model(folder / "m.gguf", cache_dir=str(folder.parent / "cache"))


# Checkpoints of T5X.

T5X_CONFIG = t5_config(
    emb_dim=4, vocab_size=130, num_encoder_layers=1, num_decoder_layers=2, scan_layers=False
)
T5X_SCANNED = dataclasses.replace(T5X_CONFIG, scan_layers=True, relpos_per_layer=True)


def make_t5x(folder: Path) -> None:
    weights = t5x_files.t5x_weights(T5X_CONFIG)
    inline = {path for path in weights if "scale" in path or "value" in path}
    t5x_files.write_checkpoint(folder / "checkpoint_7", weights, inline=inline)
    (folder / "spiece.model").write_bytes(spiece.train())


def make_t5x_scanned(folder: Path) -> None:
    weights = t5x_files.t5x_weights(T5X_SCANNED, scanned=True)
    inline = {path for path in weights if "mlp" not in path}
    t5x_files.write_checkpoint(folder / "checkpoint_7", weights, inline=inline)
    (folder / "spiece.model").write_bytes(spiece.train())


def load_t5x(folder: Path) -> None:
    config = T5X_SCANNED if folder.name == "scanned" else T5X_CONFIG
    model = t5x.load_t5x(folder, config, spiece=folder / "spiece.model")
    check_params(config, model.params)
    use_tokenizer(model)


# Adapters.

DECODER = decoder_config()


def make_adapters(folder: Path) -> None:
    for method in METHODS:
        config = make(method)
        tree = _drawn(config)
        save_adapter(folder / method, config, tree, DECODER, BASE)


def _drawn(config: Any, model_config: ModelConfig = DECODER) -> Any:
    return draw(abstract_adapter(config, model_config), seed=3)


def check_adapter(config: Any, tree: Any) -> None:
    expected = jax.tree.map(lambda x: tuple(x.shape), abstract_adapter(config, DECODER))
    assert jax.tree.map(lambda x: tuple(x.shape), tree) == expected


def load_one_adapter(folder: Path) -> None:
    check_adapter(*load_adapter(folder, DECODER, BASE))


@functools.cache
def base_params() -> Any:
    return decoder_params(make_model(DECODER))


def make_peft(folder: Path) -> None:
    overrides = {"down": {"rank": 3}, "q": {"alpha": 2.5}}
    for method in ("lora", "dora"):
        fields = {"rank": 2, "targets": ["q", "down", "gate"], "overrides": overrides}
        config = dataclasses.replace(make(method), **fields)
        peft.save_peft(folder / method, config, _drawn(config), DECODER, base_params())


def load_peft(folder: Path) -> None:
    check_adapter(*peft.load_peft(folder, DECODER, base_params()))


# Tokenizers by data.vocabulary.


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


# Configs.


def _experiment(**changes: Any) -> dict[str, Any]:
    return make_experiment(fields("m.gguf", **changes)).to_dict()


def load_run_config(folder: Path) -> None:
    experiment = assemble.read_experiment(None, str(folder))
    assert make_experiment(json.loads(json.dumps(experiment.to_dict()))) == experiment


def make_run_configs(folder: Path) -> None:
    """A run directory of each method."""
    for method in METHODS:
        path = folder / method
        path.mkdir()
        adapter = json.loads(json.dumps(make(method).to_dict()))
        config = _experiment(adapter=adapter, mesh={"rules": [["embed", ["data", "fsdp"]]]})
        (path / "config.json").write_text(json.dumps({"config": config, "base_fingerprint": BASE}))


def make_sweep_plan(folder: Path) -> None:
    runs = [
        {
            "name": f"a/rank={rank}",
            "config": "configs/base.py",
            "overrides": {"adapter.rank": rank},
            "experiment": _experiment(),
        }
        for rank in (1, 2)
    ]
    plan = {"sweep": "sweep.py", "runs": runs, "same": {"b": "a/rank=1"}}
    (folder / "sweep.json").write_text(json.dumps(plan))


def load_sweep_plan(folder: Path) -> None:
    sweep = sweep_plan.load_sweep(folder)
    for run in sweep.runs:
        assert run.directory.resolve().is_relative_to(folder.resolve()), run.directory
        run.is_done()
        run.failure()


def make_results(folder: Path) -> None:
    """A comparison's plan, and a run with all that the reports read."""
    run = synthetic_runs.make_run(folder / "run", routers=True)
    experiment = _experiment(evaluate={"split": "test"})
    (run / "config.json").write_text(json.dumps({"config": experiment}))
    path = run / "evaluation_test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"experiment": experiment}))
    (run / "checkpoints/20").mkdir(parents=True)
    (run / "checkpoints/20/_").touch()
    plan = {"settings": {"metric": "f1"}, "runs": {"sira": [[0, experiment]]}}
    (folder / "plan.json").write_text(json.dumps(plan))


def load_results(folder: Path) -> None:
    run_results.read_runs({"one": folder / "run"})
    trials = table_cells.find_trials([folder])
    assert all(trial.run is not None or trial.reason for trial in trials)


def make_sweep_file(folder: Path) -> None:
    """A sweep file whose runs are in a JSON file, so that they are changed as JSON is."""
    runs = [
        {"adapter.rank": 2, "train.seed": 1, "name": "a"},
        {"optimizer.learning_rate": 0.1, "data.tasks": ["cldr_all"]},
    ]
    (folder / "runs.json").write_text(
        json.dumps({"runs": runs, "config": "configs/experiments/starter.py:sira"})
    )
    (folder / "sweep.py").write_text(
        "from pathlib import Path\n"
        "from sira_jax import files, json_text\n"
        "CONTENT = json_text.parse(files.read_bytes(Path(__file__).parent / 'runs.json'))\n"
        "CONFIG = CONTENT['config']\n"
        "def get_sweep():\n    return CONTENT['runs']\n"
    )


def load_sweep_file(folder: Path) -> None:
    sweep = sweep_plan.read_sweep(str(folder / "sweep.py"), folder / "out")
    sweep_plan.save_sweep(folder / "out", sweep)
    again = sweep_plan.load_sweep(folder / "out")
    assert [run.experiment for run in again.runs] == [run.experiment for run in sweep.runs]


def make_launch_config(folder: Path) -> None:
    from configs.launch import starter

    content = starter.get_config().to_dict()
    content["job"] |= {
        "output": "gs://bucket/runs", "image": "host/image:1", "checkout": "/home/x/sira", "repository": "https://x/y.git",
        "env": {"A": "b"}, "sweep": [["--config.train.seed=1"], ["--config.train.seed=2"]],
    }  # fmt: skip
    (folder / "launch.json").write_text(json.dumps(content))


def load_launch_config(folder: Path) -> None:
    try:
        content = json_text.parse(read_bytes(folder / "launch.json"))
    except (OSError, ValueError):
        return  # a launch config is a Python file: only the values are of interest
    if not isinstance(content, dict):
        return
    config = make_launch(content)
    refusals = []
    for render in LAUNCHERS.values():  # not every launch is for every target
        try:
            render(config)
        except ConfigError as error:
            refusals.append(error)
    if len(refusals) == len(LAUNCHERS):
        raise refusals[0]


def make_flags(folder: Path) -> None:
    """Arguments of train.py, one a file, so that each is changed alone."""
    arguments = [
        "--config=configs/experiments/starter.py:sira", "--config.train.num_steps=30", "--config.model.path=x",
        "--config.optimizer.learning_rate=1e-3", "--config.data.tasks=cldr_all,bfcl", "--config.data.pack=false",
        "--config.optimizer.clip_norm=None", "--config.adapter.targets=('q', 'v')", "--config.mesh.rules=()",
    ]  # fmt: skip
    (folder / "one").mkdir()
    (folder / "one/flags.json").write_text(json.dumps(arguments))


def load_flags(folder: Path) -> None:
    """Parses as train.py does."""
    try:
        arguments = json_text.parse(read_bytes(folder / "flags.json"))
    except (OSError, ValueError):
        return  # how the arguments are kept here is nothing of ours
    if not isinstance(arguments, list) or any(
        type(one) is not str or "\0" in one for one in arguments
    ):
        return
    argv, shown = ["train.py", *arguments], io.StringIO()
    before = sys.argv
    sys.argv = argv  # ml_collections looks there for the fields
    try:
        with flagged.imported("train") as train:
            with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
                cli._parse(argv)
            if train.CONFIG.value is not None:
                make_experiment(train.CONFIG.value.to_dict())
    except SystemExit as error:
        if error.code == cli.USER_ERROR:
            raise ConfigError(shown.getvalue().rstrip("\n")) from None
        if error.code:  # 0 is that of --help
            raise
    finally:
        sys.argv = before


def one(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Of a format with one folder of files."""

    def write(folder: Path) -> None:
        (folder / "one").mkdir()
        make(folder / "one")

    return write


def several(**makes: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, write_one in makes.items():
            (folder / name).mkdir()
            write_one(folder / name)

    return write


TARGETS: Mapping[str, Target] = {
    "safetensors": Target(
        several(llama=make_llama, sharded=make_sharded, gemma3=make_gemma3), load_model
    ),
    "safetensors_t5": Target(several(t5=make_t5, umt5=make_umt5), load_model),
    "gguf": Target(several(bpe=make_gguf, gemma=make_gguf_gemma, rope=make_gguf_rope), load_gguf),
    "t5x": Target(several(apart=make_t5x, scanned=make_t5x_scanned), load_t5x),
    "adapter": Target(make_adapters, load_one_adapter),
    "peft": Target(make_peft, load_peft),
    "tokenizer_json": Target(make_json_tokenizers, load_json_tokenizer),
    "spiece": Target(make_spieces, load_spiece),
    "run_config": Target(make_run_configs, load_run_config, names_file=False),
    "sweep_plan": Target(one(make_sweep_plan), load_sweep_plan),
    "sweep_file": Target(one(make_sweep_file), load_sweep_file, names_file=False),
    "results": Target(one(make_results), load_results),
    "launch_config": Target(one(make_launch_config), load_launch_config, names_file=False),
    "flags": Target(make_flags, load_flags, names_file=False),
    "data": Target(data_files.make_data, data_files.load_data),
}


# True files, where they are.


def make_stories260k(folder: Path) -> None:
    make_stories.write(folder)


def make_smollm2(folder: Path) -> None:
    """The header alone; `load_smollm2` makes the file as long as it was."""
    header = read_header(_smollm2())
    start = min(tensor.offset for tensor in header.tensors.values())
    with open(_smollm2(), "rb") as file:
        (folder / "m.gguf").write_bytes(file.read(start))


def _smollm2() -> str:
    return str(cache_root() / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf")


def load_smollm2(folder: Path) -> None:
    path = folder / "m.gguf"
    if path.is_file() and not path.is_symlink():
        os.truncate(path, os.path.getsize(_smollm2()))  # zeros, which take no room
    use_tokenizer(read_base_model(path))


def real_targets() -> dict[str, Target]:
    """Those whose files are on this machine."""
    found = {}
    if stories260k.is_there():
        found["stories260k"] = Target(one(make_stories260k), load_model)
    if os.path.exists(_smollm2()):
        found["smollm2"] = Target(one(make_smollm2), load_smollm2)
    if data_files.real_folders():
        found["real_data"] = Target(data_files.make_real_data, data_files.load_real_data)
    return found
