"""Reads the text of an optimized HLO module, as `compiled.as_text()` gives it: instructions, types, loops.

Only what the counts of `hlo_costs` and `hlo_collectives` need is kept. Text that is no HLO raises ValueError.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

# Bits of an element, by the type's name; token and opaque take no memory.
_BITS = {
    **dict.fromkeys(("token", "opaque"), 0),
    **dict.fromkeys(("s1", "u1"), 1),
    **dict.fromkeys(("s2", "u2"), 2),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    "c128": 128,
}
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"(ROOT\s+)?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|called_computations)"
    r"=(?:%([\w.\-]+)|\{([^}]*)\})"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array.

    Attributes:
      dtype: "bf16".
      dims: its logical lengths.
      order: its axes from the fastest in memory to the slowest; empty for a scalar or the default layout.
      tile: the lengths that the fastest axes are padded to multiples of, slowest of them first ((8, 128) on TPUs).
      space: memory space; 0 is the device's main memory (HBM on TPUs), others are on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        """Elements without padding."""
        return math.prod(self.dims)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes it takes in memory, the tiles' padding included."""
        axes = self.order[::-1] or range(len(self.dims))
        lengths = [self.dims[axis] for axis in axes]
        if len(lengths) < len(self.tile):
            lengths = [1] * (len(self.tile) - len(lengths)) + lengths
        for place, multiple in enumerate(self.tile, len(lengths) - len(self.tile)):
            lengths[place] = -(-lengths[place] // multiple) * multiple
        return -(-math.prod(lengths) * _bits(self.dtype) // 8)


Type = Array | tuple["Type", ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the module.
      type: of its result.
      opcode: "dot".
      operands: names of the instructions it reads.
      arguments: the text between its brackets, for the number of a parameter or a constant's value.
      attributes: the text after them.
      computation: name of the computation it is in.
    """

    name: str
    type: Type
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    computation: str

    def attribute(self, name: str) -> str | None:
        """The text of an attribute up to the next one: "{1}" of lhs_contracting_dims={1}; None without it."""
        match = re.search(rf"(?:^|, ){re.escape(name)}=", self.attributes)
        if match is None:
            return None
        rest = self.attributes[match.end() :]
        depth = 0
        for place, letter in enumerate(rest):
            depth += (letter in "{([") - (letter in "})]")
            if letter == "," and depth == 0:
                return rest[:place]
        return rest

    def numbers(self, name: str) -> tuple[int, ...]:
        """The whole numbers in an attribute; () without it."""
        return tuple(int(number) for number in re.findall(r"-?\d+", self.attribute(name) or ""))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls, in the order they are written."""
        names: list[str] = []
        for one, several in _CALLED.findall(self.attributes):
            names += [one] if one else re.findall(r"%([\w.\-]+)", several)
        return tuple(names)

    @property
    def scope(self) -> str:
        """Where in the program it comes from, "jit(step)/.../attention/q/dot_general"; "" if it does not say."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(eq=False)
class Computation:
    """Instructions by name, in their order; `root` is the result's."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction | None = None

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Which instructions read each one."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {
            int(instruction.arguments): instruction
            for instruction in self.instructions.values()
            if instruction.opcode == "parameter"
        }


@dataclasses.dataclass(eq=False)
class Module:
    """Computations by name; `entry` is the program's."""

    computations: dict[str, Computation]
    entry: Computation

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """The instruction that one operand is."""
        where = self.computations[instruction.computation]
        return where.instructions[instruction.operands[index]]

    def called(self, instruction: Instruction, attribute: str) -> Computation:
        """The computation that an attribute ("body") names."""
        text = instruction.attribute(attribute) or ""
        return self.computations[text.strip().removeprefix("%")]


def leaves(kind: Type) -> Iterator[Array]:
    """The arrays of a type, in order."""
    if isinstance(kind, Array):
        yield kind
    else:
        for part in kind:
            yield from leaves(part)


def parse(text: str) -> Module:
    """The module of a text.

    Raises:
      ValueError: it has no entry computation, or a line in one is none that this module reads.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        line = _COMMENT.sub("", line).strip()
        if current is None:
            header = _HEADER.match(line)
            if header and " = " not in line.split("(", 1)[0]:
                current = Computation(header[2], {})
                computations[current.name] = current
                entry = current if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif line:
            instruction, is_root = _parse_instruction(line, current.name)
            current.instructions[instruction.name] = instruction
            current.root = instruction if is_root else current.root
    if entry is None:
        raise ValueError("the text has no ENTRY computation")
    return Module(computations, entry)


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a `while` runs its body; None where the text does not tell.

    The compiler writes it down for loops of a fixed length; else a condition that compares with one constant tells, where
    the counter starts at 0 and rises by 1, as in all loops that JAX makes of a scan.
    """
    match = re.search(r'"known_trip_count":\s*(\{[^}]*\})', loop.attributes)
    if match:
        return int(json.loads(match[1])["n"])
    condition = module.called(loop, "condition")
    inside = [condition, *(module.computations[c] for c in _fused(condition))]
    compared = [i for part in inside for i in part.instructions.values() if i.opcode == "compare"]
    constants = [
        int(i.arguments)
        for i in condition.instructions.values()
        if i.opcode == "constant" and re.fullmatch(r"\d+", i.arguments)
    ]
    is_plain = len(compared) == 1 and compared[0].attribute("direction") == "LT"
    return constants[0] if is_plain and len(constants) == 1 else None


def _fused(computation: Computation) -> list[str]:
    return [name for i in computation.instructions.values() for name in i.called]


def _bits(dtype: str) -> int:
    if dtype.startswith("f8"):
        return 8
    if dtype not in _BITS:
        raise ValueError(f"unknown type of element {dtype!r}")
    return _BITS[dtype]


def _parse_instruction(line: str, computation: str) -> tuple[Instruction, bool]:
    start = _INSTRUCTION.match(line)
    if start is None:
        raise ValueError(f"not an instruction of HLO: {line[:200]!r}")
    kind, rest = _parse_type(line[start.end() :])
    opcode, bracket, rest = rest.strip().partition("(")
    if not bracket:
        raise ValueError(f"not an instruction of HLO: {line[:200]!r}")
    end = _closing(rest)
    arguments, attributes = rest[:end], rest[end + 1 :].removeprefix(",").strip()
    operands: tuple[str, ...] = ()
    if opcode not in ("parameter", "constant"):
        operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    parsed = Instruction(
        name=start[2],
        type=kind,
        opcode=opcode,
        operands=operands,
        arguments=arguments,
        attributes=attributes,
        computation=computation,
    )
    return parsed, bool(start[1])


def _closing(text: str) -> int:
    """Where the bracket is closed that was opened before `text`; brackets in quotes do not count."""
    depth, quoted, place = 1, False, 0
    while place < len(text):
        letter = text[place]
        if letter == "\\":
            place += 1
        elif letter == '"':
            quoted = not quoted
        elif not quoted:
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                return place
        place += 1
    raise ValueError(f"a bracket is not closed: {text[:200]!r}")


def _parse_type(text: str) -> tuple[Type, str]:
    """The type that `text` starts with, and the rest."""
    if text.startswith("("):
        parts: list[Type] = []
        rest = text[1:].lstrip()
        while not rest.startswith(")"):
            part, rest = _parse_type(rest)
            parts.append(part)
            rest = rest.lstrip().removeprefix(",").lstrip()
        return tuple(parts), rest[1:]
    match = _ARRAY.match(text)
    if match is None:
        raise ValueError(f"not a type of HLO: {text[:200]!r}")
    return _array(*match.groups(default="")), text[match.end() :]


@functools.cache
def _array(dtype: str, dims: str, layout: str) -> Array:
    # A dynamic axis, "<=8", is counted at its bound.
    lengths = tuple(int(length.removeprefix("<=")) for length in dims.split(",") if length)
    order, _, rest = layout.partition(":")
    # The first tile decides the padding; those after it order the elements inside.
    tile = re.match(r"T\(([\d,*]*)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Array(
        dtype,
        lengths,
        order=tuple(int(axis) for axis in order.split(",") if axis),
        tile=tuple(int(n.replace("*", "1")) for n in tile[1].split(",")) if tile else (),
        space=int(space[1]) if space else 0,
    )
