"""The least time a compiled program can take on a chip, from its counts and the chip's published peaks.

    seconds = max(sum over the instructions of max(FLOPs / peak, bytes / bandwidth of HBM), seconds of communication)

that is, each instruction keeps either the matrix units or the memory fully busy, and all communication is hidden behind that.
Products that ask for float32's precision run as several bfloat16 passes on the matrix units and take as many times as long.
Along a mesh axis that lies on n axes of the torus, a device sends over 2n links at once.

It is an estimate from below: no overhead, no vector units' limits, no communication that has to be waited for.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

from scripts.chips import Chip
from scripts.hlo_collectives import Collective
from scripts.hlo_costs import Run
from scripts.hlo_text import Module

# Passes over the matrix units of a product of float32 operands, by the precision it asks for.
_PASSES = {"highest": 6, "high": 3}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds a call: of all arithmetic, all traffic of HBM and all communication, each alone, and of the whole program."""

    compute: float
    memory: float
    communication: float
    step: float

    @property
    def bound(self) -> str:
        """What takes longest: "compute", "memory" or "communication"."""
        parts = {name: getattr(self, name) for name in ("compute", "memory", "communication")}
        return max(parts, key=parts.get)


def estimate(
    runs: Sequence[Run],
    module: Module,
    collectives: Sequence[Collective],
    chip: Chip,
    torus_axes: Callable[[Collective], int],
) -> Estimate:
    """See the module's text.

    Args:
      runs: of `Counter.runs`.
      module: that they are of.
      collectives: its communication.
      chip: what it runs on.
      torus_axes: how many axes of the torus a collective's group spans.
    """
    compute = memory = busy = 0.0
    for run in runs:
        flops = run.cost.other_flops + run.cost.transcendentals
        flops += run.cost.matrix_flops * _passes(run, module)
        seconds = flops / chip.peak_flops, run.cost.bytes / chip.memory_bandwidth
        compute += run.times * seconds[0]
        memory += run.times * seconds[1]
        busy += run.times * max(seconds)
    communication = sum(
        one.times * one.wire_bytes / (2 * max(torus_axes(one), 1) * chip.link_bandwidth)
        for one in collectives
    )
    return Estimate(compute, memory, communication, max(busy, communication))


def _passes(run: Run, module: Module) -> int:
    """Of the products in an instruction: the most that any of them takes."""
    parts = [run.instruction]
    if run.instruction.opcode == "fusion":
        parts = list(module.called(run.instruction, "calls").instructions.values())
    asked = [
        precision
        for part in parts
        if part.opcode in ("dot", "convolution")
        for precision in re.findall(r"\w+", part.attribute("operand_precision") or "")
    ]
    return max((_PASSES.get(precision, 1) for precision in asked), default=1)
