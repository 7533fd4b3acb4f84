import pytest

from scripts.benchmark_layer import run_layer_benchmark


def test_measures_every_candidate_of_every_setting():
    lines = []
    rows = run_layer_benchmark(
        [16, 24], 4, [2], [2], 8, 12, 1.25, 3, ("einsum", "masked", "auto"), log=lines.append
    )
    names = ["frozen", "lora_r2", "lora_r8", "sira_einsum", "sira_masked", "sira_auto"]
    assert [(row["S"], row["candidate"]) for row in rows] == [
        (size, name) for size in (16, 24) for name in names
    ]
    assert len(lines) == 2
    for row in rows:
        assert (row["num_experts"], row["rank"], row["k"], row["rounds"]) == (4, 2, 2, 3)
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["temp_mib"] >= 0
    for row in rows[:6]:
        assert row["vs_frozen"] > 0
    assert rows[0]["vs_frozen"] == rows[1]["vs_lora"] == rows[2]["vs_joined_lora"] == 1.0


def test_a_slow_candidate_is_timed_once():
    rows = run_layer_benchmark([16], 4, [2], [2], 8, 8, 1.25, 3, ("masked",), skip_seconds=0.0)
    assert {row["rounds"] for row in rows} == {1}
    times = {row["candidate"]: row["median_ms"] for row in rows}
    ratio = times["sira_masked"] / times["lora_r8"]
    assert rows[-1]["vs_joined_lora"] == pytest.approx(ratio)
