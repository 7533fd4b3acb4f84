"""What is fuzzed: for each format, how a small sound file is made and how it is read as the scripts do."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from tests import stories260k
from tests.fuzz import adapter_files, config_files, data_files, model_files, tokenizer_files


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
        several(
            llama=model_files.make_llama,
            sharded=model_files.make_sharded,
            gemma3=model_files.make_gemma3,
        ),
        model_files.load_model,
    ),
    "safetensors_t5": Target(
        several(t5=model_files.make_t5, umt5=model_files.make_umt5), model_files.load_model
    ),
    "gguf": Target(
        several(
            bpe=model_files.make_gguf,
            gemma=model_files.make_gguf_gemma,
            rope=model_files.make_gguf_rope,
        ),
        model_files.load_gguf,
    ),
    "t5x": Target(
        several(apart=model_files.make_t5x, scanned=model_files.make_t5x_scanned),
        model_files.load_t5x,
        in_suite=15,
    ),
    "adapter": Target(adapter_files.make_adapters, adapter_files.load_one_adapter),
    "peft": Target(adapter_files.make_peft, adapter_files.load_peft),
    "tokenizer_json": Target(
        tokenizer_files.make_json_tokenizers, tokenizer_files.load_json_tokenizer
    ),
    "spiece": Target(tokenizer_files.make_spieces, tokenizer_files.load_spiece),
    "run_config": Target(
        config_files.make_run_configs, config_files.load_run_config, names_file=False
    ),
    "sweep_plan": Target(one(config_files.make_sweep_plan), config_files.load_sweep_plan),
    "sweep_file": Target(
        one(config_files.make_sweep_file), config_files.load_sweep_file, names_file=False
    ),
    "results": Target(one(config_files.make_results), config_files.load_results),
    "launch_config": Target(
        one(config_files.make_launch_config), config_files.load_launch_config, names_file=False
    ),
    "flags": Target(config_files.make_flags, config_files.load_flags, names_file=False),
    "data": Target(data_files.make_data, data_files.load_data),
}


def real_targets() -> dict[str, Target]:
    """Those whose files are on this machine."""
    found = {}
    if stories260k.is_there():
        found["stories260k"] = Target(one(model_files.make_stories260k), model_files.load_model)
    if os.path.exists(model_files.smollm2_path()):
        found["smollm2"] = Target(one(model_files.make_smollm2), model_files.load_smollm2)
    if data_files.real_folders():
        found["real_data"] = Target(data_files.make_real_data, data_files.load_real_data)
    return found
