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

import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from scripts import torch_sides
from scripts.cli import run_main
from scripts.table import format_rows
from scripts.timed_step import take_turns
from scripts.torch_process import TorchProcess, TorchSide, torch_process
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
        machine = {
            "jax": jax.__version__,
            **versions,
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
        }
        Path(OUT.value).write_text(
            json.dumps({"kind": KIND.value, "machine": machine, "rows": rows}, indent=1)
        )


def _step(comparison: torch_sides.Comparison, folder: Path) -> tuple[list[dict], dict[str, str]]:
    heads = HEADS.value
    check(
        EMB.value % (2 * heads) == 0,
        "--emb_dim",
        EMB.value,
        f"a multiple of twice --num_heads={heads}",
    )
    config = DecoderConfig(
        vocab_size=VOCAB.value,
        emb_dim=EMB.value,
        num_layers=LAYERS.value,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=EMB.value // heads,
        mlp_dim=MLP_DIM.value,
    )
    batch = torch_sides.random_batch(config.vocab_size, BATCH.value, LENGTH.value)
    frozen = torch_sides.random_base(config)
    spec = torch_sides.write_inputs(folder, config, frozen, batch, comparison.theirs, kind="step")
    with torch_process(PYTHON.value, spec) as process:
        ours = torch_sides.step_sides(config, comparison.ours, frozen, batch)
        seconds, theirs = _turns(ours, process, comparison)
        losses = {name: float(side.first_metrics["loss"]) for name, side in ours.items()}
        losses |= {name: side.first["loss"] for name, side in theirs.items()}
        if max(losses.values()) - min(losses.values()) > torch_sides.LOSS_TOLERANCE:
            raise RuntimeError(f"the sides do not compute the same: losses {losses}")
        rows = _rows(seconds, comparison.reference, BATCH.value * LENGTH.value)
        for row in rows:
            side = ours.get(row["side"])
            row["loss"] = losses[row["side"]]
            row["temp_mib"] = side.scratch_bytes / 2**20 if side and side.scratch_bytes else None
        return rows, process.versions


def _decode(comparison: torch_sides.Comparison, folder: Path) -> tuple[list[dict], dict[str, str]]:
    if MODEL.value:
        base = load_base_model(os.path.expanduser(MODEL.value))
        config, frozen = base.config, base.params
    else:
        config = preset("smollm2-135m")
        frozen = torch_sides.random_base(config)
    longest = config.max_positions - NEW_TOKENS.value
    check(PROMPT_LENGTH.value <= longest, "--prompt_length", PROMPT_LENGTH.value, f"up to {longest}")
    batch = torch_sides.random_batch(config.vocab_size, BATCH.value, PROMPT_LENGTH.value)
    prompts_BT = jax.device_get(batch["decoder_input_tokens"])
    spec = torch_sides.write_inputs(
        folder,
        config,
        frozen,
        batch,
        comparison.theirs,
        kind="decode",
        new_tokens=NEW_TOKENS.value,
    )
    with torch_process(PYTHON.value, spec) as process:
        ours = {
            name: torch_sides.Decoding(config, adapter, frozen, prompts_BT, NEW_TOKENS.value)
            for name, adapter in comparison.ours.items()
        }
        seconds, theirs = _turns(ours, process, comparison)
        expected = theirs[comparison.reference].first["tokens"]
        rows = _rows(seconds, comparison.reference, BATCH.value * NEW_TOKENS.value)
        for row in rows:
            tokens = (ours | theirs)[row["side"]].first["tokens"]
            pairs = [
                pair for own, one in zip(tokens, expected, strict=True) for pair in zip(own, one, strict=True)
            ]
            row["same_tokens"] = sum(own == one for own, one in pairs) / len(pairs)
        return rows, process.versions


def _turns(
    ours: Mapping[str, Any], process: TorchProcess, comparison: torch_sides.Comparison
) -> tuple[dict[str, list[float]], dict[str, TorchSide]]:
    theirs = {name: TorchSide(process, name) for name in comparison.theirs}
    return take_turns({**theirs, **ours}, REPEATS.value), theirs


def _rows(seconds: Mapping[str, list[float]], reference: str, tokens: int) -> list[dict]:
    rows = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[reference], strict=True)]
        rows.append(
            {
                "side": name,
                "median_s": statistics.median(own),
                "min_s": min(own),
                "tokens_per_s": tokens / statistics.median(own),
                f"vs_{reference}": statistics.median(ratios),
                "min_ratio": min(ratios),
                "max_ratio": max(ratios),
            }
        )
    return rows


if __name__ == "__main__":
    run_main(main)
