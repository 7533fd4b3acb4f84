"""Fixtures of the tests that run the loop."""

import jax
import pytest

from tests.training.tiny_run import trainer


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """All tiny runs of a module share their programs through JAX's cache on disk."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    values = (str(tmp_path_factory.mktemp("programs")), 0.0, -1)
    for name, value in zip(names, values, strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, compiled_once):
    """(run directory, final state) of a run without a stop."""
    workdir = tmp_path_factory.mktemp("unbroken")
    run = trainer(workdir)
    assert run.run() == "done"
    return workdir, jax.device_get(run.state)
