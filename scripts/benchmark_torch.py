"""Times our steps and decoding beside PyTorch's, on the same weights and tokens. Prints a table and writes JSON.

  python scripts/benchmark_torch.py --kind=lora
  python scripts/benchmark_torch.py --kind=mixlora
  python scripts/benchmark_torch.py --kind=decode --model=~/.cache/sira_jax/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf

lora: AdamW steps with LoRA and SiRA on all seven projections against transformers + PEFT LoRA of the same rank, and the frozen
floor of both. mixlora: SiRA on gate, up and down against the package mixlora with the same experts, rank and k. decode: greedy
decoding with the adapters of `lora`; without --model, a random model of SmolLM2-135M's shape.

PyTorch runs in a process of its own (scripts/torch_worker.py); the sides take turns, and ratios are medians over the rounds, so
that they hold on a busy machine. Before that, both must give the same loss, or decode the same tokens. PyTorch is an optional
dependency: `make parity-setup`.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from scripts import torch_sides
from scripts.cli import run_main
from scripts.table import format_rows, write_rows
from scripts.timed_step import median_ratio, take_turns
from scripts.torch_process import TorchSide, torch_process
from sira_jax.checkpoints import load_base_model
from sira_jax.errors import check
from sira_jax.models import DecoderConfig
from sira_jax.models.presets import preset

KIND = flags.DEFINE_enum("kind", "lora", ["lora", "mixlora", "decode"], "What is compared.")
OUT = flags.DEFINE_string("out", None, "Also write the rows to this JSON file.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Rounds.", lower_bound=1)
PYTHON = flags.DEFINE_string(
    "torch_python", sys.executable, "The interpreter of the PyTorch side, if it is another one."
)
NUM_EXPERTS = flags.DEFINE_integer("num_experts", 16, "E.", lower_bound=1)
RANK = flags.DEFINE_integer("rank", 4, "Rank R of a LoRA and of an expert.", lower_bound=1)
K = flags.DEFINE_integer("k", 4, "Selected experts k.", lower_bound=1)
VOCAB = flags.DEFINE_integer("vocab_size", 4096, "steps: vocabulary.", lower_bound=1)
EMB = flags.DEFINE_integer("emb_dim", 512, "steps: width.", lower_bound=1)
LAYERS = flags.DEFINE_integer("num_layers", 8, "steps: layers.", lower_bound=1)
HEADS = flags.DEFINE_integer("num_heads", 8, "steps: heads.", lower_bound=1)
MLP_DIM = flags.DEFINE_integer("mlp_dim", 1408, "steps: width of the MLP.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch_size", 8, "Rows.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 128, "steps: tokens a row.", lower_bound=1)
SCAN = flags.DEFINE_bool("scan_layers", True, "Ours: one compiled block for all layers.")
MODEL = flags.DEFINE_string("model", None, "decode: a GGUF file or a Hugging Face folder.")
PROMPT_LENGTH = flags.DEFINE_integer("prompt_length", 32, "decode: tokens a row.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "decode: tokens a row.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    del argv
    comparison = torch_sides.comparison(KIND.value, NUM_EXPERTS.value, RANK.value, K.value)
    run = _decode if KIND.value == "decode" else _step
    with tempfile.TemporaryDirectory() as folder:
        rows, versions = run(comparison, Path(folder))
    print(format_rows(rows))
    if OUT.value:
        write_rows(OUT.value, KIND.value, rows, **versions)


def _step(comparison: torch_sides.Comparison, folder: Path) -> tuple[list[dict], dict[str, str]]:
    heads = HEADS.value
    allowed = f"a multiple of twice --num_heads={heads}"
    check(EMB.value % (2 * heads) == 0, "--emb_dim", EMB.value, allowed)
    config = DecoderConfig(
        vocab_size=VOCAB.value,
        emb_dim=EMB.value,
        num_layers=LAYERS.value,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=EMB.value // heads,
        mlp_dim=MLP_DIM.value,
        scan_layers=SCAN.value,
    )
    batch = torch_sides.random_batch(config.vocab_size, BATCH.value, LENGTH.value)
    frozen = torch_sides.random_base(config)
    spec = torch_sides.write_inputs(folder, config, frozen, batch, comparison.theirs, kind="step")
    with torch_process(PYTHON.value, spec) as process:
        ours = torch_sides.step_sides(config, comparison.ours, frozen, batch)
        theirs = {name: TorchSide(process, name) for name in comparison.theirs}
        rows = _measure({**theirs, **ours}, comparison.reference, BATCH.value * LENGTH.value)
    losses = {name: side.answers[0]["loss"] for name, side in theirs.items()}
    losses |= {name: float(side.first_metrics["loss"]) for name, side in ours.items()}
    if not max(losses.values()) - min(losses.values()) <= torch_sides.LOSS_TOLERANCE:
        raise RuntimeError(f"the sides do not compute the same: first losses {losses}")
    for row in rows:
        row["loss"] = losses[row["side"]]
        scratch = ours[row["side"]].scratch_bytes if row["side"] in ours else None
        row["temp_mib"] = None if scratch is None else scratch / 2**20
    return rows, process.versions


def _decode(comparison: torch_sides.Comparison, folder: Path) -> tuple[list[dict], dict[str, str]]:
    if MODEL.value:
        base = load_base_model(os.path.expanduser(MODEL.value), scan_layers=SCAN.value)
        config, frozen = base.config, base.params
    else:
        config = dataclasses.replace(preset("smollm2-135m"), scan_layers=SCAN.value)
        frozen = torch_sides.random_base(config)
    longest = config.max_positions - NEW_TOKENS.value
    length = PROMPT_LENGTH.value
    check(length <= longest, "--prompt_length", length, f"at most {longest}")
    batch = torch_sides.random_batch(config.vocab_size, BATCH.value, length)
    prompts_BT = jax.device_get(batch["decoder_input_tokens"])
    options = {"kind": "decode", "new_tokens": NEW_TOKENS.value}
    spec = torch_sides.write_inputs(folder, config, frozen, batch, comparison.theirs, **options)
    with torch_process(PYTHON.value, spec) as process:
        ours = {
            name: torch_sides.Decoding(config, adapter, frozen, prompts_BT, NEW_TOKENS.value)
            for name, adapter in comparison.ours.items()
        }
        theirs = {name: TorchSide(process, name) for name in comparison.theirs}
        rows = _measure({**theirs, **ours}, comparison.reference, BATCH.value * NEW_TOKENS.value)
    tokens = {name: side.answers[-1]["tokens"] for name, side in theirs.items()}
    tokens |= {name: side.tokens for name, side in ours.items()}
    expected = np.asarray(tokens[comparison.reference])
    for row in rows:
        row["same_tokens"] = float(np.mean(np.asarray(tokens[row["side"]]) == expected))
    return rows, process.versions


def _measure(sides: Mapping[str, Any], reference: str, tokens: int) -> list[dict]:
    """A row for each side; the ratios are to `reference` in the same round."""
    repeats = REPEATS.value
    seconds = take_turns(sides, repeats)
    cpu_seconds = {name: side.cpu_seconds[-repeats:] for name, side in sides.items()}
    rows = []
    for name, own in seconds.items():
        median = statistics.median(own)
        rows.append(
            {
                "side": name,
                "median_s": median,
                "min_s": min(own),
                "cpu_s": statistics.median(cpu_seconds[name]),
                "tokens_per_s": tokens / median,
                f"vs_{reference}": median_ratio(own, seconds[reference]),
                "cpu_ratio": median_ratio(cpu_seconds[name], cpu_seconds[reference]),
            }
        )
    return rows


if __name__ == "__main__":
    run_main(main)
