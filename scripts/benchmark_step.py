"""Times and memory of whole training steps, for each adapter. `scripts/benchmark.py` prints the table."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scripts.arguments import parse_value
from scripts.timed_step import TimedStep, median_ratio, take_turns
from sira_jax.adapters import (
    METHODS,
    AdapterConfig,
    LoRAConfig,
    SiRAConfig,
    count_model_parameters,
    make_config,
)
from sira_jax.errors import check
from sira_jax.models import DecoderConfig, make_model
from sira_jax.training.config import OptimizerConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import fresh_state, init_adapter, split_params
from sira_jax.training.train_step import make_train_step

_NUM_STEPS = 1000  # of the schedules


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
            fields[field] = parse_value(value)
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
    batch = random_batch(config.vocab_size, batch_size, length)
    frozen = random_base(config)
    steps = {}
    for name in names:
        steps[name] = make_timed_step(config, adapters[name], frozen, batch)
        if log:
            log(f"{name} compiled")
    seconds = take_turns(steps, repeats)
    rows = []
    for name in names:
        median = statistics.median(seconds[name])
        scratch = steps[name].scratch_bytes
        row = {
            "candidate": name,
            "trained": count_model_parameters(adapters[name], config.stacks, config.emb_dim),
            "median_s": median,
            "min_s": min(seconds[name]),
            "tokens_per_s": batch_size * length / median,
            "temp_mib": None if scratch is None else scratch / 2**20,
            "state_mib": steps[name].state_bytes / 2**20,
        }
        for column, base in (
            ("vs_first", names[0]),
            ("vs_same_rank", f"lora_r{adapters[name].trained_rank}"),
        ):
            other = seconds.get(base)
            row[column] = None if other is None else median_ratio(seconds[name], other)
        rows.append(row)
    return rows


def random_base(config: DecoderConfig) -> Any:
    """Parameters of a frozen model as initialised."""
    model = make_model(config)
    variables = jax.jit(model.init)(jax.random.key(0), model.init_batch())
    return split_params(nn.unbox(variables["params"]))[1]


def random_batch(vocab_size: int, batch_size: int, length: int) -> dict[str, jax.Array]:
    """Rows of random tokens (B, T), every position a target."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (batch_size, length + 1))
    return {
        "decoder_input_tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "decoder_target_tokens": jnp.asarray(tokens[:, 1:], jnp.int32),
        "decoder_loss_weights": jnp.ones((batch_size, length), jnp.float32),
        "decoder_segment_ids": jnp.ones((batch_size, length), jnp.int32),
    }


def make_timed_step(
    config: DecoderConfig, adapter: AdapterConfig, frozen: Any, batch: Mapping[str, jax.Array]
) -> TimedStep:
    """The AdamW step of a fresh adapter, compiled; see `run_step_benchmark`."""
    model = make_model(config, adapter)
    optimizer_config = OptimizerConfig()
    optimizer = make_optimizer(optimizer_config, _NUM_STEPS)
    schedule = make_schedule(optimizer_config, _NUM_STEPS)
    step = make_train_step(model, optimizer, schedule, seed=0, num_steps=_NUM_STEPS)
    state = fresh_state(init_adapter(model, 0), optimizer)
    return TimedStep(jax.jit(step, donate_argnums=0), state, frozen, batch)
