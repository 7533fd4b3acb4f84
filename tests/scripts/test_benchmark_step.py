"""The step benchmark measures what it says, on a model small enough for a test."""

import time

import pytest

import tasks
from scripts.benchmark_data import run_data_benchmark
from scripts.benchmark_scaling import plot_scaling, run_scaling_benchmark
from scripts.benchmark_step import method_adapters, run_step_benchmark, step_adapters
from sira_jax.adapters import LoRAConfig, SiRAConfig
from sira_jax.errors import ConfigError
from tests.tiny import decoder_config


@pytest.mark.slow
def test_candidates_are_held_against_the_lora_of_their_trained_rank():
    adapters = method_adapters(["sira", "lora"])
    assert list(adapters) == ["lora_r64", "sira", "lora_r4", "lora"]
    adapters = {name: adapters[name] for name in ("lora_r4", "lora")}
    lines = []
    rows = run_step_benchmark(
        decoder_config(num_layers=1), adapters, batch_size=2, length=4, repeats=3, log=lines.append
    )
    assert [row["candidate"] for row in rows] == ["lora_r4", "lora"]
    assert len(lines) == 2
    first, second = rows
    assert first["vs_first"] == first["vs_same_rank"] == 1.0
    assert second["vs_first"] == second["vs_same_rank"] > 0
    assert first["trained"] == second["trained"] > 0
    assert 0 < first["min_s"] <= first["median_s"]
    assert first["tokens_per_s"] == 8 / first["median_s"]


def test_candidates_may_change_fields():
    adapters = method_adapters(["sira:num_experts=8:rank=2:dispatch=einsum"])
    (_, baseline), (_, sira) = adapters.items()
    assert baseline.rank == 16
    assert (sira.num_experts, sira.rank, sira.dispatch) == (8, 2, "einsum")


@pytest.mark.parametrize(
    ("candidate", "named"),
    [
        ("lorra", "lorra"),
        ("lora:rank", "lora:rank"),
        ("lora:rnk=2", "rnk"),
        ("lora:rank=x", "rank"),
    ],
)
def test_wrong_candidates_are_named(candidate, named):
    with pytest.raises(ConfigError, match=named):
        method_adapters([candidate])


@pytest.mark.slow
def test_without_a_lora_of_the_same_rank_there_is_no_ratio_to_it():
    adapters = {"floor": step_adapters(4, 2, 2)["floor"]}
    (row,) = run_step_benchmark(
        decoder_config(num_layers=1), adapters, batch_size=1, length=4, repeats=1
    )
    assert row["vs_same_rank"] is None
    assert row["vs_first"] == 1.0


@pytest.mark.slow
def test_sizes_take_turns_and_lie_beside_a_line(tmp_path):
    adapter = SiRAConfig(num_experts=2, rank=1, num_selected_experts=1)
    rows = run_scaling_benchmark(
        decoder_config(num_layers=1), adapter, [1, 2], [2, 4], length=4, repeats=2
    )
    assert [(row["series"], row["value"]) for row in rows] == [
        ("tokens", 4),
        ("tokens", 8),
        ("experts", 2),
        ("experts", 4),
    ]
    # Two points are on their line.
    assert all(row["fit_s"] == pytest.approx(row["median_s"]) for row in rows)
    assert all(row["off_line"] == pytest.approx(0, abs=1e-9) for row in rows)
    plot_scaling(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_real_batches_are_held_against_a_fixed_one(monkeypatch):
    make_batch = tasks.InputPipeline.next_batch

    def slow_batch(pipeline):
        time.sleep(0.05)
        return make_batch(pipeline)

    monkeypatch.setattr(tasks.InputPipeline, "next_batch", slow_batch)
    config = decoder_config(num_layers=1, vocab_size=384)
    fixed, data = run_data_benchmark(
        config, LoRAConfig(rank=1), "cldr_number_en", batch_size=2, length=128, repeats=3
    )
    assert (fixed["side"], fixed["vs_fixed"], fixed["fetch_ms"]) == ("fixed", 1.0, None)
    assert data["side"] == "data"
    # A step on new data has its own time and that of the batch.
    assert data["fetch_ms"] >= 50
    assert data["min_s"] > 0.05
