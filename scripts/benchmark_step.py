"""Times and memory of whole training steps, for each adapter. `scripts/benchmark.py` prints the table."""

import ast
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sira_jax.adapters import (
    METHODS,
    AdapterConfig,
    LoRAConfig,
    SiRAConfig,
    make_config,
    split_trained,
)
from sira_jax.errors import check
from sira_jax.models import Decoder, DecoderConfig
from sira_jax.training.config import OptimizerConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import TrainState, count, init_adapter, split_params
from sira_jax.training.train_step import make_train_step

_WARM_UP = 2


def step_adapters(num_experts: int, rank: int, k: int) -> dict[str, AdapterConfig]:
    """The compared adapters. `floor` is the least that still needs the whole backward pass: rank 1 on q alone."""
    sira = {
        f"sira_{dispatch}": SiRAConfig(
            num_experts=num_experts, rank=rank, num_selected_experts=k, dispatch=dispatch
        )
        for dispatch in ("auto", "einsum", "ragged")
    }
    return {
        "floor": LoRAConfig(rank=1, targets=("q",)),
        f"lora_r{rank}": LoRAConfig(rank=rank),
        f"lora_r{num_experts * rank}": LoRAConfig(rank=num_experts * rank),
        **sira,
    }


def method_adapters(candidates: Sequence[str]) -> dict[str, AdapterConfig]:
    """Configs by candidate, each after the LoRA that trains as many components.

    Args:
      candidates: methods of the registry, with the fields that differ from the defaults: "malora:num_experts=16:rank=34".

    Raises:
      ConfigError: unknown method or field, or a value out of range.
    """
    adapters: dict[str, AdapterConfig] = {}
    for candidate in candidates:
        name, *changes = candidate.split(":")
        fields = {}
        for change in changes:
            field, equals, value = change.partition("=")
            check(equals == "=", "--candidates", candidate, "METHOD, or METHOD:FIELD=VALUE:...")
            try:
                fields[field] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                fields[field] = value
        check(name in METHODS, "--candidates", name, f"some of {', '.join(METHODS)}")
        config = make_config(fields | {"method": name})
        adapters[f"lora_r{config.trained_rank}"] = LoRAConfig(rank=config.trained_rank)
        adapters[candidate] = config
    return adapters


def run_step_benchmark(
    config: DecoderConfig,
    adapters: Mapping[str, AdapterConfig],
    *,
    batch_size: int,
    length: int,
    repeats: int = 5,
    log: Callable[[str], None] | None = None,
) -> list[dict]:
    """Measures AdamW steps on random tokens, every position a target.

    Candidates take turns in `repeats` rounds, after two steps each that compile and settle.

    Args:
      config: the model.
      adapters: the candidates by name.
      batch_size: rows.
      length: tokens a row.
      repeats: rounds.
      log: called with a line for each candidate that is compiled.

    Returns:
      A dict for each candidate: candidate, trained (parameters), median_s, min_s, tokens_per_s, temp_mib, state_mib (what
      a step updates), and ratios to other candidates in the same round, medians over the rounds: vs_first, and vs_same_rank
      to the LoRA of the same trained rank, where there is one.
    """
    names = list(adapters)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, length + 1))
    batch = {
        "decoder_input_tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "decoder_target_tokens": jnp.asarray(tokens[:, 1:], jnp.int32),
        "decoder_loss_weights": jnp.ones((batch_size, length), jnp.float32),
        "decoder_segment_ids": jnp.ones((batch_size, length), jnp.int32),
    }
    variables = Decoder(config).init(jax.random.key(0), batch)
    frozen = nn.unbox(variables["params"])
    runs = {}
    for name in names:
        runs[name] = _Candidate(config, adapters[name], frozen, batch)
        if log:
            log(f"{name} compiled")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(repeats + _WARM_UP):
        for name in names:
            elapsed = runs[name].step()
            if round_index >= _WARM_UP:
                seconds[name].append(elapsed)
    rows = []
    for name in names:
        median = statistics.median(seconds[name])
        row = {
            "candidate": name,
            "trained": runs[name].trained,
            "median_s": median,
            "min_s": min(seconds[name]),
            "tokens_per_s": batch_size * length / median,
            "temp_mib": runs[name].temp_mib,
            "state_mib": runs[name].state_mib,
        }
        for column, base in (
            ("vs_first", names[0]),
            ("vs_same_rank", f"lora_r{adapters[name].trained_rank}"),
        ):
            pairs = zip(seconds[name], seconds.get(base, ()), strict=False)
            ratios = [own / other for own, other in pairs]
            row[column] = statistics.median(ratios) if ratios else None
        rows.append(row)
    return rows


class _Candidate:
    """A compiled step with its state."""

    def __init__(self, config: DecoderConfig, adapter: AdapterConfig, frozen: Any, batch: Any):
        model = Decoder(config, adapter)
        optimizer_config = OptimizerConfig()
        optimizer = make_optimizer(optimizer_config, 1000)
        step = make_train_step(
            model, optimizer, make_schedule(optimizer_config, 1000), seed=0, num_steps=1000
        )
        params = init_adapter(model, 0)
        trained = split_trained(params)[0]
        self._state = TrainState(
            step=jnp.int32(0), adapter=params, optimizer=optimizer.init(trained)
        )
        self._frozen, self._batch = split_params(frozen)[1], batch
        self._step = (
            jax.jit(step, donate_argnums=0).lower(self._state, self._frozen, batch).compile()
        )
        memory = self._step.memory_analysis()
        self.temp_mib = None if memory is None else memory.temp_size_in_bytes / 2**20
        self.state_mib = sum(x.nbytes for x in jax.tree.leaves(self._state)) / 2**20
        self.trained = count(trained)

    def step(self) -> float:
        """Runs one step and returns its seconds."""
        start = time.perf_counter()
        self._state, metrics = self._step(self._state, self._frozen, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - start
