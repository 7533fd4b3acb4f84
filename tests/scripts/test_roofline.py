"""The estimate of a program's time, by hand for a small one, and the table of chips."""

import math
from pathlib import Path

import pytest

from scripts import hlo_collectives
from scripts.chips import CHIPS, chip_of
from scripts.hlo_costs import Counter
from scripts.hlo_text import parse
from scripts.roofline import estimate
from sira_jax.errors import ConfigError

TEXT = (Path(__file__).parent / "hlo" / "tpu.txt").read_text()
V5E = CHIPS["v5e"]


def run(text, axes=1):
    module = parse(text)
    counter = Counter(module)
    mesh = hlo_collectives.Mesh({"fsdp": 8})
    found = hlo_collectives.find(counter, module, mesh)
    return estimate(counter.runs, module, found, V5E, lambda one: axes), counter


def test_every_instruction_keeps_one_unit_busy():
    got, counter = run(TEXT)
    product = 8 * 2 * 256 * 64 * 128
    # "highest" takes six passes.
    others = counter.total.other_flops
    assert got.compute == pytest.approx((6 * product + others) / V5E.peak_flops)
    assert got.memory == pytest.approx(counter.total.bytes / V5E.memory_bandwidth)
    busy = sum(
        r.times
        * max(
            (r.cost.matrix_flops * 6 + r.cost.other_flops) / V5E.peak_flops,
            r.cost.bytes / V5E.memory_bandwidth,
        )
        for r in counter.runs
    )
    assert got.step == pytest.approx(max(busy, got.communication))
    assert max(got.compute, got.memory) < busy < got.compute + got.memory


def test_precision_decides_the_passes():
    plain, _ = run(TEXT.replace(", operand_precision={highest,highest}", ""))
    highest, counter = run(TEXT)
    more = 5 * counter.total.matrix_flops / V5E.peak_flops
    assert highest.compute - plain.compute == pytest.approx(more)


def test_communication_uses_the_links_of_the_axes_it_spans():
    (one, _), (two, _) = run(TEXT, axes=1), run(TEXT, axes=2)
    sent = 8 * 256 * 16 * 4 * 7 / 8
    assert one.communication == pytest.approx(sent / (2 * 50e9))
    assert two.communication == pytest.approx(one.communication / 2)


def test_the_bound_is_what_takes_longest():
    slow_links = TEXT.replace("f32[256,16]", "f32[256,16384]")
    assert run(TEXT)[0].bound == "memory"
    assert run(slow_links)[0].bound == "communication"


def test_links_share_the_published_bandwidth():
    for chip in CHIPS.values():
        published = {"v5e": 400e9, "v5p": 1200e9, "v6e": 800e9}[chip.name]
        assert 2 * chip.links * chip.link_bandwidth == published
        assert math.log2(chip.memory_bytes / 2**30) == pytest.approx(5, abs=1.6)


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:", "v5e:2xa", ":2x2", "v5e:2x-2"])
def test_other_topologies_are_refused(topology):
    with pytest.raises(ConfigError, match="--topology"):
        chip_of(topology)


def test_chip_of_a_topology():
    assert chip_of("v5p:8x8x8") is CHIPS["v5p"]
