"""What the commands of scripts/convert.py share: a folder that appears whole, the printed mapping, adapters with their base."""

import contextlib
import dataclasses
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts import assemble
from sira_jax.adapters import AdapterConfig
from sira_jax.checkpoints import (
    BaseModel,
    adapter_file,
    fingerprint,
    load_base_model,
)
from sira_jax.errors import CheckpointError, ConfigError, check
from sira_jax.models import make_model
from sira_jax.training import loop, partitioning
from sira_jax.training.config import MeshConfig

# What a conversion may have written, and --force may delete.
_WRITTEN = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|config\.json|generation_config\.json"
    r"|tokenizer(_config)?\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


def check_out(out: str, force: bool) -> Path:
    """The absolute path of OUT.

    Raises:
      ConfigError: something is there that may not be replaced.
    """
    path = Path(os.path.abspath(out))
    if not os.path.lexists(path):
        return path
    if path.is_symlink() or not path.is_dir():
        raise ConfigError(f"OUT={out}: is there already, and is no folder")
    if not force:
        raise ConfigError(f"OUT={out}: is there already; --force replaces it")
    other = [name for name in sorted(os.listdir(path)) if not _WRITTEN.fullmatch(name)]
    if other:
        raise ConfigError(
            f"OUT={out}: holds {other[0]}, which no conversion writes: --force would delete it; take another folder"
        )
    return path


@contextlib.contextmanager
def new_folder(out: str, force: bool) -> Iterator[Path]:
    """A folder beside OUT that takes its place when the block ends without an error, and is deleted otherwise.

    Raises:
      ConfigError: see check_out.
      CheckpointError: it cannot be written.
    """
    path = check_out(out, force)
    token = uuid.uuid4().hex
    temporary, old = (path.with_name(f".{path.name}.{token}.{end}") for end in ("tmp", "old"))
    new_parents = [parent for parent in path.parents if not parent.exists()]
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"OUT={out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            os.rename(old, path)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # not empty: OUT is there
                parent.rmdir()


def print_mapping(pairs: Iterable[tuple[str, str]]) -> None:
    """Prints a line for each pair of a source and a target; layers that differ in their number alone share one."""

    def without_layer(text: str) -> str:
        return re.sub(r"\b(layers[._/]|blk\.)\d+\b", r"\1*", text)

    counts = Counter((without_layer(source), without_layer(target)) for source, target in pairs)
    for (source, target), count in counts.items():
        print(f"{source} -> {target}" + (f"  ({count} times)" if count > 1 else ""))


def by_module(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name up to its module -> what it holds, for tensors of our adapter format and of PEFT's."""
    modules: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        module, leaf = re.fullmatch(
            r"(.*_proj|layers\.\d+(?:\.\w+){2}|layers\.\d+\.\w+)\.(.*)", name
        ).groups()
        modules.setdefault(module, []).append(f"{leaf} {shape}")
    return {module: ", ".join(leaves) for module, leaves in modules.items()}


def find_model(path: str, what: str) -> str:
    """`assemble.find_model` of an argument that is called `what`."""
    try:
        return assemble.find_model(path)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", what, 1)) from None


@dataclasses.dataclass(frozen=True)
class Adapted:
    """An adapter and the base it belongs to.

    Attributes:
      config: of the adapter.
      params: its tree, in the base's layout.
      base: with its parameters.
      base_path: where the base is.
      origin: what was read, for people.
    """

    config: AdapterConfig
    params: dict[str, Any]
    base: BaseModel
    base_path: str
    origin: str


def load_adapted(source: str, base: str | None, checkpoint: str | None) -> Adapted:
    """The adapter of a run directory or of an adapter folder, with its base.

    Args:
      source: a run directory, or a folder of our adapter format.
      base: path of the base; None for the run's own model.path.
      checkpoint: of a run: best (the default), latest or a step.

    Raises:
      SiraError: it is neither, it is damaged, or the base is another one.
    """
    if not os.path.isdir(source):
        raise ConfigError(f"RUN_OR_FOLDER={source}: no such folder")
    if os.path.exists(os.path.join(source, adapter_file.CONFIG)):
        check(checkpoint is None, "--checkpoint", checkpoint, "not with an adapter folder")
        return _load_folder(source, base)
    if not os.path.exists(os.path.join(source, loop.CONFIG_FILE)):
        raise ConfigError(
            f"RUN_OR_FOLDER={source}: is neither a run directory, which has {loop.CONFIG_FILE}, nor an adapter folder,"
            f" which has {adapter_file.CONFIG}"
        )
    experiment = assemble.read_experiment(None, source)
    if experiment.adapter is None:
        raise ConfigError(f"RUN_OR_FOLDER={source}: adapter.method='none': there is no adapter")
    base_path = find_model(base, "--base") if base else assemble.find_model(experiment.model.path)
    # Not the run's own mesh: this machine may have other devices.
    mesh = partitioning.make_mesh(MeshConfig())
    loaded = assemble.load_base(base_path, experiment.model, mesh)
    model = make_model(loaded.config, experiment.adapter)
    params, step = assemble.restore_adapter(
        experiment, mesh, model, loaded.params, source, checkpoint or "best"
    )
    return Adapted(experiment.adapter, params, loaded, base_path, f"{source}, step {step}")


def _load_folder(source: str, base: str | None) -> Adapted:
    header = adapter_file.read_header(source)
    if base is None:
        raise ConfigError(
            f"RUN_OR_FOLDER={source}: an adapter folder does not say where its base is; give --base"
        )
    base_path = find_model(base, "--base")
    loaded = load_base_model(base_path, param_dtype=header.param_dtype)
    config, params = adapter_file.load_adapter(source, loaded.config, fingerprint(loaded.params))
    return Adapted(config, params, loaded, base_path, source)
