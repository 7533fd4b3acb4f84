"""The small models that users' mistakes are tried on, and a cache that is empty."""

import pytest

from tests.hf_models import weights_by_rule, write_folder
from tests.integration.mistakes import SHAPE


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A Hugging Face folder without a tokenizer, and one with fewer ids than there are bytes."""
    folder = tmp_path_factory.mktemp("models") / "model"
    write_folder(folder, SHAPE, weights_by_rule(SHAPE))
    few_ids = {**SHAPE, "vocab_size": 96}
    write_folder(folder.with_name("few_ids"), few_ids, weights_by_rule(few_ids))
    return folder


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """Neither downloaded data nor cached models; returns where they would be."""
    monkeypatch.setenv("SIRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SIRA_DATA_DIR", raising=False)
    return tmp_path / "cache"
