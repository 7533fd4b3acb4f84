"""A small model, runs on it and an adapter folder, for the tests of scripts/convert.py."""

import pytest

from tests.scripts.conversions import ADAPTERS, make_model, make_run, run


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="session")
def runs(model, tmp_path_factory):
    """Folder of run directories by the name of their method."""
    root = tmp_path_factory.mktemp("runs")
    for name in (*ADAPTERS, "none"):
        make_run(root / name, model, name)
    return root


@pytest.fixture(scope="session")
def lora(runs, tmp_path_factory):
    """The run of a LoRA as a folder of our format."""
    out = tmp_path_factory.mktemp("adapters") / "lora"
    run("adapter", runs / "lora", out)
    return out
