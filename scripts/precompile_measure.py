"""Compiles a program for a described topology and reads from the result what one chip holds, computes, moves and sends."""

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from scripts import hlo_collectives, roofline
from scripts.chips import Chip
from scripts.hlo_collectives import Collective
from scripts.hlo_costs import Cost, Counter, Run
from scripts.hlo_text import parse
from scripts.precompile_programs import Program, Setting
from sira_jax.models import DecoderConfig, EncoderDecoderConfig
from sira_jax.routing.joined import PARTS

# Sums of losses and statistics, at most so many bytes each, are what a step has to tell, not what it works with.
SMALL = 4096
_ROUTER = "router"
# The decoder's projections that read the encoder's tokens.
_READ_ENCODED = tuple(f"decoder/encoder_decoder_attention/{name}" for name in ("key", "value"))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip's HBM.

    Attributes:
      inputs: of the program's arguments, by what they are: "base", "adapter", "optimizer", "cache", "batch".
      arguments: of all arguments as the compiler lays them out, with the padding of tiles.
      scratch: what the program needs besides arguments and results: activations above all.
      peak: arguments, results that are written to other places than the arguments they replace, scratch and code.
    """

    inputs: dict[str, int]
    arguments: int
    scratch: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """One compiled program, for one chip.

    Attributes:
      name: of the adapter, or "floor".
      memory: see Memory.
      cost: of one call, loops by their trips.
      once: with each loop's body counted once and memory on the chip as well, to hold against `reported`.
      reported: (FLOPs, bytes) of the compiler's own analysis, which counts bodies once; None where it gives none.
      collectives: of one call.
      estimate: of the time of one call.
      trained: elements of each trained parameter on a chip, one layer of a stack; of all layers too.
      lower_seconds, compile_seconds: how long tracing and compiling took.
      unknown_loops: loops whose trips are not known, counted once.
      runs: its instructions, each with its cost.
      text: the optimized HLO.
    """

    name: str
    memory: Memory
    cost: Cost
    once: Cost
    reported: tuple[float, float] | None
    collectives: list[Collective]
    estimate: roofline.Estimate
    trained: frozenset[int]
    lower_seconds: float
    compile_seconds: float
    unknown_loops: list[str]
    runs: list[Run]
    text: str


def shard_bytes(tree: Any) -> int:
    """Bytes of the largest shards of a tree of placed shapes, without padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def measure(name: str, program: Program, mesh: Mesh, chip: Chip) -> Measured:
    """Compiles and counts; see the module's text."""
    start = time.perf_counter()
    lowered = program.lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    text = compiled.as_text()
    module = parse(text)
    counter, once = Counter(module), Counter(module, loops=False, on_chip=True)
    axes = hlo_collectives.Mesh(dict(mesh.shape))
    collectives = hlo_collectives.find(counter, module, axes)
    estimate = roofline.estimate(
        counter.runs, module, collectives, chip, lambda one: torus_axes(mesh, one.axes)
    )
    analysis = compiled.cost_analysis() or {}
    reported = None
    if "flops" in analysis:
        reported = analysis["flops"], analysis["bytes accessed"]
    return Measured(
        name=name,
        memory=_memory(program, compiled),
        cost=counter.total,
        once=once.total,
        reported=reported,
        collectives=collectives,
        estimate=estimate,
        trained=_trained_sizes(program.trained),
        lower_seconds=middle - start,
        compile_seconds=end - middle,
        unknown_loops=counter.unknown_loops,
        runs=counter.runs,
        text=text,
    )


def _memory(program: Program, compiled: Any) -> Memory:
    found = compiled.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    arguments, scratch = found.argument_size_in_bytes, found.temp_size_in_bytes
    return Memory(
        inputs={name: shard_bytes(tree) for name, tree in program.inputs.items()},
        arguments=arguments,
        scratch=scratch,
        peak=arguments + results + scratch + found.generated_code_size_in_bytes,
    )


def _trained_sizes(trained: Any) -> frozenset[int]:
    sizes: set[int] = set()
    by_module: dict[Any, dict[str, set[int]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        shard = leaf.sharding.shard_shape(leaf.shape)
        # A gradient has the shard's size or, where it is cut further to be summed, its whole; of one layer or of all.
        own = {math.prod(part) for shape in (shard, leaf.shape) for part in (shape, shape[1:])}
        sizes |= own
        name = path[-1].key if path else ""
        by_module.setdefault(path[:-1], {})[name] = own
    for module in by_module.values():
        # That of a router may be summed in its parts, beside that of A.
        for router, other in itertools.product(
            module.get(_ROUTER, ()), set().union(*module.values())
        ):
            sizes.add(other + PARTS * router)
    return frozenset(sizes)


def torus_axes(mesh: Mesh, axes: Sequence[str]) -> int:
    """Along how many axes of the torus the devices lie that differ along these mesh axes; 1 where devices have no place."""
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    devices = np.ravel(mesh.devices[index])
    if not hasattr(devices[0], "coords"):
        return 1
    coordinates = np.asarray([device.coords for device in devices])
    return max(1, sum(len(np.unique(column)) > 1 for column in coordinates.T))


def beyond_floor(measured: Measured, floor: Measured) -> list[tuple[Collective, str]]:
    """The collectives that the floor lacks, each with what it is: "gradients" of the adapter, "metrics", or "other".

    Two are the same if kind, bytes, mesh axes and times agree. What reduces arrays each as large as a trained parameter's
    gradient sums gradients; what has only arrays of at most SMALL bytes sums metrics and losses.
    """
    known: dict[tuple, int] = {}
    for one in floor.collectives:
        key = _key(one)
        known[key] = known.get(key, 0) + 1
    rest = []
    for one in measured.collectives:
        key = _key(one)
        if known.get(key, 0):
            known[key] -= 1
        else:
            rest.append((one, _purpose(one, measured.trained)))
    return rest


def _key(one: Collective) -> tuple:
    return one.kind, one.payload, one.axes, one.times


def _purpose(one: Collective, trained: frozenset[int]) -> str:
    large = [a for a in one.arrays if dataclasses.replace(a, tile=()).nbytes > SMALL]
    if not large:
        return "metrics"
    reduces = one.kind in ("all-reduce", "reduce-scatter")
    return "gradients" if reduces and all(a.elements in trained for a in large) else "other"


def needed_flops(setting: Setting) -> float:
    """FLOPs that a training step of the frozen model cannot do without, over all chips: what MFU is counted by.

    Forwards and backwards to the inputs: 4 for each element of a matrix and token that meets it (no gradient of the matrix),
    and 12 for each element of an attention head's query and key it meets, masked or not. No recomputation, no adapter. After
    arXiv 2204.02311, appendix B, which has 6 for a matrix that is trained.
    """
    config = setting.config
    counts = {DecoderConfig: _decoder_products, EncoderDecoderConfig: _encoder_decoder_products}
    matrices, attention = counts[type(config)](setting)
    return setting.batch_size * (4.0 * matrices + 12.0 * attention)


def _decoder_products(setting: Setting) -> tuple[float, float]:
    """(elements of matrices, elements of heads) that one row's tokens meet in a forward pass."""
    config, length = setting.config, setting.length
    block = sum(d_in * d_out for d_in, d_out in config.projections.values())
    matrices = length * (config.num_layers * block + config.vocab_size * config.emb_dim)
    return matrices, config.num_layers * config.num_heads * config.head_dim * length**2


def _encoder_decoder_products(setting: Setting) -> tuple[float, float]:
    config, read, written = setting.config, setting.length, setting.target_length
    tokens = {"encoder": read, "decoder": written}
    matrices = written * config.vocab_size * config.emb_dim
    for stack in config.stacks:
        for path, (d_in, d_out) in stack.projections.items():
            reads = read if path in _READ_ENCODED else tokens[stack.prefix[0]]
            matrices += stack.num_layers * reads * d_in * d_out
    heads = config.num_heads * config.head_dim
    pairs = config.num_encoder_layers * read**2
    pairs += config.num_decoder_layers * (written**2 + written * read)
    return matrices, heads * pairs
