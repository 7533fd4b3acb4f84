"""TPU generations, what the services call them, and the config of a slice.

Names: "TPU software versions" of the Cloud TPU documentation (runtime versions), "Plan TPUs in GKE" of the GKE documentation
(node labels, chips of a host).
"""

import dataclasses
import math
import re

from scripts.launch.values import check_count, check_pattern
from sira_jax.errors import check


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the services call one kind of TPU.

    Attributes:
      type_prefix: of accelerator types, as in v5litepod-16.
      cores_per_chip: what the number in an accelerator type counts, per chip.
      gke_accelerator: the value of the node label cloud.google.com/gke-tpu-accelerator.
      runtime_version: software of a TPU VM for JAX.
      dimensions: of a topology.
      host_sizes: chips a host may have, smallest first; a host of 1 or 8 is a slice of its own.
    """

    type_prefix: str
    cores_per_chip: int
    gke_accelerator: str
    runtime_version: str
    dimensions: int
    host_sizes: tuple[int, ...]


GENERATIONS = {
    "v4": Generation("v4", 2, "tpu-v4-podslice", "tpu-ubuntu2204-base", 3, (4,)),
    "v5e": Generation("v5litepod", 1, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", 2, (1, 4, 8)),
    "v5p": Generation("v5p", 2, "tpu-v5p-slice", "v2-alpha-tpuv5", 3, (4,)),
    "v6e": Generation("v6e", 1, "tpu-v6e-slice", "v2-alpha-tpuv6e", 2, (1, 4, 8)),
}


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """The TPUs of gke, xpk and tpu_vm.

    Attributes:
      generation: one of GENERATIONS.
      topology: chips along each axis of a slice, as in 4x4 or 2x2x4.
      slices: slices of that topology, joined over the data centre's network (gke and xpk).
    """

    generation: str = "v5e"
    topology: str = "4x4"
    slices: int = 1

    def __post_init__(self):
        names = f"one of {', '.join(GENERATIONS)}"
        is_known = isinstance(self.generation, str) and self.generation in GENERATIONS
        check(is_known, "tpu.generation", self.generation, names)
        dimensions = self.kind.dimensions
        pattern = re.compile("x".join([r"[1-9]\d{0,2}"] * dimensions))
        allowed = f"{dimensions} numbers of chips for {self.generation}, as in {'x'.join('4' * dimensions)}"
        check_pattern("tpu.topology", self.topology, pattern, allowed, optional=False)
        check_count("tpu.slices", self.slices)
        whole = self.chips in self.kind.host_sizes or self.chips % 4 == 0
        check(whole, "tpu.topology", self.topology, "a multiple of 4 chips, or one host's")

    @property
    def kind(self) -> Generation:
        """The generation's names."""
        return GENERATIONS[self.generation]

    @property
    def chips(self) -> int:
        """Chips of one slice."""
        return math.prod(int(n) for n in self.topology.split("x"))

    @property
    def accelerator_type(self) -> str:
        """A slice's name by its size, as in v5litepod-16."""
        return f"{self.kind.type_prefix}-{self.chips * self.kind.cores_per_chip}"
