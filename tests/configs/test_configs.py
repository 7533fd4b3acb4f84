"""Config files: the defaults are those of the dataclasses, and every method of the registry has its files."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from configs import base
from configs.experiments import starter
from sira_jax.adapters import METHODS, make_config
from sira_jax.training.config import SECTIONS, make_experiment

REPOSITORY = Path(__file__).parents[2]
# Fields without a sensible default in the library: a file or a task must be named.
CHOSEN_BY_THE_FILE = {("model", "path"), ("data", "tasks")}


@pytest.mark.parametrize("name", SECTIONS)
def test_base_config_has_the_librarys_fields_and_defaults(name):
    section = base.get_config()[name].to_dict()
    fields = {field.name: field.default for field in dataclasses.fields(SECTIONS[name])}
    assert set(section) == set(fields)
    for field, default in fields.items():
        if (name, field) not in CHOSEN_BY_THE_FILE:
            assert section[field] == default, f"{name}.{field}"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_config_file_with_its_defaults(method):
    module = importlib.import_module(f"configs.adapters.{method}")
    assert make_config(module.get_config().to_dict()) == METHODS[method]()
    changed = make_config(module.get_config(targets=("k", "v", "down", "up")).to_dict())
    assert changed == METHODS[method](targets=("k", "v", "down", "up"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_module_a_docs_page_and_tests(method):
    for file in (
        f"sira_jax/adapters/{method}.py",
        f"docs/{method}.md",
        f"tests/adapters/test_{method}.py",
    ):
        assert (REPOSITORY / file).is_file(), file


@pytest.mark.parametrize("method", starter.ADAPTERS)
def test_the_starter_is_a_valid_experiment(method):
    experiment = make_experiment(starter.get_config(method).to_dict())
    assert (experiment.adapter is None) == (method == "none")
