"""Each gin file parses and makes what it says."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from scripts import t5x_launch
from sira_jax.adapters import METHODS
from tests.t5x.tiny_t5x import MISSING

gin = pytest.importorskip("gin", reason="gin-config is not installed")

GIN_FILES = Path(__file__).parents[2] / "configs" / "gin"
TARGETS = ("q", "k", "up")


@pytest.fixture
def parsed():
    """Parses files of configs/gin and bindings; the result gives the value of a macro."""

    def parse(files, *bindings):
        gin.add_config_file_search_path(str(GIN_FILES))
        gin.parse_config_files_and_bindings(files, list(bindings), finalize_config=False)

        def macro(name):
            value = gin.query_parameter(f"%{name}")
            return (
                value.scoped_configurable_fn()
                if hasattr(value, "scoped_configurable_fn")
                else value
            )

        return macro

    with gin.unlock_config():
        gin.clear_config()
        yield parse
        gin.clear_config()


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_has_the_defaults_of_its_config(parsed, method):
    adapter = parsed([f"adapters/{method}.gin"], f"TARGETS={TARGETS}")("ADAPTER")
    assert adapter == METHODS[method](targets=TARGETS)
    assert type(adapter) is METHODS[method]


def test_an_adapters_file_shows_every_field():
    for method, config in METHODS.items():
        content = (GIN_FILES / f"adapters/{method}.gin").read_text()
        for field in dataclasses.fields(config):
            assert f"\n  {field.name} = " in content, (method, field.name)


def test_there_is_a_file_for_each_method_and_none():
    files = {path.stem for path in (GIN_FILES / "adapters").glob("*.gin")}
    assert files == {*METHODS, "none"}


# (emb_dim, num_heads, head_dim, mlp_dim, encoder layers, decoder layers), as published [O].
SIZES = {
    "t5_1_1_small": (512, 6, 64, 1024, 8, 8),
    "t5_1_1_base": (768, 12, 64, 2048, 12, 12),
    "t5_1_1_large": (1024, 16, 64, 2816, 24, 24),
    "t5_1_1_xl": (2048, 32, 64, 5120, 24, 24),
    "t5_1_1_xxl": (4096, 64, 64, 10240, 24, 24),
    "t5_1_0_small": (512, 8, 64, 2048, 6, 6),
    "t5_1_0_base": (768, 12, 64, 3072, 12, 12),
    "t5_1_0_large": (1024, 16, 64, 4096, 24, 24),
    "t5_1_0_3B": (1024, 32, 128, 16384, 24, 24),
    "t5_1_0_11B": (1024, 128, 128, 65536, 24, 24),
    "byt5_small": (1472, 6, 64, 3584, 12, 4),
    "byt5_base": (1536, 12, 64, 3968, 18, 6),
    "byt5_large": (1536, 16, 64, 3840, 36, 12),
    "byt5_xl": (2560, 32, 64, 6720, 36, 12),
    "byt5_xxl": (4672, 64, 64, 12352, 36, 12),
    "tiny": (16, 4, 8, 32, 2, 2),
}
RUN = ("TRAIN_STEPS=3", "RANDOM_SEED=5")


def test_there_is_a_file_for_each_size():
    assert {path.stem for path in (GIN_FILES / "sizes").glob("*.gin")} == set(SIZES)


@pytest.mark.t5x
@pytest.mark.parametrize("size", SIZES)
def test_a_model_of_each_size(parsed, size):
    pytest.importorskip("t5x", reason=MISSING, exc_type=ImportError)
    # The published vocabularies are files that are not here: bytes in their place.
    model = parsed(["models/byt5.gin", f"sizes/{size}.gin", "adapters/lora.gin"], *RUN)("MODEL")
    config = model.module.config
    found = (
        config.emb_dim,
        config.num_heads,
        config.head_dim,
        config.mlp_dim,
        config.num_encoder_layers,
        config.num_decoder_layers,
    )
    assert found == SIZES[size]
    assert (model.num_steps, model.seed) == (3, 5)
    assert model.module.adapter == METHODS["lora"]()


@pytest.mark.t5x
@pytest.mark.parametrize(
    ("name", "vocab_size", "activations", "tied"),
    [
        ("t5_1_1", 32128, ("gelu", "linear"), False),
        ("t5_1_0", 32128, ("relu",), True),
        ("mt5", 250112, ("gelu", "linear"), False),
        ("byt5", 384, ("gelu", "linear"), False),
    ],
)
def test_a_models_options(parsed, name, vocab_size, activations, tied):
    pytest.importorskip("t5x", reason=MISSING, exc_type=ImportError)
    files = [f"models/{name}.gin", "sizes/tiny.gin", "adapters/none.gin"]
    macro = parsed(files, *RUN, "VOCABULARY=@seqio.ByteVocabulary()")
    config = macro("MODEL").module.config
    assert (config.vocab_size, config.mlp_activations, config.tie_embeddings) == (
        vocab_size,
        activations,
        tied,
    )
    assert not config.scan_layers


def test_a_folder_here_with_the_name_of_one_of_gins_does_no_harm(tmp_path, monkeypatch):
    """runs/ is where everybody's results are, and where the gin files of runs are."""
    (tmp_path / "runs").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    config, resources = (importlib.import_module(f"gin.{n}") for n in ("config", "resource_reader"))
    with pytest.raises(TypeError):
        resources.system_path_file_exists("runs/finetune.gin")
    monkeypatch.setattr(config, "_FILE_READERS", [(open, resources.system_path_file_exists)])
    t5x_launch._tolerate_plain_folders()
    ((_, is_readable),) = config._FILE_READERS
    assert not is_readable("runs/finetune.gin")
