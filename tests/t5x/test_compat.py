"""Without T5X everything but its own modules can be imported, and one line says how to get it."""

import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from sira_jax.errors import ConfigError, DependencyError
from sira_jax.t5x_integration import compat

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def without(monkeypatch):
    """Makes modules missing by name."""
    find = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name in names else find(name)
        )
        compat.prepare.cache_clear()

    yield hide
    compat.prepare.cache_clear()


def test_what_is_missing_is_named_with_its_source(without):
    without(*compat.NEEDED)
    with pytest.raises(DependencyError) as raised:
        compat.import_t5x("t5x.models")
    message = str(raised.value)
    assert "\n" not in message
    for part in ("t5x (github.com/google-research/t5x)", "airio", "gin-config", "docs/t5x.md"):
        assert part in message


@pytest.mark.parametrize("name", compat.NEEDED)
def test_each_module_is_asked_for(without, name):
    # The others may be missing here too.
    without(name)
    with pytest.raises(
        DependencyError, match=rf"missing: .*\b{name} \({re.escape(compat.NEEDED[name])}\)"
    ):
        compat.prepare()


def test_versions_out_of_range_are_named_together():
    compat.check_versions({"jax": "0.10.2", "fiddle": "0.3.1", "seqio": "9.0"})
    with pytest.raises(DependencyError) as raised:
        compat.check_versions({"jax": "0.11.0", "flax": "0.12.7", "optax": "0.2.8"})
    message = str(raised.value)
    assert "jax is 0.11.0, needed is at least 0.10.2 and under 0.11" in message
    assert "flax is 0.12.7" in message
    assert "optax" not in message


@pytest.mark.parametrize("version", ["0.10.2", "0.10.2.dev1+local", "0.10.10"])
def test_versions_in_range(version):
    compat.check_versions({"jax": version})


def test_partition_spec_is_put_back_once():
    module = types.ModuleType("pjit")
    compat.mend_pjit(module)
    assert module.PartitionSpec is jax.sharding.PartitionSpec
    module.PartitionSpec = "its own"
    compat.mend_pjit(module)
    assert module.PartitionSpec == "its own"


def test_an_older_t5x_is_named(monkeypatch):
    old = types.ModuleType("t5x.trainer")
    old.Trainer = object
    monkeypatch.setattr(compat, "prepare", lambda: None)
    monkeypatch.setitem(sys.modules, "t5x", types.ModuleType("t5x"))
    monkeypatch.setitem(sys.modules, "t5x.trainer", old)
    with pytest.raises(DependencyError, match=r"t5x.trainer .* has no apply_grads: this T5X"):
        compat.import_t5x("t5x.trainer")


def test_a_broken_t5x_is_named(monkeypatch):
    monkeypatch.setattr(compat, "prepare", lambda: None)
    with pytest.raises(
        DependencyError, match="t5x_that_is_not_there cannot be imported: No module"
    ):
        compat.import_t5x("t5x_that_is_not_there")


@pytest.mark.parametrize("script", ["train", "eval", "infer", "export"])
def test_scripts_without_t5x_say_so_in_one_line(script):
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / f"t5x_{script}.py")],
        cwd=REPOSITORY,
        # Without the clones that may be on the path of these tests.
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: T5X cannot be used, these modules are missing: t5x (")


def test_gin_mistakes_are_one_line():
    gin = pytest.importorskip("gin")
    from scripts.t5x_launch import GIN_FILES, read_gin

    def parse(*bindings):
        def read():
            with gin.unlock_config():
                gin.clear_config()
                gin.parse_config_files_and_bindings(
                    [str(GIN_FILES / "adapters/lora.gin")], ["TARGETS=('q',)", *bindings]
                )

        read_gin(read, ["adapters/lora.gin"])

    parse()
    for bindings, message in (
        (["lora.LoRAConfig.rnk=1"], "doesn't have a parameter named 'rnk'"),
        (["NUMBER=%gin.REQUIRED"], r"^NUMBER is missing: give it by --gin.NUMBER=VALUE$"),
        (["lora.LoRAConfig.rank=("], "gin files or bindings: (TokenError|SyntaxError)"),
    ):
        with pytest.raises(ConfigError, match=message) as raised:
            parse(*bindings)
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="--gin_file is missing"):
        read_gin(lambda: None, [])
