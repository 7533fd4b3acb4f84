"""Finding and loading the base model of an experiment."""

import os

import jax

from sira_jax.checkpoints import BaseModel, load_base_model, read_base_model
from sira_jax.errors import ConfigError, check
from sira_jax.models import make_model
from sira_jax.training import partitioning
from sira_jax.training.axis_rules import Rules
from sira_jax.training.config import ModelSource
from sira_jax.training.train_state import abstract_params
from tasks import download


def find_model(path: str) -> str:
    """The file or folder of `model.path`, which may be a name that scripts/download_data.py knows.

    Raises:
      ConfigError: there is no such file or name, or the named model is not downloaded.
    """
    if path in download.PACKAGES:
        package = download.PACKAGES[path]
        folder = download.cache_root() / path
        files = [name for name in package.members.values() if name.endswith(".gguf")]
        check(bool(files), "model.path", path, "a model")
        if not download.is_complete(folder, package):
            raise ConfigError(
                f"model.path={path!r} is not downloaded: run `python scripts/download_data.py {path}`"
            )
        return str(folder / files[0])
    if not os.path.exists(path):  # False too for what cannot be a name
        known = [
            n for n, p in download.PACKAGES.items() if any(m.endswith("gguf") for m in p.members)
        ]
        raise ConfigError(
            f"model.path={path!r} is not allowed: no such file or folder, and the known names are"
            f" {', '.join(known)}"
        )
    return path


def load_base(
    path: str, source: ModelSource, mesh: jax.sharding.Mesh, rules: Rules = partitioning.RULES
) -> BaseModel:
    """The base model in a file or folder with its parameters, placed on the mesh; `source` says in which types."""
    options = source.options
    plain = make_model(read_base_model(path, **options).config)
    shardings = partitioning.param_shardings(abstract_params(plain), mesh, rules)
    by_path = {
        tuple(entry.key for entry in path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
    }
    return load_base_model(
        path,
        **options,
        sharding_fn=lambda path, shape: by_path[path],
        quantization=source.quantization,
    )
