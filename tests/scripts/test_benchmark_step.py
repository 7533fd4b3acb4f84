"""The step benchmark measures what it says, on a model small enough for a test."""

import pytest

from scripts.benchmark_step import method_adapters, run_step_benchmark, step_adapters
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
