"""What the tests of users' mistakes share: a small experiment, and what a good error is."""

from pathlib import Path

import pytest

from scripts import assemble
from sira_jax.errors import SiraError
from sira_jax.training.config import make_experiment
from tests.hf_models import TINY_LLAMA

TASK = "cldr_number_en"
SHAPE = {**TINY_LLAMA, "vocab_size": 384, "max_position_embeddings": 256}


def fields(model, **changes):
    """Plain fields of a small experiment; keys are sections, or section__field."""
    config = {
        "model": {"path": str(model)},
        "adapter": {"method": "sira", "rank": 2, "num_experts": 4, "num_selected_experts": 2},
        "data": {
            "tasks": [TASK],
            "vocabulary": "bytes",
            "sequence_length": 128,
            "batch_size": 4,
        },
        "train": {"num_steps": 2},
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            config.setdefault(section, {})[field] = value
        else:
            config[section] = value
    return config


def make_plan(model, **changes):
    return assemble.Plan(make_experiment(fields(model, **changes)))


def contents(folder):
    """Every file below a folder with its bytes; nothing where there is no folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_mistake(error, call, *named):
    """Asserts that the call raises exactly this class with one readable line that has these parts."""
    with pytest.raises(SiraError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 600
    for part in named:
        assert str(part) in message
