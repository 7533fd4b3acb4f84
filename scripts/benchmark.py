"""Measures speed and memory: one adapted projection, or whole training steps. Prints a table and writes JSON.

  python scripts/benchmark.py --kind=layer --sizes=512,1024,2048,4096,8192
  python scripts/benchmark.py --kind=layer --sizes=2048 --ranks=4,16 --ks=1,4 --num_experts=32
  python scripts/benchmark.py --kind=step --num_layers=8 --emb_dim=512 --mlp_dim=1408
  python scripts/benchmark.py --kind=methods --candidates=molora,malora:num_experts=16:rank=34:shared_dim=36
  python scripts/benchmark.py --kind=scaling --rows=2,4,8,16 --experts=8,16,32,64 --plot=scaling.png
  python scripts/benchmark.py --kind=data --mixture=cldr_sw

The compared sides take turns within one run, so that their ratios hold on a busy machine; times are medians.
"""

from pathlib import Path

from absl import flags

from scripts.benchmark_data import run_data_benchmark
from scripts.benchmark_layer import (
    ALGORITHMS,
    keep_freed_memory,
    run_layer_benchmark,
)
from scripts.benchmark_scaling import plot_scaling, run_scaling_benchmark
from scripts.benchmark_step import method_adapters, run_step_benchmark, step_adapters
from scripts.cli import run_main
from scripts.table import format_rows, write_rows
from sira_jax.adapters import METHODS, AdapterConfig, SiRAConfig
from sira_jax.errors import check
from sira_jax.models import DecoderConfig

KIND = flags.DEFINE_enum(
    "kind",
    "layer",
    ["layer", "step", "methods", "scaling", "data"],
    "One projection; training steps of SiRA's dispatch algorithms and LoRAs; of all methods with their defaults; of SiRA"
    " against tokens and experts; or on real data and a fixed batch.",
)
OUT = flags.DEFINE_string("out", None, "Also write the rows to this JSON file.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Rounds.", lower_bound=1)
NUM_EXPERTS = flags.DEFINE_integer("num_experts", 16, "E.", lower_bound=1)
SIZES = flags.DEFINE_list("sizes", ["512", "1024", "2048", "4096", "8192"], "layer: tokens S.")
RANKS = flags.DEFINE_list("ranks", ["4"], "Ranks R of an expert; step takes the first.")
KS = flags.DEFINE_list("ks", ["4"], "Selected experts k; step takes the first.")
D_IN = flags.DEFINE_integer("d_in", 1024, "layer: features in.", lower_bound=1)
D_OUT = flags.DEFINE_integer("d_out", 1024, "layer: features out.", lower_bound=1)
CAPACITY = flags.DEFINE_float("capacity_factor", 1.25, "layer: capacity factor.")
CANDIDATES = flags.DEFINE_list(
    "candidates", [], "layer: dispatch algorithms; step: adapters; methods: methods. Empty for all."
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the computation.")
VOCAB = flags.DEFINE_integer("vocab_size", 4096, "step: vocabulary.", lower_bound=1)
EMB = flags.DEFINE_integer("emb_dim", 512, "step: width.", lower_bound=1)
LAYERS = flags.DEFINE_integer("num_layers", 8, "step: layers.", lower_bound=1)
HEADS = flags.DEFINE_integer("num_heads", 8, "step: heads.", lower_bound=1)
MLP_DIM = flags.DEFINE_integer("mlp_dim", 1408, "step: width of the MLP.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch_size", 8, "step: rows.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 128, "step: tokens a row.", lower_bound=1)
ROWS = flags.DEFINE_list("rows", ["2", "4", "8", "16"], "scaling: rows of a batch.")
EXPERTS = flags.DEFINE_list("experts", ["8", "16", "32", "64"], "scaling: numbers of experts.")
PLOT = flags.DEFINE_string("plot", None, "scaling: also draw a PNG file.")
MIXTURE = flags.DEFINE_string("mixture", "cldr_sw", "data: a mixture or a task.")


def _numbers(flag) -> list[int]:
    for value in flag.value:
        check(value.isdecimal() and int(value) > 0, f"--{flag.name}", value, "whole numbers over 0")
    return [int(value) for value in flag.value]


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    del argv
    keep_freed_memory()
    kinds = {"layer": _layer, "scaling": _scaling, "data": _data}
    rows = kinds.get(KIND.value, lambda: _step(_adapters()))()
    print(format_rows(rows))
    if OUT.value:
        write_rows(OUT.value, KIND.value, rows)


def _layer() -> list[dict]:
    names = CANDIDATES.value or list(ALGORITHMS)
    for name in names:
        check(name in ALGORITHMS, "--candidates", name, f"some of {', '.join(ALGORITHMS)}")
    return run_layer_benchmark(
        _numbers(SIZES),
        NUM_EXPERTS.value,
        _numbers(RANKS),
        _numbers(KS),
        D_IN.value,
        D_OUT.value,
        CAPACITY.value,
        REPEATS.value,
        names,
        dtype=DTYPE.value,
        log=print,
    )


def _adapters() -> dict[str, AdapterConfig]:
    if KIND.value == "methods":
        return method_adapters(CANDIDATES.value or list(METHODS))
    known = step_adapters(NUM_EXPERTS.value, _numbers(RANKS)[0], _numbers(KS)[0])
    for name in CANDIDATES.value:
        check(name in known, "--candidates", name, f"some of {', '.join(known)}")
    return {name: known[name] for name in CANDIDATES.value or known}


def _sira() -> SiRAConfig:
    (rank, *_), (k, *_) = _numbers(RANKS), _numbers(KS)
    return SiRAConfig(num_experts=NUM_EXPERTS.value, rank=rank, num_selected_experts=k)


def _scaling() -> list[dict]:
    rows = run_scaling_benchmark(
        _model(),
        _sira(),
        _numbers(ROWS),
        _numbers(EXPERTS),
        length=LENGTH.value,
        repeats=REPEATS.value,
        log=print,
    )
    if PLOT.value:
        plot_scaling(rows, Path(PLOT.value))
    return rows


def _data() -> list[dict]:
    sizes = {"batch_size": BATCH.value, "length": LENGTH.value, "repeats": REPEATS.value}
    return run_data_benchmark(_model(), _sira(), MIXTURE.value, **sizes)


def _model() -> DecoderConfig:
    heads = HEADS.value
    return DecoderConfig(
        vocab_size=VOCAB.value,
        emb_dim=EMB.value,
        num_layers=LAYERS.value,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=max(2, EMB.value // heads),
        mlp_dim=MLP_DIM.value,
        dtype=DTYPE.value,
    )


def _step(adapters: dict[str, AdapterConfig]) -> list[dict]:
    return run_step_benchmark(
        _model(),
        adapters,
        batch_size=BATCH.value,
        length=LENGTH.value,
        repeats=REPEATS.value,
        log=print,
    )


if __name__ == "__main__":
    run_main(main)
