"""Counts of compiled programs, held against the compiler's own, against unrolled programs and against sums by hand."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts.hlo_costs import Counter
from scripts.hlo_text import parse

HLO = Path(__file__).parent / "hlo"
LAYERS = 6


@pytest.fixture(scope="module")
def sharded():
    return parse((HLO / "sharded_scan.txt").read_text())


@pytest.fixture(scope="module")
def tpu():
    counter = Counter(parse((HLO / "tpu.txt").read_text()))
    return {run.instruction.name: run for run in counter.runs}


def test_bodies_counted_once_are_the_compilers_counts(sharded):
    own = json.loads((HLO / "sharded_scan.json").read_text())
    once = Counter(sharded, loops=False).total
    assert once.flops == own["flops"]
    assert once.transcendentals == own["transcendentals"]
    # The compiler counts a few bytes of scalars that a fusion has inside.
    assert once.bytes == pytest.approx(own["bytes accessed"], rel=5e-3)


def test_loops_count_by_their_trips(sharded):
    once, full = (Counter(sharded, loops=loops).total for loops in (False, True))
    # Two products a layer: 8 rows of 64 to 32 columns forwards; and the gradients of both operands.
    assert full.matrix_flops == 5 * 3 * 2 * 8 * 64 * 32
    assert once.matrix_flops == full.matrix_flops / 5
    assert full.transcendentals == 5 * 8 * 32


def _loss(layers, x_BD, unroll):
    def layer(x_BD, weight_DF):
        return jax.nn.silu(x_BD @ weight_DF) + x_BD, None

    return jnp.sum(jax.lax.scan(layer, x_BD, layers, unroll=unroll)[0])


@functools.cache
def _counted(unroll):
    shapes = (
        jax.ShapeDtypeStruct((LAYERS, 32, 32), jnp.float32),
        jax.ShapeDtypeStruct((16, 32), jnp.float32),
    )
    step = jax.jit(jax.grad(functools.partial(_loss, unroll=unroll), argnums=(0, 1)))
    compiled = step.lower(*shapes).compile()
    return Counter(parse(compiled.as_text())), compiled.cost_analysis()


def test_a_scan_counts_as_its_unrolled_program():
    (looped, own), (unrolled, _) = _counted(1), _counted(LAYERS)
    assert not looped.unknown_loops
    assert looped.total.matrix_flops == unrolled.total.matrix_flops == LAYERS * 3 * 2 * 16 * 32 * 32
    assert looped.total.transcendentals == pytest.approx(unrolled.total.transcendentals, rel=0.35)
    # And the compiler's analysis does not, or all this were not needed.
    assert own["flops"] < 0.5 * looped.total.flops


def test_unknown_trips_are_told():
    def run(x):
        return jax.lax.while_loop(lambda x: x[0] < 3, lambda x: x * 2 + 1, x)

    compiled = jax.jit(run).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compile()
    counter = Counter(parse(compiled.as_text()))
    assert counter.total.flops > 0
    assert len(counter.unknown_loops) == 1


def test_of_branches_the_costliest_counts():
    def run(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x + 1, x)

    shapes = jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((8, 8), jnp.float32)
    compiled = jax.jit(run).lower(*shapes).compile()
    assert Counter(parse(compiled.as_text())).total.matrix_flops == 2 * 2 * 8**3


def test_a_fused_slice_of_stacked_layers_reads_one_layer(tpu):
    # Not the 8 layers; x and the result lie on the chip.
    assert tpu["y"].cost.bytes == 64 * 128 * 2 + tpu_scalar()
    assert tpu["y"].times == 8
    assert tpu["y"].cost.matrix_flops == 2 * 256 * 64 * 128


def tpu_scalar():
    """An int32 scalar takes a tile of 128."""
    return 128 * 4


def test_a_copy_to_the_chip_reads_and_does_not_write(tpu):
    cost = tpu["in_vmem"].cost
    # 64 columns are padded to 128.
    assert (cost.read_bytes, cost.written_bytes) == (256 * 128 * 2, 0)


def test_an_update_in_place_inside_nested_fusions_writes_the_update(tpu):
    update = 256 * 16 * 4
    cost = tpu["saved_next"].cost
    assert (cost.read_bytes, cost.written_bytes) == (update + tpu_scalar(), update)


def test_an_asynchronous_operation_counts_once(tpu):
    assert "started" not in tpu
    assert "finished" not in tpu
    cost = tpu["scattered"].cost
    # 32 of the 256 rows are padded to 128.
    assert (cost.read_bytes, cost.written_bytes) == (256 * 16 * 4, 128 * 16 * 4)


def _convolution(left, kernel, result, attributes):
    text = f"""ENTRY %m (a: f32[{left}], b: f32[{kernel}]) -> f32[{result}] {{
      %a = f32[{left}] parameter(0)
      %b = f32[{kernel}] parameter(1)
      ROOT %c = f32[{result}] convolution(%a, %b), {attributes}
    }}"""
    return Counter(parse(text)).total.matrix_flops


def test_a_batch_of_products_as_tpus_write_it():
    # 5 products of (7, 11) and (11, 13): the batch is a spatial axis, the dilated input meets the window at one place each.
    flops = _convolution(
        "5,7,11",
        "5,11,13",
        "5,7,13",
        "window={size=5 stride=4 pad=0_0 lhs_dilate=5}, dim_labels=0bf_0io->0bf",
    )
    assert flops == 2 * 5 * 7 * 11 * 13


@pytest.mark.parametrize(
    ("stride", "pad", "left_dilation", "dilation"),
    itertools.product((1, 2), (0, 1), (1, 2), (1, 2)),
)
def test_a_convolution_counts_what_it_multiplies(stride, pad, left_dilation, dilation):
    length, size = 6, 3
    dilated = (length - 1) * left_dilation + 1
    out = (dilated + 2 * pad - (size - 1) * dilation - 1) // stride + 1
    # Ones everywhere: the result's sum is the number of multiplications.
    x, kernel = np.ones((1, 1, length), np.float32), np.ones((1, 1, size), np.float32)
    result = jax.lax.conv_general_dilated(
        x, kernel, (stride,), [(pad, pad)], lhs_dilation=(left_dilation,), rhs_dilation=(dilation,)
    )
    assert result.shape[-1] == out
    window = f"size={size} stride={stride} pad={pad}_{pad} lhs_dilate={left_dilation} rhs_dilate={dilation}"
    flops = _convolution(
        f"1,1,{length}",
        f"1,1,{size}",
        f"1,1,{out}",
        f"window={{{window}}}, dim_labels=bf0_oi0->bf0",
    )
    assert flops == 2 * float(result.sum())


def test_a_fusion_that_gives_another_shape_hands_on_what_its_user_reads():
    text = """%view (p: f32[1,8,16]) -> f32[8,16] {
      %p = f32[1,8,16] parameter(0)
      ROOT %b = f32[8,16] bitcast(%p)
    }
    %fused (a: f32[4,8], w: f32[1,8,16], v: f32[1,8,16]) -> f32[4,16] {
      %a = f32[4,8] parameter(0)
      %w = f32[1,8,16] parameter(1)
      %v = f32[1,8,16] parameter(2)
      %whole = f32[8,16] fusion(%w), kind=kLoop, calls=%view
      %other = f32[8,16] fusion(%v), kind=kLoop, calls=%view
      %part = f32[1,16] slice(%other), slice={[0:1], [0:16]}
      %row = f32[4,16] broadcast(%part), dimensions={0,1}
      %c = f32[4,16] dot(%a, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      ROOT %sum = f32[4,16] add(%c, %row)
    }
    ENTRY %m (x: f32[4,8], y: f32[1,8,16], z: f32[1,8,16]) -> f32[4,16] {
      %x = f32[4,8] parameter(0)
      %y = f32[1,8,16] parameter(1)
      %z = f32[1,8,16] parameter(2)
      ROOT %f = f32[4,16] fusion(%x, %y, %z), kind=kOutput, calls=%fused
    }"""
    cost = Counter(parse(text)).total
    # The whole of y, one row of z.
    assert cost.read_bytes == 4 * (4 * 8 + 8 * 16 + 16)
    assert cost.written_bytes == 4 * 4 * 16
