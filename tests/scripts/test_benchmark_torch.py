"""The comparison with PyTorch as far as it goes without PyTorch; tests/parity runs it whole."""

import sys

import numpy as np
import pytest

from scripts import torch_sides
from scripts.torch_process import torch_process
from sira_jax.errors import ConfigError, DependencyError
from tests.tiny import decoder_config, decoder_params


def interpreter(tmp_path, line):
    """An executable that runs a line of shell instead of Python."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def spec(method="lora"):
    return {"kind": "step", "sides": {"one": {"method": method}}}


@pytest.mark.parametrize("method", ["lora", "mixlora"])
def test_without_torch_one_line_says_what_to_do(tmp_path, method):
    # Neither site-packages nor PYTHONPATH, whatever is installed here.
    python = interpreter(tmp_path, f'exec {sys.executable} -I -S "$@"')
    with (
        pytest.raises(
            DependencyError, match=r"torch is not there: run `make parity-setup`"
        ) as error,
        torch_process(python, spec(method)),
    ):
        pass
    assert "\n" not in str(error.value)


def test_a_missing_interpreter_is_named():
    with (
        pytest.raises(DependencyError, match=r"--torch_python=/nowhere/python: No such file"),
        torch_process("/nowhere/python", spec()),
    ):
        pass


def test_a_worker_that_dies_is_told_with_its_status(tmp_path):
    with (
        pytest.raises(RuntimeError, match="status 3"),
        torch_process(interpreter(tmp_path, "exit 3"), spec()),
    ):
        pass


@pytest.mark.parametrize("kind", ["lora", "mixlora", "decode"])
def test_both_sides_have_the_same_sizes(kind):
    compared = torch_sides.comparison(kind, num_experts=8, rank=3, k=2)
    assert compared.reference in compared.theirs
    targets = {"gate", "up", "down"} if kind == "mixlora" else set("qkvo") | {"gate", "up", "down"}
    sira = compared.ours["sira_mlp" if kind == "mixlora" else "sira"]
    assert (sira.num_experts, sira.rank, sira.num_selected_experts) == (8, 3, 2)
    theirs = compared.theirs[compared.reference]
    assert set(sira.targets) == targets
    assert set(theirs["modules"]) == {f"{target}_proj" for target in targets}
    # PEFT and mixlora scale by alpha / rank as we do.
    assert (theirs["rank"], theirs["alpha"]) == (sira.rank, sira.alpha)
    if kind == "mixlora":
        assert (theirs["num_experts"], theirs["num_selected_experts"]) == (8, 2)
    else:
        assert compared.ours["lora_r3"].rank == 3


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ConfigError, match="num_selected_experts=5"):
        torch_sides.comparison("lora", num_experts=4, rank=2, k=5)


def test_the_worker_is_given_our_weights_tokens_and_optimizer(tmp_path):
    from safetensors.numpy import load_file

    from sira_jax.models import Decoder

    config = decoder_config()
    frozen = decoder_params(Decoder(config))
    batch = torch_sides.random_batch(config.vocab_size, 2, 5)
    sent = torch_sides.write_inputs(tmp_path, config, frozen, batch, {"a": {}}, kind="step")
    weights = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        weights["model.layers.1.mlp.up_proj.weight"],
        frozen["layers"]["mlp"]["up"]["kernel"][1].T,
    )
    arrays = np.load(sent["arrays"])
    np.testing.assert_array_equal(arrays["inputs"][:, 1:], arrays["targets"][:, :-1])
    np.testing.assert_array_equal(arrays["targets"], batch["decoder_target_tokens"])
    assert sent["kind"] == "step"
    assert (sent["learning_rate"], sent["clip_norm"], sent["beta2"]) == (1e-3, 1.0, 0.999)
