"""Floating-point operations and bytes of main memory that a compiled program takes, each loop's body as often as it runs.

The compiler's own `cost_analysis()` counts a loop's body once, so that a program whose layers are scanned seems to have one
layer. Here the optimized HLO is walked: what is in a `while` counts times its trips. With `loops=False` each body counts once,
which is what the compiler's analysis counts, so that the two can be held against each other.

FLOPs: a product of matrices or a convolution counts two for each multiplication and addition, any other arithmetic one for
each element of its result, moving data none.

Bytes: each instruction that is run on its own (a fusion counts as one) reads its operands from main memory and writes its
result there, unless their type says that they lie in memory on the chip. Sizes have the padding of the layout's tiles. What
only takes a slice of an operand reads the slice; an update in place writes the update.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from scripts.hlo_text import Array, Computation, Instruction, Module, Type, leaves, trip_count

# These take no time: names for what is there already. So does all that ends in -done: what ends there began with a -start.
_FREE_NAMES = """
    parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id optimization-barrier
    add-dependency domain get-dimension-size async-update
"""
# These move data and calculate nothing.
_MOVE_NAMES = """
    broadcast reshape transpose copy concatenate slice dynamic-slice dynamic-update-slice gather iota pad
    reverse all-gather all-to-all ragged-all-to-all collective-permute collective-broadcast custom-call bitcast-convert
    rng-bit-generator rng-get-and-update-state infeed outfeed send recv scatter select-and-scatter while conditional call
    fusion async
"""
_TRANSCENDENTAL_NAMES = """
    exponential exponential-minus-one log log-plus-one logistic tanh tan sine cosine sqrt rsqrt cbrt power atan2 erf
"""
_FREE = frozenset(_FREE_NAMES.split())
_MOVES = _FREE | frozenset(_MOVE_NAMES.split())
_TRANSCENDENTAL = frozenset(_TRANSCENDENTAL_NAMES.split())
_SLICES = ("dynamic-slice", "slice", "gather")
COLLECTIVES = frozenset(
    f"{kind}{start}"
    for kind in (
        "all-gather",
        "all-reduce",
        "reduce-scatter",
        "all-to-all",
        "ragged-all-to-all",
        "collective-permute",
        "collective-broadcast",
    )
    for start in ("", "-start")
)
# TPUs start a collective in one fusion, let it run beside the work of the next ones, each of which repeats it, and end it in
# another.
_ASYNC, _START = "AsyncCollective", "AsyncCollectiveStart"
# The custom calls of the compiler that only reserve memory, mark a place or give a name to adjoining arrays.
_NO_TRAFFIC = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one instruction takes, or a sum of them.

    Attributes:
      matrix_flops: of products of matrices and convolutions.
      other_flops: of all other arithmetic but transcendental functions.
      transcendentals: elements of exp, tanh, rsqrt and the like.
      read_bytes, written_bytes: of main memory.
    """

    matrix_flops: float = 0.0
    other_flops: float = 0.0
    transcendentals: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0

    @property
    def flops(self) -> float:
        """All but transcendentals, as the compiler counts."""
        return self.matrix_flops + self.other_flops

    @property
    def bytes(self) -> float:
        """Read and written."""
        return self.read_bytes + self.written_bytes

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))

    def times(self, count: float) -> "Cost":
        """The cost of running it `count` times."""
        return Cost(*(value * count for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction of the program, the number of times it is run in one call, and what one of them takes."""

    instruction: Instruction
    times: int
    cost: Cost

    @property
    def total(self) -> Cost:
        """Of all times."""
        return self.cost.times(self.times)


class Counter:
    """Counts a module.

    Args:
      module: the optimized program of one device.
      loops: multiply what is in a loop by its trips; False counts each body once.
      on_chip: count traffic of memory on the chip as if it were main memory's, as the compiler's analysis does.

    Attributes:
      unknown_loops: names of loops whose trips the text does not tell; their body is counted once.
    """

    def __init__(self, module: Module, loops: bool = True, on_chip: bool = False):
        self._module, self._loops, self._on_chip = module, loops, on_chip
        self.unknown_loops: list[str] = []

    @functools.cached_property
    def runs(self) -> list[Run]:
        """Every instruction that takes time, control flow resolved. Of a branch's alternatives the costliest counts."""
        return list(self._walk(self._module.entry, 1))

    @functools.cached_property
    def total(self) -> Cost:
        """Of the whole program."""
        return sum((run.total for run in self.runs), Cost())

    def _walk(self, computation: Computation, times: int) -> Iterator[Run]:
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                trips = self._trips(instruction)
                for part in ("condition", "body"):
                    yield from self._walk(self._module.called(instruction, part), times * trips)
            elif instruction.opcode == "conditional":
                yield from self._costliest(instruction, times)
            elif instruction.opcode in ("call", "async-start"):
                for name in instruction.called:
                    yield from self._walk(self._module.computations[name], times)
            elif not _is_free(instruction):
                yield Run(instruction, times, self.cost(instruction))

    def _trips(self, loop: Instruction) -> int:
        if not self._loops:
            return 1
        trips = trip_count(self._module, loop)
        if trips is None:
            self.unknown_loops.append(loop.name)
        return 1 if trips is None else trips

    def _costliest(self, instruction: Instruction, times: int) -> list[Run]:
        branches = [
            list(self._walk(self._module.computations[n], times)) for n in instruction.called
        ]

        def size(runs):
            total = sum((run.total for run in runs), Cost())
            return (total.flops, total.bytes)

        return max(branches, key=size, default=[])

    def cost(self, instruction: Instruction) -> Cost:
        """Of one run of an instruction; a fusion's with what is in it."""
        read, written = self._traffic(instruction)
        return self._arithmetic(instruction) + Cost(read_bytes=read, written_bytes=written)

    def _arithmetic(self, instruction: Instruction) -> Cost:
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "fusion":
            inside = self._module.called(instruction, "calls").instructions.values()
            return sum((self._arithmetic(part) for part in inside), Cost())
        if opcode in ("dot", "convolution"):
            count = dot_flops if opcode == "dot" else convolution_flops
            return Cost(matrix_flops=count(self._module, instruction))
        if opcode in _MOVES or _is_free(instruction):
            return Cost()
        size = sum(array.elements for array in leaves(instruction.type))
        if opcode in _TRANSCENDENTAL:
            return Cost(transcendentals=size)
        if opcode in ("reduce", "reduce-window"):
            return self._reduction(instruction)
        if opcode == "sort":
            longest = max((a.elements for a in leaves(instruction.type)), default=1)
            return Cost(other_flops=longest * math.ceil(math.log2(max(longest, 2))))
        return Cost(other_flops=size)

    def _reduction(self, instruction: Instruction) -> Cost:
        """n numbers are reduced by n - 1 calls of the function, which may take pairs of several arrays at once."""
        result = next(leaves(instruction.type)).elements
        if instruction.opcode == "reduce":
            calls = next(leaves(self._module.operand(instruction, 0).type)).elements - result
        else:
            window = instruction.attribute("window") or ""
            calls = result * (math.prod(_window(window, "size", 1, default=1)) - 1)
        function = self._module.called(instruction, "to_apply").instructions.values()
        return sum((self._arithmetic(part) for part in function), Cost()).times(max(calls, 0))

    def _bytes(self, *kinds: Type) -> int:
        """Bytes of the arrays of types, those that lie in main memory."""
        arrays = (array for kind in kinds for array in leaves(kind))
        return sum(array.nbytes for array in arrays if self._on_chip or array.space == 0)

    def _traffic(self, instruction: Instruction) -> tuple[float, float]:
        """Bytes of main memory (read, written)."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "custom-call" and any(name in instruction.attributes for name in _NO_TRAFFIC):
            return 0, 0
        operands = [self._module.operand(instruction, i) for i in range(len(instruction.operands))]
        result = _result(instruction)
        if opcode == "fusion":
            inside = self._module.called(instruction, "calls")
            read = sum(
                self._read_of_parameter(inside, inside.parameters[number])
                for number, operand in enumerate(operands)
                if self._bytes(operand.type)
            )
            return read, self._written(inside, result)
        if opcode in _SLICES:
            # As much of the operand as there is of the result.
            read = _size(result) if self._bytes(operands[0].type) else 0
            return read, self._bytes(result)
        if opcode == "dynamic-update-slice":
            update = operands[1].type
            return self._bytes(update), _size(update) if self._bytes(result) else 0
        if opcode == "scatter":
            changed = _size(operands[-1].type) if self._bytes(result) else 0
            return self._bytes(*(operand.type for operand in operands[1:])) + changed, changed
        distinct = {operand.name: operand.type for operand in operands}.values()
        return self._bytes(*distinct), self._bytes(result)

    def _read_of_parameter(self, inside: Computation, value: Instruction) -> float:
        """What a fused computation reads of a parameter in main memory, or of another name for one."""
        whole = _size(value.type)
        read = 0.0
        for user in inside.users[value.name]:
            first = user.operands[0] == value.name and user.operands.count(value.name) == 1
            if user.opcode in _SLICES and first:
                read += _size(user.type)
            elif user.opcode == "dynamic-update-slice" and first:
                # In place: what is not updated stays where it is.
                continue
            elif user.opcode == "bitcast":
                read += self._read_of_parameter(inside, user)
            elif user.opcode == "fusion":
                nested = self._module.called(user, "calls")
                for number, name in enumerate(user.operands):
                    if name == value.name and _is_view(nested, number):
                        read += self._read_of_parameter(inside, user)
                    elif name == value.name:
                        read += self._read_of_parameter(nested, nested.parameters[number])
            elif not _is_handed_on(inside, user):
                return whole
        return min(read, whole)

    def _written(self, inside: Computation, result: Type) -> float:
        """What a fused computation writes of its result, whose type outside is `result`."""
        root = inside.root
        if _is_async(root):
            # A collective's start has (operand, result, flags ...), and its end hands on the result.
            return self._bytes(result[1]) if _START in root.attributes else 0
        if root.opcode != "tuple":
            return self._written_part(inside, root) if self._bytes(result) else 0
        parts = [inside.instructions[name] for name in root.operands]
        pairs = zip(parts, result, strict=True)
        return sum(self._written_part(inside, part) for part, out in pairs if self._bytes(out))

    def _written_part(self, inside: Computation, part: Instruction) -> float:
        whole = _size(part.type)
        while part.opcode == "bitcast":
            part = inside.instructions[part.operands[0]]
        if part.opcode == "parameter" or part.opcode in COLLECTIVES:
            # Handed on, or written by a collective that is under way beside the fusion's work.
            return 0
        if part.opcode == "dynamic-update-slice":
            return _size(self._module.operand(part, 1).type)
        if part.opcode == "fusion":
            nested = self._module.called(part, "calls")
            if nested.root.opcode != "tuple":
                return self._written_part(nested, nested.root)
        return whole


def _size(kind: Type) -> int:
    return sum(array.nbytes for array in leaves(kind))


def _is_async(instruction: Instruction) -> bool:
    """Whether it is the compiler's mark for the start or the end of a collective that runs beside other work."""
    return instruction.opcode == "custom-call" and _ASYNC in instruction.attributes


def _is_handed_on(inside: Computation, user: Instruction) -> bool:
    """Whether a fusion only hands on what `user` takes: to its result, or to a collective that another fusion started."""
    if user.opcode in COLLECTIVES:
        return not (_is_async(inside.root) and _START in inside.root.attributes)
    return _is_async(user) or (user.opcode == "tuple" and user is inside.root)


def _is_view(inside: Computation, number: int) -> bool:
    """Whether a fused computation does nothing but give a parameter another shape."""
    value = inside.root
    while value.opcode == "bitcast":
        value = inside.instructions[value.operands[0]]
    return value is inside.parameters[number]


def dot_flops(module: Module, dot: Instruction) -> float:
    """2 * elements of the result * length of the axes that are summed over."""
    left = module.operand(dot, 0).type
    summed = math.prod(left.dims[axis] for axis in dot.numbers("lhs_contracting_dims"))
    return 2.0 * dot.type.elements * summed


def convolution_flops(module: Module, convolution: Instruction) -> float:
    """2 * multiplications of a convolution, without the window's places in the padding or between dilated elements.

    TPUs compute all products of matrices as convolutions, those of a batch with a window over the batch's axis.
    """
    left, kernel = (next(leaves(module.operand(convolution, i).type)) for i in range(2))
    result = next(leaves(convolution.type))
    labels = convolution.attribute("dim_labels") or ""
    left_labels, kernel_labels, result_labels = split_labels(labels)
    spatial = sorted(label for label in left_labels if label.isdecimal())
    window = convolution.attribute("window") or ""
    count = len(spatial)
    sizes = _window(window, "size", count, default=1)
    strides = _window(window, "stride", count, default=1)
    pads = _window_pads(window, count)
    left_dilations = _window(window, "lhs_dilate", count, default=1)
    kernel_dilations = _window(window, "rhs_dilate", count, default=1)
    products = 1
    for axis, label in enumerate(spatial):
        length = left.dims[left_labels.index(label)]
        out = result.dims[result_labels.index(label)]
        dilated = (length - 1) * left_dilations[axis] + 1 if length else 0
        products *= _valid_places(
            out,
            sizes[axis],
            strides[axis],
            pads[axis],
            dilated,
            left_dilations[axis],
            kernel_dilations[axis],
        )
    groups = (convolution.numbers("batch_group_count") or (1,))[0]
    # The kernel's input features are those of one group already.
    features = kernel.dims[kernel_labels.index("i")]
    outputs = result.dims[result_labels.index("f")]
    batch = left.dims[left_labels.index("b")] // groups
    return 2.0 * products * features * outputs * batch


@functools.cache
def _valid_places(
    out: int, size: int, stride: int, pad: int, dilated: int, left_dilation: int, dilation: int
) -> int:
    """Pairs of a place of the result and one of the window that meet an element of the input."""
    if size == 1 and stride == left_dilation == 1 and pad == 0:
        return min(out, dilated)
    pairs = itertools.product(range(out), range(size))
    places = (at * stride - pad + inside * dilation for at, inside in pairs)
    return sum(0 <= place < dilated and place % left_dilation == 0 for place in places)


def split_labels(labels: str) -> tuple[str, str, str]:
    """The labels of input, kernel and result: "bf0_oi0->bf0" is ("bf0", "oi0", "bf0")."""
    inputs, result = labels.split("->")
    left, kernel = inputs.split("_")
    return left, kernel, result


def _window(window: str, field: str, count: int, default: int) -> list[int]:
    """The lengths of a field of a window: "{size=2x3 pad=0_0x1_1}" has the size [2, 3]."""
    for part in window.strip("{}").split():
        name, _, value = part.partition("=")
        if name == field:
            return [int(number) for number in value.split("x")]
    return [default] * count


def _window_pads(window: str, count: int) -> list[int]:
    """The padding before each axis."""
    for part in window.strip("{}").split():
        name, _, value = part.partition("=")
        if name == "pad":
            return [int(pair.split("_")[0]) for pair in value.split("x")]
    return [0] * count


def _is_free(instruction: Instruction) -> bool:
    return instruction.opcode in _FREE or instruction.opcode.endswith("-done")


def _result(instruction: Instruction) -> Type:
    """The type of what an instruction writes; the type of a `-start` lists operands and handles besides."""
    opcode, kind = instruction.opcode, instruction.type
    if opcode == "copy-start":
        return kind[0]
    has_operands = opcode.endswith("-start") and opcode != "all-reduce-start"
    return kind[1] if has_operands and not isinstance(kind, Array) else kind
