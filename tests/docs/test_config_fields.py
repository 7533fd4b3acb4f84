"""The tables of config fields, which are read from the source, against the classes themselves."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from configs import base
from configs.launch import base as launch_base
from scripts.docs import config_fields
from scripts.launch import config as launch_config
from sira_jax.adapters import METHODS, AdapterConfig
from sira_jax.training.config import SECTIONS
from tests.docs.test_site import REPOSITORY


def written(fields):
    """Name -> (type, default) of a table's fields."""
    return {field.name: (field.type, field.default) for field in fields}


def defaults(cls):
    """Name -> (type as it is written, value) of a dataclass, without what it asks for."""
    found = {}
    for field in dataclasses.fields(cls):
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        found[field.name] = value
    return found


def assert_same(fields, values):
    assert [field.name for field in fields] == list(values)
    for field in fields:
        value = values[field.name]
        if isinstance(value, ConfigDict):
            value = value.to_dict()
        if value is dataclasses.MISSING:
            assert field.default in ("", "None"), field.name
        else:
            # Evaluated, since 1e-8 and 1e-08 are one number.
            assert eval(field.default) == value, field.name
        assert field.text, field.name
        assert field.type, field.name


def test_sections_are_those_of_an_experiment():
    tables = config_fields.experiment_sections(REPOSITORY)
    assert list(tables) == list(SECTIONS)
    config = base.get_config()
    for name, fields in tables.items():
        values = {field.name: config[name][field.name] for field in fields}
        assert (
            set(values) == set(config[name]) == {f.name for f in dataclasses.fields(SECTIONS[name])}
        )
        assert_same(fields, values)


def test_methods_are_those_of_the_registry():
    common, methods = config_fields.adapter_methods(REPOSITORY)
    assert list(methods) == list(METHODS)
    assert_same(common, defaults(AdapterConfig))
    for name, fields in methods.items():
        by_name = {field.name: field for field in fields}
        expected = defaults(METHODS[name])
        assert set(by_name) == set(expected)
        assert_same([by_name[field] for field in expected], expected)


def test_sections_are_those_of_a_launch():
    tables = config_fields.launch_sections(REPOSITORY)
    assert list(tables) == list(launch_config.SECTIONS)
    config = launch_base.get_config()
    for name, fields in tables.items():
        assert {field.name for field in fields} == set(config[name])
        assert_same(fields, {field.name: config[name][field.name] for field in fields})


def test_a_method_shows_what_it_changes():
    shown = config_fields.adapter_tables(REPOSITORY)
    section = shown.split("### adapter: mov\n")[1].split("###")[0]
    # MoV's own, one that it inherits from another base, and one whose default it changes.
    for name in ("position", "num_experts", "targets"):
        assert f"| `{name}` |" in section
    assert "dropout_rate" not in section


def test_names_on_one_line_share_its_text():
    text = """What it is.

    Attributes:
      first, second: both of
        them.
      third: "a: b" is text.

    Raises:
      ConfigError: no.
    """
    assert config_fields.attributes(text) == {
        "first": "both of them.",
        "second": "both of them.",
        "third": '"a: b" is text.',
    }


@pytest.mark.parametrize(
    ("text", "cell"), [("||V|| of", r"\|\|V\|\| of"), ("`a|b` or c|d", r"`a|b` or c\|d")]
)
def test_bars_do_not_end_a_cell(text, cell):
    row = config_fields.table([config_fields.Field("x", "int | None", "1", text)]).split("\n")[-1]
    assert row == f"| `x` | `int | None` | `1` | {cell} |"
