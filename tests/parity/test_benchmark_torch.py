"""scripts/benchmark_torch.py on tiny models, from the command line to the rows (`make parity-setup`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sira_jax.checkpoints import save_hf_folder
from sira_jax.models import Decoder
from tests.tiny import decoder_config, decoder_params

for package in ("torch", "transformers", "peft"):
    pytest.importorskip(package)

pytestmark = pytest.mark.parity

REPOSITORY = Path(__file__).parents[2]
TINY = ("--vocab_size=64", "--emb_dim=16", "--num_layers=2", "--num_heads=2", "--mlp_dim=24")


def rows(tmp_path, *arguments):
    out = tmp_path / "rows.json"
    subprocess.run(
        [
            sys.executable,
            "scripts/benchmark_torch.py",
            "--repeats=2",
            "--batch_size=2",
            f"--out={out}",
            *arguments,
        ],
        cwd=REPOSITORY,
        check=True,
        timeout=300,
    )
    found = json.loads(out.read_text())
    assert found["machine"]["torch"]
    assert all(row["min_s"] > 0 and row["cpu_s"] > 0 for row in found["rows"])
    return {row["side"]: row for row in found["rows"]}


def test_training_steps_beside_peft(tmp_path):
    found = rows(tmp_path, "--kind=lora", "--length=8", "--num_experts=4", "--k=2", *TINY)
    assert set(found) == {"peft_floor", "peft_lora_r4", "floor", "lora_r4", "sira"}
    assert found["peft_lora_r4"]["vs_peft_lora_r4"] == 1.0
    losses = [row["loss"] for row in found.values()]
    assert max(losses) - min(losses) < 1e-4


def test_training_steps_beside_mixlora(tmp_path):
    pytest.importorskip("mixlora")
    found = rows(tmp_path, "--kind=mixlora", "--length=8", "--num_experts=4", "--k=2", *TINY)
    assert set(found) == {"mixlora", "sira_mlp"}
    assert abs(found["mixlora"]["loss"] - found["sira_mlp"]["loss"]) < 1e-4


def test_decoding_gives_the_same_tokens(tmp_path):
    config = decoder_config()
    save_hf_folder(tmp_path / "base", config, decoder_params(Decoder(config)))
    found = rows(
        tmp_path,
        "--kind=decode",
        f"--model={tmp_path / 'base'}",
        "--prompt_length=5",
        "--new_tokens=7",
    )
    assert set(found) == {"peft_lora_r4", "lora_r4", "sira"}
    assert all(row["same_tokens"] == 1.0 for row in found.values())
