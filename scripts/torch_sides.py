"""The sides that `scripts/benchmark_torch.py` compares: ours, and the description of PyTorch's for its worker.

Axis letters: B rows, T tokens a row.
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scripts.benchmark_step import make_timed_step, random_base, random_batch
from scripts.timed_step import TimedStep
from sira_jax.adapters import AdapterConfig, LoRAConfig, SiRAConfig
from sira_jax.checkpoints import save_hf_folder
from sira_jax.models import DecoderConfig, make_model
from sira_jax.training.config import DecodeConfig, OptimizerConfig
from sira_jax.training.decoding import generate
from sira_jax.training.train_state import init_adapter, merge_params, split_params

MLP = ("gate", "up", "down")
# With two equal models and tokens, float32 losses differ by rounding alone.
LOSS_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Adapters by the name of their side.

    Attributes:
      ours: configs.
      theirs: what `scripts/torch_worker.py` reads.
      reference: the side of PyTorch that ratios are taken to.
    """

    ours: Mapping[str, AdapterConfig]
    theirs: Mapping[str, Mapping[str, Any]]
    reference: str


def comparison(kind: str, num_experts: int, rank: int, k: int) -> Comparison:
    """The sides of a kind: "lora", "mixlora" or "decode".

    `floor` and `peft_floor` are the frozen model with the least that still needs the whole backward pass: a LoRA of rank 1 on
    q of each layer. (One on the first layer alone would need the same, and scanned layers have none of their own.)
    """
    sira = SiRAConfig(num_experts=num_experts, rank=rank, num_selected_experts=k)
    lora = LoRAConfig(rank=rank)
    reference = f"peft_lora_r{rank}"
    if kind == "mixlora":
        mixture = {"method": "mixlora", "num_experts": num_experts, "num_selected_experts": k}
        on_mlp = dataclasses.replace(sira, targets=MLP)
        return Comparison(
            ours={"sira_mlp": on_mlp},
            theirs={"mixlora": _theirs(on_mlp) | mixture},
            reference="mixlora",
        )
    ours = {f"lora_r{rank}": lora, "sira": sira}
    theirs = {reference: _theirs(lora)}
    if kind == "lora":
        floor = LoRAConfig(rank=1, targets=("q",))
        ours, theirs = {"floor": floor} | ours, {"peft_floor": _theirs(floor)} | theirs
    return Comparison(ours=ours, theirs=theirs, reference=reference)


def _theirs(config: AdapterConfig) -> dict[str, Any]:
    modules = [f"{target}_proj" for target in config.targets]
    return {"method": "lora", "rank": config.rank, "alpha": round(config.alpha), "modules": modules}


def step_sides(
    config: DecoderConfig,
    adapters: Mapping[str, AdapterConfig],
    frozen: Any,
    batch: Mapping[str, jax.Array],
) -> dict[str, TimedStep]:
    """Our steps, compiled."""
    frozen = split_params(frozen)[1]
    return {name: make_timed_step(config, one, frozen, batch) for name, one in adapters.items()}


class Decoding:
    """Our greedy decoding of prompts of equal length.

    Attributes:
      tokens: rows of generated tokens of the last run.
      cpu_seconds: of all threads of the process, for each run.
    """

    def __init__(
        self,
        config: DecoderConfig,
        adapter: AdapterConfig,
        frozen: Any,
        prompts_BT: np.ndarray,
        new_tokens: int,
    ):
        self._model = make_model(config, adapter)
        fresh = init_adapter(self._model, 0)
        self._params = merge_params(fresh, split_params(frozen)[1])
        self._prompts = prompts_BT.tolist()
        self._config = DecodeConfig(max_new_tokens=new_tokens, batch_size=len(self._prompts))
        self.tokens: list[list[int]] = []
        self.cpu_seconds: list[float] = []

    def run(self) -> float:
        """Seconds from the prompts to the tokens."""
        start, cpu_start = time.perf_counter(), time.process_time()
        self.tokens = generate(self._model, self._params, self._prompts, self._config)
        seconds = time.perf_counter() - start
        self.cpu_seconds.append(time.process_time() - cpu_start)
        return seconds


def write_inputs(
    folder: Path,
    config: DecoderConfig,
    frozen: Any,
    batch: Mapping[str, jax.Array],
    theirs: Mapping[str, Mapping[str, Any]],
    **options: Any,
) -> dict[str, Any]:
    """Writes model and tokens for the worker and returns what to send it; `options` are its kind and what that needs."""
    save_hf_folder(folder, config, split_params(frozen)[1])
    arrays = str(folder / "arrays.npz")
    np.savez(arrays, inputs=batch["decoder_input_tokens"], targets=batch["decoder_target_tokens"])
    optimizer = OptimizerConfig()
    names = ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay", "clip_norm")
    return {
        "folder": str(folder),
        "arrays": arrays,
        "sides": dict(theirs),
        "threads": os.cpu_count(),
        **{name: getattr(optimizer, name) for name in names},
        **options,
    }


__all__ = [
    "LOSS_TOLERANCE",
    "Comparison",
    "Decoding",
    "comparison",
    "random_base",
    "random_batch",
    "step_sides",
    "write_inputs",
]
