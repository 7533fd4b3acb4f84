"""Communication in compiled programs: who takes part, along which axes, how many bytes."""

from pathlib import Path

import pytest

from scripts.hlo_collectives import Mesh, by_kind, find, first_group
from scripts.hlo_costs import Counter
from scripts.hlo_text import parse

HLO = Path(__file__).parent / "hlo"
MESH = Mesh({"fsdp": 4, "tensor": 2})


def collectives(name):
    module = parse((HLO / name).read_text())
    return find(Counter(module), module, MESH)


def one(text):
    module = parse(f"ENTRY %m (p: f32[8]) -> f32[8] {{\n %p = f32[8] parameter(0)\n {text}\n}}")
    return module.entry.root


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,2},{1,3}}", [0, 2]),
        ("{}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("[4,2]<=[8]", [0, 1]),
        ("[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("[1,8]<=[8]", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("mesh['a'=4,'b'=2] {'b'}", [0, 1]),
        ("mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
        ("mesh['a'=4,'b'=2] {'a','b'}", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_groups_in_every_notation(groups, expected):
    instruction = one(f"ROOT %r = f32[8] all-reduce(%p), channel_id=1, replica_groups={groups}")
    assert first_group(instruction, 8) == expected


def test_group_of_a_permutation_is_its_chain():
    pairs = "{{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}"
    text = f"ROOT %r = f32[8] collective-permute(%p), source_target_pairs={pairs}"
    assert first_group(one(text), 8) == [0, 2, 4, 6]


def test_axes_are_those_the_group_differs_along():
    assert MESH.along([0, 1]) == ("tensor",)
    assert MESH.along([0, 2, 4, 6]) == ("fsdp",)
    assert MESH.along(range(8)) == ("fsdp", "tensor")


def test_sums_of_a_sharded_scan():
    """Each of 5 layers: x over tensor and weights over fsdp gathered, forwards and backwards, then two sums of gradients."""
    rows = by_kind(collectives("sharded_scan.txt"))
    weights, x = 64 * 32 * 4, 8 * 64 * 4
    assert rows == {
        ("all-gather", ("tensor",)): {"runs": 10, "payload": 10 * x, "wire": 10 * x / 2},
        ("all-gather", ("fsdp",)): {"runs": 10, "payload": 10 * weights, "wire": 7.5 * weights},
        ("all-reduce", ("tensor",)): {"runs": 5, "payload": 5 * x, "wire": 5 * x},
        ("all-reduce", ("fsdp",)): {"runs": 5, "payload": 5 * weights, "wire": 7.5 * weights},
    }


def test_an_asynchronous_reduction_counts_its_operand_by_the_loops_trips():
    (found,) = collectives("tpu.txt")
    assert (found.kind, found.times, found.axes) == ("reduce-scatter", 8, ("fsdp", "tensor"))
    # What is sent has no padding.
    assert found.payload == 256 * 16 * 4
    assert found.wire_bytes == pytest.approx(256 * 16 * 4 * 7 / 8)


def test_a_group_of_one_sends_nothing():
    text = "ROOT %r = f32[8] all-reduce(%p), replica_groups=[8,1]<=[8]"
    module = parse(f"ENTRY %m (p: f32[8]) -> f32[8] {{\n %p = f32[8] parameter(0)\n {text}\n}}")
    assert find(Counter(module), module, MESH) == []


def test_gathers_that_are_started_count_what_arrives():
    text = """ENTRY %m (p: f32[8]) -> f32[64] {
      %p = f32[8] parameter(0)
      %s = (f32[8], f32[64]) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}
      ROOT %d = f32[64] all-gather-done(%s)
    }"""
    module = parse(text)
    (found,) = find(Counter(module), module, MESH)
    assert (found.kind, found.payload, found.wire_bytes) == ("all-gather", 256, 256 * 7 / 8)
