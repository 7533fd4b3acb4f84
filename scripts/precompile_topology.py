"""Devices of a TPU topology that is not there, described by libtpu for compiling only."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from scripts.chips import chip_of
from sira_jax.errors import ConfigError

# Where `make precompile-setup` puts it. Outside of the environment's packages: with libtpu among them, every program would look
# for TPUs first.
FOLDER = Path(__file__).parents[1] / ".libtpu"
_LIBRARY = "TPU_LIBRARY_PATH"


def find_library() -> Path | None:
    """libtpu's shared library: that of TPU_LIBRARY_PATH, of `make precompile-setup`, or of the package; None without one."""
    candidates = [Path(os.environ[_LIBRARY])] if os.environ.get(_LIBRARY) else []
    candidates.append(FOLDER / "libtpu" / "libtpu.so")
    package = importlib.util.find_spec("libtpu")
    if package is not None and package.origin:
        candidates.append(Path(package.origin).parent / "libtpu.so")
    return next((path for path in candidates if path.is_file()), None)


def describe(topology: str) -> list[Any]:
    """The devices of a topology, "v5e:16x16"; programs can be compiled for them, not run.

    Raises:
      ConfigError: libtpu is missing or does not know the topology.
    """
    chip_of(topology)
    library = find_library()
    if library is None:
        raise ConfigError("libtpu is not installed: run `make precompile-setup`")
    os.environ[_LIBRARY] = str(library)
    # Or libtpu asks the cloud's metadata server which TPU it is on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # It holds a lock for the chips of this machine, of which nothing here uses any.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--topology={topology!r} is not allowed: libtpu says {reason}") from None
