"""Finds T5X, checks what it needs, and mends what current JAX no longer has, before anything of T5X is imported.

T5X is not on PyPI and is not among the project's requirements: it is looked for only when a module of it is asked for.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax

from sira_jax.errors import DependencyError

# Module -> where it comes from. Those with an address are not on PyPI as T5X needs them.
NEEDED = {
    "t5x": "github.com/google-research/t5x",
    "airio": "github.com/google/airio",
    "jestimator": "jestimator",
    "seqio": "seqio",
    "gin": "gin-config",
    "fiddle": "fiddle",
    "cached_property": "cached_property",
    "grain": "grain",
    "tensorflow_text": "tensorflow-text",
    "tensorflow_datasets": "tensorflow-datasets",
}
# Distribution -> (least version, first version that is known to be too new, or None), as tested with.
VERSIONS = {
    "jax": ("0.10.2", "0.11"),
    "flax": ("0.12.8", "0.13"),
    "optax": ("0.2.8", "0.3"),
    "orbax-checkpoint": ("0.12.8", "0.13"),
    "seqio": ("0.0.20", None),
    "gin-config": ("0.5.0", None),
    "fiddle": ("0.3.0", None),
}
INSTALL = (
    "git clone https://github.com/google-research/t5x and likewise google/airio, which its code imports; then put the"
    " two clones on PYTHONPATH and `pip install gin-config fiddle grain jestimator cached_property tensorflow-text"
    " tensorflow-datasets` (or, as T5X's README says, `pip install -e .` in each, which replaces the installed jax,"
    " flax and optax by what it finds); see docs/t5x.md"
)
# What this package calls of T5X, that older copies lack.
_CALLED = {
    "t5x.losses": ("get_loss_normalizing_factor_and_weights", "compute_weighted_cross_entropy"),
    "t5x.trainer": ("Trainer", "apply_grads"),
    "t5x.optimizers": ("OptaxWrapper", "OptimizerState"),
    "t5x.checkpoints": ("OrbaxCheckpointManagerInterface", "load_t5x_checkpoint"),
}


def import_t5x(name: str) -> ModuleType:
    """A module of T5X ("t5x.models"), after the checks and the mending, which are done once.

    Raises:
      DependencyError: T5X or something it imports is missing or of another version, with what to do.
    """
    prepare()
    module = _import(name)
    for attribute in _CALLED.get(name, ()):
        if not hasattr(module, attribute):
            where = getattr(module, "__file__", name)
            raise DependencyError(
                f"{name} ({where}) has no {attribute}: this T5X is of another version; update the clone"
            )
    return module


@functools.cache
def prepare() -> None:
    """Checks that what T5X needs is there, and puts back what it expects of JAX.

    Raises:
      DependencyError: see `import_t5x`.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sources = ", ".join(f"{name} ({NEEDED[name]})" for name in missing)
        raise DependencyError(
            f"T5X cannot be used, these modules are missing: {sources}. {INSTALL}"
        )
    check_versions(installed_versions())
    mend_pjit(importlib.import_module("jax.experimental.pjit"))


def installed_versions() -> dict[str, str]:
    """Distribution -> installed version, of those in VERSIONS; a copy that is merely on the path has none."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_versions(installed: Mapping[str, str]) -> None:
    """Raises DependencyError naming every distribution outside VERSIONS."""
    wrong = []
    for name, version in installed.items():
        least, limit = VERSIONS[name]
        numbers = _numbers(version)
        if numbers < _numbers(least) or (limit and numbers >= _numbers(limit)):
            allowed = f"at least {least}" + (f" and under {limit}" if limit else "")
            wrong.append(f"{name} is {version}, needed is {allowed}")
    if wrong:
        raise DependencyError(f"T5X cannot be used: {'; '.join(wrong)}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def mend_pjit(module: Any) -> None:
    """Puts PartitionSpec back into jax.experimental.pjit, where jestimator's releases import it from."""
    if not hasattr(module, "PartitionSpec"):
        module.PartitionSpec = jax.sharding.PartitionSpec


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DependencyError(f"{name} cannot be imported: {error}. {INSTALL}") from error
