"""The base of launch configs: its fields and defaults are those of the dataclasses."""

import dataclasses

import pytest

from configs.launch import base
from scripts.launch.config import SECTIONS


@pytest.mark.parametrize("name", SECTIONS)
def test_base_config_has_the_fields_and_defaults(name):
    section = base.get_config()[name].to_dict()
    fields = {field.name: field for field in dataclasses.fields(SECTIONS[name])}
    assert set(section) == set(fields)
    for field, entry in fields.items():
        default = entry.default
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        if default is dataclasses.MISSING:
            default = None
        assert section[field] == default, f"{name}.{field}"


def test_every_section_is_there():
    assert set(base.get_config()) == set(SECTIONS)
