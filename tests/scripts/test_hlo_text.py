"""The reader of optimized HLO: types, attributes, loops, and what it refuses."""

from pathlib import Path

import pytest

from scripts.hlo_text import Array, leaves, parse, trip_count

HLO = Path(__file__).parent / "hlo"
SHARDED = parse((HLO / "sharded_scan.txt").read_text())
TPU = parse((HLO / "tpu.txt").read_text())


def find(module, name):
    (found,) = [
        computation.instructions[name]
        for computation in module.computations.values()
        if name in computation.instructions
    ]
    return found


def loops(module):
    return [i for i in module.entry.instructions.values() if i.opcode == "while"]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("f32[3,5]{1,0}", 60),
        ("pred[7]", 7),
        ("s4[3]", 2),
        ("bf16[]", 2),
        ("token[]", 0),
        ("f8e4m3fn[10]", 10),
        # Padded along the fastest axis to 128 and along the next to 8.
        ("f32[256,16]{1,0:T(8,128)}", 256 * 128 * 4),
        ("f32[256,16]{0,1:T(8,128)}", 256 * 16 * 4),
        ("f32[3,5,100]{2,0,1:T(8,128)}", 5 * 8 * 128 * 4),
        ("bf16[64]{0:T(256)(128)(2,1)}", 256 * 2),
        ("bf16[9]{0:T(8,128)(2,1)S(1)}", 8 * 128 * 2),
    ],
)
def test_bytes_of_a_type(text, nbytes):
    module = parse(f"ENTRY %m (p: {text}) -> {text} {{\n ROOT %p = {text} parameter(0)\n}}")
    assert module.entry.root.type.nbytes == nbytes


def test_layout_and_memory_space():
    assert find(TPU, "x_vmem").type == Array("bf16", (256, 64), (1, 0), (8, 128), 1)
    assert find(TPU, "x0").type.space == 0


def test_nested_types():
    kind = find(TPU, "started").type
    assert [len(part) if isinstance(part, tuple) else 0 for part in kind] == [1, 0, 0]
    assert [array.dims for array in leaves(kind)] == [(256, 16), (32, 16), ()]


def test_operands_attributes_and_scope():
    fusion = find(TPU, "y")
    assert fusion.operands == ("weights", "i", "x_vmem")
    assert fusion.called == ("fused_product",)
    assert fusion.scope == "jit(step)/while/body/attention/q/dot_general"
    product = find(TPU, "product")
    assert product.attribute("operand_precision") == "{highest,highest}"
    assert product.attribute("precision") is None
    slice_ = find(TPU, "slice")
    assert slice_.numbers("dynamic_slice_sizes") == (1, 64, 128)
    assert find(TPU, "limit").arguments == "8"


def test_users_and_parameters():
    fused = TPU.computations["fused_product"]
    assert [user.name for user in fused.users["p0"]] == ["slice"]
    assert {number: p.name for number, p in fused.parameters.items()} == {0: "p0", 1: "p1", 2: "p2"}
    assert fused.root.name == "product"


def test_trips_are_those_the_compiler_wrote_down():
    assert [trip_count(SHARDED, loop) for loop in loops(SHARDED)] == [5, 5]


def test_trips_are_read_from_the_condition_without_that():
    (loop,) = loops(TPU)
    assert "known_trip_count" not in loop.attributes
    assert trip_count(TPU, loop) == 8


def test_trips_that_no_constant_decides_are_unknown():
    text = (HLO / "tpu.txt").read_text()
    open_ended = parse(text.replace("direction=LT", "direction=NE"))
    assert trip_count(open_ended, loops(open_ended)[0]) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ENTRY"),
        ("ENTRY %m (p: f32[2]) -> f32[2] {\n  nonsense\n}", "instruction"),
        ("ENTRY %m (p: f32[2]) -> f32[2] {\n  ROOT %p = f32[2 parameter(0)\n}", "type"),
        ("ENTRY %m (p: f32[2]) -> f32[2] {\n  ROOT %p = f32[2] parameter(0\n}", "bracket"),
    ],
)
def test_other_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_unknown_element_is_refused():
    with pytest.raises(ValueError, match="x99"):
        Array("x99", (2,)).nbytes  # noqa: B018
