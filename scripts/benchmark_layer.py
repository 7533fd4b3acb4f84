"""Times and memory of one adapted projection, forward and backward, for each dispatch algorithm.

A candidate computes y = x W0 + delta(x) with W0 frozen, and for a fixed dL/dy the gradients of L
with respect to x and the adapter's parameters; all of these are results, so that nothing of it can
be optimised away. `scripts/benchmark.py` prints the table.

Axis letters: G routing groups, S tokens a group, N = G * S tokens, D features in, F features out,
E experts, R rank.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from sira_jax.routing import RoutingConfig, mix_experts, project

ALGORITHMS = ("einsum", "masked", "ragged", "auto")


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory instead of giving it back to the system after every call.

    Otherwise arrays of 32 MiB and more come from fresh pages each time, which the system clears as
    they are first touched: about a fifth of the time at 8192 tokens, and none at 1024, though it is
    not the layer's. Must run before the first computation; does nothing outside of glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
        mallopt(arena_max, 1)


def _frozen(adapter, x_GSD, kernel_DF):
    return x_GSD @ kernel_DF


def _lora(adapter, x_GSD, kernel_DF):
    delta_GSF = project(2.0 * project(x_GSD, adapter["lora_a"]), adapter["lora_b"])
    return x_GSD @ kernel_DF + delta_GSF


def _sira(config: RoutingConfig) -> Callable:
    def layer(adapter, x_GSD, kernel_DF):
        delta_GSF, _ = mix_experts(
            x_GSD,
            jnp.ones(x_GSD.shape[:2], bool),
            adapter["router"],
            adapter["lora_a"],
            adapter["lora_b"],
            config,
            scale=2.0,
            deterministic=False,
        )
        return x_GSD @ kernel_DF + delta_GSF

    return layer


def _forward_and_backward(layer: Callable) -> Callable:
    def run(adapter, x_GSD, kernel_DF, cotangent_GSF):
        y_GSF, pull_back = jax.vjp(lambda *args: layer(*args, kernel_DF), adapter, x_GSD)
        return y_GSF, pull_back(cotangent_GSF)

    return run


def _candidates(num_experts, rank, k, d_in, d_out, capacity_factor, algorithms, seed):
    """Returns {name: (layer, adapter parameters)} of one setting."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def lora(lora_rank):
        return {
            "lora_a": jax.random.normal(next(keys), (d_in, lora_rank)) * d_in**-0.5,
            "lora_b": jax.random.normal(next(keys), (lora_rank, d_out)) * 0.02,
        }

    experts = {
        "lora_a": jax.random.normal(next(keys), (num_experts, d_in, rank)) * d_in**-0.5,
        "lora_b": jax.random.normal(next(keys), (num_experts, rank, d_out)) * 0.02,
        "router": jax.random.normal(next(keys), (d_in, num_experts)) * 0.02,
    }
    candidates = {
        "frozen": (_frozen, {}),
        f"lora_r{rank}": (_lora, lora(rank)),
    }
    candidates[f"lora_r{num_experts * rank}"] = (_lora, lora(num_experts * rank))
    for algorithm in algorithms:
        config = RoutingConfig(
            num_experts=num_experts,
            num_selected_experts=k,
            capacity_factor=capacity_factor,
            dispatch=algorithm,
        )
        candidates[f"sira_{algorithm}"] = (_sira(config), experts)
    return candidates


def run_layer_benchmark(
    sizes_S: Sequence[int] = (512, 1024, 2048, 4096, 8192),
    num_experts: int = 16,
    ranks: Sequence[int] = (4,),
    ks: Sequence[int] = (4,),
    d_in: int = 1024,
    d_out: int = 1024,
    capacity_factor: float | None = 1.25,
    repeats: int = 15,
    algorithms: Sequence[str] = ALGORITHMS,
    *,
    dtype: str = "float32",
    skip_seconds: float = 10.0,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> list[dict]:
    """Measures every (S, rank, k) setting, one group of S tokens, on the default device.

    Candidates take turns in `repeats` rounds, so a busy machine slows all of them alike. Each is
    timed from call to finished result, after a first run. Call `keep_freed_memory` before, or the
    times of the larger sizes hold those of the system's page clearing.

    Args:
      sizes_S: tokens of the group.
      num_experts: E.
      ranks: ranks R of an expert.
      ks: experts a token selects.
      d_in: width in.
      d_out: width out.
      capacity_factor: see `RoutingConfig`.
      repeats: rounds.
      algorithms: dispatch algorithms to measure beside the frozen projection, a LoRA of rank R and
        one of rank E * R.
      dtype: type of x and W0; adapters are float32.
      skip_seconds: a candidate whose warm run takes longer is not repeated; its one time stands.
      seed: of the random arrays.
      log: called with a line when a setting is done.

    Returns:
      A dict for each setting and candidate: S, num_experts, rank, k, candidate; median_ms, min_ms,
      rounds; temp_mib (scratch memory of the compiled program; None where the backend does not
      tell); and ratios: vs_frozen (of medians), vs_lora and vs_joined_lora (medians over the rounds
      of the ratio to the LoRA of rank R and E * R in the same round), and
      adapter_vs_joined_lora, what is left of the latter without the frozen projection.
    """
    rows = []
    for size in sizes_S:
        for rank in ranks:
            for k in ks:
                candidates = _candidates(
                    num_experts, rank, k, d_in, d_out, capacity_factor, algorithms, seed
                )
                setting = {"S": size, "num_experts": num_experts, "rank": rank, "k": k}
                measured = _measure(candidates, size, d_in, d_out, dtype, repeats, skip_seconds)
                names = ("frozen", f"lora_r{rank}", f"lora_r{num_experts * rank}")
                rows += [setting | row for row in _compare(measured, *names)]
                if log is not None:
                    log(f"S={size} rank={rank} k={k} measured")
    return rows


def _measure(candidates, size, d_in, d_out, dtype, repeats, skip_seconds):
    """Returns {name: (seconds of each round, scratch bytes or None)}."""
    x_key, kernel_key, cotangent_key = jax.random.split(jax.random.key(size), 3)
    x_GSD = jax.random.normal(x_key, (1, size, d_in)).astype(dtype)
    kernel_DF = (jax.random.normal(kernel_key, (d_in, d_out)) * d_in**-0.5).astype(dtype)
    cotangent_GSF = jax.random.normal(cotangent_key, (1, size, d_out)).astype(dtype)

    calls, memory, seconds = {}, {}, {}
    for name, (layer, adapter) in candidates.items():
        arguments = (adapter, x_GSD, kernel_DF, cotangent_GSF)
        compiled = jax.jit(_forward_and_backward(layer)).lower(*arguments).compile()
        analysis = compiled.memory_analysis()
        memory[name] = None if analysis is None else analysis.temp_size_in_bytes
        calls[name] = (compiled, arguments)
        _seconds(*calls[name])
        first = _seconds(*calls[name])
        seconds[name] = [first] if first > skip_seconds else []
    timed = [name for name in calls if not seconds[name]]
    for turn in range(repeats):
        shift = turn % max(len(timed), 1)
        for name in timed[shift:] + timed[:shift]:
            seconds[name].append(_seconds(*calls[name]))
    return {name: (seconds[name], memory[name]) for name in calls}


def _seconds(compiled, arguments):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - start


def _compare(measured, frozen, lora, joined_lora):
    medians = {name: statistics.median(seconds) for name, (seconds, _) in measured.items()}

    def ratio(name, base):
        pairs = zip(measured[name][0], measured[base][0], strict=False)
        return statistics.median(mine / its for mine, its in pairs)

    rows = []
    for name, (seconds, temp_bytes) in measured.items():
        adapter_seconds = medians[name] - medians[frozen]
        joined_seconds = medians[joined_lora] - medians[frozen]
        rows.append(
            {
                "candidate": name,
                "median_ms": medians[name] * 1e3,
                "min_ms": min(seconds) * 1e3,
                "rounds": len(seconds),
                "temp_mib": None if temp_bytes is None else temp_bytes / 2**20,
                "vs_frozen": ratio(name, frozen),
                "vs_lora": ratio(name, lora),
                "vs_joined_lora": ratio(name, joined_lora),
                "adapter_vs_joined_lora": adapter_seconds / joined_seconds
                if joined_seconds > 0
                else None,
            }
        )
    return rows
