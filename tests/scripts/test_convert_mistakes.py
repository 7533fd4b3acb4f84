"""scripts/convert.py: mistakes are one line and write nothing, and nothing is lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sira_jax.checkpoints import adapter_file, load_base_model
from sira_jax.errors import CheckpointError, ConfigError, MergeError, ModelFileError
from tests.hf_models import TINY_LLAMA, weights_by_rule, write_folder
from tests.integration.mistakes import SHAPE, assert_mistake, contents
from tests.scripts.conversions import files, run

ROOT = Path(__file__).parents[2]


def test_an_existing_folder_is_replaced_only_by_force(lora, runs, model, tmp_path):
    out = shutil.copytree(lora, tmp_path / "out")
    before = contents(out)
    named = f"OUT={out}", "is there already; --force"
    assert_mistake(ConfigError, lambda: run("to-peft", runs / "lora", out), *named)
    assert contents(out) == before
    run("to-peft", runs / "lora", out, "--force")
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    run("hf", model, out, "--force")
    assert not (out / "adapter_config.json").exists()
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    named = f"OUT={out}", "notes.txt"
    assert_mistake(ConfigError, lambda: run("hf", model, out, "--force"), *named)
    assert contents(out) == before
    assert files(tmp_path) == ["out"]


def test_links_and_files_are_not_replaced(model, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        call = lambda name=name: run("hf", model, tmp_path / name, "--force")  # noqa: E731
        assert_mistake(ConfigError, call, f"OUT={tmp_path / name}", "no folder")


def test_a_write_that_fails_leaves_what_was_there(lora, model, tmp_path, monkeypatch):
    out = shutil.copytree(lora, tmp_path / "out")
    before = contents(out)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_file, "write_text", full_disk)
    for target, force in ((out, ["--force"]), (tmp_path / "other", [])):
        call = lambda target=target, force=force: run(  # noqa: E731
            "adapter", lora, target, f"--base={model}", *force
        )
        assert_mistake(CheckpointError, call, f"OUT={target}", "No space left on device")
    assert contents(out) == before
    assert files(tmp_path) == ["out"]


def leftover(folder):
    """A model with a tensor that no parameter is made of."""
    weights = weights_by_rule(SHAPE) | {"model.layers.0.extra.weight": np.zeros(3, np.float32)}
    write_folder(folder / "m", SHAPE, weights)
    return folder / "m"


def damaged_run(folder, runs):
    shutil.copytree(runs / "lora", folder / "r")
    shutil.rmtree(folder / "r/checkpoints/2/adapter")
    return folder / "r"


def other_base(folder):
    weights = weights_by_rule(SHAPE)
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    return write_folder(folder / "other", SHAPE | {"tie_word_embeddings": True}, weights)


def peft_folder(folder, runs, change):
    run("to-peft", runs / "lora", folder / "p")
    file = folder / "p/adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder / "p"


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
MISTAKES = {
    "hf: no source": (lambda t, m, r: ("hf", t / "x"), ConfigError, "SRC='", "no such file"),
    "hf: a file": (
        lambda t, m, r: ("hf", m / "config.json"),
        ConfigError,
        "config.json: is no folder",
        "convert.py gguf",
    ),
    "hf: leftover": (lambda t, m, r: ("hf", leftover(t)), ModelFileError, "0.extra.weight"),
    "gguf: a folder": (lambda t, m, r: ("gguf", m), ConfigError, "is a folder", "convert.py hf"),
    "gguf: no GGUF file": (
        lambda t, m, r: ("gguf", m / "config.json"),
        ModelFileError,
        "neither a GGUF file nor a folder",
    ),
    "adapter: nothing there": (
        lambda t, m, r: ("adapter", t / "x"),
        ConfigError,
        "RUN_OR_FOLDER=",
        "no such folder",
    ),
    "adapter: neither": (
        lambda t, m, r: ("adapter", t),
        ConfigError,
        "neither a run directory",
        "adapter_config.json",
    ),
    "adapter: a model": (lambda t, m, r: ("adapter", m), ConfigError, "config.json", "cannot be"),
    "adapter: no adapter": (lambda t, m, r: ("adapter", r / "none"), ConfigError, "method='none'"),
    "adapter: damaged": (
        lambda t, m, r: ("adapter", damaged_run(t, r)),
        CheckpointError,
        "checkpoints/2: is damaged",
    ),
    "adapter: unknown step": (
        lambda t, m, r: ("adapter", r / "lora", "--checkpoint=3"),
        ConfigError,
        "--checkpoint='3'",
        "steps 2",
    ),
    "adapter: no base": (
        lambda t, m, r: ("adapter", r / "lora", f"--base={t / 'x'}"),
        ConfigError,
        "--base='",
        "no such file",
    ),
    "adapter: another base": (
        lambda t, m, r: ("adapter", r / "lora", f"--base={other_base(t)}"),
        CheckpointError,
        "was trained on the base model",
    ),
    "to-peft: a router": (
        lambda t, m, r: ("to-peft", r / "sira"),
        CheckpointError,
        "adapter.method='sira' cannot be written as a PEFT adapter",
    ),
    "from-peft: no folder": (
        lambda t, m, r: ("from-peft", t / "x", f"--base={m}"),
        ModelFileError,
        "no such folder",
    ),
    "from-peft: leftover": (
        lambda t, m, r: (
            "from-peft",
            peft_folder(t, r, lambda x: x.update(extra=x[NAME])),
            f"--base={m}",
        ),
        ModelFileError,
        "unexpected tensors: extra",
    ),
    "from-peft: missing": (
        lambda t, m, r: ("from-peft", peft_folder(t, r, lambda x: x.pop(NAME)), f"--base={m}"),
        ModelFileError,
        f"missing tensors: {NAME}",
    ),
    "merge: a router": (
        lambda t, m, r: ("merge", r / "sira"),
        MergeError,
        "adapter.method='sira' cannot be merged",
    ),
}


@pytest.mark.parametrize(
    ("arguments", "error", "named"), [(a, e, n) for a, e, *n in MISTAKES.values()], ids=MISTAKES
)
def test_mistakes_write_nothing(runs, model, tmp_path, arguments, error, named):
    command, source, *options = arguments(tmp_path, model, runs)
    out = tmp_path / "results" / "out"
    assert_mistake(error, lambda: run(command, source, out, *options), *named)
    assert not out.parent.exists()


def test_an_adapter_folder_needs_a_base_and_has_no_checkpoints(lora, model, tmp_path):
    shutil.copytree(lora, tmp_path / "a")
    merge = ("merge", tmp_path / "a", tmp_path / "b")
    assert_mistake(ConfigError, lambda: run(*merge), "give --base")
    options = f"--base={model}", "--checkpoint=best"
    assert_mistake(ConfigError, lambda: run(*merge, *options), "--checkpoint='best'")
    content = json.loads((tmp_path / "a/adapter_config.json").read_text())
    content["adapter"]["rank"] = 3
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(content))
    named = "adapter_model.safetensors: tensors of another shape", "expected (32, 3)"
    assert_mistake(ModelFileError, lambda: run(*merge, options[0]), *named)
    assert files(tmp_path) == ["a"]


def script(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/convert.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_the_command_line_ends_a_mistake_with_one_line_and_status_2(tmp_path):
    done = script("hf", leftover(tmp_path), tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "unexpected tensors: model.layers.0.extra" in done.stderr
    assert files(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("hf", "m"), "required: OUT"),
        (("hf", "m", "out", "--dtype=int8"), "argument --dtype"),
        (("from-peft", "m", "out"), "required: --base"),
        (("from-peft", "m", "out", "--base=b", "--checkpoint=best"), "--checkpoint"),
        (("merge-it", "m", "out"), "invalid choice: 'merge-it'"),
        ((), "required: command"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_status_2(capsys, arguments, named):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


def test_the_command_line_converts(tmp_path):
    write_folder(tmp_path / "m", TINY_LLAMA, weights_by_rule(TINY_LLAMA))
    done = script("hf", tmp_path / "m", tmp_path / "out", "--dtype=float16")
    assert (done.returncode, done.stderr) == (0, "")
    assert "model.norm.weight (32,) -> model.norm.weight float16" in done.stdout
    assert load_base_model(tmp_path / "out").config.num_layers == 3


def test_every_command_has_help(capsys):
    for command in ("hf", "gguf", "adapter", "to-peft", "from-peft", "merge"):
        with pytest.raises(SystemExit) as error:
            run(command, "--help")
        assert error.value.code == 0
        helped = capsys.readouterr().out
        assert "OUT" in helped
        assert "--force" in helped
        assert ("--checkpoint" in helped) == (command in ("adapter", "to-peft", "merge"))
