"""The communication between devices in a compiled program: kinds, bytes, the mesh axes it runs along, and whose it is."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from scripts.hlo_costs import COLLECTIVES, Counter
from scripts.hlo_text import Array, Instruction, Module, leaves


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that communicates.

    Attributes:
      kind: "all-gather", "all-reduce" or another of `hlo_costs.COLLECTIVES`.
      arrays: what each device gets of an all-gather or an all-to-all, and what it gives to the others.
      group: devices that take part together.
      axes: the mesh axes they differ along.
      times: how often it runs in one call of the program.
      scope: where in the program it comes from.
    """

    kind: str
    arrays: tuple[Array, ...]
    group: int
    axes: tuple[str, ...]
    times: int
    scope: str

    @property
    def payload(self) -> int:
        """Bytes of `arrays`, without padding to tiles; one run."""
        return sum(dataclasses.replace(array, tile=()).nbytes for array in self.arrays)

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends in one run, by the best algorithm on a ring."""
        rest = (self.group - 1) / self.group
        share = {"all-reduce": 2 * rest, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.payload * share.get(self.kind, rest)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Names and lengths of a mesh's axes; devices are numbered in row-major order, as the program numbers them."""

    axes: Mapping[str, int]

    def along(self, group: Sequence[int]) -> tuple[str, ...]:
        """The axes along which the devices of a group differ."""
        places = np.unravel_index(np.asarray(group), tuple(self.axes.values()))
        return tuple(
            name for name, at in zip(self.axes, places, strict=True) if len(np.unique(at)) > 1
        )


def find(counter: Counter, module: Module, mesh: Mesh) -> list[Collective]:
    """All collectives of a program, also those inside fusions, in the order they run. Groups of one device are left out."""
    found = []
    seen: set[str] = set()
    for run in counter.runs:
        for instruction in _inside(module, run.instruction):
            # The pieces of one that runs beside several fusions share their channel.
            channel = instruction.attribute("channel_id")
            if instruction.opcode not in COLLECTIVES or channel in seen:
                continue
            seen |= {channel} - {None}
            group = first_group(instruction, math.prod(mesh.axes.values()))
            kind = instruction.opcode.removesuffix("-start")
            if len(group) > 1:
                found.append(
                    Collective(
                        kind=kind,
                        arrays=_moved(module, instruction, kind),
                        group=len(group),
                        axes=mesh.along(group),
                        times=run.times,
                        scope=instruction.scope,
                    )
                )
    return found


def _inside(module: Module, instruction: Instruction) -> Iterator[Instruction]:
    yield instruction
    if instruction.opcode == "fusion":
        for part in module.called(instruction, "calls").instructions.values():
            yield from _inside(module, part)


def _moved(module: Module, instruction: Instruction, kind: str) -> tuple[Array, ...]:
    """Results of a gather or exchange, operands of a reduction or permutation."""
    if kind in ("all-gather", "all-to-all", "ragged-all-to-all"):
        result = instruction.type
        if instruction.opcode.endswith("-start") and not isinstance(result, Array):
            result = result[1]
        return tuple(leaves(result))
    operands = [module.operand(instruction, i) for i in range(len(instruction.operands))]
    return tuple(array for operand in operands for array in leaves(operand.type))


def first_group(instruction: Instruction, devices: int) -> list[int]:
    """The first group of devices that communicate, of a collective's `replica_groups` in any of the ways they are written.

    A permutation's group is the chain of pairs through the first source. No groups are all devices.
    """
    pairs = instruction.attribute("source_target_pairs")
    if pairs is not None:
        targets = {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)}
        start = min(targets, default=0)
        chain = [start]
        while targets.get(chain[-1], start) not in chain:
            chain.append(targets[chain[-1]])
        return chain
    text = (instruction.attribute("replica_groups") or "").strip()
    if iota := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = (
            [int(n) for n in part.split(",")] if part else None for part in iota.groups()
        )
        numbers = np.arange(math.prod(source)).reshape(source)
        if order is not None:
            numbers = numbers.transpose(order)
        return numbers.reshape(shape)[0].ravel().tolist()
    if text.startswith("mesh["):
        return _mesh_group(text)
    first = re.search(r"\{(\d+(?:,\d+)*)\}", text)
    return [int(n) for n in first[1].split(",")] if first else list(range(devices))


def _mesh_group(text: str) -> list[int]:
    """mesh['a'=4,'b'=2] {'b'}: the devices that share all axes but those in braces."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text)}
    chosen = re.findall(r"'([^']+)'", text.partition("{")[2])
    numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    if permuted := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        numbers = np.arange(numbers.size).reshape([int(n) for n in permuted[1].split(",")])
        if permuted[2]:
            numbers = numbers.transpose([int(n) for n in permuted[2].split(",")])
        numbers = numbers.reshape(tuple(sizes.values()))
    index = tuple(slice(None) if name in chosen else 0 for name in sizes)
    return np.ravel(numbers[index]).tolist()


def by_kind(collectives: Sequence[Collective]) -> dict[tuple[str, tuple[str, ...]], dict]:
    """Sums over the collectives of a kind along the same axes: runs, payload and wire bytes a call."""
    sums: dict[tuple[str, tuple[str, ...]], dict] = {}
    for one in collectives:
        row = sums.setdefault((one.kind, one.axes), {"runs": 0, "payload": 0, "wire": 0.0})
        row["runs"] += one.times
        row["payload"] += one.payload * one.times
        row["wire"] += one.wire_bytes * one.times
    return sums
