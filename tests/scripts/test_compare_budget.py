"""Sizes of a comparison's methods against counts by hand and a search through all values."""

import dataclasses
from typing import ClassVar

import pytest

from scripts import compare_budget
from sira_jax.adapters import LoRAConfig, SiRAConfig
from sira_jax.errors import ConfigError, check
from sira_jax.models import DecoderConfig

MODEL = DecoderConfig(
    vocab_size=32,
    emb_dim=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=20,
)
# (d_in, d_out) of q, k, v, o, gate, up, down.
SHAPES = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 20), (16, 20), (20, 16)]
BOTH = 3 * sum(d_in + d_out for d_in, d_out in SHAPES)
IN = 3 * sum(d_in for d_in, _ in SHAPES)


def count(config):
    return compare_budget.count(config, MODEL)


def fit(adapter, budget="parameters", rank=4, target=4 * BOTH):
    return compare_budget.fit(adapter, budget, rank, count, target)


def test_counts_by_hand():
    assert count(LoRAConfig(rank=4)) == 4 * BOTH
    sira = SiRAConfig(num_experts=6, num_selected_experts=2, rank=3)
    assert count(sira) == 6 * (3 * BOTH + IN)
    assert compare_budget.count(sira, MODEL, active=True) == 2 * 3 * BOTH + 6 * IN


def test_active_parameters_under_smoe_dropout():
    """No router is trained, and k is 1 to 6 for equal shares of the training."""
    sira = SiRAConfig(num_experts=6, rank=2, router_regularizer="smoe_dropout")
    assert compare_budget.count(sira, MODEL, active=True) == 3.5 * 2 * BOTH


@pytest.mark.parametrize("rank", [1, 2, 7, 33])
def test_the_baseline_fits_itself(rank):
    fitted = fit(LoRAConfig(rank=4, alpha=8.0), target=rank * BOTH)
    assert fitted == LoRAConfig(rank=rank, alpha=2.0 * rank)


def mixture(**changes):
    fields = {"num_experts": 8, "num_selected_experts": 4, "rank": 4, "alpha": 8.0}
    return SiRAConfig(**fields | changes)


@pytest.mark.parametrize("rank", [2, 5, 11])
@pytest.mark.parametrize("off", [-0.04, 0.0, 0.04])
def test_the_nearest_rank_of_a_mixture(rank, off):
    expected = 8 * (rank * BOTH + IN)
    target = round(expected * (1 + off))
    fitted = fit(mixture(), target=target)
    assert fitted == mixture(rank=rank, alpha=2.0 * rank)
    size = compare_budget.measure(fitted, mixture(), MODEL, target)
    assert size.trained == expected
    assert size.deviation == pytest.approx((expected - target) / target)
    assert size.fields == {"rank": rank} | ({"alpha": 2.0 * rank} if rank != 4 else {})


@pytest.mark.parametrize(("target_rank", "rank"), [(16, 2), (4, 1), (2, 1)])
def test_where_no_rank_is_near_there_are_fewer_experts(target_rank, rank):
    target = target_rank * BOTH
    by_rank = [8 * (r * BOTH + IN) for r in range(1, 9)]
    assert min(abs(count - target) for count in by_rank) > 0.05 * target
    assert rank == 1 or by_rank[rank - 2] < target
    assert by_rank[rank - 1] > target
    by_experts = {experts: experts * (rank * BOTH + IN) for experts in range(1, 9)}
    best = min(by_experts, key=lambda experts: abs(by_experts[experts] - target))
    assert best < 8
    fitted = fit(mixture(), target=target)
    assert (fitted.rank, fitted.num_experts) == (rank, best)
    assert fitted.num_selected_experts == min(4, best)
    assert fitted.scale == 2.0
    size = compare_budget.measure(fitted, mixture(), MODEL, target)
    assert size.trained == by_experts[best]
    assert size.active == min(4, best) * rank * BOTH + best * IN
    assert set(size.fields) >= {"rank", "alpha", "num_experts"}


def test_equal_rank_changes_the_rank_and_its_scale_alone():
    sira = SiRAConfig(rank=4, alpha=32.0)
    assert fit(sira, "rank", 6) == dataclasses.replace(sira, rank=6, alpha=48.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OddConfig(LoRAConfig):
    """LoRA whose rank must be odd."""

    def __post_init__(self):
        super().__post_init__()
        check(self.rank % 2 == 1, "adapter.rank", self.rank, "odd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedConfig(LoRAConfig):
    """LoRA of one size."""

    size_field: ClassVar[str | None] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorsConfig(LoRAConfig):
    """A method whose size is a number of vectors."""

    size_field: ClassVar[str | None] = "num_experts"
    num_experts: int = 5

    def count_parameters(self, d_in, d_out):
        return self.num_experts * d_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeverConfig(LoRAConfig):
    """A method that allows no rank but 0.5."""

    def __post_init__(self):
        check(self.rank == 0.5, "adapter.rank", self.rank, "0.5")


def test_values_that_are_not_allowed_are_passed_over():
    assert fit(OddConfig(rank=1), target=4 * BOTH).rank in (3, 5)
    assert fit(OddConfig(rank=1), target=5 * BOTH).rank == 5
    assert fit(OddConfig(rank=1), target=1).rank == 1


def test_a_method_of_fixed_size_stays_as_it_is():
    for budget in compare_budget.BUDGETS:
        assert fit(FixedConfig(rank=2), budget) == FixedConfig(rank=2)


def test_a_size_that_is_no_rank():
    assert fit(VectorsConfig(), "rank") == VectorsConfig()
    out = 3 * sum(d_out for _, d_out in SHAPES)
    fitted = fit(VectorsConfig(), target=11 * out + 1)
    assert fitted == VectorsConfig(num_experts=11)


def test_no_allowed_size_is_an_error():
    with pytest.raises(ConfigError, match=r"adapter\.rank: no value from 1 to 4096"):
        fit(NeverConfig(rank=0.5))
